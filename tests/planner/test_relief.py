"""Test the changes that make a run fit: each really does, in an order that costs more and more."""

import re

import pytest
from dense_models import H100_FILES, shipped

from megatron_moe.config.load import overridden
from megatron_moe.errors import ConfigError
from megatron_moe.planner.check import check_layout
from megatron_moe.planner.relief import BF16_GRADIENTS, BF16_MOMENTS, reliefs, searched
from megatron_moe.planner.search import NothingFitsError, search

ONE_GPU = next(path for path in H100_FILES if path.stem == "llama3.2-1b-e4t2-1")


def test_changes_of_a_layout_that_does_not_fit(make_config, llama3_spec):
    config = make_config(
        expert_parallel_size=8, pipeline_parallel_size=2, train={"micro_batch_size": 8}
    )
    result = check_layout(config, llama3_spec, gpus=64)
    assert result.legal
    assert not result.fits
    assert result.reliefs
    for line in result.reliefs:
        change = line.split(":")[0]
        gib, usable = map(float, re.findall(r"([\d.]+) of ([\d.]+) GiB", line)[0])
        assert gib <= usable
        if re.match(r"(train|optimizer)\.", change):  # settings, which the same check confirms
            changed = check_layout(overridden(config, change.split()), llama3_spec, gpus=64)
            assert changed.fits, change
            assert changed.candidate is not None
            assert f"{changed.candidate.memory.total:.1f} of" in line
    kinds = [line.split("=")[0].split(" ")[0] for line in result.reliefs]
    assert kinds.index("another") < kinds.index("128")
    assert kinds[0].startswith("train.")


def test_a_layout_that_fits_needs_no_changes(make_config, llama3_spec):
    config = make_config(expert_parallel_size=8, pipeline_parallel_size=4, context_parallel_size=2)
    result = check_layout(config, llama3_spec, gpus=128)
    assert result.fits
    assert result.reliefs == ()


def test_a_search_that_fits_nothing_says_what_would(make_config, llama3_spec):
    config = make_config(gbs=64)
    with pytest.raises(NothingFitsError) as caught:
        searched(config, llama3_spec, gpus=8, gpu="h100")
    lines = str(caught.value).splitlines()
    assert lines[1] == "  changes that make it fit, cheapest first:"
    cheapest = lines[2].split(":")[0].split()
    assert cheapest == [*BF16_MOMENTS, *BF16_GRADIENTS]
    assert search(overridden(config, cheapest), llama3_spec, gpus=8).best
    assert any(line.startswith("    16 h100 instead of 8: ") for line in lines)
    assert search(config, llama3_spec, gpus=16).best
    assert any("8 h200 instead of h100" in line for line in lines)
    assert any("moe.num_moe_experts=4" in line for line in lines)


def test_stages_of_an_odd_number_of_layers_are_tried(make_config, llama3_spec):
    """42 layers on 8 GPUs: no power of two has enough stages, but 3 * 2^n does."""
    from dataclasses import replace

    spec = replace(llama3_spec, num_layers=42, hidden_size=16384, ffn_hidden_size=53248,
                   num_attention_heads=128)  # fmt: skip
    config = make_config(gbs=1024)
    changes = reliefs(config, spec, gpus=64, gpu="h100")
    (more,) = [one for one in changes if "instead of 64" in one.change]
    gpus = int(more.change.split()[0])
    batch = -(-1024 // gpus) * gpus
    assert search(overridden(config, [f"train.global_batch_size={batch}"]), spec, gpus=gpus).best
    with pytest.raises(ConfigError):
        search(config, spec, gpus=128)


@pytest.mark.parametrize(("gpu", "first"), [("l40s", 2), ("rtx4090", 5)])
def test_one_small_gpu_trains_with_changes_that_hold(gpu: str, first: int):
    """Each line is confirmed by a check of the run with its settings; no layout helps one GPU."""
    config, spec, gpus = shipped(ONE_GPU)
    assert gpus == 1
    result = check_layout(config, spec, gpus=1, gpu=gpu)
    assert not result.fits
    settings = [line for line in result.reliefs if re.match(r"(train|optimizer)\.", line)]
    assert len(settings) > 3
    for line in settings:
        overrides = line.split(":")[0].split()
        changed = check_layout(overridden(config, overrides), spec, gpus=1, gpu=gpu)
        assert changed.fits, line
        assert changed.candidate is not None
        assert f"{changed.candidate.memory.total:.1f} of" in line
        assert ("host memory" in line) == ("optimizer.optimizer_cpu_offload=true" in overrides)
    assert len(settings[0].split(":")[0].split()) == first, "few changes come first"
    frozen = ["experts" in line for line in settings]
    assert frozen == sorted(frozen), "what trains less comes last"


def test_a_change_keeps_what_is_frozen_already():
    config, spec, _ = shipped(ONE_GPU)
    config = overridden(config, ["train.freeze=[norms]"])
    lines = check_layout(config, spec, gpus=1, gpu="rtx4090").reliefs
    assert any(line.startswith("train.freeze=[norms,experts] ") for line in lines)
