"""The specification's text as HTML: code, emphasis, and TeX formulas as MathML, which needs no script."""

import html
import re
import xml.etree.ElementTree as ET
from functools import cache

from latex2mathml.converter import convert_to_element

__all__ = ["formula", "requirement_html"]

SHORT = 24  # characters of a formula that fits everywhere; longer ones scroll sideways on narrow pages


def requirement_html(text: str) -> str:
    """Render one requirement's text: `code`, $formulas$, **bold** and *emphasis*; all else is escaped."""
    parts = re.split(r"(`[^`]*`|\$[^$]*\$[,.;:)]*)", text)
    return "".join(_part(part) for part in parts)


def _part(part: str) -> str:
    if len(part) > 1 and part[0] == part[-1] == "`":
        return f"<code>{html.escape(part[1:-1])}</code>"
    mathematics = re.fullmatch(r"\$([^$]*)\$([,.;:)]*)", part)
    if mathematics:
        return _unbroken(mathematics[1], mathematics[2])
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", html.escape(part))  # a link's words: the file lies elsewhere
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", plain))


@cache
def formula(source: str) -> str:
    """Render a TeX formula as MathML in the text's line."""
    element = convert_to_element(source)
    for node in element.iter():
        # The converter writes signs as character references, which the serialiser would escape once more.
        node.text = html.unescape(node.text) if node.text else None
    del element.attrib["xmlns"]
    return ET.tostring(element, encoding="unicode")


def _unbroken(source: str, punctuation: str) -> str:
    """Render a formula with the punctuation that follows it, which does not start a line of its own."""
    if not punctuation and len(source) <= SHORT:
        return formula(source)
    return f'<span class="formula">{formula(source)}{punctuation}</span>'
