"""Random rounding: its size, what it leaves alone, and that its limits hold honest variants and not wrong ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conformance.adapter import Info
from conformance.authoring.montecarlo import K, RandomRounding, monte_carlo
from conformance.judging.tolerance import MonteCarlo
from conformance.protocol.operations import UNIT


def rounded(function: Callable[[], Tensor], seed: int = 0) -> Tensor:
    with RandomRounding(torch.Generator().manual_seed(seed)):
        return function()


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_elementwise_results_move_by_at_most_a_unit(dtype: torch.dtype) -> None:
    """[NUM-13] r (1 + u xi): never more than u, and in float64 by half of it on average."""
    unit = torch.finfo(dtype).eps / 2
    x = draw(4000, dtype=dtype)
    error = ((rounded(lambda: x * 3).double() - (x * 3).double()) / (x * 3).double().abs()).abs()
    assert error.max() <= 2 * unit * 1.01  # the sum is rounded to the dtype's grid again
    assert error.mean() > 0.2 * unit


def test_sums_move_with_the_square_root_of_their_length() -> None:
    x = torch.ones(2000, 400, dtype=torch.float64)
    for function in (lambda: x.sum(1), lambda: x @ torch.ones(400, dtype=torch.float64), lambda: x.mean(1) * 400):
        error = (rounded(function) - 400) / 400
        assert 0.8 < error.std() / (400**0.5 * 2.0**-53 / 3**0.5) < 1.2


def test_copies_views_and_selections_do_not_move() -> None:
    x = draw(6, 8)
    for function in (
        lambda: x.clone(), lambda: x.T.contiguous(), lambda: x[1:3, [0, 2]], lambda: torch.cat([x, x]),
        lambda: torch.where(x > 0, x, 0), lambda: x.reshape(8, 6), lambda: x.amax(0), lambda: -x, lambda: x.abs(),
        lambda: x.sort(0).values, lambda: x.double(), lambda: x.flip(0),
    ):  # fmt: skip
        torch.testing.assert_close(rounded(function), function(), rtol=0, atol=0)


def test_composite_kernels_are_taken_apart() -> None:
    """A layer norm of nearly constant numbers loses digits in x - mean: rounding its result alone would not show it."""
    x = 1000 + draw(50, 32)
    truth = torch.nn.functional.layer_norm(x, (32,), eps=1e-6)
    error = (rounded(lambda: torch.nn.functional.layer_norm(x, (32,), eps=1e-6)) - truth).abs().max()
    assert error > 100 * 2.0**-53


def test_gradients_round_too() -> None:
    x = draw(30).requires_grad_()

    def gradient() -> Tensor:
        return torch.autograd.grad((x.exp() * 3).sum(), x)[0]

    error = (rounded(gradient) / gradient() - 1).abs()
    assert 0 < error.max() < 10 * 2.0**-53


def test_factorised_matrices_move_by_their_backward_error() -> None:
    a = torch.diag(torch.tensor([1.0, 1e-6], dtype=torch.float64))
    solution = rounded(lambda: torch.linalg.solve(a, torch.ones(2, dtype=torch.float64)))
    error = (solution / torch.tensor([1.0, 1e6]) - 1).abs()
    assert error[1] > 1e-12  # of the order of the condition number times u, as for any stable solver


class Sums:
    """A reference with one operation: `y` [i, j] -> sums, in the dtype of the run."""

    def describe(self) -> Info:
        return Info("sums", "1", frozenset({"attention"}))

    def run(self, op: str, inputs: dict[str, Any], params: dict[str, Any], probes: Sequence[str]) -> Mapping[str, Any]:
        q = torch.from_numpy(inputs["q"]).to(getattr(torch, params["dtype"]))
        y = (q * q).sum(-1)
        return {"y": y.double().numpy()} | {f"probe.{name}": (q * q).double().numpy() for name in probes}


def limits_of(q: np.ndarray[Any, Any]) -> MonteCarlo:
    return monte_carlo(Sums(), "attention", {"q": q}, {}, {"y": (q**2).sum(-1)}, "sums of squares", 3)


@pytest.mark.parametrize("dtype", UNIT)
def test_monte_carlo_holds_another_order_and_not_another_formula(dtype: str) -> None:
    from conformance.protocol.operations import round_to

    q = round_to(np.random.default_rng(0).standard_normal((40, 64)), "bfloat16")
    bound = limits_of(q)
    truth, kind = (q**2).sum(-1), getattr(torch, dtype)
    values = torch.from_numpy(q).to(kind)
    backwards = sum((values[:, i] * values[:, i] for i in reversed(range(64))), torch.zeros(40, dtype=kind))
    assert isinstance(backwards, Tensor)
    assert bound.measure(backwards.double().numpy(), truth, dtype, "y").passed
    missing = truth - q[:, 0] ** 2 if dtype != "bfloat16" else truth / 2
    assert not bound.measure(missing, truth, dtype, "y").passed


def test_monte_carlo_repeats_and_has_a_floor() -> None:
    """An output that nothing rounds has the limit of K roundings of its largest value."""
    q = np.random.default_rng(0).standard_normal((5, 8))
    assert limits_of(q) == limits_of(q)
    nothing = limits_of(np.full((3, 1), 2.0)).limits["float64"]["y"]
    assert nothing.largest >= K * UNIT["float64"] * 4.0


def test_monte_carlo_covers_probes() -> None:
    q = np.random.default_rng(0).standard_normal((5, 8))
    expected = {"y": (q**2).sum(-1), "probe.squares": q**2}
    limits = monte_carlo(Sums(), "attention", {"q": q}, {}, expected, "", 0, ("float32",)).limits["float32"]
    assert set(limits) == {"y", "probe.squares"} and 0 < limits["probe.squares"].largest < limits["y"].largest
