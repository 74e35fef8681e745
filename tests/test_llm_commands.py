"""The commands that train and score language models: from flags to a report, and errors that say what to do."""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when the hub's client is imported

import pytest
import torch

from bdpo import cli
from bdpo.llm import commands, language, plan, runs
from bdpo.losses import LOSSES, PAIRS

SMALL = ["--model", "scratch:1x32", "--data", "language", "--max-length", "64", "--batch-size", "16", "--limit", "48"]
TRAIN = [*SMALL, "--label", "overall", "--learning-rate", "1e-3", "--validation", "0.2"]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


def call(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert call(*arguments) == 1
    told = capsys.readouterr().err
    return told[told.rindex("error: ") :].removeprefix("error: ").strip()


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the language, fine-tuned for a few steps from the command line."""
    out = tmp_path_factory.mktemp("sft") / "run"
    assert call("sft", *SMALL, "--epochs", 1, "--learning-rate", 1e-2, "--out", out) == 0
    return out / "model"


# ---------------------------------------------------------------- the whole way


def test_train_evaluate_and_compare_from_a_supervised_model(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for loss in ("dpo", "bdpo"):
        run = tmp_path / loss
        assert call("train", *TRAIN, "--model", reference, "--loss", loss, "--out", run) == 0
        found = report(run)
        assert found["status"] == "finished"
        assert found["plan"]["settings"]["loss"] == loss
        assert {"eval_loss", "eval_rewards/margins", "eval_lambda", "steps"} <= set(found["results"])
        assert [log["step"] for log in found["history"]] == sorted(log["step"] for log in found["history"])
        assert "pairs read" in found["notes"][0]
        scores = ["--reference-model", reference, "--samples", 8, "--max-new-tokens", 16]
        here = ["--model", run / "model", "--data", "language", "--label", "overall", "--limit", 16]
        assert call("evaluate", *here, "--max-length", 64, *scores, "--out", tmp_path / f"e-{loss}") == 0
        assert {"Help", "Harm", "S.R.", "kl", "length"} <= set(report(tmp_path / f"e-{loss}")["results"])
    capsys.readouterr()
    assert call("compare", tmp_path / "e-dpo", tmp_path / "e-bdpo", "--out", tmp_path / "c") == 0
    assert "bdpo" in capsys.readouterr().out
    rows = report(tmp_path / "c")["tables"]["Means and paired differences"]
    assert {row["method"] for row in rows} == {"dpo", "bdpo"}
    told = {row["quantity"] for row in rows}
    assert {"Help", "kl", "length"} <= told
    assert not told & {"pairs", "steps", "Help_se"}
    before = (tmp_path / "e-dpo" / "report.json").read_text()
    assert "give another folder" in error(capsys, "compare", tmp_path / "e-dpo", "--out", tmp_path / "e-dpo")
    assert (tmp_path / "e-dpo" / "report.json").read_text() == before
    refused = {
        "are both dpo with seed 0": ["e-dpo", "e-dpo"],
        "command is train": ["e-dpo", "dpo"],
        "none of the runs; give --baseline bdpo": ["e-bdpo"],
        "is a comparison": ["c"],
    }
    for words, names in refused.items():
        assert words in error(capsys, "compare", *(tmp_path / name for name in names), "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()
    assert call("compare", tmp_path / "dpo", tmp_path / "bdpo", "--out", tmp_path / "c2") == 0
    rows = report(tmp_path / "c2")["tables"]["Means and paired differences"]
    assert {row["quantity"] for row in rows}.isdisjoint({"eval_loss", "steps"}), "losses that differ have no one scale"


def test_a_judge_is_trained_and_scores_samples(reference: Path, tmp_path: Path) -> None:
    cost = ["--label", "safe", "--judge", "cost", "--learning-rate", "1e-3", "--validation", "0.2"]
    assert call("reward", *SMALL, *cost, "--model", reference, "--out", tmp_path / "cost") == 0
    assert {"eval_accuracy", "eval_sign_accuracy"} <= set(report(tmp_path / "cost")["results"])
    here = ["--model", reference, "--data", "language", "--label", "safe", "--limit", 8, "--max-length", 64]
    judge = ["--cost-model", tmp_path / "cost" / "model", "--samples", 8, "--max-new-tokens", 16]
    assert call("evaluate", *here, *judge, "--out", tmp_path / "e") == 0
    assert 0 <= report(tmp_path / "e")["results"]["learned cost below 0"] <= 1


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*TRAIN, "--model", reference, "--evaluate-every", 1]
    assert call("train", *flags, "--out", tmp_path / "whole") == 0
    steps = report(tmp_path / "whole")["results"]["steps"]
    assert steps >= 4

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # the run is stopped when its second checkpoint is written
        from transformers import TrainerState

        save = TrainerState.save_to_json
        patch.setattr(
            TrainerState,
            "save_to_json",
            lambda self, path: (save(self, path), stop() if self.global_step == 2 else None),
        )
        assert call("train", *flags, "--out", tmp_path / "cut") == 130
    assert "a run was begun there" in error(capsys, "train", *flags, "--out", tmp_path / "cut")
    changed = error(capsys, "train", *flags, "--beta", 0.3, "--out", tmp_path / "cut", "--resume")
    assert "beta (0.1 → 0.3) differ from the run" in changed
    assert call("train", *flags, "--out", tmp_path / "cut", "--resume") == 0
    ends = [_weights(tmp_path / name / "model") for name in ("whole", "cut")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed without warning in the middle of writing the third checkpoint."""
    flags = [*TRAIN, "--model", reference, "--evaluate-every", 1]
    assert call("train", *flags, "--out", tmp_path / "whole") == 0
    script = f"""
import os, transformers
from bdpo import cli
save = transformers.TrainerState.save_to_json
def stop(self, path):
    os._exit(9) if self.global_step == 3 else save(self, path)
transformers.TrainerState.save_to_json = stop
cli.main({[str(a) for a in ("train", *flags, "--out", tmp_path / "cut")]})
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert (tmp_path / "cut" / "checkpoint-3" / "model.safetensors").is_file(), "half a checkpoint"
    assert call("train", *flags, "--out", tmp_path / "cut", "--resume") == 0
    ends = [_weights(tmp_path / name / "model") for name in ("whole", "cut")]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    for state in (tmp_path / "cut").glob("checkpoint-*/trainer_state.json"):
        state.unlink()
    assert "was written whole" in error(capsys, "train", *flags, "--out", tmp_path / "cut", "--resume")


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


# ---------------------------------------------------------------- the plan


def test_a_dry_run_counts_the_parameters_of_the_papers_model_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("train", "--config", "llama-7b-safe-rlhf", "--label", "safe", "--out", "x", "--dry-run") == 0
    told = capsys.readouterr().out
    assert "parameters: 6,738,415,616" in told
    assert "epochs" in told
    assert "Appendix B" in told
    assert "GB a device" in told
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_an_unknown_loss_and_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert "loss = 'bdpoo': choose one of dpo, nbdpo_asym" in error(
        capsys, "train", *TRAIN, "--loss", "bdpoo", "--out", "x", "--dry-run"
    )
    told = error(capsys, "train", *TRAIN, "--loss-settings", "clip=0.3", "--out", "x", "--dry-run")
    assert told.startswith("dpo has no setting 'clip'")


def _documented() -> list[list[str]]:
    """The commands on language models that the pages and the configuration files show, word by word."""
    root = Path(__file__).parents[1]
    pages = [root / "README.md", root / "book" / "scaling.md", root / "notebooks" / "table2.md"]
    text = "\n".join(page.read_text() for page in pages).replace("\\\n", " ")
    lines = re.findall(r"(?:-m bdpo|bin/bdpo) (?=train|sft|reward|evaluate|compare)([^\n#]*)", text)
    for file in sorted((root / "bdpo" / "llm" / "configs").iterdir()):
        head = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
        lines += re.findall(r"bdpo (train[^\n]*)", head)
    return [shlex.split(line.rstrip("`. ")) for line in lines if "..." not in line]


@pytest.mark.parametrize("words", _documented(), ids=" ".join)
def test_documented_commands_are_accepted(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reference: Path
) -> None:
    """Every one has a plan, and the label that its data need; models that only the reader has are replaced."""
    monkeypatch.chdir(tmp_path)
    for k, word in enumerate(words[:-1]):
        if word == "--model" and not words[k + 1].startswith("scratch"):
            words = [*words[: k + 1], str(reference), *words[k + 2 :]]
    if words[0] == "compare":
        assert commands.parse(words).runs
    else:
        assert call(*words, *({"--dry-run"} - set(words))) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_documented_commands_are_found() -> None:
    found = {words[0] for words in _documented()}
    assert found == {"train", "sft", "evaluate", "compare"}
    assert len(_documented()) >= 12


@pytest.mark.parametrize(
    ("config", "label", "words"),
    [
        ("llama-7b-hh", None, "there are several labels; give --label helpful, safe or overall"),
        ("llama-7b-safe-rlhf", "overall", "there is no label overall; give --label helpful or safe"),
    ],
)
def test_a_dry_run_refuses_a_label_that_the_data_do_not_have(
    config: str, label: str | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config", config, *(["--label", label] if label else []), "--out", "x"]
    assert words in error(capsys, "train", *flags, "--dry-run")


@pytest.mark.parametrize("loss", PAIRS)
def test_every_pair_loss_can_be_planned(loss: str) -> None:
    resolved = plan.resolve("train", {"model": "scratch:1x32", "data": "language", "out": "o", "loss": loss})
    assert set(runs.loss_settings(resolved)) <= set(LOSSES[loss].settings)


def test_flags_of_the_loss_are_read_as_json() -> None:
    options = commands.parse(["train", "--loss-settings", "clip=0.3", "--loss-settings", "detach_lambda=false"])
    assert options.loss_settings == [("clip", 0.3), ("detach_lambda", False)]


# ---------------------------------------------------------------- what is refused


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, data: object, *more: object) -> str:
    flags = ["--model", "scratch:1x32", "--max-length", 64, "--data", data, "--out", tmp_path / "out", *more]
    return error(capsys, "train", *flags)


def test_a_missing_label_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "give --label helpful, safe or overall" in refused(capsys, tmp_path, "language")


def test_bad_files_are_named_with_row_and_fix(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    empty, columns, labels = (tmp_path / name for name in ("empty.jsonl", "columns.jsonl", "labels.jsonl"))
    empty.write_text("")
    columns.write_text('{"text": "a"}\n')
    row = {"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 0}
    labels.write_text(json.dumps(row) + "\n")
    assert refused(capsys, tmp_path, empty).startswith(f"{empty}: the file is empty")
    assert f"{columns}, line 1: the columns are text" in refused(capsys, tmp_path, columns, "--label", "safe")
    assert "no column safer_response_id" in refused(capsys, tmp_path, labels, "--label", "safe")


def test_a_prompt_longer_than_the_context_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl.gz"
    rows = [{"prompt": "ab " * n, "chosen": "yes", "rejected": "no"} for n in (1, 2, 200)] * 4
    with gzip.open(file, "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    told = refused(capsys, tmp_path, file, "--tokenizer", "bpe:259", "--validation", 0.0)
    assert f"{file}, line 3: the prompt has" in told
    assert "choose truncation='prompt', 'response' or 'drop'" in told
    told = error(capsys, "train", "--model", "scratch:1x32", "--max-length", 8, *TRAIN[2:4], "--label", "safe",
                 "--out", tmp_path / "o2")  # fmt: skip
    assert "max_length is 8" in told


def test_what_comes_to_nothing_leaves_nothing(
    reference: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for more in (["--loss", "bdpoo"], ["--model", tmp_path / "none"], ["--max-length", 5], ["--tokenizer", "bpe:9"]):
        error(capsys, "train", *TRAIN, "--out", out, *more)
        assert not out.exists(), more
    out.mkdir()
    error(capsys, "train", *TRAIN, "--loss", "bdpoo", "--out", out)
    assert list(out.iterdir()) == [], "a folder that was there stays"
    (tmp_path / "file").write_text("")
    told = error(capsys, "train", *TRAIN, "--out", tmp_path / "file" / "out")
    assert "no file can be written there (Not a directory); give another folder" in told
    assert f"model = {tmp_path / 'none'}: it cannot be loaded" in error(
        capsys, "train", *TRAIN, "--model", tmp_path / "none", "--out", out
    )
    assert "a new model is scratch:LAYERSxWIDTH" in error(capsys, "train", *TRAIN, "--model", "scratch:2", "--out", out)


def test_supervised_training_takes_the_winners_of_the_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pku.jsonl"
    row = {"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 0, "safer_response_id": 1}
    file.write_text(f"{json.dumps(row)}\n" * 8)
    flags = ["sft", "--model", "scratch:1x32", "--tokenizer", "bpe:259", "--data", file, "--max-length", 16]
    assert "choose the label 'helpful' or 'safe'" in error(capsys, *flags, "--out", tmp_path / "a")
    assert call(*flags, "--label", "safe", "--max-steps", 1, "--out", tmp_path / "b") == 0
    assert "label safe" in report(tmp_path / "b")["notes"][0]


@pytest.mark.parametrize("command", ["sft", "reward"])
def test_weights_that_break_in_the_last_step_are_not_kept(
    command: str, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of 5 steps is not logged, so that neither its loss nor its gradient is looked at."""
    from transformers import Trainer

    step = Trainer.training_step

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, *args, **kwargs)
        if self.state.global_step == 4:
            next(self.model.parameters()).grad.fill_(torch.nan)
        return loss

    monkeypatch.setattr(Trainer, "training_step", broken)
    label = ["--label", "helpful"] if command == "reward" else []
    flags = [*SMALL, "--model", reference, *label, "--max-steps", 5, "--evaluate-every", 2]
    told = error(capsys, command, *flags, "--out", tmp_path / "run")
    assert "is not finite at step 5" in told
    assert "the last good checkpoint is" in told
    assert "checkpoint-4" in told
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "checkpoint-5").exists()


def test_a_tokenizer_without_pad_token_is_named(
    reference: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tokenizer = language.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "t")
    flags = [*SMALL, "--model", reference, "--label", "safe", "--tokenizer", tmp_path / "t"]
    told = error(capsys, "reward", *flags, "--out", tmp_path / "a")
    assert "has no pad token: give --pad-token, for instance '<eos>'" in told
    assert "no token of" in error(capsys, "reward", *flags, "--pad-token", "<none>", "--out", tmp_path / "b")
    assert call("reward", *flags, "--pad-token", "<eos>", "--max-steps", 1, "--out", tmp_path / "c") == 0


def test_a_diverged_run_keeps_its_last_good_checkpoint(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bdpo.llm.objective import Objective

    original = Objective.__call__
    calls = []

    def broken(self: Objective, *args: Any, **kwargs: Any) -> Any:
        losses, metrics = original(self, *args, **kwargs)
        calls.append(1)
        return (losses * float("nan") if len(calls) > 3 else losses), metrics

    monkeypatch.setattr(Objective, "__call__", broken)
    flags = [*TRAIN, "--model", reference, "--validation", 0.0, "--evaluate-every", 1]
    told = error(capsys, "train", *flags, "--out", tmp_path / "run")
    assert "the loss is nan at step 3" in told
    assert "checkpoint-3" in told
    assert (tmp_path / "run" / "checkpoint-3" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "model").exists()
    assert report(tmp_path / "run")["status"].startswith("the loss is nan")
    assert "only finished runs are compared" in error(capsys, "compare", tmp_path / "run", "--out", tmp_path / "c")


def test_models_run_no_code_and_are_safetensors(
    reference: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in reference.iterdir():
        if file.suffix == ".json":
            (pickled / file.name).write_bytes(file.read_bytes())
    torch.save(_weights(reference), pickled / "pytorch_model.bin")
    told = error(capsys, "train", *TRAIN, "--model", pickled, "--out", tmp_path / "a")
    assert "safetensors" in told
    own = tmp_path / "own"
    own.mkdir()
    (own / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (own / "config.json").write_text(json.dumps(config))
    language.tokenizer().save_pretrained(own)
    assert error(capsys, "train", *TRAIN, "--model", own, "--out", tmp_path / "b")
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_holds_something_else_is_left_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    assert "holds something else" in error(capsys, "train", *TRAIN, "--out", tmp_path)
    assert "no checkpoint in" in error(capsys, "train", *TRAIN, "--out", tmp_path / "new", "--resume")
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_compare_needs_finished_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "runs must be given" in error(capsys, "compare", "--out", tmp_path / "c")
    assert "report.json is missing" in error(capsys, "compare", tmp_path / "no", "--out", tmp_path / "c")
