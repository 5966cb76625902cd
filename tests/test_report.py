"""The reports of one result.json: what they say, and that no string of a port is anything but text in them."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt  # comes with rich
from reporting import HOSTILE, case, failing, hostile, off, passing, run_of
from rich.console import Console

from conformance.__main__ import main
from conformance.judging.requirements import chapter_title, requirements
from conformance.judging.result import write_result
from conformance.judging.runner import Outcome
from conformance.report import print_report
from conformance.report.files import write_reports
from conformance.report.html import POLICY, report_html
from conformance.report.junit import junit
from conformance.report.markdown import code, markdown
from conformance.report.mathematics import formula, requirement_html
from conformance.report.plot import error_plot
from conformance.report.style import CSS, DARK, LIGHT
from conformance.report.summary import (
    blocked,
    chapters,
    error_text,
    fraction,
    mend_first,
    passed_text,
    reproduce,
    statuses,
    text,
)

GOOD, BAD, EVIL = run_of(passing()), run_of(failing("plain words")), hostile()
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """Elements of a page with their attributes and text; complains about tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        assert all(re.fullmatch(r"[A-Za-z:-]+", name) for name, _ in attrs), (tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


@pytest.fixture(scope="module")
def evil() -> str:
    return report_html(EVIL)


# Summary


def test_text_is_one_printable_line() -> None:
    everything = "".join(map(chr, range(0x110000)))
    assert text(everything, 0x110000).isprintable() and len(text("x" * 2000)) == 1000
    assert "\u202e" not in text(HOSTILE) and "\ud800" not in text(HOSTILE)


def test_mend_first_leaves_out_what_follows_from_another() -> None:
    assert [entry["id"] for entry in mend_first(BAD)] == ["tiling/weights-closed", "tiling/weights-hard"]
    assert {cause: len(group) for cause, group in blocked(BAD).items()} == {"tiling/weights-closed": 3}
    assert mend_first(GOOD) == [] and blocked(GOOD) == {}


def test_fraction_of_every_kind() -> None:
    by_id = {entry["id"]: fraction(entry) for entry in [*BAD["cases"], *BAD["laws"]]}
    assert by_id["tiling/weights"] == 0.25 and by_id["tiling/geometry"] == 0
    assert by_id["tiling/weights-hard"] == by_id["tiling/seam"] == float("inf")
    assert by_id["tiling/refuses-halo"] is None and by_id["tiling/law-sum"] is None


def test_error_text_says_when_there_is_no_number() -> None:
    seam = next(entry for entry in BAD["cases"] if entry["id"] == "tiling/seam")
    assert error_text(seam) == "error not finite, limit 1e-14 (as the values themselves)"
    assert error_text(BAD["laws"][0]) == ""


def test_statuses_are_the_worst_that_happened() -> None:
    status_of = {status.requirement.id: status for status in statuses(BAD)}
    assert list(status_of) == list(requirements())
    words = {name: status_of[f"TILE-{name}"].word for name in (1, 2, 4, 5, 8, 10)}
    assert words == {1: "unsupported", 2: "passed", 4: "failed", 5: "failed", 8: "not covered", 10: "unsupported"}
    assert status_of["TILE-5"].sentence == "failed by 1 case, passed by 1 law"
    assert status_of["TILE-6"].sentence == "failed by 1 case and 1 law, passed by 1 case"
    assert status_of["TILE-8"].sentence == "not covered by this run"


def test_reproduce_quotes_for_the_shell() -> None:
    assert reproduce(BAD, BAD["cases"][0]) == (
        "python -m conformance explain tiling/geometry --adapter MODULE:OBJECT --dtype float64"
    )
    data = BAD | {"port": ["--cmd", "my port; rm x"], "seed": 7}
    assert "--cmd 'my port; rm x' --dtype float64 --seed 7" in reproduce(data, BAD["cases"][0])


def test_chapters_hold_cases_and_laws() -> None:
    assert {name: len(group) for name, group in chapters(BAD).items()} == {"tiling": 11, "cost": 1}
    assert chapters(BAD)["tiling"][-1]["id"] == "tiling/law-linear"


def test_chapter_title_is_its_heading() -> None:
    assert chapter_title("05_tiling.md") == "05 Tiling"


# JUnit XML


def test_junit_has_the_usual_structure() -> None:
    root = ET.fromstring(junit(BAD))
    assert root.tag == "testsuites" and [child.tag for child in root] == ["testsuite"] * 3
    assert [s.get("name") for s in root] == ["conformance.tiling", "conformance.cost", "conformance.profiles"]
    for suite in [root, *root]:
        cases = list(suite.iter("testcase"))
        assert suite.get("tests") == str(len(cases)) and float(suite.get("time", "")) >= 0
        for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert suite.get(name) == str(len(list(suite.iter(tag))))
    for test in root.iter("testcase"):
        assert test.get("classname") and test.get("name") and float(test.get("time", "")) >= 0 and len(test) <= 1
    assert len(list(root.iter("testcase"))) == len(BAD["cases"]) + len(BAD["laws"]) + len(BAD["profiles"])
    assert {p.get("name"): p.get("value") for p in root.iter("property")}["adapter"] == "a port"


def test_junit_tells_verdicts_apart() -> None:
    tests = {test.get("name"): test for test in ET.fromstring(junit(BAD)).iter("testcase")}
    kinds = {name: [child.tag for child in test] for name, test in tests.items()}
    assert kinds["weights"] == [] and kinds["weights-closed"] == ["failure"] and kinds["crash"] == ["error"]
    assert kinds["tiles"] == ["failure"] and kinds["lacking"] == ["skipped"]  # public, internal
    told = tests["weights-closed"][0]
    assert told.get("message") == "weight is off plain words" and told.get("type") == "fail"
    assert tests["weights-closed"].get("time") == "0.2500"
    assert "error 3e-09, limit 1e-14" in (told.text or "") and "explain tiling/weights-closed" in (told.text or "")


def test_junit_is_red_unless_the_run_conforms() -> None:
    """Also where nothing fails: something is unsupported, or the manifest has cases that were not run."""
    lacking = [*passing(), Outcome(case("cost/tiles", "multiply_adds"), "unsupported", "", "float64")]
    for data in (GOOD, BAD, run_of(lacking), run_of(passing(), expected=99)):
        root = ET.fromstring(junit(data))
        assert (root.get("failures") != "0") == (data["exit"] != 0)


def test_junit_holds_hostile_strings_as_text() -> None:
    document = junit(EVIL)
    root = ET.fromstring(document.encode())
    assert all(tag not in {element.tag for element in root.iter()} for tag in ("script", "img", "b"))
    assert "<script>document.title='owned'</script>" in "".join(e.get("message", "") for e in root.iter("failure"))
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", document)


# Markdown


def render(source: str) -> Page:
    return Page(MarkdownIt("commonmark").enable("table").render(source))


def test_markdown_says_what_matters() -> None:
    page = render(markdown(BAD))
    assert page.text.startswith("Does not conform: a port 1.0")
    assert passed_text(BAD) in page.text and "weight is off plain words" in page.text
    assert (
        requirements()["TILE-5"].text in page.text
        and "python -m conformance explain tiling/weights-closed" in page.text
    )
    assert "3 other failures probably follow" in page.text and "Also tiling/weights-hard" in page.text
    assert "tiling/crash" not in page.text  # it follows from the weights


def test_markdown_of_a_conforming_run_has_nothing_to_mend() -> None:
    page = render(markdown(GOOD))
    assert page.text.startswith("Conforms: a port") and "Mend" not in page.text and len(page.named("table")) == 2


def test_markdown_keeps_hostile_strings_in_code() -> None:
    page = render(markdown(EVIL))
    allowed = {"h1", "h2", "h3", "p", "code", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "strong", "em"}
    assert {tag for tag, _ in page.elements} <= allowed
    assert len(page.named("tr")) == 2 + len(EVIL["profiles"]) + len(chapters(EVIL))
    assert len(page.named("td")) == 6 * (len(EVIL["profiles"]) + len(chapters(EVIL)))


def test_markdown_is_the_size_of_a_summary() -> None:
    many = [Outcome(case(f"tiling/c{i}", "tiled_denoise"), "fail", "x" * 2000, "float64") for i in range(500)]
    assert len(markdown(run_of(many))) < 5000


# Characters that mean something in Markdown or HTML, and any others.
TRICKY = st.text("`|\\<>&*_[]()!@#~-: \nab", max_size=30) | st.text(max_size=60)


@given(TRICKY)
def test_code_renders_as_the_string_also_in_a_table(value: str) -> None:
    page = render(f"| {code(value)} | b |\n|---|---|\n| {code(value)} | b |\n\n- {code(value)}\n")
    assert [tag for tag, _ in page.elements if tag != "code"] == [
        "table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td", "ul", "li",
    ]  # fmt: skip
    shown = (text(value, 300).strip() or "(empty)").split()
    assert page.text.split() == [*shown, "b", *shown, "b", *shown]


# HTML


def test_html_has_no_script_and_reaches_for_nothing(evil: str) -> None:
    page = Page(evil)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {
        "script",
        "img",
        "iframe",
        "link",
        "object",
        "embed",
        "form",
        "base",
        "image",
        "foreignobject",
        "a:",
    }
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("href", "xlink:href", "src", "action", "data"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
        assert "url(" not in (attributes.get("style") or "").replace("url(#", "")
    assert "url(" not in CSS and "@import" not in CSS
    policy = [a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == [POLICY] and "default-src 'none'" in POLICY and "script-src" not in POLICY


def test_html_shows_hostile_strings_as_text(evil: str) -> None:
    page = Page(evil)
    assert page.text.count("<script>document.title='owned'</script>") > 10
    assert evil.count("<b>") == len(page.named("b")) and "\x1b" not in evil and "\u202e" not in evil
    evil.encode()


@given(TRICKY)
def test_html_escapes_any_string(value: str) -> None:
    data = run_of([Outcome(case("tiling/x", "tile_weights"), "fail", value, "float64", off(1), "y")], value)
    page = Page(report_html(data))
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in PLAIN.elements}
    assert len(page.elements) == len(PLAIN.elements) and text(value) in page.text


PLAIN = Page(report_html(run_of([Outcome(case("tiling/x", "tile_weights"), "fail", "x", "float64", off(1), "y")], "x")))


def test_html_can_be_read_aloud(evil: str) -> None:
    """One h1, no level left out, pictures with labels, table heads with scopes, ids once, links that lead somewhere."""
    page = Page(evil)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in pairwise(levels))
    drawings = page.named("svg")
    assert len(drawings) == 1 and all(a.get("role") == "img" and a.get("aria-label") for a in drawings)
    assert all(a.get("scope") for a in page.named("th")) and page.named("html")[0]["lang"] == "en"
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [(a.get("href") or "#")[1:] for a in page.named("a", "use") if a.get("href")]
    assert targets and set(targets) <= set(ids)
    assert any(a.get("name") == "viewport" for a in page.named("meta"))


def test_html_lists_every_requirement_with_its_status() -> None:
    page = Page(report_html(BAD))
    items = {a["id"]: a["class"] for a in page.named("li") if "id" in a}
    assert list(items) == list(requirements())
    assert [items[f"TILE-{n}"] for n in (4, 2, 8, 10)] == ["fail", "pass", "none", "unsupported"]


def test_html_of_a_conforming_run() -> None:
    page = Page(report_html(GOOD))
    assert "Mend this first" not in page.text
    assert "Conforms to smoke, tiling" in page.text and passed_text(GOOD) in page.text


def test_html_tells_a_failure_whole() -> None:
    told = Page(report_html(BAD)).text.partition("Mend this first")[2].partition("How near")[0]
    for words in (
        "weight is off plain words",
        "error 3e-09, limit 1e-14",
        "eight roundings",
        "weights taper",
        "The weights of all tiles MUST sum to one",
        "explain tiling/weights-closed",
        "3 other failures",
    ):
        assert words in told


def test_html_stays_small() -> None:
    many = [
        Outcome(case(f"tiling/c{i}", "tiled_denoise"), "fail", "x" * 300, "float64", off(1), "y") for i in range(600)
    ]
    assert len(report_html(run_of(many)).encode()) < 1_500_000


def _luminance(colour: str) -> float:
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, as WCAG 2 defines it."""
    bright, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_palette_contrast_is_enough_to_read(palette: dict[str, str]) -> None:
    for name in palette.keys() - {"page", "card", "line"}:
        for ground in ("page", "card"):
            assert contrast(palette[name], palette[ground]) >= 4.5, (name, ground)


def test_style_uses_only_colours_of_the_palette(evil: str) -> None:
    assert LIGHT.keys() == DARK.keys()
    used = set(re.findall(r"var\(--(\w+)\)", evil))
    assert used - {"tone"} <= LIGHT.keys()
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", evil.replace(CSS, ""))


# Mathematics


@pytest.mark.parametrize(
    ("source", "want"),
    [
        (r"a_b", "<msub><mi>a</mi><mi>b</mi></msub>"),
        (r"\sigma^{2}", "<msup><mi>σ</mi><mrow><mn>2</mn></mrow></msup>"),
        (r"\frac{1}{2}", "<mfrac><mrow><mn>1</mn></mrow><mrow><mn>2</mn></mrow></mfrac>"),
        (r"a < b & c", "<mi>a</mi><mo>&lt;</mo><mi>b</mi><mi>&amp;</mi><mi>c</mi>"),
        (r"\text{<b>}", "<mtext>&lt;b&gt;</mtext>"),
    ],
)
def test_formula_is_mathml(source: str, want: str) -> None:
    assert formula(source) == f'<math display="inline"><mrow>{want}</mrow></math>'


def test_requirement_html_marks_up_code_and_emphasis() -> None:
    source = "*keeps* **all** `a<b` of [this](x.md) & $2$, $2$"
    words = "<em>keeps</em> <b>all</b> <code>a&lt;b</code> of this &amp; "
    two = '<math display="inline"><mrow><mn>2</mn></mrow></math>'
    assert requirement_html(source) == f'{words}<span class="formula">{two},</span> {two}'


def test_requirement_html_knows_the_specifications_tex() -> None:
    """No command of TeX is left over in any requirement."""
    for requirement in requirements().values():
        shown = Page(f"<p>{requirement_html(requirement.text)}</p>").text
        assert "\\" not in shown and "$" not in shown, shown


# Pictures


def test_error_plot_has_a_mark_a_case_and_failures_beyond_the_limit() -> None:
    drawing = error_plot(BAD)
    limit = float(re.findall(r'class="limit" d="M([\d.]+)', drawing)[0])
    marks = re.findall(
        r'class="mark (\w+)( failed)?" transform="translate\(([\d.]+) [\d.]+\)" d="[^"]+"><title>([^<]*)', drawing
    )
    assert len(marks) == 6
    for kind, failed, x, name in marks:
        assert (float(x) > limit) == bool(failed) and kind in ("exact", "ulp", "bound"), name
    assert error_plot(run_of([Outcome(case("tiling/x", "crps"), "unsupported", "", "float64")])) == ""


def test_error_plot_keeps_marks_of_one_place_apart() -> None:
    same = [
        Outcome(case(f"tiling/c{i}", "crps"), "pass", "", "float64", off(e), "y") for i in range(30) for e in (0, 1e-15)
    ]
    places = re.findall(r'translate\([\d.]+ [\d.]+\)" d="[^"]+"><title>', error_plot(run_of(same)))
    assert len(places) == 60 and len(set(places)) == 60


# Terminal and files


def said(data: dict[str, Any], terminal: bool = False) -> str:
    out = StringIO()
    print_report(Console(file=out, force_terminal=terminal, width=200, color_system=None), data, Path("x/report.html"))
    return out.getvalue()


def test_print_report_tells_each_requirement_once_and_ends_with_the_verdict() -> None:
    shown = said(BAD)
    assert shown.count("[TILE-4] Across a boundary") == 1 and "Also tiling/weights-hard" in shown
    assert "3 other failures probably follow" in shown and "tiling/crash" not in shown
    assert shown.splitlines()[-1] == "DOES NOT CONFORM; details in x/report.html"
    assert shown.splitlines()[-2].startswith(f"a port 1.0 in float64: {passed_text(BAD)}")


@pytest.mark.parametrize("terminal", [False, True])
def test_print_report_shows_hostile_strings_as_text(terminal: bool) -> None:
    shown = said(EVIL, terminal)
    assert "\x07" not in shown and "\x1b[31m" not in shown and "[bold]markup[/bold]" in shown


def test_print_report_is_short_for_many_failures() -> None:
    many = [Outcome(case(f"tiling/c{i}", "tile_weights"), "fail", "off", "float64", off(1), "y") for i in range(50)]
    assert len(said(run_of(many)).splitlines()) < 20


def test_write_reports_makes_three_files_and_names_the_page(tmp_path: Path) -> None:
    assert write_reports(EVIL, tmp_path / "deep") == tmp_path / "deep" / "report.html"
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"report.html", "report.md", "junit.xml"}
    assert (tmp_path / "deep" / "report.html").read_text() == report_html(EVIL)


def test_reports_need_neither_matplotlib_nor_torch() -> None:
    """A port is judged, and its reports are written, with the suite's own few dependencies."""
    program = (
        "import sys; sys.modules.update(matplotlib=None, torch=None)\n"
        "from conformance.report.files import report\n"
        "from conformance.laws import all_laws\n"
        "assert all_laws()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_report_command_makes_the_reports_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_result(tmp_path / "result.json", BAD)
    words = ["report", "--result", str(tmp_path / "result.json"), "--out", str(tmp_path / "again")]
    assert main(words) == 0
    assert "DOES NOT CONFORM" in capsys.readouterr().out
    assert (tmp_path / "again" / "report.html").read_text() == report_html(BAD)


def test_report_command_invalid_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"spec": "0.2"}))
    assert main(["report", "--result", str(tmp_path / "result.json"), "--out", str(tmp_path)]) == 2
    assert "not the result of a run" in capsys.readouterr().err
