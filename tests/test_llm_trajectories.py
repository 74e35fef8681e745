"""One global batch, one trajectory: however it is split over accumulation steps, processes and interruptions.

The two processes of the second half run this very file, under torchrun with gloo; they write what the tests compare.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import LlamaConfig, LlamaForCausalLM

from bdpo.llm.pairs import Pairs
from bdpo.llm.trainer import PreferenceArguments, PreferenceTrainer, _check_distribution

LOSS, WEIGHT = (
    1e-6,
    1e-5,
)  # how far two orders of the same float32 sums may lie apart, after four steps of AdamW at 0.01


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def pairs(count: int, seed: int = 0) -> Pairs:
    draw = random.Random(seed)

    def lists(longest: int) -> list[list[int]]:
        return [[draw.randrange(3, 40) for _ in range(draw.randint(1, longest))] for _ in range(count)]

    return Pairs(lists(6), lists(5), lists(5))


def run(
    folder: Path,
    size: int,
    steps: int = 1,
    *,
    rows: int = 16,
    trainer: type[PreferenceTrainer] = PreferenceTrainer,
    resume: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Two epochs, of four optimiser steps in all; the losses, the metrics, and the weights at the end."""
    arguments = PreferenceArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": steps,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "eval_strategy": "epoch",
            "save_strategy": "steps",
            "save_steps": 2,
            "loss": "bdpo",
            "loss_settings": {"beta": 0.1},
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        | settings
    )
    if arguments.fsdp:
        # accelerate knows FSDP only on accelerators and would quietly run DDP here; PyTorch's FSDP2 knows CPUs.
        assert arguments.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    # A resumed run may be given any weights, here others than the first run was: all that counts is the checkpoint.
    start = model().apply(_blur) if resume else model()
    reference = model() if arguments.reference == "online" else None
    instance = trainer(start, arguments, pairs(rows), pairs(6, seed=1), ref_model=reference)
    instance.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    weights = instance.accelerator.get_state_dict(instance.model_wrapped)
    history = instance.state.log_history
    logs = [entry for entry in history if "loss" in entry]
    logs += [entry for entry in history if "eval_loss" in entry][-1:]
    return {
        "world": instance.accelerator.num_processes,
        "wrapper": type(instance.model_wrapped).__name__,
        "losses": [entry["loss"] for entry in logs[:-1]],
        "metrics": [{k: v for k, v in x.items() if "/" in k or "lambda" in k or k == "eval_loss"} for x in logs],
        "weights": [] if not weights else torch.cat([weights[k].flatten() for k in sorted(weights)]).tolist(),
    }


def _blur(module: torch.nn.Module) -> None:
    for weight in module.parameters(recurse=False):
        weight.data.add_(0.1)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs are one trajectory."""
    assert len(one["losses"]) == len(other["losses"]) == 4
    assert len(one["weights"]) == len(other["weights"]) > 5000
    close = [
        np.allclose(one["losses"], other["losses"], rtol=0, atol=LOSS),
        np.allclose(one["weights"], other["weights"], rtol=0, atol=WEIGHT),
    ]
    for first, second in zip(one["metrics"], other["metrics"], strict=True):
        assert first.keys() == second.keys() != set()
        close += [abs(first[k] - second[k]) < 1e-4 for k in first]
    return all(close)


# ---------------------------------------------------------------- one process


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    result = run(tmp_path_factory.mktemp("base"), 8)
    assert result["world"] == 1
    assert np.ptp(result["losses"]) > 0.01, "something is learned"
    return result


def test_accumulation_is_the_same_trajectory(base: dict[str, Any], tmp_path: Path) -> None:
    assert same(base, run(tmp_path, 4, 2))


def test_a_ragged_last_batch_weighs_each_pair_once(tmp_path: Path) -> None:
    """14 rows: batches of 8 and 6, the latter as 4 + 2."""
    assert same(run(tmp_path, 8, rows=14), run(tmp_path, 4, 2, rows=14))


def test_the_comparison_notices_another_batch(base: dict[str, Any], tmp_path: Path) -> None:
    """A mean of means, which is what accumulation without a count of the pairs computes, is another trajectory."""

    class MeanOfMeans(PreferenceTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            count = 2 * len(inputs["chosen_lengths"])
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch and count)

    assert same(base, run(tmp_path, 4, 2, trainer=MeanOfMeans)), "equal parts: no difference"
    assert not same(run(tmp_path, 8, rows=14), run(tmp_path, 4, 2, rows=14, trainer=MeanOfMeans))


@pytest.mark.parametrize("loss", ["bdpo", "alpha_dpo"])
def test_a_resumed_run_is_the_run_itself(loss: str, tmp_path: Path) -> None:
    """Bit by bit, reference and running statistics included, though it starts from other weights."""
    whole = run(tmp_path, 8, loss=loss)
    resumed = run(tmp_path, 8, loss=loss, resume=True)
    assert whole["losses"] == resumed["losses"]
    assert whole["weights"] == resumed["weights"]
    assert (tmp_path / "checkpoint-2" / "objective.json").is_file() is (loss == "alpha_dpo")


def test_a_resumed_run_without_its_reference_is_refused(tmp_path: Path) -> None:
    run(tmp_path, 8)
    (tmp_path / "reference.safetensors").unlink()
    with pytest.raises(ValueError, match=r"reference\.safetensors"):
        run(tmp_path, 8, resume=True)


# ---------------------------------------------------------------- two processes


class Bypass(PreferenceTrainer):
    """The trap: log-probs from the module inside the wrapper. Nothing fails, but the gradients are not averaged."""

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(getattr(model, "module", model), *args, **kwargs)


def processes(folder: Path) -> dict[str, Any]:
    """What the two processes run."""
    fsdp = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "ddp": lambda: run(folder / "ddp", 4),
        "ddp accumulated": lambda: run(folder / "accumulated", 2, 2),
        "ddp resumed": lambda: run(folder / "ddp", 4, resume=True),
        "ddp with statistics": lambda: run(folder / "alpha", 4, loss="alpha_dpo"),
        "ddp bypassed": lambda: run(folder / "bypassed", 4, trainer=Bypass),
        "fsdp": lambda: run(folder / "fsdp", 4, **fsdp),
        "fsdp resumed": lambda: run(folder / "fsdp", 4, resume=True, **fsdp),
        "fsdp, online reference": lambda: run(folder / "online", 4, reference="online", **fsdp),
    }
    return {name: go() for name, go in runs.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, folder]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((folder / "results.json").read_text())
    assert {result["world"] for result in results.values()} == {2}, "two processes, not twice one"
    return results


@pytest.mark.parametrize("name", ["ddp", "ddp accumulated", "ddp resumed"])
def test_two_processes_are_the_same_trajectory(base: dict[str, Any], two: dict[str, Any], name: str) -> None:
    assert two[name]["wrapper"] == "DistributedDataParallel"
    assert same(base, two[name])


def test_two_processes_share_their_running_statistics(two: dict[str, Any], tmp_path: Path) -> None:
    assert same(run(tmp_path, 8, loss="alpha_dpo"), two["ddp with statistics"])


@pytest.mark.parametrize("name", ["fsdp", "fsdp resumed", "fsdp, online reference"])
def test_sharded_weights_are_the_same_trajectory(base: dict[str, Any], two: dict[str, Any], name: str) -> None:
    assert two[name]["wrapper"] == "FSDPLlamaForCausalLM"
    assert same(base, two[name])


def test_around_the_wrapper_is_another_trajectory(base: dict[str, Any], two: dict[str, Any]) -> None:
    assert not same(base, two["ddp bypassed"])


def test_fsdp_that_would_be_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate does on CPUs, whether FSDP was asked for by a flag or by ``accelerate launch``."""
    arguments = PreferenceArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    accelerator = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
    _check_distribution(accelerator, arguments)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP was asked for, but accelerate runs MULTI_CPU instead"):
        _check_distribution(accelerator, arguments)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    results = processes(out)
    if int(os.environ["RANK"]) == 0:
        (out / "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
