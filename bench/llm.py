"""A training step of `PreferenceTrainer` beside one of TRL's `DPOTrainer`: time, memory, and the same losses.

    python bench/llm.py                print the table, about four minutes
    python bench/llm.py --rounds 2     a quick look
    python bench/llm.py --record       also write the raw rows to book/results/bench

A step is collating 8 pairs, plain DPO forward and backward, clipping, AdamW; the reference's log-probs are known.
Prompts have 64 to 128 tokens and responses 16 to 32, the model is a Llama with four layers of width 192. Both trainers
begin with the same weights, see the same pairs, and must print the same losses in all rounds. Memory is the growth of a
child process's high-water mark of resident memory over one step, gradients and AdamW's moments included. On a machine
with a GPU this still measures the CPU.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # TRL would report its use over the network

from _lib import measure  # first: it fixes the number of threads

# isort: split
import datasets
import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

from bdpo import results
from bdpo.llm.trainer import PreferenceArguments, PreferenceTrainer

PAIRS, PROMPT, RESPONSE, WIDTH = 8, 128, 32, 192
VOCABULARIES = (512, 32_000)
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": PAIRS,
    "bf16": False,
    "activation_checkpointing": False,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
VARIANTS = ("trl", "ours, two rows", "ours")


def model(vocabulary: int, width: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    names = ["<pad>", "<s>", "</s>", *map(str, range(3, vocabulary))]
    words = Tokenizer(models.WordLevel({name: k for k, name in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def rows(vocabulary: int, prompt: int, response: int) -> list[dict[str, str]]:
    draw = random.Random(1)
    columns = {"prompt": prompt, "chosen": response - 1, "rejected": response - 1}  # an end of sequence is added

    def text(longest: int) -> str:
        return "".join(f" {draw.randrange(3, vocabulary)}" for _ in range(draw.randint(longest // 2, longest)))

    return [{name: text(length) for name, length in columns.items()} for _ in range(PAIRS)]


def step_of(
    variant: str, vocabulary: int, folder: str, *, width: int = WIDTH, prompt: int = PROMPT, response: int = RESPONSE
) -> Callable[[], float]:
    """A function that makes one step and returns its loss."""
    net, data = model(vocabulary, width), rows(vocabulary, prompt, response)
    tokenizer, extra = tokenizer_of(vocabulary), {}
    trainer: DPOTrainer | PreferenceTrainer
    if variant == "trl":
        trl = DPOConfig(output_dir=folder, beta=0.1, precompute_ref_log_probs=True, **SETTINGS)
        trainer = DPOTrainer(net, args=trl, train_dataset=datasets.Dataset.from_list(data), processing_class=tokenizer)
    else:
        ours = PreferenceArguments(
            output_dir=folder, loss="dpo", loss_settings={"beta": 0.1}, share_prompt=variant == "ours", **SETTINGS
        )
        trainer = PreferenceTrainer(net, ours, data, processing_class=tokenizer)
        trainer._prepare_reference(trainer.train_dataset)
        extra = {"num_items_in_batch": PAIRS}
    trainer.current_gradient_accumulation_steps = 1  # what the training loop sets
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    items = [trainer.train_dataset[k] for k in range(PAIRS)]

    def step() -> float:
        loss = trainer.training_step(net, trainer.data_collator(items), **extra)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def compare(vocabulary: int, rounds: int, folder: str) -> pd.DataFrame:
    losses: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    steps = {variant: step_of(variant, vocabulary, folder) for variant in VARIANTS}
    runs = {variant: lambda variant=variant: losses[variant].append(steps[variant]()) for variant in VARIANTS}
    seconds = measure.interleave(runs, rounds=rounds, title=f"vocabulary {vocabulary}")
    apart = max(abs(a - b) for name in VARIANTS for a, b in zip(losses[name], losses["trl"], strict=True))
    if apart > 1e-4 or losses["trl"][0] == losses["trl"][-1]:
        raise SystemExit(f"the losses are {apart} apart: {losses}")
    peaks = {name: measure.peak_of_child(__file__, "--child", str(vocabulary), name) for name in VARIANTS}
    for name in VARIANTS:
        middle, low, high = measure.ratio(seconds, "trl", name)
        spread, step = f"{middle:.2f} ({low:.2f}–{high:.2f})", pd.Series(seconds[name]).median() * 1e3
        print(f"{vocabulary:10,} {name:15} {step:9.0f} {spread:>24}", end=" ")
        print(f"{peaks[name]:9.0f} {peaks[name] / peaks['trl']:6.2f} {apart:9.1g}", flush=True)
    return pd.DataFrame(
        [(vocabulary, n, k, s, losses[n][k + 1], peaks[n]) for n in VARIANTS for k, s in enumerate(seconds[n])],
        columns=["vocabulary", "variant", "round", "seconds", "loss", "peak_mib"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="rounds that are counted, at least 2")
    parser.add_argument("--record", action="store_true", help="write the raw rows to book/results/bench")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error(f"--rounds is {given.rounds}; at least 2 are needed for a spread")
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # TRL asks by the older name
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        if given.child:
            variant, vocabulary = given.child[1], int(given.child[0])
            measure.growth(
                step_of(variant, vocabulary, folder), warm=step_of(variant, 64, folder, width=24, prompt=4, response=4)
            )
            return
        start = time.perf_counter()
        print(f"{'vocabulary':>10} {'trainer':15} {'step, ms':>9} {'steps/s × TRL (quart.)':>24} ", end="")
        print(f"{'peak, MiB':>9} {'ratio':>6} {'|Δloss|':>9}")
        frame = pd.concat([compare(size, given.rounds * (2 if size < 1000 else 1), folder) for size in VOCABULARIES])
    if given.record:
        shape = {"pairs": PAIRS, "prompt_tokens": PROMPT, "response_tokens": RESPONSE, "layers": 4, "width": WIDTH}
        parameters = {**shape, "rounds": given.rounds, "threads": 1, "clock": "CPU seconds of the process"}
        results.write(frame, "bench/llm", parameters=parameters, seconds=time.perf_counter() - start, seeds=[0, 1])


if __name__ == "__main__":
    main()
