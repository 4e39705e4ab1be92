"""A plan is replaced only by a whole one, and `construct` overwrites nothing but plans."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from named_pipes import named_pipe
from safetensors.numpy import save_file

from megatron_moe.commands.verify import verify
from megatron_moe.config.load import build
from megatron_moe.config.moe import Moe, Upcycle
from megatron_moe.config.run import RunConfig
from megatron_moe.construct.place import check_place, publish, working_folder
from megatron_moe.errors import CheckpointError, ConfigError
from megatron_moe.experts.file import PLAN_FILE, read_plan, write_plan
from megatron_moe.experts.plan import ExpertPlan, LayerTable, make_expert_plan
from megatron_moe.experts.solved import check_solved, solved_folder, write_solved
from megatron_moe.hf.disk import write_text
from megatron_moe.hf.spec import spec_from_config

SPEC = spec_from_config(
    {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 8,
        "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 64,
    }
)  # fmt: skip
EMPTY = make_expert_plan(
    SPEC,
    Moe(num_moe_experts=2, moe_ffn_hidden_size=8),
    Upcycle(method="split_random", fit=["router", "down"]),
)


def complete(path: Path, value: float) -> None:
    """Complete a plan in the working folder, as `construct` does."""
    working, tables = working_folder(path), {}
    write_text(working / "key", "settings")
    for layer in range(2):
        rows_ND = np.full((16, 8), value + layer, dtype=np.float32)
        digest = write_solved(working, layer, rows_ND)
        router_ED = np.full((2, 8), value, dtype=np.float32)
        tables[layer] = LayerTable(router_ED=router_ED, down_hash=digest)
        write_text(working / f"{layer:05}.json", "{}")
    write_plan(working / PLAN_FILE, EMPTY.with_tables(tables), source="source")


def value_of(path: Path) -> float:
    """Return which plan is there, if it is whole."""
    plan: ExpertPlan = read_plan(path, EMPTY, source="source")
    for layer, table in plan.tables.items():
        check_solved(solved_folder(path), layer, table.down_hash or "")
    router_ED = plan.tables[0].router_ED
    assert router_ED is not None
    return float(router_ED[0, 0])


def killed_at(call: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let the given change of the file system fail, and all after it."""
    done = 0

    def failing(change: Any) -> Any:
        def wrapper(*args: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done >= call:
                raise KeyboardInterrupt
            return change(*args, **options)

        return wrapper

    for name in ("rename", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(Path, name, failing(getattr(Path, name)))
    monkeypatch.setattr(shutil, "rmtree", failing(shutil.rmtree))
    return monkeypatch.undo


@pytest.mark.parametrize("call", range(1, 9))
def test_a_kill_at_any_change_of_files_can_be_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
):
    path = tmp_path / "q.safetensors"
    complete(path, 1.0)
    publish(path)
    assert value_of(path) == 1.0
    complete(path, 2.0)
    assert value_of(path) == 1.0, "the old plan is whole while the new one is made"
    revive = killed_at(call, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        publish(path)
    revive()
    refused = ""
    try:
        left = value_of(path)
    except CheckpointError as error:
        left, refused = None, str(error)
    assert left in (1.0, 2.0) or "run megatron-moe construct again" in refused
    publish(path)
    assert value_of(path) == 2.0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["q.down", "q.safetensors"]
    names = [file.name for file in (tmp_path / "q.down").iterdir()]
    assert sorted(names) == ["00000.safetensors", "00001.safetensors"]


def test_plans_have_folders_of_their_own(tmp_path: Path):
    names = ["q.safetensors", "q.k2", "q.k3", "q", "q.x.safetensors"]
    folders = {solved_folder(tmp_path / name) for name in names}
    assert len(folders) == len(names)
    assert tmp_path / "q.down" in folders
    for number, name in enumerate(names):
        complete(tmp_path / name, number)
        publish(tmp_path / name)
    assert [value_of(tmp_path / name) for name in names] == [0, 1, 2, 3, 4]


def test_a_link_has_the_folder_of_its_plan(tmp_path: Path):
    complete(tmp_path / "q.safetensors", 3.0)
    publish(tmp_path / "q.safetensors")
    (tmp_path / "below").mkdir()
    link = tmp_path / "below" / "link.safetensors"
    link.symlink_to("../q.safetensors")
    assert value_of(link) == 3.0


def make_weights(path: Path) -> None:
    path.parent.mkdir()
    save_file({"w": np.zeros(2, dtype=np.float32)}, path)


def make_circle(path: Path) -> None:
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)


def make_foreign_matrices(path: Path) -> None:
    write_text(path.with_suffix(".down") / "notes.txt", "mine")


OCCUPIED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "weights": ("m/model.safetensors", make_weights, "a file that is no plan is there"),
    "text": ("notes", Path.touch, "a file that is no plan is there"),
    "folder": ("p", Path.mkdir, "it is a folder"),
    "below a file": ("f/x.safetensors", lambda path: path.parent.touch(), "the folder of upcycle"),
    "proc": ("/proc/x.safetensors", lambda path: None, "/proc"),
    "long": ("x" * 250, lambda path: None, "File name too long"),
    "down": ("p.down", lambda path: None, "folders of solved matrices have names in .down"),
    "circle": ("p.safetensors", make_circle, "ymlink"),
    "run": ("run", lambda path: None, "run.dir"),
    "matrices": ("q.safetensors", make_foreign_matrices, "also holds notes.txt"),
    "matrices are a file": (
        "q.safetensors", lambda path: path.with_suffix(".down").touch(), "is a file",
    ),
}  # fmt: skip


def config(tmp_path: Path, plan: Path) -> RunConfig:
    tree = {
        "run": {"dir": str(tmp_path / "run")}, "source": {"path": "dense"},
        "data": {"path": "text"}, "train": {"steps": 10}, "moe": {"num_moe_experts": 8},
        "upcycle": {"plan": str(plan)},
    }  # fmt: skip
    return build(RunConfig, tree)


@pytest.mark.parametrize("case", OCCUPIED)
def test_what_is_no_plan_is_refused_and_stays(tmp_path: Path, case: str):
    name, prepare, reason = OCCUPIED[case]
    plan = tmp_path / name
    prepare(plan)
    before = sorted(str(file) for file in tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as refused:
        check_place(config(tmp_path, plan))
    assert reason in str(refused.value)
    assert str(refused.value).startswith(("upcycle.plan (", "the folder of upcycle.plan ("))
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before


def test_a_plan_and_a_free_place_are_accepted(tmp_path: Path):
    path = tmp_path / "new" / "q.safetensors"
    check_place(config(tmp_path, path))
    assert list(path.parent.iterdir()) == []
    complete(path, 1.0)
    publish(path)
    check_place(config(tmp_path, path))
    link = tmp_path / "link"
    link.symlink_to(path)
    check_place(config(tmp_path, link))
    assert value_of(link) == 1.0


def test_every_flipped_bit_of_a_plan_is_found(tmp_path: Path):
    path = tmp_path / "q.safetensors"
    complete(path, 1.0)
    publish(path)
    for named in (path, solved_folder(path)):
        (result,) = verify(named, lambda *_: None)
        assert (result.kind, result.files, result.problems) == ("plan", 3, [])
    for file in (path, *solved_folder(path).iterdir()):
        content = file.read_bytes()
        start = content.index(b"}}", 8)
        for place in {0, 20, start // 2, start - 70, len(content) - 1}:
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            (result,) = verify(path, lambda *_: None)
            assert [str(file) in problem for problem in result.problems] == [True], place
        file.unlink()
        (gone,) = verify(path, lambda *_: None) if file != path else (None,)
        assert gone is None or [str(file) in problem for problem in gone.problems] == [True]
        file.write_bytes(content)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"matrices of \S+q\.safetensors, which is missing"):
        verify(solved_folder(path), lambda *_: None)


def test_files_beside_a_plans_matrices_are_noted_and_not_counted(tmp_path: Path):
    """An earlier plan may have left them."""
    path = tmp_path / "q.safetensors"
    complete(path, 1.0)
    publish(path)
    (solved_folder(path) / "00007.safetensors").write_text("")
    (result,) = verify(path, lambda *_: None)
    assert (result.files, result.problems) == (3, [])
    note = f"in {solved_folder(path)}, but not a part of this plan: 00007.safetensors"
    assert result.notes == [note]


def test_a_matrix_of_a_plan_and_a_folder_with_plans_name_the_plan(tmp_path: Path):
    path = tmp_path / "q.safetensors"
    complete(path, 1.0)
    publish(path)
    matrix = solved_folder(path) / "00001.safetensors"
    for place, message in {
        matrix: f"{matrix} is a part of a plan.\n  verify the plan: {path}",
        tmp_path: f"{tmp_path} is neither a run.*\n  verify what is in it: {path}",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            verify(place, lambda *_: None)


def test_a_pipe_among_the_matrices_of_a_plan_is_refused(tmp_path: Path):
    path = tmp_path / "q.safetensors"
    complete(path, 1.0)
    publish(path)
    with named_pipe(solved_folder(path) / "00001.safetensors"):
        (result,) = verify(path, lambda *_: None)
    assert "it is a named pipe (FIFO)" in result.problems[0]
