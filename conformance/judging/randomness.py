"""Tests of random numbers, of stated size and power, for what no exact comparison can judge, [NUM-5].

Every test gives a p-value that is exact or bounded from above: an honest port shows p <= a with probability a at most,
whatever the number of samples. The suite makes TESTS of them and fails a port where one is below LEVEL =
FAMILY / TESTS, so that an honest port fails any of them with probability FAMILY at most. Seeds are fixed, and nothing
is run again: a port that passes once passes always.

The laws draw eight streams of 8192 numbers. At this level a fault is then missed with a probability below 1e-3 if it is
as large as

    mean               0.04 off in all streams
    variance           5 % off in all streams
    distribution       of the first two streams: uniform, exponential or two-valued noise of mean 0 and variance 1, or
                       normal noise cut at 1.5
    correlation        0.11 between any two streams, or between neighbours in a stream
    repeats            numbers of 24 bits (float32), or a stream that starts over

tests/test_statistics.py draws both: the size of each test, and its power against these.

The bound on the distribution is that of Dvoretzky, Kiefer and Wolfowitz with Massart's constant (1990).
"""

import math
from itertools import combinations

import numpy as np

from conformance.adapter import Array

__all__ = [
    "FAMILY",
    "LEVEL",
    "TESTS",
    "correlation",
    "distribution",
    "mean",
    "neighbours",
    "repeats",
    "share",
    "variance",
]

FAMILY = 1e-6
TESTS = 20
LEVEL = FAMILY / TESTS


def _two_sided(z: float) -> float:
    """The probability P(|Z| >= |z|) of a standard normal Z."""
    return math.erfc(abs(z) / math.sqrt(2))


def mean(x: Array) -> float:
    """The p-value of mean 0: the sum of n standard normal numbers over sqrt(n) is standard normal."""
    return _two_sided(float(x.sum()) / math.sqrt(x.size))


def variance(x: Array) -> float:
    """The p-value of variance 1, from the sum of squares of an even number n, which is chi-squared.

    P(chi^2_n > s) = P(Poisson(s/2) < n/2). Raises ValueError for an odd number.
    """
    half, degrees = float((x**2).sum()) / 2, x.size // 2
    if x.size % 2:
        raise ValueError(f"an even number of numbers is needed, got {x.size}")
    if half == 0:
        return 0.0
    # The tail on the far side of the mode, where terms fall from the first on.
    tail = range(degrees - 1, -1, -1) if half > degrees else range(degrees, 10**9)
    return min(1.0, 2 * _poisson_tail(half, tail))


def _poisson_tail(rate: float, counts: range) -> float:
    """The sum of P(Poisson(rate) = k) over falling terms, as far as they count."""
    total, log_rate = 0.0, math.log(rate)
    for k in counts:
        term = math.exp(k * log_rate - rate - math.lgamma(k + 1))
        total += term
        if term <= 1e-18 * total:
            break
    return total


def distribution(x: Array) -> float:
    """The p-value of a standard normal distribution, from the largest distance D of the two distribution functions.

    P(D > d) <= 2 exp(-2 n d^2) for every n.
    """
    ordered = np.sort(x, axis=None).tolist()
    n = len(ordered)
    exact = [math.erfc(-value / math.sqrt(2)) / 2 for value in ordered]
    distance = max(max((i + 1) / n - f, f - i / n) for i, f in enumerate(exact))
    return min(1.0, 2 * math.exp(-2 * n * distance**2))


def correlation(streams: Array) -> float:
    """The p-value of independent streams [m, n]: the least p of all pairs, times their number.

    For given y the product x.y/|y| is standard normal.
    """
    least, pairs = 1.0, 0
    for x, y in combinations(streams, 2):
        least, pairs = min(least, _pair(x, y)), pairs + 1
    return min(1.0, least * pairs)


def neighbours(streams: Array) -> float:
    """The p-value of independent neighbours in each stream [m, n], n even, which pairs odd places with even ones."""
    return min(1.0, min(_pair(x[0::2], x[1::2]) for x in streams) * len(streams))


def _pair(x: Array, y: Array) -> float:
    size = float(np.linalg.norm(y))
    return 0.0 if size == 0 else _two_sided(float(x @ y) / size)


def repeats(x: Array) -> float:
    """The p-value of numbers no coarser than 2^-48, from the number of those that equal an earlier one.

    Of n numbers from a normal distribution in steps of s, n^2 s / (4 sqrt(pi)) pairs are equal on average, and their
    number is close to Poisson's.
    """
    equal = x.size - len(np.unique(x))
    rate = x.size**2 * 2.0**-48 / (4 * math.sqrt(math.pi))
    return 1.0 if equal == 0 else _poisson_tail(rate, range(equal, 10**9))


def share(count: int, trials: int, probability: float) -> float:
    """The p-value of `count` successes in `trials` of that probability: twice the smaller tail of the binomial."""
    below = sum(_binomial(k, trials, probability) for k in range(count + 1))
    above = sum(_binomial(k, trials, probability) for k in range(count, trials + 1))
    return min(1.0, 2 * min(below, above))


def _binomial(k: int, n: int, p: float) -> float:
    choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(choose + k * math.log(p) + (n - k) * math.log1p(-p))
