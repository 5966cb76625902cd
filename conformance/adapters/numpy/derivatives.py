"""Derivatives by complex steps: f(x + i h e_j) = f(x) + i h df/dx_j for analytic f, exact to rounding.

There is no difference of nearby numbers, so h may be so small (1e-20) that h^2 is nothing in any dtype. One evaluation
gives one column of a Jacobian; columns are evaluated together as samples of a batch. In a float32 run the numbers are
complex64: the derivative is that of the float32 network, computed in float32.
"""

from collections.abc import Callable

import numpy as np

from conformance.adapter import Array, Arrays

__all__ = ["STEP", "gradients", "jacobian"]

STEP = 1e-20
TOGETHER = 128  # samples in one evaluation: a matter of memory alone


def jacobian(function: Callable[[Array, int], Array], x: Array) -> tuple[Array, Array]:
    """f(x) [b, n] and its Jacobian [b, n, v] at x [b, v], each sample for itself.

    `function(x, copies)` takes x [copies b, v], the batch repeated with the samples fastest.
    """
    b, v = x.shape
    columns = []
    for start in range(0, v, max(1, TOGETHER // b)):
        which = np.arange(start, min(start + max(1, TOGETHER // b), v))
        steps = np.zeros((len(which), b, v), np.complex128)
        steps[np.arange(len(which)), :, which] = 1j * STEP
        y = function((x + steps).reshape(-1, v), len(which))
        columns.append(y.reshape(len(which), b, -1))
    all_columns = np.concatenate(columns)
    return all_columns[0].real.copy(), np.moveaxis(all_columns.imag / STEP, 0, -1)


def gradients(loss: Callable[[Arrays, int], Array], weights: Arrays, samples: int) -> dict[str, Array]:
    """The derivative of a loss by every number of every weight, in the dtype and shape of the weight.

    `loss(weights, copies)` gives the loss [copies] of each of `copies` sets of weights; the one weight that differs
    among them has one value a sample, each repeated for the `samples` of a copy.
    """
    by_name: dict[str, Array] = {}
    for name, weight in weights.items():
        parts, together = [], max(1, TOGETHER // samples)
        for start in range(0, weight.size, together):
            which = np.arange(start, min(start + together, weight.size))
            steps = np.zeros((len(which), weight.size), np.result_type(weight.dtype, np.complex64))
            steps[np.arange(len(which)), which] = 1j * STEP
            stepped = np.repeat(weight + steps.reshape(-1, *weight.shape), samples, axis=0)
            parts.append(loss({**weights, name: stepped}, len(which)).imag / STEP)
        by_name[name] = np.concatenate(parts).reshape(weight.shape).astype(weight.dtype)
    return by_name
