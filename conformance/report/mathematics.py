"""The specification's text as HTML: code, emphasis, and the little TeX that its requirements use, without a script.

`$\\sigma_{max}^{1/\\rho}$` becomes letters with sub- and superscripts. What is not known stays as it is written.
"""

import html
import re

__all__ = ["requirement_html", "tex"]

SIGNS = {
    "sigma": "σ", "gamma": "γ", "phi": "φ", "varphi": "φ", "lambda": "λ", "pi": "π", "rho": "ρ", "delta": "δ",
    "varepsilon": "ε", "epsilon": "ϵ", "mu": "μ", "ell": "ℓ", "kappa": "κ", "alpha": "α", "beta": "β", "xi": "ξ",
    "eta": "η", "sum": "∑", "le": "≤", "ge": "≥", "vert": "|", "mid": "|", "ldots": "…", "cdot": "·", "leftarrow": "←",
    "odot": "⊙", "langle": "⟨", "rangle": "⟩", "infty": "∞", "to": "→", "sim": "∼", "pm": "±", "partial": "∂",
    "left": "", "right": "", "times": "×", "in": "∈", "int": "∫", "lceil": "⌈", "rceil": "⌉", "lfloor": "⌊",
    "rfloor": "⌋", "approx": "≈",
}  # fmt: skip
WORDS = ("cos", "sin", "ln", "log", "min", "max")  # set upright
SHORT = 24  # characters of a formula that is not broken over lines
_TOKEN = re.compile(r"\\([A-Za-z]+)|\\(.)|([{}^_])|(\s+)|(.)", re.DOTALL)


def requirement_html(text: str) -> str:
    """One requirement's text: `code`, $mathematics$, **bold** and *emphasis*; all else escaped."""
    parts = re.split(r"(`[^`]*`|\$[^$]*\$)", text)
    return "".join(_part(part) for part in parts)


def _part(part: str) -> str:
    if len(part) > 1 and part[0] == part[-1] == "`":
        return f"<code>{html.escape(part[1:-1])}</code>"
    if len(part) > 1 and part[0] == part[-1] == "$":
        together = " short" if len(part) <= SHORT else ""
        return f'<span class="tex{together}">{tex(part[1:-1])}</span>'
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", html.escape(part))  # a link's words: the file lies elsewhere
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", plain))


def tex(source: str) -> str:
    """A formula as HTML."""
    tokens = [match.group() for match in _TOKEN.finditer(source)]
    return _row(tokens, until=None).strip()


def _row(tokens: list[str], until: str | None) -> str:
    """Read tokens up to the closing brace, or all."""
    made = ""
    while tokens:
        if tokens[0] == until:
            tokens.pop(0)
            break
        made += _one(tokens)
    return made


def _argument(tokens: list[str]) -> str:
    while tokens and tokens[0].isspace():
        tokens.pop(0)
    return _one(tokens) if tokens else ""


def _one(tokens: list[str]) -> str:
    token = tokens.pop(0)
    if token == "{":
        return _row(tokens, "}")
    if token in "^_" and len(token) == 1:
        tag = "sup" if token == "^" else "sub"
        return f"<{tag}>{_argument(tokens)}</{tag}>"
    if len(token) == 1 or not token.startswith("\\"):
        return {"-": "−", "'": "′"}.get(token) or html.escape(token)
    name = token[1:]
    if name in ("mathrm", *WORDS):
        return f'<span class="upright">{_argument(tokens) if name == "mathrm" else name}</span>'
    if name == "hat":
        return _argument(tokens) + "\u0302"
    if name == "sqrt":
        inside = _argument(tokens)
        return f"√{inside}" if len(inside) == 1 else f"√({inside})"
    if name == "frac":
        over, under = _argument(tokens), _argument(tokens)
        return f"({over})/({under})" if len(over) > 1 else f"{over}/({under})"
    return SIGNS.get(name, html.escape(name))
