"""What balances the router, under layouts: the same numbers reported, the same training.

Tolerances as in test_invariance.py.
"""

from pathlib import Path
from typing import Any

import pytest
from layouts import changes
from tiny import save_dense
from training_runs import run_training, tree, write_tokens

from megatron_moe.checkpoint.folder import newest
from megatron_moe.checkpoint.global_tensors import GlobalTensors

pytestmark = pytest.mark.distributed
BIAS = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0,
        "moe_router_bias_update_rate": 0.05}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "seq_aux_loss": {"moe_router_load_balancing_type": "seq_aux_loss"},
    "global_aux_loss": {"moe_router_load_balancing_type": "global_aux_loss"},
    "expert_bias": BIAS,
    "cv_squared": {"router_gate": "noisy_linear", "moe_router_load_balancing_type": "cv_squared"},
    "cv_squared_mlp": {
        "router_gate": "noisy_mlp",
        "moe_router_load_balancing_type": "cv_squared",
        "moe_aux_loss_coeff": 0.1,
    },
}
SLOW = ("cv_squared", "global_aux_loss")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("router")
    dense, tokens = save_dense(root / "dense"), write_tokens(root / "tokens")
    return {"root": root, "dense": dense, "tokens": tokens}


def run(inputs: dict[str, Path], name: str, kind: str, **more: Any) -> list[dict[str, Any]]:
    world_size, result = changes(name)
    result["moe"] |= {"num_moe_experts": 4, **KINDS[kind], **more}
    result["train"] |= {"steps": 3}
    where = inputs["root"] / f"{name}-{kind}".replace(" ", "-")
    settings = tree(where, inputs["dense"], inputs["tokens"], **result)
    return run_training(settings, world_size=world_size)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS],
)
def test_reported_values_and_training_do_not_depend_on_the_layout(
    inputs: dict[str, Path], kind: str
):
    oracle = run(inputs, "1", kind)[1:]
    perfect = 0 if "cv" in kind else 0.99
    assert all(line["loss/load_balancing"] > perfect for line in oracle)
    layouts = ["tp2 cp2 ep4", "dp2 ep2 recompute-full"]
    if "cv" in kind:  # noise must be that of the first pass where a layer is computed again
        layouts.append("pp2 vpp2 dp2 ep2 recompute-full")
    for name in layouts:
        for ours, expected in zip(run(inputs, name, kind)[1:], oracle, strict=True):
            if kind == "global_aux_loss" and "dp2" in name and ours["step"] > 1:
                continue  # its gradient is of the micro-batches so far: dp halves their number
            for key in ("loss/lm", "loss/load_balancing", "router/entropy"):
                assert ours[key] == pytest.approx(expected[key], rel=1e-5), (name, key, ours)


def test_the_bias_moves_against_the_load_and_is_saved(inputs: dict[str, Path]):
    run(inputs, "dp2", "expert_bias")
    checkpoint = newest(inputs["root"] / "dp2-expert_bias")
    assert checkpoint is not None
    import torch

    with GlobalTensors(checkpoint) as tensors:
        biases = [name for name in tensors.names if name.endswith("expert_bias")]
        assert len(biases) == 4
        for name in biases:
            bias_E = tensors.read(name, index=None, dtype=torch.float32)
            assert bias_E.abs().max() <= 3 * 0.05 + 1e-6
            assert bias_E.any()
            # Every step moves each expert by the rate, up or down.
            assert torch.allclose((bias_E / 0.05).round() * 0.05, bias_E, atol=1e-6)
