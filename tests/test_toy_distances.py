"""Distances between policies, and the rows of the comparison with PPO."""

from dataclasses import replace

import numpy as np
import pytest

from bdpo import toy
from bdpo.toy import distances

SMALL = replace(toy.Settings(), n=4, steps=300, reference_steps=10, watch_every=0, record=(0, 100))


def test_total_variation_of_equal_disjoint_and_half_shared_policies() -> None:
    with np.errstate(divide="ignore"):
        sure, other = np.log(np.eye(3)), np.log(np.roll(np.eye(3), 1, axis=1))
    even = np.full((3, 3), -np.log(3))
    assert distances.total_variation(even, even) == 0
    assert distances.total_variation(sure, other) == 1
    assert distances.total_variation(sure, even) == pytest.approx(2 / 3)
    assert distances.total_variation(even, sure) == distances.total_variation(sure, even)


def test_rows_are_those_of_run_with_distances_to_the_targets_of_their_own_kind() -> None:
    settings = toy.grid(SMALL, seed=[0, 1], label_noise=[0.0, 0.3], method=["dpo", "bdpo", "rlhf", "ppo"])
    table, plain = distances.rows(settings), toy.run(settings, policies=True)
    assert (table[list(plain.columns.drop("logps"))].fillna(-1) == plain.drop(columns="logps").fillna(-1)).all().all()
    for name in distances.TARGETS:
        assert (table.loc[table.method == name, f"tv_{name}"] == 0).all()
        end = table[(table.step == 300)]
        assert (end[f"tv_{name}"] == end[f"tv_{name}_end"]).all()
    row = table.index[(table.seed == 1) & (table.label_noise == 0.3) & (table.method == "bdpo") & (table.step == 100)][
        0
    ]
    of = plain[(plain.seed == 1) & (plain.label_noise == 0.3) & (plain.method == "ppo")]
    expected = distances.total_variation(plain.logps[row], of[of.step == 300].logps.iloc[0])
    assert table.tv_ppo_end[row] == expected > 0


def test_a_comparison_without_a_target_or_its_last_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no run of rlhf and ppo"):
        distances.rows(toy.grid(SMALL, method=["dpo", "ppo"]))
    with pytest.raises(ValueError, match="must be 300"):
        distances.rows(toy.grid(replace(SMALL, steps=200), method=["dpo", "rlhf", "ppo"]))


def test_in_a_table_dpo_is_the_pipeline_with_any_data() -> None:
    base = toy.Settings(n=5, init="shifted", shift=1.0, reference_steps=0, label_noise=0.2, mask_rate=0.2, data="fixed",
                        batch=16, optimizer="adam", learning_rate=0.02, watch_every=0)  # fmt: skip
    dpo = toy.run_grid(base, method=["dpo"], steps=[100], policies=True)
    pipeline = toy.run_grid(base, method=["rlhf"], reward_steps=[100], steps=[6000], policies=True)
    assert distances.total_variation(dpo.logps[0], pipeline.logps[0]) < 1e-3


def test_the_sweep_holds_every_method_in_every_comparison_and_varies_one_thing_at_a_time() -> None:
    settings = distances.against_ppo(2)
    assert len(settings) == 29 * 2 * len(toy.METHODS)
    for k in range(0, len(settings), len(toy.METHODS)):
        assert tuple(s.method for s in settings[k : k + len(toy.METHODS)]) == toy.METHODS
    assert all(bool(s.mask_rate) + bool(s.label_noise) + (s.init == "shifted") <= 1 for s in settings)
