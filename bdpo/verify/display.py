"""HTML of statements: words with ``$...$`` become text and mathematics that MathJax typesets."""

from __future__ import annotations

import html
import re


def math(tex: str, *, display: bool = False) -> str:
    """LaTeX in the element that Sphinx and Jupyter typeset."""
    left, right = (r"\[", r"\]") if display else (r"\(", r"\)")
    tag = "div" if display else "span"
    return f'<{tag} class="math notranslate nohighlight">{left}{html.escape(tex)}{right}</{tag}>'


def prose(words: str) -> str:
    r"""Words with ``$...$`` or ``\(...\)``."""
    out = []
    for piece in re.split(r"(\$[^$]+\$|\\\(.+?\\\))", words):
        if piece.startswith("$") and len(piece) > 2:
            out.append(math(piece[1:-1]))
        elif piece.startswith(r"\("):
            out.append(math(piece[2:-2]))
        else:
            out.append(html.escape(piece))
    return "".join(out)


def numbers(world: dict[str, str]) -> str:
    """A world, each symbol typeset."""

    def name(key: str) -> str:
        return math(key) if re.search(r"[\\_^]|^\w$", key) else html.escape(key)

    return ", ".join(f"{name(k)} = {html.escape(v)}" for k, v in world.items())
