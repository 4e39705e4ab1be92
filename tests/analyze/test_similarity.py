"""Test cosines of experts against loops over the dense neurons in float64.

The checkpoint is a dictionary here; test_command.py reads experts from a real checkpoint.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from construction import make_plan, settings
from tiny import save_dense
from torch import Tensor

from megatron_moe.analyze import similarity
from megatron_moe.analyze.similarity import layer_similarity
from megatron_moe.checkpoint.keys import checkpoint_key
from megatron_moe.experts.plan import ExpertPlan
from megatron_moe.hf.names import ROW_OF_ROLE
from megatron_moe.hf.reader import SourceCheckpoint, open_safetensors

LAYER = 1


class Stored(dict[str, Tensor]):
    """A dictionary with the methods of `GlobalTensors` that the code uses."""

    def shape_and_dtype(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self[key].shape), self[key].dtype

    def read(self, key: str, *, index: int, dtype: torch.dtype) -> Tensor:
        return self[key][index].to(dtype)


def matrices(dense: SourceCheckpoint) -> list[Tensor]:
    """Return gate, up and down of the layer, one row per neuron."""
    name = f"model.layers.{LAYER}.mlp.{{}}_proj.weight"
    gate_FD, up_FD, down_DF = (dense.read(name.format(x)) for x in ("gate", "up", "down"))
    return [gate_FD, up_FD, down_DF.T]


def built(plan: ExpertPlan, sources: list[SourceCheckpoint], *, noise: float) -> Stored:
    """Return the plan's experts with added noise."""
    torch.manual_seed(0)
    layer = plan.layer(LAYER)
    fc1, fc2 = [], []
    for expert, neurons_M in enumerate(torch.tensor(layer.neurons_EM)):
        dense = matrices(sources[int(layer.source_E[expert])])
        gate, up, down = (
            x[neurons_M] * scale + noise * torch.randn(len(neurons_M), x.shape[1])
            for x, scale in zip(dense, layer.weight_scales, strict=True)
        )
        fc1.append(torch.cat([gate, up]))
        fc2.append(down.T)
    keys = [
        checkpoint_key(ROW_OF_ROLE[role], layer=LAYER, moe_layer=True)
        for role in ("expert_fc1", "expert_fc2")
    ]
    return Stored(zip(keys, [torch.stack(fc1), torch.stack(fc2)], strict=True))


def by_loops(plan: ExpertPlan, stored: Stored, sources: list[SourceCheckpoint]) -> tuple[Any, Any]:
    """Compute cosines of experts as float64 vectors aligned with the dense layer."""
    layer, size = plan.layer(LAYER), plan.recipe.dense_ffn_hidden_size
    fc1, fc2 = (value.double().numpy() for value in stored.values())
    aligned, own, origin = [], [], []
    for expert, neurons_M in enumerate(layer.neurons_EM):
        gate, up = np.split(fc1[expert], 2)
        wide = np.concatenate([gate, up, fc2[expert].T], axis=1)
        dense = matrices(sources[int(layer.source_E[expert])])
        scaled = [x.double().numpy() * s for x, s in zip(dense, layer.weight_scales, strict=True)]
        whole = np.concatenate(scaled, axis=1)
        over_dense = np.zeros((size, wide.shape[1]))
        for row, neuron in enumerate(neurons_M):
            over_dense[neuron] += wide[row]
        aligned.append(over_dense.ravel())
        own.append(wide.ravel())
        origin.append(whole[neurons_M].ravel())
    cosine = lambda a, b: a @ b / np.sqrt((a @ a) * (b @ b))  # noqa: E731
    between = [[cosine(a, b) for b in aligned] for a in aligned]
    return np.array(between), np.array([cosine(a, b) for a, b in zip(own, origin, strict=True)])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[SourceCheckpoint]:
    root: Path = tmp_path_factory.mktemp("similarity")
    folders = [save_dense(root / str(seed), seed=seed) for seed in (0, 1)]
    return [open_safetensors(folder) for folder in folders]


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(
    "case", ["copy", "granular-paper-drop", "split_random", "qwen", "mix", "split_clustered"]
)
def test_cosines_are_those_of_plain_loops(sources, monkeypatch, case: str, noise: float):
    monkeypatch.setattr(similarity, "BLOCK_NUMBERS", 64 * 4 * 10)  # ten neurons at a time
    moe, upcycle = settings(case)
    plan = make_plan(sources[0].spec, moe, upcycle, sources[0])
    of_plan = sources[: plan.recipe.num_sources]
    stored = built(plan, of_plan, noise=noise)
    result: Any = layer_similarity(stored, plan, LAYER, of_plan)  # type: ignore[arg-type]
    between_EE, to_dense_E = by_loops(plan, stored, of_plan)
    # The code scales in float32, and the loops in float64.
    assert result.between_EE.numpy() == pytest.approx(between_EE, abs=1e-6)
    assert result.to_dense_E.numpy() == pytest.approx(to_dense_E, abs=1e-6)
    if not noise:
        assert to_dense_E == pytest.approx(np.ones(len(to_dense_E)))
        match case:
            case "copy":
                assert between_EE == pytest.approx(np.ones_like(between_EE))
            case "split_random" | "split_clustered":
                assert between_EE == pytest.approx(np.eye(len(between_EE)))
    else:
        assert (to_dense_E < 0.99).all()


def test_without_the_dense_weights_experts_are_still_compared(sources):
    moe, upcycle = settings("copy")
    plan = make_plan(sources[0].spec, moe, upcycle, sources[0])
    result = layer_similarity(built(plan, sources, noise=0.0), plan, LAYER, None)  # type: ignore
    assert result.to_dense_E is None
    assert result.between_EE.numpy() == pytest.approx(np.ones((4, 4)))
