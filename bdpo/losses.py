r"""The six preference losses of the paper, as pure functions of four log-prob tensors.

One convention holds throughout. A log-prob is the *sum* of the log-probs of a response's tokens given the prompt, not
their mean; :math:`\beta` multiplies the margin of log-ratios; a loss is returned for every pair, not yet averaged.
With policy :math:`\pi`, reference :math:`\pi_{\mathrm{ref}}`, winner :math:`y_w` and loser :math:`y_l`, all six are

.. math:: \mathcal{L} = -\log\sigma(\beta\,m), \qquad
   m = \lambda_w \log\frac{\pi(y_w)}{\pi_{\mathrm{ref}}(y_w)} - \lambda_l \log\frac{\pi(y_l)}{\pi_{\mathrm{ref}}(y_l)},

and differ in the weights :math:`\lambda_w, \lambda_l`, which may depend on the policy, and in whether these reach the
value or only the gradient.

**detach_lambda.** The paper marks one policy term as detached, in Eq 25, and does not say whether gradients pass
through :math:`\lambda`. ``True``, the default of every loss, holds :math:`\lambda` constant in the backward pass,
because the paper introduces it as a weight of gradients and only a constant is one: the gradient of the winner's
log-prob is then never positive and that of the loser's never negative, and their proportion is the one that
:math:`\lambda` says. ``False`` differentiates the formula as it stands. What this does to each loss is said in its
docstring and checked in ``tests/test_losses.py``.

**Accuracy.** In float64, for log-probs from -2000 to -1e-9, :math:`\beta` from 1e-3 to 10 and ``clip`` up to 1e4,
value and gradients have a relative error below 1e-8, down to where float64 underflows (some 1e-307). One exception:
with ``detach_lambda=False`` the gradients of v2 are sums of terms of either sign, and the error is relative to the sum
of their sizes. float16 and bfloat16 are computed in float32 and returned in the dtype they came in.

**Input.** Log-probs are finite and at most 0. Minus infinity is refused: a response of probability zero has an
infinite margin, hence a loss of 0 or infinity, or NaN where two infinities meet, and comes in practice from a wrong
label mask. Values are looked at in eager mode and under ``torch.func``, which costs a GPU one synchronisation; under
``torch.compile``, where a look would break the graph, only types, shapes and settings are.

Nothing is detached but :math:`\lambda` and the term that Eq 25 detaches: compute the reference's log-probs under
``torch.no_grad()``.

Source: arXiv:2502.20847v1, Eq 1 and Section 5 (Eqs 25-29); defaults from its Appendix B, the synthetic experiment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_ARGUMENTS = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")


def dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 1.0,
    detach_lambda: bool = True,
) -> Tensor:
    r"""Direct preference optimisation: both responses weigh the same.

    :math:`m = \log\frac{\pi(y_w)}{\pi_{\mathrm{ref}}(y_w)} - \log\frac{\pi(y_l)}{\pi_{\mathrm{ref}}(y_l)}`

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps
        :math:`\log\pi(y_w)` and :math:`\log\pi(y_l)`: sums over tokens, in nats, of any shapes that broadcast.
    ref_chosen_logps, ref_rejected_logps
        The same under the reference.
    beta
        Above 0, per nat. A larger beta saturates the loss at a smaller margin: it keeps the policy nearer the
        reference. The paper uses 1 on synthetic data and states none for language models, where 0.1 is customary.
    detach_lambda
        No effect: the weights are the constant 1. Taken so that a training loop may pass it to every loss.

    Returns
    -------
    Tensor
        One loss a pair, at least 0, in the broadcast shape and the dtype of the log-probs.

    Raises
    ------
    TypeError
        For log-probs that are not floating-point tensors of one dtype, and for settings of the wrong type.
    ValueError
        For log-probs that are positive, infinite or NaN, on different devices or of shapes that do not broadcast;
        for a ``beta`` that is not a positive finite number.

    Notes
    -----
    Source: Eq 1 of arXiv:2502.20847v1, without the expectation.
    """
    _check_settings(beta=beta, detach_lambda=detach_lambda)
    win, lose, ref_win, ref_lose = _read(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    margin = (win - ref_win) - (lose - ref_lose)
    return _minus_log_sigmoid(beta * margin, policy_chosen_logps.dtype)


def nbdpo_asym(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 1.0,
    clip: float = 0.5,
    detach_lambda: bool = True,
) -> Tensor:
    r"""Naive Balanced DPO, asymmetric: DPO's value, the winner's gradient multiplied by :math:`\lambda \ge 1`.

    :math:`m = \lambda\log\frac{\pi(y_w)}{\pi_{\mathrm{ref}}(y_w)} - \log\frac{\pi(y_l)}{\pi_{\mathrm{ref}}(y_l)}
    - (\lambda-1)\log\frac{\bar\pi(y_w)}{\pi_{\mathrm{ref}}(y_w)}` with :math:`\bar\pi` the detached policy and
    :math:`\lambda = 1 + \mathrm{clip}(\log\frac{\pi(y_w)}{\pi(y_l)}, 0, \Delta\lambda_{\max})`

    As printed, Eq 25 closes a parenthesis late, which puts the detached term inside the loser's logarithm; this is the
    reading that leaves the value unchanged, as the text says it should. It is computed as DPO's margin plus
    :math:`(\lambda-1)(\log\pi(y_w) - \log\bar\pi(y_w))`, so that the value is that of `dpo` to the last bit.

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
        As in `dpo`.
    clip
        :math:`\Delta\lambda_{\max}` in nats, at least 0. A larger clip lets :math:`\lambda` grow further; 0 gives DPO.
        The paper uses 0.5 on synthetic data and 0.3 for language models.
    detach_lambda
        No effect on value or gradient: :math:`\lambda` multiplies a difference that is always zero. Only second
        derivatives see it.

    Returns
    -------
    Tensor
        One loss a pair, as in `dpo`.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`; also for a ``clip`` that is not a finite number of at least 0.

    Notes
    -----
    At the bounds of the clip, a tie among them, the derivative of :math:`\lambda` is that from inside.

    Source: Eqs 25 and 26 of arXiv:2502.20847v1 with :math:`\Delta\lambda_{\min} = 0`.
    """
    _check_settings(beta=beta, clip=clip, detach_lambda=detach_lambda)
    win, lose, ref_win, ref_lose = _read(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    lam = _imbalance_ratio(win, lose, 0.0, clip, detach_lambda)
    margin = (win - ref_win) - (lose - ref_lose) + (lam - 1) * (win - win.detach())
    return _minus_log_sigmoid(beta * margin, policy_chosen_logps.dtype)


def nbdpo_sym(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 1.0,
    clip: float = 0.5,
    detach_lambda: bool = True,
) -> Tensor:
    r"""Naive Balanced DPO, symmetric: as `nbdpo_asym`, but :math:`\lambda` may also fall below 1.

    :math:`\lambda = 1 + \mathrm{clip}(\log\frac{\pi(y_w)}{\pi(y_l)}, \frac{1}{1+\Delta\lambda_{\max}} - 1,
    \Delta\lambda_{\max})`, between :math:`\frac{1}{1+\Delta\lambda_{\max}}` and :math:`1+\Delta\lambda_{\max}`

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, clip, detach_lambda
        As in `nbdpo_asym`.

    Returns
    -------
    Tensor
        One loss a pair, as in `dpo`.

    Raises
    ------
    TypeError, ValueError
        As in `nbdpo_asym`.

    Notes
    -----
    Source: Eqs 25 and 26 of arXiv:2502.20847v1.
    """
    _check_settings(beta=beta, clip=clip, detach_lambda=detach_lambda)
    win, lose, ref_win, ref_lose = _read(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    lam = _imbalance_ratio(win, lose, -clip / (1 + clip), clip, detach_lambda)
    margin = (win - ref_win) - (lose - ref_lose) + (lam - 1) * (win - win.detach())
    return _minus_log_sigmoid(beta * margin, policy_chosen_logps.dtype)


def nbdpo_v2_asym(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 1.0,
    clip: float = 0.5,
    detach_lambda: bool = True,
) -> Tensor:
    r"""Naive Balanced DPO v2, asymmetric: :math:`\lambda \ge 1` multiplies the winner's log-ratio, value included.

    :math:`m = \lambda\log\frac{\pi(y_w)}{\pi_{\mathrm{ref}}(y_w)} - \log\frac{\pi(y_l)}{\pi_{\mathrm{ref}}(y_l)}` with
    :math:`\lambda` as in `nbdpo_asym`

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, clip
        As in `nbdpo_asym`.
    detach_lambda
        ``True``: the gradient of `nbdpo_asym`, taken at this margin. ``False``: where the clip does not bind,
        :math:`r = \log\frac{\pi(y_w)}{\pi_{\mathrm{ref}}(y_w)}` joins both weights,
        :math:`\partial m/\partial\log\pi(y_w) = \lambda + r` and :math:`\partial m/\partial\log\pi(y_l) = -(1 + r)`.
        The gradient is then that of the value, which is what v2 is for; but it pushes the winner down
        once :math:`r < -\lambda` and the loser up once :math:`r < -1`, and it jumps where the clip sets in: hence the
        default.

    Returns
    -------
    Tensor
        One loss a pair, as in `dpo`.

    Raises
    ------
    TypeError, ValueError
        As in `nbdpo_asym`.

    Notes
    -----
    At the bounds of the clip, an equal pair among them, the derivative of :math:`\lambda` is that from inside.

    Source: Eqs 26 and 27 of arXiv:2502.20847v1 with :math:`\Delta\lambda_{\min} = 0`.
    """
    _check_settings(beta=beta, clip=clip, detach_lambda=detach_lambda)
    win, lose, ref_win, ref_lose = _read(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    lam = _imbalance_ratio(win, lose, 0.0, clip, detach_lambda)
    margin = lam * (win - ref_win) - (lose - ref_lose)
    return _minus_log_sigmoid(beta * margin, policy_chosen_logps.dtype)


def nbdpo_v2_sym(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 1.0,
    clip: float = 0.5,
    detach_lambda: bool = True,
) -> Tensor:
    r"""Naive Balanced DPO v2, symmetric: as `nbdpo_v2_asym`, but :math:`\lambda` may also fall below 1.

    :math:`m = \lambda\log\frac{\pi(y_w)}{\pi_{\mathrm{ref}}(y_w)} - \log\frac{\pi(y_l)}{\pi_{\mathrm{ref}}(y_l)}` with
    :math:`\lambda` as in `nbdpo_sym`

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, clip, detach_lambda
        As in `nbdpo_v2_asym`.

    Returns
    -------
    Tensor
        One loss a pair, as in `dpo`.

    Raises
    ------
    TypeError, ValueError
        As in `nbdpo_asym`.

    Notes
    -----
    Source: Eqs 26 and 27 of arXiv:2502.20847v1.
    """
    _check_settings(beta=beta, clip=clip, detach_lambda=detach_lambda)
    win, lose, ref_win, ref_lose = _read(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    lam = _imbalance_ratio(win, lose, -clip / (1 + clip), clip, detach_lambda)
    margin = lam * (win - ref_win) - (lose - ref_lose)
    return _minus_log_sigmoid(beta * margin, policy_chosen_logps.dtype)


def bdpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 1.0,
    detach_lambda: bool = True,
) -> Tensor:
    r"""Balanced DPO: each log-ratio is weighted by the other response's share of the total log-prob.

    :math:`m = \lambda_w\log\frac{\pi(y_w)}{\pi_{\mathrm{ref}}(y_w)}
    - (1-\lambda_w)\log\frac{\pi(y_l)}{\pi_{\mathrm{ref}}(y_l)}` with
    :math:`\lambda_w = \frac{\log\pi(y_l)}{\log\pi(y_w) + \log\pi(y_l)}`

    Since :math:`\lambda_w\log\pi(y_w) = (1-\lambda_w)\log\pi(y_l)`, the value depends on the policy through the ratio
    :math:`\log\pi(y_w)/\log\pi(y_l)` alone:
    :math:`m = (1-\lambda_w)\log\pi_{\mathrm{ref}}(y_l) - \lambda_w\log\pi_{\mathrm{ref}}(y_w)`.

    Parameters
    ----------
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
        As in `dpo`.
    detach_lambda
        ``True``: :math:`\partial m/\partial\log\pi` is :math:`\lambda_w` for the winner, :math:`-(1-\lambda_w)` for the
        loser. ``False``: both are multiplied by
        :math:`\frac{\log\pi_{\mathrm{ref}}(y_w) + \log\pi_{\mathrm{ref}}(y_l)}{\log\pi(y_w) + \log\pi(y_l)}`. The ratio
        of the two, and all of the gradient at :math:`\pi = \pi_{\mathrm{ref}}`, are the same in either reading; but
        this factor fades as the policy's log-probs sink and grows without bound as they near 0. Hence the default.

    Returns
    -------
    Tensor
        One loss a pair, as in `dpo`.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`.

    Notes
    -----
    Where both of the policy's log-probs are exactly 0, :math:`\lambda_w` has no limit; it is taken as the constant
    :math:`\frac12`, its value for every equal pair. The gradient there is that of :math:`\lambda_w = \frac12` if
    detached, and 0 if not.

    Source: Eqs 28 and 29 of arXiv:2502.20847v1.
    """
    _check_settings(beta=beta, detach_lambda=detach_lambda)
    win, lose, ref_win, ref_lose = _read(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    lam_win, lam_lose = _shares(win, lose)
    margin = lam_win.detach() * (win - ref_win) - lam_lose.detach() * (lose - ref_lose)
    if not detach_lambda:
        # The same margin without the policy's log-probs, which cancel. Differentiating the line above would subtract
        # nearly equal numbers when the policy's log-probs are far from the reference's; this has terms of one sign.
        short = lam_lose * ref_lose - lam_win * ref_win
        margin = margin.detach() + (short - short.detach())
    return _minus_log_sigmoid(beta * margin, policy_chosen_logps.dtype)


#: The losses by name, called as ``LOSSES[name](policy_chosen_logps, policy_rejected_logps, ref_chosen_logps,
#: ref_rejected_logps, beta=...)``, and ``clip=...`` for the four whose name begins with ``nbdpo``.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo,
    "nbdpo_asym": nbdpo_asym,
    "nbdpo_sym": nbdpo_sym,
    "nbdpo_v2_asym": nbdpo_v2_asym,
    "nbdpo_v2_sym": nbdpo_v2_sym,
    "bdpo": bdpo,
}


def _minus_log_sigmoid(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``-log(sigmoid(x))``, which is accurate for large x only if the sigmoid is never formed."""
    return -logsigmoid(x).to(dtype)


def _imbalance_ratio(win: Tensor, lose: Tensor, low: float, high: float, detach: bool) -> Tensor:
    r""":math:`\lambda` of Eq 26; at its bounds ``clamp`` has the derivative from inside."""
    lam = 1 + (win - lose).clamp(low, high)
    return lam.detach() if detach else lam


def _shares(win: Tensor, lose: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`\lambda_w` of Eq 29 and :math:`1-\lambda_w`, the constants ½ where both log-probs are 0.

    Both come from the ratio of the log-prob nearer 0 to the farther one, which lies in [0, 1]: no subtraction loses
    digits, neither in the shares nor in their derivatives.
    """
    winner_nearer = lose <= win
    nearer, farther = torch.where(winner_nearer, win, lose), torch.where(winner_nearer, lose, win)
    certain = farther == 0
    ratio = torch.where(certain, 1, nearer / torch.where(certain, 1, farther))
    smaller, larger = ratio / (1 + ratio), 1 / (1 + ratio)
    return torch.where(winner_nearer, larger, smaller), torch.where(winner_nearer, smaller, larger)


def _check_settings(*, beta: float, detach_lambda: bool, clip: float = 0.0) -> None:
    """Refuse a setting of the wrong type or outside its range."""
    for name, value in (("beta", beta), ("clip", clip)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} = {value!r}: it must be a number, not a {type(value).__name__}; pass a float")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta = {beta!r}: it must be finite and above 0; 0.1 is customary for language models")
    if not 0 <= clip < math.inf:
        raise ValueError(f"clip = {clip!r}: it must be finite and at least 0; 0 gives DPO, the paper uses 0.3 and 0.5")
    if not isinstance(detach_lambda, bool):
        raise TypeError(f"detach_lambda = {detach_lambda!r}: it must be True or False")


def _read(*logps: Tensor) -> tuple[Tensor, ...]:
    """The four log-prob tensors, checked, in the dtype to compute in: their own, or float32 if that is wider."""
    for name, x in zip(_ARGUMENTS, logps, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}: it must be a tensor; wrap it in torch.as_tensor")
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}: log-probs are floating-point; convert them with .float()")
    if len({x.dtype for x in logps}) > 1:
        raise TypeError(f"{_list(logps, 'dtype')}: the dtypes must agree; convert with .to(torch.float32)")
    if len({x.device for x in logps}) > 1:
        raise ValueError(f"{_list(logps, 'device')}: the devices must agree; move the tensors with .to(device)")
    try:
        torch.broadcast_shapes(*(x.shape for x in logps))
    except RuntimeError as error:
        raise ValueError(f"{_list(logps, 'shape')}: the shapes must broadcast; give one log-prob a pair") from error
    if logps[0].dtype.itemsize < 4:
        logps = tuple(x.float() for x in logps)
    if not torch.compiler.is_compiling():
        _Look.apply(*(x.detach() for x in logps))
    return logps


def _list(logps: tuple[Tensor, ...], what: str) -> str:
    """``name has what`` for the four tensors, for a message."""
    return ", ".join(f"{name} has {what} {getattr(x, what)}" for name, x in zip(_ARGUMENTS, logps, strict=True))


class _Look(torch.autograd.Function):
    """A look at the values of the four tensors.

    Under ``torch.func.vmap`` a tensor cannot decide an ``if``. An autograd function can say there what it does with
    the batch as a whole: here the same, look at all of it.
    """

    @staticmethod
    def forward(*logps: Tensor) -> Tensor:
        fine = [(x <= 0) & (x > -math.inf) for x in logps]  # false for NaN
        if not torch.stack([f.all() for f in fine]).all():
            name, x, f = next((n, x, f) for n, x, f in zip(_ARGUMENTS, logps, fine, strict=True) if not f.all())
            raise ValueError(
                f"{name} contains {x[~f][0].item()}: a log-prob is finite and at most 0; pass sums of token log-probs,"
                " not probabilities or logits, and for -inf or NaN look for a wrong label mask or an overflow"
            )
        return torch.empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Nothing is differentiated, so nothing is kept."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *logps: Tensor) -> tuple[Tensor, None]:
        return _Look.apply(*logps), None
