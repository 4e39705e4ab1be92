"""Compare the time of a loop over experts with torch's grouped_mm, forward and backward.

    python -m research.expert_products

Each round times both in turn, so that other load on the machine affects both; the table has medians
and their ratio. model/experts.py uses a loop because of these results (docs/performance.md).

Shape letters: E experts, T tokens, D hidden_size, M neurons of one expert.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_moe.model.experts import apply_experts

ROUNDS = 7
SHAPES = {
    "SmolLM2-135M, 4 experts": (4, 1024, 576, 1536),
    "hidden 512, 8 experts": (8, 4096, 512, 1536),
    "fine-grained, 64 experts": (64, 16384, 512, 192),
}


def main() -> None:
    """Measure every shape in fp32 and bf16 and print the table."""
    table = Table("experts", "dtype", "loop, ms", "grouped_mm, ms", "grouped_mm / loop")
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            loop, grouped = measure(*shape, dtype)
            table.add_row(
                name, str(dtype)[6:], f"{loop:.1f}", f"{grouped:.1f}", f"{grouped / loop:.2f}"
            )
    console = Console()
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {ROUNDS} rounds")
    console.print(table)


def measure(E: int, T: int, D: int, M: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return the median milliseconds of forward and backward for the loop and grouped_mm."""
    torch.manual_seed(0)
    fc1 = [torch.randn(2 * M, D).mul(0.02).to(dtype).requires_grad_() for _ in range(E)]
    fc2 = [torch.randn(D, M).mul(0.02).to(dtype).requires_grad_() for _ in range(E)]
    fc1_EDM = torch.stack([w.detach().T for w in fc1]).contiguous().requires_grad_()
    fc2_EMD = torch.stack([w.detach().T for w in fc2]).contiguous().requires_grad_()
    counts = torch.multinomial(torch.ones(E), T, replacement=True).bincount(minlength=E)
    ends_E = counts.cumsum(0).int()
    x_TD = torch.randn(T, D).to(dtype).requires_grad_()
    prob_T = torch.rand(T)

    def loop() -> Tensor:
        return apply_experts(x_TD, prob_T, counts.tolist(), fc1, fc2)

    def grouped() -> Tensor:
        gate_TM, up_TM = F.grouped_mm(x_TD, fc1_EDM, offs=ends_E).chunk(2, dim=-1)
        h_TM = F.silu(gate_TM) * up_TM * prob_T[:, None].to(dtype)
        return F.grouped_mm(h_TM, fc2_EMD, offs=ends_E)

    torch.testing.assert_close(loop(), grouped(), rtol=2e-2, atol=2e-2)
    rounds = [(timed(loop), timed(grouped)) for _ in range(ROUNDS + 1)][1:]
    first, second = zip(*rounds, strict=True)
    return statistics.median(first), statistics.median(second)


def timed(forward: Callable[[], Tensor]) -> float:
    """Return the milliseconds of one forward and backward pass."""
    start = time.perf_counter()
    out = forward()
    out.backward(torch.ones_like(out))
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    main()
