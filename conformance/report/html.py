"""The report as one HTML file, without script, network or anything beside it. It opens from a disk, prints, and fits a
telephone.

Every string of result.json goes through `_e`, which escapes it; the content security policy forbids scripts and
connections of any kind as a second wall. Styles alone are allowed, and stand in the file.
"""

import html
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from conformance.judging.requirements import REASONS, chapter_title
from conformance.protocol.operations import PROFILES
from conformance.report.mathematics import requirement_html
from conformance.report.plot import error_plot
from conformance.report.style import CSS
from conformance.report.summary import (
    FAILED,
    VERDICT_TEXT,
    Status,
    blocked,
    by_operation,
    chapters,
    counts,
    entries,
    error_text,
    fraction,
    level,
    mend_first,
    passed_text,
    reproduce,
    statuses,
    text,
)

if TYPE_CHECKING:
    pass  # which loads Matplotlib

__all__ = ["POLICY", "report_html"]

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
TONE = {0: "pass", 1: "fail", 3: "unsupported"}
STATUS_TONE = {"passed": "pass", "failed": "fail", "unsupported": "unsupported", "not covered": "none"}
EXCERPT = 40  # ids of cases listed below a requirement


def _e(value: object, limit: int = 1000) -> str:
    """Escape a string of result.json for HTML text, also inside a quoted attribute."""
    return html.escape(text(value, limit), quote=True)


def report_html(data: dict[str, Any]) -> str:
    """Render the whole page."""
    known = statuses(data)
    adapter = data["adapter"]
    sections = [
        _banner(data),
        _profiles(data),
        _mend(data, known),
        _plot(data),
        _requirements(known),
        _table_section(data),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>Conformance of {_e(adapter["name"], 60)}: {_e(_verdict(data))}</title>
<style>{CSS}</style>
</head>
<body>
<main>
{"".join(section for section in sections if section)}
</main>
<footer><small>Made from result.json by the conformance suite, specification {_e(data["spec"])}, vectors
{_e(data["vectors"])}. <code>python -m conformance report</code> makes this page again.</small></footer>
</body>
</html>
"""


def _verdict(data: dict[str, Any]) -> str:
    return VERDICT_TEXT[data["exit"]].partition(":")[0].lower()


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    """Render a description list, whose values are HTML already."""
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs) + "</dl>"


def _banner(data: dict[str, Any]) -> str:
    adapter = data["adapter"]
    claim = [name for name, profile in data["profiles"].items() if profile["conforms"]]
    names = ", ".join(_e(name, 40) for name in claim)
    claims = f"Conforms to <b>{names}</b>" if claim else "No profile of this run is conformed to"
    facts = [
        ("dtype of the network", _e(data["dtype"])),
        ("seed of the laws", _e(data["seed"])),
        ("specification", _e(data["spec"])),
        ("vectors", _e(data["vectors"])),
        ("operations", str(len(adapter["ops"]))),
        ("time", f"{sum(entry['seconds'] for entry in entries(data)):.1f} s"),
    ]
    return f"""<header class="banner {TONE[data["exit"]]}">
<h1><bdi>{_e(adapter["name"], 120)}</bdi> {_e(adapter["version"], 60)}
<span class="verdict">{_e(_verdict(data))}</span></h1>
<p>{passed_text(data)}. {claims}.</p>
{_pairs(facts)}
</header>
"""


def _profiles(data: dict[str, Any]) -> str:
    cards = "".join(map(_card, data["profiles"].items()))
    return f'<section><h2>Profiles</h2>\n<ul class="cards">{cards}</ul></section>\n'


def _card(item: tuple[str, dict[str, Any]]) -> str:
    name, p = item
    word, tone = ("conforms", "pass") if p["conforms"] else ("does not conform", "fail")
    if not p["conforms"] and not p["failed"]:
        word, tone = "incomplete", "unsupported"
    share = 100 * p["passed"] / p["expected"] if p["expected"] else 0
    rest = [f"{p[key]} {key}" for key in ("failed", "unsupported") if p[key]]
    return f"""<li class="card {tone}"><h3>{_e(name, 40)} <span class="word">{word}</span></h3>
<p><b>{p["passed"]} of {p["expected"]}</b> passed{"".join(", " + part for part in rest)}</p>
<div class="bar" aria-hidden="true"><span style="width:{min(share, 100):.0f}%"></span></div>
<p><small>{_e(PROFILES.get(name, "not a profile of this suite"))}</small></p></li>
"""


def _mend(data: dict[str, Any], known: list[Status]) -> str:
    groups = by_operation(mend_first(data))
    rest = blocked(data)
    if not groups:
        return ""
    words = {status.requirement.id: status.requirement.text for status in known}
    told: set[str] = set()
    parts = ""
    for group in groups:
        cards = [_failure(data, entry, words, told, len(rest.get(entry["id"], []))) for entry in group]
        more = f"{len(cards) - 1} more of the operation {_e(group[0]['op'], 60)}"
        parts += cards[0] + (_details(more, "".join(cards[1:])) if cards[1:] else "")
    items = "".join(
        f"<li><code>{_e(entry['id'], 120)}</code> after <code>{_e(cause, 120)}</code>: {_e(entry['detail'], 200)}</li>"
        for cause, group in rest.items()
        for entry in group
    )
    number = f"{sum(map(len, rest.values()))} failures that probably follow from these"
    parts += _details(number, f"<ul>{items}</ul>") if rest else ""
    return f'<section id="mend"><h2>Mend this first</h2>\n{parts}</section>\n'


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>\n{content}</details>\n"


def _required(entry: dict[str, Any], words: dict[str, str], told: set[str]) -> str:
    """Render the requirements of a case with their text; of one in `told` the text stands further up."""
    lines = []
    for name in entry["requirements"]:
        if name not in words:
            lines.append(f"<p>{_e(name)}: the specification has no text for it</p>")
            continue
        sentence = "(as above)" if name in told else requirement_html(words[name])
        lines.append(f'<p><a href="#{_e(name)}">{_e(name)}</a> {sentence}</p>')
        told.add(name)
    return "".join(lines)


def _failure(data: dict[str, Any], entry: dict[str, Any], words: dict[str, str], told: set[str], follow: int) -> str:
    pairs = [("what happened", f"<bdi>{_e(entry['detail'])}</bdi>")]
    if entry.get("measured") is not None:
        measure = f"{_e(error_text(entry))}; <small>judged as {_e(entry['class'])}: {_e(entry['tolerance'])}</small>"
        pairs.append(("how far off", measure))
    pairs += [("likely", _e(entry["meaning"])), ("required", _required(entry, words, told))]
    if follow:
        pairs.append(("consequences", f"{follow} other failures probably follow from this one"))
    pairs.append(("explain", f'<pre tabindex="0"><code>{_e(reproduce(data, entry))}</code></pre>'))
    word = {"fail": "fails", "error": "is in error"}[entry["verdict"]]
    return f"""<article class="failure {_e(entry["verdict"])}">
<h3><code>{_e(entry["id"], 120)}</code> <span class="word">{word}</span></h3>
<p><small>operation {_e(entry["op"])}, {_e(level(entry))}, {_e(entry["dtype"])}</small></p>
{_pairs(pairs)}
</article>
"""


def _plot(data: dict[str, Any]) -> str:
    drawing = error_plot(data)
    if not drawing:
        return ""
    silent = sum(fraction(entry) is None for entry in data["cases"])
    return f"""<section><h2>How near the limits</h2>
<figure><div class="scroll" tabindex="0" role="group" aria-label="plot, scrolls sideways">{drawing}</div>
<figcaption>One mark for each case with a number to compare: the worst output's error over its limit. Beyond the line,
in the tinted part, a case fails. Left stand those without any error; right, off the scale, those more than a million
times too far, not finite, or off where no error is allowed. Not shown: {silent} cases that were refused, not answered
or not comparable, and the laws. Point at a mark for its case.</figcaption></figure></section>
"""


def _requirements(known: list[Status]) -> str:
    by_chapter: dict[str, list[Status]] = {}
    for status in known:
        by_chapter.setdefault(status.requirement.chapter, []).append(status)
    parts = "".join(_chapter(name, group) for name, group in by_chapter.items())
    if not parts:
        return ""
    return f"""<section><h2>Requirements</h2>
<p>The specification's own words, and what this run says of each. What it does not cover is held by tests of the
reference or cannot be seen through arrays. Pictures of what the chapters specify are in
<code>docs/illustrations.md</code>, beside the specification.</p>
{parts}</section>
"""


def _chapter(name: str, group: list[Status]) -> str:
    words = [status.word for status in group]
    tally = [
        f'<span class="word {STATUS_TONE[word]}">{words.count(word)} {word}</span>'
        for word in ("failed", "unsupported", "passed", "not covered")
        if word in words
    ]
    items = "".join(map(_requirement, group))
    return (
        f"<details><summary><b>{_e(chapter_title(name))}</b>: {', '.join(tally)}</summary>\n"
        f'<ul class="requirements">{items}</ul></details>\n'
    )


def _requirement(status: Status) -> str:
    requirement, word = status.requirement, status.word
    ids = [name for verdict in (*FAILED, "unsupported", "pass") for name in status.by_verdict[verdict]]
    named = ", ".join(f"<code>{_e(name, 120)}</code>" for name in ids[:EXCERPT])
    more = f" and {len(ids) - EXCERPT} more" if len(ids) > EXCERPT else ""
    reason = requirement_html(REASONS.get(requirement.id, ""))
    listed = f"<p><small>{named}{more}{'' if ids else reason}</small></p>" if ids or reason else ""
    return f"""<li id="{_e(requirement.id)}" class="{STATUS_TONE[word]}"><p><b>{_e(requirement.id)}</b>
<span class="word">{_e(status.sentence)}</span></p><p>{requirement_html(requirement.text)}</p>{listed}</li>
"""


def _table_section(data: dict[str, Any]) -> str:
    parts = "".join(_table(name, group) for name, group in chapters(data).items())
    return f"<section><h2>All cases and laws</h2>\n{parts}</section>\n"


def _table(name: str, group: list[dict[str, Any]]) -> str:
    tally = [f'<span class="word {verdict}">{n} {verdict}</span>' for verdict, n in counts(group).items() if n]
    head = "".join(f"<th scope='col'>{w}</th>" for w in ("case or law", "verdict", "operation", "judged as"))
    head += "<th scope='col' class='number'>error / limit</th><th scope='col' class='number'>seconds</th>"
    head += "<th scope='col'>requirements</th><th scope='col'>detail</th>"
    return f"""<details><summary><b>{_e(name, 40)}</b>: {", ".join(tally)}</summary>
<div class="scroll" tabindex="0" role="group" aria-label="{_e(name, 40)}, table, scrolls sideways"><table>
<thead><tr>{head}</tr></thead><tbody>
{"".join(map(_row, group))}</tbody></table></div></details>
"""


def _row(entry: dict[str, Any]) -> str:
    part = fraction(entry)
    share = "" if part is None else f"{part:.3g}" if part != float("inf") else "no number"
    kind = entry.get("class") or f"law, {entry['examples']} examples"
    return (
        f"<tr><td><code>{_e(entry['id'], 120)}</code></td>"
        f'<td><span class="word {_e(entry["verdict"])}">{_e(entry["verdict"])}</span></td>'
        f"<td><span class='line'>{_e(entry['op'])}, {_e(level(entry))}</span></td><td>{_e(kind)}</td>"
        f"<td class='number'>{share}</td><td class='number'>{entry['seconds']:.2f}</td>"
        f"<td>{_e(' '.join(entry['requirements']))}</td>"
        f"<td class='detail'><bdi>{_e(entry['detail'], 300)}</bdi></td></tr>\n"
    )
