"""The command line: help, what it prints, and errors that say what to do."""

import json
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from bdpo import cli, publish

COMMANDS = ["build", "run", "claims", "serve", "sync"]


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> publish.Book:
    """A folder that is a book and holds nothing else."""
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: index\n")
    monkeypatch.chdir(tmp_path)
    return publish.Book(tmp_path)


def row(id: str, verdict: str, **more: Any) -> dict[str, Any]:
    from bdpo.ledger import INDEX, empty_row

    return {**empty_row(INDEX[id]), "verdict": verdict, **more}


@pytest.fixture
def ledger(book: publish.Book) -> list[dict[str, Any]]:
    """A ledger of two rows."""
    evidence = {
        "role": "printed",
        "method": "identity",
        "passed": False,
        "strength": "proof",
        "domain": "all of it",
        "mutants_total": 3,
        "mutants_killed": 2,
    }
    rows = [
        row("eq-1", "open"),
        row(
            "eq-2",
            "refuted",
            notebook="balance",
            evidence=[evidence],
            counterexample={"x": "1/2"},
            mutants_total=3,
            mutants_killed=2,
        ),
    ]
    publish.write(book.out / "claims.json", json.dumps({"claims": rows}))
    return rows


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a failing command says."""
    assert cli.main(arguments) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    return told.err.removeprefix("error: ").strip()


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command} " in told


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: bdpo {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "COMMAND"),
        (["weave"], "weave"),
        (["build", "--jobs", "0"], "'0' is not a whole number of at least 1"),
        (["build", "--timeout", "soon"], "'soon' is not a whole number of at least 1"),
        (["run"], "NOTEBOOK"),
        (["run", "balance", "-p", "n"], "-p"),
    ],
)
def test_misuse_exits_with_2(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_outside_a_book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"no book in {tmp_path} or above it" in error(capsys, "build")


@pytest.mark.parametrize(
    ("command", "told"), [("claims", "no verdicts yet; run: make book"), ("serve", "not built yet; run: make book")]
)
def test_before_the_first_build(
    book: publish.Book, command: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in error(capsys, command)


def test_claims_are_listed_with_their_verdicts(
    ledger: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["claims"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["id", "verdict", "mutants", "where", "notebook"]
    assert lines[1].split()[:2] == ["eq-1", "open"]
    assert lines[2].split()[:3] == ["eq-2", "refuted", "2/3"]
    assert lines[2].endswith("balance")
    assert lines[3] == "2 claims: 1 open, 1 refuted"


def test_one_claim_is_told_in_full(ledger: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["claims", "eq-2"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("eq-2: refuted")
    assert ledger[1]["statement"] in told
    assert "counterexample: x = 1/2" in told
    assert "- printed, identity: failed (proof), 2 of 3 mutants killed, on all of it" in told
    assert "notebook: balance, at #claim-eq-2" in told


def test_claims_as_json(ledger: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["claims", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ledger
    assert cli.main(["claims", "eq-2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ledger[1]


def test_an_unknown_claim_is_answered_with_those_near_it(
    ledger: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert error(capsys, "claims", "eq2") == "no claim 'eq2'; near it: eq-2; bdpo claims lists them all"


def test_unknown_notebook(book: publish.Book, capsys: pytest.CaptureFixture[str]) -> None:
    assert error(capsys, "run", "balance") == "no notebook 'balance'; there are: none"


def test_sync_check_fails_until_synced(book: publish.Book, capsys: pytest.CaptureFixture[str]) -> None:
    (book.root / "notebooks").mkdir()
    (book.root / "notebooks" / "a.md").write_text("# A\n")
    assert "not in line with its text: notebooks/a.ipynb" in error(capsys, "sync", "--check")
    assert cli.main(["sync"]) == 0
    assert capsys.readouterr().err == "wrote notebooks/a.ipynb\n"
    assert cli.main(["sync", "--check"]) == 0


def test_serve_gives_the_pages_to_this_machine_only(book: publish.Book, capsys: pytest.CaptureFixture[str]) -> None:
    publish.write(book.html / "index.html", "<title>here</title>")
    with publish.server(book, 0) as server:
        assert server.server_address[0] == "127.0.0.1"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/") as answer:
                assert answer.read() == b"<title>here</title>"
        finally:
            server.shutdown()
            thread.join()
        capsys.readouterr()  # the log of requests
        assert "--port" in error(capsys, "serve", "--port", str(server.server_port)), "the port is taken"
    assert "--port" in error(capsys, "serve", "--port", "99999")


def test_a_missing_extra_is_named(
    book: publish.Book, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "filelock", None)
    assert "pip install 'bdpo[book]'" in error(capsys, "build")


def test_the_module_is_the_command(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bdpo", "--version"], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("bdpo 0.")
