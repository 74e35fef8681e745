"""The converters: inverse to each other, exact, refusing what they cannot say; and what they claim can be wrong."""

import doctest
import math
from dataclasses import replace
from typing import Any

import pytest
import sympy as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdpo import conventions
from bdpo.conventions import CONVENTIONS, LIBRARIES, LIKELIHOODS, Convention, losses
from bdpo.losses import LOSSES

each = pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda c: f"{c.library}-{c.where}-{c.loss}-{c.logps}")
POSITIVE = st.floats(1e-3, 1e3)


def free(convention: Convention) -> list[str]:
    """Our settings that the library can set."""
    spec = LOSSES[convention.loss]
    numbers = [k for k, v in spec.settings.items() if isinstance(v, float) and not isinstance(v, bool)]
    return [k for k in numbers if k not in convention.ours]


def a_batch(lengths: tuple[list[float], list[float]]) -> dict[str, torch.Tensor]:
    """Pairs of the given lengths with everything that a loss may need."""
    long, short = (torch.tensor(x, dtype=torch.float64) for x in lengths)
    rate = torch.linspace(-0.4, -2.6, 4 * len(long), dtype=torch.float64).view(4, -1)
    batch = {name: rate[k] * (long, short)[k % 2] for k, name in enumerate(LOSSES["dpo"].needs)}
    scalar = {
        k: torch.tensor(v, dtype=torch.float64) for k, v in {"kl": 0.5, "margin_mean": 0.3, "margin_std": 0.8}.items()
    }
    return (
        batch
        | scalar
        | {
            "chosen_lengths": long,
            "rejected_lengths": short,
            "prompt_logps": torch.full_like(long, -9.0),
            "prompt_lengths": torch.full_like(long, 4.0),
            "policy_logps": batch["policy_chosen_logps"],
            "ref_logps": batch["ref_chosen_logps"],
            "desirable": torch.arange(len(long)) % 2 == 0,
        }
    )


# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_examples_of_the_module_run() -> None:
    result = doctest.testmod(conventions)
    assert result.attempted > 0
    assert result.failed == 0


@each
def test_every_convention_names_a_library_and_a_loss(convention: Convention) -> None:
    assert convention.library in LIBRARIES
    assert convention.loss in LOSSES
    assert convention.logps in ("sum", "mean")
    assert convention.likelihood in ("", *LIKELIHOODS)
    assert set(convention.ours) <= set(LOSSES[convention.loss].settings)
    assert (convention.likelihood != "") == (
        convention.loss in ("dpo_sft", "cpo", "slic", "orpo") and not convention.ours
    )


@each
def test_forth_and_back_is_where_one_started_for_symbols(convention: Convention) -> None:
    symbols = {name: sp.Symbol(name, positive=True) for name in free(convention)}
    back = convention.back(**convention.to(**symbols))
    assert set(back) == set(symbols)
    assert all(sp.simplify(back[name] - symbol) == 0 for name, symbol in symbols.items())


@each
def test_forth_and_back_is_where_one_started_for_the_defaults(convention: Convention) -> None:
    found, settings = conventions.ours(convention.where, library=convention.library, **convention.theirs())
    assert found is convention
    expected = {k: v for k, v in LOSSES[convention.loss].settings.items() if k in settings} | dict(convention.ours)
    assert {k: pytest.approx(v) for k, v in expected.items()} == settings


@given(beta=POSITIVE, gamma=POSITIVE, alpha=POSITIVE)
def test_ratios_of_gamma_and_alpha(beta: float, gamma: float, alpha: float) -> None:
    assert conventions.theirs("CPOTrainer", "simpo", beta=beta, gamma=gamma)["simpo_gamma"] == gamma
    assert conventions.theirs("SimPOTrainer", "simpo", beta=beta, gamma=gamma)["gamma_beta_ratio"] == gamma / beta
    theirs = conventions.theirs("AlphaDPOTrainer", "alpha_dpo", beta=beta, gamma=gamma, alpha=alpha)
    assert (theirs["gamma_beta_ratio"], theirs["alpha"]) == (gamma / beta, alpha / beta)
    assert conventions.ours("AlphaDPOTrainer", **theirs)[1] == pytest.approx(
        {"beta": beta, "gamma": gamma, "alpha": alpha}
    )


def test_two_names_for_one_class_are_told_apart_by_the_library() -> None:
    assert conventions.find("ORPOTrainer", "orpo").library == "trl"
    assert conventions.find("ORPOTrainer", "orpo", "orpo").library == "orpo"
    assert conventions.find("DPOTrainer", "dpo").fixed == {"loss_type": ["sigmoid"]}
    assert conventions.find("DPOTrainer", "dpo", logps="mean").fixed == {"loss_type": ["sigmoid_norm"]}
    assert conventions.ours("DPOLoss", beta=0.1, label_smoothing=0.0)[0].loss == "dpo"
    assert conventions.ours("DPOLoss", beta=0.1, label_smoothing=0.2)[0].loss == "conservative_dpo"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: conventions.find("PPOTrainer", "dpo"), ValueError, r"where = 'PPOTrainer': not among.*DPOTrainer"),
        (
            lambda: conventions.find("DPOLoss", "simpo"),
            ValueError,
            r"loss = 'simpo': DPOLoss does not state it; it.*dpo",
        ),
        (
            lambda: conventions.theirs("DPOTrainer", "ipo", beta=-1.0),
            ValueError,
            r"^beta = -1\.0: it must be finite and",
        ),
        (lambda: conventions.theirs("DPOTrainer", "ipo", gamma=1.0), TypeError, "unexpected keyword argument 'gamma'"),
        (
            lambda: conventions.theirs("LigerFusedLinearKTOLoss", "kto", desirable_weight=2.0),
            ValueError,
            r"^desirable_weight = 2\.0: LigerFusedLinearKTOLoss cannot say so; there it is always 1\.0",
        ),
        (lambda: conventions.ours("DPOTrainer", beta=0.1), ValueError, r"^settings = .* states none of our losses so"),
        (lambda: conventions.ours("DPOTrainer", loss_type=["exo_pair"], beta=0.1), ValueError, "none of our losses so"),
        (lambda: conventions.ours("RSOLoss", gamma=-1.0), ValueError, r"^beta = -1\.0: it must be finite and above 0"),
        (lambda: conventions.ours("Nothing"), ValueError, "it states nothing"),
        (
            lambda: conventions.beta_of_temperature(0.0),
            ValueError,
            r"^temperature = 0\.0: it must be finite and above 0",
        ),
        (lambda: conventions.ipo_target(math.inf), ValueError, "^beta = inf: it must be finite and above 0"),
        (lambda: conventions.beta_of_sums(0.1, 0), ValueError, "^length = 0: it is the number of tokens"),
        (lambda: conventions.beta_of_sums(math.nan, 3), ValueError, "^beta_of_means = nan: it must be finite"),
        (lambda: conventions.smoothing_of_noise(0.5), ValueError, r"^noise = 0\.5: it is the share of flipped labels"),
        (
            lambda: conventions.likelihood(-torch.ones(1), torch.ones(1), "tokens"),
            ValueError,
            "^how = 'tokens': it must be",
        ),
        (
            lambda: conventions.likelihood(-torch.ones(1), torch.zeros(1), "sum"),
            ValueError,
            r"^chosen_lengths contains 0\.0: at least 1",
        ),
        (
            lambda: conventions.likelihood(-torch.ones(2), torch.ones(3), "mean"),
            ValueError,
            r"have shapes \(2,\) and \(3,\)",
        ),
        (lambda: conventions.beta_of_temperature("1"), ValueError, "^temperature = '1': it must be finite and above 0"),
        (
            lambda: conventions.theirs("CPOTrainer", "slic", delta=0.0),
            ValueError,
            r"^delta = 0\.0: CPOTrainer cannot say",
        ),
        (
            lambda: conventions.losses(conventions.find("CPOTrainer", "slic"), {}, delta=0.0),
            ValueError,
            r"^delta = 0\.0: CPOTrainer cannot say so; it divides by it",
        ),
        (
            lambda: conventions.losses(conventions.find("LigerFusedLinearKTOLoss", "kto"), {}, desirable_weight=2.0),
            ValueError,
            r"^desirable_weight = 2\.0: LigerFusedLinearKTOLoss cannot say so",
        ),
        *(
            (
                lambda weights=weights: conventions.ours(
                    "DPOTrainer", loss_type=["sigmoid", "sft"], beta=0.1, loss_weights=weights
                ),
                ValueError,
                "^settings = .* states none of our losses so",
            )
            for weights in ([0.0, 1.0], [1.0], 1.0)
        ),
    ],
)
def test_what_cannot_be_said_is_refused_with_what_can(call: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_mixture_with_other_weights_is_no_conservative_dpo() -> None:
    theirs = conventions.theirs("DPOTrainer", "conservative_dpo", label_smoothing=0.2)
    assert theirs["loss_weights"] == pytest.approx([1.6, -0.6])
    with pytest.raises(ValueError, match="states none of our losses so"):
        conventions.ours("DPOTrainer", **{**theirs, "loss_weights": [1.0, 1.0]})


# --- single converters ------------------------------------------------------------------------------------------------


@given(x=POSITIVE)
def test_temperature_and_target_are_their_own_inverses(x: float) -> None:
    assert conventions.beta_of_temperature(conventions.beta_of_temperature(x)) == pytest.approx(x)
    assert conventions.ipo_target(conventions.ipo_target(x)) == pytest.approx(x)


def test_ipo_is_zero_at_its_target_and_nowhere_else() -> None:
    target = torch.tensor([conventions.ipo_target(0.1)])
    ref = torch.tensor([-20.0])
    assert LOSSES["ipo"](ref + target, ref, ref, ref, beta=0.1).item() == 0
    assert LOSSES["ipo"](ref + 2 * target, ref, ref, ref, beta=0.1).item() > 1


@given(length=st.integers(1, 500), beta=POSITIVE)
def test_means_are_sums_with_a_smaller_beta_for_equal_lengths_only(length: int, beta: float) -> None:
    batch = a_batch(([length] * 3, [length] * 3))
    on_means = losses(conventions.find("DPOTrainer", "dpo", logps="mean"), batch, beta=beta)
    on_sums = LOSSES["dpo"](*(batch[k] for k in LOSSES["dpo"].needs), beta=conventions.beta_of_sums(beta, length))
    torch.testing.assert_close(on_means, on_sums, rtol=1e-12, atol=0)


def test_sums_and_means_can_prefer_different_responses() -> None:
    """10 tokens at -1 against 3 at -2: the first is likelier a token and less likely as a whole."""
    zeros = torch.zeros(1)
    win, lose = torch.tensor([-10.0]), torch.tensor([-6.0])
    assert LOSSES["dpo"](win, lose, zeros, zeros) > math.log(2) > LOSSES["dpo"](win / 10, lose / 3, zeros, zeros)


@given(noise=st.floats(0, 0.45), beta=st.floats(0.01, 10))
def test_robust_dpo_is_conservative_dpo_with_a_smoothing_below_0(noise: float, beta: float) -> None:
    batch = a_batch(([3, 9, 2], [4, 1, 7]))
    pair = [batch[k] for k in LOSSES["dpo"].needs]
    plain = LOSSES["dpo"](*pair, beta=beta)
    margin = beta * ((pair[0] - pair[2]) - (pair[1] - pair[3]))
    smoothing = conventions.smoothing_of_noise(noise)
    assert smoothing <= 0
    robust = LOSSES["robust_dpo"](*pair, beta=beta, label_smoothing=noise)
    torch.testing.assert_close(robust, plain + smoothing * margin, rtol=1e-9, atol=1e-9)


def test_three_averages_of_the_likelihood() -> None:
    logps, lengths = torch.tensor([-6.0, -20.0]), torch.tensor([2.0, 10.0])
    terms = {how: conventions.likelihood(logps, lengths, how) for how in LIKELIHOODS}
    assert terms["sum"].mean() == (6 + 20) / 2
    assert terms["mean"].mean() == (6 / 2 + 20 / 10) / 2
    assert terms["batch"].mean() == pytest.approx((6 + 20) / (2 + 10))
    assert torch.equal(terms["prompt"], terms["batch"])
    alone = [conventions.likelihood(logps[k : k + 1], lengths[k : k + 1], "batch").mean() for k in (0, 1)]
    assert sum(alone) / 2 != terms["batch"].mean()  # two micro-batches are not one


# --- what is claimed could be wrong -----------------------------------------------------------------------------------


def mutants(c: Convention) -> dict[str, Convention]:
    """Conventions with one mistake."""
    other = {"sum": "mean", "mean": "sum"}[c.logps]
    found = {"twice": replace(c, scale=lambda **s: 2 * c.scale(**s))}
    if LOSSES[c.loss].logps == "sum" and c.loss != "kto":
        found["sum and mean swapped"] = replace(c, logps=other)
    for how in LIKELIHOODS if c.likelihood else ():
        if how != c.likelihood:
            found[f"likelihood by {how}"] = replace(c, likelihood=how)
    return found


@each
def test_a_convention_with_one_mistake_gives_other_losses(convention: Convention) -> None:
    batch = a_batch(([3, 9, 2, 30], [4, 1, 7, 8]))
    right = losses(convention, batch).mean()
    for name, mutant in mutants(convention).items():
        assert abs(losses(mutant, batch).mean() - right) > 1e-3 * right.abs(), name


def test_a_batch_without_lengths_says_which_tensor_is_missing() -> None:
    batch = {k: v for k, v in a_batch(([3.0], [4.0])).items() if k.endswith("_logps")}
    with pytest.raises(KeyError, match="chosen_lengths"):
        losses(conventions.find("DPOTrainer", "ipo"), batch)
