"""Preference optimisation of language models: `PreferenceTrainer`, on transformers' ``Trainer``.

Differences to a trainer that scores two rows a pair: the prompt is read once (`bdpo.llm.pairs`), the loss is any pair
objective of `bdpo.losses` by name, and the reference's log-probs are computed once, before the first step, unless asked
otherwise. A global batch of n pairs gives the same step however it is split over accumulation steps and processes:
every pair weighs 1/n, also in a last, smaller batch. (β-DPO and KTO of pairs look at the pairs of one forward pass
together, and are the exceptions.)

The first step's reference is the model that the trainer was given, a `ref_model`, or for PEFT the model without its
adapter. The log-probs are kept in ``output_dir/reference.safetensors``, so that a resumed run has the same reference.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from bdpo.llm.objective import METRICS, Objective, mean_metrics
from bdpo.llm.pairs import PairCollator, Pairs, add_pair_scoring, check_model, score, tokenize

REFERENCES = ("precomputed", "online")


class TrainingDiverged(ArithmeticError):
    """Loss or weights are no longer finite. The message says where, and which checkpoint was the last good one."""


@dataclass
class PreferenceArguments(TrainingArguments):
    """The arguments of transformers' ``Trainer`` and those of preference optimisation.

    Parameters
    ----------
    loss
        A pair objective of `bdpo.losses.LOSSES` by name.
    loss_settings
        Its settings, such as ``{"beta": 0.1}``. What is left out has the loss's own default, which for the paper's six
        is that of its synthetic experiment, beta = 1: too large for sums of log-probs over sentences.
    reference
        ``"precomputed"``: the reference scores all pairs before the first step and is not needed afterwards.
        ``"online"``: it scores every batch again; needs a `ref_model` or a PEFT model. Ignored by losses without one.
    share_prompt
        Whether the two responses share the computation of their prompt; see `bdpo.llm.pairs`.
    max_length
        In tokens, prompt and longer response together; the model's context if None.
    truncation
        ``"error"``, ``"prompt"``, ``"response"`` or ``"drop"``: what to do with a longer pair; see
        `bdpo.llm.pairs.tokenize`.
    momentum
        Of the running statistics of the margin; see `bdpo.llm.objective.Objective`.
    """

    loss: str = field(default="dpo", metadata={"help": "a pair objective of bdpo.losses by name"})
    loss_settings: dict[str, Any] | str = field(
        default_factory=dict, metadata={"help": 'settings of the loss: {"beta": 0.1}'}
    )
    reference: str = field(default="precomputed", metadata={"help": " or ".join(REFERENCES)})
    share_prompt: bool = field(default=True, metadata={"help": "compute the prompt once for both responses"})
    max_length: int | None = field(default=None, metadata={"help": "in tokens; the model's context if not given"})
    truncation: str = field(default="error", metadata={"help": "error, prompt, response or drop"})
    momentum: float = field(default=0.9, metadata={"help": "of the running statistics of the margin"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss_settings = _as_dict(self.loss_settings)
        if self.reference not in REFERENCES:
            raise ValueError(f"reference = {self.reference!r}: choose one of {', '.join(REFERENCES)}")
        self.remove_unused_columns = False  # the columns are those that PairCollator reads
        self.logging_nan_inf_filter = False  # a loss that is not finite stops the run instead
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every weight of a decoder is used in every step


class PreferenceTrainer(Trainer):
    """Train a causal language model on pairs of responses.

    Parameters
    ----------
    model
        A causal language model of transformers, or a PeftModel around one.
    args
        `PreferenceArguments`.
    train_dataset, eval_dataset
        Rows for `bdpo.llm.pairs.tokenize` (a list or a ``datasets.Dataset``), or `Pairs`, which are taken as they are;
        for evaluation also a dict of such.
    processing_class
        The tokenizer; not needed for `Pairs`.
    ref_model
        The reference, if it is not the model as given or the PEFT model without its adapter.
    callbacks, optimizers
        As in ``Trainer``.

    Raises
    ------
    ValueError
        For an unknown loss or setting, a reference that is needed and missing, a model or a combination that is not
        supported, rows that do not fit; each message says what to change. See also `check_model`.

    Notes
    -----
    ``train(resume_from_checkpoint=...)`` takes the reference from the run's ``output_dir``. A loss or weights that
    are not finite raise `TrainingDiverged` before a checkpoint is written from them.
    """

    args: PreferenceArguments
    model: Any
    objective: Objective

    def __init__(
        self,
        model: Any,
        args: PreferenceArguments,
        train_dataset: Pairs | Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        ref_model: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        self.objective = Objective(args.loss, _as_dict(args.loss_settings), momentum=args.momentum)
        self.with_adapter = hasattr(model, "disable_adapter")
        _check_arguments(args, self.objective, model, ref_model)
        check_model(model, args.share_prompt)
        add_pair_scoring(model)
        if ref_model is not None:
            check_model(ref_model, args.share_prompt)
            add_pair_scoring(ref_model.requires_grad_(False))

        def pairs(rows: Any) -> Pairs | None:
            return rows if rows is None else self._pairs(rows, processing_class, args, model)

        super().__init__(
            model,
            args,
            PairCollator(args.share_prompt),
            train_dataset=pairs(train_dataset),
            eval_dataset={k: pairs(v) for k, v in eval_dataset.items()}
            if isinstance(eval_dataset, dict)
            else pairs(eval_dataset),
            processing_class=processing_class,
            compute_metrics=_mean_metrics,
            callbacks=[*(callbacks or []), _Guard(self)],
            optimizers=optimizers,
        )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process: start one process each, torchrun --nproc_per_node "
                f"{self.args.n_gpu}, or show this one a single GPU with CUDA_VISIBLE_DEVICES=0"
            )
        _check_distribution(self.accelerator, args)
        self.ref_model = ref_model
        if ref_model is not None:
            ref_model.eval()
            # Whole on every device, also beside a model that is sharded.
            self.ref_model = self.accelerator.prepare_model(ref_model.to(self.args.device), evaluation_mode=True)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole batch
        self.model_accepts_loss_kwargs = False
        self.label_names = []
        self._seen: list[Tensor] = []
        self._resumed = False

    @staticmethod
    def _pairs(rows: Any, tokenizer: Any, args: PreferenceArguments, model: Any) -> Pairs:
        if isinstance(rows, Pairs):
            return rows
        if tokenizer is None and "prompt_ids" not in next(iter(rows), {"prompt_ids": None}):
            raise ValueError("rows of text need a tokenizer: pass processing_class")
        context = getattr(model.config, "max_position_embeddings", None)
        length = args.max_length or context
        if length is None:
            raise ValueError("config.max_position_embeddings is not set: pass max_length")
        if context is not None and length > context:
            raise ValueError(f"max_length = {length}: the model's context is {context} tokens")
        return tokenize(rows, tokenizer, max_length=length, truncation=args.truncation)

    # ------------------------------------------------------------ a step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        """The batches of one optimiser step, and how many pairs they hold over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(len(batch["chosen_lengths"]) for batch in batches)
        if self.accelerator.num_processes > 1:
            count = int(self.accelerator.reduce(torch.tensor(count, device=device), "sum"))
        return batches, count

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of the pairs; in training, their share of the mean over the whole batch.

        ``return_outputs`` adds the metrics, [pairs, len(METRICS)].
        """
        logps = model(pairs=inputs)
        if not torch.isfinite(logps.detach()).all():
            raise TrainingDiverged(f"log-probs of the policy are not finite {whereabouts(self.args, self.state)}")
        win, lose = logps.chunk(2)
        ref_win, ref_lose = self._reference_logps(inputs)
        losses, metrics = self.objective(
            win,
            lose,
            ref_win,
            ref_lose,
            (inputs["chosen_lengths"], inputs["rejected_lengths"]),
            gather=self.accelerator.gather,
            learn=model.training,
        )
        loss = losses.mean()
        if not math.isfinite(value := loss.item()):
            raise TrainingDiverged(f"the loss is {value} {whereabouts(self.args, self.state)}")
        if num_items_in_batch is not None:  # processes average their gradients, accumulation steps add theirs
            loss = losses.sum() * (self.accelerator.num_processes / num_items_in_batch)
            self._seen.append(metrics)
        return (loss, metrics) if return_outputs else loss

    def _reference_logps(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        if not self.objective.needs_reference:
            return None, None
        if "ref_chosen_logps" in inputs:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        model, context = self._reference_model()
        with torch.no_grad(), context:
            win, lose = model(pairs=inputs).chunk(2)
        return win, lose

    def _reference_model(self) -> tuple[Any, contextlib.AbstractContextManager]:
        """The model that gives the reference's log-probs, and the context in which it does."""
        if self.ref_model is not None:
            return self.ref_model, contextlib.nullcontext()
        if self.with_adapter:
            return self.model_wrapped, self.accelerator.unwrap_model(self.model_wrapped).disable_adapter()
        return self.model_wrapped, contextlib.nullcontext()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As ``Trainer``'s, of all pairs: a last, smaller batch is left out of training alone, if at all."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop

    def prediction_step(
        self, model: Any, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Tensor, Tensor]:
        """The metrics of the pairs, the loss among them, in the place of logits: pairs that even out the batches of
        several processes are then left out by ``Trainer``."""
        with torch.no_grad():
            _, metrics = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        return None, metrics, metrics.new_ones(len(metrics))

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the count of parameters alone takes longer than a step of a small model. See bdpo.llm.memory."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean metrics of the pairs since the last time, over all processes."""
        if self._seen:
            logs = {**logs, **mean_metrics(self._seen, self.accelerator.reduce)}
            self._seen.clear()
        super().log(logs, start_time)

    # ------------------------------------------------------------ the reference, and coming back to a run

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; a resumed run has the reference and the running statistics of the first."""
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = str(last_checkpoint(str(self.args.output_dir)))
        self._resumed = bool(checkpoint)
        if checkpoint and self.objective.uses_statistics:
            self.objective.state = json.loads((Path(checkpoint) / "objective.json").read_text())
        return super().train(checkpoint or None, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As ``Trainer.evaluate``, of rows or `Pairs`."""
        if eval_dataset is not None and not isinstance(eval_dataset, str | Pairs | dict):
            eval_dataset = self._pairs(eval_dataset, self.processing_class, self.args, self.model)
        if not self.is_in_train:
            self._prepare_reference(eval_dataset if isinstance(eval_dataset, Pairs) else self.eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _prepare_reference(self, *datasets: Any, file: Path | None = None) -> None:
        """Give all pairs their reference log-probs, where that has to be done beforehand."""
        if not self.objective.needs_reference or self.args.reference == "online":
            return
        found = [d for part in datasets for d in (part.values() if isinstance(part, dict) else [part]) if d is not None]
        missing = [pairs for pairs in found if pairs.reference is None]
        if not missing:
            return
        digests = [_digest(pairs) for pairs in missing]
        stored = _read_reference(file) if file is not None and self._resumed else {}
        if file is not None and self._resumed and not set(digests) <= set(stored):
            raise ValueError(
                f"{file} does not hold the reference of these pairs: resume with the data of the first run"
            )
        changed = self.state.global_step > 0 and self.ref_model is None and not self.with_adapter
        if changed and not stored:
            raise ValueError(
                "the model was trained already and is no reference for new pairs: "
                "pass them as eval_dataset from the beginning, or pass a ref_model"
            )
        model, context = self._reference_model()
        if not stored:
            for pairs, digest in zip(missing, digests, strict=True):
                stored[digest] = np.stack(
                    score(
                        model,
                        pairs,
                        batch_size=self.args.per_device_eval_batch_size,
                        share_prompt=self.args.share_prompt,
                        progress=None if self.args.disable_tqdm else "Reference",
                        ranks=(self.accelerator.process_index, self.accelerator.num_processes),
                        gather=self.accelerator.gather,
                        context=context,
                    )
                )
            if file is not None and self.is_world_process_zero():
                _write_reference(file, stored)
        for pairs, digest in zip(missing, digests, strict=True):
            pairs.reference = (stored[digest][0], stored[digest][1])


# ---------------------------------------------------------------- what must not go on, and what can be gone on with


def _whole_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints in their order; one in whose writing the run was stopped lacks the trainer's state, its last file."""
    whole = (state.parent for state in Path(folder).glob("checkpoint-*/trainer_state.json"))
    return sorted((path for path in whole if path.name[11:].isdecimal()), key=lambda path: int(path.name[11:]))


def last_checkpoint(folder: str | Path) -> Path:
    """The last checkpoint in a folder that was written whole.

    Raises
    ------
    ValueError
        If there is none.
    """
    if not (whole := _whole_checkpoints(folder)):
        raise ValueError(f"no checkpoint in {folder} was written whole: begin anew, in another folder")
    return whole[-1]


def whereabouts(args: TrainingArguments, state: TrainerState) -> str:
    """Where a run stands, the last checkpoint that it can go back to, and what usually helps."""
    whole = _whole_checkpoints(str(args.output_dir))
    kept = f"the last good checkpoint is {whole[-1]}" if whole else "no checkpoint was written yet"
    loss = f"loss {args.loss!r}, " if isinstance(args, PreferenceArguments) else ""
    return (
        f"at step {state.global_step} ({loss}learning rate {args.learning_rate:g}); {kept}. "
        "A lower learning rate, a longer warm-up or a lower max_grad_norm usually helps"
    )


class FiniteWeights(TrainerCallback):
    """Lets no weights be saved that are not finite."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self._check(args, state, kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check(args, state, kwargs["model"])

    def _check(self, args: Any, state: Any, model: Any) -> None:
        for name, weight in model.named_parameters():
            if weight.requires_grad and not torch.isfinite(weight.detach()).all():
                raise TrainingDiverged(f"{name} is not finite {whereabouts(args, state)}")


class _Guard(FiniteWeights):
    """Prepares the reference when the model is in place, and keeps the objective's running statistics."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        file = Path(args.output_dir) / "reference.safetensors"
        trainer._prepare_reference(trainer.train_dataset, trainer.eval_dataset, file=file)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.objective.uses_statistics and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if folder.is_dir():
                (folder / "objective.json").write_text(json.dumps(self.trainer.objective.state))


def _mean_metrics(result: EvalPrediction) -> dict[str, float]:
    metrics = np.asarray(result.predictions)
    known = ~np.isnan(metrics)
    return {
        name: float(metrics[known[:, k], k].mean(dtype=np.float64))
        for k, name in enumerate(METRICS)
        if known[:, k].any()
    }


def _as_dict(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """Settings as a mapping; the command line gives them as JSON."""
    return json.loads(value) if isinstance(value, str) else dict(value or {})


def _check_arguments(args: PreferenceArguments, objective: Objective, model: Any, ref_model: Any) -> None:
    adapter = hasattr(model, "disable_adapter")
    if adapter and getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "a prompt-learning adapter changes the positions of the tokens: use LoRA or another adapter of weights"
        )
    if ref_model is model:
        raise ValueError(
            "ref_model is the model itself and would be trained with it: pass copy.deepcopy(model), or leave it out"
        )
    if args.reference == "online" and objective.needs_reference and ref_model is None and not adapter:
        raise ValueError(
            f"loss {args.loss!r} needs a reference at every step: pass ref_model, or a PEFT model, or set "
            "reference='precomputed'"
        )
    if args.gradient_checkpointing and _as_dict(args.gradient_checkpointing_kwargs).get("use_reentrant"):
        raise ValueError(
            "gradient checkpointing has to be the one without re-entrance: drop use_reentrant=True from its kwargs"
        )
    if args.label_smoothing_factor:
        raise ValueError("label_smoothing_factor is for token labels: use loss='conservative_dpo' or 'robust_dpo'")


def _check_distribution(accelerator: Any, args: PreferenceArguments) -> None:
    kind = accelerator.distributed_type
    if kind == "DEEPSPEED":
        raise ValueError(
            "DeepSpeed: on their way into the loss, transformers would round the reference's log-probs, which are sums "
            "over many tokens, to the 8 bits of bfloat16; use FSDP, which shards as much as ZeRO-3"
        )
    if (args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true") and kind != "FSDP":
        raise ValueError(
            f"FSDP was asked for, but accelerate runs {kind.value} instead: it starts FSDP for several processes that "
            "have a GPU each, and not otherwise"
        )


def _digest(pairs: Pairs) -> str:
    """What the pairs are, token by token."""
    total = hashlib.sha256()
    for lists in (pairs.prompts, pairs.chosen, pairs.rejected):
        for ids in lists:
            total.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
    return total.hexdigest()


def _read_reference(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        return {}
    with safe_open(file, "numpy") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def _write_reference(file: Path, values: dict[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(values, half)
        half.replace(file)
    finally:
        half.unlink(missing_ok=True)
