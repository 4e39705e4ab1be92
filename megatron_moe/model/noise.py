"""Draw normal numbers as a function of seed, layer, token and expert, under any layout.

This is a counter-based generator like Philox: each number is a hash of its coordinates. It has no
state and no order, and a rank draws only the numbers of its own tokens.

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
    """Return standard normal numbers in fp32, ``(s, B, E)``.

    Args:
        seed: Seed of the run.
        layer: Global layer id.
        samples_B: Index of each sample in the run.
        positions_s: Position of each token in its sample.
        num_experts: E.
    """
    experts_E = torch.arange(num_experts, device=samples_B.device)
    start = torch.tensor(seed, device=samples_B.device)
    key = _hash(_hash(_hash(start) ^ layer) ^ samples_B)
    key = _hash(key ^ positions_s[:, None])
    key = _hash(key[..., None] ^ experts_E)
    return _box_muller(_unit(key), _unit(_hash(key)))


def _hash(x: Tensor) -> Tensor:
    """Apply splitmix64 to 64-bit integers."""
    x = x + _STEP
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift ``x`` right as an unsigned integer; torch's own shift extends the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _unit(x: Tensor) -> Tensor:
    """Convert the upper 53 bits to an fp64 number in (0, 1)."""
    return (_shifted(x, 11).double() + 0.5) * 2.0**-53


def _box_muller(u: Tensor, v: Tensor) -> Tensor:
    return ((-2.0 * u.log()).sqrt() * (2.0 * math.pi * v).cos()).float()
