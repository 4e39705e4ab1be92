"""The section with the table of `megatron-moe evaluate`."""

from __future__ import annotations

import numpy as np

from megatron_moe.report.html import Child, Html, command, el, join, missing, number, table
from megatron_moe.report.parts import Section, alt_of, figure, figures, steps_table
from megatron_moe.report.picture import Line, line_picture
from megatron_moe.report.read import RunFiles
from megatron_moe.report.records import Evaluation, Judged, TaskScores


def judgement(run: RunFiles) -> Section:
    """Held-out text: the dense model, the MoE as it began, and as it is; and scores of tasks."""
    title = "Evaluation"
    wanted = str(run.path)
    parts: list[Child] = []
    if run.evaluations:
        now = run.evaluations[-1]
        parts += [_table(now), [el("p", remark) for remark in now.remarks], _over_steps(run)]
    else:
        how = command("megatron-moe", "evaluate", wanted), " brings it."
        parts.append(missing("No checkpoint has been evaluated on held-out text yet.", *how))
    if run.tasks:
        parts.append(_tasks(run.tasks))
    else:
        how = command("megatron-moe", "evaluate", wanted, "--tasks", "llama-moe"), " brings them."
        parts.append(missing("No scores of tasks yet.", *how))
    return Section("evaluation", title, join(parts))


def _tasks(tasks: list[TaskScores]) -> Html:
    rows = [
        [
            el("bdi", score.task),
            "as the task says" if score.examples is None else str(score.examples),
            el("bdi", score.metric),
            "-" if record.step is None else f"{record.step:,}",
            _value(score.value),
            _value(score.stderr),
        ]
        for record in tasks
        for score in record.scores
    ]
    head = ["task", "examples", "metric", "step", "value", "standard error"]
    return table(head, rows, caption="Scores of lm-evaluation-harness")


def _value(value: float | str | None) -> str:
    return value if isinstance(value, str) else number(value)


def _table(now: Evaluation) -> Html:
    models = [
        (name, judged)
        for name, judged in (
            ("dense", now.dense),
            ("MoE, step 0", now.step_0),
            (f"MoE, step {now.step:,}", now.domains),
        )
        if judged is not None
    ]
    head: list[Child] = ["domain", "tokens"]
    for what in ("loss", "perplexity", "bits per byte"):
        head += [f"{what}: {name}" for name, _ in models]
    rows = [
        [
            el("bdi", domain),
            number(judged.tokens),
            *(
                _cell(of.get(domain), what)
                for what in ("loss", "perplexity", "bits_per_byte")
                for _, of in models
            ),
        ]
        for domain, judged in now.domains.items()
    ]
    caption = f"Held-out text at step {now.step:,}; loss in nats per token"
    return table(head, rows, caption=caption)


def _cell(judged: Judged | None, what: str) -> str:
    return number(None if judged is None else getattr(judged, what))


def _over_steps(run: RunFiles) -> Html | None:
    evaluations = run.evaluations
    if len(evaluations) < 2:
        return None
    domains = list(evaluations[-1].domains)
    steps = np.array([one.step for one in evaluations])
    lines = [
        Line(
            name,
            steps,
            np.array([_loss(one.domains.get(name)) for one in evaluations]),
            dots=True,
            colour=run.domain_colours[name],
        )
        for name in domains
    ]
    title = "Evaluated loss by domain"
    picture = line_picture(lines, alt=alt_of(title, lines), y="nats per token")
    return figures(figure(title, picture, steps_table(lines, title)))


def _loss(judged: Judged | None) -> float:
    return float("nan") if judged is None else judged.loss
