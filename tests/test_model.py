"""The file of a model, its default patch and tiling, and the prior it gives."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import synthetic
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from storm_ref.denoiser import randomise
from storm_ref.tiling import Tiling
from storm_ref.workbench.prior.model import (
    Model,
    default_patch,
    default_tiling,
    load,
    read_tensors,
    save,
    write_tensors,
)
from storm_ref.workbench.run.training import TrainSettings, prepare

WEIGHTS = Path(__file__).parents[1] / "tiny_data" / "storm_tiny.safetensors"
SMALL = TrainSettings(patch=(3, 4), width=16, heads=2, depth=1, frames=2, covariance_rank=10)


@pytest.fixture
def model(generator: torch.Generator) -> Model:
    """A model with generic weights: a fresh network is zero and would hide what the file lost."""
    f = synthetic.fields()
    made, _ = prepare(f, f.time[8:60], synthetic.STEP, SMALL)
    randomise(made.network, generator)
    return replace(made, training={"held_back": [[0, 1.0]]})


@pytest.mark.parametrize(
    ("grid", "patch"),
    [((33, 49), (3, 7)), ((32, 64), (4, 4)), ((721, 1440), (1, 24)), ((7, 13), (1, 13)), ((29, 31), (1, 1))],
)
def test_default_patch_value(grid: tuple[int, int], patch: tuple[int, int]) -> None:
    assert default_patch(*grid) == patch


@pytest.mark.parametrize("most", [1, 5, 24, 100])
def test_default_patch_divides_and_is_the_largest(most: int) -> None:
    for grid in ((12, 16), (33, 49), (30, 45)):
        got = default_patch(*grid, most)
        every = [(y, x) for y in range(1, 31) for x in range(1, 50) if y * x <= most]
        fits = [(y, x) for y, x in every if not (grid[0] % y or grid[1] % x)]
        assert got in fits
        assert got[0] * got[1] == max(y * x for y, x in fits)


@pytest.mark.usefixtures("unchecked")
def test_default_tiling_cuts_large_grids_only(model: Model) -> None:
    """A grid of 16 tokens is one tile; a large grid gets cores that the rules of tiling accept."""
    assert default_tiling(model).y.core == 12
    wide = replace(
        model, latitude=torch.linspace(80, -80, 120).double(), longitude=torch.arange(400).double() * 0.9, periodic=True
    )
    tiling = default_tiling(wide)
    assert (tiling.y.length, tiling.y.core, tiling.y.halo, tiling.y.blend) == (120, 72, 24, 12)
    assert (tiling.x.length, tiling.x.core, tiling.x.halo, tiling.x.blend) == (400, 80, 24, 12)


def test_model_trained_by_tiles_is_run_by_them(model: Model, tmp_path: Path) -> None:
    """The tiling survives the file and is the default of an analysis; an old file without a tiling has none."""
    tiling = Tiling.of((12, 16), (6, 8), (3, 4), (3, 4), False, (3, 4))
    save(replace(model, tiling=tiling), tmp_path / "tiles")
    got = load(tmp_path / "tiles")
    assert got.tiling == default_tiling(got) == tiling
    assert load(WEIGHTS).tiling is None
    f, x, sigma = synthetic.fields(), torch.linspace(-2, 2, 384).double().reshape(1, 2, 12, 16), torch.ones(1).double()
    with torch.no_grad():
        plain, given, whole = (
            m.prior_at(f, f.time[70], t).denoise(x, sigma) for m, t in ((got, None), (got, tiling), (model, None))
        )
    assert torch.equal(plain, given) and not torch.allclose(plain, whole, atol=1e-3)


def test_load_gives_back_what_was_saved(model: Model, tmp_path: Path) -> None:
    """Weights keep their bits, background and covariance are rounded to float32, and denoised fields agree."""
    path = tmp_path / "m.safetensors"
    save(model, path)
    got = load(path)
    assert synthetic.bits(got.network) == synthetic.bits(model.network)
    for name in ("config", "periodic", "season", "frames", "time_step", "variables", "units", "training"):
        assert getattr(got, name) == getattr(model, name), name
    assert torch.equal(got.longitude, model.longitude)
    assert torch.equal(got.background.regression, model.background.regression.float().double())
    assert torch.equal(got.covariance.vectors, model.covariance.vectors.float().double())
    f = synthetic.fields()
    x, sigma = torch.linspace(-2, 2, 768).double().reshape(2, 2, 12, 16), torch.ones(2).double()
    with torch.no_grad():
        one, two = (m.prior_at(f, f.time[70]) for m in (model, got))
        torch.testing.assert_close(two.denoise(x, sigma), one.denoise(x, sigma), rtol=0, atol=1e-4)
    torch.testing.assert_close(two.background, one.background, rtol=1e-6, atol=0)
    assert list(tmp_path.iterdir()) == [path]


def test_save_file_can_be_read_without_us(model: Model, tmp_path: Path) -> None:
    """The file holds tensors and text, which any safetensors reader understands."""
    save(model, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="np") as file:
        assert set(file.metadata()) == {"kind", "about"}
        assert file.get_tensor("network.final.weight").shape == (2 * 12, 16)


def test_load_invalid_files(model: Model, tmp_path: Path) -> None:
    """A file that is missing, truncated, foreign or of another kind is refused by name, with a remedy."""
    path = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match=r"m\.safetensors: cannot be read.*check the path"):
        load(path)
    save(model, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"m\.safetensors: cannot be read"):
        load(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"m\.safetensors: this is .*, not 'storm-ref model 1': give another file"):
        load(path)
    write_tensors(path, "storm-ref training state 1", {"a": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="this is 'storm-ref training state 1'"):
        load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda t, a: t.pop("network.final.weight"),
        lambda t, a: t.update({"network.final.weight": torch.zeros(24, 15)}),
        lambda t, a: t.update({"network.unknown": torch.zeros(1)}),
        lambda t, a: t.pop("climate.slope"),
        lambda t, a: t.update({"climate.mean": t["climate.mean"][..., :-1]}),
        lambda t, a: t.update({"covariance.values": -t["covariance.values"]}),
        lambda t, a: t.pop("static"),
        lambda t, a: a["config"].update(width=17),
        lambda t, a: a["config"].update(depth=2),
        lambda t, a: a["config"].update(colour=1),
        lambda t, a: a.pop("variables"),
    ],
)
def test_load_invalid_parts(change, model: Model, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A file in which any one part was tampered with is refused."""
    path = tmp_path / "m.safetensors"
    save(model, path)
    tensors, about = read_tensors(path, "storm-ref model 1")
    change(tensors, about)
    write_tensors(path, "storm-ref model 1", tensors, about)
    with pytest.raises(ValueError, match=r"m\.safetensors: its parts do not fit"):
        load(path)


def test_write_tensors_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full half-way through leaves the old file, and nothing else."""
    path = tmp_path / "m.safetensors"
    write_tensors(path, "k", {"a": torch.ones(1)}, {})

    def full(tensors: object, name: Path, metadata: object) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("storm_ref.workbench.prior.model.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        write_tensors(path, "k", {"a": torch.zeros(1)}, {})
    assert list(tmp_path.iterdir()) == [path]
    assert load_file(path)["a"].tolist() == [1.0]


def test_prior_of_a_fresh_network_is_the_gaussian(model: Model) -> None:
    """With F = 0 the denoiser is Sigma (Sigma + s^2)^-1 x, and the state is background plus std x."""
    for weight in (*model.network.final.parameters(), *model.network.final_adaptive.parameters()):
        torch.nn.init.zeros_(weight)
    f = synthetic.fields()
    prior = model.prior_at(f, f.time[70])
    x = torch.ones(1, 2, 12, 16, dtype=torch.float64)
    with torch.no_grad():
        got = prior.denoise(x, torch.tensor([0.5]).double())
    torch.testing.assert_close(got, model.covariance.apply(x, lambda v: v / (v + 0.25)), rtol=0, atol=1e-12)
    assert torch.equal(prior.physical(x)[0, 1], (prior.background[0, 1] + prior.std[1]))


def test_prior_depends_on_each_past_frame_and_no_other(model: Model) -> None:
    """The prior at time 70 depends on frames 69 and 68 and on no other, not even the truth at 70."""
    f = synthetic.fields()
    x, sigma = torch.zeros(1, 2, 12, 16).double(), torch.tensor([2.0]).double()

    def both(values: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        prior = model.prior_at(replace(f, values=values), f.time[70])
        with torch.no_grad():
            return prior.background, prior.denoise(x, sigma)

    plain = both(f.values)
    for frame in (67, 68, 69, 70, 71):
        moved = f.values.copy()
        moved[frame] += 5 * np.arange(16, dtype=np.float32)
        same = [torch.equal(a, b) for a, b in zip(plain, both(moved), strict=True)]
        assert same == ([False, False] if frame in (68, 69) else [True, True]), frame


@pytest.mark.usefixtures("unchecked")
def test_check_invalid(model: Model) -> None:
    f = synthetic.fields()
    with pytest.raises(ValueError, match=r"the model is of \('a', 'b'\), the data of \('b', 'a'\)"):
        model.prior_at(replace(f, variables=("b", "a")), f.time[70])
    with pytest.raises(ValueError, match="latitudes of the data are not the model's"):
        model.prior_at(replace(f, latitude=f.latitude + 1), f.time[70])
    with pytest.raises(ValueError, match="longitudes of the data are not the model's"):
        model.prior_at(replace(f, longitude=f.longitude[:-1]), f.time[70])
