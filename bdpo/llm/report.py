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
:root { color-scheme: light dark; --ink: #1d2733; --paper: #fff; --rule: #c9d1da; --line: #0673b3; --held: #b34700 }
@media (prefers-color-scheme: dark) { :root { --ink: #dde3ea; --paper: #12171d; --rule: #3b444f; --line: #4db5ee;
  --held: #f29a5c } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
       max-width: 60rem; padding: 0 1rem }
.table { margin: 1rem 0; overflow-x: auto }
table { border-collapse: collapse }
caption { text-align: left; font-weight: 600 }
th, td { padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top }
.number { text-align: right; font-variant-numeric: tabular-nums }
figure { margin: 1rem 0; display: inline-block } svg { max-width: 100%; height: auto }
svg text { fill: currentColor; font-size: 12px } svg path { fill: none; stroke: var(--line); stroke-width: 2 }
svg line { stroke: var(--rule) } svg .validation { stroke: var(--held) } svg text.training { fill: var(--line) }
svg text.validation { fill: var(--held); stroke: none }
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
    kinds = {c: ' class="number"' * all(r.get(c) is None or _is_number(r.get(c)) for r in rows) for c in columns}
    head = "".join(f'<th scope="col"{kinds[column]}>{html.escape(str(column))}</th>' for column in columns)
    body = "".join(
        f"<tr>{''.join(f'<td{kinds[column]}>{_cell(row.get(column))}</td>' for column in columns)}</tr>" for row in rows
    )
    return (
        f'<div class="table" tabindex="0"><table><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def curves(history: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """A small line chart for each numeric column of rows with a ``step``, with that of validation (``eval_…``)."""
    columns = dict.fromkeys(c for row in history for c, v in row.items() if c != "step" and _is_number(v))
    for column in dict.fromkeys(column.removeprefix("eval_") for column in columns):
        lines = {
            kind: [(row["step"], row[name]) for row in history if _is_number(row.get(name)) and "step" in row]
            for kind, name in (("training", column), ("validation", f"eval_{column}"))
        }
        lines = {kind: points for kind, points in lines.items() if len(points) > 1}
        if any(value != points[0][1] for points in lines.values() for _, value in points):
            yield _chart(column, lines)


def _chart(name: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    width, height, left, top, bottom = 420, 220, 70, 30, 190
    xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    across = lambda x: left + (width - left - 20) * (x - x0) / ((x1 - x0) or 1)  # noqa: E731
    up = lambda y: bottom - (bottom - top) * (y - y0) / ((y1 - y0) or 1)  # noqa: E731
    paths, words = "", []
    for kind, points in lines.items():
        (first, start), (last, end) = points[0], points[-1]
        words.append(f"{name}, {kind}, from {_number(start)} at step {first} to {_number(end)} at step {last}")
        corners = " L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in points)
        paths += f'<path class="{kind}" d="M{corners}"/>'
    key = "".join(
        f'<text class="{kind}" x="{width - 20 - 75 * k}" y="15" text-anchor="end">{kind}</text>'
        for k, kind in enumerate(reversed(list(lines)))
    )
    told = html.escape("; ".join(words), quote=True)
    return (
        f'<figure><svg role="img" aria-label="{told}" viewBox="0 0 {width} {height}" width="{width}">'
        f'<text x="0" y="15">{html.escape(name)}</text>{key}'
        f'<line x1="{left}" x2="{width - 20}" y1="{bottom}" y2="{bottom}"/>'
        f'<line x1="{left}" x2="{left}" y1="{top}" y2="{bottom}"/>'
        f'<text x="{left - 6}" y="{bottom}" text-anchor="end">{_number(y0)}</text>'
        f'<text x="{left - 6}" y="{top + 5}" text-anchor="end">{_number(y1)}</text>'
        f'<text x="{left}" y="{bottom + 18}">step {x0:g}</text>'
        f'<text x="{width - 20}" y="{bottom + 18}" text-anchor="end">{x1:g}</text>{paths}</svg></figure>'
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(value: Any) -> str:
    if _is_number(value):
        return _number(value).replace("-", "−")
    if isinstance(value, dict):
        value = ", ".join(f"{k} = {v}" for k, v in value.items())
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return html.escape("–" if value is None or value == "" else str(value))


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
