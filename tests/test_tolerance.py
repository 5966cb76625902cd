"""Tolerances: each class measures what it says, and survives the way to a file and back."""

import json

import numpy as np
import pytest

from conformance.judging.tolerance import (
    Bound,
    Either,
    Exact,
    Limits,
    Measured,
    MonteCarlo,
    MustReject,
    Ulp,
    from_json,
    to_json,
)
from conformance.protocol.operations import UNIT

U = UNIT["float64"]


Numeric = Exact | Ulp | Bound | MonteCarlo


def measure(tolerance: Numeric, got: list[float], expected: list[float], dtype: str = "float64") -> Measured:
    return tolerance.measure(np.array(got), np.array(expected), dtype, "y")


def test_exact_ignores_only_the_sign_of_zero() -> None:
    assert measure(Exact(""), [-0.0, 1.0], [0.0, 1.0]).passed
    assert not measure(Exact(""), [0.0, np.nextafter(1.0, 2)], [0.0, 1.0]).passed


def test_ulp_counts_spacings_of_the_expected_value() -> None:
    expected = np.array([1.0, 1e300, 3e-300])
    for steps in (0, 1, 3, 4):
        measured = Ulp(3, "").measure(expected + steps * np.spacing(expected), expected, "float64", "y")
        assert measured.error == steps and measured.passed == (steps <= 3)
    assert not measure(Ulp(3, ""), [1e-300], [0.0]).passed


@pytest.mark.parametrize("dtype", UNIT)
def test_bound_is_k_u_scale(dtype: str) -> None:
    u = UNIT[dtype]
    measured = measure(Bound(10, ""), [4.0, 30 * u], [4.0, 0.0], dtype)
    assert measured.passed and measured.limit == 40 * u and measured.where == (1,)
    assert not measure(Bound(10, ""), [4.0, 50 * u], [4.0, 0.0], dtype).passed
    assert measure(Bound(10, "", scale=8.0), [4.0, 50 * u], [4.0, 0.0], dtype).passed


def test_bound_rejects_every_nonzero_where_nothing_is_expected() -> None:
    assert not measure(Bound(10, ""), [1e-300], [0.0]).passed


def test_monte_carlo_limits_both_rms_and_the_largest_error() -> None:
    """[NUM-13] One element far off breaks the largest, all of them a little off break the RMS."""
    tolerance = MonteCarlo("", {"float64": {"y": Limits(1.0, 3.0)}}, 4.0, 16, 0)
    zero = [0.0] * 100
    assert measure(tolerance, [2.9] + [0.0] * 99, zero).passed
    one = measure(tolerance, [3.1] + [0.0] * 99, zero)
    assert not one.passed and one.unit == "absolute" and one.where == (0,)
    all_of_them = measure(tolerance, [1.1] * 100, zero)
    assert not all_of_them.passed and all_of_them.unit == "root mean square"
    assert measure(tolerance, [0.9] * 100, zero).passed
    with pytest.raises(KeyError):
        measure(tolerance, zero, zero, "float32")


def test_measured_fraction_of_a_zero_limit() -> None:
    assert Measured(0.0, 0.0, "", ()).fraction == 0.0
    assert Measured(1e-300, 0.0, "", ()).fraction == np.inf
    assert Measured(1.0, 4.0, "", ()).fraction == 0.25


def test_measured_of_nothing_passes() -> None:
    for tolerance in (Exact(""), Ulp(1, ""), Bound(1, ""), MonteCarlo("", {"float64": {"y": Limits(0, 0)}}, 4, 16, 0)):
        assert measure(tolerance, [], []).passed


def test_to_json_comes_back_the_same() -> None:
    monte_carlo = MonteCarlo("a chain", {"float32": {"y": Limits(1e-6, 3e-6)}}, 4.0, 16, 7)
    may = Either(Ulp(1, ""), "may")
    for tolerance in (Exact("x"), Ulp(4, "y"), Bound(8, "z", 2.0), monte_carlo, MustReject("no"), may):
        data = json.loads(json.dumps(to_json(tolerance)))
        assert data["class"] == tolerance.kind and from_json(data) == tolerance
    assert U == 2.0**-53
