"""Supervised fine-tuning on prompts and responses: the step before preferences, which gives the reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from bdpo.llm.pairs import tokenize
from bdpo.llm.trainer import FiniteWeights, TrainingDiverged, whereabouts

IGNORED = -100  # the label of a token that is not scored


class Responses(Dataset):
    """Tokenised prompts with responses; only the tokens of the response, with its end, are labels.

    Parameters
    ----------
    rows
        Mappings with the texts ``prompt`` and ``response``, or ``prompt`` and ``chosen``.
    tokenizer, max_length, truncation
        As in `bdpo.llm.pairs.tokenize`.

    Raises
    ------
    ValueError, TypeError
        As `bdpo.llm.pairs.tokenize`; for rows without a response.
    """

    def __init__(
        self, rows: Iterable[Mapping[str, Any]], tokenizer: Any, max_length: int, truncation: str = "error"
    ) -> None:
        rows = list(rows)
        answer = next((name for name in ("response", "chosen") if rows and name in rows[0]), "")
        if rows and (not answer or "prompt" not in rows[0]):
            raise ValueError(f"row 0 has the columns {', '.join(rows[0])}; it needs prompt, and response or chosen")
        twice = [{"prompt": row["prompt"], "chosen": row[answer], "rejected": row[answer]} for row in rows]
        self.pairs = tokenize(twice, tokenizer, max_length=max_length, truncation=truncation)
        self.counts = self.pairs.counts

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"prompt": self.pairs.prompts[row], "response": self.pairs.chosen[row]}


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Items of `Responses` as one batch, padded on the right: ``input_ids``, ``attention_mask``, ``labels``."""
    rows = [([*item["prompt"], *item["response"]], len(item["prompt"])) for item in items]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for k, (tokens, start) in enumerate(rows):
        ids[k, : len(tokens)] = torch.tensor(tokens)
        mask[k, : len(tokens)] = 1
        labels[k, start : len(tokens)] = ids[k, start : len(tokens)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class StopsAtNaN(FiniteWeights):
    """Ends a run whose loss or weights are no longer finite, before anything is written from it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name in ("loss", "eval_loss", "grad_norm"):
            if not math.isfinite(float((logs or {}).get(name, 0.0))):
                raise TrainingDiverged(f"{name} is {logs[name]} {whereabouts(args, state)}")


def trainer(
    model: Any,
    args: TrainingArguments,
    rows: Responses | Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int = 0,
    truncation: str = "error",
    validation: Responses | Iterable[Mapping[str, Any]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """A ``transformers.Trainer`` that minimises the mean cross-entropy of the responses' tokens.

    Parameters
    ----------
    model, args
        As ``Trainer`` takes them.
    rows, tokenizer, max_length, truncation
        As in `Responses`; or `Responses` themselves, which are taken as they are.
    validation
        Of the same form, or None.
    callbacks
        Further callbacks.

    Returns
    -------
    transformers.Trainer
        Ready to ``train()``. A loss that is not finite raises `TrainingDiverged`.
    """
    args.remove_unused_columns = False
    args.logging_nan_inf_filter = False

    def read(rows: Any) -> Responses:
        return rows if isinstance(rows, Responses) else Responses(rows, tokenizer, max_length, truncation)

    return Trainer(
        model,
        args,
        collate,
        train_dataset=read(rows),
        eval_dataset=None if validation is None else read(validation),
        processing_class=tokenizer,
        callbacks=[*callbacks, StopsAtNaN()],
    )
