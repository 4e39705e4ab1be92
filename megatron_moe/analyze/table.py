"""Format an analysis as text tables for a terminal or a log, whatever their width."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.text import Text

from megatron_moe.analyze.load import between_others
from megatron_moe.analyze.record import Analysis

BY_LAYER = (
    "layer", "max/mean", "entropy", "dead", "drops", "conf.", "domains", "halves", "experts",
    "source",
)  # fmt: skip
"""Columns by layer, short enough for 80 characters; docs/evaluation.md explains them."""

BY_DOMAIN = (
    "domain", "tokens", "loss", "max/mean", "entropy", "dead", "busiest expert's tokens",
)  # fmt: skip
"""Columns by domain, means over layers; also explained there."""


def analysis_report(analysis: Analysis) -> Text:
    """Format routing statistics by layer, then by domain."""
    head = (
        f"{analysis.checkpoint}: step {analysis.step}, {len(analysis.layers)} MoE layers of "
        f"{analysis.num_experts} experts, top {analysis.topk}; "
        f"{sum(analysis.tokens.values()):,} tokens"
    )
    parts = [head, _aligned(_by_layer(analysis)), _aligned(_domains(analysis))]
    if len(analysis.domains) > 1:
        parts.append(_aligned(_distances(analysis)))
    return Text("\n\n".join(parts))


def _by_layer(analysis: Analysis) -> list[tuple[str, ...]]:
    """Return the table by layer; one domain alone has no distance to others."""
    rows = [BY_LAYER, *_layers(analysis)]
    if len(analysis.domains) > 1:
        return rows
    between = BY_LAYER.index("domains")
    return [(*row[:between], *row[between + 1 :]) for row in rows]


def _layers(analysis: Analysis) -> list[tuple[str, ...]]:
    """Return rows by layer with means over domains; dead experts are unused by all domains."""
    counts_ZLE = np.array(list(analysis.counts.values()))
    choices = analysis.topk * sum(analysis.tokens.values())
    distance_L = between_others(np.array(analysis.distances.layers))
    similarity_LEE = np.array(analysis.similarity.between_experts)
    similarity_L = between_others(similarity_LEE * (1 - np.eye(analysis.num_experts)))
    to_dense = analysis.similarity.to_dense
    rows = []
    for row, layer in enumerate(analysis.layers):
        dropped = sum(values[row] for values in analysis.dropped.values())
        rows.append(
            (
                str(layer),
                f"{_mean(analysis.max_over_mean, row):.3f}",
                f"{_mean(analysis.entropy, row):.3f}",
                str(int((counts_ZLE[:, row].sum(axis=0) == 0).sum())),
                f"{dropped / max(choices, 1):.2%}",
                f"{_mean(analysis.confidence, row):.3f}",
                f"{distance_L[row]:.4f}",
                f"{_mean(analysis.distances.within, row):.4f}",
                f"{similarity_L[row]:.4f}",
                f"{np.mean(to_dense[row]):.4f}" if to_dense else "-",
            )
        )
    return rows


def _mean(by_domain: dict[str, list[float]], row: int) -> float:
    return float(np.mean([values[row] for values in by_domain.values()]))


def _domains(analysis: Analysis) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [BY_DOMAIN]
    for name in analysis.domains:
        counts_LE = np.array(analysis.counts[name])
        row, expert = np.unravel_index(counts_LE.argmax(), counts_LE.shape)
        share = counts_LE[row, expert] / max(analysis.tokens[name], 1)
        rows.append(
            (
                name,
                f"{analysis.tokens[name]:,}",
                f"{analysis.loss[name]:.4f}",
                f"{np.mean(analysis.max_over_mean[name]):.3f}",
                f"{np.mean(analysis.entropy[name]):.3f}",
                str(sum(analysis.dead[name])),
                f"{share:.0%}, layer {analysis.layers[row]} expert {expert}",
            )
        )
    return rows


def _distances(analysis: Analysis) -> list[tuple[str, ...]]:
    """Return distances from each text to the run's domains; evaluation sets have no column."""
    columns = [n for n in analysis.domains if n not in analysis.evaluation_sets] or analysis.domains
    rows = [("L2 distance", *columns)]
    for name, row in zip(analysis.domains, analysis.distances.mean, strict=True):
        values = dict(zip(analysis.domains, row, strict=True))
        rows.append((name, *(f"{values[column]:.4f}" for column in columns)))
    return rows


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Align the first column to the left and the others to the right.

    >>> print(_aligned([("a", "long"), ("name", "1")]))
    a     long
    name     1
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
