"""Score the experts of a MoE source on text: load, REAP and utility, in one pass.

A hook on the experts of each layer sees the output of every choice, times its combine weight. Sums
over choices are load (their number), REAP (the norm of that output, of which the mean counts, arXiv
2510.13999), and utility (its product with the gradient of the loss, which is the change of the loss
if this choice was left out, to first order).

Shape letters: T choices of this rank's experts, D hidden_size, E experts on this rank, O experts of
the source, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from numpy.typing import NDArray
from torch import Tensor

from megatron_moe.config.run import RunConfig
from megatron_moe.construct.measure import Progress, batches_of, rounds, world_sum
from megatron_moe.construct.partial import PartialFiles
from megatron_moe.data.samples import Text
from megatron_moe.errors import ConfigError, nearest_multiples
from megatron_moe.model.build import Model
from megatron_moe.train.step import run_schedule

LOAD, NORM, UTILITY = range(3)


@dataclass(slots=True)
class ExpertMeasurement:
    """One pass over a MoE model, on one rank."""

    model: Model
    """Filled source model; its weights are frozen by this class."""
    config: RunConfig
    """Configuration of the source model."""
    texts: list[Text]
    groups: ProcessGroupCollection
    gradients: bool
    """Whether utility is measured, which takes a backward pass."""
    sums_LO3: Tensor = field(init=False)

    def __post_init__(self) -> None:
        spec, samples = self.model.spec, self.config.measure.samples
        assert spec.experts is not None
        each = self.groups.dp.size() * self.groups.pp.size()
        if samples % each:
            raise ConfigError(
                f"measure.samples ({samples}) must be divisible by dp * pp ({each}) to measure "
                "experts: each rank counts the tokens of all ranks that send it some, so every "
                "rank must have a sequence in every round.\n"
                f"  nearest measure.samples: {nearest_multiples(samples, each)}"
            )
        size = (spec.num_layers, spec.experts.num_moe_experts, 3)
        self.sums_LO3 = torch.zeros(size, dtype=torch.float64)
        for chunk in self.model.chunks:
            decoder: Any = chunk.module.decoder
            for layer, block in zip(chunk.layers, decoder.layers, strict=True):
                if isinstance(block.mlp, MoELayer):
                    experts: Any = block.mlp.experts
                    experts.register_forward_hook(self._hook(layer))
            for name, parameter in chunk.module.named_parameters():
                parameter.requires_grad_("word_embeddings" in name)  # starts the graph

    def run(self, partial: PartialFiles, progress: Progress) -> None:
        """Run the pass, resuming from ``partial``."""
        each = list(rounds(self.config.measure.samples, self.groups))
        sums = {"experts": self.sums_LO3}
        for index in range(partial.restore(sums), len(each)):
            batches = batches_of(each[index], self.texts, self.config, self.groups)
            run_schedule(
                self.model.modules, batches, self.config, self.model, self.groups,
                forward_only=not self.gradients,
            )  # fmt: skip
            for module in self.model.modules:
                module.zero_grad(set_to_none=True)
            progress(index + 1, len(each))
            if (index + 1) % self.config.measure.interval == 0:
                partial.save(sums, index + 1)

    def scores(self, choose: str) -> NDArray[np.float64]:
        """Return the score of each expert by ``upcycle.choose``, ``(L, O)``; all ranks call it."""
        sums_LO3 = world_sum(self.sums_LO3)
        load_LO = sums_LO3[..., LOAD]
        match choose:
            case "load" | "merge":
                return load_LO.numpy()
            case "utility":
                return sums_LO3[..., UTILITY].numpy()
            case _:  # reap: the mean over the tokens that chose the expert
                return (sums_LO3[..., NORM] / load_LO.clamp(min=1)).numpy()

    def _hook(self, layer: int) -> Callable[..., None]:
        etp, ep = self.groups.expt_tp, self.groups.ep

        def hook(module: Any, args: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
            counts_E = args[1].cpu()
            whole_TD = output[0].detach().float()
            if etp.size() > 1:  # each etp rank has some neurons' part of the output
                whole_TD = whole_TD.clone()
                dist.all_reduce(whole_TD, group=etp)
            first = ep.rank() * len(counts_E)
            own_E3 = self.sums_LO3[layer, first : first + len(counts_E)]
            if etp.rank() == 0:
                own_E3[:, LOAD] += counts_E
                own_E3[:, NORM] += _by_expert(whole_TD.norm(dim=-1), counts_E)

            def product(gradient_TD: Tensor) -> None:
                change_T = (whole_TD * gradient_TD.float()).sum(dim=-1).abs()
                own_E3[:, UTILITY] += _by_expert(change_T, counts_E)

            if output[0].requires_grad and etp.rank() == 0:
                output[0].register_hook(product)

        return hook


def _by_expert(values_T: Tensor, counts_E: Tensor) -> Tensor:
    """Sum the values of each expert's choices, which are ordered by expert."""
    runs = values_T[: int(counts_E.sum())].double().cpu().split(counts_E.tolist())
    return torch.stack([run.sum() for run in runs])
