"""Wrong ports of chapter 7: the likelihood's score and its matrices W."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from conformance.adapters import reference_operations as adapter
from conformance.mutants.mutant import Patch, chapter, edit
from storm_ref import edm, guidance, tiling
from storm_ref.denoiser import denoiser
from storm_ref.edm import Denoise
from storm_ref.guidance import Observations, ObservationsLike

__all__ = ["GUIDANCE"]

_guided, _linearised = guidance._guided, guidance._Linearised
_heun = edm.heun_step


def _straight_through(denoise: Denoise) -> Denoise:
    """The same values with dD/dx = 1."""

    def identity(x: Tensor, sigma: Tensor) -> Tensor:
        return denoise(x, sigma).detach() + x - x.detach()

    return identity


def _without_jacobian(denoise: Denoise, observations: ObservationsLike, weighting: Any) -> Denoise:
    return _guided(_straight_through(denoise), observations, weighting)


def _scored_without_jacobian(denoise: Denoise, observations: ObservationsLike, weighting: Any) -> Denoise:
    """W has its J, the score has none."""
    if observations.value.numel() == 0:
        return denoise

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        at = guidance._linearise(denoise, observations, x, sigma)
        return at.denoised.detach() + edm.per_sample(sigma**2, x) * at.operator_t(weighting(at, sigma))

    return guided


def _jacobian_for_transpose(self: Any, v: Tensor) -> Tensor:
    """J v, row by row; J^T v is what reverse mode gives."""
    flat = self.denoised.flatten(1)
    rows = [
        torch.autograd.grad(flat[:, i].sum(), self.x, retain_graph=True)[0].flatten(1) for i in range(flat.shape[1])
    ]
    return torch.einsum("ibj,bj->bi", torch.stack(rows), v.flatten(1)).reshape(v.shape)


def _plain_corrector(*which: bool) -> tuple[Patch, ...]:
    """Guidance in the predictor, in the corrector: the other is given the prior's denoiser."""
    predictor, corrector = which

    def marked(denoise: Denoise, observations: ObservationsLike, weighting: Any) -> Denoise:
        right = _guided(denoise, observations, weighting)
        if right is denoise:
            return denoise

        def guided(x: Tensor, sigma: Tensor) -> Tensor:
            return right(x, sigma)

        guided.plain = denoise  # type: ignore[attr-defined]
        return guided

    def step(
        denoise: Denoise, x: Tensor, sigma: float, sigma_next: float, gamma: float = 0.0, noise: Tensor | None = None
    ) -> Tensor:
        count = [0]

        def chosen(z: Tensor, sigma: Tensor) -> Tensor:
            use = (predictor, corrector)[count[0]]
            count[0] += 1
            return (denoise if use else getattr(denoise, "plain", denoise))(z, sigma)

        return _heun(chosen, x, sigma, sigma_next, gamma, noise)

    return (guidance, "_guided", marked), (edm, "heun_step", step)


def _stops_early(
    denoise: Denoise, x: Tensor, sigma: float, sigma_next: float, gamma: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """No guidance in the last step."""
    return _heun(getattr(denoise, "plain", denoise) if sigma_next == 0 else denoise, x, sigma, sigma_next, gamma, noise)


def _last_read_counts(self: Observations, x: Tensor) -> Tensor:
    """H x, whose adjoint overwrites where several observations read one point instead of adding up."""
    places = self.index.flatten().tolist()
    last = {place: at for at, place in enumerate(places)}
    keep = torch.tensor([last[place] == at for at, place in enumerate(places)]).reshape(self.index.shape)
    read = x.flatten(-3)[..., self.index]
    return (torch.where(keep, read, read.detach()) * self.weight.to(x)).sum(-1)


def _normalised_step(denoise: Denoise, observations: ObservationsLike) -> Denoise:
    """W = R^-1 / |y - H(xhat)|, as in code published with DPS."""

    def weighting(at: Any, sigma: Tensor) -> Tensor:
        size = at.innovation.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        weighted: Tensor = at.innovation / observations.variance.to(at.innovation) / size
        return weighted

    return guidance._guided(denoise, observations, weighting)


def _in_tiles(i: Mapping[str, Tensor], p: Mapping[str, Any]) -> dict[str, Tensor]:
    """Guidance inside each tile, with the observations that it sees, then the blend of guided tiles."""
    network = adapter._network(i, p)
    made = tiling.Tiling(tiling.Axis(**p["y"]), tiling.Axis(**p["x"]))
    condition = adapter._condition(network, i, p)
    shape = tuple(i["x"].shape[1:])

    def local(z: Tensor, sigma: Tensor, batch: Any) -> Tensor:
        members = len(z) // len(batch)
        guided = []
        for at, tile in enumerate(batch):
            part = slice(at * members, (at + 1) * members)
            crop = condition.crop(tile.rows, tile.cols, network.config.patch)
            rows, cols = tile.rows, tile.cols

            def on_tile(y: Tensor, s: Tensor, crop: Any = crop) -> Tensor:
                config = network.config
                return edm.precondition(
                    lambda c, t: network(c, t, crop), y, s, config.sigma_data, network.final.weight.dtype
                )

            seen = _seen_by(i, shape, rows, cols)
            guided.append(
                adapter._guide(p)(on_tile, seen)(z[part], sigma[part]) if seen else on_tile(z[part], sigma[part])
            )
        return torch.cat(guided)

    return {"guided": tiling.blend_tiles(local, made, p["together"])(i["x"], i["sigma"])}


def _seen_by(i: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, cols: Tensor) -> Observations | None:
    """The observations all of whose points lie in a tile, with indices of the tile."""
    local = torch.full((shape[1], shape[2]), -1)
    local[rows[:, None], cols] = torch.arange(len(rows) * len(cols)).reshape(len(rows), len(cols))
    size = len(rows) * len(cols)
    channel, place = i["index"] // (shape[1] * shape[2]), local.flatten()[i["index"] % (shape[1] * shape[2])]
    inside = (place >= 0).all(-1)
    if not bool(inside.any()):
        return None
    index = (channel * size + place)[inside]
    return Observations(
        i["value"][inside], i["variance"][inside], index, i["weight"][inside], (shape[0], len(rows), len(cols))
    )


def _untiled_jacobian(i: Mapping[str, Tensor], p: Mapping[str, Any]) -> dict[str, Tensor]:
    """Values of the blended denoiser, Jacobian of the untiled one."""
    tiled = adapter._tiled_network(i, p)
    network = adapter._network(i, p)
    whole = denoiser(network, adapter._condition(network, i, p))

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        once = whole(x, sigma)
        return tiled(x, sigma).detach() + once - once.detach()

    seen = Observations(i["value"], i["variance"], i["index"], i["weight"], tuple(i["x"].shape[1:]))
    return {"guided": adapter._guide(p)(denoise, seen)(i["x"], i["sigma"])}


def _without_missing(self: Any) -> None:
    """Values that are not finite become zero, in silence."""
    object.__setattr__(self, "value", torch.nan_to_num(self.value, posinf=0, neginf=0))


def _values_unchecked(*pieces: str) -> Patch:
    return (guidance, "_check_values", edit(*pieces))


def _score(*pieces: str) -> Patch:
    return (guidance, "_guided", edit(*pieces))


def _observed(*pieces: str) -> Patch:
    return (Observations, "__post_init__", edit(*pieces))


def _variances(change: Callable[[Tensor], Tensor]) -> tuple[Patch, ...]:
    """R changed before it is used, for linear and other operators."""

    def changed(owner: type) -> Callable[..., None]:
        right = owner.__post_init__  # type: ignore[attr-defined]

        def post(self: Any) -> None:
            right(self)
            object.__setattr__(self, "variance", change(self.variance))

        return post

    owners = (Observations, guidance.OperatorObservations)
    return tuple((owner, "__post_init__", changed(owner)) for owner in owners)


_SCORE = "linear.denoised.detach() + per_sample(sigma**2, x) * score"
_R2 = "s2 * sigma_data**2 / (s2 + sigma_data**2)"

GUIDANCE = chapter(
    "guidance",
    ("variance_as_std", "R is taken for a standard deviation and squared", "GUIDE-6 CONV-6",
     *_variances(lambda r: r**2)),
    ("variance_rooted", "the root of R is used", "GUIDE-6 CONV-6", *_variances(lambda r: r**0.5)),
    ("variance_of_first", "the first observation's variance serves all", "GUIDE-6",
     *_variances(lambda r: r[:1].expand_as(r))),
    ("variance_ignored", "R is taken for 1", "GUIDE-6 CONV-6", *_variances(torch.ones_like)),
    ("jacobian_dropped", "J is left out: the identity is close enough", "GUIDE-1",
     (guidance, "_guided", _without_jacobian)),
    ("jacobian_dropped_in_score", "J^T is left out of the score", "GUIDE-1",
     (guidance, "_guided", _scored_without_jacobian)),
    ("jacobian_not_transposed", "J stands for J^T", "GUIDE-1", (_linearised, "jacobian_t", _jacobian_for_transpose)),
    ("jacobian_untiled", "J is that of the untiled denoiser, not of the blend", "GUIDE-1",
     (adapter, "_guided_denoise", _untiled_jacobian)),
    ("guidance_in_tiles", "guidance acts inside each tile: observations in overlaps count twice", "GUIDE-1 TILE-7",
     (adapter, "_guided_denoise", _in_tiles)),
    ("guidance_sigma", "the score is multiplied by sigma, not by sigma^2", "GUIDE-1",
     _score(_SCORE, _SCORE.replace("sigma**2", "sigma"))),
    ("guidance_unscaled", "the score is added to the mean without its factor", "GUIDE-1",
     _score(_SCORE, "linear.denoised.detach() + score")),
    ("guidance_sign", "the innovation has the other sign", "GUIDE-1",
     _score(_SCORE, _SCORE.replace("+ per_sample", "- per_sample"))),
    ("guidance_doubled", "observations are added twice", "GUIDE-1",
     _score(_SCORE, _SCORE.replace("+ per_sample", "+ 2 * per_sample"))),
    ("guidance_sigma_of_first_member", "the first member's noise level serves all", "GUIDE-1",
     _score(_SCORE, _SCORE.replace("sigma**2", "sigma[:1].expand_as(sigma) ** 2"))),
    ("operator_at_noisy_state", "the innovation is y - H(x) of the noisy state", "GUIDE-1",
     (guidance, "_linearise",
      edit("observations.value.to(predicted) - predicted.detach()",
          "observations.value.to(predicted) - observations.apply(x).detach()"))),
    ("operator_linearised_at_noisy_state", "H' is taken at the noisy state", "GUIDE-1",
     (guidance, "_linearise",
      edit("predicted = observations.apply(point)",
          "noisy = x.detach().clone().requires_grad_()\n        at_mean = observations.apply(point)\n"
          "        predicted = observations.apply(noisy)", "torch.autograd.grad(predicted, point, cotangent",
          "torch.autograd.grad(predicted, noisy, cotangent", "linearisation_point=point", "linearisation_point=noisy",
          "- predicted.detach()", "- at_mean.detach()"))),
    ("adjoint_overwrites", "where two observations read one point H^T overwrites instead of adding up", "GUIDE-1",
     (Observations, "apply", _last_read_counts)),
    ("observation_weights_forgotten", "an observation is the sum of the points it reads, without their weights",
     "GUIDE-1", (Observations, "apply", edit(" * self.weight.to(x)", ""))),
    ("observation_first_point_only", "an observation reads the first of its points alone", "GUIDE-1",
     (Observations, "apply", edit(".sum(-1)", "[..., 0]"))),
    ("observation_index_channel_last", "indices count with the channel fastest", "CONV-1 GUIDE-1",
     (Observations, "apply", edit("x.flatten(-3)[", "x.movedim(-3, -1).flatten(-3)["))),
    ("observation_index_column_major", "indices count with the row fastest, as in Fortran", "CONV-1 GUIDE-1",
     (Observations, "apply", edit("x.flatten(-3)[", "x.transpose(-1, -2).flatten(-3)["))),
    ("guidance_predictor_only", "guidance enters the predictor alone", "GUIDE-1", *_plain_corrector(True, False)),
    ("guidance_corrector_only", "guidance enters the corrector alone", "GUIDE-1", *_plain_corrector(False, True)),
    ("guidance_not_in_last_step", "the last step is taken without guidance", "GUIDE-1", _plain_corrector(True, True)[0],
     (edm, "heun_step", _stops_early)),
    ("dps_step_normalised", "dps divides by the norm of the innovation", "GUIDE-2",
     (guidance, "dps", _normalised_step)),
    ("dps_factor_half", "dps takes the gradient of the half square twice: a factor 2", "GUIDE-2",
     (guidance, "dps", edit("return linear.innovation /", "return 2 * linear.innovation /"))),
    ("pigdm_r2_of_sigma", "pigdm has r^2 = sigma^2", "GUIDE-3", (guidance, "pigdm", edit(_R2, "s2"))),
    ("pigdm_r_for_r2", "pigdm has r where r^2 belongs", "GUIDE-3", (guidance, "pigdm", edit(_R2, f"({_R2}).sqrt()"))),
    ("pigdm_sigma_data_one", "pigdm takes sigma_d = 1", "GUIDE-3 CONV-5",
     (guidance, "pigdm", edit(_R2, "s2 / (s2 + 1)"))),
    ("pigdm_identity", "pigdm takes the identity for H' H'^T", "GUIDE-3",
     (guidance, "pigdm", edit("r2 * linear.operator(linear.operator_t(d))", "r2 * d"))),
    ("pigdm_one_step", "pigdm's system is solved by one step of conjugate gradients", "GUIDE-3",
     (guidance, "pigdm", edit("linear.innovation, steps)", "linear.innovation, 1)"))),
    ("sda_gamma_sigma", "sda has gamma sigma, not gamma sigma^2", "GUIDE-4",
     (guidance, "sda", edit("per_sample(sigma**2, linear", "per_sample(sigma, linear"))),
    ("sda_gamma_squared", "sda has gamma^2 sigma^2", "GUIDE-4",
     (guidance, "sda", edit("+ gamma * per_sample", "+ gamma**2 * per_sample"))),
    ("sda_gamma_default", "sda has gamma = 0.1, whatever it is asked for", "GUIDE-4",
     (guidance, "sda", edit("+ gamma * per_sample", "+ 0.1 * per_sample"))),
    ("sda_r2", "sda has gamma r^2 with r^2 of unit variance", "GUIDE-4",
     (guidance, "sda",
      edit("per_sample(sigma**2, linear", "per_sample(sigma**2 / (sigma**2 + 1), linear"))),
    ("gamma_negative_accepted", "a negative gamma is accepted", "GUIDE-4 CONV-10",
     (guidance, "sda", edit("if not gamma >= 0:", "if False:"))),
    ("mmps_sigma", "mmps has sigma H' J H'^T in W, not sigma^2", "GUIDE-5 GUIDE-8",
     (guidance, "mmps", edit("per_sample(sigma**2, linear", "per_sample(sigma, linear"))),
    ("mmps_without_jacobian", "mmps leaves J out of W", "GUIDE-5 GUIDE-8",
     (guidance, "mmps", edit("linear.jacobian_t(linear.operator_t(d))", "linear.operator_t(d)"))),
    ("guidance_left_out", "mmps answers the mean without guidance", "GUIDE-1 GUIDE-5",
     (guidance, "mmps", lambda denoise, observations, *steps: denoise)),
    ("mmps_one_step", "mmps stops after one step of conjugate gradients", "GUIDE-5 GUIDE-8",
     (guidance, "mmps", edit("linear.innovation, steps, tolerance", "linear.innovation, 1, tolerance"))),
    ("mmps_loose", "mmps stops at a residual of 1 %", "GUIDE-5 GUIDE-8",
     (guidance, "mmps", edit("linear.innovation, steps, tolerance", "linear.innovation, steps, 1e-2"))),
    ("mmps_steepest_descent", "conjugate gradients forget their last direction: steepest descent", "GUIDE-5 GUIDE-8",
     (guidance, "conjugate_gradient",
      edit("residual + squared_next / torch.where(squared > 0, squared, 1) * direction", "residual"))),
    ("mmps_in_batch", "conjugate gradients share one step length among all members", "GUIDE-5",
     (guidance, "conjugate_gradient",
      edit("step = torch.where(active,",
          "shared, curvature = squared.sum().expand_as(squared), curvature.sum().expand_as(squared)\n"
          "        step = torch.where(active,",
          "torch.where(active, squared / torch.where", "torch.where(active, shared / torch.where"))),
    ("observation_nan_as_zero", "a missing observation is taken for zero", "GUIDE-7 CONV-7 CONV-10",
     *((owner, "__post_init__", _without_missing) for owner in (Observations, guidance.OperatorObservations))),
    ("variance_unchecked", "a variance of zero, or none, is accepted", "GUIDE-6 CONV-10",
     _values_unchecked("(torch.isfinite(variance) & (variance > 0))", "(variance == variance) & (variance >= 0)")),
    ("variance_infinite_accepted", "an infinite variance is accepted", "GUIDE-6 CONV-10",
     _values_unchecked("(torch.isfinite(variance) & (variance > 0))", "(variance > 0)")),
    ("variance_negative_accepted", "a negative variance passes by its magnitude", "GUIDE-6 CONV-10",
     _values_unchecked("(torch.isfinite(variance) & (variance > 0))", "torch.isfinite(variance)"),
     *_variances(torch.abs)[1:]),
    ("index_negative_accepted", "a negative index counts from the end of the state", "GUIDE-11 CONV-10",
     _observed("(self.index < 0)", "(self.index < -torch.Size(self.shape).numel())")),
    ("index_outside_clamped", "an observation outside the state is moved to its edge", "GUIDE-11 CONV-10",
     _observed("outside = ((self.index < 0)",
         "object.__setattr__(self, 'index', self.index.clamp(0, torch.Size(self.shape).numel() - 1))\n"
         "    outside = ((self.index < 0)")),
    ("weight_not_finite_accepted", "an observation's weight that is not finite is taken for zero", "GUIDE-11 CONV-10",
     _observed("if not bool(torch.isfinite(self.weight).all()):",
         "object.__setattr__(self, 'weight', torch.nan_to_num(self.weight, posinf=0, neginf=0))\n    if False:")),
    ("no_observation_refused", "an analysis without observations is refused", "GUIDE-10",
     _score("return denoise\n", 'raise ValueError("no observations")\n'),
     (adapter, "_assimilate", edit('seen = _observations(i) if len(i["value"]) else None', "seen = _observations(i)"))),
    ("no_observation_is_nan", "without observations the mean of no innovations, a NaN, is added", "GUIDE-10 NUM-11",
     _score("return denoise\n", "return lambda x, sigma: denoise(x, sigma) + observations.value.mean()\n")),
)  # fmt: skip
