"""Peak performance of GPUs and their links: data-sheet numbers, per direction and per GPU."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU model in the kind of node it is usually sold in."""

    name: str
    peak_flops: float
    """Dense bf16 operations per second."""
    hbm_gib: float
    """Memory that a process can allocate, in GiB."""
    hbm_bytes_per_second: float
    nvlink_bytes_per_second: float
    """Bandwidth to the GPUs of the same node, in one direction."""
    network_bytes_per_second: float
    """Bandwidth to other nodes, in one direction; each GPU has one network adapter."""
    torch_attention_efficiency: float = 0.35
    """Fraction of the peak that FlashAttention-2, which torch has, reaches: 0.35 on H100 (arXiv
    2407.08608, abstract), and as much as FlashAttention-3 there on A100. Never measured by this
    project; newer GPUs are assumed to be like H100."""
    gpus_per_node: int = 8

    @property
    def usable_gib(self) -> float:
        """Memory that a predicted layout may use, in GiB."""
        return self.hbm_gib * (1 - HEADROOM)


HEADROOM = 0.05
"""Fraction of the memory left free, because activation estimates are no more accurate."""

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA data sheets of the SXM parts. The network is that of the matching DGX system:
        # HDR 200 Gb/s (A100), NDR 400 Gb/s (H100, H200, B200). hbm_gib is what the driver reports.
        Gpu(
            name="a100",
            peak_flops=312e12,
            hbm_gib=79.2,
            hbm_bytes_per_second=2.04e12,
            nvlink_bytes_per_second=300e9,
            network_bytes_per_second=25e9,
            torch_attention_efficiency=0.62,
        ),
        Gpu(
            name="h100",
            peak_flops=989.5e12,
            hbm_gib=79.1,
            hbm_bytes_per_second=3.35e12,
            nvlink_bytes_per_second=450e9,
            network_bytes_per_second=50e9,
        ),
        Gpu(
            name="h200",
            peak_flops=989.5e12,
            hbm_gib=139.8,
            hbm_bytes_per_second=4.8e12,
            nvlink_bytes_per_second=450e9,
            network_bytes_per_second=50e9,
        ),
        Gpu(
            name="b200",
            peak_flops=2250e12,
            hbm_gib=178.4,
            hbm_bytes_per_second=8.0e12,
            nvlink_bytes_per_second=900e9,
            network_bytes_per_second=50e9,
        ),
        # Without NVLink, GPUs of a node share PCIe 4. Their network is assumed to be 100 Gb/s.
        # Checked 2026-11-29. L40S: a reseller's copy of NVIDIA's data sheet (bf16 362.05 TFLOP/s,
        # 733 with sparsity; 864 GB/s). RTX 4090: two tables of specifications (bf16 165.15 TFLOP/s,
        # 330.3 with sparsity; 1008 GB/s). hbm_gib of both is not verified.
        Gpu(
            name="l40s",
            peak_flops=362e12,
            hbm_gib=45.0,
            hbm_bytes_per_second=0.864e12,
            nvlink_bytes_per_second=25e9,
            network_bytes_per_second=12.5e9,
        ),
        Gpu(
            name="rtx4090",
            peak_flops=165e12,
            hbm_gib=24.0,
            hbm_bytes_per_second=1.008e12,
            nvlink_bytes_per_second=25e9,
            network_bytes_per_second=12.5e9,
        ),
    )
}


def gpu_named(name: str) -> Gpu:
    """Return the GPU called ``name``.

    Raises:
        ConfigError: The table has no such GPU.
    """
    if name not in GPUS:
        raise ConfigError(f"--gpu {name} is not in the table; known: {', '.join(GPUS)}")
    return GPUS[name]
