"""Predict the seconds that one micro-batch spends in one layer on one rank, by part.

The parts follow Megatron-Core's order: norm, attention under tp with sequence parallelism and cp,
norm, router, all-to-all over ep, all-gather over etp, experts, and back. ``shape.py`` lists the
shape letters.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.parts import Role
from megatron_moe.planner.activations import local_tokens
from megatron_moe.planner.calibration import Calibration
from megatron_moe.planner.hardware import Gpu
from megatron_moe.planner.kernels import ZERO, Kernels, Seconds
from megatron_moe.planner.network import Links, group_of
from megatron_moe.planner.shape import MoeShape
from megatron_moe.planner.workload import Degrees, Workload

Parts = dict[str, Seconds]
"""Time by part: gemm, attention, memory (element-wise kernels), tp, cp, ep, etp, overhead."""

DENSE_LAYER_OVERHEAD = 0.3
"""Overhead of a dense layer as a fraction of that of an MoE layer."""

EXPOSED = 0.3
"""Fraction of overlapped communication that remains exposed."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A GPU model with the constants of the time model."""

    gpu: Gpu
    calibration: Calibration

    @property
    def links(self) -> Links:
        """The GPU's links with the calibrated efficiency."""
        return Links(self.gpu, self.calibration.link_efficiency)


def layer_seconds(
    shape: MoeShape, work: Workload, degrees: Degrees, machine: Machine, *, routes: bool
) -> Parts:
    """Return the time of one layer by part; ``routes`` selects an MoE layer."""
    kernels = Kernels(machine.gpu, machine.calibration, work.bytes_per_value, work.engine)
    attention = _attention(shape, work, degrees, kernels, machine.links)
    if routes:
        ffn = _experts(shape, work, degrees, kernels, machine.links)
    else:
        ffn = _ffn("dense_ffn", shape.ffn_hidden_size, shape, work, degrees, kernels, machine.links)
    overhead = machine.calibration.layer_overhead_seconds * (1 if routes else DENSE_LAYER_OVERHEAD)
    ffn["overhead"] = Seconds(overhead / 3, overhead * 2 / 3)
    return total([attention, ffn, _recomputed(shape, work, degrees, kernels, attention, ffn)])


def _recomputed(
    shape: MoeShape,
    work: Workload,
    degrees: Degrees,
    kernels: Kernels,
    attention: Parts,
    ffn: Parts,
) -> Parts:
    """Return the time of the forward work that the backward pass recomputes."""
    if work.recompute == "none":
        return {}
    if work.recompute == "full":
        return {name: Seconds(0.0, s.forward) for name, s in total([attention, ffn]).items()}
    tokens = local_tokens(shape, work, degrees)
    norm = kernels.elementwise(tokens.sequence_parallel * shape.hidden_size, forward=0, backward=2)
    if work.recompute == "moe":
        return total([{name: Seconds(0.0, s.forward) for name, s in ffn.items()}, {"memory": norm}])
    neurons = tokens.expert_rows * shape.moe_ffn_hidden_size / degrees.etp
    return {"memory": norm + norm + kernels.elementwise(neurons, forward=0, backward=3)}


def total(parts: list[Parts]) -> Parts:
    """Add times part by part."""
    summed: Parts = {}
    for times in parts:
        for name, seconds in times.items():
            summed[name] = summed[name] + seconds if name in summed else seconds
    return summed


def _attention(
    shape: MoeShape, work: Workload, degrees: Degrees, kernels: Kernels, links: Links
) -> Parts:
    """Return the time of attention, including both norms and both residual additions."""
    d, tp, cp = shape.hidden_size, degrees.tp, degrees.cp
    tokens = local_tokens(shape, work, degrees).gathered
    qkv = (shape.query_width + 2 * shape.kv_width) // tp
    core = kernels.attention(
        work.micro_batch_size, work.sequence_length / cp, work.sequence_length,
        shape.query_width / tp,
    )  # fmt: skip
    # Norms and additions read or write the residual stream 2 x 5 times forward, 2 x 6 backward;
    # the rotary embedding reads and writes queries and keys, three times without fusion.
    passes = 6 if work.engine == "torch" else 2
    stream = kernels.elementwise(tokens / tp * d, forward=10, backward=12)
    rotary = kernels.elementwise(
        tokens * (shape.query_width / tp + shape.kv_width_of_rank(tp)),
        forward=passes,
        backward=passes,
    )
    trained = shape.trained_share("attention", work.frozen)
    attention = {
        "gemm": kernels.linear(tokens, d, qkv, trained=trained)
        + kernels.linear(tokens, shape.query_width // tp, d, trained=trained),
        "attention": core,
        "memory": stream + rotary,
        "tp": _sequence_parallel(tokens * d, work, degrees, links)
        + _shared_groups(tokens, shape, work, degrees, links),
        "cp": _exchange_kv(shape, work, degrees, links, attention=core),
    }
    return total([attention, _attention_adapters(shape, work, degrees, kernels, links)])


def _attention_adapters(
    shape: MoeShape, work: Workload, degrees: Degrees, kernels: Kernels, links: Links
) -> Parts:
    """Return the time of attention's adapters, and of adding their output."""
    rank, d, tp = shape.adapter_rank("attention"), shape.hidden_size, degrees.tp
    if not rank:
        return {}
    tokens = local_tokens(shape, work, degrees)
    heads, qkv = shape.query_width // tp, (shape.query_width + 2 * shape.kv_width) // tp
    trained = shape.trained_share("adapters", work.frozen)
    products = (
        (tokens.sequence_parallel, d, rank),
        (tokens.gathered, rank, qkv),
        (tokens.gathered, heads, rank),
        (tokens.sequence_parallel, rank, d),
    )
    once = links.gather(group_of("tp", degrees), tokens.gathered * rank * work.bytes_per_value)
    added = tokens.gathered * qkv + tokens.sequence_parallel * d
    return {
        "gemm": sum((kernels.linear(*sizes, trained=trained) for sizes in products), ZERO),
        "memory": kernels.elementwise(added, forward=3, backward=0),
        "tp": Seconds(2 * once, 2 * once),
    }


def _experts(
    shape: MoeShape, work: Workload, degrees: Degrees, kernels: Kernels, links: Links
) -> Parts:
    d, neurons = shape.hidden_size, shape.moe_ffn_hidden_size // degrees.etp
    local = shape.num_moe_experts // degrees.ep
    rows = local_tokens(shape, work, degrees).expert_rows
    received = rows / degrees.etp
    exchange = links.all_to_all(group_of("ep", degrees), received * d * work.bytes_per_value)
    gather = links.gather(group_of("etp", degrees), rows * d * work.bytes_per_value)
    # Permute and unpermute make 3.5 passes over the rows. With several local experts, sorting
    # chunks by expert and back makes 4 more. The backward pass makes as many.
    permute = kernels.elementwise(received * d, forward=3.5, backward=3.5)
    if local > 1:
        permute += kernels.elementwise(rows * d, forward=4, backward=4)
    # The torch engine recomputes the activation in the backward pass, and writes it.
    swiglu = 6 if work.engine == "torch" else 5
    shared = {}
    if shape.shared_expert_size:
        shared = _ffn(
            "shared_experts", shape.shared_expert_size, shape, work, degrees, kernels, links
        )
    dispatch = _overlapped(Seconds(2 * exchange, 2 * exchange), behind=shared.get("gemm", ZERO))
    trained = shape.trained_share("experts", work.frozen)
    routed = {
        "gemm": kernels.grouped(rows, d, 2 * neurons, copies=local, trained=trained)
        + kernels.grouped(rows, neurons, d, copies=local, trained=trained),
        "memory": permute + kernels.elementwise(rows * neurons, forward=3, backward=swiglu),
        "ep": dispatch,
        "etp": Seconds(2 * gather, 2 * gather),
    }
    return total([routed, shared, _expert_adapters(rows, shape, work, degrees, kernels)])


def _expert_adapters(
    rows: float, shape: MoeShape, work: Workload, degrees: Degrees, kernels: Kernels
) -> Parts:
    """Return the time of the adapters of a rank's experts, and of adding their output."""
    rank, d = shape.adapter_rank("experts"), shape.hidden_size
    if not rank:
        return {}
    copies, neurons = shape.num_moe_experts // degrees.ep, shape.moe_ffn_hidden_size // degrees.etp
    trained = shape.trained_share("adapters", work.frozen)
    sizes = ((d, rank), (rank, 2 * neurons), (neurons, rank), (rank, d))
    products = (kernels.grouped(rows, *one, copies=copies, trained=trained) for one in sizes)
    return {
        "gemm": sum(products, ZERO),
        "memory": kernels.elementwise(rows * (2 * neurons + d), forward=3, backward=0),
    }


def _ffn(
    role: Role,
    neurons: int,
    shape: MoeShape,
    work: Workload,
    degrees: Degrees,
    kernels: Kernels,
    links: Links,
) -> Parts:
    """Return the time of a SwiGLU under tp: the FFN of a dense layer, or the shared expert."""
    d, local = shape.hidden_size, neurons // degrees.tp
    trained = shape.trained_share(role, work.frozen)
    tokens = local_tokens(shape, work, degrees).gathered
    return {
        "gemm": kernels.linear(tokens, d, 2 * local, trained=trained)
        + kernels.linear(tokens, local, d, trained=trained),
        "memory": kernels.elementwise(tokens * local, forward=3, backward=5),
        "tp": _sequence_parallel(tokens * d, work, degrees, links),
    }


def ffn_seconds(
    neurons: int, shape: MoeShape, work: Workload, degrees: Degrees, machine: Machine
) -> Seconds:
    """Return the time of one dense FFN of this size, all parts together."""
    kernels = Kernels(machine.gpu, machine.calibration, work.bytes_per_value, work.engine)
    parts = _ffn("dense_ffn", neurons, shape, work, degrees, kernels, machine.links)
    return sum(parts.values(), ZERO)


def _sequence_parallel(values: float, work: Workload, degrees: Degrees, links: Links) -> Seconds:
    """Return the exposed time of sequence parallelism's collectives.

    The forward pass has an all-gather and a reduce-scatter. The backward pass gathers the output's
    gradient, and overlaps two collectives with products: the input is gathered again during the
    product of the input's gradient, and that gradient is scattered during the product of the
    weight's (Megatron-Core, tensor_parallel/layers.py). ``tp_comm_overlap`` overlaps the others.
    """
    once = links.gather(group_of("tp", degrees), values * work.bytes_per_value)
    alone = EXPOSED if work.tp_comm_overlap else 1.0
    return Seconds(2 * alone * once, (alone + 2 * EXPOSED) * once)


def _shared_groups(
    tokens: float, shape: MoeShape, work: Workload, degrees: Degrees, links: Links
) -> Seconds:
    """Return the time of gathering the fused projection if several tp ranks share a query group.

    Its gradient is scattered in the backward pass. Nothing overlaps with either.
    """
    if degrees.tp <= shape.num_query_groups:
        return ZERO
    fused = tokens * (shape.query_width + 2 * shape.kv_width) * work.bytes_per_value
    once = links.gather(group_of("tp", degrees), fused)
    return Seconds(once, once)


def _exchange_kv(
    shape: MoeShape, work: Workload, degrees: Degrees, links: Links, *, attention: Seconds
) -> Seconds:
    """Return the exposed time of sending keys and values around the cp ring.

    The backward pass sends their gradients too. Attention hides most of it.
    """
    kv_bytes = 2 * shape.kv_width_of_rank(degrees.tp) * work.bytes_per_value
    kv_bytes *= work.sequence_length * work.micro_batch_size
    once = links.gather(group_of("cp", degrees), kv_bytes)
    return _overlapped(Seconds(once, 2 * once), behind=attention)


def _overlapped(communication: Seconds, *, behind: Seconds) -> Seconds:
    """Return the exposed part of communication that overlaps with the computation ``behind``."""
    if behind is ZERO:
        return communication
    return Seconds(
        max(EXPOSED * communication.forward, communication.forward - behind.forward),
        max(EXPOSED * communication.backward, communication.backward - behind.backward),
    )
