"""Tests of RMSNorm against torch, and of its gradients against finite differences."""

from types import SimpleNamespace

import pytest
import torch

from megatron_moe.model.norm import RMSNorm


def norm(dtype: torch.dtype) -> RMSNorm:
    config = SimpleNamespace(params_dtype=dtype, sequence_parallel=False)
    ours = RMSNorm(config, 16, eps=1e-3)  # type: ignore[arg-type]
    with torch.no_grad():
        ours.weight.copy_(torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.5)
    return ours


def test_gradients_are_those_of_finite_differences():
    ours = norm(torch.float64)
    x = torch.randn(3, 2, 16, dtype=torch.float64, requires_grad=True)

    def apply(x: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(ours, {"weight": weight_D}, (x,))

    assert torch.autograd.gradcheck(apply, (x, ours.weight))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_values_and_gradients_are_torchs(dtype: torch.dtype, close: float):
    """bf16 agrees to a few roundings of 2^-9, because torch rounds at different points."""
    ours, x = norm(dtype), torch.randn(5, 16).to(dtype).requires_grad_()
    out_grad = torch.randn(5, 16).to(dtype)
    actual = ours(x)
    wanted = torch.nn.functional.rms_norm(x, (16,), ours.weight, 1e-3)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, wanted, rtol=close, atol=close)
    inputs = (x, ours.weight)
    for own, torchs in zip(
        torch.autograd.grad(actual, inputs, out_grad),
        torch.autograd.grad(wanted, inputs, out_grad),
        strict=True,
    ):
        torch.testing.assert_close(own, torchs, rtol=close, atol=4 * close)
