"""bdpo.imbalance: closed forms, two routes to each gradient, and wrong forms that the comparison must notice."""

import math
from fractions import Fraction

import pytest
import sympy as sp
import torch
from flint import arb, fmpq

from bdpo import imbalance, losses

F = Fraction


def dpo(chosen, rejected, ref_chosen, ref_rejected, *, beta=1.0):
    return -torch.nn.functional.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def difference(chosen, rejected, ref_chosen, ref_rejected, *, slope=1.0):
    """A loss of the difference of the probabilities: balanced in the sense of Definition 1."""
    return -torch.nn.functional.logsigmoid(slope * (chosen.exp() - rejected.exp()))


def uneven(chosen, rejected, ref_chosen, ref_rejected):
    """Neither a function of the ratio nor of the difference."""
    return -torch.nn.functional.logsigmoid(3 * chosen - rejected * rejected)


LOSSES = [dpo, difference, uneven]
#: winner, loser, reference of both; the first policy has no third response
POLICIES = [
    (0.75, 0.25, 0.5, 0.5),
    (0.5, 0.2, 0.1, 0.3),
    (0.2, 0.5, 0.3, 0.1),
    (0.25, 0.25, 0.4, 0.2),
    (1e-9, 0.9, 0.1, 0.1),
]


def logs(*numbers):
    return [torch.tensor(x, dtype=torch.float64).log() for x in numbers]


def columns():
    return [torch.stack(x) for x in zip(*(logs(*p) for p in POLICIES), strict=True)]


def close(found, expected):
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-300) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("coordinate", imbalance.COORDINATES)
@pytest.mark.parametrize("loss", LOSSES)
def test_automatic_differentiation_and_closed_form_agree(loss, coordinate):
    data = columns()
    found = imbalance.gradient(loss, *data, coordinate=coordinate)
    g = imbalance.gradient(loss, *data)
    assert all(bool((x != 0).any()) for x in found)
    assert close(found, imbalance.convert(*g, data[0].exp(), data[1].exp(), coordinate))


@pytest.mark.parametrize("coordinate", imbalance.COORDINATES)
@pytest.mark.parametrize("detach_lambda", [True, False])
@pytest.mark.parametrize("name", losses.PAPER)
def test_the_six_objectives_in_every_coordinate(name, detach_lambda, coordinate):
    data, options = columns(), {"beta": 0.5, "detach_lambda": detach_lambda}
    found = imbalance.gradient(losses.LOSSES[name], *data, coordinate=coordinate, **options)
    g = imbalance.gradient(losses.LOSSES[name], *data, **options)
    expected = imbalance.convert(*g, data[0].exp(), data[1].exp(), coordinate)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-14) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("coordinate", "wrong"),
    {
        "log instead of probability": ("probability", lambda a, b, p, q: (a, b)),
        "multiplied, not divided": ("probability", lambda a, b, p, q: (a * p, b * q)),
        "divided by the other's": ("probability", lambda a, b, p, q: (a / q, b / p)),
        "normaliser forgotten": ("logit", lambda a, b, p, q: (a, b)),
        "own term only": ("logit", lambda a, b, p, q: (a * (1 - p), b * (1 - q))),
        "sign of the normaliser": ("logit", lambda a, b, p, q: (a + p * (a + b), b + q * (a + b))),
    }.values(),
)
def test_wrong_conversions_disagree_with_automatic_differentiation(coordinate, wrong):
    data = columns()
    found = imbalance.gradient(uneven, *data, coordinate=coordinate)
    assert not close(found, wrong(*imbalance.gradient(uneven, *data), data[0].exp(), data[1].exp()))


@pytest.mark.parametrize("beta", [1e-3, 0.1, 1.0, 10.0])
def test_dpo_in_probabilities_has_the_ratio_of_eq_2(beta):
    data = columns()
    winner, loser = imbalance.gradient(dpo, *data, coordinate="probability", beta=beta)
    assert close([winner / loser], [-(data[1].exp() / data[0].exp())])


@pytest.mark.parametrize("coordinate", ["log", "logit"])
def test_dpo_is_balanced_in_logarithms_and_logits_and_the_difference_loss_is_not(coordinate):
    data = columns()
    winner, loser = imbalance.gradient(dpo, *data, coordinate=coordinate)
    assert close([winner], [-loser])
    unequal = data[0] != data[1]
    winner, loser = imbalance.gradient(difference, *data, coordinate=coordinate)
    third = data[0].exp() + data[1].exp() < 1
    gap = (winner + loser).abs()
    assert bool((gap[unequal & third] > 0).all())


def test_the_difference_loss_is_balanced_in_probabilities():
    winner, loser = imbalance.gradient(difference, *columns(), coordinate="probability")
    assert close([winner], [-loser])


def test_two_responses_leave_no_room_for_imbalance_in_logits():
    for loss in LOSSES:
        winner, loser = imbalance.gradient(loss, *logs(*POLICIES[0]), coordinate="logit")
        assert close([winner], [-loser])


def test_convert_is_exact_on_fractions():
    g, p = (F(-1, 3), F(1, 2)), (F(1, 2), F(1, 4))
    assert imbalance.convert(*g, *p, "probability") == (F(-2, 3), F(2))
    assert imbalance.convert(*g, *p, "log") == g
    winner, loser = imbalance.convert(*g, *p, "logit")
    third = -F(1, 4) * sum(g)
    assert winner + loser + third == 0
    assert (winner, loser) == (F(-5, 12), F(11, 24))


def test_category_takes_the_definition_to_the_letter():
    assert imbalance.category(F(-1), F(1)) == "balanced"
    assert imbalance.category(F(-2), F(1)) == "positively imbalanced"
    assert imbalance.category(F(-1), F(2)) == "negatively imbalanced"
    assert imbalance.category(F(1), F(1)) == "negatively imbalanced"  # equal sizes fall under "else"
    assert imbalance.category(F(0), F(0)) == "balanced"


def test_log_ratio_of_extreme_log_probabilities_where_probabilities_vanish():
    chosen, rejected = (torch.tensor([x], dtype=torch.float64) for x in (-2000.0, -1000.0))
    g = imbalance.gradient(dpo, chosen, rejected, chosen, rejected)
    assert float(chosen.exp()) == 0
    assert imbalance.log_ratio(*g, chosen, rejected).item() == 1000.0
    assert imbalance.log_ratio(*g, chosen, rejected, coordinate="log").item() == 0
    assert imbalance.log_ratio(*g, chosen, rejected, coordinate="logit").item() == 0
    with pytest.raises(ValueError, match=r"log-probability is -2000, whose probability is 0"):
        imbalance.gradient(dpo, chosen, rejected, chosen, rejected, coordinate="probability")


@pytest.mark.parametrize("coordinate", imbalance.COORDINATES)
def test_log_ratio_is_that_of_the_automatic_gradients(coordinate):
    data = columns()
    winner, loser = imbalance.gradient(uneven, *data, coordinate=coordinate)
    g = imbalance.gradient(uneven, *data)
    found = imbalance.log_ratio(*g, data[0], data[1], coordinate=coordinate)
    assert torch.allclose(found, (winner.abs() / loser.abs()).log(), atol=1e-12)
    assert bool((found != 0).any())


def test_mean_log_ratio_vanishes_where_the_labels_follow_the_policy():
    # responses of probability 2/3 and 1/3; the first wins two of three times, as DPO believes: 2 * 1/2 + 1 * 2 = 3 * 1
    chosen, rejected = logs([2 / 3, 2 / 3, 1 / 3], [1 / 3, 1 / 3, 2 / 3])
    flat = torch.full_like(chosen, math.log(0.5))
    g = imbalance.gradient(dpo, chosen, rejected, flat, flat)
    assert abs(imbalance.mean_log_ratio(*g, chosen, rejected).item()) < 1e-14
    assert bool((imbalance.log_ratio(*g, chosen, rejected).abs() > 0.5).all())


def test_one_unlikely_response_decides_the_mean():
    chosen, rejected = (torch.tensor(x, dtype=torch.float64) for x in ([-1.0] * 99 + [-500.0], [-2.0] * 99 + [-1.0]))
    g = imbalance.gradient(dpo, chosen, rejected, chosen, rejected)
    assert int((imbalance.log_ratio(*g, chosen, rejected) < 0).sum()) == 99
    expected = 500 - math.log(99 * math.exp(2) + math.exp(1))  # the 99 winners add less than 1e-200
    assert imbalance.mean_log_ratio(*g, chosen, rejected).item() == pytest.approx(expected, abs=1e-12)


def test_reference_broadcasts_and_options_reach_the_loss():
    chosen, rejected = logs([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    reference = torch.tensor(-1.0, dtype=torch.float64)
    winner, loser = imbalance.gradient(dpo, chosen, rejected, reference, reference, beta=0.5)
    doubt = 1 / (1 + (chosen.exp() / rejected.exp()) ** 0.5)
    assert close([winner, loser], [-0.5 * doubt, 0.5 * doubt])


def test_arguments_are_not_changed_and_carry_no_gradient():
    data = columns()
    data[0].requires_grad_()
    imbalance.gradient(dpo, *data, coordinate="logit")
    assert data[0].grad is None


@pytest.mark.parametrize(
    "call",
    [
        lambda: imbalance.gradient(dpo, *columns(), coordinate="odds"),
        lambda: imbalance.convert(F(1), F(1), F(1, 2), F(1, 2), "odds"),
        lambda: imbalance.log_ratio(*columns(), coordinate="odds"),
        lambda: imbalance.mean_log_ratio(*columns(), coordinate="odds"),
    ],
)
def test_unknown_coordinate(call):
    with pytest.raises(ValueError, match=r"coordinate is 'odds'; allowed: probability, log, logit"):
        call()


def test_more_than_all_of_the_probability():
    with pytest.raises(ValueError, match=r"probability 1\.2 together"):
        imbalance.gradient(dpo, *logs(0.8, 0.4, 0.5, 0.5), coordinate="logit")


def test_mean_of_no_pairs():
    with pytest.raises(ValueError, match="no pair"):
        imbalance.mean_log_ratio(*[torch.zeros(0)] * 4)


# ---------------------------------------------------------------- closed forms of every pair loss

SWITCHES = [
    (name, {switch: value})
    for name in losses.PAIRS
    for switch in ([s for s in ("detach_lambda", "detach_kl") if s in losses.LOSSES[name].settings] or [None])
    for value in ((True, False) if switch else (None,))
]
CASES = [(name, {k: v for k, v in options.items() if k}) for name, options in SWITCHES]
every_loss = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(f"{k}={v}" for k, v in x.items())
)


def batch(name, *, size=64, spread=8.0, seed=0):
    """Random arguments of a pair loss, in the order that it takes them."""
    draw = torch.Generator().manual_seed(seed)
    uniform = torch.rand(4, size, generator=draw, dtype=torch.float64)
    made = dict(zip(losses.LOSSES["dpo"].needs, -spread * uniform - 0.01, strict=True))
    made |= {need: torch.randint(1, 6, (size,), generator=draw) for need in ("chosen_lengths", "rejected_lengths")}
    made |= {"margin_mean": torch.tensor(0.25, dtype=torch.float64), "margin_std": torch.tensor(1.5).double()}
    return [made[need] for need in losses.LOSSES[name].needs]


def worst(found, expected):
    """Largest difference, relative to the larger of the two sizes."""
    pairs = zip(found, expected, strict=True)
    return max(float(((a - b).abs() / torch.maximum(a.abs(), b.abs()).clamp(min=1e-300)).max()) for a, b in pairs)


def test_there_is_a_closed_form_for_each_pair_loss_and_no_other():
    assert tuple(imbalance.CLOSED) == losses.PAIRS


@every_loss
@pytest.mark.parametrize("spread", [0.5, 8.0, 200.0])
def test_closed_form_is_the_automatic_gradient(name, options, spread):
    data = batch(name, spread=spread)
    automatic = imbalance.gradient(losses.LOSSES[name], *data, **options)
    assert all(bool((g != 0).any()) for g in automatic)
    assert worst(imbalance.closed(name, *data, **options), automatic) < 1e-10


@every_loss
@pytest.mark.parametrize("coordinate", ["probability", "logit"])
def test_closed_form_converts_to_the_automatic_gradient_in_other_coordinates(name, options, coordinate):
    data = batch(name)
    room = (data[0].exp() + data[1].exp() < 0.95).nonzero().flatten()
    assert len(room) > 10
    data = [x[room] if x.dim() else x for x in data]
    automatic = imbalance.gradient(losses.LOSSES[name], *data, coordinate=coordinate, **options)
    g = imbalance.closed(name, *data, **options)
    assert worst(imbalance.convert(*g, data[0].exp(), data[1].exp(), coordinate), automatic) < 1e-10


@every_loss
def test_closed_form_at_settings_that_are_no_defaults(name, options):
    numbers = {k: 0.37 for k, v in losses.LOSSES[name].settings.items() if not isinstance(v, bool)}
    data = batch(name, seed=1)
    automatic = imbalance.gradient(losses.LOSSES[name], *data, **options, **numbers)
    assert worst(imbalance.closed(name, *data, **options, **numbers), automatic) < 1e-10
    assert worst(imbalance.closed(name, *data, **options), automatic) > 1e-3  # the settings matter


@every_loss
def test_closed_form_of_one_pair_is_the_same_for_tensors_enclosures_and_sympy(name, options):
    data = [torch.as_tensor(x).flatten()[:1] for x in batch(name, seed=2)]
    exact = [Fraction(float(x)) for x in data]
    tensors = imbalance.closed(name, *data, **options)
    balls = imbalance.closed(name, *(arb(fmpq(x.numerator, x.denominator)) for x in exact), **options)
    formulas = imbalance.closed(name, *(sp.Rational(x.numerator, x.denominator) for x in exact), **options)
    for tensor, ball, formula in zip(tensors, balls, formulas, strict=True):
        assert float(ball) == pytest.approx(float(tensor), rel=1e-12)
        assert float(formula) == pytest.approx(float(tensor), rel=1e-12)


@pytest.mark.parametrize("name", losses.PAIRS)
@pytest.mark.parametrize(
    "wrong",
    {
        "winner and loser swapped": lambda a, b: (b, a),
        "signs": lambda a, b: (-a, -b),
        "halved": lambda a, b: (a / 2, b / 2),
        "the winner's counted for both": lambda a, b: (a, -1.01 * a),
        "the loser forgotten": lambda a, b: (a, 0 * b),
        "one in a million off": lambda a, b: (a * (1 + 1e-6), b),
    }.items(),
    ids=lambda x: x[0],
)
def test_wrong_closed_forms_disagree(name, wrong):
    data = batch(name)
    automatic = imbalance.gradient(losses.LOSSES[name], *data)
    assert worst(wrong[1](*imbalance.closed(name, *data)), automatic) > 1e-10


def test_extreme_log_probs_do_not_overflow_a_closed_form():
    for name in losses.PAIRS:
        data = batch(name, spread=1e5)
        assert all(bool(g.isfinite().all()) for g in imbalance.closed(name, *data)), name


def test_whole_numbers_as_lengths_cost_no_digits():
    data = batch("simpo")
    floats = [x.double() for x in data]
    for whole, real in zip(imbalance.closed("simpo", *data), imbalance.closed("simpo", *floats), strict=True):
        assert torch.equal(whole, real)


def test_wrong_calls_of_a_closed_form():
    with pytest.raises(ValueError, match=r"no pair loss 'kto'; there are dpo"):
        imbalance.closed("kto")
    with pytest.raises(ValueError, match=r"cpo takes 2 arguments, policy_chosen_logps, policy_rejected_logps; got 4"):
        imbalance.closed("cpo", *batch("dpo"))
    with pytest.raises(TypeError, match=r"dpo has no setting 'gamma'; it has beta"):
        imbalance.closed("dpo", *batch("dpo"), gamma=1.0)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dpo", {"beta": -1.0}, r"beta = -1\.0: it must be finite and above 0"),
        ("ipo", {"beta": 0}, "beta = 0: it must be finite and above 0"),
        ("dpo", {"beta": F(-1, 2)}, r"beta = -0\.5: it must be finite and above 0"),
        ("dpo", {"beta": math.nan}, "beta = nan: it must be finite and above 0"),
        ("robust_dpo", {"label_smoothing": 0.5}, r"label_smoothing = 0\.5: it is the share of flipped labels"),
    ],
)
def test_a_closed_form_and_the_balance_refuse_the_settings_that_the_loss_refuses(name, settings, message):
    with pytest.raises(ValueError, match=message):
        imbalance.closed(name, *batch(name), **settings)
    with pytest.raises(ValueError, match=message):
        imbalance.balance(name, "log", **settings)


@pytest.mark.parametrize("value", [math.nan, -math.inf, 0.5])
def test_a_closed_form_and_a_gradient_refuse_what_is_no_log_prob(value):
    data = batch("dpo")
    data[0] = torch.full_like(data[0], value)
    for call in (lambda: imbalance.closed("dpo", *data), lambda: imbalance.gradient(dpo, *data)):
        with pytest.raises(ValueError, match=f"policy_chosen_logps contains {value}: a log-prob is finite"):
            call()


def test_a_closed_form_and_a_gradient_refuse_what_is_no_tensor_of_log_probs():
    whole = [x.long() for x in batch("dpo")]
    for call in (lambda: imbalance.closed("dpo", *whole), lambda: imbalance.gradient(dpo, *whole)):
        with pytest.raises(
            TypeError, match=r"policy_chosen_logps has dtype torch\.int64: log-probs are floating-point"
        ):
            call()
    with pytest.raises(TypeError, match="policy_chosen_logps is a float: it must be a tensor"):
        imbalance.closed("dpo", -1.0, -2.0, -1.0, -2.0)
    with pytest.raises(ValueError, match=r"chosen_lengths contains 0\.0: a length is the number of tokens"):
        imbalance.closed("simpo", *batch("dpo")[:2], torch.tensor(0), torch.tensor(1))
    with pytest.raises(ValueError, match="a certain response has infinite odds"):
        imbalance.closed("orpo", torch.zeros(1), -torch.ones(1), torch.ones(1), torch.ones(1))


@pytest.mark.parametrize("name", losses.PAIRS)
def test_a_closed_form_of_bfloat16_is_computed_in_float32(name):
    low = [x.bfloat16() for x in batch(name)]
    found = imbalance.closed(name, *low)
    expected = imbalance.closed(name, *(x.float() for x in low))
    assert all(x.dtype is torch.bfloat16 for x in found)
    assert all(torch.equal(x, y.bfloat16()) for x, y in zip(found, expected, strict=True))


def test_a_word_for_nan_is_refused():
    with pytest.raises(ValueError, match="winner = nan, loser = 1: NaN has no size"):
        imbalance.category(math.nan, 1)


# ---------------------------------------------------------------- which loss is balanced where

IN_LOG = {
    **dict.fromkeys(("dpo", "ipo", "beta_dpo", "robust_dpo", "conservative_dpo", "hinge"), "balanced"),
    **dict.fromkeys(("cpo", "slic", "dpo_sft"), "positively imbalanced"),
}


@pytest.mark.parametrize("coordinate", imbalance.COORDINATES)
@pytest.mark.parametrize("name", losses.PAIRS)
def test_balance_of_each_loss(name, coordinate):
    found = imbalance.balance(name, coordinate)
    assert found.established
    assert found.kind == ("depends" if coordinate == "probability" else IN_LOG.get(name, "depends"))
    for word, world in found.witnesses.items():  # a second route: automatic differentiation at the witness
        logs_first = [n.removesuffix("_logps") for n in losses.LOSSES[name].needs]
        keys = ["winner", "loser", *logs_first[2:]]
        value = {k: torch.tensor(float(x), dtype=torch.float64) for k, x in world.items()}
        data = [
            value[k].log() if n.endswith("_logps") else value[k]
            for k, n in zip(keys, losses.LOSSES[name].needs, strict=True)
        ]
        winner, loser = (float(g) for g in imbalance.gradient(losses.LOSSES[name], *data, coordinate=coordinate))
        if word == "balanced":
            assert winner + loser == pytest.approx(0, abs=1e-12)
        else:
            assert imbalance.category(winner, loser) == word
            assert abs(winner + loser) > 1e-9


def test_balance_depends_on_the_settings():
    assert imbalance.balance("dpo_sft", "log", sft_weight=0.0).kind == "balanced"
    assert imbalance.balance("nbdpo_asym", "log", clip=0.0).kind == "balanced"
    assert imbalance.balance("slic", "log", sft_weight=0.0).kind == "balanced"


def test_balance_on_given_pairs_is_not_established_by_agreement():
    keys = ("winner", "loser", "ref_chosen", "ref_rejected")
    equal = [dict(zip(keys, (F(1, n), F(1, 2 * n), F(1, 3), F(1, 3)), strict=True)) for n in (2, 3)]
    found = imbalance.balance("dpo", "probability", equal)
    assert (found.kind, found.established) == ("negatively imbalanced", False)
    with pytest.raises(ValueError, match="no pair of the 0"):
        imbalance.balance("dpo", "probability", [])
    with pytest.raises(ValueError, match=r"coordinate is 'odds'"):
        imbalance.balance("dpo", "odds")


def test_pairs_leave_room_for_a_third_response():
    worlds = list(imbalance.pairs())
    assert len(worlds) > 100
    assert all(w["winner"] > 0 and w["loser"] > 0 and w["winner"] + w["loser"] < 1 for w in worlds)
