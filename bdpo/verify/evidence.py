"""What a check leaves behind: an outcome, and the proof that the check could have failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from bdpo.verify.display import numbers, prose

S = TypeVar("S")

#: What a passed check is worth. Only the first two establish a statement on their declared domain.
STRENGTHS = ("proof", "exhaustive", "search", "measurement")


#: Words for ``passed``.
OUTCOME = {True: "passed", False: "failed", None: "undecided"}


class VacuousCheck(ValueError):
    """The check was given nothing that could have made it fail."""


@dataclass(frozen=True)
class Outcome:
    """What one run of a check found: ``passed`` is ``None`` where it could not decide."""

    passed: bool | None
    strength: str
    counterexample: dict[str, str] | None = None
    detail: str = ""


@dataclass(frozen=True)
class Evidence:
    """One check of one statement, as data.

    ``statement`` is generated from the formula that was checked (words with ``$...$``). ``falsifier`` says what would
    have made the check fail, ``trust`` what has to be believed for it to mean anything. ``mutants`` are wrong variants
    of the statement on which the same check was run again; a mutant is killed only if the check *failed* on it.
    """

    method: str
    statement: str
    passed: bool | None
    strength: str
    domain: str
    tolerance: str
    falsifier: str
    trust: str
    mutants: list[dict[str, Any]]
    counterexample: dict[str, str] | None = None
    seconds: float = 0.0
    detail: str = ""
    mutants_total: int = field(init=False)
    mutants_killed: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mutants_total", len(self.mutants))
        object.__setattr__(self, "mutants_killed", sum(m["killed"] for m in self.mutants))

    @property
    def sound(self) -> bool:
        """Whether the check was shown able to fail.

        A pass counts if every mutant was killed. A failure counts if some mutant was: a mutant that survives beside a
        failed statement is a true neighbour of it, which shows that the check can also pass.
        """
        needed = 1 if self.passed is False else max(self.mutants_total, 1)
        return self.mutants_killed >= needed

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __bool__(self) -> bool:
        raise TypeError("evidence is not a truth value: read `.passed` (True, False or None) and `.sound`")

    def __repr__(self) -> str:
        found = f", counterexample {self.counterexample}" if self.counterexample else ""
        score = f"mutants killed {self.mutants_killed}/{self.mutants_total}"
        return f"<{self.method}: {OUTCOME[self.passed]} ({self.strength}), {score}{found}>"

    def _repr_html_(self) -> str:
        found = f" Counterexample: {numbers(self.counterexample)}." if self.counterexample else ""
        return (
            f'<p class="check">{prose(self.statement)} <span class="check-outcome">{self.method}: '
            f"{OUTCOME[self.passed]} ({self.strength}), {self.mutants_killed} of {self.mutants_total} mutants killed."
            f"{found}</span></p>"
        )


def audit(
    check: Callable[[S], Outcome],
    statement: S,
    mutants: Mapping[str, S],
    *,
    method: str,
    text: str,
    domain: str,
    tolerance: str,
    falsifier: str,
    trust: str,
) -> Evidence:
    """Run ``check`` on ``statement``, then on every mutant, which it has to reject.

    Parameters
    ----------
    check
        Maps a statement to an :class:`Outcome`.
    statement, mutants
        The statement, and named variants of it that are false.
    method, text, domain, tolerance, falsifier, trust
        Recorded in the evidence.

    Raises
    ------
    VacuousCheck
        If there is no mutant: a check that was never seen to fail is not evidence.
    """
    if not mutants:
        raise VacuousCheck(
            "no mutant was given: name at least one false variant of the statement for the check to reject"
        )
    start = time.perf_counter()
    outcome = check(statement)
    if outcome.strength not in STRENGTHS:
        raise ValueError(f"strength is {outcome.strength!r}; allowed: {', '.join(STRENGTHS)}")
    trials = [{"name": name, "killed": check(mutant).passed is False} for name, mutant in mutants.items()]
    return Evidence(
        method=method,
        statement=text,
        passed=outcome.passed,
        strength=outcome.strength,
        domain=domain,
        tolerance=tolerance,
        falsifier=falsifier,
        trust=trust,
        mutants=trials,
        counterexample=outcome.counterexample,
        seconds=round(time.perf_counter() - start, 3),
        detail=outcome.detail,
    )
