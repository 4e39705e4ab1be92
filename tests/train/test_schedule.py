"""Compare learning rate and weight decay of every style with torch's schedulers and with formulas.

Both sides compute in float64 but in another order: 1e-12 relative allows for the rounding of a
hundred products.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.train.schedule import make_schedule

PEAK, LEAST, WARMUP, STEPS = 3e-3, 2e-4, 10, 60


def rates(**optimizer: Any) -> list[tuple[float, float]]:
    """Return learning rate and weight decay before each of 81 steps of a run of 60."""
    tree = {
        "run": {"dir": "run"}, "source": {"path": "dense"}, "moe": {"num_moe_experts": 4},
        "data": {"path": "text"}, "train": {"steps": STEPS},
        "optimizer": {"lr": PEAK, "min_lr": LEAST, "warmup_steps": WARMUP, **optimizer},
    }  # fmt: skip
    updated: Any = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    schedule = make_schedule(build(RunConfig, tree), updated)
    seen = []
    for _ in range(81):
        (group,) = updated.param_groups
        seen.append((group["lr"], group["weight_decay"]))
        schedule.step(increment=1)
    return seen


def of_torch(
    make: Callable[[torch.optim.Optimizer], Any], *, warmup: int, last: int
) -> list[float]:
    """Return the rates of one of torch's schedulers after a warm-up, for steps up to last."""
    updated = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    after = make(updated)
    if warmup:  # LinearLR cannot start at zero, so the first rate is left out below
        rising = lr_scheduler.LambdaLR(updated, lambda step: step / warmup)
        after = lr_scheduler.SequentialLR(updated, [rising, after], [warmup])
    seen = []
    for _ in range(last + 1):
        seen.append(updated.param_groups[0]["lr"])
        updated.step()
        after.step()
    return seen


def cosine(length: int) -> Callable[[torch.optim.Optimizer], Any]:
    return lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, length, eta_min=LEAST)


def linear(length: int) -> Callable[[torch.optim.Optimizer], Any]:
    return lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, LEAST / PEAK, length)


@pytest.mark.parametrize(
    ("optimizer", "expected", "warmup", "end"),
    [
        ({}, cosine(50), 10, 60),
        ({"lr_decay_style": "linear"}, linear(50), 10, 60),
        ({"lr_decay_steps": 40}, cosine(30), 10, 40),
        ({"lr_decay_steps": 75, "lr_decay_style": "linear"}, linear(65), 10, 75),
        ({"lr_warmup_fraction": 0.25}, cosine(45), 15, 60),
        ({"lr_warmup_fraction": 0.25, "lr_decay_steps": 40}, cosine(30), 10, 40),
        ({"warmup_steps": 0}, cosine(60), 0, 60),
    ],
)  # fmt: skip
def test_cosine_and_linear_are_those_of_torch(
    optimizer: dict[str, Any], expected: Any, warmup: int, end: int
):
    ours = [lr for lr, _ in rates(**optimizer)]
    assert ours[: end + 1] == pytest.approx(of_torch(expected, warmup=warmup, last=end), rel=1e-12)
    assert ours[end + 1 :] == [LEAST] * (80 - end)


def test_constant_stays():
    assert [lr for lr, _ in rates(lr_decay_style="constant")][WARMUP:] == [PEAK] * 71


def test_inverse_square_root_is_the_formula():
    """Vaswani et al. (arXiv 1706.03762), equation 3, scaled to reach the peak after warm-up."""
    ours = [lr for lr, _ in rates(lr_decay_style="inverse-square-root")]
    formula = [PEAK * min(step / WARMUP, math.sqrt(WARMUP / max(step, 1))) for step in range(61)]
    assert ours[:61] == pytest.approx(formula, rel=1e-12)
    floor = [lr for lr, _ in rates(lr_decay_style="inverse-square-root", min_lr=2e-3)]
    assert min(floor[WARMUP:]) == 2e-3


@pytest.mark.parametrize(
    ("style", "form"),
    [
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
        ("exponential", lambda x: 2 * 0.5**x - 1),
        ("minus_sqrt", lambda x: 1 - math.sqrt(x)),
    ],
)
def test_wsd_is_stable_and_then_decays(style: str, form: Callable[[float], float]):
    ours = [
        lr for lr, _ in rates(lr_decay_style="WSD", lr_wsd_decay_style=style, lr_wsd_decay_steps=20)
    ]
    assert ours[WARMUP:41] == [PEAK] * 31
    decay = [LEAST + (PEAK - LEAST) * form(x / 20) for x in range(1, 21)]
    assert ours[41:61] == pytest.approx(decay, rel=1e-12)
    assert ours[61:] == [LEAST] * 20


@pytest.mark.parametrize(
    ("style", "form"),
    [("linear", lambda x: x), ("cosine", lambda x: (1 - math.cos(math.pi * x)) / 2)],
)
def test_weight_decay_grows_as_its_style_says(style: str, form: Callable[[float], float]):
    ours = rates(
        weight_decay_incr_style=style, start_weight_decay=0.02, end_weight_decay=0.2,
        lr_decay_steps=40,
    )  # fmt: skip
    expected = [0.02 + 0.18 * form(min(step, 40) / 40) for step in range(81)]
    assert [decay for _, decay in ours] == pytest.approx(expected, rel=1e-12)


def test_weight_decay_is_constant_by_default():
    assert {decay for _, decay in rates()} == {0.1}


def test_a_run_without_steps_has_a_schedule():
    tree = {
        "run": {"dir": "run"}, "source": {"path": "dense"}, "moe": {"num_moe_experts": 4},
        "data": {"path": "text"}, "train": {"steps": 0},
    }  # fmt: skip
    updated: Any = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    assert make_schedule(build(RunConfig, tree), updated).lr_decay_steps == 101
