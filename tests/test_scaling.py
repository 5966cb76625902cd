"""The cost model of strong scaling: its formulas by hand, its laws, and the figures that docs/scale.md quotes."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from storm_ref import cost
from storm_ref.config import StormConfig, storm_10b, storm_10m
from storm_ref.experiments.scaling import __main__ as command
from storm_ref.experiments.scaling import model, report, sensitivity
from storm_ref.experiments.scaling.model import Level, Machine, Workload, best, efficiency, ideal, meshes, step, wire
from storm_ref.parallel import traffic as messages
from storm_ref.parallel.mesh import Mesh
from storm_ref.parallel.traffic import Traffic
from storm_ref.tiling import Axis, Tiling

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
SMALL = StormConfig(3, 3, (2, 2), 64, 4, 2)
TILES = Tiling.of((16, 48), (8, 8), (2, 2), (2, 2), periodic=True, patch=(2, 2))  # 2 x 6
WORK = Workload(SMALL, TILES, samples=4)
# Products alone take time.
PLAIN = Machine(memory_bandwidth=1e30, issue=0.0, fixed=0.0, jitter=0.0)
CAPACITY = Machine().capacity
# Exact but for the order in which floats are summed.
NEAR = 1e-12


@pytest.mark.parametrize(
    ("mesh", "axis", "kind", "seconds"),
    [
        # Four ranks in a node: 50 GB/s, 5 us; 3 messages of 8 GB in all.
        (Mesh(tp=4), "tp", "all-reduce", 2 * 3 / 4 * 8 / 50 + 3 * 2 * 2 * 5e-6),
        (Mesh(tile=4, tp=2), "tile", "all-gather", 3 * 8 / 50 + 3 * 2 * 5e-6),
        (Mesh(fsdp=4), "fsdp", "reduce-scatter", 3 / 4 * 8 / 50 + 3 * 2 * 5e-6),
        (Mesh(tile=5), "tile", "all-to-all", 8 / 50 + 3 * 3 * 5e-6),
        # A rank a node: 10 GB/s, 10 us. Two a node share one ring, and so do eight, which the node then limits.
        (Mesh(ddp=4, tp=8), "ddp", "all-reduce", 2 * 3 / 4 * 8 / 10 + 3 * 2 * 2 * 10e-6),
        (Mesh(tile=4, tp=4), "tile", "all-reduce", 2 * 3 / 4 * 8 / 20 + 3 * 2 * 2 * 10e-6),
        (Mesh(fsdp=16), "fsdp", "all-gather", 15 * 8 / 50 + 3 * 4 * 10e-6),
        # Rows for single ranks go out by each rank's own share of the links.
        (Mesh(tile=4, tp=4), "tile", "all-to-all", 8 / 10 + 3 * 2 * 10e-6),
    ],
)
def test_wire_is_the_formula_by_hand(mesh: Mesh, axis: str, kind: str, seconds: float) -> None:
    machine = Machine(inside=Level(50e9, 5e-6), between=Level(10e9, 10e-6), node=8)
    assert wire(machine, mesh, axis, kind, Traffic(3, 8 * 10**9)) == pytest.approx(seconds, rel=NEAR)


@pytest.mark.parametrize("training", [True, False])
def test_step_of_one_rank_is_compute(training: bool) -> None:
    """No message, and the products of [COST-2] and, in training, of [COST-3] three times over."""
    work = replace(WORK, training=training)
    alone = step(PLAIN, work, Mesh())
    assert (alone.tp, alone.tile, alone.fsdp, alone.ddp, alone.fixed) == (0, 0, 0, 0, 0)
    products = cost.tiled_evaluation(SMALL, TILES, 4).multiply_adds
    if training:
        products = 3 * (products + cost.memory(SMALL, 8 * 24, work.frames, batch=4).multiply_adds)
    assert alone.total == pytest.approx(products / (0.4 * 95.8e12), rel=NEAR)
    assert alone.total == pytest.approx(ideal(PLAIN, work, 1), rel=NEAR)


def test_step_adds_what_is_fixed_and_the_worst_of_many() -> None:
    late = step(replace(PLAIN, fixed=1.0, jitter=0.1), WORK, Mesh(ddp=4))
    alone = step(PLAIN, WORK, Mesh(ddp=4))
    assert late.compute == pytest.approx(alone.compute * (1 + 0.1 * math.sqrt(2 * math.log(4))), rel=NEAR)
    assert late.fixed == 1.0


def test_step_is_no_shorter_than_its_launches() -> None:
    """Two blocks, three passes, and batches: one of each shape of tile, here one."""
    machine = replace(PLAIN, issue=1.0)
    assert step(machine, WORK, Mesh()).compute == pytest.approx(2 * 3 * 1.0, rel=1e-6)
    assert step(machine, replace(WORK, tiles_per_batch=4), Mesh()).compute == pytest.approx(18, rel=1e-6)


def test_step_waits_for_the_rank_with_most_tiles() -> None:
    """Five equal tiles over two ranks: three parts in five of the work, not half."""
    row = Tiling(Axis(8, 8, patch=2), Axis(40, 8, 2, 2, periodic=True, patch=2))
    work = replace(WORK, tiling=row, training=False)
    whole, cut = (step(PLAIN, work, Mesh(tile=tile)).compute for tile in (1, 2))
    assert cut == pytest.approx(whole * 3 / 5, rel=NEAR)


def test_step_divides_by_tp_what_tp_shares_out() -> None:
    whole, cut = (step(PLAIN, WORK, Mesh(tp=tp)).compute for tp in (1, 4))
    assert whole / 4 < cut < whole / 2


def test_step_hides_weights_behind_compute() -> None:
    """A share of what fsdp and ddp send, and no more than compute lasts."""
    slow = replace(PLAIN, between=Level(1e6, 0.0), inside=Level(1e6, 0.0))
    mesh = Mesh(ddp=2, fsdp=2)
    seen, half, hidden = (step(replace(slow, overlap=o), WORK, mesh) for o in (0.0, 0.5, 1.0))
    waits = seen.ddp + seen.fsdp
    assert seen.compute < waits / 2
    assert half.ddp + half.fsdp == pytest.approx(waits - seen.compute, rel=NEAR)
    assert hidden.total == pytest.approx(waits, rel=NEAR)
    fast = replace(PLAIN, between=Level(1e15, 0.0), inside=Level(1e15, 0.0), overlap=0.75)
    assert step(fast, WORK, mesh).fsdp == pytest.approx(step(replace(fast, overlap=0.0), WORK, mesh).fsdp / 4, rel=NEAR)


@pytest.mark.parametrize("training", [True, False])
def test_exchange_is_that_of_the_busiest_rank(training: bool) -> None:
    """[PAR-9], [PAR-10]; memory tokens are gathered like states."""
    mesh = Mesh(tile=5)
    rows, tokens = model._exchange(TILES, 5, training)
    every = [messages.exchange_traffic(TILES, mesh, rank, 1, training)["tile", "all-to-all"] for rank in range(5)]
    assert rows.bytes == max(t.bytes for t in every)
    assert rows.messages == every[0].messages
    plain = replace(TILES, y=replace(TILES.y, blend=0), x=replace(TILES.x, blend=0))  # then a gather alone sends rows
    points = max(messages.exchange_traffic(plain, mesh, r, 1, training)["tile", "all-to-all"].bytes for r in range(5))
    assert 4 * tokens == points


def all_meshes(work: Workload = WORK) -> list[Mesh]:
    sizes = (1, 2, 4, 6, 8, 16, 24, 48)
    return [mesh for size in sizes for mesh in meshes(CAPACITY, work, size)]


def test_meshes_fit_and_are_all_that_do() -> None:
    """[PAR-4], against a search of every mesh of 12 ranks."""
    legal = meshes(CAPACITY, WORK, 12)
    every = [Mesh(d, f, t, p) for d in (1, 2, 3, 4) for f in (1, 2, 3, 4) for t in range(1, 13) for p in (1, 2, 4)]
    assert set(legal) == {m for m in every if m.size == 12 and m.data <= 4}
    for mesh in legal:
        mesh.check(SMALL, WORK.tiles, WORK.samples)


def test_meshes_hold_their_weights() -> None:
    """10 B in training: 16 bytes for each of 9.4e9 weights do not go into half of 64 GB."""
    held = [model.weight_bytes(Workload(storm_10b()), mesh) for mesh in (Mesh(), Mesh(fsdp=8), Mesh(tp=8))]
    assert held[0] == pytest.approx(16 * 9.4e9, rel=0.02)
    assert held[1] == pytest.approx(held[0] / 8, rel=0.01)
    assert held[0] / 8 < held[2] < held[0]
    legal = meshes(CAPACITY, Workload(storm_10b()), 512)
    assert legal and all(mesh.fsdp * mesh.tp > 4 for mesh in legal)


def test_best_is_the_fastest() -> None:
    fastest = best(Machine(), WORK, 8)
    assert fastest.total == min(step(Machine(), WORK, mesh).total for mesh in meshes(CAPACITY, WORK, 8))
    assert fastest.mesh.size == 8


def test_best_invalid_no_mesh() -> None:
    """Four samples, twelve tiles, four heads: no more than 192 ranks."""
    with pytest.raises(ValueError, match="no mesh of 256 accelerators fits 4 samples, 12 tiles and 4 heads"):
        best(Machine(), WORK, 256)


@pytest.mark.parametrize("training", [True, False])
def test_step_takes_no_less_than_products_shared_out(training: bool) -> None:
    work = replace(WORK, training=training)
    for machine in (PLAIN, Machine(), replace(Machine(), overlap=1.0)):
        for mesh in all_meshes(work):
            assert step(machine, work, mesh).total >= ideal(machine, work, mesh.size) * (1 - NEAR)


BETTER = {
    "peak": replace(Machine(), peak=2 * Machine().peak),
    "memory": replace(Machine(), memory_bandwidth=2 * Machine().memory_bandwidth),
    "inside": replace(Machine(), inside=Level(100e9, 5e-6)),
    "inside's hop": replace(Machine(), inside=Level(50e9, 2.5e-6)),
    "between": replace(Machine(), between=Level(20e9, 10e-6)),
    "between's hop": replace(Machine(), between=Level(10e9, 5e-6)),
    "issue": replace(Machine(), issue=Machine().issue / 2),
    "fixed": replace(Machine(), fixed=Machine().fixed / 2),
    "jitter": replace(Machine(), jitter=Machine().jitter / 2),
    "overlap": replace(Machine(), overlap=1.0),
}


@pytest.mark.parametrize("name", BETTER)
def test_step_is_no_slower_on_a_better_machine(name: str) -> None:
    for mesh in all_meshes():
        assert step(BETTER[name], WORK, mesh).total <= step(Machine(), WORK, mesh).total * (1 + NEAR)
    for size in (512, 32768):
        work = Workload(storm_10m())
        assert best(BETTER[name], work, size).total <= best(Machine(), work, size).total * (1 + NEAR)


def test_efficiency_is_one_where_all_can_be_shared_out() -> None:
    assert efficiency(Machine(), WORK, 4, 4) == 1.0
    assert efficiency(PLAIN, replace(WORK, samples=64, training=False), 16, 4) == pytest.approx(1, rel=NEAR)


@pytest.mark.slow
def test_efficiency_falls_with_accelerators() -> None:
    efficiencies = [efficiency(Machine(), Workload(storm_10m()), size) for size in model.SIZES]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert 0 < efficiencies[-1] < efficiencies[0] == 1


def test_needed_gives_the_figure_it_is_asked_for() -> None:
    knob = next(k for k in sensitivity.KNOBS if k.name == "peak attained")
    work = Workload(storm_10m())
    value = sensitivity.needed(work, knob, 0.6)
    assert value is not None
    # Bisection leaves 12 / 2^12 of a power of two, and 2^0.003 is 1.002.
    assert sensitivity.turned(work, knob, value / knob.default) == pytest.approx(0.6, abs=0.005)
    assert sensitivity.needed(work, knob, 1.5) is None


@pytest.mark.parametrize("knob", sensitivity.KNOBS, ids=lambda knob: knob.name)
def test_knobs_turn_from_the_defaults(knob: sensitivity.Knob) -> None:
    """The value that is printed is the model's; twice the value gives another result."""
    given = Machine(), Workload(storm_10m())
    assert efficiency(*knob.turn(*given, knob.default)) == pytest.approx(efficiency(*given), rel=NEAR)
    assert knob.turn(*given, 2 * knob.default) != given


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"peak": 0.0}, "must be positive"),
        ({"between": Level(-1.0, 0.0)}, "must be positive"),
        ({"attained": 1.5}, "lie in 0 to 1"),
        ({"overlap": -0.1}, "lie in 0 to 1"),
        ({"jitter": -1.0}, "must not be negative"),
    ],
)
def test_machine_invalid(change: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Machine(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["samples", "frames", "chunk", "tiles_per_batch"])
def test_workload_invalid_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        replace(WORK, **{name: 0})  # type: ignore[arg-type]


def tables(first: str) -> list[list[str]]:
    """The rows of the tables in docs/scale.md whose heading starts with `first`."""
    lines, rows, inside = PAGE.read_text().splitlines(), [], False
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells or cells[0] == first:
            inside = bool(cells)
        elif inside and not set("".join(cells)) <= set("-"):
            rows.append(cells)
    return rows


@pytest.mark.slow
def test_page_quotes_what_the_command_finds(tmp_path: Path) -> None:
    """In a process of its own, without checks of shapes: some twenty seconds instead of minutes."""
    arguments = [sys.executable, "-m", "storm_ref.experiments.scaling", "--out", str(tmp_path)]
    subprocess.run(arguments, check=True, capture_output=True, cwd=PAGE.parents[1])
    computed = json.loads((tmp_path / "scaling.json").read_text())["tables"]
    assert tables("training") == computed["training"]
    assert tables("evaluation") == [row for row in computed["evaluation"] if row[1] in ("512", "4,096", "32,768")]
    assert tables("assumption") == computed["sensitivities"]
    assert tables("samples") == computed["batches"]


def test_page_quotes_the_predictions() -> None:
    """The same for the ends of the table, without waiting for the rest."""
    for name, config in (("10 M", storm_10m()), ("10 B", storm_10b())):
        rows = report.prediction_rows({name: [best(Machine(), Workload(config), size) for size in (512, 32768)]})
        assert [row for row in tables("training") if row[0] == name and row[1] in ("512", "32,768")] == rows


def test_page_names_the_machine() -> None:
    """Every default is in the text as the model has it."""
    text, m = PAGE.read_text(), Machine()
    for value in (m.peak / 1e12, m.attained, m.memory_bandwidth / 1e12, m.capacity / 1e9, m.node, m.overlap):
        assert f"| {value:g}" in text
    for level in (m.inside, m.between):
        assert f"| {level.bandwidth / 1e9:g} GB/s, {level.latency * 1e6:g} us" in text
    for value, unit in ((m.issue * 1e3, "ms"), (m.fixed * 1e3, "ms"), (m.jitter * 100, "%")):
        assert f"| {value:g} {unit}" in text


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with fewer sizes and variants."""
    monkeypatch.setattr(report, "SIZES", (512, 32768))
    monkeypatch.setattr(report, "KNOBS", report.KNOBS[-2:-1])
    monkeypatch.setattr(report, "BATCHES", (1024,))


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_main_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path / "a" / "b")]) == 0
    record = json.loads((tmp_path / "a" / "b" / "scaling.json").read_text())
    steps: Sequence[dict[str, float]] = record["steps"]["10 M"]
    assert record["samples"] == 512
    assert steps[-1]["total"] == best(Machine(), Workload(storm_10m()), 32768).total
    assert (tmp_path / "a" / "b" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "32,768" in out and "The paper: 61-64 %" in out
    assert max(len(line) for line in out.splitlines() if "written" not in line) <= 80
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["scaling.json", "scaling.png"]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("batch", "told"),
    [("0", "--batch must be at least 1, got 0"), ("1", "no mesh of 32768 accelerators fits 1 samples")],
)
def test_main_invalid_batch(batch: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path / "out"), "--batch", batch]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("short")
def test_main_invalid_out_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    assert "is a file, and results go to a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"
