"""The section about which experts work for which domain, from `megatron-moe analyze`.

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

MOST_DOMAINS = 12
"""That get a picture of their own."""


def specialisation(run: RunFiles) -> Section:
    """Domains by experts, their distances, and experts beside each other."""
    title = "What experts specialise in"
    if not run.analyses:
        body = missing(
            "Nobody has looked at the routing by domain yet.",
            command("megatron-moe", "analyze", str(run.path)), " brings it.",
        )  # fmt: skip
        return Section("specialisation", title, body)
    now = run.analyses[-1]
    told = el("p", f"Of the checkpoint of step {now.step:,}: {_tokens(now)}.")
    parts = [
        told,
        *_domain_experts(now),
        figures(_distance_by_layer(run.analyses), _mean_distance(now), *_per_domain(run, now)),
        figures(*_coactivation(now), *_similarity(run.analyses)),
    ]
    return Section("specialisation", title, join(parts))


def _tokens(now: Analysis) -> str:
    each = [f"{now.tokens[name]:,} tokens of {name}" for name in now.domains]
    return ", ".join(each[:8]) + (f" and {len(each) - 8} more domains" if len(each) > 8 else "")


def _picked(count: int) -> list[int]:
    """The first, the middle and the last."""
    return sorted({0, count // 2, count - 1})


def share_of_mean(counts_E: Array) -> Array:
    """Choices of each expert over the mean; 1 is even.

    >>> share_of_mean(np.array([3.0, 1.0]))
    array([1.5, 0.5])
    """
    return counts_E * (counts_E.shape[-1] / np.maximum(counts_E.sum(axis=-1, keepdims=True), 1))


def _domain_experts(now: Analysis) -> list[Html]:
    """Three layers with all domains, and all layers of each domain."""
    counts_NLE = np.array([now.counts[name] for name in now.domains], dtype=np.float64)
    loads_NLE = share_of_mean(counts_NLE)
    layers = [_one_layer(now, loads_NLE[:, i], now.layers[i]) for i in _picked(len(now.layers))]
    shown = list(zip(now.domains, loads_NLE, strict=True))[:MOST_DOMAINS]
    domains = figures(*(_one_domain(now, name, loads_LE) for name, loads_LE in shown))
    return [figures(*layers), folded("All layers, domain by domain", domains)]


def _one_layer(now: Analysis, loads_NE: Array, layer: int) -> Html:
    title = f"Domains and experts, layer {layer}"
    busiest = "; ".join(
        f"{name}: expert {int(load_E.argmax())} at {number(float(load_E.max()))}"
        for name, load_E in list(zip(now.domains, loads_NE, strict=True))[:8]
    )
    picture = heat_picture(
        loads_NE,
        rows=Rows("domain", now.domains, all=len(now.domains) <= 24),
        columns=_expert_axis(now),
        scale=Scale.around_one(loads_NE, "choices of the expert / mean of the domain; 1 is even"),
        alt=f"{title}. Busiest expert of each domain, times the mean: {busiest}.",
    )
    rows = [[str(e), *map(number, map(float, load_N))] for e, load_N in enumerate(loads_NE.T)]
    head = ["expert", *(el("bdi", name) for name in now.domains)]
    return figure(title, picture, table(head, rows, caption=f"{title}: choices / mean"))


def _one_domain(now: Analysis, name: str, loads_LE: Array) -> Html:
    title = join(["Layers and experts, ", el("bdi", name)])
    picture = heat_picture(
        loads_LE,
        rows=Rows("layer", [str(layer) for layer in now.layers]),
        columns=_expert_axis(now),
        scale=Scale.around_one(loads_LE, "choices of the expert / mean; 1 is even"),
        alt=f"Layers and experts, {name}: busiest expert {span_of(loads_LE.max(axis=1))} times "
        "the mean, from the first layer to the last.",
    )
    rows = [
        [str(layer), str(int(load_E.argmax())), number(float(load_E.max()))]
        for layer, load_E in zip(now.layers, loads_LE, strict=True)
    ]
    head = ["layer", "busiest expert", "choices / mean"]
    return figure(title, picture, table(head, rows, caption=f"Busiest experts, {name}"))


def _expert_axis(now: Analysis) -> Rows:
    return Rows("expert", [str(expert) for expert in range(now.num_experts)])


def mean_distances(now: Analysis) -> Array:
    """Mean over pairs of different domains of their distance, by layer."""
    distances_LNN = np.array(now.distances.layers)
    pairs = np.triu_indices(distances_LNN.shape[1], k=1)
    return distances_LNN[:, *pairs].mean(axis=1)


def _distance_by_layer(analyses: list[Analysis]) -> Html | None:
    """Whether deeper layers specialise more; one line for each checkpoint that was looked at."""
    shown = [analyses[i] for i in _picked(len(analyses))]
    if len(shown[-1].domains) < 2:
        return None
    lines = [
        Line(f"step {one.step:,}", np.array(one.layers), mean_distances(one), dots=True)
        for one in shown
    ]
    within_L = np.mean([*shown[-1].distances.within.values()], axis=0)
    lines.append(Line("two halves of one domain", np.array(shown[-1].layers), within_L))
    title = "Distance between domains by layer"
    picture = line_picture(
        lines, alt=alt_of(title, lines), y="L2 of shares, mean of pairs", x="layer", from_zero=True
    )
    note = "How differently two domains choose experts: 0 is alike."
    return figure(title, picture, steps_table(lines, title, axis="layer"), note=note)


def _mean_distance(now: Analysis) -> Html | None:
    if len(now.domains) < 2:
        return None
    values_NN = np.array(now.distances.mean)
    title = "Distance between domains, mean of layers"
    numbered = [f"{i + 1} {name}" for i, name in enumerate(now.domains)]
    names = Rows("", numbered, all=len(now.domains) <= 24)
    pairs = values_NN[np.triu_indices(len(values_NN), k=1)]
    picture = heat_picture(
        values_NN,
        rows=names,
        columns=Rows("", [str(i + 1) for i in range(len(now.domains))], all=len(now.domains) <= 24),
        scale=Scale.of(values_NN, "L2 of shares; 0 is alike", low=0.0),
        alt=f"{title}: between {number(float(pairs.min()))} and {number(float(pairs.max()))}.",
        height=min(360, 110 + 22 * len(values_NN)),
    )
    rows = [
        [el("bdi", name), *map(number, map(float, row_N))]
        for name, row_N in zip(now.domains, values_NN, strict=True)
    ]
    head = ["domain", *(el("bdi", name) for name in now.domains)]
    note = "Columns carry the numbers of the rows."
    return figure(title, picture, table(head, rows, caption=title), note=note)


def _per_domain(run: RunFiles, now: Analysis) -> list[Html]:
    """Numbers of each domain by layer."""
    told = [
        ("Entropy of the choices", now.entropy, "nats"),
        ("Router confidence", now.confidence, "mean of the best expert's score"),
        ("Busiest expert", now.max_over_mean, "tokens / mean"),
        ("Dead experts", now.dead, "experts without a token"),
        ("Choices dropped", now.dropped, "by capacity"),
    ]
    return [
        _by_domain(run, now, title, values, label)
        for title, values, label in told
        if title not in ("Dead experts", "Choices dropped") or any(map(any, values.values()))
    ]


def _by_domain(run: RunFiles, now: Analysis, title: str, values: dict, label: str) -> Html:
    title = f"{title} by layer"
    lines = [
        Line(
            name,
            np.array(now.layers),
            np.array(values[name], dtype=np.float64),
            colour=run.domain_colours[name],
        )
        for name in now.domains
    ]
    picture = line_picture(lines, alt=alt_of(title, lines), y=label, x="layer")
    return figure(title, picture, steps_table(lines, title, axis="layer"))


def _coactivation(now: Analysis) -> list[Html]:
    """How often two experts were chosen together, over how often by chance."""
    if now.topk < 2:
        return []
    each = np.array(now.coactivation, dtype=np.float64)
    return [_together(now, each[i], now.layers[i]) for i in _picked(len(now.layers))]


def _together(now: Analysis, pairs_EE: Array, layer: int) -> Html:
    pairs_EE = pairs_EE.copy()
    np.fill_diagonal(pairs_EE, np.nan)  # an expert with itself says only how busy it is
    title = f"Experts chosen together, layer {layer}"
    first, second = np.unravel_index(int(np.nanargmax(pairs_EE)), pairs_EE.shape)
    axis = _expert_axis(now)
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
    """Cosines of experts' weights, by layer and over the checkpoints that were looked at."""
    shown = [analyses[i] for i in _picked(len(analyses))]
    between = [(one, _between(one)) for one in shown]
    to_dense = [(one, d) for one in shown if (d := _to_dense(one)) is not None]
    return [
        _cosines(title, told)
        for title, told in [
            ("Likeness of experts to each other", between),
            ("Likeness of experts to the dense layer", to_dense),
        ]
        if told
    ]


def _between(one: Analysis) -> Array:
    cosines_LEE = np.array(one.similarity.between_experts)
    pairs = np.triu_indices(cosines_LEE.shape[1], k=1)
    return cosines_LEE[:, *pairs].mean(axis=1)


def _to_dense(one: Analysis) -> Array | None:
    told = one.similarity.to_dense
    return None if told is None else np.array(told).mean(axis=1)


def _cosines(title: str, told: list[tuple[Analysis, Array]]) -> Html:
    lines = [
        Line(f"step {one.step:,}", np.array(one.layers), values_L, dots=True)
        for one, values_L in told
    ]
    picture = line_picture(
        lines, alt=alt_of(title, lines), y="cosine of weights, mean of experts", x="layer"
    )
    return figure(title, picture, steps_table(lines, title, axis="layer"))
