"""The bench's command and its page: what it leaves, what it refuses, and that it shows what was measured."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot as plt

from storm_ref.experiments import fidelity
from storm_ref.experiments.bench import __main__ as command
from storm_ref.experiments.bench import history, machine, pictures, report, scale, timing
from storm_ref.experiments.bench.history import Job
from storm_ref.experiments.fidelity import Sizes
from storm_ref.workbench.io import bundled

pytestmark = pytest.mark.slow

SIZES = Sizes((0.5, 2.0), (12, 24), (12, 24), (12, 24), (0, 1), 8, (2, 4), (2,), 2, 2, 2, 3.0, (2, 2))
JOB = scale.DomainJob((24, 40), "tiny", 8, 2, 1, tiles_per_batch=4, threads=1)


def _history(frames: int, form: str, grid: tuple[int, int] = (128, 256)) -> dict[str, Any]:
    return {
        "frames": frames,
        "form": form,
        "grid": list(grid),
        "tokens": frames * math.prod(grid),
        "seconds_compress": 2.0,
        "seconds_denoise": 1.0,
        "peak_bytes": 8 * 10**8,
        "peak_bytes_compress": 5 * 10**8,
        "threads": 2,
        "tokens_per_s": 1e6,
        "tokens_per_s_compress": 2e6 if form == "folded" else 1e5,
    }


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    """A cost.json of numbers that are easy to find again; one of them misses its aim."""
    growth = [
        {"method": m, "tokens": n, "multiply_adds": n, "peak_live_bytes": n, "seconds": n / 1000}
        for m in ("tiled", "full", "timesformer")
        for n in (4096, 8192)
    ]
    history = [_history(k, form) for k in (96, 6000) for form in ("folded", "equations")]
    return {
        **{aim.key: 1.0 for aim in report.AIMS},
        "sampler_overhead": 0.01,
        "rss_growth_k96_to_k6000": 0.0,
        "counted_exponent_full": 1.95,
        "ratio_to_dense": 1.23,
        "tokens": 196_608_000,
        "exponent_full": 1.9,
        "exponent_timesformer": 1.5,
        "growth": growth,
        "tokens_per_s_compress_equations": 1e5,
        "history": [*history, _history(177_500, "folded", (56, 64))],
        "machine": machine.describe(2),
    }


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return fidelity.run(bundled.weights(), sizes=SIZES)


def test_write_shows_every_part(tmp_path: Path, values: dict[str, Any], measured: dict[str, Any]) -> None:
    report.write(tmp_path, values, measured, {"tokens": _history(610_352, "folded")})
    page = (tmp_path / "index.html").read_text()
    shown = set(re.findall(r'<img src="([^"]+)"', page))
    assert shown == {p.name for p in tmp_path.glob("*.png")} and len(shown) == 10
    assert all((tmp_path / name).stat().st_size > 10_000 for name in shown)
    assert 'class="n no">1.230<' in page and page.count('class="n ok"') == len(report.AIMS) - 1
    for text in ("196,608,000 tokens, 0.80 GB, 3.0 s", "19,999,", "about 20 B tokens", "100,000 tokens/s"):
        assert text.replace("19,999,", "20,000,014,336") in page
    assert page.count("<tr>") == 2 + len(report.AIMS) + 4 + 1 + sum(len(p["coarse"]) for p in measured.values())


def test_pictures_say_what_their_lines_are(values: dict[str, Any], measured: dict[str, Any]) -> None:
    """Whatever has labelled lines has a legend that names them, and every axis of numbers a label."""
    exponents = {m: 1.0 for m in ("tiled", "full", "timesformer")}
    figures = [pictures.growth(values["growth"], exponents), pictures.history(values["history"])]
    figures += [draw(measured) for draw in (pictures.halo, pictures.sampled, pictures.seams, pictures.reach)]
    for figure in figures:
        legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
        named = {text.get_text() for legend in legends for text in legend.get_texts()}
        lines = {label for axis in figure.axes for label in axis.get_legend_handles_labels()[1]}
        assert lines and lines <= named
        assert all(axis.get_xlabel() for axis in figure.axes) and any(axis.get_ylabel() for axis in figure.axes)
        plt.close(figure)


def test_write_without_a_part_leaves_it_out(tmp_path: Path, values: dict[str, Any]) -> None:
    report.write(tmp_path, {k: v for k, v in values.items() if k != "growth"}, {}, {})
    page = (tmp_path / "index.html").read_text()
    assert "history.png" in page and "growth.png" not in page and "coarse" not in page
    report.write(tmp_path, {}, {}, {})
    assert "<img" not in (tmp_path / "index.html").read_text()


def test_write_escapes_what_it_is_told(tmp_path: Path, values: dict[str, Any]) -> None:
    report.write(tmp_path, values | {"machine": {"processor": "<script>alert(1)</script>"}}, {}, {})
    assert "<script>" not in (tmp_path / "index.html").read_text()


def test_aims_judge() -> None:
    """Each aim takes a value that is well within it and refuses one that is well outside."""
    good = dict(zip([a.key for a in report.AIMS], (1.0, 1.0, 1.95, 1.0, 1.0, 0.01, 2e8, 0.8, 0.0), strict=True))
    bad = dict(zip([a.key for a in report.AIMS], (1.01, 0.99, 1.8, 1.06, 1.2, 0.04, 1e8, 2.1, 0.03), strict=True))
    assert all(aim.met(good[aim.key]) and not aim.met(bad[aim.key]) for aim in report.AIMS)


def test_fidelity_headline_is_of_the_most_steps(measured: dict[str, Any]) -> None:
    headline = report.fidelity_headline(measured)
    assert headline.keys() == {"generic", "trained"}
    assert all(row["steps"] == 4 for rows in headline.values() for row in rows) and len(headline["generic"]) == 3


def test_parts_make_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], measured: dict[str, Any]
) -> None:
    """cost.json as a whole run leaves it, the measurements replaced by quick or given ones."""
    monkeypatch.setattr(timing, "growth", lambda progress: values["growth"])
    monkeypatch.setattr(timing, "ratio_to_dense", lambda progress: {"ratio": 1.1})
    monkeypatch.setattr(timing, "sampler_overhead", lambda c, steps: {"overhead": 0.001 * steps})
    monkeypatch.setattr(fidelity, "run", lambda *_, **__: measured)
    seen: list[Job] = []

    def sweep(jobs: list[Job], progress: object) -> list[dict[str, Any]]:
        seen.extend(jobs)
        return [_history(job.frames, job.form, job.grid) for job in jobs]

    monkeypatch.setattr(history, "sweep", sweep)
    assert command.main(["--out", str(tmp_path), "--threads", "3"]) == 0
    costs = json.loads((tmp_path / "cost.json").read_text())
    assert all(math.isfinite(costs[aim.key]) for aim in report.AIMS)
    assert costs["exponent_tiled"] == pytest.approx(1) and costs["tokens"] == 6000 * 32_768
    assert (costs["ratio_to_dense"], costs["sampler_overhead"], costs["peak_rss_gb"]) == (
        1.1,
        0.02,
        0.8,
    )
    assert costs["rss_growth_k96_to_k6000"] == 0 and costs["tokens_per_s"] == 1e6
    assert {job.threads for job in seen} == {3} and {job.frames for job in seen} >= {1, 96, 6000, 177_500}
    assert json.loads((tmp_path / "fidelity.json").read_text()).keys() == measured.keys()


def test_main_adds_parts_and_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PARTS", {"one": lambda *_: {"exponent_tiled": 1.0}, "two": lambda *_: {"b": 2}})
    assert command.main(["--out", str(tmp_path), "--only", "one"]) == 0
    assert command.main(["--out", str(tmp_path), "--only", "two"]) == 0
    kept = json.loads((tmp_path / "cost.json").read_text())
    assert (kept["exponent_tiled"], kept["b"]) == (1.0, 2) and kept["machine"]["torch"]


def test_main_scale_runs_its_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scale, "JOBS", {"domain": JOB})
    assert command.main(["scale", "--out", str(tmp_path), "--threads", "1"]) == 0
    assert json.loads((tmp_path / "scale" / "domain.json").read_text())["points"] == 960
    assert "24 x 40 points" in (tmp_path / "index.html").read_text()
    assert "scale: domain: done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--only", "speed"], "there is no speed"), (["scale", "--only", "x"], "choose from"), (["--threads", "0"], "1")],
)
def test_main_invalid(tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*words, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_main_invalid_model_before_anything_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path), "--model", str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors" in capsys.readouterr().err and not (tmp_path / "cost.json").exists()


def test_main_stopped_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "PARTS", {"one": lambda *_: {"a": 1}, "two": stop})
    assert command.main(["--out", str(tmp_path)]) == 130
    assert "go on from here" in capsys.readouterr().err
    assert json.loads((tmp_path / "cost.json").read_text())["a"] == 1


def test_describe_names_the_machine() -> None:
    about = machine.describe(3)
    assert about["threads"] == 3 and about["cores"] >= 1 and about["memory_gb"] > 0.5 and about["processor"]
