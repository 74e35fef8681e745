"""The checkers themselves: each accepts what is true, rejects what is false, and refuses what cannot fail."""

from fractions import Fraction
from math import comb

import pytest
import sympy as sp
from hypothesis import strategies as st

from bdpo import verify as v

x, y = sp.symbols("x y", positive=True)
t = sp.Symbol("t", real=True)
half = sp.Rational(1, 2)


# ---------------------------------------------------------------- identity


@pytest.mark.parametrize(
    "statement",
    [
        sp.Eq((x + y) ** 2, x**2 + 2 * x * y + y**2),
        sp.Eq(v.named("D", sp.Derivative(sp.log(x / y), x)), 1 / x),
        sp.Eq(1 / (1 + sp.exp(-t)), sp.exp(t) / (1 + sp.exp(t)), evaluate=False),
        sp.Eq(sp.log(x * y), sp.log(x) + sp.log(y), evaluate=False),
        sp.Eq(sp.tanh(t / 2), 2 / (1 + sp.exp(-t)) - 1),
    ],
)
def test_identity_proves_and_kills_all_default_mutants(statement):
    evidence = v.identity(statement)
    assert evidence.passed is True
    assert evidence.strength == "proof"
    assert evidence.mutants_total >= 2
    assert evidence.mutants_killed == evidence.mutants_total
    assert evidence.sound


def test_identity_refutes_at_an_exact_point():
    statement = sp.Eq(sp.log(x + y), sp.log(x) + sp.log(y))
    evidence = v.identity(statement, mutants={"sum to product": sp.Eq(sp.log(x + y), sp.log(x) * sp.log(y))})
    assert evidence.passed is False
    point = {sp.Symbol(k, positive=True): Fraction(q) for k, q in evidence.counterexample.items()}
    assert v.holds(statement, point) is False


def test_identity_of_indexed_sums_covers_every_n():
    n, i, k = (sp.Symbol(name, integer=True, positive=True) for name in "nik")
    a = sp.IndexedBase("a", real=True)
    total = sp.Sum(a[k], (k, 1, n))
    evidence = v.identity(
        sp.Eq(v.named("m", a[i] - total), a[i] * (1 - total / a[i])),
        where=[i <= n],
        mutants={"twice": sp.Eq(a[i] - total, a[i] - 2 * total)},
    )
    assert (evidence.passed, evidence.strength) == (True, "proof")


def test_identity_adds_up_sums_over_one_range():
    n, k = (sp.Symbol(name, integer=True, positive=True) for name in "nk")
    a, b = sp.IndexedBase("a", positive=True), sp.IndexedBase("b", positive=True)

    def total(summand):
        return sp.Sum(summand, (k, 1, n))

    left = total(a[k] / (a[k] + b[k])) + x * total(b[k] / (a[k] + b[k]))
    right = total((a[k] + x * b[k]) / (a[k] + b[k]))
    assert v.identity(sp.Eq(left, right), points=5, mutants={"twice": sp.Eq(left, 2 * right)}).passed is True
    captured = sp.Eq(a[k] * total(b[k]), total(a[k] * b[k]))  # the k outside is another than the k inside
    evidence = v.identity(captured, points=0, mutants={"itself": captured})
    assert evidence.passed is None


def test_where_excludes_points_outside_the_domain():
    statement, wrong = sp.Eq(x, y), {"three times": sp.Eq(x, 3 * y)}
    assert v.identity(statement, mutants=wrong).passed is False
    assert v.identity(statement, mutants=wrong, where=[sp.Eq(x, y)]).passed is None  # no point left, and no proof


def test_a_mutant_that_sympy_decides_by_itself_is_refused():
    with pytest.raises(v.VacuousCheck, match="mutant 'half'"):
        v.identity(sp.Eq((x + 1) ** 2, x**2 + 2 * x + 1), mutants={"half": sp.Eq(sp.Integer(1), half)})


@pytest.mark.parametrize("statement", [sp.Eq(x, x, evaluate=False), sp.Eq(sp.Integer(0), 0, evaluate=False), sp.true])
def test_identity_refuses_what_cannot_fail(statement):
    with pytest.raises(v.VacuousCheck):
        v.identity(statement)


def test_identity_refuses_what_is_no_equation():
    with pytest.raises(TypeError, match="not an equation"):
        v.identity(x < y)


def test_identity_undecided_is_not_a_pass():
    # true (a square of a sum is a double sum), but SymPy's algebra does not see it: no verdict may rest on it
    n, k, m = sp.symbols("n k m", integer=True, positive=True)
    a = sp.IndexedBase("a", real=True)
    square = sp.Sum(a[k], (k, 1, n)) ** 2
    double = sp.Sum(a[k] * a[m], (k, 1, n), (m, 1, n))
    evidence = v.identity(sp.Eq(square, double), mutants={"doubled": sp.Eq(square, 2 * double)})
    assert evidence.passed is None
    assert evidence.sound


def test_mutations_leave_out_equivalent_neighbours():
    zero = sp.Symbol("z", positive=True)
    names = v.mutations(sp.Eq(x, x + zero - zero, evaluate=False))
    assert all("z" not in name for name in names)


def test_audit_demands_a_mutant():
    with pytest.raises(v.VacuousCheck, match="mutant"):
        v.identity(sp.Eq(v.named("a", x + x), 2 * x), mutants={})


def test_a_checker_that_always_passes_is_exposed():
    everything = lambda statement: v.Outcome(True, "proof")  # noqa: E731
    evidence = v.audit(
        everything, 1, {"wrong": 2}, method="m", text="1", domain="d", tolerance="exact", falsifier="f", trust="t"
    )
    assert evidence.passed is True
    assert not evidence.sound


def test_a_checker_that_never_decides_kills_nothing():
    nothing = lambda statement: v.Outcome(None, "search")  # noqa: E731
    evidence = v.audit(
        nothing, 1, {"wrong": 2}, method="m", text="1", domain="d", tolerance="exact", falsifier="f", trust="t"
    )
    assert evidence.mutants_killed == 0
    assert not evidence.sound


def test_evidence_is_data_and_not_a_truth_value():
    evidence = v.identity(sp.Eq((x + 1) ** 2, x**2 + 2 * x + 1))
    data = evidence.to_dict()
    assert data["mutants_killed"] == data["mutants_total"] == len(data["mutants"])
    with pytest.raises(TypeError, match="truth value"):
        bool(evidence)


# ---------------------------------------------------------------- names and exact values


def test_points_of_many_symbols_vary_every_symbol():
    many = sp.symbols("a b c d f g h", positive=True)
    product = sp.Mul(*many)
    mutants = {f"without {s}": sp.Eq(v.named("m", product), product / s) for s in many}
    evidence = v.identity(sp.Eq(v.named("m", product), sp.exp(sp.expand_log(sp.log(product)))), mutants=mutants)
    assert evidence.mutants_killed == len(many)


def test_named_prints_its_name_and_is_checked_as_its_meaning():
    slope = v.named(r"f'(x)", sp.Derivative(x**3, x))
    assert v.latex(sp.Eq(slope, 3 * x**2)) == r"f'(x) = 3 x^{2}"
    assert v.unfold(slope) == 3 * x**2
    assert slope.free_symbols == {x}


def test_names_may_contain_names():
    inner = v.named("a", x + 1)
    assert v.unfold(v.named("b", inner**2)) == (x + 1) ** 2


def test_evaluate_is_exact_on_sums_and_indices():
    n, k = sp.symbols("n k", integer=True)
    p = sp.IndexedBase("p")
    env = {n: 3, p: [Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]}
    assert v.evaluate(sp.Sum(p[k] ** 2, (k, 1, n)), env) == Fraction(7, 18)
    assert v.evaluate(sp.Sum(p[k], (k, 2, n)), env) == Fraction(1, 2)


def test_evaluate_balls_enclose_and_exactness_is_not_faked():
    with pytest.raises(v.NotRational):
        v.evaluate(sp.log(x), {x: 2})
    assert v.evaluate(sp.log(x), {x: 2}, exact=False).contains(v.evaluate(sp.log(x), {x: 2}, exact=False).mid())
    assert v.evaluate(sp.gamma(x), {x: 5}, exact=False).contains(24)
    assert v.holds(sp.log(x) > 1, {x: 3}) is True
    assert v.holds(sp.log(x) > 2, {x: 3}) is False


def test_holds_says_none_where_balls_cannot_tell():
    assert v.holds(sp.Eq(sp.log(x * y), sp.log(x) + sp.log(y), evaluate=False), {x: 2, y: 3}) is None


def test_missing_value_names_the_symbol():
    with pytest.raises(KeyError, match="no value for y"):
        v.evaluate(x + y, {x: 1})


# ---------------------------------------------------------------- inequality


def test_inequality_proved_by_signs():
    evidence = v.inequality((x + y) ** 2 > x**2, mutants={"reversed": (x + y) ** 2 < x**2})
    assert (evidence.passed, evidence.strength) == (True, "proof")


def test_inequality_that_only_survives_the_search_is_no_proof():
    evidence = v.inequality(x**2 + y**2 >= 2 * x * y, mutants={"reversed": x**2 + y**2 <= 2 * x * y})
    assert (evidence.passed, evidence.strength) == (True, "search")


def test_inequality_counterexample_is_exact_and_small():
    evidence = v.inequality(x * y < 1, mutants={"lower": x * y < half})
    assert evidence.passed is False
    assert evidence.counterexample == {"x": "1", "y": "1"}


def test_certificate_covers_a_box_rigorously():
    statement = x * (1 - x) < sp.Rational(26, 100)
    mutants = {"below the maximum": x * (1 - x) < sp.Rational(24, 100)}
    evidence = v.inequality(statement, mutants=mutants, box={x: (0, 1)}, certify=True)
    assert (evidence.passed, evidence.strength) == (True, "proof")
    assert evidence.sound


def test_certificate_finds_a_needle_the_grid_misses():
    needle = (x - sp.Rational(617, 1000)) ** 2 + sp.Rational(-1, 10**6) > 0
    evidence = v.inequality(needle, mutants={"deeper": (x - half) ** 2 > half}, box={x: (0, 1)}, certify=True)
    assert evidence.passed is not True


def test_certificate_needs_bounded_boxes():
    with pytest.raises(ValueError, match="no interval"):
        v.inequality(x > y, mutants={"r": x < y}, box={x: (0, 1)}, certify=True)


def test_inequality_refuses_decided_relations():
    with pytest.raises(v.VacuousCheck):
        v.inequality(x > 0, mutants={"r": x < 0})


# ---------------------------------------------------------------- worlds


def test_search_returns_the_first_world_that_fails():
    worlds = [{x: Fraction(k, 4)} for k in range(1, 9)]
    evidence = v.search(x**2 < x, worlds, mutants={"reversed": x**2 > x}, domain="quarters")
    assert evidence.passed is False
    assert evidence.counterexample == {"x": "1"}


def test_search_pass_is_not_proof_unless_exhaustive():
    worlds = [{x: Fraction(1, k)} for k in range(2, 6)]
    searched = v.search(x**2 < x, worlds, mutants={"reversed": x**2 > x}, domain="unit fractions")
    everything = v.search(x**2 < x, worlds, mutants={"r": x**2 > x}, domain="these four", exhaustive=True)
    assert (searched.strength, everything.strength) == ("search", "exhaustive")


@pytest.mark.parametrize(
    ("worlds", "reason"),
    [([], "no world"), ([{x: 1}, {x: 1}], "identical"), ([{x: 0}, {x: 0, y: 0}], "zero")],
)
def test_search_refuses_vacuous_worlds(worlds, reason):
    with pytest.raises(v.VacuousCheck, match=reason):
        v.search(x < 2, worlds, mutants={"r": x > 2}, domain="d")


def test_search_refuses_hypotheses_that_never_hold():
    never = v.law("never applies", lambda world: None)
    with pytest.raises(v.VacuousCheck, match="hypotheses"):
        v.search(never, [{x: 1}, {x: 2}], mutants={"m": v.law("false", lambda w: False)}, domain="d")


def test_search_refuses_a_nameless_function():
    with pytest.raises(TypeError, match="law"):
        v.search(lambda w: True, [{x: 1}, {x: 2}], mutants={"m": lambda w: False}, domain="d")


def test_property_search_shrinks():
    worlds = st.fixed_dictionaries({x: st.fractions(min_value=0, max_value=10)})
    evidence = v.property_search(x < 3, worlds, mutants={"lower": x < 1}, domain="fractions up to 10")
    assert evidence.passed is False
    assert evidence.counterexample == {"x": "3"}


# ---------------------------------------------------------------- gradients and measurements


def test_gradient_accepts_the_closed_form_and_rejects_mutants():
    evidence = v.gradient(
        lambda a, b: a**2 * b,
        lambda a, b: [2 * a * b, a**2],
        [(1.0, 2.0), (-3.0, 0.5)],
        mutants={"swapped": lambda a, b: [a**2, 2 * a * b], "halved": lambda a, b: [a * b, a**2]},
        words="$2ab, a^2$",
        domain="two points",
    )
    assert evidence.passed is True
    assert evidence.sound
    assert evidence.strength == "search"


def test_gradient_refuses_flat_functions_and_single_points():
    flat = {"m": lambda a: [1.0]}
    with pytest.raises(v.VacuousCheck, match="zero"):
        v.gradient(lambda a: 0 * a, lambda a: [0.0], [(1.0,), (2.0,)], mutants=flat, words="w", domain="d")
    with pytest.raises(v.VacuousCheck, match="two different"):
        v.gradient(lambda a: a**2, lambda a: [2 * a], [(1.0,), (1.0,)], mutants=flat, words="w", domain="d")


def test_measured_mean_passes_fails_and_abstains():
    below = v.measured_mean([-1.0, -1.2, -0.9, -1.1], "<", 0, words="w", domain="d")
    above = v.measured_mean([1.0, 1.2, 0.9, 1.1], "<", 0, words="w", domain="d")
    around = v.measured_mean([-1.0, 1.2, 0.9, -1.1], "<", 0, words="w", domain="d")
    assert (below.passed, above.passed, around.passed) == (True, False, None)
    assert below.sound
    assert above.sound


@pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, 1.0, 1.0]])
def test_measured_mean_refuses_too_little(values):
    with pytest.raises(v.VacuousCheck):
        v.measured_mean(values, "<", 0, words="w", domain="d")


def test_measured_mean_refuses_diverged_runs():
    with pytest.raises(ValueError, match="diverged"):
        v.measured_mean([1.0, float("nan"), 2.0], "<", 0, words="w", domain="d")


def test_measured_median_passes_fails_and_abstains_and_kills_all_mutants_where_it_decides():
    few = [1.0, 2.0, 3.0, 4.0, 5.0, 600.0]  # 6 runs: from the smallest to the largest
    above, below = (v.measured_median(few, side, 0.5, words="w", domain="d") for side in "><")
    assert (above.passed, below.passed) == (True, False)
    assert above.mutants_killed == below.mutants_killed == 3
    assert v.measured_median(few, ">", 1.5, words="w", domain="d").passed is None
    assert above.detail == "median 3.5, 95% interval [1, 600], n = 6"


@pytest.mark.parametrize("n", [6, 8, 9, 16, 40])
def test_the_interval_of_the_median_is_the_narrowest_that_the_sign_test_allows(n):
    """Its two tails, counted exactly: P(Bin(n, 1/2) < k) at most 1/40 for the k used, more for the next."""

    def tail(k):
        return Fraction(sum(comb(n, j) for j in range(k)), 2**n)

    k = max(k for k in range(1, n) if tail(k) <= Fraction(1, 40))
    detail = v.measured_median(range(1, n + 1), ">", 0, words="w", domain="d").detail
    assert f"interval [{k}, {n + 1 - k}]" in detail


def test_measured_median_takes_equal_values_and_abstains_at_a_tie():
    same = v.measured_median([0.0] * 8, "<", 0.5, words="w", domain="d")
    assert (same.passed, same.mutants_killed) == (True, 3)
    assert v.measured_median([0.5] * 8, "<", 0.5, words="w", domain="d").passed is None


def test_measured_median_refuses_too_few_runs_and_diverged_ones():
    with pytest.raises(v.VacuousCheck, match="5 values"):
        v.measured_median([1.0, 2.0, 3.0, 4.0, 5.0], "<", 0, words="w", domain="d")
    with pytest.raises(ValueError, match="diverged"):
        v.measured_median([1.0] * 7 + [float("inf")], "<", 0, words="w", domain="d")


# ---------------------------------------------------------------- proofs


def test_proof_lines_judge_each_line_alone():
    lines = {
        "1": sp.Eq((x + y) ** 2, x**2 + 2 * x * y + y**2),
        "2": sp.Eq(v.named("s", (x - y) ** 2), x**2 - y**2),
        "3": (x + y) ** 2 > x**2,
    }
    judged = v.proof_lines(lines, mutants={"3": {"reversed": (x + y) ** 2 < x**2}})
    assert [judged[k].passed for k in lines] == [True, False, True]


def test_proof_lines_on_worlds():
    worlds = [{x: Fraction(1, 3)}, {x: Fraction(1, 2)}]
    judged = v.proof_lines({"a": x < 1}, worlds=worlds, domain="two", mutants={"a": {"r": x > 1}})
    assert judged["a"].passed is True
