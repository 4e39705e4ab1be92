"""Test that each configuration in configs/h100 is legal on the GPUs in its name, and fits."""

import pytest
from dense_models import H100_FILES, shipped

from megatron_moe.model.capacity import capacity_of
from megatron_moe.planner.check import check_layout


def test_there_are_configurations():
    assert len(H100_FILES) >= 16


@pytest.mark.parametrize("path", H100_FILES, ids=lambda path: path.stem)
def test_configuration_is_legal_and_fits(path):
    config, spec, gpus = shipped(path)
    result = check_layout(config, spec, gpus=gpus)
    assert result.reasons == ()
    assert result.fits
    assert result.candidate is not None
    assert result.candidate.time.mfu_full_attention > 30


@pytest.mark.parametrize(("factor", "of_megatron"), [(1, 0.5), (2, 1.0), (4, 2.0)])
@pytest.mark.parametrize("gpus", [128, 512])
def test_capacity_factors_are_those_of_the_paper(factor, of_megatron, gpus):
    """Check that factors follow arXiv 2412.09952: tokens / experts * factor.

    Its factor 4 at top-2 is Megatron-Core's 2.
    """
    (path,) = [p for p in H100_FILES if p.stem == f"llama3-8b-e8t2-cf{factor}-{gpus}"]
    moe = shipped(path)[0].moe
    capacity = capacity_of(moe)
    assert capacity is not None
    assert capacity.tokens(8192, num_experts=8, topk=2) == 8192 // 8 * factor
    assert moe.megatron_capacity_factor == of_megatron
