"""Test that output folders are complete or absent, and never mixed or overwritten."""

from pathlib import Path

import pytest
from folders import complete_or_absent, is_complete, write_json

from megatron_moe.errors import UserError


def fill(out: Path, request: dict) -> None:
    with complete_or_absent(out) as staging:
        write_json(staging / "record.json", {"request": request})


def test_same_request_again_is_complete(tmp_path: Path):
    out = tmp_path / "new" / "out"
    assert not is_complete(out, record="record.json", request={"a": 1})
    fill(out, {"a": 1})
    assert is_complete(out, record="record.json", request={"a": 1})


def test_failure_leaves_nothing(tmp_path: Path):
    def fail() -> None:
        with complete_or_absent(tmp_path / "out") as staging:
            (staging / "half").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_not_in_the_next_one(tmp_path: Path):
    leftover = tmp_path / ".out.partial"
    leftover.mkdir()
    (leftover / "half").touch()
    fill(tmp_path / "out", {})
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "record.json"]


def test_another_request_is_refused_with_both(tmp_path: Path):
    fill(tmp_path / "out", {"from": "a"})
    with pytest.raises(UserError, match="another request: from = a, now from = b"):
        is_complete(tmp_path / "out", record="record.json", request={"from": "b"})


def test_a_folder_of_somebody_else_is_refused_and_kept(tmp_path: Path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="not created by this tool"):
        is_complete(tmp_path, record="record.json", request={})
    assert (tmp_path / "thesis.tex").exists()


def test_an_empty_folder_may_be_filled(tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    assert not is_complete(out, record="record.json", request={})
    fill(out, {})
    assert (out / "record.json").exists()
