"""The Gaussian world against two other routes: exact fractions, and automatic differentiation of the losses."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from bdpo import dynamics
from bdpo.gaussian import REFERENCE, RESPONSES, SAMPLING, beyond, curves, extrema

DYADIC = 1 / math.sqrt(2 * math.log(2))  # the width at which exp(-d^2 / 2 sigma^2) = 2^(-d^2)
LINE = range(6)


def dyadic(mode):
    bumps = [Fraction(1, 2 ** ((y - mode) ** 2)) for y in LINE]
    return [b / sum(bumps) for b in bumps]


def exact(mu_p, mu_q, sampling, reference):
    """The same curves in fractions, by the general functions of `dynamics`."""
    p, q = dyadic(mu_p), dyadic(mu_q)
    pairs = [(i, j, b * (p[i] * p[j] if sampling == "shiftless" else 1)) for i, j, b in dynamics.expected_pairs(q)]
    w = dynamics.pair_weights(p, pairs, p if reference == "policy" else None)
    return {
        "p": p,
        "q": q,
        "w": w,
        "wp": [a * b for a, b in zip(w, p, strict=True)],
        "dpo": dynamics.probability_change(p, w),
        "balanced": dynamics.probability_change(p, dynamics.to_logits(p, w)),
        "eq14": dynamics.probability_change(p, [a * b for a, b in zip(w, p, strict=True)]),
    }


@pytest.mark.parametrize("reference", REFERENCE)
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("modes", [(1, 3), (0, 5), (2, 2), (4, 1)])
def test_curves_are_the_exact_ones(modes, sampling, reference):
    expected = exact(*modes, sampling, reference)
    found = curves(*modes, DYADIC, DYADIC, sampling=sampling, reference=reference, responses=LINE)
    for name, values in expected.items():
        scale = max(abs(float(v)) for v in values) or 1
        assert found[name] == pytest.approx([float(v) for v in values], rel=1e-12, abs=1e-13 * scale + 1e-16)


@pytest.mark.parametrize("reference", REFERENCE)
def test_updates_are_steps_on_the_losses(reference):
    """Logits, expected loss over each pair once, autograd, and the Jacobian of the softmax."""
    found = curves(2, 4, 1.5, 2.5, reference=reference, responses=LINE)
    s = torch.tensor(np.log(found["p"]), requires_grad=True)
    fixed = s.detach() if reference == "policy" else torch.zeros(len(LINE))
    wanted = torch.tensor(found["q"])[:, None] / (torch.tensor(found["q"])[:, None] + torch.tensor(found["q"]))
    margin = (s - fixed)[:, None] - (s - fixed)
    loss = -(wanted * torch.nn.functional.logsigmoid(margin)).sum() + 0.5 * math.log(2) * len(LINE)
    (gradient,) = torch.autograd.grad(loss, s)
    policy = s.detach()
    _, dpo = torch.autograd.functional.jvp(lambda x: x.softmax(0), policy, -gradient)
    _, pulled = torch.autograd.functional.vjp(lambda x: x.softmax(0), policy, -gradient)  # w as gradient in pi
    _, balanced = torch.autograd.functional.jvp(lambda x: x.softmax(0), policy, pulled)
    assert found["w"] == pytest.approx((-gradient).numpy(), rel=1e-12)
    assert found["dpo"] == pytest.approx(dpo.numpy(), rel=1e-9, abs=1e-15)
    assert found["balanced"] == pytest.approx(balanced.numpy(), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("sampling", SAMPLING)
def test_probability_is_neither_made_nor_lost(sampling):
    found = curves(30, 70, 10, 10, sampling=sampling)
    for name in ("dpo", "balanced", "eq14"):
        assert abs(found[name].sum()) < 1e-13 * np.abs(found[name]).max() * len(RESPONSES)
        assert np.abs(found[name]).max() > 0


def test_the_plotted_curve_is_no_update():
    """Moving every probability by w p would make or lose some: the mean of w is missing."""
    found = curves(30, 70, 10, 10)
    assert abs(found["wp"].sum()) > np.abs(found["wp"]).max()


def test_between_the_responses_the_curves_pass_through_them():
    on = curves(20.5, 60, 8, 15, sampling="shiftless")
    off = curves(20.5, 60, 8, 15, sampling="shiftless", at=[33, 33.5, 34])
    for name in on:
        assert off[name][[0, 2]] == pytest.approx(on[name][33:35], rel=1e-14)
    assert on["w"][33] > off["w"][1] > on["w"][34]


def test_mirror_world_is_antisymmetric():
    found = curves(39.5, 59.5, 10, 10)
    assert found["w"] == pytest.approx(-found["w"][::-1], abs=1e-11)
    shifted = curves(40, 60, 10, 10)  # the paper's modes lie symmetric about 50, the responses about 49.5
    assert not np.allclose(shifted["w"], -shifted["w"][::-1], atol=1e-3)


def test_reference_policy_removes_the_policy_from_w():
    one, other = (curves(mu, 55, 10, 10, reference="policy")["w"] for mu in (45, 10))
    assert (one == other).all()
    assert RESPONSES[one.argmax()] == 55


def test_equal_policy_and_utility_need_no_step():
    found = curves(50, 50, 10, 10)
    for name in ("w", "dpo", "balanced", "eq14"):
        assert np.abs(found[name]).max() < 1e-12


def test_width_so_small_that_the_curve_underflows():
    found = curves(50.5, 10, 0.01, 0.02)
    assert np.isfinite(np.concatenate(list(found.values()))).all()
    assert found["p"][50] == found["p"][51] == 0.5
    preferred_to = sum(abs(z - 10) > 40 for z in RESPONSES)
    assert found["w"][50] == pytest.approx(preferred_to - 98 - 0.5)  # beats all by p but 51, which is as likely


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma_p": 0}, "sigma_p is 0; it must be a finite number above 0"),
        ({"sigma_q": -1.0}, "sigma_q is -1.0"),
        ({"sigma_q": math.inf}, "sigma_q is inf"),
        ({"mu_p": math.nan}, "mu_p is nan; it must be a finite number"),
        ({"sampling": "online"}, "sampling is 'online'; it must be one of 'uniform', 'shiftless'"),
        ({"reference": None}, "reference is None; it must be one of 'none', 'policy'"),
        ({"responses": [1]}, "at least two different"),
        ({"responses": [1, 2, 1]}, "at least two different"),
        ({"responses": [[1, 2], [3, 4]]}, "at least two different"),
        ({"responses": [1, math.inf]}, "finite"),
    ],
)
def test_refuses(change, message):
    given = {"mu_p": 45, "mu_q": 55, "sigma_p": 10, "sigma_q": 10}
    with pytest.raises(ValueError, match=message):
        curves(**given | change)


def test_extrema_of_a_cosine():
    found = extrema(np.cos, 0.5, 3.5 * math.pi)
    assert [e.kind for e in found] == ["min", "max", "min"]
    assert [e.y for e in found] == pytest.approx([math.pi, 2 * math.pi, 3 * math.pi], abs=1e-7)
    assert [e.value for e in found] == pytest.approx([-1, 1, -1])


def test_extrema_ignore_ends_turning_points_and_rounding():
    assert extrema(lambda y: y, 0, 1) == []
    assert extrema(lambda y: (y - 0.5) ** 3, 0, 1) == []
    assert extrema(lambda y: np.round(y, 15) + 1e-14 * np.sin(400 * y), 0, 1) == []
    assert [e.kind for e in extrema(lambda y: np.minimum(y, 0.5) - np.maximum(y, 0.7), 0, 1)] == ["max"]  # a plateau


def test_extrema_refuse_an_empty_interval():
    with pytest.raises(ValueError, match="the interval from 2 to 1 is empty"):
        extrema(np.cos, 2, 1)
    with pytest.raises(ValueError, match="steps is 1"):
        extrema(np.cos, 0, 1, steps=1)


def test_beyond_counts_what_is_far_from_every_centre():
    y, values = [0, 1, 2, 3, 4], [1, -1, 2, -2, 4]
    assert beyond(y, values, [0], 0) == 0.9
    assert beyond(y, values, [0], 1) == 0.8  # a response at the distance itself is not beyond it
    assert beyond(y, values, [0, 4], 1) == 0.2
    assert beyond(y, values, [2], 2) == 0
    with pytest.raises(ValueError, match="centres is empty"):
        beyond(y, values, [], 1)
    with pytest.raises(ValueError, match="distance is -1"):
        beyond(y, values, [0], -1)
    with pytest.raises(ValueError, match="all 0"):
        beyond(y, [0] * 5, [0], 1)
