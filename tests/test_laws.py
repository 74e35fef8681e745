"""Finite laws and three draws: two routes to every stage, which must agree exactly."""

from fractions import Fraction as F
from itertools import product

import pytest
import sympy as sp

from bdpo import laws, verify

LAWS = [*laws.monotone(2, 3, 2), *list(laws.monotone(3, 4, 1))[::3]]


def by_three_draws(law, phi, psi):
    """Stages of a finite law as means of three symbolic draws, every triple of atoms sorted and weighed."""
    x, y = sp.symbols("x:3", positive=True), sp.symbols("y:3", positive=True)
    symbolic = laws.stages_of_draws(x, y)
    compiled = {name: sp.Poly(verify.unfold(stage), *x, *y) for name, stage in symbolic.items()}
    total = dict.fromkeys(laws.STAGES, F(0))
    for triple in product(range(len(law["p"])), repeat=3):
        weight = law["p"][triple[0]] * law["p"][triple[1]] * law["p"][triple[2]]
        i, j, k = sorted(triple)
        point = [*(sp.Rational(phi[a]) for a in (i, j, k)), *(sp.Rational(psi[a]) for a in (i, j, k))]
        for name, polynomial in compiled.items():
            value = polynomial.eval(tuple(point))
            total[name] += weight * F(int(value.p), int(value.q))
    return total


@pytest.mark.parametrize("law", LAWS[::23])
def test_three_draws_average_to_the_stages_of_the_law(law):
    assert by_three_draws(law, law["f"], law["g"]) == laws.stages_of_law(law["p"], law["f"], law["g"])


@pytest.mark.parametrize("law", LAWS[::7])
def test_only_the_conditional_mean_loses_anything(law):
    stages = laws.stages_of_law(law["p"], law["f"], law["g"])
    values = [stages[name] for name in laws.STAGES]
    lost = laws.STAGES.index("unconditional")
    assert len(set(values[:lost])) == len(set(values[lost:])) == 1
    assert values[0] >= values[-1]


def test_a_decreasing_weight_breaks_the_factorised_stage_and_the_inequality():
    stages = laws.stages_of_law([F(1, 2), F(1, 2)], [F(0), F(1)], [F(1), F(0)])
    assert stages["integral outside"] != stages["factorised"]
    assert stages["factorised"] < stages["unconditional"]


def test_a_constant_function_gives_zero_everywhere():
    stages = laws.stages_of_law([F(1, 3), F(2, 3)], [F(5), F(5)], [F(1), F(2)])
    assert set(stages.values()) == {F(0)}


def test_three_draws_of_a_square_estimate_the_second_moment():
    x = sp.symbols("x:3")
    estimate = laws.three_draws(lambda i, j, k: x[i] * x[j])
    assert sp.expand(estimate - (x[0] * x[1] + x[0] * x[2] + x[1] * x[2]) / 3) == 0


def test_ladder_climbs():
    low, middle, high = laws.ladder("f", "a", "b")
    assert (middle - low).is_positive
    assert (high - middle).is_positive


def test_monotone_laws_have_ties_and_zeros_and_no_repetition():
    found = [tuple(map(tuple, law.values())) for law in laws.monotone(2, 3, 2)]
    assert len(found) == len(set(found)) == 3 * 6 * 6
    assert ((F(1, 2), F(1, 2)), (F(0), F(0)), (F(0), F(1))) in found


def test_covariance_is_that_of_the_law():
    assert laws.covariance([F(1, 2), F(1, 2)], [F(0), F(1)], [F(0), F(2)]) == F(1, 2)
