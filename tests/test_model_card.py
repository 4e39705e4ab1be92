"""The model card quotes files of the run, which may be damaged or cut short."""

from pathlib import Path

import pytest

from megatron_moe.commands.model_card import _losses, _receipt
from megatron_moe.errors import CheckpointError


def test_half_a_last_line_of_metrics_is_left_out(tmp_path: Path):
    """A killed run leaves one, which used to end the export in a traceback."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss/lm": 2.5}\n{"step": 2, "loss/lm": 1.5}\n{"step": 3, "lo')
    assert _losses(path, 2) == {"loss/lm, step 2": "1.5000"}
    assert _losses(tmp_path / "missing.jsonl", 2) == {}


def test_a_damaged_receipt_is_named(tmp_path: Path):
    path = tmp_path / "receipt.json"
    path.write_text("{")
    with pytest.raises(
        CheckpointError, match=r"receipt\.json, which the model card quotes, is"
    ) as e:
        _receipt(path)
    assert str(e.value).endswith("\n  move it away to export without it")
