"""The style of the HTML report: one palette for light and one for dark, and the style sheet that uses them by name.

All text colours have a contrast of at least 4.5 to 1 on both backgrounds they stand on (tests/test_report.py computes
it), and a word or a shape repeats what a colour says. Series follow Okabe and Ito's colour-blind-safe set.
"""

__all__ = ["CSS", "DARK", "LIGHT"]

LIGHT = {
    "page": "#ffffff", "card": "#f4f6f8", "line": "#c9d0d8", "ink": "#1b1f24", "muted": "#505963",
    "pass": "#00694f", "fail": "#a83200", "error": "#7b2d8b", "unsupported": "#6f5100", "link": "#0a58b8",
    "s1": "#0067a3", "s2": "#a83200", "s3": "#00694f", "s4": "#8a3477", "s5": "#6f5100",
}  # fmt: skip
DARK = {
    "page": "#14171c", "card": "#1e232b", "line": "#3c4552", "ink": "#e7eaee", "muted": "#a9b2bd",
    "pass": "#4fd0aa", "fail": "#ff9268", "error": "#dfa3ee", "unsupported": "#e6b950", "link": "#7fb7ff",
    "s1": "#5cb8ee", "s2": "#ff9268", "s3": "#4fd0aa", "s4": "#ea9fd4", "s5": "#f0e062",
}  # fmt: skip


def _variables(palette: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in palette.items())


CSS = (
    f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
"""
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.25; } h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1.02rem; margin: 0; } p { margin: .5rem 0; max-width: 46rem; }
a { color: var(--link); } small, .muted { color: var(--muted); } small { font-size: .86rem; }
code { font: .88em/1.45 ui-monospace, "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: .4rem 0; padding: .5rem .7rem; overflow-x: auto; background: var(--page); border: 1px solid var(--line);
  border-radius: .3rem; overflow-wrap: normal; }
math { font-size: 1.06em; } .formula { white-space: nowrap; }
@media (max-width: 48rem) {
  .formula { display: inline-block; max-width: 100%; overflow-x: auto; padding: .15em 0; vertical-align: middle; }
}
.banner { border: 1px solid var(--line); border-left: .6rem solid var(--tone); background: var(--card);
  border-radius: .4rem; padding: .9rem 1.1rem; }
.banner .verdict { color: var(--tone); }
dl { display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; margin: .7rem 0 0; } dl div { min-width: 5rem; }
dt { color: var(--muted); font-size: .8rem; } dd { margin: 0; }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); padding: 0;
  margin: .6rem 0; list-style: none; }
.card { border: 1px solid var(--line); border-top: .3rem solid var(--tone); background: var(--card);
  border-radius: .4rem; padding: .6rem .8rem; } .card p { margin: .25rem 0; }
.failure { border: 1px solid var(--line); border-left: .4rem solid var(--tone); background: var(--card);
  border-radius: .4rem; padding: .7rem .9rem; margin: .8rem 0; }
.failure dl { display: block; margin: .3rem 0 0; } .failure dt { margin-top: .45rem; }
.bar { height: .45rem; background: var(--line); border-radius: .3rem; overflow: hidden; }
.bar span { display: block; height: 100%; background: var(--tone); }
.pass { --tone: var(--pass); } .fail { --tone: var(--fail); } .error { --tone: var(--error); }
.unsupported { --tone: var(--unsupported); } .none { --tone: var(--muted); }
.word { color: var(--tone); font-weight: 650; } td .word { white-space: nowrap; }
details { border-top: 1px solid var(--line); padding: .35rem 0; } summary { cursor: pointer; padding: .25rem 0; }
summary:focus-visible, a:focus-visible, .scroll:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.scroll { overflow-x: auto; margin: .4rem 0; }
table { border-collapse: collapse; font-size: .86rem; overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td code, .line { white-space: nowrap; } td.detail { min-width: 16rem; }
ul.requirements { list-style: none; padding: 0; margin: .3rem 0; }
ul.requirements li { padding: .5rem 0 .5rem .8rem; border-left: .25rem solid var(--tone); margin: .5rem 0; }
ul.requirements p { margin: .15rem 0; }
figure { margin: 1rem 0 1.6rem; } figcaption { font-size: .9rem; max-width: 46rem; margin-top: .3rem; }
svg { display: block; max-width: 100%; height: auto; } .scroll > svg { min-width: 40rem; }
svg text { fill: var(--ink); } svg.plot { font: 12px system-ui, "Segoe UI", Roboto, sans-serif; }
svg .grid { stroke: var(--line); }
svg .limit { stroke: var(--fail); stroke-width: 2; }
svg .beyond { fill: var(--fail); opacity: .09; }
svg .quiet { fill: var(--muted); } svg .mark { stroke: var(--card); stroke-width: .6; }
svg .exact { fill: var(--s1); } svg .ulp { fill: var(--s5); } svg .bound { fill: var(--s3); }
svg .monte_carlo { fill: var(--s4); } svg .either { fill: var(--muted); }
svg .failed { stroke: var(--ink); stroke-width: 1.6; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: .6rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; } .scroll { overflow: visible; } .scroll > svg { min-width: 0; }
  .card, .failure, figure, li { break-inside: avoid; }
  h2 { break-after: avoid; } svg.plot { max-height: 22cm; } td code { white-space: normal; }
  details::details-content { content-visibility: visible; block-size: auto; opacity: 1; }
}
"""
)
