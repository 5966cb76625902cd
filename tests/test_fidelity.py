"""The measurements of fidelity: what they must give where the answer is known."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_problems import EPS, NETWORK, naive_cone, normal
from torch import Tensor

from storm_ref.denoiser import denoiser
from storm_ref.edm import sample, schedule
from storm_ref.experiments import fidelity
from storm_ref.experiments.fidelity import Sizes, samples, subjects
from storm_ref.experiments.fidelity.coarse_level import coarse_gain
from storm_ref.experiments.fidelity.cone import cone
from storm_ref.experiments.fidelity.evaluation import error_by_halo, skill
from storm_ref.experiments.fidelity.measures import noisy_states
from storm_ref.experiments.fidelity.samples import sample_tiles_apart, sampled_error, scores
from storm_ref.experiments.fidelity.seams import seam_profile, seams
from storm_ref.experiments.fidelity.subjects import Subject, generic, tiling_of
from storm_ref.tiling import Axis, Tile, Tiling, extents, tiled_denoiser
from storm_ref.workbench.prior.covariance import Covariance, covariance_denoiser
from storm_ref.workbench.prior.model import load

WEIGHTS = Path(__file__).parents[1] / "tiny_data" / "storm_tiny.safetensors"
# Sampled fields add up the rounding of some ten evaluations, each at most as sensitive as its Jacobian.
SAMPLED = 1e3 * NETWORK
SIGMAS = (0.5, 10.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(count: int = 1, depth: int = 2, window: int | None = None, core: tuple[int, int] = (2, 2)) -> Subject:
    """4 x 8 points in 2 x 4 tiles; a halo of 3 covers the domain."""
    return generic((4, 8), core, seeded(), count, 8, 2, depth, window, torch.float64)


def correlated(subject: Subject) -> Subject:
    """The same with a covariance of three leading directions."""
    shape = (2, *subject.grid)
    vectors = torch.linalg.qr(normal(2 * subject.grid[0] * subject.grid[1], 3))[0]
    values, rest = torch.tensor([9.0, 4.0, 2.0]).double(), torch.tensor(0.5).double()
    return replace(subject, covariance=Covariance(vectors, values, rest, shape))


def test_by_is_the_tiled_denoiser() -> None:
    """[TILE-6] With a white covariance the preconditioning is [EDM-1]."""
    s, tiling = small(), tiling_of(small(), 2, 1)
    x, sigma = normal(1, 2, 4, 8), torch.tensor([2.0], dtype=torch.float64)
    for got, want in (
        (s.tiled(tiling), tiled_denoiser(s.network, s.condition, tiling)),
        (s.untiled(), denoiser(s.network, s.condition)),
    ):
        assert (got(x, sigma) - want(x, sigma)).abs().max() <= NETWORK * x.abs().max()
    assert (s.network_off()(x, sigma) - x / 5).abs().max() <= 4 * EPS * x.abs().max()


def test_tiling_of_and_legal_halos() -> None:
    """The largest halo covers the circle; the blend is cut to what each core allows."""
    s = small(core=(2, 4))
    assert subjects.legal_halos(s) == [0, 1, 2] and subjects.legal_halos(small()) == [0, 1, 2, 3]
    assert tiling_of(s, 2, 2) == Tiling(Axis(4, 2, 2, 1), Axis(8, 4, 2, 2, periodic=True))
    with pytest.raises(ValueError, match="wraps onto itself"):
        tiling_of(s, 3)


def test_default_core_makes_six_tiles_an_axis() -> None:
    """The bundled model has 8 rows of tokens, which leave cores of one."""
    assert subjects.default_core(load(WEIGHTS)) == (4, 8)


def test_error_by_halo_is_rounding_when_extents_cover() -> None:
    """[TILE-8] and falls from the smallest halo to the largest; blends among the records; costs as [COST-2]."""
    records = error_by_halo(small(2), [0, 1, 2, 3], SIGMAS, seeded(1))
    assert {(r["halo"], r["blend"]) for r in records} == {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)}
    for sigma in SIGMAS:
        errors = {r["halo"]: r for r in records if r["sigma"] == sigma and r["blend"] == 0}
        assert errors[0]["relative"] > errors[2]["relative"] > 1e-6
        assert errors[3]["maximum"] <= NETWORK * 10 * errors[3]["network"]
        assert errors[0]["absolute"] == pytest.approx(errors[0]["relative"] * errors[0]["network"], rel=1e-12)
        assert errors[0]["maximum"] >= errors[0]["absolute"]
    assert records[0]["overhead"] == 1 and records[-1]["cost_over_untiled"] > 1


def test_error_by_halo_is_rounding_for_a_window_within_the_halo() -> None:
    """[TILE-8] L r p <= h - b: 1 <= 2 - 1 but not 1 - 1."""
    records = error_by_halo(small(depth=1, window=1), [1, 2], SIGMAS, seeded(1))
    for r in records:
        exact = r["halo"] - r["blend"] >= 1
        assert (r["relative"] <= NETWORK * 10) == exact, r
        assert exact or r["relative"] > 1e-6


def test_error_by_halo_takes_every_blend_as_the_operator_has_it() -> None:
    """Tiles' outputs are shared between blends: the errors are those of T[D] all the same."""
    s = correlated(generic((8, 8), (2, 2), seeded(), 1, 8, 2, 1, None, torch.float64))
    x, sigma = noisy_states(s, 2.0, seeded(1))
    errors = []
    for blend in (0, 1):
        exact = covariance_denoiser(s.network, s.condition, tiling_of(s, 2, blend), s.covariance)(x, sigma)
        errors.append(float((exact - s.untiled()(x, sigma)).square().mean().sqrt()))
    records = error_by_halo(s, [2], [2.0], seeded(1))
    assert [r["absolute"] for r in records] == pytest.approx(errors, rel=1e-9)


def test_skill_value() -> None:
    """Lost is 0 where tiles equal the untiled network; the network off is the Gaussian's own error."""
    s = small(3)
    records = skill(s, [0, 3], [2.0], seeded(1))
    x, level = noisy_states(s, 2.0, seeded(1))
    assert records[0]["off"] == pytest.approx(float((x / 5 - s.states).square().mean().sqrt()), rel=1e-12)
    want = float((s.untiled()(x, level) - s.states).square().mean().sqrt())
    assert records[0]["untiled"] == pytest.approx(want, rel=1e-12)
    assert abs(records[1]["lost"]) <= SAMPLED and abs(records[0]["lost"]) > 1e-4
    a, b, c = (records[0][k] ** 2 for k in ("tiled", "untiled", "off"))
    assert records[0]["lost"] == pytest.approx((a - b) / (c - b), rel=1e-9)


@pytest.mark.parametrize("kind", ["white", "covariance"])
def test_once_with_tiles_that_cover_is_the_untiled_sampler(kind: str) -> None:
    """T[S[D]] = S[D]: also the covariance of a tile's own points is then the whole one."""
    s = small() if kind == "white" else correlated(small())
    latents, sigmas = normal(2, 2, 4, 8), schedule(4)
    want = sample(s.untiled(), latents, sigmas)
    got = sample_tiles_apart(s, tiling_of(s, 3, 1), latents, sigmas)
    assert (got - want).abs().max() <= SAMPLED * want.abs().max()


def test_once_hears_nothing_from_beyond_the_extent() -> None:
    """Bit for bit, after many evaluations; with blending at each of them the same change is felt."""
    s = small()
    tiling, latents, sigmas = tiling_of(s, 1, 0), normal(1, 2, 4, 8), schedule(6)
    changed = latents.clone()
    changed[..., 6] += 1  # column 6 is not in the extent of the tile of columns 2 and 3, which is 1..4
    assert 6 not in extents(tiling.x)[1].tolist()
    apart = [sample_tiles_apart(s, tiling, z, sigmas)[..., 2:4] for z in (latents, changed)]
    assert torch.equal(*apart)
    joint = [sample(s.tiled(tiling), z, sigmas)[..., 2:4] for z in (latents, changed)]
    assert (joint[0] - joint[1]).abs().max() > 1e-6


def test_restricted_covariance_value() -> None:
    """P Sigma P^T, against the dense matrix."""
    s = correlated(small())
    tile = Tile(torch.tensor([1, 2]), torch.tensor([7, 0, 1]), torch.ones(2, 3).double())
    part = samples._restricted(s.covariance, tile)
    whole = s.covariance.apply(torch.eye(64).double().reshape(64, 2, 4, 8), lambda v: v).reshape(64, 64)
    index = torch.arange(64).reshape(2, 4, 8)[:, tile.rows[:, None], tile.cols].flatten()
    got = part.apply(torch.eye(12).double().reshape(12, 2, 2, 3), lambda v: v).reshape(12, 12)
    assert (got - whole[index][:, index]).abs().max() <= 64 * EPS * 9


def test_sampled_error_is_rounding_when_extents_cover() -> None:
    """Both methods; the untiled field's own change vanishes at the most steps."""
    records = sampled_error(small(), [(0, 0), (3, 1)], [2, 4], 2, seeded(1), apart=(4,))
    assert [r["method"] for r in records].count("once") == 2 and len(records) == 8
    for r in records:
        if r["halo"] == 3 or (r["method"] == "untiled" and r["steps"] == 4):
            assert r["relative"] <= SAMPLED
        else:
            assert r["relative"] > 1e-4
        assert r["difference"] <= r["maximum"]


def test_scored_is_alike_when_extents_cover() -> None:
    records = scores(small(2), [(3, 1), (0, 0)], 3, 3, seeded(1))
    assert [r["method"] for r in records] == ["untiled", "every evaluation", "every evaluation", "network off"]
    assert records[0]["more"] == 0 and abs(records[1]["more"]) <= SAMPLED
    assert abs(records[2]["more"]) > 1e-6


def test_seam_profile_value() -> None:
    """Steps of 1 everywhere and 3 across the boundaries of cores of 4; patches of 2 are compared with patches."""
    along_x = Tiling(Axis(8, 4, patch=2), Axis(8, 4, periodic=True, patch=2))
    steps = torch.tensor([3.0, 1, 1, 1, -3, -1, -1, -1])  # closes on itself
    field = steps.cumsum(0).double().expand(2, 1, 8, 8)
    profile, ratio = seam_profile(field, along_x, "x")
    assert torch.equal(profile, torch.tensor([[3.0, 1, 1, 1]]).double().expand(2, -1))
    assert torch.equal(ratio, torch.tensor([[3.0, 1 / 3]], dtype=torch.float64).expand(2, -1))
    profile, _ = seam_profile(field.transpose(-1, -2).contiguous(), along_x, "y")
    assert torch.equal(profile, torch.tensor([[3.0, 1, 1, 1]]).double().expand(2, -1))


def test_seams_of_a_covering_tiling_are_those_of_the_untiled_field() -> None:
    """over_untiled is 1 at every place; a hard crop of small extents is not; the step is within its bound."""
    records = seams(small(), [(3, 1), (0, 0)], [2.0], seeded(1), 3, 4)
    assert len(records) == 2 * 3 * 2
    for r in records:
        worst = max(abs(v - 1) for v in r["over_untiled"])
        if r["method"] == "untiled":
            assert worst == 0
        else:
            assert worst <= SAMPLED if r["halo"] == 3 else worst > 1e-3
        if "bound" in r:
            assert 0 < r["step"] <= r["bound"]
    assert sum("bound" in r for r in records) == 1


@pytest.mark.parametrize("point", [(3, 9), (2, 8)])
def test_cone_support_is_that_of_the_chapter(point: tuple[int, int]) -> None:
    """[TILE-9] by tile, for a point in the middle of its tile and one in a seam."""
    s = generic((8, 20), (4, 4), seeded(), 1, 8, 2, 1, None, torch.float64)
    tiling = tiling_of(s, 1, 1)
    _, maps = cone(s, tiling, point, 3, seeded(1))
    for k, reached in enumerate(maps, start=1):
        rows, cols = (naive_cone(a, k)[p] for a, p in zip((tiling.y, tiling.x), point, strict=True))
        want = torch.zeros(8, 20, dtype=torch.bool)
        want[torch.tensor(sorted(rows))[:, None], torch.tensor(sorted(cols))] = True
        by_tile = want.reshape(2, 4, 5, 4).any(3).any(1)
        assert torch.equal(torch.tensor(reached) != 0, by_tile), f"after {k} evaluations"
    assert not bool(torch.tensor(maps[0]).all())


def test_cone_value() -> None:
    """The Jacobian of the whole Euler sampler, taken at once, times the first noise level."""
    s, tiling = small(), tiling_of(small(), 1, 0)
    records, maps = cone(s, tiling, (1, 1), 3, seeded(1))
    levels = schedule(3, 0.02, 80.0).tolist()
    x = (levels[0] * torch.randn(1, 2, 4, 8, generator=seeded(1), dtype=torch.float64)).requires_grad_()
    out: Tensor = x
    for now, after in pairwise(levels):
        d = tiled_denoiser(s.network, s.condition, tiling)(out, torch.tensor([now], dtype=torch.float64))
        out = out + (after - now) * (out - d) / now
    (back,) = torch.autograd.grad(out[0, 0, 1, 1], x)
    want = (levels[0] * back[0]).abs().amax(0).reshape(2, 2, 4, 2).amax((1, 3))
    # The two ways to write a step differ by the rounding of x, which is 80 times the answer.
    assert (torch.tensor(maps[-1], dtype=torch.float64) - want).abs().max() <= 80 * SAMPLED * want.max()
    assert [r["distance"] for r in records if r["k"] == 3] == [0, 1, 2]
    assert records[-3]["answer"] == maps[-1][0][0] and records[-1]["sigma"] == levels[0]


def test_coarse_gains_everything_with_a_block_a_token() -> None:
    records = coarse_gain(small(), [0, 1], [2.0], (4, 8), seeded(1), 2, 2)
    assert [r["sigma"] for r in records] == [2.0, None, 2.0, None]
    assert all(r["coarse"] <= SAMPLED < r["tiled"] and r["gain"] > 0.99 for r in records)
    assert all(r["coarse_cost"] > r["tiled_cost"] for r in records)
    assert all(abs(r["lost_coarse"]) <= SAMPLED < abs(r["lost_tiled"]) for r in records if r["sigma"])


@pytest.mark.slow
def test_run_is_json_and_tells_its_progress() -> None:
    """Every part runs at its smallest, with the bundled model and world."""
    told: list[tuple[str, int, int]] = []
    sizes = Sizes((0.5, 2.0), (12, 24), (12, 24), (12, 24), (0, 1), 8, (2,), (2,), 2, 2, 1, 3.0, (2, 2))
    result = fidelity.run(WEIGHTS, lambda *args: told.append(args), sizes=sizes)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    shared = {"about", "halo", "sampled", "seams", "cone", "coarse", "pictures"}
    assert result["generic"].keys() == shared and result["trained"].keys() == shared | {"skill", "scored"}
    for part in result.values():
        tall, wide = part["about"].get("tiles", (6, 12))
        assert [len(part["cone"]["maps"]["tiled"][0]), len(part["cone"]["maps"]["tiled"][0][0])] == [tall, wide]
        assert min(tall, wide) >= 6
        assert torch.tensor(part["pictures"]["difference"]).shape == torch.tensor(part["pictures"]["tiled"]).shape
    assert all(0 < done <= total for _, done, total in told) and len({label for label, _, _ in told}) == 12
