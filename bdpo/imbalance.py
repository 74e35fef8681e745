r"""The gradient of a pair loss in probabilities, log-probabilities and logits, and how unequal its two parts are.

The same loss has another gradient in each coordinate, so "which response is pulled harder" has an answer only once the
coordinate is named. From :math:`g_y = \partial L/\partial\log\pi(y)` for winner and loser alone,

==================  =====================================================
coordinate          derivative for a response :math:`y` of the pair
==================  =====================================================
``"probability"``   :math:`g_y/\pi(y)`
``"log"``           :math:`g_y`
``"logit"``         :math:`g_y - \pi(y)\,(g_w + g_l)`
==================  =====================================================

:func:`gradient` finds :math:`g_w, g_l` of any pair loss by automatic differentiation, :func:`closed` by the formulas of
:data:`CLOSED`, which also take enclosures and SymPy expressions; :func:`balance` decides which loss is balanced in
which coordinate. Statistics of a batch (``margin_mean``, ``margin_std``, ``kl``), lengths and references are constants:
nothing is differentiated through them, as in the losses themselves.

Source: Definition 1 (Eq 8), arXiv:2502.20847v1; Lemma 1 (Eq 9) for the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import TYPE_CHECKING, Any

import sympy as sp
from flint import arb, ctx, fmpq

from bdpo.losses import LOSSES, Spec
from bdpo.losses._common import PAIR, check_settings, read

if TYPE_CHECKING:
    from torch import Tensor

COORDINATES = ("probability", "log", "logit")


def _known(coordinate: str) -> None:
    if coordinate not in COORDINATES:
        raise ValueError(f"coordinate is {coordinate!r}; allowed: {', '.join(COORDINATES)}")


def convert(g_w: Any, g_l: Any, p_w: Any, p_l: Any, coordinate: str) -> tuple[Any, Any]:
    r"""Derivatives in a coordinate, from those in log-probabilities.

    :math:`\frac{\partial L}{\partial\pi} = \frac{g}{\pi},\qquad \frac{\partial L}{\partial s} = g - \pi\,(g_w+g_l)`

    Plain arithmetic: exact on fractions and SymPy expressions, elementwise on tensors.

    Source: Lemma 1, arXiv:2502.20847v1.

    Parameters
    ----------
    g_w, g_l
        :math:`\partial L/\partial\log\pi` of winner and loser.
    p_w, p_l
        Their probabilities, positive.
    coordinate
        ``"probability"``, ``"log"`` or ``"logit"``. The logit of any third response :math:`k` has the derivative
        :math:`-\pi_k\,(g_w+g_l)`.

    Returns
    -------
    tuple
        The derivatives of winner and loser.

    Raises
    ------
    ValueError
        If the coordinate is unknown.
    """
    _known(coordinate)
    if coordinate == "probability":
        return g_w / p_w, g_l / p_l
    if coordinate == "log":
        return g_w, g_l
    return g_w - p_w * (g_w + g_l), g_l - p_l * (g_w + g_l)


def category(winner: Any, loser: Any) -> str:
    r"""The word of Definition 1 for one pair of derivatives, taken to the letter.

    balanced if :math:`\partial_w+\partial_l = 0`; else positively imbalanced if :math:`|\partial_w| > |\partial_l|`;
    else negatively imbalanced

    Source: Definition 1, arXiv:2502.20847v1.

    Parameters
    ----------
    winner, loser
        The two derivatives, in whatever coordinate; exact numbers, since balance is an equality.

    Returns
    -------
    str
        ``"balanced"``, ``"positively imbalanced"`` or ``"negatively imbalanced"``.

    Raises
    ------
    ValueError
        If a derivative is NaN.
    """
    if not (abs(winner) >= 0 and abs(loser) >= 0):
        raise ValueError(f"winner = {winner}, loser = {loser}: NaN has no size; look for an overflow upstream")
    if winner + loser == 0:
        return "balanced"
    return "positively imbalanced" if abs(winner) > abs(loser) else "negatively imbalanced"


def gradient(
    loss: Callable[..., Tensor],
    chosen: Tensor,
    rejected: Tensor,
    *others: Tensor,
    coordinate: str = "log",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    r"""Derivatives of the summed losses for each pair's winner and loser, by automatic differentiation there.

    :math:`\left(\frac{\partial L}{\partial c(y_w)},\ \frac{\partial L}{\partial c(y_l)}\right)`, where :math:`c` is
    :math:`\pi`, :math:`\log\pi` or :math:`s`

    Source: Definition 1, arXiv:2502.20847v1.

    Parameters
    ----------
    loss
        Takes the policy's two log-probabilities, ``others`` and ``options``, returns one loss a pair: any pair loss of
        :mod:`bdpo.losses`, or your own.
    chosen, rejected
        Log-probabilities of the policy, in nats.
    *others
        What else the loss takes, in its order, of shapes that broadcast: the reference's log-probabilities, lengths,
        statistics of the batch. They are constants.
    coordinate
        ``"probability"`` treats :math:`\pi(y_w), \pi(y_l)` as independent, which they are if there is a third response;
        ``"logit"`` puts the rest :math:`1-\pi(y_w)-\pi(y_l)` on a third response.
    **options
        Passed to the loss, such as ``beta=0.1``.

    Returns
    -------
    tuple of Tensor
        The derivatives, of the pairs' common shape.

    Raises
    ------
    TypeError
        If a log-probability is not a floating-point tensor.
    ValueError
        If the coordinate is unknown, a log-probability is positive, infinite or NaN, a probability is 0 in this
        floating-point format, or a pair has more than all of the probability.
    """
    import torch

    _known(coordinate)
    read(PAIR[:2], chosen, rejected)
    shape = torch.broadcast_shapes(*(x.shape for x in (chosen, rejected, *others)))
    logps = [x.detach().expand(shape) for x in (chosen, rejected)]
    p_w, p_l = (x.exp() for x in logps)
    if coordinate == "log":
        leaves = [x.clone().requires_grad_() for x in logps]
        policy = leaves
    elif coordinate == "probability":
        if bool(((p_w == 0) | (p_l == 0)).any()):
            least = float(torch.minimum(logps[0], logps[1]).min())
            raise ValueError(
                f"a log-probability is {least:g}, whose probability is 0 in {p_w.dtype}; differentiate in the log "
                "coordinate and compare sizes with log_ratio(), which needs no probability"
            )
        leaves = [x.clone().requires_grad_() for x in (p_w, p_l)]
        policy = [x.log() for x in leaves]
    else:
        most = float((p_w + p_l).max())
        if most > 1 + 1e-6:
            raise ValueError(f"chosen and rejected have probability {most:g} together; allowed: up to 1")
        rest = (1 - p_w - p_l).clamp(min=0).log()
        leaves = [x.clone().requires_grad_() for x in (*logps, rest)]
        policy = list(torch.stack(leaves, -1).log_softmax(-1).unbind(-1))[:2]
    total = loss(*policy, *others, **options).sum()
    winner, loser = torch.autograd.grad(total, leaves[:2])
    return winner, loser


def log_ratio(g_w: Tensor, g_l: Tensor, chosen: Tensor, rejected: Tensor, *, coordinate: str = "probability") -> Tensor:
    r"""How much harder the winner is pulled than the loser, in nats.

    :math:`\log\left|\frac{\partial L}{\partial c(y_w)}\right| - \log\left|\frac{\partial L}{\partial c(y_l)}\right|`

    Positive: the winner's derivative is larger ("positively imbalanced"); 0: equal sizes; negative: the loser's. Works
    on log-probabilities whose probabilities are 0 in floating point.

    Source: Definition 1 and Eq 2, arXiv:2502.20847v1.

    Parameters
    ----------
    g_w, g_l
        :math:`\partial L/\partial\log\pi` of winner and loser, as :func:`gradient` returns them.
    chosen, rejected
        The policy's log-probabilities, in nats.
    coordinate
        In which coordinate the sizes are compared.

    Returns
    -------
    Tensor
        One number a pair; infinite if just one derivative is 0, NaN if both are.

    Raises
    ------
    ValueError
        If the coordinate is unknown.
    """
    winner, loser = _log_sizes(g_w, g_l, chosen, rejected, coordinate)
    return winner - loser


def mean_log_ratio(
    g_w: Tensor, g_l: Tensor, chosen: Tensor, rejected: Tensor, *, coordinate: str = "probability"
) -> Tensor:
    r"""The same for a whole data set: the sizes are averaged over the pairs before they are compared.

    :math:`\log\mathbb{E}\left|\frac{\partial L}{\partial c(y_w)}\right|
    - \log\mathbb{E}\left|\frac{\partial L}{\partial c(y_l)}\right|`

    For a loss that falls in the winner and rises in the loser its sign is the class of Definition 1 in expectation. In
    probabilities one very unlikely response can decide it, because its pair counts :math:`1/\pi` times.

    Source: Definition 1 (Eq 8), arXiv:2502.20847v1.

    Parameters
    ----------
    g_w, g_l, chosen, rejected, coordinate
        As for :func:`log_ratio`; the mean runs over all pairs.

    Returns
    -------
    Tensor
        One number.

    Raises
    ------
    ValueError
        If the coordinate is unknown or there is no pair.
    """
    winner, loser = _log_sizes(g_w, g_l, chosen, rejected, coordinate)
    if winner.numel() == 0:
        raise ValueError("there is no pair to average over; give at least 1")
    return winner.flatten().logsumexp(0) - loser.flatten().logsumexp(0)


def _log_sizes(g_w: Tensor, g_l: Tensor, chosen: Tensor, rejected: Tensor, coordinate: str) -> tuple[Tensor, Tensor]:
    """Logarithms of the sizes of both derivatives."""
    _known(coordinate)
    if coordinate == "probability":
        return g_w.abs().log() - chosen, g_l.abs().log() - rejected
    winner, loser = convert(g_w, g_l, chosen.exp(), rejected.exp(), coordinate)
    return winner.abs().log(), loser.abs().log()


# ---------------------------------------------------------------- closed forms


def _of(function: str, x: Any) -> Any:
    """An elementary function of a tensor, an enclosure (``flint.arb``) or a SymPy expression."""
    return getattr(sp, function)(x) if isinstance(x, sp.Basic) else getattr(x, function)()


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + _of("exp", -x))  # where exp overflows, 0 is right


def _complement(x: Any) -> Any:
    r""":math:`1 - e^x`, with all digits also near 0."""
    return 1 - sp.exp(x) if isinstance(x, sp.Basic) else -x.expm1()


def _at_least(x: Any, low: Any) -> Any:
    if isinstance(x, sp.Basic):
        return sp.Max(low, x)
    return x.max(arb(low)) if isinstance(x, arb) else x.clamp(min=low)


def _clip(x: Any, low: Any, high: Any) -> Any:
    return -_at_least(-_at_least(x, low), -high)


def _mean(x: Any) -> Any:
    """The mean of a batch; an enclosure or a SymPy expression is a batch of one pair."""
    return x if isinstance(x, sp.Basic | arb) else x.mean()


def _step(x: Any) -> Any:
    """1 above 0, else 0."""
    if isinstance(x, sp.Basic):
        return sp.Piecewise((1, x > 0), (0, True))
    if not isinstance(x, arb):
        return (x > 0).to(x.dtype)
    if not x > 0 and not x <= 0:
        raise ArithmeticError(f"{x} contains 0: no enclosure decides on which side of the kink it lies")
    return arb(int(x > 0))


def _both(pull: Any) -> tuple[Any, Any]:
    """The winner is pulled up as hard as the loser is pushed down."""
    return -pull, pull


def _dpo(win: Any, lose: Any, ref_win: Any, ref_lose: Any, *, beta: Any, detach_lambda: bool = True) -> Any:
    r""":math:`\mp\beta\,\sigma(-\beta m)`."""
    return _both(beta * _sigmoid(-beta * ((win - ref_win) - (lose - ref_lose))))


def _naive(symmetric: bool) -> Callable[..., Any]:
    r""":math:`-\lambda\beta\sigma(-\beta m)` and :math:`\beta\sigma(-\beta m)`, at DPO's margin."""

    def formula(win: Any, lose: Any, ref_win: Any, ref_lose: Any, *, beta: Any, clip: Any, detach_lambda: bool) -> Any:
        lam = 1 + _clip(win - lose, -clip / (1 + clip) if symmetric else 0, clip)
        doubt = _sigmoid(-beta * ((win - ref_win) - (lose - ref_lose)))
        return -lam * beta * doubt, beta * doubt

    return formula


def _naive_v2(symmetric: bool) -> Callable[..., Any]:
    r""":math:`-(\lambda+\lambda'h_w)\beta\sigma(-\beta m)` and :math:`(1+\lambda'h_w)\beta\sigma(-\beta m)`.

    :math:`h_w` is the winner's log-ratio, and :math:`\lambda' = 1` where the clip does not bind and gradients pass
    through :math:`\lambda`, else 0.
    """

    def formula(win: Any, lose: Any, ref_win: Any, ref_lose: Any, *, beta: Any, clip: Any, detach_lambda: bool) -> Any:
        low, gap = -clip / (1 + clip) if symmetric else 0, win - lose
        lam = 1 + _clip(gap, low, clip)
        through = 0 if detach_lambda else (1 - _step(low - gap) - _step(gap - clip)) * (win - ref_win)
        doubt = _sigmoid(-beta * (lam * (win - ref_win) - (lose - ref_lose)))
        return -(lam + through) * beta * doubt, (1 + through) * beta * doubt

    return formula


def _bdpo(win: Any, lose: Any, ref_win: Any, ref_lose: Any, *, beta: Any, detach_lambda: bool) -> Any:
    r""":math:`-\lambda_w\beta\sigma(-\beta m)` and :math:`(1-\lambda_w)\beta\sigma(-\beta m)`.

    Both times :math:`\frac{\log\pi_{\mathrm{ref}}(y_w)+\log\pi_{\mathrm{ref}}(y_l)}{\log\pi(y_w)+\log\pi(y_l)}` if
    gradients pass through :math:`\lambda_w`.
    """
    total = win + lose
    pull = beta * _sigmoid(-beta * (win * ref_lose - lose * ref_win) / total)
    scale = pull if detach_lambda else pull * (ref_win + ref_lose) / total
    return -scale * lose / total, scale * win / total


def _ipo(win: Any, lose: Any, ref_win: Any, ref_lose: Any, *, beta: Any) -> Any:
    r""":math:`\pm 2\,(m - \frac{1}{2\beta})`."""
    return _both(1 / beta - 2 * ((win - ref_win) - (lose - ref_lose)))


def _hinge(win: Any, lose: Any, ref_win: Any, ref_lose: Any, *, beta: Any) -> Any:
    r""":math:`\mp\beta` where :math:`\beta m < 1`, else 0."""
    return _both(beta * _step(1 - beta * ((win - ref_win) - (lose - ref_lose))))


def _conservative(win: Any, lose: Any, ref_win: Any, ref_lose: Any, *, beta: Any, label_smoothing: Any) -> Any:
    r""":math:`\mp\beta\,(\sigma(-\beta m) - \varepsilon)`."""
    return _both(beta * (_sigmoid(-beta * ((win - ref_win) - (lose - ref_lose))) - label_smoothing))


def _robust(win: Any, lose: Any, ref_win: Any, ref_lose: Any, *, beta: Any, label_smoothing: Any) -> Any:
    r""":math:`\mp\beta\,(\sigma(-\beta m) + \frac{\varepsilon}{1-2\varepsilon})`."""
    offset = label_smoothing / (1 - 2 * label_smoothing)
    return _both(beta * (_sigmoid(-beta * ((win - ref_win) - (lose - ref_lose))) + offset))


def _beta_dpo(
    win: Any, lose: Any, ref_win: Any, ref_lose: Any, margin_mean: Any, *, beta: Any, alpha: Any, beta_min: Any
) -> Any:
    r""":math:`\mp\beta_B\,\sigma(-\beta_Bm)` with :math:`\beta_B = \max(\beta_{\min}, \beta(1+\alpha(\bar m-\mu)))`."""
    margin = (win - ref_win) - (lose - ref_lose)
    batch = _at_least(beta * (1 + alpha * (_mean(margin) - margin_mean)), beta_min)
    return _both(batch * _sigmoid(-batch * margin))


def _kto_pair(win: Any, lose: Any, ref_win: Any, ref_lose: Any, *, beta: Any, detach_kl: bool) -> Any:
    r""":math:`-\frac\beta2\sigma'(\beta(h_w - z_l))` and :math:`\frac\beta2\sigma'(\beta(h_l - z_w))`.

    :math:`h` is the log-ratio and :math:`z = \max(0, \bar h)`. With gradients through :math:`z`, the mean of the
    loser's derivatives is taken from the winner's, and vice versa, each where its own :math:`z` is not cut off at 0.
    """
    h_win, h_lose = win - ref_win, lose - ref_lose
    z_win, z_lose = _at_least(_mean(h_win), 0), _at_least(_mean(h_lose), 0)
    winner, loser = (beta / 2 * _sigmoid(x) * _sigmoid(-x) for x in (beta * (h_win - z_lose), beta * (h_lose - z_win)))
    if detach_kl:
        return -winner, loser
    free_win, free_lose = 1 - _step(-_mean(h_win)), 1 - _step(-_mean(h_lose))
    return -winner - free_win * _mean(loser), loser + free_lose * _mean(winner)


def _dpo_sft(win: Any, lose: Any, ref_win: Any, ref_lose: Any, length_win: Any, *, beta: Any, sft_weight: Any) -> Any:
    r""":math:`-\beta\,\sigma(-\beta m) - \frac{\omega}{|y_w|}` and :math:`\beta\,\sigma(-\beta m)`."""
    winner, loser = _dpo(win, lose, ref_win, ref_lose, beta=beta)
    return winner - sft_weight / length_win, loser


def _cpo(win: Any, lose: Any, *, beta: Any, sft_weight: Any) -> Any:
    r""":math:`-\beta\,\sigma(-\beta(\log\pi_w - \log\pi_l)) - \omega` and :math:`\beta\,\sigma(\ldots)`."""
    pull = beta * _sigmoid(-beta * (win - lose))
    return -pull - sft_weight, pull


def _slic(win: Any, lose: Any, *, delta: Any, sft_weight: Any) -> Any:
    r""":math:`-1-\omega` and 1 where :math:`\log\pi_w - \log\pi_l < \delta`, else :math:`-\omega` and 0."""
    active = _step(delta - (win - lose))
    return -active - sft_weight, active


def _simpo(win: Any, lose: Any, length_win: Any, length_lose: Any, *, beta: Any, gamma: Any) -> Any:
    r""":math:`\mp\frac{\beta}{|y|}\,\sigma(-u)`, :math:`u` the margin of the mean log-probs less :math:`\gamma`."""
    doubt = _sigmoid(gamma - beta * (win / length_win - lose / length_lose))
    return -beta / length_win * doubt, beta / length_lose * doubt


def _alpha_dpo(
    win: Any,
    lose: Any,
    ref_win: Any,
    ref_lose: Any,
    length_win: Any,
    length_lose: Any,
    mean: Any,
    std: Any,
    *,
    beta: Any,
    gamma: Any,
    alpha: Any,
) -> Any:
    r""":math:`\mp\frac{\beta}{|y|}\,\sigma(-\beta u + \gamma + \alpha\frac{m-\mu}{s})`: SimPO's, with another doubt."""
    margin = (win - ref_win) / length_win - (lose - ref_lose) / length_lose
    target = gamma + alpha * ((margin - mean) / std)
    return _simpo(win, lose, length_win, length_lose, beta=beta, gamma=target)


def _orpo(win: Any, lose: Any, length_win: Any, length_lose: Any, *, odds_weight: Any) -> Any:
    r""":math:`-\frac{1}{|y_w|}\big(1 + \frac{\lambda d}{1-p_w}\big)` and :math:`\frac{\lambda d}{|y_l|(1-p_l)}`.

    :math:`\log p = \frac{1}{|y|}\log\pi(y)` and :math:`d = \sigma(-\log\frac{p_w(1-p_l)}{p_l(1-p_w)})`.
    """
    mean_win, mean_lose = win / length_win, lose / length_lose
    rest_win, rest_lose = _complement(mean_win), _complement(mean_lose)
    contrast = odds_weight * _sigmoid((mean_lose - _of("log", rest_lose)) - (mean_win - _of("log", rest_win)))
    return -(1 + contrast / rest_win) / length_win, contrast / rest_lose / length_lose


#: Closed forms of :math:`(g_w, g_l) = \left(\frac{\partial L}{\partial\log\pi(y_w)},
#: \frac{\partial L}{\partial\log\pi(y_l)}\right)` by the name of the loss: functions of the loss's own tensors and
#: settings. :func:`closed` fills in the settings' defaults. Derived in the chapter "An atlas of pair losses".
CLOSED: dict[str, Callable[..., tuple[Any, Any]]] = {
    "dpo": _dpo,
    "nbdpo_asym": _naive(symmetric=False),
    "nbdpo_sym": _naive(symmetric=True),
    "nbdpo_v2_asym": _naive_v2(symmetric=False),
    "nbdpo_v2_sym": _naive_v2(symmetric=True),
    "bdpo": _bdpo,
    "ipo": _ipo,
    "cpo": _cpo,
    "kto_pair": _kto_pair,
    "alpha_dpo": _alpha_dpo,
    "beta_dpo": _beta_dpo,
    "robust_dpo": _robust,
    "conservative_dpo": _conservative,
    "hinge": _hinge,
    "slic": _slic,
    "simpo": _simpo,
    "orpo": _orpo,
    "dpo_sft": _dpo_sft,
}


def closed(name: str, *arguments: Any, **settings: Any) -> tuple[Any, Any]:
    r"""Derivatives of a pair loss in the log-probabilities of winner and loser, by formula.

    :math:`g_w = \frac{\partial L}{\partial\log\pi(y_w)},\qquad g_l = \frac{\partial L}{\partial\log\pi(y_l)}`

    For other coordinates hand the result to :func:`convert`.

    Source: by hand, checked against SymPy in the chapter "An atlas of pair losses" and against automatic
    differentiation of :mod:`bdpo.losses`.

    Parameters
    ----------
    name
        A key of :data:`CLOSED`, which are those of ``bdpo.losses.PAIRS``.
    *arguments
        What the loss takes, in the order of ``LOSSES[name].needs``: all tensors, or all ``flint.arb``, or all SymPy
        expressions. Statistics of a batch count as constants.
    **settings
        The loss's settings, by default those of ``LOSSES[name].settings``.

    Returns
    -------
    tuple
        The derivatives of winner and loser, in the kind of number that came in.

    Raises
    ------
    ValueError
        If there is no such pair loss, or not as many arguments as it needs; for tensors that the loss itself refuses,
        and settings outside their range.
    TypeError
        If a setting is not one of the loss's; for tensors and settings of a wrong type, as with the loss itself.
    """
    spec = _pair_spec(name)
    if len(arguments) != len(spec.needs):
        raise ValueError(f"{name} takes {len(spec.needs)} arguments, {', '.join(spec.needs)}; got {len(arguments)}")
    _check(spec, settings)
    chosen = {**spec.settings, **settings}
    if any(isinstance(x, sp.Basic | arb) for x in arguments):
        return CLOSED[name](*arguments, **chosen)
    winner, loser = CLOSED[name](*read(spec.needs, *arguments, certain=name != "orpo"), **chosen)
    return winner.to(arguments[0].dtype), loser.to(arguments[0].dtype)


def _check(spec: Spec, settings: Mapping[str, Any]) -> None:
    """Refuse settings that the loss does not have, and numbers outside their range; symbols have none."""
    if unknown := settings.keys() - spec.settings.keys():
        raise TypeError(f"{spec.name} has no setting {min(unknown)!r}; it has {', '.join(spec.settings)}")
    numbers = {key: x for key, x in settings.items() if not isinstance(x, sp.Basic | arb)}
    check_settings(**{key: float(x) if isinstance(x, Fraction) else x for key, x in numbers.items()})


def _pair_spec(name: str) -> Spec:
    if name not in CLOSED:
        raise ValueError(f"there is no pair loss {name!r}; there are {', '.join(CLOSED)}")
    return LOSSES[name]


# ---------------------------------------------------------------- which loss is balanced where


@dataclass(frozen=True)
class Balance:
    """Whether a pair loss is balanced in a coordinate."""

    loss: str  #: its name
    coordinate: str  #: ``"probability"``, ``"log"`` or ``"logit"``
    kind: str  #: a word of :func:`category` if it is the same for every pair, else ``"depends"``
    established: bool  #: True if proved or shown by witnesses, False if only no other pair was found
    witnesses: dict[str, dict[str, Fraction]]  #: for each word the first pair found, none where the word is proved


_WORDS = ("balanced", "positively imbalanced", "negatively imbalanced")


def balance(
    name: str, coordinate: str, worlds: Iterable[Mapping[str, Fraction]] | None = None, **settings: Any
) -> Balance:
    r"""Is this loss balanced in that coordinate, and if not, which way does it lean?

    The words are those of :func:`category`, for one pair: balanced if :math:`\partial_w+\partial_l=0`.

    *Proved for every pair:* where SymPy finds :math:`g_w+g_l = 0` the loss is balanced in logarithms, and in logits
    too, since :math:`\partial_w+\partial_l = (g_w+g_l)(1-\pi_w-\pi_l)` there. Where that sum is negative and
    :math:`g_l\ge0`, it is positively imbalanced in both. *Depends:* two exact pairs with different words, each decided
    by rigorous enclosures or, where derivatives cancel, by SymPy. Otherwise the word of all pairs that were tried, and
    ``established`` is False. A loss that looks at its batch sees a batch of one pair.

    Source: Definition 1, arXiv:2502.20847v1, without the expectation.

    Parameters
    ----------
    name
        A key of :data:`CLOSED`.
    coordinate
        ``"probability"``, ``"log"`` or ``"logit"``.
    worlds
        Pairs to try, the smallest first, as :func:`pairs` makes them by default. Each has a third response, so
        :math:`\pi_w+\pi_l<1`.
    **settings
        The loss's settings; ``balanced`` is a matter of these, too.

    Returns
    -------
    Balance
        The word, and the pairs that show it.

    Raises
    ------
    ValueError
        If there is no such loss or coordinate, no pair to try that could be decided, or a setting outside its range.
    TypeError
        If a setting is not one of the loss's, or of a wrong type.
    """
    _known(coordinate)
    spec = _pair_spec(name)
    _check(spec, settings)
    proved = None if coordinate == "probability" else _same_for_all(spec, settings)
    if proved:
        return Balance(name, coordinate, proved, True, {})
    keys = ("winner", "loser", *map(_short, spec.needs[2:]))
    witnesses: dict[str, dict[str, Fraction]] = {}
    seen = set()
    for world in pairs() if worlds is None else worlds:
        told = {key: world[key] for key in keys}
        if (numbers := tuple(told.values())) in seen:
            continue
        seen.add(numbers)
        word = _word(name, told, coordinate, settings, look_for_balance=_WORDS[0] not in witnesses)
        if word is not None:
            witnesses.setdefault(word, told)
        if len(witnesses) == len(_WORDS):
            break
    if not witnesses:
        raise ValueError(f"no pair of the {len(seen)} in worlds could be decided; give others, or leave worlds out")
    kind = next(iter(witnesses)) if len(witnesses) == 1 else "depends"
    return Balance(name, coordinate, kind, len(witnesses) > 1, witnesses)


def pairs() -> Iterator[dict[str, Fraction]]:
    """Exact pairs of winner and loser, with reference, lengths and statistics of a batch, the simplest first.

    Returns
    -------
    iterator of dict
        ``winner``, ``loser``, ``ref_chosen``, ``ref_rejected`` are probabilities; ``chosen_lengths``,
        ``rejected_lengths``, ``margin_mean`` and ``margin_std`` are what the losses call so.
    """
    policies = sorted(
        {(Fraction(i, d), Fraction(j, d)) for d in range(3, 8) for i, j in product(range(1, d), repeat=2) if i + j < d}
        | {(Fraction(i, 1000), Fraction(j, 1000)) for i, j in ((1, 1), (1, 500), (500, 1), (1, 998), (998, 1))},
        key=lambda p: (p[0].denominator + p[1].denominator, p),
    )
    references = [(Fraction(1, 3), Fraction(1, 3)), (Fraction(1, 4), Fraction(1, 2)), (Fraction(1, 2), Fraction(1, 4))]
    lengths = [(1, 1), (1, 2), (2, 1), (100, 1)]
    names = ("winner", "loser", "ref_chosen", "ref_rejected", "chosen_lengths", "rejected_lengths")
    for size, reference, policy in product(lengths, references, policies):
        numbers = dict(zip(names, (*policy, *reference, *map(Fraction, size)), strict=True))
        yield {**numbers, "margin_mean": Fraction(0), "margin_std": Fraction(1)}


def _short(need: str) -> str:
    return need.removesuffix("_logps")


def _word(
    name: str,
    world: Mapping[str, Fraction],
    coordinate: str,
    settings: Mapping[str, Any],
    *,
    look_for_balance: bool = True,
) -> str | None:
    """The word of Definition 1 for one exact pair, or None where enclosures and cancelling cannot tell."""
    before, ctx.prec = ctx.prec, 200
    try:
        winner, loser = _at(name, world, coordinate, settings, lambda x: arb(fmpq(x.p, x.q)))
        sizes = abs(winner) - abs(loser)
        if sizes > 0 or sizes < 0:
            return _WORDS[1] if sizes > 0 else _WORDS[2]
        if not look_for_balance:
            return None
        winner, loser = _at(name, world, coordinate, settings, lambda x: x)
        return _WORDS[0] if winner + loser == 0 else None
    except ArithmeticError:  # on a kink
        return None
    finally:
        ctx.prec = before


def _at(
    name: str,
    world: Mapping[str, Fraction],
    coordinate: str,
    settings: Mapping[str, Any],
    number: Callable[[sp.Rational], Any],
) -> tuple[Any, Any]:
    """Both derivatives at an exact pair, in the kind of number that ``number`` makes of a fraction."""
    options = {key: x if isinstance(x, bool) else number(x) for key, x in _exact(name, settings).items()}
    value = {key: number(sp.Rational(x.numerator, x.denominator)) for key, x in world.items()}
    p_w, p_l = value["winner"], value["loser"]
    rest = [_of("log", value[_short(n)]) if n.endswith("_logps") else value[n] for n in LOSSES[name].needs[2:]]
    return convert(*closed(name, _of("log", p_w), _of("log", p_l), *rest, **options), p_w, p_l, coordinate)


def _same_for_all(spec: Spec, settings: Mapping[str, Any]) -> str | None:
    """The word that SymPy proves for every pair, in logarithms and in logits, or None."""
    constant = {"chosen_lengths", "rejected_lengths", "margin_std"}
    symbols = [sp.Symbol(n, positive=True) if n in constant else sp.Symbol(n, real=True) for n in spec.needs]
    g_w, g_l = closed(spec.name, *symbols, **_exact(spec.name, settings))
    total = sp.expand(g_w + g_l)
    if total == 0:
        return _WORDS[0]
    if total.is_negative and g_l.is_nonnegative:
        return _WORDS[1]
    return _WORDS[2] if total.is_positive and g_w.is_nonpositive else None


def _exact(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a loss, numbers as the fractions that their decimals spell."""
    chosen = {**LOSSES[name].settings, **settings}
    return {key: x if isinstance(x, bool) else sp.Rational(str(x)) for key, x in chosen.items()}
