"""What a run will do, settled before anything is loaded: every setting, its value, and where the value comes from.

A setting is given by a flag, else by a configuration file, else by its default here. Nothing is computed from a setting
that was not checked first, and the resolved plan is what ``--dry-run`` prints and what a report carries.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from bdpo import parameters

PAPER = "arXiv:2502.20847v1"
COMMANDS = ("sft", "train", "reward", "evaluate", "compare")
LABELS = ("helpful", "safe", "overall")
#: A model with new weights, by layers and width.
SCRATCH = re.compile(r"scratch:([1-9]\d*)x([1-9]\d*)")


class PlanError(ValueError):
    """A plan that cannot be carried out; the message says what to change."""


@dataclass(frozen=True)
class Setting:
    """One knob of the command line: what it is, what is allowed, its default and where that comes from."""

    help: str
    kind: type
    default: Any
    source: str
    commands: tuple[str, ...] = COMMANDS
    check: Any = None  # called with name and value; raises ValueError
    metavar: str | None = None


def _integer(low: int, high: int = 2**31) -> Any:
    return partial(parameters.integer, low=low, high=high)


def _number(low: float, high: float, **open_ends: Any) -> Any:
    return partial(parameters.number, low=low, high=high, **open_ends)


def _choice(*options: Any) -> Any:
    return partial(parameters.choice, options=options)


def _model(name: str, value: str) -> None:
    if value.startswith("scratch:") and (not (match := SCRATCH.fullmatch(value)) or int(match[2]) % 32):
        raise ValueError(
            f"{name} = {value!r}: a new model is scratch:LAYERSxWIDTH, such as scratch:3x128; 32 divides the width"
        )


_MODELS = ("sft", "train", "reward", "evaluate")
_TRAINING = ("sft", "train", "reward")
_OURS = "our choice: "

#: All settings by name. A flag is the name with hyphens, a configuration file uses the name.
SETTINGS: dict[str, Setting] = {
    "model": Setting(
        "folder or hub id of the model; scratch:3x128 makes a new Llama of 3 layers and width 128",
        str,
        None,
        "must be given",
        _MODELS,
        _model,
        metavar="PATH_OR_ID",
    ),
    "revision": Setting("branch, tag or commit of a model on the hub", str, None, _OURS + "the hub's default", _MODELS),
    "tokenizer": Setting(
        "folder or hub id of the tokenizer, or bpe:2048 to train one of 2048 tokens on the data",
        str,
        None,
        _OURS + "the model's own; bpe:2048 for a new model",
        _MODELS,
        metavar="PATH_OR_ID",
    ),
    "data": Setting(
        "hh or safe-rlhf (from the hub), language, or a file (.jsonl, .jsonl.gz, .parquet)",
        str,
        None,
        "must be given",
        _MODELS,
        metavar="NAME_OR_FILE",
    ),
    "label": Setting(
        "which of the labels decides the winner, where the data have several; sft takes the winners",
        str,
        None,
        _OURS + "must be given where the data have several; the paper does not say which it trains on",
        _MODELS,
        _choice(*LABELS),
    ),
    "loss": Setting(
        "an objective of bdpo.losses on pairs, such as bdpo, nbdpo_sym, ipo, simpo; a wrong name lists them all",
        str,
        "dpo",
        f"{PAPER}, Section 6.2: the baseline",
        ("train",),
        metavar="NAME",
    ),
    "beta": Setting(
        "above 0; larger keeps the policy nearer the reference",
        float,
        0.1,
        _OURS + "customary for language models; the paper states none for them",
        ("train",),
        _number(0, 1e4, open_low=True),
    ),
    "loss_settings": Setting(
        "further settings of the loss, such as clip=0.3; repeat the flag for several",
        dict,
        {},
        _OURS + "the loss's own defaults",
        ("train",),
        metavar="NAME=VALUE",
    ),
    "epochs": Setting(
        "passes over the data", float, 2.0, f"{PAPER}, Appendix B", _TRAINING, _number(0, 1000, open_low=True)
    ),
    "max_steps": Setting(
        "stop after this many optimiser steps; 0: as the epochs say", int, 0, _OURS + "no limit", _TRAINING, _integer(0)
    ),
    "learning_rate": Setting(
        "of AdamW, after warm-up",
        float,
        1e-6,
        _OURS + "the order customary for 7B models; tune it for each loss",
        _TRAINING,
        _number(0, 1, open_low=True),
    ),
    "schedule": Setting(
        "how the learning rate falls",
        str,
        "cosine",
        _OURS + "customary",
        _TRAINING,
        _choice("cosine", "linear", "constant"),
    ),
    "warmup": Setting(
        "share of the steps in which the learning rate rises",
        float,
        0.03,
        _OURS + "customary",
        _TRAINING,
        _number(0, 1, open_high=True),
    ),
    "weight_decay": Setting("of AdamW", float, 0.0, _OURS + "none", _TRAINING, _number(0, 1)),
    "max_grad_norm": Setting(
        "gradients are clipped to this norm",
        float,
        1.0,
        _OURS + "customary",
        _TRAINING,
        _number(0, 1e6, open_low=True),
    ),
    "batch_size": Setting(
        "pairs on one device at a time", int, 8, _OURS + "fits small machines", _MODELS, _integer(1, 2**16)
    ),
    "accumulation": Setting(
        "batches whose gradients are added up before a step",
        int,
        1,
        _OURS + "none",
        _TRAINING,
        _integer(1, 2**16),
    ),
    "max_length": Setting(
        "longest prompt with response, in tokens",
        int,
        512,
        _OURS + "covers most of both data sets; memory grows with it",
        _MODELS,
        _integer(2, 2**20),
    ),
    "truncation": Setting(
        "what to do with a longer row: stop with an error, cut the prompt's beginning or the response's end, drop it",
        str,
        "error",
        _OURS + "nothing is lost silently",
        _TRAINING,
        _choice("error", "prompt", "response", "drop"),
    ),
    "pad_token": Setting(
        "token of the vocabulary to pad with, where the tokenizer has none",
        str,
        None,
        _OURS + "the tokenizer's own",
        _MODELS,
    ),
    "judge": Setting(
        "reward: better responses score higher; cost: harmful ones do, and unsafe ones above 0",
        str,
        "reward",
        _OURS + "the one that needs a label only",
        ("reward",),
        _choice("reward", "cost"),
    ),
    "dtype": Setting(
        "float32, or bf16 where the device has it",
        str,
        "float32",
        _OURS + "runs everywhere",
        _MODELS,
        _choice("float32", "bf16"),
    ),
    "gradient_checkpointing": Setting(
        "recompute activations: less memory, a third more time",
        bool,
        False,
        _OURS + "off; needed for 7B on one device",
        _TRAINING,
        _choice(True, False),
    ),
    "reference": Setting(
        "log-probs of the reference: computed once before training, or at every step",
        str,
        "precomputed",
        _OURS + "one pass instead of two models in memory",
        ("train",),
        _choice("precomputed", "online"),
    ),
    "lora_rank": Setting(
        "train low-rank adapters of this rank; 0 trains all weights",
        int,
        0,
        f"{PAPER}, Section 6.2, speaks of fine-tuning only: all weights",
        _TRAINING,
        _integer(0, 1024),
    ),
    "validation": Setting(
        "share of the rows kept for validation",
        float,
        0.05,
        _OURS + "enough to see a jump of the loss",
        _TRAINING,
        _number(0, 0.5),
    ),
    "evaluate_every": Setting(
        "steps between two validations and checkpoints; 0: a tenth of the run",
        int,
        0,
        _OURS + "ten points of a curve",
        _TRAINING,
        _integer(0),
    ),
    "limit": Setting("use only the first rows of the data; 0: all", int, 0, _OURS + "all", _MODELS, _integer(0)),
    "reward_model": Setting(
        "folder of a reward model that scores the samples", str, None, _OURS + "none", ("evaluate",)
    ),
    "cost_model": Setting("folder of a cost model that scores the samples", str, None, _OURS + "none", ("evaluate",)),
    "reference_model": Setting(
        "folder or hub id of the model that the KL divergence is taken to", str, None, _OURS + "none", ("evaluate",)
    ),
    "temperature": Setting(
        "of the samples that are scored",
        float,
        1.0,
        _OURS + "the policy itself",
        ("evaluate",),
        _number(0, 10, open_low=True),
    ),
    "samples": Setting(
        "prompts for which a response is sampled",
        int,
        256,
        _OURS + "standard errors of 6 %",
        ("evaluate",),
        _integer(1),
    ),
    "max_new_tokens": Setting(
        "longest response sampled", int, 128, _OURS + "most responses of both data sets", ("evaluate",), _integer(1)
    ),
    "runs": Setting("folders of finished runs", list, (), "must be given", ("compare",)),
    "baseline": Setting("loss that the others are compared with", str, "dpo", f"{PAPER}, Table 2", ("compare",)),
    "seed": Setting(
        "of new weights, the order of rows, and samples", int, 0, _OURS + "any", _MODELS, _integer(0, 2**31 - 1)
    ),
    "threads": Setting(
        "threads of PyTorch on the processor; 0: PyTorch decides", int, 0, _OURS + "any", _MODELS, _integer(0, 1024)
    ),
    "out": Setting("folder of the run; made if it is not there", str, None, "must be given", metavar="FOLDER"),
}

#: What may differ between a run and its resumption.
FREE = frozenset({"threads", "out"})


@dataclass(frozen=True)
class Plan:
    """A command with all its settings and, for each, where the value comes from."""

    command: str
    settings: dict[str, Any]
    sources: dict[str, str]

    def __getitem__(self, name: str) -> Any:
        return self.settings[name]

    @property
    def out(self) -> Path:
        return Path(self.settings["out"])

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {"command": self.command, "settings": self.settings, "sources": self.sources}

    def __str__(self) -> str:
        rows = [(name, _short(value), self.sources[name]) for name, value in self.settings.items()]
        widths = [max(len(row[k]) for row in rows) for k in range(2)]
        return "\n".join(f"{n:<{widths[0]}}  {v:<{widths[1]}}  {s}" for n, v, s in rows)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def of_command(command: str) -> dict[str, Setting]:
    """The settings that a command takes."""
    return {name: setting for name, setting in SETTINGS.items() if command in setting.commands}


def shipped() -> list[str]:
    """Names of the configuration files that come with the package."""
    folder = resources.files("bdpo.llm") / "configs"
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".toml"))


def read_config(name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of a configuration file, and what it says about where they come from.

    Parameters
    ----------
    name
        A path to a ``.toml``, ``.yaml``, ``.yml`` or ``.json`` file, or the name of a file that comes with the package.

    Returns
    -------
    tuple of dict
        Settings, and the file's ``sources`` table (setting to words; may be empty).

    Raises
    ------
    PlanError
        If there is no such file, it cannot be read, or it holds something else than settings.
    """
    path = Path(name)
    if name in shipped():
        path = Path(str(resources.files("bdpo.llm") / "configs" / f"{name}.toml"))
    if not path.is_file():
        raise PlanError(f"no configuration file {name}; give a path, or one that is shipped: {', '.join(shipped())}")
    try:
        text = path.read_text("utf-8")
        match path.suffix:
            case ".toml":
                found = tomllib.loads(text)
            case ".json":
                found = json.loads(text)
            case ".yaml" | ".yml":
                import yaml

                found = yaml.safe_load(text)
            case other:
                raise PlanError(f"{path}: the ending {other!r} is none of .toml, .yaml, .yml, .json")
    except PlanError:
        raise
    except Exception as error:  # each parser has errors of its own
        raise PlanError(f"{path} is no valid {path.suffix[1:]}: {error}") from None
    if not isinstance(found, dict):
        raise PlanError(f"{path} holds {type(found).__name__}; it must hold settings, NAME = VALUE")
    sources = found.pop("sources", {})
    if not isinstance(sources, dict) or not all(isinstance(words, str) for words in sources.values()):
        raise PlanError(f"{path}: the table sources must give words for settings")
    return found, sources


def _known(name: str, command: str, where: str) -> Setting:
    allowed = of_command(command)
    if name in allowed:
        return allowed[name]
    if name in SETTINGS:
        raise PlanError(f"{where}: {name} is no setting of {command}, but of {', '.join(SETTINGS[name].commands)}")
    near = difflib.get_close_matches(name, allowed, n=2)
    raise PlanError(f"{where}: no setting {name!r}" + (f"; near it: {', '.join(near)}" if near else ""))


def _checked(name: str, value: Any, setting: Setting, where: str) -> Any:
    if value is None:
        return None
    if setting.kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if setting.kind is list and isinstance(value, tuple):
        value = list(value)
    if not isinstance(value, setting.kind) or (setting.kind is int and isinstance(value, bool)):
        raise PlanError(f"{where}: {name} = {value!r}; it must be of type {setting.kind.__name__}")
    if setting.check is not None:
        try:
            setting.check(name, value)
        except ValueError as error:
            raise PlanError(f"{where}: {str(error).removeprefix('parameter ')}") from None
    return value


def resolve(command: str, flags: Mapping[str, Any], config: str | None = None) -> Plan:
    """Settle every setting of a command: flags win over the file, the file over the defaults.

    Parameters
    ----------
    command
        ``sft``, ``train``, ``reward``, ``evaluate`` or ``compare``.
    flags
        The settings given on the command line, by name.
    config
        As in :func:`read_config`. Its settings for other commands are refused, so that none is silently without effect.

    Returns
    -------
    Plan
        All settings of the command, checked, each with its source.

    Raises
    ------
    PlanError
        For an unknown setting, a value of the wrong type or out of range, or a setting that must be given and is not.
    """
    given, words = read_config(config) if config else ({}, {})
    settings: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for where, values in ((f"file {config}", given), ("command line", flags)):
        for name, value in values.items():
            setting = _known(name, command, where)
            value = _checked(name, value, setting, where)
            if setting.kind is dict:
                value = {**settings.get(name, {}), **value}
            settings[name] = value
            sources[name] = words.get(name, where) if where.startswith("file") else where
    for name, setting in of_command(command).items():
        if name not in settings:
            settings[name] = _checked(name, setting.default, setting, "default")
            sources[name] = setting.source
        if setting.source == "must be given" and not settings[name]:
            how = "after the command" if setting.kind is list else f"by --{name.replace('_', '-')}"
            raise PlanError(f"{name} must be given, {how} or in a file: {setting.help}")
    ordered = {name: settings[name] for name in of_command(command)}
    return Plan(command, ordered, {name: sources[name] for name in ordered})
