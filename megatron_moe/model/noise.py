"""Normal numbers that are a function of what they are for: the same under every layout.

A counter-based generator, like Philox, of which each number is a hash of its coordinates: no state,
no order, and a rank draws the numbers of its own tokens only.

Shape letters of this module:

    s  positions of this rank   B  micro_batch_size   E  num_moe_experts
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# splitmix64's multipliers and step, as signed 64-bit integers; torch's int64 products wrap around.
_STEP, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def normal_numbers(
    *, seed: int, layer: int, samples_B: Tensor, positions_s: Tensor, num_experts: int
) -> Tensor:
    """Standard normal numbers, fp32, one for each token and expert.

    Args:
        seed: The run's.
        layer: Global layer id.
        samples_B: Number of each sample in the run.
        positions_s: Place of each token in its sample.
        num_experts: Numbers of one token.
    """
    experts_E = torch.arange(num_experts, device=samples_B.device)
    start = torch.tensor(seed, device=samples_B.device)
    key = _hash(_hash(_hash(start) ^ layer) ^ samples_B)
    key = _hash(key ^ positions_s[:, None])
    key = _hash(key[..., None] ^ experts_E)
    return _box_muller(_unit(key), _unit(_hash(key)))


def _hash(x: Tensor) -> Tensor:
    """splitmix64 of 64-bit integers."""
    x = x + _STEP
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """``x`` as an unsigned number, shifted right: torch's shift drags the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _unit(x: Tensor) -> Tensor:
    """Of the upper 53 bits a number in (0, 1), fp64."""
    return (_shifted(x, 11).double() + 0.5) * 2.0**-53


def _box_muller(u: Tensor, v: Tensor) -> Tensor:
    return ((-2.0 * u.log()).sqrt() * (2.0 * math.pi * v).cos()).float()
