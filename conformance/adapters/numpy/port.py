"""An independent port in NumPy: every operation written from the text of spec/ and the table in ../README.md alone.

It exists to be a second opinion. Expected values that come from the reference would hold its errors too; this port
knows neither the reference nor PyTorch, shares no line with it, and has to agree with every one of them. So it is naive
on purpose: one function an equation, loops where they are plain, derivatives by complex steps.

numpy_tokens.py has chapters 1 and 2, numpy_network.py 3 and 4, numpy_tiling.py 5, numpy_sampling.py 6 to 8,
numpy_verification.py the scores, numpy_derivatives.py the derivatives, numpy_cost.py the counts, numpy_checks.py the
refusals. Here they get the names and the arrays of the operations.

It runs in float64 and float32. In float32 the network and its derivatives are float32 (complex64), all else float64.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from conformance.adapter import Array, Arrays, Info, Params, Unsupported
from conformance.adapters.numpy import checks as check
from conformance.adapters.numpy import cost, sampling, tiling
from conformance.adapters.numpy import network as net
from conformance.adapters.numpy import tokens as tok
from conformance.adapters.numpy import verification as scores
from conformance.adapters.numpy.derivatives import gradients, jacobian
from conformance.protocol.operations import to_dtype

__all__ = ["NumpyPort", "adapter"]

DTYPES: dict[str, type[np.floating[Any]]] = {"float64": np.float64, "float32": np.float32}
PROFILES = ("smoke", "core", "tiling", "edm", "guidance", "train", "scores", "rng", "cost")

Operation = Callable[[Arrays, Params], Mapping[str, Any]]


# Parts of the network.


def weights_of(inputs: Arrays) -> dict[str, Array]:
    return {name.removeprefix("weights."): value for name, value in inputs.items() if name.startswith("weights.")}


PAST = ("embed_history", "embed_position", "embed_age", "memory")


def network_of(inputs: Arrays, params: Params, *needs: str) -> net.Network:
    """The network of a case. Weights of the parts that it needs (none named: of all) have to be there."""
    config, weights = tok.config_of(params["config"]), weights_of(inputs)
    shapes = tok.weight_shapes(config).items()
    tok.check_weights(weights, {name: size for name, size in shapes if name.startswith(needs or "") or name in weights})
    return net.Network(weights, config, DTYPES[params["dtype"]], bool(params.get("periodic", False)))


def mask_of(window: Mapping[str, Any] | None) -> Array | None:
    if window is None:
        return None
    return net.window_mask(window["rows"], window["cols"], window["radius"], bool(window["periodic"]))


def patchify(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    return {"tokens": tok.patchify(check.shape("x", inputs["x"], None, None, None, None), params["patch"])}


def unpatchify(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    tokens = check.shape("tokens", inputs["tokens"], None, None, None)
    return {"x": tok.unpatchify(tokens, params["patch"], params["rows"])}


def position(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    kind, length = params["kind"], params.get("length")
    return {"position": tok.position(inputs["latitude"], inputs["longitude"], kind, params["patch"], length)}


def embed(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    n = network_of(inputs, params, "embed_state", "embed_position")
    return {"tokens": tok.embed_state(inputs["x"], inputs["static"], inputs["position"], n.weights, n.config)}


def embed_history(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    n = network_of(inputs, params, *PAST[:3])
    return {"tokens": tok.embed_history(past_of(inputs), n.weights, n.config)}


def past_of(inputs: Arrays) -> tok.Past:
    return tok.Past(inputs["past"], inputs["past_static"], inputs["age"], inputs["position"])


def memory(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    return {"memory": tok.memory(inputs["score"], inputs["value"], params["chunks"])}


def compressed(inputs: Arrays, params: Params, network: net.Network) -> Array:
    return tok.compress(past_of(inputs), network.weights, network.config, params.get("chunk"))


def compress(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    return {"memory": compressed(inputs, params, network_of(inputs, params, *PAST))}


def gate(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    return {"gamma": net.gate(inputs["sigma"], inputs["alpha"], inputs["beta"])}


def attention(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    return {"y": net.attention(inputs["q"], inputs["k"], inputs["v"], mask_of(params.get("window")))}


def block(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    """The width is that of x, the MLP ratio that of its first weight."""
    x, weights, heads = check.shape("x", inputs["x"], None, None, None), weights_of(inputs), params["heads"]
    b, n, d = x.shape
    if d % check.integer("heads", heads):
        raise ValueError(f"the width {d} is no multiple of heads {heads}; let heads divide the width")
    ratio = len(weights["mlp.0.weight"]) // d
    tok.check_weights(weights, tok.block_shapes(d, heads, ratio))
    m = check.shape("memory", inputs["memory"], None, n, d)
    e, sigma = check.shape("embedding", inputs["embedding"], None, d), check.shape("sigma", inputs["sigma"], None)
    check.batch({"memory": m, "embedding": e, "sigma": sigma}, b)
    for name in ("x", "memory", "embedding"):
        check.finite(name, inputs[name])
    return {"y": net.block(x, m, e, sigma, weights, mask_of(params.get("window")))}


def noise_embedding(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    n = network_of(inputs, params, "embed_noise")
    return {"embedding": net.noise_embedding(inputs["sigma"], n.weights, n.config)}


def final(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    n = network_of(inputs, params, "final")
    tokens = check.shape("tokens", inputs["tokens"], None, None, n.config.width)
    e = check.shape("embedding", inputs["embedding"], None, n.config.width)
    check.batch({"embedding": e}, len(tokens))
    return {"raw": net.final(tokens, e, n.weights, n.config, params["rows"])}


def count_weights(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    shapes = tok.weight_shapes(tok.config_of(params["config"]))
    return {"count": np.array(sum(int(np.prod(shape)) for shape in shapes.values()), np.int64)}


# The denoiser, whole and in tiles, its loss and its derivatives.


def condition_of(inputs: Arrays, params: Params, network: net.Network) -> net.Condition:
    """Static fields, memory and position; the grid of the past is that of the static fields, [NET-6]."""
    grid, past = inputs["static"].shape[-2:], inputs["past"].shape[-2:]
    if past != grid:
        raise ValueError(f"past has the grid {list(past)}, static {list(grid)}; bring both to one grid")
    return net.Condition(inputs["static"], compressed(inputs, params, network), inputs["position"])


def denoise(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    network = network_of(inputs, params)
    return {"denoised": net.denoise(inputs["x"], inputs["sigma"], condition_of(inputs, params, network), network)}


def axes_of(params: Params) -> tuple[tiling.Axis, tiling.Axis]:
    return tiling.axis_of(params["y"]), tiling.axis_of(params["x"])


def denoise_tiled(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    """`together` may change nothing, [TILE-6]: here tiles go one by one."""
    check.integer("together", params.get("together", 1))
    network, (y, x) = network_of(inputs, params), axes_of(params)
    condition = condition_of(inputs, params, network)
    return {"denoised": tiling.blended_network(inputs["x"], inputs["sigma"], condition, network, y, x)}


def losses(inputs: Arrays, params: Params, network: net.Network, copies: int) -> Array:
    """The loss [copies], [EDM-3] and [EDM-11], of weights that may have one value a sample, copy by copy."""

    def repeated(value: Array) -> Array:
        each = np.broadcast_to(value, (samples, *value.shape[1:]))
        return np.tile(each, (copies,) + (1,) * (value.ndim - 1))

    clean, samples = check.finite("clean", inputs["clean"]), len(inputs["clean"])
    noise = check.finite("noise", check.shape("noise", inputs["noise"], *clean.shape))
    sigma = check.shape("sigma", inputs["sigma"], samples)
    valid = check.shape("valid", inputs.get("valid", np.ones(clean.shape, bool)), *clean.shape)
    if valid.dtype != bool or not valid.any():
        raise ValueError(f"valid is of {valid.dtype} and true at {valid.sum()} points; give true at one point or more")
    known = {name: inputs[name] for name in ("static", "past", "past_static", "age")}
    check.batch(known, samples)
    many = {name: repeated(value) for name, value in known.items()}
    noisy = repeated(clean + sigma[:, None, None, None] * noise)
    condition = condition_of({**many, "position": inputs["position"]}, params, network)
    error = net.denoise(noisy, repeated(sigma), condition, network) - repeated(clean)
    weight = net.precondition(sigma, network.config.sigma_data)["loss_weight"][:, None, None, None]
    each = weight * (error * error).reshape(copies, *clean.shape)
    return each[:, valid].sum(1) / valid.sum()  # type: ignore[no-any-return]


def loss(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    return {"loss": losses(inputs, params, network_of(inputs, params), 1)[0]}


def loss_gradients(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    network = network_of(inputs, params)

    def at(weights: Arrays, copies: int) -> Array:
        stepped = net.Network(weights, network.config, network.dtype, network.periodic)
        return losses(inputs, params, stepped, copies)

    by_weight = gradients(at, network.weights, len(inputs["clean"]))
    return {**loss(inputs, params), **{f"gradients.{name}": gradient for name, gradient in by_weight.items()}}


def guided_denoise(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    """[GUIDE-1] with D and J those of the blended T[D]."""
    check.integer("together", params.get("together", 1))
    network, (y, x) = network_of(inputs, params), axes_of(params)
    condition, sigma = condition_of(inputs, params, network), inputs["sigma"]
    state = check.shape("x", inputs["x"], None, network.config.channels, y.length, x.length)
    value, variance = check.variances(inputs["value"], inputs["variance"])
    points = sampling.LinearOperator.of_points(inputs["index"], inputs["weight"], len(value), state[0].size)
    weigh = sampling.weighting(params["method"], params)

    def blended(flat: Array, copies: int) -> Array:
        z = flat.reshape(-1, *state.shape[1:])

        def repeated(part: Array) -> Array:
            return part if len(part) == 1 else np.tile(part, (copies,) + (1,) * (part.ndim - 1))

        many = net.Condition(repeated(condition.static), repeated(condition.memory), condition.position)
        return tiling.blended_network(z, np.tile(sigma, copies), many, network, y, x).reshape(len(z), -1)

    means, jacobians = jacobian(blended, state.reshape(len(state), -1))
    guided = [
        sampling.guide(mean, j, float(s), points, value, variance, weigh)
        for mean, j, s in zip(means, jacobians, sigma, strict=True)
    ]
    return {"guided": np.array(guided).reshape(state.shape)}


# ShardedTiles.


def tile_geometry(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    axis = tiling.axis_of(params)
    sizes = np.array([len(extent) for extent in axis.extents])
    return {"cores": np.array(axis.cores), "sizes": sizes, "points": np.concatenate(axis.extents)}


def tile_weights(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    return {"weights": np.concatenate(tiling.axis_of(params).weights)}


def tiled_denoise(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    (y, x), z = axes_of(params), check.finite("x", inputs["x"])
    check.shape("x", z, None, None, y.length, x.length)
    field = check.shape("field", inputs["field"], *z.shape[1:])
    sigma = check.positive("sigma", check.shape("sigma", inputs["sigma"], len(z)))
    on_tile = tiling.dense_denoiser(sigma, params["own"], params["mean"], field)
    for _ in range(check.integer("evaluations", params["evaluations"])):
        z = tiling.blend(z, y, x, on_tile)
    return {"denoised": z}


# Sampling, guidance, assimilation.


def precondition(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    return net.precondition(inputs["sigma"], params["sigma_data"])


def schedule(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    given = {name: params[name] for name in ("sigma_min", "sigma_max", "rho") if name in params}
    return {"sigmas": sampling.schedule(params["steps"], **given)}


def prior_of(inputs: Arrays, members: Array) -> sampling.Gaussian:
    mean = check.shape("mean", inputs["mean"], None)
    check.finite("x", check.shape("members", members, None, len(mean)))
    return sampling.Gaussian(mean, inputs["covariance"])


def sampler_step(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    x, churn = inputs["x"], sampling.churn_of(params.get("churn"))
    sigma, following = float(params["sigma"]), float(params["next"])
    steps, prior = check.integer("steps", params["steps"]), prior_of(inputs, x)
    check.positive("sigma", sigma)
    return {"x": sampling.step(prior.denoise, x, sigma, following, steps, churn, inputs.get("noise"))}


def sample(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    prior, churn = prior_of(inputs, inputs["latents"]), sampling.churn_of(params.get("churn"))
    latents, sigmas = inputs["latents"], inputs["sigmas"]
    return {"samples": sampling.sample(prior.denoise, latents, sigmas, churn, inputs.get("noises"))}


def training_sigma(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    return {"sigma": np.exp(-1.2 + 1.2 * check.finite("normal", inputs["normal"]))}


def operator_of(inputs: Arrays, v: int) -> sampling.Operator:
    n = len(inputs["value"])
    if "pairs" in inputs:
        return sampling.PairNorms(inputs["pairs"], n, v)
    return sampling.LinearOperator(inputs["operator"], n, v)


def guided_mean(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    x, prior = inputs["x"], prior_of(inputs, inputs["x"])
    sigma = check.positive("sigma", check.shape("sigma", inputs["sigma"], len(x)))
    observe = operator_of(inputs, x.shape[1])
    guided = [
        sampling.guided_gaussian(prior, observe, inputs["value"], inputs["variance"], params["method"], params)(
            x[i : i + 1], float(sigma[i])
        )[0]
        for i in range(len(x))
    ]
    return {"guided": np.array(guided).reshape(x.shape)}


def assimilate(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    """`together` may change nothing, [DA-3]."""
    check.integer("together", params.get("together", 1))
    prior, observe = prior_of(inputs, inputs["latents"]), operator_of(inputs, inputs["latents"].shape[1])
    denoiser = sampling.guided_gaussian(
        prior, observe, inputs["value"], inputs["variance"], params.get("method"), params
    )
    latents, sigmas, churn = inputs["latents"], inputs["sigmas"], sampling.churn_of(params.get("churn"))
    return {"samples": sampling.sample(denoiser, latents, sigmas, churn, inputs.get("noises"))}


def analysis(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    """The whole of STORM, [DA-1], [DA-2], [TILE-7]: the sampler around the blended denoiser, guided or not."""
    latents, name = inputs["latents"], "guided" if params["method"] else "denoised"
    if "value" in inputs and not params["method"]:  # [DA-7]
        raise ValueError("there are observations and no method to use them by; give one, or no observations")
    evaluate = guided_denoise if params["method"] else denoise_tiled

    def denoiser(flat: Array, sigma: float) -> Array:
        given = {"x": flat.reshape(latents.shape), "sigma": np.full(len(flat), sigma)}
        denoised: Array = evaluate({**inputs, **given}, params)[name]
        return denoised.reshape(flat.shape)

    noises = inputs.get("noises")
    rows = None if noises is None else noises.reshape(*noises.shape[:2], -1)
    members = sampling.sample(
        denoiser, latents.reshape(len(latents), -1), inputs["sigmas"], sampling.churn_of(params.get("churn")), rows
    )
    return {"samples": members.reshape(latents.shape)}


def linear_cycle(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    means, covariances = sampling.linear_cycle(inputs)
    return {"means": means, "covariances": covariances}


def cycle(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    observed = params.get("observed", [True] * len(inputs["value"]))
    return {"states": sampling.cycle(inputs, observed, params.get("method"), params)}


def noise(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    names = ("seed", "analysis", "member", "shape", "draws")
    return {"noise": sampling.member_noise(*(params[name] for name in names))}


# Scores and counts.


def crps(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    return {"crps": scores.crps(inputs["members"], inputs["truth"], bool(params["fair"]))}


def spread_skill(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    given = [inputs.get(name) for name in ("weights", "mask")]
    values = scores.spread_skill(inputs["members"], inputs["truth"], *given)
    return dict(zip(("rmse", "spread", "ratio"), values, strict=True))


def average(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    return {"average": scores.average(inputs["score"], inputs.get("weights"), inputs.get("mask"))}


def area_weights(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    return {"weights": scores.area_weights(inputs["latitude"])}


def rank_histogram(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    return {"counts": scores.rank_histogram(inputs["members"], inputs["truth"], inputs.get("mask"), params["seed"])}


def multiply_adds(inputs: Arrays, params: Params) -> Mapping[str, Any]:
    config, (y, x) = tok.config_of(params["config"]), axes_of(params)
    grid, frames = params["grid"], check.integer("frames", params["frames"])
    if list(grid) != [y.length, x.length]:
        raise ValueError(f"the grid is {list(grid)}, the axes have {y.length} and {x.length} points; give one grid")
    rows, cols = tok.tokens_of(grid, config.patch)
    counts = {"compress": cost.compression(config, rows * cols, frames), "denoise": cost.tiled_evaluation(config, y, x)}
    return {name: np.array(count, np.int64) for name, count in counts.items()}


OPERATIONS: dict[str, Operation] = {
    function.__name__: function
    for function in (
        patchify, unpatchify, position, embed, embed_history, memory, compress, gate, attention, block,
        noise_embedding, final, count_weights, denoise, tile_geometry, tile_weights, tiled_denoise, denoise_tiled,
        precondition, schedule, sampler_step, sample, training_sigma, loss, guided_mean, guided_denoise, assimilate,
        analysis, linear_cycle, cycle, noise, crps, spread_skill, average, area_weights, rank_histogram, multiply_adds,
    )
} | {"gradients": loss_gradients}  # fmt: skip


class NumpyPort:
    """The adapter."""

    def describe(self) -> Info:
        return Info("numpy", "1.0", frozenset(OPERATIONS), tuple(DTYPES), PROFILES)

    def run(
        self, op: str, inputs: dict[str, Array], params: dict[str, Any], probes: Sequence[str] = ()
    ) -> Mapping[str, Array]:
        """One operation; there are no probes. Raises ValueError for what the specification refuses."""
        if op not in OPERATIONS or params["dtype"] not in DTYPES:
            raise Unsupported(f"{op} in {params['dtype']}")
        outputs = {name: np.asarray(value) for name, value in OPERATIONS[op](inputs, params).items()}
        return to_dtype(op, outputs, params["dtype"])


adapter = NumpyPort()
