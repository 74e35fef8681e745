r"""Other people's settings and ours: converters that run.

Ours, everywhere in this package: a log-prob is a sum over tokens; :math:`\beta` multiplies the margin; one loss a pair,
unreduced. Libraries and papers differ in all of that, often under the same name. ``CONVENTIONS`` says how each states
each of our losses, as a pair of functions between the settings, and :func:`losses` computes our losses in their
convention, so that the claim can be compared with the library itself (``tests/test_peers.py`` does).

>>> theirs("SimPOTrainer", "simpo", beta=2.0, gamma=0.5)
{'loss_type': 'sigmoid', 'sft_weight': 0.0, 'beta': 2.0, 'gamma_beta_ratio': 0.25}
>>> convention, settings = ours("SimPOTrainer", loss_type="sigmoid", sft_weight=0.0, beta=2.0, gamma_beta_ratio=0.25)
>>> convention.loss, settings
('simpo', {'beta': 2.0, 'gamma': 0.5})

The converters are plain arithmetic: they take SymPy symbols as well as numbers, and the chapter on conventions proves
with them that each pair of functions is inverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bdpo.losses import LOSSES

# ---------------------------------------------------------------- one formula at a time


def beta_of_temperature(temperature: float) -> float:
    r"""The beta of somebody who divides the margin by a temperature.

    :math:`\beta = 1/T`

    Parameters
    ----------
    temperature
        :math:`T > 0`, in nats. A larger one is a smaller beta: it lets the policy move farther.

    Returns
    -------
    float
        beta, per nat. The function is its own inverse.

    Raises
    ------
    ValueError
        For a temperature that is not above 0 and finite.
    """
    return 1 / _positive("temperature", temperature)


def ipo_target(beta: float) -> float:
    r"""The margin that IPO asks for.

    :math:`m^* = \frac{1}{2\beta}`; the paper writes :math:`\tau` for beta

    Parameters
    ----------
    beta
        Above 0, per nat. A larger beta asks for less.

    Returns
    -------
    float
        The target in nats. The function is its own inverse: a target of 5 nats is a beta of 0.1.

    Raises
    ------
    ValueError
        For a beta that is not above 0 and finite.

    Notes
    -----
    Source: Eq 17 of arXiv:2310.12036v2.
    """
    return 1 / (2 * _positive("beta", beta))


def beta_of_sums(beta_of_means: float, length: float) -> float:
    r"""The beta on sums that acts as a given beta on means, for responses of one common length.

    :math:`\beta\,\frac{1}{n}\sum_t \log\pi_t = \frac{\beta}{n}\sum_t \log\pi_t`

    Parameters
    ----------
    beta_of_means
        Above 0, per nat a token.
    length
        The number of tokens :math:`n`, at least 1, of winner and loser alike.

    Returns
    -------
    float
        beta, per nat.

    Raises
    ------
    ValueError
        For a beta that is not above 0 and finite, and a length below 1.

    Notes
    -----
    There is no such number for two different lengths: sums and means can prefer different responses.
    """
    if not 1 <= length < math.inf:
        raise ValueError(f"length = {length!r}: it is the number of tokens of a response, at least 1")
    return _positive("beta_of_means", beta_of_means) / length


def smoothing_of_noise(noise: float) -> float:
    r"""Robust DPO as a conservative DPO: the label smoothing, below 0, that gives the same loss.

    :math:`\varepsilon_c = -\frac{\varepsilon_r}{1-2\varepsilon_r}`, since cDPO adds :math:`\varepsilon_c\beta m` to
    DPO's loss and rDPO subtracts :math:`\frac{\varepsilon_r}{1-2\varepsilon_r}\beta m`

    Parameters
    ----------
    noise
        :math:`\varepsilon_r`, the share of flipped labels, from 0 to below ½.

    Returns
    -------
    float
        The smoothing of cDPO's formula, at most 0: outside the range that cDPO means. The two are different remedies,
        not two spellings of one.

    Raises
    ------
    ValueError
        For a noise outside its range.
    """
    if not 0 <= noise < 0.5:
        raise ValueError(f"noise = {noise!r}: it is the share of flipped labels, at least 0 and below 0.5")
    return -noise / (1 - 2 * noise)


#: How the negative log-prob of the winner may be averaged.
LIKELIHOODS = ("sum", "mean", "batch", "prompt")


def likelihood(policy_chosen_logps: Tensor, chosen_lengths: Tensor, how: str) -> Tensor:
    r"""The winner's negative log-prob as a term for each pair, whose mean over the batch is the library's SFT term.

    :math:`-\log\pi(y_w)` (``"sum"``), :math:`-\frac{1}{|y_w|}\log\pi(y_w)` (``"mean"``), or
    :math:`-\frac{B}{\sum_i |y_{w,i}|}\log\pi(y_w)` (``"batch"``: the mean over all tokens of a batch of :math:`B`);
    ``"prompt"`` is ``"batch"`` on log-probs and lengths that contain the prompt

    Parameters
    ----------
    policy_chosen_logps
        :math:`\log\pi(y_w)`: sums over tokens, in nats, of shape [batch].
    chosen_lengths
        The numbers of tokens summed over, at least 1, of shape [batch].
    how
        One of ``LIKELIHOODS``. In a batch of one, or of equal lengths, ``"mean"`` and ``"batch"`` agree.

    Returns
    -------
    Tensor
        One term a pair. With ``"batch"`` it depends on the rest of the batch: two micro-batches do not add up to one.

    Raises
    ------
    ValueError
        For another ``how``, lengths below 1, or shapes that differ.
    """
    if how not in LIKELIHOODS:
        raise ValueError(f"how = {how!r}: it must be one of {', '.join(map(repr, LIKELIHOODS))}")
    if policy_chosen_logps.shape != chosen_lengths.shape:
        shapes = f"{tuple(policy_chosen_logps.shape)} and {tuple(chosen_lengths.shape)}"
        raise ValueError(f"policy_chosen_logps and chosen_lengths have shapes {shapes}: give one length a log-prob")
    if not (chosen_lengths >= 1).all():
        raise ValueError(f"chosen_lengths contains {chosen_lengths.min().item()}: at least 1; drop empty responses")
    if how == "sum":
        return -policy_chosen_logps
    if how == "mean":
        return -policy_chosen_logps / chosen_lengths
    return -policy_chosen_logps / (chosen_lengths.sum() / chosen_lengths.numel())


def _positive(name: str, value: float) -> float:
    try:
        fine = bool(0 < value < math.inf)
    except TypeError:  # no number, or a symbol that may be negative
        fine = False
    if not fine:
        raise ValueError(f"{name} = {value!r}: it must be finite and above 0")
    return value


# ---------------------------------------------------------------- who says it how


@dataclass(frozen=True)
class Library:
    """Whose code was read."""

    title: str  #: its name
    version: str  #: the release or the commit that was read
    compared: str  #: ``"installed"``: run against ours; ``"formula"``: its formula, in our words, is run against ours


LIBRARIES = {
    "trl": Library("TRL", "1.16.0", "installed"),
    "liger": Library("Liger kernels", "0.8.5", "installed"),
    "torchtune": Library("torchtune", "0.6.1", "formula"),
    "dpo": Library("the DPO authors' code", "main, 8a4023f", "formula"),
    "simpo": Library("the SimPO authors' code", "main, 15c4ff8", "formula"),
    "alpha_dpo": Library("the α-DPO authors' code", "main, f6a8102", "formula"),
    "beta_dpo": Library("the β-DPO authors' code", "main, 6f3abb8", "formula"),
    "orpo": Library("the ORPO authors' code", "main, 0f0abfe", "formula"),
    "halos": Library("HALOs, the KTO authors' code", "main, 031a524", "formula"),
}


@dataclass(frozen=True)
class Convention:
    """How a library states one of our losses; :func:`losses` computes ours in its convention.

    Their loss is ``scale(...)`` times the mean over the batch of ours, computed on ``logps``, with the winner's
    likelihood averaged as ``likelihood`` says.
    """

    library: str  #: a key of ``LIBRARIES``
    where: str  #: the class or function that takes their settings
    fixed: Mapping[str, Any]  #: their settings that choose this loss
    loss: str  #: our name of it
    to: Callable[..., dict[str, Any]]  #: our settings, to the rest of theirs
    back: Callable[..., dict[str, Any]]  #: the rest of theirs, to our settings
    ours: Mapping[str, Any] = field(default_factory=dict)  #: our settings that they cannot change
    logps: str = "sum"  #: what their formula compares: ``"sum"`` or ``"mean"`` log-probs
    likelihood: str = ""  #: how they average the winner's likelihood, of ``LIKELIHOODS``; empty if they have none
    scale: Callable[..., Any] = lambda **_: 1  #: from our settings: their loss over ours

    def theirs(self, **settings: Any) -> dict[str, Any]:
        """Their settings from ours; see the function of this name."""
        chosen = {**LOSSES[self.loss].settings, **self.ours, **settings}
        _check(self.loss, chosen)
        for name, only in self.ours.items():
            if chosen[name] != only:
                raise ValueError(f"{name} = {chosen[name]!r}: {self.where} cannot say so; there it is always {only!r}")
        try:
            return {**self.fixed, **self.to(**chosen)}
        except ZeroDivisionError:
            zeros = ", ".join(f"{k} = {x!r}" for k, x in chosen.items() if x == 0 and not isinstance(x, bool))
            raise ValueError(f"{zeros}: {self.where} cannot say so; it divides by it; take more than 0") from None


def _named(**pairs: str) -> tuple[Callable[..., dict[str, Any]], Callable[..., dict[str, Any]]]:
    """Settings of the same meaning: ``theirs="ours"``, forth and back."""
    return (
        lambda **settings: {theirs: settings[ours] for theirs, ours in pairs.items()},
        lambda **settings: {ours: settings[theirs] for theirs, ours in pairs.items()},
    )


_BETA = _named(beta="beta")
_BETA_EPS = _named(beta="beta", label_smoothing="label_smoothing")
_BETA_SFT = _named(beta="beta", alpha="sft_weight")
_RATIO = (
    lambda *, beta, gamma, **_: {"beta": beta, "gamma_beta_ratio": gamma / beta},
    lambda *, beta, gamma_beta_ratio, **_: {"beta": beta, "gamma": beta * gamma_beta_ratio},
)
_ALPHA_RATIO = (
    lambda *, beta, gamma, alpha, **_: {"beta": beta, "gamma_beta_ratio": gamma / beta, "alpha": alpha / beta},
    lambda *, beta, gamma_beta_ratio, alpha, **_: {
        "beta": beta,
        "gamma": beta * gamma_beta_ratio,
        "alpha": beta * alpha,
    },
)
_SFT_WEIGHTS = (
    lambda *, beta, sft_weight, **_: {"beta": beta, "loss_weights": [1.0, sft_weight]},
    lambda *, beta, loss_weights, **_: {"beta": beta, "sft_weight": loss_weights[1] / loss_weights[0]},
)
# cDPO = 2(1-ε) DPO - (1-2ε) rDPO, at the same ε
_CDPO_MIX = (
    lambda *, beta, label_smoothing, **_: {
        "beta": beta,
        "label_smoothing": label_smoothing,
        "loss_weights": [2 * (1 - label_smoothing), 2 * label_smoothing - 1],
    },
    lambda *, beta, label_smoothing, loss_weights, **_: {"beta": beta, "label_smoothing": label_smoothing},
)
# max(0, 1 - Δ/δ) + (ω/δ) NLL is (1/δ) times max(0, δ - Δ) + ω NLL
_HINGE_SLOPE = (
    lambda *, delta, sft_weight, **_: {"beta": 1 / delta, "cpo_alpha": sft_weight / delta},
    lambda *, beta, cpo_alpha, **_: {"delta": 1 / beta, "sft_weight": cpo_alpha / beta},
)


def _over_delta(*, delta: Any, **_: Any) -> Any:
    return 1 / delta


_KTO = _named(beta="beta", desirable_weight="desirable_weight", undesirable_weight="undesirable_weight")


def _of(library: str, where: str, **always: Any) -> Callable[..., Convention]:
    """Rows of one class: the settings that choose the loss, our name, the converters, the rest."""

    def row(fixed: Mapping[str, Any], loss: str, converters: tuple[Any, Any], **rest: Any) -> Convention:
        return Convention(library, where, {**always, **fixed}, loss, *converters, **rest)

    return row


_TRL_DPO, _TRL_CPO = _of("trl", "DPOTrainer"), _of("trl", "CPOTrainer")
_LIGER_DPO = _of("liger", "LigerFusedLinearDPOLoss", compute_nll_loss=False, average_log_prob=False, use_ref_model=True)
_ORIGINAL = _of("dpo", "preference_loss", ipo=False, reference_free=False)

CONVENTIONS: tuple[Convention, ...] = (
    _TRL_DPO({"loss_type": ["sigmoid"]}, "dpo", _BETA),
    _TRL_DPO({"loss_type": ["sigmoid_norm"]}, "dpo", _BETA, logps="mean"),
    _TRL_DPO({"loss_type": ["hinge"]}, "hinge", _BETA),
    _TRL_DPO({"loss_type": ["ipo"]}, "ipo", _BETA, logps="mean"),
    _TRL_DPO({"loss_type": ["robust"]}, "robust_dpo", _BETA_EPS),
    _TRL_DPO({"loss_type": ["sigmoid", "robust"]}, "conservative_dpo", _CDPO_MIX),
    _TRL_DPO({"loss_type": ["sigmoid", "sft"]}, "dpo_sft", _SFT_WEIGHTS, likelihood="batch"),
    _TRL_CPO({"loss_type": "sigmoid"}, "cpo", _named(beta="beta", cpo_alpha="sft_weight"), likelihood="batch"),
    _TRL_CPO({"loss_type": "hinge"}, "slic", _HINGE_SLOPE, likelihood="batch", scale=_over_delta),
    _TRL_CPO({"loss_type": "simpo", "cpo_alpha": 0.0}, "simpo", _named(beta="beta", simpo_gamma="gamma"), logps="mean"),
    _of("trl", "ORPOTrainer")({}, "orpo", _named(beta="odds_weight"), logps="mean", likelihood="prompt"),
    _of("trl", "KTOTrainer")({"loss_type": "kto"}, "kto", _KTO),
    _LIGER_DPO({"loss_type": "sigmoid"}, "dpo", _BETA),
    _LIGER_DPO({"loss_type": "sigmoid", "average_log_prob": True}, "dpo", _BETA, logps="mean"),
    _LIGER_DPO({"loss_type": "hinge"}, "hinge", _BETA),
    _LIGER_DPO({"loss_type": "robust"}, "robust_dpo", _BETA_EPS),
    _LIGER_DPO({"loss_type": "sigmoid", "compute_nll_loss": True}, "dpo_sft", _BETA_SFT, likelihood="batch"),
    _of("liger", "LigerFusedLinearCPOLoss", average_log_prob=False, label_smoothing=0.0)(
        {"compute_nll_loss": True}, "cpo", _BETA_SFT, likelihood="batch"
    ),
    _of("liger", "LigerFusedLinearSimPOLoss", label_smoothing=0.0)(
        {"compute_nll_loss": False}, "simpo", _named(beta="beta", gamma="gamma"), logps="mean"
    ),
    _of("liger", "LigerFusedLinearORPOLoss")(
        {"compute_nll_loss": True}, "orpo", _named(beta="odds_weight"), logps="mean", likelihood="batch"
    ),
    _of("liger", "LigerFusedLinearKTOLoss", use_ref_model=True, average_log_prob=False)(
        {}, "kto", _BETA, ours={"desirable_weight": 1.0, "undesirable_weight": 1.0}
    ),
    _of("torchtune", "DPOLoss")({"label_smoothing": 0.0}, "dpo", _BETA),
    _of("torchtune", "DPOLoss")({}, "conservative_dpo", _BETA_EPS),
    _of("torchtune", "RSOLoss")({}, "hinge", _named(gamma="beta")),
    _ORIGINAL({"label_smoothing": 0.0}, "dpo", _BETA),
    _ORIGINAL({}, "conservative_dpo", _BETA_EPS),
    _ORIGINAL({"ipo": True}, "ipo", _BETA),
    _ORIGINAL({"label_smoothing": 0.0, "reference_free": True}, "cpo", _BETA, ours={"sft_weight": 0.0}),
    _of("simpo", "SimPOTrainer", loss_type="sigmoid", sft_weight=0.0)({}, "simpo", _RATIO, logps="mean"),
    _of("alpha_dpo", "AlphaDPOTrainer", loss_type="alpha-dpo", ln=True)({}, "alpha_dpo", _ALPHA_RATIO, logps="mean"),
    _of("beta_dpo", "preference_loss", mode_loss="beta_DPO")(
        {}, "beta_dpo", _named(beta="beta", a="alpha"), ours={"beta_min": 1e-3}
    ),
    _of("orpo", "ORPOTrainer")(
        {"disable_prompt_loss": True}, "orpo", _named(alpha="odds_weight"), logps="mean", likelihood="batch"
    ),
    _of("orpo", "ORPOTrainer")(
        {"disable_prompt_loss": False}, "orpo", _named(alpha="odds_weight"), logps="mean", likelihood="prompt"
    ),
    _of("halos", "SLiCTrainer")({}, "slic", _named(beta="delta", lambda_coef="sft_weight"), likelihood="sum"),
    _of("halos", "KTOTrainer")({}, "kto", _KTO),
)

#: How our functions average the winner's likelihood, and which setting weighs it (ORPO's is fixed to 1).
_OURS = {"dpo_sft": "mean", "cpo": "sum", "slic": "sum", "orpo": "mean"}


def find(where: str, loss: str, library: str | None = None, logps: str | None = None) -> Convention:
    """The convention of one class or function for one of our losses.

    Parameters
    ----------
    where
        The library's class or function, such as ``"DPOTrainer"``.
    loss
        Our name, a key of `bdpo.losses.LOSSES`.
    library
        A key of ``LIBRARIES``, where two libraries use one name (``"ORPOTrainer"``); otherwise optional.
    logps
        ``"sum"`` or ``"mean"``, where a library offers both (TRL's sigmoid and sigmoid_norm); the first by default.

    Returns
    -------
    Convention
        The first that fits.

    Raises
    ------
    ValueError
        If there is none; the message lists what there is.
    """
    named = [c for c in CONVENTIONS if c.where == where and library in (None, c.library)]
    if not named:
        known = ", ".join(sorted({c.where for c in CONVENTIONS if library in (None, c.library)}))
        raise ValueError(f"where = {where!r}: not among the conventions read; choose from {known or 'none'}")
    fitting = [c for c in named if c.loss == loss and logps in (None, c.logps)]
    if not fitting:
        known = ", ".join(dict.fromkeys(f"{c.loss} ({c.logps})" for c in named))
        raise ValueError(f"loss = {loss!r}: {where} does not state it; it states {known}")
    return fitting[0]


def theirs(where: str, loss: str, *, library: str | None = None, logps: str | None = None, **settings: Any) -> dict:
    """Their settings for one of our losses.

    Parameters
    ----------
    where, loss, library, logps
        As in :func:`find`.
    **settings
        Our settings; what is left out has our default.

    Returns
    -------
    dict
        What to pass to their class or function, the settings that choose the loss included.

    Raises
    ------
    ValueError
        If they do not state the loss, or cannot express the settings, or a setting is outside its range.
    TypeError
        For a setting that our loss does not have.
    """
    return find(where, loss, library, logps).theirs(**settings)


def ours(where: str, *, library: str | None = None, **settings: Any) -> tuple[Convention, dict[str, Any]]:
    """Our loss and its settings, from theirs.

    Parameters
    ----------
    where, library
        As in :func:`find`.
    **settings
        All of their settings that :func:`theirs` lists for the loss. Of two readings the more special one is taken:
        torchtune's ``label_smoothing=0`` is DPO, not conservative DPO with nothing smoothed.

    Returns
    -------
    tuple
        The convention, which names our loss and says whether it is to be computed on means, and our settings:
        ``losses(convention, batch, **settings)`` is their loss.

    Raises
    ------
    ValueError
        If no convention has these settings; the message lists those of the class.
    """
    named = [c for c in CONVENTIONS if c.where == where and library in (None, c.library)]
    for convention in sorted(named, key=lambda c: -len(c.fixed)):
        chosen = {name: settings.get(name) for name in convention.fixed}
        rest = {name: value for name, value in settings.items() if name not in convention.fixed}
        default = convention.to(**{**LOSSES[convention.loss].settings, **convention.ours})
        if chosen != dict(convention.fixed) or set(rest) != set(default):
            continue
        try:
            values = {**convention.back(**rest), **convention.ours}
        except (ArithmeticError, LookupError, TypeError):  # a weight of 0, or no list of weights
            continue
        _check(convention.loss, values)
        again = convention.to(**values)
        if all(_agree(again[name], value) for name, value in rest.items()):
            return convention, values
    known = "; ".join(f"{c.loss}: {c.theirs()}" for c in named)
    raise ValueError(f"settings = {settings!r}: {where} states none of our losses so; it states {known or 'nothing'}")


def losses(convention: Convention, batch: Mapping[str, Tensor], **settings: Any) -> Tensor:
    r"""Our losses in their convention: what they report is the mean of what is returned.

    Parameters
    ----------
    convention
        An entry of ``CONVENTIONS``.
    batch
        Tensors by the names of `bdpo.losses`: sums of log-probs and, where lengths enter, ``chosen_lengths`` and
        ``rejected_lengths``; where the likelihood covers the prompt, also ``prompt_logps`` and ``prompt_lengths``,
        those of the prompt's tokens but the first, which nothing predicts.
    **settings
        Our settings; what is left out has our default.

    Returns
    -------
    Tensor
        One value a pair (or response).

    Raises
    ------
    KeyError
        If the batch lacks a tensor that the loss, or its normalisation, needs.
    TypeError, ValueError
        As the loss itself; also for settings that the library cannot express.
    """
    convention.theirs(**settings)  # refuses what they cannot say
    spec = LOSSES[convention.loss]
    chosen = {**spec.settings, **convention.ours, **settings}
    tensors = dict(batch)
    if convention.logps == "mean" and spec.logps == "sum":
        for name in (n for n in spec.needs if n.endswith("_logps")):
            tensors[name] = batch[name] / batch["chosen_lengths" if "chosen" in name else "rejected_lengths"]
    values = spec(*(tensors[name] for name in spec.needs), **chosen)
    if convention.likelihood:
        win, lengths = batch["policy_chosen_logps"], batch["chosen_lengths"]
        own = likelihood(win, lengths, _OURS[convention.loss])
        if convention.likelihood == "prompt":
            win, lengths = win + batch["prompt_logps"], lengths + batch["prompt_lengths"]
        values = values + chosen.get("sft_weight", 1.0) * (likelihood(win, lengths, convention.likelihood) - own)
    return convention.scale(**chosen) * values


def _agree(one: Any, other: Any) -> bool:
    """Whether two settings are equal, numbers up to rounding."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_agree, one, other))
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (one, other))
    return math.isclose(one, other, rel_tol=1e-9) if numbers else one == other


def _check(loss: str, settings: Mapping[str, Any]) -> None:
    """Let the loss itself judge the settings, on one harmless pair."""
    one = torch.ones(1)
    others = {"desirable": one.bool(), "kl": one, "margin_std": one, "chosen_lengths": one, "rejected_lengths": one}
    LOSSES[loss](*(others.get(name, -one) for name in LOSSES[loss].needs), **settings)


# ---------------------------------------------------------------- where they differ, and why


@dataclass(frozen=True)
class Disagreement:
    """A known difference between a library and this package. ``tests/test_peers.py`` asserts that it is still there."""

    library: str  #: a key of ``LIBRARIES``
    losses: tuple[str, ...]  #: our names of what it touches
    what: str  #: what the library does
    cause: str  #: why
    so: str  #: what to do about it


DISAGREEMENTS: dict[str, Disagreement] = {
    "trl-ipo-means": Disagreement(
        "trl",
        ("ipo",),
        "`loss_type=['ipo']` divides each log-ratio by the length of its response.",
        "The trainer says that IPO's authors confirmed it; Eq 17 of the paper, and the DPO authors' code, have sums.",
        "Pass log-probs divided by the lengths to `ipo`; beta changes its meaning by a factor of the length.",
    ),
    "trl-smoothing-ignored": Disagreement(
        "trl",
        ("conservative_dpo",),
        "`loss_type=['sigmoid']` ignores `label_smoothing`, without a warning.",
        "The field now belongs to `robust`, `exo_pair` and `aot`. It was cDPO's, as it still is in torchtune.",
        "Ask for `['sigmoid', 'robust']` with the weights of `theirs('DPOTrainer', 'conservative_dpo')`.",
    ),
    "label-smoothing-twice": Disagreement(
        "torchtune",
        ("conservative_dpo", "robust_dpo"),
        "`label_smoothing` is cDPO's; TRL's `robust` has it as rDPO's.",
        "Two papers, one name: the first adds a multiple of the margin to DPO's loss, the second subtracts one.",
        "Say which; `smoothing_of_noise` converts.",
    ),
    "trl-simpo-likelihood": Disagreement(
        "trl",
        ("simpo",),
        "`CPOTrainer(loss_type='simpo')` adds the likelihood of the winner by default.",
        "`cpo_alpha` is 1 whatever the loss; the sum is a method of its own, CPO-SimPO.",
        "Set `cpo_alpha=0`.",
    ),
    "trl-likelihood-batch": Disagreement(
        "trl",
        ("cpo", "dpo_sft", "slic"),
        "The likelihood of the winner is a mean over all tokens of the batch.",
        "It is PyTorch's cross entropy. The papers have a sum (CPO, SLiC) or a mean for each pair (RPO).",
        "Scale the weight by the mean length. Two micro-batches are still not one batch: long winners weigh more.",
    ),
    "trl-orpo-prompt": Disagreement(
        "trl",
        ("orpo",),
        "The likelihood covers the tokens of the prompt too.",
        "So does the authors' code, unless `disable_prompt_loss`; the paper speaks of the response.",
        "Long prompts weigh the second term down. There is no switch.",
    ),
    "trl-orpo-certain": Disagreement(
        "trl",
        ("orpo",),
        "Log-probs above about -3e-8 a token give a right value and a gradient that is NaN.",
        "Both branches of a `torch.where` are differentiated, and the unused one divides by 0; float32 always.",
        "One such response, short and certain, ends a run: drop it, or use `orpo`.",
    ),
    "trl-empty-response": Disagreement(
        "trl",
        ("ipo", "simpo"),
        "A response without tokens counts as length 1 in DPOTrainer and gives NaN in CPOTrainer.",
        "One clamps the length, the other divides by 0.",
        "Drop them; we refuse lengths below 1.",
    ),
    "trl-kto-cancels": Disagreement(
        "trl",
        ("kto",),
        "Losses and gradients of responses that are far on the right side round to 0.",
        "It is computed as 1 - sigmoid(x), which in float32 is 0 from about x = 17 on; the loss is about exp(-x).",
        "Harmless in training. A comparison of small losses needs `kto`.",
    ),
    "liger-ipo-missing": Disagreement(
        "liger",
        ("ipo",),
        "There is no IPO.",
        "It would have to average, as TRL does, and its chunks see log-probs without lengths.",
        "Use another.",
    ),
    "liger-smoothing-ignored": Disagreement(
        "liger",
        ("conservative_dpo",),
        "`loss_type='sigmoid'` ignores `label_smoothing`, without a warning.",
        "As in TRL, whose loss types it follows; its docstring still mentions cDPO.",
        "There is no cDPO in Liger's DPO; its CPO and SimPO have it.",
    ),
    "liger-simpo-likelihood": Disagreement(
        "liger",
        ("simpo",),
        "`LigerFusedLinearSimPOLoss()` adds the likelihood of the winner by default.",
        "The module's default of `compute_nll_loss` is True; that of the function below it is False.",
        "Set `compute_nll_loss=False`.",
    ),
    "liger-average-default": Disagreement(
        "liger",
        ("dpo", "cpo", "kto"),
        "The base class averages log-probs by default; DPO, CPO and KTO sum them.",
        "ORPO and SimPO, which average, take the default of the base class and cannot change it.",
        "State `average_log_prob` when you make a loss of your own from it.",
    ),
    "liger-orpo-certain": Disagreement(
        "liger",
        ("orpo",),
        "Log-probs above about -6e-8 a token give an infinite log-odds and a gradient that is NaN.",
        "log(1 - p) is computed as log1p(-exp(log p)) in float32, as in the authors' code.",
        "As for TRL.",
    ),
    "liger-kto-reference": Disagreement(
        "liger",
        ("kto",),
        "`LigerFusedLinearKTOLoss()` takes a reference and does not use it by default.",
        "The module's default of `use_ref_model` is False; that of the function below it is True.",
        "Set `use_ref_model=True`.",
    ),
    "liger-kto-negative": Disagreement(
        "liger",
        ("kto",),
        "A negative reference point is used as it is.",
        "The estimate is left to the caller; the paper clamps it at 0, and so does TRL.",
        "Clamp it, as `kto_kl` does; `kto` refuses it.",
    ),
    "liger-float32": Disagreement(
        "liger",
        ("dpo",),
        "Log-probs and loss are float32, also where the model is float64.",
        "The logits are converted before the softmax.",
        "Compare with a tolerance of float32.",
    ),
    "alpha-dpo-first-steps": Disagreement(
        "alpha_dpo",
        ("alpha_dpo",),
        "The running mean and deviation start at 0.",
        "A moving average of rate 0.1 without a correction: the first standardised margins are ten times too large.",
        "Start `margin_mean` and `margin_std` at the first batch's own.",
    ),
    "beta-dpo-first-steps": Disagreement(
        "beta_dpo",
        ("beta_dpo",),
        "The running mean starts at 0, so that beta begins too large (or too small).",
        "The same moving average; the batch is also compared with a mean that already contains it.",
        "Start `margin_mean` at the first batch's own.",
    ),
    "halos-slic-shapes": Disagreement(
        "halos",
        ("slic",),
        "Hinges of shape [batch] are added to likelihoods of shape [batch, length].",
        "Log-probs became tables of tokens; one of two places was changed to sum them.",
        "Sum over tokens first, as the paper and the earlier releases do.",
    ),
}
