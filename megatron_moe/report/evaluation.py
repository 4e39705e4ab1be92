"""Build the section with the results of `megatron-moe evaluate`."""

from __future__ import annotations

import numpy as np

from megatron_moe.report.html import Child, Html, command, el, join, missing, number, table
from megatron_moe.report.parts import Section, alt_of, figure, figures, steps_table
from megatron_moe.report.picture import Line, line_picture
from megatron_moe.report.read import RunFiles
from megatron_moe.report.records import DomainScore, Evaluation, TaskScores


def evaluation(run: RunFiles) -> Section:
    """Return the section with held-out scores of the source model and the run, and task scores."""
    title = "Evaluation"
    path = str(run.path)
    parts: list[Child] = []
    if run.evaluations:
        latest = run.evaluations[-1]
        remarks = [el("p", remark) for remark in latest.remarks]
        parts += [_table(latest), remarks, _over_steps(run)]
    else:
        how = command("megatron-moe", "evaluate", path), " evaluates one."
        parts.append(missing("No checkpoint has been evaluated on held-out text yet.", *how))
    if run.tasks:
        parts.append(_tasks(run.tasks))
    else:
        how = command("megatron-moe", "evaluate", path, "--tasks", "llama-moe"), " runs tasks."
        parts.append(missing("There are no task scores yet.", *how))
    return Section("evaluation", title, join(parts))


def _tasks(tasks: list[TaskScores]) -> Html:
    rows = [
        [
            el("bdi", score.task),
            "task's default" if score.examples is None else str(score.examples),
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


def _table(latest: Evaluation) -> Html:
    models = [
        (name, scores)
        for name, scores in (
            ("source", latest.dense),
            ("MoE, step 0", latest.step_0),
            (f"MoE, step {latest.step:,}", latest.domains),
        )
        if scores is not None
    ]
    head: list[Child] = ["domain", "tokens"]
    for metric in ("loss", "perplexity", "bits per byte"):
        head += [f"{metric}: {name}" for name, _ in models]
    rows = [
        [
            el("bdi", domain),
            number(score.tokens),
            *(
                _cell(scores.get(domain), metric)
                for metric in ("loss", "perplexity", "bits_per_byte")
                for _, scores in models
            ),
        ]
        for domain, score in latest.domains.items()
    ]
    caption = f"Held-out text at step {latest.step:,}; loss in nats per token"
    return table(head, rows, caption=caption)


def _cell(score: DomainScore | None, metric: str) -> str:
    return number(None if score is None else getattr(score, metric))


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
            color=run.domain_colors[name],
        )
        for name in domains
    ]
    title = "Evaluated loss by domain"
    picture = line_picture(lines, alt=alt_of(title, lines), y="nats per token")
    return figures(figure(title, picture, steps_table(lines, title)))


def _loss(score: DomainScore | None) -> float:
    return float("nan") if score is None else score.loss
