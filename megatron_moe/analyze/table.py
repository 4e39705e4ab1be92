"""An analysis as text for a terminal or a log: columns, at any width."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.text import Text

from megatron_moe.analyze.load import between_others
from megatron_moe.analyze.record import Analysis

BY_LAYER = (
    "layer", "max/mean", "entropy", "dead", "dropped", "confidence", "domains apart",
    "halves apart", "experts alike", "like dense",
)  # fmt: skip


def analysis_report(found: Analysis) -> Text:
    """Layer by layer, then domain by domain, what the routers did."""
    head = (
        f"{found.checkpoint}: step {found.step}, {len(found.layers)} MoE layers of "
        f"{found.num_experts} experts, top {found.topk}; {sum(found.tokens.values()):,} tokens"
    )
    parts = [head, _aligned([BY_LAYER, *_layers(found)]), _aligned(_domains(found))]
    if len(found.domains) > 1:
        parts.append(_aligned(_distances(found)))
    return Text("\n\n".join(parts))


def _layers(found: Analysis) -> list[tuple[str, ...]]:
    """Means over domains; dead are experts that no domain's tokens chose."""
    counts_ZLE = np.array(list(found.counts.values()))
    choices = found.topk * sum(found.tokens.values())
    apart_L = between_others(np.array(found.distances.layers))
    alike_LEE = np.array(found.similarity.between_experts)
    alike_L = between_others(alike_LEE * (1 - np.eye(found.num_experts)))
    to_dense = found.similarity.to_dense
    rows = []
    for row, layer in enumerate(found.layers):
        dropped = sum(values[row] for values in found.dropped.values())
        rows.append(
            (
                str(layer),
                f"{_mean(found.max_over_mean, row):.3f}",
                f"{_mean(found.entropy, row):.3f}",
                str(int((counts_ZLE[:, row].sum(axis=0) == 0).sum())),
                f"{dropped / max(choices, 1):.2%}",
                f"{_mean(found.confidence, row):.3f}",
                f"{apart_L[row]:.4f}",
                f"{_mean(found.distances.within, row):.4f}",
                f"{alike_L[row]:.4f}",
                f"{np.mean(to_dense[row]):.4f}" if to_dense else "-",
            )
        )
    return rows


def _mean(by_domain: dict[str, list[float]], row: int) -> float:
    return float(np.mean([values[row] for values in by_domain.values()]))


def _domains(found: Analysis) -> list[tuple[str, ...]]:
    rows = [("domain", "tokens", "loss", "max/mean", "entropy", "dead", "busiest expert's tokens")]
    for name in found.domains:
        counts_LE = np.array(found.counts[name])
        row, expert = np.unravel_index(counts_LE.argmax(), counts_LE.shape)
        share = counts_LE[row, expert] / max(found.tokens[name], 1)
        rows.append(
            (
                name,
                f"{found.tokens[name]:,}",
                f"{found.loss[name]:.4f}",
                f"{np.mean(found.max_over_mean[name]):.3f}",
                f"{np.mean(found.entropy[name]):.3f}",
                str(sum(found.dead[name])),
                f"{share:.0%}, layer {found.layers[row]} expert {expert}",
            )
        )
    return rows


def _distances(found: Analysis) -> list[tuple[str, ...]]:
    """From every text to the domains of the run; a set has a row and no column."""
    columns = [n for n in found.domains if n not in found.evaluation_sets] or found.domains
    rows = [("L2 distance", *columns)]
    for name, row in zip(found.domains, found.distances.mean, strict=True):
        values = dict(zip(found.domains, row, strict=True))
        rows.append((name, *(f"{values[column]:.4f}" for column in columns)))
    return rows


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """The first column to the left, the others to the right.

    >>> print(_aligned([("a", "long"), ("name", "1")]))
    a     long
    name     1
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
