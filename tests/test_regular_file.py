"""Every reader refuses a named pipe in place of its file, before it opens it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from named_pipes import named_pipe
from tiny import save_dense

from megatron_moe.checkpoint.folder import read_progress
from megatron_moe.checkpoint.index import SafeReader
from megatron_moe.config.load import load
from megatron_moe.config.run import RunConfig
from megatron_moe.data.documents import ReadPosition, read_blocks
from megatron_moe.data.reference import read_reference_losses
from megatron_moe.data.stream import open_pair
from megatron_moe.data.tokenizer import fingerprint_of, load_tokenizer
from megatron_moe.errors import UserError
from megatron_moe.experts.file import check_plan
from megatron_moe.experts.solved import check_solved, read_solved
from megatron_moe.hf.checksums import Block, Checksums, read_checksums
from megatron_moe.hf.load import load_model
from megatron_moe.hf.reader import open_safetensors
from megatron_moe.hf.spec import read_spec
from megatron_moe.planner.calibration import read_constants
from megatron_moe.regular_file import regular, regular_or_shell_pipe

Reader = Callable[[Path], Any]


def blocks(path: Path) -> list[Any]:
    return list(read_blocks([path], text_key="text", start=ReadPosition()))


READERS: dict[str, tuple[str, Reader]] = {
    "settings": ("run.yaml", lambda folder: load(RunConfig, folder / "run.yaml")),
    "config_of_a_source": ("config.json", read_spec),
    "weights_of_a_source": ("model.safetensors", open_safetensors),
    "generation_config": ("generation_config.json", lambda f: load_model(f, device="cpu")),
    "tokenizer": ("tokenizer.json", load_tokenizer),
    "tokenizer_config": ("tokenizer_config.json", fingerprint_of),
    "sentencepiece": ("tokenizer.model", load_tokenizer),
    "plan": ("plan.safetensors", lambda folder: check_plan(folder / "plan.safetensors")),
    "hash_of_a_plans_matrix": ("00000.safetensors", lambda folder: check_solved(folder, 0, "")),
    "matrix_of_a_plan": ("00000.safetensors", lambda folder: read_solved(folder, 0, slice(1))),
    "tokens": ("text.bin", lambda folder: open_pair(folder / "text")),
    "index_of_tokens": ("text.idx", lambda folder: open_pair(folder / "text")),
    "text": ("text.jsonl", lambda folder: blocks(folder / "text.jsonl")),
    "table": ("text.parquet", lambda folder: blocks(folder / "text.parquet")),
    "reference_losses": (
        "losses.json", lambda f: read_reference_losses(f / "losses.json", [], tokenizer=""),
    ),
    "constants": ("constants.json", lambda folder: read_constants(folder / "constants.json")),
    "checksums": ("CHECKSUMS", read_checksums),
    "file_with_a_checksum": (
        "x", lambda folder: Checksums(folder, {"x": {0: Block(0, 1, "")}}).check_file("x"),
    ),
    "index_of_a_checkpoint": (".metadata", lambda folder: SafeReader(folder).read_metadata()),
    "progress_of_a_checkpoint": ("checkpoint.json", read_progress),
}  # fmt: skip


@pytest.mark.parametrize("case", READERS)
def test_a_pipe_in_place_of_a_file_is_refused(tmp_path: Path, case: str):
    name, read = READERS[case]
    folder = save_dense(tmp_path / "dense")
    (folder / "checkpoints").mkdir()
    for suffix in (".bin", ".idx"):
        (folder / f"text{suffix}").write_bytes(b"text")
    with named_pipe(folder / name), pytest.raises(UserError) as error:
        read(folder)
    assert name.rpartition("/")[2] in str(error.value)
    assert "it is a named pipe (FIFO), not a regular file" in str(error.value)


def test_torch_opens_no_pipe_in_place_of_a_tensor(tmp_path: Path):
    with named_pipe(tmp_path / "x"), pytest.raises(OSError, match="named pipe"):
        SafeReader(tmp_path).fs.create_stream(tmp_path / "x", "rb").__enter__()


def test_devices_and_sockets_are_refused(tmp_path: Path):
    with pytest.raises(OSError, match="it is a device"):
        regular(Path("/dev/zero"))
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="it is a device"):
        regular(tmp_path / "link")


def test_settings_from_a_process_of_the_shell_are_read(tmp_path: Path):
    """A shell passes ``<(command)`` as a pipe in /dev/fd, which has a writer."""
    reader, writer = os.pipe()
    os.write(writer, b"settings: true\n")
    os.close(writer)
    path = Path(f"/dev/fd/{reader}")
    assert regular_or_shell_pipe(path).read_text() == "settings: true\n"
    os.close(reader)
    with named_pipe(tmp_path / "x"), pytest.raises(OSError, match="named pipe"):
        regular_or_shell_pipe(tmp_path / "x")
