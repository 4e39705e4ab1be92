"""Decide which dead experts to re-create from which siblings, and with which router rows.

A token goes to the K experts with the largest logits. A dead expert is in no token's sum, so new
weights alone change nothing: only the new router row does. A copy of the sibling's row would enter
every token of the sibling and push out another expert there. Instead the new row lies between the
mean of all rows and the sibling's. The logit of the new expert is then between the mean logit of
the token and the sibling's. So, as long as the K-th largest logit exceeds the mean, the new expert
enters only tokens that the sibling has, ranks below it, and takes the place of the one with the
smallest weight. This is unchanged if a vector is added to all rows, which no softmax notices.

The decisions are a function of counts that are summed over all ranks, so they are the same on every
rank.

Shape letters of this module:

    L  MoE layers   E  num_moe_experts   D  width of a router row
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_moe.config.moe import Moe

UnusedSteps = dict[int, list[int]]
"""Consecutive steps in which each expert got (almost) no token, by the MoE layer's id."""


@dataclass(frozen=True, slots=True)
class Revival:
    """An expert that is re-created from another one of its layer."""

    layer: int
    expert: int
    sibling: int
    """Expert whose weights are copied."""
    unused_steps: int
    """Consecutive steps in which the expert got (almost) no token."""
    attempt: int
    """1 for the first time; each later time the expert has stayed dead since the one before."""

    @property
    def share(self) -> float:
        """Share of the sibling's row in the new one; the rest is the mean row of the layer.

        A half at first. An expert that stays dead gets closer to its sibling each time.
        """
        return 1 - 2.0**-self.attempt

    def row(self, rows_ED: Tensor) -> Tensor:
        """Return the new router row, ``(D,)`` in float64, given all rows before any revival."""
        mean_D = rows_ED.double().mean(dim=0)
        return mean_D + self.share * (rows_ED[self.sibling].double() - mean_D)

    def __str__(self) -> str:
        return (
            f"re-created expert {self.expert} of layer {self.layer} from expert {self.sibling}, "
            f"after {self.unused_steps} steps without enough tokens"
        )


def unused_after(before: UnusedSteps, chosen_LE: Tensor, moe: Moe) -> UnusedSteps:
    """Return the steps without tokens after one more step.

    Args:
        before: Steps without tokens before it, in the order of the layers.
        chosen_LE: Tokens that chose each expert in that step.
        moe: Settings.
    """
    bound_L1 = moe.revive_below_load * chosen_LE.mean(dim=1, keepdim=True)
    unused_LE = (chosen_LE <= bound_L1).tolist()
    return {
        layer: [(count + 1) * unused for count, unused in zip(counts, unused_E, strict=True)]
        for (layer, counts), unused_E in zip(before.items(), unused_LE, strict=True)
    }


def due_revivals(unused: UnusedSteps, chosen_LE: Tensor, moe: Moe) -> list[Revival]:
    """Return the revivals that follow the step which led to ``unused``.

    The experts of a layer that are due get different siblings, the busiest first: two copies of one
    sibling would stay equal forever. If there are more of them than siblings, the rest waits.
    """
    steps, revivals = moe.revive_after_steps, []
    assert steps is not None
    for (layer, counts), chosen_E in zip(unused.items(), chosen_LE.tolist(), strict=True):
        due = [expert for expert, count in enumerate(counts) if count and not count % steps]
        alive = [expert for expert, count in enumerate(counts) if not count]
        busiest = sorted(alive, key=lambda expert: -chosen_E[expert])
        revivals += [
            Revival(layer, expert, sibling, counts[expert], counts[expert] // steps)
            for expert, sibling in zip(due, busiest, strict=False)
        ]
    return revivals
