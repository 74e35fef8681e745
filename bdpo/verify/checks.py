"""The checks: identities, inequalities, searches over exact worlds, gradients, measurements, lines of proofs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import sympy as sp
from flint import arb, ctx, fmpq

from bdpo.verify.evidence import Evidence, Outcome, VacuousCheck, audit
from bdpo.verify.formula import _PRECISION, NotRational, evaluate, holds, mutations, text, unfold

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Relation = Any
Box = Mapping[Any, tuple[Any, Any]]
World = Mapping[Any, Any]

_SYMPY = "SymPy's algebra; exact rationals"
_BALLS = "ball arithmetic of FLINT (rigorous enclosures)"


# ---------------------------------------------------------------- points


def _grid(symbol: sp.Symbol, box: Box) -> list[Fraction]:
    """Simple rationals inside the domain of a symbol: its box if it has one, else what its assumptions allow."""
    if symbol in box:
        low, high = (Fraction(str(b)) for b in box[symbol])
        inside = {low + (high - low) * Fraction(k, d) for d in (2, 3, 4, 5, 7) for k in range(1, d)}
        return sorted(inside, key=lambda q: (q.denominator, q))
    whole = [Fraction(k) for k in (1, 2, 3, 5)]
    if symbol.is_integer:
        return whole
    parts = [Fraction(q) for q in ("1", "1/2", "2", "1/3", "3/4", "5/2", "1/10", "10")]
    return parts if symbol.is_positive else [*parts, Fraction(0), *(-q for q in parts)]


def _points(symbols: Sequence[sp.Symbol], box: Box, limit: int) -> list[dict[Any, Fraction]]:
    """Up to ``limit`` rational points, the simplest first; no two symbols are forced to agree."""
    if not symbols:
        return [{}]
    grids = [_grid(s, box) for s in symbols]
    simplest_first = itertools.chain.from_iterable(
        _ranks([len(g) for g in grids], total) for total in range(sum(len(g) - 1 for g in grids) + 1)
    )
    chosen = itertools.islice(simplest_first, limit)
    return [{s: g[k] for s, g, k in zip(symbols, grids, ks, strict=True)} for ks in chosen]


def _ranks(sizes: Sequence[int], total: int) -> Iterator[tuple[int, ...]]:
    """All tuples of ranks below ``sizes`` that add up to ``total``."""
    if len(sizes) == 1:
        if total < sizes[0]:
            yield (total,)
        return
    for first in range(min(sizes[0] - 1, total) + 1):
        for rest in _ranks(sizes[1:], total - first):
            yield (first, *rest)


def _domain(symbols: Sequence[sp.Symbol], box: Box) -> str:
    def one(s: sp.Symbol) -> str:
        if s in box:
            low, high = (sp.latex(sp.sympify(bound)) for bound in box[s])
            return rf"${sp.latex(s)} \in ({low}, {high})$"
        kind = "integer" if s.is_integer else "positive" if s.is_positive else "real" if s.is_real else "any"
        return f"${sp.latex(s)}$ {kind}"

    return ", ".join(map(one, symbols)) or "no free symbol"


def _symbols(*statements: Any) -> list[sp.Symbol]:
    sides = [
        side for st in statements for side in (st.args if isinstance(st, sp.core.relational.Relational) else (st,))
    ]
    found = {s for side in sides for s in unfold(side).free_symbols if isinstance(s, sp.Symbol)}
    return sorted(found - {b.label for b in _bases(*statements)}, key=str)


def _bases(*statements: Any) -> list[sp.IndexedBase]:
    return sorted({e.base for st in statements for e in unfold(st).atoms(sp.Indexed)}, key=str)


_ENTRIES = [Fraction(q) for q in ("1/2", "2", "1/3", "3", "3/4", "5/2", "1/5", "4")]


def _worlds(statements: Sequence[Any], box: Box, limit: int) -> list[dict[Any, Any]]:
    """Rational points for the symbols; an indexed variable gets a list of different entries, another at each point."""
    points: list[dict[Any, Any]] = list(_points(_symbols(*statements), box, limit))
    for turn, point in enumerate(points):
        for shift, base in enumerate(_bases(*statements), turn):
            point[base] = [_ENTRIES[(k + shift) % len(_ENTRIES)] for k in range(len(_ENTRIES))]
    return points


def describe(world: World) -> dict[str, str]:
    """A world as text, fractions written out."""

    def written(v: Any) -> str:
        return "(" + ", ".join(written(x) for x in v) + ")" if isinstance(v, (list, tuple)) else str(v)

    return {(str(k.label) if isinstance(k, sp.IndexedBase) else str(k)): written(v) for k, v in world.items()}


# ---------------------------------------------------------------- identities


def _one_sum(e: Any) -> Any:
    r"""Sums over the same range as one, its summand simplified: :math:`\sum a + c\sum b = \sum(a + cb)`."""
    rest: Any = sp.S.Zero
    summands: dict[Any, Any] = {}
    for term in sp.Add.make_args(sp.expand_mul(e)):
        sums = [factor for factor in sp.Mul.make_args(term) if isinstance(factor, sp.Sum)]
        factor = term / sums[0] if len(sums) == 1 else None
        if factor is None or factor.free_symbols & {limits[0] for limits in sums[0].limits}:
            rest += term
        else:
            summands[sums[0].limits] = summands.get(sums[0].limits, 0) + factor * sums[0].function
    return rest + sum(sp.Sum(sp.cancel(sp.together(a)), *limits).doit() for limits, a in summands.items())


def _zero(d: Any) -> str | None:
    """Name of the first transformation that turns ``d`` into 0, or None."""
    attempts: dict[str, Callable[[Any], Any]] = {
        "expand": sp.expand,
        "one sum instead of several": _one_sum,
        "cancel": lambda e: sp.cancel(sp.together(e)),
        "expand logarithms, cancel": lambda e: sp.cancel(sp.together(sp.expand_log(sp.powsimp(e)))),
        "simplify": sp.simplify,
        "simplify after expanding logarithms": lambda e: sp.simplify(sp.expand_log(sp.logcombine(e))),
        "rewrite in exponentials": lambda e: sp.simplify(e.rewrite(sp.exp)),
    }
    return next((name for name, f in attempts.items() if f(d) == 0), None)


def _equal(box: Box, where: Sequence[Any], points: int) -> Callable[[sp.Eq], Outcome]:
    def check(statement: sp.Eq) -> Outcome:
        difference = unfold(statement.lhs) - unfold(statement.rhs)
        relation = sp.Eq(difference, 0, evaluate=False)
        for point in _worlds([difference, *where], box, points):
            if all(holds(c, point) for c in where) and holds(relation, point) is False:
                return Outcome(False, "proof", describe(point), "the two sides differ at a rational point")
        if how := _zero(difference):
            return Outcome(True, "proof", detail=f"the difference of the sides becomes 0 by: {how}")
        return Outcome(None, "search", detail="no point tells the sides apart, but SymPy does not prove them equal")

    return check


def _must_be_equation(part: Any, what: str) -> None:
    if part in (sp.true, sp.false):
        raise VacuousCheck(
            f"SymPy decided the {what} ({part}) while it was built: name a part of it with verify.named, or give "
            "sympy.Eq(left, right, evaluate=False)"
        )
    if not isinstance(part, sp.Eq):
        raise TypeError(f"the {what} {part!r} is not an equation; give sympy.Eq(left, right)")
    if part.lhs == part.rhs:
        raise VacuousCheck(f"both sides of {part} are the same expression: nothing could fail")


def identity(
    statement: sp.Eq | Sequence[sp.Eq],
    *,
    mutants: Mapping[str, sp.Eq] | None = None,
    box: Box | None = None,
    where: Sequence[Any] = (),
    points: int = 60,
) -> Evidence:
    r"""Prove or refute :math:`f = g` for all values of the symbols, exactly.

    A rational point at which the sides differ refutes it (rationally, or by enclosures that exclude 0); SymPy's
    transformations of :math:`f - g` to 0 prove it. Neither: undecided.

    Parameters
    ----------
    statement
        An equation, or several that must all hold.
    mutants
        False variants by name; by default the neighbours of :func:`bdpo.verify.formula.mutations`.
    box
        Open intervals of symbols whose assumptions alone do not give the domain, such as ``{p: (0, 1)}``.
    where
        Relations between symbols that the points must meet, such as ``i <= n`` for an index.
    points
        How many rational points are tried, the simplest first.

    Raises
    ------
    VacuousCheck
        If both sides are the same expression, or both are 0, before anything is carried out.
    """
    parts = list(statement) if isinstance(statement, (list, tuple)) else [statement]
    for part in parts:
        _must_be_equation(part, "statement")
    box = dict(box or {})
    if mutants is None:
        many = len(parts) > 1
        mutants = {
            f"{name} (line {k})" if many else name: m
            for k, part in enumerate(parts, 1)
            for name, m in mutations(part).items()
        }
    variants = {k: list(m) if isinstance(m, (list, tuple)) else [m] for k, m in mutants.items()}
    for name, equations in variants.items():
        for equation in equations:
            _must_be_equation(equation, f"mutant {name!r}")
    run = _equal(box, where, points)

    def check(equations: list[sp.Eq]) -> Outcome:
        return min(map(run, equations), key=lambda outcome: (False, None, True).index(outcome.passed))

    symbols = _symbols(*parts)
    return audit(
        check,
        parts,
        variants,
        method="symbolic identity",
        text=text(parts if len(parts) > 1 else parts[0]),
        domain=_domain([*symbols, *(b.label for b in _bases(*parts))], box)
        + "".join(rf", \({sp.latex(c)}\)" for c in where),
        tolerance="exact",
        falsifier="a point of the domain at which the two sides differ",
        trust=_SYMPY,
    )


# ---------------------------------------------------------------- inequalities


def _sign_proof(relation: Any) -> str | None:
    """A proof by inspection: over a common denominator all coefficients have one sign and all symbols are positive."""
    d = sp.together(unfold(relation.lhs) - unfold(relation.rhs))
    if isinstance(relation, (sp.StrictLessThan, sp.LessThan)):
        d = -d
    strict = isinstance(relation, (sp.StrictGreaterThan, sp.StrictLessThan))
    numerator, denominator = sp.fraction(sp.cancel(d))
    if not all(s.is_positive for s in numerator.free_symbols | denominator.free_symbols):
        return None
    signs = []
    for part in (numerator, denominator):
        terms = sp.Add.make_args(sp.expand(part))
        kinds = {t.is_positive for t in terms} if part != 0 else set()
        if kinds == {True}:
            signs.append(1)
        elif {t.is_negative for t in terms} == {True}:
            signs.append(-1)
        elif part == 0 and not strict:
            return "both sides are equal"
        else:
            return None
    return (
        "over a common denominator all coefficients have one sign and all symbols are positive"
        if signs[0] == signs[1]
        else None
    )


def _enclose(difference: Any, box: Mapping[Any, tuple[Fraction, Fraction]]) -> arb:
    env = {}
    for s, (low, high) in box.items():
        mid, rad = (low + high) / 2, (high - low) / 2
        env[s] = arb(fmpq(mid.numerator, mid.denominator), fmpq(rad.numerator, rad.denominator))
    return evaluate(difference, env, exact=False)


def _certificate(relation: Any, box: Box, boxes: int) -> Outcome:
    """Branch and bound with enclosures on a closed box."""
    difference = unfold(relation.lhs) - unfold(relation.rhs)
    if isinstance(relation, (sp.StrictLessThan, sp.LessThan)):
        difference = -difference
    strict = isinstance(relation, (sp.StrictGreaterThan, sp.StrictLessThan))
    todo = [{s: (Fraction(str(a)), Fraction(str(b))) for s, (a, b) in box.items()}]
    done, before, ctx.prec = 0, ctx.prec, _PRECISION
    try:
        while todo:
            if done + len(todo) > boxes:
                return Outcome(None, "search", detail=f"undecided after {done} boxes")
            current = todo.pop()
            value = _enclose(difference, current)
            if value.is_finite() and (value > 0 or (not strict and value >= 0)):
                done += 1
                continue
            middle = {s: (a + b) / 2 for s, (a, b) in current.items()}
            if holds(relation, middle) is False:
                return Outcome(False, "proof", describe(middle), "found while bounding")
            widest = max(current, key=lambda s: current[s][1] - current[s][0])
            a, b = current[widest]
            todo += [{**current, widest: (a, (a + b) / 2)}, {**current, widest: ((a + b) / 2, b)}]
        return Outcome(True, "proof", detail=f"{done} boxes cover the domain, each enclosure has the right sign")
    finally:
        ctx.prec = before


def _shrink(relation: Any, point: dict[Any, Fraction], box: Mapping[Any, Any]) -> dict[Any, Fraction]:
    """Replace coordinates by simpler ones while the relation stays false."""
    for symbol in point:
        for simpler in sorted(_grid(symbol, box), key=lambda q: (q.denominator + abs(q.numerator), q)):
            if simpler.denominator + abs(simpler.numerator) >= point[symbol].denominator + abs(point[symbol].numerator):
                break
            if holds(relation, {**point, symbol: simpler}) is False:
                point = {**point, symbol: simpler}
                break
    return point


def inequality(
    statement: Relation,
    *,
    mutants: Mapping[str, Relation],
    box: Box | None = None,
    certify: bool = False,
    points: int = 2000,
    boxes: int = 20_000,
) -> Evidence:
    """Prove or refute an inequality.

    First a search for a rational counterexample (minimised); then a proof by signs of coefficients; then, with
    ``certify``, a rigorous interval certificate on the closed ``box``. What passes the search alone has strength
    ``search``, which establishes nothing.

    Parameters
    ----------
    statement
        A SymPy relation with ``<``, ``<=``, ``>`` or ``>=``.
    mutants
        False variants by name.
    box
        Intervals of symbols, for points and for the certificate.
    certify
        Ask for an interval certificate; every symbol then needs a bounded interval.
    """
    inequalities = (sp.StrictGreaterThan, sp.GreaterThan, sp.StrictLessThan, sp.LessThan)
    if not isinstance(statement, inequalities):
        if statement in (sp.true, sp.false):
            raise VacuousCheck(f"the inequality is already {statement} without any check")
        raise TypeError(f"{statement!r} is not an inequality; give one of <, <=, >, >= between SymPy expressions")
    box = dict(box or {})
    symbols = _symbols(statement)
    if not symbols:
        raise VacuousCheck(f"{statement} has no free symbol: nothing is searched")
    if certify and (missing := [s for s in symbols if s not in box]):
        raise ValueError(f"no interval for {missing}; a certificate needs a bounded interval for each symbol")

    def check(relation: Any) -> Outcome:
        for point in _points(_symbols(relation), box, points):
            if holds(relation, point) is False:
                return Outcome(
                    False, "proof", describe(_shrink(relation, point, box)), "found by exact rational search"
                )
        if how := _sign_proof(relation):
            return Outcome(True, "proof", detail=how)
        if certify:
            return _certificate(relation, box, boxes)
        return Outcome(True, "search", detail=f"no counterexample among {points} simplest rational points")

    return audit(
        check,
        statement,
        mutants,
        method="inequality",
        text=text(statement),
        domain=_domain(symbols, box),
        tolerance="exact",
        falsifier="a point of the domain at which the inequality is false",
        trust=f"{_SYMPY}; {_BALLS}" if certify else _SYMPY,
    )


# ---------------------------------------------------------------- worlds


def _decide(statement: Any, world: World) -> bool | None:
    return statement(world) if callable(statement) and not isinstance(statement, sp.Basic) else holds(statement, world)


def search(
    statement: Relation | Callable[[World], bool | None],
    worlds: Iterable[World],
    *,
    mutants: Mapping[str, Any],
    domain: str,
    exhaustive: bool = False,
) -> Evidence:
    """Look for a counterexample among exact worlds, in the order given (put the smallest first).

    Parameters
    ----------
    statement
        A relation (or list of relations) evaluated exactly at each world, or a :class:`bdpo.verify.formula.law`, which
        may answer None where the hypotheses are not met.
    worlds
        Mappings from symbols (or ``IndexedBase``) to fractions (or sequences of them). Read once.
    mutants
        False variants by name, tried on the same worlds.
    domain
        The family of worlds in words.
    exhaustive
        Whether the worlds are *all* of a finite domain; then passing establishes the statement there.

    Raises
    ------
    VacuousCheck
        If there is no world, none meets the hypotheses, all numbers of all worlds are zero, or all worlds are identical
        copies of one.
    """
    pool = list(worlds)
    if not pool:
        raise VacuousCheck("no world was given: the search cannot fail")
    if len(pool) > 1 and all(w == pool[0] for w in pool[1:]):
        raise VacuousCheck("all worlds are identical: the search cannot tell a law from an accident")
    if all(_all_zero(v) for w in pool for v in w.values()):
        raise VacuousCheck("every number of every world is zero: nothing could fail")
    strength = "exhaustive" if exhaustive else "search"

    def check(candidate: Any) -> Outcome:
        met = undecided = 0
        for world in pool:
            answer = _decide(candidate, world)
            if answer is False:
                return Outcome(False, "proof", describe(world), f"world number {met + 1} of {len(pool)} that was tried")
            met += answer is True
            undecided += answer is None
        return Outcome(True if met else None, strength, detail=f"{met} worlds met the hypotheses, {undecided} did not")

    evidence = audit(
        check,
        statement,
        mutants,
        method="exhaustive search" if exhaustive else "exact search",
        text=text(statement),
        domain=domain,
        tolerance="exact",
        falsifier="a world of the domain in which the statement is false",
        trust="Python's fractions",
    )
    if evidence.passed is None:
        raise VacuousCheck(f"no world of {len(pool)} meets the hypotheses (or balls decide none): {evidence.detail}")
    return evidence


def _all_zero(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_all_zero(v) for v in value)
    return value == 0


def property_search(
    statement: Any,
    worlds: SearchStrategy[Any],
    *,
    mutants: Mapping[str, Any],
    domain: str,
    examples: int = 500,
) -> Evidence:
    """Look for a counterexample with Hypothesis, which shrinks what it finds; deterministic.

    Passing has strength ``search``: it establishes nothing by itself.
    """
    from hypothesis import HealthCheck, Phase, find, settings
    from hypothesis.errors import NoSuchExample

    if examples < 1:
        raise ValueError(f"examples is {examples}; allowed: 1 or more")
    options = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )

    def check(candidate: Any) -> Outcome:
        met = 0

        def wrong(world: World) -> bool:
            nonlocal met
            answer = _decide(candidate, world)
            met += answer is not None
            return answer is False

        try:
            found = find(worlds, wrong, settings=options)
        except NoSuchExample:
            return Outcome(True if met else None, "search", detail=f"{met} generated worlds met the hypotheses")
        return Outcome(False, "proof", describe(found), "found and shrunk by Hypothesis")

    evidence = audit(
        check,
        statement,
        mutants,
        method="property search",
        text=text(statement),
        domain=domain,
        tolerance="exact",
        falsifier="a generated world in which the statement is false",
        trust="Python's fractions; Hypothesis generates the worlds",
    )
    if evidence.passed is None:
        raise VacuousCheck("no generated world meets the hypotheses")
    return evidence


# ---------------------------------------------------------------- gradients


def gradient(
    function: Callable[..., Any],
    closed_form: Callable[..., Sequence[Any]],
    points: Sequence[Sequence[float]],
    *,
    mutants: Mapping[str, Callable[..., Sequence[Any]]],
    words: str,
    domain: str,
    rtol: float = 1e-10,
) -> Evidence:
    """Compare automatic differentiation with a closed form, in float64.

    Parameters
    ----------
    function
        Maps scalar float64 tensors to a scalar tensor.
    closed_form
        Maps floats to the list of partial derivatives.
    points
        Argument lists; at least two different ones, and not all derivatives zero.
    mutants
        Wrong closed forms by name.
    words
        What is compared, with ``$...$``.
    rtol
        Largest relative difference allowed for each partial derivative.
    """
    import torch

    if not points or all(list(p) == list(points[0]) for p in points[1:]):
        raise VacuousCheck("give at least two different points")

    def automatic(point: Sequence[float]) -> list[float]:
        arguments = [torch.tensor(float(x), dtype=torch.float64, requires_grad=True) for x in point]
        return [float(g) for g in torch.autograd.grad(function(*arguments), arguments)]

    reference = [automatic(p) for p in points]
    if not any(g for gs in reference for g in gs):
        raise VacuousCheck("every derivative at every point is zero: nothing could fail")

    def check(candidate: Callable[..., Sequence[Any]]) -> Outcome:
        worst = 0.0
        for point, expected in zip(points, reference, strict=True):
            got = [float(g) for g in candidate(*point)]
            if len(got) != len(expected):
                raise ValueError(f"the closed form has {len(got)} derivatives, the function {len(expected)} arguments")
            for g, e in zip(got, expected, strict=True):
                error = abs(g - e) / max(abs(g), abs(e), 1e-300)
                worst = max(worst, error)
                if not error <= rtol:
                    where = {f"x{k}": repr(float(x)) for k, x in enumerate(point, 1)}
                    return Outcome(False, "search", where, f"{g!r} against {e!r}")
        return Outcome(True, "search", detail=f"largest relative difference {worst:.1e} at {len(points)} points")

    return audit(
        check,
        closed_form,
        mutants,
        method="automatic differentiation",
        text=words,
        domain=domain,
        tolerance=f"{rtol:g} relative",
        falsifier="a point at which the two gradients differ by more than the tolerance",
        trust="float64; torch.autograd",
    )


# ---------------------------------------------------------------- measurements


def measured_mean(
    values: Sequence[float],
    relation: str,
    threshold: float,
    *,
    words: str,
    domain: str,
    level: float = 0.95,
) -> Evidence:
    """Decide on which side of a threshold (``<`` or ``>``) a mean lies, by Student's interval over independent runs.

    Passed if the whole interval lies on the claimed side, failed if it lies on the other, undecided otherwise. Mutants,
    all false where the data decide: the other side, the data reflected at the threshold, a threshold beyond all data.
    """
    from scipy import stats

    data = _finite(values)
    if len(data) < 3:
        raise VacuousCheck(f"{len(data)} values; an interval needs at least 3 independent runs")
    if len(set(data)) == 1:
        raise VacuousCheck("all values are identical: there is no spread to measure")

    def interval(sample: list[float]) -> tuple[float, float, float]:
        mean = sum(sample) / len(sample)
        half = float(stats.t.ppf((1 + level) / 2, len(sample) - 1) * stats.sem(sample))
        return mean - half, mean, mean + half

    return _measured("mean", interval, "Student", data, relation, threshold, words, domain, level)


def measured_median(
    values: Sequence[float],
    relation: str,
    threshold: float,
    *,
    words: str,
    domain: str,
    level: float = 0.95,
) -> Evidence:
    """Decide on which side of a threshold (``<`` or ``>``) a median lies, by order statistics of independent runs.

    The interval reaches from the k-th smallest to the k-th largest value, with the largest k whose sign test keeps the
    level: no assumption about the distribution, and values may be alike. Passed, failed, undecided and mutants as in
    `measured_mean`. Needs 6 values at a level of 95 %.
    """
    from scipy import stats

    data = _finite(values)
    k = sum(bool(stats.binom.cdf(j, len(data), 0.5) <= (1 - level) / 2) for j in range(len(data) // 2))
    if not k:
        raise VacuousCheck(f"{len(data)} values; a {level:.0%} interval of the median needs more independent runs")

    def interval(sample: list[float]) -> tuple[float, float, float]:
        ordered = sorted(sample)
        return ordered[k - 1], (ordered[(len(data) - 1) // 2] + ordered[len(data) // 2]) / 2, ordered[-k]

    return _measured("median", interval, "order-statistics", data, relation, threshold, words, domain, level)


def _finite(values: Sequence[float]) -> list[float]:
    data = [float(v) for v in values]
    if any(v != v or abs(v) == float("inf") for v in data):
        raise ValueError("a value is not finite: report a diverged run as such, not inside a mean or median")
    return data


def _measured(
    what: str,
    interval: Callable[[list[float]], tuple[float, float, float]],
    kind: str,
    data: list[float],
    relation: str,
    threshold: float,
    words: str,
    domain: str,
    level: float,
) -> Evidence:
    """Evidence from an interval (low, middle, high) of independent runs and a threshold."""
    if relation not in ("<", ">"):
        raise ValueError(f"relation is {relation!r}; allowed: '<' or '>'")

    def check(claim: tuple[list[float], str, float]) -> Outcome:
        sample, side, bound = claim
        low, middle, high = interval(sample)
        below, above = high < bound, low > bound
        detail = f"{what} {middle:.4g}, {level:.0%} interval [{low:.4g}, {high:.4g}], n = {len(sample)}"
        if side == ">":
            below, above = above, below
        return Outcome(True if below else False if above else None, "measurement", detail=detail)

    statement, spread = (data, relation, threshold), max(data) - min(data) or 1.0
    opposite = ">" if relation == "<" else "<"
    side, other = (opposite, relation) if check(statement).passed is False else (relation, opposite)
    mutants = {
        "the other side": (data, other, threshold),
        "data reflected at the threshold": ([2 * threshold - v for v in data], side, threshold),
        "threshold beyond all data": (data, side, min(data) - spread if side == "<" else max(data) + spread),
    }
    return audit(
        check,
        statement,
        mutants,
        method=f"measured {what}",
        text=words,
        domain=domain,
        tolerance=f"{level:.0%} {kind} interval",
        falsifier=f"an interval of the {what} on the other side of the threshold",
        trust="independent runs; float arithmetic",
    )


# ---------------------------------------------------------------- proofs, line by line


def proof_lines(
    lines: Mapping[str, Relation],
    *,
    worlds: Iterable[World] | None = None,
    domain: str = "",
    mutants: Mapping[str, Mapping[str, Relation]] | None = None,
) -> dict[str, Evidence]:
    """Judge each line of a proof by itself.

    An equation without ``worlds`` goes through :func:`identity`, an inequality through :func:`inequality`, and with
    ``worlds`` every line through :func:`search`. A line that fails does not stop the next ones.

    Parameters
    ----------
    lines
        Relation by name (an equation number, say), in the order of the proof.
    mutants
        For each line its false variants; equations without worlds may leave them out.
    """
    mutants = mutants or {}
    pool = None if worlds is None else list(worlds)
    judged = {}
    for name, line in lines.items():
        if pool is not None:
            judged[name] = search(line, pool, mutants=mutants.get(name, {}), domain=domain)
        elif isinstance(line, sp.Eq):
            judged[name] = identity(line, mutants=mutants.get(name))
        else:
            judged[name] = inequality(line, mutants=mutants.get(name, {}))
    return judged


__all__ = [
    "NotRational",
    "gradient",
    "identity",
    "inequality",
    "measured_mean",
    "measured_median",
    "proof_lines",
    "property_search",
    "search",
]
