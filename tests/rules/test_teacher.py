"""A teacher that is another model must fit the run: its vocabulary and its layout."""

from pathlib import Path
from typing import Any

import pytest
from tiny import save_dense, save_moe
from training_runs import tree

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.experts.from_source import complete_from_source
from megatron_moe.hf.spec import read_spec
from megatron_moe.rules.check import violations


def messages(source: Path, *, world_size: int = 1, **sections: Any) -> list[str]:
    settings = tree(source.parent / "run", source, source.parent / "tokens", **sections)
    config = build(RunConfig, complete_from_source(settings))
    return violations(config, read_spec(source), world_size)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("rules") / "source")


def test_a_larger_model_with_the_same_vocabulary_can_teach(source: Path, tmp_path: Path):
    larger = save_dense(tmp_path / "larger", "qwen3", hidden_size=128, head_dim=16)
    assert not messages(source, teacher={"path": str(larger), "logits_weight": 1.0})


def test_another_vocabulary_is_refused(source: Path, tmp_path: Path):
    other = save_dense(tmp_path / "other", vocab_size=300)
    (message,) = messages(source, teacher={"path": str(other), "logits_weight": 1.0})
    assert message == (
        f"teacher.path ({other}) has a vocabulary of 300 tokens, but the source has 257: their "
        "logits cannot be compared.\n  use a teacher with the tokenizer of the source, such as a "
        "larger model of its family"
    )


def test_a_teacher_that_cannot_be_read_is_refused(source: Path, tmp_path: Path):
    teacher = {"path": str(tmp_path / "missing"), "logits_weight": 1.0}
    (message,) = messages(source, teacher=teacher)
    assert message.startswith(f"teacher.path ({tmp_path / 'missing'}) cannot be used: ")


@pytest.mark.parametrize(
    ("changes", "parallel", "rule"),
    [
        ({"num_hidden_layers": 3}, {"pipeline_parallel_size": 2}, "num_hidden_layers"),
        ({"num_attention_heads": 1, "num_key_value_heads": 1},
         {"tensor_parallel_size": 2}, "num_attention_heads"),
        ({"intermediate_size": 97}, {"tensor_parallel_size": 2}, "intermediate_size"),
    ],
)  # fmt: skip
def test_the_teacher_keeps_the_rules_of_the_layout(
    source: Path, tmp_path: Path, changes: dict[str, int], parallel: dict[str, int], rule: str
):
    other = save_dense(tmp_path / "other", **changes)
    found = messages(
        source, world_size=2, parallel=parallel,
        teacher={"path": str(other), "logits_weight": 1.0},
    )  # fmt: skip
    assert len(found) == 1
    assert found[0].startswith(f"the teacher ({other}) has the layout of the run. ")
    assert rule in found[0]


def test_a_moe_source_has_no_ffns_to_teach_with(tmp_path: Path):
    source = save_moe(tmp_path / "moe", "mixtral")
    common = {"moe": {"num_moe_experts": 8}, "upcycle": {"method": "grow"}}
    assert not messages(source, **common, teacher={"logits_weight": 1.0})
    (message,) = messages(source, **common, teacher={"layers_weight": 1.0})
    assert f"needs a dense source, but {source} is a MoE model" in message
