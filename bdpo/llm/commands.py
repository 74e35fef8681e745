"""The commands ``sft``, ``train``, ``reward``, ``evaluate`` and ``compare`` of ``python -m bdpo``.

Each settles its plan first (`bdpo.llm.plan`), so that a wrong setting costs a second and not an hour; ``--dry-run``
stops there. A run keeps its checkpoints, its plan and its report in one folder, and ``--resume`` goes on in it.
Models and data are read without running code of theirs: safetensors only, never ``trust_remote_code``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bdpo.llm import plan as planning
from bdpo.llm.plan import Plan, PlanError

HELP = {
    "sft": "fine-tune a model on prompts and responses (supervised)",
    "train": "train a model on preferences, with any objective of bdpo.losses on pairs",
    "reward": "train a reward model or a cost model on preferences",
    "evaluate": "score a model: preference accuracy, sampled responses, divergence, lengths",
    "compare": "compare finished runs: means, intervals, differences paired by seed",
}


# ---------------------------------------------------------------- flags


def add(commands: Any) -> None:
    """Add the commands to the subparsers of a parser."""
    for command, words in HELP.items():
        parser = commands.add_parser(command, help=words, description=words[0].upper() + words[1:] + ".")
        parser.set_defaults(action=main, command=command)
        shipped = f", or by name: {', '.join(planning.shipped())}" if command == "train" else ""
        parser.add_argument("--config", metavar="FILE", help=f"settings from a .toml, .yaml or .json file{shipped}")
        parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
        if command != "compare":
            parser.add_argument("--dry-run", action="store_true", help="print the plan and what it needs, then stop")
        if command in ("sft", "train", "reward"):
            parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
        for name, setting in planning.of_command(command).items():
            _flag(parser, name, setting)


def _flag(parser: argparse.ArgumentParser, name: str, setting: planning.Setting) -> None:
    default = "" if setting.default in (None, {}, ()) else f" (default: {setting.default})"
    settings: dict[str, Any] = {
        "default": argparse.SUPPRESS,
        "help": (setting.help + default).replace("%", "%%"),
    }
    if setting.kind is list:
        parser.add_argument(name, nargs="*", metavar="FOLDER", **settings)
        return
    if setting.kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif setting.kind is dict:
        settings |= {"action": "append", "type": _pair, "metavar": setting.metavar}
    else:
        options = "|".join(getattr(setting.check, "keywords", {}).get("options", ()))
        settings |= {"type": setting.kind, "metavar": setting.metavar or options or setting.kind.__name__.upper()}
    parser.add_argument(f"--{name.replace('_', '-')}", **settings)


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main(options: argparse.Namespace) -> int:
    """Carry out one command; the exit status is 0 if it was done, 1 if not (the reason is on stderr)."""
    given = vars(options)
    flags = {name: value for name, value in given.items() if name in planning.of_command(options.command)}
    flags = {name: dict(v) if planning.SETTINGS[name].kind is dict else v for name, v in flags.items()}
    try:
        resolved = planning.resolve(options.command, flags, options.config)
        if options.command == "compare":
            return compare(resolved)
        return _run(resolved, dry_run=options.dry_run, resume=given.get("resume", False))
    except ModuleNotFoundError as error:
        if options.traceback or (error.name or "bdpo").partition(".")[0] == "bdpo":
            raise
        return _fail(f"{error}; language models need more than the package does: pip install 'bdpo[llm]'")
    except (ValueError, TypeError, ArithmeticError, OSError) as error:
        if options.traceback:
            raise
        return _fail(str(error))


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


# ---------------------------------------------------------------- a run


def _run(plan: Plan, *, dry_run: bool, resume: bool) -> int:
    from bdpo.llm import runs

    if dry_run:
        print(plan)
        for name, value in runs.needs(plan).items():
            print(f"{name}: {value}")
        return 0
    start = time.perf_counter()
    with _folder(plan, resume):
        report = runs.COMMANDS[plan.command](plan, resume=resume, start=start)
    for name, value in report["results"].items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    print(plan.out / "report.html")
    return 0 if report["status"] == "finished" else _fail(report["status"])


@contextlib.contextmanager
def _folder(plan: Plan, resume: bool = False) -> Iterator[None]:
    """The folder of a run, with its plan in it; gone again if the run ends before it wrote anything."""
    new = not plan.out.exists()
    _check_folder(plan, resume)
    try:
        yield
    except BaseException:
        note = plan.out / "plan.json"
        with contextlib.suppress(OSError):  # another process of the run may have been faster
            if list(plan.out.iterdir()) == [note]:
                note.unlink()
                if new:
                    plan.out.rmdir()
        raise


def _check_folder(plan: Plan, resume: bool) -> None:
    """Refuse to mix two runs in one folder, and note the plan in it."""
    from bdpo.llm import report

    note = plan.out / "plan.json"
    if plan.out.exists() and not plan.out.is_dir():
        raise PlanError(f"out = {plan.out}: it is a file; give a folder")
    there = {path.name for path in plan.out.iterdir()} if plan.out.is_dir() else set()
    if there and note.name not in there:
        raise PlanError(f"out = {plan.out}: the folder holds something else; give a new one")
    begun = any(name.startswith("checkpoint-") for name in there)
    if resume and not begun:
        raise PlanError(f"--resume: no checkpoint in {plan.out}; leave --resume out, or give the folder of a run")
    if not resume and (begun or "report.json" in there):
        way_out = "--resume goes on with it, another folder begins anew" if begun else "give another folder"
        raise PlanError(f"out = {plan.out}: a run was begun there; {way_out}")
    if resume:
        before = json.loads(note.read_text("utf-8"))["settings"]
        after = json.loads(json.dumps(plan.settings))
        changed = [
            f"{name} ({before.get(name)} → {after[name]})"
            for name in after
            if name not in planning.FREE and before.get(name) != after[name]
        ]
        if changed:
            raise PlanError(f"--resume: {', '.join(changed)} differ from the run in {plan.out}; use what it began with")
    try:
        report.whole(note, json.dumps(plan.as_dict(), indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        why = f"no file can be written there ({error.strerror}); give another folder"
        raise PlanError(f"out = {plan.out}: {why}") from None


# ---------------------------------------------------------------- compare


#: What has to be the same in runs that are compared; they differ in their loss, its settings, and their seed.
ALIKE = ("data", "label", "limit", "validation", "judge", "temperature", "samples", "max_new_tokens")


def compare(plan: Plan) -> int:
    """Print and write the table of finished runs."""
    import pandas as pd

    from bdpo.llm import report
    from bdpo.tables import Interval, summary

    start = time.perf_counter()
    rows = _rows([Path(folder) for folder in plan["runs"]])
    methods = list(dict.fromkeys(row["method"] for row in rows))
    if plan["baseline"] not in methods:
        raise PlanError(f"baseline = {plan['baseline']}: none of the runs; give --baseline {' or '.join(methods)}")
    common = [name for name in rows[0] if all(name in row for row in rows) and name not in ("run", "method", "seed")]
    found = summary(pd.DataFrame(rows), common, baseline=plan["baseline"])
    table = [
        {
            "method": row["method"],
            "quantity": row["quantity"],
            "n": row["n"],
            "mean, 95 %": format(Interval(row["mean"], row["low"], row["high"]), ".3f"),
            f"minus {plan['baseline']}, 95 %": format(
                Interval(row["difference"], row["difference_low"], row["difference_high"]), ".3f"
            ),
            "same numbers as": row["twin"] or None,
        }
        for row in found.to_dict("records")
    ]
    with _folder(plan):
        report.write(
            plan.out,
            title="Comparison",
            status="finished",
            plan=plan.as_dict(),
            tables={"Means and paired differences": table, "Runs": rows},
            seconds=time.perf_counter() - start,
        )
    print(pd.DataFrame(table).to_string(index=False))
    print(plan.out / "report.html")
    return 0


def _rows(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Method, seed and numbers of each finished run, if they can be compared."""
    rows: dict[tuple[Any, Any], dict[str, Any]] = {}
    first: dict[str, Any] = {}
    for folder in folders:
        found = _finished(folder)
        settings, told = found["plan"]["settings"], dict(found["results"])
        alike = {"command": found["plan"]["command"], **{name: settings.get(name) for name in ALIKE}}
        first = first or alike
        for name, value in alike.items():
            if value != first[name]:
                raise PlanError(
                    f"{folder}: {name} is {value}, in {folders[0]} it is {first[name]}; compare runs that differ only "
                    "in their loss, its settings and their seed"
                )
        method = told.pop("method", None) or settings.get("loss") or settings.get("model") or folder.name
        seed = told.pop("trained with seed", settings.get("seed", 0))
        if (method, seed) in rows:
            other = rows[method, seed]["run"]
            raise PlanError(f"{other} and {folder} are both {method} with seed {seed}; give one run of each")
        numbers = {name: value for name, value in told.items() if _is_compared(name, value, alike["command"])}
        rows[method, seed] = {"run": str(folder), "method": method, "seed": seed, **numbers}
    return list(rows.values())


def _finished(folder: Path) -> Mapping[str, Any]:
    path = folder / "report.json"
    if not path.is_file():
        raise PlanError(f"{path} is missing: give folders of finished runs of train or evaluate")
    found: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
    if found["status"] != "finished":
        raise PlanError(f"{folder}: {found['status']}; only finished runs are compared")
    if found["plan"]["command"] == "compare":
        raise PlanError(f"{folder} is a comparison; give the runs themselves")
    return found


def _is_compared(name: str, value: Any, command: str) -> bool:
    """Not counts, not standard errors, and not the values of losses that differ: each has a scale of its own."""
    if name in ("pairs", "sampled responses", "steps") or name.endswith("_se"):
        return False
    return isinstance(value, int | float) and not (command == "train" and name == "eval_loss")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Only these commands, for programs that have no book."""
    parser = argparse.ArgumentParser(prog="bdpo")
    add(parser.add_subparsers(required=True, metavar="COMMAND"))
    return parser.parse_args(arguments)
