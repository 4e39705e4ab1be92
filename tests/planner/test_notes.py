"""What a prediction leaves out is said, not guessed."""

from pathlib import Path
from typing import Any

import pytest

from megatron_moe.cli.plan import plan_notes
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig


def notes(tmp_path: Path, **sections: dict[str, Any]) -> list[str]:
    tree = {"run": {"dir": "run"}, "source": {"path": "dense"}, "moe": {"num_moe_experts": 4},
            "data": {"path": "text"}, "train": {"steps": 1}}  # fmt: skip
    (tmp_path / "text.jsonl").write_text("{}\n")
    tree["data"] = {"path": str(tmp_path / "text.jsonl")}
    for name, values in sections.items():
        tree[name] = {**tree[name], **values}
    return list(plan_notes(build(RunConfig, tree), gpus=8, gpu="H100"))


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [("train", {"fp8": "hybrid"}, "train.fp8 (hybrid)"),
     ("train", {"delay_wgrad_compute": True}, "train.delay_wgrad_compute (True)"),
     ("moe", {"moe_shared_expert_overlap": True}, "moe.moe_shared_expert_overlap (True)")],
)  # fmt: skip
def test_settings_that_nobody_measured_are_not_predicted(
    tmp_path: Path, section: str, values: dict[str, Any], named: str
):
    assert notes(tmp_path) == []
    (note,) = notes(tmp_path, **{section: values})
    assert note.startswith(f"{named} is not in the prediction, which is that of the run without it")
