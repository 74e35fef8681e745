r"""The objectives of preference learning, as pure functions of tensors under one convention.

**Convention.** A log-prob is the *sum* of the log-probs of a response's tokens given the prompt, not their mean, in
nats; an objective that compares means takes the lengths and divides itself. :math:`\beta` multiplies the margin. A loss
is returned for every pair (or response, or prompt), not yet averaged. No function keeps a state: what an objective
needs to remember of earlier batches, it takes as an argument.

**Accuracy.** In float64, for log-probs from -2000 to -1e-9 and the settings swept by `bdpo.losses.audit`, value and
gradients have a relative error below 1e-8, down to where float64 underflows (some 1e-307). Where a number is a sum
of terms of either sign, the error is relative to the sum of their sizes; the docstrings say where. float16 and bfloat16
are computed in float32 and returned in the dtype they came in.

**Input.** Log-probs are finite and at most 0. Minus infinity is refused: a response of probability zero has an
infinite margin, hence a loss of 0 or infinity, or NaN where two infinities meet, and comes in practice from a wrong
label mask. Values are looked at in eager mode and under ``torch.func``, which costs a GPU one synchronisation; under
``torch.compile``, where a look would break the graph, only types, shapes and settings are.

**Gradients.** The losses detach only what their docstrings say. Compute the reference's log-probs under
``torch.no_grad()``.

``LOSSES`` holds one `Spec` for each objective: what it needs, what can be set, where it comes from.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bdpo.losses.dynamic import alpha_dpo, beta_dpo, beta_dpo_filter, log_ratio_margin
from bdpo.losses.kto import kto, kto_kl, kto_pair
from bdpo.losses.pairs import conservative_dpo, cpo, dpo_sft, hinge, ipo, orpo, robust_dpo, simpo, slic
from bdpo.losses.paper import bdpo, dpo, nbdpo_asym, nbdpo_sym, nbdpo_v2_asym, nbdpo_v2_sym
from bdpo.losses.rlhf import reward_bt, rlhf_tabular

__all__ = [
    "LOSSES",
    "PAIRS",
    "PAPER",
    "Spec",
    "alpha_dpo",
    "bdpo",
    "beta_dpo",
    "beta_dpo_filter",
    "conservative_dpo",
    "cpo",
    "dpo",
    "dpo_sft",
    "hinge",
    "ipo",
    "kto",
    "kto_kl",
    "kto_pair",
    "log_ratio_margin",
    "nbdpo_asym",
    "nbdpo_sym",
    "nbdpo_v2_asym",
    "nbdpo_v2_sym",
    "orpo",
    "reward_bt",
    "rlhf_tabular",
    "robust_dpo",
    "simpo",
    "slic",
]


@dataclass(frozen=True)
class Spec:
    """One objective, and what a trainer has to know to feed it; calling the spec calls the function."""

    name: str  #: its key in ``LOSSES``
    title: str  #: its full name
    function: Callable[..., Tensor]
    kind: str  #: ``"pair"``, ``"unpaired"`` (a labelled response), ``"reward"`` (a pair of scores) or ``"policy"``
    needs: tuple[str, ...]  #: the names of its tensor arguments, in order
    settings: dict[str, float | bool | str]  #: its keyword settings and their defaults
    logps: str  #: ``"sum"`` or ``"mean"`` (it divides by the lengths), what its margin compares; else ``"none"``
    reference_free: bool  #: True if it takes nothing of a reference
    source: str  #: paper, version and equation

    def __call__(self, *tensors: Tensor, **settings: float | bool | str) -> Tensor:
        return self.function(*tensors, **settings)


def _spec(function: Callable[..., Tensor], title: str, kind: str, logps: str, source: str) -> Spec:
    """The spec of a function; needs and settings are its positional and its keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    needs = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    settings: dict[str, Any] = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    reference_free = not any(name.startswith("ref_") for name in needs)
    return Spec(function.__name__, title, function, kind, needs, settings, logps, reference_free, source)


_ALL = (
    _spec(dpo, "Direct preference optimisation", "pair", "sum", "arXiv:2305.18290v3, Eq 7"),
    _spec(nbdpo_asym, "Naive Balanced DPO, asymmetric", "pair", "sum", "arXiv:2502.20847v1, Eqs 25, 26"),
    _spec(nbdpo_sym, "Naive Balanced DPO, symmetric", "pair", "sum", "arXiv:2502.20847v1, Eqs 25, 26"),
    _spec(nbdpo_v2_asym, "Naive Balanced DPO v2, asymmetric", "pair", "sum", "arXiv:2502.20847v1, Eqs 27, 26"),
    _spec(nbdpo_v2_sym, "Naive Balanced DPO v2, symmetric", "pair", "sum", "arXiv:2502.20847v1, Eqs 27, 26"),
    _spec(bdpo, "Balanced DPO", "pair", "sum", "arXiv:2502.20847v1, Eqs 28, 29"),
    _spec(ipo, "Identity preference optimisation", "pair", "sum", "arXiv:2310.12036v2, Eq 17"),
    _spec(cpo, "Contrastive preference optimisation", "pair", "sum", "arXiv:2401.08417, Eq 3 and Section 3"),
    _spec(kto_pair, "KTO of a batch of pairs", "pair", "sum", "the KTO authors' first report, Eq 7"),
    _spec(alpha_dpo, "α-DPO, adaptive reward margin", "pair", "mean", "arXiv:2410.10148v4, final objective"),
    _spec(beta_dpo, "β-DPO, β of the batch", "pair", "sum", "arXiv:2407.08639, batch-level β"),
    _spec(robust_dpo, "Robust DPO (rDPO)", "pair", "sum", "arXiv:2403.00409, Section 3.1"),
    _spec(conservative_dpo, "Conservative DPO (cDPO)", "pair", "sum", "E. Mitchell's note on noisy preferences, 2023"),
    _spec(hinge, "DPO with a hinge", "pair", "sum", "arXiv:2309.06657, hinge-norm"),
    _spec(slic, "SLiC-HF, calibration with human feedback", "pair", "sum", "arXiv:2305.10425, Eq 1"),
    _spec(simpo, "Simple preference optimisation", "pair", "mean", "arXiv:2405.14734v3, Eq 6"),
    _spec(orpo, "Odds-ratio preference optimisation", "pair", "mean", "arXiv:2403.07691v2, Eqs 6, 7"),
    _spec(dpo_sft, "DPO with a likelihood term", "pair", "sum", "arXiv:2404.19733, Eq 1"),
    _spec(kto, "Kahneman-Tversky optimisation", "unpaired", "sum", "arXiv:2402.01306v4, Eq 8"),
    _spec(reward_bt, "Bradley-Terry reward loss", "reward", "none", "arXiv:2305.18290v3, Eq 2"),
    _spec(rlhf_tabular, "KL-regularised policy objective, exact", "policy", "none", "arXiv:2305.18290v3, Eq 3"),
)

#: Every objective by name. ``LOSSES[name](...)`` takes the tensors that ``LOSSES[name].needs`` lists, in that order.
LOSSES: dict[str, Spec] = {spec.name: spec for spec in _ALL}

#: The six that the audited paper compares.
PAPER = ("dpo", "nbdpo_asym", "nbdpo_sym", "nbdpo_v2_asym", "nbdpo_v2_sym", "bdpo")

#: The objectives of a winner and a loser.
PAIRS = tuple(name for name, spec in LOSSES.items() if spec.kind == "pair")
