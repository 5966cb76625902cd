"""Training repeats and resumes bit for bit, learns, and uses no data that it must not see."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import synthetic
import torch

from storm_ref.denoiser import Condition, randomise
from storm_ref.edm import precondition_coefficients
from storm_ref.parallel.mesh import World
from storm_ref.parallel.shard import scaled_loss
from storm_ref.tiling import Tiling
from storm_ref.workbench.io.data import calendar
from storm_ref.workbench.prior.covariance import covariance_denoiser, output_scale, precondition, white
from storm_ref.workbench.prior.model import Model, write_tensors
from storm_ref.workbench.run import training
from storm_ref.workbench.run.training import Batch, Objective, Samples, TrainSettings, prepare, scheduled_rate, train

SMALL = TrainSettings(
    patch=(3, 4),
    width=16,
    heads=2,
    depth=1,
    frames=2,
    covariance_rank=10,
    steps=20,
    batch=4,
    warmup=5,
    mixed_transitions=2,
)


def made(settings: TrainSettings = SMALL, **kinds: object) -> tuple[Model, Samples]:
    f = synthetic.fields(**kinds)  # type: ignore[arg-type]
    return prepare(f, f.time[8:60], synthetic.STEP, settings)


def loss_of(model: Model, samples: Samples, batch: Batch, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return the loss that a single process differentiates."""
    squares = Objective(model, samples)(batch, sigma, noise)
    return scaled_loss(squares, batch.valid, World.alone(), sharded=False)


def final(settings: TrainSettings, **rest: object) -> tuple[bytes, object]:
    """Return the weights and losses of a whole run."""
    trained = train(*made(settings), settings, **rest)  # type: ignore[arg-type]
    return synthetic.bits(trained.network), trained.training["losses"]


def test_prepare_sees_no_later_frame() -> None:
    """Model and samples have the same bits whatever follows the last training time."""
    f = synthetic.fields()
    later = f.values.copy()
    later[60:] += 1000
    one, two = (prepare(replace(f, values=v), f.time[8:60], synthetic.STEP, SMALL) for v in (f.values, later))
    assert torch.equal(one[0].background.climatology, two[0].background.climatology)
    assert torch.equal(one[0].covariance.vectors, two[0].covariance.vectors)
    for name in ("departure", "anomaly", "forcing", "past", "age"):
        assert torch.equal(getattr(one[1], name), getattr(two[1], name)), name
    assert len(one[1].anomaly) == 60


def test_prepare_history_and_scales() -> None:
    """The past is two frames 6 and 12 hours old, fields have unit variance, and the clock is in minutes."""
    _, samples = made()
    assert samples.target.tolist() == list(range(8, 60))
    assert samples.past[0].tolist() == [7, 6]
    assert samples.age[0].tolist() == [6.0, 12.0]
    assert samples.clock[:5].tolist() == [0, 360, 720, 1080, 0]
    assert samples.departure.square().mean().item() == pytest.approx(1, abs=1e-5)
    assert samples.anomaly[8:].square().mean().item() == pytest.approx(1, abs=1e-5)


def test_prepare_season_only_after_a_year() -> None:
    """Inputs are one constant field, latitude, sine and cosine of the time of day, and the season after a year."""
    assert made()[0].config.static_channels == 4
    f = synthetic.fields(1, days=340)
    assert prepare(f, f.time[8:], synthetic.STEP, SMALL)[0].config.static_channels == 6


@pytest.mark.parametrize("season", [True, False])
def test_prepare_season_as_the_user_says(season: bool) -> None:
    """The setting decides for a short record, and the season adds its sine and cosine at every frame."""
    few = synthetic.fields()
    model, samples = prepare(few, few.time[8:], synthetic.STEP, replace(SMALL, season=season))
    assert model.season is season and model.config.static_channels == (6 if season else 4)
    known = torch.from_numpy(calendar(few.time, few.latitude, few.longitude))[: len(samples.forcing)]
    assert torch.equal(samples.forcing[:, 2:], known if season else known[:, :2])


def test_objective_is_one_for_the_gaussian(generator: torch.Generator) -> None:
    """With F = 0 and data from N(0, Sigma) the loss is 1 at every level; 1,500 fields leave an error below 2 %."""
    model, samples = made(replace(SMALL, covariance_rank=40))
    c = model.covariance
    noise = torch.randn(2, 1500, 2, 12, 16, generator=generator, dtype=torch.float64)
    x = c.apply(noise[0], lambda v: v.sqrt()).float()
    index = torch.zeros(1500).long()
    past = samples.anomaly[samples.past[index]]
    batch = Batch(x, torch.ones_like(x).bool(), past, index)
    for level in (0.1, 1.0, 10.0):
        sigma = torch.full((1500,), level, dtype=torch.float64)
        with torch.no_grad():
            loss = loss_of(model, samples, batch, sigma, noise[1].float())
        assert loss.item() == pytest.approx(1, abs=0.03), level


def test_objective_with_rank_0_has_the_weight_of_edm(generator: torch.Generator) -> None:
    """[EDM-3] The weight of one sample is 1 / c_out^2, computed by hand."""
    model, samples = made()
    model = replace(model, covariance=white((2, 12, 16), 1.0).to(torch.float32))
    index, sigma = torch.tensor([3]), torch.tensor([0.7]).double()
    noise = torch.randn(1, 2, 12, 16, generator=generator)
    batch = training.mix(samples, index, 1, generator)
    got = loss_of(model, samples, batch, sigma, noise)
    _, c_out, _, _ = precondition_coefficients(sigma, 1.0)
    mean = precondition(lambda z, _: torch.zeros_like(z), batch.x + 0.7 * noise, sigma, model.covariance)
    assert got.item() == pytest.approx(((mean - batch.x).square().mean() / c_out**2).item(), rel=1e-5)


def test_objective_leaves_invalid_points_out(generator: torch.Generator) -> None:
    """A target with absurd values where it is not valid has the same loss."""
    model, samples = made(gaps=True)
    assert not samples.valid.all()
    index, sigma = torch.arange(52), torch.full((52,), 1.0).double()
    noise = torch.randn(52, 2, 12, 16, generator=generator)
    # F = 0 and a white covariance: each point's estimate depends on that point alone.
    model = replace(model, covariance=white((2, 12, 16), 1.0).to(torch.float32))
    batch = training.mix(samples, index, 1, generator)
    wild = replace(batch, x=torch.where(batch.valid, batch.x, 1e6))
    with torch.no_grad():
        assert torch.equal(*(loss_of(model, samples, b, sigma, noise) for b in (batch, wild)))


def test_objective_by_tiles_is_that_of_the_tiled_denoiser(generator: torch.Generator) -> None:
    """[TILE-6] One tile leaves the loss as it is, several change it as T[D] does, and all weights get a gradient."""
    model, samples = made(replace(SMALL, tile=(3, 4), halo=(3, 4)))
    cut = model.tiling
    assert cut is not None and (cut.y.core, cut.y.halo, cut.x.core, cut.x.halo) == (3, 3, 4, 4)
    randomise(model.network, generator)
    index, sigma = torch.tensor([3, 5]), torch.tensor([0.7, 2.0]).double()
    noise = torch.randn(2, 2, 12, 16, generator=generator)
    batch = training.mix(samples, index, 1, generator)
    plain, one, several = (
        loss_of(replace(model, tiling=tiling), samples, batch, sigma, noise)
        for tiling in (None, Tiling.whole((12, 16), False, (3, 4)), cut)
    )
    assert one.item() == pytest.approx(plain.item(), rel=1e-5)
    frames, at = samples.past[index], samples.target[index]
    memory = model.network.compress(batch.past, samples.forcing[frames], samples.age[index], model.position)
    condition = Condition(samples.forcing[at], memory, model.position[None], model.periodic)
    noisy = batch.x + sigma.float()[:, None, None, None] * noise
    error = covariance_denoiser(model.network, condition, cut, model.covariance)(noisy, sigma) - batch.x
    weight = output_scale(model.covariance, sigma).float()[:, None, None, None] ** -2
    assert several.item() == pytest.approx((weight * error**2)[batch.valid].mean().item(), rel=1e-5)
    assert several.item() != pytest.approx(plain.item(), rel=1e-3)
    several.backward()
    gradients = {name: p.grad for name, p in model.network.named_parameters()}
    assert not [name for name, g in gradients.items() if g is None or not bool(g.abs().sum() > 0)]


def test_train_by_tiles_keeps_them_and_judges_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loss of a run uses the tiles, also on the held-back part, and the trained model keeps them."""
    tiles = replace(SMALL, tile=(6, 8), halo=(3, 4), blend=(3, 4), steps=2)
    model, samples = made(tiles)
    seen: list[object] = []
    forward = Objective.forward

    def spy(self: Objective, *draw: object) -> torch.Tensor:
        seen.append(self.tiles)
        return forward(self, *draw)  # type: ignore[arg-type]

    monkeypatch.setattr(Objective, "forward", spy)
    trained = train(model, samples, tiles)
    assert trained.training["settings"]["tile"] == [6, 8]
    assert trained.tiling == model.tiling == Tiling.of((12, 16), (6, 8), (3, 4), (3, 4), False, (3, 4))
    assert len(seen) > 2 and all(tiling == model.tiling for tiling in seen)


def test_train_settings_invalid_tiles() -> None:
    with pytest.raises(ValueError, match="give the tile"):
        replace(SMALL, halo=(3, 4))
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        made(replace(SMALL, tile=(6, 6)))


def test_mix_is_a_rotation_of_transitions_of_one_hour(generator: torch.Generator) -> None:
    """Transitions of one time of day get weights whose squares sum to 1, the same for history and target."""
    _, samples = made()
    index = torch.tensor([5, 6])
    # Each transition carries its own number in a channel of its own: the mixture shows the weights.
    marks = torch.zeros(52, 52, 12, 16)
    marks[torch.arange(52), torch.arange(52)] = 1
    frames = torch.zeros(60, 52, 12, 16)
    frames[torch.arange(8, 60) - 1] = marks  # the newest past frame of transition i is frame 7 + i
    known = torch.ones_like(marks).bool()
    marked = replace(samples, departure=marks, valid=known, anomaly=frames)
    batch = training.mix(marked, index, 3, generator)
    used = batch.x.abs().amax((2, 3)) > 0
    assert used[0, 5] and used[1, 6]
    assert (samples.clock[used[0]] == samples.clock[5]).all()
    assert (samples.clock[used[1]] == samples.clock[6]).all()
    torch.testing.assert_close(batch.past[:, 0], batch.x)
    distinct = used.sum(1) == 3
    assert distinct.any()
    torch.testing.assert_close(batch.x[distinct].square().sum(1), torch.ones(int(distinct.sum()), 12, 16))
    steps = batch.x.diff(dim=-1).square().mean() / batch.x.square().mean()
    assert 0 < steps < 0.5, "the weights are not smooth, or do not vary at all"


def test_mix_of_one_is_the_data(generator: torch.Generator) -> None:
    _, samples = made()
    batch = training.mix(samples, torch.tensor([4, 9]), 1, generator)
    assert torch.equal(batch.x, samples.departure[[4, 9]])
    assert torch.equal(batch.past, samples.anomaly[samples.past[[4, 9]]])


def test_scheduled_rate_value() -> None:
    """The rate rises by fifths, is full after the warm-up, half in the middle and zero at the end."""
    s = replace(SMALL, learning_rate=1.0, steps=25)
    got = [scheduled_rate(i, s) for i in (0, 3, 4, 5, 15, 25)]
    assert got == pytest.approx([0.2, 0.8, 1.0, 1.0, 0.5, 0.0])


@pytest.mark.slow
def test_train_repeats_with_its_seed() -> None:
    assert final(SMALL) == final(SMALL)
    assert final(SMALL)[0] != final(replace(SMALL, seed=1))[0]


def test_train_takes_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    first = final(SMALL)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert final(SMALL) == first


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 7, 10])
def test_train_resumes_bitwise(stop: int, tmp_path: Path) -> None:
    """A run that was stopped and resumed from its file ends with the bits of one that was not."""
    path = tmp_path / "state.safetensors"
    train(*made(), SMALL, checkpoint=path, stop=stop)
    resumed = train(*made(), SMALL, checkpoint=path)
    whole = train(*made(), SMALL)
    assert synthetic.bits(resumed.network) == synthetic.bits(whole.network)
    assert resumed.training == whole.training
    assert len(whole.training["losses"]) == 20


def test_train_with_activation_checkpointing_changes_no_bit() -> None:
    settings = replace(SMALL, steps=5)
    assert final(settings, activation_checkpointing=True) == final(settings)


def test_train_leaves_the_given_model_alone() -> None:
    model, samples = made()
    before = synthetic.bits(model.network)
    trained = train(model, samples, SMALL)
    assert synthetic.bits(model.network) == before != synthetic.bits(trained.network)


def test_train_without_steps_is_the_prior() -> None:
    model, samples = made()
    s = replace(SMALL, steps=0)
    trained = train(model, samples, s)
    assert synthetic.bits(trained.network) == synthetic.bits(model.network)
    assert [step for step, _ in trained.training["held_back"]] == [0]


@pytest.mark.slow
def test_train_learns_and_keeps_the_best() -> None:
    """With plain EDM there is much to learn: 150 steps take a tenth off the loss on days never trained on."""
    s = replace(SMALL, covariance_rank=0, steps=150, batch=16, learning_rate=3e-3, ema=0.9, width=32)
    model, samples = made(s)
    trained = train(model, samples, s)
    held = [loss for _, loss in trained.training["held_back"]]
    assert min(held) < 0.9 * held[0]
    # The network that is returned has the loss that was the least.
    trainer = training._Trainer(replace(trained, covariance=trained.covariance.to(torch.float32)), samples, s)
    trainer.judge()
    assert trainer.held_back[0][1] == pytest.approx(min(held), rel=1e-6)


def test_train_that_only_harms_gives_back_the_start() -> None:
    """A rate of 3 ruins the network: every later loss is above the first, whose weights are returned."""
    s = replace(SMALL, learning_rate=3.0, clip=1e9, ema=0.0)
    model, samples = made(s)
    trained = train(model, samples, s)
    held = [loss for _, loss in trained.training["held_back"]]
    assert min(held[1:]) > held[0]
    assert synthetic.bits(trained.network) == synthetic.bits(model.network)


def test_train_never_touches_the_held_back_part() -> None:
    """The losses of all steps are the same whatever the last eighth of the record holds."""
    model, samples = made()
    wild = replace(samples, departure=samples.departure.clone())
    wild.departure[-6:] = 1e3
    assert math.ceil(52 / 8) == 7
    one, two = (train(model, s, SMALL).training for s in (samples, wild))
    assert one["losses"] == two["losses"]
    assert one["held_back"] != two["held_back"]


def test_train_tells_progress() -> None:
    told: list[tuple[str, int, int, str]] = []
    train(*made(), SMALL, lambda *a: told.append(a))
    assert [t[1] for t in told] == list(range(1, 21))
    assert {(t[0], t[2]) for t in told} == {("training", 20)}
    assert "loss" in told[-1][3]


def test_train_invalid_checkpoints(tmp_path: Path) -> None:
    """A checkpoint of other settings or another network, a damaged one and a model are refused by name."""
    path = tmp_path / "state.safetensors"
    train(*made(), SMALL, checkpoint=path, stop=2)
    for name, value in (("batch", 5), ("learning_rate", 1e-3)):
        with pytest.raises(ValueError, match=rf"state\.safetensors: was trained with other settings \(\['{name}'\]\)"):
            train(*made(), replace(SMALL, **{name: value}), checkpoint=path)  # type: ignore[arg-type]
    f = synthetic.fields(1)
    with pytest.raises(ValueError, match=r"state\.safetensors: does not fit this network"):
        train(*prepare(f, f.time[8:60], synthetic.STEP, SMALL), SMALL, checkpoint=path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"state\.safetensors: cannot be read"):
        train(*made(), SMALL, checkpoint=path)
    write_tensors(path, "storm-ref model 1", {"a": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="not 'storm-ref training state 2'"):
        train(*made(), SMALL, checkpoint=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixed_transitions": 0}, "mixed_transitions must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"steps": -1}, "must not be negative"),
        ({"held_back": 0.0}, "held_back"),
        ({"ema": 1.0}, "ema"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_settings_invalid(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)  # type: ignore[arg-type]


def test_prepare_invalid_patch() -> None:
    with pytest.raises(ValueError, match="patch"):
        made(replace(SMALL, patch=(5, 4)))


def test_prepare_periodic_and_single_channel() -> None:
    """On the globe positions lie on the sphere, and the smooth fields are periodic."""
    model, samples = made(channels=1, periodic=True)
    assert model.config.position_features == 3
    root = samples.roots[1]
    torch.testing.assert_close(root.roll((1, 1), (0, 1)), root, rtol=0, atol=1e-5)
    assert np.isfinite(train(model, samples, SMALL).training["losses"]).all()
