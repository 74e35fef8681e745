"""What rests on what: the statements that a statement needs, those that need it, and the weakest link below it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

#: From the verdict that supports most to the one that supports least.
WEAKER = (
    "reproduced",
    "holds",
    "holds-with-condition",
    "holds-corrected",
    "partly-reproduced",
    "not-run",
    "open",
    "not-reproduced",
    "ill-defined",
    "refuted",
)


def direct(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """For each id the ids that it names: what it rests on, and the row that it is the same as."""
    return {r["id"]: [*r["rests_on"], *([r["same_as"]] if r["same_as"] else [])] for r in rows}


def foundations(rows: Iterable[Mapping[str, Any]]) -> dict[str, set[str]]:
    """For each id all that it rests on, however far down.

    Raises
    ------
    ValueError
        If a statement rests on itself.
    """
    below, found = direct(rows), {}

    def visit(name: str, path: tuple[str, ...]) -> set[str]:
        if name in path:
            raise ValueError(f"{name} rests on itself: {' → '.join((*path, name))}")
        if name not in found:
            found[name] = set(below[name]).union(*(visit(b, (*path, name)) for b in below[name]))
        return found[name]

    for name in below:
        visit(name, ())
    return found


def consequences(rows: Iterable[Mapping[str, Any]]) -> dict[str, set[str]]:
    """For each id all that rests on it, however far up."""
    below = foundations(rows)
    above: dict[str, set[str]] = {name: set() for name in below}
    for name, needs in below.items():
        for needed in needs:
            above[needed].add(name)
    return above


def weakest(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """For each id the weakest verdict among all that it rests on; its own if it rests on nothing."""
    rows = list(rows)
    verdicts = {r["id"]: r["verdict"] for r in rows}
    return {
        name: max((verdicts[b] for b in below or {name}), key=WEAKER.index) for name, below in foundations(rows).items()
    }


def layers(rows: Iterable[Mapping[str, Any]], shown: set[str]) -> list[list[str]]:
    """The shown statements in layers: each rests only on earlier ones, links through hidden statements included."""
    below = {name: needs & shown for name, needs in foundations(rows).items() if name in shown}
    level: dict[str, int] = {}
    while len(level) < len(below):
        for name, needs in below.items():
            if name not in level and needs <= set(level):
                level[name] = 1 + max((level[b] for b in needs), default=-1)
    return [[n for n in below if level[n] == k] for k in range(max(level.values(), default=-1) + 1)]
