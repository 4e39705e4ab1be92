"""Checks 6 to 8: products of experts, attention and cross entropy, each alone.

Shape letters of this module:

    E  experts   T  tokens times top-k   D  hidden_size   M  neurons of one expert
    S  sequence  H  heads   G  KV groups   C  head width   V  vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from gpu_checks.session import Session, passed
from gpu_checks.timing import milliseconds, peak_gib, product_tflops, relative_error
from megatron_moe.config.run import Parallel
from megatron_moe.runtime.world import World

BF16_ERROR = 2e-2
"""Largest error over the largest value, bf16 beside float64: products of bf16 values are summed in
fp32, and rounded to 8 bits (4e-3) some three times between the input and a gradient."""
EXPERTS_OF_PRODUCT = 0.70
"""Target: speed of the experts' products as a part of a large product's, in the same minute."""
LOSS_MILLISECONDS = 3.0
"""Target at 4096 x 128256. Six passes over bf16 logits, as the planner counts, are 1.9 ms on an
H100."""


def experts(session: Session) -> None:
    """Multiply by every kernel the package has: values and gradients beside float64, and speed."""
    session.on_rank(partial(_all_experts, session))


def _all_experts(session: Session, world: World) -> None:
    device = world.device
    large = product_tflops(device, size=session.size(8192, 256), dtype=torch.bfloat16)
    session.add("large product, bf16", f"{large:.0f} TFLOP/s", tflops=large)
    full = {"8 x 14336": (8, 4096, 14336, 2048), "64 x 1792": (64, 4096, 1792, 512)}
    small = {"4 x 128": (4, 64, 128, 32)}
    for name, (E, D, M, each) in session.size(full, small).items():
        for load, counts in _loads(E, each).items():
            inputs = _ExpertInputs(counts, D, M, device)
            expected = inputs.in_float64()
            for kernel, run in _kernels(inputs).items():
                label = f"{kernel}, {name}, {load}"
                try:
                    _one_kernel(session, label, kernel, run, inputs, expected, large)
                except Exception as error:  # the next kernel may work
                    problem = f"{type(error).__name__}: {str(error)[:200]}"
                    session.add(label, problem, verdict="FAIL")


def _loads(experts: int, each: int) -> dict[str, list[int]]:
    """Return tokens by expert: balanced, busy experts with four times the others', one empty."""
    skewed = [8 * each // 5 if e % 2 else 2 * each // 5 for e in range(experts)]
    return {"balanced": [each] * experts, "skewed 4:1": skewed,
            "one empty": [0 if e == 1 else each for e in range(experts)]}  # fmt: skip


class _ExpertInputs:
    """Tokens, routing weights and experts, with gradients."""

    def __init__(self, counts: list[int], D: int, M: int, device: torch.device) -> None:
        torch.manual_seed(0)
        draw = partial(torch.randn, device=device, dtype=torch.bfloat16)
        E, T = len(counts), sum(counts)
        self.counts, self.tokens, self.flops = counts, T, 3 * 2 * T * 3 * D * M
        self.x_TD = draw(T, D).requires_grad_()
        self.prob_T = torch.rand(T, device=device).requires_grad_()
        self.out_grad_TD = draw(T, D)
        self.fc1_E2MD, self.fc2_EDM = draw(E, 2 * M, D) * D**-0.5, draw(E, D, M) * M**-0.5
        self.fc1s = [weight.requires_grad_() for weight in self.fc1_E2MD.unbind()]
        self.fc2s = [weight.requires_grad_() for weight in self.fc2_EDM.unbind()]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x_TD, self.prob_T, *self.fc1s, *self.fc2s]

    def backward(self, run: Callable[[], Tensor]) -> Tensor:
        for leaf in self.leaves:
            leaf.grad = None
        out_TD = run()
        out_TD.backward(self.out_grad_TD)
        return out_TD

    def in_float64(self) -> list[Tensor]:
        """Return output and gradients by torch's autograd, one expert after the other."""
        results: list[Any] = [[], [], [], [], []]
        starts = accumulate(self.counts, initial=0)
        for start, count, fc1, fc2 in zip(starts, self.counts, self.fc1s, self.fc2s, strict=False):
            rows = slice(start, start + count)
            leaves = [
                t.detach().double().requires_grad_()
                for t in (self.x_TD[rows], self.prob_T[rows], fc1, fc2)
            ]
            x, prob, w1, w2 = leaves
            gate, up = (x @ w1.t()).chunk(2, dim=-1)
            out = (F.silu(gate) * up * prob[:, None]) @ w2.t()
            grads = torch.autograd.grad(out, leaves, self.out_grad_TD[rows].double())
            for kept, value in zip(results, (out.detach(), *grads), strict=True):
                kept.append(value.float())
        out, x_grad, prob_grad, fc1_grads, fc2_grads = results
        return [torch.cat(out), torch.cat(x_grad), torch.cat(prob_grad), *fc1_grads, *fc2_grads]


def _kernels(inputs: _ExpertInputs) -> dict[str, Callable[[], Tensor]]:
    from megatron_moe.model.experts import apply_experts
    from megatron_moe.model.grouped_experts import grouped_experts

    x, prob, fc1s, fc2s = inputs.x_TD, inputs.prob_T, inputs.fc1s, inputs.fc2s
    count_E = torch.tensor(inputs.counts, device=x.device)
    return {
        "loop": lambda: apply_experts(x, prob, inputs.counts, fc1s, fc2s),
        "grouped_mm": lambda: grouped_experts(x, prob, count_E, fc1s, fc2s),
    }


def _one_kernel(
    session: Session, label: str, kernel: str, run: Callable[[], Tensor],
    inputs: _ExpertInputs, expected: list[Tensor], large: float,
) -> None:  # fmt: skip
    out_TD = inputs.backward(run)
    result = [out_TD.detach(), *(leaf.grad for leaf in inputs.leaves)]
    errors = [relative_error(a, b) for a, b in zip(result, expected, strict=True) if b.any()]
    wrong_zeros = any(a.any() for a, b in zip(result, expected, strict=True) if not b.any())
    ok = max(errors) <= BF16_ERROR and not wrong_zeros
    device = inputs.x_TD.device
    elapsed = milliseconds(lambda: inputs.backward(run), device)
    tflops = inputs.flops / elapsed / 1e9
    figure = kernel == "grouped_mm" and label.endswith("balanced")
    reached = not figure or tflops >= EXPERTS_OF_PRODUCT * large
    target = f", >= {EXPERTS_OF_PRODUCT:.0%} of the product" if figure else ""
    session.add(
        label, f"{max(errors):.1e}, {tflops:.0f} TFLOP/s, {tflops / large:.0%}",
        expected=f"error <= {BF16_ERROR:.0e}{target}",
        verdict=session.target(reached) if ok else "FAIL", figure=figure,
        errors=errors[:3], worst_weight_gradient=max(errors[3:]), milliseconds=elapsed,
        tflops=tflops, of_large_product=tflops / large,
        peak_gib=peak_gib(lambda: inputs.backward(run), device),
    )  # fmt: skip


def attention(session: Session) -> None:
    """Run the package's core attention: causal, and within documents."""
    session.on_rank(partial(_all_attention, session))


def _all_attention(session: Session, world: World) -> None:
    from megatron_moe.model.attention import SdpaAttention
    from megatron_moe.parallel.groups import create_groups

    _, groups = create_groups(Parallel(), seed=0)
    unused_config: Any = SimpleNamespace()
    module = SdpaAttention(unused_config, pg_collection=groups)
    H, G, C = session.size((32, 8, 128), (4, 2, 16))
    for S in session.size((4096, 8192), (128,)):
        q, k, v = (
            torch.randn(S, 1, heads, C, device=world.device, dtype=torch.bfloat16).requires_grad_()
            for heads in (H, G, G)
        )
        place_BS = torch.arange(S, device=world.device)[None] % (S // 4)  # four documents
        for label, mask, part in ((f"causal, {S}", None, 1.0), (f"documents, {S}", place_BS, 0.25)):
            flops = 3.5 * 4 * S * S * H * C / 2 * part
            _one_attention(session, label, partial(module, q, k, v, mask), flops, world.device)


def _one_attention(
    session: Session, label: str, forward: Callable[[], Tensor], flops: float, device: torch.device
) -> None:
    out_grad = torch.randn_like(forward().detach())

    def run() -> None:
        forward().backward(out_grad)

    elapsed = milliseconds(run, device, repeats=5)
    tflops, memory = flops / elapsed / 1e9, peak_gib(run, device)
    kernels = list(_longest_kernels(run, device)) or ["no kernel"]
    session.add(
        label, f"{tflops:.0f} TFLOP/s, {memory:.2f} GiB, {kernels[0][:30]}",
        milliseconds=elapsed, tflops=tflops, peak_gib=memory, kernels=kernels,
        flops="7 products of S x S x H x C, of which a causal (or document) mask leaves its part",
    )  # fmt: skip


def _longest_kernels(run: Callable[[], object], device: torch.device) -> Iterator[str]:
    """Yield the names of the five kernels (on a CPU: operations) that take longest."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        run()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    yield from (event.key for event in events[:5])


def loss(session: Session) -> None:
    """Take the package's loss and its gradient over the logits of one sequence."""
    session.on_rank(partial(_loss, session))


def _loss(session: Session, world: World) -> None:
    from megatron_moe.model.loss import make_output_processor
    from megatron_moe.parallel.groups import create_groups

    _, groups = create_groups(Parallel(), seed=0)
    S, V = session.size((4096, 128256), (64, 1000))
    device = world.device
    logits_SBV = torch.randn(S, 1, V, device=device, dtype=torch.bfloat16).requires_grad_()
    labels_BS = torch.randint(V, (1, S), device=device)
    process = make_output_processor(vocab_size=V, tp_group=groups.tp)

    def run() -> Tensor:
        logits_SBV.grad = None
        losses_BS = process(
            hidden_states=logits_SBV, output_layer=lambda hidden, weight: (hidden.clone(), None),
            output_weight=None, labels=labels_BS,
        )  # fmt: skip
        losses_BS.mean().backward()
        return losses_BS.detach()

    losses_BS = run()
    assert logits_SBV.grad is not None
    exact = logits_SBV.detach().double().requires_grad_()
    exact_S = F.cross_entropy(exact[:, 0], labels_BS[0], reduction="none")
    exact_S.mean().backward()
    assert exact.grad is not None
    error = relative_error(logits_SBV.grad, exact.grad)
    loss_error = relative_error(losses_BS[0], exact_S.detach())
    del exact, exact_S
    copying = milliseconds(logits_SBV.detach().clone, device)  # the loss may overwrite its logits
    elapsed, memory = milliseconds(run, device) - copying, peak_gib(run, device)
    ok = error <= BF16_ERROR and loss_error <= 1e-5
    session.add(
        f"{S} x {V}", f"{elapsed:.1f} ms, {memory:.2f} GiB, gradient {error:.1e}",
        expected=f"<= {LOSS_MILLISECONDS:.0f} ms, error <= {BF16_ERROR:.0e}",
        verdict=session.target(elapsed <= LOSS_MILLISECONDS) if ok else passed(ok),
        milliseconds=elapsed, peak_gib=memory, gradient_error=error, loss_error=loss_error,
    )  # fmt: skip
