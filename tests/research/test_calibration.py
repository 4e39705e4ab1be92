"""Test that the shipped constants are the fit, and predict models that the fit has not seen."""

from dataclasses import astuple

import pytest

from megatron_moe.planner.calibration import FITTED
from research.calibration.fit import (
    fit,
    leave_one_model_out,
    mfu_of,
    predict,
    predicted_mfu,
    rescaled,
    score,
    sensitivity,
    without,
)
from research.calibration.published import published, validation


@pytest.fixture(scope="module")
def held_out() -> list[float]:
    return leave_one_model_out(published())


def test_unseen_models_are_predicted(held_out):
    result = score(held_out, published())
    assert result.mean_absolute_error <= 2.5
    assert result.spearman >= 0.9


def test_folding_beats_not_folding_for_unseen_models(held_out):
    rows = published()
    pairs = 0
    for i, without_folding in enumerate(rows):
        if without_folding.folding is not False:
            continue
        with_folding = next(
            j
            for j, row in enumerate(rows)
            if row.model == without_folding.model
            and row.folding
            and row.work.global_batch_size == 256
        )
        assert held_out[with_folding] > held_out[i]
        pairs += 1
    assert pairs == 3


def test_the_shipped_constants_are_the_fit():
    assert astuple(FITTED) == pytest.approx(astuple(fit(published())), rel=0.01)


def test_accuracy_does_not_depend_on_the_batch_of_rows_without_one():
    for batch in (128, 512):
        assert sensitivity(published(), global_batch=batch).mean_absolute_error <= 2.5


def test_rows_that_nothing_was_fitted_to_are_predicted():
    rows = validation()
    assert score([predicted_mfu(row) for row in rows], rows).mean_absolute_error <= 2.0
    for row in rows:
        slow = row.model == "llama3-8x70b" and not row.folding  # see docs/planning.md
        assert abs(predicted_mfu(row) - row.mfu) < (6 if slow else 4)


def test_only_causal_counting_explains_long_sequences():
    """Check that arXiv 2504.14960, table 5, cannot count the square: see published_mfu.yaml."""
    long = [row for row in validation() if row.work.sequence_length >= 32768]
    assert len(long) == 6
    for row in long:
        assert row.convention == "causal"
        time = predict(row)
        assert abs(mfu_of(time, "causal") - row.mfu) < 2
        assert mfu_of(time, "full_attention") - row.mfu > 10


@pytest.mark.parametrize("term", ["ep", "output_layer", "attention", "etp"])
def test_terms_that_carry_the_prediction(term):
    rows = published()
    full = score([predicted_mfu(row) for row in rows], rows).mean_absolute_error
    assert score(rescaled(without(term, rows), rows), rows).mean_absolute_error > 1.2 * full
