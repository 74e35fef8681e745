"""Formulas that print as mathematics and evaluate exactly: one object for the page and for the check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy as sp
from flint import arb, ctx, fmpq
from sympy.core.symbol import Str

Env = Mapping[Any, Any]


class NotRational(ValueError):
    """The value is not a rational number, so exact fractions cannot hold it."""


class Named(sp.Expr):
    """A displayed name bound to the expression it stands for."""

    def __new__(cls, name: Any, meaning: Any) -> Named:
        return super().__new__(cls, name if isinstance(name, Str) else Str(name), sp.sympify(meaning))

    @property
    def meaning(self) -> sp.Expr:
        return self.args[1]

    @property
    def free_symbols(self) -> set[Any]:
        return self.meaning.free_symbols

    def _latex(self, printer: Any) -> str:
        return self.args[0].name

    def _sympystr(self, printer: Any) -> str:
        return self.args[0].name

    def _eval_is_commutative(self) -> bool:
        return True


def named(name: str, meaning: Any) -> Named:
    r"""Bind the LaTeX ``name`` to ``meaning``: it prints as the name and is checked as the meaning.

    Examples
    --------
    >>> import sympy as sp
    >>> x = sp.Symbol("x")
    >>> slope = named(r"f'(x)", sp.Derivative(x**2, x))
    >>> latex(sp.Eq(slope, 2 * x))
    "f'(x) = 2 x"
    """
    if not name.strip():
        raise ValueError("name is empty; give the LaTeX that the reader shall see")
    return Named(name, meaning)


@lru_cache(maxsize=1024)  # sums with a symbolic bound take SymPy a while
def unfold(expr: Any) -> Any:
    """Replace every name by what it stands for, and carry out derivatives, integrals and finite sums."""
    while names := expr.atoms(Named):
        expr = expr.xreplace({name: name.meaning for name in names})
    return expr.doit()


def latex(formula: Any) -> str:
    """LaTeX of a formula, or of a list of formulas, one below the other."""
    if isinstance(formula, (list, tuple)):
        lines = [latex(f) for f in formula]
        return lines[0] if len(lines) == 1 else r"\begin{gathered} " + r" \\ ".join(lines) + r" \end{gathered}"
    if isinstance(formula, sp.Basic):
        return sp.latex(formula)
    raise TypeError(f"{formula!r} is not a SymPy formula and has no LaTeX")


def text(statement: Any) -> str:
    """What a statement says, as words with ``$...$``: a formula prints itself, a :class:`law` carries its words."""
    if isinstance(statement, law):
        return statement.words
    if callable(statement) and not isinstance(statement, sp.Basic):
        raise TypeError(f"{statement!r} cannot say what it decides: wrap it with verify.law(words, function)")
    return f"${latex(statement)}$"


class law:
    r"""A statement that no SymPy formula holds: words (with ``$...$``) and the function of a world that decides it.

    ``function(world)`` returns True or False, or None where the hypotheses of the statement are not met.
    Prefer a SymPy formula: there the page and the check cannot drift apart.
    """

    def __init__(self, words: str, function: Callable[[Any], bool | None]):
        self.words, self.function = words, function

    def __call__(self, world: Any) -> bool | None:
        return self.function(world)


def _exact(value: Any) -> Fraction:
    if isinstance(value, fmpq):
        return Fraction(int(value.p), int(value.q))
    if isinstance(value, (sp.Rational, sp.Integer)):
        return Fraction(int(value.p), int(value.q))
    return Fraction(value)


def _ball(value: Any) -> arb:
    if isinstance(value, arb):
        return value
    value = _exact(value)
    return arb(fmpq(value.numerator, value.denominator))


_BALL_FUNCTIONS: dict[Any, Callable[[arb], arb]] = {
    sp.exp: arb.exp,
    sp.log: arb.log,
    sp.tanh: arb.tanh,
    sp.sinh: arb.sinh,
    sp.cosh: arb.cosh,
    sp.erf: arb.erf,
    sp.gamma: arb.gamma,
    sp.Abs: abs,
    sp.sin: arb.sin,
    sp.cos: arb.cos,
}
_EXTREMES = {sp.Max: max, sp.Min: min}


def evaluate(expr: Any, env: Env, *, exact: bool = True) -> Any:
    """Value of ``expr`` at ``env``: a ``Fraction`` if ``exact``, otherwise a ball (``flint.arb``) that contains it.

    ``env`` maps symbols to numbers, and ``IndexedBase`` objects to sequences whose first entry has index 1
    (nested sequences for two indices). Sums over an index are carried out.

    Raises
    ------
    NotRational
        If ``exact`` and the expression leaves the rational numbers.
    KeyError
        If a symbol has no value in ``env``.
    """
    scope = {(str(k.label) if isinstance(k, sp.IndexedBase) else k): v for k, v in env.items()}
    return _evaluate(unfold(sp.sympify(expr)), scope, _exact if exact else _ball, exact)


def _evaluate(e: Any, env: dict[Any, Any], number: Callable[[Any], Any], exact: bool) -> Any:
    def rec(x: Any) -> Any:
        return _evaluate(x, env, number, exact)

    if isinstance(e, sp.Rational):
        return number(e)
    if isinstance(e, sp.Symbol):
        if e not in env:
            raise KeyError(f"no value for {e} in {sorted(map(str, env))}")
        return number(env[e])
    if isinstance(e, sp.Indexed):
        value = env[str(e.base.label)]
        for index in e.indices:
            value = value[int(_exact_int(index, env)) - 1]
        return number(value)
    if isinstance(e, sp.Add):
        return sum((rec(a) for a in e.args[1:]), rec(e.args[0]))
    if isinstance(e, sp.Mul):
        out = rec(e.args[0])
        for a in e.args[1:]:
            out = out * rec(a)
        return out
    if isinstance(e, sp.Pow):
        base, power = rec(e.base), e.exp
        if power.is_Integer:
            return base ** int(power)
        if exact:
            raise NotRational(f"{e} is not rational")
        return base.sqrt() if power == sp.Rational(1, 2) else base ** rec(power)
    if isinstance(e, sp.Sum):
        return _sum(e, env, number, exact)
    if isinstance(e, sp.KroneckerDelta):
        return number(int(_exact_int(e.args[0], env) == _exact_int(e.args[1], env)))
    if isinstance(e, sp.Piecewise):
        for value, condition in e.args:
            if condition == sp.true or holds(condition, env, exact=exact):
                return rec(value)
        raise ValueError(f"no branch of {e} applies")
    if type(e) in _EXTREMES:
        return _EXTREMES[type(e)](rec(a) for a in e.args)
    if isinstance(e, sp.Abs):
        return abs(rec(e.args[0]))
    if exact:
        raise NotRational(f"{e} is not rational")
    if e is sp.pi:
        return arb.pi()
    if e is sp.E:
        return arb(1).exp()
    if type(e) in _BALL_FUNCTIONS:
        return _BALL_FUNCTIONS[type(e)](rec(e.args[0]))
    raise TypeError(f"cannot evaluate {type(e).__name__} in {e}")


def _exact_int(e: Any, env: dict[Any, Any]) -> int:
    value = _evaluate(sp.sympify(e), env, _exact, True)
    if value.denominator != 1:
        raise ValueError(f"the index {e} has the value {value}, not a whole number")
    return value.numerator


def _sum(e: sp.Sum, env: dict[Any, Any], number: Callable[[Any], Any], exact: bool) -> Any:
    (index, low, high), *rest = e.limits[::-1]
    inner = sp.Sum(e.function, *rest[::-1]) if rest else e.function
    terms = range(_exact_int(low, env), _exact_int(high, env) + 1)
    return sum((_evaluate(inner, {**env, index: k}, number, exact) for k in terms), number(0))


_PRECISION = 200  # bits; balls are rigorous at any precision, more bits only decide more cases


def holds(relation: Any, env: Env, *, exact: bool = True) -> bool | None:
    """Whether a relation (or each of a list) is true at ``env``; ``None`` where balls cannot tell."""
    if relation in (sp.true, True):
        return True
    if relation in (sp.false, False):
        return False
    if isinstance(relation, (list, tuple)):
        answers = [holds(r, env, exact=exact) for r in relation]
        return False if False in answers else None if None in answers else True
    if isinstance(relation, (sp.And, sp.Or)):
        answers = [holds(r, env, exact=exact) for r in relation.args]
        decisive = isinstance(relation, sp.Or)
        return decisive if decisive in answers else None if None in answers else not decisive
    if exact:
        try:
            difference = evaluate(relation.lhs, env) - evaluate(relation.rhs, env)
            return bool(relation.func(sp.Rational(difference.numerator, difference.denominator), 0))
        except NotRational:
            return holds(relation, env, exact=False)
    before, ctx.prec = ctx.prec, _PRECISION
    try:
        difference = evaluate(relation.lhs, env, exact=False) - evaluate(relation.rhs, env, exact=False)
    finally:
        ctx.prec = before
    if not difference.is_finite():
        return None
    if isinstance(relation, sp.Eq):
        return False if not difference.contains(0) else None
    if isinstance(relation, sp.Ne):
        return True if not difference.contains(0) else None
    positive = isinstance(relation, (sp.StrictGreaterThan, sp.GreaterThan))
    signed = difference if positive else -difference
    if signed > 0:
        return True
    if signed < 0:
        return False
    return None


def mutations(formula: sp.Eq) -> dict[str, sp.Eq]:
    """False neighbours of an equation: sign flipped, each addend or factor of the right side dropped, halved.

    A neighbour that still *is* the same equation (its right side differs by an expression that expands to zero) is not
    a mutant and is left out.
    """
    left, right = formula.lhs, formula.rhs
    found = {"right side with the other sign": -right, "right side doubled": 2 * right}
    parts = sp.Add.make_args(right)
    if len(parts) > 1:
        found |= {f"without the term {sp.sstr(p)}": right - p for p in parts}
    factors = [f for f in sp.Mul.make_args(right) if not f.is_number]
    if len(factors) > 1:
        found |= {f"without the factor {sp.sstr(f)}": right / f for f in factors}
    return {name: sp.Eq(left, r, evaluate=False) for name, r in found.items() if sp.expand(unfold(r - right)) != 0}
