"""A statement of the paper in a notebook: its formula, the evidence gathered for it, and the card that shows both."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from bdpo import verify
from bdpo.ledger.index import INDEX, Entry
from bdpo.ledger.rules import AS_PRINTED, verdict
from bdpo.verify.display import math, numbers, prose
from bdpo.verify.evidence import OUTCOME

MIME = "application/vnd.bdpo.claim+json"

_BADGE = {
    "holds": "holds",
    "holds-with-condition": "holds with a condition",
    "holds-corrected": "holds once corrected",
    "refuted": "refuted",
    "ill-defined": "ill-defined",
    "reproduced": "reproduced",
    "partly-reproduced": "partly reproduced",
    "not-reproduced": "not reproduced",
    "not-run": "not run",
    "open": "open",
}


class Claim:
    """One statement under audit. Evidence is attached by role; the verdict is computed from it.

    Parameters
    ----------
    entry
        The statement's row of the index.
    formula
        What is displayed *and* checked: a SymPy relation, a list of them, or ``{reading: relation}``. ``None`` for a
        statement made in prose, whose readings are then displayed as their checks state them.
    """

    def __init__(self, entry: Entry, formula: Any = None):
        self.entry, self.formula = entry, formula
        self.evidence: list[dict[str, Any]] = []

    def _formula_of(self, reading: str, evidence: verify.Evidence) -> Any:
        if not isinstance(self.formula, Mapping):
            return self.formula
        if reading not in self.formula and evidence.statement.startswith("$"):
            known = ", ".join(self.formula)
            raise ValueError(f"{self.entry.id}: no formula for the reading {reading!r}; known: {known}")
        return self.formula.get(reading)  # a reading decided by a law carries its words in the evidence

    def _latex_of(self, reading: str) -> str | None:
        """LaTeX of a reading that has a formula of its own."""
        own = isinstance(self.formula, Mapping) and reading in self.formula
        return verify.latex(self.formula[reading]) if own else None

    def _attach(self, role: str, evidence: verify.Evidence, reading: str, words: str | None) -> Claim:
        if not isinstance(evidence, verify.Evidence):
            raise TypeError(f"{self.entry.id}: {role} takes Evidence from bdpo.verify, not {type(evidence).__name__}")
        self.evidence.append({**evidence.to_dict(), "role": role, "reading": reading, "words": words})
        return self

    def printed(self, evidence: verify.Evidence, reading: str = AS_PRINTED) -> Claim:
        """Attach a check of the statement as the paper prints it, in the given reading.

        Raises
        ------
        ValueError
            If the check is of another formula than the one that this claim displays.
        """
        shown = self._formula_of(reading, evidence)
        if shown is not None and verify.text(shown) != evidence.statement:
            raise ValueError(
                f"{self.entry.id}: the evidence is about {evidence.statement}, but the claim displays "
                f"{verify.text(shown)}; pass claim.formula to the check"
            )
        return self._attach("printed", evidence, reading, None)

    def step(self, evidence: verify.Evidence, reading: str = AS_PRINTED) -> Claim:
        """Attach a line of our proof of the printed statement, where no single check decides it.

        The reading is established if all its steps are, and if the statement itself also passed a check.
        """
        return self._attach("step", evidence, reading, None)

    def under(self, condition: str, evidence: verify.Evidence, reading: str = AS_PRINTED) -> Claim:
        """Attach a check of the statement under ``condition`` (words), which the paper does not ask for."""
        return self._attach("under", evidence, reading, condition)

    def corrected(self, evidence: verify.Evidence, reading: str = AS_PRINTED, words: str | None = None) -> Claim:
        """Attach a check of a repaired formula that still serves the paper's use of the statement."""
        return self._attach("corrected", evidence, reading, words)

    def conclusion(self, words: str, evidence: verify.Evidence, reading: str = AS_PRINTED) -> Claim:
        """Attach a check of what the paper concludes; if it fails, no repair of the formula rescues the statement."""
        return self._attach("conclusion", evidence, reading, words)

    def sharp(self, evidence: verify.Evidence, words: str | None = None) -> Claim:
        """Attach a true statement worth having instead of the printed one."""
        return self._attach("sharp", evidence, AS_PRINTED, words)

    def well_posed(self, words: str, evidence: verify.Evidence) -> Claim:
        """Attach a check that equally consistent readings agree; a counterexample makes the statement ill-defined."""
        return self._attach("well-posed", evidence, AS_PRINTED, words)

    def reproduction(self, evidence: verify.Evidence, reading: str = AS_PRINTED) -> Claim:
        """Attach a measurement of what the paper reports."""
        return self._attach("reproduction", evidence, reading, None)

    def not_run(self, words: str, reading: str) -> Claim:
        """Say that the experiment which ``reading`` asks for was not made, and in ``words`` what it would take."""
        nothing = verify.Evidence(
            method="not run",
            statement=reading,
            passed=None,
            strength="measurement",
            domain=words,
            tolerance="none",
            falsifier="the experiment itself",
            trust="nothing: it was not run",
            mutants=[],
        )
        return self._attach("not-run", nothing, reading, words)

    @property
    def verdict(self) -> str:
        return verdict(self.evidence)[0]

    def row(self) -> dict[str, Any]:
        """The ledger row as plain data."""
        overall, readings = verdict(self.evidence)
        first = next((e for e in self.evidence if e["role"] in ("printed", "well-posed") and e["counterexample"]), None)
        better = next((e for role in ("corrected", "under", "sharp") for e in self.evidence if e["role"] == role), None)
        trust = [e["trust"] for e in self.evidence if e["role"] != "not-run"]
        if any(e["role"] == "step" for e in self.evidence):
            trust.append("the steps of the proof are put together in prose")
        formulas = self.formula
        if isinstance(formulas, Mapping):  # readings of one formula print alike: show it once
            formulas = list({verify.latex(f): f for f in formulas.values()}.values())
        return {
            **empty_row(self.entry),
            "latex": None if formulas is None else verify.latex(formulas),
            "readings": [{"name": n, "verdict": r, "latex": self._latex_of(n)} for n, r in readings.items()],
            "verdict": overall,
            "corrected": better and ": ".join(filter(None, (better["words"], better["statement"]))),
            "evidence": self.evidence,
            "counterexample": first and first["counterexample"],
            "falsifier": next((e["falsifier"] for e in self.evidence), None),
            "trust": "; ".join(dict.fromkeys(trust)) or None,
            "mutants_total": sum(e["mutants_total"] for e in self.evidence),
            "mutants_killed": sum(e["mutants_killed"] for e in self.evidence),
        }

    def __repr__(self) -> str:
        return f"<claim {self.entry.id}: {self.verdict}>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        row = self.row()
        return {"text/plain": repr(self), "text/html": card(row), MIME: row}


def empty_row(entry: Entry) -> dict[str, Any]:
    """A row of the ledger before any evidence: verdict ``open``."""
    return {
        "id": entry.id,
        "kind": entry.kind,
        "locator": entry.locator,
        "statement": entry.statement,
        "latex": None,
        "readings": [],
        "verdict": "open",
        "corrected": None,
        "evidence": [],
        "counterexample": None,
        "falsifier": None,
        "trust": None,
        "same_as": entry.same_as,
        "rests_on": list(entry.rests_on),
        "notebook": None,
        "anchor": f"claim-{entry.id}",
        "mutants_total": 0,
        "mutants_killed": 0,
    }


def claim(id: str, formula: Any = None) -> Claim:
    """Open the audit of one statement.

    Parameters
    ----------
    id
        An id of the claims index, such as ``"eq-2"``.
    formula
        See :class:`Claim`.

    Raises
    ------
    KeyError
        If the id is not in the index.
    """
    if id not in INDEX:
        raise KeyError(f"{id!r} is not an id of the claims index; `bdpo claims` lists them")
    return Claim(INDEX[id], formula)


# ---------------------------------------------------------------- the card


def badge(name: str) -> str:
    return f'<span class="badge badge-{name}">{_BADGE[name]}</span>'


def several_formulas(row: Mapping[str, Any]) -> bool:
    """Whether the readings of a row have formulas of their own, which then stand beside them."""
    return len({reading["latex"] for reading in row["readings"]}) > 1


def readings(row: Mapping[str, Any]) -> str:
    """HTML of the readings of a row, each with its verdict, and with its formula where it has one of its own."""
    own = several_formulas(row)
    items = "".join(
        f"<li>{prose(r['name'])}: {math(r['latex']) if own and r['latex'] else ''} {badge(r['verdict'])}</li>"
        for r in row["readings"]
    )
    return f'<ul class="claim-reading">{items}</ul>'


def findings(row: Mapping[str, Any]) -> str:
    """HTML of what a row found: formulas, readings with their verdicts, counterexample, what survives."""
    parts = []
    if row["latex"] and not several_formulas(row):
        parts.append(f'<div class="claim-formula">{math(row["latex"], display=True)}</div>')
    if len(row["readings"]) > 1:
        parts.append(readings(row))
    if row["counterexample"]:
        found = numbers(row["counterexample"])
        parts.append(f'<p class="claim-counterexample"><strong>Counterexample.</strong> {found}</p>')
    if row["corrected"]:
        parts.append(f'<p class="claim-corrected"><strong>What survives.</strong> {prose(row["corrected"])}</p>')
    return "".join(parts)


def card(row: Mapping[str, Any]) -> str:
    """HTML of a row: statement, verdict, findings, and the evidence folded away."""
    body = "".join(
        f"<tr><td>{e['role']}</td><td>{prose(e['statement'])}</td>"
        f"<td>{e['method']}: {OUTCOME[e['passed']]} ({e['strength']})</td>"
        f"<td>{prose(e['domain'])}</td><td>{e['mutants_killed']}/{e['mutants_total']}</td></tr>"
        for e in row["evidence"]
    )
    count = len(row["evidence"])
    return (
        f'<div class="claim" id="{row["anchor"]}">'
        f'<p class="claim-head"><span class="claim-id">{row["id"]}</span> '
        f'<span class="claim-locator">{html.escape(row["locator"])}</span> {badge(row["verdict"])}</p>'
        f'<p class="claim-statement">{prose(row["statement"])}</p>{findings(row)}'
        f'<details class="claim-evidence"><summary>Evidence: {count} check{"s" * (count != 1)}, '
        f"{row['mutants_killed']} of {row['mutants_total']} mutants killed</summary>"
        '<table class="evidence"><thead><tr><th>Role</th><th>Statement checked</th><th>Outcome</th><th>Domain</th>'
        f"<th>Mutants killed</th></tr></thead><tbody>{body}</tbody></table></details></div>"
    )
