"""From evidence to verdict. Nobody types a verdict: these rules compute it.

Each piece of evidence has a *role* and belongs to a *reading* of the statement:

``printed``        the statement as the paper prints it, in that reading
``step``           a line of our proof of a printed statement that no single check decides; prose puts them together
``under``          the statement under a condition that the paper does not ask for
``corrected``      a repaired formula that the paper's own use of it still needs
``conclusion``     what the paper concludes from the statement, checked on the repaired one
``sharp``          a true statement worth having instead; it never rescues a refuted one
``well-posed``     whether equally consistent readings agree; a counterexample makes the statement ill-defined
``reproduction``   a measurement compared with what the paper reports
``not-run``        an experiment that the reading asks for and that nobody made; it stands alone in its reading

Evidence counts only if it was shown able to fail. What passed nothing but a search establishes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

ROLES = ("printed", "step", "under", "corrected", "conclusion", "sharp", "well-posed", "reproduction", "not-run")
VERDICTS = (
    "holds",
    "holds-with-condition",
    "holds-corrected",
    "refuted",
    "ill-defined",
    "reproduced",
    "partly-reproduced",
    "not-reproduced",
    "not-run",
    "open",
)
AS_PRINTED = "as printed"


def sound(evidence: Mapping[str, Any]) -> bool:
    """Whether the check was shown able to fail (a failed check: at least one mutant killed; else: all of them)."""
    if evidence["role"] == "not-run":
        return True  # no check: it claims nothing
    needed = 1 if evidence["passed"] is False else max(evidence["mutants_total"], 1)
    return evidence["mutants_killed"] >= needed


def established(evidence: Mapping[str, Any]) -> bool:
    return evidence["passed"] is True and evidence["strength"] in ("proof", "exhaustive")


def refuted(evidence: Mapping[str, Any]) -> bool:
    return evidence["passed"] is False and bool(evidence["counterexample"]) and evidence["strength"] == "proof"


def _reproduction(measured: list[Mapping[str, Any]]) -> str:
    outcomes = {e["passed"] for e in measured}
    if outcomes == {True}:
        return "reproduced"
    if outcomes == {False}:
        return "not-reproduced"
    return "partly-reproduced" if True in outcomes else "open"


def reading_verdict(evidence: Iterable[Mapping[str, Any]]) -> str:
    """Verdict of one reading from its evidence (rows with the keys of ``Evidence`` plus ``role``)."""
    by_role: dict[str, list[Mapping[str, Any]]] = {role: [] for role in ROLES}
    for e in evidence:
        if not sound(e):
            return "open"
        by_role[e["role"]].append(e)
    printed, measured = by_role["printed"], by_role["reproduction"]
    if any(map(refuted, printed)):
        rescued = not any(map(refuted, by_role["conclusion"]))
        for role, verdict in (("corrected", "holds-corrected"), ("under", "holds-with-condition")):
            if rescued and by_role[role] and all(map(established, by_role[role])):
                return verdict
        return "refuted"
    steps = by_role["step"]
    proved = any(map(established, printed)) or (steps and all(map(established, steps)))
    if printed and proved and all(e["passed"] for e in printed):
        return "holds"
    if measured:
        return _reproduction(measured)
    return "not-run" if by_role["not-run"] and not any(by_role[r] for r in ROLES if r != "not-run") else "open"


def verdict(evidence: Iterable[Mapping[str, Any]]) -> tuple[str, dict[str, str]]:
    """Verdict of a statement, and of each of its readings.

    Readings that agree give their common verdict. If some readings survive and others are refuted, the statement holds
    with the condition that it be read so. One open reading leaves the statement open. A reading that was not run keeps
    a statement from being reproduced as a whole, and also from not being reproduced: what failed elsewhere is no
    failure of it.
    """
    items = list(evidence)
    posed = [e for e in items if e["role"] == "well-posed"]
    names = dict.fromkeys(e["reading"] for e in items if e["role"] not in ("well-posed", "sharp"))
    readings = {
        n: reading_verdict(e for e in items if e["reading"] == n and e["role"] not in ("well-posed", "sharp"))
        for n in names
    }
    if any(sound(e) and refuted(e) for e in posed):
        return "ill-defined", readings
    if not readings or not all(map(sound, items)) or "open" in readings.values():
        return "open", readings
    found = set(readings.values())
    if len(found) == 1:
        return found.pop(), readings
    if "not-run" in found:
        return ("partly-reproduced" if found & {"reproduced", "partly-reproduced"} else "not-run"), readings
    if found <= {"reproduced", "partly-reproduced", "not-reproduced"}:
        return "partly-reproduced", readings
    if "refuted" in found or "not-reproduced" in found:
        return "holds-with-condition", readings
    return "holds-corrected" if "holds-corrected" in found else "holds-with-condition", readings
