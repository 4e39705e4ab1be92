"""Schedules in whole runs: AdamW's settings reach the weights, and a longer run is one run."""

import pytest
import torch
from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator
from training_runs import Runs, make_runs

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.data.announce import samples_of_run

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("schedules"), num_hidden_layers=2)


def test_adamw_with_other_settings_is_adamw_in_float64(runs: Runs):
    """The weights after two steps follow from those after one, by the formula of Adam.

    fp32 rounds the moments and the update: 1e-6 of the learning rate is eight units in the last
    place of an update of one.
    """
    beta1, beta2, eps, lr, decay = 0.7, 0.8, 1e-3, 1e-3, 0.2
    runs.train(
        "adamw", train={"steps": 2, "global_batch_size": 4}, checkpoint={"interval": 1},
        optimizer={"adam_beta1": beta1, "adam_beta2": beta2, "adam_eps": eps, "lr": lr,
                   "lr_decay_style": "constant", "warmup_steps": 0, "weight_decay": decay},
    )  # fmt: skip
    first, second = (
        {key: value.double() for key, value in runs.tensors("adamw", step).items()}
        for step in (1, 2)
    )
    weights = [key for key in first if not key.startswith("optimizer.")]
    assert len(weights) > 10
    for key in weights:
        m, v = (second[f"optimizer.{moment}.{key}"] for moment in ("exp_avg", "exp_avg_sq"))
        gradient = (m - beta1 * first[f"optimizer.exp_avg.{key}"]) / (1 - beta1)
        squared = beta2 * first[f"optimizer.exp_avg_sq.{key}"] + (1 - beta2) * gradient**2
        torch.testing.assert_close(v, squared, rtol=1e-4, atol=1e-10)
        update = (m / (1 - beta1**2)) / ((v / (1 - beta2**2)).sqrt() + eps)
        decayed = first[key] * (1 - lr * decay) if "norm" not in key else first[key]
        torch.testing.assert_close(second[key], decayed - lr * update, rtol=2e-7, atol=1e-6 * lr)


LONG = {
    "lr_decay_style": "WSD", "lr_decay_steps": 8, "lr_wsd_decay_steps": 4,
    "lr_wsd_decay_style": "minus_sqrt", "lr_warmup_fraction": 0.25, "warmup_steps": 100,
    "weight_decay_incr_style": "linear", "start_weight_decay": 0.0, "end_weight_decay": 0.3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tolerance"), [("1", 0), pytest.param("dp2 ep2", 1e-5, marks=pytest.mark.slow)]
)
def test_an_extended_run_is_the_run_that_took_all_steps(runs: Runs, name: str, tolerance: float):
    """With lr_decay_steps, train.steps only says when to stop; another layout changes nothing.

    Under the same layout to the last bit; under another, sums have another order (see
    test_invariance.py for 1e-5).
    """
    whole = runs.train(f"whole {name}", optimizer=LONG, train={"steps": 8})
    runs.train(f"parts {name}", optimizer=LONG, train={"steps": 5})
    longer = runs.train(f"parts {name}", name, optimizer=LONG, train={"steps": 8})
    for ours, expected in zip(longer[1:], whole[1:], strict=True):
        assert ours["learning_rate"] == expected["learning_rate"]
        for key in ("loss/lm", "grad_norm"):
            assert ours[key] == pytest.approx(expected[key], rel=tolerance, abs=0), key


def test_the_batch_grows_as_in_megatron_core_and_across_a_resume(runs: Runs):
    """The oracle is Megatron-Core's calculator of micro-batches, with a threshold every 10 samples.

    Under another layout, losses agree to 1e-5, as in test_invariance.py.
    """
    ramp = {"start": 4, "increment": 2, "samples": 30}
    train = {"steps": 7, "global_batch_size": 10, "rampup_batch_size": ramp}
    whole = runs.train("ramp", train=train)
    calculator = StepBatchsizeNumMicroBatchesCalculator(
        micro_batch_size=1, data_parallel_size=1, decrease_batch_size_if_needed=False, rank=1,
        schedule="0:4 10:6 20:8 30:10",
    )  # fmt: skip
    expected, samples = [], 0
    for _ in range(7):
        calculator.update(samples, consistency_check=True)
        expected.append(calculator.get_current_global_batch_size())
        samples += expected[-1]
    assert [line["tokens/batch"] // 32 for line in whole[1:]] == expected
    assert whole[-1]["tokens/seen"] == samples * 32
    assert len(set(expected)) == 4
    decay = {"lr_decay_steps": 7}
    runs.train("ramp-parts", train={**train, "steps": 3}, optimizer=decay)
    parts = runs.train("ramp-parts", "dp2 ep2", train=train, optimizer=decay)
    for ours, theirs in zip(parts[1:], whole[1:], strict=True):
        assert ours["tokens/seen"] == theirs["tokens/seen"]
        assert ours["loss/lm"] == pytest.approx(theirs["loss/lm"], rel=1e-5)
    config = build(RunConfig, runs.settings("ramp", train=train))
    assert samples_of_run(config) == samples
