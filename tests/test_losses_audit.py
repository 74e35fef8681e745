"""The check that every objective passes and every mutant fails, and the second derivation of its formulas.

``bdpo.losses.audit`` holds values and derivatives written by hand. Here the values stand once more in the letters of
the papers, with what is detached as a variable of its own, and are differentiated numerically in 60 digits.
"""

import functools
import inspect

import mpmath as mp
import pytest
import torch
from torch.nn.functional import logsigmoid

from bdpo.losses import LOSSES, PAIRS, PAPER
from bdpo.losses.audit import COUPLED, check, domain, formula, leaves, sweep
from bdpo.losses.mutants import (
    adaptive,
    batch_beta,
    calibrated,
    clamped_means,
    dynamic,
    equivalents,
    judged,
    kill_table,
    lambda_asym,
    lambda_sym,
    log_odds,
    mutants,
    of_margin,
    of_odds,
    one,
    paired,
    share_lose,
    share_win,
    standardised,
    tabular,
    textbook,
    token_gap,
    value_preserving,
    with_likelihood,
)

each_loss = pytest.mark.parametrize("name", LOSSES)


# --- the check and its mutants ----------------------------------------------------------------------------------------


@each_loss
def test_value_and_gradients_to_eight_digits_on_the_whole_domain(name):
    assert check(LOSSES[name].function, name) is None


@each_loss
def test_every_mutant_is_rejected_and_every_equivalent_passes(name):
    rows = kill_table(name)
    assert len([row for row in rows if row.argued is None]) >= 12
    assert [row for row in rows if row.argued is None and row.found is None] == []
    assert [row for row in rows if row.argued is not None and row.found is not None] == []
    assert [row for row in rows if row.found and "refused" in row.found] == []  # by a wrong number, not by an error
    assert {row.mutant for row in rows} == {*mutants(name), *equivalents(name)}


def half_mean(good, bad):
    return (good + bad) / 2


#: What the mutants are built from, without the mistake. A form that is stable only in part is checked in part.
CONTROLS = {
    "dpo": textbook(one, one),
    "nbdpo_asym": value_preserving(lambda_asym),
    "nbdpo_sym": value_preserving(lambda_sym),
    "nbdpo_v2_asym": textbook(lambda_asym, one),
    "nbdpo_v2_sym": textbook(lambda_sym, one),
    "bdpo": textbook(share_win, share_lose),
    "ipo": of_margin(lambda m, beta: (m - 1 / (2 * beta)).square()),
    "hinge": of_margin(lambda m, beta: torch.relu(1 - beta * m)),
    "conservative_dpo": of_margin(lambda m, b, e: -(1 - e) * logsigmoid(b * m) - e * logsigmoid(-b * m)),
    "robust_dpo": of_margin(lambda m, b, e: ((e - 1) * logsigmoid(b * m) + e * logsigmoid(-b * m)) / (1 - 2 * e)),
    "dpo_sft": with_likelihood(lambda w, x, rw, n, weight, beta: -weight * w / n),
    "cpo": with_likelihood(lambda w, x, rw, n, weight, beta: -weight * w / n),
    "slic": calibrated(lambda gap, delta, weight, w, x: torch.relu(delta - gap) - weight * w),
    "simpo": lambda *a, beta, gamma: -logsigmoid(beta * token_gap(*a) - gamma),
    "orpo": of_odds(lambda p, q, weight, w, x: -p - weight * logsigmoid(log_odds(p) - log_odds(q))),
    "alpha_dpo": adaptive(lambda a, beta, gamma, alpha: alpha * standardised(a).detach()),
    "beta_dpo": dynamic(lambda *a: batch_beta(*a).detach()),
    "kto_pair": paired(clamped_means, half_mean),
    "kto": judged(lambda gain, weight, point: weight * logsigmoid(-gain).exp()),
    "reward_bt": lambda w, x: -logsigmoid(w - x),
    "rlhf_tabular": tabular(lambda p, q: p.exp(), lambda p, q: p - q),
}


@each_loss
def test_what_the_mutants_are_built_from_passes_without_the_mistake(name):
    assert check(CONTROLS[name], name, only=lambda s: s.get("detach_lambda", True)) is None


@each_loss
def test_the_domain_and_the_sweep_are_not_vacuous(name):
    shapes = {x.shape for x in domain(name)}
    assert len(shapes) == 1
    assert next(iter(shapes))[0] >= 100
    swept = list(sweep(name))
    for knob, default in LOSSES[name].settings.items():  # every knob is turned
        assert len({s[knob] for s in swept}) >= 2
        assert swept[0][knob] == default
    with torch.no_grad():
        for settings in swept:  # no setting makes the loss a constant
            function = functools.partial(LOSSES[name].function, **settings)
            value = (torch.func.vmap(function) if name in COUPLED else function)(*domain(name))
            assert value.unique().numel() > 1


def test_a_check_of_nothing_and_an_unknown_name_are_refused():
    with pytest.raises(ValueError, match="a check of nothing proves nothing"):
        check(LOSSES["dpo"].function, "dpo", only=lambda s: False)
    with pytest.raises(ValueError, match=r"name = 'dop': it must be one of dpo, "):
        check(LOSSES["dpo"].function, "dop")


def test_a_wrong_number_is_reported_with_its_place():
    found = check(lambda *a, **k: 2 * LOSSES["dpo"](*a, **k), "dpo")
    assert found.startswith("beta=1, detach_lambda=True: value is ")
    assert " at [-2000.0, -2000.0, -2000.0, -2000.0]" in found
    assert "has 1 numbers, not" in check(lambda *a, **k: LOSSES["dpo"](*a, **k).mean(), "dpo")
    assert "refused" in check(lambda *a, **k: LOSSES["dpo"](*(-x for x in a), **k), "dpo")


# --- the formulas in the letters of their sources, differentiated numerically -----------------------------------------


def sigmoid(x):
    return 1 / (1 + mp.exp(-x))


def ratio(policy, ref):
    return mp.log(mp.exp(policy) / mp.exp(ref))


def nll(x):
    return -mp.log(sigmoid(x))


def dpo_margin(w, x, rw, rx):
    return ratio(w, rw) - ratio(x, rx)


def printed_ipo(at, w, x, rw, rx, *, beta):
    return (dpo_margin(w, x, rw, rx) - 1 / (2 * beta)) ** 2


def printed_hinge(at, w, x, rw, rx, *, beta):
    return max(mp.mpf(0), 1 - (beta * ratio(w, rw) - beta * ratio(x, rx)))


def printed_conservative_dpo(at, w, x, rw, rx, *, beta, label_smoothing):
    t = beta * dpo_margin(w, x, rw, rx)
    return (1 - label_smoothing) * nll(t) + label_smoothing * nll(-t)


def printed_robust_dpo(at, w, x, rw, rx, *, beta, label_smoothing):
    clean, flipped = nll(beta * dpo_margin(w, x, rw, rx)), nll(beta * dpo_margin(x, w, rx, rw))
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def printed_dpo_sft(at, w, x, rw, rx, n, *, beta, sft_weight):
    return nll(beta * ratio(w, rw) - beta * ratio(x, rx)) - sft_weight * w / n


def printed_cpo(at, w, x, *, beta, sft_weight):
    return nll(beta * w - beta * x) - sft_weight * w


def printed_slic(at, w, x, *, delta, sft_weight):
    return max(mp.mpf(0), delta - w + x) - sft_weight * w


def printed_simpo(at, w, x, n, k, *, beta, gamma):
    return nll(beta / n * w - beta / k * x - gamma)


def printed_orpo(at, w, x, n, k, *, odds_weight):
    odds = [mp.exp(s / length) / (1 - mp.exp(s / length)) for s, length in ((w, n), (x, k))]
    return -w / n + odds_weight * nll(mp.log(odds[0] / odds[1]))


def printed_alpha_dpo(at, w, x, rw, rx, n, k, mean, std, *, beta, gamma, alpha):
    m = ratio(at[0], rw) / n - ratio(at[1], rx) / k
    return nll(beta / n * w - beta / k * x - (gamma + alpha * (m - mean) / std))


def printed_kto(at, p, r, good, kl, *, beta, desirable_weight, undesirable_weight):
    if good:
        return desirable_weight - desirable_weight * sigmoid(beta * (ratio(p, r) - kl))
    return undesirable_weight - undesirable_weight * sigmoid(beta * (kl - ratio(p, r)))


def printed_reward_bt(at, w, x):
    return -mp.log(mp.exp(w) / (mp.exp(w) + mp.exp(x)))


POINTS = [
    {"w": "-3", "x": "-4.5", "rw": "-2.25", "rx": "-5"},
    {"w": "-7", "x": "-6.75", "rw": "-9", "rx": "-1"},
    {"w": "-0.5", "x": "-9", "rw": "-2", "rx": "-0.25"},
]
REST = {"n": "3", "k": "5", "mean": "0.75", "std": "1.5", "p": "-3", "r": "-2.5", "kl": "0.25", "good": True}


@pytest.mark.parametrize("settings", [{}, {"beta": 0.75}, {"label_smoothing": 0.3, "gamma": 0.125, "sft_weight": 2.0}])
@pytest.mark.parametrize(
    "name", [n for n in LOSSES if n not in (*PAPER, *COUPLED, "rlhf_tabular")]
)  # the paper's six: test_losses.py; the others below
def test_formula_of_the_audit_is_the_printed_one_and_its_derivative(name, settings):
    printed = globals()[f"printed_{name}"]
    keys = list(inspect.signature(printed).parameters)[1:][: len(LOSSES[name].needs)]
    chosen = {k: mp.mpf(settings.get(k, v)) for k, v in LOSSES[name].settings.items()}
    with mp.workdps(60):
        for point in POINTS:
            for good in (True, False):
                row = [x if isinstance(x := {**REST, **point, "good": good}[k], bool) else mp.mpf(x) for k in keys]
                [[(value, _), *derivatives]] = formula(name, [row], **chosen)
                assert mp.almosteq(value, printed(row, *row, **chosen), rel_eps=1e-50)
                for i, (derivative, _) in zip(leaves(name), derivatives, strict=True):
                    numeric = mp.diff(
                        lambda t, i=i, row=row: printed(row, *row[:i], t, *row[i + 1 :], **chosen), row[i]
                    )
                    assert mp.almosteq(derivative, numeric, rel_eps=1e-25, abs_eps=1e-40)


BATCH = [["-3", "-4.5", "-2.25", "-5"], ["-7", "-6.75", "-9", "-8.5"], ["-0.5", "-2", "-3", "-2.25"]]


def summed_kto_pair(at, batch, *, beta, detach_kl):
    z_win, z_lose = (
        max(0, sum(ratio(row[i], row[i + 2]) for row in (at if detach_kl else batch)) / len(batch)) for i in (0, 1)
    )
    return sum(
        (1 - sigmoid(beta * (ratio(w, rw) - z_lose)) + 1 - sigmoid(beta * (z_win - ratio(x, rx)))) / 2
        for w, x, rw, rx in batch
    )


def summed_beta_dpo(at, batch, *, beta, alpha, beta_min):
    mean = sum(dpo_margin(*row[:4]) for row in at) / len(at)
    b = max(beta_min, (1 + alpha * (mean - at[0][4])) * beta)
    return sum(nll(b * dpo_margin(*row[:4])) for row in batch)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("kto_pair", {"beta": 0.75, "detach_kl": True}),
        ("kto_pair", {"beta": 0.75, "detach_kl": False}),
        ("beta_dpo", {"beta": 0.25, "alpha": 0.5, "beta_min": 1e-3}),
        ("beta_dpo", {"beta": 0.25, "alpha": 3.0, "beta_min": 0.5}),
    ],
)
def test_coupled_formula_of_the_audit_is_the_printed_one_and_its_derivative(name, settings):
    printed = globals()[f"summed_{name}"]
    extra = ["0.5"] if name == "beta_dpo" else []
    chosen = {k: v if isinstance(v, bool) else mp.mpf(v) for k, v in settings.items()}
    with mp.workdps(60):
        batch = [[mp.mpf(v) for v in [*row, *extra]] for row in BATCH]
        found = formula(name, batch, **chosen)
        assert mp.almosteq(sum(row[0][0] for row in found), printed(batch, batch, **chosen), rel_eps=1e-50)
        for i, row in enumerate(found):
            for j in (0, 1):

                def moved(t, i=i, j=j):
                    return [[*r[:j], t, *r[j + 1 :]] if k == i else r for k, r in enumerate(batch)]

                numeric = mp.diff(lambda t, f=moved: printed(batch, f(t), **chosen), batch[i][j])
                assert mp.almosteq(row[1 + j][0], numeric, rel_eps=1e-25)


def test_tabular_formula_of_the_audit_is_the_printed_one_and_its_derivative():
    def printed(logits, ref, rewards, beta):
        p, q = ([mp.exp(v) / sum(mp.exp(u) for u in x) for v in x] for x in (logits, ref))
        gain = sum(a * r for a, r in zip(p, rewards, strict=True))
        return -(gain - beta * sum(a * mp.log(a / b) for a, b in zip(p, q, strict=True)))

    with mp.workdps(60):
        row = [[mp.mpf(v) for v in x] for x in (["0.5", "-1", "2"], ["1", "0", "-0.25"], ["3", "-2", "0.5"])]
        [[(value, _), *derivatives]] = formula("rlhf_tabular", [row], beta=mp.mpf("0.75"))
        assert mp.almosteq(value, printed(*row, mp.mpf("0.75")), rel_eps=1e-50)
        for i, (derivative, _) in enumerate(derivatives):
            numeric = mp.diff(
                lambda t, i=i: printed([*row[0][:i], t, *row[0][i + 1 :]], *row[1:], mp.mpf("0.75")), row[0][i]
            )
            assert mp.almosteq(derivative, numeric, rel_eps=1e-25)


# --- the specs --------------------------------------------------------------------------------------------------------


def test_the_dict_of_specs_says_what_the_functions_say():
    assert tuple(LOSSES)[:6] == PAPER
    assert tuple(n for n, s in LOSSES.items() if s.kind == "pair") == PAIRS
    vocabulary = {
        *("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps"),
        *("chosen_lengths", "rejected_lengths", "margin_mean", "margin_std", "kl"),
        *("policy_logps", "ref_logps", "desirable", "chosen_rewards", "rejected_rewards"),
        *("logits", "ref_logits", "rewards"),
    }
    for name, spec in LOSSES.items():
        parameters = inspect.signature(spec.function).parameters.values()
        assert (spec.name, spec.function.__name__) == (name, name)
        assert spec.needs == tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
        assert spec.settings == {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert set(spec.needs) <= vocabulary
        assert spec.kind in ("pair", "unpaired", "reward", "policy")
        assert spec.reference_free == (not any("ref_" in need for need in spec.needs))
        lengths = {"chosen_lengths", "rejected_lengths"} <= set(spec.needs)
        assert spec.logps == ("none" if spec.kind in ("reward", "policy") else "mean" if lengths else "sum")
        for section in ("Returns\n", "Raises\n", "Notes\n", "Source: "):
            assert section in (spec.function.__doc__ or "")
        for argument in (*spec.needs, *spec.settings):
            assert argument in spec.function.__doc__


# --- the page ---------------------------------------------------------------------------------------------------------

#: How the page writes groups of arguments.
WORDS = {
    ("policy_chosen_logps", "policy_rejected_logps"): r"$\log\pi$",
    ("ref_chosen_logps", "ref_rejected_logps"): r"$\log\piref$",
    ("policy_logps",): r"$\log\pi(y)$",
    ("ref_logps",): r"$\log\piref(y)$",
    ("chosen_lengths", "rejected_lengths"): "lengths",
    ("chosen_lengths",): "winner's length",
    ("margin_mean",): r"$\mu$",
    ("margin_std",): "$s$",
    ("desirable",): "label",
    ("kl",): "$z_0$",
    ("chosen_rewards", "rejected_rewards"): "scores",
    ("logits",): "logits",
    ("ref_logits",): "reference's logits",
    ("rewards",): "rewards",
}


def in_words(needs):
    said = []
    while needs:
        group = next(g for g in WORDS if needs[: len(g)] == g)
        said.append(WORDS[group])
        needs = needs[len(group) :]
    return ", ".join(said)


def test_the_table_on_the_page_is_the_dict(root):
    page = (root / "book" / "losses.md").read_text(encoding="utf-8")
    expected = []
    for name, spec in LOSSES.items():
        settings = ", ".join(f"`{k}={v}`" for k, v in spec.settings.items()) or "none"
        compares = {"sum": "sums", "mean": "means", "none": ""}[spec.logps]
        cells = (f"`{name}`", spec.title, in_words(spec.needs), compares, settings, spec.source)
        expected.append(f"| {' | '.join(cells)} |")
    assert [line for line in page.splitlines() if line.startswith("| `") and line.count("|") == 7] == expected


def test_the_page_gives_a_formula_and_the_settings_of_every_pair_objective(root):
    page = (root / "book" / "losses.md").read_text(encoding="utf-8")
    section = page.split("### The pairs' losses as formulas")[1].split("###")[0]
    rows = {line.split("`")[1]: line for line in section.splitlines() if line.startswith("| `")}
    assert set(rows) == set(PAIRS) - set(PAPER)
    for name, line in rows.items():
        knobs = set(LOSSES[name].settings) - {"beta", "beta_min"}
        assert all(f"`{knob}`" in line for knob in knobs)
