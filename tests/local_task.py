"""A small multiple-choice task out of text at hand, and its score computed by hand."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

YAML = """\
task: goes_on
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: right
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
CHOICES = 4
Question = dict[str, Any]


def questions_of(sentences: list[str], *, count: int) -> list[Question]:
    """Which words go on with these? Those of the same sentence, among those of the next ones."""
    halves = []
    for sentence in sentences[: count + CHOICES]:
        words = sentence.split()
        middle = len(words) // 2
        halves.append((" ".join(words[:middle]), " ".join(words[middle:])))
    return [
        {
            "question": halves[i][0],
            "choices": [halves[i + (j - i) % CHOICES][1] for j in range(CHOICES)],
            "right": i % CHOICES,
        }
        for i in range(count)
    ]


def write_task(folder: Path, questions: list[Question]) -> Path:
    """The folder for ``--include_path``."""
    folder.mkdir()
    file = folder / "goes_on.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "goes_on.yaml").write_text(YAML.format(file=file))
    return folder


@torch.no_grad()
def likelihoods(folder: Path, questions: list[Question]) -> list[list[float]]:
    """Log-likelihood of each choice after its question: one pass each, nothing shared."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result = []
    for question in questions:
        before = len(tokenizer(question["question"]).input_ids)
        sums = []
        for choice in question["choices"]:
            ids_T = torch.tensor(tokenizer(f"{question['question']} {choice}").input_ids)
            logits_SV = model(ids_T[None, :-1]).logits[0].double()
            logp_S = logits_SV.log_softmax(dim=-1).gather(1, ids_T[1:, None])[:, 0]
            sums.append(logp_S[before - 1 :].sum().item())
        result.append(sums)
    return result


def scores_by_hand(questions: list[Question], result: list[list[float]]) -> dict[str, float]:
    """Accuracy, and accuracy by likelihood per letter."""
    right = {"acc": 0, "acc_norm": 0}
    for question, sums in zip(questions, result, strict=True):
        lengths = [len(choice) for choice in question["choices"]]
        per_letter = [s / n for s, n in zip(sums, lengths, strict=True)]
        right["acc"] += sums.index(max(sums)) == question["right"]
        right["acc_norm"] += per_letter.index(max(per_letter)) == question["right"]
    return {name: count / len(questions) for name, count in right.items()}


def logged_likelihoods(folder: Path) -> list[list[float]]:
    """Those that the harness wrote down with ``--log_samples``."""
    (file,) = folder.rglob("samples_goes_on_*.jsonl")
    lines = sorted(map(json.loads, file.read_text().splitlines()), key=lambda line: line["doc_id"])
    return [[float(answer[0]) for answer in line["filtered_resps"]] for line in lines]
