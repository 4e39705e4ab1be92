"""Test that each rule of upcycle.* reports the values, the reason and a way out."""

from typing import Any

import pytest

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import spec_from_config
from megatron_moe.rules.construction import construction_violations, measuring_violations

FFN = 48
SPEC = spec_from_config(
    {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "hidden_size": 32,
        "intermediate_size": FFN, "num_attention_heads": 4, "vocab_size": 64,
    }
)  # fmt: skip


def messages_for(moe: dict[str, Any], upcycle: dict[str, Any]) -> list[str]:
    return list(construction_violations(config(moe=moe, upcycle=upcycle), SPEC))


def config(*, moe: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    tree = {
        "run": {"dir": "run"}, "source": {"path": "dense"}, "data": {"path": "text"},
        "train": {"steps": 10}, "moe": {"num_moe_experts": 8, **moe}, **sections,
    }  # fmt: skip
    return build(RunConfig, tree)


def sizes(size: int, shared: int | None = None, **more: int) -> dict[str, Any]:
    return {"moe_ffn_hidden_size": size, "moe_shared_expert_intermediate_size": shared, **more}


PLAN = {"plan": "plan.safetensors"}

REFUSALS = [
    ("whole", sizes(24), {"method": "drop"},
     "moe.moe_ffn_hidden_size (24) must equal the dense model's intermediate_size (48) with "
     "upcycle.method (drop): each expert is the whole dense FFN.\n"
     "  leave moe.moe_ffn_hidden_size unset"),
    ("shards", sizes(20), {"method": "granular"},
     "intermediate_size of the dense model (48) must be divisible by moe.moe_ffn_hidden_size "
     "(20) with upcycle.method (granular): an expert is one of equal shards.\n"
     "  valid moe_ffn_hidden_size: 48, 24, 16, 12, 8, 6, 4, 3, 2, 1"),
    ("replicas", sizes(16, moe_router_topk=3), {"method": "granular"},
     "moe.num_moe_experts (8) must be divisible by intermediate_size / moe_ffn_hidden_size = 3 "
     "with upcycle.method (granular): experts are whole replicas of the dense FFN.\n"
     "  nearest num_moe_experts: 6, 9"),
    ("exact", sizes(12, moe_router_topk=2), {"method": "granular"},
     "moe.moe_router_topk (2) must be divisible by intermediate_size / moe_ffn_hidden_size = 4 "
     "with upcycle.scale (exact): if a token misses a shard of the dense FFN, no factor can "
     "restore its output.\n"
     "  nearest moe_router_topk: 4; or set upcycle.scale"),
    ("partition", sizes(8), {"method": "split_random"},
     "moe.num_moe_experts * moe_ffn_hidden_size + moe_shared_expert_intermediate_size = 8 * 8 + "
     "0 = 64 must equal the dense model's intermediate_size (48) with upcycle.method "
     "(split_random): each neuron goes to one expert.\n"
     "  set moe.moe_ffn_hidden_size=6"),
    ("partition-odd", sizes(5, 6), {"method": "split_clustered"},
     "moe.num_moe_experts * moe_ffn_hidden_size + moe_shared_expert_intermediate_size = 8 * 5 + "
     "6 = 46 must equal the dense model's intermediate_size (48) with upcycle.method "
     "(split_clustered): each neuron goes to one expert.\n"
     "  choose sizes so that num_moe_experts divides 42"),
    ("sharing", sizes(40, 16), {"method": "sharing_inter", **PLAN},
     "moe.moe_ffn_hidden_size + moe_shared_expert_intermediate_size = 40 + 16 = 56 must be at "
     "most the dense model's intermediate_size (48) with upcycle.method (sharing_inter): an "
     "expert must not use a neuron twice.\n"
     "  largest moe_ffn_hidden_size with this shared expert: 32"),
    ("shared", sizes(48, 16), {},
     "moe.moe_shared_expert_intermediate_size (16) with upcycle.method (copy) has no neurons to "
     "use: the routed experts hold the whole dense FFN, and its neurons would count twice.\n"
     "  methods with a shared expert: split_random, split_clustered, split_coactivation, "
     "split_routed, sharing_inter, qwen, weaver"),
    ("no-shared", sizes(6), {"method": "weaver", **PLAN},
     "upcycle.method (weaver) needs moe.moe_shared_expert_intermediate_size: the method moves "
     "common neurons to a shared expert.\n"
     "  set it, or set upcycle.method=split_clustered to have none"),
    ("no-shared-inter", sizes(6), {"method": "sharing_inter", **PLAN},
     "upcycle.method (sharing_inter) needs moe.moe_shared_expert_intermediate_size: the method "
     "moves common neurons to a shared expert.\n"
     "  set it, or set upcycle.method=sharing_inner to have none"),
    ("mix-alone", {}, {"method": "mix"},
     "upcycle.mix_with (0 folders) with upcycle.method (mix): method mix takes experts from "
     "source.path and at least one more dense model, other methods only from source.path.\n"
     "  set both or neither"),
    ("mix-many", {"num_moe_experts": 2}, {"method": "mix", "mix_with": ["a", "b"]},
     "upcycle.mix_with names 2 dense models besides source.path, more than moe.num_moe_experts "
     "(2): each must provide an expert.\n"
     "  set moe.num_moe_experts=3 or more, or remove 1 of them"),
    ("scale", {}, {"scale": "exact"},
     "upcycle.scale (exact) requires upcycle.method (granular), but it is copy: its factor is "
     "for whole replicas.\n"
     "  set upcycle.rescale instead"),
    ("rescale", sizes(24), {"method": "granular", "rescale": "N"},
     "upcycle.rescale (N) cannot be combined with upcycle.method (granular): its shards form "
     "whole replicas, which have their own factor.\n"
     "  set upcycle.scale instead"),
    ("paper", sizes(24), {"method": "granular", "scale": "paper", "rescale_at": "runtime"},
     "upcycle.rescale_at (runtime) cannot be combined with upcycle.scale (paper): the paper's "
     "factor scales gate, up and down; inside SiLU it is not a factor of the output.\n"
     "  set upcycle.rescale_at=weights, or upcycle.scale=exact"),
    ("permutation", sizes(6), {"method": "qwen", "permutation_seed": 1},
     "upcycle.permutation_seed (1) has no effect with upcycle.method (qwen), which chooses "
     "neurons itself.\n"
     "  leave it unset, and set upcycle.seed"),
    ("groups", {}, {"router_init": "virtual_groups"},
     "upcycle.router_init (virtual_groups) with upcycle.method (copy): only experts of method "
     "granular are shards of replicas that must be chosen together.\n"
     "  leave upcycle.router_init unset, or set upcycle.method=granular"),
    ("fit-whole", {}, {"fit": ["down"], **PLAN},
     "upcycle.fit (down) with upcycle.method (copy): it solves for experts that are parts of the "
     "dense FFN.\n"
     "  set upcycle.method to one of split_random, split_clustered, split_coactivation, "
     "split_routed, sharing_inner, sharing_inter, weaver, or leave upcycle.fit empty"),
    ("fit-routed", sizes(6), {"method": "split_routed", "fit": ["down"], **PLAN},
     "upcycle.fit (down) with upcycle.method (split_routed) must contain router: the method groups "
     "neurons by what a fitted router sends to them.\n"
     "  set upcycle.fit=[router,down], or upcycle.method=split_coactivation"),
    ("fit-one-expert",
     {"num_moe_experts": 1, "moe_router_topk": 1, "router_order": "softmax_topk", **sizes(48)},
     {"method": "split_random", "fit": ["router"], **PLAN},
     "upcycle.fit (router) needs moe.num_moe_experts (1) to be at least 2: a router of one expert "
     "has nothing to choose.\n  set moe.num_moe_experts=2 or more"),
    ("fit-noise", sizes(6), {"method": "split_random", "fit": ["down"], "noise_std": 0.1, **PLAN},
     "upcycle.fit (down) cannot be combined with upcycle.reinit_ratio (None) or upcycle.noise_std "
     "(0.1): they change the neurons that were solved for.\n"
     "  leave them unset"),
    ("fit-calibrated", sizes(6),
     {"method": "split_random", "fit": ["down"], "rescale": "calibrated", **PLAN},
     "upcycle.fit (down) cannot be combined with upcycle.rescale (calibrated): the solution has "
     "its own magnitude.\n  leave upcycle.rescale unset"),
    ("fit-router", sizes(6),
     {"method": "split_random", "fit": ["router"], "router_init": "uniform", **PLAN},
     "upcycle.router_init (uniform) has no effect with upcycle.fit (router), which solves for the "
     "router's rows.\n  leave upcycle.router_init unset"),
    ("fit-noisy", {**sizes(6), "router_gate": "noisy_linear"},
     {"method": "split_random", "fit": ["router"], **PLAN},
     "upcycle.fit (router) requires moe.router_gate (linear), but it is noisy_linear: its choices "
     "are random in training.\n  set moe.router_gate=linear"),
]  # fmt: skip

MEASURED = [
    ("upcycle.method (sharing_inner)", sizes(24), {"method": "sharing_inner"}),
    ("upcycle.router_init (centroids)", {}, {"router_init": "centroids"}),
    ("a calibrated scale", {}, {"rescale": "calibrated"}),
    ("upcycle.fit (down)", sizes(6), {"method": "split_random", "fit": ["down"]}),
]
REFUSALS += [
    (what, moe, upcycle,
     f"{what} is measured on text and needs upcycle.plan: the file that megatron-moe construct "
     "writes and train reads.\n  set upcycle.plan, and run megatron-moe construct CONFIG.yaml "
     "first")
    for what, moe, upcycle in MEASURED
]  # fmt: skip


@pytest.mark.parametrize(
    ("moe", "upcycle", "message"), [pytest.param(*row[1:], id=row[0]) for row in REFUSALS]
)
def test_a_message_has_setting_rule_reason_and_way_out(moe, upcycle, message: str):
    assert messages_for(moe, upcycle) == [message]
    assert "\n  " in message, "no way out"


WAYS_OUT = [
    (sizes(32, 16), {"method": "sharing_inter", **PLAN}),
    (sizes(6), {"method": "split_clustered"}),
    (sizes(6), {"method": "sharing_inner", **PLAN}),
    ({"num_moe_experts": 3}, {"method": "mix", "mix_with": ["a", "b"]}),
    ({"num_moe_experts": 2}, {"method": "mix", "mix_with": ["a"]}),
    (sizes(24), {"method": "granular", "scale": "exact", "rescale_at": "runtime"}),
]


@pytest.mark.parametrize(("moe", "upcycle"), WAYS_OUT)
def test_the_suggested_ways_out_are_legal(moe, upcycle):
    assert messages_for(moe, upcycle) == []


LEGAL = [
    ({}, {}),
    ({}, {"method": "drop", "noise_std": 0.1, "permutation_seed": 0}),
    (sizes(24), {"method": "granular"}),
    (sizes(12, moe_router_topk=2), {"method": "granular", "scale": "paper"}),
    (sizes(6), {"method": "split_random"}),
    (sizes(4, 16), {"method": "split_clustered", "reinit_ratio": 0.5}),
    (sizes(24), {"method": "sharing_inner", **PLAN}),
    (sizes(32, 16), {"method": "sharing_inter", **PLAN}),
    (sizes(20), {"method": "qwen"}),
    (sizes(20, 64), {"method": "qwen"}),
    (sizes(4, 16), {"method": "weaver", **PLAN}),
    ({}, {"method": "mix", "mix_with": ["a"]}),
]


@pytest.mark.parametrize(("moe", "upcycle"), LEGAL)
def test_what_a_method_can_build_is_legal(moe, upcycle):
    assert messages_for(moe, upcycle) == []


NOTHING_TO_MEASURE = (
    "upcycle.method (copy) with this router and scale needs no measurements: there is no plan file "
    "to write.\n  run megatron-moe train"
)
NO_PLAN = (
    "upcycle.plan must be set: it is the file that megatron-moe construct writes.\n"
    "  set upcycle.plan=runs/plan.safetensors"
)
UNEVEN = (
    "measure.samples (20) must be divisible by moe.num_moe_experts (8): the sequences are divided "
    "into one cluster of equal size per expert.\n  nearest measure.samples: 16, 24"
)
FEW = (
    "measure.samples (4) must be at least 8 with upcycle.fit: every 8th sequence is left out of "
    "the fit, to choose its penalty.\n  set measure.samples=8 or more"
)
INNER = {"method": "sharing_inner"}


@pytest.mark.parametrize(
    ("upcycle", "samples", "messages"),
    [
        pytest.param({}, 16, [NOTHING_TO_MEASURE], id="nothing"),
        pytest.param(INNER, 16, [NO_PLAN], id="no-plan"),
        pytest.param({**INNER, **PLAN}, 20, [UNEVEN], id="uneven"),
        pytest.param(INNER, 20, [NO_PLAN, UNEVEN], id="both"),
        pytest.param({**INNER, **PLAN}, 16, [], id="legal"),
        pytest.param({**INNER, **PLAN, "fit": ["down"]}, 8, [], id="fit"),
        pytest.param({"method": "split_random", **PLAN, "fit": ["down"]}, 4, [FEW], id="few"),
    ],
)
def test_construct_rejects_what_it_cannot_measure(upcycle, samples: int, messages: list[str]):
    run = config(moe=sizes(24), upcycle=upcycle, measure={"samples": samples})
    assert list(measuring_violations(run, SPEC)) == messages
