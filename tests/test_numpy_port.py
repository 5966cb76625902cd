"""The independent NumPy port: no torch, no reference, every frozen value again, and derivatives that are right."""

import ast
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance.adapter import Array, Unsupported, describe
from conformance.adapters.numpy import tokens
from conformance.adapters.numpy.derivatives import jacobian
from conformance.adapters.numpy.port import adapter
from conformance.adapters.numpy.tiling import Axis
from conformance.judging.runner import exit_code, run_suite, select
from conformance.judging.vectors import load_cases, manifest
from conformance.laws import all_laws
from conformance.protocol.operations import OPERATIONS, to_dtype

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "conformance" / "adapters" / "numpy").glob("*.py"))
CONFIG = {
    "channels": 2,
    "static_channels": 1,
    "patch": [2, 2],
    "width": 4,
    "heads": 2,
    "depth": 1,
    "mlp_ratio": 2,
    "position_features": 3,
    "position_octaves": 2,
    "noise_features": 4,
    "window": None,
    "sigma_data": 1.25,
}
AXIS = {"core": 4, "halo": 2, "blend": 2, "patch": 2}
TILES = {"y": {"length": 4, "periodic": False, **AXIS}, "x": {"length": 8, "periodic": True, **AXIS}, "together": 1}


def run(op: str, inputs: dict[str, Any], dtype: str = "float64", **params: Any) -> dict[str, Array]:
    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    return dict(adapter.run(op, to_dtype(op, arrays, dtype), {**params, "dtype": dtype}, ()))


def network(samples: int = 2) -> dict[str, Array]:
    """A tiny network with weights away from zero, and an analysis on a grid of 4 x 8."""
    rng = np.random.default_rng(5)
    shapes = {
        "x": (samples, 2, 4, 8),
        "static": (1, 1, 4, 8),
        "past": (1, 3, 2, 4, 8),
        "past_static": (1, 3, 1, 4, 8),
        "position": (2, 4, 3),
    }
    weights = tokens.weight_shapes(tokens.config_of(CONFIG))
    inputs = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    inputs |= {f"weights.{name}": 0.5 * rng.standard_normal(shape) for name, shape in weights.items()}
    return inputs | {"age": np.array([[6.0, 12.0, 30.0]]), "sigma": np.array([0.7, 3.0])[:samples]}


def test_numpy_port_imports_neither_torch_nor_the_reference() -> None:
    """Not even by way of what it imports; nor the recipes of cases."""
    code = """
import sys
import numpy as np
from conformance.adapters.numpy.port import adapter
adapter.run("schedule", {}, {"steps": 4, "dtype": "float64"}, ())
foreign = ("torch", "storm_ref", "conformance.cases")
print([name for name in sys.modules if any(name == f or name.startswith(f + ".") for f in foreign)])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_numpy_port_depends_on_numpy_and_the_protocol_alone(module: Path) -> None:
    """Each file imports the standard library, NumPy, its siblings, the protocol and the table of operations."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    allowed = {"numpy", "conformance.adapter", "conformance.adapters.numpy", "conformance.protocol.operations"}
    others = {name for name in imported - allowed if not name.startswith("conformance.adapters.numpy.")}
    assert {name.split(".")[0] for name in others} <= sys.stdlib_module_names


def test_numpy_port_modules_are_found() -> None:
    assert {path.stem for path in MODULES} > {"port", "tokens", "network", "sampling", "tiling"}


def test_numpy_port_has_every_operation() -> None:
    """But those of many ranks, which it does not claim."""
    assert describe(adapter).ops == {op for op, known in OPERATIONS.items() if known.chapter != "parallel"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_numpy_port_conforms(dtype: str) -> None:
    """Every profile that it claims, every case and law: the frozen values have a second, independent witness."""
    info = describe(adapter)
    profiles, cases, laws = select(info, load_cases(), all_laws(), [])
    counts = {name: sum(count.values()) for name, count in manifest()["profiles"].items()}
    result = run_suite(adapter, info, cases, laws, profiles, dtype, expected=counts)
    assert [f"{o.subject.id}: {o.verdict}, {o.detail}" for o in result.outcomes if o.verdict != "pass"] == []
    assert exit_code(result) == 0


def test_jacobian_closed_form() -> None:
    """The Jacobian of sin(x) and a product is exact to rounding for each sample, as no difference quotient is."""
    x = np.array([[0.3, 2.0], [-1.1, 0.5]])

    def function(z: Array, copies: int) -> Array:
        return np.stack([np.sin(z[:, 0]), z[:, 0] * z[:, 1], np.exp(z[:, 1])], axis=1)

    value, derivative = jacobian(function, x)
    zero = np.zeros(2)
    columns = [[np.cos(x[:, 0]), zero], [x[:, 1], x[:, 0]], [zero, np.exp(x[:, 1])]]
    assert np.array_equal(value, function(x, 1))
    np.testing.assert_allclose(derivative, np.moveaxis(np.array(columns), 2, 0), rtol=4e-16)


@pytest.mark.parametrize("function", [tokens.gelu, tokens.sigmoid, tokens.softplus, tokens.silu])
def test_extended_functions_derivative(function: Any) -> None:
    """f(x + i h) against central differences; their error is eps / step + step^2, some 1e-10."""
    x, step = np.linspace(-30.0, 30.0, 121), 1e-5
    got = function(x + 1e-20j)
    np.testing.assert_allclose(got.real, function(x), rtol=1e-15, atol=1e-38)  # h^2 is 1e-40
    np.testing.assert_allclose(got.imag / 1e-20, (function(x + step) - function(x - step)) / (2 * step), atol=2e-9)


def test_gradients_finite_differences() -> None:
    """Three weights of every tensor; central differences are good to some 1e-8 of the loss, here about 10."""
    inputs, step = network(), 1e-6
    rng = np.random.default_rng(1)
    inputs |= {"clean": inputs.pop("x"), "noise": rng.standard_normal((2, 2, 4, 8))}
    settings: dict[str, Any] = {"config": CONFIG, "chunk": 2, "periodic": False}
    outputs = run("gradients", inputs, **settings)
    assert outputs["loss"] == run("loss", inputs, **settings)["loss"]
    for name in [name for name in inputs if name.startswith("weights.")]:
        for index in rng.integers(0, inputs[name].size, 3):
            values = []
            for sign in (1, -1):
                weight = inputs[name].copy()
                weight.flat[index] += sign * step
                values.append(float(run("loss", {**inputs, name: weight}, **settings)["loss"]))
            gradient = outputs[f"gradients.{name.removeprefix('weights.')}"].flat[index]
            assert abs(gradient - (values[0] - values[1]) / (2 * step)) < 1e-6, name


def test_gradients_float32_near_float64() -> None:
    """The float32 derivative is that of the float32 network: some digits, of every tensor's own size."""
    inputs = network()
    inputs |= {"clean": inputs.pop("x"), "noise": np.ones((2, 2, 4, 8))}
    settings: dict[str, Any] = {"config": CONFIG, "chunk": 1, "periodic": False}
    wide, single = run("gradients", inputs, **settings), run("gradients", inputs, "float32", **settings)
    for name, value in wide.items():
        assert single[name].dtype == (np.float64 if name == "loss" else np.float32)
        assert np.abs(single[name] - value).max() < 1e-3 * np.abs(value).max()


def test_guided_denoise_finite_differences() -> None:
    """`dps` with one observation: sigma^2 (y - H(D)) / R times the gradient of H(D), here by differences."""
    inputs, step = network(1), 1e-6
    settings: dict[str, Any] = {"config": CONFIG, "chunk": 1, "periodic": True, **TILES}
    observed = {"value": [0.4], "variance": [0.5], "index": [[5, 40]], "weight": [[1.0, -2.0]]}

    def reading(x: Array) -> float:
        d = run("denoise_tiled", {**inputs, "x": x}, **settings)["denoised"].ravel()
        return float(d[5] - 2 * d[40])

    mean = run("denoise_tiled", inputs, **settings)["denoised"]
    moved = run("guided_denoise", {**inputs, **observed}, method="dps", **settings)["guided"] - mean
    factor = inputs["sigma"][0] ** 2 * (0.4 - reading(inputs["x"])) / 0.5
    for point in (5, 6, 21, 40, 63):
        change = np.zeros_like(inputs["x"])
        change.flat[point] = step
        gradient = (reading(inputs["x"] + change) - reading(inputs["x"] - change)) / (2 * step)
        assert abs(moved.flat[point] - factor * gradient) < 1e-7 * max(1, abs(factor))
    assert np.abs(moved).max() > 0.1


def test_guided_mean_scalar_closed_form() -> None:
    """[GUIDE-8] one number of variance c, seen with variance R at noise level sigma: precisions add up."""
    c, r, sigma, x, y = 2.0, 0.3, 1.5, 0.8, -0.4
    prior = {"mean": [0.0], "covariance": [[c]], "x": [[x]], "sigma": [sigma]}
    observed = {"operator": [[1.0]], "value": [y], "variance": [r]}
    got = run("guided_mean", {**prior, **observed}, method="mmps", steps=5)["guided"]
    precision = 1 / c + 1 / sigma**2 + 1 / r
    np.testing.assert_allclose(got, (x / sigma**2 + y / r) / precision, rtol=1e-14)


def test_crps_two_members() -> None:
    """Members 0 and 2, truth 3: mean distance 2, of the members 2 in each order; minus 1/2 plain, minus 1 fair."""
    inputs = {"members": [[0.0], [2.0]], "truth": [3.0]}
    assert run("crps", inputs, fair=False)["crps"] == 1.5
    assert run("crps", inputs, fair=True)["crps"] == 1.0


def test_axis_weights_sum_to_one() -> None:
    """[TILE-5] on a closed axis with a short last core and on a circle."""
    for axis in (Axis(22, 8, 4, 2, False, 2), Axis(24, 8, 4, 4, True, 2)):
        total = np.zeros(axis.length)
        for points, weight in zip(axis.extents, axis.weights, strict=True):
            total[points] += weight
        np.testing.assert_allclose(total, 1, rtol=4 * 2.0**-52)


def test_noise_of_distinct_keys() -> None:
    """[DA-3] no two triples share a key, also where one number needs more than 32 bits; the first draws stay."""

    def draws(seed: int, analysis: int, member: int, n: int = 2) -> Array:
        return run("noise", {}, seed=seed, analysis=analysis, member=member, shape=[3], draws=n)["noise"]

    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**32, 0, 0), (0, 2**32, 0)]
    assert len({draws(*key).tobytes() for key in keys}) == len(keys)
    assert np.array_equal(draws(3, 1, 4, 5)[:2], draws(3, 1, 4))


def test_denoised_does_not_depend_on_companions() -> None:
    """[NET-6] a sample alone, and the same sample in a batch."""
    both = network(2)
    settings: dict[str, Any] = {"config": CONFIG, "chunk": 3, "periodic": False}
    alone = run("denoise", network(2) | {"x": both["x"][1:], "sigma": both["sigma"][1:]}, **settings)["denoised"]
    np.testing.assert_allclose(alone, run("denoise", both, **settings)["denoised"][1:], rtol=0, atol=1e-14)


def test_run_invalid_dtype() -> None:
    with pytest.raises(Unsupported, match="bfloat16"):
        adapter.run("schedule", {}, {"steps": 2, "dtype": "bfloat16"}, ())


@pytest.mark.parametrize(
    ("op", "inputs", "params", "says"),
    [
        ("patchify", {"x": np.zeros((1, 1, 5, 4))}, {"patch": [2, 2]}, r"5 rows .* \[2, 2\]"),
        ("gate", {"sigma": [0.0], "alpha": [1.0], "beta": [0.0]}, {}, "sigma is 0.0 at"),
        ("schedule", {}, {"steps": 2.5}, "steps is 2.5"),
        ("tile_geometry", {}, {"length": 8, "periodic": True, **AXIS, "halo": 4}, "wraps onto itself"),
        ("tile_geometry", {}, {"length": 10, "periodic": False, **AXIS, "core": 8, "blend": 4, "halo": 4}, "last core"),
        ("crps", {"members": [[1.0]], "truth": [1.0]}, {"fair": True}, "1 members"),
        ("average", {"score": [1.0], "mask": [False]}, {}, "mean over 0 points"),
        ("spread_skill", {"members": [[1.0], [3.0]], "truth": [2.0]}, {}, "RMSE is 0"),
        ("count_weights", {}, {"config": {**CONFIG, "heads": 3}}, "width 4 is no multiple of heads 3"),
        ("noise", {}, {"seed": -1, "analysis": 0, "member": 0, "shape": [1], "draws": 1}, "seed is -1"),
        ("unpatchify", {"tokens": np.zeros((1, 6, 4))}, {"patch": [2, 2], "rows": 4}, "6 tokens"),
        ("memory", {"score": np.zeros((1, 0, 1, 1)), "value": np.zeros((1, 0, 1, 1, 1))}, {"chunks": []}, "0 frames"),
    ],
)
def test_run_invalid_input_says_why(op: str, inputs: dict[str, Any], params: dict[str, Any], says: str) -> None:
    """[CONV-10] the thing and the value seen; the frozen cases have the rest."""
    with pytest.raises(ValueError, match=says):
        run(op, inputs, **params)


def test_sample_invalid_state_names_step_and_member() -> None:
    """[DA-6] latents so large that the second member overflows in the first step."""
    inputs = {"mean": [0.0], "covariance": [[1.0]], "latents": [[1.0], [1e308]], "sigmas": [80.0, 1.0, 0.0]}
    with pytest.raises(ValueError, match="step 0, member 1"):
        run("sample", inputs, churn={})


def test_schedule_ends() -> None:
    """[EDM-5] the first and the last level before zero are those asked for, to 64 ULP."""
    sigmas = run("schedule", {}, steps=18)["sigmas"]
    assert sigmas[-1] == 0 and math.isclose(sigmas[0], 80, rel_tol=64 * 2.0**-52)
    assert math.isclose(sigmas[-2], 0.002, rel_tol=64 * 2.0**-52)
