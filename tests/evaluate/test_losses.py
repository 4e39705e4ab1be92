"""`evaluate` gives the losses of transformers on the same text, under every layout.

The oracle shares no code with it: transformers tokenizes the documents, which are cut by hand;
losses of the dense folder and the exported checkpoint are in float64; bytes are counted in the
decoded text.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from judged import SAMPLES, SEQ_LENGTH, Judged
from layouts import LAYOUTS
from training_runs import read_metrics
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from megatron_moe.cli.main import app
from megatron_moe.commands.export import export_checkpoint

pytestmark = pytest.mark.distributed


def evaluated(run: Path, *words: str) -> dict[str, Any]:
    """Run the command with --json and return the results that it writes."""
    result = CliRunner().invoke(app, ["evaluate", str(run), "--json", *words])
    assert result.exception is None, result.exception
    return json.loads((run / "evaluation" / "step-000002.json").read_text())


def labels(judged: Judged, domain: str) -> list[torch.Tensor]:
    """Return inputs and labels of the evaluated sequences, ``(S + 1,)`` each."""
    tokenizer = AutoTokenizer.from_pretrained(judged.dense)
    ids = [
        i
        for text in judged.texts[domain]
        for i in (*tokenizer.encode(text), tokenizer.eos_token_id)
    ]
    starts = range(0, SAMPLES * SEQ_LENGTH, SEQ_LENGTH)
    return [torch.tensor(ids[start : start + SEQ_LENGTH + 1]) for start in starts]


@torch.no_grad()
def loss_by_hand(folder: Path, judged: Judged, domain: str) -> float:
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float64,
        experts_implementation="eager",  # grouped_mm does not support float64
    ).eval()
    losses = [
        torch.nn.functional.cross_entropy(model(ids_T[None, :-1]).logits[0], ids_T[1:])
        for ids_T in labels(judged, domain)
    ]
    return torch.stack(losses).mean().item()


def bytes_by_hand(judged: Judged, domain: str) -> int:
    tokenizer = AutoTokenizer.from_pretrained(judged.dense)
    label_ids = torch.cat([ids_T[1:] for ids_T in labels(judged, domain)])
    text = tokenizer.decode(label_ids, skip_special_tokens=True)
    assert "\ufffd" not in text, "the text is cut inside a character: its bytes are unknown"
    assert len(text.encode()) > len(text), "needs a multi-byte character to tell bytes from letters"
    return len(text.encode())


@pytest.fixture(scope="module")
def by_hand(judged: Judged, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    exported = tmp_path_factory.mktemp("exported") / "hf"
    export_checkpoint(judged.run, exported)
    return {
        domain: {
            "dense": loss_by_hand(judged.dense, judged, domain),
            "now": loss_by_hand(exported, judged, domain),
            "bytes": bytes_by_hand(judged, domain),
        }
        for domain in judged.texts
    }


@pytest.mark.parametrize("layout", ["1", "ep2", "tp2", "pp2"])
def test_figures_are_those_of_transformers(judged: Judged, by_hand: dict[str, Any], layout: str):
    world_size, parallel = LAYOUTS[layout]
    words = [f"parallel.{name}={size}" for name, size in parallel.items()]
    result = evaluated(judged.run, *words, "--ranks", str(world_size))
    assert (result["schema"], result["kind"], result["step"]) == (1, "evaluation", 2)
    assert result["seq_length"] == SEQ_LENGTH
    tokens = SAMPLES * SEQ_LENGTH
    for domain, expected in by_hand.items():
        losses = dict.fromkeys(("dense", "step_0"), expected["dense"])
        for model, loss in {**losses, "domains": expected["now"]}.items():
            figures = result[model][domain]
            assert (figures["tokens"], figures["bytes"]) == (tokens, expected["bytes"])
            # fp32 compared to fp64, with losses near 7.
            assert figures["loss"] == pytest.approx(loss, abs=2e-5), (model, domain)
            assert figures["perplexity"] == pytest.approx(math.exp(loss), rel=2e-5)
            bits = loss * tokens / math.log(2)
            assert figures["bits_per_byte"] == pytest.approx(bits / expected["bytes"], rel=1e-5)
        assert abs(expected["now"] - expected["dense"]) > 0.1, "training changed nothing"


def test_the_training_loop_says_the_same(judged: Judged, by_hand: dict[str, Any]):
    first, *_, last = read_metrics(judged.run)
    for line, model in ((first, "dense"), (last, "now")):
        for domain, expected in by_hand.items():
            loss, key = expected[model], f"validation/{domain}"
            bits = loss * SAMPLES * SEQ_LENGTH / math.log(2)
            assert line[f"perplexity/{key}"] == pytest.approx(math.exp(loss), rel=2e-5)
            assert line[f"bits_per_byte/{key}"] == pytest.approx(bits / expected["bytes"], rel=1e-5)


def test_without_the_dense_weights_the_checkpoint_is_judged_alone(
    judged: Judged, by_hand: dict[str, Any], tmp_path: Path
):
    """The run was also moved; shape and tokenizer come from the checkpoint itself."""
    run = shutil.copytree(judged.run, tmp_path / "moved")
    result = evaluated(run, f"source.path={tmp_path / 'gone'}")
    assert (result["dense"], result["step_0"]) == (None, None)
    for domain, expected in by_hand.items():
        assert result["domains"][domain]["loss"] == pytest.approx(expected["now"], abs=2e-5)
        assert result["domains"][domain]["bytes"] == expected["bytes"]
    (remark,) = result["remarks"]
    assert "the weights of the source model are not in" in remark


def test_nothing_held_out_is_said(judged: Judged):
    words = ["evaluate", str(judged.run), f"data.path={judged.text}", "data.domains=null"]
    result = CliRunner().invoke(app, words)
    assert "the run has no held-out text" in str(result.exception)
