r"""Every objective of `bdpo.losses` once more, in 60 digits and by hand, and a check of any function against it.

:func:`check` compares any function with the objective that it claims to be: value and every gradient, to eight digits,
on a domain made of edges, ties, near-cancellations and random points. The formulas below share no code with
`bdpo.losses`: values and derivatives were written down from the equations. That the check finds mistakes is shown in
`bdpo.losses.mutants`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mpmath as mp
import torch
from torch import Tensor

from bdpo.losses import LOSSES

Loss = Callable[..., Tensor]
#: A number and the size to which its error is relative: its own, or that of the terms it is a sum of.
Sized = tuple[Any, Any]

RELATIVE = 1e-8
UNDERFLOW = 1e-307  # below this float64 has no relative accuracy to offer
DIGITS = 60

#: Objectives whose pairs see each other: the check gives them small batches.
COUPLED = ("kto_pair", "beta_dpo")


# --- the formulas, by hand --------------------------------------------------------------------------------------------


def _only(x: Any) -> Sized:
    return x, abs(x)


def _total(*terms: Any) -> Sized:
    return mp.fsum(terms), mp.fsum(abs(t) for t in terms)


def _softplus(x: Any) -> Any:
    return mp.log1p(mp.exp(x))


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + mp.exp(-x))


def _paper(
    name: str, w: Any, x: Any, rw: Any, rx: Any, *, beta: Any, clip: Any = None, detach_lambda: bool
) -> list[Sized]:
    """Eqs 1 and 25-29. With λ attached, v2's derivatives are the sums λ + r and 1 + r."""
    r_win, r_lose = w - rw, x - rx
    if name == "bdpo":
        scale = 1 if detach_lambda else (rw + rx) / (w + x)
        margin = (w * rx - x * rw) / (w + x)
        slopes = _only(x / (w + x) * scale), _only(-w / (w + x) * scale)
    else:
        low = 0 if name.endswith("asym") or name == "dpo" else 1 / (1 + clip) - 1
        gap = w - x
        lam = 1 if name == "dpo" else 1 + min(max(gap, low), clip)
        v2 = "v2" in name
        through = r_win if v2 and not detach_lambda and low <= gap <= clip else 0
        margin = (lam if v2 else 1) * r_win - r_lose
        slopes = _total(lam, through), _total(-1, -through)
    pull = beta * _sigmoid(-beta * margin)
    return [_only(_softplus(-beta * margin)), *((-pull * s, pull * size) for s, size in slopes)]


def _ipo(w: Any, x: Any, rw: Any, rx: Any, *, beta: Any) -> list[Sized]:
    m, c = (w - rw) - (x - rx), 1 / (2 * beta)
    size = abs(m) + c
    return [((m - c) ** 2, size**2), (2 * (m - c), 2 * size), (2 * (c - m), 2 * size)]


def _hinge(w: Any, x: Any, rw: Any, rx: Any, *, beta: Any) -> list[Sized]:
    m = (w - rw) - (x - rx)
    if beta * m >= 1:
        return [_only(mp.mpf(0))] * 3
    return [_total(1, -beta * m), _only(-beta), _only(beta)]


def _conservative(w: Any, x: Any, rw: Any, rx: Any, *, beta: Any, label_smoothing: Any) -> list[Sized]:
    t, e = beta * ((w - rw) - (x - rx)), label_smoothing
    value = (1 - e) * _softplus(-t) + e * _softplus(t)
    kept, flipped = beta * (1 - e) * _sigmoid(-t), beta * e * _sigmoid(t)
    return [_only(value), _total(-kept, flipped), _total(kept, -flipped)]


def _robust(w: Any, x: Any, rw: Any, rx: Any, *, beta: Any, label_smoothing: Any) -> list[Sized]:
    t, e = beta * ((w - rw) - (x - rx)), label_smoothing
    scale = 1 / (1 - 2 * e)
    slope = beta * scale * ((1 - e) * _sigmoid(-t) + e * _sigmoid(t))
    return [_total((1 - e) * scale * _softplus(-t), -e * scale * _softplus(t)), _only(-slope), _only(slope)]


def _dpo_sft(w: Any, x: Any, rw: Any, rx: Any, n: Any, *, beta: Any, sft_weight: Any) -> list[Sized]:
    t = beta * ((w - rw) - (x - rx))
    pull = beta * _sigmoid(-t)
    return [_only(_softplus(-t) - sft_weight * w / n), _only(-pull - sft_weight / n), _only(pull)]


def _cpo(w: Any, x: Any, *, beta: Any, sft_weight: Any) -> list[Sized]:
    t = beta * (w - x)
    pull = beta * _sigmoid(-t)
    return [_only(_softplus(-t) - sft_weight * w), _only(-pull - sft_weight), _only(pull)]


def _slic(w: Any, x: Any, *, delta: Any, sft_weight: Any) -> list[Sized]:
    short = delta - w + x > 0
    terms = (delta, -w, x) if short else (0,)
    return [_total(*terms, -sft_weight * w), _only(-int(short) - sft_weight), _only(mp.mpf(int(short)))]


def _simpo(w: Any, x: Any, n: Any, k: Any, *, beta: Any, gamma: Any) -> list[Sized]:
    t = beta * w / n - beta * x / k - gamma
    pull = beta * _sigmoid(-t)
    return [_only(_softplus(-t)), _only(-pull / n), _only(pull / k)]


def _orpo(w: Any, x: Any, n: Any, k: Any, *, odds_weight: Any) -> list[Sized]:
    p, q = mp.exp(w / n), mp.exp(x / k)
    t = mp.log(p / (1 - p)) - mp.log(q / (1 - q))
    pull = odds_weight * _sigmoid(-t)
    value = odds_weight * _softplus(-t) - w / n
    return [_only(value), _only(-(1 + pull / (1 - p)) / n), _only(pull / (1 - q) / k)]


def _alpha_dpo(
    w: Any, x: Any, rw: Any, rx: Any, n: Any, k: Any, mean: Any, std: Any, *, beta: Any, gamma: Any, alpha: Any
) -> list[Sized]:
    m = (w - rw) / n - (x - rx) / k
    t = beta * (w / n - x / k) - gamma - alpha * (m - mean) / std
    pull = beta * _sigmoid(-t)  # the target is a constant
    return [_only(_softplus(-t)), _only(-pull / n), _only(pull / k)]


def _beta_dpo(rows: list[list[Any]], *, beta: Any, alpha: Any, beta_min: Any) -> list[list[Sized]]:
    margins = [(w - rw) - (x - rx) for w, x, rw, rx, _ in rows]
    b = max(beta_min, beta * (1 + alpha * (mp.fsum(margins) / len(rows) - rows[0][4])))
    found = []
    for m in margins:
        pull = b * _sigmoid(-b * m)  # b is a constant
        found.append([_only(_softplus(-b * m)), _only(-pull), _only(pull)])
    return found


def _kto_pair(rows: list[list[Any]], *, beta: Any, detach_kl: bool) -> list[list[Sized]]:
    n = len(rows)
    r_win, r_lose = [w - rw for w, _, rw, _ in rows], [x - rx for _, x, _, rx in rows]
    mean_win, mean_lose = mp.fsum(r_win) / n, mp.fsum(r_lose) / n
    good = [_sigmoid(beta * (max(0, mean_lose) - r)) for r in r_win]
    bad = [_sigmoid(beta * (r - max(0, mean_win))) for r in r_lose]
    slope_good = [beta * s * _sigmoid(beta * (r - max(0, mean_lose))) / 2 for s, r in zip(good, r_win, strict=True)]
    slope_bad = [beta * s * _sigmoid(beta * (max(0, mean_win) - r)) / 2 for s, r in zip(bad, r_lose, strict=True)]
    found = []
    for g, b, sg, sb in zip(good, bad, slope_good, slope_bad, strict=True):
        win, lose = [-sg], [sb]
        if not detach_kl and mean_win >= 0:  # at 0 the derivative of the clamp is 1
            win += [-s / n for s in slope_bad]
        if not detach_kl and mean_lose >= 0:
            lose += [s / n for s in slope_good]
        found.append([_only((g + b) / 2), _total(*win), _total(*lose)])
    return found


def _kto(
    p: Any, r: Any, good: Any, kl: Any, *, beta: Any, desirable_weight: Any, undesirable_weight: Any
) -> list[Sized]:
    sign, weight = (1, desirable_weight) if good else (-1, undesirable_weight)
    t = sign * beta * (kl - (p - r))
    return [_only(weight * _sigmoid(t)), _only(-sign * weight * beta * _sigmoid(t) * _sigmoid(-t))]


def _reward_bt(w: Any, x: Any) -> list[Sized]:
    pull = _sigmoid(x - w)
    return [_only(_softplus(x - w)), _only(-pull), _only(pull)]


def _rlhf_tabular(logits: list[Any], ref_logits: list[Any], rewards: list[Any], *, beta: Any) -> list[Sized]:
    p, q = ([e / mp.fsum(es) for e in es] for es in ([mp.exp(v) for v in x] for x in (logits, ref_logits)))
    cost = [beta * (mp.log(a) - mp.log(b)) - r for a, b, r in zip(p, q, rewards, strict=True)]
    sizes = [beta * (abs(mp.log(a)) + abs(mp.log(b))) + abs(r) for a, b, r in zip(p, q, rewards, strict=True)]
    mean, size = (mp.fsum(a * c for a, c in zip(p, of, strict=True)) for of in (cost, sizes))
    return [(mean, size), *((a * (c - mean), a * (s + size)) for a, c, s in zip(p, cost, sizes, strict=True))]


_FORMULAS: dict[str, Callable[..., list[Sized]]] = {
    **{name: functools.partial(_paper, name) for name in LOSSES if name.startswith("nbdpo") or name in ("dpo", "bdpo")},
    "ipo": _ipo,
    "hinge": _hinge,
    "conservative_dpo": _conservative,
    "robust_dpo": _robust,
    "dpo_sft": _dpo_sft,
    "cpo": _cpo,
    "slic": _slic,
    "simpo": _simpo,
    "orpo": _orpo,
    "alpha_dpo": _alpha_dpo,
    "kto": _kto,
    "reward_bt": _reward_bt,
    "rlhf_tabular": _rlhf_tabular,
}
_COUPLED_FORMULAS: dict[str, Callable[..., list[list[Sized]]]] = {"kto_pair": _kto_pair, "beta_dpo": _beta_dpo}


def formula(name: str, rows: Sequence[Sequence[Any]], **settings: Any) -> list[list[Sized]]:
    """Value and derivatives of every row of a batch, each with the size that its error is relative to.

    A row holds what ``LOSSES[name].needs`` lists; the derivatives are those by :func:`leaves`. Numbers are mpmath's.
    """
    given = {k: v if isinstance(v, bool) else mp.mpf(v) for k, v in settings.items()}
    if name in _COUPLED_FORMULAS:
        return _COUPLED_FORMULAS[name]([list(row) for row in rows], **given)
    return [_FORMULAS[name](*row, **given) for row in rows]


def leaves(name: str) -> tuple[int, ...]:
    """Positions of the arguments that a loss is differentiated by: the policy's log-probs, the rewards, the logits."""
    needs = LOSSES[name].needs
    wanted = [i for i, n in enumerate(needs) if n.startswith("policy_") or n in ("chosen_rewards", "rejected_rewards")]
    return tuple(wanted or [needs.index("logits")])


# --- the domain -------------------------------------------------------------------------------------------------------


def _pairs() -> list[tuple[float, ...]]:
    """Four log-probs: edges, and every place where something cancels, ties or saturates."""
    edges = [-2000.0, -700.1, -35.7, -1.0, -1e-9]
    grid = list(itertools.product(edges, repeat=4))[::4]
    near = [
        (x, x * (1 + 1e-12), y, z)
        for x, (y, z) in itertools.product([-2000.0, -1.5, -1e-9], [(-2000.0, -1.0), (-1e-9, -35.7), (-700.1, -700.1)])
    ]
    start = [(x, y, x, y) for x, y in itertools.product([*edges, -3.25], repeat=2)]  # policy = reference
    started = [(x * (1 + 1e-9), y * (1 - 2e-9), x, y) for x, y, *_ in start if x > -2000]
    ties = [(-1.0, -1.0 - gap, -2.0, -1.25) for gap in (0.5, 3.0, 0.0, -0.75)]  # λ on a bound of clip = 0.5 or 3
    inside = [(-9.0, -9.125, ref, -9.5) for ref in (-1.0, -7.5, -8.0, -40.0)]  # log-ratios about -λ and -1
    return grid + near + start + started + ties + inside


@functools.cache
def domain(name: str) -> tuple[Tensor, ...]:
    """The arguments of a loss, [rows] each; [rows, 3] for a tabular policy, and [batches, 3] for the ``COUPLED``."""
    g = torch.Generator().manual_seed(0)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)

    spec = LOSSES[name]
    if spec.kind == "policy":
        scale = 10 ** draw(-3, 2.5, 200, 1)
        logits, ref, rewards = (scale * torch.randn(200, 3, generator=g, dtype=torch.float64) for _ in range(3))
        ref[:50] = logits[:50]
        return logits, ref, rewards
    if spec.kind == "reward":
        edges = torch.tensor([-1e3, -36.0, -1.0, -1e-9, 0.0, 1e-9, 2.5, 40.0, 700.1], dtype=torch.float64)
        grid = torch.cartesian_prod(edges, edges)
        return tuple(torch.cat([grid, 10 * torch.randn(100, 2, generator=g, dtype=torch.float64)]).T)
    logps = torch.cat([torch.tensor(_pairs(), dtype=torch.float64), -(10 ** draw(-9, 3.3, 80, 4))]).T
    rows = logps.shape[1]
    if name in COUPLED:
        logps = torch.cat([logps[:, torch.randperm(rows, generator=g)], -(10 ** draw(-1, 1, 4, 90))], 1)
        logps = logps[:, : 3 * (logps.shape[1] // 3)].reshape(4, -1, 3)
        rows = logps.shape[1]
    lengths = torch.tensor([1.0, 2.0, 7.0, 1000.0], dtype=torch.float64)
    found = dict(
        zip(
            ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps"),
            logps,
            strict=True,
        )
    )
    found |= {"policy_logps": logps[0], "ref_logps": logps[2], "desirable": draw(0, 1, rows) < 0.5}
    found |= {n: lengths[torch.randint(4, (rows,), generator=g)] for n in ("chosen_lengths", "rejected_lengths")}
    found |= {"margin_mean": draw(-2, 2, rows), "margin_std": 10 ** draw(-1, 2, rows), "kl": draw(0, 30, rows).round()}
    if name in COUPLED:
        found["margin_mean"] = found["margin_mean"][:, None].expand(-1, 3)
    return tuple(found[need] for need in spec.needs)


_KNOBS: dict[str, tuple[float | bool, ...]] = {
    "beta": (1e-3, 1.0, 10.0),
    "clip": (0.0, 3.0, 1e4),
    "label_smoothing": (0.0, 0.3, 0.49),
    "gamma": (0.0, 3.0),
    "alpha": (0.0, 2.0),
    "beta_min": (0.5,),
    "delta": (0.0, 30.0),
    "sft_weight": (0.0, 3.0),
    "odds_weight": (0.0, 1.0, 30.0),
    "desirable_weight": (0.0, 2.0),
    "undesirable_weight": (0.0, 3.0),
    "detach_lambda": (True, False),
    "detach_kl": (True, False),
}


def sweep(name: str) -> Iterator[dict[str, Any]]:
    """The settings that a loss is checked at: its defaults, and each setting moved alone."""
    defaults = LOSSES[name].settings
    yield dict(defaults)
    for knob, values in _KNOBS.items():
        if knob in defaults:
            yield from ({**defaults, knob: value} for value in values if value != defaults[knob])


@functools.cache
def _expected(name: str, settings: tuple[tuple[str, Any], ...]) -> tuple[Tensor, Tensor]:
    """The numbers of the formula on the domain and their sizes, [1 + derivatives, rows]."""
    arguments = domain(name)
    with mp.workdps(DIGITS):
        if name in COUPLED:
            batches = torch.stack(arguments, -1).tolist()
            found = [
                row for b in batches for row in formula(name, [[mp.mpf(v) for v in r] for r in b], **dict(settings))
            ]
        else:
            columns = [x.tolist() for x in arguments]
            rows = [[_exact(v) for v in row] for row in zip(*columns, strict=True)]
            found = formula(name, rows, **dict(settings))
        numbers = torch.tensor([[[float(v), float(s)] for v, s in row] for row in found], dtype=torch.float64)
    return numbers[..., 0].T, numbers[..., 1].T


def _exact(x: Any) -> Any:
    return [mp.mpf(v) for v in x] if isinstance(x, list) else x if isinstance(x, bool) else mp.mpf(x)


# --- the check --------------------------------------------------------------------------------------------------------


def value_and_gradients(function: Loss, name: str, *arguments: Tensor, **settings: Any) -> list[Tensor]:
    """Value and gradients by automatic differentiation, each flattened to [rows]."""
    inputs = [x.clone().requires_grad_() if i in leaves(name) else x for i, x in enumerate(arguments)]
    bound = functools.partial(function, **settings)
    value = (torch.func.vmap(bound) if name in COUPLED else bound)(*inputs)
    wanted = [inputs[i] for i in leaves(name)]
    if value.requires_grad:
        gradients = torch.autograd.grad(value.sum(), wanted, materialize_grads=True)
    else:
        gradients = tuple(torch.zeros_like(x) for x in wanted)
    columns = [c for g in gradients for c in (g.unbind(-1) if LOSSES[name].kind == "policy" else [g])]
    return [x.detach().flatten() for x in (value, *columns)]


def check(
    function: Loss,
    name: str,
    *,
    only: Callable[[dict[str, Any]], bool] = lambda settings: True,
    last: int | None = None,
    gradients: bool = True,
    relative: float = RELATIVE,
) -> str | None:
    """Whether a function is the objective of that name: ``None``, or the first number that is wrong, in words.

    Parameters
    ----------
    function
        Takes what ``LOSSES[name].needs`` lists, and the settings of that spec by keyword. The ``COUPLED`` objectives
        are called once a batch, under ``torch.func.vmap``.
    name
        A key of `LOSSES`.
    only
        Which settings of the sweep to look at, such as ``lambda s: s["detach_lambda"]``; all by default.
    last, gradients, relative
        For weaker checks: only the last rows of the domain, which are random ones; values alone; a larger error.

    Returns
    -------
    str or None
        ``None`` if value and gradients are right at every row and setting looked at.

    Raises
    ------
    ValueError
        If the name is unknown, or nothing is left to check.
    """
    if name not in LOSSES:
        raise ValueError(f"name = {name!r}: it must be one of {', '.join(LOSSES)}")
    swept = [settings for settings in sweep(name) if only(settings)]
    if not swept:
        raise ValueError(f"only = {only!r} leaves no setting of {name}: a check of nothing proves nothing")
    if last is not None and last < 1:
        raise ValueError(f"last = {last!r} leaves no row of the domain: a check of nothing proves nothing")
    for settings in swept:
        try:
            found = value_and_gradients(function, name, *domain(name), **settings)
        except ValueError as error:
            return f"{_words(settings)}: refused: {error}"
        columns = zip(_parts(name), found, *_expected(name, tuple(settings.items())), strict=True)
        for what, got, wanted, size in list(columns)[: None if gradients else 1]:
            if got.shape != wanted.shape:
                return f"{_words(settings)}: {what} has {got.numel()} numbers, not {wanted.numel()}"
            wrong = ~((got - wanted).abs() <= relative * size + UNDERFLOW)  # true for NaN
            wrong[: 0 if last is None else -last] = False
            if wrong.any():
                i = int(wrong.nonzero()[0])
                numbers = f"{got[i].item():.9g}, not {wanted[i].item():.9g}"
                return f"{_words(settings)}: {what} is {numbers}, at {_row(name, i)}"
    return None


def _parts(name: str) -> list[str]:
    spec = LOSSES[name]
    return [
        "value",
        *(
            f"gradient by {i}"
            for i in (
                [spec.needs[i] for i in leaves(name)] if spec.kind != "policy" else ("logit 0", "logit 1", "logit 2")
            )
        ),
    ]


def _row(name: str, i: int) -> list[Any]:
    shape = (-1, 3) if LOSSES[name].kind == "policy" else (-1,)
    return [x.reshape(shape)[i].tolist() for x in domain(name)]


def _words(settings: dict[str, Any]) -> str:
    return (
        ", ".join(f"{k}={v:g}" if not isinstance(v, bool) else f"{k}={v}" for k, v in settings.items()) or "no settings"
    )
