r"""The recorded experiment of Table 3: every method on a real file of pairs, with models trained from scratch.

.. code-block:: console

    $ python -m bdpo.llm.real harmless-base-test.jsonl.gz --seeds 5  # goes on where it was stopped

**Divisions.** A pair belongs to the dialogue that its opening begins, the first words of the human, and a dialogue is
never divided. Those set aside for validation are chosen by a hash of the opening: they are the same for every seed, and
no model is trained or reported on them. The other dialogues are divided into training and test, anew for each seed. The
tokenizer, the reference and the judge of a seed see its training part only.

**Tuning.** beta and learning rate are chosen as in `bdpo.llm.experiment.tuned`, by the learned reward of responses to
the validation prompts, with a division, a reference and a judge of `TUNING_SEED`, which is not recorded. The paper
reports a learned reward, and its mean over samples varies less than the accuracy on so few pairs. Its weakness: it is
what over-optimisation raises. Accuracy on the validation pairs stands beside it in every row.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainingArguments

from bdpo.llm import preferences, scoring, supervised
from bdpo.llm.experiment import (
    EVALUATION_BATCH,
    METHODS,
    RATES,
    TUNING_SEED,
    Record,
    kept,
    options,
    quiet,
    record,
    trained,
    tuned,
)
from bdpo.llm.pairs import Pairs, add_pair_scoring, tokenize
from bdpo.llm.pairs import score as pair_logps
from bdpo.llm.runs import divide, new_llama, train_tokenizer

LABEL = "harmless"
REAL_METHODS = tuple(name for name in METHODS if name != "rloo_exact")  # no program scores real responses


@dataclass(frozen=True)
class RealSetup:
    """Sizes of the experiment on a real file; all our choice. Nothing here is near a model that people would use."""

    vocabulary: int = 1024
    layers: int = 2
    width: int = 64
    prompt_characters: int = 160  # of a prompt the last ones are kept
    response_characters: int = 200  # pairs with a longer response are left out
    validation: float = 0.12  # of the dialogues, for all seeds
    held_out: float = 0.2  # of the other dialogues, for one seed
    sft_epochs: int = 4
    sft_rate: float = 3e-3
    epochs: int = 2  # arXiv:2502.20847v1, Appendix B: "the same for HH"
    batch: int = 32
    validations: int = 10  # along a run
    checkpoints: int = 3  # at which responses are sampled, the last one at the end
    judge_characters: int = 400  # as response_characters, of what the judge is trained on
    judge_epochs: int = 2
    judge_rate: float = 1e-3
    samples: int = 160
    new_tokens: int = 64
    max_length: int = 512
    rloo_steps: int = 20
    rloo_completions: int = 64


def opening(prompt: str) -> str:
    """The first words of a dialogue: what the human says before the assistant does."""
    return prompt.split("\n\nAssistant:")[0]


def set_aside(row: Mapping[str, Any], share: float) -> bool:
    """Whether a pair is for validation: by a hash of its opening, so that a dialogue is never divided."""
    digest = hashlib.sha256(opening(row["prompt"]).encode()).hexdigest()
    return int(digest[:8], 16) < share * 16**8


def shortened(row: Mapping[str, Any], characters: int) -> dict[str, str]:
    """A pair with the end of its prompt alone."""
    return {"prompt": row["prompt"][-characters:], "chosen": row["chosen"], "rejected": row["rejected"]}


def longest(row: Mapping[str, Any]) -> int:
    """Characters of the longer response."""
    return max(len(row["chosen"]), len(row["rejected"]))


class RealWorld:
    """One seed of the experiment on a file: a division of its pairs, and a tokenizer, a reference and a judge of it.

    Parameters
    ----------
    file
        A preference file with one label, such as the harmless pairs of Anthropic HH.
    setup, seed, split, folder
        As in `bdpo.llm.experiment.World`; split says which pairs and prompts the policies are scored on.

    Raises
    ------
    ValueError
        If a part of the division is empty.
    """

    def __init__(self, file: Path, setup: RealSetup, seed: int, split: str = "test", *, folder: Path) -> None:
        self.setup, self.seed, self.response_tokens = setup, seed, setup.new_tokens
        found = preferences.read(file, label="safe")
        self.read = found.report.read
        rest = [row for row in found.rows if not set_aside(row, setup.validation)]
        held = set(divide(sorted({opening(row["prompt"]) for row in rest}), setup.held_out, seed)[1])
        parts = {
            "train": [row for row in rest if opening(row["prompt"]) not in held],
            "validation": [row for row in found.rows if set_aside(row, setup.validation)],
            "test": [row for row in rest if opening(row["prompt"]) in held],
        }

        def short(part: str, most: int) -> list[dict[str, str]]:
            return [shortened(row, setup.prompt_characters) for row in parts[part] if longest(row) <= most]

        self.texts = {part: short(part, setup.response_characters) for part in parts}
        self.judge_texts = short("train", setup.judge_characters)
        if empty := [part for part, rows in self.texts.items() if not rows]:
            raise ValueError(f"{file.name}: no pairs for {empty[0]}; give more and shorter ones, or larger shares")
        key = repr((setup, seed, hashlib.sha256(file.read_bytes()).hexdigest())).encode()
        self.folder = folder / hashlib.sha256(key).hexdigest()[:12]
        self.tokenizer = train_tokenizer((row[k] for row in self.texts["train"] for k in row), setup.vocabulary)
        self.tokens = {
            part: tokenize(rows, self.tokenizer, max_length=setup.max_length) for part, rows in self.texts.items()
        }
        self.scored, self.held = self.texts[split], self.tokens[split]
        prompts = dict.fromkeys(row["prompt"] for row in self.scored)
        self.prompts = list(itertools.islice(itertools.cycle(prompts), setup.samples))

    def _arguments(self, rate: float, epochs: int) -> TrainingArguments:
        return TrainingArguments(
            **quiet(
                per_device_train_batch_size=self.setup.batch,
                num_train_epochs=epochs,
                learning_rate=rate,
                lr_scheduler_type="linear",
                warmup_steps=0.1,
                logging_steps=50,
                seed=self.seed,
            )
        )

    @functools.cached_property
    def reference(self) -> Any:
        """A new Llama, fine-tuned on the chosen responses."""
        s = self.setup

        def make() -> Any:
            model = new_llama(s.layers, s.width, s.vocabulary, s.max_length, self.seed)
            args = self._arguments(s.sft_rate, s.sft_epochs)
            return trained(
                supervised.trainer(model, args, self.texts["train"], self.tokenizer, max_length=s.max_length)
            )

        return kept(self.folder / "reference", make).eval()

    @functools.cached_property
    def judge(self) -> Any:
        """A reward model, trained from the reference on the same pairs as the policies and on longer ones."""
        s = self.setup

        def make() -> Any:
            model = scoring.judge(self.reference, pad_token_id=self.tokenizer.pad_token_id)
            args = self._arguments(s.judge_rate, s.judge_epochs)
            return trained(
                scoring.JudgeTrainer(
                    model, args, self.judge_texts, self.tokenizer, kind="reward", max_length=s.max_length
                )
            )

        return kept(self.folder / "judge", make, "AutoModelForSequenceClassification").eval()

    def judged(
        self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool] | None = None
    ) -> np.ndarray:
        """The judge's scores of responses."""
        return scoring.judged(self.judge, self.tokenizer, prompts, responses, ended=ended, batch_size=EVALUATION_BATCH)

    @functools.cached_property
    def judge_accuracy(self) -> float:
        """The share of held-out pairs that the judge orders as the annotators did."""
        prompts = [row["prompt"] for row in self.scored]
        chosen, rejected = (self.judged(prompts, [row[k] for row in self.scored]) for k in ("chosen", "rejected"))
        return float((chosen > rejected).mean())

    def pairs(self, label: str) -> tuple[Pairs, Pairs]:
        """Tokenised pairs for training and for validation."""
        return self.tokens["train"], self.tokens["validation"]

    def questions(self) -> list[str]:
        """The prompts that online training answers."""
        return [row["prompt"] for row in self.texts["train"]]

    def reward(self, label: str, *, learned: bool) -> Callable[..., list[float | None]]:
        """The reward that RLOO follows: the judge's."""
        if not learned:
            raise ValueError("learned = False: no program scores real responses; take rloo_learned")

        def reward(
            prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
        ) -> list[float | None]:
            ended = [ids[-1] == self.tokenizer.eos_token_id for ids in completion_ids]
            return self.judged(prompts, completions, ended).tolist()

        return reward

    def accuracy(self, policy: Any) -> float:
        """The share of held-out pairs whose chosen response gained more log-probability than the rejected one."""
        if self.held.reference is None:
            reference = copy.deepcopy(self.reference)
            add_pair_scoring(reference)
            self.held.reference = pair_logps(reference, self.held, batch_size=EVALUATION_BATCH)
        add_pair_scoring(policy)
        now = pair_logps(policy, self.held, batch_size=EVALUATION_BATCH)
        win, lose = (a - b for a, b in zip(now, self.held.reference, strict=True))
        return float(((win > lose) + 0.5 * (win == lose)).mean())

    def evaluate(self, label: str, policy: Any) -> dict[str, float]:
        """Scores of a policy on the held-out pairs, and of its responses to their prompts."""
        samples = scoring.sample(
            policy, self.tokenizer, self.prompts, seed=self.seed, max_new_tokens=self.setup.new_tokens
        )
        return {
            "read": self.read,
            **{part: len(rows) for part, rows in self.texts.items()},
            "judge_accuracy": self.judge_accuracy,
            "accuracy": self.accuracy(policy),
            "reward": float(self.judged(samples.prompts, samples.responses, samples.ended).mean()),
            "kl": float(scoring.kl(policy, self.reference, self.tokenizer, samples, batch_size=128).mean()),
            "length": float(np.mean([len(ids) for ids in samples.response_ids])),
            "ended": float(np.mean(samples.ended)),
        }


def table3(
    file: Path,
    seeds: Iterable[int],
    setup: RealSetup | None = None,
    *,
    methods: Sequence[str] = REAL_METHODS,
    folder: Path,
    root: Path | None = None,
) -> None:
    """Record ``llm/tuning-table3``, then ``llm/table3`` and ``llm/curves-table3``, going on where they end.

    Parameters
    ----------
    file, setup
        As in `RealWorld`.
    seeds, methods, folder, root
        As in `bdpo.llm.experiment.table2`.
    """
    setup = setup or RealSetup()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    same = {"setup": dataclasses.asdict(setup), "file": file.name, "sha256": digest, "rates": list(RATES)}
    trials = Record("llm/tuning-table3", same, root)
    world = RealWorld(file, setup, TUNING_SEED, "validation", folder=folder)
    best = tuned(world, LABEL, trials.rows, trials.save, REAL_METHODS, by="reward")
    same["chosen"] = {method: list(pair) for method, pair in best.items()}
    tables = [Record(f"llm/{name}", same, root) for name in ("table3", "curves-table3")]
    record(lambda seed: RealWorld(file, setup, seed, folder=folder), LABEL, seeds, methods, best, *tables)


def main(arguments: Sequence[str] | None = None) -> None:
    """Record Table 3's experiment."""
    parser = options("bdpo.llm.real", "Record the experiment of Table 3.", "_build/llm")
    parser.add_argument("file", type=Path, help="a preference file with one label")
    given = parser.parse_args(arguments)
    table3(given.file, range(given.seeds), methods=given.methods or REAL_METHODS, folder=given.work)


if __name__ == "__main__":
    main()
