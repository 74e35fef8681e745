"""Each notebook as a program: paired, with parameters that are declared, checked, and work at their smallest."""

import ast
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from bdpo import parameters, publish

BOOK = publish.Book(Path(__file__).resolve().parent.parent)
NAMES = [text.stem for text in BOOK.texts]

every_notebook = pytest.mark.parametrize("name", NAMES)


def code(name: str) -> list[Any]:
    return publish.code_cells(publish.read_text(BOOK.root / "notebooks" / f"{name}.md"))


def cells_of_parameters(name: str) -> tuple[str, str]:
    """The cell that declares the parameters, and the one after it, which checks them."""
    cells = code(name)
    tagged = [k for k, cell in enumerate(cells) if "parameters" in publish.tags(cell)]
    assert len(tagged) == 1, "one cell declares the parameters"
    return cells[tagged[0]].source, cells[tagged[0] + 1].source


def check(name: str, **given: Any) -> None:
    """Declare the parameters, set some, check them: what the notebook does first."""
    declare, verify = cells_of_parameters(name)
    space: dict[str, Any] = {}
    exec(declare, space)
    exec(verify, space | given)


def bounds(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    """The smallest and largest values that the notebook allows its whole numbers."""
    found: dict[str, tuple[int, int]] = {}

    def note(parameter: str, value: Any, low: int, high: int) -> Any:
        found[parameter] = (low, high)
        return value

    with monkeypatch.context() as patch:
        patch.setattr(parameters, "integer", note)
        check(name)
    return found


def test_pairs_are_in_sync() -> None:
    assert publish.sync(BOOK, check=True) == [], "run: python -m bdpo sync"


def test_the_table_of_contents_names_every_notebook() -> None:
    listed = {page.removeprefix("notebooks/") for page in publish.pages(BOOK) if page.startswith("notebooks/")}
    assert listed == set(NAMES) != set()


@every_notebook
def test_committed_notebook_has_no_outputs(name: str) -> None:
    notebook = nbformat.read(BOOK.root / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in publish.code_cells(notebook))


@every_notebook
def test_cells_are_short(name: str) -> None:
    for cell in code(name):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 25, lines[0]


@every_notebook
def test_each_parameter_has_a_literal_default_and_a_comment(name: str) -> None:
    declare, _ = cells_of_parameters(name)
    declared = publish.declared(publish.read_text(BOOK.root / "notebooks" / f"{name}.md"))
    assert declared
    for statement in ast.parse(declare).body:
        assert re.search(r"# \S+", declare.splitlines()[statement.lineno - 1]), ast.unparse(statement)


@every_notebook
def test_defaults_are_accepted_and_wrong_values_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name)
    declared = publish.declared(publish.read_text(BOOK.root / "notebooks" / f"{name}.md"))
    limits = bounds(name, monkeypatch)
    for parameter in declared:
        low, high = limits.get(parameter, (0, 0))
        outside = [low - 1, high + 1] if parameter in limits else []
        for wrong in ["no such value", None, *outside]:
            with pytest.raises(ValueError, match=rf"^parameter {parameter} = {re.escape(repr(wrong))}: it must be"):
                check(name, **{parameter: wrong})


@every_notebook
def test_runs_at_its_smallest_parameters(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {parameter: str(low) for parameter, (low, _) in bounds(name, monkeypatch).items()}
    path, rows = publish.run(BOOK, name, small, out=tmp_path / f"{name}.ipynb", timeout=400)  # on two busy cores
    executed = nbformat.read(path, as_version=4)
    for cell in publish.code_cells(executed):
        told = [output.text for output in cell.outputs if output.get("name") == "stderr"]
        assert not told, "a chapter gives no warnings"
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["evidence"], f"{row['id']} has no evidence"
        for evidence in row["evidence"]:  # the mutants ran again
            alive = [mutant["name"] for mutant in evidence["mutants"] if not mutant["killed"]]
            decided = evidence["passed"] is not None  # few runs may leave a measurement undecided
            assert not (decided and alive), f"{row['id']}: {evidence['statement']} let {alive} pass"
