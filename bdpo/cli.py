"""The command ``bdpo``: build the book, execute a chapter with other parameters, read the verdicts, serve the site; and
train language models on preferences (`bdpo.llm.commands`)."""

import argparse
import contextlib
import difflib
import json
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bdpo
from bdpo import publish
from bdpo.llm import commands as language_models


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def build(options: argparse.Namespace) -> int:
    book = publish.find(Path.cwd())
    whole = publish.build(
        book, jobs=options.jobs, timeout=options.timeout, keep_going=options.keep_going, force=options.force, say=say
    )
    print(f"{summary(whole['claims'])}\n{book.short(book.html / 'index.html')}")
    return 0


def run(options: argparse.Namespace) -> int:
    book = publish.find(Path.cwd())
    path, rows = publish.run(book, options.notebook, dict(options.parameter), out=options.out, timeout=options.timeout)
    if rows:
        print(table(rows))
    print(book.short(path))
    return 0


def claims(options: argparse.Namespace) -> int:
    rows = publish.claims(publish.find(Path.cwd()))
    if options.id is None:
        print(json.dumps(rows, indent=1, ensure_ascii=False) if options.json else f"{table(rows)}\n{summary(rows)}")
        return 0
    found = {row["id"]: row for row in rows}
    if options.id not in found:
        near = difflib.get_close_matches(options.id, found, n=3)
        raise publish.BookError(
            f"no claim {options.id!r}"
            + (f"; near it: {', '.join(near)}" if near else "")
            + "; bdpo claims lists them all"
        )
    row = found[options.id]
    print(json.dumps(row, indent=1, ensure_ascii=False) if options.json else full(row))
    return 0


def serve(options: argparse.Namespace) -> int:
    server = publish.server(publish.find(Path.cwd()), options.port)
    say(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends)")
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


def sync(options: argparse.Namespace) -> int:
    book = publish.find(Path.cwd())
    differing = [book.short(path) for path in publish.sync(book, check=options.check)]
    if options.check and differing:
        raise publish.BookError(f"not in line with its text: {', '.join(differing)}; run: python -m bdpo sync")
    for name in differing:
        say(f"wrote {name}")
    return 0


def summary(rows: Sequence[dict[str, Any]]) -> str:
    counts = Counter(row["verdict"] for row in rows)
    return f"{len(rows)} claims: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [("id", "verdict", "mutants", "where", "notebook")]
    lines += [
        (
            row["id"],
            row["verdict"],
            f"{row['mutants_killed']}/{row['mutants_total']}" if row["mutants_total"] else "",
            row["locator"],
            row["notebook"] or "",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def full(row: dict[str, Any]) -> str:
    lines = [f"{row['id']}: {row['verdict']}  ({row['locator']})", row["statement"]]
    for label, name in (
        ("formula", "latex"),
        ("what survives", "corrected"),
        ("counterexample", "counterexample"),
        ("would be shown false by", "falsifier"),
        ("rests on trust in", "trust"),
        ("same as", "same_as"),
        ("rests on", "rests_on"),
    ):
        value = row[name]
        if isinstance(value, dict):
            value = ", ".join(f"{k} = {v}" for k, v in value.items())
        if isinstance(value, list):
            value = ", ".join(value)
        if value:
            lines.append(f"{label}: {value}")
    lines += [f"reading {reading['name']}: {reading['verdict']}" for reading in row["readings"]]
    for item in row["evidence"]:
        outcome = {True: "passed", False: "failed", None: "undecided"}[item["passed"]]
        killed = f"{item['mutants_killed']} of {item['mutants_total']} mutants killed"
        lines.append(
            f"- {item['role']}, {item['method']}: {outcome} ({item['strength']}), {killed}, on {item['domain']}"
        )
    if row["notebook"]:
        lines.append(f"notebook: {row['notebook']}, at #{row['anchor']}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="bdpo", description="The audited book on gradient imbalance in DPO, and training on preferences."
    )
    top.add_argument("--version", action="version", version=f"bdpo {bdpo.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, action: Any, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        added.set_defaults(action=action)
        return added

    def timeout(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "--timeout", type=positive, default=600, metavar="S", help="stop a notebook after S seconds (default: 600)"
        )

    one = command("build", build, "execute what changed, collect the verdicts, build the site in _build/html")
    one.add_argument("--jobs", type=positive, metavar="N", help="notebooks executed at a time (default: one a core)")
    one.add_argument("--keep-going", action="store_true", help="execute the other notebooks also after one has failed")
    one.add_argument("--force", action="store_true", help="execute every notebook, changed or not")
    timeout(one)

    one = command("run", run, "execute one notebook, with other parameters if you like, beside the book")
    one.add_argument("notebook", metavar="NOTEBOOK", help="its name, such as balance, or its path")
    one.add_argument(
        "-p", dest="parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter"
    )
    one.add_argument("-o", dest="out", type=Path, metavar="OUT", help="where the result goes (default: in _build/runs)")
    timeout(one)

    one = command("claims", claims, "show the verdicts, or all that is known of one claim")
    one.add_argument("id", nargs="?", metavar="ID", help="such as eq-2 or thm-1-dpo (default: a table of all)")
    one.add_argument("--json", action="store_true", help="as JSON, for programs")

    one = command("serve", serve, "serve the built site on this machine")
    one.add_argument("--port", type=int, default=8000, help="0 takes any free one (default: 8000)")

    one = command("sync", sync, "write each notebook's .ipynb from its text")
    one.add_argument("--check", action="store_true", help="write nothing; fail if one differs")

    language_models.add(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command.

    Returns
    -------
    int
        The exit status: 0 done, 1 failed (the reason is on stderr), 130 interrupted; misuse exits with 2.
    """
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that notebooks being executed are stopped, too
    try:
        return options.action(options)
    except publish.BookError as error:
        say(f"error: {error}")
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "bdpo").partition(".")[0] == "bdpo":
            raise
        say(f"error: {error}; the book needs more than the package does: pip install 'bdpo[book]', or make setup")
        return 1
    except KeyboardInterrupt:
        say("stopped; what was finished is kept")
        return 130
