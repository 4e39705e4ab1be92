"""Routers are reported when a condition has lasted, once, and again after it was gone."""

import numpy as np

from megatron_moe.train.health import RouterHealth

HEALTHY = [10, 12, 9, 9]
DEAD = [20, 0, 10, 10]
COLLAPSED = [200, 199, 1, 0]
LOADED = [30, 5, 2, 3]


def warnings(*steps: list[list[int]], max_load: float | None = None) -> dict[int, list[str]]:
    """Return the warnings of each step that has some; layers 3 and 5, two of four experts."""
    health = RouterHealth([3, 5], num_experts=4, topk=2, steps=3, max_load=max_load)
    found = {
        step: health.after(step, np.array(chosen_LE)) for step, chosen_LE in enumerate(steps, 1)
    }
    return {step: texts for step, texts in found.items() if texts}


def test_a_healthy_router_is_not_reported():
    assert warnings(*[[HEALTHY, HEALTHY]] * 10) == {}


def test_a_dead_expert_is_reported_once_and_again_after_a_recovery():
    found = warnings(
        *[[HEALTHY, DEAD]] * 5, [HEALTHY, HEALTHY], *[[HEALTHY, DEAD]] * 2, [DEAD, DEAD]
    )
    assert found == {
        step: [
            f"Step {step}: no token has chosen expert 1 of layer 5 for 3 steps: dead. Raise "
            "moe.moe_aux_loss_coeff, or lower the learning rate of routers "
            "(optimizer.lr_multipliers)"
        ]
        for step in (3, 9)
    }


def test_another_expert_each_time_is_not_dead():
    assert warnings([HEALTHY, [0, 9, 9, 9]], [HEALTHY, [9, 0, 9, 9]], [HEALTHY, [9, 9, 0, 9]]) == {}


def test_a_collapsed_router_is_not_also_a_list_of_dead_experts():
    (texts,) = warnings(*[[COLLAPSED, HEALTHY]] * 4).values()
    assert [text.split(". ")[0] for text in texts] == [
        "Step 3: the router of layer 3 has sent 99% of the choices to 2 experts for 3 steps (now "
        "99.8%): it has collapsed"
    ]


def test_a_high_load_is_reported_above_the_bound_only():
    """The busiest expert has 30 of a mean of 10."""
    assert warnings(*[[HEALTHY, LOADED]] * 4, max_load=3.0) == {}
    assert list(warnings(*[[HEALTHY, LOADED]] * 4)) == []
    ((step, (text,)),) = warnings(*[[HEALTHY, LOADED]] * 4, max_load=2.9).items()
    assert step == 3
    assert "layer 5 has had more than 2.9 times the mean load for 3 steps (now 3.00;" in text


def test_a_layer_whose_experts_are_all_chosen_cannot_collapse():
    health = RouterHealth([0], num_experts=2, topk=2, steps=1, max_load=None)
    assert health.after(1, np.array([[8, 8]])) == []
