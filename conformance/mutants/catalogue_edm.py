"""Wrong ports of chapter 6: preconditioning, schedule, sampler, training."""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from conformance.adapters import reference_operations as adapter
from conformance.mutants.mutant import Patch, chapter, edit
from storm_ref import attention, edm
from storm_ref.denoiser import Storm
from storm_ref.edm import Churn, Denoise

__all__ = ["EDM", "TRAINING"]

_coefficients, _gradients, _gate = edm.precondition_coefficients, adapter._gradients, attention.noise_gate
_sample, _loss, _embed_sigma = edm.sample, edm.edm_loss, Storm.embed_sigma


def _coefficient(right: str, wrong: str) -> Patch:
    return (edm, "precondition_coefficients", edit(right, wrong))


def _in_float32(sigma: Tensor, sigma_data: float) -> tuple[Tensor, ...]:
    single = sigma.float()
    total = single**2 + sigma_data**2
    coefficients = sigma_data**2 / total, single * sigma_data / total.sqrt(), 1 / total.sqrt(), single.log() / 4
    return tuple(c.double() for c in coefficients) if bool((sigma > 0).all()) else _coefficients(sigma, sigma_data)


def _precondition(*pieces: str) -> Patch:
    return (edm, "precondition", edit(*pieces))


def _schedule(*pieces: str) -> Patch:
    return (edm, "schedule", edit(*pieces))


def _heun(*pieces: str) -> Patch:
    return (edm, "heun_step", edit(*pieces))


def _samples(*pieces: str) -> Patch:
    return (edm, "sample", edit(*pieces))


def _gamma(*pieces: str) -> Patch:
    return (Churn, "gamma", edit(*pieces))


def _mixed(path: str) -> Callable[..., Tensor]:
    """A denoiser given the noise level in float32, or a state that is rounded between evaluations."""

    def derivative(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
        level = torch.full((x.shape[0],), sigma, dtype=torch.float64)
        if path == "sigma":
            level = level.float().double()
        else:
            x = x.to(getattr(torch, path)).double()
        return (x - denoise(x, level).double()) / sigma

    return derivative


def _euler(
    denoise: Denoise, x: Tensor, sigma: float, sigma_next: float, gamma: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    sigma_hat = (1 + gamma) * sigma
    if gamma > 0 and noise is not None:
        x = x + math.sqrt(sigma_hat**2 - sigma**2) * noise
    level = torch.full((x.shape[0],), sigma_hat, dtype=torch.float64)
    return x + (sigma_next - sigma_hat) * (x - denoise(x, level)) / sigma_hat


def _heun_to_the_end(
    denoise: Denoise, x: Tensor, sigma: float, sigma_next: float, gamma: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """A corrector in the last step too, at a level next to zero."""
    sigma_hat = (1 + gamma) * sigma
    if gamma > 0 and noise is not None:
        x = x + math.sqrt(sigma_hat**2 - sigma**2) * noise
    d = edm._derivative(denoise, x, sigma_hat)
    x_next = x + (sigma_next - sigma_hat) * d
    d_prime = edm._derivative(denoise, x_next, max(sigma_next, 1e-3 * sigma))
    return x + (sigma_next - sigma_hat) * (d + d_prime) / 2


def _never_stops(denoise: Denoise, latents: Tensor, sigmas: Tensor, churn: Churn = Churn(),  # noqa: B008
                 noises: Tensor | None = None, progress: Any = None) -> Tensor:  # fmt: skip
    """A state that stops being finite goes on, with zeros for what is lost."""
    try:
        return _sample(denoise, latents, sigmas, churn, noises, progress)
    except edm.NotFiniteError:
        return torch.zeros_like(latents, dtype=torch.float64)


def _own_noise(denoise: Denoise, latents: Tensor, sigmas: Tensor, churn: Churn = Churn(),  # noqa: B008
               noises: Tensor | None = None, progress: Any = None) -> Tensor:  # fmt: skip
    """Churn without noises draws its own."""
    if churn.s_churn > 0 and noises is None:
        noises = torch.randn(len(sigmas) - 1, *latents.shape, dtype=torch.float64)
    return _sample(denoise, latents, sigmas, churn, noises, progress)


def _any_levels(denoise: Denoise, latents: Tensor, sigmas: Tensor, churn: Churn = Churn(),  # noqa: B008
                noises: Tensor | None = None, progress: Any = None) -> Tensor:  # fmt: skip
    """Levels that rise, or do not end in 0, are taken as they are."""
    levels, steps = sigmas.tolist(), len(sigmas) - 1
    x: Tensor = levels[0] * latents.double()
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        noise = None if noises is None else churn.s_noise * noises[i].double()
        x = edm.heun_step(denoise, x, sigma, sigma_next, churn.gamma(sigma, steps), noise)
    return x


_PREDICTED = "x_next = x_hat + (sigma_next - sigma_hat) * d\n"
_CORRECTED = "x_next = x_hat + (sigma_next - sigma_hat) * (d + d_prime) / 2"
_SKIP = "(per_sample(c_skip, x64) * x64 + per_sample(c_out, x64) * raw.double())"
_RAMP = "torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)"
_LEVELS = "torch.cat([(top + ramp * (bottom - top)) ** rho, torch.zeros(1, dtype=torch.float64)])"

EDM = chapter(
    "edm",
    ("c_noise_unquartered", "c_noise is ln(sigma) without 1/4", "EDM-2",
     _coefficient("s.log() / 4", "s.log()")),
    ("c_noise_log10", "c_noise has the decimal logarithm", "EDM-2", _coefficient("s.log() / 4", "s.log10() / 4")),
    ("c_skip_of_sigma", "c_skip has sigma^2 in its numerator", "EDM-2 EDM-1",
     _coefficient("c_skip = sigma_data**2 / total", "c_skip = s**2 / total")),
    ("c_out_unrooted", "c_out divides by sigma^2 + sigma_d^2, not by its root", "EDM-2 EDM-1",
     _coefficient("s * sigma_data / total.sqrt()", "s * sigma_data / total")),
    ("c_in_unit_variance", "c_in takes sigma_d = 1", "EDM-2 EDM-1",
     _coefficient("c_in = 1 / total.sqrt()", "c_in = 1 / (s**2 + 1).sqrt()")),
    ("sigma_data_is_a_variance", "sigma_d is taken for a variance", "EDM-2 CONV-5",
     (edm, "precondition_coefficients",
      edit("s**2 + sigma_data**2", "s**2 + sigma_data", "sigma_data**2 / total", "sigma_data / total",
          "s * sigma_data / total", "s * sigma_data**0.5 / total"))),
    ("coefficients_in_float32", "coefficients are computed in float32", "EDM-9 NUM-2 NUM-9",
     (edm, "precondition_coefficients", _in_float32)),
    ("sigma_zero_accepted", "sigma = 0 is accepted by the preconditioning", "EDM-2 CONV-10",
     (edm, "_positive", edit("(sigma > 0)", "(sigma >= 0)"))),
    ("sigma_negative_accepted", "a negative sigma passes by its magnitude", "EDM-2 CONV-10",
     (edm, "_positive", lambda sigma: sigma.double().abs().clamp(min=1e-30))),
    ("c_in_forgotten", "the network is given x, not c_in x", "EDM-1",
     _precondition("per_sample(c_in, x64) * x64", "x64")),
    ("c_out_forgotten", "the network's output is not multiplied by c_out", "EDM-1",
     _precondition("per_sample(c_out, x64) * raw", "raw")),
    ("skip_of_scaled_state", "c_skip multiplies c_in x, not x", "EDM-1",
     _precondition("per_sample(c_skip, x64) * x64", "per_sample(c_skip, x64) * per_sample(c_in, x64) * x64")),
    ("network_given_c_noise", "the network is given c_noise in place of sigma", "EDM-1 NET-1",
     _precondition("c_skip, c_out, c_in, _ =", "c_skip, c_out, c_in, c_noise =", "sigma.double())", "c_noise)")),
    ("network_in_float64", "the network is given its state in float64, whatever its own dtype", "EDM-9 NUM-9",
     _precondition(".to(dtype), sigma", ", sigma")),
    ("skip_narrow", "D is put together in float32", "EDM-9 NUM-9",
     _precondition(_SKIP,
         "((per_sample(c_skip, x64) * x64).float() + (per_sample(c_out, x64) * raw.double()).float())")),
    ("skip_in_bfloat16", "D is put together in bfloat16", "EDM-9 NUM-9",
     _precondition(_SKIP,
         "((per_sample(c_skip, x64) * x64).bfloat16() + (per_sample(c_out, x64) * raw.double()).bfloat16())")),
    ("state_rounded_to_float32", "the state is rounded to float32 before the preconditioning", "EDM-9 NUM-9",
     _precondition("x64 = x.double()", "x64 = x.float().double()")),
    ("schedule_over_n", "the schedule's ramp is i/n: sigma_min is never reached", "EDM-5",
     _schedule(_RAMP, "torch.arange(steps, dtype=torch.float64) / steps")),
    ("schedule_rho_inverted", "the schedule's exponents rho and 1/rho are exchanged", "EDM-5",
     _schedule("top =", "rho = 1 / rho\n    top =")),
    ("schedule_rho_fixed", "the schedule has rho = 7, whatever it is asked for", "EDM-5",
     _schedule("top =", "rho = 7.0\n    top =")),
    ("schedule_geometric", "noise levels fall by a constant factor", "EDM-5",
     _schedule("(top + ramp * (bottom - top)) ** rho", "sigma_max * (sigma_min / sigma_max) ** ramp")),
    ("schedule_linear", "noise levels fall by a constant difference", "EDM-5",
     _schedule("(top + ramp * (bottom - top)) ** rho", "sigma_max + ramp * (sigma_min - sigma_max)")),
    ("schedule_rises", "sigma_min and sigma_max are exchanged in the bracket", "EDM-5",
     _schedule("top + ramp * (bottom - top)", "bottom + ramp * (top - bottom)")),
    ("schedule_without_zero", "the schedule does not end in 0", "EDM-5",
     _schedule(_LEVELS, "(top + ramp * (bottom - top)) ** rho")),
    ("schedule_in_float32", "noise levels are computed in float32", "EDM-5 EDM-9 NUM-2",
     _schedule("torch.cat([(top + ramp * (bottom - top)) ** rho,",
         "torch.cat([((top + ramp.float() * (bottom - top)) ** rho).double(),")),
    ("schedule_sigma_max_ignored", "the schedule starts at 80, whatever it is asked for", "EDM-5",
     _schedule("top =", "sigma_max = 80.0\n    top =")),
    ("schedule_of_one_step_at_sigma_min", "a schedule of one step starts at sigma_min", "EDM-5",
     _schedule(_RAMP,
         "torch.arange(steps, dtype=torch.float64) / (steps - 1) if steps > 1 else torch.ones(1, "
         "dtype=torch.float64)")),
    ("schedule_unchecked", "levels that cannot be are accepted: sigma_min above sigma_max, no step, rho of 0",
     "CONV-10",
     _schedule("if steps < 1:", "steps = max(steps, 1)\n    if False:",
         "if not 0 < sigma_min < sigma_max or not math.isfinite(sigma_max):", "if False:", "if not rho > 0:",
         "rho = rho or 1.0\n    if False:")),
    ("latents_unscaled", "the sampler starts from the latents, not from sigma_0 times them", "EDM-7",
     _samples("levels[0] * latents.double()", "latents.double()")),
    ("latents_by_variance", "the sampler starts from sigma_0^2 times the latents", "EDM-7",
     _samples("levels[0] * latents", "levels[0] ** 2 * latents")),
    ("sampler_in_float32", "the sampler's state is float32", "EDM-9 NUM-9", (edm, "_derivative", _mixed("float32"))),
    ("sampler_in_bfloat16", "the sampler's state is bfloat16", "EDM-9 NUM-9", (edm, "_derivative", _mixed("bfloat16"))),
    ("sigma_in_float32", "the denoiser is given the noise level in float32", "EDM-9 NUM-9",
     (edm, "_derivative", _mixed("sigma"))),
    ("euler_sampler", "steps are Euler's: no corrector", "EDM-7", (edm, "heun_step", _euler)),
    ("last_step_missing", "the last step, to sigma = 0, is left out", "EDM-7",
     _heun("return x_next", "return x_next if sigma_next else x_hat")),
    ("corrector_in_last_step", "the last step has a corrector too, at a level next to zero", "EDM-7",
     (edm, "heun_step", _heun_to_the_end)),
    ("corrector_alone", "a step uses the corrector's slope alone", "EDM-7", _heun("(d + d_prime) / 2", "d_prime")),
    ("corrector_at_old_level", "the corrector is evaluated at the step's first noise level", "EDM-7",
     _heun("_derivative(denoise, x_next, sigma_next)", "_derivative(denoise, x_next, sigma_hat)")),
    ("corrector_from_prediction", "the corrected step starts from the prediction", "EDM-7",
     _heun(_CORRECTED, _CORRECTED.replace("x_hat", "x_next"))),
    ("corrector_from_x", "the corrected step starts from x, not from the state with churn's noise", "EDM-6 EDM-7",
     _heun(_CORRECTED, _CORRECTED.replace("x_hat", "x"))),
    ("slope_at_sigma", "the slope is taken at sigma, not at the raised level", "EDM-6 EDM-7",
     _heun("_derivative(denoise, x_hat, sigma_hat)", "_derivative(denoise, x_hat, sigma)")),
    ("step_from_sigma", "the step is from sigma, not from the raised level", "EDM-6 EDM-7",
     _heun(_PREDICTED, _PREDICTED.replace("sigma_hat", "sigma"), _CORRECTED,
         _CORRECTED.replace("sigma_hat", "sigma"))),
    ("churn_by_variance", "churn adds (hat^2 - sigma^2) times noise, without the root", "EDM-6",
     _heun("math.sqrt(sigma_hat**2 - sigma**2)", "(sigma_hat**2 - sigma**2)")),
    ("churn_by_difference", "churn adds (hat - sigma) times noise", "EDM-6",
     _heun("math.sqrt(sigma_hat**2 - sigma**2)", "(sigma_hat - sigma)")),
    ("churn_uncapped", "gamma is not capped at sqrt 2 - 1", "EDM-6",
     _gamma("min(self.s_churn / steps, math.sqrt(2) - 1)", "self.s_churn / steps")),
    ("churn_over_levels", "S_churn is divided by the number of levels, n + 1", "EDM-6",
     _gamma("self.s_churn / steps", "self.s_churn / (steps + 1)")),
    ("churn_undivided", "S_churn is not divided by the number of steps", "EDM-6",
     _gamma("self.s_churn / steps", "self.s_churn")),
    ("churn_everywhere", "churn acts at every noise level, whatever S_min and S_max", "EDM-6",
     _gamma("if self.s_min <= sigma <= self.s_max", "if True")),
    ("churn_limits_open", "churn does not act at S_min and S_max themselves", "EDM-6",
     _gamma("self.s_min <= sigma <= self.s_max", "self.s_min < sigma < self.s_max")),
    ("s_noise_ignored", "S_noise is ignored", "EDM-6", _samples("churn.s_noise * noises[i]", "noises[i]"),
     (adapter, "_sampler_step", edit('churn.s_noise * i["noise"]', 'i["noise"]'))),
    ("s_noise_squared", "S_noise is applied twice", "EDM-6", _heun("* noise", "* noise * 1.0"),
     _samples("churn.s_noise * noises[i]", "churn.s_noise**2 * noises[i]"),
     (adapter, "_sampler_step", edit('churn.s_noise * i["noise"]', 'churn.s_noise**2 * i["noise"]'))),
    ("one_noise_for_all_steps", "churn adds the same noise at every step", "EDM-6 EDM-8",
     _samples("noises[i].double()", "noises[0].double()")),
    ("one_noise_for_all_members", "churn adds the first member's noise to all", "EDM-6 DA-3",
     _samples("noises[i].double()", "noises[i][:1].double()")),
    ("noises_reversed", "churn's noises are used from the last to the first", "EDM-6",
     _samples("noises[i]", "noises[-1 - i]")),
    ("own_noise", "churn without noises draws its own", "EDM-8 CONV-10 NUM-12", (edm, "sample", _own_noise)),
    ("levels_unchecked", "noise levels that rise or do not end in 0 are accepted", "EDM-12 CONV-10",
     (edm, "sample", _any_levels)),
    ("infinite_state_goes_on", "a state that stops being finite goes on as zeros", "EDM-12 DA-6 NUM-11",
     (edm, "sample", _never_stops)),
    ("churn_negative_accepted", "a negative churn is accepted as none", "CONV-10 EDM-6",
     (Churn, "__post_init__", lambda self: None)),
)  # fmt: skip


def _with_gradients(change: Callable[[str, Tensor, Mapping[str, Tensor]], Tensor]) -> Patch:
    """Gradients that are changed afterwards: by name, value, and the inputs."""

    def gradients(i: Mapping[str, Tensor], p: Mapping[str, Any]) -> dict[str, Tensor]:
        named = _gradients(i, p)
        return {name: change(name, value, i) if name != "loss" else value for name, value in named.items()}

    return (adapter, "_gradients", gradients)


def _mean_of_means(
    denoise: Denoise, x: Tensor, noise: Tensor, sigma: Tensor, sigma_data: float, valid: Tensor | None = None
) -> Tensor:
    """The mean over samples of each sample's mean over its valid points."""
    if valid is None:
        return _loss(denoise, x, noise, sigma, sigma_data)
    error = denoise(x + edm.per_sample(sigma, x) * noise, sigma) - x
    weighted = edm.per_sample(edm.loss_weight(sigma, sigma_data), x) * error**2
    counts = valid.flatten(1).sum(1)
    return (torch.where(valid, weighted, 0).flatten(1).sum(1) / counts).mean()


def _loss_edit(*pieces: str) -> Patch:
    return (edm, "edm_loss", edit(*pieces))


_WEIGHT = "return (s**2 + sigma_data**2) / (s * sigma_data) ** 2"
_FINISH = 'self.memory.finish(state), "b (i j) d'

TRAINING = chapter(
    "edm",
    ("loss_weight_inverted", "the loss is weighted by 1 / lambda", "EDM-3",
     (edm, "loss_weight", edit(_WEIGHT, "return (s * sigma_data) ** 2 / (s**2 + sigma_data**2)"))),
    ("loss_weight_unsquared", "lambda divides by sigma sigma_d, not by its square", "EDM-3",
     (edm, "loss_weight", edit("(s * sigma_data) ** 2", "(s * sigma_data)"))),
    ("loss_weight_square_of_sigma", "lambda divides by sigma^2 sigma_d", "EDM-3",
     (edm, "loss_weight", edit("(s * sigma_data) ** 2", "(s**2 * sigma_data)"))),
    ("loss_weight_inverse_variance", "lambda is 1 / sigma^2", "EDM-3",
     (edm, "loss_weight", edit(_WEIGHT, "return 1 / s**2"))),
    ("loss_unweighted", "the loss has no weight lambda", "EDM-3",
     _loss_edit("per_sample(loss_weight(sigma, sigma_data), x) * error**2", "error**2")),
    ("loss_root_weight", "the error is multiplied by lambda before it is squared", "EDM-3",
     _loss_edit("per_sample(loss_weight(sigma, sigma_data), x) * error**2",
         "(per_sample(loss_weight(sigma, sigma_data), x) * error) ** 2")),
    ("loss_noise_by_variance", "training noise is multiplied by sigma^2", "EDM-3",
     _loss_edit("per_sample(sigma, x)", "per_sample(sigma**2, x)")),
    ("loss_of_noise", "the loss compares with the noise, not with the clean state", "EDM-3",
     _loss_edit("sigma) - x", "sigma) - noise")),
    ("loss_of_noisy_state", "the loss compares with the noisy state", "EDM-3",
     _loss_edit("sigma) - x", "sigma) - (x + per_sample(sigma, x) * noise)")),
    ("loss_absolute", "the loss takes absolute errors", "EDM-3", _loss_edit("error**2", "error.abs()")),
    ("loss_halved", "the loss has a factor 1/2", "EDM-3", _loss_edit("* error**2", "* error**2 / 2")),
    ("loss_summed_over_points", "the loss is summed over points and averaged over samples alone", "EDM-3",
     _loss_edit("weighted.mean() if valid is None else weighted[valid].mean()",
         "weighted.sum() / len(x) if valid is None else weighted[valid].sum() / len(x)")),
    ("loss_missing_counted", "points that are not valid count as zeros", "EDM-11 CONV-7",
     _loss_edit("weighted[valid].mean()", "(weighted * valid).mean()")),
    ("loss_valid_ignored", "points that are not valid enter the loss", "EDM-11",
     _loss_edit("weighted[valid].mean()", "weighted.mean()")),
    ("loss_mean_of_means", "the loss is averaged over each sample's valid points, then over samples", "EDM-11 EDM-3",
     (edm, "edm_loss", _mean_of_means)),
    ("loss_invalid_hidden", "the network is given zeros at points that are not valid", "EDM-11",
     _loss_edit("error = denoise(x", "shown = x if valid is None else x * valid\n    error = denoise(shown")),
    ("training_noise_variance", "training noise levels have ln sigma of variance 1.2", "EDM-4",
     (edm, "training_sigma", edit("std * normal", "math.sqrt(std) * normal"))),
    ("training_noise_std_squared", "training noise levels have ln sigma of deviation 1.44", "EDM-4",
     (edm, "training_sigma", edit("std * normal", "std**2 * normal"))),
    ("training_noise_sign", "training noise levels have ln sigma of mean +1.2", "EDM-4",
     (edm, "training_sigma", edit("mean + std", "-mean + std"))),
    ("training_noise_base_ten", "training noise levels are powers of ten", "EDM-4",
     (edm, "training_sigma", edit("torch.exp(mean + std * normal.double())", "10 ** (mean + std * normal.double())"))),
    ("training_noise_in_float32", "training noise levels are computed in float32", "EDM-4 EDM-9",
     (edm, "training_sigma",
      edit("torch.exp(mean + std * normal.double())", "torch.exp(mean + std * normal.float()).double()"))),
    ("gradients_summed_over_samples", "gradients are of the sum over samples, not of the mean", "EDM-3",
     _with_gradients(lambda name, value, i: value * len(i["sigma"]))),
    ("gradients_sign", "gradients are those of minus the loss", "EDM-3",
     _with_gradients(lambda name, value, i: -value)),
    ("gradients_clipped", "gradients are clipped to norm 1", "EDM-3",
     _with_gradients(lambda name, value, i: value / max(1.0, float(value.double().norm())))),
    ("gradients_stop_at_memory", "no gradient flows through the memory to the history's weights", "EDM-3 NET-2",
     (Storm, "compress", edit(_FINISH, '(lambda m: m.detach() + 0 * m)(self.memory.finish(state)), "b (i j) d'))),
    ("gradients_stop_at_gate", "no gradient flows to the gates", "EDM-3 ATT-4",
     (attention, "noise_gate", lambda *a: _gate(*a).detach() + 0 * _gate(*a))),
    ("gradients_stop_at_embedding", "no gradient flows to the noise embedding", "EDM-3 NET-1",
     (Storm, "embed_sigma", lambda *a: _embed_sigma(*a).detach() + 0 * _embed_sigma(*a))),
)  # fmt: skip
