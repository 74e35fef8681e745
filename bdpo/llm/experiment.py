r"""The recorded experiment of Table 2: what the paper asks, in a language whose answers a program can judge.

.. code-block:: console

    $ python -m bdpo.llm.experiment table2 --label overall --seeds 5  # goes on where it was stopped

**Table 2's world** is the controlled language of `bdpo.llm.language`. For each seed: demonstrations, a supervised model
(the reference), labelled pairs, a reward model trained on ``better`` and a cost model on ``safer``; then every method
from that one reference, for each of the three labels. A row is one policy at one checkpoint: exact Help, Harm and
safety of sampled responses, the same by the learned models, the KL divergence to the reference, lengths.

**Tuning.** beta and learning rate are chosen for each method and label on prompts of the validation split and a seed
that is not recorded, by `utility`, the mean exact score that the label follows: first beta at the middle learning rate,
then the learning rate at that beta. ``carried-helpful`` is what happens if one does not: the label ``helpful`` with the
settings chosen for ``overall``.

`run`, `tuned` and `record` ask no more of a world than `AnyWorld` says; `bdpo.llm.real` has another one, for Table 3.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
import transformers
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from bdpo import results
from bdpo.llm import language as lang
from bdpo.llm import preferences, scoring, supervised
from bdpo.llm.pairs import Pairs, tokenize
from bdpo.llm.runs import checkpointing
from bdpo.llm.trainer import PreferenceArguments, PreferenceTrainer, TrainingDiverged

LABELS = ("overall", "helpful", "safe")
TUNING_SEED = 100


@dataclass(frozen=True)
class Method:
    """One row of the table: the objective, its fixed settings, the grid it is tuned on, and why it is there."""

    title: str
    loss: str
    why: str
    settings: dict[str, Any] = field(default_factory=dict)
    betas: tuple[float, ...] = (0.0125, 0.05, 0.2, 0.8)
    rate: float | None = None  # tuned where None
    like: str | None = None  # not tuned: takes the settings of this method,
    factor: float = 1.0  # with beta multiplied by this


_PAPER = "arXiv:2502.20847v1, Table 2"
_CLIP = {"clip": 0.3}  # arXiv:2502.20847v1, Appendix B
METHODS: dict[str, Method] = {
    "dpo": Method("DPO", "dpo", _PAPER),
    "nbdpo_asym": Method("nbDPO (asymm)", "nbdpo_asym", _PAPER, _CLIP),
    "nbdpo_sym": Method("nbDPO (symm)", "nbdpo_sym", _PAPER, _CLIP),
    "nbdpo_v2_asym": Method("nbDPOv2 (asymm)", "nbdpo_v2_asym", _PAPER, _CLIP),
    "nbdpo_v2_sym": Method("nbDPOv2 (symm)", "nbdpo_v2_sym", _PAPER, _CLIP),
    "bdpo": Method("bDPO", "bdpo", _PAPER),
    "bdpo_doubled": Method(
        "bDPO at DPO's settings, β doubled",
        "bdpo",
        "control: at the reference bDPO's gradient is about half of DPO's",
        like="dpo",
        factor=2.0,
    ),
    "dpo_sft": Method("DPO + SFT term", "dpo_sft", "control: another way to hold the winner up", {"sft_weight": 0.2}),
    "simpo": Method("SimPO", "simpo", "control: no reference, mean log-probs", {"gamma": 0.5}, (0.25, 1.0, 2.5, 6.0)),
    "ipo": Method("IPO", "ipo", "control: a bounded target for the margin"),
    "rloo_exact": Method(
        "RLHF (RLOO), exact reward", "rloo", "control: online, told the truth; not tuned", betas=(0.05,), rate=1e-3
    ),
    "rloo_learned": Method(
        "RLHF (RLOO), learned reward", "rloo", "control: online; not tuned", betas=(0.05,), rate=1e-3
    ),
}
RATES, MIDDLE = (2e-4, 6e-4, 2e-3, 6e-3), 6e-4


@dataclass(frozen=True)
class Setup:
    """Sizes of the controlled experiment; all our choice, so that one seed takes minutes on one core."""

    layers: int = 2
    width: int = 64
    demonstrations: int = 20_000
    sft_steps: int = 600
    sft_batch: int = 64
    sft_rate: float = 5e-3
    pairs: int = 1000
    temperature: float = 0.25  # of the annotators, in units of the scores
    epochs: int = 2  # arXiv:2502.20847v1, Appendix B
    batch: int = 32
    validation_pairs: int = 96
    validations: int = 10  # along a run
    checkpoints: int = 3  # at which responses are sampled, the last one at the end
    prompts: int = 256
    judge_epochs: int = 3
    judge_rate: float = 1e-3
    rloo_steps: int = 40
    rloo_completions: int = 64


def utility(label: str, rows: Sequence[Mapping[str, Any]]) -> float:
    """The mean of what a label follows, exactly: Help, -Harm, or for ``overall`` Help - Harm."""
    helpful, harmful = {"helpful": (1, 0), "safe": (0, 1), "overall": (1, 1)}[label]
    return float(np.mean([helpful * row["help"] - harmful * row["harm"] for row in rows]))


def quiet(folder: Path | None = None, **more: Any) -> dict[str, Any]:
    """Arguments of every training run here: one process on the processor, float32, no checkpoints, no messages."""
    return {
        "output_dir": str(folder or Path(tempfile.gettempdir()) / "bdpo"),  # where next to nothing is written
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        **more,
    }


def trained(trainer: Any) -> Any:
    """The model of a trainer, after training without messages."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model


EVALUATION_BATCH = 96  # pairs scored at a time


class AnyWorld(Protocol):
    """What a method needs: one seed's reference and pairs, and how to score a policy there.

    The setup has the fields ``epochs``, ``batch``, ``validations``, ``checkpoints``, ``rloo_steps`` and
    ``rloo_completions`` of `Setup`; ``response_tokens`` bounds a response, the folder holds the reference.
    """

    setup: Any
    seed: int
    folder: Path
    tokenizer: Any
    response_tokens: int

    @property
    def reference(self) -> Any:
        """The supervised model, from which every policy starts."""

    def pairs(self, label: str) -> tuple[Pairs, Pairs]:
        """Tokenised pairs for training and for validation."""

    def questions(self) -> list[str]:
        """The prompts that online training answers."""

    def reward(self, label: str, *, learned: bool) -> Callable[..., list[float | None]]:
        """The reward that online training follows, as TRL calls it."""

    def evaluate(self, label: str, policy: Any) -> dict[str, float]:
        """Scores of a policy."""


class World:
    """One seed of the controlled language: its prompts, its reference, its pairs, and what is learned to judge with.

    Parameters
    ----------
    setup
        Sizes.
    seed
        Of demonstrations, weights, pairs, annotators and samples.
    split
        ``"test"``, or ``"validation"`` for tuning: which prompts the policies are scored on.
    folder
        Where models are kept, so that a run that goes on does not train them again.
    """

    response_tokens = lang.RESPONSE_TOKENS

    def __init__(self, setup: Setup, seed: int, split: str = "test", *, folder: Path) -> None:
        self.setup, self.seed = setup, seed
        self.folder = folder / hashlib.sha256(repr((setup, seed)).encode()).hexdigest()[:12]
        self.language, self.tokenizer = lang.Language(), lang.tokenizer()
        self.prompts = self.language.prompts(setup.prompts, seed, split)
        self._pairs: dict[str, tuple[Pairs, Pairs]] = {}
        self._judges: dict[str, Any] = {}

    @functools.cached_property
    def reference(self) -> Any:
        """The supervised model."""
        return kept(self.folder / "reference", lambda: supervise(self)).eval()

    @functools.cached_property
    def _rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        s = self.setup
        train = self.language.pairs(s.pairs, self.seed, s.temperature)
        return train, self.language.pairs(s.validation_pairs, self.seed, s.temperature, "validation")

    def rows(self, label: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Pairs with chosen and rejected responses, for training and for validation."""
        train, validation = (preferences.from_rows(rows, label=label).rows for rows in self._rows)
        return train, validation

    def judge(self, label: str) -> Any:
        """A reward model of the label; for ``safe`` a cost model. Trained from the reference on the pairs."""
        if label not in self._judges:
            self._judges[label] = kept(
                self.folder / f"judge-{label}", lambda: train_judge(self, label), "AutoModelForSequenceClassification"
            ).eval()
        return self._judges[label]

    def pairs(self, label: str) -> tuple[Pairs, Pairs]:
        """Tokenised pairs for training and for validation; the first trainer adds the reference's log-probs."""
        if label not in self._pairs:
            self._pairs[label] = tuple(  # type: ignore[assignment]
                tokenize(rows, self.tokenizer, max_length=64) for rows in self.rows(label)
            )
        return self._pairs[label]

    def questions(self) -> list[str]:
        """The prompts that online training answers."""
        return self.language.prompts(self.setup.pairs, self.seed)

    def reward(self, label: str, *, learned: bool) -> Callable[..., list[float | None]]:
        """The reward that RLOO follows: what the label follows, exactly, or the judge that was trained on the label."""
        judge = self.judge(label) if learned else None
        sign = -1.0 if label == "safe" else 1.0  # a cost is to be small

        def reward(
            prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
        ) -> list[float | None]:
            ended = [ids[-1] == self.tokenizer.eos_token_id for ids in completion_ids]
            if judge is not None:
                return (sign * scoring.judged(judge, self.tokenizer, prompts, completions, ended=ended)).tolist()
            scores = lang.scores(prompts, completions, ended)
            return [utility(label, [score._asdict()]) for score in scores]

        return reward

    def evaluate(self, label: str, policy: Any) -> dict[str, float]:
        """Score sampled responses of a policy to the world's prompts, exactly and by the learned judges."""
        samples = scoring.sample(policy, self.tokenizer, self.prompts, seed=self.seed)
        rows = scoring.exact(samples)
        reward, cost = (
            scoring.judged(self.judge(kind), self.tokenizer, samples.prompts, samples.responses, ended=samples.ended)
            for kind in ("helpful", "safe")
        )
        mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        return {
            "utility": utility(label, rows),
            **mean,
            "kl": float(scoring.kl(policy, self.reference, self.tokenizer, samples, batch_size=256).mean()),
            "learned_help": float(reward.mean()),
            "learned_harm": float(cost.mean()),
            "learned_safe": float((cost < 0).mean()),
            "agree_help": _finite(scoring.agreement([row["help"] for row in rows], reward.tolist())["pairs"]),
            "agree_harm": _finite(scoring.agreement([row["harm"] for row in rows], cost.tolist())["pairs"]),
            "agree_sign": scoring.agreement([row["harm"] for row in rows], cost.tolist())["sign"],
        }


def recorded_world(seed: int = 0, *, root: Path | None = None, **sizes: Any) -> World:
    """The world of a recorded seed whose models lie among the results: nothing has to be trained before a policy.

    Parameters
    ----------
    seed
        0: one world is kept.
    root
        As in `bdpo.results.read`.
    sizes
        Other fields of `Setup`, such as ``pairs`` and ``epochs``; not those of the models.
    """
    world = World(dataclasses.replace(Setup(), **sizes), seed, folder=Path())
    world.folder = results.folder(root) / "llm" / f"world-{seed}"
    if not (world.folder / "reference").is_dir():
        raise FileNotFoundError(f"no models of seed {seed} in {world.folder.parent}; kept are those of seed 0")
    return world


def kept(home: Path, make: Callable[[], Any], kind: str = "AutoModelForCausalLM") -> Any:
    """The model in a folder; made and put there first if it is not."""
    if not home.is_dir():
        half = home.with_suffix(f".{os.getpid()}")
        make().save_pretrained(half)
        if not home.is_dir():  # another process may have been faster
            half.rename(home)
    return getattr(transformers, kind).from_pretrained(home, use_safetensors=True)


def supervise(world: World) -> Any:
    """Train the reference of a world on its demonstrations."""
    s = world.setup
    args = TrainingArguments(
        **quiet(
            per_device_train_batch_size=s.sft_batch,
            max_steps=s.sft_steps,
            learning_rate=s.sft_rate,
            lr_scheduler_type="linear",
            warmup_steps=s.sft_steps // 20,
            adam_beta2=0.95,
            logging_steps=max(1, s.sft_steps // 10),
            seed=world.seed,
        )
    )
    model = lang.model(layers=s.layers, width=s.width, seed=world.seed)
    rows = world.language.demonstrations(s.demonstrations, world.seed)
    return trained(supervised.trainer(model, args, rows, world.tokenizer, max_length=64))


def train_judge(world: World, label: str) -> Any:
    """Train what judges a label from the world's reference."""
    s = world.setup
    train, validation = world.rows(label)
    args = TrainingArguments(
        **quiet(
            per_device_train_batch_size=s.batch,
            num_train_epochs=s.judge_epochs,
            learning_rate=s.judge_rate,
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            seed=world.seed,
        )
    )
    model = scoring.judge(world.reference, pad_token_id=world.tokenizer.pad_token_id)
    kind = "cost" if label == "safe" else "reward"
    return trained(
        scoring.JudgeTrainer(model, args, train, world.tokenizer, kind=kind, max_length=64, validation=validation)
    )


def _finite(share: float) -> float:
    """A share of pairs; one half, chance, where no pair differs."""
    return share if math.isfinite(share) else 0.5


# ---------------------------------------------------------------- one method


class At(TrainerCallback):
    """Calls a function with the step at the steps given."""

    def __init__(self, steps: Iterable[int], function: Callable[[int], None]) -> None:
        self.steps, self.function = set(steps), function

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.function(state.global_step)


def run(
    world: AnyWorld, label: str, method: str, *, beta: float, rate: float, along: bool = True
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train one policy from the world's reference and score it.

    Parameters
    ----------
    world, label, method
        Where, on which labels, and a key of `METHODS`.
    beta, rate
        Of the objective, and of AdamW.
    along
        Whether to validate and score along the way, or only at the end.

    Returns
    -------
    tuple of list
        Rows of the policy at its checkpoints, and rows of the validation loss. A run that diverged has one row, with
        ``status`` "diverged" and NaN for what was not measured.
    """
    s, spec = world.setup, METHODS[method]
    if spec.loss == "rloo":
        return rloo(world, label, method, beta=beta, rate=rate, along=along), []
    train, validation = world.pairs(label)
    steps = s.epochs * math.ceil(len(train) / s.batch)
    every = max(1, steps // s.validations)
    marks = {math.ceil(steps * k / s.checkpoints): k for k in range(1, s.checkpoints + 1)} if along else {steps: 1}
    model = copy.deepcopy(world.reference)
    same = {"seed": world.seed, "label": label, "method": method, "beta": beta, "rate": rate}
    rows: list[dict[str, Any]] = []
    args = PreferenceArguments(
        **quiet(
            loss=spec.loss,
            loss_settings={**spec.settings, "beta": beta},
            per_device_train_batch_size=s.batch,
            per_device_eval_batch_size=EVALUATION_BATCH,
            num_train_epochs=s.epochs,
            learning_rate=rate,
            lr_scheduler_type="linear",
            warmup_steps=steps // 10,
            logging_steps=every,
            eval_strategy="steps" if along else "no",
            eval_steps=every,
            eval_on_start=along,
            seed=world.seed,
        )
    )

    def score(step: int) -> None:
        rows.append({**same, "step": step, "checkpoint": marks[step], "status": "ok", **world.evaluate(label, model)})

    trainer = PreferenceTrainer(model, args, train, validation, callbacks=[At(marks, score)])
    try:
        trained(trainer)
    except TrainingDiverged:
        rows.append({**same, "step": trainer.state.global_step, "checkpoint": 0, "status": "diverged"})
    curve = [
        {**same, "step": log["step"]} | {new: log[f"eval_{old}"] for old, new in CURVE.items() if f"eval_{old}" in log}
        for log in trainer.state.log_history
        if "eval_loss" in log
    ]
    return rows, curve


#: What is recorded at every validation, and under which name.
CURVE = {
    "loss": "validation_loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "logps/chosen": "chosen_logps",
    "logps/rejected": "rejected_logps",
    "lambda": "winner_share",
}


def rloo(
    world: AnyWorld, label: str, method: str, *, beta: float, rate: float, along: bool = True
) -> list[dict[str, Any]]:
    """The RLHF side: RLOO of TRL, online, with the exact or the learned reward of the label.

    Parameters and rows as in `run`; beta is the weight of the KL penalty, and there is no validation loss.
    """
    from datasets import Dataset  # type: ignore[import-untyped]
    from trl import RLOOConfig, RLOOTrainer

    s = world.setup
    marks = {math.ceil(s.rloo_steps * k / s.checkpoints): k for k in range(1, s.checkpoints + 1)}
    marks = marks if along else {s.rloo_steps: 1}
    same = {"seed": world.seed, "label": label, "method": method, "beta": beta, "rate": rate}
    rows: list[dict[str, Any]] = []
    args = RLOOConfig(
        **quiet(
            beta=beta,
            learning_rate=rate,
            lr_scheduler_type="constant",
            max_steps=s.rloo_steps,
            per_device_train_batch_size=s.rloo_completions,
            num_generations=8,
            max_completion_length=world.response_tokens,
            **checkpointing(False),
            model_init_kwargs={"dtype": "float32", "use_safetensors": True},
            logging_steps=s.rloo_steps,
            seed=world.seed,
        )
    )

    def score(step: int) -> None:
        found = world.evaluate(label, trainer.model)
        rows.append({**same, "step": step, "checkpoint": marks[step], "status": "ok", **found})

    assert world.reference is not None  # and lies in the folder
    trainer = RLOOTrainer(
        str(world.folder / "reference"),
        world.reward(label, learned=method == "rloo_learned"),
        args,
        Dataset.from_dict({"prompt": world.questions()}),
        processing_class=world.tokenizer,
        callbacks=[At(marks, score)],
    )
    trained(trainer)
    return rows


# ---------------------------------------------------------------- tuning


def tuned(
    world: AnyWorld,
    label: str,
    rows: list[dict[str, Any]],
    save: Callable[[], None],
    methods: Sequence[str] = tuple(METHODS),
    by: str = "utility",
) -> dict[str, tuple[float, float]]:
    """Choose beta and learning rate of every method.

    First the beta with the largest score at the middle rate, then the rate at that beta; a run that diverged loses.

    Parameters
    ----------
    world, label
        On the validation split, and on which labels.
    rows
        The trials made so far; new ones are added.
    save
        Called after each new trial.
    methods
        Which; with a method that takes the settings of another, also that one.
    by
        The score, by its name in the rows.

    Returns
    -------
    dict
        Method to (beta, rate).
    """
    best: dict[str, tuple[float, float]] = {}

    def value(method: str, beta: float, rate: float) -> float:
        same = (method, beta, rate)
        found = next((r for r in rows if (r["method"], r["beta"], r["rate"]) == same), None)
        if found is None:
            found = run(world, label, method, beta=beta, rate=rate, along=False)[0][-1]
            rows.append(found)
            save()
            print(f"{label}, trial of {method}, beta {beta:g}, rate {rate:g}: {by} {found.get(by)}", flush=True)
        return found[by] if found["status"] == "ok" else -math.inf

    chosen = {method: METHODS[method] for method in methods}
    for method, spec in chosen.items():
        if spec.rate is not None:
            best[method] = (spec.betas[0], spec.rate)
        elif spec.like is None:
            beta = max(spec.betas, key=lambda b: value(method, b, MIDDLE))
            best[method] = (beta, max(RATES, key=lambda r: value(method, beta, r)))
    for method, spec in chosen.items():
        if spec.like is not None:
            best[method] = (spec.factor * best[spec.like][0], best[spec.like][1])
    return best


# ---------------------------------------------------------------- recording


class Record:
    """Rows that grow while they are recorded; a later call with the same parameters goes on where they end."""

    def __init__(self, name: str, parameters: Mapping[str, Any], root: Path | None) -> None:
        self.name, self.parameters, self.root = name, json.loads(json.dumps(parameters)), root
        self.rows: list[dict[str, Any]] = []
        self.seconds, self.start = 0.0, time.perf_counter()
        if name in results.names(root=root):
            note = results.provenance(name, root=root)
            if note["parameters"] != self.parameters:
                raise SystemExit(f"{name} was recorded with other parameters: move it away, or use the same")
            self.rows, self.seconds = results.read(name, root=root).to_dict("records"), note["seconds"]

    def save(self) -> None:
        """Write all rows so far."""
        frame = pd.DataFrame(self.rows)
        results.write(
            frame,
            self.name,
            parameters=self.parameters,
            seconds=self.seconds + time.perf_counter() - self.start,
            seeds=sorted({int(seed) for seed in frame["seed"]}),
            root=self.root,
        )

    def has(self, **what: Any) -> bool:
        """Whether some row has these values."""
        return any(all(row[name] == value for name, value in what.items()) for row in self.rows)


def table2(
    label: str,
    seeds: Iterable[int],
    setup: Setup | None = None,
    *,
    methods: Sequence[str] = tuple(METHODS),
    folder: Path,
    root: Path | None = None,
) -> None:
    """Record ``llm/tuning-LABEL``, then ``llm/table2-LABEL`` and ``llm/curves-LABEL``, going on where they end.

    Parameters
    ----------
    label
        Which label decides the winner.
    seeds
        Seeds to record, each with all methods before the next.
    setup, methods
        What to run. Methods that are left out now may follow later.
    folder
        Where models are kept.
    root
        As in `bdpo.results.write`.
    """
    setup = setup or Setup()
    same = {"setup": dataclasses.asdict(setup), "clip": _CLIP["clip"], "rates": list(RATES)}
    trials = Record(f"llm/tuning-{label}", same, root)
    finer = dataclasses.replace(setup, prompts=2 * setup.prompts)
    world = World(finer, TUNING_SEED, "validation", folder=folder)
    best = tuned(world, label, trials.rows, trials.save)
    same["chosen"] = {method: list(pair) for method, pair in best.items()}
    tables = [Record(f"llm/{name}-{label}", same, root) for name in ("table2", "curves")]
    record(lambda seed: World(setup, seed, folder=folder), label, seeds, methods, best, *tables)


def record(
    make: Callable[[int], AnyWorld],
    label: str,
    seeds: Iterable[int],
    methods: Sequence[str],
    best: Mapping[str, tuple[float, float]],
    table: Record,
    curves: Record,
) -> None:
    """Record the reference and all methods of each seed before the next, going on where the table ends.

    Parameters
    ----------
    make
        From a seed to its world.
    label, seeds, methods
        As in `table2`.
    best
        Method to (beta, rate).
    table, curves
        Where the two kinds of rows of `run` go.
    """
    for seed in seeds:
        missing = [method for method in ("sft", *methods) if not table.has(seed=seed, method=method)]
        world = make(seed) if missing else None
        for method in missing:
            assert world is not None
            curve: list[dict[str, Any]] = []
            if method == "sft":
                first = {"beta": 0.0, "rate": 0.0, "step": 0, "checkpoint": 0, "status": "ok"}
                first |= world.evaluate(label, world.reference)
                rows = [{"seed": seed, "label": label, "method": method, **first}]
            else:
                rows, curve = run(world, label, method, beta=best[method][0], rate=best[method][1])
            table.rows += rows
            half = [row for row in curves.rows if (row["seed"], row["method"]) != (seed, method)]  # without the table's
            curves.rows = half + curve
            if curves.rows:
                curves.save()
            table.save()
            print(f"{label}, seed {seed}, {method}: {rows[-1]}", flush=True)


def options(name: str, description: str, work: str) -> argparse.ArgumentParser:
    """The options that the recorded experiments share."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=description)
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), metavar="NAME", help="default: all")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="record the seeds 0 to N-1 (default: 5)")
    parser.add_argument("--work", type=Path, default=Path(work), help="where models are kept")
    torch.set_num_threads(1)  # the recorded numbers belong to one thread
    transformers.utils.logging.disable_progress_bar()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Record Table 2's experiment."""
    parser = options("bdpo.llm.experiment", "Record the experiment of Table 2.", "_build/llm")
    parser.add_argument("name", choices=["table2"])
    parser.add_argument("--label", choices=LABELS, default=LABELS[0])
    given = parser.parse_args(arguments)
    table2(given.label, range(given.seeds), methods=given.methods or tuple(METHODS), folder=given.work)


if __name__ == "__main__":
    main()
