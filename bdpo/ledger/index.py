"""Every statement of arXiv:2502.20847v1 that the ledger rules on: permanent id, place, and what it says in our words.

Formulas are not typed here: a chapter binds each to a SymPy expression, from which both the page and the check are made.
No verdict stands here either; see :mod:`bdpo.ledger.rules`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One statement. ``same_as`` names the row that contains it; ``rests_on`` the statements that it uses."""

    id: str
    kind: str
    locator: str
    statement: str
    same_as: str | None = None
    rests_on: tuple[str, ...] = ()


def _rows(kind: str, table: str) -> list[Entry]:
    """Parse lines of the form ``id | locator | statement [| same_as X] [| rests_on A B]``."""
    entries = []
    for line in table.strip().splitlines():
        name, locator, statement, *options = (part.strip() for part in line.split(" | "))
        extra = {key: rest for key, _, rest in (option.partition(" ") for option in options)}
        entries.append(
            Entry(name, kind, locator, statement, extra.get("same_as"), tuple(extra.get("rests_on", "").split()))
        )
    return entries


_ASSUMPTIONS = _rows(
    "assumption",
    r"""
asm-1 | Assumption 1, §3.2 | The gradients of the logits with respect to the parameters have similar norms, all close to one number $g$.
asm-2 | Assumption 2, Eq 7, §3.2 | The gradients of different logits are nearly orthogonal: their cosines $c_{ij}$ are close to 0.
asm-2-random | §3.2, first argument | Two random directions have $\mathbb{E}[c_{ij}] = 0$ and $\mathbb{E}[c_{ij}^2] = O(1/N)$ for $N$ parameters, so a large model has small correlations.
asm-2-negative | §3.2, second argument | Empirically the mean cosine of logit gradients is negative.
asm-2-redundancy | §3.2, third argument | A large mean cosine means that the model is redundant: larger than needed, or not well optimised.
""",
)

_NUMBERED = [
    *_rows(
        "definition",
        r"""
def-1 | Definition 1, Eq 8, §4.1 | A loss is balanced if its derivatives with respect to $\pi(y_w)$ and $\pi(y_l)$ cancel in expectation; otherwise it is positively imbalanced if the winner's is the larger in size, else negatively imbalanced.
""",
    ),
    *_rows(
        "corollary",
        r"""
cor-1 | Corollary 1, §4.1 | The DPO loss is negatively imbalanced. | rests_on def-1 eq-2
cor-2 | Corollary 2, §4.1 | The reward loss of the PPO pipeline is balanced. | rests_on def-1 eq-3
cor-3 | Corollary 3, §4.1 | With a good reward model the policy loss of the PPO pipeline is positively imbalanced, two samples being taken as a pair. | rests_on def-1 eq-5 txt-reward-log-density
""",
    ),
    *_rows(
        "lemma",
        r"""
lem-1 | Lemma 1, Eq 9, §4.1 | The Jacobian of the softmax. | rests_on eq-6
lem-2 | Lemma 2, Eq 18, §4.3.2 | The pair weight is the difference $w_i = \beta_i - \alpha_i$ of what the preferences ask for and what the policy already gives. | rests_on eq-6 eq-17
lem-3 | Lemma 3, Eq 19, §4.3.2 | For bounded increasing positive $f, g$ the variance of $fg$ is at least the variance of $f$ times the second moment of $g$.
lem-4 | Lemma 4, Eq 23, §4.3.3 | For bounded increasing positive $f, g$ the covariance of $fg$ and $g$ is at least the mean of $f$ times the variance of $g$.
""",
    ),
    *_rows(
        "theorem",
        r"""
thm-1-dpo | Theorem 1, Eq 10, §4.1 | One DPO step on one pair changes the logit of its first response by $\eta g^2 \tau_{ij}(1-\kappa_{ij})$. | rests_on asm-1 asm-2
thm-1-balanced | Theorem 1, Eq 11, §4.1 | One step of a balanced loss changes that logit by the same times $1-\pi_i+\pi_j$, up to a constant. | rests_on asm-1 asm-2 lem-1 def-1
thm-2-dpo | Theorem 2, Eq 12, §4.1 | Over an epoch of DPO on uniformly drawn responses, probabilities change like a replicator equation with fitness $w_i$. | rests_on thm-1-dpo lem-1
thm-2-balanced | Theorem 2, Eqs 13–14, §4.1 | For a balanced loss and small probabilities the fitness becomes $w_i \pi_i$. | rests_on thm-1-balanced lem-1
thm-3-i | Theorem 3, first part, §4.3.1 | Every local extremum of $w$ lies outside the interval between the two modes. | rests_on lem-2
thm-3-ii | Theorem 3, second part, §4.3.1 | To an extremum of $w$ right of $\mu_q$ belongs an extremum of $w\pi$ between $\mu_p$ and it. | rests_on thm-3-i
thm-3-iii | Theorem 3, third part, §4.3.1 | To an extremum of $w$ on the left belongs an extremum of $w\pi$ between it and $\mu_p$. | rests_on thm-3-i
thm-4 | Theorem 4, Eq 20, §4.3.2 | If $\beta_i$ grows with $p_i$, the variance of $w_ip_i$ exceeds that of $w_i$ (after normalisation) by at least a difference of covariances. | rests_on lem-2 lem-3
thm-5 | Theorem 5, Eqs 21–22, §4.3.2 | A small perturbation of the preferences adds at most as much variance to $w_i$ (normalised) as to $w_ip_i$.
thm-6 | Theorem 6, §4.3.3 | A response that is never seen and that the reference gives probability zero keeps probability zero under DPO. | rests_on thm-2-dpo
thm-7 | Theorem 7, Eq 24, §4.3.3 | If $\beta_i$ and $\alpha_i$ are independent, $\sum w_jp_j^2 < \sum w_jp_j\,\mathbb{E}[p_k]$. | rests_on lem-2 lem-4
""",
    ),
    *_rows(
        "proposition",
        r"""
prop-1 | Proposition 1, Eq 30, §5.3 | The ratio of bDPO's gradients at the reference policy. | rests_on eq-28 eq-29
prop-2 | Proposition 2, Eqs 31–32, §5.3 | During training bDPO's mean gradient of the winner grows and that of the loser falls, monotonically. | rests_on eq-28 eq-29
""",
    ),
]

_EQUATIONS = _rows(
    "equation",
    r"""
eq-1 | Eq 1, §3.1 | The DPO loss.
eq-2 | Eq 2, §3.1 | The ratio of the DPO loss's derivatives in $\pi(y_w)$ and $\pi(y_l)$. | rests_on eq-1
eq-3 | Eq 3, §3.1 | The loss that trains the reward model.
eq-4 | Eq 4, §3.1 | The policy objective of the PPO pipeline.
eq-5 | Eq 5, §3.1 | Its derivative in $\pi(y)$. | rests_on eq-4
eq-6 | Eq 6, §3.2 | The policy is the softmax of its logits.
eq-7 | Eq 7, §3.2 | Logit gradients are nearly orthogonal. | same_as asm-2
eq-8 | Eq 8, §4.1 | The condition that defines a balanced loss. | same_as def-1
eq-9 | Eq 9, §4.1 | The softmax Jacobian. | same_as lem-1
eq-10 | Eq 10, §4.1 | The logit change of one DPO step. | same_as thm-1-dpo
eq-11 | Eq 11, §4.1 | The logit change of one step of a balanced loss. | same_as thm-1-balanced
eq-12 | Eq 12, §4.1 | The probability change of an epoch of DPO. | same_as thm-2-dpo
eq-13 | Eq 13, §4.1 | For small probabilities $1-\pi_i+\pi_j$ is close to 1. | rests_on thm-1-balanced
eq-14 | Eq 14, §4.1 | The probability change of an epoch of a balanced loss. | same_as thm-2-balanced
eq-15 | Eq 15, §4.2 | The Gaussian policy of the simulation.
eq-16 | Eq 16, §4.2 | The Gaussian utility of the simulation.
eq-17 | Eq 17, §4.2 | Preferences proportional to utilities.
eq-18 | Eq 18, §4.3.2 | $w_i = \beta_i - \alpha_i$. | same_as lem-2
eq-19 | Eq 19, §4.3.2 | Variance of a product. | same_as lem-3
eq-20 | Eq 20, §4.3.2 | Variance lower bound. | same_as thm-4
eq-21 | Eq 21, §4.3.2 | The subset has the larger second moment of $p$. | same_as thm-5
eq-22 | Eq 22, §4.3.2 | Variance under perturbed labels. | same_as thm-5
eq-23 | Eq 23, §4.3.3 | Covariance of a product. | same_as lem-4
eq-24 | Eq 24, §4.3.3 | Weighted sums under independence. | same_as thm-7
eq-25 | Eq 25, §5.1 | The naive balanced DPO loss.
eq-26 | Eq 26, §5.1 | The clipped logarithmic weight $\lambda$.
eq-27 | Eq 27, §5.2 | The second version of the naive loss.
eq-28 | Eq 28, §5.3 | The Balanced-DPO loss.
eq-29 | Eq 29, §5.3 | Its weight $\lambda_w$.
eq-30 | Eq 30, §5.3 | Gradient ratio of bDPO at the reference. | same_as prop-1
eq-31 | Eq 31, §5.3 | Mean gradient of the winner. | same_as prop-2
eq-32 | Eq 32, §5.3 | Mean gradient of the loser. | same_as prop-2
eq-33 | Eq 33, §6.1.1 | Preferences of the synthetic data.
eq-34 | Eq 34, §6.1.1 | Utilities of the synthetic data.
eq-35 | Eq 35, App. C | The mean logit change of DPO under negatively correlated logit gradients. | rests_on asm-1 thm-1-dpo
eq-36 | Eq 36, App. C | The same for a balanced loss. | rests_on asm-1 thm-1-balanced
eq-37 | Eq 37, App. D | The change of a logit over an epoch is the sum of its changes over pairs. | rests_on thm-1-dpo
eq-38 | Eq 38, App. D | That sum is $\gamma w_i$. | rests_on thm-1-dpo
eq-39 | Eq 39, App. D | First-order change of a probability by the chain rule.
eq-40 | Eq 40, App. D | The chain rule with the softmax Jacobian put in. | rests_on lem-1 eq-38 eq-39
eq-41 | Eq 41, App. D | The same, collected. | rests_on eq-40
eq-42 | Eq 42, App. D | $w$ as a sum over the other responses. | rests_on lem-2
eq-43 | Eq 43, App. D | Its derivative. | rests_on eq-42
eq-44 | Eq 44, App. D | The logarithmic derivative of $p$ is an increasing function that vanishes at the mode.
eq-45 | Eq 45, App. D | The same for $q$.
eq-46 | Eq 46, App. D | The condition for an extremum of $w$. | rests_on eq-43 eq-44 eq-45
eq-47 | Eq 47, App. D | The derivative of $wp$. | rests_on eq-44 eq-45
eq-48 | Eq 48, App. D | The condition for an extremum of $wp$. | rests_on eq-47
eq-49 | Eq 49, App. D | That condition written with the derivative of $w$. | rests_on eq-48
eq-50 | Eq 50, App. D | The extremum of $w$ is a zero of its derivative.
eq-51 | Eq 51, App. D | The value of the condition there. | rests_on eq-49 eq-50
eq-52 | Eq 52, App. D | Lemma 3: the variance of the product.
eq-53 | Eq 53, App. D | Lemma 3: as half the mean squared difference of two copies. | rests_on eq-52
eq-54 | Eq 54, App. D | Lemma 3: lower bound by the larger $g$. | rests_on eq-53
eq-55 | Eq 55, App. D | Lemma 3: squared difference as a double integral of indicators. | rests_on eq-54
eq-56 | Eq 56, App. D | Lemma 3: mean and integral exchanged. | rests_on eq-55
eq-57 | Eq 57, App. D | Lemma 3: the mean factorised by independence. | rests_on eq-56
eq-58 | Eq 58, App. D | Lemma 3: the conditional second moment is at least the unconditional one. | rests_on eq-57
eq-59 | Eq 59, App. D | Lemma 3: the constant taken out. | rests_on eq-58
eq-60 | Eq 60, App. D | Lemma 3: probabilities as the mean of an indicator. | rests_on eq-59
eq-61 | Eq 61, App. D | Lemma 3: integral and mean exchanged back. | rests_on eq-60
eq-62 | Eq 62, App. D | Lemma 3: the integral as half the mean squared difference. | rests_on eq-61
eq-63 | Eq 63, App. D | Lemma 3: the variance of $f$. | rests_on eq-62
eq-64 | Eq 64, App. D | Theorem 4: variance of a difference. | rests_on lem-2
eq-65 | Eq 65, App. D | Theorem 4: Lemma 3 used twice. | rests_on eq-64 lem-3
eq-66 | Eq 66, App. D | Theorem 4: the normalised variance of $w$ subtracted. | rests_on eq-65
eq-67 | Eq 67, App. D | Theorem 5: added variance of $w$ as second moments. | rests_on thm-5
eq-68 | Eq 68, App. D | Theorem 5: the second moment of $p$ enlarged to the subset. | rests_on eq-67
eq-69 | Eq 69, App. D | Theorem 5: only the noise remains. | rests_on eq-68
eq-70 | Eq 70, App. D | Theorem 5: added variance of $wp$ expanded.
eq-71 | Eq 71, App. D | Theorem 5: only the noise remains. | rests_on eq-70
eq-72 | Eq 72, App. D | Lemma 4: the covariance of the product.
eq-73 | Eq 73, App. D | Lemma 4: as half a mean over two copies. | rests_on eq-72
eq-74 | Eq 74, App. D | Lemma 4: lower bound by the larger $f$. | rests_on eq-73
eq-75 | Eq 75, App. D | Lemma 4: squared difference as a double integral of indicators. | rests_on eq-74
eq-76 | Eq 76, App. D | Lemma 4: mean and integral exchanged. | rests_on eq-75
eq-77 | Eq 77, App. D | Lemma 4: the mean factorised by independence. | rests_on eq-76
eq-78 | Eq 78, App. D | Lemma 4: the conditional mean is at least the unconditional one. | rests_on eq-77
eq-79 | Eq 79, App. D | Lemma 4: the constant taken out. | rests_on eq-78
eq-80 | Eq 80, App. D | Lemma 4: probabilities as the mean of an indicator. | rests_on eq-79
eq-81 | Eq 81, App. D | Lemma 4: integral and mean exchanged back. | rests_on eq-80
eq-82 | Eq 82, App. D | Lemma 4: the integral as half the mean squared difference. | rests_on eq-81
eq-83 | Eq 83, App. D | Lemma 4: the variance of $g$. | rests_on eq-82
eq-84 | Eq 84, App. D | Theorem 7: the claim in means. | rests_on thm-7
eq-85 | Eq 85, App. D | Theorem 7: Lemma 4 for $\alpha$. | rests_on lem-4
eq-86 | Eq 86, App. D | Theorem 7: the means of $\alpha$ and $\beta$ are equal. | rests_on eq-85
""",
)

_TABLES = [
    *_rows(
        "table",
        r"""
tab-1 | Table 1, §6.1.2 | Reward of six methods at three mask rates on the synthetic data, and the order read from it. | rests_on eq-33 eq-34
tab-2 | Table 2, §6.2 | Helpfulness, harmfulness and safety rate of six methods on SafeRLHF.
tab-3 | Table 3, §6.2 | The same of DPO and bDPO on Anthropic HH.
""",
    ),
    *_rows(
        "figure",
        r"""
fig-1-a | Figure 1, row 1, uniform | $w$ and $w\pi$ for modes at 45 and 55, uniform sampling. | rests_on eq-15 eq-16 eq-17
fig-1-b | Figure 1, row 1, shiftless | The same with responses drawn from the policy. | rests_on eq-15 eq-16 eq-17
fig-1-c | Figure 1, row 2, uniform | $w$ and $w\pi$ for modes at 30 and 70, uniform sampling. | rests_on eq-15 eq-16 eq-17
fig-1-d | Figure 1, row 2, shiftless | The same with responses drawn from the policy. | rests_on eq-15 eq-16 eq-17
fig-1-e | Figure 1, row 3, uniform | $w$ and $w\pi$ for modes at 48 and 52, uniform sampling. | rests_on eq-15 eq-16 eq-17
fig-1-f | Figure 1, row 3, shiftless | The same with responses drawn from the policy. | rests_on eq-15 eq-16 eq-17
fig-2 | Figure 2, App. A | The output distribution after DPO at mask rate 0.2.
""",
    ),
    *_rows(
        "appendix",
        r"""
app-c | Appendix C | Negative correlation of logit gradients weakens DPO's updates and strengthens those of a balanced loss, so it makes the issue more severe. | rests_on eq-35 eq-36 asm-2-negative
""",
    ),
]

_CLAIMS = _rows(
    "claim",
    r"""
txt-losers | §1 | DPO's updates concentrate on the losing responses. | rests_on eq-2
txt-ppo-balanced | §1 | PPO keeps the updates of winners and losers balanced. | rests_on cor-2 cor-3
txt-reward-log-density | §3.1 | The optimal reward is proportional to $\log P_D(y \mid x)$. | rests_on eq-3
txt-ppo-winners | §3.1 | PPO focuses more on the winning responses. | rests_on eq-5 txt-reward-log-density
txt-fig1-shift | §4.2 | Under uniform sampling $w$ is shifted far from both distributions, $w\pi$ is not. | rests_on fig-1-a fig-1-c fig-1-e
txt-fig1-shiftless | §4.2 | Without distribution shift DPO and PPO behave alike. | rests_on fig-1-b fig-1-d fig-1-f
txt-fig1-ood | §4.2 | PPO's updates of out-of-distribution responses are significantly smaller. | rests_on fig-1-a fig-1-c fig-1-e
txt-thm3-bias | §4.3.1 | Under uniform sampling DPO's update is more biased. | rests_on thm-2-dpo thm-2-balanced thm-3-i thm-3-ii thm-3-iii
txt-concentration | §4.3.2 | $w$ is less concentrated than $wp$. | rests_on thm-4
txt-noise | §4.3.2 | DPO is more sensitive to label noise than PPO. | rests_on thm-5
txt-ood-guarantee | §4.3.3 | DPO's learning process guarantees that zero stays zero; the contrary claim of Xu et al. is false. | rests_on thm-6
txt-dpo-better-ood | §4.3.3 | By the loss alone, DPO does better out of distribution than PPO. | rests_on thm-7 thm-2-dpo thm-2-balanced
txt-value-unchanged | §5.1 | Naive bDPO changes the gradient but neither the value nor the set of optima. | rests_on eq-25
txt-lambda-proportional | §5.1 | Full balance needs $\lambda$ approximately proportional to $\pi_w/\pi_l$. | rests_on eq-25
txt-v2-converges | §5.2 | Removing the detached term lets v2 converge to a minimum of its loss. | rests_on eq-27
txt-more-balanced | §5.3 | bDPO is more balanced than DPO. | rests_on prop-1 eq-2
txt-diminishes | §5.3 | The imbalance diminishes during training. | rests_on prop-2
txt-most-beat-baseline | §6.1 | Most methods beat the baseline on the synthetic data. | rests_on tab-1
txt-v1-beats-v2 | §6.1 | Naive bDPO v1 beats v2. | rests_on tab-1
txt-mask-harmless | §6.1 | More masking does not worsen the result. | rests_on tab-1
txt-symm-unstable | §6.2 | Symmetric naive bDPO trains unstably. | rests_on tab-2
txt-toy-no-ood | §4.3.3, §6.1 | No apparent out-of-distribution overestimation on the synthetic data. | rests_on fig-2
""",
)

#: All statements by id, in the order of the book's index.
INDEX: dict[str, Entry] = {e.id: e for e in [*_ASSUMPTIONS, *_NUMBERED, *_EQUATIONS, *_TABLES, *_CLAIMS]}
