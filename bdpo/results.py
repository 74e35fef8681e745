"""Recorded rows of long runs: one Parquet file and, beside it, one JSON file that says where they come from.

A result has a name such as ``toy/table1`` and lies under ``book/results``. Rows are raw, one a run and recorded step;
tables and figures are computed from them, never typed. Both files are written under another name and renamed, and the
second holds the digest of the first, so that rows and provenance that do not belong together are noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bdpo

if TYPE_CHECKING:
    import pandas as pd

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*(/[a-z0-9][a-z0-9_.-]*)*")


def folder(root: str | Path | None = None) -> Path:
    """Where results lie: ``root`` if given, else ``book/results`` of the book around this directory, or around bdpo.

    Parameters
    ----------
    root
        A folder to use instead; it need not exist yet.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    FileNotFoundError
        If no folder is given and there is no book.
    """
    if root is not None:
        return Path(root)
    for start in (Path.cwd(), Path(bdpo.__file__).parent):
        for parent in (start, *start.parents):
            if (parent / "_toc.yml").is_file():
                return parent / "book" / "results"
    raise FileNotFoundError(f"no book above {Path.cwd()}: run inside a checkout, or say where with root=")


def write(
    frame: pd.DataFrame,
    name: str,
    *,
    parameters: Mapping[str, Any],
    seconds: float,
    seeds: Sequence[int] | None = None,
    optional: Sequence[str] = (),
    root: str | Path | None = None,
) -> Path:
    """Write rows and their provenance, each file whole or not at all.

    Parameters
    ----------
    frame
        At least one row. Numbers are finite; a row may hold NaN or infinities only if it says why, in a column
        ``status`` with another value than ``"ok"`` or in a column ``diverged`` that is true.
    name
        Such as ``"toy/table1"``: lower case, digits, ``_ . -``, and ``/`` between folders.
    parameters
        All that somebody needs to make the rows again; anything that JSON can hold.
    seconds
        Wall time of the run that made the rows.
    seeds
        The seeds used, if any.
    optional
        Columns that some rows do not have: NaN there means "not defined" and needs no reason. Infinities do.
    root
        As in :func:`folder`.

    Returns
    -------
    Path
        The Parquet file.

    Raises
    ------
    ValueError
        If the name or the seconds are not of this form, there is no row, two columns share a name, or a row hides a
        number that is not finite.
    TypeError
        If JSON cannot hold the parameters.
    """
    path = _path(name, root)
    if not (isinstance(seconds, int | float) and 0 <= seconds < float("inf")):
        raise ValueError(f"seconds is {seconds!r}; allowed: a finite number of at least 0")
    _check_rows(frame, name, optional)
    note = {
        "name": name,
        "rows": len(frame),
        "columns": {str(column): str(kind) for column, kind in frame.dtypes.items()},
        "optional": list(optional),
        "parameters": dict(parameters),
        "seeds": None if seeds is None else [int(s) for s in seeds],
        "seconds": round(float(seconds), 3),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **origin(),
    }
    json.dumps(note, allow_nan=False)  # complains before anything is written
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        frame.to_parquet(half, engine="pyarrow", compression="zstd", index=False)
        note["sha256"] = hashlib.sha256(half.read_bytes()).hexdigest()
        half.replace(path)
        half.write_text(json.dumps(note, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
        half.replace(path.with_suffix(".json"))
    finally:
        half.unlink(missing_ok=True)
    return path


def read(name: str, *, root: str | Path | None = None) -> pd.DataFrame:
    """The rows of a result, of all runs, diverged ones too.

    Parameters
    ----------
    name, root
        As in :func:`write`.

    Returns
    -------
    DataFrame
        As it was written.

    Raises
    ------
    FileNotFoundError
        If there is no such result; the message lists those there are.
    ValueError
        If the rows are not those that the provenance was written for.
    """
    import pandas as pd

    path, note = _path(name, root), provenance(name, root=root)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != note["sha256"]:
        raise ValueError(
            f"{path.name} has the digest {found[:12]}…, its provenance names {note['sha256'][:12]}…: the two files are"
            " of different runs; record the result again, or restore both from version control"
        )
    return pd.read_parquet(path, engine="pyarrow")


def provenance(name: str, *, root: str | Path | None = None) -> dict[str, Any]:
    """Where the rows come from: parameters, seeds, seconds, versions, commit, hardware, digest.

    Parameters
    ----------
    name, root
        As in :func:`write`.

    Returns
    -------
    dict
        With the keys ``name, rows, columns, optional, parameters, seeds, seconds, finished, versions, commit, dirty,
        hardware, sha256``.

    Raises
    ------
    FileNotFoundError
        If there is no such result; the message lists those there are.
    """
    path = _path(name, root)
    note = path.with_suffix(".json")
    if not (path.is_file() and note.is_file()):
        there = ", ".join(names(root=root)) or "none"
        raise FileNotFoundError(f"no result {name!r} under {folder(root)}; there: {there}")
    return json.loads(note.read_text("utf-8"))


def names(*, root: str | Path | None = None) -> list[str]:
    """The results there are, sorted.

    Parameters
    ----------
    root
        As in :func:`folder`.

    Returns
    -------
    list of str
        Names as :func:`read` takes them.
    """
    base = folder(root)
    return sorted(
        path.relative_to(base).with_suffix("").as_posix()
        for path in base.rglob("*.parquet")
        if path.with_suffix(".json").is_file() and not path.name.startswith(".")
    )


def origin() -> dict[str, Any]:
    """Versions, commit and hardware of this process.

    Returns
    -------
    dict
        ``versions`` (Python and the packages that make the numbers; only those installed), ``commit`` and ``dirty``
        (whether a file of the package differs from it; both ``None``
        outside a checkout), ``hardware`` (``cpu``, ``cores``, ``gpu``).
    """
    versions = {"python": platform.python_version(), "bdpo": bdpo.__version__}
    for package in ("numpy", "torch", "numba", "pandas", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    state = _git("status", "--porcelain", "--untracked-files=no", ".")
    return {
        "versions": versions,
        "commit": (_git("rev-parse", "HEAD") or "").strip() or None,
        "dirty": None if state is None else bool(state.strip()),
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "gpu": _gpu()},
    }


def _path(name: str, root: str | Path | None) -> Path:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name is {name!r}; allowed: such as 'toy/table1', of a-z, 0-9, '_', '.', '-' and '/'")
    path = folder(root) / name
    return path.with_name(f"{path.name}.parquet")


def _check_rows(frame: pd.DataFrame, name: str, optional: Sequence[str]) -> None:
    """Refuse no rows, doubled columns, and numbers that are not finite in rows that do not say so."""
    import numpy as np

    if not len(frame):
        raise ValueError(f"{name}: there is no row to write")
    if not frame.columns.is_unique:
        raise ValueError(f"{name}: the columns {list(frame.columns[frame.columns.duplicated()])} stand there twice")
    excused = np.zeros(len(frame), bool)
    if "diverged" in frame:
        excused |= frame["diverged"].to_numpy(bool)
    if "status" in frame:
        excused |= (frame["status"] != "ok").to_numpy(bool)
    for column in frame.select_dtypes("number").columns:
        values = frame[column].to_numpy(float, na_value=np.nan)
        hidden = (np.isinf(values) if column in optional else ~np.isfinite(values)) & ~excused
        if hidden.any():
            row = int(hidden.argmax())
            raise ValueError(
                f"{name}: column {column!r} is {frame[column].iloc[row]} in row {row}, and the row does not say why;"
                " mark it in a column 'status' (other than 'ok') or 'diverged', or name the column in optional="
            )


def _git(*arguments: str) -> str | None:
    """What git says about the checkout the package lies in; nothing outside one."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(bdpo.__file__).parent), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _gpu() -> str | None:
    """The accelerator's name, if this process has loaded torch and torch sees one."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
