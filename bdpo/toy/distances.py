r"""How far the policies of two methods lie apart: the rows behind "nearer to PPO".

Two policies are compared by their total variation, the largest difference of probabilities that they give to any set of
responses, averaged over prompts:

.. math:: \frac1n\sum_x \frac12\sum_y \left|\pi(y \mid x) - \pi'(y \mid x)\right| .
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bdpo.toy.engine import REWARD_STARTS, Settings, grid, run
from bdpo.toy.methods import METHODS

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

#: Step at which every method has had as many updates as the policy of PPO.
BUDGET = 300
#: Whom the others are compared with.
TARGETS = ("rlhf", "ppo")


def total_variation(logps: NDArray[Any], other: NDArray[Any]) -> float:
    r""":math:`\frac1n\sum_x\frac12\sum_y|\pi(y\mid x)-\pi'(y\mid x)|`.

    Parameters
    ----------
    logps, other
        Log-probabilities [prompt, response].

    Returns
    -------
    float
        From 0, where the policies agree, to 1, where they share no response; NaN if one of them is.
    """
    return float(np.abs(np.exp(logps) - np.exp(other)).sum() / 2 / len(logps))


def rows(settings: Sequence[Settings]) -> pd.DataFrame:
    """Runs as by `bdpo.toy.run`, with the distances of each policy to those of the methods in ``TARGETS``.

    Parameters
    ----------
    settings
        Runs that differ in more than their method are compared only with their like, so the targets must be among them
        for each combination of all other settings, and ``record`` must hold ``BUDGET``.

    Returns
    -------
    DataFrame
        The table of `bdpo.toy.run`, and for each target ``tv_NAME`` and ``tv_NAME_end``: total variation to its policy
        at the same step, and at step ``BUDGET``.

    Raises
    ------
    ValueError
        If a target is missing, or was not recorded at step ``BUDGET``.
    """
    settings = list(settings)
    alike: dict[Settings, list[Settings]] = {}
    for one in settings:
        alike.setdefault(replace(one, method="dpo"), []).append(one)
    missing = [s for s, some in alike.items() if not set(TARGETS) <= {one.method for one in some}]
    if missing:
        raise ValueError(f"no run of {' and '.join(TARGETS)} beside {missing[0]}; give all methods of one comparison")
    late = [s for s in settings if BUDGET not in (*s.record, s.steps)]
    if late:
        raise ValueError(f"record is {late[0].record} and steps {late[0].steps}; one of them must be {BUDGET}")
    table = run(settings, policies=True)
    kinds = {one: k for k, one in enumerate(alike)}
    table["kind"] = np.repeat(
        [kinds[replace(s, method="dpo")] for s in settings], [len({*s.record, s.steps}) for s in settings]
    )
    policies = {(k, m, t): lp for k, m, t, lp in zip(table.kind, table.method, table.step, table.logps, strict=True)}
    for name in TARGETS:
        for column, at in ((f"tv_{name}", None), (f"tv_{name}_end", BUDGET)):
            table[column] = [
                total_variation(lp, policies[k, name, t if at is None else at])
                for k, t, lp in zip(table.kind, table.step, table.logps, strict=True)
            ]
    return table.drop(columns=["logps", "kind"])


def against_ppo(seeds: int = 16) -> list[Settings]:
    """Every method on the same data as PPO, with masks, label noise and distribution shift, one at a time.

    A table of logits (Adam, rate 0.01) and the network of the central reading see masks, then label noise; the network
    twice, since its reward model may take over the reference's hidden layer or start from the first policy. The table
    alone starts from a bump beside the best responses, with pairs drawn evenly or from that bump; there is no stage
    that makes a reference, so that the bump is the reference. The reward model has as many updates as a policy at step
    ``BUDGET``, on the same pairs. The methods of one comparison stand side by side;
    seeds as in `bdpo.toy.sweeps.Recorded`.
    """
    common: dict[str, Any] = {"optimizer": "adam", "data": "fixed", "pairs": 2000, "batch": 64, "steps": 1000}
    common |= {"reward_steps": BUDGET, "record": (0, 10, 30, 100, BUDGET), "watch_every": 0}
    table = Settings(policy="tabular", learning_rate=0.01, **common)
    network = Settings(policy="mlp", init="random", learning_rate=0.001, **common)
    runs = []
    for base in (table, *grid(network, reward_start=REWARD_STARTS)):
        runs += grid(base, mask_rate=(0.0, 0.2, 0.4), seed=range(seeds), method=METHODS)
        runs += grid(base, label_noise=(0.1, 0.2, 0.3, 0.4), seed=range(seeds), method=METHODS)
    bump = replace(table, init="shifted", reference_steps=0)
    axes: dict[str, Any] = {"shift": (0.0, 1.0, 2.0, 3.0), "sampling": ("uniform", "initial")}
    return runs + grid(bump, **axes, seed=range(seeds), method=METHODS)
