"""Tests of the training loop: number of steps, and when and in which order hooks run."""

from types import SimpleNamespace

import pytest

from megatron_moe.train.loop import Hook, run_loop


def run(
    *,
    done: int = 0,
    steps: int,
    hooks: dict[str, int],
    stop_after: int | None = None,
    goes_back: dict[int, int] | None = None,
) -> list[tuple[str, int]]:
    """Run the loop and return all events as (name, step)."""
    back = dict(goes_back or {})
    state, seen = SimpleNamespace(step=done), []

    def take_step() -> str:
        state.step += 1
        seen.append(("step", state.step))
        return f"result {state.step}"

    def describe(result: str, seconds: float) -> dict:
        assert result == f"result {state.step}"
        assert seconds >= 0
        return {"step": state.step}

    def keeps(result: str) -> bool:
        assert result == f"result {state.step}"
        goal = back.pop(state.step, None)
        state.step = state.step if goal is None else goal
        return goal is None

    run_loop(
        state,
        steps=steps,
        take_step=take_step,
        wait=lambda: None,
        describe=describe,
        hooks=[
            Hook(
                interval,
                lambda numbers, name=name: seen.append((name, numbers["step"])),
                when_stopped=name != "validate",
            )
            for name, interval in hooks.items()
        ],
        keeps=keeps,
        stopping=lambda: state.step == stop_after,
    )
    return seen


def test_hooks_run_in_their_order_after_each_step():
    assert run(steps=2, hooks={"show": 1, "validate": 1, "save": 1}) == [
        ("step", 1), ("show", 1), ("validate", 1), ("save", 1),
        ("step", 2), ("show", 2), ("validate", 2), ("save", 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("done", "steps", "interval", "at"),
    [
        (0, 6, 2, [2, 4, 6]),
        (0, 7, 3, [3, 6, 7]),
        (0, 2, 10, [2]),
        (4, 9, 3, [6, 9]),
        (5, 7, 5, [7]),
    ],
    ids=["divides", "and-the-last", "only-the-last", "resumed", "resumed-at-a-multiple"],
)
def test_a_hook_runs_at_its_interval_and_after_the_last_step(done, steps, interval, at):
    seen = run(done=done, steps=steps, hooks={"save": interval})
    assert [step for name, step in seen if name == "save"] == at
    assert [step for name, step in seen if name == "step"] == list(range(done + 1, steps + 1))


@pytest.mark.parametrize("done", [3, 4], ids=["done", "past-the-end"])
def test_a_finished_run_takes_no_step_and_calls_no_hook(done: int):
    assert run(done=done, steps=3, hooks={"save": 1}) == []


def test_a_hook_adds_to_the_numbers_that_later_hooks_see():
    state, written = SimpleNamespace(step=0), []

    def take_step() -> None:
        state.step += 1

    run_loop(
        state,
        steps=3,
        take_step=take_step,
        wait=lambda: None,
        describe=lambda result, seconds: {"step": state.step},
        hooks=[
            Hook(2, lambda numbers: numbers.update({"loss/validation": 1.5})),
            Hook(1, lambda numbers: written.append(dict(numbers))),
        ],
        keeps=lambda result: True,
        stopping=lambda: False,
    )
    assert written == [
        {"step": 1},
        {"step": 2, "loss/validation": 1.5},
        {"step": 3, "loss/validation": 1.5},
    ]


def test_the_seconds_are_those_of_the_step_alone(monkeypatch: pytest.MonkeyPatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    state, measured = SimpleNamespace(step=0), []

    def take(seconds: float) -> None:
        clock.now += seconds

    def take_step() -> None:
        state.step += 1
        take(2.5)

    def describe(result: None, seconds: float) -> dict:
        measured.append(seconds)
        take(1.0)
        return {}

    # The host finishes after 2.5 s, the device 0.5 s later.
    run_loop(state, steps=3, take_step=take_step, wait=lambda: take(0.5), describe=describe,
             hooks=[Hook(1, lambda numbers: take(7.0))],
             keeps=lambda result: True, stopping=lambda: False)  # fmt: skip
    assert measured == [3.0, 3.0, 3.0]


def test_a_run_that_is_stopped_saves_and_does_not_validate():
    assert run(steps=9, hooks={"show": 1, "validate": 5, "save": 5}, stop_after=2) == [
        ("step", 1), ("show", 1), ("step", 2), ("show", 2), ("save", 2),
    ]  # fmt: skip


def test_a_step_that_is_not_kept_is_taken_again_from_where_it_went_back_to():
    assert run(steps=3, hooks={"show": 1}, goes_back={3: 1}) == [
        ("step", 1), ("show", 1), ("step", 2), ("show", 2), ("step", 3),
        ("step", 2), ("show", 2), ("step", 3), ("show", 3),
    ]  # fmt: skip
