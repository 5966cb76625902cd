"""Inputs of cases and laws: configurations of small networks, generic weights, states and histories.

Generic means drawn away from zero, [NUM-6]: a zero gate would hide whatever stands behind it. Narrow arrays are
representable in bfloat16.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conformance.adapter import Array
from conformance.protocol.operations import round_to

__all__ = [
    "block_shapes",
    "compress_inputs",
    "config",
    "copying_weights",
    "draw",
    "network_inputs",
    "past_inputs",
    "scaled",
    "shapes",
    "state_inputs",
    "weights",
]

Config = Mapping[str, Any]


def draw(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    """Standard normal numbers times `scale`, rounded to bfloat16 so that one set of inputs serves every dtype."""
    return round_to(scale * rng.standard_normal(shape), "bfloat16")


def config(**changes: Any) -> dict[str, Any]:
    """A configuration of two blocks, width 16, two channels and a static field, with changes."""
    standard = {
        "channels": 2,
        "static_channels": 1,
        "patch": [2, 2],
        "width": 16,
        "heads": 2,
        "depth": 2,
        "mlp_ratio": 4,
        "position_features": 3,
        "position_octaves": 3,
        "noise_features": 8,
        "window": None,
        "sigma_data": 1.0,
    }
    return standard | changes


def block_shapes(width: int, heads: int, ratio: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a block's weights; keys have no bias, [ATT-5]."""
    by_name: dict[str, tuple[int, ...]] = {"adaptive.weight": (9 * width, width), "adaptive.bias": (9 * width,)}
    for name in ("spatial", "temporal"):
        for part in ("query", "key", "value", "out"):
            by_name[f"{name}.{part}.weight"] = (width, width)
            if part != "key":
                by_name[f"{name}.{part}.bias"] = (width,)
    by_name |= {"mlp.0.weight": (ratio * width, width), "mlp.0.bias": (ratio * width,)}
    by_name |= {"mlp.2.weight": (width, ratio * width), "mlp.2.bias": (width,)}
    return by_name | {"gate_alpha": (heads,), "gate_beta": (heads,)}


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of a network."""
    d, octaves = c["width"], c["position_octaves"]
    points = c["patch"][0] * c["patch"][1]
    values = (c["channels"] + c["static_channels"]) * points
    linears = {
        "embed_state": (d, values),
        "embed_history": (d, values),
        "embed_noise.0": (d, c["noise_features"]),
        "embed_noise.2": (d, d),
        "memory.value": (d, d),
        "memory.out": (d, d),
        "final_adaptive": (2 * d, d),
        "final": (c["channels"] * points, d),
    }
    by_name: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linears.items()}
    by_name |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    by_name["embed_position.weight"] = (d, 2 * c["position_features"] * octaves)
    by_name["embed_age.weight"] = (d, 2 * octaves)
    by_name["memory.query"] = (c["heads"], d // c["heads"])
    by_name["memory.key.weight"] = (d, d)
    for layer in range(c["depth"]):
        by_name |= {f"blocks.{layer}.{k}": v for k, v in block_shapes(d, c["heads"], c["mlp_ratio"]).items()}
    return by_name


def weights(by_name: Mapping[str, tuple[int, ...]], rng: np.random.Generator, *prefixes: str) -> dict[str, Array]:
    """Draw `weights.NAME` for every shape whose name begins with one of the prefixes, or for all without prefixes.

    Matrices are N(0, 1 / fan_in), vectors N(0, 1/4).
    """
    return {
        f"weights.{name}": draw(rng, *shape, scale=shape[-1] ** -0.5 if len(shape) > 1 else 0.5)
        for name, shape in by_name.items()
        if not prefixes or name.startswith(prefixes)
    }


def _cells(c: Config, grid: tuple[int, int]) -> tuple[int, int]:
    return grid[0] // c["patch"][0], grid[1] // c["patch"][1]


def state_inputs(c: Config, grid: tuple[int, int], batch: int, rng: np.random.Generator) -> dict[str, Array]:
    """Draw `static` and `position` of a state on the grid."""
    return {
        "static": draw(rng, batch, c["static_channels"], *grid),
        "position": rng.uniform(-1, 1, (*_cells(c, grid), c["position_features"])),
    }


def past_inputs(
    c: Config, grid: tuple[int, int], age: Sequence[Sequence[float]], rng: np.random.Generator
) -> dict[str, Array]:
    """Draw `past`, `past_static` and `age` of frames of these ages in hours, [b][k]."""
    lead = (len(age), len(age[0]))
    return {
        "past": draw(rng, *lead, c["channels"], *grid),
        "past_static": draw(rng, *lead, c["static_channels"], *grid),
        "age": np.array(age, dtype=np.float64),
    }


def network_inputs(
    c: Config, grid: tuple[int, int], sigma: Sequence[float], age: Sequence[Sequence[float]], seed: int
) -> dict[str, Array]:
    """Draw all inputs of `denoise`: x of the size that each noise level gives it, everything else generic."""
    rng = np.random.default_rng(seed)
    levels = np.array(sigma, dtype=np.float64)
    x = (1 + levels)[:, None, None, None] * rng.standard_normal((len(levels), c["channels"], *grid))
    return (
        weights(shapes(c), rng)
        | state_inputs(c, grid, len(levels), rng)
        | past_inputs(c, grid, age, rng)
        | {"x": x, "sigma": levels}
    )


def compress_inputs(c: Config, grid: tuple[int, int], age: Sequence[Sequence[float]], seed: int) -> dict[str, Array]:
    """Draw all inputs of `compress` and `embed_history`, generic; only the weights that these need."""
    rng = np.random.default_rng(seed)
    position = {"position": rng.uniform(-1, 1, (*_cells(c, grid), c["position_features"]))}
    drawn = weights(shapes(c), rng, "embed_history", "embed_position", "embed_age", "memory")
    return drawn | past_inputs(c, grid, age, rng) | position


def copying_weights(c: Config, **matrices: Array) -> dict[str, Array]:
    """Make weights of `compress` that move numbers instead of mixing them.

    The key, value and output projections are the identity, and everything else is zero unless `matrices` names it, with
    __ for the dots. With one frame the memory is then the history token itself, whatever the dtype, without rounding.
    """
    prefixes = ("embed_history", "embed_position", "embed_age", "memory")
    by_name = {f"weights.{name}": np.zeros(shape) for name, shape in shapes(c).items() if name.startswith(prefixes)}
    for part in ("key", "value", "out"):
        by_name[f"weights.memory.{part}.weight"] = np.eye(c["width"])
    for name, value in matrices.items():
        key = f"weights.{name.replace('__', '.')}"
        if by_name[key].shape != value.shape:
            raise ValueError(f"{key} has shape {by_name[key].shape}, got {value.shape}")
        by_name[key] = np.asarray(value, np.float64)
    return by_name


def scaled(inputs: Mapping[str, Array], **factors: float) -> dict[str, Array]:
    """Multiply every weight whose name ends as a key does, with __ for the dots, by the key's factor.

    Factors are powers of two, so that bfloat16 still holds the products.
    """
    products = dict(inputs)
    for ending, factor in factors.items():
        names = [name for name in products if name.endswith("." + ending.replace("__", "."))]
        if not names:
            raise ValueError(f"no weight's name ends with {ending}")
        products |= {name: factor * products[name] for name in names}
    return products
