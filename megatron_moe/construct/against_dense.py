"""Compare the upcycled model with its source before the first step, by layer and by loss.

The source model runs on text, sharded like the run. The input of each FFN, or of each MoE layer of
a MoE source, also goes to the MoE layer with the same index, and their outputs are compared. As a
baseline for a dense source, the comparison includes the loss of the simplest construction: a random
split without rescaling.

Shape letters: s positions of this rank, D hidden_size, E experts, L layers, B = 1 sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_moe.config.moe import Upcycle
from megatron_moe.config.run import RunConfig
from megatron_moe.construct.measure import normalized, world_sum
from megatron_moe.data.batches import Batch, slice_for_context_parallel, validation_batches
from megatron_moe.data.texts import Texts
from megatron_moe.experts.from_source import source_config
from megatron_moe.experts.plan import make_expert_plan
from megatron_moe.hf.reader import SourceCheckpoint
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.model.build import Model, build_model
from megatron_moe.model.upcycle import upcycle
from megatron_moe.parallel.layout import ParallelLayout
from megatron_moe.runtime.engine import Engine
from megatron_moe.train.step import mean_loss

MAX_SEQUENCES = 16
"""Maximum number of sequences per domain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgainstDense:
    """Comparison of the MoE at step 0 with its source, dense or MoE."""

    text: str
    """``held-out``, or ``training`` if the run has no held-out text."""
    sequences: int
    loss_dense: float
    """Loss in nats per token, like the other losses."""
    loss_moe: float
    loss_split_random_unscaled: float | None
    """Loss of `split_random` with ``rescale`` none and the run's number of experts; None if the
    dense FFN is not divisible by it."""
    output_error: dict[int, float]
    """Norm of the difference between the outputs of the MoE layer and the dense layer on the same
    hidden states, relative to the dense output, by MoE layer."""
    busiest_expert: dict[int, float]
    """Load of the most chosen expert divided by the mean load, by MoE layer; 1 is perfect balance.
    Choices dropped by a capacity limit do not count."""

    def to_json(self) -> dict[str, Any]:
        """Return the values stored in receipt.json."""
        return asdict(self)

    def __str__(self) -> str:
        errors, unscaled = self.output_error.values(), self.loss_split_random_unscaled
        baseline = "" if unscaled is None else f", random split without rescale {unscaled:.4f}"
        return (
            f"loss on {self.text} text: source {self.loss_dense:.4f}, MoE {self.loss_moe:.4f}"
            f"{baseline}; output error per MoE layer {min(errors):.1e} to {max(errors):.1e}; "
            f"busiest expert up to {max(self.busiest_expert.values()):.2f} times the mean load"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonJob:
    """Configuration, layout and device of the models to compare."""

    config: RunConfig
    dense: SourceCheckpoint
    layout: ParallelLayout
    groups: ProcessGroupCollection
    rank: int
    engine: Engine

    def build(self, config: RunConfig) -> Model:
        """Build a model with ``config`` and fill it from the dense checkpoint."""
        model = build_model(
            config, self.dense.spec, layout=self.layout, groups=self.groups, rank=self.rank,
            engine=self.engine,
        )  # fmt: skip
        plan = make_expert_plan(self.dense.spec, config.moe, config.upcycle)
        upcycle(model, self.dense, plan, layout=self.layout, rank=self.rank)
        return model

    def loss(self, model: Model, batches: list[Batch]) -> float:
        """Return nats per token over the batches of all ranks, each with one sequence."""
        return mean_loss(
            model.modules, batches, source_config(self.config, self.dense.spec), model, self.groups
        )


def compare_layers_and_losses(job: ComparisonJob, moe: Model, texts: Texts) -> AgainstDense:
    """Compare the filled ``moe`` with the dense model; every rank returns the same result.

    Temporarily needs memory for the dense model, and then for another model of the run's shape.
    """
    batches, sequences = _batches(job, texts)
    dense_model = job.build(source_config(job.config, job.dense.spec))
    layers = _LayerComparison(moe, counted=[bool(batch.loss_mask_BS.any()) for batch in batches])
    layers.register_hooks(dense_model)
    cp = job.groups.cp
    slices = [slice_for_context_parallel(b, cp_rank=cp.rank(), cp_size=cp.size()) for b in batches]
    loss_dense = job.loss(dense_model, slices)
    del dense_model
    loss_moe = job.loss(moe, slices)
    baseline = unscaled_random_split(job.config, job.dense.spec, job.layout)
    output_error, busiest_expert = layers.result()
    return AgainstDense(
        text="held-out" if texts.validation else "training",
        sequences=sequences,
        loss_dense=loss_dense,
        loss_moe=loss_moe,
        loss_split_random_unscaled=job.loss(job.build(baseline), slices) if baseline else None,
        output_error=output_error,
        busiest_expert=busiest_expert,
    )


def unscaled_random_split(
    config: RunConfig, spec: ModelSpec, layout: ParallelLayout
) -> RunConfig | None:
    """Return the run's configuration with an unscaled random split of the dense FFN.

    Return None if sizes do not divide, or if the source is a MoE.
    """
    experts, dense_size = config.moe.num_moe_experts, spec.ffn_hidden_size
    if spec.experts is not None or dense_size % (experts * layout.experts.size("etp")):
        return None
    sizes = {
        "moe_ffn_hidden_size": dense_size // experts,
        "moe_shared_expert_intermediate_size": None,
    }
    upcycle = Upcycle(method="split_random", rescale="none", seed=config.upcycle.seed)
    moe = config.moe.model_copy(update=sizes)
    return config.model_copy(update={"moe": moe, "upcycle": upcycle})


def _batches(job: ComparisonJob, texts: Texts) -> tuple[list[Batch], int]:
    """Return this dp rank's sequences, one per batch, and the number of sequences on all ranks."""
    dp, most = job.groups.dp, min(MAX_SEQUENCES, job.config.data.validation_samples)
    batches, sequences = [], 0
    for text in (texts.validation or texts.training).values():
        sequences += min(most, text.num_chunks)
        batches += validation_batches(
            text, num_samples=most, micro_batch_size=1, dp_rank=dp.rank(), dp_size=dp.size()
        )
    return batches, sequences


@dataclass(slots=True)
class _LayerComparison:
    """Accumulates the output error and the router's choices of each MoE layer."""

    moe: Model
    counted: list[bool]
    """For each of this rank's sequences, whether it counts or is padding."""
    squares_L2: Tensor = field(init=False)
    """Sums of squares of the difference, and of the dense output."""
    chosen_LE: Tensor = field(init=False)
    _passed: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        layers, experts = self.moe.spec.num_layers, self.moe.transformer.num_moe_experts
        assert experts is not None
        self.squares_L2 = torch.zeros(layers, 2, dtype=torch.float64)
        self.chosen_LE = torch.zeros(layers, experts, dtype=torch.float64)

    def register_hooks(self, dense: Model) -> None:
        """Register hooks on the FFNs of ``dense`` whose layers are MoE layers in ``moe``."""
        for moe_chunk, dense_chunk in zip(self.moe.chunks, dense.chunks, strict=True):
            assert moe_chunk.layers == dense_chunk.layers
            routed: Any = moe_chunk.module.decoder
            plain: Any = dense_chunk.module.decoder
            pairs = zip(moe_chunk.layers, routed.layers, plain.layers, strict=True)
            for layer, moe_block, dense_block in pairs:
                if isinstance(moe_block.mlp, MoELayer):
                    dense_block.mlp.register_forward_hook(self._hook(layer, moe_block.mlp))

    def _hook(self, layer: int, moe: Any) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
            expected_sBD = output[0]
            x_sBD = normalized(args[0], module).to(args[0].dtype)
            routed: list[Tensor] = []
            handle = moe.router.register_forward_hook(
                lambda _, __, routing: routed.append(routing[0])
            )
            moe.eval()
            output_sBD = moe(x_sBD)[0]
            moe.train()
            handle.remove()
            index = self._passed.get(layer, 0)
            self._passed[layer] = index + 1
            if index < len(self.counted) and self.counted[index]:
                error, whole = (output_sBD - expected_sBD).double(), expected_sBD.double()
                self.squares_L2[layer] += torch.stack(
                    [error.square().sum(), whole.square().sum()]
                ).cpu()
                self.chosen_LE[layer] += (routed[0] > 0).double().sum(dim=0).cpu()

        return hook

    def result(self) -> tuple[dict[int, float], dict[int, float]]:
        """Return the relative error and the busiest expert's load by layer, over all ranks."""
        squares_L2, chosen_LE = world_sum(self.squares_L2), world_sum(self.chosen_LE)
        error_L = (squares_L2[:, 0] / squares_L2[:, 1]).sqrt().tolist()
        busiest_L = (chosen_LE.amax(dim=1) / chosen_LE.mean(dim=1)).tolist()
        routed = chosen_LE.sum(dim=1).nonzero()[:, 0].tolist()
        return {i: error_L[i] for i in routed}, {i: busiest_L[i] for i in routed}
