"""Something else in the place of a file or folder of a run is refused before anything is built."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from commands import run_command
from tiny import save_dense
from training_runs import tree, write_tokens

from megatron_moe.train.run_folder import misplaced

FILES = (
    "lock", "metrics.jsonl", "resumed.jsonl", "config.yaml", "texts.json", "receipt.json",
    "plan.safetensors", "wandb_id", "mlflow_run_id",
)  # fmt: skip
FOLDERS = ("checkpoints", "source", "tensorboard", "tokens")


def link_to_nothing(path: Path) -> None:
    path.symlink_to("/gone/elsewhere")


OBSTACLES: dict[str, Callable[[Path], None]] = {
    "a file": Path.touch,
    "a folder": Path.mkdir,
    "a named pipe (FIFO)": os.mkfifo,
    "a symbolic link to /gone/elsewhere, which is not there": link_to_nothing,
}


def replace(path: Path, what: str) -> None:
    """Put something else in the place of a file or folder."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    OBSTACLES[what](path)


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
@pytest.mark.parametrize("what", OBSTACLES)
def test_only_files_are_taken_for_files_and_folders_for_folders(
    tmp_path: Path, name: str, what: str
):
    replace(tmp_path / name, what)
    expected = "a folder" if name in FOLDERS else "a file"
    problem = misplaced(tmp_path)
    if what == expected:
        assert problem is None
    else:
        assert problem is not None
        assert problem.startswith(f"{tmp_path / name} must be {expected} that the run writes, but")
        assert f"but is {what}.\n  move it away, or set another run.dir" in problem


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_links_to_what_is_there_are_followed(tmp_path: Path, name: str):
    """People move parts of a run to another disk and leave a link behind."""
    expected = "a folder" if name in FOLDERS else "a file"
    replace(tmp_path / "moved", expected)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(tmp_path / "moved")
    assert misplaced(tmp_path) is None


def test_an_empty_folder_is_a_run_that_has_not_begun(tmp_path: Path):
    assert misplaced(tmp_path) is None


@pytest.mark.parametrize("name", ["metrics.jsonl", "lock", "checkpoints"])
def test_a_file_of_another_user_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    """Root may write everywhere, so the answer of the system is that for another user."""
    replace(tmp_path / name, "a folder" if name in FOLDERS else "a file")
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: allowed(path, mode) and not mode & os.W_OK)
    problem = misplaced(tmp_path)
    assert problem is not None
    assert f"{tmp_path / name} must be " in problem
    assert "that this user may read and write.\n  change its owner or its mode" in problem


# ---- whole commands ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run, with its configuration next to it."""
    root = tmp_path_factory.mktemp("trained")
    dense = save_dense(root / "dense", num_hidden_layers=2)
    settings = tree(root / "run", dense, write_tokens(root / "tokens"), train={"steps": 2})
    (root / "run.yaml").write_text(yaml.safe_dump(settings))
    run_command("train", root / "run.yaml", check=True)
    return root / "run"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("metrics.jsonl", "a folder"),
        ("metrics.jsonl", "a named pipe (FIFO)"),
        ("lock", "a folder"),
        ("checkpoints/latest", "a folder"),
        ("checkpoints/latest", "a named pipe (FIFO)"),
        ("checkpoints", "a file"),
    ],
)
def test_a_job_ends_before_any_work(trained: Path, tmp_path: Path, name: str, what: str):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    replace(run / name, what)
    done = run_command("train", trained.with_name("run.yaml"), f"run.dir={run}")
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    assert f"{run / name} must be a " in done.stderr
    assert f"but is {what}." in done.stderr
    assert done.stdout.strip() == "", "nothing was read or built"


@pytest.mark.distributed
def test_a_report_refuses_metrics_that_are_no_file(trained: Path, tmp_path: Path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    replace(run / "metrics.jsonl", "a named pipe (FIFO)")
    done = run_command("report", run)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert f"{run}/metrics.jsonl must be a file, but is a named pipe (FIFO)." in done.stderr


@pytest.mark.distributed
def test_a_folder_in_the_place_of_the_report_is_named(trained: Path, tmp_path: Path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "report.html").mkdir()
    done = run_command("report", run)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert f"DiskError: a folder is in the place of a file ({run}/report.html)" in done.stderr
    assert "move it away" in done.stderr
