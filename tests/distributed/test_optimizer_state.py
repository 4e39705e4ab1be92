"""A run that is grown from the export of a run continues with the moments of its optimizer.

The text is one sequence over and over, so that a new run, which begins at the first sequence, sees
what the run before would have seen next. Tolerances: with equal twins, sums of m equal parts
replace one term, in fp32; observed 2e-7.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import LAYOUTS
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tiny import save_moe
from training_runs import read_metrics, run_training, tree

from megatron_moe.commands.export import export_checkpoint
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import CheckpointError
from megatron_moe.experts.from_source import complete_from_source
from megatron_moe.hf.spec import read_spec
from megatron_moe.rules.check import violations

pytestmark = pytest.mark.distributed
STEPS = 3
SAME = 1e-6
MOE = {"moe_aux_loss_coeff": 0.0}


def settings(root: Path, name: str, folder: Path, **sections: Any) -> dict[str, Any]:
    """Settings of a run without warm-up, decay, clipping or a loss on the router's load.

    Clipping would differ: the norm of two halves of a gradient is smaller than that of the whole.
    """
    defaults: dict[str, Any] = {
        "moe": MOE,
        "train": {"steps": STEPS},
        "optimizer": {
            "lr": 1e-3, "min_lr": 1e-3, "warmup_steps": 0, "clip_grad": 1e6, "adam_eps": 1e-15,
        },
    }  # fmt: skip
    for section, values in sections.items():
        defaults[section] = {**defaults.get(section, {}), **values}
    result = tree(root / name, folder, root / "tokens", **defaults)
    if "num_moe_experts" not in sections.get("moe", {}):
        del result["moe"]["num_moe_experts"]
    return complete_from_source(result)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of twice `STEPS` steps, and an export from its middle."""
    root = tmp_path_factory.mktemp("small")
    builder = IndexedDatasetBuilder(str(root / "tokens.bin"), dtype=np.int32)
    tokens = torch.randint(0, 257, (32,), generator=torch.Generator().manual_seed(0))
    for _ in range(200):
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(root / "tokens.idx"))
    source = save_moe(root / "source", "qwen2_moe")
    run = settings(
        root, "run", source, upcycle={"method": "keep"}, train={"steps": 2 * STEPS},
        checkpoint={"interval": STEPS},
    )  # fmt: skip
    run_training(run, world_size=1)
    export_checkpoint(root / "run" / "checkpoints" / f"step_{STEPS:08d}", root / "hf")
    return root


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss/lm"] for line in lines if line["step"] > 0]


def from_small(small: Path, name: str, layout: str = "1", **sections: Any) -> list[float]:
    """Train from the export, with the moments of its checkpoint, and return the losses."""
    world_size, parallel = LAYOUTS[layout]
    state = small / "run" / "checkpoints" / f"step_{STEPS:08d}"
    run = settings(
        small, name, small / "hf", parallel=parallel,
        **{"source": {"optimizer_state": str(state)}, **sections},
    )  # fmt: skip
    return losses(run_training(run, world_size=world_size))


def grown(twins: str, **upcycle: Any) -> dict[str, Any]:
    return {
        "moe": {"num_moe_experts": 8, **MOE},
        "upcycle": {"method": "grow", "twins": twins, **upcycle},
    }


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("keep", "1"),
        ("exact", "tp2-ep2-etp2"),
        pytest.param("keep", "tp2-ep2-etp2", marks=pytest.mark.slow),
        pytest.param("exact", "1", marks=pytest.mark.slow),
    ],
)
def test_losses_equal_those_of_the_small_run(small: Path, kind: str, layout: str):
    """Equal twins with their part of the moments learn what the one expert would have learned."""
    expected = losses(read_metrics(small / "run"))[STEPS:]
    changes = {"upcycle": {"method": "keep"}} if kind == "keep" else grown("exact")
    with_moments = from_small(small, f"{kind}-{layout}", layout, **changes)
    assert with_moments == pytest.approx(expected, rel=SAME)


def test_without_moments_it_does_not(small: Path):
    expected = losses(read_metrics(small / "run"))[STEPS:]
    without = from_small(small, "without", source={}, **grown("exact"))
    assert without[0] == pytest.approx(expected[0], rel=SAME)
    assert without[1:] != pytest.approx(expected[1:], rel=100 * SAME)


def test_a_layout_gives_the_losses_of_one_rank(small: Path):
    """Noise as in test_invariance.py: sums in another order, five AdamW steps."""
    changes = grown("noise", noise_std=0.01) | {"train": {"steps": 5}}
    ours, expected = (
        from_small(small, f"noise-{layout}", layout, **changes) for layout in ("tp2-ep2", "1")
    )
    assert ours == pytest.approx(expected, rel=1e-5)


def test_moments_of_step_0_are_saved(small: Path):
    expected = from_small(small, "one-job", upcycle={"method": "keep"})
    for steps, layout in ((0, "1"), (STEPS, "tp2-ep2")):
        ours = from_small(
            small, "two-jobs", layout, upcycle={"method": "keep"}, train={"steps": steps}
        )
    assert ours == pytest.approx(expected, rel=SAME)


def test_pruning_keeps_the_moments_of_kept_experts(small: Path):
    changes = {
        "moe": {"num_moe_experts": 2, **MOE},
        "upcycle": {"method": "prune", "choose": "even"},
    }
    ours, expected = (
        from_small(small, f"prune-{layout}", layout, **changes) for layout in ("ep2", "1")
    )
    assert ours == pytest.approx(expected, rel=1e-5)
    without = from_small(small, "prune-without", source={}, **changes)
    assert without[1:] != pytest.approx(expected[1:], rel=1e-5)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (f"step_{2 * STEPS:08d}", "model.norm.weight has other values"),
        ("step_00000000", "equally many updates of all parameters, but it holds 0"),
        ("nowhere", "must be a run with a checkpoint"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(small: Path, state: str, reason: str):
    if state == "step_00000000":
        first = settings(
            small, "first", small / "hf", upcycle={"method": "keep"}, train={"steps": 0}
        )
        run_training(first, world_size=1)
        folder = small / "first"
    else:
        folder = small / "run" / "checkpoints" / state
    with pytest.raises(CheckpointError, match=reason) as raised:
        from_small(
            small, "refused", source={"optimizer_state": str(folder)}, upcycle={"method": "keep"}
        )
    assert " unset" in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"upcycle": {"method": "keep"}, "optimizer": {"optimizer": "muon"}},
            "needs optimizer.opt",
        ),
        (
            {"upcycle": {"method": "split_random"}, "moe": {"num_moe_experts": 8, **MOE}},
            "splits or merges",
        ),
    ],
)
def test_settings_without_a_copy_of_each_moment_are_refused(
    small: Path, changes: dict[str, Any], reason: str
):
    run = settings(small, "rules", small / "hf", **{"source": {"optimizer_state": "x"}, **changes})
    config = build(RunConfig, run)
    assert any(reason in message for message in violations(config, read_spec(small / "hf"), 1))
