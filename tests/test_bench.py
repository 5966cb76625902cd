"""The benchmarks measure what they say, resume where they stopped, and say so when a part of them fails."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from counting import Count

from storm_ref import cost
from storm_ref.config import StormConfig
from storm_ref.denoiser import Condition, denoiser
from storm_ref.experiments import out_of_core
from storm_ref.experiments.bench import history, scale, timing
from storm_ref.experiments.bench.history import Checkpoint, History, Job, streamer
from storm_ref.experiments.folded import FoldedState
from storm_ref.tiling import overhead, tiled_denoiser, tiles
from storm_ref.tokenisation import sphere_position

SMALL = StormConfig(2, 1, (1, 1), 8, 2, 1)


# Timing


def test_band_has_tiles_of_one_shape_and_proportional_cost() -> None:
    sizes = [4096, 8192, 65_536]
    shapes = {tuple(tile.weight.shape) for n in sizes for tile in tiles(timing.band(n))}
    assert shapes == {(timing.CORE + timing.HALO, timing.CORE + 2 * timing.HALO)}
    adds = [cost.tiled_evaluation(SMALL, timing.band(n)).multiply_adds for n in sizes]
    assert adds[1] == 2 * adds[0] and adds[2] == 16 * adds[0]


def test_band_invalid_tokens() -> None:
    with pytest.raises(ValueError, match="whole tiles"):
        timing.band(5000)


def test_methods_count_what_they_run() -> None:
    for method in timing.methods(SMALL):
        run = method.prepare(4096)
        with torch.no_grad(), Count() as count:
            run()
        assert count.total.multiply_adds == method.multiply_adds(4096), method.name


def test_counted_exponents_are_those_of_the_specification() -> None:
    exponents = timing.counted(timing.ten_million(), [4096 << i for i in range(9)])
    assert exponents["tiled"] == pytest.approx(1, abs=5e-4)
    assert exponents["frames"] == pytest.approx(1, abs=5e-4)
    assert exponents["full"] >= 1.9
    assert 1 < exponents["tiled_closed_square"] < 1.07


def test_growth_records_every_method_and_stops_at_the_limit() -> None:
    records = timing.growth(4096, 8192, 1, SMALL)
    by = {m: [r["tokens"] for r in records if r["method"] == m] for m in ("tiled", "full", "timesformer")}
    assert by["tiled"] == [4096, 8192]
    assert by["full"][0] == by["timesformer"][0] == 4096
    assert all(r["seconds"] > 0 for r in records)


def test_ratio_to_dense_compares_equal_work() -> None:
    comparison = timing.ratio_to_dense(side=3, heads=1, width=2, rounds=1)
    assert comparison["multiply_adds"] == comparison["multiply_adds_dense"]
    assert comparison["ratio"] == pytest.approx(comparison["seconds_tiles"] / comparison["seconds_dense"])


def test_sampler_overhead_counts_every_evaluation() -> None:
    run = timing.sampler_overhead(SMALL, steps=2)
    assert run["evaluations"] == 3
    assert run["overhead"] == pytest.approx(run["seconds"] / run["seconds_network"] - 1)
    assert 0 < run["seconds_network"] < run["seconds"]


# History


def test_history_frames_are_the_same_in_any_chunks() -> None:
    frames = History(SMALL, (4, 8))
    past, static, age = frames.chunk(0, 100)
    parts = [frames.chunk(at, min(at + 7, 100)) for at in range(0, 100, 7)]
    assert torch.equal(torch.cat([p for p, _, _ in parts], 1), past)
    assert torch.equal(torch.cat([a for _, _, a in parts], 1), age)
    assert static.shape == (1, 100, 1, 4, 8) and age[0, 0] == 1
    assert not torch.equal(past[:, 0], past[:, history.BANK])


@pytest.mark.parametrize("form", history.FORMS)
def test_streamer_is_the_compression(form: str) -> None:
    c = StormConfig(2, 1, (1, 1), 8, 2, 1)
    network = timing.generic_network(c).double()
    frames = History(c, (4, 8))
    memory = streamer(form, network, frames)
    with torch.no_grad():
        for at in range(0, 50, 9):
            past, static, age = frames.chunk(at, min(at + 9, 50))
            memory.take(past.double(), static.double(), age)
        past, static, age = frames.chunk(0, 50)
        expected = network.compress(past.double(), static.double(), age, frames.position)
    assert torch.allclose(memory.finish(), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.slow
def test_run_has_the_same_memory_whatever_the_frames() -> None:
    few, many = (history.run(Job(k, grid=(8, 64), threads=1)) for k in (64, 960))
    assert (few["tokens"], many["tokens"]) == (64 * 512, 960 * 512)
    assert many["peak_bytes"] == pytest.approx(few["peak_bytes"], rel=0.03)
    assert many["peak_bytes"] > 100e6  # a process with torch in it: the peak of a process, and in bytes


@pytest.mark.slow
def test_run_invalid_says_what_the_process_said(tmp_path: Path) -> None:
    job = Job(2, grid=(8, 64), threads=1)
    (tmp_path / "state").write_bytes(b"no tensors")
    with pytest.raises(RuntimeError, match="cannot be read as safetensors"):
        history.run(job, checkpoint=tmp_path / "state")


def test_checkpoint_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """A stream cut after any chunk ends in the same bits, without taking a frame twice."""
    job = Job(20, grid=(8, 64), chunk=4, threads=1)
    network, frames = timing.generic_network(SMALL), History(SMALL, job.grid)

    def stream(path: Path | None, stop: int) -> tuple[FoldedState, int]:
        memory = streamer("folded", network, frames)
        taken = 0

        class Counted:
            kind = memory.kind
            state = property(lambda _: memory.state, lambda _, value: setattr(memory, "state", value))

            def take(self, past: torch.Tensor, static: torch.Tensor, age: torch.Tensor) -> None:
                nonlocal taken
                if taken == stop:
                    raise KeyboardInterrupt
                memory.take(past, static, age)
                taken += 1

            def finish(self) -> torch.Tensor:
                return memory.finish()

        checkpoint = Checkpoint(path, job)
        checkpoint.every = 0.0
        history._stream(job, Counted(), frames, checkpoint)
        return memory.state, taken

    whole, chunks = stream(None, 99)
    assert chunks == 5
    with pytest.raises(KeyboardInterrupt):
        stream(tmp_path / "state", 3)
    rest, more = stream(tmp_path / "state", 99)
    assert more == 2
    assert all(torch.equal(a, b) for a, b in zip(vars(whole).values(), vars(rest).values(), strict=True))
    again, none = stream(tmp_path / "state", 99)
    assert none == 0 and torch.equal(again.values, whole.values)


def test_checkpoint_invalid_of_another_job(tmp_path: Path) -> None:
    job = Job(20, grid=(8, 64), chunk=4, threads=1)
    network, frames = timing.generic_network(SMALL), History(SMALL, job.grid)
    history._stream(job, streamer("folded", network, frames), frames, Checkpoint(tmp_path / "state", job))
    other = Job(24, grid=(8, 64), chunk=4, threads=1)
    with pytest.raises(ValueError, match="delete it or choose another folder"):
        Checkpoint(tmp_path / "state", other).load(streamer("folded", network, frames))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"form": "fast"}, "there is no 'fast'"), ({"frames": 0}, "at least 1"), ({"grid": (8, 100)}, "divide")],
)
def test_job_invalid(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Job(**({"frames": 1, "grid": (8, 64)} | change))  # type: ignore[arg-type]


def test_job_survives_json() -> None:
    job = Job(5, grid=(8, 64))
    assert Job(**(json.loads(json.dumps(asdict(job))) | {"grid": (8, 64)})) == job
    assert overhead(job.tiling) > 1 and math.prod(job.grid) * 5 == job.tokens


def test_denoise_of_one_frame_is_by_tiles() -> None:
    network, frames = timing.generic_network(SMALL), History(SMALL, (8, 96))
    job = Job(1, grid=(8, 96))
    assert len(tiles(job.tiling)) == 3
    memory = torch.zeros(1, 8, 96, SMALL.width)
    assert history.denoise_once(network, memory, frames, job.tiling) > 0
    with pytest.raises(RuntimeError, match="not finite"):
        history.denoise_once(network, memory + torch.nan, frames, job.tiling)
    x, condition = timing.scene(network, job.tiling)
    sigma = torch.ones(1, dtype=torch.float64)
    with torch.no_grad():
        whole, cut = denoiser(network, condition)(x, sigma), tiled_denoiser(network, condition, job.tiling)(x, sigma)
    assert not torch.equal(whole, cut)


# Scale


DOMAIN = scale.DomainJob((24, 40), "tiny", 8, 2, 1, tiles_per_batch=4, threads=1)


def test_work_is_the_denoiser_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stores that a domain's run leaves hold T[D] of the stores it read, bit for bit."""
    record = scale.work(DOMAIN, tmp_path)
    assert (record["points"], record["tokens"]) == (960, 1920)
    state, static, memory, out = (
        torch.from_numpy(np.asarray(out_of_core.open_array(tmp_path / f"{name}.zarr")[...]))
        for name in ("state", "static", "memory", "out")
    )
    network = timing.generic_network(scale.PRESETS["tiny"]())
    latitude = torch.linspace(-90, 90, 25)[:-1] + 90 / 24
    position = sphere_position(latitude, torch.arange(40) * 9.0, (1, 1))
    condition = Condition(static[None], memory[None], position[None], True)
    with torch.no_grad():
        denoise = tiled_denoiser(network, condition, DOMAIN.tiling, DOMAIN.tiles_per_batch)
        expected = denoise(state[None], torch.ones(1, dtype=torch.float64))
    assert torch.equal(out[None], expected)
    assert float(state.std()) == pytest.approx(1, abs=0.1)
    assert not torch.equal(state.float(), static)
    monkeypatch.setattr(out_of_core, "denoise", None)  # what is done is not done again
    again = scale.work(DOMAIN, tmp_path)
    assert again["seconds_denoise"] == record["seconds_denoise"]


@pytest.mark.slow
def test_run_keeps_the_record_and_removes_the_stores(tmp_path: Path) -> None:
    record = scale.run("small", DOMAIN, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["small.json"]
    assert scale.run("small", DOMAIN, tmp_path) == record  # from the record: times would differ
    with pytest.raises(ValueError, match="record of another run"):
        scale.run("small", replace(DOMAIN, blend=2), tmp_path)
    assert scale.run("small", replace(DOMAIN, threads=2), tmp_path) == record


def test_work_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scale.work(DOMAIN, _folder(tmp_path / "whole"))
    said: list[int] = []

    def stop(line: dict[str, int]) -> None:
        said.append(line["frames"])
        if len(said) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(scale, "speak", stop)
    with pytest.raises(KeyboardInterrupt):
        scale.work(DOMAIN, _folder(tmp_path / "cut"))
    again = scale.work(DOMAIN, tmp_path / "cut")
    assert said == sorted(said) and said[-1] == scale._STEPS and said.count(scale._STEPS) == 1
    values = [np.asarray(out_of_core.open_array(tmp_path / f / "out.zarr")[...]) for f in ("whole", "cut")]
    assert np.array_equal(*values)
    assert again["points"] == whole["points"]


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(("change", "words"), [({"preset": "huge"}, "no 'huge'"), ({"core": 7}, "divide")])
def test_domain_job_invalid(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(DOMAIN, **change)  # type: ignore[arg-type]


def test_jobs_are_of_the_sizes_of_the_paper() -> None:
    tokens = {name: job.tokens for name, job in scale.JOBS.items() if isinstance(job, Job)}
    assert tokens["frames"] == pytest.approx(635e6, rel=0.005)
    assert tokens["tokens"] >= 20e9 and tokens["equations"] == 6000 * 32_768
