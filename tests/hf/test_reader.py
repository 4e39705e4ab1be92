"""Slices of safetensors files equal indexing, are counted and bounded in memory, or rejected."""

import ctypes
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_moe.errors import CheckpointError
from megatron_moe.hf import reader, windows
from megatron_moe.hf.names import dense_tensors
from megatron_moe.hf.reader import SourceCheckpoint, open_mixed, open_safetensors
from megatron_moe.hf.spec import spec_from_config

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 7,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch):
    """Make every read of a test use several windows."""
    monkeypatch.setattr(windows, "WINDOW_BYTES", 100)


def folder_of(path: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def dense_with(path: Path, tensors: dict[str, Tensor], **config: object) -> SourceCheckpoint:
    return open_safetensors(folder_of(path, tensors, **config))


def sharded(path: Path, shards: dict[str, dict[str, Tensor]]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    for file, tensors in shards.items():
        save_file(tensors, path / file)
    return with_index(path, {name: file for file, tensors in shards.items() for name in tensors})


def with_index(path: Path, file_of: object) -> Path:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    return path


def with_header(path: Path, header: bytes, tensors: bytes = b"", length: int | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    prefix = struct.pack("<Q", len(header) if length is None else length)
    (path / "model.safetensors").write_bytes(prefix + header + tensors)
    return path


# ---- reading -------------------------------------------------------------------------------------

SELECTIONS = {
    "all": (None, None),
    "rows": (slice(3, 19), None),
    "open_rows": (slice(5, None), None),
    "columns": (None, slice(2, 9)),
    "row_list": (np.array([20, 3, 3, 0, 11]), None),
    "column_list": (None, torch.tensor([10, 0, 10])),
    "rows_of_columns": (slice(1, 22), np.array([8, 1], dtype=np.int32)),
    "rows_and_columns": (torch.tensor([22, 1, 9]), slice(0, 1)),
    "lists": (np.arange(22, -1, -1), np.arange(10, -1, -1)),
    "nothing": (slice(4, 4), None),
    "empty_list": (np.array([], dtype=np.int64), None),
}


def index(full: Tensor, rows: object, columns: object) -> Tensor:
    """Index with torch, one dimension at a time: the oracle."""
    rows = torch.from_numpy(rows).long() if isinstance(rows, np.ndarray) else rows
    columns = torch.from_numpy(columns).long() if isinstance(columns, np.ndarray) else columns
    full = full if rows is None else full[rows]
    return full if columns is None else full[:, columns]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SELECTIONS.values(), ids=SELECTIONS)
def test_a_slice_is_what_indexing_gives(tmp_path: Path, rows, columns, dtype: torch.dtype):
    full = torch.randn(23, 11).to(dtype)
    dense = open_safetensors(folder_of(tmp_path, {"other": torch.ones(3), "w": full}))
    result = dense.read("w", rows=rows, columns=columns)
    expected = index(full, rows, columns)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert dense.bytes_read == expected.numel() * dtype.itemsize


@st.composite
def indices(draw: st.DrawFn, size: int):
    kind = draw(st.sampled_from(["all", "slice", "list"]))
    if kind == "all":
        return None
    if kind == "slice":
        start = draw(st.integers(0, size))
        return slice(start, draw(st.integers(start, size)))
    return draw(hnp.arrays(np.int64, st.integers(0, 40), elements=st.integers(0, size - 1)))


@settings(max_examples=150)
@given(st.data())
def test_any_slice_of_any_tensor_fills_any_view(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    dtype, into = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    flat = data.draw(st.booleans())
    full = torch.randn((height,) if flat else (height, width)).to(dtype)
    rows = data.draw(indices(height))
    columns = None if flat else data.draw(indices(width))
    odd = torch.ones(data.draw(st.integers(1, 9)), dtype=torch.float16)
    path = folder_of(tmp_path_factory.mktemp("dense"), {"a": odd, "w": full})
    expected = index(full, rows, columns)

    around = torch.full([size + 2 for size in expected.shape], -7.0, dtype=into)
    expected_around = around.clone()
    inside = (slice(1, -1),) * expected.ndim
    destination = nn.Parameter(around)[inside]  # a strided view that requires a gradient
    dense = open_safetensors(path)
    dense.read_into("w", destination, rows=rows, columns=columns)

    expected_around[inside] = expected.to(into)
    torch.testing.assert_close(around, expected_around, rtol=0, atol=0)
    assert dense.bytes_read == expected.numel() * dtype.itemsize


def test_what_several_want_of_a_tensor_is_read_in_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Random rows in 8 parts, random columns, an overlap, and all: no row is mapped twice."""
    full = torch.randn(200, 24)
    dense = open_safetensors(folder_of(tmp_path, {"w": full}))
    monkeypatch.setattr(windows, "WINDOW_BYTES", 16 * 24 * 4)
    mapped = []
    map_window = reader.mapped_rows

    def spy(info, window):
        mapped.extend(range(window.start, window.stop))
        return map_window(info, window)

    monkeypatch.setattr(reader, "mapped_rows", spy)
    rows, columns = torch.randperm(200).chunk(8), torch.randperm(24).chunk(8)
    selections = [
        *((part, None) for part in rows),
        *((None, part) for part in columns),
        (slice(30, 90), slice(2, 5)),
        (None, None),
        (torch.tensor([7, 7, 199]), None),
    ]
    requests = [reader.ReadRequest(torch.empty_like(index(full, *s)), *s) for s in selections]
    dense.read_all_into("w", requests)
    for request in requests:
        assert torch.equal(request.destination, index(full, request.rows, request.columns))
    assert mapped == list(range(200))


def test_tensors_that_no_machine_word_is_aligned_to_are_read(tmp_path: Path):
    # Headers of old files have any length; this one is 1 byte longer than a multiple of eight.
    values = torch.randn(5, 3)
    header = b'{"w":{"dtype":"F32","shape":[5,3],"data_offsets":[0,60]}}'
    header += b" " * (1 - len(header) % 8)
    dense = open_safetensors(with_header(tmp_path, header, values.numpy().tobytes()))
    assert torch.equal(dense.read("w", rows=slice(1, 5)), values[1:5])


def test_an_empty_tensor_reads_as_empty(tmp_path: Path):
    dense = dense_with(tmp_path, {"w": torch.ones(3, 0)})
    assert dense.read("w", rows=slice(1, 3)).shape == (2, 0)


def test_shards_are_read_by_index_and_through_the_links_of_the_hub_cache(tmp_path: Path):
    a, b = torch.randn(3, 4), torch.randn(6)
    blobs = sharded(tmp_path / "blobs", {"x1": {"a": a}, "x2": {"b": b}})
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for name, blob in (("one.safetensors", "x1"), ("two.safetensors", "x2"), ("config.json",) * 2):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    dense = open_safetensors(with_index(snapshot, {"a": "one.safetensors", "b": "two.safetensors"}))
    assert torch.equal(dense.read("a"), a)
    assert torch.equal(dense.read("b"), b)
    assert dense.tensors["b"].file == snapshot / "two.safetensors"
    assert dense.tensors["a"].shape == (3, 4)
    assert dense.source_bytes == dense.bytes_read == a.nbytes + b.nbytes
    assert blobs != dense.folder == snapshot


M_MMAP_THRESHOLD = -3


def peak_growth(work: Callable[[], None], warm_up: Callable[[], None]) -> int:
    """Return the growth in bytes of a forked child's peak resident memory during ``work``.

    ``warm_up`` runs the same code on other data first, so that the code itself is resident.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the parent's threads do not exist in the child
        # Return freed buffers to the system at once: memory that the allocator keeps depends on
        # earlier tests, and must not count for the reader.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**18)
        warm_up()
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current size
        before = resident("VmRSS")
        work()
        os.write(send, str(resident("VmHWM") - before).encode())
        os._exit(0)
    os.close(send)
    _, status = os.waitpid(child, 0)
    assert status == 0
    return int(os.read(receive, 99))


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (slice(4096, 8192), None),
        (np.random.default_rng(0).permutation(32768)[:4096], None),
        (np.full(4096, 7), None),
        (None, slice(256, 512)),
        (None, np.random.default_rng(0).permutation(2048)[:256]),
    ],
    ids=["rows", "row_list", "one_row_repeated", "columns", "column_list"],
)
def test_beyond_its_destination_a_read_is_resident_with_some_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows, columns
):
    window = 4 * 2**20
    monkeypatch.setattr(windows, "WINDOW_BYTES", window)
    dense = dense_with(tmp_path / "dense", {"w": torch.ones(32768, 2048)})  # 256 MiB
    shutil.copytree(dense.folder, tmp_path / "other")
    other = open_safetensors(tmp_path / "other")

    shape = (32768 if rows is None else 4096, 2048 if columns is None else 256)
    destination = torch.full(shape, 7.0)
    assert destination.nbytes == 32 * 2**20

    def read_an_eighth(dense: SourceCheckpoint) -> None:
        dense.read_into("w", destination, rows=rows, columns=columns)
        assert destination.sum() == destination.numel()

    growth = peak_growth(lambda: read_an_eighth(dense), warm_up=lambda: read_an_eighth(other))
    assert growth < 2 * window, "one window, mapped or gathered from the file"


# ---- rejected files ------------------------------------------------------------------------------


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as refusal:
        work()
    return str(refusal.value)


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> bytes:
    return json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


BAD_FILES = {
    "empty": (b"", b"", 0, "found a header of 0 bytes in 8 bytes"),
    "header_cut_off": (b'{"w":', b"", 4000, "found a header of 4000 bytes in 13 bytes"),
    "huge_header": (b"{}", b"", 2**63, f"found a header of {2**63} bytes"),
    "no_json": (b"{nonsense", b"", None, "found a header that is not JSON"),
    "not_text": (b"\xff\xfe\x00", b"", None, "found a header that is not JSON"),
    "no_object": (b"[1, 2]", b"", None, "found a header that is not a JSON object"),
    "shape_not_offsets": (entry(shape=(3,)), b"\0" * 8, None, "w of (3,) F32 in bytes 0 to 8"),
    "negative_shape": (entry(shape=(-1, -2)), b"\0" * 8, None, "w of (-1, -2) F32"),
    "shape_of_text": (entry(shape=("a",)), b"\0" * 8, None, "found w: {"),
    "offset_infinite": (entry(offsets=(0, float("inf"))), b"\0" * 8, None, "found w: {"),
    "a_gap": (entry(offsets=(4, 12)), b"\0" * 12, None, "w begins at byte"),
    "cut_off": (entry(), b"\0" * 7, None, "is truncated: its header requires"),
    "too_long": (entry(), b"\0" * 9, None, "is too long: its header requires"),
    "entry_of_text": (b'{"w": "x"}', b"", None, "w is x"),
    "quantized": (entry("I8", (8,)), b"\0" * 8, None, "w is I8\n  a quantized checkpoint must be"),
    "float8": (entry("F8_E4M3", (8,)), b"\0" * 8, None, "expected F64, F32, F16, BF16"),
}


@pytest.mark.parametrize(
    ("header", "tensors", "length", "reason"), BAD_FILES.values(), ids=BAD_FILES
)
def test_a_file_that_cannot_be_trusted_is_refused_with_its_name(
    tmp_path: Path, header: bytes, tensors: bytes, length: int | None, reason: str
):
    folder = with_header(tmp_path, header, tensors, length)
    message = refused(lambda: open_safetensors(folder))
    assert reason in message
    assert str(tmp_path / "model.safetensors") in message


@settings(max_examples=200)
@given(position=st.integers(0, 300), junk=st.binary(min_size=1, max_size=4), cut=st.integers(0, 40))
def test_a_damaged_file_is_refused_or_read_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, position: int, junk: bytes, cut: int
):
    folder = folder_of(
        tmp_path_factory.mktemp("dense"), {"v": torch.ones(3), "w": torch.ones(2, 2)}
    )
    path = folder / "model.safetensors"
    content = path.read_bytes()
    damaged = content[:position] + junk + content[position + len(junk) :]
    path.write_bytes(damaged[: len(damaged) - cut])
    try:
        dense = open_safetensors(folder)
        for name in dense.tensors:
            dense.read(name)
    except CheckpointError:
        pass


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite_are_refused_where_they_are_read(
    tmp_path: Path, dtype: torch.dtype, value: float
):
    weight = torch.zeros(30, 10).to(dtype)
    weight[20, 4] = value
    dense = open_safetensors(folder_of(tmp_path, {"w": weight}))
    dense.read("w", rows=slice(0, 20))
    dense.read("w", columns=np.array([0, 5, 9]))
    message = refused(lambda: dense.read("w", rows=np.array([0, 20])))
    assert "w must be finite, but has 1 NaN or infinite values in rows" in message
    assert f"file: {tmp_path / 'model.safetensors'}" in message
    refused(lambda: dense.read("w", columns=slice(4, 5)))


def test_large_values_whose_sum_overflows_are_finite(tmp_path: Path):
    weight = torch.full((30, 10), 6e4, dtype=torch.float16)
    dense = open_safetensors(folder_of(tmp_path, {"w": weight}))
    assert torch.equal(dense.read("w"), weight)


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "a/../../secret", ".."])
def test_an_index_cannot_name_a_file_outside_its_folder(tmp_path: Path, file: str):
    save_file({"w": torch.ones(2)}, tmp_path / "secret")
    folder = tmp_path / "dense"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    message = refused(lambda: open_safetensors(with_index(folder, {"w": file})))
    assert f"lists the file {file!r} for w: it must be in the index's folder" in message


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors.index.json").write_text(content)
    message = refused(lambda: open_safetensors(tmp_path))
    assert 'is not an index of tensors: expected {"weight_map": {NAME: FILE}}' in message


def test_shards_and_tensors_that_an_index_promises_must_be_there(tmp_path: Path):
    folder = sharded(tmp_path, {"one": {"a": torch.ones(2)}, "two": {"b": torch.ones(2)}})
    with_index(folder, {"a": "one", "b": "one"})
    message = refused(lambda: open_safetensors(folder))
    assert "b must be in one according to" in message
    assert f"file: {folder / 'one'}" in message
    with_index(folder, {"a": "one", "b": "two", "c": "three", "d": "four"})
    assert "2 of 4 missing:\n    four\n    three" in refused(lambda: open_safetensors(folder))


def test_a_tensor_outside_the_index_is_not_overlooked(tmp_path: Path):
    folder = sharded(tmp_path, {"one": {"a": torch.ones(2), "b": torch.ones(3)}})
    dense = open_safetensors(with_index(folder, {"a": "one"}))
    assert "1 unexpected:\n    b" in refused(lambda: dense.check_tensors({"a": (2,)}))


class Trap:
    """Object that creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_refused_unopened_with_the_way_to_convert_them(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save(Trap(tmp_path / "opened"), tmp_path / "pytorch_model.bin")
    message = refused(lambda: open_safetensors(tmp_path))
    assert "which can run code when they are opened: only safetensors are supported" in message
    assert "AutoModelForCausalLM.from_pretrained(folder" in message
    assert not (tmp_path / "opened").exists()


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "weights.gguf").touch()
    message = refused(lambda: open_safetensors(tmp_path))
    assert "has neither model.safetensors nor model.safetensors.index.json" in message
    assert "config.json, weights.gguf" in message


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path: Path):
    dense = open_safetensors(folder_of(tmp_path, {"w": torch.ones(9000, 4)}))
    os.truncate(tmp_path / "model.safetensors", 5000)
    assert "can no longer read" in refused(lambda: dense.read("w", rows=slice(8000, 9000)))


@pytest.mark.parametrize(
    ("selection", "reason"),
    [
        ({"rows": slice(2, 7)}, "w is (6, 4), but rows 2 to 6 were requested"),
        ({"rows": np.array([-1, 2])}, "w is (6, 4), but rows -1 to 2 were requested"),
        ({"columns": torch.tensor([4])}, "w is (6, 4), but columns 4 to 4 were requested"),
        ({"columns": slice(0, 5)}, "w is (6, 4), but columns 0 to 4 were requested"),
    ],
)
def test_indices_that_a_tensor_lacks_are_refused(tmp_path: Path, selection: dict, reason: str):
    dense = open_safetensors(folder_of(tmp_path, {"w": torch.ones(6, 4)}))
    assert reason in refused(lambda: dense.read("w", **selection))


def test_a_selection_that_fits_no_dimension_is_refused(tmp_path: Path):
    tensors = {"flat": torch.ones(6), "cube": torch.ones(2, 2, 2)}
    dense = open_safetensors(folder_of(tmp_path, tensors))
    assert "must have 2 dim" in refused(lambda: dense.read("flat", columns=slice(0, 1)))
    assert "must have 1 or 2 dimensions" in refused(lambda: dense.read("cube"))
    assert "has no tensor cubes" in refused(lambda: dense.read("cubes"))
    for mistake in (slice(0, 4, 2), np.ones(6, dtype=bool), np.array([[0]])):
        with pytest.raises(AssertionError):
            dense.read("flat", rows=mistake)


# ---- required tensors ----------------------------------------------------------------------------


def test_all_that_is_missing_extra_or_misshapen_comes_in_one_error(tmp_path: Path):
    dense = dense_with(tmp_path, {"a": torch.ones(2, 3), "x": torch.ones(1), "y": torch.ones(1)})
    message = refused(lambda: dense.check_tensors({"a": (3, 2), "b": (1,)}))
    assert message == (
        f"{tmp_path} does not contain the tensors that its config.json requires.\n"
        "  1 missing:\n"
        "    b\n"
        "  2 unexpected:\n"
        "    x\n"
        "    y\n"
        "  1 of the wrong shape:\n"
        "    a is (2, 3), but config.json requires (3, 2)\n"
        f"      file: {tmp_path / 'model.safetensors'}"
    )
    assert dense.bytes_read == 0


def test_long_lists_are_cut_with_their_count(tmp_path: Path):
    dense = dense_with(tmp_path, {f"t{i:03}": torch.ones(1) for i in range(150)})
    message = refused(lambda: dense.check_tensors({}))
    assert "150 unexpected:" in message
    assert message.endswith("    t019\n    and 130 more")


def test_saved_rotary_frequencies_are_ignored(tmp_path: Path):
    name = "model.layers.11.self_attn.rotary_emb.inv_freq"
    dense_with(tmp_path, {"a": torch.ones(1), name: torch.ones(2)}).check_tensors({"a": (1,)})
    dense = dense_with(tmp_path, {"a": torch.ones(1), name + "s": torch.ones(2)})
    assert "inv_freqs" in refused(lambda: dense.check_tensors({"a": (1,)}))


def test_an_output_layer_next_to_tied_embeddings_must_equal_them(tmp_path: Path):
    embedding, expected = torch.randn(20, 4), {"model.embed_tokens.weight": (20, 4)}
    both = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    dense_with(tmp_path, both, tie_word_embeddings=True).check_tensors(expected)
    untied = dense_with(tmp_path, both)
    assert "lm_head.weight" in refused(lambda: untied.check_tensors(expected))
    both["lm_head.weight"][17, 2] += 1
    tied = dense_with(tmp_path, both, tie_word_embeddings=True)
    message = refused(lambda: tied.check_tensors(expected))
    assert "lm_head.weight must equal model.embed_tokens.weight" in message
    assert "set tie_word_embeddings to false" in message


def test_models_of_another_shape_are_not_mixed(tmp_path: Path):
    dense = open_safetensors(whole_folder(tmp_path / "dense"))
    same = whole_folder(tmp_path / "same", max_position_embeddings=99)
    assert [other.folder for other in open_mixed(dense, [same])] == [same]
    wider = whole_folder(tmp_path / "wider", intermediate_size=8)
    assert refused(lambda: open_mixed(dense, [same, wider])) == (
        f"{wider} (upcycle.mix_with) and {dense.folder} (source.path) must have the same shape, "
        "because their weights are averaged, but differ in\n    ffn_hidden_size: 8 and 6"
    )


def whole_folder(path: Path, **config: object) -> Path:
    """Write a folder with every tensor of its configuration."""
    shapes = dense_tensors(spec_from_config(CONFIG | config))
    return folder_of(path, {name: torch.ones(shape) for name, shape in shapes}, **config)
