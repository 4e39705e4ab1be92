"""Settings that a MoE source fills in, and the message of each rule on sources and methods."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import CheckpointError, ConfigError
from megatron_moe.experts.from_source import complete_from_source, load_run
from megatron_moe.hf.spec import read_spec
from megatron_moe.rules.check import violations

DENSE = {
    "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 4, "hidden_size": 32,
    "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64,
}  # fmt: skip
QWEN2_MOE = DENSE | {
    "architectures": ["Qwen2MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 12, "shared_expert_intermediate_size": 16, "mlp_only_layers": [0],
}  # fmt: skip
SIGMOID = DENSE | {
    "architectures": ["Glm4MoeForCausalLM"], "n_routed_experts": 8, "num_experts_per_tok": 1,
    "moe_intermediate_size": 12, "norm_topk_prob": False, "partial_rotary_factor": 1.0,
}  # fmt: skip


def tree(folder: Path, source: dict[str, Any], **sections: Any) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(source))
    return {
        "run": {"dir": str(folder / "run")}, "source": {"path": str(folder)},
        "data": {"path": "text", "seq_length": 32}, "train": {"steps": 10},
        "optimizer": {"warmup_steps": 0}, **sections,
    }  # fmt: skip


def messages(
    folder: Path, source: dict[str, Any], moe: dict[str, Any], upcycle: dict[str, Any]
) -> list[str]:
    settings = complete_from_source(tree(folder, source, moe=moe, upcycle=upcycle))
    return violations(build(RunConfig, settings), read_spec(folder), 1)


def test_keep_takes_every_setting_from_the_source(tmp_path: Path):
    settings = complete_from_source(tree(tmp_path, QWEN2_MOE, upcycle={"method": "keep"}))
    assert settings["moe"] == {
        "num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 12,
        "router_order": "softmax_topk", "moe_layers": [1, 2, 3],
        "moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False,
        "moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True,
    }  # fmt: skip
    assert not violations(build(RunConfig, settings), read_spec(tmp_path), 1)


def test_adapters_have_no_moments_in_the_run_of_the_source(tmp_path: Path):
    settings = tree(tmp_path, QWEN2_MOE, upcycle={"method": "keep"}, lora={"rank": 4})
    settings["source"]["optimizer_state"] = "runs/moe"
    config = build(RunConfig, complete_from_source(settings))
    assert violations(config, read_spec(tmp_path), 1) == [
        "lora.rank (4) cannot be combined with source.optimizer_state (runs/moe): adapters have no "
        "moments in the source's run.\n  leave source.optimizer_state unset, or lora.rank"
    ]


def test_what_is_set_is_kept(tmp_path: Path):
    upcycle = {"method": "grow", "twins": "exact"}
    moe = {"num_moe_experts": 24, "moe_aux_loss_coeff": 0.0, "first_dense_layers": 1}
    settings = complete_from_source(tree(tmp_path, QWEN2_MOE, moe=moe, upcycle=upcycle))
    assert settings["moe"].items() >= moe.items()
    assert settings["moe"]["moe_router_topk"] == 6  # three copies of each of two experts
    assert "moe_layers" not in settings["moe"]
    assert not violations(build(RunConfig, settings), read_spec(tmp_path), 1)


def test_parts_take_their_size_from_the_source(tmp_path: Path):
    settings = complete_from_source(
        tree(tmp_path, QWEN2_MOE, moe={"num_moe_experts": 32}, upcycle={"method": "split_random"})
    )
    assert settings["moe"].items() >= {"moe_ffn_hidden_size": 3, "moe_router_topk": 8}.items()


def test_a_dense_source_fills_in_nothing(tmp_path: Path):
    settings = tree(tmp_path, DENSE, moe={"moe_router_topk": 1})
    assert complete_from_source(settings) is settings


def test_a_resumed_run_needs_no_source(tmp_path: Path):
    """The run keeps a copy of the source's config.json."""
    settings = tree(tmp_path, QWEN2_MOE, upcycle={"method": "keep"})
    expected = complete_from_source(settings)
    (tmp_path / "run" / "source").mkdir(parents=True)
    (tmp_path / "config.json").rename(tmp_path / "run" / "source" / "config.json")
    assert complete_from_source(settings) == expected


def test_growing_needs_a_number_of_experts(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree(tmp_path, QWEN2_MOE, upcycle={"method": "grow"})))
    with pytest.raises(ConfigError, match=r"moe.num_moe_experts must be set"):
        load_run(file)
    assert load_run(file, ["moe.num_moe_experts=16"]).moe.moe_router_topk == 2
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_MOE | {"num_experts_per_tok": 9}))
    with pytest.raises(CheckpointError, match=r"num_experts_per_tok \(9\) must be at most"):
        load_run(file)


KEEP, GROW, PRUNE, SPLIT = (
    {"method": method} for method in ("keep", "grow", "prune", "split_random")
)
E4, E16 = {"num_moe_experts": 4}, {"num_moe_experts": 16}
REFUSALS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ("moe-source", QWEN2_MOE, {}, {}, r"upcycle.method \(copy\) needs a dense model in"),
    ("dense-source", DENSE, E4, KEEP, r"upcycle.method \(keep\) needs a MoE model in source.path"),
    ("dense-twins", DENSE, E4, {"twins": "exact"}, r"upcycle.twins \(exact\) has no effect"),
    ("dense-choose", DENSE, E4, {"choose": "load"}, r"upcycle.choose \(load\) has no effect"),
    ("dense-gate", DENSE, E4 | {"moe_shared_expert_gate": True}, {},
     "moe.moe_shared_expert_gate .true. needs a MoE source"),
    ("number", QWEN2_MOE, E16, KEEP, r"moe.num_moe_experts \(16\) must be 8 as in the source"),
    ("top-k", QWEN2_MOE, {"moe_router_topk": 4}, KEEP, r"moe.moe_router_topk \(4\) must be 2"),
    ("size", QWEN2_MOE, {"moe_ffn_hidden_size": 24}, KEEP, r"hidden_size \(24\) must be 12"),
    ("order", QWEN2_MOE, E16 | {"router_order": "topk_softmax"}, GROW,
     r"router_order \(topk_softmax\) must be softmax_topk"),
    ("shared", QWEN2_MOE, {"moe_shared_expert_intermediate_size": None}, KEEP,
     r"moe_shared_expert_intermediate_size \(None\) must be 16"),
    ("gate", QWEN2_MOE, {"moe_shared_expert_gate": False}, KEEP,
     r"moe_shared_expert_gate \(False\) must be True"),
    ("layers", QWEN2_MOE, {"moe_layers": "all"}, KEEP,
     r"moe.moe_layers \(all\) must be the MoE layers of the source \(\[1, 2, 3\]\)"),
    ("fewer", QWEN2_MOE, E4, GROW, r"moe.num_moe_experts \(4\) must be more than the source's 8"),
    ("more", QWEN2_MOE, E16, PRUNE | {"choose": "even"}, "must be less than the source's 8"),
    ("uneven", QWEN2_MOE, {"num_moe_experts": 12}, GROW,
     r"must be a multiple of the source's 8[\s\S]*nearest num_moe_experts: 16"),
    ("odd", QWEN2_MOE, {"num_moe_experts": 3}, PRUNE | {"choose": "even"},
     r"must divide the source's 8[\s\S]*valid num_moe_experts: \[1, 2, 4\]"),
    ("exact-top-k", QWEN2_MOE, E16 | {"moe_router_topk": 2}, GROW | {"twins": "exact"},
     r"moe.moe_router_topk \(2\) must be 4, the source's 2 times 2 copies, with upcycle.twins"),
    ("exact-load", QWEN2_MOE, E16, GROW | {"twins": "exact", "choose": "load", "plan": "p"},
     r"upcycle.twins \(exact\) needs upcycle.choose \(load\) to be even"),
    ("exact-sigmoid", SIGMOID, E16, GROW | {"twins": "exact"},
     r"upcycle.twins \(exact\) is not possible for a source with moe.moe_router_topk \(1\)"),
    ("twins-of-keep", QWEN2_MOE, {}, KEEP | {"twins": "bias"}, "requires upcycle.method .grow."),
    ("noise-of-bias", QWEN2_MOE, E16, GROW | {"twins": "bias", "noise_std": 0.1},
     r"upcycle.noise_std \(0.1\) requires upcycle.twins \(noise\)"),
    ("choice", QWEN2_MOE, E16, GROW | {"choose": "reap", "plan": "p"},
     r"upcycle.choose \(reap\) with upcycle.method \(grow\) must be one of even, load, utility"),
    ("parts", QWEN2_MOE, {"num_moe_experts": 40}, SPLIT,
     r"num_moe_experts \(40\) must be a multiple of the source's 8[\s\S]*: \[16, 24, 32, 48, 96\]"),
    ("one-part", QWEN2_MOE, {"num_moe_experts": 8}, SPLIT, r"num_moe_experts \(8\) must be a mult"),
    ("size-of-parts", QWEN2_MOE, E16 | {"moe_ffn_hidden_size": 12}, SPLIT,
     r"moe.moe_ffn_hidden_size \(12\) must be 6 with upcycle.method \(split_random\)"),
    ("top-k-of-parts", QWEN2_MOE, E16 | {"moe_router_topk": 2}, SPLIT,
     r"moe.moe_router_topk \(2\) must be 4, the source's 2 times 2 parts"),
    ("sigmoid-parts", SIGMOID, E16, SPLIT, r"\(split_random\) is not possible for a source with"),
    ("choice-of-parts", QWEN2_MOE, E16, SPLIT | {"choose": "load"}, r"\(load\) has no effect"),
    ("factor-of-parts", QWEN2_MOE, E16, SPLIT | {"rescale": "N/K"}, r"\(N/K\) has no effect"),
    ("coactivation", QWEN2_MOE, E16, {"method": "split_coactivation", "plan": "p"},
     r"split its experts: split_random, split_clustered"),
    ("no-plan", QWEN2_MOE, E4, PRUNE, r"upcycle.choose \(reap\) is measured on text"),
    ("rescale", QWEN2_MOE, {}, KEEP | {"rescale": "N/K"}, r"upcycle.rescale \(N/K\) has no effect"),
    ("rows", QWEN2_MOE, {}, KEEP | {"router_init": "zero"}, r"router_init \(zero\) has no effect"),
    ("noisy", QWEN2_MOE, {"router_gate": "noisy_linear"}, KEEP, "router_gate .noisy_linear. must"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "moe", "upcycle", "message"), [pytest.param(*row[1:], id=row[0]) for row in REFUSALS]
)
def test_a_contradiction_is_refused(
    tmp_path: Path, source: dict[str, Any], moe: dict[str, Any], upcycle: dict[str, Any],
    message: str,
):  # fmt: skip
    (refusal,) = messages(tmp_path, source, moe, upcycle)
    assert re.search(message, refusal)
    assert "\n  " in refusal, "each refusal names a way out"


@pytest.mark.parametrize(
    ("moe", "upcycle"),
    [
        (E16, GROW),
        (E16, GROW | {"twins": "bias"}),
        ({"num_moe_experts": 12}, GROW | {"choose": "load", "plan": "p"}),
        (E4, PRUNE | {"choose": "even"}),
        (E16, SPLIT),
        ({"num_moe_experts": 32}, {"method": "split_clustered"}),
        ({"num_moe_experts": 5}, PRUNE | {"choose": "load", "plan": "p"}),
    ],
)
def test_what_is_legal(tmp_path: Path, moe: dict[str, Any], upcycle: dict[str, Any]):
    assert not messages(tmp_path, QWEN2_MOE, moe, upcycle)
