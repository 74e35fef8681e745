"""What every objective does with shapes, dtypes, transformations and wrong input, and the edges of the ones beside the
paper's six, named one by one."""

import functools
import math
import warnings

import pytest
import torch
from beartype import beartype
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from bdpo.losses import (
    LOSSES,
    PAIRS,
    PAPER,
    alpha_dpo,
    beta_dpo,
    beta_dpo_filter,
    conservative_dpo,
    cpo,
    dpo,
    dpo_sft,
    hinge,
    ipo,
    kto,
    kto_kl,
    kto_pair,
    log_ratio_margin,
    orpo,
    reward_bt,
    rlhf_tabular,
    robust_dpo,
    simpo,
    slic,
)
from bdpo.losses.audit import COUPLED, leaves
from bdpo.losses.mutants import log_odds

OTHERS = [name for name in LOSSES if name not in PAPER]
LOG_PROBS = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
each = pytest.mark.parametrize("name", OTHERS)


def arguments(name, *shape, dtype=torch.float64, seed=0):
    """Arguments of a loss away from its corners, in the order of its signature."""
    g = torch.Generator().manual_seed(seed)
    rand = functools.partial(torch.rand, generator=g, dtype=torch.float64)
    responses = (*shape, 5)
    drawn = {
        **{n: (-1 - 30 * rand(shape)).to(dtype) for n in (*LOG_PROBS[:2], "policy_logps")},
        **{n: (-9 - 30 * rand(shape)).to(dtype) for n in (*LOG_PROBS[2:], "ref_logps")},  # means of log-ratios above 0
        **{n: torch.randint(1, 40, shape, generator=g) for n in ("chosen_lengths", "rejected_lengths")},
        **{n: (3 * rand(shape) - 1).to(dtype) for n in ("chosen_rewards", "rejected_rewards")},
        **{n: (4 * rand(responses) - 2).to(dtype) for n in ("logits", "ref_logits", "rewards")},
        "desirable": rand(shape) < 0.5,
        **{n: torch.tensor(v, dtype=dtype) for n, v in (("margin_mean", -20.0), ("margin_std", 1.7), ("kl", 0.4))},
    }
    return [drawn[need] for need in LOSSES[name].needs]


def value_and_gradients(name, given, **settings):
    inputs = [x.clone().requires_grad_() if i in leaves(name) else x for i, x in enumerate(given)]
    value = LOSSES[name](*inputs, **settings)
    return value.detach(), *torch.autograd.grad(value.sum(), [inputs[i] for i in leaves(name)])


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(a, b, rtol=1e-12, atol=0.0):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=rtol, atol=atol
    )


# --- every objective: shapes, dtypes, transformations -----------------------------------------------------------------


@each
def test_one_loss_a_row_in_the_shape_and_the_dtype_given(name):
    for shape in ((7,), (2, 3), (0,), (3, 0, 2)):
        value = LOSSES[name](*arguments(name, *shape))
        assert value.shape == shape
        assert value.dtype is torch.float64
    assert LOSSES[name](*arguments(name)).shape == ()


@each
def test_shapes_broadcast(name):
    given = arguments(name, 4, 3)
    given[1] = given[1][:1]  # one rejected response, reference or reward for four rows
    value, *_ = value_and_gradients(name, given)
    full = [given[0], given[1].expand_as(given[0]).clone(), *given[2:]]
    torch.testing.assert_close(value, value_and_gradients(name, full)[0])


@pytest.mark.parametrize("name", [n for n in OTHERS if n not in COUPLED])
def test_a_row_does_not_see_its_batch(name):
    given = arguments(name, 6)
    together = value_and_gradients(name, given)
    for i in range(6):
        alone = value_and_gradients(name, [x[i : i + 1] if x.dim() else x for x in given])
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b[i : i + 1], rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize("name", COUPLED)
def test_a_coupled_pair_sees_its_batch(name):
    given = arguments(name, 6)
    halves = [LOSSES[name](*(x[part] if x.dim() else x for x in given)) for part in (slice(0, 3), slice(3, 6))]
    assert not torch.allclose(torch.cat(halves), LOSSES[name](*given))


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_inside_and_comes_back(name, dtype):
    given = arguments(name, 50, dtype=dtype)
    wide = [x.float() if x.dtype is dtype else x for x in given]
    for a, b in zip(value_and_gradients(name, given), value_and_gradients(name, wide), strict=True):
        assert a.dtype is dtype
        assert a.isfinite().all()
        assert torch.equal(a, b.to(dtype))


@each
def test_float32_agrees_with_float64_at_training_scale(name):
    given = arguments(name, 500)
    low = [x.float() if x.is_floating_point() else x for x in given]
    same = [x.double() if x.is_floating_point() else x for x in low]
    for a, b in zip(value_and_gradients(name, low), value_and_gradients(name, same), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", [n for n in PAIRS if n not in PAPER])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_extreme_log_probs_give_no_nan_and_no_infinity(name, dtype):
    edges = torch.tensor([-2000.0, -700.0, -1.0, -1e-9, 0.0][: 4 if name == "orpo" else 5], dtype=torch.float64)
    grid = torch.cartesian_prod(*[edges] * 4).T.to(dtype)
    needs = LOSSES[name].needs
    rest = {"chosen_lengths": torch.tensor(1), "rejected_lengths": torch.tensor(1000), "margin_mean": torch.tensor(0.0)}
    given = [*grid[: 4 if "ref_chosen_logps" in needs else 2]]
    given += [{**rest, "margin_std": torch.tensor(0.01)}[need] for need in needs[len(given) :]]
    for x in value_and_gradients(name, given):
        assert x.isfinite().all()


@each
def test_gradients_and_hessians_agree_with_central_differences(name):
    detached = {"alpha_dpo": {"alpha": 0.0}, "beta_dpo": {"alpha": 0.0}, "kto_pair": {"detach_kl": False}}
    given = [x.double() if x.is_floating_point() else x for x in arguments(name, 6, seed=3)]
    inputs = [x.requires_grad_() if i in leaves(name) else x for i, x in enumerate(given)]
    loss = functools.partial(LOSSES[name].function, **detached.get(name, {}))
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("name", ["alpha_dpo", "beta_dpo", "kto_pair"])
def test_what_is_detached_makes_the_gradient_another_than_that_of_the_value(name):
    given = [x.requires_grad_() if i in leaves(name) else x for i, x in enumerate(arguments(name, 6, seed=3))]
    assert not torch.autograd.gradcheck(LOSSES[name].function, given, raise_exception=False)


@each
def test_under_vmap_and_function_transforms(name):
    given = arguments(name, 6)
    dims = tuple(0 if x.dim() else None for x in given)
    batch = [x.reshape(-1, 1, *x.shape[1:]) if x.dim() else x for x in given]  # a batch of one a row, for the coupled
    mapped = torch.func.vmap(LOSSES[name].function, in_dims=dims)(*batch)
    rows = [LOSSES[name](*(x[i : i + 1] if x.dim() else x for x in given)) for i in range(6)]
    torch.testing.assert_close(mapped, torch.stack(rows))
    gradient = torch.func.grad(lambda *a: LOSSES[name](*a).sum(), argnums=leaves(name))
    expected = [value_and_gradients(name, [x[i : i + 1] if x.dim() else x for x in given])[1:] for i in range(6)]
    for got, wanted in zip(torch.func.vmap(gradient, in_dims=dims)(*batch), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(wanted))


@each
def test_values_are_looked_at_under_vmap(name):
    given = arguments(name, 6)
    bad = leaves(name)[0]
    given[bad].view(-1)[0] = math.nan
    dims = tuple(0 if x.dim() else None for x in given)
    with pytest.raises(ValueError, match=f"{LOSSES[name].needs[bad]} contains nan"):
        torch.func.vmap(LOSSES[name].function, in_dims=dims)(*given)


@pytest.mark.parametrize(
    "name",
    ["ipo", "robust_dpo", "dpo_sft", "simpo", "orpo", "alpha_dpo", "beta_dpo", "kto_pair", "kto", "rlhf_tabular"],
)
def test_compiles_to_one_graph(name):
    given = arguments(name, 6)
    compiled = torch.compile(LOSSES[name].function, fullgraph=True, backend="eager")
    inputs = [x.clone().requires_grad_() if i in leaves(name) else x for i, x in enumerate(given)]
    value = compiled(*inputs)
    found = value.detach(), *torch.autograd.grad(value.sum(), [inputs[i] for i in leaves(name)])
    for a, b in zip(found, value_and_gradients(name, given), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(Exception, match="must agree"):  # types, shapes and settings are still checked
        compiled(*given[:1], given[1].float(), *given[2:])


def test_a_spec_itself_compiles_and_calls():
    given = arguments("dpo", 6)
    compiled = torch.compile(LOSSES["dpo"], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given, beta=0.3), dpo(*given, beta=0.3))


@each
def test_no_warning_and_the_annotated_types(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        beartype(LOSSES[name].function)(*arguments(name, 3))


# --- wrong input ------------------------------------------------------------------------------------------------------

BAD_VALUES = {
    **dict.fromkeys(
        (*LOG_PROBS, "policy_logps", "ref_logps"), ((0.5, -math.inf, math.nan), "a log-prob is finite and")
    ),
    **dict.fromkeys(("chosen_lengths", "rejected_lengths"), ((0.0, -1.0, math.nan, math.inf), "at least 1")),
    **dict.fromkeys(
        ("chosen_rewards", "rejected_rewards", "rewards", "logits", "ref_logits", "margin_mean"),
        ((math.nan, math.inf, -math.inf), "must be finite"),
    ),
    "margin_std": ((0.0, -1.0, math.nan), "finite and above 0"),
    "kl": ((-0.5, math.nan, math.inf), "at least 0"),
}


@pytest.mark.parametrize(
    ("name", "need"), [(n, need) for n in OTHERS for need in LOSSES[n].needs if need != "desirable"]
)
def test_every_argument_is_refused_outside_its_domain(name, need):
    values, rule = BAD_VALUES[need]
    for value in values:
        given = arguments(name, 3)
        i = LOSSES[name].needs.index(need)
        given[i] = given[i].double().clone()
        given[i].view(-1)[-1] = value
        with pytest.raises(ValueError, match=rf"^{need} contains {value}: .*{rule}"):
            LOSSES[name](*given)


@pytest.mark.parametrize(("name", "need"), [(n, need) for n in OTHERS for need in LOSSES[n].needs])
def test_every_argument_is_refused_if_it_is_no_tensor_or_of_the_wrong_kind(name, need):
    i = LOSSES[name].needs.index(need)
    given = arguments(name, 3)
    with pytest.raises(TypeError, match=f"^{need} is a float: it must be a tensor; wrap it"):
        LOSSES[name](*given[:i], -1.0, *given[i + 1 :])
    wrong = torch.ones(3, dtype=torch.float64) if need == "desirable" else torch.ones(3, dtype=torch.bool)
    rule = {
        "desirable": "labels are bool",
        **dict.fromkeys(("chosen_lengths", "rejected_lengths", "margin_mean", "margin_std", "kl"), "real numbers"),
    }
    with pytest.raises(TypeError, match=f"^{need} has dtype .*{rule.get(need, 'are floating-point')}"):
        LOSSES[name](*given[:i], wrong, *given[i + 1 :])


@each
def test_dtypes_devices_and_shapes_that_do_not_fit_are_listed(name):
    given = arguments(name, 3)
    first, second = LOSSES[name].needs[:2]
    with pytest.raises(
        TypeError, match=f"{first} has dtype torch.float64, {second} has dtype torch.float32.*must agree"
    ):
        LOSSES[name](given[0], given[1].float(), *given[2:])
    with pytest.raises(ValueError, match=f"{first} has shape .*{second} has shape .*must broadcast"):
        LOSSES[name](given[0], torch.cat([given[1]] * 2), *given[2:])
    with pytest.raises(ValueError, match=f"{first} has device cpu, {second} has device meta.*must agree"):
        LOSSES[name](given[0], given[1].to("meta"), *given[2:])


OUTSIDE = {
    "beta": (0, -1.0, math.inf, math.nan),
    "label_smoothing": (-0.1, 0.5, 1.0, math.nan),
    "beta_min": (0, -1.0, math.inf),
    **dict.fromkeys(("gamma", "alpha", "delta", "sft_weight", "odds_weight"), (-0.1, math.inf, math.nan)),
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), (-0.1, math.inf, math.nan)),
}


@pytest.mark.parametrize(("name", "knob"), [(n, knob) for n in OTHERS for knob in LOSSES[n].settings])
def test_every_setting_is_refused_outside_its_range_and_of_the_wrong_type(name, knob):
    if knob == "detach_kl":
        with pytest.raises(TypeError, match="detach_kl = 1: it must be True or False"):
            LOSSES[name](*arguments(name, 3), detach_kl=1)
        return
    for value in OUTSIDE[knob]:
        with pytest.raises(ValueError, match=f"^{knob} = {value}: "):
            LOSSES[name](*arguments(name, 3), **{knob: value})
    for value in ("0.1", True, None):
        with pytest.raises(TypeError, match=f"^{knob} = {value!r}: it must be a number"):
            LOSSES[name](*arguments(name, 3), **{knob: value})


# --- special cases, to the last bit -----------------------------------------------------------------------------------


def same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("conservative_dpo", "label_smoothing"),
        ("robust_dpo", "label_smoothing"),
        ("beta_dpo", "alpha"),
        ("dpo_sft", "sft_weight"),
    ],
)
def test_switched_off_it_is_dpo(name, off):
    given = arguments(name, 20)
    same(value_and_gradients(name, given, beta=0.3, **{off: 0}), value_and_gradients("dpo", given[:4], beta=0.3))


def test_alpha_dpo_with_alpha_0_is_simpo():
    w, x, rw, rx, n, k, *statistics = arguments("alpha_dpo", 20)
    close(alpha_dpo(w, x, rw, rx, n, k, *statistics, alpha=0), simpo(w, x, n, k), rtol=1e-14)


def test_simpo_of_single_tokens_without_a_target_is_cpo_without_likelihood():
    w, x, n, _ = arguments("simpo", 20)
    ones = torch.ones_like(n)
    assert torch.equal(simpo(w, x, ones, ones, beta=0.3, gamma=0), cpo(w, x, beta=0.3, sft_weight=0))


def test_cpo_without_likelihood_is_dpo_under_a_uniform_reference():
    w, x = arguments("cpo", 20)
    flat = torch.full_like(w, -math.log(7))
    close(cpo(w, x, beta=0.3, sft_weight=0), dpo(w, x, flat, flat, beta=0.3))


def test_hinge_is_slic_on_log_ratios_in_units_of_its_margin():
    w, x, rw, rx = arguments("hinge", 20)
    shifted = w - rw - 40, x - rx - 40  # log-probs of at most 0 with the same gap
    close(hinge(w, x, rw, rx, beta=0.25), 0.25 * slic(*shifted, delta=4.0, sft_weight=0), atol=1e-14)


def test_dpo_is_the_reward_loss_of_its_implicit_rewards():
    w, x, rw, rx = arguments("dpo", 20)
    close(dpo(w, x, rw, rx, beta=0.3), reward_bt(0.3 * (w - rw), 0.3 * (x - rx)))


def test_kto_pair_is_kto_of_both_responses_with_the_reference_points_of_the_other_half():
    w, x, rw, rx = arguments("kto_pair", 20)
    good, bad = torch.ones(20, dtype=torch.bool), torch.zeros(20, dtype=torch.bool)
    winners = kto(w, rw, good, kto_kl(x, rx), beta=0.3)
    losers = kto(x, rx, bad, kto_kl(w, rw), beta=0.3)
    close(kto_pair(w, x, rw, rx, beta=0.3), (winners + losers) / 2)


# --- edges, one by one ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ipo", "hinge", "conservative_dpo", "robust_dpo", "beta_dpo", "dpo_sft", "kto_pair"])
def test_an_equal_pair_at_the_reference_has_margin_0(name):
    same_log_prob = torch.full((4, 3), -7.0, dtype=torch.float64)
    given = [*same_log_prob, *(x for x in arguments(name, 3)[4:])]
    if name == "beta_dpo":
        given[4] = torch.tensor(0.0)
    value = LOSSES[name](*given, beta=0.25, **({"sft_weight": 0} if name == "dpo_sft" else {}))
    expected = {"ipo": 4.0, "hinge": 1.0, "kto_pair": 0.5}.get(name, math.log(2))
    close(value, [expected] * 3)


def test_ipo_is_0_at_its_target_and_pushes_back_beyond():
    margin = numbers(4.0, 5.0, 6.0)
    zero = torch.zeros(3, dtype=torch.float64)
    value, win, lose = value_and_gradients("ipo", [zero, -margin, zero, zero], beta=0.1)
    close(value, [1.0, 0.0, 1.0])
    close(win, [-2.0, 0.0, 2.0])
    close(lose, [2.0, 0.0, -2.0])


def test_hinge_and_slic_have_no_slope_at_the_corner():
    zero, at = torch.zeros(1, dtype=torch.float64), numbers(-4.0)
    same(value_and_gradients("hinge", [zero, at, zero, zero], beta=0.25), [zero, zero, zero])
    same(value_and_gradients("slic", [zero, at], delta=4.0, sft_weight=0.0), [zero, zero, zero])


def test_conservative_dpo_stops_where_the_labels_say_and_robust_dpo_never_does():
    best = math.log(0.8 / 0.2)
    zero = torch.zeros(3, dtype=torch.float64)
    rejected = -numbers(best - 0.1, best, best + 0.1)
    _, win, _ = value_and_gradients("conservative_dpo", [zero, rejected, zero, zero], beta=1.0, label_smoothing=0.2)
    assert win[0] < -1e-3
    assert abs(win[1]) < 1e-15
    assert win[2] > 1e-3
    value, win, _ = value_and_gradients("robust_dpo", [zero, 500 * rejected, zero, zero], beta=1.0, label_smoothing=0.2)
    assert (value < 0).all()
    close(win, [-0.2 / 0.6] * 3)  # the sigmoid is gone, ε / (1 - 2ε) is not


@given(flips=st.integers(0, 49), margin=st.floats(-3, 3))
def test_robust_dpo_averages_over_flipped_labels_to_dpo_and_conservative_dpo_does_not(flips, margin):
    share = flips / 100
    zero = torch.zeros(1, dtype=torch.float64)
    w, x = zero + min(margin, 0.0), zero - max(margin, 0.0)
    clean = dpo(w, x, zero, zero)

    def averaged(loss):
        right, wrong = (loss(*p, zero, zero, beta=1.0, label_smoothing=share) for p in ((w, x), (x, w)))
        return (1 - share) * right + share * wrong

    close(averaged(robust_dpo), clean, rtol=1e-9)
    if share > 0.02 and abs(margin) > 0.1:
        assert abs(averaged(conservative_dpo) - clean) > 1e-4


def test_one_minus_sigmoid_loses_small_losses_of_kto_and_a_plain_sigmoid_loses_slopes():
    lost = numbers(-50.0).requires_grad_()  # desirable, and 50 nats below the reference: a slope of exp(-50)
    won = torch.zeros(1, dtype=torch.float64)
    good, zero = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.float64)
    assert (1 - (won - numbers(-50.0)).sigmoid()).item() == 0.0
    close(kto(won, numbers(-50.0), good, torch.tensor(0.0), beta=1.0), [math.exp(-50)])
    assert torch.autograd.grad((-lost).sigmoid().sum(), lost)[0].item() == 0.0
    _, slope = value_and_gradients("kto", [lost.detach(), zero, good, torch.tensor(0.0)], beta=1.0)
    close(slope, [-math.exp(-50)])


def test_kto_weights_and_reference_point():
    zero, good = torch.zeros(2, dtype=torch.float64), torch.tensor([True, False])
    policy = numbers(-1.0, -1.0)
    value = kto(policy, zero, good, torch.tensor(0.5), beta=2.0, desirable_weight=3.0, undesirable_weight=5.0)
    close(value, [3 / (1 + math.exp(-3.0)), 5 / (1 + math.exp(3.0))])


def test_kto_kl_is_a_clamped_mean_without_a_gradient():
    policy, ref = numbers(-3.0, -1.0).requires_grad_(), numbers(-4.0, -1.5)
    assert kto_kl(policy, ref).item() == 0.75
    assert not kto_kl(policy, ref).requires_grad
    assert kto_kl(ref, policy).item() == 0.0
    assert kto_kl(policy.half(), ref.half()).dtype is torch.float16
    with pytest.raises(ValueError, match="policy_logps is empty"):
        kto_kl(torch.zeros(0), torch.zeros(0))


def test_kto_does_not_pass_gradients_to_its_reference_point():
    kl = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    p, r, good, _ = arguments("kto", 4)
    assert not kto(p, r, good, kl).requires_grad


def test_kto_pair_at_the_reference_where_the_clamp_has_its_corner():
    """At step 0 both means are 0. The derivative of the clamp is 1 there: attached, twice the pull on each side."""
    start = [numbers(-3.0, -5.0), numbers(-4.0, -2.0)] * 2
    _, win, lose = value_and_gradients("kto_pair", start, beta=2.0)
    close(win, [-0.25] * 2)  # β σ(0) σ(0) / 2
    _, win, lose = value_and_gradients("kto_pair", start, beta=2.0, detach_kl=False)
    close(win, [-0.5] * 2)
    close(lose, [0.5] * 2)


def test_kto_pair_of_pairs_that_broadcast_counts_every_pair_once():
    w, x, rw, rx = arguments("kto_pair", 4)
    wide = kto_pair(w, x[:1], rw, rx[:1])
    torch.testing.assert_close(wide, kto_pair(w, x[:1].expand(4), rw, rx[:1].expand(4)))


def test_orpo_near_certainty_where_log_of_one_minus_exp_is_minus_infinity():
    log_p = torch.tensor([-1e-9, -1e-6, -1e-3, -100.0])
    naive = log_p - (-log_p.exp()).log1p()
    assert naive[0] == math.inf
    expected = [a - math.log(-math.expm1(a)) for a in log_p.double().tolist()]
    torch.testing.assert_close(log_odds(log_p), torch.tensor(expected, dtype=torch.float32))
    one = torch.ones(4)
    for x in value_and_gradients("orpo", [log_p, log_p.flip(0), one, one]):
        assert x.isfinite().all()


def test_orpo_refuses_certainty_and_says_why():
    one = torch.ones(1)
    for pair in ((torch.zeros(1), -one), (-one, torch.zeros(1))):
        with pytest.raises(ValueError, match=r"_logps contains -?0\.0: .*a certain response has infinite odds"):
            orpo(*pair, one, one)


def test_orpo_without_contrast_is_the_mean_negative_log_prob():
    w, x, n, k = arguments("orpo", 5)
    close(orpo(w, x, n, k, odds_weight=0), -w / n)


def test_dpo_sft_divides_by_the_length_and_cpo_does_not():
    w, x, rw, rx, n = arguments("dpo_sft", 5)
    close(dpo_sft(w, x, rw, rx, n, sft_weight=2.0) - dpo(w, x, rw, rx, beta=0.1), -2 * w / n, rtol=1e-9)
    close(cpo(w, x, sft_weight=2.0) - cpo(w, x, sft_weight=0), -2 * w, rtol=1e-9)


def test_lengths_may_be_integers_or_floats_of_any_width():
    w, x, n, k = arguments("simpo", 5)
    expected = simpo(w, x, n, k)
    for dtype in (torch.int32, torch.int64, torch.float32, torch.bfloat16):
        assert torch.equal(simpo(w, x, n.to(dtype), k.to(dtype)), expected)


def test_alpha_dpo_asks_more_of_a_pair_already_told_apart_and_its_target_has_no_gradient():
    w, x, rw, rx = (numbers(-2.0, -2.0), numbers(-4.0, -4.0), numbers(-2.0, -5.0), numbers(-4.0, -4.0))
    one, zero = torch.ones(2), torch.tensor(0.0)
    value, win, _ = value_and_gradients(
        "alpha_dpo", [w, x, rw, rx, one, one, zero, torch.tensor(1.0)], beta=1.0, gamma=0.0, alpha=0.5
    )
    t = numbers(2 - 0.5 * 0, 2 - 0.5 * 3)  # margins of log-ratios: 0 and 3
    close(value, -logsigmoid(t))
    close(win, -torch.sigmoid(-t))


def test_beta_dpo_moves_with_the_batch_and_stops_at_its_floor():
    zero = torch.zeros(2, dtype=torch.float64)
    margin = numbers(1.0, 3.0)  # mean 2
    for running, beta in ((2.0, 0.1), (1.0, 0.16), (0.0, 0.22), (1000.0, 1e-3)):
        value = beta_dpo(zero, -margin, zero, zero, torch.tensor(running))
        close(value, dpo(zero, -margin, zero, zero, beta=beta), rtol=1e-7)


def test_log_ratio_margin_is_what_the_dynamic_objectives_compare():
    w, x, rw, rx, n, k, *_ = arguments("alpha_dpo", 5)
    assert torch.equal(log_ratio_margin(w, x, rw, rx), (w - rw) - (x - rx))
    close(log_ratio_margin(w, x, rw, rx, n, k), (w - rw) / n - (x - rx) / k)
    assert not log_ratio_margin(w.requires_grad_(), x, rw, rx).requires_grad
    with pytest.raises(TypeError, match="go together: pass both, or neither"):
        log_ratio_margin(w, x, rw, rx, n)


def test_filter_keeps_a_share_repeats_itself_and_survives_outliers():
    margins = torch.cat([torch.randn(95, generator=torch.Generator().manual_seed(0)), torch.full((5,), 1e4)])
    mean, std = torch.tensor(0.0), torch.tensor(1.0)
    masks = [beta_dpo_filter(margins, mean, std, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert masks[0].dtype is torch.bool
    assert masks[0].sum() == 80
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not masks[0][95:].any()
    assert beta_dpo_filter(margins, mean, std, keep=1).all()
    assert beta_dpo_filter(margins, mean, std, keep=0.29).sum() == 29  # 0.29 * 100 is 28.999999999999996
    assert beta_dpo_filter(margins[:0], mean, std).shape == (0,)


def test_filter_draws_in_proportion_to_the_weights():
    """Keeping one of three: the frequency of each is its weight's share, within five standard errors."""
    margins, n = numbers(0.0, 1.0, 2.0), 1000
    g = torch.Generator().manual_seed(0)
    draws = [beta_dpo_filter(margins, torch.tensor(0.0), torch.tensor(1.0), keep=0.34, generator=g) for _ in range(n)]
    share = (-margins.square() / 2).softmax(0)
    frequency = torch.stack(draws).double().mean(0)
    assert ((frequency - share).abs() < 5 * (share * (1 - share) / n).sqrt()).all()


@pytest.mark.parametrize(
    ("keep", "error"), [(0, ValueError), (1.5, ValueError), (math.nan, ValueError), ("1", TypeError), (True, TypeError)]
)
def test_filter_refuses_other_shares(keep, error):
    with pytest.raises(error, match=f"keep = {keep!r}: it "):
        beta_dpo_filter(torch.zeros(3), torch.tensor(0.0), torch.tensor(1.0), keep=keep)


def test_filter_refuses_margins_that_are_no_vector():
    with pytest.raises(ValueError, match=r"margins has shape \(2, 3\)"):
        beta_dpo_filter(torch.zeros(2, 3), torch.tensor(0.0), torch.tensor(1.0))


@pytest.mark.parametrize(("count", "keep"), [(1, 0.8), (1, 0.99), (4, 0.2)])
def test_filter_refuses_to_leave_no_pair(count, keep):
    """A batch of nothing has a mean loss of NaN; a batch of one can only be kept whole."""
    mean, std = torch.tensor(0.0), torch.tensor(1.0)
    with pytest.raises(ValueError, match=f"keep = {keep} of {count} pairs leaves none to train on; pass more"):
        beta_dpo_filter(torch.zeros(count), mean, std, keep=keep)
    assert beta_dpo_filter(torch.zeros(count), mean, std, keep=1).all()
    assert beta_dpo_filter(torch.zeros(2 * count), mean.reshape(1, 1), std, keep=0.8).any()


@pytest.mark.parametrize("at", [1, 2])
def test_filter_refuses_statistics_of_single_pairs(at):
    given = [torch.zeros(3), torch.tensor(0.0), torch.tensor(1.0)]
    given[at] = given[at].expand(3, 1)
    with pytest.raises(ValueError, match=r"margin_mean has shape .*, margin_std .*: they are one number each"):
        beta_dpo_filter(*given)


def test_the_deviation_of_one_margin_is_refused_with_the_reason():
    given = [
        x if need != "margin_std" else torch.ones(1).std(correction=0) / 0
        for need, x in zip(LOSSES["alpha_dpo"].needs, arguments("alpha_dpo", 1), strict=True)
    ]
    with pytest.raises(ValueError, match=r"margin_std contains nan: .* of one margin it is NaN, .* two or more"):
        LOSSES["alpha_dpo"](*given)


def test_reward_loss_knows_only_the_difference():
    w, x = arguments("reward_bt", 5)
    close(reward_bt(w + 2, x + 2), reward_bt(w, x))
    close(reward_bt(w, w), [math.log(2)] * 5)


def test_policy_objective_at_its_optimum_has_the_closed_form_and_no_gradient():
    _, ref, rewards = arguments("rlhf_tabular", 5)
    best = ref + rewards / 0.5
    value, gradient = value_and_gradients("rlhf_tabular", [best, ref, rewards], beta=0.5)
    close(value, -0.5 * (ref.log_softmax(-1) + rewards / 0.5).logsumexp(-1))
    close(gradient, torch.zeros_like(ref), atol=1e-14)
    for seed in (1, 2, 3):
        assert (rlhf_tabular(*arguments("rlhf_tabular", 5, seed=seed)[:1], ref, rewards, beta=0.5) > value).all()


def test_policy_objective_ignores_constants_in_logits_and_survives_large_ones():
    logits, ref, rewards = arguments("rlhf_tabular", 5)
    close(rlhf_tabular(logits + 3, ref - 5, rewards), rlhf_tabular(logits, ref, rewards))
    large = numbers(0.0, 2000.0, -2000.0)
    value, gradient = value_and_gradients("rlhf_tabular", [large, large.flip(0), numbers(1.0, 2.0, 3.0)])
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("shapes", [((3,), (3,), (1,)), ((2, 3), (3,), (4,)), ((), (), ()), ((0,), (0,), (0,))])
def test_policy_objective_refuses_other_numbers_of_responses(shapes):
    with pytest.raises(ValueError, match=r"the last dimension lists the responses|must broadcast"):
        rlhf_tabular(*(torch.zeros(s) for s in shapes))


def test_ipo_and_dpo_agree_on_the_direction_below_the_target():
    w, x, rw, rx = arguments("ipo", 20)
    below = (w - rw) - (x - rx) < 5
    gradients = [value_and_gradients(name, [w, x, rw, rx], beta=0.1)[1] for name in ("ipo", "dpo")]
    assert below.any()
    assert (gradients[0][below] < 0).all()
    assert (gradients[1][below] < 0).all()
    assert torch.equal(ipo(w, x, rw, rx), ipo(w, x, rw, rx, beta=0.1))
