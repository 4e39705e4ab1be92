"""The schedule that overlaps the exchange of tokens computes what the ordinary one does.

On a CPU nothing overlaps, but Megatron-Core's schedule runs the same pieces in the same order as on
a GPU. Every piece computes what it does in the ordinary pass, and micro-batches add their gradients
in the same order. So losses and gradient norms are equal to the last bit, unless a sum of three
gradients is taken in another order (shared experts).
"""

from typing import Any

import pytest
from training_runs import Runs, make_runs

pytestmark = pytest.mark.distributed
slow = pytest.mark.slow
OVERLAP = {"overlap_moe_expert_parallel_comm": True}
PARTS = {"moe_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 32}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("overlap")
    common: dict[str, dict[str, Any]] = {
        "moe": {"moe_layers": [0, 2, 3]}, "upcycle": {"method": "drop"},
        "train": {"steps": 3, "global_batch_size": 8, "precision": "bf16"},
        "data": {"validation_path": str(root / "tokens"), "validation_samples": 3},
    }  # fmt: skip
    return make_runs(root, common=common)


CASES = {
    "ep": ("dp2 ep2", {}),
    "tp": ("tp2 ep2", {}),
    "interleaved": ("pp2 vpp2 dp2 ep2", {}),
    "one-expert-each": ("dp4 ep4", {}),
    "drops": ("tp2 dp2 ep2 drops", {}),
    "etp": ("dp4 ep2 etp2", {}),
    "documents": ("dp2 ep2", {"data": {"reset_attention": True}}),
    "noisy": ("dp2 ep2", {"moe": {"router_gate": "noisy_linear"}}),
    "teacher": ("dp2 ep2", {"teacher": {"logits_weight": 1.0}}),
    "frozen": ("dp2 ep2", {"train": {"freeze": ["embeddings", "norms@0", "attention@0"]}}),
    "checked": ("dp2 ep2", {"guard": {"device_check_interval": 2}}),
    "stages": ("dp2 ep2", {"train": {"stages": [{"steps": 1, "freeze": ["experts"]}, {}]}}),
}  # fmt: skip


def numbers(lines: list[dict[str, Any]]) -> list[list[Any]]:
    names = ("loss/lm", "grad_norm", "router/load_imbalance_by_layer", "loss/validation",
             "router/drop_rate", "loss/load_balancing", "loss/teacher_logits")  # fmt: skip
    return [[line.get(name) for name in names] for line in lines]


QUICK = ("ep", "interleaved", "frozen")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=slow) for case in CASES]
)
def test_a_run_is_the_one_without_overlap(runs: Runs, case: str):
    layout, sections = CASES[case]
    train = sections.get("train", {})
    others = {name: values for name, values in sections.items() if name != "train"}
    both = [
        runs.train(f"{case} {bool(overlap)}", layout, train={**train, **overlap}, **others)
        for overlap in ({}, OVERLAP)
    ]
    assert numbers(both[1]) == numbers(both[0])


def test_shared_experts_differ_by_the_order_of_a_sum(runs: Runs):
    """bf16 gradients have 8 bits, so that another order changes a norm by 2^-8 of it at most."""
    sections: dict[str, dict[str, Any]] = {"moe": PARTS, "upcycle": {"method": "split_random"}}
    plain = runs.train("apart", "dp2 ep2", **sections)
    ours = runs.train("together", "dp2 ep2", train=OVERLAP, **sections)
    assert ours[1]["loss/lm"] == plain[1]["loss/lm"]
    for line, expected in zip(ours[1:], plain[1:], strict=True):
        assert line["loss/lm"] == pytest.approx(expected["loss/lm"], rel=1e-3)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2**-8)


@slow
def test_choices_are_recorded_and_replayed(runs: Runs):
    """Passes of several micro-batches are under way at once; each takes its own choices."""
    folder = str(runs.root / "choices")
    recorded = runs.train("recorded", "dp2 ep2", moe={"record_routing": folder})
    replayed = runs.train(
        "replayed", "dp2 ep2", train=OVERLAP, moe={"replay_routing": folder},
    )  # fmt: skip
    assert numbers(replayed) == numbers(recorded)
    other = {"method": "drop", "router_init": "normal", "router_init_std": 0.5}
    moved = runs.train(
        "moved", "dp2 ep2", train=OVERLAP, moe={"replay_routing": folder}, upcycle=other
    )
    loads = [[line.get("router/load_by_expert") for line in run] for run in (moved, recorded)]
    assert loads[0] == loads[1]


def test_the_schedule_of_pieces_runs(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    """Otherwise the tests above compare a run with itself. Ranks are forked, so a file tells."""
    from megatron.core.models.common.model_chunk_schedule_plan import TransformerLayerSchedulePlan

    seen, run = runs.root / "seen", TransformerLayerSchedulePlan.run

    def watched(f_layer: Any, b_layer: Any, *args: Any, **kwargs: Any) -> Any:
        with seen.open("a") as file:
            file.write(f"{f_layer is not None} {b_layer is not None}\n")
        return run(f_layer, b_layer, *args, **kwargs)

    monkeypatch.setattr(TransformerLayerSchedulePlan, "run", staticmethod(watched))
    runs.train("watched", "dp2 ep2", train={**OVERLAP, "steps": 1}, optimizer={"warmup_steps": 0})
    # Four micro-batches of four layers on two ranks: three pairs, and an end on either side.
    lines = seen.read_text().splitlines()
    counts = [lines.count(line) for line in ("True True", "True False", "False True")]
    assert counts == [24, 8, 8]
