r"""Mistakes that one can make with each objective, and the evidence that `bdpo.losses.audit.check` finds them.

``mutants(name)`` are functions that are the objective but for one mistake; each must fail the check.
``equivalents(name)`` are changes that look like mistakes and are none: each must pass it, and comes with the reason.
`kill_table` runs both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bdpo.losses import LOSSES
from bdpo.losses.audit import Loss, check, leaves

# --- mistakes ---------------------------------------------------------------------------------------------------------

#: A building block of a mistake: some function of tensors.
Part = Callable[..., Any]
Change = Callable[[dict[str, Any], dict[str, Any]], tuple[dict[str, Any], dict[str, Any]]]


def _changed(name: str, change: Change, after: Callable[[Tensor], Tensor] = lambda value: value) -> Loss:
    """The loss with its arguments changed by name, tensors and settings, and its result changed."""
    spec = LOSSES[name]

    def loss(*tensors: Tensor, **settings: Any) -> Tensor:
        given, chosen = change(dict(zip(spec.needs, tensors, strict=True)), dict(settings))
        return after(spec(*(given[need] for need in spec.needs), **chosen))

    return loss


def _with(**changed: Callable[[dict[str, Any]], Tensor]) -> Change:
    """Arguments replaced by functions of all arguments."""
    return lambda given, settings: ({**given, **{k: f(given) for k, f in changed.items()}}, settings)


def _setting(name: str, f: Callable[[Any], Any]) -> Change:
    return lambda given, settings: (given, {**settings, name: f(settings[name])})


def _constant(value: float | bool | str, given: Any) -> Any:
    return value


def _swapped(*pairs: tuple[str, str]) -> Change:
    table = {**dict(pairs), **{b: a for a, b in pairs}}
    return lambda given, settings: ({need: given[table.get(need, need)] for need in given}, settings)


def _nothing(given: dict[str, Any], settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return given, settings


def _mean_of_all(value: Tensor) -> Tensor:
    return value.mean().expand_as(value)


def _by_needs(name: str) -> Iterator[tuple[str, Loss]]:
    """Mistakes that can be made with the arguments of a loss, whatever it computes of them."""
    needs = LOSSES[name].needs
    sides = [(need, need.replace("chosen", "rejected")) for need in needs if "chosen" in need]
    sides = [(a, b) for a, b in sides if b in needs]
    if sides:
        yield "winner and loser swapped", _changed(name, _swapped(*sides))
    if "ref_chosen_logps" in needs:
        policy_and_ref = [(f"policy_{side}_logps", f"ref_{side}_logps") for side in ("chosen", "rejected")]
        yield "policy and reference swapped", _changed(name, _swapped(*policy_and_ref))
        yield "references crossed", _changed(name, _swapped(("ref_chosen_logps", "ref_rejected_logps")))
        dropped = {f"ref_{side}_logps": (lambda g, s=side: 0 * g[f"ref_{s}_logps"]) for side in ("chosen", "rejected")}
        yield "reference dropped", _changed(name, _with(**dropped))
    if "ref_logps" in needs:
        yield "policy and reference swapped", _changed(name, _swapped(("policy_logps", "ref_logps")))
        yield "reference dropped", _changed(name, _with(ref_logps=lambda g: 0 * g["ref_logps"]))
    if LOSSES[name].logps == "sum" and "chosen_lengths" not in needs:
        lengths = dict(zip(needs, (7.0, 9.0, 7.0, 9.0), strict=False))
        means = {n: (lambda g, n=n, k=k: g[n] / k) for n, k in lengths.items() if n.endswith("logps")}
        yield "token mean for token sum", _changed(name, _with(**means))
    for need in needs:
        if need.endswith("_lengths"):
            yield f"{need} ignored", _changed(name, _with(**{need: lambda g, n=need: torch.ones_like(g[n])}))
            yield f"{need} one too many", _changed(name, _with(**{need: lambda g, n=need: g[n] + 1}))
    if {"chosen_lengths", "rejected_lengths"} <= set(needs):
        yield "lengths swapped", _changed(name, _swapped(("chosen_lengths", "rejected_lengths")))
    if "margin_mean" in needs:
        yield "mean of the margins ignored", _changed(name, _with(margin_mean=lambda g: 0 * g["margin_mean"]))
    if "margin_std" in needs:
        yield "deviation of the margins ignored", _changed(name, _with(margin_std=lambda g: 0 * g["margin_std"] + 1))
        yield "variance for deviation", _changed(name, _with(margin_std=lambda g: g["margin_std"].square()))
    if "kl" in needs:
        yield "reference point ignored", _changed(name, _with(kl=lambda g: 0 * g["kl"]))
        yield "reference point doubled", _changed(name, _with(kl=lambda g: 2 * g["kl"]))
    if "desirable" in needs:
        yield "labels turned round", _changed(name, _with(desirable=lambda g: ~g["desirable"]))
        yield "all desirable", _changed(name, _with(desirable=lambda g: torch.ones_like(g["desirable"])))
    if "rewards" in needs:
        yield "reward's sign flipped", _changed(name, _with(rewards=lambda g: -g["rewards"]))
        yield "policy and reference swapped", _changed(name, _swapped(("logits", "ref_logits")))
        yield "uniform reference", _changed(name, _with(ref_logits=lambda g: 0 * g["ref_logits"]))
        yield "rewards of other responses", _changed(name, _with(rewards=lambda g: g["rewards"].roll(1, -1)))
    for i in leaves(name):
        yield f"gradient by {needs[i]} lost", _changed(name, _with(**{needs[i]: lambda g, n=needs[i]: g[n].detach()}))


def _by_settings(name: str) -> Iterator[tuple[str, Loss]]:
    """Each number ignored, and moved by a tenth; each switch thrown."""
    for knob, default in LOSSES[name].settings.items():
        if isinstance(default, bool):
            yield f"{knob} toggled", _changed(name, _setting(knob, lambda v: not v))
        else:
            yield f"{knob} ignored", _changed(name, _setting(knob, functools.partial(_constant, default)))
            yield f"{knob} a tenth too small", _changed(name, _setting(knob, lambda v: 0.9 * v))
        if knob == "beta":
            yield "beta inverted", _changed(name, _setting(knob, lambda v: 1 / v))


def _by_result(name: str) -> Iterator[tuple[str, Loss]]:
    """Mistakes with the value of a loss, and with the precision it is computed in."""
    spec = LOSSES[name]
    yield "sign flipped", _changed(name, _nothing, lambda value: -value)
    yield "batch mean for single losses", _changed(name, _nothing, _mean_of_all)
    yield "bits for nats", _changed(name, _nothing, lambda value: value * 1.4426950408889634)
    yield "a millionth too large", _changed(name, _nothing, lambda value: value * (1 + 1e-6))

    def low(*tensors: Tensor, **settings: Any) -> Tensor:
        return spec(*(x if x.dtype is torch.bool else x.float() for x in tensors), **settings).double()

    yield "float32 inside", low


# Textbook forms: what one would type first, to build mistakes from.


def textbook(lam_win: Part, lam_lose: Part) -> Loss:
    """The six objectives as typed, from weights of winner and loser: functions of (w, x, rw, rx, clip)."""

    def loss(
        w: Tensor, x: Tensor, rw: Tensor, rx: Tensor, *, beta: float, clip: float = 0.5, detach_lambda: bool = True
    ) -> Tensor:
        lams = (torch.as_tensor(lam(w, x, rw, rx, clip)) for lam in (lam_win, lam_lose))
        weight_win, weight_lose = (lam.detach() if detach_lambda else lam for lam in lams)
        return -logsigmoid(beta * (weight_win * (w - rw) - weight_lose * (x - rx)))

    return loss


def value_preserving(lam: Part) -> Loss:
    """Eq 25 as typed, from a weight of the winner: DPO's value, the winner's gradient times λ."""

    def loss(
        w: Tensor, x: Tensor, rw: Tensor, rx: Tensor, *, beta: float, clip: float = 0.5, detach_lambda: bool = True
    ) -> Tensor:
        weight = lam(w, x, rw, rx, clip).detach()
        steered = w.detach() + weight * (w - w.detach())
        return -logsigmoid(beta * ((steered - rw) - (x - rx)))

    return loss


def one(*_: Any) -> float:
    """The weight of DPO."""
    return 1.0


def lambda_asym(w: Tensor, x: Tensor, rw: Tensor, rx: Tensor, clip: float) -> Tensor:
    """λ of Eq 26 for the asymmetric form."""
    return 1 + (w - x).clamp(0, clip)


def lambda_sym(w: Tensor, x: Tensor, rw: Tensor, rx: Tensor, clip: float) -> Tensor:
    """λ of Eq 26 for the symmetric form."""
    return 1 + (w - x).clamp(1 / (1 + clip) - 1, clip)


def share_win(w: Tensor, x: Tensor, *_: Any) -> Tensor:
    """The winner's weight of Eq 29, as typed."""
    return x / (w + x)


def share_lose(w: Tensor, x: Tensor, *_: Any) -> Tensor:
    """The loser's weight of Eq 29, as typed."""
    return w / (w + x)


def margin(w: Tensor, x: Tensor, rw: Tensor, rx: Tensor, *_: Tensor) -> Tensor:
    """The difference of the log-ratios."""
    return (w - rw) - (x - rx)


def token_gap(w: Tensor, x: Tensor, n: Tensor, k: Tensor) -> Tensor:
    """The difference of the mean log-probs."""
    return w / n - x / k


def token_margin(w: Tensor, x: Tensor, rw: Tensor, rx: Tensor, n: Tensor, k: Tensor, *_: Tensor) -> Tensor:
    """The difference of the mean log-ratios."""
    return (w - rw) / n - (x - rx) / k


def of_margin(f: Part) -> Loss:
    """A loss that is a function (margin, β, …) of DPO's margin."""
    return lambda *a, beta, **k: f(margin(*a), beta, *(v for knob, v in k.items() if knob != "detach_lambda"))


def with_likelihood(f: Part) -> Loss:
    """DPO or CPO with a term added: a function (w, x, rw, n, weight, β), references 0 and lengths 1 where not given."""

    def loss(w: Tensor, x: Tensor, *rest: Tensor, beta: float, sft_weight: float) -> Tensor:
        rw, rx, n = rest or (torch.zeros_like(w), torch.zeros_like(w), torch.ones_like(w))
        return -logsigmoid(beta * margin(w, x, rw, rx)) + f(w, x, rw, n, sft_weight, beta)

    return loss


def adaptive(shift: Part, gap: Part = lambda a: token_gap(a[0], a[1], a[4], a[5])) -> Loss:
    """α-DPO with another target: a function (arguments, β, γ, α)."""
    return lambda *a, beta, gamma, alpha: -logsigmoid(beta * gap(a) - gamma - shift(a, beta, gamma, alpha))


def standardised(a: tuple[Tensor, ...]) -> Tensor:
    """The margin of α-DPO in standard deviations."""
    return (token_margin(*a) - a[6]) / a[7]


def dynamic(scale: Part) -> Loss:
    """β-DPO with another β: a function (margin, running mean, β, α, floor)."""
    return lambda *a, beta, alpha, beta_min: -logsigmoid(scale(margin(*a), a[4], beta, alpha, beta_min) * margin(*a))


def batch_beta(m: Tensor, mean: Tensor, beta: float, alpha: float, floor: float) -> Tensor:
    """The β of a batch."""
    return (beta * (1 + alpha * (m.mean() - mean))).clamp(min=floor)


def paired(
    points: Part, weigh: Part = lambda good, bad: (good + bad) / 2, last: Part = lambda t: logsigmoid(t).exp()
) -> Loss:
    """KTO of pairs with other reference points: a function (winners' log-ratios, losers')."""

    def loss(w: Tensor, x: Tensor, rw: Tensor, rx: Tensor, *, beta: float, detach_kl: bool) -> Tensor:
        z_win, z_lose = points(w - rw, x - rx)
        if detach_kl:
            z_win, z_lose = z_win.detach(), z_lose.detach()
        return weigh(last(beta * (z_lose - (w - rw))), last(beta * ((x - rx) - z_win)))

    return loss


def clamped_means(r_win: Tensor, r_lose: Tensor) -> tuple[Tensor, Tensor]:
    """The reference points of KTO of pairs."""
    return r_win.mean().clamp(min=0), r_lose.mean().clamp(min=0)


def judged(f: Part) -> Loss:
    """KTO as another function (gain, weight, point): the gain over z₀ and z₀ itself, times β and the label's sign."""

    def loss(
        p: Tensor,
        r: Tensor,
        good: Tensor,
        kl: Tensor,
        *,
        beta: float,
        desirable_weight: float,
        undesirable_weight: float,
    ) -> Tensor:
        sign = torch.where(good, 1.0, -1.0).double()
        weight = torch.where(good, desirable_weight, undesirable_weight).double()
        return f(sign * beta * ((p - r) - kl), weight, sign * beta * kl)

    return loss


def calibrated(f: Part) -> Loss:
    """SLiC as another function (gap, δ, ω, w, x)."""
    return lambda w, x, *, delta, sft_weight: f(w - x, delta, sft_weight, w, x)


def of_odds(f: Part) -> Loss:
    """ORPO as another function (mean log-prob of the winner, of the loser, λ, w, x)."""
    return lambda w, x, n, k, *, odds_weight: f(w / n, x / k, odds_weight, w, x)


def log_odds(log_p: Tensor) -> Tensor:
    """``log(p / (1 - p))``, accurate near 0 and 1."""
    return log_p - (-torch.expm1(log_p)).log()


def tabular(weigh: Part, cost: Part) -> Loss:
    """The policy objective with other weights (log π, log ref) and another cost (log π, log ref)."""

    def loss(logits: Tensor, ref_logits: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
        p, q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
        return (weigh(p, q) * (beta * cost(p, q) - rewards)).sum(-1)

    return loss


def _logistic(build: Callable[[Part], Loss]) -> dict[str, Loss]:
    """Other functions of the argument of -log σ, and its form that overflows; ``build`` makes a loss of one."""
    return {
        "logarithm of a sigmoid": build(lambda t: -t.sigmoid().log()),
        "hinge for logistic": build(lambda t: torch.relu(1 - t)),
        "exponential for logistic": build(lambda t: (-t).exp()),
        "sigmoid without logarithm": build(lambda t: (-t).sigmoid()),
        "square for logistic": build(lambda t: (t - 1).square()),
    }


def _naive(name: str) -> dict[str, Loss]:
    """Mistakes of the naive balanced objectives."""
    lam, other = (lambda_asym, lambda_sym) if name.endswith("asym") else (lambda_sym, lambda_asym)
    v1 = "v2" not in name
    build = value_preserving if v1 else lambda f: textbook(f, one)
    return {
        "λ inverted": build(lambda *a: 1 / lam(*a)),
        "λ without its 1": build(lambda *a: lam(*a) - 1),
        "λ with the pair turned round": build(lambda w, x, *r: lam(x, w, *r)),
        "λ from the reference": build(lambda w, x, rw, rx, clip: lam(rw, rx, w, x, clip)),
        "λ from log-ratios": build(lambda w, x, rw, rx, clip: lam(w - rw, x - rx, rw, rx, clip)),
        "λ from probabilities": build(lambda w, x, rw, rx, clip: 1 + (w - x).exp().clamp(0, clip)),
        "the other side's clip": build(other),
        "clip of either sign": build(lambda w, x, rw, rx, clip: 1 + (w - x).clamp(-clip, clip)),
        "no clip": build(lambda w, x, *_: 1 + (w - x)),
        "λ on the loser": textbook(one, lam),
        "no λ": textbook(one, one),
        "the other version": LOSSES[name.replace("nbdpo", "nbdpo_v2") if v1 else name.replace("_v2", "")].function,
    }


def _likelihood() -> dict[str, Loss]:
    """Mistakes with the likelihood term of DPO + SFT and of CPO."""
    return {
        "likelihood of the loser": with_likelihood(lambda w, x, rw, n, weight, beta: -weight * x / n),
        "likelihood with the wrong sign": with_likelihood(lambda w, x, rw, n, weight, beta: weight * w / n),
        "likelihood detached": with_likelihood(lambda w, x, rw, n, weight, beta: -weight * w.detach() / n),
        "likelihood times β": with_likelihood(lambda w, x, rw, n, weight, beta: -beta * weight * w / n),
        "likelihoods of both": with_likelihood(lambda w, x, rw, n, weight, beta: -weight * (w + x) / n),
        "likelihood left out": with_likelihood(lambda w, x, rw, n, weight, beta: 0 * w),
    }


def _smoothed(clean: Part, flipped: Part) -> Loss:
    """A weighted sum of the losses of the label and of the flipped label, weights as functions of ε."""
    return of_margin(lambda m, beta, e: -clean(e) * logsigmoid(beta * m) - flipped(e) * logsigmoid(-beta * m))


def _own(name: str) -> dict[str, Loss]:
    """Mistakes that belong to one loss."""
    soft, relu = logsigmoid, torch.relu
    if name.startswith("nbdpo"):
        return _naive(name)
    if name == "dpo":
        return {
            **_logistic(lambda f: of_margin(lambda m, beta: f(beta * m))),
            "loser halved": textbook(one, lambda *_: 0.5),
            "reference of the loser only": lambda w, x, rw, rx, **k: LOSSES["dpo"](w, x, 0 * rw, rx, **k),
            "one label in a million flipped": of_margin(lambda m, beta: -soft(beta * m) + 1e-6 * beta * m),
        }
    if name == "bdpo":
        return {
            "shares swapped": textbook(share_lose, share_win),
            "shares of one half": textbook(lambda *_: 0.5, lambda *_: 0.5),
            "shares not normalised": textbook(lambda w, x, *_: x, lambda w, x, *_: w),
            "shares from the reference": textbook(
                lambda w, x, rw, rx, _: share_win(rw, rx), lambda w, x, rw, rx, _: share_lose(rw, rx)
            ),
            "shares of probabilities": textbook(lambda w, x, *_: (w - x).sigmoid(), lambda w, x, *_: (x - w).sigmoid()),
            "one minus a share near one": textbook(share_win, lambda *a: 1 - share_win(*a)),
            "differentiated as typed": textbook(share_win, share_lose),
        }
    if name == "ipo":
        return {
            "target 1/β": of_margin(lambda m, beta: (m - 1 / beta).square()),
            "target β/2": of_margin(lambda m, beta: (m - beta / 2).square()),
            "target of the other sign": of_margin(lambda m, beta: (m + 1 / (2 * beta)).square()),
            "β times the margin, target ½": of_margin(lambda m, beta: (beta * m - 0.5).square()),
            "absolute for square": of_margin(lambda m, beta: (m - 1 / (2 * beta)).abs()),
            "square only below the target": of_margin(lambda m, beta: relu(1 / (2 * beta) - m).square()),
            "half of the square": of_margin(lambda m, beta: (m - 1 / (2 * beta)).square() / 2),
        }
    if name == "hinge":
        return {
            "logistic for hinge": of_margin(lambda m, beta: -soft(beta * m)),
            "square of the hinge": of_margin(lambda m, beta: relu(1 - beta * m).square()),
            "no hinge": of_margin(lambda m, beta: 1 - beta * m),
            "margin β, slope 1": of_margin(lambda m, beta: relu(beta - m)),
            "margin 1/β, slope 1": of_margin(lambda m, beta: relu(1 / beta - m)),
            "smooth corner": of_margin(lambda m, beta: torch.nn.functional.softplus(1 - beta * m, beta=30)),
            "slope beyond the corner": of_margin(lambda m, beta: torch.nn.functional.leaky_relu(1 - beta * m, 1e-3)),
        }
    if name == "conservative_dpo":
        return {
            **_logistic(lambda f: of_margin(lambda m, beta, e: (1 - e) * f(beta * m) + e * f(-beta * m))),
            "as robust DPO": LOSSES["robust_dpo"].function,
            "flipped term subtracted": _smoothed(lambda e: 1 - e, lambda e: -e),
            "clean term not weighted": _smoothed(lambda e: 1, lambda e: e),
            "weights swapped": _smoothed(lambda e: e, lambda e: 1 - e),
            "smoothing over two classes": _smoothed(lambda e: 1 - e / 2, lambda e: e / 2),
        }
    if name == "robust_dpo":
        return {
            **_logistic(
                lambda f: of_margin(lambda m, beta, e: ((1 - e) * f(beta * m) - e * f(-beta * m)) / (1 - 2 * e))
            ),
            "as conservative DPO": LOSSES["conservative_dpo"].function,
            "not divided by 1 - 2ε": _smoothed(lambda e: 1 - e, lambda e: -e),
            "divided by 1 - ε": _smoothed(lambda e: 1, lambda e: -e / (1 - e)),
            "flipped term added": _smoothed(lambda e: (1 - e) / (1 - 2 * e), lambda e: e / (1 - 2 * e)),
            "lower bound of 0": lambda *a, **k: LOSSES["robust_dpo"](*a, **k).clamp(min=0),
        }
    if name == "dpo_sft":
        return {
            **_likelihood(),
            "log-ratio for log-prob": with_likelihood(lambda w, x, rw, n, weight, beta: -weight * (w - rw) / n),
            "weight on the other term": lambda *a, beta, sft_weight: (
                -sft_weight * soft(beta * margin(*a)) - a[0] / a[4]
            ),
            "hinge for logistic": lambda *a, beta, sft_weight: relu(1 - beta * margin(*a)) - sft_weight * a[0] / a[4],
        }
    if name == "cpo":
        return {
            **_likelihood(),
            "weight on the other term": lambda w, x, *, beta, sft_weight: -sft_weight * soft(beta * (w - x)) - w,
            "hinge for logistic": lambda w, x, *, beta, sft_weight: relu(1 - beta * (w - x)) - sft_weight * w,
            "probabilities for log-probs": lambda w, x, *, beta, sft_weight: (
                -soft(beta * (w.exp() - x.exp())) - sft_weight * w
            ),
        }
    if name == "slic":
        return {
            "logistic for hinge": calibrated(lambda gap, delta, weight, w, x: -soft(gap - delta) - weight * w),
            "square of the hinge": calibrated(lambda gap, delta, weight, w, x: relu(delta - gap).square() - weight * w),
            "no hinge": calibrated(lambda gap, delta, weight, w, x: delta - gap - weight * w),
            "hinge over everything": calibrated(lambda gap, delta, weight, w, x: relu(delta - gap - weight * w)),
            "likelihood of the loser": calibrated(lambda gap, delta, weight, w, x: relu(delta - gap) - weight * x),
            "likelihood with the wrong sign": calibrated(
                lambda gap, delta, weight, w, x: relu(delta - gap) + weight * w
            ),
            "margin with the wrong sign": calibrated(lambda gap, delta, weight, w, x: relu(-delta - gap) - weight * w),
        }
    if name == "simpo":
        return {
            **_logistic(lambda f: lambda *a, beta, gamma: f(beta * token_gap(*a) - gamma)),
            "target with the wrong sign": lambda *a, beta, gamma: -soft(beta * token_gap(*a) + gamma),
            "target times β": lambda *a, beta, gamma: -soft(beta * (token_gap(*a) - gamma)),
            "target over β": lambda *a, beta, gamma: -soft(beta * token_gap(*a) - gamma / beta),
            "one length for both": lambda w, x, n, k, **s: LOSSES["simpo"](w, x, n, n, **s),
            "sums over the total length": lambda w, x, n, k, *, beta, gamma: -soft(beta * (w - x) / (n + k) - gamma),
        }
    if name == "orpo":
        return {
            "log(1 - exp) near certainty": of_odds(
                lambda p, q, weight, w, x: -p - weight * soft(p - q - ((-p.exp()).log1p() - (-q.exp()).log1p()))
            ),
            "probability ratio for odds ratio": of_odds(lambda p, q, weight, w, x: -p - weight * soft(p - q)),
            "odds of sums": of_odds(lambda p, q, weight, w, x: -p - weight * soft(log_odds(w) - log_odds(x))),
            "likelihood summed": of_odds(lambda p, q, weight, w, x: -w - weight * soft(log_odds(p) - log_odds(q))),
            "likelihood of the loser": of_odds(
                lambda p, q, weight, w, x: -q - weight * soft(log_odds(p) - log_odds(q))
            ),
            "weight inside the logistic": of_odds(
                lambda p, q, weight, w, x: -p - soft(weight * (log_odds(p) - log_odds(q)))
            ),
            "odds of the loser only": of_odds(lambda p, q, weight, w, x: -p - weight * soft(p - log_odds(q))),
            "logarithm of a sigmoid": of_odds(
                lambda p, q, weight, w, x: -p - weight * (log_odds(p) - log_odds(q)).sigmoid().log()
            ),
        }
    if name == "alpha_dpo":
        gap_of_ratios = lambda a: token_margin(*a)  # noqa: E731
        own_gap = lambda a: (token_gap(a[0], a[1], a[4], a[5]) - a[6]) / a[7]  # noqa: E731
        return {
            "target not detached": adaptive(lambda a, beta, gamma, alpha: alpha * standardised(a)),
            "target times β": adaptive(
                lambda a, beta, gamma, alpha: (beta - 1) * gamma + beta * alpha * standardised(a).detach()
            ),
            "target with the wrong sign": adaptive(lambda a, beta, gamma, alpha: -alpha * standardised(a).detach()),
            "log-ratios for log-probs": adaptive(
                lambda a, beta, gamma, alpha: alpha * standardised(a).detach(), gap_of_ratios
            ),
            "margin of sums": adaptive(lambda a, beta, gamma, alpha: alpha * ((margin(*a) - a[6]) / a[7]).detach()),
            "not divided by the deviation": adaptive(
                lambda a, beta, gamma, alpha: alpha * (token_margin(*a) - a[6]).detach()
            ),
            "margin of the policy alone": adaptive(lambda a, beta, gamma, alpha: alpha * own_gap(a).detach()),
        }
    if name == "beta_dpo":
        return {
            "β not detached": dynamic(batch_beta),
            "no floor": dynamic(lambda m, mean, beta, alpha, floor: (beta * (1 + alpha * (m.mean() - mean))).detach()),
            "β of the pair": dynamic(
                lambda m, mean, beta, alpha, floor: (beta * (1 + alpha * (m - mean))).clamp(min=floor).detach()
            ),
            "β falls with the margin": dynamic(
                lambda m, mean, beta, alpha, floor: batch_beta(m, mean, beta, -alpha, floor).detach()
            ),
            "change of β not relative": dynamic(
                lambda m, mean, beta, alpha, floor: (beta + alpha * (m.mean() - mean)).clamp(min=floor).detach()
            ),
            "rewards for margins": dynamic(
                lambda m, mean, beta, alpha, floor: batch_beta(beta * m, mean, beta, alpha, floor).detach()
            ),
            "median for mean": dynamic(
                lambda m, mean, beta, alpha, floor: batch_beta(m.median(), mean, beta, alpha, floor).detach()
            ),
        }
    if name == "kto_pair":
        return {
            "one minus a sigmoid": paired(clamped_means, last=lambda t: 1 - (-t).sigmoid()),
            "a plain sigmoid, whose slope vanishes": paired(clamped_means, last=torch.sigmoid),
            "sum of the two halves": paired(clamped_means, lambda good, bad: good + bad),
            "winner's half only": paired(clamped_means, lambda good, bad: good),
            "loser's half only": paired(clamped_means, lambda good, bad: bad),
            "reference points swapped": paired(lambda r_win, r_lose: clamped_means(r_lose, r_win)),
            "reference points of 0": paired(lambda r_win, r_lose: (0 * r_win, 0 * r_lose)),
            "reference points not clamped": paired(lambda r_win, r_lose: (r_win.mean(), r_lose.mean())),
            "reference points of the pair": paired(lambda r_win, r_lose: (r_win.clamp(min=0), r_lose.clamp(min=0))),
            "logarithms, as in DPO": paired(clamped_means, last=lambda t: -soft(-t)),
        }
    if name == "kto":
        return {
            "one minus a sigmoid": judged(lambda gain, weight, point: weight * (1 - gain.sigmoid())),
            "a plain sigmoid, whose slope vanishes": judged(lambda gain, weight, point: weight * (-gain).sigmoid()),
            "logarithm of the sigmoid": judged(lambda gain, weight, point: -weight * soft(gain)),
            "no sigmoid": judged(lambda gain, weight, point: -weight * gain),
            "reference point with the wrong sign": judged(
                lambda gain, weight, point: weight * soft(-gain - 2 * point).exp()
            ),
            "value for loss": judged(lambda gain, weight, point: weight * soft(gain).exp()),
            "weights inside": judged(lambda gain, weight, point: soft(-weight * gain).exp()),
            "no weights": judged(lambda gain, weight, point: soft(-gain).exp()),
        }
    if name == "reward_bt":
        return {
            **_logistic(lambda f: lambda w, x: f(w - x)),
            "rewards added": lambda w, x: -soft(w + x),
            "difference doubled": lambda w, x: -soft(2 * (w - x)),
            "difference of sigmoids": lambda w, x: -soft(w.sigmoid() - x.sigmoid()),
            "a loss for each": lambda w, x: -soft(w) - soft(-x),
            "margin of 1": lambda w, x: -soft(w - x - 1),
        }
    return {  # rlhf_tabular
        "expectation under the reference": tabular(lambda p, q: q.exp(), lambda p, q: p - q),
        "weights detached": tabular(lambda p, q: p.exp().detach(), lambda p, q: p - q),
        "weights not normalised": tabular(lambda p, q: (p - p.amax(-1, keepdim=True)).exp(), lambda p, q: p - q),
        "no penalty": tabular(lambda p, q: p.exp(), lambda p, q: 0 * p),
        "entropy for divergence": tabular(lambda p, q: p.exp(), lambda p, q: p),
        "divergence with the wrong sign": tabular(lambda p, q: p.exp(), lambda p, q: q - p),
        "reverse divergence": tabular(lambda p, q: p.exp(), lambda p, q: (q - p).exp() * (q - p)),
        "square of the log-ratio": tabular(lambda p, q: p.exp(), lambda p, q: (p - q).square() / 2),
        "mean over responses": lambda *a, **k: LOSSES["rlhf_tabular"](*a, **k) / a[0].shape[-1],
        "logarithm of a softmax": tabular(lambda p, q: p.exp(), lambda p, q: p.exp().log() - q.exp().log()),
    }


@functools.cache
def equivalents(name: str) -> dict[str, tuple[Loss, str]]:
    """Changes that :func:`~bdpo.losses.audit.check` rightly lets pass, each with the reason why it is no mistake."""
    found: dict[str, tuple[Loss, str]] = {}
    toggled = _changed(name, _setting("detach_lambda", lambda v: not v))
    if name == "dpo":
        found["detach_lambda toggled"] = toggled, "the weights are the constant 1"
    if name in ("nbdpo_asym", "nbdpo_sym"):
        found["detach_lambda toggled"] = (
            toggled,
            "λ multiplies a difference that is always 0; only second derivatives see it",
        )
    if name in ("dpo", "ipo", "hinge", "conservative_dpo", "robust_dpo", "beta_dpo"):
        found["a prefix in both responses"] = (
            _changed(
                name,
                _with(**{n: (lambda g, n=n: g[n] - 0.5) for n in ("policy_chosen_logps", "policy_rejected_logps")}),
            ),
            "the margin is a difference of winner and loser",
        )
    if name == "reward_bt":
        shift = {n: (lambda g, n=n: g[n] + 0.5) for n in ("chosen_rewards", "rejected_rewards")}
        found["0.5 added to both rewards"] = _changed(name, _with(**shift)), "only the difference counts"
    if name == "rlhf_tabular":
        found["0.5 added to all logits"] = (
            _changed(name, _with(logits=lambda g: g["logits"] + 0.5)),
            "softmax is invariant",
        )
    return found


@functools.cache
def mutants(name: str) -> dict[str, Loss]:
    """Functions that are the objective but for one mistake, by the name of the mistake."""
    found = {**dict(_by_needs(name)), **dict(_by_settings(name)), **dict(_by_result(name)), **_own(name)}
    return {what: loss for what, loss in found.items() if what not in equivalents(name)}


class Row(NamedTuple):
    """What became of one mutant: ``found`` is the first wrong number, or None if the check passed it."""

    loss: str
    mutant: str
    found: str | None
    argued: str | None  #: why it is no mistake, for an equivalent


def kill_table(*names: str) -> list[Row]:
    """Every mutant and every equivalent of the named losses, all by default, run through the check.

    Raises
    ------
    RuntimeError
        If a loss fails its own check: then the fate of its mutants says nothing.
    """
    rows = []
    for name in names or LOSSES:
        if (wrong := check(LOSSES[name].function, name)) is not None:
            raise RuntimeError(f"{name} fails its own check: {wrong}")
        rows += [Row(name, what, check(mutant, name), None) for what, mutant in mutants(name).items()]
        rows += [Row(name, what, check(same, name), why) for what, (same, why) in equivalents(name).items()]
    return rows
