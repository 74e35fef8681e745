"""What the commands do once their plan is settled: read data, load models, train or score, report."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bdpo.llm import language, memory, preferences, report, scoring, supervised
from bdpo.llm.objective import Objective
from bdpo.llm.pairs import add_pair_scoring, score, tokenize
from bdpo.llm.plan import LABELS, SCRATCH, SETTINGS, Plan, PlanError
from bdpo.llm.trainer import PreferenceArguments, PreferenceTrainer, TrainingDiverged, last_checkpoint
from bdpo.losses import LOSSES

LANGUAGE_ROWS = 4000  # pairs of the controlled language, unless a limit says otherwise
LANGUAGE_DEMONSTRATIONS = 20_000


# ---------------------------------------------------------------- data, tokenizer, model


def load_rows(plan: Plan) -> tuple[list[dict[str, Any]], str]:
    """The rows of a plan, and a sentence on how many were kept and why others were not.

    Raises
    ------
    PlanError, PreferenceError
        If the data need a label, or cannot be read; the message names file, row and fix.
    """
    limit, split, label = plan["limit"] or None, "test" if plan.command == "evaluate" else "train", plan["label"]
    check_label(plan)
    if plan["data"] != "language":
        found = preferences.read(plan["data"], label=label, split=split, limit=limit)
        return found.rows, str(found.report)
    lang = language.Language()
    if plan.command == "sft":
        rows: list[dict[str, Any]] = lang.demonstrations(limit or LANGUAGE_DEMONSTRATIONS, plan["seed"], split)
        return rows, f"language: {len(rows)} demonstrations"
    found = preferences.from_rows(
        lang.pairs(limit or LANGUAGE_ROWS, plan["seed"], split=split), label=label, name="language"
    )
    return found.rows, str(found.report)


def check_label(plan: Plan) -> None:
    """Refuse a label that the data do not have, as far as that is known without reading them.

    Raises
    ------
    PlanError
        Naming the labels to choose from.
    """
    labels = {"language": LABELS, **preferences.HUB_LABELS}.get(plan["data"])
    demonstrated = plan["data"] == "language" and plan.command == "sft"  # these rows have no label
    if labels and not demonstrated and plan["label"] not in labels:
        have = f"is no label {plan['label']}" if plan["label"] else "are several labels"
        *some, last = labels
        raise PlanError(f"data = {plan['data']}: there {have}; give --label {', '.join(some)} or {last}")


def _of_lines(make: Callable[[list[Any]], Any], rows: list[Any], plan: Plan) -> Any:
    """What is made of rows, if there are any; an error names the line of the file and not the row of this part."""
    if not rows:
        return None
    try:
        return make(rows)
    except (TypeError, ValueError) as error:
        found = re.match(r"row (\d+): ", str(error))
        if found is None or "line" not in rows[int(found[1])]:
            raise
        line = rows[int(found[1])]["line"]
        raise type(error)(f"{plan['data']}, line {line}: {str(error)[found.end() :]}") from error


@contextmanager
def _loading(setting: str, name: str) -> Iterator[None]:
    """Errors of transformers, which do not always say what they could not load."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise PlanError(f"{setting} = {name}: it cannot be loaded, from a folder or from the hub. {error}") from error


def divide(rows: list[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Rows for training and for validation, at random; at least one for validation if the share is above 0."""
    count = math.ceil(share * len(rows))
    if count and count >= len(rows):
        raise PlanError(f"validation = {share} of {len(rows)} rows leaves none for training: give more rows")
    order = np.random.default_rng(seed).permutation(len(rows))
    held = set(order[:count].tolist())
    return [row for k, row in enumerate(rows) if k not in held], [rows[k] for k in sorted(held)]


def load_tokenizer(plan: Plan, rows: Iterable[Mapping[str, Any]]) -> Any:
    """The tokenizer of a plan: the model's own, another, the language's, or one trained on the rows."""
    scratch = SCRATCH.fullmatch(plan["model"])
    name = plan["tokenizer"] or ("bpe:2048" if scratch else plan["model"])
    if scratch and plan["data"] == "language" and plan["tokenizer"] is None:
        return language.tokenizer()
    if match := re.fullmatch(r"bpe:(\d+)", name):
        return train_tokenizer(
            (row[k] for row in rows for k in ("prompt", "chosen", "rejected", "response") if k in row), int(match[1])
        )
    with _loading("tokenizer" if plan["tokenizer"] else "model", name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=plan["revision"], trust_remote_code=False)
    if plan["pad_token"] is not None:
        if plan["pad_token"] not in tokenizer.get_vocab():
            raise PlanError(
                f"pad_token = {plan['pad_token']!r}: no token of {name}; its end token is {tokenizer.eos_token!r}"
            )
        tokenizer.pad_token = plan["pad_token"]
    if tokenizer.pad_token_id is None and plan.command in ("reward", "evaluate"):
        raise PlanError(
            f"the tokenizer of {name} has no pad token: give --pad-token, for instance {tokenizer.eos_token!r}"
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], size: int) -> Any:
    """A byte-level BPE tokenizer with ``<pad>``, ``<bos>`` and ``<eos>``, trained on texts; ``<bos>`` starts a text.

    Parameters
    ----------
    texts
        What to train on.
    size
        Tokens in the vocabulary, at least 259: the 256 bytes and the three special ones.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if size < 259:
        raise PlanError(f"bpe:{size}: a vocabulary has at least 259 tokens, 256 bytes and 3 special ones")
    special = ["<pad>", "<bos>", "<eos>"]
    words: Any = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def load_config(plan: Plan, vocabulary: int) -> Any:
    """The configuration of a plan's model."""
    if match := SCRATCH.fullmatch(plan["model"]):
        return llama_config(int(match[1]), int(match[2]), vocabulary, plan["max_length"])
    return AutoConfig.from_pretrained(plan["model"], revision=plan["revision"], trust_remote_code=False)


def llama_config(layers: int, width: int, vocabulary: int, context: int) -> LlamaConfig:
    """The configuration of a small Llama whose tokenizer is `train_tokenizer`'s or the language's."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32 if width > 64 else 2,
        max_position_embeddings=context,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )


def new_llama(layers: int, width: int, vocabulary: int, context: int, seed: int) -> LlamaForCausalLM:
    """A small Llama with new weights, in float32."""
    set_seed(seed)
    return LlamaForCausalLM(llama_config(layers, width, vocabulary, context))


def load_model(plan: Plan, tokenizer: Any, name: str | None = None) -> Any:
    """The model of a plan, or another by name: safetensors only, adapters added if the plan says so."""
    # Trained weights stay in float32, under autocast: a step of 1e-6 is lost in a weight that has 8 bits.
    frozen = plan.command == "evaluate" or plan.settings.get("lora_rank") or name is not None
    dtype = torch.bfloat16 if plan["dtype"] == "bf16" and frozen else torch.float32
    model: Any  # ``to`` of transformers' models has types that no dtype fits
    if name is None and SCRATCH.fullmatch(plan["model"]):
        config = load_config(plan, len(tokenizer))
        if plan["data"] == "language" and plan["tokenizer"] is None:  # its own shape learns it fastest
            layers, width = config.num_hidden_layers, config.hidden_size
            model = language.model(layers=layers, width=width, seed=plan["seed"])
        else:
            model = new_llama(
                config.num_hidden_layers, config.hidden_size, len(tokenizer), plan["max_length"], plan["seed"]
            )
        model = model.to(dtype)
    else:
        with _loading("reference_model" if name and plan.command == "evaluate" else "model", name or plan["model"]):
            model = AutoModelForCausalLM.from_pretrained(
                name or plan["model"],
                revision=None if name else plan["revision"],
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
            )
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and plan["max_length"] > context:
        raise PlanError(
            f"max_length = {plan['max_length']}: the context of {name or plan['model']} has {context} tokens"
        )
    if name is None and plan.settings.get("lora_rank"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model,
            LoraConfig(
                r=plan["lora_rank"],
                lora_alpha=2 * plan["lora_rank"],
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
    if plan.command != "evaluate":
        return model  # the trainer places it, and where weights are sharded it never lies whole on one device
    return model.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


def needs(plan: Plan) -> dict[str, str]:
    """What a plan needs, without loading weights: parameters, and memory as far as it can be foreseen."""
    vocabulary = len(language.VOCABULARY) if plan["data"] == "language" else 2048
    if match := re.fullmatch(r"bpe:(\d+)", plan["tokenizer"] or ""):
        vocabulary = int(match[1])
    if plan.command == "train":
        Objective(plan["loss"], loss_settings(plan))
    check_label(plan)
    found: dict[str, str] = {}
    try:
        with _loading("model", plan["model"]):
            config = load_config(plan, vocabulary)
    except PlanError:
        if not re.search(r"llama-(2-)?7b", plan["model"].lower()):
            raise
        config = LlamaConfig()  # whose defaults are the published shape of Llama 7B
        found["note"] = f"{plan['model']} was not reached; counted is the published shape of Llama 7B"
    lora = plan.settings.get("lora_rank", 0)
    found["parameters"] = f"{memory.count(config).total:,} ({config.model_type}, {config.num_hidden_layers} layers)"
    if plan.command != "evaluate":
        half = max(1, plan["max_length"] // 2)
        found["a step at full length, on paper"] = "\n" + str(
            memory.estimate(
                config,
                pairs=plan["batch_size"],
                prompt_tokens=half,
                response_tokens=half,
                accumulation=plan["accumulation"],
                devices=int(os.environ.get("WORLD_SIZE", 1)),
                sharding="fsdp" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else "none",
                precision="bf16-mixed" if plan["dtype"] == "bf16" else "float32",
                checkpointing=plan["gradient_checkpointing"],
                online_reference=plan.settings.get("reference") == "online" and not lora,
                trainable=_adapter_size(config, lora) if lora else None,
            )
        )
    return found


def _adapter_size(config: Any, rank: int) -> int:
    """Parameters of low-rank adapters on every linear layer but the head."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()]
    return sum(rank * (m.in_features + m.out_features) for m in layers)


def loss_settings(plan: Plan) -> dict[str, Any]:
    """The settings of the loss; beta among them, unless nobody asked for it and the loss has none."""
    known = LOSSES[plan["loss"]].settings if plan["loss"] in LOSSES else {"beta": None}
    asked = plan.sources["beta"] != SETTINGS["beta"].source
    return ({"beta": plan["beta"]} if asked or "beta" in known else {}) | plan["loss_settings"]


# ---------------------------------------------------------------- training


def arguments(plan: Plan, rows: int, validation: int) -> dict[str, Any]:
    """What all three trainers are told."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    a_step = plan["batch_size"] * plan["accumulation"] * processes
    steps = plan["max_steps"] or math.ceil(plan["epochs"] * math.ceil(rows / a_step))
    every = plan["evaluate_every"] or max(1, steps // 10)
    cuda = torch.cuda.is_available()
    return {
        "output_dir": str(plan.out),
        "num_train_epochs": plan["epochs"],
        "max_steps": plan["max_steps"] or -1,
        "learning_rate": plan["learning_rate"],
        "lr_scheduler_type": plan["schedule"],
        "warmup_steps": math.ceil(plan["warmup"] * steps),
        "weight_decay": plan["weight_decay"],
        "max_grad_norm": plan["max_grad_norm"],
        "per_device_train_batch_size": plan["batch_size"],
        "per_device_eval_batch_size": plan["batch_size"],
        "gradient_accumulation_steps": plan["accumulation"],
        "bf16": plan["dtype"] == "bf16",
        "use_cpu": not cuda,
        "seed": plan["seed"],
        "logging_steps": every,
        "save_steps": every,
        "save_total_limit": 2,
        "eval_strategy": "steps" if validation else "no",
        "eval_steps": every,
        "report_to": [],
        "dataloader_pin_memory": cuda,
        **(checkpointing(True) if plan["gradient_checkpointing"] else {}),
    }


def checkpointing(on: bool) -> dict[str, Any]:
    """Whether activations are recomputed, under the name that this version of transformers has for it."""
    new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: on} | ({f"{name}_kwargs": {"use_reentrant": False}} if on else {})


def _prepare(plan: Plan) -> tuple[list[Any], list[Any], Any, Any, str]:
    """Training rows, validation rows, tokenizer, model, and what to say of the data."""
    if plan["threads"]:
        torch.set_num_threads(plan["threads"])
    rows, words = load_rows(plan)
    train, validation = divide(rows, plan["validation"], plan["seed"])
    tokenizer = load_tokenizer(plan, train)
    return train, validation, tokenizer, load_model(plan, tokenizer), words


def _train(plan: Plan, trainer: Trainer, notes: list[str], *, resume: bool, start: float, title: str) -> dict[str, Any]:
    """Train, keep the model, report. A run that diverged is reported, too, and keeps its last checkpoint."""
    status, numbers = "finished", {}
    try:
        trainer.train(resume_from_checkpoint=str(last_checkpoint(plan.out)) if resume else None)
        trainer.save_model(
            str(home := plan.out / "model")
        )  # safetensors; by one process, with sharded weights put together
        if trainer.eval_dataset is not None:
            numbers = {k: v for k, v in trainer.evaluate().items() if k.startswith("eval_") and _worth_telling(k)}
        numbers["steps"] = trainer.state.global_step
        notes.append(f"The model lies in {home}.")
    except TrainingDiverged as error:
        status = str(error)
    if not trainer.is_world_process_zero():
        return {"status": status, "results": {}}
    history = [{k: v for k, v in log.items() if _worth_telling(k)} for log in trainer.state.log_history]
    return report.write(
        plan.out,
        title=title,
        status=status,
        plan=plan.as_dict(),
        numbers=numbers,
        history=[log for log in history if "loss" in log or "eval_loss" in log],
        notes=notes,
        seconds=time.perf_counter() - start,
    )


def _worth_telling(name: str) -> bool:
    return not name.endswith(("runtime", "per_second", "flos", "epoch"))


def sft(plan: Plan, *, resume: bool, start: float) -> dict[str, Any]:
    """Supervised fine-tuning."""
    train, validation, tokenizer, model, words = _prepare(plan)
    make = partial(
        supervised.Responses, tokenizer=tokenizer, max_length=plan["max_length"], truncation=plan["truncation"]
    )
    told, held = (_of_lines(make, rows, plan) for rows in (train, validation))
    args = TrainingArguments(**arguments(plan, len(told), len(validation)))
    trainer = supervised.trainer(model, args, told, tokenizer, validation=held)
    notes = [words, _cut(told.counts)]
    return _train(plan, trainer, notes, resume=resume, start=start, title=f"Supervised fine-tuning of {plan['model']}")


def train(plan: Plan, *, resume: bool, start: float) -> dict[str, Any]:
    """Training on preferences."""
    Objective(plan["loss"], loss_settings(plan))  # before anything is read
    train_rows, validation, tokenizer, model, words = _prepare(plan)
    make = partial(tokenize, tokenizer=tokenizer, max_length=plan["max_length"], truncation=plan["truncation"])
    told, held = (_of_lines(make, rows, plan) for rows in (train_rows, validation))
    args = PreferenceArguments(
        **arguments(plan, len(told), len(validation)),
        loss=plan["loss"],
        loss_settings=loss_settings(plan),
        reference=plan["reference"],
        max_length=plan["max_length"],
        truncation=plan["truncation"],
    )
    online = plan["reference"] == "online" and not plan["lora_rank"]
    trainer = PreferenceTrainer(
        model,
        args,
        told,
        held,
        processing_class=tokenizer,
        ref_model=load_model(plan, tokenizer, plan["model"]) if online else None,
    )
    notes = [words, _cut(told.counts)]
    title = f"{trainer.objective.spec.title} on {plan['data']}"
    return _train(plan, trainer, notes, resume=resume, start=start, title=title)


def reward(plan: Plan, *, resume: bool, start: float) -> dict[str, Any]:
    """Training of a judge."""
    if plan["lora_rank"]:
        raise PlanError("lora_rank: a judge is trained whole; set it to 0")
    train_rows, validation, tokenizer, model, words = _prepare(plan)
    make = partial(
        scoring.Comparisons,
        kind=plan["judge"],
        tokenizer=tokenizer,
        max_length=plan["max_length"],
        truncation=plan["truncation"],
    )
    told, held = (_of_lines(make, rows, plan) for rows in (train_rows, validation))
    judge = scoring.judge(model, pad_token_id=tokenizer.pad_token_id)
    args = TrainingArguments(**arguments(plan, len(told), len(validation)))
    trainer = scoring.JudgeTrainer(judge, args, told, tokenizer, validation=held)
    return _train(
        plan, trainer, [words], resume=resume, start=start, title=f"A {plan['judge']} model on {plan['data']}"
    )


def _cut(counts: Mapping[str, int]) -> str:
    return "Tokenised: " + ", ".join(f"{reason} {count}" for reason, count in counts.items())


# ---------------------------------------------------------------- evaluation


def evaluate(plan: Plan, *, resume: bool, start: float) -> dict[str, Any]:
    """Score a model on held-out pairs and on responses that it samples."""
    rows, words = load_rows(plan)
    if plan["threads"]:
        torch.set_num_threads(plan["threads"])
    tokenizer = load_tokenizer(plan, rows)
    model = load_model(plan, tokenizer)
    other = plan["reference_model"]
    reference = load_model(plan, tokenizer, other) if other else None
    pairs = tokenize(rows, tokenizer, max_length=plan["max_length"], truncation="drop")
    add_pair_scoring(model)
    margins = np.subtract(*score(model, pairs, batch_size=plan["batch_size"], progress="pairs"))
    numbers: dict[str, Any] = {
        **trained_as(plan["model"]),
        "pairs": len(pairs),
        "likelier response is chosen": float((margins > 0).mean()),
    }
    if reference is not None:
        add_pair_scoring(reference)
        margins = margins - np.subtract(*score(reference, pairs, batch_size=plan["batch_size"], progress="reference"))
        numbers["implicit reward prefers chosen"] = float((margins > 0).mean())
    room = plan["max_length"] - plan["max_new_tokens"]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    fitting = [p for p in prompts if len(tokenizer(p)["input_ids"]) <= room][: plan["samples"]]
    if not fitting:
        raise PlanError(
            f"no prompt leaves room for max_new_tokens = {plan['max_new_tokens']} in max_length = {plan['max_length']}"
        )
    samples = scoring.sample(
        model,
        tokenizer,
        fitting,
        seed=plan["seed"],
        max_new_tokens=plan["max_new_tokens"],
        temperature=plan["temperature"],
        batch_size=plan["batch_size"],
        progress=True,
    )
    numbers |= {
        "sampled responses": len(samples),
        "length": float(np.mean([len(ids) for ids in samples.response_ids])),
        "ended": float(np.mean(samples.ended)),
    }
    if reference is not None and plan["temperature"] == 1:
        numbers["kl"] = float(scoring.kl(model, reference, tokenizer, samples, batch_size=plan["batch_size"]).mean())
    if plan["data"] == "language":
        found = scoring.summary(scoring.exact(samples))
        numbers |= {name: value for name, value in found.items() if name != "n"}
    for name, folder in (("learned reward", plan["reward_model"]), ("learned cost", plan["cost_model"])):
        if folder:
            with _loading(name.replace("learned ", "") + "_model", folder):
                judge = AutoModelForSequenceClassification.from_pretrained(
                    folder, use_safetensors=True, trust_remote_code=False
                )
            scores = scoring.judged(judge, tokenizer, samples.prompts, samples.responses, ended=samples.ended)
            numbers[name] = float(scores.mean())
            if name == "learned cost":
                numbers["learned cost below 0"] = float((scores < 0).mean())
    return report.write(
        plan.out,
        title=f"Evaluation of {plan['model']} on {plan['data']}",
        status="finished",
        plan=plan.as_dict(),
        numbers=numbers,
        notes=[
            words,
            _cut(pairs.counts),
            f"{len(prompts) - len(fitting)} of {len(prompts)} prompts were not sampled from.",
        ],
        seconds=time.perf_counter() - start,
    )


def trained_as(model: str) -> dict[str, Any]:
    """The loss and the seed that a model of ours was trained with; nothing for others."""
    note = Path(model).parent / "plan.json"
    if not note.is_file():
        return {}
    settings = json.loads(note.read_text("utf-8"))["settings"]
    return {"method": settings.get("loss", "sft"), "trained with seed": settings["seed"]}


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "sft": sft,
    "train": train,
    "reward": reward,
    "evaluate": evaluate,
}
