"""Turn a statement into evidence, and prove that the check could have failed.

Every check takes a *statement* (a SymPy formula where possible, so that what is printed is what is checked), runs, and
then runs again on *mutants*: false variants that it must reject. The result, plain data, is an
:class:`~bdpo.verify.evidence.Evidence`.

- :func:`~bdpo.verify.checks.identity` proves an equation, or refutes it at a rational point.
- :func:`~bdpo.verify.checks.inequality` searches for a counterexample, then proves by signs of coefficients, or by
  rigorous enclosures on a compact box.
- :func:`~bdpo.verify.checks.search` tries any statement on a list of exact worlds; passing is a proof only if the list
  is the whole domain.
- :func:`~bdpo.verify.checks.property_search` lets Hypothesis make the worlds, and shrinks what it finds.
- :func:`~bdpo.verify.checks.gradient` compares a closed form with automatic differentiation.
- :func:`~bdpo.verify.checks.measured_mean` decides on which side of a threshold a mean of independent runs lies,
  :func:`~bdpo.verify.checks.measured_median` the same for a median, without assuming a distribution.
- :func:`~bdpo.verify.checks.proof_lines` judges each line of a proof by itself.

What passes only a search has strength ``search``, which establishes nothing.

This package knows no paper.
"""

from bdpo.verify.checks import (
    describe,
    gradient,
    identity,
    inequality,
    measured_mean,
    measured_median,
    proof_lines,
    property_search,
    search,
)
from bdpo.verify.evidence import Evidence, Outcome, VacuousCheck, audit
from bdpo.verify.formula import NotRational, evaluate, holds, latex, law, mutations, named, text, unfold

__all__ = [
    "Evidence",
    "NotRational",
    "Outcome",
    "VacuousCheck",
    "audit",
    "describe",
    "evaluate",
    "gradient",
    "holds",
    "identity",
    "inequality",
    "latex",
    "law",
    "measured_mean",
    "measured_median",
    "mutations",
    "named",
    "proof_lines",
    "property_search",
    "search",
    "text",
    "unfold",
]
