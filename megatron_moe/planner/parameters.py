"""Count parameters: of the whole model, active for one token, and held by each rank of a layout.

A rank's parameters are listed tensor by tensor, because Megatron-Core's gradient buffers align and
pad tensors, and because dense and expert parameters are replicated over different groups.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from megatron_moe.config.parts import ALL_TRAINED, Frozen, Part, Role
from megatron_moe.hf.names import ROW_OF_ROLE, parameter_part
from megatron_moe.parallel.shards import padded_vocabulary
from megatron_moe.parallel.stages import PipelineSplit, chunk_layers, is_first, is_last
from megatron_moe.planner.shape import MoeShape
from megatron_moe.planner.workload import Degrees


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """The shard of a parameter that a rank holds."""

    name: str
    numel: int
    expert: bool = False
    """Whether the parameter belongs to an expert, and is replicated over edp instead of dp x cp."""

    @property
    def part(self) -> Part:
        """Role of the parameter in settings, and its layer."""
        return parameter_part(self.name)


def total_parameters(shape: MoeShape, *, frozen: Frozen = ALL_TRAINED) -> int:
    """Return the number of parameters of the whole model, without vocabulary padding.

    Frozen parameters are left out.
    """
    dense, experts = trained_parameters(shape, Degrees(gpus=1), pp_rank=0, frozen=frozen)
    return dense + experts


def active_parameters(shape: MoeShape) -> int:
    """Return the number of parameters that one token uses: all but the experts not selected.

    Embedding and output layer both count, as in the 13.7B of Llama-3-8B E8T2.
    """
    idle = shape.num_moe_experts - shape.moe_router_topk
    return total_parameters(shape) - shape.num_moe_layers * idle * _expert_numel(shape)


def rank_tensors(shape: MoeShape, degrees: Degrees, *, pp_rank: int) -> list[list[LocalTensor]]:
    """Return all parameters of one rank, by model chunk, in Megatron-Core's module order.

    All ranks of a pipeline stage hold slices of equal size, so the pp coordinate is sufficient. If
    pp > 1, a tied output layer is a copy on the last stage, as in Megatron-Core.
    """
    return [
        chunk_tensors(shape, degrees, pp_rank=pp_rank, vpp_rank=vpp_rank)
        for vpp_rank in range(degrees.vpp)
    ]


def rank_parameters(shape: MoeShape, degrees: Degrees, *, pp_rank: int) -> tuple[int, int]:
    """Return the numbers of dense and of expert parameters on a rank of stage ``pp_rank``.

    Computes the sum of `rank_tensors` in closed form, because a search needs it thousands of times.
    """
    layers = rank_layers(shape, degrees, pp_rank=pp_rank)
    routed = len(shape.moe_layers.intersection(layers))
    d, tp = shape.hidden_size, degrees.tp
    qkv = (shape.query_width + 2 * shape.kv_width) // tp
    attention = d * (qkv + shape.query_width // tp + 2) + qkv * shape.qkv_bias
    attention += sum(shape.qk_norm_sizes(tp))
    attention += sum(attention_adapters(shape, tp).values())
    router = sum(shape.router_sizes.values()) + d * shape.shared_expert_gate
    dense = len(layers) * attention
    dense += routed * (router + 3 * d * (shape.shared_expert_size // tp))
    dense += (len(layers) - routed) * 3 * d * (shape.ffn_hidden_size // tp)
    vocabulary = padded_vocabulary(shape.vocab_size, tp) // tp * d
    dense += vocabulary * (pp_rank == 0)
    if pp_rank == degrees.pp - 1:
        dense += d + vocabulary * (not shape.tied_embeddings or degrees.pp > 1)
    local = shape.num_moe_experts // degrees.ep
    adapters = sum(expert_adapters(shape, degrees.etp).values())
    experts = routed * local * (3 * d * (shape.moe_ffn_hidden_size // degrees.etp) + adapters)
    return dense, experts


def rank_layers(shape: MoeShape, degrees: Degrees, *, pp_rank: int) -> tuple[int, ...]:
    """Return the ids of the layers of all chunks of a pipeline rank."""
    return _rank_layers(shape.num_layers, degrees.pp, degrees.vpp, degrees.split, pp_rank)


@lru_cache(maxsize=4096)  # a search asks for the same few, tens of thousands of times
def _rank_layers(
    num_layers: int, pp: int, vpp: int, split: PipelineSplit, pp_rank: int
) -> tuple[int, ...]:
    position = {"num_layers": num_layers, "pp": pp, "vpp": vpp, "pp_rank": pp_rank}
    chunks = (chunk_layers(**position, split=split, vpp_rank=chunk) for chunk in range(vpp))
    return tuple(layer for chunk in chunks for layer in chunk)


def trained_parameters(
    shape: MoeShape, degrees: Degrees, *, pp_rank: int, frozen: Frozen = ALL_TRAINED
) -> tuple[int, int]:
    """Return `rank_parameters` without those that are frozen."""
    dense, experts = rank_parameters(shape, degrees, pp_rank=pp_rank)
    if not frozen:
        return dense, experts
    left_out = {False: 0, True: 0}  # of all others, and of experts
    vocabulary = padded_vocabulary(shape.vocab_size, degrees.tp) // degrees.tp * shape.hidden_size
    if "embeddings" in frozen:
        copies = (pp_rank == 0) + (
            pp_rank == degrees.pp - 1 and (not shape.tied_embeddings or degrees.pp > 1)
        )
        left_out[False] += vocabulary * copies
    if "norms" in frozen and pp_rank == degrees.pp - 1:
        left_out[False] += shape.hidden_size
    layers = rank_layers(shape, degrees, pp_rank=pp_rank)
    for routes in (True, False):
        alike = [layer for layer in layers if (layer in shape.moe_layers) == routes]
        if alike:
            for (role, expert), numel in _sizes_by_role(
                shape, degrees.tp, degrees.ep, degrees.etp, alike[0]
            ).items():
                left_out[expert] += numel * (len(alike) - frozen.trained(role, alike))
    return dense - left_out[False], experts - left_out[True]


@lru_cache(maxsize=4096)
def _sizes_by_role(
    shape: MoeShape, tp: int, ep: int, etp: int, layer: int
) -> Counter[tuple[Role, bool]]:
    """Return the parameters of one layer on a rank, by role and whether they are an expert's."""
    sizes: Counter[tuple[Role, bool]] = Counter()
    degrees = Degrees(gpus=tp * ep * etp, tp=tp, ep=ep, etp=etp)
    for tensor in layer_tensors(shape, degrees, layer=layer):
        sizes[tensor.part.role, tensor.expert] += tensor.numel
    return sizes


def chunk_tensors(
    shape: MoeShape, degrees: Degrees, *, pp_rank: int = 0, vpp_rank: int = 0
) -> list[LocalTensor]:
    """Return the parameters of one model chunk of one rank, in module order."""
    rows = padded_vocabulary(shape.vocab_size, degrees.tp) // degrees.tp
    vocabulary = rows * shape.hidden_size
    tensors: list[LocalTensor] = []
    if is_first(pp_rank=pp_rank, vpp_rank=vpp_rank):
        tensors.append(LocalTensor("embedding.word_embeddings.weight", vocabulary))
    layers = chunk_layers(
        num_layers=shape.num_layers,
        pp=degrees.pp,
        vpp=degrees.vpp,
        split=degrees.split,
        pp_rank=pp_rank,
        vpp_rank=vpp_rank,
    )
    for layer in layers:
        tensors += layer_tensors(shape, degrees, layer=layer)
    if is_last(pp=degrees.pp, vpp=degrees.vpp, pp_rank=pp_rank, vpp_rank=vpp_rank):
        tensors.append(LocalTensor("decoder.final_layernorm.weight", shape.hidden_size))
        if not shape.tied_embeddings or degrees.pp > 1:
            tensors.append(LocalTensor("output_layer.weight", vocabulary))
    return tensors


def layer_tensors(shape: MoeShape, degrees: Degrees, *, layer: int) -> list[LocalTensor]:
    """Return the parameters of one layer on one rank."""
    prefix, d, tp = f"decoder.layers.{layer}.", shape.hidden_size, degrees.tp
    qkv = (shape.query_width + 2 * shape.kv_width) // tp
    adapters = attention_adapters(shape, tp)
    sizes = {
        "input_layernorm.weight": d * (not shape.post_norms),
        "self_attention.linear_proj.weight": d * shape.query_width // tp,
        "self_attention.linear_proj.adapter.linear_in.weight": adapters["proj_in"],
        "self_attention.linear_proj.adapter.linear_out.weight": adapters["proj_out"],
        "self_attention.linear_qkv.weight": d * qkv,
        "self_attention.linear_qkv.bias": qkv * shape.qkv_bias,
        "self_attention.linear_qkv.adapter.linear_in.weight": adapters["qkv_in"],
        "self_attention.linear_qkv.adapter.linear_out.weight": adapters["qkv_out"],
        "self_attention.q_layernorm.weight": shape.qk_norm_sizes(tp)[0],
        "self_attention.k_layernorm.weight": shape.qk_norm_sizes(tp)[1],
        "self_attn_bda.norm.weight": d * shape.post_norms,
        "pre_mlp_layernorm.weight": d * (not shape.post_norms),
    }
    experts: dict[str, int] = {}
    shared: dict[str, int] = {}
    if layer in shape.moe_layers:
        neurons = shape.moe_ffn_hidden_size // degrees.etp
        sizes |= {f"mlp.router.{name}": numel for name, numel in shape.router_sizes.items()}
        for expert in range(shape.num_moe_experts // degrees.ep):
            experts[f"mlp.experts.linear_fc1.weight{expert}"] = 2 * neurons * d
            experts[f"mlp.experts.linear_fc2.weight{expert}"] = neurons * d
            for row, numel in expert_adapters(shape, degrees.etp).items():
                (template,) = ROW_OF_ROLE[row].megatron
                name = template.format(layer=layer, expert=expert).removeprefix(prefix)
                experts |= {name: numel} if numel else {}
        shared = _ffn("mlp.shared_experts.", d, shape.shared_expert_size // tp)
        shared["mlp.shared_experts.gate_weight"] = d * shape.shared_expert_gate
    else:
        sizes |= _ffn("mlp.", d, shape.ffn_hidden_size // tp)
    return [
        *(LocalTensor(prefix + name, numel) for name, numel in sizes.items() if numel),
        *(LocalTensor(prefix + name, numel, expert=True) for name, numel in experts.items()),
        *(LocalTensor(prefix + name, numel) for name, numel in shared.items() if numel),
        *([LocalTensor(f"{prefix}mlp_bda.norm.weight", d)] if shape.post_norms else []),
    ]


def attention_adapters(shape: MoeShape, tp: int) -> dict[str, int]:
    """Return the parameters of a layer's attention adapters on one of ``tp`` ranks, by row."""
    rank, d = shape.adapter_rank("attention"), shape.hidden_size
    return {
        "proj_in": rank * shape.query_width // tp,
        "proj_out": rank * d,
        "qkv_in": rank * d,
        "qkv_out": rank * (shape.query_width + 2 * shape.kv_width) // tp,
    }


def expert_adapters(shape: MoeShape, etp: int) -> dict[str, int]:
    """Return the parameters of an expert's adapters on one of ``etp`` ranks, by row."""
    rank, d = shape.adapter_rank("experts"), shape.hidden_size
    neurons = shape.moe_ffn_hidden_size // etp
    return {
        "expert_fc1_in": rank * d,
        "expert_fc1_out": rank * 2 * neurons,
        "expert_fc2_in": rank * neurons,
        "expert_fc2_out": rank * d,
    }


def _ffn(prefix: str, hidden_size: int, neurons: int) -> dict[str, int]:
    return {
        f"{prefix}linear_fc1.weight": 2 * neurons * hidden_size,
        f"{prefix}linear_fc2.weight": neurons * hidden_size,
    }


def _expert_numel(shape: MoeShape) -> int:
    adapters = sum(expert_adapters(shape, 1).values())
    return 3 * shape.hidden_size * shape.moe_ffn_hidden_size + adapters
