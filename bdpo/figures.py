"""One look for every figure of the book, on light pages and on dark ones.

A colour means the same thing in every chapter, and every series also has a line style, so that colour is never the only
carrier of meaning::

    def draw(fig):
        ax = fig.subplots()
        ax.plot(t, p_dpo, **figures.LINE["dpo"], label="DPO")
        ax.set(xlabel="step", ylabel="$p$")
        ax.legend()

    figures.show(draw, name="fig-collapse", alt="…", caption="…", data={"step": t, "p": p_dpo})
"""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from IPython.display import HTML, display
from matplotlib import rc_context
from matplotlib.figure import Figure

#: What each colour stands for. All have a contrast of at least 3 on white and on the book's dark page, and any two can
#: be told apart in colour blindness.
COLOR = {
    "dpo": "#0697e0",
    "balanced": "#e57300",
    "ppo": "#7e671b",
    "winner": "#00995c",
    "loser": "#b234a5",
    "reference": "#888b91",
}

#: The colour of a line together with its style, as keyword arguments of ``ax.plot``.
LINE = {
    name: {"color": COLOR[name], "linestyle": style}
    for name, style in {
        "dpo": "-",
        "balanced": (0, (6, 1.5)),
        "ppo": (0, (5, 1.5, 1, 1.5)),
        "winner": "-",
        "loser": (0, (3.5, 1.5)),
        "reference": (0, (1, 1.5)),
    }.items()
}

_INK = {"light": ("#1d2733", "#dfe4ea", "#ffffff"), "dark": ("#dde3ea", "#3b444f", "none")}  # ink, grid, paper


def _style(scheme: str, salt: str) -> Any:  # a dict whose keys matplotlib types one by one
    ink, grid, paper = _INK[scheme]
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(inked, ink),
        "grid.color": grid,
        "figure.facecolor": paper,
        "savefig.facecolor": paper,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": "medium",
        "font.size": 11,
        "grid.linewidth": 0.7,
        "image.cmap": "cividis",
        "legend.frameon": False,
        "lines.linewidth": 2,
        "mathtext.fontset": "cm",
        "svg.hashsalt": salt,  # else the ids inside are random
    }


def _svg(draw: Callable[[Figure], object], scheme: str, name: str, size: tuple[float, float]) -> str:
    """A data URI of the figure in one colour scheme."""
    with rc_context(_style(scheme, f"{name}-{scheme}")):
        fig = Figure(figsize=size, layout="constrained")
        draw(fig)
        if not any(ax.has_data() or ax.texts for ax in fig.axes):
            raise ValueError(f"draw(fig) of {name!r} drew nothing; start it with ax = fig.subplots()")
        file = io.BytesIO()
        fig.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def _table(data: Mapping[str, Sequence[Any]], name: str) -> str:
    """A data URI of the numbers behind a figure, as CSV."""
    columns = {column: np.asarray(values) for column, values in data.items()}
    shapes = {column: values.shape for column, values in columns.items()}
    if any(len(shape) != 1 for shape in shapes.values()) or len(set(shapes.values())) > 1 or (0,) in shapes.values():
        raise ValueError(f"the columns of data of {name!r} have shapes {shapes}; give sequences of one positive length")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(values.tolist() for values in columns.values()), strict=True))
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(file.getvalue().encode()).decode()


def render(
    draw: Callable[[Figure], object],
    *,
    name: str,
    alt: str,
    caption: str,
    data: Mapping[str, Sequence[Any]],
    size: tuple[float, float] = (6.4, 3.6),
) -> str:
    """The HTML that `show` displays; see there."""
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ValueError(f"name is {name!r}; it becomes a link target: use small letters, digits and hyphens")
    for argument, words in {"alt": alt, "caption": caption}.items():
        if not words.strip():
            raise ValueError(
                f"{argument} of {name!r} is empty; say what the figure shows to somebody who cannot see it"
            )
    if not data:
        raise ValueError(f"data of {name!r} is empty; give the numbers behind the figure as {{column: values}}")
    if not all(0 < length <= 20 for length in size):
        raise ValueError(f"size of {name!r} is {size}; give width and height in inches, each above 0 and at most 20")
    light, dark = (_svg(draw, scheme, name, size) for scheme in ("light", "dark"))
    words = html.escape(alt, quote=True)
    title = re.sub(r"\$([^$]+)\$", r'<span class="math notranslate nohighlight">\\(\1\\)</span>', html.escape(caption))
    return (
        f'<figure class="bdpo-figure" id="{name}">'
        f'<div><img class="only-light" alt="{words}" src="{light}">'
        f'<img class="only-dark" alt="{words}" src="{dark}" style="display: none"></div>'
        f'<figcaption>{title} <a class="figure-data" download="{name}.csv" href="{_table(data, name)}">Data (CSV)</a>'
        "</figcaption></figure>"
    )


def show(
    draw: Callable[[Figure], object],
    *,
    name: str,
    alt: str,
    caption: str,
    data: Mapping[str, Sequence[Any]],
    size: tuple[float, float] = (6.4, 3.6),
) -> None:
    """Display a figure in the book's look, in a light and a dark version, with the numbers behind it.

    Parameters
    ----------
    draw
        ``draw(fig)`` draws on an empty `matplotlib.figure.Figure`. It is called once for each version, so it must not
        draw random numbers; ink for annotations is ``matplotlib.rcParams["text.color"]``.
    name
        Target of links, such as ``fig-collapse``: prose refers to it by ``[text](#fig-collapse)``. Unique in the book.
    alt
        What the figure shows, for somebody who cannot see it.
    caption
        Shown below; ``$...$`` is mathematics.
    data
        ``{column: values}``, one-dimensional and of equal length: offered as a CSV file.
    size
        Width and height in inches, at most 20; larger figures have relatively smaller letters.

    Raises
    ------
    ValueError
        If the name is no link target, alt text, caption or data are missing, columns differ in length, the size is out
        of range, or nothing was drawn.
    """
    display(HTML(render(draw, name=name, alt=alt, caption=caption, data=data, size=size)))
