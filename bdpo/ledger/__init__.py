"""The paper's statements, the rules from evidence to verdict, and the collected ledger.

In a notebook::

    claim = ledger.claim("eq-2", formula=sp.Eq(dw / dl, -pi_l / pi_w))
    claim.printed(verify.identity(claim.formula))
    claim                                    # displays the card; the row travels with the output
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bdpo.ledger.claim import MIME, Claim, card, claim, empty_row
from bdpo.ledger.index import INDEX, Entry
from bdpo.ledger.rules import ROLES, VERDICTS, verdict


def collect(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The whole ledger in the order of the index: the given rows, ``open`` for the rest.

    The verdict of each row is computed again from its evidence. A row that is ``same_as`` another and has no evidence
    of its own takes over the other's.

    Raises
    ------
    ValueError
        If an id is unknown, or ruled on twice.
    """
    given: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["id"] not in INDEX:
            raise ValueError(f"{row['id']!r} is not an id of the claims index")
        if row["id"] in given:
            raise ValueError(
                f"{row['id']} is ruled on twice: in {given[row['id']]['notebook']} and in {row['notebook']}"
            )
        given[row["id"]] = row
    ledger = []
    for name, entry in INDEX.items():
        row = {**empty_row(entry), **given.get(name, {})}
        if not row["evidence"] and entry.same_as in given:
            row = {
                **given[entry.same_as],
                **{k: row[k] for k in ("id", "kind", "locator", "statement", "same_as", "rests_on")},
            }
        row["verdict"] = verdict(row["evidence"])[0]
        ledger.append(row)
    return ledger


class Colophon:
    """Versions that a chapter ran with, shown at its end."""

    packages = ("numpy", "sympy", "python-flint", "hypothesis", "torch", "matplotlib")

    def __init__(self) -> None:
        self.versions = {"python": platform.python_version()}
        for name in self.packages:
            try:
                self.versions[name] = version(name)
            except PackageNotFoundError:
                self.versions[name] = "not installed"

    def __repr__(self) -> str:
        return ", ".join(f"{k} {v}" for k, v in self.versions.items())

    def _repr_html_(self) -> str:
        return f'<p class="colophon">Computed with {self!r}.</p>'


def colophon() -> Colophon:
    """What this chapter was computed with; put it in the last cell."""
    return Colophon()


__all__ = [
    "INDEX",
    "MIME",
    "ROLES",
    "VERDICTS",
    "Claim",
    "Colophon",
    "Entry",
    "card",
    "claim",
    "collect",
    "colophon",
    "empty_row",
    "verdict",
]
