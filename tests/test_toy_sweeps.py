"""Sweeps: killed and resumed, split among processes, refused where they do not belong; and the recorded rows."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from bdpo import results, toy
from bdpo.toy import sweeps
from bdpo.toy.__main__ import main as command

BASE = toy.Settings(n=5, steps=30, reference_steps=10, init="random", data="fresh", batch=8)
AXES = {"mask_rate": (0.0, 0.2), "seed": range(10), "method": ("dpo", "bdpo", "rlhf")}

_PROGRAM = """
import sys
from bdpo import toy
from bdpo.toy import sweeps
base = toy.Settings(n=5, steps=30, reference_steps=10, init="random", data="fresh", batch=8)
axes = {"mask_rate": (0.0, 0.2), "seed": range(10), "method": ("dpo", "bdpo", "rlhf")}
sweeps.sweep(toy.grid(base, **axes), sys.argv[1], chunk=2, progress=False)
"""


@pytest.fixture(scope="module")
def whole():
    return toy.run(toy.grid(BASE, **AXES))


def test_a_killed_sweep_resumes_with_identical_rows(tmp_path, whole, root):
    work = subprocess.Popen([sys.executable, "-c", _PROGRAM, str(tmp_path)], cwd=root)
    try:
        while len(list(tmp_path.glob("[0-9]*.parquet"))) < 3:
            assert work.poll() is None, "the sweep ended before it could be killed"
            time.sleep(0.001)
    finally:
        os.kill(work.pid, signal.SIGKILL)
        work.wait()
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("[0-9]*.parquet")}
    assert 3 <= len(kept) < 30
    table, seconds = sweeps.sweep(toy.grid(BASE, **AXES), tmp_path, chunk=2, progress=False)
    pd.testing.assert_frame_equal(table, whole, check_exact=True)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert seconds > 0


def test_rows_do_not_depend_on_chunks_or_processes(tmp_path, whole):
    one, _ = sweeps.sweep(toy.grid(BASE, **AXES), tmp_path / "one", chunk=7, progress=False)
    two, _ = sweeps.sweep(toy.grid(BASE, **AXES), tmp_path / "two", chunk=25, workers=2, progress=False)
    pd.testing.assert_frame_equal(one, whole, check_exact=True)
    pd.testing.assert_frame_equal(two, whole, check_exact=True)


def test_a_folder_of_another_sweep_is_refused(tmp_path):
    settings = toy.grid(BASE, seed=range(2))
    sweeps.sweep(settings, tmp_path, progress=False)
    for other in ({"settings": settings[:1]}, {"chunk": 1}, {"columns": ["reward"]}):
        with pytest.raises(ValueError, match="another sweep"):
            sweeps.sweep(**({"settings": settings, "folder": tmp_path, "progress": False} | other))


def test_nothing_to_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 runs"):
        sweeps.sweep([], tmp_path)
    with pytest.raises(ValueError, match="chunk = 0"):
        sweeps.sweep([BASE], tmp_path, chunk=0)
    with pytest.raises(ValueError, match="workers = 0"):
        sweeps.sweep([BASE], tmp_path, workers=0)
    assert not list(tmp_path.iterdir())


def test_an_error_in_a_chunk_is_not_swallowed(tmp_path):
    with pytest.raises(ZeroDivisionError):
        sweeps.sweep([BASE], tmp_path, rows=lambda settings: 1 / 0, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.txt"]


@pytest.mark.parametrize("name", sweeps.RECORDED)
def test_recorded_sweeps_are_made_of_distinct_runs_with_paired_methods(name):
    settings = sweeps.RECORDED[name].settings(2)
    assert len(set(settings)) == len(settings)
    assert set(toy.PAPER) <= {s.method for s in settings}
    worlds = {replace(s, method="dpo") for s in settings}
    methods = {m for s in settings for m in [s.method]}
    assert len(worlds) * len(methods) == len(settings)


def test_a_variation_changes_the_central_reading_in_one_thing():
    for name, change in sweeps.VARIATIONS.items():
        assert len(change) == (name != "central")
        assert all(getattr(sweeps.CENTRAL, key) != value for key, value in change.items())
    assert len({tuple(change.items()) for change in sweeps.VARIATIONS.values()}) == len(sweeps.VARIATIONS)
    settings = sweeps.variations(2)
    assert len(settings) == len(sweeps.VARIATIONS) * 3 * 3 * 2 * 6
    assert sum(s == replace(sweeps.CENTRAL, record=(100,), watch_every=0) for s in settings) == 1


def test_the_command_records_a_result(tmp_path, monkeypatch, capsys):
    few = sweeps.Recorded("a title", lambda seeds: toy.grid(BASE, seed=range(seeds), method=("dpo", "ppo")), 5)
    monkeypatch.setitem(sweeps.RECORDED, "table1", few)
    command(["table1", "--seeds", "2", "--chunks", str(tmp_path / "chunks"), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.strip().endswith("table1.parquet")
    table = results.read("toy/table1", root=tmp_path / "out")
    assert list(table.method) == ["dpo", "ppo", "dpo", "ppo"]
    note = results.provenance("toy/table1", root=tmp_path / "out")
    assert note["seeds"] == [0, 1]
    assert note["parameters"]["command"] == "python -m bdpo.toy table1"
    pd.testing.assert_frame_equal(table, toy.run(few.settings(2)), check_exact=True)


def test_unknown_sweeps_and_bad_counts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="name is 'table2'; allowed: table1, multiverse"):
        sweeps.record("table2", root=tmp_path)
    with pytest.raises(ValueError, match="seeds is 0"):
        sweeps.record("table1", seeds=0, root=tmp_path)


@pytest.mark.parametrize("name", sweeps.RECORDED)
def test_a_recorded_row_comes_out_again(name, root):
    """A few rows of the repository, made anew: equal to rounding, which the compiler and the processor decide."""
    folder = root / "book" / "results"
    if f"toy/{name}" not in results.names(root=folder):
        pytest.skip(f"toy/{name} is not recorded here")
    what = sweeps.RECORDED[name]
    note, table = results.provenance(f"toy/{name}", root=folder), results.read(f"toy/{name}", root=folder)
    settings = what.settings(note["parameters"]["seeds"])
    assert len(settings) == note["parameters"]["runs"]
    methods, rows_a_run = len({s.method for s in settings}), len(table) // len(settings)
    blocks, widest = len(settings) // methods, float(np.finfo(np.float32).max)  # narrow rows are cut there
    for k in (0, blocks // 2, blocks - 1):
        again = what.rows(settings[k * methods : (k + 1) * methods])
        old = table.iloc[k * len(again) : (k + 1) * len(again)].reset_index(drop=True)
        assert len(again) == methods * rows_a_run
        for column in old:
            if pd.api.types.is_float_dtype(old[column]) and column in {
                *toy.MEASURES,
                *(c for c in old if c[:3] == "tv_"),
            }:
                tolerance = {"rel": 1e-4, "abs": 1e-6} if what.narrow else {"rel": 1e-6, "abs": 1e-9}
                fresh = again[column].clip(-widest, widest) if what.narrow else again[column]
                assert fresh.to_numpy() == pytest.approx(old[column].to_numpy(), nan_ok=True, **tolerance), column
            elif column != "diverged_at":
                assert list(again[column]) == list(old[column]), column
