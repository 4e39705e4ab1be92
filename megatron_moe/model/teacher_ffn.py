"""The dense FFN of a teacher's layer, and what each expert's neurons contribute to its output.

Shape letters of this module:

    s  positions of this rank (S: of its tp group)    B  micro_batch_size    D  hidden_size
    f  dense neurons of this tp rank                  E  num_moe_experts
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe.experts.plan import LayerPlan
from megatron_moe.parallel.shards import ShardIndex


class TeacherFfn:
    """A dense FFN of the source, sharded over tp, and which neurons each expert has of it."""

    def __init__(self, fc1_2fD: Tensor, fc2_Df: Tensor, plan: LayerPlan, tp: ProcessGroup) -> None:
        self._fc1_2fD, self._fc2_Df, self._tp = fc1_2fD, fc2_Df, tp
        self._expert_fE = self._membership(plan)
        self._expected: Tensor | None = None
        self._results: tuple[Tensor, Tensor] | None = None

    def _membership(self, plan: LayerPlan) -> Tensor:
        """Return how often each of this rank's neurons is in each expert, ``(f, E)``."""
        neurons_EM = torch.tensor(plan.neurons_EM)  # a copy, as the plan's array is read-only
        size = self._fc2_Df.shape[1] * self._tp.size()
        counts = [torch.bincount(neuron_M, minlength=size) for neuron_M in neurons_EM]
        own = ShardIndex(self._tp.rank(), self._tp.size()).slice_of(size)
        return torch.stack(counts, dim=1)[own].to(self._fc2_Df.device, torch.float32)

    def expect(self, _: Any, inputs: tuple[Any, ...]) -> None:
        """Keep the results for this input until `forget`, so that router and layer share them."""
        self._expected = inputs[0]

    def forget(self) -> None:
        """Drop the input that was expected, and its results."""
        self._expected = self._results = None

    @torch.no_grad()
    def output(self, x_sBD: Tensor) -> Tensor:
        """Return the output for this rank's positions, ``(s, B, D)``."""
        return self._run(x_sBD)[1]

    @torch.no_grad()
    def shares(self, x_sBD: Tensor) -> Tensor:
        """Return each expert's share of the output, fp32 ``(s, B, E)``; they sum to 1 per token.

        A neuron's share is what it contributes in the direction of the output. A negative sum
        counts as zero; if no expert has a positive one, all shares are equal.
        """
        activation_SBf, output_sBD = self._run(x_sBD)
        output_SBD = self._gathered(output_sBD)
        contribution_SBf = activation_SBf.float() * (output_SBD @ self._fc2_Df).float()
        share_sBE = self._summed(contribution_SBf @ self._expert_fE).clamp_min(0)
        total_sB1 = share_sBE.sum(dim=-1, keepdim=True)
        equal = 1 / share_sBE.shape[-1]
        return torch.where(total_sB1 > 0, share_sBE / total_sB1, equal)

    def _run(self, x_sBD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of ``down`` for all positions, and the output for this rank's."""
        if x_sBD is self._expected and self._results is not None:
            return self._results
        gate_SBf, up_SBf = F.linear(self._gathered(x_sBD), self._fc1_2fD).chunk(2, dim=-1)
        activation_SBf = F.silu(gate_SBf) * up_SBf
        results = activation_SBf, self._summed(F.linear(activation_SBf, self._fc2_Df))
        if x_sBD is self._expected:
            self._results = results
        return results

    def _gathered(self, x_sBD: Tensor) -> Tensor:
        return gather_from_sequence_parallel_region(x_sBD, group=self._tp)

    def _summed(self, x_SBD: Tensor) -> Tensor:
        return reduce_scatter_to_sequence_parallel_region(x_SBD, group=self._tp)
