"""The pipeline on small books of its own: what is done again and what is not, and what a failure leaves behind."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from bdpo import cli, publish

HEADER = """\
---
kernelspec:
  name: python3
  display_name: Python 3
  language: python
---

"""


def text(*cells: str, title: str = "A chapter") -> str:
    blocks = [f"# {title}", *(f"```{{code-cell}} ipython3\n{cell}\n```" for cell in cells)]
    return HEADER + "\n\n".join(blocks) + "\n"


PARAMETERS = ":tags: [parameters]\n\nn = 3  # how many\nname = 'x'  # for whom"
CHECK = "if not 0 < n < 10:\n    raise ValueError(f'parameter n = {n}: it must be from 1 to 9')\nprint(n, name)"


def ruling(id: str) -> str:
    """A cell that displays a row without evidence, as a claim does."""
    row = {"id": id, "evidence": []}
    return f"from IPython.display import display\ndisplay({{{publish.CLAIM!r}: {row}}}, raw=True)"


def make(folder: Path, **notebooks: str) -> publish.Book:
    """A book with these notebooks, in sync, and a package `bdpo` of its own."""
    files = {
        "_config.yml": 'title: Small\nexclude_patterns: [_build, "notebooks/*.md"]\n'
        'execute: {execute_notebooks: "off"}\nonly_build_toc_files: true\n',
        "_toc.yml": "format: jb-book\nroot: book/index\nchapters:\n"
        + "".join(f"- file: notebooks/{name}\n" for name in notebooks),
        "book/index.md": "# Small\n",
        "bdpo/__init__.py": "",
        "bdpo/alpha.py": "one = 1\n",
        "bdpo/beta.py": "def two():\n    from bdpo.alpha import one\n    return one + one\n",
        "bdpo/gamma/__init__.py": "from .delta import three\n",
        "bdpo/gamma/delta.py": "three = 3\n",
        "bdpo/gamma/table.json": "[3]",
        "bdpo/other.py": "nothing = 0\n",
        "book/results/run/rows.json": "[1]",
        **{f"notebooks/{name}.md": content for name, content in notebooks.items()},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    book = publish.Book(folder.resolve())
    publish.sync(book)
    return book


def edit(path: Path, old: str, new: str) -> None:
    before = path.read_text()
    assert old in before
    path.write_text(before.replace(old, new))


def leftovers(book: publish.Book) -> list[Path]:
    """Files that a whole or an interrupted build must not leave."""
    return [p for p in book.out.rglob("*") if p.parent.name == "work" or p.name.startswith((".claims.", ".a.", ".b."))]


# ---------------------------------------------------------------- pairs


def ids(book: publish.Book, name: str) -> list[str]:
    return [cell.id for cell in nbformat.read(book.root / "notebooks" / f"{name}.ipynb", as_version=4).cells]


def test_sync_writes_a_pair_without_outputs_and_the_same_each_time(tmp_path: Path) -> None:
    book = make(tmp_path, a=text("1 + 1", "1 + 1", "2"))
    pair = book.root / "notebooks" / "a.ipynb"
    first = pair.read_bytes()
    nbformat.validate(nbformat.read(pair, as_version=4))
    assert publish.sync(book) == []
    pair.unlink()
    assert publish.sync(book, check=True) == [pair]
    assert not pair.exists(), "a check writes nothing"
    assert publish.sync(book) == [pair]
    assert pair.read_bytes() == first, "ids come from the cells, not from chance"
    assert len(set(ids(book, "a"))) == 4, "equal cells have different ids"


def test_sync_keeps_the_ids_of_cells_that_stay(tmp_path: Path) -> None:
    book = make(tmp_path, a=text("1", "2"))
    title, one, two = ids(book, "a")
    (book.root / "notebooks" / "a.md").write_text(text("1", "1.5", "20"))
    publish.sync(book)
    after = ids(book, "a")
    assert after[:2] == [title, one]
    assert len(set(after)) == 4
    assert two not in after[:2]


def test_sync_strips_what_a_notebook_server_saved_beside_the_text(tmp_path: Path) -> None:
    book = make(tmp_path, a=text("1"))
    pair = book.root / "notebooks" / "a.ipynb"
    clean = pair.read_bytes()
    notebook = nbformat.read(pair, as_version=4)
    notebook.cells[1].execution_count = 7
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="1\n")]
    nbformat.write(notebook, pair)
    assert publish.sync(book) == [pair]
    assert pair.read_bytes() == clean


def test_sync_loses_no_edit_made_in_the_notebook(tmp_path: Path) -> None:
    book = make(tmp_path, a=text("1"))
    pair = book.root / "notebooks" / "a.ipynb"
    edit(pair, '"1"', '"1 + 41"')
    before = pair.read_bytes()
    with pytest.raises(publish.BookError, match=r"notebooks/a\.ipynb was edited.*jupytext --to md:myst"):
        publish.sync(book)
    assert pair.read_bytes() == before
    (book.root / "notebooks" / "a.md").write_text(text("1 + 41"))  # the edit is brought over
    publish.sync(book)
    assert "1 + 41" in pair.read_text()


def test_sync_names_a_notebook_without_text(tmp_path: Path) -> None:
    book = make(tmp_path, a=text("1"))
    (book.root / "notebooks" / "a.md").rename(book.root / "notebooks" / "b.md")
    with pytest.raises(publish.BookError, match=r"notebooks/a\.ipynb has no text"):
        publish.sync(book, check=True)


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("import math", []),
        ("import bdpo", ["bdpo"]),
        ("import bdpo.alpha as a", ["bdpo", "bdpo.alpha"]),
        ("from bdpo import alpha, gamma", ["bdpo", "bdpo.alpha", "bdpo.gamma"]),
        ("from bdpo.gamma import three", ["bdpo", "bdpo.gamma"]),
        ("def f():\n    from bdpo import alpha", ["bdpo", "bdpo.alpha"]),
        ("import bdpo\nbdpo.gamma.delta.three", ["bdpo", "bdpo.gamma", "bdpo.gamma.delta"]),
        ("import importlib\nimportlib.import_module('bdpo.alpha')", ["bdpo", "bdpo.alpha"]),
        ("from bdpo_other import alpha", []),
    ],
)
def test_imported_modules_are_found_however_they_are_named(tmp_path: Path, code: str, modules: list[str]) -> None:
    book = make(tmp_path)
    assert sorted(publish.imported(book.root, code)) == modules


def test_closure_follows_lazy_and_relative_imports_and_takes_data_along(tmp_path: Path) -> None:
    book = make(tmp_path)

    def names(code: str) -> set[str]:
        return {path.relative_to(book.root).as_posix() for path in publish.closure(book.root, code)}

    assert names("from bdpo import beta") == {"bdpo/__init__.py", "bdpo/beta.py", "bdpo/alpha.py"}
    inside = {"bdpo/gamma/__init__.py", "bdpo/gamma/delta.py", "bdpo/gamma/table.json"}
    assert names("import bdpo.gamma") == {"bdpo/__init__.py", *inside}


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (("notebooks/a.md", "# A chapter", "# Another title"), False),
        (("notebooks/a.md", "beta.two()", "beta.two() + 1"), True),
        (("notebooks/a.md", ":tags: [remove-cell]", ":tags: [hide-cell]"), True),
        (("bdpo/beta.py", "one + one", "2 * one"), True),
        (("bdpo/alpha.py", "one = 1", "one = 2"), True),
        (("bdpo/other.py", "nothing", "anything"), False),
        (("bdpo/gamma/table.json", "[3]", "[4]"), False),
        (("book/results/run/rows.json", "[1]", "[2]"), True),
        (("book/results/else/rows.json", None, "[2]"), False),
        (("requirements.lock", None, "numpy==1"), True),
    ],
)
def test_key_changes_with_what_the_outputs_depend_on(
    tmp_path: Path, change: tuple[str, str | None, str], again: bool
) -> None:
    code = (
        ":tags: [remove-cell]\n\n%matplotlib inline\nfrom bdpo import beta\nbeta.two()\nopen('../book/results/run/x')"
    )
    book = make(tmp_path, a=text(code))
    name, old, new = change
    path = book.root / name

    def key() -> str:
        return publish.key(book, publish.read_text(book.root / "notebooks" / "a.md"))

    before = key()
    if old is None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(new)
    else:
        edit(path, old, new)
    assert (key() != before) is again


def test_key_depends_on_parameters(tmp_path: Path) -> None:
    book = make(tmp_path, a=text(PARAMETERS))
    notebook = publish.read_text(book.root / "notebooks" / "a.md")
    keys = {publish.key(book, notebook, p) for p in (None, {"n": 1}, {"n": "1"}, {"name": 1})}
    assert len(keys) == 4


# ---------------------------------------------------------------- execution


def outputs(book: publish.Book, name: str) -> str:
    notebook = nbformat.read(book.executed(name), as_version=4)
    return "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))


def test_only_what_changed_is_executed_again(tmp_path: Path) -> None:
    book = make(
        tmp_path,
        a=text("from bdpo import beta\nprint(beta.two())", "import os\nprint(os.getcwd())"),
        b=text("from bdpo.gamma import three\nprint(three)"),
    )
    said: list[str] = []
    assert sorted(publish.execute(book, say=said.append)) == ["a", "b"]
    assert len(said) == 2
    assert outputs(book, "b") == "3\n"
    assert outputs(book, "a").startswith("2\nnotebooks\n"), "paths of the machine are cut to those in the book"
    first = book.executed("a").read_bytes()
    assert publish.execute(book) == []
    assert book.executed("a").read_bytes() == first

    edit(book.root / "notebooks" / "a.md", "# A chapter", "# Better words")
    publish.sync(book)
    assert publish.execute(book) == []
    assert "Better words" in book.executed("a").read_text()
    assert outputs(book, "a").startswith("2\n"), "new prose, old outputs"

    edit(book.root / "bdpo" / "gamma" / "delta.py", "3", "4")
    assert publish.execute(book) == ["b"]
    assert outputs(book, "b") == "4\n"

    (book.root / "notebooks" / "a.md").unlink()
    (book.root / "notebooks" / "a.ipynb").unlink()
    assert publish.execute(book, force=True) == ["b"]
    assert not book.executed("a").exists(), "no executed copy outlives its text"
    assert leftovers(book) == []
    assert "timestamp" not in book.executed("b").read_text()
    assert list(json.loads((book.out / "seconds.json").read_text())) == ["b"]


def test_a_failing_cell_is_reported_and_the_rest_is_kept(tmp_path: Path) -> None:
    failing = text("x = 1", ":tags: [raises-exception]\n\n1 / 0", "y = 0\nx / y")
    book = make(tmp_path, a=failing, b=text("print('done')"), c=text("print('never')"))
    # the longest first: b, which is kept; then a, which fails; then c, which is no longer started
    publish.write(book.out / "seconds.json", json.dumps({"b": 9, "a": 5, "c": 1}))
    book.executed("a").parent.mkdir(parents=True)
    book.executed("a").write_text(nbformat.writes(nbformat.v4.new_notebook()))
    with pytest.raises(publish.BookError) as caught:
        publish.execute(book, jobs=1)
    message = str(caught.value)
    line = failing.splitlines().index("y = 0") + 1
    assert message.startswith(f"notebooks/a.md failed in code cell 3 (line {line})\n\n    y = 0\n    x / y\n")
    assert "ZeroDivisionError: division by zero" in message
    assert "log: _build/logs/a.log" in message
    assert "not executed: c" in message
    assert "\x1b" not in message
    assert outputs(book, "b") == "done\n"
    assert not book.executed("a").exists(), "outputs of code that is no more are not shown"
    assert (book.out / "failed" / "a.ipynb").exists()
    with pytest.raises(publish.BookError, match=r"a\.md failed"):
        publish.execute(book, keep_going=True)
    assert outputs(book, "c") == "never\n"
    edit(book.root / "notebooks" / "a.md", "y = 0", "y = 2")
    publish.sync(book)
    assert publish.execute(book) == ["a"]
    assert not (book.out / "failed" / "a.ipynb").exists()


WAIT = "import os, time\nfrom pathlib import Path\nPath('pid').write_text(str(os.getpid()))\ntime.sleep(600)"


def gone(pid: int) -> bool:
    """Whether a process has ended, given a moment to be buried."""
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_a_notebook_out_of_time_is_stopped_with_its_kernel(tmp_path: Path) -> None:
    book = make(tmp_path, a=text("'quick'", WAIT))
    with pytest.raises(publish.BookError, match=r"a\.md took longer than 12 s and was stopped in code cell 2 \(line"):
        publish.execute(book, timeout=12)
    assert gone(int((book.root / "notebooks" / "pid").read_text()))
    assert leftovers(book) == []


def test_a_dying_kernel_is_reported(tmp_path: Path) -> None:
    book = make(tmp_path, a=text("import os\nos._exit(3)"))
    with pytest.raises(publish.BookError, match=r"a\.md stopped without an answer .*code cell 1(.|\n)*Kernel died"):
        publish.execute(book)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_build_ends_its_kernels_and_leaves_nothing_half_written(
    tmp_path: Path, root: Path, sent: signal.Signals, status: int
) -> None:
    book = make(tmp_path, a=text(WAIT))
    pid = book.root / "notebooks" / "pid"
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "bdpo", "build"],
        cwd=book.root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "the notebook never started"
            time.sleep(0.05)
        process.send_signal(sent)
        told = process.communicate(timeout=30)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == status
    assert "Traceback" not in told
    assert gone(int(pid.read_text()))
    assert leftovers(book) == []
    assert not book.executed("a").exists()


# ---------------------------------------------------------------- parameters


def test_declared_parameters_are_literals(tmp_path: Path) -> None:
    book = make(tmp_path, a=text(PARAMETERS), b=text(":tags: [parameters]\n\nn = 2 ** 3"), c=text("1"))
    a, b, c = (publish.read_text(path) for path in book.texts)
    assert publish.declared(a) == {"n": 3, "name": "x"}
    with pytest.raises(publish.BookError, match=r"n must be a literal: n = 2 \*\* 3"):
        publish.declared(b)
    assert publish.declared(c) == {}


@pytest.mark.parametrize(
    ("typed", "default", "value"),
    [("3", 1, 3), ("3", "x", "3"), ("1e-3", 0.5, 0.001), ("[1, 2]", [], [1, 2]), ("True", False, True), ("x", 1, "x")],
)
def test_parameters_typed_on_a_command_line(typed: str, default: object, value: object) -> None:
    got = publish.typed(typed, default)
    assert got == value
    assert type(got) is type(value)


def test_run_executes_one_notebook_beside_the_book(tmp_path: Path) -> None:
    book = make(tmp_path, a=text(PARAMETERS, CHECK, ruling("eq-2")))
    path, rows = publish.run(book, "notebooks/a.md", {"n": "4", "name": "5"})
    assert path == book.out / "runs" / "a-n=4-name=5.ipynb"
    assert "4 5\\n" in path.read_text()
    assert rows == [{"id": "eq-2", "evidence": [], "notebook": "a"}]
    assert not book.executed("a").exists()
    assert leftovers(book) == []


def test_run_refuses_before_executing(tmp_path: Path) -> None:
    book = make(tmp_path, a=text(PARAMETERS, CHECK))
    with pytest.raises(
        publish.BookError, match=r"a has no parameter m; it has(.|\n)*    n = 3  # how many\n    name = 'x'"
    ):
        publish.run(book, "a", {"m": "4"})
    with pytest.raises(publish.BookError, match="no notebook 'z'; there are: a"):
        publish.run(book, "z", {})
    for folder in (book.root / "notebooks", book.out / "notebooks"):
        with pytest.raises(publish.BookError, match="overwrite"):
            publish.run(book, "a", {}, out=folder / "x.ipynb")
    with pytest.raises(publish.BookError, match=r"ends in \.ipynb"):
        publish.run(book, "a", {}, out=tmp_path / "x.txt")
    assert not (book.out / "runs").exists()


def test_run_reports_a_wrong_value_as_the_notebook_does(tmp_path: Path) -> None:
    book = make(tmp_path, a=text(PARAMETERS, CHECK))
    with pytest.raises(publish.BookError, match="ValueError: parameter n = 40: it must be from 1 to 9"):
        publish.run(book, "a", {"n": "40"})
    assert not (book.out / "runs").exists()


# ---------------------------------------------------------------- ledger and site


def executed_with(book: publish.Book, **ids: list[str]) -> None:
    """Executed copies with these rows, without the cost of a kernel."""
    for name, rows in ids.items():
        data = [nbformat.v4.new_output("display_data", {publish.CLAIM: {"id": id, "evidence": []}}) for id in rows]
        cell = nbformat.v4.new_code_cell(outputs=data)
        publish.save(book, book.executed(name), nbformat.v4.new_notebook(cells=[cell]))


def test_collect_writes_one_row_an_id_and_only_what_changed(tmp_path: Path) -> None:
    book = make(tmp_path, a=text("1"), b=text("2"))
    executed_with(book, a=["eq-2"], b=["eq-1", "lem-1"])
    rows = {row["id"]: row for row in publish.collect(book)}
    assert rows["eq-2"]["notebook"] == "a"
    assert rows["lem-1"]["notebook"] == "b"
    assert rows["eq-3"]["notebook"] is None
    files = {path.stem: path.stat().st_mtime_ns for path in (book.out / "claims").glob("*.json")}
    assert files.keys() == rows.keys()
    publish.write(book.out / "claims" / "retired.json", "{}")
    executed_with(book, a=[], b=["eq-1", "lem-1"])
    publish.collect(book)
    again = {path.stem: path.stat().st_mtime_ns for path in (book.out / "claims").glob("*.json")}
    assert {name for name in again if again[name] != files[name]} == {"eq-2"}


@pytest.mark.parametrize(("rows", "where"), [({"a": ["eq-2"], "b": ["eq-2"]}, "a and b"), ({"a": ["eq-2"] * 2}, "a")])
def test_collect_refuses_a_claim_ruled_on_twice(tmp_path: Path, rows: dict[str, list[str]], where: str) -> None:
    book = make(tmp_path, **{name: text("1") for name in rows})
    executed_with(book, **rows)
    with pytest.raises(publish.BookError, match=f"claim eq-2 is displayed twice, in {where};"):
        publish.collect(book)


def test_collect_refuses_an_id_that_is_not_in_the_index(tmp_path: Path) -> None:
    book = make(tmp_path, a=text("1"))
    executed_with(book, a=["eq-999"])
    with pytest.raises(publish.BookError, match="eq-999"):
        publish.collect(book)


def test_provenance_tells_versions_and_nothing_of_the_machine(root: Path) -> None:
    told = publish.provenance(publish.Book(root))
    assert {"version", "commit", "dirty", "python", "platform", "packages", "seconds"} == told.keys()
    assert told["python"] == platform.python_version()
    assert {"numpy", "sympy", "torch"} <= told["packages"].keys()
    for private in (str(root), str(Path.home()), platform.node()):
        assert private not in json.dumps(told)


def test_build_from_nothing_then_nothing_then_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    book = make(tmp_path, a=text("print(1)", ruling("eq-2")))
    monkeypatch.chdir(book.root / "notebooks")
    assert cli.main(["build"]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == "_build/html/index.html"
    assert "built 2 pages" in told.err
    whole = json.loads((book.html / "claims.json").read_text())
    assert whole == json.loads((book.out / "claims.json").read_text())
    assert [row["notebook"] for row in whole["claims"] if row["id"] == "eq-2"] == ["a"]
    assert whole["provenance"]["seconds"].keys() == {"a"}
    assert str(book.root) not in json.dumps(whole)

    began = time.monotonic()
    assert cli.main(["build"]) == 0
    assert time.monotonic() - began < 10
    assert capsys.readouterr().err == "", "nothing changed, nothing done"

    page = book.root / "book" / "index.md"
    page.write_text("# Small\n\n[nowhere](nowhere.md)\n")
    for _ in range(2):  # Sphinx forgets warnings that it has given once
        assert cli.main(["build"]) == 1
        told = capsys.readouterr()
        assert "book/index.md:3" in told.err
        assert "log: _build/logs/html.log" in told.err

    page.write_text("# Small\n")
    edit(book.root / "_toc.yml", "chapters:", "chapters:\n- file: book/more")
    (book.root / "book" / "more.md").write_text("# More\n")
    edit(book.root / "_config.yml", "[_build,", "[_build, book/more.md,")
    assert cli.main(["build"]) == 1, "a page of the table of contents is left out"
    assert "book/more" in capsys.readouterr().err


def test_missing_pages_are_named(tmp_path: Path) -> None:
    book = make(tmp_path, a=text("1"), b=text("2"))
    publish.write(book.html / "book" / "index.html", "")
    publish.write(book.html / "notebooks" / "b.html", "")
    assert publish.missing_pages(book) == ["notebooks/a"]


def test_two_builds_do_not_run_in_one_folder(tmp_path: Path) -> None:
    import filelock

    book = make(tmp_path, a=text("1"))
    book.out.mkdir()
    with filelock.FileLock(book.out / ".lock"), pytest.raises(publish.BookError, match="another build is running"):
        publish.build(book)
    assert not book.executed("a").exists()


def test_a_file_is_written_whole_and_only_if_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    assert publish.write(path, "one") is True
    assert publish.write(path, "one") is False

    def full(self: Path, data: bytes) -> int:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        publish.write(path, "two")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert path.read_text() == "one"
