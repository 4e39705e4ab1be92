"""safetensors and transformers can read a streamed folder; it is complete or absent."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.reader import open_safetensors
from megatron_moe.hf.writer import FolderWriter

ANNOUNCED = {"a": ((3, 5), torch.bfloat16), "b": ((7,), torch.float32), "c": ((), torch.float64)}
TENSORS = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in ANNOUNCED.items()}


def announced(tensors: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


@pytest.fixture
def tiny() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("max_shard_bytes", "files"),
    [
        (5 * 10**9, ["model.safetensors"]),
        (15_000, [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]),
    ],
    ids=["one_file", "three_files"],
)
def test_transformers_loads_what_was_streamed_in_any_order(
    tiny: LlamaForCausalLM, tmp_path: Path, max_shard_bytes: int, files: list[str]
):
    state = tiny.state_dict()
    tiny.config.save_pretrained(tmp_path)
    target = tmp_path / "deep" / "out"
    with FolderWriter(target, announced(state), max_shard_bytes=max_shard_bytes) as writer:
        for name in reversed(state):
            writer.write(name, state[name])
        writer.add_file("config.json", tmp_path / "config.json")
        assert not target.exists()
    assert sorted(path.name for path in target.glob("*.safetensors")) == files
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    for file in files:
        size = (target / file).stat().st_size
        assert size <= max_shard_bytes + 4000, "tensors and a header"

    loaded, report = AutoModelForCausalLM.from_pretrained(
        target, dtype="auto", output_loading_info=True
    )
    assert not any(report.values())
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, state[name])
    dense = open_safetensors(target)
    assert all(torch.equal(dense.read(name), state[name]) for name in state)


def test_safetensors_reads_every_dtype_shape_and_the_metadata(tmp_path: Path):
    with FolderWriter(tmp_path / "out", ANNOUNCED) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
        writer.add_file("note.txt", b"as given")
    assert (tmp_path / "out" / "note.txt").read_bytes() == b"as given"
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "megatron_moe.checksums": "CHECKSUMS"}
        assert set(file.keys()) == set(TENSORS)
        assert all(torch.equal(file.get_tensor(name), TENSORS[name]) for name in TENSORS)
        assert all(file.get_tensor(name).dtype == TENSORS[name].dtype for name in TENSORS)


@pytest.mark.parametrize(
    "weight",
    [torch.nn.Parameter(torch.randn(6, 4)).T[1:3, ::2], torch.nn.Parameter(torch.randn(8))[::2]],
    ids=["matrix", "vector"],
)
def test_a_strided_parameter_is_written_as_it_reads(tmp_path: Path, weight: Tensor):
    with FolderWriter(tmp_path / "out", announced({"w": weight})) as writer:
        writer.write("w", weight)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("w"), weight)


def test_the_index_says_where_each_tensor_is(tmp_path: Path):
    with FolderWriter(tmp_path / "out", ANNOUNCED, max_shard_bytes=30) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 30 + 28 + 8
    assert index["weight_map"] == {
        name: f"model-0000{i}-of-00003.safetensors" for i, name in enumerate("abc", start=1)
    }
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, framework="pt") as shard:
            assert torch.equal(shard.get_tensor(name), TENSORS[name])


WRONG = {
    "unknown": ("d", TENSORS["a"], "d is not announced for"),
    "twice": ("a", TENSORS["a"], "a is already written for"),
    "shape": ("b", torch.ones(8), r"b is (8,) torch.float32, but was announced as (7,) torch.fl"),
    "dtype": ("b", torch.ones(7).half(), "b is (7,) torch.float16, but was announced as (7,)"),
    "incomplete": (None, None, "is not complete: 2 of 3 tensors were not written.\n    b\n    c"),
}


@pytest.mark.parametrize(("name", "tensor", "reason"), WRONG.values(), ids=WRONG)
def test_what_was_not_announced_is_refused_and_leaves_nothing(
    tmp_path: Path, name: str | None, tensor: Tensor, reason: str
):
    def write_wrongly() -> None:
        with FolderWriter(tmp_path / "out", ANNOUNCED) as writer:
            writer.write("a", TENSORS["a"])
            if name is not None:
                writer.write(name, tensor)

    with pytest.raises(CheckpointError) as refusal:
        write_wrongly()
    assert reason in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_writer_leaves_nothing(tmp_path: Path, interruption: type[BaseException]):
    def write_half() -> None:
        with FolderWriter(tmp_path / "out", ANNOUNCED) as writer:
            writer.write("a", TENSORS["a"])
            assert len(list(tmp_path.iterdir())) == 1
            raise interruption

    with pytest.raises(interruption):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten_unless_it_is_empty(tmp_path: Path):
    with FolderWriter(tmp_path, {}):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "CHECKSUMS"}
    with (
        pytest.raises(CheckpointError, match="exists and is not an empty folder"),
        FolderWriter(tmp_path, ANNOUNCED),
    ):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "CHECKSUMS"}


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path):
    petabytes = {"w": ((2**26, 2**26), torch.float32)}
    with (
        pytest.raises(CheckpointError, match=r"16777216.0 GiB needed, .* GiB free"),
        FolderWriter(tmp_path / "out", petabytes),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_files_next_to_the_tensors_have_plain_names_of_their_own(tmp_path: Path):
    with FolderWriter(tmp_path / "out", {}) as writer:
        for name in ("../escape", "model.safetensors"):
            with pytest.raises(AssertionError):
                writer.add_file(name, b"")
