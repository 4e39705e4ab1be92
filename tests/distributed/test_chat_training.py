"""Instruction tuning: conversations side by side learn as if each were alone."""

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import run_command
from layouts import LAYOUTS
from tiny import CHATML, TOKENIZER_SIZE, save_dense, save_tokenizer
from training_runs import run_training, tree
from transformers import AutoModelForCausalLM

from megatron_moe.data.chat import ChatTokenizer
from megatron_moe.data.messages import Dialogue

pytestmark = pytest.mark.distributed
LENGTH = 64
LONG = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "again " * 99}]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("chat")
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("a*.py"))
    dense = save_dense(root / "dense", vocab_size=TOKENIZER_SIZE)
    save_tokenizer(dense, library, chat_template=CHATML)
    lines = [json.dumps({"messages": conversation(i)}) for i in range(16)]
    lines.insert(3, '{"messages": "broken"}')
    lines.insert(5, json.dumps({"messages": LONG}))
    (root / "chat.jsonl").write_text("\n".join(lines))
    return {"root": root, "dense": dense, "chat": root / "chat.jsonl"}


def conversation(i: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"count {i}"},
        {"role": "assistant", "content": "x " * (i % 5 + 1)},
    ]


def settings(inputs: dict[str, Path], layout: str, **data: Any) -> dict[str, Any]:
    return tree(
        inputs["root"] / layout, inputs["dense"], inputs["chat"], parallel=LAYOUTS[layout][1],
        data={
            "kind": "chat", "reset_attention": True, "seq_length": LENGTH, "max_malformed": 1,
            "validation_fraction": 0.25, **data,
        },
        train={"steps": 2, "global_batch_size": 4, "precision": "fp32"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def one_rank(inputs: dict[str, Path]) -> list[dict[str, Any]]:
    return run_training(settings(inputs, "1"), world_size=1)


@torch.no_grad()
def test_the_loss_is_that_of_each_conversation_alone(
    inputs: dict[str, Path], one_rank: list[dict[str, Any]]
):
    """transformers, one conversation at a time, on what the assistant says."""
    model = AutoModelForCausalLM.from_pretrained(inputs["dense"], dtype=torch.float32)
    tokenizer = ChatTokenizer(inputs["dense"])
    encodings = [tokenizer.encode(Dialogue(conversation(i))) for i in range(16)]
    lengths = [len(encoding.ids) for encoding in encodings]
    quarter = (sum(lengths) + len(tokenizer.encode(Dialogue(LONG)).ids)) / 4
    first = min(range(5, 16), key=lambda i: abs(sum(lengths[i:]) - quarter))
    losses = []
    for encoded in encodings[first:]:
        ids = torch.tensor([encoded.ids])
        counts = torch.tensor(encoded.counts)[1:]
        of_token = torch.nn.functional.cross_entropy(
            model(ids).logits[0, :-1], ids[0, 1:], reduction="none"
        )
        losses.append(of_token[counts])
    assert one_rank[0]["loss/validation"] == pytest.approx(torch.cat(losses).mean().item(), 1e-5)
    assert one_rank[-1]["loss/validation"] < one_rank[0]["loss/validation"]


@pytest.mark.parametrize("layout", ["cp2", "tp2-ep2", "pp2"])
def test_layouts_agree(inputs: dict[str, Path], one_rank: list[dict[str, Any]], layout: str):
    lines = run_training(settings(inputs, layout), world_size=LAYOUTS[layout][0])
    for ours, expected in zip(lines, one_rank, strict=True):
        for name in {"loss/lm", "loss/validation", "grad_norm"} & expected.keys():
            assert ours[name] == pytest.approx(expected[name], rel=1e-4), (name, ours["step"])


def test_without_a_reset_conversations_see_each_other(
    inputs: dict[str, Path], one_rank: list[dict[str, Any]]
):
    mixed = settings(inputs, "1", reset_attention=False)
    mixed["run"]["dir"] = str(inputs["root"] / "mixed")
    (first, *_) = run_training(mixed, world_size=1)
    assert abs(first["loss/validation"] - one_rank[0]["loss/validation"]) > 1e-3


def test_the_command_reports_what_it_omits_and_sets_the_reference(
    inputs: dict[str, Path], one_rank: list[dict[str, Any]]
):
    config, out = inputs["root"] / "run.yaml", inputs["root"] / "reference.json"
    config.write_text(yaml.safe_dump(settings(inputs, "1")))
    done = run_command("reference-loss", config, "--out", out, check=True)
    output = " ".join(done.stdout.split())
    assert "chat.jsonl:4: has no list 'messages'" in output
    assert "1 conversations are longer than data.seq_length + 1 = 65 tokens" in output
    assert "the first is number 4 " in output
    written = json.loads(out.read_text())
    assert written["losses"]["text"] == pytest.approx(one_rank[0]["loss/validation"], rel=1e-5)
    assert written["seq_length"] == LENGTH
