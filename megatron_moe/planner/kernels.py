"""Predict the forward and backward seconds of one layer's compute kernels, without communication.

A kernel's time is its operations at the fitted efficiency plus its operands at the memory bandwidth
(an additive roofline), so small or thin products slow down without a constant of their own. The
fp32 buffer of a weight's gradient is read and written meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.planner.calibration import Calibration
from megatron_moe.planner.hardware import Gpu
from megatron_moe.planner.workload import Engine

HBM_EFFICIENCY = 0.8
"""Fraction of the data-sheet bandwidth that element-wise kernels and operands reach (like
STREAM)."""

ATTENTION_EFFICIENCY = 0.62
ATTENTION_HALF_LENGTH = 1500
"""FlashAttention-3 on H100, causal, head 128 (arXiv 2407.08608, figure 5): fraction of the peak
for the operations it executes, and the sequence length that reaches half of it."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Forward and backward time, in seconds."""

    forward: float
    backward: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.forward + other.forward, self.backward + other.backward)

    @property
    def both(self) -> float:
        """Forward plus backward."""
        return self.forward + self.backward


ZERO = Seconds(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Kernels:
    """Kernel times of one GPU under a calibration."""

    gpu: Gpu
    calibration: Calibration
    bytes_per_value: int = 2
    engine: Engine = "transformer_engine"

    def linear(self, rows: float, inputs: int, outputs: int, *, trained: float = 1.0) -> Seconds:
        """Return the time of a linear layer; see `grouped`."""
        time = self._products(rows, inputs, outputs, copies=1, separate=False)
        return _without_gradients(time, trained)

    def grouped(
        self, rows: float, inputs: int, outputs: int, *, copies: int, trained: float = 1.0
    ) -> Seconds:
        """Return the time of the linear layers of ``copies`` experts that share ``rows``.

        The backward pass of frozen weights has one product, the input's gradient; ``trained`` is
        the fraction of layers whose weights are trained, and the mean is returned. Torch's grouped
        product cannot add to the fp32 buffer: its result is written and read once more, after the
        product. Its efficiency is assumed to be that of other products.
        """
        separate = self.engine == "torch"
        time = self._products(rows, inputs, outputs, copies=copies, separate=separate)
        return _without_gradients(time, trained)

    def _products(
        self, rows: float, inputs: int, outputs: int, *, copies: int, separate: bool
    ) -> Seconds:
        """Return the time of a product and of the products of its backward pass.

        The backward pass has two products: the input's gradient, and the weight's gradient. The
        latter is accumulated into an fp32 buffer, tile by tile: while one tile is read and written,
        the next is computed, so the longer of the two counts.
        """
        flops = 2 * rows * inputs * outputs / (self.gpu.peak_flops * self._gemm)
        weights = copies * inputs * outputs
        activations = self.bytes_per_value * rows * (inputs + outputs) / self._bandwidth
        product = flops + activations + self.bytes_per_value * weights / self._bandwidth
        buffer = 8 * weights / self._bandwidth
        accumulated = max(flops + activations, buffer)
        if separate:
            accumulated = flops + activations + buffer + 4 * weights / self._bandwidth
        return Seconds(product, product + accumulated)

    def attention(self, batch: int, length: float, sequence: int, width: float) -> Seconds:
        """Return the time of causal flash attention for ``length`` queries of each sequence.

        The backward pass executes 2.5 times the products of the forward pass, because it recomputes
        the scores.
        """
        seen = sequence / 2
        flops = 4 * batch * length * seen * width
        torch = self.engine == "torch"
        best = self.gpu.torch_attention_efficiency if torch else ATTENTION_EFFICIENCY
        reached = best * length / (length + ATTENTION_HALF_LENGTH)
        forward = flops / (self.gpu.peak_flops * reached)
        return Seconds(forward, 2.5 * forward)

    def elementwise(self, values: float, *, forward: float, backward: float) -> Seconds:
        """Return the time of kernels that read or write ``values`` the given number of times."""
        once = values * self.bytes_per_value / self._bandwidth
        return Seconds(forward * once, backward * once)

    @property
    def _gemm(self) -> float:
        return self.calibration.gemm_efficiency

    @property
    def _bandwidth(self) -> float:
        return self.gpu.hbm_bytes_per_second * HBM_EFFICIENCY


def _without_gradients(time: Seconds, trained: float) -> Seconds:
    """Return the mean time of layers of which a fraction has weight gradients."""
    if trained == 1:
        return time
    return Seconds(time.forward, time.forward + trained * (time.backward - time.forward))
