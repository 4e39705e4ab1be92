"""A replayed run is the recorded one, under the layout of the record and under others.

Under the same layout, to the last bit. Under another, the counts of tokens are equal exactly, as
they are integers, and losses to the tolerance of test_invariance.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import Runs, make_runs

from megatron_moe.errors import DataError
from megatron_moe.train.routing_record import read_step

pytestmark = pytest.mark.distributed
LOADS = "router/load_by_expert"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    common: dict[str, dict[str, Any]] = {
        "moe": {"moe_layers": [0, 2, 3]}, "train": {"steps": 3}, "upcycle": {"method": "drop"},
    }  # fmt: skip
    return make_runs(tmp_path_factory.mktemp("routing"), common=common)


@pytest.fixture(scope="module")
def recorded(runs: Runs) -> list[dict[str, Any]]:
    return runs.train("recorded", moe={"record_routing": str(runs.root / "choices")})[1:]


def replay(
    runs: Runs, where: str, layout: str = "1", **sections: dict[str, Any]
) -> list[dict[str, Any]]:
    return runs.train(where, layout, moe={"replay_routing": str(runs.root / "choices")},
                      **sections)[1:]  # fmt: skip


def numbers(lines: list[dict[str, Any]]) -> list[list[Any]]:
    return [[line[key] for key in ("loss/lm", "grad_norm", LOADS)] for line in lines]


def test_recording_changes_no_bit(runs: Runs, recorded: list[dict[str, Any]]):
    assert numbers(runs.train("plain")[1:]) == numbers(recorded)


@pytest.mark.parametrize("recompute", ["none", pytest.param("moe", marks=pytest.mark.slow), "full"])
def test_a_replayed_run_is_the_recorded_one(
    runs: Runs, recorded: list[dict[str, Any]], recompute: str
):
    lines = replay(runs, f"same-{recompute}", train={"steps": 3, "recompute": recompute})
    assert numbers(lines) == numbers(recorded)


def test_other_routers_send_tokens_to_the_recorded_experts(
    runs: Runs, recorded: list[dict[str, Any]]
):
    """Other router rows: left alone, they would choose otherwise, and their weights differ."""
    other = {"method": "drop", "router_init": "normal", "router_init_std": 0.5}
    alone = runs.train("alone", upcycle=other)[1:]
    replayed = replay(runs, "other", upcycle=other)
    assert [line[LOADS] for line in replayed] == [line[LOADS] for line in recorded]
    assert [line[LOADS] for line in alone] != [line[LOADS] for line in recorded]
    assert replayed[0]["loss/lm"] != recorded[0]["loss/lm"]


@pytest.mark.parametrize(
    "layout",
    [
        "tp2 pp2 dp2 ep4",
        pytest.param("cp2 ep2", marks=pytest.mark.slow),
        pytest.param("pp2 vpp2 recompute-full", marks=pytest.mark.slow),
    ],
)
def test_a_record_is_replayed_under_another_layout(
    runs: Runs, recorded: list[dict[str, Any]], layout: str
):
    lines = replay(runs, layout.replace(" ", "-"), layout)
    for ours, expected in zip(lines, recorded, strict=True):
        assert ours[LOADS] == expected[LOADS]
        assert ours["loss/lm"] == pytest.approx(expected["loss/lm"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_a_layout_records_what_one_rank_does(runs: Runs, recorded: list[dict[str, Any]]):
    runs.train(
        "folded", "tp2 pp2 dp2 ep4", moe={"record_routing": str(runs.root / "folded-choices")}
    )
    for step in (1, 2, 3):
        folders = [runs.root / name / f"step_{step:08d}" for name in ("choices", "folded-choices")]
        assert len(list(folders[1].iterdir())) == 8
        samples = range(4 * (step - 1), 4 * step)
        one, folded = (
            read_step(folder, [0, 2, 3], list(samples), torch.arange(32)) for folder in folders
        )
        for layer, choices in one.items():
            for sample, chosen_sK in choices.items():
                assert torch.equal(folded[layer][sample].sort().values, chosen_sK.sort().values)


def test_a_stage_without_moe_layers_is_part_of_a_record(runs: Runs):
    folder = str(runs.root / "late-choices")
    late = runs.train("late", "pp2", moe={"moe_layers": [2, 3], "record_routing": folder})[1:]
    replayed = runs.train("late-one", moe={"moe_layers": [2, 3], "replay_routing": folder})[1:]
    assert [line[LOADS] for line in replayed] == [line[LOADS] for line in late]


def test_a_record_that_lacks_something_is_refused(runs: Runs, recorded: list[dict[str, Any]]):
    folder = runs.root / "choices" / "step_00000001"
    with pytest.raises(DataError, match="lacks 64 choices of this rank's layers"):
        read_step(folder, [0, 1], [0, 1], torch.arange(32))
    with pytest.raises(DataError, match="has no complete record of the step"):
        read_step(runs.root / "choices" / "step_00000009", [0], [0], torch.arange(32))
    (runs.root / "partial").mkdir()
    np.savez(runs.root / "partial" / "rank_00000_of_00002.npz", layers=np.arange(1))
    with pytest.raises(DataError, match="has no complete record of the step"):
        read_step(runs.root / "partial", [0], [0], torch.arange(32))


def test_a_record_of_another_model_is_refused_before_a_step(tmp_path: Path):
    from megatron_moe.config.load import build
    from megatron_moe.config.run import RunConfig
    from megatron_moe.train.routing_record import RoutingRecord

    def config(**moe: Any) -> RunConfig:
        return build(RunConfig, {
            "run": {"dir": "run"}, "source": {"path": "dense"},
            "moe": {"num_moe_experts": 4, **moe}, "data": {"path": "text"}, "train": {"steps": 1},
        })  # fmt: skip

    folder = str(tmp_path / "record")
    with pytest.raises(DataError, match=r"must be a folder that moe\.record_routing has"):
        RoutingRecord(config(replay_routing=folder), rank=0, size=1)
    RoutingRecord(config(record_routing=folder), rank=0, size=1)
    RoutingRecord(config(replay_routing=folder), rank=0, size=1)
    with pytest.raises(
        DataError, match="was recorded with moe_router_topk = 2, but this run has 1"
    ):
        RoutingRecord(
            config(replay_routing=folder, moe_router_topk=1, router_order="softmax_topk"),
            rank=0, size=1,
        )  # fmt: skip
