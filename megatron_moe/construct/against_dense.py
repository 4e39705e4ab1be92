"""What upcycling did to the dense model: layer by layer and in loss, before the first step.

The dense model runs on text, sharded as the run is; each of its FFNs hands its input to the MoE
layer of the same number too, and their outputs are compared. Beside the losses of both stands that
of the crudest construction, a random split whose output is not scaled.

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

from megatron_moe.config.judging import dense_config
from megatron_moe.config.run import RunConfig, Upcycle
from megatron_moe.construct.measure import normalised, world_sum
from megatron_moe.data.batches import Batch, slice_for_context_parallel, validation_batches
from megatron_moe.data.texts import Texts
from megatron_moe.experts.plan import make_expert_plan
from megatron_moe.hf.reader import DenseCheckpoint
from megatron_moe.model.build import Model, build_model
from megatron_moe.model.upcycle import upcycle
from megatron_moe.parallel.layout import ParallelLayout
from megatron_moe.runtime.engine import Engine
from megatron_moe.train.step import mean_loss

MAX_SEQUENCES = 16
"""Of each domain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgainstDense:
    """The MoE beside the dense model it was made of, at step 0."""

    text: str
    """Which text: held out, or training where nothing is."""
    sequences: int
    loss_dense: float
    """Nats per token, as the other losses."""
    loss_moe: float
    loss_split_random_unscaled: float | None
    """Of `split_random` with ``rescale`` none and the run's experts; None where the dense FFN does
    not divide among them."""
    output_error: dict[int, float]
    """By MoE layer: norm of the difference of the MoE layer's output and the dense layer's on the
    same hidden states, relative to the latter."""
    busiest_expert: dict[int, float]
    """By MoE layer: choices of the most chosen expert, over the mean; 1 is perfect balance. Choices
    that a capacity limit drops are not in it."""

    def to_json(self) -> dict[str, Any]:
        """As receipt.json holds it."""
        return asdict(self)

    def __str__(self) -> str:
        errors, unscaled = self.output_error.values(), self.loss_split_random_unscaled
        crude = "" if unscaled is None else f", random split without rescale {unscaled:.4f}"
        return (
            f"loss on {self.text} text: dense {self.loss_dense:.4f}, MoE {self.loss_moe:.4f}"
            f"{crude}; output error of a MoE layer {min(errors):.1e} to {max(errors):.1e}; busiest "
            f"expert up to {max(self.busiest_expert.values()):.2f} times its share"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparing:
    """Where the models of a comparison live."""

    config: RunConfig
    dense: DenseCheckpoint
    layout: ParallelLayout
    groups: ProcessGroupCollection
    rank: int
    engine: Engine

    def built(self, config: RunConfig) -> Model:
        """Another model of the same checkpoint, filled."""
        model = build_model(
            config, self.dense.spec, layout=self.layout, groups=self.groups, rank=self.rank,
            engine=self.engine,
        )  # fmt: skip
        plan = make_expert_plan(self.dense.spec, config.moe, config.upcycle)
        upcycle(model, self.dense, plan, layout=self.layout, rank=self.rank)
        return model

    def loss(self, model: Model, batches: list[Batch]) -> float:
        """Nats per token over all ranks' batches, each of one sequence."""
        return mean_loss(model.modules, batches, dense_config(self.config), model, self.groups)


def compare_layers_and_losses(job: Comparing, moe: Model, texts: Texts) -> AgainstDense:
    """Compare the filled ``moe`` with the dense model; every rank returns the same.

    Costs a second model and then a third of the run's shape for a moment.
    """
    batches, sequences = _batches(job, texts)
    dense_model = job.built(dense_config(job.config))
    layers = _Layers(moe, counted=[bool(batch.loss_mask_BS.any()) for batch in batches])
    layers.listen(dense_model)
    cp = job.groups.cp
    mine = [slice_for_context_parallel(b, cp_rank=cp.rank(), cp_size=cp.size()) for b in batches]
    loss_dense = job.loss(dense_model, mine)
    del dense_model
    loss_moe = job.loss(moe, mine)
    crude = unscaled_random_split(job.config, job.dense.spec.ffn_hidden_size, job.layout)
    output_error, busiest_expert = layers.result()
    return AgainstDense(
        text="held-out" if texts.validation else "training",
        sequences=sequences,
        loss_dense=loss_dense,
        loss_moe=loss_moe,
        loss_split_random_unscaled=job.loss(job.built(crude), mine) if crude else None,
        output_error=output_error,
        busiest_expert=busiest_expert,
    )


def unscaled_random_split(
    config: RunConfig, dense_size: int, layout: ParallelLayout
) -> RunConfig | None:
    """The run with each neuron in one expert and no factor; None where it does not divide."""
    experts = config.moe.num_moe_experts
    if dense_size % (experts * layout.experts.size("etp")):
        return None
    sizes = {
        "moe_ffn_hidden_size": dense_size // experts,
        "moe_shared_expert_intermediate_size": None,
    }
    upcycle = Upcycle(method="split_random", rescale="none", seed=config.upcycle.seed)
    moe = config.moe.model_copy(update=sizes)
    return config.model_copy(update={"moe": moe, "upcycle": upcycle})


def _batches(job: Comparing, texts: Texts) -> tuple[list[Batch], int]:
    """This dp rank's sequences, one a batch, and how many there are on all."""
    dp, most = job.groups.dp, min(MAX_SEQUENCES, job.config.data.validation_samples)
    batches, sequences = [], 0
    for text in (texts.validation or texts.training).values():
        sequences += min(most, text.num_chunks)
        batches += validation_batches(
            text, num_samples=most, micro_batch_size=1, dp_rank=dp.rank(), dp_size=dp.size()
        )
    return batches, sequences


@dataclass(slots=True)
class _Layers:
    """Adds up, by MoE layer, what its output is off by and whom its router chooses."""

    moe: Model
    counted: list[bool]
    """Of each of this rank's sequences, whether it is one, or only fills a round."""
    squares_L2: Tensor = field(init=False)
    """Of the difference, and of the dense output."""
    chosen_LE: Tensor = field(init=False)
    _passed: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        layers, experts = self.moe.spec.num_layers, self.moe.transformer.num_moe_experts
        assert experts is not None
        self.squares_L2 = torch.zeros(layers, 2, dtype=torch.float64)
        self.chosen_LE = torch.zeros(layers, experts, dtype=torch.float64)

    def listen(self, dense: Model) -> None:
        """Follow the FFNs of ``dense`` whose layers are MoE layers."""
        for ours, theirs in zip(self.moe.chunks, dense.chunks, strict=True):
            assert ours.layers == theirs.layers
            routed: Any = ours.module.decoder
            plain: Any = theirs.module.decoder
            for layer, block, other in zip(ours.layers, routed.layers, plain.layers, strict=True):
                if isinstance(block.mlp, MoELayer):
                    other.mlp.register_forward_hook(self._hook(layer, block.mlp))

    def _hook(self, layer: int, moe: Any) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
            expected_sBD = output[0]
            x_sBD = normalised(args[0], module).to(args[0].dtype)
            routed: list[Tensor] = []
            listening = moe.router.register_forward_hook(
                lambda _, __, routing: routed.append(routing[0])
            )
            moe.eval()
            found_sBD = moe(x_sBD)[0]
            moe.train()
            listening.remove()
            index = self._passed.get(layer, 0)
            self._passed[layer] = index + 1
            if index < len(self.counted) and self.counted[index]:
                off, whole = (found_sBD - expected_sBD).double(), expected_sBD.double()
                self.squares_L2[layer] += torch.stack(
                    [off.square().sum(), whole.square().sum()]
                ).cpu()
                self.chosen_LE[layer] += (routed[0] > 0).double().sum(dim=0).cpu()

        return hook

    def result(self) -> tuple[dict[int, float], dict[int, float]]:
        """Relative error and share of the busiest expert, by layer, over all ranks."""
        squares_L2, chosen_LE = world_sum(self.squares_L2), world_sum(self.chosen_LE)
        error_L = (squares_L2[:, 0] / squares_L2[:, 1]).sqrt().tolist()
        busiest_L = (chosen_LE.amax(dim=1) / chosen_LE.mean(dim=1)).tolist()
        routed = chosen_LE.sum(dim=1).nonzero()[:, 0].tolist()
        return {i: error_L[i] for i in routed}, {i: busiest_L[i] for i in routed}
