"""The loss of a conversation counts on the assistant's tokens; transformers is the oracle."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from transformers import AutoTokenizer

from megatron_moe.data.batches import micro_batches, validation_batches
from megatron_moe.data.chat import ChatTokenizer, write_conversations
from megatron_moe.data.chat_samples import ChatSamples
from megatron_moe.data.messages import Dialogue, parse_dialogue
from megatron_moe.data.packing import document_bounds
from megatron_moe.data.tokens import prepare_conversations
from megatron_moe.errors import DataError

CHATML = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CONVERSATIONS = [
    [("system", "Be brief."), ("user", "What is 2 + 2?"), ("assistant", "4.")],
    [("user", "import os"), ("assistant", "\u00e9 \u6f22"), ("user", "?"), ("assistant", "Yes\n")],
    [("user", "def f(x):\n    return x"), ("assistant", "a function " * 20), ("user", "Thanks.")],
]


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def folder(bpe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(bpe_folder, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(CHATML)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ChatTokenizer:
    return ChatTokenizer(folder)


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_marks_are_those_of_transformers(
    folder: Path, tokenizer: ChatTokenizer, turns: list[tuple[str, str]]
):
    oracle = AutoTokenizer.from_pretrained(folder)
    expected = oracle.apply_chat_template(
        messages(turns), return_dict=True, return_assistant_tokens_mask=True
    )
    result = tokenizer.encode(Dialogue(messages(turns)))
    assert result.ids == expected["input_ids"]
    assert [int(count) for count in result.counts] == expected["assistant_masks"]
    text = oracle.decode([i for i, count in zip(result.ids, result.counts, strict=True) if count])
    assert text == "".join(f"{text}<|im_end|>\n" for role, text in turns if role == "assistant")


def test_both_forms_are_read():
    openai = {"messages": messages(CONVERSATIONS[1]), "id": 7}
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = {
        "conversations": [{"from": names[r], "value": text} for r, text in CONVERSATIONS[1]]
    }
    for record in (openai, sharegpt):
        assert parse_dialogue(json.dumps(record).encode()).messages == messages(CONVERSATIONS[1])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("[", "not JSON"),
        ("[]", "must be an object, not list"),
        ({"text": "x"}, "has no list 'messages'"),
        ({"messages": []}, "has no list 'messages'"),
        ({"messages": ["x"]}, "a turn must be an object, not str"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "an unknown speaker: 'bing'"),
        ({"messages": [{"role": "user", "content": None}]}, "a turn of the user has no text: None"),
        ({"messages": messages([("user", "x")])}, "has no message of the assistant"),
        ({"messages": messages([("assistant", "<|im_end|>")])}, "the control token <|im_end|>"),
    ],
)
def test_broken_conversations_are_reported_with_their_position(
    tmp_path: Path, tokenizer: ChatTokenizer, record: object, message: str
):
    path = jsonl(tmp_path / "chat.jsonl", [{"messages": messages(CONVERSATIONS[0])}])
    with path.open("a") as file:
        file.write((record if isinstance(record, str) else json.dumps(record)) + "\n")
    with pytest.raises(DataError) as refused:
        write_conversations(path, tmp_path / "out", tokenizer)
    assert f"{path}:2: " in str(refused.value)
    assert message in str(refused.value)
    (line,) = write_conversations(path, tmp_path / "out", tokenizer, max_malformed=1)
    assert line.startswith(f"{path}:2: ")
    assert len(IndexedDataset(str(tmp_path / "out"), multimodal=True).document_indices) == 2


def test_conversations_are_prepared_once(tmp_path: Path, folder: Path, bpe_folder: Path):
    path = jsonl(tmp_path / "chat.jsonl", [{"messages": messages(CONVERSATIONS[0])}, "broken"])
    into: Any = {"dense_folder": folder, "vocab_size": 600, "cache_dir": tmp_path / "cache"}

    def prepare() -> Path:
        return prepare_conversations(path, **into, max_malformed=1)

    prefix = prepare()
    assert prepare() == prefix
    assert prepare_conversations(prefix, **into) == prefix
    report = json.loads(Path(f"{prefix}.json").read_text())
    assert report["conversations"] == 1
    assert report["malformed"][0].startswith(f"{path}:2: must be an object")
    assert ChatSamples(prefix, seq_length=99, vocab_size=600, seed=0).num_chunks == 1
    with pytest.raises(DataError, match="malformed conversations"):
        prepare_conversations(path, **into)
    with pytest.raises(
        DataError, match=r"ids up to \d+, but the model's vocab_size is 9: id 9 has"
    ):
        prepare_conversations(path, **{**into, "vocab_size": 9})


def test_templates_that_rewrite_earlier_turns_are_refused(folder: Path, tmp_path: Path):
    rewriting = shutil.copytree(folder, tmp_path / "rewriting")
    last_only = CHATML.replace("m['content'] +", "(m['content'] if loop.last else '') +")
    (rewriting / "chat_template.jinja").write_text(last_only)
    with pytest.raises(ValueError, match="renders turn 2 differently when more turns follow"):
        ChatTokenizer(rewriting).encode(Dialogue(messages(CONVERSATIONS[1])))
    raising = "{{ raise_exception('no system') }}"
    (rewriting / "chat_template.jinja").write_text(raising)
    with pytest.raises(ValueError, match="template rejects the conversation: no system"):
        ChatTokenizer(rewriting).encode(Dialogue(messages(CONVERSATIONS[0])))


def test_a_folder_without_a_template_is_refused(bpe_folder: Path, tmp_path: Path):
    with pytest.raises(DataError, match="has no chat template"):
        ChatTokenizer(bpe_folder)
    with pytest.raises(DataError, match="has no tokenizer"):
        ChatTokenizer(tmp_path)


@pytest.fixture(scope="module")
def pair(tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    records: list[object] = [
        {"messages": [*messages(CONVERSATIONS[i % 3]), *messages([("user", f"{i}" * i)])]}
        for i in range(1, 41)
    ]
    write_conversations(jsonl(folder / "chat.jsonl", records), folder / "chat", tokenizer)
    return folder / "chat"


@pytest.mark.parametrize("seq_length", [150, 300, 301])
def test_an_epoch_of_samples_holds_each_conversation_once(
    pair: Path, tokenizer: ChatTokenizer, seq_length: int
):
    dataset = IndexedDataset(str(pair), multimodal=True)
    modes = dataset.index.sequence_modes
    bounds = dataset.document_indices
    wanted = sorted(
        (
            np.concatenate([dataset[s][0] for s in range(a, b)]).tolist(),
            np.concatenate([np.full(len(dataset[s][0]), modes[s]) for s in range(a, b)]).tolist(),
        )
        for a, b in pairwise(bounds)
    )
    samples = ChatSamples(pair, seq_length=seq_length, vocab_size=600, seed=5)
    unpacked = []
    for k in range(samples.num_chunks):
        sample = samples[k]
        assert sample.ids_T.shape == (seq_length + 1,)
        starts = document_bounds(torch.from_numpy(sample.position_ids_S)).tolist()
        for start, end in pairwise(starts):
            last = end == seq_length
            ids = sample.ids_T[start : end + last]
            # The label of input j is id j + 1, so the mask is shifted left by one.
            mask = sample.loss_mask_S[start : end - 1 + last]
            if not last:
                assert sample.loss_mask_S[end - 1] == 0, "loss on the next one's first token"
            if ids.any():
                stop = len(ids) - (ids[::-1] != 0).argmax()
                assert not mask[max(0, stop - 1) :].any(), "loss on padding"
                unpacked.append((ids[:stop].tolist(), [0, *mask[: stop - 1].astype(int)]))
    fits = [(ids, marks) for ids, marks in wanted if len(ids) <= seq_length + 1]
    assert sorted(unpacked) == fits
    assert len(samples.too_long) == len(wanted) - len(fits)
    assert (seq_length == 150) == bool(samples.too_long)


def test_no_loss_falls_on_the_first_token_of_the_next_conversation(tmp_path: Path):
    builder = IndexedDatasetBuilder(f"{tmp_path}/pair.bin", dtype=np.int32, multimodal=True)
    for ids in ([1, 2, 3, 4], [5, 6, 7]):
        builder.add_item(torch.tensor(ids), mode=1)
        builder.end_document()
    builder.finalize(f"{tmp_path}/pair.idx")
    samples = ChatSamples(tmp_path / "pair", seq_length=7, vocab_size=8, seed=0)
    sample = samples.chunk(0)
    assert sample.ids_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 0]
    assert sample.loss_mask_S.tolist() == [1, 1, 1, 0, 1, 1, 0]
    assert sample.position_ids_S.tolist() == [0, 1, 2, 3, 0, 1, 2]


def test_packs_go_the_way_of_all_samples(pair: Path):
    samples = ChatSamples(pair, seq_length=300, vocab_size=600, seed=5)
    batches = micro_batches(
        samples, position=3, global_batch_size=4, micro_batch_size=2, dp_rank=1, dp_size=2
    )
    assert [row.tolist() for batch in batches for row in batch.tokens_BS] == [
        samples[k].ids_T[:-1].tolist() for k in (5, 6)
    ]
    (batch,) = validation_batches(samples, num_samples=2, micro_batch_size=2, dp_rank=0, dp_size=1)
    assert batch.loss_mask_BS.sum() == sum(samples.chunk(i).loss_mask_S.sum() for i in range(2))


def test_conversations_that_cannot_be_used_are_refused(pair: Path):
    with pytest.raises(DataError, match=r"each of the 40 conversations .* = 11 tokens"):
        ChatSamples(pair, seq_length=10, vocab_size=600, seed=0)
    samples = ChatSamples(pair, seq_length=300, vocab_size=5, seed=0)
    with pytest.raises(DataError, match="vocab_size is 5"):
        samples.chunk(0)
