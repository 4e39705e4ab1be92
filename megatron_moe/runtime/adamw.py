"""torch's fused AdamW with the state layout of Apex's and Transformer Engine's FusedAdam.

Like those two, it keeps one step count per parameter group, which is what Megatron-Core's
distributed optimizer saves and reshards. torch's AdamW keeps one count per parameter, which cannot
be loaded under another layout.

Moments may be kept in bf16 or in host memory between steps (`StoredMoments`). A step then takes one
parameter after the other: it copies its moments into fp32 on the device, updates, and copies them
back. So there is one kernel and one result, whatever the moments are kept in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class ClipsGradients(Protocol):
    """An optimizer that can scale gradients within its own pass over them."""

    def clip(self, *, max_norm: float, total_norm: float) -> None:
        """Make the next step scale gradients of norm ``total_norm`` to ``max_norm``."""


@dataclass(frozen=True, slots=True)
class StoredMoments:
    """Format and place of moments between steps."""

    dtypes: Mapping[str, torch.dtype]
    """Dtypes of exp_avg and exp_avg_sq; that of the parameter, fp32, if there is none."""
    on_host: bool
    """Whether they are in host memory, pinned if the parameters are on a GPU."""

    def zeros(self, parameter: Tensor, name: str) -> Tensor:
        """Return the moment of a parameter before its first update."""
        dtype = self.dtypes.get(name, parameter.dtype)
        if not self.on_host:
            return torch.zeros_like(parameter, dtype=dtype)
        return torch.zeros(parameter.shape, dtype=dtype, pin_memory=parameter.is_cuda)

    def device_bytes(self) -> int:
        """Return the bytes of one element's moments on the device."""
        return 0 if self.on_host else self.num_bytes()

    def num_bytes(self) -> int:
        """Return the bytes of one element's moments."""
        return sum(self.dtypes.get(name, torch.float32).itemsize for name in MOMENTS)


MOMENTS = ("exp_avg", "exp_avg_sq")
PLAIN = StoredMoments({}, on_host=False)
"""As the update computes them."""


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
        self.moments = PLAIN
        """Format of the moments; set before the first step."""

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
                    self.state[p] = {name: self.moments.zeros(p, name) for name in MOMENTS}
            if self.moments is PLAIN:
                states = [self.state[p] for p in params]
                self._update(group, params, *([s[name] for s in states] for name in MOMENTS))
            else:
                self._update_one_by_one(group, params)
        self._divide_by = None

    def _update_one_by_one(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update with copies of the moments; only those of one parameter exist at a time."""
        for p in params:
            stored = [self.state[p][name] for name in MOMENTS]
            first, second = (torch.empty_like(p).copy_(m, non_blocking=True) for m in stored)
            self._update(group, [p], [first], [second])
            for moment, updated in zip(stored, (first, second), strict=True):
                moment.copy_(updated, non_blocking=True)
        if self.moments.on_host and params[0].is_cuda:
            # A checkpoint reads host memory without regard to the stream.
            torch.cuda.current_stream(params[0].device).synchronize()

    def _update(
        self, group: dict[str, Any], params: list[Tensor], first: list[Tensor], second: list[Tensor]
    ) -> None:
        """Update parameters and their fp32 moments, on one device, in one pass."""
        beta1, beta2 = group["betas"]
        device = params[0].device
        divide_by = None if self._divide_by is None else _scalar(self._divide_by, device)
        torch._fused_adamw_(
            params,
            [p.grad for p in params if p.grad is not None],
            first,
            second,
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


def _scalar(value: float, device: torch.device) -> Tensor:
    """Return an fp32 scalar on the parameters' device.

    The CUDA kernel reads it there without a device check. A fill, unlike a copy from the host, does
    not wait for the GPU.
    """
    return torch.full((), float(value), dtype=torch.float32, device=device)
