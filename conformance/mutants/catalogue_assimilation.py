"""Wrong ports of chapter 8: members, cycles, and the scores that judge them."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conformance.mutants.mutant import Patch, chapter, edit
from storm_ref import assimilation, verification
from storm_ref.assimilation import Sampler

__all__ = ["ASSIMILATION", "VERIFICATION"]

_noise = assimilation.member_noise


def _members(*pieces: str) -> Patch:
    return (assimilation, "draw_members", edit(*pieces))


def _cycle(right: str, wrong: str) -> Patch:
    return (assimilation, "cycle", edit(right, wrong))


def _linear(*pieces: str) -> Patch:
    return (assimilation, "linear_cycle", edit(*pieces))


def _keyed(change: Callable[[int, int, int], tuple[int, int, int]]) -> Patch:
    def noise(seed: int, analysis: int, member: int, shape: Sequence[int], draws: int = 1) -> Tensor:
        return _noise(*change(seed, analysis, member), shape, draws)

    return (assimilation, "member_noise", noise)


def _other_numbers(make: Callable[[np.random.Generator, tuple[int, ...]], Any], key: str = "") -> Patch:
    """Numbers of another kind or order from a generator that is as good."""

    def noise(seed: int, analysis: int, member: int, shape: Sequence[int], draws: int = 1) -> Tensor:
        _noise(seed, analysis, member, (1,), 1)  # refuses what is to be refused
        numbers = [seed, analysis, member, *([draws] if key == "draws" else list(shape) if key == "shape" else [])]
        return torch.from_numpy(np.ascontiguousarray(make(np.random.default_rng(numbers), (draws, *shape))))

    return (assimilation, "member_noise", noise)


def _one_row(generator: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Draws of fields whose rows are all alike; of vectors, whose values are."""
    row = generator.standard_normal((*shape[:-2], 1, shape[-1]) if len(shape) > 2 else (*shape[:-1], 1))
    return np.broadcast_to(row, shape)


def _antithetic(generator: np.random.Generator, shape: tuple[int, ...]) -> Any:
    numbers = generator.standard_normal(math.prod(shape))
    return np.where(np.arange(numbers.size) % 2, -np.roll(numbers, 1), numbers).reshape(shape)


def _global(seed: int, analysis: int, member: int, shape: Sequence[int], draws: int = 1) -> Tensor:
    _noise(seed, analysis, member, (1,), 1)
    return torch.randn(draws, *shape, dtype=torch.float64)


def _torch_seed(seed: int, analysis: int, member: int, shape: Sequence[int], draws: int = 1) -> Tensor:
    """The three numbers packed into the seed of a generator that keeps 32 bits of it."""
    _noise(seed, analysis, member, (1,), 1)
    packed = (seed * 1_000_003 + analysis * 65_536 + member) % 2**32
    return torch.randn(draws, *shape, generator=torch.Generator().manual_seed(packed), dtype=torch.float64)


def _unchecked_key(seed: int, analysis: int, member: int, shape: Sequence[int], draws: int = 1) -> Tensor:
    return _noise(seed % 2**64, analysis % 2**32, member % 2**32, shape, draws)


def _with_state(text: str) -> Callable[..., Iterator[Tensor]]:
    """A cycle whose next history is another: `frames` and `state` in, new frames out."""
    make = eval(f"lambda frames, state: {text}", {"torch": torch})

    def cycle(history: Sequence[Tensor], analyses: Sequence[Any], draw: Any) -> Iterator[Tensor]:
        frames = list(history)
        if not frames:
            raise ValueError("a cycle needs at least one past frame to start from")
        for k, observations in enumerate(analyses):
            state = draw(frames, observations, k)
            frames = make(frames, state)
            yield state

    return cycle


def _shifted_observations(history: Sequence[Tensor], analyses: Sequence[Any], draw: Any) -> Iterator[Tensor]:
    """Analysis k is given the observations of analysis k - 1, the first its own."""
    yield from _right_cycle(history, [analyses[max(k - 1, 0)] for k in range(len(analyses))], draw)


_right_cycle = assimilation.cycle
_KEEP_P = "covariance = keep @ model @ covariance @ model.T @ keep.T + keep @ model_error"


def _filter(model: Tensor, model_error: Tensor, operator: Tensor, error: Tensor, mean: Tensor, covariance: Tensor,
            observations: Tensor, joseph: bool = False) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """The Kalman filter; or its gain in the recursion of the cycle."""
    result = []
    for y in observations:
        forecast = model @ covariance @ model.T + model_error
        gain = forecast @ operator.T @ torch.linalg.inv(operator @ forecast @ operator.T + error)
        keep = torch.eye(len(mean), dtype=mean.dtype) - gain @ operator
        mean = keep @ model @ mean + gain @ y
        covariance = keep @ forecast
        if joseph:
            covariance = keep @ (forecast - model_error) @ keep.T + keep @ model_error
        result.append((mean, covariance))
    return result


def _filter_gain(**i: Tensor) -> list[tuple[Tensor, Tensor]]:
    return _filter(**i, joseph=True)


_START = "part = noise[:, start : start + sampler.members_per_batch]"

ASSIMILATION = chapter(
    "assimilation",
    ("members_share_latents", "all members start from the first one's latents", "DA-3",
     _members(_START, _START + "\n        part = torch.cat([part[:1, :1].expand_as(part[:1]), part[1:]])")),
    ("members_share_step_noise", "all members of a batch get the first one's step noises", "DA-3 EDM-6",
     _members("later = part[1:] if", "later = part[1:, :1].expand_as(part[1:]) if")),
    ("noise_by_batch_index", "the noise of a member depends on its place in its batch", "DA-3",
     _members(_START, "part = noise[:, : min(sampler.members_per_batch, noise.shape[1] - start)]")),
    ("last_batch_dropped", "members of a last, smaller batch are left out", "DA-3",
     _members("range(0, noise.shape[1], sampler.members_per_batch)",
         "range(0, max(noise.shape[1] - sampler.members_per_batch, 0) + 1, sampler.members_per_batch)")),
    ("latents_reused_as_step_noise", "the latents are used again as the first step's noise", "DA-3 EDM-6",
     _members("later = part[1:] if", "later = part[:-1] if")),
    ("batches_reversed", "batches of members come back in the reverse order", "DA-3",
     _members("return torch.cat(parts)", "return torch.cat(parts[::-1])")),
    ("members_recentred", "the ensemble is shifted so that its noise has mean zero", "DA-3",
     _members("    parts = []\n", "    parts = []\n    noise = noise - noise.mean(1, keepdim=True)\n")),
    ("observations_without_guidance", "observations without a guidance method are ignored", "DA-7 CONV-10",
     _members("if observations is not None and guide is None:", "if False:")),
    ("no_member_accepted", "an ensemble of no member is accepted", "CONV-10",
     _members("if noise.shape[1] == 0:", "if noise.shape[1] == 0:\n        return noise[0]\n    if False:")),
    ("together_zero_accepted", "members evaluated zero at a time are taken all at once", "CONV-10",
     (Sampler, "__post_init__",
      lambda self: object.__setattr__(self, "members_per_batch", max(self.members_per_batch, 1)))),
    ("observations_halved", "observations are used in every second analysis", "DA-1 DA-4",
     _cycle("draw(frames, observations, k)", "draw(frames, observations if k % 2 == 0 else None, k)")),
    ("observations_a_step_late", "an analysis is given the observations of the one before", "DA-1 DA-4",
     (assimilation, "cycle", _shifted_observations)),
    ("noise_of_first_analysis", "every analysis has the first one's noise", "DA-3 DA-4",
     _cycle("draw(frames, observations, k)", "draw(frames, observations, 0)")),
    ("history_not_moved", "the history stays that of the first analysis", "DA-4",
     _cycle("frames = [*frames[1:], state]", "pass")),
    ("history_oldest_kept", "the newest frame leaves the history as the analysis enters", "DA-4",
     _cycle("[*frames[1:], state]", "[*frames[:-1], state]")),
    ("history_newest_first", "the analysis enters the history at the oldest end", "DA-4",
     _cycle("[*frames[1:], state]", "[state, *frames[:-1]]")),
    ("history_a_step_late", "an analysis enters the history one analysis late", "DA-4",
     _cycle("frames = [*frames[1:], state]", "frames, late = [*frames[1:], late if k else frames[-1]], state")),
    ("history_ensemble_mean", "all members are given the ensemble mean as history", "DA-4",
     (assimilation, "cycle", _with_state("[*frames[1:], state.mean(0, keepdim=True).expand_as(state)]"))),
    ("history_of_first_member", "all members are given the first one's history", "DA-4",
     (assimilation, "cycle", _with_state("[*frames[1:], state[:1].expand_as(state)]"))),
    ("history_of_next_member", "members are given their neighbour's history", "DA-4",
     (assimilation, "cycle", _with_state("[*frames[1:], state.roll(1, 0)]"))),
    ("history_in_float32", "analyses are stored in float32 between cycles", "DA-4 EDM-9",
     (assimilation, "cycle", _with_state("[*frames[1:], state.float().double()]"))),
    ("empty_history_accepted", "a cycle without history starts from zero", "CONV-10 MEM-7",
     (assimilation, "cycle",
      edit('raise ValueError("a cycle needs at least one past frame to start from")', "return"))),
    ("history_corrected_by_observations", "today's observations are assimilated into the past too", "DA-1",
     (assimilation, "cycle",
      edit("state = draw(frames, observations, k)",
          "state = draw(frames, observations, k)\n        frames = [*frames[:-1], (frames[-1] + state) / 2]\n"
          "        state = draw(frames, observations, k)"))),
    ("forecast_inflated", "a forecast's spread is inflated by 10 %", "DA-2",
     _cycle("state = draw(frames, observations, k)",
         "state = draw(frames, observations, k)\n"
         "        state = state if observations is not None else state.mean(0) + 1.1 * (state - state.mean(0))")),
    ("noise_same_for_all_members", "all members have one noise", "DA-3", _keyed(lambda s, k, m: (s, k, 0))),
    ("noise_same_for_all_analyses", "all analyses have one noise", "DA-3", _keyed(lambda s, k, m: (s, 0, m))),
    ("noise_seed_ignored", "the seed has no effect", "DA-3", _keyed(lambda s, k, m: (0, k, m))),
    ("noise_numbers_added", "the noise depends on the sum of seed, analysis and member", "DA-3",
     _keyed(lambda s, k, m: (s + k + m, 0, 0))),
    ("noise_members_of_ten", "the noise depends on 10 analysis + member", "DA-3",
     _keyed(lambda s, k, m: (s, 0, 10 * k + m))),
    ("noise_seed_cut_to_32_bits", "the seed is cut to 32 bits", "DA-3", _keyed(lambda s, k, m: (s % 2**32, k, m))),
    ("noise_packed_in_32_bits", "seed, analysis and member are packed into 32 bits", "DA-3",
     (assimilation, "member_noise", _torch_seed)),
    ("noise_global_generator", "the noise comes from a global generator", "DA-3 EDM-8 NUM-12",
     (assimilation, "member_noise", _global)),
    ("noise_depends_on_draws", "the first draws depend on how many are asked for", "DA-3",
     _other_numbers(lambda g, s: g.standard_normal(s), "draws")),
    ("noise_uniform", "the noise is uniform with variance one", "DA-3",
     _other_numbers(lambda g, s: math.sqrt(12) * (g.random(s) - 0.5))),
    ("noise_sum_of_uniforms", "the noise is a sum of three uniform numbers with variance one", "DA-3",
     _other_numbers(lambda g, s: 2 * (g.random((3, *s)) - 0.5).sum(0))),
    ("noise_in_float32", "the noise is drawn in float32", "DA-3 EDM-9",
     _other_numbers(lambda g, s: g.standard_normal(s, np.float32).astype(np.float64))),
    ("noise_of_variance_two", "the noise has variance 2, of a complex number's two parts", "DA-3",
     _other_numbers(lambda g, s: math.sqrt(2) * g.standard_normal(s))),
    ("noise_repeated_along_rows", "one row of noise serves all rows", "DA-3", _other_numbers(_one_row)),
    ("noise_antithetic", "every second value is minus the one before", "DA-3", _other_numbers(_antithetic)),
    ("noise_key_unchecked", "a seed, analysis or member out of range is wrapped in silence", "CONV-10 DA-3",
     (assimilation, "member_noise", _unchecked_key)),
    ("kalman_gain", "the cycle is the Kalman filter", "DA-5", (assimilation, "linear_cycle", _filter)),
    ("kalman_gain_alone", "the gain is that of the Kalman filter", "DA-5",
     (assimilation, "linear_cycle", _filter_gain)),
    ("cycle_keep_once", "the past's spread is multiplied by (I - G H) once", "DA-5",
     _linear(_KEEP_P, _KEEP_P.replace(" @ keep.T", ""))),
    ("posterior_covariance_without_history", "the past's spread is left out", "DA-5",
     _linear(_KEEP_P, "covariance = keep @ model_error")),
    ("cycle_without_model_error", "Q is left out of the analysis' covariance", "DA-5",
     _linear(_KEEP_P, _KEEP_P.replace(" + keep @ model_error", ""))),
    ("cycle_model_transposed", "A^T stands for A in the covariance", "DA-5",
     _linear(_KEEP_P, "covariance = keep @ model.T @ covariance @ model @ keep.T + keep @ model_error")),
    ("q_and_r_swapped", "the gain has Q and R exchanged: R is inflated by H Q H^T in the numerator", "DA-5",
     _linear("gain = torch.linalg.solve(innovation, operator @ model_error).T",
         "gain = torch.linalg.pinv(operator) @ torch.linalg.solve(innovation, error).T")),
    ("cycle_forecast_not_kept", "the analysis' mean has the whole forecast, not (I - G H) of it", "DA-5",
     _linear("mean = keep @ model @ mean + gain @ y", "mean = model @ mean + gain @ y")),
)  # fmt: skip


def _average(*pieces: str) -> Patch:
    return (verification, "average", edit(*pieces))


def _ranks(*pieces: str) -> Patch:
    return (verification, "rank_histogram", edit(*pieces))


_PLAIN, _FAIR = "sum_of_differences(departure) / (2 * m * m)", "sum_of_differences(departure) / (2 * m * (m - 1))"
_RMSE = "average(_departures(members, truth, least=1).mean(0).square(), weights=weights, mask=mask).sqrt()"
_BIAS = "average(_departures(members, truth, least=1).mean(0), weights=weights, mask=mask)"
_WEIGHTED = "(weight * chosen).sum() / weight.sum()"
_EXTRA = "extra = (uniform * (ties + 1)).long()"


def _both(right: str, wrong: str) -> tuple[Patch, ...]:
    return tuple((verification, name, edit(right, wrong)) for name in ("crps_ensemble", "crps_fair"))


def _masked_by_zero(score: Tensor, *, weights: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Points outside the mask are multiplied by zero."""
    weight = torch.ones_like(score) if weights is None else weights.broadcast_to(score.shape)
    weight = weight.double() * (1.0 if mask is None else mask.broadcast_to(score.shape))
    if not bool(weight.sum() > 0):
        raise ValueError("nothing to average")
    return (weight * score).sum() / weight.sum()


def _uncentred(members: Tensor, truth: Tensor, **where: Any) -> Tensor:
    """The root of the mean over members and points of squared errors."""
    return verification.average((members - truth).double().square().mean(0), **where).sqrt()


VERIFICATION = chapter(
    "verification",
    ("crps_fair_biased", "the fair CRPS divides by M^2: it is the plain one", "VER-2",
     (verification, "crps_fair", edit(_FAIR, _PLAIN))),
    ("crps_plain_fair", "the plain CRPS divides by M (M - 1)", "VER-1",
     (verification, "crps_ensemble", edit(_PLAIN, "sum_of_differences(departure) / (2 * m * max(m - 1, 1))"))),
    ("crps_fair_off_by_one", "the fair CRPS divides by (M - 1)^2", "VER-2",
     (verification, "crps_fair", edit(_FAIR, "sum_of_differences(departure) / (2 * (m - 1) ** 2)"))),
    ("crps_full_double_sum", "the CRPS subtracts the whole mean distance between members, not half", "VER-1 VER-2",
     *_both("/ (2 * m", "/ (m")),
    ("crps_half_double_sum", "the CRPS sums pairs i < j once and halves again", "VER-1 VER-2",
     *_both("/ (2 * m", "/ (4 * m")),
    ("crps_without_spread", "the CRPS is the mean absolute error", "VER-1 VER-2",
     *_both("- sum_of_differences(departure)", "- 0 * sum_of_differences(departure)")),
    ("crps_of_the_mean", "the CRPS has the absolute error of the mean", "VER-1 VER-2",
     *_both("departure.abs().mean(0)", "departure.mean(0).abs()")),
    ("crps_squared", "the CRPS has squares for absolute differences", "VER-1",
     (verification, "crps_ensemble", edit("departure.abs().mean(0)", "departure.square().mean(0)"))),
    ("crps_sorted_from_zero", "the sorted sum counts members from 0: 2 i - M - 1 is off by two", "VER-3",
     (verification, "sum_of_differences", edit("torch.arange(1, m + 1,", "torch.arange(0, m,"))),
    ("crps_sorted_off_by_one", "the sorted sum has 2 i - M for 2 i - M - 1", "VER-3",
     (verification, "sum_of_differences", edit("- m - 1", "- m"))),
    ("crps_unsorted", "the sorted sum runs over members as they come", "VER-3",
     (verification, "sum_of_differences", edit(".sort(0).values", ""))),
    ("crps_in_float32", "the CRPS is computed in float32", "VER-10",
     (verification, "_departures",
      edit("members.double() - truth.double()", "(members.float() - truth.float()).double()"))),
    ("crps_of_one_member", "the fair CRPS of one member is its absolute error", "VER-2 CONV-10",
     (verification, "crps_fair", edit("least=2)", "least=1)", "(m - 1))", "max(m - 1, 1))"))),
    ("average_unnormalised", "a weighted mean is divided by the number of points", "VER-4",
     _average(_WEIGHTED, "(weight * chosen).sum() / len(chosen)")),
    ("average_over_all_points", "a mean over a mask is divided by the weights of all points", "VER-4",
     _average(_WEIGHTED,
         "(weight * chosen).sum() / (score.numel() if weights is None else weights.broadcast_to(score.shape).sum())")),
    ("average_masked_by_zero", "points outside the mask are multiplied by zero, NaN and all", "VER-4 CONV-7 NUM-11",
     (verification, "average", _masked_by_zero)),
    ("average_skips_nan", "a NaN at a selected point is left out in silence", "VER-4 NUM-11",
     _average(_WEIGHTED, "(weight * chosen)[~chosen.isnan()].sum() / weight[~chosen.isnan()].sum()")),
    ("average_mask_ignored", "the mask is ignored", "VER-4",
     _average("selected = _selection(mask, score)", "selected = _selection(None, score)")),
    ("average_mask_inverted", "the mask marks what is left out", "VER-4",
     _average("_selection(mask, score)", "_selection(None if mask is None else ~mask, score)")),
    ("average_weights_ignored", "weights are ignored", "VER-4", _average(_WEIGHTED, "chosen.mean()")),
    ("average_weights_squared", "weights are applied twice", "VER-4",
     _average(_WEIGHTED, "(weight**2 * chosen).sum() / (weight**2).sum()")),
    ("average_of_nothing", "a mean over nothing is zero", "VER-4 CONV-10",
     _average("    if weight.sum() == 0:\n",
         "    if weight.sum() == 0:\n        return weight.sum()\n    if False:\n")),
    ("average_negative_weights", "negative weights are accepted", "VER-4 CONV-10",
     _average("((weight >= 0) & weight.isfinite())", "weight.isfinite()")),
    ("average_in_float32", "means are computed in float32", "VER-10",
     _average(_WEIGHTED, "((weight.float() * chosen.float()).sum() / weight.float().sum()).double()")),
    ("area_weights_sine", "area weights are the sine of latitude", "VER-5",
     (verification, "area_weights", edit(".cos()", ".sin().abs()"))),
    ("area_weights_radians", "latitude is taken for radians", "VER-5 CONV-3",
     (verification, "area_weights", edit(".deg2rad()", ""))),
    ("area_weights_one", "there are no area weights", "VER-5",
     (verification, "area_weights", edit("deg2rad().cos()[:, None]", "cos()[:, None].abs() ** 0"))),
    ("area_weights_rooted", "area weights are the root of the cosine", "VER-5",
     (verification, "area_weights", edit(".cos()", ".cos().clamp(min=0).sqrt()"))),
    ("area_weights_float32", "area weights are computed in float32", "VER-10 VER-5",
     (verification, "area_weights",
      edit("latitude.double().deg2rad().cos()", "latitude.float().deg2rad().cos().double()"))),
    ("latitude_unchecked", "a latitude beyond the pole is accepted", "CONV-10 VER-5",
     (verification, "area_weights", edit("(latitude.abs() <= 90).all()", "True"))),
    ("rmse_mean_of_roots", "the RMSE is the mean of absolute errors of the mean", "VER-6",
     (verification, "rmse", edit(_RMSE, _RMSE.replace(".square()", ".abs()").replace(".sqrt()", "")))),
    ("rmse_of_members", "the RMSE is that of the members, not of their mean", "VER-6",
     (verification, "rmse", _uncentred)),
    ("rmse_not_rooted", "the RMSE is the mean square error", "VER-6",
     (verification, "rmse", edit(_RMSE, _RMSE.replace(".sqrt()", "")))),
    ("rmse_of_median", "the RMSE is that of the ensemble's median", "VER-6",
     (verification, "rmse", edit(".mean(0).square()", ".median(0).values.square()"))),
    ("rmse_centred", "the mean error is subtracted before the RMSE", "VER-6",
     (verification, "rmse", edit(_RMSE, f"({_RMSE}.square() - {_BIAS}.square()).clamp(min=0).sqrt()"))),
    ("spread_with_m", "the spread has 1/M for 1/(M - 1)", "VER-7",
     (verification, "spread", edit("correction=1", "correction=0"))),
    ("spread_mean_of_roots", "the spread is the mean of standard deviations", "VER-7",
     (verification, "spread",
      edit("members.double().var(0, correction=1), weights=weights, mask=mask).sqrt()",
          "members.double().std(0, correction=1), weights=weights, mask=mask)"))),
    ("spread_about_truth", "the spread of one member is zero", "VER-7 CONV-10",
     (verification, "spread",
      edit("_require_members(members, least=2)", "_require_members(members, least=1)", "correction=1",
          "correction=min(1, len(members) - 1)"))),
    ("ratio_without_factor", "spread-skill lacks the factor sqrt(1 + 1/M)", "VER-8",
     (verification, "spread_skill", edit("math.sqrt(1 + 1 / m) * ", ""))),
    ("ratio_factor_inverted", "spread-skill has the factor sqrt(M / (M + 1))", "VER-8",
     (verification, "spread_skill", edit("math.sqrt(1 + 1 / m)", "math.sqrt(m / (m + 1))"))),
    ("ratio_factor_unrooted", "spread-skill has the factor 1 + 1/M", "VER-8",
     (verification, "spread_skill", edit("math.sqrt(1 + 1 / m)", "(1 + 1 / m)"))),
    ("ratio_inverted", "spread-skill is error over spread", "VER-8",
     (verification, "spread_skill",
      edit("* spread(members, weights=weights, mask=mask) / error",
          "* error / spread(members, weights=weights, mask=mask)"))),
    ("ratio_of_nothing", "spread over an error of zero is infinite, or 1", "VER-8 CONV-10",
     (verification, "spread_skill", edit("if error == 0:", "if error == 0:\n        return error + 1\n    if False:"))),
    ("rank_ties_low", "a truth equal to members ranks below them all", "VER-9",
     _ranks(_EXTRA, "extra = (0 * uniform).long()")),
    ("rank_ties_high", "a truth equal to members ranks above them all", "VER-9", _ranks(_EXTRA, "extra = ties")),
    ("rank_ties_middle", "a truth equal to members ranks in their middle", "VER-9",
     _ranks(_EXTRA, "extra = ties // 2")),
    ("rank_ties_never_last", "ties are drawn from one place too few", "VER-9",
     _ranks(_EXTRA, "extra = (uniform * ties).long()")),
    ("rank_from_above", "ranks are counted from above", "VER-9",
     _ranks("(departure < 0).sum(0)", "(departure > 0).sum(0)")),
    ("rank_without_first", "there are M ranks, the last two taken together", "VER-9",
     _ranks("return torch.bincount((departure < 0).sum(0) + extra, minlength=members.shape[0] + 1)",
         "return torch.bincount(((departure < 0).sum(0) + extra).clamp(max=members.shape[0] - 1), "
         "minlength=members.shape[0])")),
    ("rank_from_one", "ranks are counted from 1", "VER-9",
     _ranks("(departure < 0).sum(0) + extra, minlength=members.shape[0] + 1)",
         "(departure < 0).sum(0) + extra + 1, minlength=members.shape[0] + 2)[: members.shape[0] + 1]")),
    ("rank_mask_ignored", "ranks are counted at points outside the mask too", "VER-9 VER-4",
     _ranks("_selection(mask, truth)", "_selection(None, truth)")),
    ("rank_nan_accepted", "a NaN ranks lowest", "VER-9 NUM-11 CONV-10",
     _ranks("if bool(departure.isnan().any()):", "if False:")),
)  # fmt: skip
