"""Reference losses of the dense model, and the file that ties them to a tokenizer."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny import save_dense
from training_runs import tree, write_tokens
from transformers import AutoModelForCausalLM

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.data.reference import dense_losses, read_reference_losses, write_reference_losses
from megatron_moe.data.samples import Samples
from megatron_moe.data.stream import TokenStream
from megatron_moe.errors import DataError

LENGTH = 100


@pytest.mark.parametrize("reset_attention", [False, True])
def test_losses_are_those_of_the_dense_model(tmp_path: Path, reset_attention: bool):
    """The oracle runs the documents one by one, so that none can attend to the one before."""
    dense = save_dense(tmp_path / "dense")
    stream = TokenStream(write_tokens(tmp_path / "tokens", length=70), vocab_size=257)
    samples = Samples(stream, seq_length=LENGTH, seed=0, reset_positions=reset_attention)
    data = {"validation_samples": 3, "reset_attention": reset_attention}
    config = build(RunConfig, tree(tmp_path / "run", dense, tmp_path / "tokens", data=data))
    result = dense_losses(config, {"a": samples}, device=torch.device("cpu"))

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    losses = []
    for i in range(3):
        ids_T = torch.from_numpy(samples.chunk(i).ids_T.copy())
        begin = i * LENGTH
        cuts = [0, *(c - begin for c in range(70, 301, 70) if 0 < c - begin < LENGTH), LENGTH]
        for start, end in pairwise(cuts) if reset_attention else [(0, LENGTH)]:
            with torch.no_grad():
                logits = model(ids_T[None, start:end]).logits[0]
            losses.append(
                torch.nn.functional.cross_entropy(
                    logits, ids_T[start + 1 : end + 1], reduction="none"
                )
            )
    assert result == {"a": pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)}


def test_a_file_goes_with_its_tokenizer(tmp_path: Path):
    path = tmp_path / "new" / "losses.json"
    write_reference_losses(path, {"a": 2.5}, dense="models/dense", tokenizer="abc")
    assert read_reference_losses(path, ["a"], tokenizer="abc") == {"a": 2.5}
    with pytest.raises(
        DataError, match=r"another tokenizer \(abc\) than the dense model's \(xyz\)"
    ):
        read_reference_losses(path, ["a"], tokenizer="xyz")


def test_reference_losses_come_from_a_file(tmp_path: Path):
    path = tmp_path / "losses.json"
    path.write_text(json.dumps({"a": 2, "b": 1.5, "c": 1.0}))
    assert read_reference_losses(path, ["b", "a"], tokenizer="t") == {"b": 1.5, "a": 2.0}
    with pytest.raises(DataError, match="has no loss for d; it has a, b, c"):
        read_reference_losses(path, ["a", "d"], tokenizer="t")
    path.write_text('{"a": NaN}')
    with pytest.raises(DataError, match="has no loss for a"):
        read_reference_losses(path, ["a"], tokenizer="t")
    path.write_text("[1]")
    with pytest.raises(DataError, match="must contain an object"):
        read_reference_losses(path, ["a"], tokenizer="t")
    with pytest.raises(DataError, match="cannot read the reference losses"):
        read_reference_losses(tmp_path / "none", ["a"], tokenizer="t")
