"""Samples of several domains in given shares, and how far each domain has been consumed.

The state is a handful of numbers per domain. Every rank carries it through every sample of the
global batch and then takes its own, so the blend does not know the layout, and a checkpoint that
holds the state goes on under another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_moe.config.mixtures import check_weights
from megatron_moe.data.order import permuted
from megatron_moe.data.samples import Sample, SampleSource
from megatron_moe.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendState:
    """Where a blend is; tuples follow ``domains``. Goes into the checkpoint as it is."""

    domains: tuple[str, ...]

    weights: tuple[float, ...]
    """Shares of the samples to come; sum 1."""

    consumed: tuple[int, ...]
    """Samples drawn from each domain so far."""

    owed: tuple[float, ...]
    """Samples that each domain is behind its share so far; sum 0."""

    @property
    def position(self) -> int:
        """Samples drawn in all."""
        return sum(self.consumed)

    @property
    def by_domain(self) -> dict[str, float]:
        """Weights by the names of their domains."""
        return dict(zip(self.domains, self.weights, strict=True))

    def reweighted(self, weights: Sequence[float]) -> BlendState:
        """The same place with other shares from here on."""
        return replace(self, weights=tuple(weights))

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, domains: Sequence[str]) -> BlendState:
        """The state that `to_json` wrote, for a run over ``domains``.

        Raises:
            CheckpointError: The checkpoint is of other domains.
        """
        if tuple(values["domains"]) != tuple(domains):
            raise CheckpointError(
                f"the checkpoint mixes the domains {', '.join(values['domains'])}, the "
                f"configuration {', '.join(domains)}: its place in the data is lost.\n"
                "  name the same domains in the same order"
            )
        return cls(**{name: tuple(value) for name, value in values.items()})


def start_blend(weights: Mapping[str, float]) -> BlendState:
    """The state before the first sample. See `check_weights` for what it refuses."""
    shares = check_weights(weights)
    return BlendState(
        domains=tuple(shares),
        weights=tuple(shares.values()),
        consumed=(0,) * len(shares),
        owed=(0.0,) * len(shares),
    )


def draw(state: BlendState, count: int) -> tuple[list[int], BlendState]:
    """The domains (as indices) of the next ``count`` samples, and the state after them.

    Each sample goes to the domain that is furthest behind its share. No domain then ever is a
    whole sample ahead of its share, where random draws would stray by the square root of their
    number; and with constant weights, n draws now and m later are n + m draws at once.
    """
    owed, consumed, drawn = list(state.owed), list(state.consumed), []
    for _ in range(count):
        for domain, weight in enumerate(state.weights):
            owed[domain] += weight
        chosen = max(range(len(owed)), key=owed.__getitem__)
        owed[chosen] -= 1.0
        consumed[chosen] += 1
        drawn.append(chosen)
    return drawn, replace(state, owed=tuple(owed), consumed=tuple(consumed))


class BlendedBatch:
    """The samples of one global batch, numbered on from the position it starts at.

    The draws come in a rhythm. Dealt to ranks in turn, it could give a domain to the same rank at
    every step, whose router would then balance its experts for that domain alone; so they are
    shuffled within the batch.
    """

    def __init__(self, picks: list[tuple[SampleSource, int]], *, position: int, seed: int) -> None:
        self._picks = picks
        self._position = position
        self._seed = seed

    def __getitem__(self, k: int) -> Sample:
        """Sample ``k`` of the run; it must lie in this batch."""
        place = permuted(
            k - self._position, len(self._picks), seed=self._seed, epoch=self._position
        )
        source, local = self._picks[place]
        return source[local]


def next_global_batch(
    sources: Mapping[str, SampleSource], state: BlendState, *, global_batch_size: int, seed: int
) -> tuple[BlendedBatch, BlendState]:
    """The next global batch of a blend, for `micro_batches`, and the state after it.

    Args:
        sources: Samples of each domain; each domain goes through its own in their order.
        state: Where the blend is; the batch starts at ``state.position``.
        global_batch_size: Samples of the step over all ranks.
        seed: Seed of the arrangement within the batch.
    """
    drawn, after = draw(state, global_batch_size)
    local = list(state.consumed)
    picks = []
    for domain in drawn:
        picks.append((sources[state.domains[domain]], local[domain]))
        local[domain] += 1
    return BlendedBatch(picks, position=state.position, seed=seed), after


def epochs_of_domains(
    weights: Mapping[str, float], chunks: Mapping[str, int], *, num_samples: int
) -> dict[str, float]:
    """How often a run of ``num_samples`` reads each domain, at constant weights."""
    return {name: weight * num_samples / chunks[name] for name, weight in weights.items()}


def repetition_warnings(epochs: Mapping[str, float], *, limit: float) -> list[str]:
    """A line for each domain that is read more than ``limit`` times, to say before the run."""
    return [
        f"domain {name} will be read {count:.1f} times, more than {limit:g}: it has too little "
        "text for its weight"
        for name, count in epochs.items()
        if count > limit
    ]
