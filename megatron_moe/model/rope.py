"""Scale rotary frequencies as a checkpoint's ``config.json`` says.

Shape letters: ``C`` pairs of a head's channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_moe.hf.rope import RopeScaling


def scaled_frequencies(frequency_C: Tensor, scaling: RopeScaling, *, base: float) -> Tensor:
    """Return the frequencies, ``(C,)``, after scaling.

    Args:
        frequency_C: Unscaled frequencies, ``base ** (-i / C)``.
        scaling: Kind of scaling, and its numbers.
        base: Base of the frequencies (rope_theta).
    """
    match scaling.rope_type:
        case "linear":
            return frequency_C / scaling.factor
        case "dynamic":  # `rules.training.context` keeps sequences below the length where it scales
            return frequency_C
        case "llama3":
            kept_C = _llama3_kept(frequency_C, scaling)
        case "yarn":
            kept_C = _yarn_kept(frequency_C, scaling, base)
    return frequency_C * (kept_C + (1 - kept_C) / scaling.factor)


def _llama3_kept(frequency_C: Tensor, scaling: RopeScaling) -> Tensor:
    """Return the part of each frequency that is not divided by the factor, as in Llama 3.1.

    Wavelengths below ``original / high_freq_factor`` are kept, frequencies of wavelengths above
    ``original / low_freq_factor`` are divided, and those between are interpolated. Megatron-Core's
    own version hard-codes three of the numbers.
    """
    original = scaling.original_max_position_embeddings
    turns_C = original * frequency_C / (2 * math.pi)  # full turns within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns_C - low) / (high - low)).clamp(0, 1)


def _yarn_kept(frequency_C: Tensor, scaling: RopeScaling, base: float) -> Tensor:
    """Return the part of each frequency that is not divided, as in YaRN (arXiv 2309.00071)."""
    pairs = len(frequency_C)

    def pair_of(turns: float) -> float:
        """Return the pair of channels that makes ``turns`` within the original context."""
        length = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return pairs * math.log(length) / math.log(base)

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    if low == high:
        high += 0.001
    pair_C = torch.arange(pairs, dtype=torch.float32, device=frequency_C.device)
    return 1 - ((pair_C - low) / (high - low)).clamp(0, 1)
