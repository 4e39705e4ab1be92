"""Tests of the fused AdamW against torch's AdamW, and of the state that Megatron-Core saves."""

import copy
from typing import Any

import pytest
import torch

from megatron_moe.runtime.adamw import FusedAdamW, StoredMoments

SHAPES = [(7, 5), (64,), (1,), (3, 2, 4)]
STEPS = 6


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** (step - 3)


def groups(params: list[torch.nn.Parameter]) -> list[dict]:
    return [
        {"params": params[:2], "weight_decay": 0.1},
        {"params": params[2:], "weight_decay": 0.0, "lr": 3e-3},
    ]


@pytest.mark.parametrize("norm", [50.0, 0.5], ids=["longer", "shorter"])
def test_clipping_in_the_step_is_clipping_before_it(norm: float):
    """Clipping applies to the next step only."""
    our_params, torch_params = parameters(), parameters()
    ours, torchs = (FusedAdamW(groups(p), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
                    for p in (our_params, torch_params))  # fmt: skip
    for step in range(2):
        set_gradients(our_params, step)
        set_gradients(torch_params, step)
        if step == 0:
            ours.clip(max_norm=1.0, total_norm=norm)
            for p in torch_params:
                assert p.grad is not None
                p.grad.mul_(min(1.0, 1.0 / (norm + 1e-6)))
        ours.step()
        torchs.step()
        for a, b in zip(our_params, torch_params, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-6, atol=1e-7
            )  # divides by the norm instead of multiplying


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)], ids=str)
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_every_step_is_torchs(betas: tuple[float, float], eps: float):
    our_params, torch_params = parameters(), parameters()
    settings = {"lr": 1e-2, "betas": betas, "eps": eps}
    ours = FusedAdamW(groups(our_params), **settings)
    torchs = torch.optim.AdamW(groups(torch_params), **settings)
    for step in range(STEPS):
        for params, optimizer in ((our_params, ours), (torch_params, torchs)):
            set_gradients(params, step)
            for group in optimizer.param_groups:
                group["lr"] *= 0.9  # as the schedule does
            optimizer.step()
        for p, q in zip(our_params, torch_params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
            for name in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(
                    ours.state[p][name], torchs.state[q][name], rtol=1e-6, atol=1e-12
                )


@pytest.mark.parametrize("names", [("exp_avg",), ("exp_avg_sq",), ("exp_avg", "exp_avg_sq")])
def test_moments_in_bf16_are_torchs_rounded_after_each_step(names: tuple[str, ...]):
    """The update itself is computed before the rounding."""
    our_params, torch_params = parameters(), parameters()
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    ours = FusedAdamW(groups(our_params), **settings)
    ours.moments = StoredMoments(dict.fromkeys(names, torch.bfloat16), on_host=False)
    torchs = torch.optim.AdamW(groups(torch_params), **settings)
    for step in range(STEPS):
        for params, optimizer in ((our_params, ours), (torch_params, torchs)):
            set_gradients(params, step)
            optimizer.step()
        for p, q in zip(our_params, torch_params, strict=True):
            for name in names:
                moment = torchs.state[q][name]
                moment.copy_(moment.bfloat16())
                assert ours.state[p][name].dtype == torch.bfloat16
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
            for name in ("exp_avg", "exp_avg_sq"):
                moment = ours.state[p][name].float()
                torch.testing.assert_close(moment, torchs.state[q][name], rtol=2**-7, atol=1e-12)


def test_moments_in_host_memory_change_no_bit():
    plain_params, our_params = parameters(), parameters()
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    plain, ours = (FusedAdamW(groups(p), **settings) for p in (plain_params, our_params))
    ours.moments = StoredMoments({}, on_host=True)
    for step in range(STEPS):
        for params, optimizer in ((plain_params, plain), (our_params, ours)):
            set_gradients(params, step)
            optimizer.clip(max_norm=1.0, total_norm=2.0)
            optimizer.step()
    for p, q in zip(plain_params, our_params, strict=True):
        assert torch.equal(p, q)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(plain.state[p][name], ours.state[q][name])


def test_moments_in_host_memory_are_there_while_parameters_are_elsewhere():
    """Parameters on the meta device stand for those on a GPU: copies go both ways."""
    params = [torch.nn.Parameter(p.detach().to("meta")) for p in parameters()]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = FusedAdamW(groups(params), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    optimizer.moments = StoredMoments({"exp_avg": torch.bfloat16}, on_host=True)
    assert [optimizer.moments.zeros(p, "exp_avg").device.type for p in params] == ["cpu"] * 4
    assert (optimizer.moments.device_bytes(), optimizer.moments.num_bytes()) == (0, 6)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_kernels_scalars_are_on_the_parameters_device(
    device: str, monkeypatch: pytest.MonkeyPatch
):
    """There is one step count per group. The CUDA kernel reads it without a device check."""
    calls = []

    def kernel(
        params: list,
        grads: list,
        avgs: list,
        squares: list,
        maxes: list,
        steps: list,
        **options: Any,
    ):
        calls.append((steps, options))

    monkeypatch.setattr(torch, "_fused_adamw_", kernel)
    params = [torch.nn.Parameter(p.detach().to(device)) for p in parameters()]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = FusedAdamW(groups(params), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    optimizer.clip(max_norm=1.0, total_norm=4.0)
    optimizer.step()
    assert len(calls) == 2
    for steps, options in calls:
        scale = options["grad_scale"]
        assert len(steps) == 2
        assert steps[0] is steps[1]
        assert {steps[0].device.type, scale.device.type} == {device}
        assert steps[0].dtype == scale.dtype == torch.float32
        assert isinstance(options["lr"], float)


def test_one_step_by_hand():
    p = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = FusedAdamW([p], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5)
    p.grad = torch.tensor([-3.0], dtype=torch.float64)
    optimizer.step()
    # The corrected moments of the first step are g and g^2, so it is lr * sign(g), after decay.
    assert p.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) + 0.1, abs=1e-8)


def test_the_step_is_counted_once_a_group_also_without_gradients():
    """The count is saved once for all ranks, and a rank may hold no parameter of a group."""
    our_params = parameters()
    optimizer = FusedAdamW(groups(our_params), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    before = [p.detach().clone() for p in our_params]
    for _ in range(3):
        set_gradients(our_params[:2], 0)
        optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    assert all(set(optimizer.state[p]) == {"exp_avg", "exp_avg_sq"} for p in our_params[:2])
    assert not any(optimizer.state[p] for p in our_params[2:])
    assert all(torch.equal(p, b) for p, b in zip(our_params[2:], before[2:], strict=True))


def test_a_loaded_state_continues_to_the_last_bit():
    def run(params: list[torch.nn.Parameter], optimizer: FusedAdamW, steps: range) -> None:
        for step in steps:
            set_gradients(params, step)
            optimizer.step()

    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    one = parameters()
    optimizer = FusedAdamW(one, **settings)
    run(one, optimizer, range(3))
    other = [torch.nn.Parameter(p.detach().clone()) for p in one]
    resumed = FusedAdamW(other, **settings)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(one, optimizer, range(3, STEPS))
    run(other, resumed, range(3, STEPS))
    assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


def test_options_of_cuda_kernels_are_taken_and_do_nothing():
    optimizer = FusedAdamW(
        parameters(), lr=1.0, betas=(0.9, 0.95), eps=1e-8, adam_w_mode=True, capturable=False
    )
    assert optimizer.param_groups[0]["bias_correction"] is True
    assert "adam_w_mode" not in optimizer.param_groups[0]
