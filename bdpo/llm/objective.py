r"""An objective of `bdpo.losses` fed from a batch of log-probs, with the numbers that people watch while it trains.

=============================  ==================================================================================
``rewards/chosen, rejected``   :math:`\beta\log\frac{\pi}{\pi_{\mathrm{ref}}}`; without a reference
                               :math:`\beta\log\pi`, divided by the length where the objective compares means
``rewards/margins``            their difference
``rewards/accuracies``         the share of pairs whose chosen response has the higher reward
``logps/chosen, rejected``     summed log-probs under the policy
``lengths/chosen, rejected``   tokens
``lambda``                     :math:`g_w/(g_w+g_l)`, the winner's share of the gradient, with
                               :math:`g = |\partial\mathcal{L}/\partial\log\pi|`: :math:`\lambda_w` of Eq 29 for bDPO,
                               1/2 for DPO, :math:`\lambda/(1+\lambda)` for nbDPO
``gradient_log_ratio``         :math:`\ln(g_w/g_l)`, the gradient imbalance in log-prob coordinates; 0 is balance
=============================  ==================================================================================

The names with ``rewards`` and ``logps`` are those of TRL. ``lambda`` leaves out the pairs for which both gradients are
exactly zero, ``gradient_log_ratio`` those for which one is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bdpo.losses import LOSSES, PAIRS, log_ratio_margin

#: The columns of the metrics.
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "lengths/chosen",
    "lengths/rejected",
    "lambda",
    "gradient_log_ratio",
)

LOGPS = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
LENGTHS = ("chosen_lengths", "rejected_lengths")
STATISTICS = ("margin_mean", "margin_std")


def mean_metrics(parts: list[Tensor], reduce: Callable[..., Any]) -> dict[str, float]:
    """The means over all pairs of some batches, and over all processes, of each metric but the loss.

    ``reduce(tensor, "sum")`` adds a tensor over the processes: ``Accelerator.reduce``.
    """
    metrics = torch.cat(parts).double()
    known = ~metrics.isnan()
    sums, counts = reduce(torch.stack([metrics.nan_to_num(0.0).sum(0), known.double().sum(0)]), "sum").tolist()
    return {name: s / n for name, s, n in zip(METRICS, sums, counts, strict=True) if n and name != "loss"}


def _alone(x: Tensor) -> Tensor:
    return x


class Objective:
    r"""A pair objective by name, with settings.

    Parameters
    ----------
    name
        A key of `bdpo.losses.LOSSES` whose kind is ``"pair"``.
    settings
        Keyword settings of that loss; what is left out has the loss's own default.
    momentum
        At least 0 and below 1: how much of the past the running mean and standard deviation of the margin keep, for the
        objectives that need them (:math:`s \leftarrow \text{momentum}\, s + (1-\text{momentum})\, s_{\text{batch}}`,
        after the batch was scored with the old value; they begin as 0, the margin of a policy that is its reference,
        and 1, our choice). Larger is slower; 0.9 is that of the authors of β-DPO.

    Raises
    ------
    ValueError
        For an unknown name, a loss that is not one of pairs, an unknown setting, a momentum out of range.
    """

    def __init__(self, name: str, settings: Mapping[str, Any] | None = None, *, momentum: float = 0.9) -> None:
        if name not in LOSSES:
            raise ValueError(f"loss = {name!r}: choose one of {', '.join(PAIRS)}")
        self.spec = LOSSES[name]
        if self.spec.kind != "pair":
            raise ValueError(
                f"loss = {name!r} is an objective of kind {self.spec.kind!r}, not of pairs: {', '.join(PAIRS)}"
            )
        if unknown := set(self.spec.needs) - {*LOGPS, *LENGTHS, *STATISTICS}:
            raise ValueError(
                f"loss = {name!r} needs {', '.join(sorted(unknown))}, which a batch of pairs does not have"
            )
        self.settings = dict(self.spec.settings)
        for key, value in (settings or {}).items():
            if key not in self.settings:
                raise ValueError(f"{name} has no setting {key!r}, only {', '.join(self.settings)}")
            self.settings[key] = value
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum = {momentum!r}: it must be at least 0 and below 1")
        self.momentum = momentum
        self.state = {"margin_mean": 0.0, "margin_std": 1.0}
        one = {name: torch.full((1,), -1.0) for name in self.spec.needs}
        one |= {name: torch.full((1,), 1.0) for name in self.spec.needs if not name.endswith("logps")}
        self.spec(*one.values(), **self.settings)  # its own checks of the settings, before anything is loaded

    @property
    def uses_statistics(self) -> bool:
        return bool(set(STATISTICS) & set(self.spec.needs))

    @property
    def needs_reference(self) -> bool:
        return not self.spec.reference_free

    def __call__(
        self,
        win: Tensor,
        lose: Tensor,
        ref_win: Tensor | None,
        ref_lose: Tensor | None,
        lengths: tuple[Tensor, Tensor],
        *,
        gather: Callable[[Tensor], Tensor] = _alone,
        learn: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The losses of a batch, [pairs], and its metrics, [pairs, len(METRICS)], NaN where one is not defined.

        Parameters
        ----------
        win, lose, ref_win, ref_lose
            Summed log-probs, [pairs]; those of the reference may be None if the objective needs none.
        lengths
            Tokens of the chosen and of the rejected responses, [pairs].
        gather
            Stacks a tensor of all processes, for statistics of the batch.
        learn
            Whether this batch moves the running statistics: True in training, False in evaluation.
        """
        with torch.enable_grad():
            leaves = [x if x.requires_grad else x.detach().requires_grad_() for x in (win, lose)]
            fed: dict[str, Any] = dict(zip((*LOGPS, *LENGTHS), (*leaves, ref_win, ref_lose, *lengths), strict=True))
            fed |= self._statistics(fed, gather, learn)
            losses = self.spec(*(fed[name] for name in self.spec.needs), **self.settings)
            g_win, g_lose = torch.autograd.grad(losses.sum(), leaves, retain_graph=True, materialize_grads=True)
        with torch.no_grad():
            metrics = self._metrics(losses, win, lose, ref_win, ref_lose, lengths, g_win.abs(), g_lose.abs())
        return losses, metrics

    def _metrics(
        self,
        losses: Tensor,
        win: Tensor,
        lose: Tensor,
        ref_win: Tensor | None,
        ref_lose: Tensor | None,
        lengths: tuple[Tensor, Tensor],
        g_win: Tensor,
        g_lose: Tensor,
    ) -> Tensor:
        beta = float(self.settings.get("beta", 1.0))
        rewards = []
        for logps, reference, length in ((win, ref_win, lengths[0]), (lose, ref_lose, lengths[1])):
            if not self.needs_reference or reference is None:
                rewards.append(beta * (logps / length if self.spec.logps == "mean" else logps))
            else:
                rewards.append(beta * (logps - reference))
        columns = (
            losses,
            rewards[0],
            rewards[1],
            rewards[0] > rewards[1],
            rewards[0] - rewards[1],
            win,
            lose,
            *lengths,
            g_win / (g_win + g_lose),
            torch.where((g_win > 0) & (g_lose > 0), (g_win / g_lose).log(), torch.nan),
        )
        return torch.stack([column.float() for column in columns], 1)

    def _statistics(
        self, logps: Mapping[str, Any], gather: Callable[[Tensor], Tensor], learn: bool
    ) -> dict[str, Tensor]:
        """The running statistics of the margin before this batch, which then moves them."""
        if not self.uses_statistics:
            return {}
        before = {key: logps["policy_chosen_logps"].new_tensor(value) for key, value in self.state.items()}
        if learn:
            lengths = LENGTHS if self.spec.logps == "mean" else ()
            margins = gather(log_ratio_margin(*(logps[name] for name in (*LOGPS, *lengths))))
            now = {"margin_mean": margins.mean().item(), "margin_std": margins.std(correction=0).item()}
            self.state = {key: self.momentum * self.state[key] + (1 - self.momentum) * now[key] for key in now}
        return before
