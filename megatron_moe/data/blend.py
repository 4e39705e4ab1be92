"""Mix samples of several domains by weight, and track the samples consumed per domain.

The state is a few numbers per domain. Every rank updates it for all samples of the global batch
and then takes its own samples. The blend therefore does not depend on the layout, and a run can
resume from its checkpoint under another layout.
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
    """Position of a blend; tuples are in the order of ``domains``. Saved in the checkpoint."""

    domains: tuple[str, ...]

    weights: tuple[float, ...]
    """Shares of the samples to come; they sum to 1."""

    consumed: tuple[int, ...]
    """Samples drawn from each domain so far."""

    owed: tuple[float, ...]
    """Samples that each domain lags behind its share so far; they sum to 0."""

    @property
    def position(self) -> int:
        """Total number of samples drawn."""
        return sum(self.consumed)

    @property
    def by_domain(self) -> dict[str, float]:
        """Weights keyed by domain name."""
        return dict(zip(self.domains, self.weights, strict=True))

    def reweighted(self, weights: Sequence[float]) -> BlendState:
        """Return the same position with other weights for the samples to come."""
        return replace(self, weights=tuple(weights))

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, domains: Sequence[str]) -> BlendState:
        """Restore the state that `to_json` wrote, for a run over ``domains``.

        Raises:
            CheckpointError: The checkpoint has other domains.
        """
        if tuple(values["domains"]) != tuple(domains):
            raise CheckpointError(
                f"the checkpoint mixes the domains {', '.join(values['domains'])}, but the "
                f"configuration mixes {', '.join(domains)}: the position in the data cannot be "
                "restored.\n  list the same domains in the same order"
            )
        return cls(**{name: tuple(value) for name, value in values.items()})


def start_blend(weights: Mapping[str, float]) -> BlendState:
    """Return the state before the first sample. `check_weights` validates ``weights``."""
    shares = check_weights(weights)
    return BlendState(
        domains=tuple(shares),
        weights=tuple(shares.values()),
        consumed=(0,) * len(shares),
        owed=(0.0,) * len(shares),
    )


def draw(state: BlendState, count: int) -> tuple[list[int], BlendState]:
    """Return the domains (as indices) of the next ``count`` samples, and the state after them.

    Each sample is drawn from the domain that lags furthest behind its share. No domain is ever
    a whole sample ahead of its share; random draws would deviate by the square root of their
    number. With constant weights, drawing n and then m samples equals drawing n + m at once.
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
    """Samples of one global batch, indexed from the position where the batch starts.

    The draws are periodic. Assigned to ranks in turn, they could give a domain to the same rank at
    every step, and that rank's router would then balance its experts for this domain alone.
    Therefore the samples are shuffled within the batch.
    """

    def __init__(self, picks: list[tuple[SampleSource, int]], *, position: int, seed: int) -> None:
        self._picks = picks
        self._position = position
        self._seed = seed

    def __getitem__(self, k: int) -> Sample:
        """Return sample ``k`` of the run, which must be in this batch."""
        index = permuted(
            k - self._position, len(self._picks), seed=self._seed, epoch=self._position
        )
        source, local = self._picks[index]
        return source[local]


def next_global_batch(
    sources: Mapping[str, SampleSource], state: BlendState, *, global_batch_size: int, seed: int
) -> tuple[BlendedBatch, BlendState]:
    """Return the next global batch of a blend, for `micro_batches`, and the state after it.

    Args:
        sources: Samples of each domain; each domain is read in the order of its own samples.
        state: Position of the blend; the batch starts at ``state.position``.
        global_batch_size: Samples of the step over all ranks.
        seed: Seed of the shuffle within the batch.
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
    """Return the epochs of each domain in a run of ``num_samples`` with constant weights."""
    return {name: weight * num_samples / chunks[name] for name, weight in weights.items()}


def repetition_warnings(epochs: Mapping[str, float], *, limit: float) -> list[str]:
    """Return a warning for each domain that is read more than ``limit`` times."""
    return [
        f"domain {name} will be read {count:.1f} times, more than {limit:g}: it has too little "
        "text for its weight"
        for name, count in epochs.items()
        if count > limit
    ]
