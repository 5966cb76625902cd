"""[NUM-5]: size and power of the suite's statistical tests, by simulation, and their tails against exact values."""

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest

from conformance.adapter import Array
from conformance.judging import randomness as statistics
from conformance.judging.randomness import LEVEL, correlation, distribution, mean, neighbours, repeats, share, variance

STREAMS, LENGTH = 8, 8192
TESTS: dict[str, Callable[[Array], float]] = {
    "mean": mean,
    "variance": variance,
    "distribution": distribution,
    "correlation": correlation,
    "neighbours": neighbours,
    "repeats": repeats,
}
# Size: of 1000 independent p-values at most 79 lie below 0.05, but for 5e-5 of all luck (binomial, mean 50, 4.2 sigma).
RUNS, PART, MOST = 1000, 0.05, 79


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("name", TESTS)
def test_p_values_size(name: str) -> None:
    rng = np.random.default_rng(1)
    below = sum(TESTS[name](rng.standard_normal((4, 50))) <= PART for _ in range(RUNS))
    assert below <= MOST
    # Those that are exact do reach their size; the distance bound and the repeats are smaller than they say.
    assert below >= 24 or name in ("distribution", "repeats")


def test_family_level() -> None:
    assert pytest.approx(1e-6) == statistics.TESTS * LEVEL


def repeated(x: Array) -> Array:
    """Every stream begins again after half its length."""
    return np.concatenate([x[:, : LENGTH // 2]] * 2, axis=1)


def after(x: Array) -> Array:
    """Correlation 0.11 between neighbours."""
    y = x.copy()
    y[:, 1::2] = 0.11 * x[:, 0::2] + math.sqrt(1 - 0.11**2) * x[:, 1::2]
    return y


def common(x: Array) -> Array:
    """Correlation 0.11 between the streams 0 and 5."""
    y = x.copy()
    y[5] = 0.11 * x[0] + math.sqrt(1 - 0.11**2) * x[5]
    return y


FAULTS: list[tuple[str, str, Callable[[Array], Array]]] = [
    ("mean", "off by 0.04", lambda x: x + 0.04),
    ("variance", "5 % more", lambda x: math.sqrt(1.05) * x),
    ("variance", "5 % less", lambda x: math.sqrt(0.95) * x),
    ("variance", "variance 2", lambda x: math.sqrt(2) * x),
    ("distribution", "uniform", lambda x: math.sqrt(3) * (2 * np.vectorize(math.erf)(x[:2] / math.sqrt(2)) / 2)),
    ("distribution", "exponential", lambda x: -np.log(np.vectorize(math.erfc)(x[:2] / math.sqrt(2)) / 2) - 1),
    ("distribution", "two-valued", lambda x: np.sign(x[:2])),
    ("distribution", "cut at 1.5", lambda x: np.clip(x[:2], -1.5, 1.5)),
    ("correlation", "0.11 between two streams", common),
    ("correlation", "one stream for two", lambda x: x[[0, 1, 2, 3, 4, 5, 6, 0]]),
    ("correlation", "of opposite sign", lambda x: np.concatenate([x[:7], -x[2:3]])),
    ("neighbours", "0.11", after),
    ("neighbours", "each number twice", lambda x: np.repeat(x[:, ::2], 2, axis=1)),
    ("repeats", "float32", lambda x: x.astype(np.float32).astype(np.float64)),
    ("repeats", "starts over", repeated),
]


@pytest.mark.parametrize(("name", "fault"), [(name, what) for name, what, _ in FAULTS])
def test_p_values_power(name: str, fault: str) -> None:
    """A fault missed once in a thousand runs shows in all of five."""
    wrong = next(f for n, what, f in FAULTS if (n, what) == (name, fault))
    for seed in range(5):
        assert TESTS[name](wrong(normal(20 + seed, STREAMS, LENGTH))) <= LEVEL


def test_p_values_honest() -> None:
    """Another generator than the reference's passes at the suite's level."""
    x = np.random.Generator(np.random.MT19937(3)).standard_normal((STREAMS, LENGTH))
    assert min(test(x) for test in TESTS.values()) > 1e-3


def test_variance_exact_tails() -> None:
    """P(chi^2_n > s) is the regularised incomplete gamma function."""
    for n, total in ((2, 5.0), (40, 90.0), (40, 12.0), (1000, 1300.0)):
        x = np.full(n, math.sqrt(total / n))
        above = float(mpmath.gammainc(n / 2, total / 2, regularized=True))
        assert variance(x) == pytest.approx(2 * min(above, 1 - above), rel=1e-8)


def test_variance_invalid_odd() -> None:
    with pytest.raises(ValueError, match="even"):
        variance(np.ones(3))


def test_variance_of_extremes() -> None:
    assert variance(np.zeros(64)) == 0.0
    assert variance(np.full(64, 1e9)) == 0.0


def test_share_exact_tails() -> None:
    """Ten coins: P(heads <= 1) = 11/1024; a count at the middle is no evidence at all."""
    assert share(1, 10, 0.5) == pytest.approx(22 / 1024)
    assert share(9, 10, 0.5) == pytest.approx(22 / 1024)
    assert share(5, 10, 0.5) == 1.0


def test_share_size_and_power() -> None:
    """800 of 4000 are expected: a share of a quarter shows, and one of a fifth does not."""
    assert share(1000, 4000, 0.2) <= LEVEL
    assert share(816, 4000, 0.2) > PART


def test_distribution_of_exact_quantiles() -> None:
    """Two points at the quartiles: both distances are 1/4."""
    quartile = 0.6744897501960817
    assert distribution(np.array([-quartile, quartile])) == pytest.approx(min(1.0, 2 * math.exp(-4 / 16)))
    x = np.full(64, quartile)
    assert distribution(x) == pytest.approx(2 * math.exp(-128 * 0.75**2))


def test_correlation_of_known_product() -> None:
    """x.y/|y| = 3 for three streams, two of which are orthogonal to all others: three pairs are counted."""
    x, y, other = np.array([3.0, 0.0, 0.0]), np.array([2.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0])
    assert correlation(np.stack([x, y, other])) == pytest.approx(3 * math.erfc(3 / math.sqrt(2)))
