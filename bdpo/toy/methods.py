r"""Which losses the synthetic experiment runs, as the numbers that the compiled loop takes.

A method is a loss of :mod:`bdpo.losses` that is a sum over pairs, or one of three ways to learn from a reward:

==============  ====================================================================================================
``"rlhf"``      Bradley-Terry reward model on the same pairs, then the exact gradient of reward minus divergence
``"ppo"``       the same reward model, then clipped PPO on samples of the policy
``"oracle"``    the exact gradient with the true reward, :math:`\log u`, in place of a learned one
==============  ====================================================================================================

Not here: ``kto_pair``, ``alpha_dpo`` and ``beta_dpo`` compare a pair with statistics of its batch and of the batches
before, which an exact expectation does not have; ``kto`` learns from single responses with labels, which this world
does not give. All responses have length 1, so sums and means of token log-probs are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bdpo.toy import kernel as k

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: The six that the paper compares, in the order of its Table 1.
PAPER = ("dpo", "nbdpo_asym", "nbdpo_sym", "nbdpo_v2_asym", "nbdpo_v2_sym", "bdpo")
#: All that are sums over pairs.
PAIRS = (
    *PAPER,
    "ipo",
    "hinge",
    "conservative_dpo",
    "robust_dpo",
    "dpo_sft",
    "cpo",
    "slic",
    "simpo",
    "orpo",
)
#: Those that learn from a reward.
REWARD = ("rlhf", "ppo", "oracle")
METHODS = (*PAIRS, *REWARD)

_SFT = {"dpo_sft": 1.0, "cpo": 1.0, "slic": 0.1}  # the defaults of bdpo.losses


def coefficients(
    method: str,
    *,
    beta: float = 1.0,
    clip: float = 0.5,
    label_smoothing: float = 0.1,
    sft_weight: float | None = None,
    gamma: float = 0.5,
    delta: float = 1.0,
    odds_weight: float = 0.1,
    detach_lambda: bool = True,
    dtype: Any = np.float64,
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """A loss as the compiled loop takes it.

    Parameters
    ----------
    method
        One of ``PAIRS``; or ``"reward_bt"``, whose log-probs are scores; or one of ``REWARD``, of which only ``beta``
        counts.
    beta, clip, label_smoothing, sft_weight, gamma, delta, odds_weight, detach_lambda
        As in :mod:`bdpo.losses`; each is used by the losses that have it. ``sft_weight=None`` is the loss's default.
    dtype
        Of the numbers.

    Returns
    -------
    tuple of arrays
        Six integers and ten numbers; :mod:`bdpo.toy.kernel` names their places.

    Raises
    ------
    ValueError
        If the method is unknown.
    """
    if method not in (*METHODS, "reward_bt"):
        raise ValueError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    switches, numbers = np.zeros(6, np.int64), np.zeros(10)
    numbers[[k.BETA, k.RIGHT, k.SCALE]] = beta, 1.0, 1.0
    if method.startswith("nbdpo"):
        numbers[k.LOW] = -clip / (1 + clip) if method.endswith("_sym") else 0.0
        numbers[k.HIGH] = clip
        numbers[k.VALUE] = float("_v2_" in method)
    elif method == "bdpo":
        switches[k.SHARE] = 1
    elif method == "ipo":
        switches[k.LINK] = k.SQUARE
        numbers[[k.BETA, k.CENTRE]] = 1.0, 1 / (2 * beta)
    elif method == "hinge":
        switches[k.LINK] = k.HINGE
        numbers[k.CENTRE] = 1.0
    elif method == "slic":
        switches[k.LINK] = k.HINGE
        numbers[[k.BETA, k.CENTRE]] = 1.0, delta
    elif method == "conservative_dpo":
        numbers[[k.RIGHT, k.WRONG]] = 1 - label_smoothing, label_smoothing
    elif method == "robust_dpo":
        numbers[[k.RIGHT, k.WRONG]] = np.array([1 - label_smoothing, -label_smoothing]) / (1 - 2 * label_smoothing)
    elif method == "simpo":
        numbers[k.GAMMA] = gamma
    elif method == "orpo":
        switches[k.ODDS] = 1
        numbers[[k.BETA, k.RIGHT, k.SFT]] = 1.0, odds_weight, 1.0
    elif method == "reward_bt":
        switches[k.HEAD] = 1
        numbers[k.BETA] = 1.0
    if method in _SFT:
        numbers[k.SFT] = _SFT[method] if sft_weight is None else sft_weight
    switches[k.THROUGH] = not detach_lambda and (method == "bdpo" or "_v2_" in method)
    switches[k.FREE] = method in ("cpo", "slic", "simpo", "orpo")
    return switches, numbers.astype(dtype)
