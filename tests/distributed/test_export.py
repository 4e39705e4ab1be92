"""What comes out of a checkpoint: transformers loads it whole, and it computes what was trained.

Each model is trained for two large steps first, so that experts differ from each other and the
router's choice matters; then the logits of the checkpoint, on other ranks, must equal those of
transformers on the exported folder. 1e-4 on logits of size 10, seen 2e-5: sums in another order.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import LAYOUTS
from ranks import run_on_ranks
from tiny import MULTIPLIERS, save_dense
from training_runs import run_training, tree, write_tokens
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_moe.checkpoint.folder import newest, read_config
from megatron_moe.commands.export import export_checkpoint
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import CheckpointError
from megatron_moe.runtime.engine import TORCH_ON_CPU
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed

SIGMOID = {"moe_router_score_function": "sigmoid"}
CASES = {
    "mixtral": ("llama", {}, "tp2-ep4-etp1", {}, "MixtralForCausalLM"),
    "mixtral-tied": ("llama", {"tie_word_embeddings": True}, "pp2", {}, "MixtralForCausalLM"),
    "mixtral-from-mistral": ("mistral", {}, "tp2-ep2-etp2", {}, "MixtralForCausalLM"),
    "mixtral-from-phi3": ("phi3", {}, "tp2-ep2-etp2", {}, "MixtralForCausalLM"),
    "mixtral-from-granite": ("granite", MULTIPLIERS, "tp2-ep2", {}, "MixtralForCausalLM"),
    "shared-from-tied-granite": ("granite", {**MULTIPLIERS, "tie_word_embeddings": True}, "pp2", {
        "moe_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 32,
        "moe_layers": [0, 1, 3]}, "Qwen2MoeForCausalLM"),
    "flex-olmo-from-olmo2": ("olmo2", {}, "tp2-ep2-etp2", {}, "FlexOlmoForCausalLM"),
    "flex-olmo-softmax-topk": ("olmo2", {}, "pp2", {"router_order": "softmax_topk"},
                               "FlexOlmoForCausalLM"),
    "qwen2-moe": ("qwen2", {}, "tp2-ep2", {}, "Qwen2MoeForCausalLM"),
    "qwen2-moe-softmax-topk": ("qwen2", {}, "ep2", {"router_order": "softmax_topk"},
                               "Qwen2MoeForCausalLM"),
    "qwen3-moe": ("qwen3", {"head_dim": 16}, "tp2", {}, "Qwen3MoeForCausalLM"),
    "qwen3-moe-softmax-topk": ("qwen3", {"head_dim": 16}, "ep2", {"router_order": "softmax_topk"},
                               "Qwen3MoeForCausalLM"),
    "qwen3-moe-mixed-layers": ("qwen3", {"head_dim": 16}, "pp2", {"moe_layers": [1, 2]},
                               "Qwen3MoeForCausalLM"),
    "softmax-topk-from-llama": ("llama", {}, "ep2", {"router_order": "softmax_topk"},
                                "Qwen2MoeForCausalLM"),
    "shared-from-llama": ("llama", {}, "tp2-ep2", {
        "moe_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 32,
        "moe_layers": [0, 1, 3]}, "Qwen2MoeForCausalLM"),
    "sigmoid-bias-from-llama": ("llama", {}, "tp2-ep2", {
        **SIGMOID, "first_dense_layers": 1, "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.05}, "Glm4MoeForCausalLM"),
    "sigmoid-shared-from-qwen3": ("qwen3", {"head_dim": 16}, "tp2", {
        **SIGMOID, "moe_ffn_hidden_size": 20, "moe_shared_expert_intermediate_size": 16,
        "moe_router_topk": 1}, "Glm4MoeForCausalLM"),
}  # fmt: skip


SLOW = ("mixtral-from-mistral",)
"""Cases whose family and architecture others have."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES]
)
def test_an_export_means_the_same(tmp_path: Path, case: str):
    family, changes, layout, moe, architecture = CASES[case]
    split = {"upcycle": {"method": "split_random", "rescale_at": "runtime", "verify": "never"}}
    methods: dict[str, Any] = split if "moe_ffn_hidden_size" in moe else {}
    world_size, parallel = LAYOUTS[layout]
    settings = tree(
        tmp_path / "run", save_dense(tmp_path / "dense", family, **changes),
        write_tokens(tmp_path / "tokens"), parallel=parallel,
        moe={"num_moe_experts": 4, **moe},
        train={"steps": 2, "global_batch_size": 4, "precision": "fp32"},
        optimizer={"lr": 1e-2, "min_lr": 1e-2, "warmup_steps": 0}, **methods,
    )  # fmt: skip
    run_training(settings, world_size=world_size)
    assert export_checkpoint(tmp_path / "run", tmp_path / "hf") == architecture
    assert AutoConfig.from_pretrained(tmp_path / "hf").architectures == [architecture]
    _, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading

    checkpoint = newest(tmp_path / "run")
    assert checkpoint is not None
    run_on_ranks(
        check_logits, read_config(checkpoint), checkpoint, tmp_path / "hf", world_size=world_size
    )


def check_logits(world: World, config: RunConfig, checkpoint: Path, exported: Path) -> None:
    from megatron_moe.checkpoint.sharded import restore
    from megatron_moe.experts.plan import make_expert_plan
    from megatron_moe.hf.spec import read_spec
    from megatron_moe.model.build import build_model
    from megatron_moe.model.routers import set_output_scales
    from megatron_moe.model.verify import compare_with_dense
    from megatron_moe.parallel.groups import create_groups
    from megatron_moe.train.state import make_state

    spec = read_spec(config.source.path)
    layout, groups = create_groups(config.parallel, seed=0)
    model = build_model(
        config, spec, layout=layout, groups=groups, rank=world.rank, engine=TORCH_ON_CPU
    )
    state = make_state(config, model, groups)
    plan = make_expert_plan(spec, config.moe, config.upcycle)
    set_output_scales(model.modules, plan)
    restore(state, checkpoint, config, groups, plan_hash=plan.hash)

    torch.manual_seed(0)
    tokens_S = torch.randint(0, spec.vocab_size, (32,))
    agreement = compare_with_dense(model, exported, tokens_S, groups=groups)
    assert agreement.max_logit_error <= 1e-4, agreement
    dense = compare_with_dense(model, config.source.path, tokens_S, groups=groups)
    assert dense.max_logit_error > 1e-2, "training changed nothing: the check above proves nothing"


def test_an_existing_folder_is_not_overwritten(tmp_path: Path):
    settings: dict[str, Any] = tree(
        tmp_path / "run", save_dense(tmp_path / "dense"), write_tokens(tmp_path / "tokens"),
        train={"steps": 0, "global_batch_size": 4, "precision": "bf16"},
    )  # fmt: skip
    run_training(settings, world_size=1)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        export_checkpoint(tmp_path / "run", tmp_path / "hf")
    export_checkpoint(tmp_path / "run", tmp_path / "hf2")
    assert json.loads((tmp_path / "hf2" / "config.json").read_text())["dtype"] == "bfloat16"
