"""configs/h100: every configuration is legal on as many GPUs as its name says, and fits."""

import pytest
from dense_models import H100_FILES, shipped

from megatron_moe.plan.check import check_layout


def test_there_are_some():
    assert len(H100_FILES) >= 12


@pytest.mark.parametrize("path", H100_FILES, ids=lambda path: path.stem)
def test_configuration_is_legal_and_fits(path):
    config, spec, gpus = shipped(path)
    result = check_layout(config, spec, gpus=gpus)
    assert result.reasons == ()
    assert result.fits
    assert result.candidate is not None
    assert result.candidate.time.mfu > 30
