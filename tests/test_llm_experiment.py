"""The recorded experiments: tables from raw rows, tuning, resuming; the recorded rows themselves."""

import dataclasses
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bdpo import results
from bdpo.llm import experiment, language
from bdpo.losses import LOSSES, PAPER

TINY = experiment.Setup(
    layers=1, width=32, demonstrations=64, sft_steps=4, sft_batch=16, pairs=32, epochs=1, batch=16,
    validation_pairs=8, validations=2, checkpoints=2, prompts=8, judge_epochs=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


# ---------------------------------------------------------------- the experiment


def test_the_papers_six_and_the_controls_are_there_with_the_papers_clip() -> None:
    assert list(experiment.METHODS)[:6] == list(PAPER)
    for method in experiment.METHODS.values():
        if method.loss != "rloo":
            assert set(method.settings) | {"beta"} <= set(LOSSES[method.loss].settings)
        if method.loss.startswith("nbdpo"):
            assert method.settings == {"clip": 0.3}
    doubled = experiment.METHODS["bdpo_doubled"]
    assert (doubled.loss, doubled.like, doubled.factor) == ("bdpo", "dpo", 2.0)


def test_utility_is_what_the_label_follows() -> None:
    scored = [language.Score(1.0, -0.5, True)._asdict(), language.Score(0.0, 1.5, False)._asdict()]
    assert [experiment.utility(x, scored) for x in experiment.LABELS] == [0.0, 0.5, -0.5]


def test_tuning_takes_the_best_beta_first_then_the_best_rate_and_makes_no_trial_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[tuple[Any, ...]] = []

    def run(world: Any, label: str, method: str, *, beta: float, rate: float, along: bool) -> Any:
        tried.append((method, beta, rate))
        score = -abs(math.log(beta / 0.2)) - abs(math.log(rate / 2e-3))
        return [{"method": method, "beta": beta, "rate": rate, "status": "ok", "utility": score}], []

    monkeypatch.setattr(experiment, "run", run)
    trials: list[dict[str, Any]] = []
    methods = ("dpo", "bdpo_doubled", "rloo_exact")
    best = experiment.tuned(None, "overall", trials, lambda: None, methods)  # type: ignore[arg-type]
    assert best == {"dpo": (0.2, 2e-3), "rloo_exact": (0.05, 1e-3), "bdpo_doubled": (0.4, 2e-3)}
    assert len(tried) == len(set(tried)) == 4 + 3
    experiment.tuned(None, "overall", trials, lambda: None, methods)  # type: ignore[arg-type]
    assert len(tried) == 7, "what was tried is not tried again"


def test_a_trial_that_diverged_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(world: Any, label: str, method: str, *, beta: float, rate: float, along: bool) -> Any:
        row = {"method": method, "beta": beta, "rate": rate}
        good = beta == 0.05 and rate == experiment.MIDDLE
        return [row | ({"status": "ok", "utility": -5.0} if good else {"status": "diverged"})], []

    monkeypatch.setattr(experiment, "run", run)
    best = experiment.tuned(None, "overall", [], lambda: None, ("dpo",))  # type: ignore[arg-type]
    assert best["dpo"] == (0.05, experiment.MIDDLE)


def test_a_record_goes_on_where_it_ended_and_refuses_other_parameters(tmp_path: Path) -> None:
    one = experiment.Record("llm/x", {"a": (1, 2)}, tmp_path)
    one.rows.append({"seed": 3, "method": "dpo", "value": 1.0})
    one.save()
    again = experiment.Record("llm/x", {"a": [1, 2]}, tmp_path)
    assert again.has(seed=3, method="dpo")
    assert not again.has(seed=4, method="dpo")
    with pytest.raises(SystemExit, match="other parameters"):
        experiment.Record("llm/x", {"a": [1]}, tmp_path)


def test_a_tiny_world_runs_all_the_way_twice_alike(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        world = experiment.World(TINY, 0, folder=tmp_path / name)
        made.append(experiment.run(world, "overall", "bdpo", beta=0.1, rate=1e-3))
    assert made[0] == made[1]
    scored, curve = made[0]
    assert [row["checkpoint"] for row in scored] == [1, 2]
    assert {row["status"] for row in scored} == {"ok"}
    assert curve[0]["step"] == 0
    assert curve[0]["validation_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert len(curve) == 3


def test_a_diverged_run_leaves_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bdpo.llm.trainer import PreferenceTrainer, TrainingDiverged

    def diverge(self: Any, *_: Any, **__: Any) -> None:
        raise TrainingDiverged("nan")

    monkeypatch.setattr(PreferenceTrainer, "train", diverge)
    world = experiment.World(TINY, 0, folder=tmp_path)
    found, _ = experiment.run(world, "safe", "dpo", beta=0.1, rate=1.0)
    assert [row["status"] for row in found] == ["diverged"]


def test_real_pairs_are_shortened_and_long_ones_left_out(tmp_path: Path) -> None:
    setup = experiment.RealSetup(prompt_characters=5, response_characters=4)
    row = {"prompt": "0123456789", "chosen": "abcd", "rejected": "ab", "line": 1}
    assert experiment.shortened(row, setup) == {"prompt": "56789", "chosen": "abcd", "rejected": "ab"}
    assert experiment.shortened({**row, "rejected": "abcde"}, setup) is None


def test_a_tiny_real_world_runs_all_the_way(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl.gz"
    with gzip.open(file, "wt") as stream:
        for k in range(24):
            row = {"prompt": f"say {k}", "chosen": f"yes {k}", "rejected": f"no {k}"}
            stream.write(json.dumps(row) + "\n")
    setup = experiment.RealSetup(
        vocabulary=270, layers=1, width=32, sft_epochs=1, epochs=1, judge_epochs=1, batch=8, prompts=4, new_tokens=4
    )
    world = experiment.RealWorld(file, setup, 0, folder=tmp_path / "w")
    assert world.evaluate(world.reference)["accuracy"] == 0.5
    assert world.evaluate(world.reference)["kl"] == pytest.approx(0.0, abs=1e-6)
    found = world.evaluate(world.policy("bdpo"))
    assert 0 <= found["accuracy"] <= 1
    assert (found["train"], found["held_out"]) == (19, 5)


# ---------------------------------------------------------------- what is recorded


def recorded(prefix: str) -> list[str]:
    return [name for name in results.names() if name.startswith(prefix)]


@pytest.mark.parametrize("name", recorded("llm/table2-"))
def test_recorded_rows_are_whole_and_start_from_one_reference(name: str) -> None:
    frame, setup = results.read(name), results.provenance(name)["parameters"]["setup"]
    assert setup == dataclasses.asdict(experiment.Setup())
    assert not frame.duplicated(["seed", "method", "checkpoint"]).any()
    assert set(PAPER) <= set(frame.method)
    sft = frame[frame.method == "sft"]
    assert (sft.kl == 0).all()
    ok = frame[frame.status == "ok"]
    assert ok.safe.between(0, 1).all()
    assert (ok.kl >= 0).all()
    assert np.isfinite(ok.select_dtypes("number")).all(axis=None)


def test_the_recorded_world_is_the_recorded_reference() -> None:
    world = experiment.recorded_world(0)
    found = experiment.evaluate(world, "overall", world.reference)
    frame = results.read("llm/table2-overall")
    row = frame[(frame.method == "sft") & (frame.seed == 0)].iloc[0]
    for name in ("help", "harm", "learned_help", "learned_harm"):  # another processor may sample a token differently
        assert found[name] == pytest.approx(row[name], abs=0.05), name


def test_an_unrecorded_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="kept are those of seed 0"):
        experiment.recorded_world(7, root=tmp_path)
