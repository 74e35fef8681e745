r"""Tables from raw rows: means with intervals over seeds, and differences to a baseline paired by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
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
    tuple of float
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
        return mean, math.nan, math.nan
    half = float(stats.t.ppf((1 + level) / 2, data.size - 1) * data.std(ddof=1) / math.sqrt(data.size))
    return mean, mean - half, mean + half


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


def cell(mean: float, low: float, high: float, digits: int = 2) -> str:
    """A number with its interval as people write it: ``0.41 [0.35, 0.47]``; without ends where there are none."""
    if math.isnan(mean):
        return "–"
    text = f"{mean:.{digits}f}"
    return text if math.isnan(low) else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"
