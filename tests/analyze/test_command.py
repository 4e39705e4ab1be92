"""Test `megatron-moe analyze` on a trained run: equal numbers under any layout, and its files.

A tiny model is first trained for two large steps, so that experts differ. Floats differ between
layouts in the seventh digit, and the file keeps six decimals.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import changes
from ranks import run_on_ranks
from tiny import save_dense
from training_runs import run_training, tree, write_tokens

from megatron_moe.analyze.record import Analysis, Distances, path_of, read_analysis
from megatron_moe.analyze.table import BY_DOMAIN, BY_LAYER, analysis_report
from megatron_moe.checkpoint.folder import run_of, step_folder
from megatron_moe.checkpoint.global_tensors import GlobalTensors
from megatron_moe.cli.main import app
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError, DataError
from megatron_moe.runtime.world import World

pytestmark = pytest.mark.distributed
SEQ_LENGTH, SAMPLES, LAYERS, TOPK = 32, 5, [0, 1, 3], 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with two domains and two checkpoints."""
    root = tmp_path_factory.mktemp("analyze")
    domains = {
        name: {"path": str(write_tokens(root / name, seed=seed)), "weight": 0.5}
        for seed, name in enumerate(("left", "right"))
    }
    settings = tree(
        root / "run", save_dense(root / "dense"), root,
        moe={"moe_layers": LAYERS}, upcycle={"permutation_seed": 3},
        train={"steps": 2, "global_batch_size": 4},
        optimizer={"lr": 1e-2, "min_lr": 1e-2, "warmup_steps": 0}, checkpoint={"interval": 1},
    )  # fmt: skip
    settings["data"] = {
        "domains": domains, "validation_fraction": 0.2, "seq_length": SEQ_LENGTH,
        "validation_samples": SAMPLES,
    }  # fmt: skip
    run_training(settings, world_size=1)
    write_tokens(root / "elsewhere", seed=7)
    return root / "run"


def overrides(name: str) -> tuple[int, list[str]]:
    world_size, layout = changes(name)
    return world_size, [
        f"{section}.{key}={json.dumps(value)}"
        for section, values in layout.items()
        for key, value in values.items()
    ]


def analyzed(run: Path, name: str) -> Analysis:
    world_size, settings = overrides(name)
    checkpoint, config = run_of(run, settings)
    run_on_ranks(analyze_there, config, checkpoint, world_size=world_size)
    return read_analysis(path_of(run, 2))


def analyze_there(world: World, config: RunConfig, checkpoint: Path) -> None:
    from megatron_moe.commands.analyze import analyze

    analyze(config, world, [checkpoint], sets={}, say=lambda _: None)


@pytest.fixture(scope="module")
def alone(run: Path) -> Analysis:
    return analyzed(run, "1")


def test_counts_add_up(alone: Analysis):
    assert alone.layers == LAYERS
    assert alone.tokens == dict.fromkeys(("left", "right"), SEQ_LENGTH * SAMPLES)
    for name, tokens in alone.tokens.items():
        assert [sum(counts) for counts in alone.counts[name]] == [tokens * TOPK] * len(LAYERS)
        halves_HLE = np.array(alone.counts_of_halves[name])
        assert (halves_HLE.sum(axis=0) == np.array(alone.counts[name])).all()
        early = 3 * SEQ_LENGTH  # three samples of five
        assert (halves_HLE[0].sum(axis=-1) == early * TOPK).all()
    both_LE = np.array(alone.counts["left"]) + np.array(alone.counts["right"])
    together_LEE = np.array(alone.coactivation)
    assert (together_LEE.diagonal(axis1=1, axis2=2) == both_LE).all()
    # A token with K experts is counted in K rows and K columns.
    assert (together_LEE.sum(axis=(1, 2)) == sum(alone.tokens.values()) * TOPK**2).all()
    assert np.ptp(both_LE, axis=1).all(), (
        "all experts are equal: the comparison below proves nothing"
    )


def test_one_domain_has_no_distance_to_others(alone: Analysis):
    one = alone.domains[0]
    by_domain = ("tokens", "loss", "counts", "dropped", "entropy", "max_over_mean", "dead",
                 "confidence", "counts_of_halves")  # fmt: skip
    distances = Distances(
        layers=[[[0.0]]] * len(LAYERS), mean=[[0.0]], within={one: alone.distances.within[one]}
    )
    changes = {name: {one: getattr(alone, name)[one]} for name in by_domain}
    alone_text = str(analysis_report(alone))
    text = str(analysis_report(alone.model_copy(
        update={**changes, "domains": [one], "distances": distances}
    )))  # fmt: skip
    for word in ("  domains  ", "L2 distance"):
        assert word in alone_text
        assert word not in text
    rows = [line.split("  ") for line in text.split("\n\n")[1].splitlines()]
    assert {len([cell for cell in row if cell]) for row in rows} == {len(BY_LAYER) - 1}


def test_every_column_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    _, by_layer, by_domain, *_ = page.partition("## Analysis")[2].split("| column |")
    for columns, table in ((BY_LAYER, by_layer), (BY_DOMAIN, by_domain)):
        assert [name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
                for name in re.findall(r"`([^`]+)`", row)] == list(columns)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "dp4 ep4",
        "tp2 ep2",
        "pp2",
        pytest.param("tp2 cp2 ep2 recompute-full", marks=pytest.mark.slow),
        pytest.param("pp2 vpp2 recompute-moe", marks=pytest.mark.slow),
    ],
)
def test_layouts_count_the_same(run: Path, alone: Analysis, name: str):
    analysis = analyzed(run, name)
    exact = (
        "layers",
        "domains",
        "tokens",
        "counts",
        "dropped",
        "dead",
        "coactivation",
        "distances",
    )
    for field in (*exact, "entropy", "max_over_mean"):
        assert getattr(analysis, field) == getattr(alone, field), field
    assert analysis.similarity == alone.similarity
    for domain in alone.domains:
        assert analysis.loss[domain] == pytest.approx(alone.loss[domain], rel=1e-5)
        assert analysis.confidence[domain] == pytest.approx(alone.confidence[domain], abs=2e-6)


def test_the_checkpoints_experts_are_compared(run: Path, alone: Analysis):
    """Compare with the cosine of two experts computed directly from the checkpoint's tensors.

    Both are permuted copies of the same dense neurons.
    """
    from megatron_moe.experts.plan import make_expert_plan
    from megatron_moe.hf.spec import read_spec

    _, config = run_of(run)
    plan = make_expert_plan(read_spec(config.source.path), config.moe, config.upcycle)
    key = "decoder.layers.3.mlp.experts.experts.linear_fc{}.weight"
    vectors = []
    with GlobalTensors(step_folder(run, 2)) as tensors:
        for expert in (0, 2):
            order = np.argsort(plan.layer(3).neurons_EM[expert])
            fc1, fc2 = (
                tensors.read(key.format(i), index=expert, dtype=torch.float64).numpy()
                for i in (1, 2)
            )
            gate, up = np.split(fc1, 2)
            vectors.append(np.concatenate([gate[order], up[order], fc2.T[order]]).ravel())
    a, b = vectors
    cosine = a @ b / np.sqrt((a @ a) * (b @ b))
    assert alone.similarity.between_experts[2][0][2] == pytest.approx(cosine, abs=1e-6)
    assert 0.9 < cosine < 0.9999, "two large steps make the copies diverge slightly"
    assert alone.similarity.to_dense is not None
    assert (np.array(alone.similarity.to_dense) < 0.9999).all()


def output_of(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the output of the command; ranks are other processes, so file descriptors are read."""
    app(["analyze", *arguments], standalone_mode=False)
    return capfd.readouterr().out


def test_every_step_and_other_texts_from_the_command_line(run: Path, capfd):
    elsewhere = f"far={run.parent / 'elsewhere'}"
    printed = output_of(capfd, str(run), "--all-steps", "--set", elsewhere, "--json")
    first, second = json.loads(printed)["analyses"]
    assert [first["step"], second["step"]] == [1, 2]
    assert first["domains"] == ["left", "right", "far"]
    assert first["evaluation_sets"] == ["far"]
    assert json.loads(path_of(run, 1).read_text()) == first
    apart = [np.array(x["similarity"]["to_dense"]) for x in (first, second)]
    assert (apart[0] > apart[1]).all(), "each step moves away from the dense weights"

    printed = output_of(capfd, str(step_folder(run, 1)), "--set", elsewhere)
    _, by_layer, by_domain, apart = printed.split("\n\n")
    assert [line.split()[0] for line in by_layer.splitlines()] == ["layer", "0", "1", "3"]
    assert [line.split()[0] for line in by_domain.splitlines()[1:]] == first["domains"]
    far = apart.splitlines()[-1].split()
    assert far == ["far", *(f"{x:.4f}" for x in first["distances"]["mean"][2][:2])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{step}", "--all-steps"], "is a single checkpoint"),
        (["{run}", "--set", "far"], "not of the form NAME=FILE"),
        (["{run}", "--set", "left={run}"], "which the run's domains are named too"),
        (["{run}", "data.validation_fraction=null"], "holds no text out"),
    ],
)
def test_errors_name_the_way_out(run: Path, arguments: list[str], message: str):
    given = [word.format(run=run, step=step_folder(run, 1)) for word in arguments]
    with pytest.raises(ConfigError) as caught:
        app(["analyze", *given], standalone_mode=False)
    assert message in str(caught.value)


def test_a_file_of_another_kind_is_refused(tmp_path: Path, alone: Analysis):
    path = tmp_path / "step-000002.json"
    path.write_text(json.dumps({**alone.model_dump(by_alias=True), "schema": 2}))
    with pytest.raises(DataError, match="is not an analysis of schema 1"):
        read_analysis(path)
