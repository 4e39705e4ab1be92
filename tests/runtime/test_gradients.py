"""Tests of gradients that products write into data parallelism's buffers, against autograd."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from tiny import save_dense
from torch import Tensor
from training_runs import tree, write_tokens

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.runtime import gradients
from megatron_moe.runtime.world import World


def buffer_of(*sizes: tuple[int, ...]) -> Any:
    params = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for param in params:
        param.main_grad = torch.full(param.shape, torch.nan)  # left over from the previous step
    return SimpleNamespace(param_index_map=dict.fromkeys(params), extra_main_grads=[])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_first_product_of_a_step_overwrites_and_the_others_add(dtype: torch.dtype):
    buffer = buffer_of((3, 4))
    (main_grad,) = (param.main_grad for param in buffer.param_index_map)
    for step in range(3):
        gradients.reset(buffer)
        generator = torch.Generator().manual_seed(step)
        exact = torch.zeros(3, 4, dtype=torch.float64)
        for rows in (5, 0, 2):
            out_grad = torch.randn(rows, 3, generator=generator).to(dtype)
            inputs = torch.randn(rows, 4, generator=generator).to(dtype)
            gradients.add_product(main_grad, out_grad, inputs)
            exact += out_grad.double().t() @ inputs.double()
        # A sum of seven products of numbers in dtype, rounded to dtype at most twice.
        torch.testing.assert_close(
            main_grad.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps
        )


@pytest.mark.distributed
def test_cuda_adds_bf16_products_to_fp32_in_one_operation():
    """Run in a separate process that defines torch's two CUDA-only overloads for the CPU."""
    run_on_ranks(check_widened, world_size=1)


def check_widened(world: World) -> None:
    calls = []

    def mm(left: Tensor, right: Tensor, wide: torch.dtype, *, out: Tensor) -> Tensor:
        calls.append("mm")
        return out.copy_(left.to(wide) @ right.to(wide))

    def addmm(
        self: Tensor, left: Tensor, right: Tensor, wide: torch.dtype, *, beta: float = 1,
        alpha: float = 1, out: Tensor,
    ) -> Tensor:  # fmt: skip
        calls.append("addmm")
        assert self.data_ptr() == out.data_ptr()
        return out.copy_(self + left.to(wide) @ right.to(wide))

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    generator = torch.Generator().manual_seed(0)
    main_grad, exact = torch.full((3, 4), torch.nan), torch.zeros(3, 4, dtype=torch.float64)
    for index, rows in enumerate((5, 0, 2)):
        out_grad = torch.randn(rows, 3, generator=generator).bfloat16()
        inputs = torch.randn(rows, 4, generator=generator).bfloat16()
        gradients.add_widened(main_grad, out_grad, inputs, first=index == 0)
        exact += out_grad.double().t() @ inputs.double()
    assert calls == ["mm", "addmm"], "no rows are no product"
    torch.testing.assert_close(main_grad.double(), exact, rtol=0, atol=1e-5)  # fp32
    gradients.add_widened(main_grad, torch.empty(0, 3), torch.empty(0, 4), first=True)
    assert not main_grad.any()


def test_no_rows_at_all_are_a_gradient_of_zero():
    buffer = buffer_of((3, 4))
    (main_grad,) = (param.main_grad for param in buffer.param_index_map)
    for _ in range(2):
        gradients.reset(buffer)
        gradients.add_product(main_grad, torch.empty(0, 3), torch.empty(0, 4))
        assert torch.equal(main_grad, torch.zeros(3, 4))
        main_grad.fill_(torch.nan)


def test_what_no_product_came_to_is_zero():
    buffer = buffer_of((2, 2), (2,))
    with_products, other = (param.main_grad for param in buffer.param_index_map)
    gradients.reset(buffer)
    gradients.add_product(with_products, torch.ones(1, 2), torch.ones(1, 2))
    with_products.fill_(torch.nan)
    gradients.reset(buffer)
    assert torch.equal(other, torch.zeros(2))
    gradients.zero_stale(buffer.param_index_map)
    assert torch.equal(with_products, torch.zeros(2, 2))


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True])
def test_a_steps_gradients_are_autograds(tmp_path: Path, tied: bool):
    """Compare the buffers in two steps of two micro-batches with a backward pass of torch."""
    dense = save_dense(tmp_path / "dense", tie_word_embeddings=tied)
    config = build(
        RunConfig,
        tree(
            tmp_path / "run",
            dense,
            write_tokens(tmp_path / "tokens"),
            moe={"num_moe_experts": 4, "moe_router_load_balancing_type": "none"},
            train={"steps": 3, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
        ),
    )
    run_on_ranks(compare, config, world_size=1)


def compare(world: World, config: RunConfig) -> None:
    from megatron_moe.bench.build import make_supply, make_timed_state
    from megatron_moe.parallel.groups import create_groups
    from megatron_moe.train.guard import StepGuard
    from megatron_moe.train.step import train_step

    layout, groups = create_groups(config.parallel, seed=0)
    state = make_timed_state(config, world, layout, groups, random=True, balanced=False)
    batches = make_supply(config, state.model.spec, groups, random=True)(state)
    assert len(batches) == 2
    (wrapped,) = state.wrapped
    for _ in range(2):  # the second step starts with marked buffers, not zeroed ones
        wanted = autograds(wrapped.module, batches)
        actual: dict[str, Tensor] = {}

        def keep(stage: str, actual: dict[str, Tensor] = actual) -> None:
            if stage == "optimizer":
                for name, param in wrapped.module.named_parameters():
                    actual[name] = param.main_grad.clone()

        train_step(state, batches, config, groups, guard=StepGuard(config.guard), at=keep)
        assert actual.keys() == wanted.keys()
        for name, gradient in actual.items():  # fp32 sums in a different order
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-7)


def autograds(module: Any, batches: list[Any]) -> dict[str, Tensor]:
    """Return gradients of the mean over all tokens, without data parallelism."""
    from megatron_moe.model.loss import make_output_processor

    process = make_output_processor(vocab_size=module.vocab_size, tp_group=module.pg_collection.tp)
    names, parameters = zip(*module.named_parameters(), strict=True)
    with without_buffers(module):
        total = torch.zeros(())
        for batch in batches:
            losses_BS = module(
                batch.tokens_BS,
                batch.position_ids_BS,
                attention_mask=None,
                labels=batch.labels_BS,
                output_processor=process,
            )
            total = total + (losses_BS * batch.loss_mask_BS).sum()
        total = total / sum(batch.loss_mask_BS.sum() for batch in batches)
        return dict(zip(names, torch.autograd.grad(total, parameters), strict=True))


@contextmanager
def without_buffers(module: torch.nn.Module) -> Iterator[None]:
    """Make products return gradients instead of adding to buffers."""
    main_grads = {param: param.main_grad for param in module.parameters()}
    linears = [m for m in module.modules() if hasattr(m, "gradient_accumulation_fusion")]
    for param in main_grads:
        del param.main_grad
    for linear in linears:
        linear.gradient_accumulation_fusion = False
    yield
    for param, main_grad in main_grads.items():
        param.main_grad = main_grad
    for linear in linears:
        linear.gradient_accumulation_fusion = True
