r"""The recorded experiments: what Tables 2 and 3 of the paper ask, in worlds that fit one core.

.. code-block:: console

    $ python -m bdpo.llm.experiment table2 --label overall --seeds 5  # goes on where it was stopped
    $ python -m bdpo.llm.experiment table3 --file harmless-base-test.jsonl.gz --seeds 5

**Table 2's world** is the controlled language of `bdpo.llm.language`. For each seed: demonstrations, a supervised model
(the reference), labelled pairs, a reward model trained on ``better`` and a cost model on ``safer``; then every method
from that one reference, for each of the three labels. A row is one policy at one checkpoint: exact Help, Harm and
safety of sampled responses, the same by the learned models, the KL divergence to the reference, lengths.

**Tuning.** beta and learning rate are chosen for each method and label on prompts of the validation split and a seed
that is not recorded, by `utility`, the mean exact score that the label follows: first beta at the middle learning rate,
then the learning rate at that beta. ``carried-helpful`` is what happens if one does not: the label ``helpful`` with the
settings chosen for ``overall``.
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
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from bdpo import results
from bdpo.llm import language as lang
from bdpo.llm import preferences, scoring, supervised
from bdpo.llm.pairs import Pairs, add_pair_scoring, tokenize
from bdpo.llm.pairs import score as pair_logps
from bdpo.llm.runs import divide, new_llama, train_tokenizer
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
        return _kept(self.folder / "reference", lambda: supervise(self)).eval()

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
            self._judges[label] = _kept(
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


def _kept(home: Path, make: Callable[[], Any], kind: str = "AutoModelForCausalLM") -> Any:
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
    trainer = supervised.trainer(model, args, rows, world.tokenizer, max_length=64)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model


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
    trainer = scoring.JudgeTrainer(model, args, train, world.tokenizer, kind=kind, max_length=64, validation=validation)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model


def evaluate(world: World, label: str, policy: Any) -> dict[str, float]:
    """Score sampled responses of a policy to the world's prompts, exactly and by the learned judges."""
    samples = scoring.sample(policy, world.tokenizer, world.prompts, seed=world.seed)
    rows = scoring.exact(samples)
    reward, cost = (
        scoring.judged(world.judge(kind), world.tokenizer, samples.prompts, samples.responses, ended=samples.ended)
        for kind in ("helpful", "safe")
    )
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return {
        "utility": utility(label, rows),
        **mean,
        "kl": float(scoring.kl(policy, world.reference, world.tokenizer, samples, batch_size=256).mean()),
        "learned_help": float(reward.mean()),
        "learned_harm": float(cost.mean()),
        "learned_safe": float((cost < 0).mean()),
        "agree_help": _finite(scoring.agreement([row["help"] for row in rows], reward.tolist())["pairs"]),
        "agree_harm": _finite(scoring.agreement([row["harm"] for row in rows], cost.tolist())["pairs"]),
        "agree_sign": scoring.agreement([row["harm"] for row in rows], cost.tolist())["sign"],
    }


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
    world: World, label: str, method: str, *, beta: float, rate: float, along: bool = True
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
            per_device_eval_batch_size=s.validation_pairs,
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
        rows.append({**same, "step": step, "checkpoint": marks[step], "status": "ok", **evaluate(world, label, model)})

    trainer = PreferenceTrainer(model, args, train, validation, callbacks=[At(marks, score)])
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
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


def reward_of(world: World, label: str, *, learned: bool) -> Callable[..., list[float | None]]:
    """The reward that RLOO follows: what the label follows, exactly, or the judge that was trained on the label."""
    judge = world.judge(label) if learned else None
    sign = -1.0 if label == "safe" else 1.0  # a cost is to be small

    def reward(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float | None]:
        ended = [ids[-1] == world.tokenizer.eos_token_id for ids in completion_ids]
        if judge is not None:
            return (sign * scoring.judged(judge, world.tokenizer, prompts, completions, ended=ended)).tolist()
        scores = lang.scores(prompts, completions, ended)
        return [utility(label, [score._asdict()]) for score in scores]

    return reward


def rloo(
    world: World, label: str, method: str, *, beta: float, rate: float, along: bool = True
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
            max_completion_length=lang.RESPONSE_TOKENS,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32", "use_safetensors": True},
            logging_steps=s.rloo_steps,
            seed=world.seed,
        )
    )

    def score(step: int) -> None:
        found = evaluate(world, label, trainer.model)
        rows.append({**same, "step": step, "checkpoint": marks[step], "status": "ok", **found})

    assert world.reference is not None  # and lies in the folder
    trainer = RLOOTrainer(
        str(world.folder / "reference"),
        reward_of(world, label, learned=method == "rloo_learned"),
        args,
        Dataset.from_dict({"prompt": world.language.prompts(s.pairs, world.seed)}),
        processing_class=world.tokenizer,
        callbacks=[At(marks, score)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return rows


# ---------------------------------------------------------------- tuning


def tuned(
    world: World,
    label: str,
    rows: list[dict[str, Any]],
    save: Callable[[], None],
    methods: Sequence[str] = tuple(METHODS),
) -> dict[str, tuple[float, float]]:
    """Choose beta and learning rate of every method.

    First the beta with the largest `utility` at the middle rate, then the rate at that beta; a run that diverged loses.

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
        return found["utility"] if found["status"] == "ok" else -math.inf

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
    table, curves = (Record(f"llm/{name}-{label}", same, root) for name in ("table2", "curves"))
    for seed in seeds:
        world = World(setup, seed, folder=folder)
        for method in ("sft", *methods):
            if table.has(seed=seed, method=method):
                continue
            curve: list[dict[str, Any]] = []
            if method == "sft":
                first = {"beta": 0.0, "rate": 0.0, "step": 0, "checkpoint": 0, "status": "ok"}
                first |= evaluate(world, label, world.reference)
                rows = [{"seed": seed, "label": label, "method": method, **first}]
            else:
                rows, curve = run(world, label, method, beta=best[method][0], rate=best[method][1])
            table.rows += rows
            curves.rows += curve
            if curves.rows:
                curves.save()
            table.save()
            print(f"{label}, seed {seed}, {method}: utility {rows[-1].get('utility')}", flush=True)


# ---------------------------------------------------------------- Table 3: real pairs


@dataclass(frozen=True)
class RealSetup:
    """Sizes of the experiment on a real file; all our choice. Nothing here is near a model that people would use."""

    vocabulary: int = 1024
    layers: int = 2
    width: int = 64
    prompt_characters: int = 160  # of a prompt the last ones are kept
    response_characters: int = 200  # pairs with a longer response are left out
    held_out: float = 0.2
    sft_epochs: int = 3
    sft_rate: float = 3e-3
    epochs: int = 2  # arXiv:2502.20847v1, Appendix B: "the same for HH"
    batch: int = 32
    beta: float = 0.1
    rate: float = 5e-4  # of every method alike: not tuned
    judge_epochs: int = 2
    judge_rate: float = 1e-3
    prompts: int = 200
    new_tokens: int = 64
    max_length: int = 512


REAL_METHODS = ("dpo", "bdpo", "dpo_sft")


class RealWorld:
    """One seed of the experiment on a file: a division of its pairs, and a tokenizer, a reference and a judge of it.

    Parameters
    ----------
    file
        A preference file with one label, such as the harmless pairs of Anthropic HH.
    setup, seed, folder
        As in `World`.
    """

    def __init__(self, file: Path, setup: RealSetup, seed: int, *, folder: Path) -> None:
        self.setup, self.seed = setup, seed
        found = preferences.read(file, label="safe")
        self.read = found.report.read
        rows = [short for row in found.rows if (short := shortened(row, setup)) is not None]
        key = repr((setup, seed, len(rows), rows[0]["prompt"], rows[-1]["prompt"])).encode()
        self.folder = folder / hashlib.sha256(key).hexdigest()[:12]
        train, test = divide(rows, setup.held_out, seed)
        self.texts = train, test
        self.tokenizer = train_tokenizer((row[k] for row in train for k in row), setup.vocabulary)
        self.train, self.test = (tokenize(part, self.tokenizer, max_length=setup.max_length) for part in (train, test))
        self.prompts = list(dict.fromkeys(row["prompt"] for row in test))[: setup.prompts]

    def _arguments(self, rate: float, epochs: int) -> dict[str, Any]:
        return quiet(
            per_device_train_batch_size=self.setup.batch,
            per_device_eval_batch_size=64,
            num_train_epochs=epochs,
            learning_rate=rate,
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            logging_steps=50,
            seed=self.seed,
        )

    @functools.cached_property
    def reference(self) -> Any:
        """A new Llama, fine-tuned on the chosen responses."""

        def make() -> Any:
            s = self.setup
            model = new_llama(s.layers, s.width, s.vocabulary, s.max_length, self.seed)
            args = TrainingArguments(**self._arguments(s.sft_rate, s.sft_epochs))
            trainer = supervised.trainer(model, args, self.texts[0], self.tokenizer, max_length=s.max_length)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            return model

        return _kept(self.folder / "reference", make).eval()

    @functools.cached_property
    def judge(self) -> Any:
        """A reward model, trained from the reference on the same pairs as the policies."""

        def make() -> Any:
            s = self.setup
            model = scoring.judge(self.reference, pad_token_id=self.tokenizer.pad_token_id)
            args = TrainingArguments(**self._arguments(s.judge_rate, s.judge_epochs))
            trainer = scoring.JudgeTrainer(
                model, args, self.texts[0], self.tokenizer, kind="reward", max_length=s.max_length
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            return model

        return _kept(self.folder / "judge", make, "AutoModelForSequenceClassification").eval()

    @functools.cached_property
    def judge_accuracy(self) -> float:
        """The share of held-out pairs that the judge orders as the annotators did."""
        sides = [
            scoring.judged(
                self.judge, self.tokenizer, [r["prompt"] for r in self.texts[1]], [r[k] for r in self.texts[1]]
            )
            for k in ("chosen", "rejected")
        ]
        return float((sides[0] > sides[1]).mean())

    def policy(self, method: str) -> Any:
        """Train one policy from the reference."""
        model, spec = copy.deepcopy(self.reference), METHODS[method]
        args = PreferenceArguments(
            **self._arguments(self.setup.rate, self.setup.epochs),
            loss=spec.loss,
            loss_settings={**spec.settings, "beta": self.setup.beta},
        )
        trainer = PreferenceTrainer(model, args, self.train)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return model

    def accuracy(self, policy: Any) -> float:
        """The share of held-out pairs whose chosen response gained more log-probability than the rejected one."""
        if self.test.reference is None:
            add_pair_scoring(self.reference)
            self.test.reference = pair_logps(self.reference, self.test, batch_size=64)
        add_pair_scoring(policy)
        win, lose = (
            a - b for a, b in zip(pair_logps(policy, self.test, batch_size=64), self.test.reference, strict=True)
        )
        return float(((win > lose) + 0.5 * (win == lose)).mean())

    def evaluate(self, policy: Any) -> dict[str, float]:
        """Scores of a policy on the held-out pairs and prompts."""
        s = self.setup
        samples = scoring.sample(policy, self.tokenizer, self.prompts, seed=self.seed, max_new_tokens=s.new_tokens)
        rewards = scoring.judged(
            self.judge, self.tokenizer, samples.prompts, samples.responses, ended=samples.ended, batch_size=64
        )
        lengths = [len(ids) for ids in samples.response_ids]
        return {
            "read": self.read,
            "train": len(self.train),
            "held_out": len(self.test),
            "judge_accuracy": self.judge_accuracy,
            "accuracy": self.accuracy(policy),
            "reward": float(rewards.mean()),
            "kl": float(scoring.kl(policy, self.reference, self.tokenizer, samples).mean()),
            "length": float(np.mean(lengths)),
            "ended": float(np.mean(samples.ended)),
        }


def shortened(row: Mapping[str, Any], setup: RealSetup) -> dict[str, str] | None:
    """A pair with the end of its prompt; None if one of its responses is too long."""
    if any(len(row[side]) > setup.response_characters for side in ("chosen", "rejected")):
        return None
    return {"prompt": row["prompt"][-setup.prompt_characters :], "chosen": row["chosen"], "rejected": row["rejected"]}


def table3(
    file: Path,
    seeds: Iterable[int],
    setup: RealSetup | None = None,
    *,
    methods: Sequence[str] = REAL_METHODS,
    folder: Path,
    root: Path | None = None,
) -> None:
    """Record ``llm/table3``, going on where it ends.

    Parameters
    ----------
    file, setup
        As in `RealWorld`.
    seeds, methods, folder, root
        As in `table2`.
    """
    setup = setup or RealSetup()
    table = Record("llm/table3", {"setup": dataclasses.asdict(setup), "file": file.name}, root)
    for seed in seeds:
        if all(table.has(seed=seed, method=method) for method in ("sft", *methods)):
            continue
        world = RealWorld(file, setup, seed, folder=folder)
        for method in ("sft", *methods):
            if not table.has(seed=seed, method=method):
                policy = world.reference if method == "sft" else world.policy(method)
                table.rows.append({"seed": seed, "method": method, **world.evaluate(policy)})
                table.save()
                print(f"seed {seed}, {method}: {table.rows[-1]}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Record an experiment."""
    parser = argparse.ArgumentParser(prog="python -m bdpo.llm.experiment", description="Record an experiment.")
    parser.add_argument("name", choices=["table2", "table3"])
    parser.add_argument("--label", choices=LABELS, default=LABELS[0], help="the label of table2")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="record the seeds 0 to N-1 (default: 5)")
    parser.add_argument("--file", type=Path, help="the preference file of table3")
    parser.add_argument("--work", type=Path, default=Path("_build/llm"), help="where models are kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the recorded numbers belong to one thread
    transformers.utils.logging.disable_progress_bar()
    if options.name == "table2":
        table2(options.label, range(options.seeds), methods=options.methods, folder=options.work)
    elif options.file is None:
        parser.error("table3 needs --file")
    else:
        chosen = [method for method in options.methods if method in REAL_METHODS]
        table3(options.file, range(options.seeds), methods=chosen, folder=options.work)


if __name__ == "__main__":
    main()
