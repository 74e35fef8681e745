r"""The two objectives of reward-based learning from preferences: the reward's and the policy's."""

from __future__ import annotations

from torch import Tensor

from bdpo.losses._common import check_settings, minus_log_sigmoid, read


def reward_bt(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    r"""The Bradley-Terry loss of a reward model: the winner should score higher.

    :math:`\mathcal{L} = -\log\sigma(r_w - r_l)`

    Parameters
    ----------
    chosen_rewards, rejected_rewards
        Scores of winner and loser, any finite numbers, of shapes that broadcast. Adding a number to both changes
        nothing.

    Returns
    -------
    Tensor
        One loss a pair, at least 0.

    Raises
    ------
    TypeError, ValueError
        For scores that are not floating-point tensors of one dtype and device, not finite, or do not broadcast.

    Notes
    -----
    `dpo` is this loss with :math:`r = \beta\log\frac{\pi(y)}{\pi_{\mathrm{ref}}(y)}`.

    Source: Eq 2 of arXiv:2305.18290v3, without the expectation.
    """
    win, lose = read(("chosen_rewards", "rejected_rewards"), chosen_rewards, rejected_rewards)
    return minus_log_sigmoid(win - lose, chosen_rewards.dtype)


def rlhf_tabular(logits: Tensor, ref_logits: Tensor, rewards: Tensor, *, beta: float = 0.1) -> Tensor:
    r"""The policy objective of RLHF over a listed set of responses, exact: no sampling, no clipping.

    :math:`\mathcal{L} = -\sum_y \pi(y)\,r(y) + \beta\sum_y \pi(y)\log\frac{\pi(y)}{\pi_{\mathrm{ref}}(y)}` with
    :math:`\pi = \mathrm{softmax}(\mathrm{logits})` over the last dimension, and :math:`\pi_{\mathrm{ref}}` likewise

    Parameters
    ----------
    logits, ref_logits
        Of shape [..., responses], finite: the policy's and the reference's, each up to a constant.
    rewards
        :math:`r(y)`, of the same last dimension, finite.
    beta
        Above 0, in units of reward a nat. A larger beta keeps the policy nearer the reference.

    Returns
    -------
    Tensor
        One loss a prompt, of shape [...]: minus the objective that is to be maximised, of either sign.

    Raises
    ------
    TypeError, ValueError
        As in `dpo`; also for inputs that do not list the same number of responses.

    Notes
    -----
    The optimum is :math:`\pi \propto \pi_{\mathrm{ref}}\,e^{r/\beta}`, the loss there
    :math:`-\beta\log\sum_y\pi_{\mathrm{ref}}(y)\,e^{r(y)/\beta}`. Errors of value and gradient are relative to the sum
    of the sizes of the terms.

    Source: Eq 3 of arXiv:2305.18290v3, with the sign of a loss.
    """
    check_settings(beta=beta)
    policy, ref, reward = read(("logits", "ref_logits", "rewards"), logits, ref_logits, rewards)
    sizes = [tuple(x.shape[-1:]) for x in (policy, ref, reward)]
    if len(set(sizes)) > 1 or sizes[0] in ((), (0,)):
        shapes = ", ".join(str(tuple(x.shape)) for x in (policy, ref, reward))
        raise ValueError(f"logits, ref_logits and rewards have shapes {shapes}: the last dimension lists the responses")
    log_pi, log_ref = policy.log_softmax(-1), ref.log_softmax(-1)
    return (log_pi.exp() * (beta * (log_pi - log_ref) - reward)).sum(-1).to(logits.dtype)
