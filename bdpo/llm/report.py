"""The report of a run: one JSON file for programs, one HTML page for people that needs nothing beside it."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bdpo import results

_CSS = """
:root { color-scheme: light dark; --ink: #1d2733; --paper: #fff; --rule: #c9d1da; --line: #0673b3 }
@media (prefers-color-scheme: dark) { :root { --ink: #dde3ea; --paper: #12171d; --rule: #3b444f; --line: #4db5ee } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
       max-width: 60rem; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
caption { text-align: left; font-weight: 600 }
th, td { padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
figure { margin: 1rem 0; display: inline-block } svg { max-width: 100%; height: auto }
svg text { fill: currentColor; font-size: 12px } svg path { fill: none; stroke: var(--line); stroke-width: 2 }
svg line { stroke: var(--rule) }
p { white-space: pre-line }
.failed { border-left: .4rem solid #c0392b; padding-left: 1rem }
"""


def write(
    folder: str | Path,
    *,
    title: str,
    status: str,
    plan: Mapping[str, Any],
    numbers: Mapping[str, Any] | None = None,
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    seconds: float = 0.0,
) -> dict[str, Any]:
    """Write ``report.json`` and ``report.html`` into a folder, each whole or not at all.

    Parameters
    ----------
    folder
        Made if it is not there.
    title
        What was run.
    status
        ``"finished"``, or what happened instead; anything else is shown in red.
    plan
        As ``Plan.as_dict`` gives it.
    numbers
        Single numbers by name.
    tables
        Rows by caption; rows of one table share their columns.
    history
        Rows with a ``step``; each numeric column becomes a curve.
    notes
        Sentences that a reader needs: dropped rows, where checkpoints lie.
    seconds
        Wall time.

    Returns
    -------
    dict
        What ``report.json`` holds. Numbers that are not finite become ``None`` there, for JSON has none.
    """
    folder = Path(folder)
    report = {
        "title": title,
        "status": status,
        "results": dict(numbers or {}),
        "tables": {caption: list(map(dict, rows)) for caption, rows in (tables or {}).items()},
        "history": list(map(dict, history)),
        "notes": list(notes),
        "plan": dict(plan),
        "seconds": round(seconds, 3),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **results.origin(),
    }
    report = _plain(report)
    whole(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    whole(folder / "report.html", page(report))
    return report


def page(report: Mapping[str, Any]) -> str:
    """The HTML of a report, without anything from outside."""
    title = html.escape(str(report["title"]))
    failed = "" if report["status"] == "finished" else ' class="failed"'
    settings = [
        {"setting": name, "value": value, "from": report["plan"].get("sources", {}).get(name, "")}
        for name, value in report["plan"].get("settings", {}).items()
    ]
    origin = {
        "seconds": report["seconds"],
        "finished": report["finished"],
        "commit": (report["commit"] or "none") + (" with changes" if report["dirty"] else ""),
        **{f"version of {name}": version for name, version in report["versions"].items()},
        **report["hardware"],
    }
    parts = [
        f"<h1>{title}</h1><p{failed}><strong>{html.escape(str(report['status']))}</strong></p>",
        *(f"<p>{html.escape(note)}</p>" for note in report["notes"]),
        table("Results", [{"quantity": name, "value": value} for name, value in report["results"].items()]),
        *(table(caption, rows) for caption, rows in report["tables"].items()),
        "<h2>Along training</h2>" if report["history"] else "",
        *curves(report["history"]),
        "<h2>Plan</h2>",
        table(str(report["plan"].get("command", "")), settings),
        "<h2>Provenance</h2>",
        table("This run", [{"what": name, "value": value} for name, value in origin.items()]),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_CSS}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def table(caption: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """HTML of rows that share their columns; empty for no rows."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    head = "".join(f'<th scope="col">{html.escape(str(column))}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(_cell(row.get(column)) for column in columns)}</tr>" for row in rows)
    return (
        f"<table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def curves(history: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """One small line chart for each numeric column of rows with a ``step``."""
    columns = dict.fromkeys(c for row in history for c, v in row.items() if c != "step" and _is_number(v))
    for column in columns:
        points = [(row["step"], row[column]) for row in history if _is_number(row.get(column)) and "step" in row]
        if len(points) > 1:
            yield _chart(column, points)


def _chart(name: str, points: Sequence[tuple[float, float]]) -> str:
    width, height, left, top, bottom = 420, 220, 70, 30, 190
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    across = lambda x: left + (width - left - 20) * (x - x0) / ((x1 - x0) or 1)  # noqa: E731
    up = lambda y: bottom - (bottom - top) * (y - y0) / ((y1 - y0) or 1)  # noqa: E731
    path = " ".join(f"{'ML'[k > 0]}{across(x):.1f} {up(y):.1f}" for k, (x, y) in enumerate(points))
    words = html.escape(
        f"{name} from {_number(ys[0])} at step {xs[0]} to {_number(ys[-1])} at step {xs[-1]}", quote=True
    )
    return (
        f'<figure><svg role="img" aria-label="{words}" viewBox="0 0 {width} {height}" width="{width}">'
        f'<text x="0" y="15">{html.escape(name)}</text>'
        f'<line x1="{left}" x2="{width - 20}" y1="{bottom}" y2="{bottom}"/>'
        f'<line x1="{left}" x2="{left}" y1="{top}" y2="{bottom}"/>'
        f'<text x="{left - 6}" y="{bottom}" text-anchor="end">{_number(y0)}</text>'
        f'<text x="{left - 6}" y="{top + 5}" text-anchor="end">{_number(y1)}</text>'
        f'<text x="{left}" y="{bottom + 18}">step {x0:g}</text>'
        f'<text x="{width - 20}" y="{bottom + 18}" text-anchor="end">{x1:g}</text><path d="{path}"/></svg></figure>'
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(value: Any) -> str:
    if _is_number(value):
        return f'<td class="number">{_number(value)}</td>'
    if isinstance(value, dict):
        value = ", ".join(f"{k} = {v}" for k, v in value.items())
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return f"<td>{html.escape('–' if value is None else str(value))}</td>"


def _plain(value: Any) -> Any:
    """As JSON takes it: no NaN, no infinities, no NumPy scalars, no paths."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def whole(path: Path, text: str) -> None:
    """Write a file under another name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        half.write_text(text, "utf-8")
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
