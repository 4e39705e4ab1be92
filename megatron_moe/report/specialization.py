"""Build the section about expert specialization by domain, from `megatron-moe analyze`.

Shape letters of this module:

    L  MoE layers   E  experts   N  domains
"""

from __future__ import annotations

import numpy as np

from megatron_moe.analyze.record import Analysis
from megatron_moe.report.history import Array
from megatron_moe.report.html import Html, command, el, folded, join, missing, number, table
from megatron_moe.report.parts import Section, alt_of, figure, figures, span_of, steps_table
from megatron_moe.report.picture import Line, Rows, Scale, heat_picture, line_picture
from megatron_moe.report.read import RunFiles

MAX_DOMAINS = 12
"""Maximum number of domains with a picture of their own."""


def specialization(run: RunFiles) -> Section:
    """Return the section with loads by domain, distances of domains and similarity of experts."""
    title = "Expert specialization"
    if not run.analyses:
        body = missing(
            "Routing by domain has not been analyzed yet.",
            command("megatron-moe", "analyze", str(run.path)), " analyzes it.",
        )  # fmt: skip
        return Section("specialization", title, body)
    latest = run.analyses[-1]
    intro = el("p", f"Checkpoint of step {latest.step:,}: {_tokens(latest)}.")
    parts = [
        intro,
        *_domain_experts(latest),
        figures(
            _distance_by_layer(run.analyses), _mean_distance(latest), *_per_domain(run, latest)
        ),
        figures(*_coactivation(latest), *_similarity(run.analyses)),
    ]
    return Section("specialization", title, join(parts))


def _tokens(latest: Analysis) -> str:
    each = [f"{latest.tokens[name]:,} tokens of {name}" for name in latest.domains]
    return ", ".join(each[:8]) + (f" and {len(each) - 8} more domains" if len(each) > 8 else "")


def _picked(count: int) -> list[int]:
    """Return the first, the middle and the last index."""
    return sorted({0, count // 2, count - 1})


def share_of_mean(counts_E: Array) -> Array:
    """Return the choices of each expert relative to the mean; 1 is balanced.

    >>> share_of_mean(np.array([3.0, 1.0]))
    array([1.5, 0.5])
    """
    return counts_E * (counts_E.shape[-1] / np.maximum(counts_E.sum(axis=-1, keepdims=True), 1))


def _domain_experts(latest: Analysis) -> list[Html]:
    """Return pictures of all domains in three layers, and of all layers for each domain."""
    counts_NLE = np.array([latest.counts[name] for name in latest.domains], dtype=np.float64)
    loads_NLE = share_of_mean(counts_NLE)
    layers = [
        _one_layer(latest, loads_NLE[:, i], latest.layers[i]) for i in _picked(len(latest.layers))
    ]
    shown = list(zip(latest.domains, loads_NLE, strict=True))[:MAX_DOMAINS]
    domains = figures(*(_one_domain(latest, name, loads_LE) for name, loads_LE in shown))
    return [figures(*layers), folded("All layers, domain by domain", domains)]


def _one_layer(latest: Analysis, loads_NE: Array, layer: int) -> Html:
    title = f"Domains and experts, layer {layer}"
    busiest = "; ".join(
        f"{name}: expert {int(load_E.argmax())} at {number(float(load_E.max()))}"
        for name, load_E in list(zip(latest.domains, loads_NE, strict=True))[:8]
    )
    picture = heat_picture(
        loads_NE,
        rows=Rows("domain", latest.domains, all=len(latest.domains) <= 24),
        columns=_expert_axis(latest),
        scale=Scale.around_one(
            loads_NE, "choices of the expert / mean of the domain; 1 is balanced"
        ),
        alt=f"{title}. Busiest expert of each domain, times the mean: {busiest}.",
    )
    rows = [[str(e), *map(number, map(float, load_N))] for e, load_N in enumerate(loads_NE.T)]
    head = ["expert", *(el("bdi", name) for name in latest.domains)]
    return figure(title, picture, table(head, rows, caption=f"{title}: choices / mean"))


def _one_domain(latest: Analysis, name: str, loads_LE: Array) -> Html:
    title = join(["Layers and experts, ", el("bdi", name)])
    picture = heat_picture(
        loads_LE,
        rows=Rows("layer", [str(layer) for layer in latest.layers]),
        columns=_expert_axis(latest),
        scale=Scale.around_one(loads_LE, "choices of the expert / mean; 1 is balanced"),
        alt=f"Layers and experts, {name}: busiest expert {span_of(loads_LE.max(axis=1))} times "
        "the mean, from the first layer to the last.",
    )
    rows = [
        [str(layer), str(int(load_E.argmax())), number(float(load_E.max()))]
        for layer, load_E in zip(latest.layers, loads_LE, strict=True)
    ]
    head = ["layer", "busiest expert", "choices / mean"]
    return figure(title, picture, table(head, rows, caption=f"Busiest experts, {name}"))


def _expert_axis(latest: Analysis) -> Rows:
    return Rows("expert", [str(expert) for expert in range(latest.num_experts)])


def mean_distances(latest: Analysis) -> Array:
    """Return the mean distance over pairs of different domains, by layer."""
    distances_LNN = np.array(latest.distances.layers)
    pairs = np.triu_indices(distances_LNN.shape[1], k=1)
    return distances_LNN[:, *pairs].mean(axis=1)


def _distance_by_layer(analyses: list[Analysis]) -> Html | None:
    """Return a picture of the mean distance of domains by layer, one line per checkpoint."""
    shown = [analyses[i] for i in _picked(len(analyses))]
    if len(shown[-1].domains) < 2:
        return None
    lines = [
        Line(f"step {a.step:,}", np.array(a.layers), mean_distances(a), dots=True) for a in shown
    ]
    within_L = np.mean([*shown[-1].distances.within.values()], axis=0)
    lines.append(Line("two halves of one domain", np.array(shown[-1].layers), within_L))
    title = "Distance between domains by layer"
    picture = line_picture(
        lines, alt=alt_of(title, lines), y="L2 of shares, mean of pairs", x="layer", from_zero=True
    )
    note = "Difference between two domains' choices of experts; 0 means identical."
    return figure(title, picture, steps_table(lines, title, axis="layer"), note=note)


def _mean_distance(latest: Analysis) -> Html | None:
    if len(latest.domains) < 2:
        return None
    values_NN = np.array(latest.distances.mean)
    title = "Distance between domains, mean of layers"
    numbered = [f"{i + 1} {name}" for i, name in enumerate(latest.domains)]
    names = Rows("", numbered, all=len(latest.domains) <= 24)
    pairs = values_NN[np.triu_indices(len(values_NN), k=1)]
    picture = heat_picture(
        values_NN,
        rows=names,
        columns=Rows(
            "", [str(i + 1) for i in range(len(latest.domains))], all=len(latest.domains) <= 24
        ),
        scale=Scale.of(values_NN, "L2 of shares; 0 is identical", low=0.0),
        alt=f"{title}: between {number(float(pairs.min()))} and {number(float(pairs.max()))}.",
        height=min(360, 110 + 22 * len(values_NN)),
    )
    rows = [
        [el("bdi", name), *map(number, map(float, row_N))]
        for name, row_N in zip(latest.domains, values_NN, strict=True)
    ]
    head = ["domain", *(el("bdi", name) for name in latest.domains)]
    note = "Columns have the same numbers as rows."
    return figure(title, picture, table(head, rows, caption=title), note=note)


def _per_domain(run: RunFiles, latest: Analysis) -> list[Html]:
    """Return pictures of each metric by layer, one line per domain."""
    metrics = [
        ("Entropy of the choices", latest.entropy, "nats"),
        ("Router confidence", latest.confidence, "mean of the best expert's score"),
        ("Busiest expert", latest.max_over_mean, "tokens / mean"),
        ("Dead experts", latest.dead, "experts without a token"),
        ("Choices dropped", latest.dropped, "by capacity"),
    ]
    return [
        _by_domain(run, latest, title, values, label)
        for title, values, label in metrics
        if title not in ("Dead experts", "Choices dropped") or any(map(any, values.values()))
    ]


def _by_domain(run: RunFiles, latest: Analysis, title: str, values: dict, label: str) -> Html:
    title = f"{title} by layer"
    lines = [
        Line(
            name,
            np.array(latest.layers),
            np.array(values[name], dtype=np.float64),
            color=run.domain_colors[name],
        )
        for name in latest.domains
    ]
    picture = line_picture(lines, alt=alt_of(title, lines), y=label, x="layer")
    return figure(title, picture, steps_table(lines, title, axis="layer"))


def _coactivation(latest: Analysis) -> list[Html]:
    """Return pictures of how many tokens chose each pair of experts together."""
    if latest.topk < 2:
        return []
    pairs_LEE = np.array(latest.coactivation, dtype=np.float64)
    return [_together(latest, pairs_LEE[i], latest.layers[i]) for i in _picked(len(latest.layers))]


def _together(latest: Analysis, pairs_EE: Array, layer: int) -> Html:
    pairs_EE = pairs_EE.copy()
    np.fill_diagonal(pairs_EE, np.nan)  # the diagonal is only the expert's load
    title = f"Experts chosen together, layer {layer}"
    first, second = np.unravel_index(int(np.nanargmax(pairs_EE)), pairs_EE.shape)
    axis = _expert_axis(latest)
    picture = heat_picture(
        pairs_EE,
        rows=axis,
        columns=axis,
        scale=Scale.of(pairs_EE, "tokens that chose both", low=0.0),
        alt=f"{title}: most often {first} and {second}, "
        f"{number(float(pairs_EE[first, second]))} tokens.",
        height=330,
    )
    order = np.argsort(np.nan_to_num(np.triu(pairs_EE, k=1)).ravel())[::-1][:12]
    rows = [
        [f"{a} and {b}", number(float(pairs_EE[a, b]))]
        for a, b in (np.unravel_index(i, pairs_EE.shape) for i in order)
        if pairs_EE[a, b] > 0
    ]
    return figure(
        title, picture, table(["experts", "tokens"], rows, caption=f"{title}, most often")
    )


def _similarity(analyses: list[Analysis]) -> list[Html]:
    """Return pictures of the cosine similarity of experts' weights, by layer and checkpoint."""
    shown = [analyses[i] for i in _picked(len(analyses))]
    between = [(analysis, _between(analysis)) for analysis in shown]
    to_dense = [(analysis, d) for analysis in shown if (d := _to_dense(analysis)) is not None]
    return [
        _cosines(title, cosines)
        for title, cosines in [
            ("Similarity between experts", between),
            ("Similarity of experts to the source", to_dense),
        ]
        if cosines
    ]


def _between(analysis: Analysis) -> Array:
    cosines_LEE = np.array(analysis.similarity.between_experts)
    pairs = np.triu_indices(cosines_LEE.shape[1], k=1)
    return cosines_LEE[:, *pairs].mean(axis=1)


def _to_dense(analysis: Analysis) -> Array | None:
    cosines = analysis.similarity.to_dense
    return None if cosines is None else np.array(cosines).mean(axis=1)


def _cosines(title: str, cosines: list[tuple[Analysis, Array]]) -> Html:
    lines = [
        Line(f"step {analysis.step:,}", np.array(analysis.layers), values_L, dots=True)
        for analysis, values_L in cosines
    ]
    picture = line_picture(
        lines, alt=alt_of(title, lines), y="cosine of weights, mean of experts", x="layer"
    )
    return figure(title, picture, steps_table(lines, title, axis="layer"))
