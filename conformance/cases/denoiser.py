"""Cases of chapter 4: the whole network with generic weights, its first and last parts, sizes, and what it refuses.

Expected values: counts of weights in closed form; D = c_skip x for a network whose last layer is zero, in fractions;
what is generic is the reference's.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from conformance.adapter import Array
from conformance.judging.case import Chain, Recipe
from conformance.judging.inputs import config, draw, network_inputs, scaled, shapes, weights
from conformance.judging.tolerance import Exact, MustReject, Ulp

__all__ = ["count", "network_recipe", "recipes", "skip_recipe"]

CORE = ("core",)
NETWORK = Chain("the whole network: embeddings, memory, blocks, last layer, preconditioning")
AGES = [[6.0, 12.0, 30.0]]


def network_recipe(
    name: str,
    seed: int,
    grid: tuple[int, int],
    sigma: Sequence[float],
    meaning: str,
    age: Sequence[Sequence[float]] | None = None,
    chunk: int = 2,
    periodic: bool = False,
    profiles: tuple[str, ...] = CORE,
    requirements: tuple[str, ...] = (),
    targets: tuple[str, ...] = (),
    factors: Mapping[str, float] | None = None,
    change: Mapping[str, Array] | None = None,
    dtype: str | None = None,
    **changes: Any,
) -> Recipe:
    """`denoise` with generic weights. `factors` scale weights by the end of their names, `change` replaces inputs."""
    c = config(**{"width": 6, "depth": 1, **changes})
    inputs = network_inputs(c, grid, sigma, age or AGES * len(sigma), seed)
    inputs = scaled(inputs, **(factors or {})) | dict(change or {})
    params = {"config": c, "chunk": chunk, "periodic": periodic}
    cited = ("NET-2", "NET-3", "NET-4", "NET-5", *requirements)
    return Recipe(
        f"{name}",
        "denoise",
        requirements=cited,
        profiles=profiles,
        judge=NETWORK,
        meaning=meaning,
        inputs=inputs,
        params=params,
        targets=targets,
        dtype=dtype,
    )


def _wholes() -> list[Recipe]:
    """Networks of all shapes."""
    return [
        network_recipe(
            "denoiser/generic-weights", 400, (4, 8), [0.05, 20.0],
            "right parts, if the chapters before pass, are wired wrongly: noise embedding, order of blocks, last layer",
            [[6, 12, 24], [1, 3, 100]], periodic=True, profiles=("smoke", "core"), requirements=("NET-1", "TOK-4"),
            width=8, depth=2,
            targets=(
                "gate_reversed", "blocks_reversed", "silu_twice", "final_scale_shift", "gelu_tanh", "adaptive_order",
            ),
        ),
        network_recipe(
            "denoiser/rectangular-patch", 404, grid=(3, 9), sigma=[2.0, 0.1],
            meaning="sigma_data is not used everywhere, or patch and position sizes are mixed up", age=[[6], [48]],
            chunk=1, patch=[1, 3], channels=1, static_channels=2, width=8, heads=4, sigma_data=0.5, mlp_ratio=2,
            position_features=2, targets=("sigma_data_one", "unpatchify_columns"),
        ),
        network_recipe(
            "denoiser/tall-patch", 405, (6, 4), [0.7],
            "without static fields, with one head or a tall patch, a dimension is dropped or exchanged", patch=[3, 1],
            channels=3, static_channels=0, heads=1, depth=3, width=6, mlp_ratio=1, position_features=1,
        ),
        network_recipe(
            "denoiser/single-points", 406, (3, 5), [1.3], "a token of one grid point is not handled as any other",
            patch=[1, 1], channels=1, position_octaves=5, targets=("unpatchify_columns",),
        ),
        network_recipe(
            "denoiser/one-token", 407, (2, 2), [0.4], "a grid of one token is squeezed, or sees what is not there",
            [[6]], width=6, heads=3,
        ),
        network_recipe(
            "denoiser/deep", 408, (4, 4), [1.5], "blocks share weights or gates, or are taken in another order",
            depth=4, width=4, targets=("blocks_shared", "blocks_reversed", "first_block_only"),
        ),
        network_recipe(
            "denoiser/many-heads", 409, (4, 4), [3.0],
            "heads are cut by stride, scores are scaled by the width, or noise features have other frequencies",
            width=10, heads=5, noise_features=64, requirements=("NET-1",), factors={"query__weight": 2},
            targets=("heads_interleaved", "attention_scale_width", "noise_frequencies"),
        ),
        network_recipe(
            "denoiser/many-frames", 410, grid=(2, 6), sigma=[10.0],
            meaning="a long history of irregular ages is cut, padded, or weighted by chunk",
            age=[[1, 2, 3.3, 5.7, 6, 9, 12, 15, 18, 24, 30, 36, 48, 72, 168, 720, 8760]], chunk=5, channels=1,
            position_octaves=5, factors={"memory__query": 4},
            targets=("last_chunk_dropped", "age_in_days", "memory_not_rescaled"),
        ),
        network_recipe(
            "denoiser/own-conditions", 411, (4, 4), [0.5, 0.5, 9.0],
            "samples of a batch share a noise level, static fields or history that each should have for itself",
            [[6, 12], [7, 30], [1, 90]], requirements=("NET-6",),
            targets=("static_of_first_sample", "sigma_of_first_sample", "memory_of_first_sample"),
        ),
    ]  # fmt: skip


def _windows() -> list[Recipe]:
    needs = ("ATT-6",)
    small: dict[str, Any] = {"width": 4, "position_features": 1, "position_octaves": 2}
    return [
        network_recipe(
            "denoiser/windowed", 420, (6, 10), [0.7],
            "the window or the closing of the columns does not reach the blocks",
            periodic=True, window=1, requirements=needs, **small, targets=("window_not_periodic", "window_self_only"),
        ),
        network_recipe(
            "denoiser/windowed-closed", 421, (5, 6), [0.7],
            "a region's window wraps around, is of another shape, or serves the first block alone",
            window=1, patch=[1, 2], depth=2, requirements=needs, **small,
            targets=("window_always_periodic", "window_column_major"),
        ),
        network_recipe(
            "denoiser/window-of-one", 422, (4, 6), [2.5], "a window of radius 0 is taken for no window",
            periodic=True, window=0, requirements=needs, **small, targets=("window_forgotten",),
        ),
        network_recipe(
            "denoiser/window-around", 423, (12, 8), [0.3],
            "a window that goes round the globe counts tokens twice, or wraps from pole to pole",
            periodic=True, window=2, requirements=needs, **small, targets=("window_duplicates", "window_rows_wrap"),
        ),
        network_recipe(
            "denoiser/window-two", 424, (7, 6), [1.0],
            "the radius is counted in grid points, or one too small or too wide",
            window=2, patch=[1, 1], channels=1, requirements=needs, **small,
            targets=("window_radius_minus_one", "window_euclidean", "window_in_points"),
        ),
    ]  # fmt: skip


def _levels() -> list[Recipe]:
    return [
        network_recipe(
            "denoiser/least-noise", 430, (4, 4), [0.002],
            "at the last noise level the skip connection loses digits, or the gate is not spatial",
            requirements=("NET-1", "ATT-4"), targets=("gate_reversed", "skip_narrow"),
        ),
        network_recipe(
            "denoiser/most-noise", 431, (4, 4), [80.0],
            "at the first noise level static fields or past are scaled by c_in, or the gate is not temporal",
            requirements=("NET-1", "ATT-4", "TOK-4", "TOK-5"),
            targets=("static_times_c_in", "past_times_c_in", "gate_reversed"),
        ),
        network_recipe(
            "denoiser/other-data-scale", 432, (2, 4), [0.25, 5.0],
            "sigma_data is taken for 1, or squared once too often",
            sigma_data=2.5, requirements=("EDM-2",), targets=("sigma_data_one",),
        ),
        network_recipe(
            "denoiser/gates-shut", 433, (2, 6), [1e-4], "a gate that is 0 still lets the memory through", age=[[6, 9]],
            requirements=("ATT-4",), factors={"gate_alpha": 16}, targets=("gate_reversed", "gate_without_softplus"),
        ),
        network_recipe(
            "denoiser/gates-open", 434, (2, 6), [1e4], "a gate that is 1 still lets self-attention through",
            age=[[6, 9]],
            requirements=("ATT-4",), factors={"gate_alpha": 16}, targets=("gate_reversed", "gate_without_softplus"),
        ),
        network_recipe(
            "denoiser/steep-gates", 435, (2, 4), [1.0],
            "softplus of a large alpha overflows, or is cut off too early",
            requirements=("ATT-4",), heads=4, width=4, targets=("softplus_threshold",),
            change={  # ln sigma is 0: a gate of 1/2 where softplus is finite, 0 inf = NaN where it is not
                "weights.blocks.0.gate_alpha": np.array([1024.0, 128, 20.5, 21.5]),
                "weights.blocks.0.gate_beta": np.array([0.0, 0, 0.0625, -0.0625]),
            },
        ),
    ]  # fmt: skip


FAINT = {
    "embed_state__weight": 2.0**-10,
    "embed_state__bias": 2.0**-10,
    "embed_position__weight": 2.0**-10,
    "memory__out__weight": 2.0**-10,
    "memory__out__bias": 2.0**-10,
    "spatial__out__weight": 2.0**-10,
    "spatial__out__bias": 2.0**-10,
    "temporal__out__weight": 2.0**-10,
    "temporal__out__bias": 2.0**-10,
    "mlp__2__weight": 2.0**-10,
    "mlp__2__bias": 2.0**-10,
}


def _extremes() -> list[Recipe]:
    return [
        network_recipe(
            "denoiser/faint-tokens", 440, (4, 4), [0.8],
            "layer norm, here of tokens of size 1e-3, has another eps than 1e-6, or has it outside the root",
            requirements=("ATT-2", "NUM-6"), factors=FAINT, targets=("layer_norm_eps", "layer_norm_eps_outside"),
        ),
        network_recipe(
            "denoiser/offset-tokens", 443, (4, 4), [0.8],
            "layer norm takes the variance as mean square minus squared mean, and loses the digits of an offset",
            requirements=("ATT-2", "NUM-6"), targets=("layer_norm_quick_variance",),
            change={"weights.embed_state.bias": np.full(8, 1024.0)}, width=8,
        ),
        network_recipe(
            "denoiser/sharp-attention", 441, (4, 4), [0.3],
            "scores of some thousands overflow or lose their differences",
            requirements=("ATT-1",), factors={"query__weight": 2048}, targets=("attention_not_shifted",),
        ),
        network_recipe(
            "denoiser/loud-modulation", 442, (4, 4), [0.6], "silu or the modulation is clipped, doubled or left out",
            requirements=("ATT-2", "NET-4"), targets=("silu_twice", "silu_missing", "scale_without_one"),
            factors={"embed_noise__2__weight": 4, "embed_noise__2__bias": 4, "final_adaptive__weight": 2},
        ),
    ]  # fmt: skip


def _shared() -> list[Recipe]:
    """A batch of 1 that serves all samples."""
    c = config(width=6, depth=1)
    full = network_inputs(c, (4, 4), [0.2, 1.0, 30.0], [[6.0, 24.0]] * 3, 450)
    past = ("past", "past_static", "age")
    meaning = "a batch of 1 that serves all samples is refused, or served to the first alone"

    def shares(name: str, *shared: str) -> Recipe:
        inputs = full | {key: full[key][:1].copy() for key in shared}
        params = {"config": c, "chunk": 2, "periodic": False}
        return Recipe(
            f"denoiser/{name}",
            "denoise",
            requirements=("NET-6", "NET-5"),
            profiles=CORE,
            judge=NETWORK,
            meaning=meaning,
            inputs=inputs,
            params=params,
        )

    return [
        shares("shared-condition", "static", *past),
        shares("shared-past", *past),
        shares("shared-static", "static"),
    ]


def _skip(x: float, sigma: float, sigma_data: float) -> float:
    """c_skip x in fractions, rounded once."""
    square = Fraction(sigma_data) ** 2
    return float(square / (Fraction(sigma) ** 2 + square) * Fraction(x))


def skip_recipe(
    name: str, sigma: Sequence[float], profiles: tuple[str, ...], dtype: str | None = None, sigma_data: float = 1.0
) -> Recipe:
    """Zero output layer: F = 0, so that D = c_skip x whatever the rest, in 53 bits."""
    c = config(width=4, depth=1, sigma_data=sigma_data)
    inputs = network_inputs(c, (2, 4), sigma, [[6.0]] * len(sigma), 402)
    inputs |= {name: np.zeros_like(inputs[name]) for name in ("weights.final.weight", "weights.final.bias")}
    rows = zip(inputs["x"], sigma, strict=True)
    expected = np.stack([[[[_skip(v, s, sigma_data) for v in row] for row in field] for field in x] for x, s in rows])
    return Recipe(
        name, "denoise", requirements=("NET-5", "EDM-1", "NUM-9", "CONV-9"), profiles=profiles,
        judge=Ulp(6, "c_skip within 4 ULP, one product, and a sum with 0"),
        meaning="the skip connection is missing, takes c_in x instead of x, or x passes through the network's dtype",
        inputs=inputs, params={"config": c, "chunk": 1, "periodic": True}, expected={"denoised": expected},
        targets=("skip_narrow", "skip_missing"), dtype=dtype,
    )  # fmt: skip


def _parts() -> list[Recipe]:
    rng = np.random.default_rng(460)
    noise = config(width=8, noise_features=64)
    few = config(width=4, noise_features=2)
    last = config(width=8, patch=[1, 3], channels=2)
    levels = [0.002, 0.3, 0.30000000003, 1.0, 80.0]

    def embedding(name: str, c: dict[str, Any], meaning: str) -> Recipe:
        inputs = weights(shapes(c), rng, "embed_noise") | {"sigma": np.array(levels)}
        chain = Chain("a logarithm, sines and cosines, two layers with a silu between")
        return Recipe(
            f"denoiser/{name}",
            "noise_embedding",
            requirements=("NET-1",),
            profiles=CORE,
            judge=chain,
            meaning=meaning,
            inputs=inputs,
            params={"config": c},
        )

    tokens = {"tokens": draw(rng, 2, 6, 8), "embedding": draw(rng, 2, 8)}
    return [
        embedding(
            "noise-embedding", noise, "c_noise lacks its 1/4, frequencies are other powers, or a silu is missing"
        ),
        embedding("noise-embedding-narrow", few, "one sine and one cosine: another lowest frequency or cosines first"),
        Recipe(
            "denoiser/final",
            "final",
            requirements=("NET-4",),
            profiles=CORE,
            judge=Chain("a modulated layer norm and a linear map"),
            meaning="shift and scale are exchanged, the silu or the 1 is missing, "
            "or fields are put together by columns",
            inputs=weights(shapes(last), rng, "final") | tokens,
            params={"config": last, "rows": 3},
            targets=("final_scale_shift", "scale_without_one", "unpatchify_columns"),
        ),
    ]


def count(c: Mapping[str, Any]) -> int:
    """[NET-7], [ATT-7]: number of weights, 25 D^2 a block at ratio 4 besides vectors, added up by hand."""
    d, ratio, octaves = c["width"], c["mlp_ratio"], c["position_octaves"]
    points = c["patch"][0] * c["patch"][1]
    values = (c["channels"] + c["static_channels"]) * points
    embeddings = 2 * (values + 1) * d + 2 * c["position_features"] * octaves * d + 2 * octaves * d
    noise = (c["noise_features"] + 1) * d + (d + 1) * d
    memory = d + 3 * d * d + 2 * d  # query; key, value, out; two biases
    matrices = (4 + 4 + 9 + 2 * ratio) * d * d
    vectors = 6 * d + 9 * d + (ratio + 1) * d + 2 * c["heads"]
    final = 2 * (d + 1) * d + (d + 1) * c["channels"] * points
    return int(embeddings + noise + memory + c["depth"] * (matrices + vectors) + final)


def _counts() -> list[Recipe]:
    large = {"channels": 3, "static_channels": 3, "position_octaves": 6, "noise_features": 64}
    sizes = {
        "small": config(),
        "rectangle": config(
            patch=[1, 3], width=12, heads=3, depth=3, mlp_ratio=2, position_features=1, static_channels=0
        ),
        "10m": config(**large, width=256, heads=8, depth=6),
        "200m": config(**large, width=1024, heads=16, depth=8),
        "10b": config(**large, width=3072, heads=24, depth=40),
    }
    return [
        Recipe(
            f"denoiser/count-{name}", "count_weights", requirements=("NET-7", "ATT-7", "ATT-5"), profiles=CORE,
            judge=Exact("a count"),
            meaning="a bias too many (keys have none), another MLP ratio or number of modulations, or a layer missing",
            inputs={}, params={"config": c}, expected={"count": np.array(count(c), np.int64)},
            targets=("key_bias", "mlp_ratio"),
        )
        for name, c in sizes.items()
    ]  # fmt: skip


def _contradictions() -> list[Recipe]:
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "heads": ({"width": 16, "heads": 3}, "3 heads do not divide a width of 16"),
        "position": ({"position_features": 4}, "a position has 1, 2 or 3 coordinates, not 4"),
        "noise-features": ({"noise_features": 7}, "an odd number of noise features"),
        "data-scale": ({"sigma_data": 0.0}, "sigma_data is zero"),
        "static": ({"static_channels": -1}, "a negative number of static fields"),
        "radius": ({"window": -1}, "a negative window radius"),
        "depth": ({"depth": 0}, "a network without blocks"),
        "patch": ({"patch": [2, 0]}, "a patch without columns"),
    }
    return [
        Recipe(
            f"denoiser/refuses-config-{name}", "count_weights", requirements=("CONV-12",), profiles=CORE,
            judge=MustReject(why), meaning="a configuration whose sizes contradict one another passes", inputs={},
            params={"config": config(**change)}, valid_counterpart=({}, {"config": config()}),
        )
        for name, (change, why) in wrong.items()
    ]  # fmt: skip


def _refusals() -> list[Recipe]:
    c = config(width=2, heads=1, depth=1, mlp_ratio=1, noise_features=2, position_octaves=1)
    valid = network_inputs(c, (4, 4), [0.5, 2.0, 3.0], [[6.0, 12.0]] * 3, 403)
    params: dict[str, Any] = {"config": c, "chunk": 1, "periodic": False}

    def refuses(
        name: str, requirement: str, why: str, meaning: str, settings: Mapping[str, Any] | None = None, **change: Array
    ) -> Recipe:
        other = params if settings is None else params | {"config": c | dict(settings)}
        return Recipe(
            f"denoiser/refuses-{name}", "denoise", requirements=(requirement, "CONV-10"), profiles=CORE,
            judge=MustReject(why), meaning=meaning, inputs=valid | change, params=other,
            valid_counterpart=(valid, params),
        )  # fmt: skip

    past: dict[str, Any] = {key: valid[key][:2].copy() for key in ("past", "past_static", "age")}
    return [
        refuses(
            "other-grid", "NET-6", "the state has 6 rows where the positions are of 4",
            "a state of another grid is broadcast or cropped", x=np.ones((3, 2, 6, 4)),
        ),
        refuses(
            "broken-patch", "TOK-1", "the state has 5 columns, not whole patches of 2",
            "columns that fill no patch are cropped", x=np.ones((3, 2, 4, 5)), static=np.ones((3, 1, 4, 5)),
        ),
        refuses(
            "other-past", "NET-6", "the past frames have 2 columns where the state has 4",
            "past frames of another grid are broadcast or cropped", past=valid["past"][..., :2].copy(),
            past_static=valid["past_static"][..., :2].copy(),
        ),
        refuses(
            "missing-static", "NET-6", "a static field is missing", "missing static fields pass unnoticed",
            static=valid["static"][:, :0],
        ),
        refuses(
            "other-channels", "NET-6", "the state has one channel of two",
            "a channel is broadcast to those that are missing",
            x=valid["x"][:, :1].copy(),
        ),
        refuses(
            "static-for-two", "NET-6", "static fields are of 2 samples, the state of 3",
            "fields of another batch are broadcast, cut or repeated", static=valid["static"][:2].copy(),
        ),
        refuses(
            "past-for-two", "NET-6", "the past is of 2 samples, the state of 3",
            "a history of another batch is broadcast, cut or repeated", **past,
        ),
        refuses(
            "other-position", "NET-6", "positions have two coordinates where the network takes three",
            "positions of another kind pass", position=valid["position"][..., :2].copy(),
        ),
        refuses("zero-sigma", "EDM-2", "sigma = 0 has no logarithm", "sigma = 0 reaches the logarithm of c_noise",
                sigma=np.array([0.5, 0.0, 3.0])),
        refuses("negative-sigma", "EDM-2", "a noise level is negative", "a negative sigma is squared or clamped",
                sigma=np.array([0.5, 2.0, -3.0])),
        refuses("negative-age", "CONV-4", "a frame is of the future", "the sign of an age is ignored",
                age=np.array([[6.0, 12.0]] * 2 + [[6.0, -12.0]])),
        refuses("data-scale", "CONV-12", "sigma_data is negative", "sigma_data is only ever squared",
                {"sigma_data": -1.0}),
        refuses("window", "CONV-12", "a window has radius -1", "a negative radius is taken for none", {"window": -1}),
    ]  # fmt: skip


def recipes() -> list[Recipe]:
    """Whole networks of many shapes, windows and noise levels; parts; counts; what does not fit."""
    skip = skip_recipe("denoiser/fresh", [1.0, 0.3, 40.0], CORE)
    return [
        *_wholes(), *_windows(), *_levels(), *_extremes(), *_shared(), skip, *_parts(), *_counts(), *_contradictions(),
        *_refusals(),
    ]  # fmt: skip
