"""The adapter for TRL: plain DPO through it is TRL's own, step by step."""

import copy
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # TRL would report its use over the network

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from bdpo.llm.trl_adapter import ObjectiveTrainer

# TRL asks transformers for a property under its older name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "mat",
    "home",
    "fast",
    "slow",
    "and",
    "big",
]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


ROWS = [
    {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " ran"},
    {"prompt": "a big dog", "chosen": " ran home", "rejected": " sat on a slow mat and ran"},
    {"prompt": "the slow cat and the dog", "chosen": " ran fast", "rejected": " sat"},
    {"prompt": "a dog", "chosen": " sat", "rejected": " ran slow and fast home"},
]


def train(kind: type[DPOTrainer], folder: Path, config: dict[str, Any] | None = None, **kwargs: Any) -> DPOTrainer:
    arguments = DPOConfig(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "beta": 0.3,
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": False,
            "activation_checkpointing": False,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        | (config or {})
    )
    start = model()
    if "peft_config" not in kwargs and not arguments.precompute_ref_log_probs:
        kwargs["ref_model"] = copy.deepcopy(start)
    trainer = kind(start, args=arguments, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer(), **kwargs)
    trainer.train()
    return trainer


def logged(trainer: DPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: DPOTrainer) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


@pytest.mark.parametrize(
    ("config", "kwargs"),
    [
        ({}, {}),
        ({"precompute_ref_log_probs": True}, {}),
        ({}, {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True)}),
        ({"gradient_accumulation_steps": 2, "max_steps": 5}, {}),
    ],
    ids=["online reference", "precomputed reference", "adapter", "accumulation"],
)
def test_plain_dpo_does_not_drift_from_trl(config: dict[str, Any], kwargs: dict[str, Any], tmp_path: Path) -> None:
    theirs = train(DPOTrainer, tmp_path, config, **kwargs)
    ours = train(ObjectiveTrainer, tmp_path, config, **kwargs)
    assert len(logged(ours, "loss")) >= 5
    assert logged(ours, "loss")[0] != logged(ours, "loss")[-1]
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), abs=2e-5), name
    assert (weights(ours) - weights(theirs)).abs().max() < 1e-5
    assert set(logged(ours, "lambda")) == {0.5}


def test_another_objective_is_another_trajectory(tmp_path: Path) -> None:
    dpo = train(ObjectiveTrainer, tmp_path)
    bdpo = train(ObjectiveTrainer, tmp_path, loss="bdpo")
    assert bdpo.objective.settings["beta"] == 0.3, "that of DPOConfig"
    assert (weights(dpo) - weights(bdpo)).abs().max() > 1e-3
    assert len(set(logged(bdpo, "lambda"))) > 1


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing = 0\.1 has no effect"):
        train(ObjectiveTrainer, tmp_path, {"label_smoothing": 0.1})
    with pytest.raises(ValueError, match="no setting 'gamma'"):
        train(ObjectiveTrainer, tmp_path, loss="bdpo", loss_settings={"gamma": 1.0})
    with pytest.raises(ValueError, match="'reward'"):
        train(ObjectiveTrainer, tmp_path, loss="reward_bt")
