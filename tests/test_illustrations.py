"""The pictures of docs/illustrations.md: their closed forms, and that the page shows what the script draws."""

import re
from pathlib import Path

import numpy as np

from docs import illustrations


def test_sampled_variances_are_those_of_the_specification() -> None:
    """[GUIDE-9] The figures that chapter 07 states for c = 1, R = 0.3."""
    c, r = np.ones(1), np.full(1, 0.3)
    got = {name: round(float(value[0]), 3) for name, value in illustrations.sampled_variances(c, r).items()}
    assert got == {"mmps: the posterior": 0.231, "pigdm": 0.287, "sda": 0.105, "dps": 0.036}
    assert round(float(illustrations.sampled_variances(c, r, gamma=1.0)["sda"][0]), 3) == 0.358


def test_page_shows_every_picture() -> None:
    page = Path(illustrations.__file__).with_name("illustrations.md")
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text())
    assert shown == list(illustrations.PICTURES)
    assert all((page.parent / name).exists() for name in shown)


def test_figures_are_drawn() -> None:
    """Each has two panels with named axes and something in them."""
    for draw in illustrations.PICTURES.values():
        for panel in draw().axes:
            assert panel.get_xlabel() and panel.get_ylabel() and len(panel.lines) >= 4
