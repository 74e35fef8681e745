"""Tables: intervals, paired differences, and what a reader sees."""

import math
import re

import pandas as pd
import pytest
from scipy import stats

from bdpo import tables

# From raw rows


def test_interval_is_students() -> None:
    values = [1.0, 2.0, 4.0]
    mean, low, high = tables.interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean == pytest.approx(7 / 3)
    assert (low, high) == pytest.approx(tuple(expected))


def test_interval_of_one_run_has_no_ends_and_refuses_what_is_not_finite() -> None:
    mean, low, high = tables.interval([3.0])
    assert mean == 3
    assert math.isnan(low)
    assert math.isnan(high)
    for wrong in ([], [1.0, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="an interval needs finite numbers"):
            tables.interval(wrong)


def rows(**values: list[float]) -> pd.DataFrame:
    return pd.DataFrame(
        [{"method": m, "seed": k, "score": v} for m, list_ in values.items() for k, v in enumerate(list_)]
    )


def test_differences_are_paired_and_leave_out_seeds_that_one_lacks() -> None:
    frame = rows(dpo=[0.0, 10.0, 20.0], bdpo=[1.0, 12.0, 21.0, 99.0])
    found = tables.summary(frame, ["score"]).set_index("method").loc["bdpo"]
    assert (found.n, found.pairs) == (4, 3)
    assert (found.difference, found.difference_low) == pytest.approx(tables.interval([1.0, 2.0, 1.0])[:2])


def test_summary_does_not_depend_on_the_order_of_rows() -> None:
    frame = rows(dpo=[0.0, 10.0, 20.0], bdpo=[1.0, 12.0, 21.0])
    shuffled = frame.sample(frac=1, random_state=0)
    both = [tables.summary(f, ["score"]).set_index("method").sort_index() for f in (frame, shuffled)]
    pd.testing.assert_frame_equal(*both)


def test_rows_that_are_the_same_are_flagged_and_doubled_rows_refused() -> None:
    frame = rows(dpo=[0.0, 1.0], bdpo=[2.0, 3.0], copy=[2.0, 3.0])
    twins = tables.summary(frame, ["score"]).set_index("method").twin
    assert twins["bdpo"] == "copy"
    assert twins["dpo"] == ""
    with pytest.raises(ValueError, match="two rows for seed 0"):
        tables.summary(pd.concat([frame, frame]), ["score"])


def test_an_interval_is_written_with_half_its_width() -> None:
    found = tables.Interval(-0.414, -0.473, -0.355)
    assert f"{found:.2f}" == "−0.41\u00a0±\u00a00.06"
    assert f"{tables.interval([1.0]):.1f}" == "1.0"
    assert f"{tables.Interval(math.nan, math.nan, math.nan):.1f}" == "–"


# What a reader sees


def test_strings_are_escaped_and_mathematics_is_typeset() -> None:
    frame = pd.DataFrame({"$g_w$": ["a < b", r"$\frac12$ & more"], "n": [1, 2]}, index=["x<y", "two\nlines"])
    html = tables.render(frame, caption="All $k$ of them")
    assert "a &lt; b" in html
    assert "x&lt;y" in html
    assert "two<br>lines" in html
    assert html.count('class="math') == 3
    assert re.search(r"<table[^>]*><caption>All <span", html)
    assert html.startswith('<div class="bdpo-table" tabindex="0">')  # scrolls by keyboard, too


def test_the_name_of_the_index_stands_among_the_titles() -> None:
    html = tables.render(pd.DataFrame({"n": [1]}, index=pd.Index(["a"], name="loss")))
    assert re.findall("<th>(.*?)</th>", html) == ["loss", "n", "a"]


def test_lines_show_each_cell_as_str_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("IPython.display.display", lambda made: shown.append(made.data))
    tables.lines(["name", "value"], iter([("a", 0.5), ("b", 12)]))
    assert re.findall("<td>(.*?)</td>", shown[0]) == ["a", "0.5", "b", "12"]
    assert re.findall("<th>(.*?)</th>", shown[0]) == ["name", "value"]


def test_an_empty_table_and_lines_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="the table is empty"):
        tables.render(pd.DataFrame())
    with pytest.raises(ValueError, match="the table is empty"):
        tables.lines(["a"], [])
    with pytest.raises(ValueError, match="2 columns passed, passed data had 1"):
        tables.lines(["a", "b"], [("only one",)])
