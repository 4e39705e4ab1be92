"""Warn about routers that stay unhealthy for many steps: dead experts, collapse, high load.

Shape letters of this module:

    L  MoE layers   E  experts   K  experts per token
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

COLLAPSED = 0.99
"""Share of the choices that go to K experts of a layer, from which on its router has collapsed."""
_WAY_OUT = (
    "Raise moe.moe_aux_loss_coeff, or lower the learning rate of routers (optimizer.lr_multipliers)"
)


class RouterHealth:
    """Count the consecutive steps in which something is wrong with a layer's router.

    Each condition is reported once, when it has lasted for ``steps`` steps, and again after it was
    gone. A resumed run counts from zero.

    Args:
        layers: Ids of the MoE layers.
        num_experts: Experts of a layer.
        topk: Experts per token.
        steps: Number of steps after which a condition is reported.
        max_load: Bound on the busiest expert's tokens over the mean; None sets no bound.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        num_experts: int,
        topk: int,
        steps: int,
        max_load: float | None,
    ) -> None:
        self._layers, self._topk, self._steps, self._max_load = layers, topk, steps, max_load
        self._unused_LE = np.zeros((len(layers), num_experts), dtype=int)
        self._collapsed_L, self._loaded_L = np.zeros((2, len(layers)), dtype=int)

    def after(self, step: int, chosen_LE: np.ndarray) -> list[str]:
        """Return the warnings that become due after a step.

        Args:
            step: Steps taken.
            chosen_LE: Tokens that chose each expert in the last step.
        """
        mean_L = chosen_LE.mean(axis=1)
        busiest_LE = np.sort(chosen_LE, axis=1)[:, ::-1]
        share_L = busiest_LE[:, : self._topk].sum(axis=1) / busiest_LE.sum(axis=1)
        alternatives = chosen_LE.shape[1] > self._topk
        load_L = busiest_LE[:, 0] / mean_L
        bound = np.inf if self._max_load is None else self._max_load
        self._unused_LE = (self._unused_LE + 1) * (chosen_LE == 0)
        self._collapsed_L = (self._collapsed_L + 1) * (alternatives & (share_L >= COLLAPSED))
        self._loaded_L = (self._loaded_L + 1) * (load_L > bound)
        return [
            f"Step {step}: {text}. {_WAY_OUT}"
            for row, layer in enumerate(self._layers)
            for text in self._due(row, layer, float(share_L[row]), float(load_L[row]))
        ]

    def _due(self, row: int, layer: int, share: float, load: float) -> list[str]:
        """Return what has now lasted for the given number of steps in one layer."""
        steps = f"for {self._steps} steps"
        texts = []
        if self._collapsed_L[row] == self._steps:
            texts.append(
                f"the router of layer {layer} has sent {COLLAPSED:.0%} of the choices to "
                f"{self._topk} experts {steps} (now {share:.1%}): it has collapsed"
            )
        dead = np.flatnonzero(self._unused_LE[row] == self._steps).tolist()
        if dead and not self._collapsed_L[row]:
            names = f"expert{'s' * (len(dead) > 1)} {', '.join(map(str, dead))}"
            texts.append(f"no token has chosen {names} of layer {layer} {steps}: dead")
        if self._loaded_L[row] == self._steps:
            texts.append(
                f"the busiest expert of layer {layer} has had more than {self._max_load} times the "
                f"mean load {steps} (now {load:.2f}; log.router_max_load)"
            )
        return texts
