r"""Tables from raw rows: means with intervals over runs, differences to a baseline paired by seed, one look.

.. code-block:: python

    gain = tables.interval(reward["bdpo"] - reward["dpo"])  # one number a seed
    f"{gain:.2f}"  # '−0.13 ± 0.08'
    tables.show(frame)
    tables.lines(["loss", "gain"], [("bDPO", f"{gain:.2f}")])
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bdpo.verify.display import prose

if TYPE_CHECKING:
    import pandas as pd


class Interval(NamedTuple):
    """A mean with its interval; formats as mean ± half the width, or as a dash where nothing was measured."""

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the width; NaN for a single run."""
        return (self.high - self.low) / 2

    def __format__(self, spec: str) -> str:
        if math.isnan(self.mean):
            return "–"
        text = format(self.mean, spec)
        text += "" if math.isnan(self.half) else f"\u00a0±\u00a0{format(self.half, spec)}"
        return text.replace("-", "−")


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    r"""Mean of independent runs with Student's interval.

    :math:`\bar x \pm t_{n-1}\, s/\sqrt n`

    Parameters
    ----------
    values
        One number a run. NaN and infinities are refused: a diverged run is counted, not averaged.
    level
        Coverage, above 0 and below 1.

    Returns
    -------
    Interval
        Mean, lower and upper end. With one value the ends are NaN: nothing is known about the spread.

    Raises
    ------
    ValueError
        For no value or one that is not finite.
    """
    from scipy import stats

    data = np.asarray(values, dtype=float)
    if not data.size or not np.isfinite(data).all():
        raise ValueError(f"values = {list(values)}: an interval needs finite numbers, at least one")
    mean = float(data.mean())
    if data.size == 1:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf((1 + level) / 2, data.size - 1) * stats.sem(data))
    return Interval(mean, mean - half, mean + half)


def summary(
    frame: pd.DataFrame,
    quantities: Sequence[str],
    *,
    by: str = "method",
    pair: str = "seed",
    baseline: str = "dpo",
) -> pd.DataFrame:
    """Means and paired differences of raw rows.

    Parameters
    ----------
    frame
        One row for each method and seed, of finished runs.
    quantities
        Columns to summarise.
    by, pair
        The column that names the method, and the one that says which rows of two methods belong together.
    baseline
        The method that the others are compared with; its own differences, and all if it is not there, are NaN.

    Returns
    -------
    DataFrame
        One row for each method and quantity: ``n``, ``mean``, ``low``, ``high`` (95 %), ``pairs`` (seeds that the
        baseline has, too), ``difference``, ``difference_low``, ``difference_high``, and ``twin``: another method whose
        raw values are the same in every quantity, a sign of one run reported twice; empty where there is none.

    Raises
    ------
    ValueError
        If a method has two rows for one seed, or a quantity is not finite.
    """
    import pandas as pd

    doubled = frame.duplicated([by, pair])
    if doubled.any():
        first = frame[doubled].iloc[0]
        raise ValueError(f"{by} {first[by]!r} has two rows for {pair} {first[pair]}: give one row a run")
    parts = {name: part.set_index(pair)[list(quantities)] for name, part in frame.groupby(by, sort=False)}
    twins = {
        name: next((o for o, p in parts.items() if o != name and p.sort_index().equals(part.sort_index())), "")
        for name, part in parts.items()
    }
    rows: list[dict[str, Any]] = []
    for name, part in parts.items():
        for quantity in quantities:
            mean, low, high = interval(part[quantity])
            row = {by: name, "quantity": quantity, "n": len(part), "mean": mean, "low": low, "high": high, "pairs": 0}
            row |= dict.fromkeys(("difference", "difference_low", "difference_high"), math.nan)
            if baseline in parts and name != baseline:
                gaps = (part[quantity] - parts[baseline][quantity]).dropna()
                if len(gaps):
                    row["pairs"] = len(gaps)
                    row["difference"], row["difference_low"], row["difference_high"] = interval(gaps)
            rows.append({**row, "twin": twins[name]})
    return pd.DataFrame(rows)


def render(frame: pd.DataFrame, *, caption: str = "", index: bool = True) -> str:
    """The HTML that `show` displays; see there."""
    if frame.empty:
        raise ValueError("the table is empty: give at least one line and one column")

    def words(cell: Any) -> Any:
        return prose(cell).replace("\n", "<br>") if isinstance(cell, str) else cell

    if frame.index.nlevels == frame.columns.nlevels == 1 and frame.index.name is not None:
        frame = frame.rename_axis(index=None, columns=frame.index.name)  # one line of titles, not two
    typeset = frame.map(words).rename(index=words, columns=words)
    table = typeset.to_html(classes="table", border=0, escape=False, index=index, justify="unset")
    if caption:
        start = table.index(">") + 1
        table = f"{table[:start]}<caption>{prose(caption)}</caption>{table[start:]}"
    return f'<div class="bdpo-table" tabindex="0">{table}</div>'


def show(frame: pd.DataFrame, *, caption: str = "", index: bool = True) -> None:
    """Display a frame in the book's look; a table that is too wide scrolls, also by keyboard.

    Parameters
    ----------
    frame
        In strings, also those of the titles, ``$...$`` is mathematics, and a line break starts a new line.
    caption
        Shown above.
    index
        Whether the index is a column.

    Raises
    ------
    ValueError
        If there is nothing to show.
    """
    from IPython.display import HTML, display

    display(HTML(render(frame, caption=caption, index=index)))


def lines(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Display rows of cells under titles, each cell as ``str`` writes it; otherwise as `show`.

    Raises
    ------
    ValueError
        If there is no row, or one that is longer or shorter than the titles.
    """
    import pandas as pd

    show(pd.DataFrame([[str(cell) for cell in row] for row in rows], columns=list(titles)), index=False)
