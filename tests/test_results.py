"""Recorded rows: written whole or not at all, never with a hidden NaN, and refused where they do not belong."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from bdpo import results


@pytest.fixture
def rows():
    return pd.DataFrame({"method": ["dpo", "bdpo"], "seed": [0, 1], "reward": [4.25, 4.5]})


def test_rows_and_provenance_come_back(tmp_path, rows):
    path = results.write(rows, "toy/one", parameters={"steps": 3}, seconds=1.5, seeds=[0, 1], root=tmp_path)
    assert path == tmp_path / "toy" / "one.parquet"
    pd.testing.assert_frame_equal(results.read("toy/one", root=tmp_path), rows)
    note = results.provenance("toy/one", root=tmp_path)
    assert (note["parameters"], note["seeds"], note["seconds"], note["rows"]) == ({"steps": 3}, [0, 1], 1.5, 2)
    assert {"python", "numpy", "bdpo"} <= set(note["versions"])
    assert note["hardware"]["cores"] >= 1
    assert note["hardware"]["cpu"]
    assert results.names(root=tmp_path) == ["toy/one"]


def test_nothing_half_written_stays(tmp_path, rows):
    results.write(rows, "one", parameters={}, seconds=0, root=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.json", "one.parquet"]
    before = (tmp_path / "one.parquet").read_bytes()
    with pytest.raises(TypeError):
        results.write(rows, "one", parameters={"f": object()}, seconds=0, root=tmp_path)
    assert (tmp_path / "one.parquet").read_bytes() == before


def test_a_failure_while_writing_leaves_the_old_result(tmp_path, rows, monkeypatch):
    results.write(rows, "one", parameters={}, seconds=0, root=tmp_path)

    def full(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(OSError, match="disk full"):
        results.write(rows.head(1), "one", parameters={}, seconds=0, root=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.json", "one.parquet"]
    assert len(results.read("one", root=tmp_path)) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_needs_a_reason(tmp_path, rows, bad):
    rows.loc[1, "reward"] = bad
    with pytest.raises(ValueError, match=r"column 'reward' is .* in row 1"):
        results.write(rows, "one", parameters={}, seconds=0, root=tmp_path)
    assert not list(tmp_path.iterdir())
    for column, said, unsaid in (
        ("diverged", [False, True], [True, False]),
        ("status", ["ok", "lost"], ["lost", "ok"]),
    ):
        results.write(rows.assign(**{column: said}), "one", parameters={}, seconds=0, root=tmp_path)
        with pytest.raises(ValueError, match="does not say why"):
            results.write(rows.assign(**{column: unsaid}), "one", parameters={}, seconds=0, root=tmp_path)


def test_a_number_that_a_row_does_not_have_needs_no_reason_but_an_infinity_does(tmp_path, rows):
    rows.loc[1, "reward"] = math.nan
    results.write(rows, "one", parameters={}, seconds=0, optional=["reward"], root=tmp_path)
    assert results.provenance("one", root=tmp_path)["optional"] == ["reward"]
    rows.loc[1, "reward"] = math.inf
    with pytest.raises(ValueError, match="column 'reward' is inf"):
        results.write(rows, "one", parameters={}, seconds=0, optional=["reward"], root=tmp_path)


def test_missing_values_of_nullable_columns_count_as_not_finite(tmp_path, rows):
    rows["steps"] = pd.array([1, None], dtype="Int64")
    with pytest.raises(ValueError, match="column 'steps'"):
        results.write(rows, "one", parameters={}, seconds=0, root=tmp_path)


def test_float32_stays_float32(tmp_path):
    frame = pd.DataFrame({"reward": np.float32([0.1])})
    results.write(frame, "one", parameters={}, seconds=0, root=tmp_path)
    assert results.read("one", root=tmp_path)["reward"].dtype == np.float32


@pytest.mark.parametrize("name", ["", "/one", "../one", "toy//one", "Toy", "a b", "toy/", 3, None])
def test_names_that_leave_the_folder_are_refused(tmp_path, rows, name):
    with pytest.raises(ValueError, match="name is"):
        results.write(rows, name, parameters={}, seconds=0, root=tmp_path)


def test_no_rows_doubled_columns_and_bad_seconds_are_refused(tmp_path, rows):
    with pytest.raises(ValueError, match="no row"):
        results.write(rows.head(0), "one", parameters={}, seconds=0, root=tmp_path)
    with pytest.raises(ValueError, match="twice"):
        results.write(rows.rename(columns={"seed": "reward"}), "one", parameters={}, seconds=0, root=tmp_path)
    for seconds in (-1, math.nan, math.inf, None):
        with pytest.raises(ValueError, match="seconds is"):
            results.write(rows, "one", parameters={}, seconds=seconds, root=tmp_path)


def test_an_unknown_name_says_what_there_is(tmp_path, rows):
    results.write(rows, "toy/one", parameters={}, seconds=0, root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no result 'toy/two' under .*; there: toy/one"):
        results.read("toy/two", root=tmp_path)


def test_rows_of_another_run_are_noticed(tmp_path, rows):
    results.write(rows, "one", parameters={}, seconds=0, root=tmp_path)
    results.write(rows.head(1), "two", parameters={}, seconds=0, root=tmp_path)
    (tmp_path / "two.parquet").replace(tmp_path / "one.parquet")
    with pytest.raises(ValueError, match="different runs"):
        results.read("one", root=tmp_path)


def test_provenance_is_strict_json(tmp_path, rows):
    with pytest.raises(ValueError, match="JSON"):
        results.write(rows, "one", parameters={"rate": math.nan}, seconds=0, root=tmp_path)
    results.write(rows, "one", parameters={"rate": 0.5}, seconds=0, root=tmp_path)
    assert json.loads((tmp_path / "one.json").read_text())["parameters"] == {"rate": 0.5}


def test_the_folder_is_that_of_the_book_around(tmp_path, monkeypatch):
    (tmp_path / "_toc.yml").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert results.folder() == tmp_path / "book" / "results"
