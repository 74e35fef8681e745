"""The objectives of `bdpo.losses` inside TRL's ``DPOTrainer``, for those who train with TRL. Needs the extra ``trl``.

Only ``compute_loss`` is replaced, which is the hook that TRL documents for a change of objective, and ``log``, to add
the metrics. Datasets, truncation, adapters, references and distribution remain TRL's; only tokens of responses are
scored, as in `bdpo.llm.pairs`, but TRL's batches repeat the prompt, so it is computed twice. `bdpo.llm.trainer` is
faster and needs less memory.

TRL reports its use over the network unless ``HF_HUB_OFFLINE`` or ``HF_HUB_DISABLE_TELEMETRY`` is set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from bdpo.llm.objective import Objective, mean_metrics
from bdpo.llm.pairs import add_pair_scoring, check_model

_UNUSED = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "label_smoothing": 0.0,
    "use_weighting": False,
}


class ObjectiveTrainer(DPOTrainer):
    """TRL's ``DPOTrainer`` with any pair objective of `bdpo.losses`.

    Parameters
    ----------
    loss
        The objective by name.
    loss_settings
        Its settings. ``beta``, if the objective has one and it is not given here, is that of the ``DPOConfig``.
    momentum
        As in `bdpo.llm.objective.Objective`.
    args, kwargs
        As in ``DPOTrainer``.

    Raises
    ------
    ValueError
        For an unknown loss or setting; for settings of ``DPOConfig`` that would shape TRL's own loss and have no effect
        here; for images, an auxiliary loss of experts, DeepSpeed, and a PeftModel (pass the model and a `peft_config`).
    """

    args: DPOConfig
    model: Any
    ref_model: Any
    objective: Objective

    def __init__(
        self,
        *args: Any,
        loss: str = "dpo",
        loss_settings: Mapping[str, Any] | None = None,
        momentum: float = 0.9,
        **kwargs: Any,
    ) -> None:
        Objective(loss, loss_settings, momentum=momentum)  # a wrong name or setting is refused before a model is loaded
        super().__init__(*args, **kwargs)
        for name, default in _UNUSED.items():
            if (value := getattr(self.args, name, default)) != default:
                raise ValueError(
                    f"{name} = {value!r} has no effect on loss {loss!r}: leave it out and use loss_settings"
                )
        settings = dict(loss_settings or {})
        if "beta" in Objective(loss).settings:
            settings.setdefault("beta", self.args.beta)
        self.objective = Objective(loss, settings, momentum=momentum)
        if self._is_vision_dataset:
            raise ValueError("pairs with images are not supported")
        if self.accelerator.distributed_type == "DEEPSPEED":
            raise ValueError("DeepSpeed is not supported: use FSDP")
        model = self.accelerator.unwrap_model(self.model)
        if "ref" in getattr(model, "peft_config", {}):
            raise ValueError("a PeftModel is given: merge it, and pass the model and a peft_config")
        for each in (model, self.ref_model and self.accelerator.unwrap_model(self.ref_model)):
            if each is not None:
                check_model(each, share_prompt=False)
                add_pair_scoring(each)
        self._seen: dict[bool, list[Tensor]] = {True: [], False: []}

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean of the losses; with ``return_outputs`` also the metrics, [pairs, len(METRICS)]."""
        batch = _as_pairs(inputs)
        win, lose = model(pairs=batch).chunk(2)
        ref_win, ref_lose = self._reference(inputs, batch)
        lengths = (batch["chosen_lengths"], batch["rejected_lengths"])
        training = self.model.training
        losses, metrics = self.objective(
            win, lose, ref_win, ref_lose, lengths, gather=self.accelerator.gather, learn=training
        )
        self._seen[training].append(metrics)
        return (losses.mean(), metrics) if return_outputs else losses.mean()

    def _reference(self, inputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> tuple[Any, Any]:
        if not self.objective.needs_reference:
            return None, None
        if "ref_chosen_logps" in inputs:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        model, context = self.ref_model, contextlib.nullcontext()
        if model is None:
            model, context = self.model, self.accelerator.unwrap_model(self.model).disable_adapter()
        with torch.no_grad(), context, self.accelerator.autocast():
            win, lose = model(pairs=batch).chunk(2)
        return win, lose

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean metrics of the batches since the last time, over all processes."""
        if seen := self._seen[self.model.training]:
            prefix = "" if self.model.training else "eval_"
            logs.update({prefix + name: mean for name, mean in mean_metrics(seen, self.accelerator.reduce).items()})
            seen.clear()
        super().log(logs, start_time)


def _as_pairs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch of TRL, rows of chosen and then of rejected responses, as a batch of `bdpo.llm.pairs`."""
    ids, scored = inputs["input_ids"], inputs["completion_mask"].bool()
    owners, at = scored.nonzero(as_tuple=True)
    chosen, rejected = scored.sum(1).chunk(2)
    return {
        "chosen_lengths": chosen,
        "rejected_lengths": rejected,
        "input_ids": ids,
        "segments": inputs["attention_mask"] + scored,
        "targets": ids[scored],
        "sources": owners * ids.shape[1] + at - 1,
        "owners": owners,
    }
