"""A permutation of any size that needs no memory: the order in which chunks are visited.

A shuffled index of the chunks would cost a rank gigabytes on a trillion tokens, and would change
with the version of the library that shuffles. A Feistel network computes each place of the
permutation from (seed, epoch) by a few multiplications; numbers that fall outside of the range
are sent through again ("cycle walking": Black and Rogaway, Ciphers with Arbitrary Finite Domains,
CT-RSA 2002).
"""

from __future__ import annotations

_ROUNDS = 8
_MASK_64 = (1 << 64) - 1


def permuted(index: int, size: int, *, seed: int, epoch: int) -> int:
    """Place ``index`` of the permutation of ``range(size)`` that belongs to (seed, epoch).

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
    """A bijection of ``range(4 ** half_bits)``: a round XORs one half with a hash of the other."""
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for round_ in range(_ROUNDS):
        left, right = right, left ^ (_mix(right + key + round_ * 0x9E3779B97F4A7C15) & mask)
    return left << half_bits | right


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): every bit depends on all."""
    value &= _MASK_64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK_64
    return value ^ value >> 31
