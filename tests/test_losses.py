"""The six objectives of the paper: the formulas they are checked against, and what they do at the edges.

The check itself, in 60-digit arithmetic, and its mutants are in ``test_losses_audit.py``, for every objective.
"""

import functools
import itertools
import math
import re
import warnings
from collections.abc import Callable

import mpmath as mp
import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float, jaxtyped
from torch import Tensor
from torch.nn.functional import logsigmoid

from bdpo.losses import LOSSES as EVERY
from bdpo.losses import PAPER
from bdpo.losses.audit import RELATIVE, UNDERFLOW, check, domain, formula
from bdpo.losses.mutants import lambda_asym, lambda_sym, one, share_lose, share_win, textbook

Loss = Callable[..., Tensor]
LOSSES = {name: EVERY[name].function for name in PAPER}
Batch = Float[Tensor, "*batch"]
ARGUMENTS = ["policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps"]
NAIVE = [name for name in LOSSES if name.startswith("nbdpo")]
V1 = [name for name in NAIVE if "v2" not in name]
V2 = [name for name in NAIVE if "v2" in name]
LAMBDA = {name: lambda_asym if name.endswith("asym") else lambda_sym for name in NAIVE}


# --- the paper's formulas against those of the audit ---------------------------------------------------------------


def value_and_gradients(loss: Loss, logps: Tensor, **settings) -> tuple[Tensor, Tensor, Tensor]:
    win, lose = (x.clone().requires_grad_() for x in logps[:2])
    value = loss(win, lose, *logps[2:], **settings)
    gradients = torch.autograd.grad(value.sum(), [win, lose], materialize_grads=True)
    return value.detach(), *gradients


def as_printed(name, win, lose, ref_win, ref_lose, beta, clip, detach, bar_win, bar_lose):
    """The loss in the letters of the paper, with detached quantities as variables of their own (``bar_…``)."""
    at = (bar_win, bar_lose) if detach else (win, lose)
    r_win, r_lose = win - ref_win, lose - ref_lose
    if name == "dpo":
        margin = r_win - r_lose
    elif name == "bdpo":
        lam = at[1] / (at[0] + at[1])
        margin = lam * r_win - (1 - lam) * r_lose
    else:
        low = mp.mpf(0) if name.endswith("asym") else 1 / (1 + clip) - 1
        lam = 1 + min(max(at[0] - at[1], low), clip)
        margin = lam * r_win - r_lose
        if name in V1:  # Eq 25, its parenthesis closed where the value stays DPO's
            margin -= (lam - 1) * (bar_win - ref_win)
    return -mp.log(1 / (1 + mp.exp(-beta * margin)))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("detach", [True, False])
def test_formula_of_the_audit_is_the_printed_one_and_its_derivative(name, detach):
    with mp.workdps(60):
        for point in [(-3, -4, -2, -5), (-7, -6.75, -9, -1), (-12, -11, -1, -30), (-0.5, -9, -2, -0.25)]:
            logps, settings = [mp.mpf(x) for x in point], (mp.mpf("0.7"), mp.mpf("1.3"), detach)
            win, lose, *ref = logps
            clip = {"clip": settings[1]} if name in NAIVE else {}
            [row] = formula(name, [logps], beta=settings[0], detach_lambda=detach, **clip)
            value, d_win, d_lose = (number for number, _ in row)
            printed = functools.partial(as_printed, name)
            assert mp.almosteq(value, printed(*logps, *settings, win, lose), rel_eps=1e-50)
            numeric = mp.diff(lambda w: printed(w, lose, *ref, *settings, win, lose), win)  # noqa: B023
            assert mp.almosteq(d_win, numeric, rel_eps=1e-25)
            numeric = mp.diff(lambda x: printed(win, x, *ref, *settings, win, lose), lose)  # noqa: B023
            assert mp.almosteq(d_lose, numeric, rel_eps=1e-25)


# --- the forms one would write first, and where they fail -------------------------------------------------------------


def test_naive_log_of_sigmoid_loses_small_losses_and_overflows_on_large_ones():
    margin = torch.tensor([800.0, 40.0, -800.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(3, dtype=torch.float64)
    naive = -torch.sigmoid(margin).log()
    assert naive.tolist() == [0.0, 0.0, math.inf]
    # the margin goes into whichever log-prob keeps all four at most 0
    good = LOSSES["dpo"](margin.clamp(max=0), -margin.clamp(min=0), zero, zero)
    assert good.tolist() == pytest.approx([0.0, math.exp(-40), 800.0], rel=1e-12)
    assert torch.autograd.grad(naive.sum(), margin)[0].isnan().tolist() == [False, False, True]
    assert torch.autograd.grad(good.sum(), margin)[0].tolist() == pytest.approx([0.0, -math.exp(-40), -1.0], rel=1e-12)


def test_naive_subtraction_loses_the_smaller_share():
    typed = textbook(share_win, lambda *x: 1 - share_win(*x))
    assert "gradient by policy_rejected_logps" in check(typed, "bdpo", only=lambda s: s["detach_lambda"])


def test_eq_28_as_typed_cancels_when_lambda_is_attached():
    assert "gradient by" in check(textbook(share_win, share_lose), "bdpo", only=lambda s: not s["detach_lambda"])


def test_eq_25_as_typed_does_not_keep_the_value_to_the_last_bit():
    def typed(win, lose, ref_win, ref_lose, *, beta, clip):
        lam = lambda_asym(win, lose, ref_win, ref_lose, clip).detach()
        detached = (lam - 1) * (win.detach() - ref_win)
        return -logsigmoid(beta * (lam * (win - ref_win) - (lose - ref_lose) - detached))

    settings = {"beta": 1.0, "clip": 1e4}
    logps = torch.stack(domain("nbdpo_asym"))
    value, *gradients = value_and_gradients(typed, logps, **settings)
    ours, *our_gradients = value_and_gradients(LOSSES["nbdpo_asym"], logps, **settings)
    assert not torch.equal(value, LOSSES["dpo"](*logps))
    assert torch.equal(ours, LOSSES["dpo"](*logps))
    for typed_gradient, gradient in zip(gradients, our_gradients, strict=True):  # the same loss all the same
        torch.testing.assert_close(typed_gradient, gradient, rtol=1e-6, atol=1e-300)


# --- gradients by a second route: central differences of the loss itself ----------------------------------------------


def moderate(n: int = 12) -> tuple[Tensor, ...]:
    """Pairs away from the kinks of λ, with margins that neither saturate nor vanish."""
    generator = torch.Generator().manual_seed(1)
    logps = -1 - 3 * torch.rand(4, n, generator=generator, dtype=torch.float64)
    gap = logps[0] - logps[1]
    clear = ((gap.abs() > 0.01) & ((gap - 0.5).abs() > 0.01) & ((gap + 1 / 3).abs() > 0.01)).nonzero().flatten()
    return tuple(x[clear] for x in logps)


@pytest.mark.parametrize("name", ["dpo", *V2, "bdpo"])
def test_attached_gradients_and_hessians_agree_with_central_differences(name):
    logps = [x.requires_grad_() for x in moderate()]  # by the references too
    loss = functools.partial(LOSSES[name], beta=0.7, detach_lambda=False)
    assert torch.autograd.gradcheck(loss, logps)
    assert torch.autograd.gradgradcheck(loss, logps)


@pytest.mark.parametrize("name", [*NAIVE, "bdpo"])
def test_detached_gradients_agree_with_central_differences_at_frozen_lambda(name):
    win, lose, ref_win, ref_lose = moderate()
    at = (win, lose, ref_win, ref_lose, 0.5)
    lam_win, lam_lose = (share_win(*at), share_lose(*at)) if name == "bdpo" else (LAMBDA[name](*at), one())
    kept = (lam_win - 1) * (win - ref_win) if name in V1 else 0.0

    def frozen(w, x):
        return -logsigmoid(0.7 * (lam_win * (w - ref_win) - lam_lose * (x - ref_lose) - kept))

    step = 1e-5
    differences = [
        (frozen(win + step, lose) - frozen(win - step, lose)) / (2 * step),
        (frozen(win, lose + step) - frozen(win, lose - step)) / (2 * step),
    ]
    gradients = value_and_gradients(LOSSES[name], torch.stack(moderate()), beta=0.7)[1:]
    for gradient, difference in zip(gradients, differences, strict=True):
        torch.testing.assert_close(gradient, difference, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", [*NAIVE, "bdpo"])
def test_a_detached_gradient_is_not_the_derivative_of_the_value(name):
    win, lose, *ref = moderate()
    logps = [win.requires_grad_(), lose.requires_grad_()]
    assert not torch.autograd.gradcheck(lambda w, x: LOSSES[name](w, x, *ref, beta=0.7), logps, raise_exception=False)


# --- what the losses are, as properties -------------------------------------------------------------------------------

log_prob = st.floats(-9, math.log10(2000)).map(lambda e: -(10**e))
pair = st.tuples(log_prob, log_prob, log_prob, log_prob).map(lambda x: torch.tensor(x, dtype=torch.float64)[:, None])
beta_ = st.floats(-3, 1).map(lambda e: 10**e)
clip_ = st.floats(0, 100)
detach_ = st.booleans()
each_loss = pytest.mark.parametrize("name", LOSSES)


def close(a: Tensor | float, b: Tensor | float, relative: float = RELATIVE, absolute: float = UNDERFLOW) -> None:
    a, b = (torch.as_tensor(x, dtype=torch.float64).expand(1) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=relative, atol=absolute)


@given(x=pair, beta=beta_)
def test_dpo_with_the_pair_turned_round_differs_by_the_margin(x, beta):
    w, lose, rw, rlose = x
    margin = beta * ((w - rw) - (lose - rlose))
    close(LOSSES["dpo"](lose, w, rlose, rw, beta=beta) - LOSSES["dpo"](*x, beta=beta), margin, absolute=1e-9)


@pytest.mark.parametrize(("name", "notices"), [(name, name in (*V2, "bdpo")) for name in LOSSES])
def test_a_shared_prefix_in_both_responses(name, notices):
    logps = tensors(-7, -7.25, -6, -9)
    prefix = tensors(-2, -2, -1.5, -1.5)  # its log-prob under policy and reference
    for with_it, without in zip(
        value_and_gradients(LOSSES[name], logps + prefix), value_and_gradients(LOSSES[name], logps), strict=True
    ):
        assert torch.equal(with_it, without) is not notices


@given(x=pair, beta=beta_, clip=clip_, detach=detach_)
def test_v1_has_the_value_of_dpo_to_the_last_bit_and_one_gradient_in_either_reading(x, beta, clip, detach):
    dpo, _, dpo_lose = value_and_gradients(LOSSES["dpo"], x, beta=beta)
    for name in V1:
        value, win, lose = value_and_gradients(LOSSES[name], x, beta=beta, clip=clip, detach_lambda=detach)
        assert torch.equal(value, dpo)
        assert torch.equal(lose, dpo_lose)
        assert torch.equal(win, value_and_gradients(LOSSES[name], x, beta=beta, clip=clip)[1])


def test_v1_second_derivatives_do_see_whether_lambda_is_detached():
    def second(detach):
        win = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
        rest = (torch.tensor(x, dtype=torch.float64) for x in (-2.25, -1.0, -3.0))
        (slope,) = torch.autograd.grad(LOSSES["nbdpo_asym"](win, *rest, detach_lambda=detach), win, create_graph=True)
        return torch.autograd.grad(slope, win)[0].item()

    # margin -1.75, λ = 1.25; attached, (λ - 1)(log π - its detached copy) adds 2 λ' = 2 to the curvature of the margin
    pull = 1 / (1 + math.exp(-1.75))
    curvature = 1.25**2 * pull * (1 - pull)
    assert second(True) == pytest.approx(curvature, rel=1e-12)
    assert second(False) == pytest.approx(curvature - 2 * pull, rel=1e-12)


@given(x=pair, beta=beta_)
def test_clip_zero_is_dpo(x, beta):
    for name in NAIVE:
        ours = value_and_gradients(LOSSES[name], x, beta=beta, clip=0)
        for a, b in zip(ours, value_and_gradients(LOSSES["dpo"], x, beta=beta), strict=True):
            assert torch.equal(a, b)


@each_loss
@settings(max_examples=40)
@given(x=pair, beta=beta_)
def test_detached_gradients_never_push_the_winner_down_or_the_loser_up(name, x, beta):
    value, win, lose = value_and_gradients(LOSSES[name], x, beta=beta)
    assert value >= 0
    assert win <= 0 <= lose


def test_attached_v2_pushes_the_winner_down_and_the_loser_up():
    logps = torch.tensor([[-5.0], [-5.25], [-2.0], [-5.0]], dtype=torch.float64)  # λ = 1.25, log-ratio of the winner -3
    for name in V2:
        _, win, lose = value_and_gradients(LOSSES[name], logps, detach_lambda=False)
        margin = 1.25 * -3 + 0.25
        pull = 1 / (1 + math.exp(margin))
        close(win, -pull * (1.25 - 3))
        close(lose, pull * (1 - 3))
        assert win > 0 > lose


@each_loss
@settings(max_examples=40)
@given(x=pair, beta=beta_, clip=clip_)
def test_the_ratio_of_the_gradients_is_the_ratio_of_the_weights(name, x, beta, clip):
    w, lose = x[:2]
    settings = {"clip": clip} if name in NAIVE else {}
    ratio = {"dpo": torch.ones(1), "bdpo": lose / w}.get(name)
    if ratio is None:
        ratio = LAMBDA[name](*x, clip)
    for detach in (True,) if name in V2 else (True, False):
        _, d_win, d_lose = value_and_gradients(LOSSES[name], x, beta=beta, detach_lambda=detach, **settings)
        close(-d_win, ratio * d_lose, absolute=1e-290)


@each_loss
@settings(max_examples=40)
@given(x=pair, beta=beta_, detach=detach_)
def test_at_the_reference_every_loss_is_log_two(name, x, beta, detach):
    start = torch.stack([x[0], x[1], x[0], x[1]])
    close(LOSSES[name](*start, beta=beta, detach_lambda=detach), math.log(2))


@given(x=pair, beta=beta_)
def test_bdpo_gradient_ratio_at_the_reference_in_probabilities(x, beta):
    """Eq 30, with the chain rule from log-probs to probabilities, where these do not underflow."""
    win, lose = (-(v.abs() % 500) - 1e-9 for v in x[:2])
    for detach in (True, False):
        start = torch.stack([win, lose, win, lose])
        _, d_win, d_lose = value_and_gradients(LOSSES["bdpo"], start, beta=beta, detach_lambda=detach)
        pi_win, pi_lose = win.exp(), lose.exp()
        close((d_win / pi_win) / (d_lose / pi_lose), -(pi_lose * lose) / (pi_win * win))


@given(x=pair, beta=beta_, scale=st.floats(0.01, 1))
def test_bdpo_value_depends_on_the_policy_through_one_ratio(x, beta, scale):
    w, lose, rw, rlose = x
    value = LOSSES["bdpo"](w, lose, rw, rlose, beta=beta)
    close(LOSSES["bdpo"](scale * w, scale * lose, rw, rlose, beta=beta), value)
    bound = math.log1p(math.exp(beta * rw.item()))  # since the margin is at most |log π_ref(y_w)|
    assert value >= bound * (1 - RELATIVE)


@given(x=pair, beta=beta_)
def test_bdpo_attached_gradient_is_the_detached_one_times_a_factor_of_the_pair(x, beta):
    w, lose, rw, rlose = x
    value, *detached = value_and_gradients(LOSSES["bdpo"], x, beta=beta)
    same_value, *attached = value_and_gradients(LOSSES["bdpo"], x, beta=beta, detach_lambda=False)
    assert torch.equal(value, same_value)
    for a, d in zip(attached, detached, strict=True):
        close(a, d * (rw + rlose) / (w + lose), absolute=1e-290)


@each_loss
@settings(max_examples=40)
@given(x=pair, y=pair, beta=beta_, detach=detach_)
def test_a_pair_does_not_see_its_batch(name, x, y, beta, detach):
    settings = {"beta": beta, "detach_lambda": detach}
    together = value_and_gradients(LOSSES[name], torch.cat([x, y], dim=1), **settings)
    alone = [value_and_gradients(LOSSES[name], z, **settings) for z in (x, y)]
    for a, *parts in zip(together, *alone, strict=True):
        torch.testing.assert_close(a, torch.cat(parts), rtol=1e-14, atol=UNDERFLOW)


# --- named edges ------------------------------------------------------------------------------------------------------

each_reading = pytest.mark.parametrize("detach", [True, False])


def tensors(*logps: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(logps, dtype=dtype)[:, None]


@each_loss
@each_reading
def test_equal_pair(name, detach):
    """One response twice: the margin is 0, λ is 1, the shares are ½; what pulls the two apart is the bare weight."""
    value, win, lose = value_and_gradients(LOSSES[name], tensors(-7, -7, -5, -5), beta=2.0, detach_lambda=detach)
    weight = 0.5 if name == "bdpo" else 1.0
    if not detach and name == "bdpo":
        weight *= (-5 - 5) / (-7 - 7)
    if not detach and name in V2:  # also asymmetric, where an equal pair lies on the clip: the derivative from inside
        weight += -7 - -5
    close(value, math.log(2))
    close(win, -weight)  # β σ(0) = 1
    close(lose, weight)


@each_loss
@each_reading
@pytest.mark.parametrize("at", [-2000.0, -1e-9])
def test_equal_pair_at_the_ends_of_the_domain(name, detach, at):
    value, win, lose = value_and_gradients(LOSSES[name], tensors(at, at, at, at), detach_lambda=detach)
    close(value, math.log(2))
    close(win, -0.25 if name == "bdpo" else -0.5)
    close(lose, -win)


@each_reading
def test_a_gap_on_the_clip_has_the_derivative_from_inside(detach):
    on, beyond = tensors(-3, -3.5, -1, -2), tensors(-3, -3.5 - 1e-12, -1, -2)
    for name in V2:
        ours, past = (value_and_gradients(LOSSES[name], x, detach_lambda=detach)[1].item() for x in (on, beyond))
        pull = 1 / (1 + math.exp(1.5 * -2 + 1.5))
        assert ours == pytest.approx(-pull * (1.5 if detach else 1.5 - 2), rel=1e-12)
        assert past == pytest.approx(-pull * 1.5, rel=1e-9)


@each_loss
@each_reading
def test_extreme_margins_neither_overflow_nor_lose_their_slope(name, detach):
    lost = tensors(-2000, -1e-9, -1e-9, -2000)  # log-ratios of -2000 and 2000
    value, win, lose = value_and_gradients(LOSSES[name], lost, beta=10.0, detach_lambda=detach)
    lam_win, lam_lose = {"bdpo": (0, 1), "nbdpo_v2_sym": (1 / 1.5, 1)}.get(name, (1, 1))
    close(value, 10 * (lam_win * 2000 + lam_lose * 2000))
    close(lose, 10 * lam_lose)  # the sigmoid is 1, and no reading differs this far out
    assert win.isfinite()
    won = tensors(-1e-9, -2000, -2000, -1e-9)
    for x in value_and_gradients(LOSSES[name], won, beta=10.0, detach_lambda=detach):
        assert x == 0  # exp(-20000) and less: float64 ends at exp(-745)


@each_reading
def test_bdpo_with_both_log_probs_zero_takes_shares_of_one_half(detach):
    """λ_w has no limit there; ½ is its value along all equal pairs. A zero of either sign is the same."""
    for zeros in [(0.0, 0.0), (-0.0, 0.0), (0.0, -0.0)]:
        value, win, lose = value_and_gradients(LOSSES["bdpo"], tensors(*zeros, -3, -1), detach_lambda=detach)
        pull = 1 / (1 + math.exp(0.5 * 3 - 0.5 * 1))
        close(value, math.log1p(math.exp(-1)))
        close(win, -pull / 2 if detach else 0)
        close(lose, pull / 2 if detach else 0)
    near = value_and_gradients(LOSSES["bdpo"], tensors(-1e-9, -1e-9, -3, -1), detach_lambda=detach)
    close(near[0], math.log1p(math.exp(-1)))


@each_loss
@each_reading
def test_zero_log_probs_are_finite_and_the_limit_where_there_is_one(name, detach):
    for zero_at in [(0,), (1,), (2,), (3,), (0, 2), (1, 3), (2, 3), (0, 3)]:
        exact, near = (
            torch.tensor([[at if i in zero_at else -1.75 - i] for i in range(4)], dtype=torch.float64)
            for at in (0.0, -1e-300)
        )
        for a, b in zip(
            value_and_gradients(LOSSES[name], exact, detach_lambda=detach),
            value_and_gradients(LOSSES[name], near, detach_lambda=detach),
            strict=True,
        ):
            close(a, b, relative=1e-14, absolute=1e-299)
    assert all(x.isfinite().all() for x in value_and_gradients(LOSSES[name], torch.zeros(4, 1), detach_lambda=detach))


@each_loss
def test_empty_batch_and_single_pair_without_a_batch(name):
    assert LOSSES[name](*torch.zeros(4, 0)).shape == (0,)
    assert LOSSES[name](*torch.zeros(4, 3, 0, 2)).shape == (3, 0, 2)
    assert LOSSES[name](*-torch.ones(4)).shape == ()


@each_loss
@each_reading
def test_any_shapes_that_broadcast(name, detach):
    generator = torch.Generator().manual_seed(2)
    shapes = [(5, 1, 3), (4, 1), (), (2, 1, 1, 3)]
    logps = [(-4 * torch.rand(s, generator=generator, dtype=torch.float64)).requires_grad_() for s in shapes]
    value = LOSSES[name](*logps, detach_lambda=detach)
    expanded = [x.detach().expand(2, 5, 4, 3).clone().requires_grad_() for x in logps]
    full = LOSSES[name](*expanded, detach_lambda=detach)
    assert value.shape == (2, 5, 4, 3)
    assert torch.equal(value, full)
    gradients = torch.autograd.grad(value.sum(), logps[:2])
    for x, gradient, wide in zip(logps, gradients, torch.autograd.grad(full.sum(), expanded[:2]), strict=False):
        torch.testing.assert_close(gradient, wide.sum_to_size(x.shape), rtol=1e-12, atol=1e-14)


@each_loss
@each_reading
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_finite_and_float32_inside(name, detach, dtype):
    points = [0.0, -1e-9, -1e-3, -1.0, -64.0, -2000.0]
    logps = torch.tensor(list(itertools.product(points, repeat=4)), dtype=torch.float64).T
    if dtype is torch.float16 and not detach:  # gradients of bDPO and v2 that a float16 can hold
        logps = logps[:, (logps[:2] < -0.5).all(dim=0)]
    low = logps.to(dtype)
    for beta in (1e-3, 0.1, 1.0, 10.0):
        got = value_and_gradients(LOSSES[name], low, beta=beta, detach_lambda=detach)
        wide = value_and_gradients(LOSSES[name], low.float(), beta=beta, detach_lambda=detach)
        for a, b in zip(got, wide, strict=True):
            assert a.dtype is dtype
            assert a.isfinite().all()
            assert torch.equal(a, b.to(dtype))


@each_loss
def test_float32_agrees_with_float64_at_training_scale(name):
    generator = torch.Generator().manual_seed(3)
    reference = -200 * torch.rand(2, 500, generator=generator)
    policy = (reference + torch.randn(2, 500, generator=generator)).clamp(max=-1e-3)
    logps = torch.cat([policy, reference])
    for a, b in zip(
        value_and_gradients(LOSSES[name], logps, beta=0.1),
        value_and_gradients(LOSSES[name], logps.double(), beta=0.1),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=0)


# --- bad input --------------------------------------------------------------------------------------------------------


def call(name: str = "dpo", position: int | None = None, bad: object = None, **settings):
    logps: list = [torch.tensor([-1.0, -2.0]) for _ in range(4)]
    if position is not None:
        logps[position] = bad
    return LOSSES[name](*logps, **settings)


@each_loss
@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize(("value", "shown"), [(0.5, "0.5"), (math.nan, "nan"), (-math.inf, "-inf"), (math.inf, "inf")])
def test_log_probs_outside_the_domain_are_refused_by_name(name, position, value, shown):
    with pytest.raises(ValueError, match=rf"^{ARGUMENTS[position]} contains {shown}: .*finite and at most 0; pass"):
        call(name, position, torch.tensor([-1.0, value]))


@each_loss
@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (-1.0, "is a float: it must be a tensor; wrap it"),
        ([-1.0, -2.0], "is a list: it must be a tensor; wrap it"),
        (None, "is a NoneType: it must be a tensor; wrap it"),
        (torch.tensor([-1, -2]), r"has dtype torch\.int64: log-probs are floating-point; convert"),
        (torch.tensor([True, False]), r"has dtype torch\.bool: log-probs are floating-point; convert"),
        (torch.tensor([-1j, -2]), r"has dtype torch\.complex64: log-probs are floating-point; convert"),
        (torch.tensor([-1.0, -2.0]).double(), r"has dtype torch\.float64.*: the dtypes must agree; convert"),
    ],
    ids=["number", "list", "none", "integers", "booleans", "complex", "mixed"],
)
def test_what_is_no_tensor_of_log_probs_is_refused_by_name(name, position, bad, message):
    with pytest.raises(TypeError, match=f"{ARGUMENTS[position]} {message}"):
        call(name, position, bad)


@each_loss
@pytest.mark.parametrize("position", range(4))
def test_shapes_and_devices_that_do_not_fit_are_refused_by_name(name, position):
    with pytest.raises(ValueError, match=rf"{ARGUMENTS[position]} has shape torch\.Size\(\[3\]\).*broadcast; give"):
        call(name, position, -torch.ones(3))
    with pytest.raises(ValueError, match=f"{ARGUMENTS[position]} has device meta.*must agree; move"):
        call(name, position, torch.ones(2, device="meta"))


@each_loss
@pytest.mark.parametrize("beta", [0, 0.0, -0.1, math.inf, math.nan])
def test_beta_outside_its_range_is_refused(name, beta):
    with pytest.raises(ValueError, match=rf"^beta = {beta!r}: it must be finite and above 0; 0\.1 is customary"):
        call(name, beta=beta)


@each_loss
@pytest.mark.parametrize("beta", ["0.1", None, True, 1j, torch.tensor(0.1)])
def test_beta_of_the_wrong_type_is_refused(name, beta):
    with pytest.raises(TypeError, match=rf"^beta = {re.escape(repr(beta))}: it must be a number, .*; pass a float"):
        call(name, beta=beta)


@pytest.mark.parametrize("name", NAIVE)
def test_clip_outside_its_range_is_refused(name):
    for clip in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=rf"^clip = {clip!r}: it must be finite and at least 0; 0 gives DPO"):
            call(name, clip=clip)
    with pytest.raises(TypeError, match=r"^clip = '1': it must be a number, not a str; pass a float"):
        call(name, clip="1")


@each_loss
def test_detach_lambda_is_a_truth_value(name):
    with pytest.raises(TypeError, match=r"^detach_lambda = 'no': it must be True or False"):
        call(name, detach_lambda="no")


@pytest.mark.parametrize("name", ["dpo", "bdpo"])
def test_a_loss_without_a_clip_does_not_take_one(name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'clip'"):
        call(name, clip=0.5)


# --- inside other machinery -------------------------------------------------------------------------------------------


@each_loss
@each_reading
def test_under_vmap_and_function_transforms(name, detach):
    logps = torch.stack(moderate())
    loss = functools.partial(LOSSES[name], beta=0.3, detach_lambda=detach)
    value, win, lose = value_and_gradients(LOSSES[name], logps, beta=0.3, detach_lambda=detach)
    torch.testing.assert_close(torch.func.vmap(loss)(*logps), value)
    per_pair = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(*logps)
    torch.testing.assert_close(per_pair, (win, lose))
    shared = torch.func.vmap(loss, in_dims=(0, 0, None, None))(*logps[:2], logps[2, 0], logps[3, 0])
    torch.testing.assert_close(shared, loss(*logps[:2], logps[2, 0], logps[3, 0]))
    hessian = torch.func.jacrev(torch.func.grad(loss))(*logps[:, 0])
    first = logps[0, 0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(first, *logps[1:, 0]), first, create_graph=True)
    torch.testing.assert_close(hessian, torch.autograd.grad(slope, first)[0])


@each_loss
def test_values_are_looked_at_under_vmap_too(name):
    logps = -torch.ones(4, 5)
    logps[2, 3] = 0.25
    for transformed in (LOSSES[name], torch.func.grad(LOSSES[name])):
        with pytest.raises(ValueError, match=r"ref_chosen_logps contains 0\.25"):
            torch.func.vmap(transformed)(*logps)


@pytest.mark.parametrize("name", ["dpo", "nbdpo_sym", "bdpo"])
def test_compiles_to_one_graph(name):
    logps = torch.stack(moderate())
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="eager")
    for a, b in zip(
        value_and_gradients(compiled, logps, beta=0.3), value_and_gradients(LOSSES[name], logps, beta=0.3), strict=True
    ):
        torch.testing.assert_close(a, b)
    for beta in (0.2, 0.1):  # a schedule
        torch.testing.assert_close(compiled(*logps, beta=beta), LOSSES[name](*logps, beta=beta))
    with pytest.raises(Exception, match="must agree"):  # types, shapes and settings are still checked
        compiled(*logps[:3], logps[3].float())


@each_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_warning_and_the_annotated_types(name, dtype):
    @jaxtyped(typechecker=beartype)
    def typed(win: Batch, lose: Batch, ref_win: Batch, ref_lose: Batch, reduce: bool) -> Batch:
        loss = LOSSES[name](win, lose, ref_win, ref_lose)
        return loss.sum() if reduce else loss

    logps = -torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(4)).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        beartyped = beartype(LOSSES[name])(*logps)
        assert torch.equal(typed(*logps, reduce=False), beartyped)
        beartyped.sum()
    assert beartyped.dtype is dtype
    with pytest.raises(Exception, match="return value"):
        typed(*logps, reduce=True)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_examples_on_the_page_run(root):
    page = (root / "book" / "losses.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert len(examples) >= 2
    scope: dict = {}
    for example in examples:
        exec(compile(example, "book/losses.md", "exec"), scope)
    assert scope["last"] < scope["first"]  # the training loop on the page learns


def test_the_page_names_every_loss_and_every_default(root):
    page = (root / "book" / "losses.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| \d[\d, ]* \| \$", page, flags=re.MULTILINE) == list(LOSSES)
    for name, loss in LOSSES.items():
        defaults = EVERY[name].settings
        clip = {"clip": 0.5} if name in NAIVE else {}
        assert defaults == {"beta": 1.0, **clip, "detach_lambda": True}
        assert all(f"| `{keyword}` | {default} |" in page for keyword, default in defaults.items())
        for section in ("Parameters\n", "Returns\n", "Raises\n", "Source: Eq"):
            assert section in (loss.__doc__ or "")
