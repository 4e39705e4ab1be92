"""Test the slices of all ranks against Megatron-Core's fused layouts built with numpy.

Shape letters: D hidden_size, F ffn_hidden_size, M neurons of an expert, V vocab_size, G groups.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_moe.hf.names import ROW_OF_ROLE, shapes_of
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.parallel.shards import Piece, ShardIndex, padded_vocabulary, pieces, select

Array = NDArray[np.int64]
EMPTY = -1


def make_spec(**shape: int) -> ModelSpec:
    sizes = {
        "num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 24, "num_attention_heads": 8,
        "num_query_groups": 4, "kv_channels": 2, "vocab_size": 13, "max_position_embeddings": 8,
    }  # fmt: skip
    return ModelSpec(
        family="llama", layernorm_epsilon=1e-5, rotary_base=1e4, rope_scaling=None,
        tied_embeddings=False, qkv_bias=True, qk_layernorm=True, initializer_range=0.02,
        eos_token_id=None, bos_token_id=None, **sizes | shape,
    )  # fmt: skip


@st.composite
def specs_and_sizes(draw: st.DrawFn) -> tuple[ModelSpec, int]:
    """Draw a dense model and a number of tensor-parallel ranks that can shard it."""
    size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    groups = size * draw(st.integers(1, 3))
    if size > 1 and draw(st.booleans()):  # fewer query groups than ranks
        groups = draw(st.sampled_from([n for n in range(1, size) if size % n == 0]))
    heads = math.lcm(groups, size) * draw(st.integers(1, 3))
    channels = draw(st.sampled_from([2, 4])) * (1 if groups % size == 0 else size)
    spec = make_spec(
        hidden_size=draw(st.integers(1, 6)),
        ffn_hidden_size=size * draw(st.integers(1, 5)),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=channels,
        vocab_size=draw(st.integers(1, 40)),
    )
    return spec, size


def sources(role: str, spec: ModelSpec) -> dict[str, Array]:
    """Return the row's dense tensors of layer 1, with all values distinct."""
    tensors, first = {}, 0
    for template, shape in zip(
        ROW_OF_ROLE[role].hf, shapes_of(ROW_OF_ROLE[_dense(role)], spec), strict=True
    ):
        count = int(np.prod(shape))
        tensors[template.format(layer=1)] = np.arange(first, first + count).reshape(shape)
        first += count
    return tensors


def _dense(role: str) -> str:
    return role.removeprefix("expert_")


def fill(shape: tuple[int, ...], parts: list[Piece], tensors: dict[str, Array]) -> Array:
    """Return the local parameter, after checking that no element is filled twice."""
    local = np.full(shape, EMPTY)
    for piece in parts:
        block = tensors[piece.source]
        block = block if piece.rows is None else block[piece.rows]
        block = block if piece.columns is None else block[:, piece.columns]
        assert (local[piece.into] == EMPTY).all(), "an element is filled twice"
        assert local[piece.into].shape == block.shape, "upcycling copies without broadcasting"
        local[piece.into] = block
    return local


# The expected shards, built as in Megatron-Core and without the code under test.


def fused_qkv(tensors: list[Array], spec: ModelSpec, size: int) -> list[Array]:
    """Shard the rows of SelfAttention.linear_qkv: queries, key and value of group after group."""
    by_group = [t.reshape(spec.num_query_groups, -1, *t.shape[1:]) for t in tensors]
    fused = np.concatenate(by_group, axis=1)
    return np.split(fused.reshape(-1, *fused.shape[2:]), size)


def fused_gated(tensors: list[Array], spec: ModelSpec, size: int) -> list[Array]:
    """Shard MLP.linear_fc1: each rank splits its own output in two, gate then up."""
    gates, ups = (np.split(t, size) for t in tensors)
    return [np.concatenate([gate, up]) for gate, up in zip(gates, ups, strict=True)]


def columns(tensors: list[Array], spec: ModelSpec, size: int) -> list[Array]:
    """Shard RowParallelLinear along its input."""
    return np.split(tensors[0], size, axis=1)


def vocabulary(tensors: list[Array], spec: ModelSpec, size: int) -> list[Array]:
    """Shard VocabParallelEmbedding, padded with empty rows, into equal parts."""
    missing = -len(tensors[0]) % size
    return np.split(np.pad(tensors[0], ((0, missing), (0, 0)), constant_values=EMPTY), size)


def whole(tensors: list[Array], spec: ModelSpec, size: int) -> list[Array]:
    return [tensors[0]] * size


ORACLES: dict[str, Callable[[list[Array], ModelSpec, int], list[Array]]] = {
    "embedding": vocabulary,
    "input_norm": whole,
    "qkv": fused_qkv,
    "qkv_bias": fused_qkv,
    "q_norm": whole,
    "k_norm": whole,
    "proj": columns,
    "ffn_norm": whole,
    "fc1": fused_gated,
    "fc2": columns,
    "final_norm": whole,
    "output": vocabulary,
}


@pytest.mark.parametrize("role", ORACLES)
@given(case=specs_and_sizes())
@settings(max_examples=40)
def test_every_rank_holds_the_shard_of_megatron(role: str, case: tuple[ModelSpec, int]):
    spec, size = case
    tensors = sources(role, spec)
    expected = ORACLES[role](list(tensors.values()), spec, size)
    for rank in range(size):
        parts = pieces(ROW_OF_ROLE[role], layer=1, part=ShardIndex(rank, size), spec=spec)
        np.testing.assert_array_equal(fill(expected[rank].shape, parts, tensors), expected[rank])


@pytest.mark.parametrize("role", [role for role, oracle in ORACLES.items() if oracle is not whole])
@given(case=specs_and_sizes())
@settings(max_examples=20)
def test_the_ranks_tile_each_tensor_exactly_once(role: str, case: tuple[ModelSpec, int]):
    spec, size = case
    tensors = sources(role, spec)
    taken = {name: np.zeros(tensor.shape, int) for name, tensor in tensors.items()}
    for rank in range(size):
        for piece in pieces(ROW_OF_ROLE[role], layer=1, part=ShardIndex(rank, size), spec=spec):
            rows = slice(None) if piece.rows is None else piece.rows
            taken[piece.source][(rows,) if piece.columns is None else (rows, piece.columns)] += 1
    assert all((counts == 1).all() for counts in taken.values())


@given(case=specs_and_sizes(), data=st.data())
@settings(max_examples=60)
def test_an_expert_takes_its_neurons_in_the_plans_order(case: tuple[ModelSpec, int], data):
    spec, size = case
    some = st.integers(0, spec.ffn_hidden_size - 1)
    count = size * data.draw(st.integers(1, 4))
    neurons_M = np.array(data.draw(st.lists(some, min_size=count, max_size=count)))
    fc1, fc2 = sources("expert_fc1", spec), sources("expert_fc2", spec)
    chosen = [tensor[neurons_M] for tensor in fc1.values()]
    expected_fc1 = fused_gated(chosen, spec, size)
    expected_fc2 = columns([next(iter(fc2.values()))[:, neurons_M]], spec, size)
    for rank in range(size):
        for role, tensors, expected in (
            ("expert_fc1", fc1, expected_fc1[rank]),
            ("expert_fc2", fc2, expected_fc2[rank]),
        ):
            parts = pieces(
                ROW_OF_ROLE[role],
                layer=1,
                part=ShardIndex(rank, size),
                spec=spec,
                neurons_M=neurons_M,
            )
            np.testing.assert_array_equal(fill(expected.shape, parts, tensors), expected)


@given(
    indices=st.lists(st.integers(0, 30), min_size=1, max_size=12)
    | st.integers(0, 20).flatmap(lambda i: st.integers(1, 12).map(lambda n: [*range(i, i + n)])),
    size=st.sampled_from([1, 2, 3]),
    data=st.data(),
)
def test_select_returns_consecutive_indices_as_a_slice(indices, size, data):
    indices = np.array(indices * size)
    rank = data.draw(st.integers(0, size - 1))
    chosen = select(indices, ShardIndex(rank, size), 99)
    expected = np.split(indices, size)[rank]
    np.testing.assert_array_equal(np.arange(99)[chosen], expected)
    assert isinstance(chosen, slice) == bool((np.diff(expected) == 1).all())


def test_select_of_a_slice_stays_inside_it():
    assert select(slice(10, 16), ShardIndex(2, 3), 99) == slice(14, 16)
    assert select(None, ShardIndex(2, 3), 99) == slice(66, 99)


@given(vocab_size=st.integers(1, 300_000), tp=st.integers(1, 64))
def test_the_vocabulary_is_padded_to_the_next_multiple_of_tp(vocab_size: int, tp: int):
    padded = padded_vocabulary(vocab_size, tp)
    assert padded % tp == 0
    assert 0 <= padded - vocab_size < tp


def test_a_rank_past_the_end_of_the_vocabulary_reads_nothing():
    spec = make_spec(vocab_size=5)  # 8 ranks hold one row each
    row = ROW_OF_ROLE["embedding"]
    read = [pieces(row, layer=None, part=ShardIndex(rank, 8), spec=spec) for rank in range(8)]
    assert [len(parts) for parts in read] == [1, 1, 1, 1, 1, 0, 0, 0]


def test_pieces_with_the_same_values_have_the_same_key():
    """Replicated experts share reads by key, so different pieces must have different keys."""
    spec, row = make_spec(), ROW_OF_ROLE["expert_fc2"]

    def key(neurons, rank=0, role_row=row):
        part = ShardIndex(rank, 2)
        neurons_M = None if neurons is None else np.array(neurons)
        return pieces(role_row, layer=0, part=part, spec=spec, neurons_M=neurons_M)[0].key

    everything = range(spec.ffn_hidden_size)
    assert key(None) == key(everything)
    assert key([3, 1, 7, 9]) == key([3, 1, 8, 8])
    different = [
        key(None),
        key(None, rank=1),
        key([3, 1, 7, 9]),
        key([1, 3, 7, 9]),
        key(None, role_row=ROW_OF_ROLE["expert_fc1"]),
    ]
    assert len(set(different)) == len(different)
