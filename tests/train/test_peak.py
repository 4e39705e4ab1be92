"""Tests of the peak that MFU is relative to, for the device names that drivers report."""

import pytest
import torch

from megatron_moe.train import peak
from megatron_moe.train.peak import Peak, device_peak

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5), ("NVIDIA H200 NVL", 835.5), ("NVIDIA B200", 2250),
    ],
)  # fmt: skip
def test_a_known_card_has_its_data_sheets_peak(
    name: str, teraflops: float, monkeypatch: pytest.MonkeyPatch
):
    """The expected values are half of the data sheets' figures with sparsity."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    result = device_peak(GPU, torch.bfloat16)
    assert result == Peak(teraflops * 1e12, f"{name} data sheet, bf16 dense")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA H100", torch.bfloat16), ("NVIDIA GH200 480GB", torch.bfloat16),
        ("NVIDIA GB200", torch.bfloat16), ("NVIDIA H20", torch.bfloat16),
        ("NVIDIA H100 80GB HBM3", torch.float32),
    ],
)  # fmt: skip
def test_another_card_or_precision_is_measured(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    measured = Peak(1.0, "measured")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(peak, "_measured", lambda *_: measured)
    assert device_peak(GPU, dtype) is measured
