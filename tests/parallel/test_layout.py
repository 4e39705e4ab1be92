import itertools
import math

import pytest

from megatron_moe.config.run import Parallel
from megatron_moe.errors import ConfigError
from megatron_moe.parallel.layout import fold, local_experts

SIZES = [
    pytest.param(tp, cp, pp, ep, etp, id=f"tp{tp}-cp{cp}-pp{pp}-ep{ep}-etp{etp}")
    for tp, cp, pp, ep, etp in itertools.product((1, 2), (1, 2), (1, 2), (1, 4), (1, 2))
]


def config(tp=1, cp=1, pp=1, ep=1, etp=1) -> Parallel:
    return Parallel(
        tensor_parallel_size=tp,
        context_parallel_size=cp,
        pipeline_parallel_size=pp,
        expert_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )


@pytest.mark.parametrize(("tp", "cp", "pp", "ep", "etp"), SIZES)
def test_groups_match_megatron(tp, cp, pp, ep, etp):
    """Compare each group with Megatron-Core's, which creates the process groups."""
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    world_size = 16
    layout = fold(config(tp, cp, pp, ep, etp), world_size=world_size)
    order = "tp-cp-ep-dp-pp"
    dense = parallel_state.RankGenerator(
        tp=tp, ep=1, dp=world_size // (tp * cp * pp), pp=pp, cp=cp, order=order
    )
    expert = parallel_state.RankGenerator(
        tp=etp, ep=ep, dp=world_size // (etp * ep * pp), pp=pp, cp=1, order=order
    )

    for axes, megatron in [
        (("tp",), "tp"),
        (("cp",), "cp"),
        (("dp", "cp"), "dp-cp"),
        (("pp",), "pp"),
    ]:
        assert sorted(layout.attention.groups(*axes)) == sorted(dense.get_ranks(megatron))
    for axes, megatron in [(("etp",), "tp"), (("ep",), "ep"), (("edp",), "dp"), (("pp",), "pp")]:
        assert sorted(layout.experts.groups(*axes)) == sorted(expert.get_ranks(megatron))


@pytest.mark.parametrize(("tp", "cp", "pp", "ep", "etp"), SIZES)
def test_every_axis_partitions_the_world(tp, cp, pp, ep, etp):
    layout = fold(config(tp, cp, pp, ep, etp), world_size=16)
    for grid in (layout.attention, layout.experts):
        assert math.prod(grid.shape) == 16
        for axis in grid.axes:
            assert sorted(itertools.chain(*grid.groups(axis))) == list(range(16))


def test_expert_parallel_may_exceed_data_parallel():
    """Folding lets ep span tp and cp ranks, so ep > dp is legal."""
    layout = fold(config(tp=4, cp=2, ep=8), world_size=8)
    assert layout.attention.size("dp") == 1
    assert [list(local_experts(layout, rank=r, num_experts=8)) for r in range(8)] == [
        [0], [1], [2], [3], [4], [5], [6], [7]
    ]  # fmt: skip


def test_an_impossible_world_names_the_numbers():
    with pytest.raises(ConfigError, match=r"world_size \(12\).*pp \* ep \* etp = 2 \* 4 \* 1 = 8"):
        fold(config(pp=2, ep=4), world_size=12)
