"""Turn a statement into evidence, and prove that the check could have failed.

Every check takes a *statement* (a SymPy formula where possible, so that what is printed is what is checked), runs, and
then runs again on *mutants*: false variants that it must reject. The result is an :class:`Evidence`, plain data.

=====================  =====================================================================  ==================
check                  decides                                                                strength if passed
=====================  =====================================================================  ==================
:func:`identity`       an equation, symbolically; refutes at a rational point                 proof
:func:`inequality`     an inequality: exact search, signs of coefficients, ball certificate   proof or search
:func:`search`         any statement on a list of exact worlds                                exhaustive or search
:func:`property_search`  any statement on worlds that Hypothesis makes                        search
:func:`gradient`       a closed-form gradient against automatic differentiation               search
:func:`measured_mean`  which side of a threshold a mean of independent runs lies on           measurement
:func:`proof_lines`    each line of a proof by itself                                         as above
=====================  =====================================================================  ==================

This package knows no paper.
"""

from bdpo.verify.checks import (
    describe,
    gradient,
    identity,
    inequality,
    measured_mean,
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
    "mutations",
    "named",
    "proof_lines",
    "property_search",
    "search",
    "text",
    "unfold",
]
