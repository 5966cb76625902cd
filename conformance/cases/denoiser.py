"""Cases of chapter 4: the whole network, with generic weights.

Expected values: two frozen vectors made from the reference, and the equations written out in NumPy for a network of
another shape. The NumPy form also checks the frozen vectors, in the tests.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from conformance.adapter import Array, Arrays
from conformance.case import Case
from conformance.cases.attention import block, block_shapes, draw_weights, modulate, silu
from conformance.cases.memory import compress, linear
from conformance.cases.tokenisation import fourier, patchify, unpatchify
from conformance.tolerance import Bound, MustReject, Ulp, chain_bound
from conformance.vectors import Recipe

__all__ = ["RECIPES", "cases", "denoise", "storm_shapes"]

Config = Mapping[str, Any]


def storm_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights, those of the reference's state dict."""
    c, d, octaves = config, config["width"], config["position_octaves"]
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
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    shapes |= {"embed_position.weight": (d, 2 * c["position_features"] * octaves), "embed_age.weight": (d, 2 * octaves)}
    shapes |= {"memory.query": (c["heads"], d // c["heads"]), "memory.key.weight": (d, d)}
    for layer in range(c["depth"]):
        shapes |= {f"blocks.{layer}.{k}": v for k, v in block_shapes(d, c["heads"], c["mlp_ratio"]).items()}
    return shapes


def _noise_embedding(inputs: Arrays, sigma: Array, config: Config) -> Array:
    """[NET-1]."""
    wave = [2 * math.pi * 2 ** (j / 8 - 2) for j in range(config["noise_features"] // 2)]
    phase = np.stack([np.log(sigma) / 4 * f for f in wave], -1)
    features = np.concatenate([np.sin(phase), np.cos(phase)], -1)
    return linear(inputs, "embed_noise.2", silu(linear(inputs, "embed_noise.0", features)))


def denoise(inputs: Arrays, config: Config, periodic: bool) -> Array:
    """[NET-1] to [NET-5]: D(x; sigma), [b, C, H, W]."""
    x, sigma, position = inputs["x"], inputs["sigma"], inputs["position"]
    (b, _, _, _), (rows, cols) = x.shape, position.shape[:2]
    memory = compress(inputs, config).reshape(b, rows * cols, -1)
    patch, sd = tuple(config["patch"]), config["sigma_data"]
    s = sigma[:, None, None, None]
    total = s**2 + sd**2
    t = linear(inputs, "embed_state", patchify(np.concatenate([x / np.sqrt(total), inputs["static"]], 1), patch))
    t = t + linear(inputs, "embed_position", fourier(position.reshape(rows * cols, -1), config["position_octaves"]))
    e = _noise_embedding(inputs, sigma, config)
    radius = config["window"]
    window = None if radius is None else {"rows": rows, "cols": cols, "radius": radius, "periodic": periodic}
    for layer in range(config["depth"]):
        prefix = f"weights.blocks.{layer}."
        own = {"weights." + name.removeprefix(prefix): v for name, v in inputs.items() if name.startswith(prefix)}
        t = block(own, t, memory, e, sigma, window)
    shift, scale = np.split(linear(inputs, "final_adaptive", silu(e)), 2, -1)
    raw = unpatchify(linear(inputs, "final", modulate(t, shift, scale)), patch, rows)
    result: Array = sd**2 / total * x + s * sd / np.sqrt(total) * raw
    return result


def _config(**changes: Any) -> dict[str, Any]:
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


def _inputs(
    seed: int, config: Config, grid: tuple[int, int], sigma: list[float], age: list[list[float]]
) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    b, k, c, s = len(sigma), len(age[0]), config["channels"], config["static_channels"]
    cells = (grid[0] // config["patch"][0], grid[1] // config["patch"][1])
    fields = {
        "x": rng.standard_normal((b, c, *grid)) * (1 + np.array(sigma))[:, None, None, None],
        "static": rng.standard_normal((b, s, *grid)),
        "past": rng.standard_normal((b, k, c, *grid)),
        "past_static": rng.standard_normal((b, k, s, *grid)),
        "position": rng.uniform(-1, 1, (*cells, config["position_features"])),
    }
    return draw_weights(storm_shapes(config), rng) | fields | {"sigma": np.array(sigma), "age": np.array(age)}


GENERIC: dict[str, Any] = {"config": _config(), "periodic": True, "chunk": 2}
WINDOWED: dict[str, Any] = {
    "config": _config(window=1, depth=1, width=8, position_features=1),
    "periodic": True,
    "chunk": 16,
}
RECTANGLE: dict[str, Any] = {
    "config": _config(
        patch=[1, 3], channels=1, static_channels=2, heads=4, sigma_data=0.5, mlp_ratio=2, position_features=2
    ),
    "periodic": False,
    "chunk": 1,
}


def _tolerance(params: Mapping[str, Any], inputs: Arrays) -> Bound:
    return chain_bound(lambda a: denoise(a, params["config"], params["periodic"]), dict(inputs), "the whole network")


RECIPES = (
    Recipe(
        "denoiser/generic-weights",
        "denoise",
        ("NET-1", "NET-2", "NET-3", "NET-4", "NET-5", "TOK-4"),
        GENERIC,
        "right parts, if the chapters before pass, are wired wrongly: noise embedding, order of blocks, last layer",
        lambda: _inputs(400, GENERIC["config"], (4, 8), [0.05, 20.0], [[6.0, 12.0, 24.0], [1.0, 3.0, 100.0]]),
        lambda inputs: _tolerance(GENERIC, inputs),
    ),
    Recipe(
        "denoiser/windowed",
        "denoise",
        ("NET-3", "ATT-6"),
        WINDOWED,
        "the window or the closing of the columns does not reach the blocks",
        lambda: _inputs(401, WINDOWED["config"], (8, 10), [0.7], [[6.0, 12.0]]),
        lambda inputs: _tolerance(WINDOWED, inputs),
    ),
)


def _fresh() -> Case:
    """Zero output layer: F = 0, so that D = c_skip x whatever the rest; sigma chosen so that c_skip is exact."""
    inputs = _inputs(402, GENERIC["config"], (4, 8), [1.0, 1.0], [[6.0], [6.0]])
    inputs |= {name: np.zeros_like(inputs[name]) for name in ("weights.final.weight", "weights.final.bias")}
    return Case(
        "denoiser/fresh",
        "denoise",
        ("NET-5", "EDM-1"),
        Ulp(2, "c_skip = 1/2 exactly; one product, one sum with 0"),
        "the skip connection is missing, or takes c_in x instead of x",
        inputs,
        GENERIC,
        {"denoised": inputs["x"] / 2},
    )


def _refusals() -> list[Case]:
    valid = _inputs(403, GENERIC["config"], (4, 8), [0.5], [[6.0, 12.0]])

    def case(name: str, requirement: str, why: str, meaning: str, **change: Array) -> Case:
        return Case(
            f"denoiser/{name}",
            "denoise",
            (requirement,),
            MustReject(why),
            meaning,
            valid | change,
            GENERIC,
            neighbour=(valid, GENERIC),
        )

    return [
        case(
            "refuses-other-grid",
            "NET-6",
            "the state has 6 rows where the positions are of 4",
            "a state of another grid is broadcast or cropped",
            x=np.ones((1, 2, 6, 8)),
        ),
        case(
            "refuses-other-past",
            "NET-6",
            "the past frames have 4 columns where the state has 8",
            "past frames of another grid are broadcast or cropped",
            past=valid["past"][..., :4],
            past_static=valid["past_static"][..., :4],
        ),
        case(
            "refuses-missing-static",
            "NET-6",
            "a static field is missing",
            "missing static fields pass unnoticed",
            static=valid["static"][:, :0],
        ),
        case(
            "refuses-zero-sigma",
            "EDM-2",
            "sigma = 0 has no logarithm",
            "sigma = 0 reaches the logarithm of c_noise",
            sigma=np.array([0.0]),
        ),
    ]


def cases() -> list[Case]:
    """Frozen networks, one in NumPy, the skip connection alone, and shapes that do not fit."""
    rectangle = _inputs(404, RECTANGLE["config"], (3, 9), [2.0, 0.1], [[6.0], [48.0]])
    expected = denoise(rectangle, RECTANGLE["config"], False)
    return [
        *(recipe.case() for recipe in RECIPES),
        Case(
            "denoiser/rectangular-patch",
            "denoise",
            ("NET-1", "NET-2", "NET-4", "NET-5"),
            _tolerance(RECTANGLE, rectangle),
            "sigma_data is not used everywhere, or patch and position sizes are mixed up",
            rectangle,
            RECTANGLE,
            {"denoised": expected},
        ),
        _fresh(),
        *_refusals(),
    ]
