"""The recorded experiments: tables from raw rows, tuning, resuming; the recorded rows themselves."""

import dataclasses
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bdpo import results
from bdpo.llm import experiment, language, real
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


def test_tuning_follows_the_score_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(world: Any, label: str, method: str, *, beta: float, rate: float, along: bool) -> Any:
        row = {"method": method, "beta": beta, "rate": rate, "status": "ok"}
        return [row | {"reward": beta + rate, "accuracy": -beta - rate}], []

    monkeypatch.setattr(experiment, "run", run)
    spec = experiment.METHODS["ipo"]
    for by, pick in (("reward", max), ("accuracy", min)):
        best = experiment.tuned(None, "harmless", [], lambda: None, ("ipo",), by)  # type: ignore[arg-type]
        assert best["ipo"] == (pick(spec.betas), pick(experiment.RATES))


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


# ---------------------------------------------------------------- real pairs

TINY_REAL = real.RealSetup(
    vocabulary=270, layers=1, width=32, validation=0.2, sft_epochs=1, epochs=1, batch=8, validations=2, checkpoints=2,
    judge_epochs=1, samples=4, new_tokens=4, rloo_steps=2, rloo_completions=8,
)  # fmt: skip


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """A file of HH's form: forty dialogues, the last eight with a second turn."""
    file = tmp_path / "pairs.jsonl.gz"
    with gzip.open(file, "wt") as stream:
        for k in range(40):
            start = f"\n\nHuman: say {k % 32}\n\nAssistant:"
            start += f" what?\n\nHuman: {k}\n\nAssistant:" * (k >= 32)
            stream.write(json.dumps({"chosen": f"{start} yes {k}", "rejected": f"{start} no {k}"}) + "\n")
    return file


def test_real_prompts_are_shortened_and_responses_measured() -> None:
    row = {"prompt": "0123456789", "chosen": "abcd", "rejected": "ab", "line": 1}
    assert real.shortened(row, 5) == {"prompt": "56789", "chosen": "abcd", "rejected": "ab"}
    assert [real.longest(row), real.longest({**row, "rejected": "abcde"})] == [4, 5]


def test_validation_pairs_are_those_of_every_seed_and_no_dialogue_is_divided(pairs_file: Path, tmp_path: Path) -> None:
    tests = []
    for seed in (0, 1, 2, experiment.TUNING_SEED):
        texts = real.RealWorld(pairs_file, TINY_REAL, seed, folder=tmp_path).texts
        assert sum(map(len, texts.values())) == 40
        number = {part: {int(row["chosen"].split()[-1]) % 32 for row in rows} for part, rows in texts.items()}
        assert not number["train"] & number["test"]
        assert not number["validation"] & (number["train"] | number["test"])
        tests.append((number["validation"], number["test"]))
    assert len({frozenset(validation) for validation, _ in tests}) == 1
    assert len({frozenset(test) for _, test in tests}) == 4, "each seed has a division of its own"


def test_a_division_with_an_empty_part_is_refused(pairs_file: Path, tmp_path: Path) -> None:
    setup = dataclasses.replace(TINY_REAL, validation=0.0)
    with pytest.raises(ValueError, match="gz: no pairs for validation"):
        real.RealWorld(pairs_file, setup, 0, folder=tmp_path)


def test_tuning_scores_on_validation_pairs_and_a_recorded_seed_on_test_pairs(pairs_file: Path, tmp_path: Path) -> None:
    for split in ("validation", "test"):
        world = real.RealWorld(pairs_file, TINY_REAL, 0, split, folder=tmp_path)
        assert world.scored == world.texts[split]
        assert set(world.prompts) <= {row["prompt"] for row in world.texts[split]}
        assert len(world.prompts) == TINY_REAL.samples


# TRL's RLOO asks transformers for a property under its older name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_every_method_runs_on_real_pairs_and_twice_alike(pairs_file: Path, tmp_path: Path) -> None:
    made: list[dict[str, Any]] = []
    for name in ("a", "b"):
        world = real.RealWorld(pairs_file, TINY_REAL, 0, folder=tmp_path / name)
        first = world.evaluate(real.LABEL, world.reference)
        assert first["accuracy"] == 0.5
        assert first["kl"] == pytest.approx(0.0, abs=1e-6)
        made.append({m: experiment.run(world, real.LABEL, m, beta=0.1, rate=1e-3) for m in real.REAL_METHODS})
    assert made[0] == made[1]
    assert set(made[0]) == set(experiment.METHODS) - {"rloo_exact"}
    for method, (scored, curve) in made[0].items():
        assert [row["checkpoint"] for row in scored] == [1, 2], method
        assert {row["status"] for row in scored} == {"ok"}
        assert 0 <= scored[-1]["accuracy"] <= 1
        assert scored[-1]["kl"] > 0
        assert len(curve) == (0 if method == "rloo_learned" else 3)


def test_real_responses_have_no_exact_reward(pairs_file: Path, tmp_path: Path) -> None:
    world = real.RealWorld(pairs_file, TINY_REAL, 0, folder=tmp_path)
    with pytest.raises(ValueError, match="no program scores real responses"):
        experiment.run(world, real.LABEL, "rloo_exact", beta=0.1, rate=1e-3)


def test_a_recording_that_was_killed_goes_on_to_equal_rows(
    pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a curve was written and before its table; the reference of the second seed is measured again."""
    monkeypatch.setattr(real, "tuned", lambda *_, **__: dict.fromkeys(real.REAL_METHODS, (0.1, 1e-3)))
    methods, where = ("dpo", "bdpo"), {"folder": tmp_path / "models"}

    def rows(root: Path) -> list[pd.DataFrame]:
        return [results.read(f"llm/{name}", root=root) for name in ("table3", "curves-table3")]

    real.table3(pairs_file, range(2), setup=TINY_REAL, methods=methods, root=tmp_path / "whole", **where)
    save = experiment.Record.save

    def killed(self: experiment.Record) -> None:
        if self.name == "llm/table3" and self.has(seed=1, method="dpo"):
            raise KeyboardInterrupt
        save(self)

    monkeypatch.setattr(experiment.Record, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        real.table3(pairs_file, range(2), setup=TINY_REAL, methods=methods, root=tmp_path / "part", **where)
    monkeypatch.setattr(experiment.Record, "save", save)
    half = [set(zip(found.seed, found.method, strict=True)) for found in rows(tmp_path / "part")]
    assert half[1] - half[0] == {(1, "dpo")}
    real.table3(pairs_file, range(2), setup=TINY_REAL, methods=methods, root=tmp_path / "part", **where)
    for whole, part in zip(rows(tmp_path / "whole"), rows(tmp_path / "part"), strict=True):
        pd.testing.assert_frame_equal(whole, part)
    table = rows(tmp_path / "whole")[0]
    same = ["train", "validation", "test", "judge_accuracy"]
    assert (table.groupby("seed")[same].nunique() == 1).all(axis=None), "methods of a seed share division and judge"


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


@pytest.mark.parametrize("name", real.SIZES)
def test_recorded_rows_on_real_pairs_are_whole_and_tuned_by_their_trials(name: str) -> None:
    frame, note = results.read(f"llm/{name}"), results.provenance(f"llm/{name}")
    assert note["parameters"]["setup"] == dataclasses.asdict(real.SIZES[name])
    assert not frame.duplicated(["seed", "method", "checkpoint"]).any()
    assert set(frame.method) == {"sft", *real.REAL_METHODS}
    assert frame.seed.nunique() >= 5
    assert experiment.TUNING_SEED not in set(frame.seed)
    sft, ok = frame[frame.method == "sft"], frame[frame.status == "ok"]
    assert (sft.kl == 0).all()
    assert (sft.accuracy == 0.5).all()
    assert ok.accuracy.between(0, 1).all()
    assert np.isfinite(ok.select_dtypes("number")).all(axis=None)
    assert frame.validation.nunique() == 1
    trials = results.read(f"llm/tuning-{name}").to_dict("records")
    best = experiment.tuned(None, real.LABEL, trials, lambda: None, real.REAL_METHODS, "reward")  # type: ignore[arg-type]
    assert {method: list(pair) for method, pair in best.items()} == note["parameters"]["chosen"]
    for (method,), part in frame[frame.method != "sft"].groupby(["method"]):
        assert set(zip(part.beta, part.rate, strict=True)) == {best[method]}


def test_the_recorded_world_is_the_recorded_reference() -> None:
    world = experiment.recorded_world(0)
    found = world.evaluate("overall", world.reference)
    frame = results.read("llm/table2-overall")
    row = frame[(frame.method == "sft") & (frame.seed == 0)].iloc[0]
    for name in ("help", "harm", "learned_help", "learned_harm"):  # another processor may sample a token differently
        assert found[name] == pytest.approx(row[name], abs=0.05), name


def test_an_unrecorded_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="kept are those of seed 0"):
        experiment.recorded_world(7, root=tmp_path)
