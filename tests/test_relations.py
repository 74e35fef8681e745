"""The relations of the chapter "An atlas of pair losses", in numbers: the library's losses, values and gradients.

Where the chapter refutes a neighbour of a relation, the test shows the library's losses differing, too.
"""

import math
from itertools import pairwise

import pytest
import torch

from bdpo import imbalance, losses
from bdpo.losses import LOSSES, PAIRS


def data(size=50, seed=0, spread=6.0):
    """Log-probs of pairs under policy and reference."""
    draw = torch.Generator().manual_seed(seed)
    return list(-spread * torch.rand(4, size, generator=draw, dtype=torch.float64) - 0.05)


def whole(value, like):
    return torch.full_like(like, float(value))


def both(loss, *tensors, **settings):
    """Losses and their two gradients, one row each."""
    value = LOSSES[loss](*tensors, **settings)
    return torch.stack([value, *imbalance.gradient(LOSSES[loss], *tensors, **settings)])


def same(x, y, atol=1e-12):
    return torch.allclose(x, y, rtol=1e-11, atol=atol)


def x_of(logps, beta):
    a, b, a0, b0 = logps
    return beta * ((a - a0) - (b - b0))


# ---------------------------------------------------------------- noisy labels


def flipped(loss, logps, **settings):
    """The loss of the same pairs with their labels turned round; gradients in the original order."""
    a, b, a0, b0 = logps
    value, g_l, g_w = both(loss, b, a, b0, a0, **settings)
    return torch.stack([value, g_w, g_l])


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.3, 0.49])
def test_robust_dpo_is_unbiased_under_flipped_labels_and_conservative_dpo_is_not(rate):
    logps = data()
    clean = both("dpo", *logps, beta=0.7)
    mean = {
        loss: (1 - rate) * both(loss, *logps, beta=0.7, label_smoothing=rate)
        + rate * flipped(loss, logps, beta=0.7, label_smoothing=rate)
        for loss in ("robust_dpo", "conservative_dpo")
    }
    assert same(mean["robust_dpo"], clean, atol=1e-10)
    assert not torch.allclose(mean["conservative_dpo"], clean, rtol=1e-4)
    twice = 2 * rate * (1 - rate)
    assert same(mean["conservative_dpo"], both("conservative_dpo", *logps, beta=0.7, label_smoothing=twice))


@pytest.mark.parametrize("loss", ["robust_dpo", "conservative_dpo"])
def test_no_smoothing_is_dpo(loss):
    assert same(both(loss, *data(), beta=0.3, label_smoothing=0.0), both("dpo", *data(), beta=0.3))


def test_smoothing_adds_a_slope_of_either_sign():
    logps, rate, beta = data(), 0.2, 0.4
    dpo, x = LOSSES["dpo"](*logps, beta=beta), x_of(logps, beta)
    assert same(LOSSES["conservative_dpo"](*logps, beta=beta, label_smoothing=rate), dpo + rate * x)
    assert same(LOSSES["robust_dpo"](*logps, beta=beta, label_smoothing=rate), dpo - rate / (1 - 2 * rate) * x)


@pytest.mark.parametrize("rate", [0.1, 0.25])
def test_conservative_dpo_stops_where_its_belief_is_one_minus_the_smoothing(rate):
    beta = 0.5
    margin = math.log((1 - rate) / rate) / beta
    logps = [torch.tensor([x], dtype=torch.float64) for x in (-20 + margin, -25.0, -20.0, -25.0)]
    _, g_w, g_l = both("conservative_dpo", *logps, beta=beta, label_smoothing=rate)
    assert abs(g_w.item()) < 1e-14
    assert abs(g_l.item()) < 1e-14
    _, g_w, _ = both("robust_dpo", *logps, beta=beta, label_smoothing=rate)
    assert g_w.item() < -0.01  # this one goes on


# ---------------------------------------------------------------- shapes of the margin


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_ipo_at_a_quarter_of_beta_is_the_parabola_of_dpo(beta):
    logps = data(spread=1.5)
    x = x_of(logps, beta)
    dpo = LOSSES["dpo"](*logps, beta=beta)

    def parabola(share):
        return beta**2 / 8 * LOSSES["ipo"](*logps, beta=share * beta) + math.log(2) - 0.5

    assert bool(((dpo - parabola(0.25)).abs() <= x**4 / 192 + 1e-14).all())
    assert not bool(((dpo - parabola(0.5)).abs() <= x**4 / 192 + 1e-14).all())


def test_dpo_with_a_growing_scale_and_margin_becomes_the_hinge():
    logps, beta = data(), 0.6
    a, b, a0, b0 = logps
    hinge = LOSSES["hinge"](*logps, beta=beta)
    errors = []
    for k in (1.0, 10.0, 100.0, 1000.0):
        # a target margin of k is a reference that likes the winner k / (k beta) nats more
        smooth = LOSSES["dpo"](a, b, a0, b0 - 1 / beta, beta=k * beta) / k
        errors.append(float((smooth - hinge).abs().max()))
        assert errors[-1] <= math.log(2) / k + 1e-12
    assert all(later < earlier for earlier, later in pairwise(errors))


@pytest.mark.parametrize("delta", [0.5, 2.0])
def test_slic_is_a_scaled_hinge_under_a_flat_reference_plus_likelihood(delta):
    a, b, a0, _ = data()
    hinge = both("hinge", a, b, a0, a0, beta=1 / delta)
    assert same(both("slic", a, b, delta=delta, sft_weight=0.0), delta * hinge)
    likelihood = torch.stack([-a, whole(-1, a), whole(0, a)])
    assert same(both("slic", a, b, delta=delta, sft_weight=0.3), delta * hinge + 0.3 * likelihood)


def test_kto_on_opposite_log_ratios_is_a_bounded_loss_of_half_the_margin_but_no_function_of_the_margin():
    beta, zero = 0.8, torch.zeros(1, dtype=torch.float64)

    def kto(h_w, h_l):
        # a second pair with very low log-ratios sets both reference points to 0
        columns = [torch.tensor(x, dtype=torch.float64) for x in ([-5 + h_w, -99.0], [-5 + h_l, -99.0])]
        reference = torch.tensor([-5.0, -5.0], dtype=torch.float64)
        return LOSSES["kto_pair"](*columns, reference, reference, beta=beta)[0]

    for h in (0.5, 1.0, 3.0):
        assert kto(h, -h).item() == pytest.approx(1 / (1 + math.exp(beta * h)), rel=1e-12)
    assert abs(kto(2.0, 0.0).item() - kto(1.0, -1.0).item()) > 1e-3
    start = zero - 3
    quarter = both("dpo", start, start, start, start, beta=beta)[1:] / 4
    assert same(both("kto_pair", start, start, start, start, beta=beta)[1:], quarter)


# ---------------------------------------------------------------- references and lengths


def test_cpo_is_dpo_under_a_flat_reference_plus_likelihood():
    a, b, a0, b0 = data()
    likelihood = torch.stack([-a, whole(-1, a), whole(0, a)])
    assert same(both("cpo", a, b, beta=0.4, sft_weight=0.7), both("dpo", a, b, a0, a0, beta=0.4) + 0.7 * likelihood)
    assert not same(both("cpo", a, b, beta=0.4, sft_weight=0.0), both("dpo", a, b, a0, b0, beta=0.4))


def test_dpo_with_likelihood_is_cpo_under_a_flat_reference_and_dpo_without_weight():
    a, b, a0, b0 = data()
    length = whole(4, a)
    flat = both("dpo_sft", a, b, a0, a0, length, beta=0.4, sft_weight=0.8)
    assert same(flat, both("cpo", a, b, beta=0.4, sft_weight=0.2))
    assert same(both("dpo_sft", a, b, a0, b0, length, beta=0.4, sft_weight=0.0), both("dpo", a, b, a0, b0, beta=0.4))


def test_a_reference_uniform_over_tokens_shifts_the_margin_by_the_difference_of_lengths():
    a, b, *_ = data()
    vocabulary = 32_000
    for length_w, length_l in ((3, 3), (1, 2), (5, 2)):
        reference = [whole(-n * math.log(vocabulary), a) for n in (length_w, length_l)]
        shift = 0.1 * (length_w - length_l) * math.log(vocabulary)
        expected = torch.nn.functional.softplus(-(0.1 * (a - b) + shift))
        assert same(LOSSES["dpo"](a, b, *reference, beta=0.1), expected)
        assert same(LOSSES["cpo"](a, b, beta=0.1, sft_weight=0.0), expected) == (length_w == length_l)


@pytest.mark.parametrize("length", [1, 3])
def test_simpo_of_equal_lengths_is_dpo_with_a_reference_that_prefers_the_winner(length):
    a, b, a0, _ = data()
    beta, gamma = 2.0, 0.5
    simpo = both("simpo", a, b, whole(length, a), whole(length, a), beta=beta, gamma=gamma)
    assert same(simpo, both("dpo", a, b, a0, a0 - gamma * length / beta, beta=beta / length))


def test_simpo_of_unequal_lengths_is_no_dpo_since_its_pulls_differ_by_the_lengths():
    a, b, *_ = data()
    _, g_w, g_l = both("simpo", a, b, whole(1, a), whole(2, a))
    assert same(g_w, -2 * g_l)
    assert not same(g_w, -g_l)


def test_alpha_dpo_without_alpha_is_simpo_and_otherwise_adds_the_reference():
    a, b, a0, b0 = data()
    one, two = whole(1, a), whole(2, a)
    statistics = [torch.tensor(x, dtype=torch.float64) for x in (0.2, 1.5)]
    simpo = both("simpo", a, b, one, two, beta=2.0, gamma=0.5)
    assert same(both("alpha_dpo", a, b, a0, b0, one, two, *statistics, beta=2.0, gamma=0.5, alpha=0.0), simpo)
    alpha, (mean, std) = 0.6, statistics
    u, u0 = a - b / 2, a0 - b0 / 2
    argument = (2.0 - alpha / std) * u + alpha / std * u0 + alpha * mean / std - 0.5
    found = LOSSES["alpha_dpo"](a, b, a0, b0, one, two, *statistics, beta=2.0, gamma=0.5, alpha=alpha)
    assert same(found, torch.nn.functional.softplus(-argument))
    subtracted = (2.0 - alpha / std) * u - alpha / std * u0 + alpha * mean / std - 0.5
    assert not same(found, torch.nn.functional.softplus(-subtracted))


def test_orpo_compares_log_odds_which_are_log_probs_only_while_those_are_small():
    one = torch.ones(1, dtype=torch.float64)
    for log_p, tolerance, near in ((-20.0, 1e-6, True), (-0.5, 1e-2, False)):
        a, b = whole(log_p, one), whole(log_p - 1, one)
        contrast = (LOSSES["orpo"](a, b, one, one, odds_weight=1.0) + a).item()
        dpo = LOSSES["dpo"](a, b, a, a, beta=1.0).item()
        assert (abs(contrast - dpo) < tolerance) == near
        odds = [math.exp(x) / (1 - math.exp(x)) for x in (log_p, log_p - 1)]
        assert contrast == pytest.approx(math.log1p(odds[1] / odds[0]), rel=1e-12)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("loss", [n for n in PAIRS if n.startswith("nbdpo")])
def test_a_clip_of_zero_is_dpo(loss):
    assert same(both(loss, *data(), beta=0.3, clip=0.0), both("dpo", *data(), beta=0.3))


def test_the_first_naive_version_keeps_the_value_and_the_second_does_not():
    logps = data()
    dpo = LOSSES["dpo"](*logps, beta=0.3)
    assert same(LOSSES["nbdpo_asym"](*logps, beta=0.3), dpo)
    assert not same(LOSSES["nbdpo_v2_asym"](*logps, beta=0.3), dpo)


def test_bdpo_under_a_flat_reference_is_a_hyperbolic_tangent():
    a, b, a0, _ = data()
    squashed = -a0 * torch.tanh((b / a).log() / 2)
    assert same(LOSSES["bdpo"](a, b, a0, a0, beta=0.9), torch.nn.functional.softplus(-0.9 * squashed))


def test_beta_dpo_is_dpo_without_alpha_or_on_a_batch_of_the_mean_margin_unless_the_floor_binds():
    logps = data()
    mean = (x_of(logps, 1.0)).mean()
    dpo = both("dpo", *logps, beta=0.1)
    assert same(both("beta_dpo", *logps, mean + 3, beta=0.1, alpha=0.0), dpo)
    assert same(both("beta_dpo", *logps, mean, beta=0.1, alpha=0.6), dpo)
    assert not same(both("beta_dpo", *logps, mean, beta=0.1, alpha=0.6, beta_min=0.2), dpo)


# ---------------------------------------------------------------- where DPO comes from


def test_dpo_is_the_reward_loss_of_its_implicit_rewards():
    a, b, a0, b0 = data()
    rewards = 0.3 * (a - a0), 0.3 * (b - b0)
    assert same(losses.reward_bt(*rewards), LOSSES["dpo"](a, b, a0, b0, beta=0.3))


def population(logits, ref_logits, rewards, beta, pairs):
    """DPO's mean loss over pairs, labelled by the Bradley-Terry model of the rewards."""
    log_p, log_q = logits.log_softmax(0), ref_logits.log_softmax(0)
    total = logits.new_zeros(())
    for i, j in pairs:
        p = torch.sigmoid(rewards[i] - rewards[j])
        for (w, l_), weight in (((i, j), p), ((j, i), 1 - p)):
            total = total + weight * LOSSES["dpo"](log_p[w], log_p[l_], log_q[w], log_q[l_], beta=beta)
    return total


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_dpo_and_the_kl_regularised_objective_have_the_same_optimum(n, beta):
    draw = torch.Generator().manual_seed(n)
    ref_logits, rewards, other = torch.randn(3, n, generator=draw, dtype=torch.float64)
    optimum = (ref_logits.log_softmax(0) + rewards / beta).requires_grad_()
    every = [(i, j) for i in range(n) for j in range(i)]

    def kl_regularised(logits):
        return losses.rlhf_tabular(logits, ref_logits, rewards, beta=beta)

    def dpo(logits):
        return population(logits, ref_logits, rewards, beta, every)

    for objective in (kl_regularised, dpo):
        (slope,) = torch.autograd.grad(objective(optimum), optimum)
        assert float(slope.abs().max()) < 1e-12
        assert (objective(other) - objective(optimum)).item() > 1e-6
    optimum = optimum.detach()
    gap = (kl_regularised(other) - kl_regularised(optimum)).item()
    log_p, log_best = other.log_softmax(0), optimum.log_softmax(0)
    assert gap == pytest.approx(float(beta * (log_p.exp() * (log_p - log_best)).sum()), rel=1e-9)


def test_pairs_that_do_not_connect_all_responses_leave_the_optimum_open():
    zeros = torch.zeros(3, dtype=torch.float64)
    rewards = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64).log()
    for p in ([0.5, 0.25, 0.25], [0.4, 0.2, 0.4]):
        logits = torch.tensor(p, dtype=torch.float64).log().requires_grad_()
        steps = {
            name: torch.autograd.grad(population(logits, zeros, rewards, 1.0, pairs), logits)[0].abs().max().item()
            for name, pairs in (("one", [(0, 1)]), ("all", [(0, 1), (0, 2), (1, 2)]))
        }
        assert steps["one"] < 1e-15
        assert (steps["all"] < 1e-15) == (p[2] == 0.25)


# ---------------------------------------------------------------- third responses


@pytest.mark.parametrize("loss", PAIRS)
def test_the_third_responses_change_is_the_chapters_formula(loss):
    policy = torch.tensor([0.2, 0.3, 0.4, 0.1], dtype=torch.float64)
    spec, known = LOSSES[loss], {"margin_mean": 0.0, "margin_std": 1.0, "chosen_lengths": 2.0, "rejected_lengths": 3.0}
    others = [policy.new_tensor([known.get(need, math.log(0.25))]) for need in spec.needs[2:]]
    logits = policy.log().requires_grad_()
    log_p = logits.log_softmax(0)
    (slope,) = torch.autograd.grad(spec(log_p[:1], log_p[1:2], *others).sum(), logits)
    rate = 1e-6 / slope.norm()
    moved = ((logits.detach() - rate * slope).softmax(0) - policy) / rate
    g_w, g_l = (g.item() for g in imbalance.closed(loss, policy[:1].log(), policy[1:2].log(), *others))
    norm = float((policy**2).sum())
    for k in (2, 3):
        p_k = float(policy[k])
        expected = p_k * ((0.2 + p_k - norm) * g_w + (0.3 + p_k - norm) * g_l)
        assert moved[k].item() == pytest.approx(expected, rel=1e-4, abs=1e-7)
        assert abs(expected) > 1e-4


@pytest.mark.parametrize("loss", [n for n in PAIRS if imbalance.balance(n, "log").kind == "balanced"])
def test_third_responses_rise_under_a_balanced_loss_while_the_loser_is_likelier(loss):
    for p_w, p_l in ((0.2, 0.3), (0.3, 0.2)):
        policy = torch.tensor([p_w, p_l, 0.5], dtype=torch.float64)
        others = [policy.new_tensor([0.0 if n == "margin_mean" else math.log(0.3)]) for n in LOSSES[loss].needs[2:]]
        logits = policy.log().requires_grad_()
        log_p = logits.log_softmax(0)
        (slope,) = torch.autograd.grad(LOSSES[loss](log_p[:1], log_p[1:2], *others).sum(), logits)
        after = (logits.detach() - 1e-4 / slope.norm() * slope).softmax(0)
        assert bool(after[2] > 0.5) == (p_l > p_w)
