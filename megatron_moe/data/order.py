"""Compute the order of chunks: a random permutation of any size that needs no memory.

A shuffled index of the chunks would take gigabytes per rank for a trillion tokens, and would
depend on the version of the library that shuffles. A Feistel network computes each element of the
permutation from (seed, epoch) with a few multiplications. Values outside of the range are mapped
again until they are inside ("cycle walking": Black and Rogaway, Ciphers with Arbitrary Finite
Domains, CT-RSA 2002).
"""

from __future__ import annotations

_ROUNDS = 8
_MASK_64 = (1 << 64) - 1


def permuted(index: int, size: int, *, seed: int, epoch: int) -> int:
    """Return element ``index`` of the permutation of ``range(size)`` given by (seed, epoch).

    >>> sorted(permuted(i, 5, seed=0, epoch=0) for i in range(5))
    [0, 1, 2, 3, 4]
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    key = _mix(_mix(seed) ^ epoch)
    while True:
        index = _feistel(index, half_bits, key)
        if index < size:
            return index


def _feistel(value: int, half_bits: int, key: int) -> int:
    """Map ``range(4 ** half_bits)`` to itself; a round XORs one half with a hash of the other."""
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for round_ in range(_ROUNDS):
        left, right = right, left ^ (_mix(right + key + round_ * 0x9E3779B97F4A7C15) & mask)
    return left << half_bits | right


def _mix(value: int) -> int:
    """Apply the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) to hash 64 bits."""
    value &= _MASK_64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK_64
    return value ^ value >> 31
