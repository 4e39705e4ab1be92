"""torch's fused AdamW with the state layout of Apex's and Transformer Engine's FusedAdam.

Like those two, it keeps one step count per parameter group, which is what Megatron-Core's
distributed optimizer saves and reshards. torch's AdamW keeps one count per parameter, which cannot
be loaded under another layout.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class ClipsGradients(Protocol):
    """An optimizer that can scale gradients within its own pass over them."""

    def clip(self, *, max_norm: float, total_norm: float) -> None:
        """Make the next step scale gradients of norm ``total_norm`` to ``max_norm``."""


class FusedAdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay, in one fused pass over parameter, gradient and moments."""

    # torch wraps these to disable compilation, which imports its compiler: 2 s on every rank.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        **fused_adam_options: object,
    ) -> None:
        # The other options that Megatron-Core passes are for CUDA kernels and master weights, which
        # it does not use here.
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": True})
        self._divide_by: float | None = None

    def clip(self, *, max_norm: float, total_norm: float) -> None:
        """Make the next step scale gradients to ``max_norm`` within its own pass over them.

        Megatron-Core's clipping would be an extra pass over all gradients, and a copy, before it.
        """
        divisor = (total_norm + 1e-6) / max_norm
        self._divide_by = divisor if divisor > 1 else None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        for group in self.param_groups:
            # Count steps even if this rank holds no parameter of the group: the count is saved as
            # one number for all ranks.
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
            beta1, beta2 = group["betas"]
            device = params[0].device
            divide_by = None if self._divide_by is None else _scalar(self._divide_by, device)
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [_scalar(group["step"], device)] * len(params),
                lr=float(group["lr"]),
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=divide_by,
            )
        self._divide_by = None


def _scalar(value: float, device: torch.device) -> Tensor:
    """Return an fp32 scalar on the parameters' device.

    The CUDA kernel reads it there without a device check. A fill, unlike a copy from the host, does
    not wait for the GPU.
    """
    return torch.full((), float(value), dtype=torch.float32, device=device)
