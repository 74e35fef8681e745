"""From texts to the site: pair, execute, collect, build, check, serve. No mathematics here.

==============================  ==========================================================================
``notebooks/NAME.md``           what people edit
``notebooks/NAME.ipynb``        its pair without outputs, written by :func:`sync`
``_build/notebooks/NAME.ipynb`` the executed copy, written by :func:`execute` (and `_build/logs`, `_build/failed`)
``_build/claims/ID.json``       one row of the ledger, written by :func:`collect`; all of them in `_build/claims.json`
``_build/html``                 the site, written by :func:`site`
``_build/runs``                 single notebooks executed with other parameters, written by :func:`run`
==============================  ==========================================================================

What has not changed is not done again: a notebook is executed anew when its code, the parts of ``bdpo`` it imports,
the recorded data it names, or a version changed, and not when its prose did.
"""

import ast
import contextlib
import functools
import hashlib
import http.server
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bdpo

CLAIM = "application/vnd.bdpo.claim+json"
BUILD = "run: make book (or: python -m bdpo build)"
INJECTED = "injected-parameters"


class BookError(Exception):
    """Something that a person can put right; the message says what and how."""


# ---------------------------------------------------------------- the folder


@dataclass(frozen=True)
class Book:
    """The folder of a book; ``root`` is where `_toc.yml` lies."""

    root: Path

    @property
    def out(self) -> Path:
        return self.root / "_build"

    @property
    def html(self) -> Path:
        return self.out / "html"

    @property
    def texts(self) -> list[Path]:
        return sorted((self.root / "notebooks").glob("*.md"))

    def executed(self, name: str) -> Path:
        return self.out / "notebooks" / f"{name}.ipynb"

    def short(self, path: Path) -> str:
        """The path as people write it in the root of the book."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)


def find(start: Path) -> Book:
    """The book that a folder belongs to.

    Raises
    ------
    BookError
        If neither the folder nor any above it holds a `_toc.yml`.
    """
    for folder in (start := start.resolve(), *start.parents):
        if (folder / "_toc.yml").is_file():
            return Book(folder)
    raise BookError(f"no book in {start} or above it (no _toc.yml); change to the folder of the book")


def write(path: Path, text: str) -> bool:
    """Write a file if its content changed, whole or not at all; whether it was written."""
    if path.is_file() and path.read_bytes() == text.encode():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        half.write_bytes(text.encode())
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
    return True


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no such file."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def digest(parts: Iterable[str | bytes]) -> str:
    """One hash of many parts; no two lists of parts run together."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "big") + data)
    return total.hexdigest()


def contents(root: Path, files: Iterable[Path]) -> Iterator[str | bytes]:
    """Names and contents of files, for :func:`digest`."""
    for path in sorted(set(files)):
        yield path.relative_to(root).as_posix()
        yield path.read_bytes()


def tree(*folders: Path) -> Iterator[Path]:
    """All files below, without what interpreters, editors and notebook servers leave behind."""
    for folder in folders:
        for path in folder.rglob("*"):
            inner = path.relative_to(folder).parts
            if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in inner):
                yield path


# ---------------------------------------------------------------- pairs


def read_text(path: Path) -> Any:
    """The notebook that a MyST text describes."""
    import jupytext

    return jupytext.reads(path.read_text("utf-8"), fmt="md:myst")


def cells_as_text(notebook: Any) -> str:
    """What of a notebook its text holds: sources, tags and other settings of cells; neither outputs nor ids."""
    import jupytext
    import nbformat

    bare = nbformat.v4.new_notebook(cells=[dict(cell) for cell in notebook.cells])
    for cell in bare.cells:
        cell.pop("id", None)
    text = jupytext.writes(nbformat.from_dict(bare), fmt="md:myst")
    return text.split("\n---\n", 1)[-1].strip()


def paired(text: Path) -> str:
    """The .ipynb that belongs to a text: no outputs, and the ids of cells kept from the present one.

    Raises
    ------
    BookError
        If the present .ipynb holds an edit that the text does not have.
    """
    import jupytext.combine
    import nbformat

    notebook, present = read_text(text), text.with_suffix(".ipynb")
    body = cells_as_text(notebook)
    old = nbformat.read(present, as_version=4) if present.is_file() else nbformat.v4.new_notebook()
    if present.is_file():
        was = cells_as_text(old)
        if was != body and old.metadata.get("bdpo", {}).get("text") != digest([was])[:16]:
            name = f"notebooks/{present.name}"
            raise BookError(
                f"{name} was edited, and its text is not the same; to keep the edit in the notebook: "
                f"jupytext --to md:myst {name}; to keep the text instead: rm {name}; then sync again"
            )
    keep = jupytext.combine.map_outputs_to_inputs(notebook.cells, old.cells)
    taken = {old.cells[k].id for k in keep if k is not None}
    for cell, k in zip(notebook.cells, keep, strict=True):
        if k is not None:
            cell.id = old.cells[k].id
            continue
        cell.id = next(name for n in range(len(taken) + 1) if (name := digest([cell.source, str(n)])[:8]) not in taken)
        taken.add(cell.id)
    notebook.metadata.pop("jupytext", None)
    notebook.metadata["bdpo"] = {"text": digest([body])[:16]}
    notebook.nbformat_minor = 5
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def sync(book: Book, *, check: bool = False) -> list[Path]:
    """Bring every .ipynb in line with its text, which is the source.

    Parameters
    ----------
    book
        The book.
    check
        Write nothing; only say which differ.

    Returns
    -------
    list of Path
        The .ipynb files that differed (now written, unless ``check``).

    Raises
    ------
    BookError
        If an .ipynb has no text, or holds an edit that its text does not have.
    """
    problems, differing = [], []
    texts = book.texts
    for orphan in sorted({p.stem for p in (book.root / "notebooks").glob("*.ipynb")} - {p.stem for p in texts}):
        name = f"notebooks/{orphan}.ipynb"
        problems.append(f"{name} has no text; to keep it: jupytext --to md:myst {name}; else: rm {name}")
    for text in texts:
        try:
            wanted = paired(text)
        except BookError as error:
            problems.append(str(error))
            continue
        target = text.with_suffix(".ipynb")
        if target.is_file() and target.read_bytes() == wanted.encode():
            continue
        differing.append(target)
        if not check:
            write(target, wanted)
    if problems:
        raise BookError("\n".join(problems))
    return differing


# ---------------------------------------------------------------- what an execution depends on


def tags(cell: Any) -> list[str]:
    return list(cell.metadata.get("tags", []))


def code_cells(notebook: Any) -> list[Any]:
    """The cells that the text has: without the one in which papermill injects parameters."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and INJECTED not in tags(cell)]


def parameters_cell(notebook: Any) -> str:
    """The source of the cell tagged ``parameters``; empty where there is none."""
    return next((cell.source for cell in code_cells(notebook) if "parameters" in tags(cell)), "")


def declared(notebook: Any) -> dict[str, Any]:
    """The parameters of a notebook and their defaults, which are plain literals.

    Raises
    ------
    BookError
        If a default is not a literal.
    """
    defaults = {}
    for line in ast.parse(parameters_cell(notebook)).body:
        match line:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                try:
                    defaults[name] = ast.literal_eval(value)
                except ValueError:
                    raise BookError(f"the default of parameter {name} must be a literal: {ast.unparse(line)}") from None
    return defaults


def python(source: str) -> str:
    """The Python in a cell: without lines for IPython (``%magic``, ``!shell``)."""
    return "\n".join("" if re.match(r"\s*[%!]", line) else line for line in source.splitlines())


def module_file(root: Path, module: str) -> Path | None:
    """The file of a module of ours, if there is one of that name."""
    stem = root.joinpath(*module.split("."))
    return next((p for p in (stem / "__init__.py", stem.with_suffix(".py")) if p.is_file()), None)


def imported(root: Path, source: str, package: str = "") -> set[str]:
    """The modules of ``bdpo`` that a piece of Python names, wherever it does so (also within functions).

    ``from bdpo import x``, ``import bdpo.x``, relative imports, names as strings (``import_module("bdpo.x")``), and
    attributes (``import bdpo; bdpo.x.y``) all count. ``package`` is what a relative import starts from.
    """
    parsed = ast.parse(source)
    names: set[str] = set()
    for node in ast.walk(parsed):
        match node:
            case ast.Import(names=aliases):
                names |= {alias.name for alias in aliases}
            case ast.ImportFrom(module=module, names=aliases, level=level):
                above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                base = ".".join([*above, *([module] if module else [])])
                names |= {base, *(f"{base}.{alias.name}" for alias in aliases)}
            case ast.Constant(value=str(text)):
                names.add(text)
            case ast.Attribute():
                names.add(ast.unparse(node))
    found = set()
    for name in names:
        parts = name.split(".") if re.fullmatch(r"bdpo(\.\w+)*", name) else []
        found |= {m for k in range(1, len(parts) + 1) if module_file(root, m := ".".join(parts[:k]))}
    return found


def closure(root: Path, source: str) -> set[Path]:
    """The files of ``bdpo`` on which a piece of Python depends: modules, what they import, and data beside them."""
    files: set[Path] = set()
    waiting, seen = imported(root, source), set()
    while waiting:
        seen.add(module := waiting.pop())
        path = module_file(root, module)
        assert path is not None, module
        files.add(path)
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        if path.name == "__init__.py":
            files |= {p for p in path.parent.iterdir() if p.is_file() and p.suffix not in (".py", ".pyc")}
        waiting |= imported(root, path.read_text("utf-8"), package) - seen
    return files


def data_named(root: Path, text: str) -> set[Path]:
    """The recorded results that code names: by file, by folder, or all if it names only `book/results`."""
    folder = root / "book" / "results"
    files = set(tree(folder))
    named = {f for f in files if any(part in text for part in f.relative_to(folder).parts)}
    return named or (files if "results" in text else set())


def key(book: Book, notebook: Any, parameters: Mapping[str, Any] | None = None) -> str:
    """What decides whether an execution is still good: code, parameters, imports, data, versions. Not prose."""
    cells = code_cells(notebook)
    source = "\n".join(python(cell.source) for cell in cells)
    files = closure(book.root, source)
    text = source + "".join(path.read_text("utf-8") for path in files if path.suffix == ".py")
    lock = book.root / "requirements.lock"
    return digest(
        [
            "1",
            platform.python_version(),
            json.dumps(parameters or {}, sort_keys=True),
            *(part for cell in cells for part in (cell.source, ",".join(tags(cell)))),
            *contents(book.root, {*files, *data_named(book.root, text), *([lock] if lock.is_file() else [])}),
        ]
    )


# ---------------------------------------------------------------- execution

# What a process does; it ends with status 3 if a cell showed an error, which the cell may have announced.
_WORKER = """
import json, sys, papermill
try:
    papermill.execute_notebook(**json.load(sys.stdin))
except papermill.PapermillExecutionError as error:
    print(error, file=sys.stderr)
    sys.exit(3)
"""


@dataclass
class Execution:
    """One notebook in a process of its own, from :meth:`start` until :meth:`stop`."""

    book: Book
    name: str
    notebook: Any
    parameters: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 600.0
    label: str = ""

    def start(self) -> "Execution":
        import nbformat

        self.label = self.label or self.name
        work = self.book.out / "work" / f"{self.label}-{os.getpid()}"
        work.mkdir(parents=True, exist_ok=True)
        self.source, self.result = work / "in.ipynb", work / f"{self.name}.ipynb"
        nbformat.write(self.notebook, self.source)
        self.log = self.book.out / "logs" / f"{self.label}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            # what the key was computed from is what the kernel imports
            "PYTHONPATH": os.pathsep.join(filter(None, [str(self.book.root), os.environ.get("PYTHONPATH")])),
            "PYTHONHASHSEED": "0",
            "PYTHONUTF8": "1",
            "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, not the user's
            "IPYTHONDIR": str(work / "ipython"),  # nor the user's start-up files
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "TQDM_DISABLE": "1",
            # notebooks run side by side; each keeps to one core
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
        }
        order = {
            "input_path": str(self.source),
            "output_path": str(self.result),
            "parameters": dict(self.parameters),
            "kernel_name": "python3",
            "cwd": str(self.book.root / "notebooks"),
            "progress_bar": False,
            "log_output": True,
        }
        self.began = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _WORKER],
                cwd=self.book.root,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and we stop the others in order
            )
        assert self.process.stdin is not None
        with self.process.stdin as pipe, contextlib.suppress(BrokenPipeError):
            pipe.write(json.dumps(order).encode())
        return self

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def over(self) -> bool:
        """Whether it has ended, by itself or by its timeout."""
        return self.process.poll() is not None or self.seconds > self.timeout

    def stop(self) -> None:
        """End the process and all it started (the kernel sits in a session of its own), and clear away its files."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            worker = psutil.Process(self.process.pid)
            for process in [*worker.children(recursive=True), worker]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()
        shutil.rmtree(self.source.parent, ignore_errors=True)

    def outcome(self) -> Any:
        """The executed notebook.

        Raises
        ------
        BookError
            If a cell failed, the kernel died, or time ran out; with the notebook, the cell and the traceback.
        """
        import nbformat

        code = self.process.poll()
        done = nbformat.read(self.result, as_version=4) if self.result.is_file() else None
        cells = code_cells(done) if done else []
        notes = [cell.metadata.get("papermill", {}) for cell in cells]
        failed = next((k for k, cell in enumerate(cells, 1) if error_of(cell)), None)
        if code in (0, 3) and not failed:
            return done
        # papermill notes of a cell whether there was an exception once it has begun, or at the latest when it is over
        busy = max((k for k, note in enumerate(notes, 1) if note.get("exception") is not None), default=0)
        busy = next((k for k, note in enumerate(notes, 1) if note.get("status") == "running"), busy)
        at = failed or busy
        if code is None:
            what = f"took longer than {self.timeout:g} s and was stopped"
        else:
            what = "failed" if failed else f"stopped without an answer (exit status {code})"
        text = self.book.root / "notebooks" / f"{self.name}.md"
        lines = [f"{self.book.short(text)} {what}"]
        if at:
            source = cells[at - 1].source
            position = text.read_text("utf-8").find(source) if text.is_file() else -1
            line = text.read_text("utf-8").count("\n", 0, position) + 1 if position >= 0 else None
            lines[0] += f" in code cell {at}" + (f" (line {line})" if line else "")
            lines += ["", *("    " + part for part in source.splitlines()), ""]
        if failed:
            lines.append(re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error_of(cells[failed - 1]).traceback)))
        elif code is not None:
            lines += self.log.read_text("utf-8", "replace").splitlines()[-15:]
        lines.append(f"log: {self.book.short(self.log)}")
        if done:
            kept = self.book.out / "failed" / f"{self.label}.ipynb"
            write(kept, nbformat.writes(tidy(done)))
            lines.append(f"as far as it came: {self.book.short(kept)}")
        raise BookError("\n".join(lines))


def error_of(cell: Any) -> Any:
    """The error on which a cell stopped, unless it is one that the cell announces."""
    if "raises-exception" in tags(cell):
        return None
    return next((output for output in cell.get("outputs", []) if output.output_type == "error"), None)


def tidy(notebook: Any) -> Any:
    """Take out what differs between two equal executions: times, and papermill's notes."""
    for part in (notebook, *notebook.cells):
        for noise in ("papermill", "execution"):
            part.metadata.pop(noise, None)
    notebook.cells = [cell for cell in notebook.cells if "papermill-error-cell-tag" not in tags(cell)]
    return notebook


def save(book: Book, path: Path, notebook: Any) -> None:
    """Write an executed notebook; paths in its outputs are made relative to the book."""
    import nbformat

    here = json.dumps(str(book.root) + os.sep, ensure_ascii=False)[1:-1]
    write(path, nbformat.writes(notebook).replace(here, "") + "\n")


def with_outputs(notebook: Any, executed: Any) -> Any:
    """The notebook as it reads now, with the outputs of an execution of the same code."""
    for cell, run in zip(code_cells(notebook), code_cells(executed), strict=True):
        cell.outputs, cell.execution_count = run.outputs, run.execution_count
    notebook.metadata["language_info"] = executed.metadata.get("language_info", {})
    return notebook


Say = Callable[[str], None]


def execute(
    book: Book,
    *,
    jobs: int | None = None,
    timeout: float = 600.0,
    keep_going: bool = False,
    force: bool = False,
    say: Say = lambda line: None,
) -> list[str]:
    """Execute the notebooks that need it, several at a time, the longest first.

    Each result is kept as soon as it is there, also if a later notebook fails or the build is interrupted.

    Parameters
    ----------
    book
        The book; its pairs are in sync.
    jobs
        How many at a time; by default one a core.
    timeout
        Seconds after which a notebook is stopped.
    keep_going
        Execute the rest also after one has failed. Either way those already running come to their end.
    force
        Execute all, changed or not.
    say
        Where one line of progress for each notebook goes.

    Returns
    -------
    list of str
        The names of the notebooks that were executed.

    Raises
    ------
    BookError
        If a notebook failed.
    """
    import nbformat
    from tqdm import tqdm

    times = book.out / "seconds.json"
    seconds: dict[str, float] = read_json(times)
    waiting: list[tuple[str, Any, str]] = []
    names = [text.stem for text in book.texts]
    for stale in (p for p in (book.out / "notebooks").glob("*.ipynb") if p.stem not in names):
        stale.unlink()
    for name in names:
        notebook = nbformat.read(book.root / "notebooks" / f"{name}.ipynb", as_version=4)
        now = key(book, notebook)
        done = book.executed(name)
        if done.is_file() and not force:
            executed = nbformat.read(done, as_version=4)
            if executed.metadata.get("bdpo", {}).get("key") == now:
                fresh = with_outputs(notebook, executed)
                fresh.metadata["bdpo"] = {"key": now}
                save(book, done, fresh)  # the prose may have changed
                continue
        waiting.append((name, notebook, now))
    waiting.sort(key=lambda item: -seconds.get(item[0], float("inf")))

    finished: list[str] = []
    failures: list[str] = []
    running: list[tuple[Execution, str]] = []
    bar = tqdm(total=len(waiting), unit="notebook", disable=not (waiting and sys.stderr.isatty()), leave=False)
    try:
        while running or (waiting and (keep_going or not failures)):
            while waiting and len(running) < (jobs or os.cpu_count() or 1) and (keep_going or not failures):
                name, notebook, now = waiting.pop(0)
                running.append((Execution(book, name, notebook, timeout=timeout).start(), now))
            for one in [one for one in running if one[0].over()]:
                run, now = one
                try:
                    result = with_outputs(run.notebook, tidy(run.outcome()))
                    result.metadata["bdpo"] = {"key": now}
                    save(book, book.executed(run.name), result)
                    seconds[run.name] = round(run.seconds, 1)
                    write(times, as_json({name: seconds[name] for name in names if name in seconds}))
                    (book.out / "failed" / f"{run.name}.ipynb").unlink(missing_ok=True)
                    finished.append(run.name)
                    mark = "executed"
                except BookError as error:
                    book.executed(run.name).unlink(missing_ok=True)  # of code that is no more
                    failures.append(str(error))
                    mark = "FAILED"
                finally:
                    run.stop()
                    running.remove(one)
                bar.clear()
                say(f"{mark} {run.name} in {run.seconds:.1f} s")
                bar.update()
            bar.set_postfix_str(", ".join(f"{run.name} {run.seconds:.0f} s" for run, _ in running))
            time.sleep(0.1)
    finally:
        bar.close()
        for run, _ in running:
            run.stop()
    if failures:
        left = f"\n\nnot executed: {', '.join(name for name, *_ in waiting)}" if waiting else ""
        raise BookError("\n\n".join(failures) + left)
    return finished


def choose(book: Book, notebook: str) -> Path:
    """The text of a notebook, asked for by name or by path.

    Raises
    ------
    BookError
        If there is no such notebook.
    """
    name = Path(notebook).name
    name = name.removesuffix(Path(name).suffix) if Path(name).suffix in (".md", ".ipynb") else name
    known = {text.stem: text for text in book.texts}
    if name not in known:
        raise BookError(f"no notebook {notebook!r}; there are: {', '.join(known) or 'none'}")
    return known[name]


def typed(text: str, default: Any) -> Any:
    """A parameter from the command line: kept as text where the default is text, else read as a Python literal."""
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def run(
    book: Book, notebook: str, parameters: Mapping[str, str], *, out: Path | None = None, timeout: float = 600.0
) -> tuple[Path, list[dict[str, Any]]]:
    """Execute one notebook with parameters of one's own, beside the book and never into it.

    Parameters
    ----------
    book
        The book.
    notebook
        Its name, or the path of its text or notebook.
    parameters
        Values as typed on a command line.
    out
        Where the executed notebook goes; by default `_build/runs/NAME-PARAMETERS.ipynb`.
    timeout
        Seconds after which it is stopped.

    Returns
    -------
    tuple
        The executed notebook's path, and the rows that it ruled on.

    Raises
    ------
    BookError
        If the notebook or a parameter is unknown, ``out`` belongs to the book, or the notebook fails; wrong values
        of known parameters are refused by the notebook itself.
    """
    text = choose(book, notebook)
    source = read_text(text)
    defaults = declared(source)
    if unknown := [name for name in parameters if name not in defaults]:
        allowed = parameters_cell(source) or "(none)"
        raise BookError(
            f"{text.stem} has no parameter {', '.join(unknown)}; it has, with these defaults:\n"
            + "\n".join("    " + line for line in allowed.splitlines())
        )
    values = {name: typed(value, defaults[name]) for name, value in parameters.items()}
    label = re.sub(r"[^\w.=-]+", "_", "-".join([text.stem, *(f"{k}={v}" for k, v in parameters.items())]))
    if len(label) > 100:
        label = f"{text.stem}-{digest([label])[:12]}"
    target = (out or book.out / "runs" / f"{label}.ipynb").resolve()
    if target.suffix != ".ipynb":
        raise BookError(f"{out}: the name of an executed notebook ends in .ipynb")
    if target.parent in (book.root / "notebooks", book.out / "notebooks"):
        raise BookError(f"{out} would overwrite the book's own notebook; choose another folder")
    execution = Execution(book, text.stem, source, values, timeout, label).start()
    try:
        while not execution.over():
            time.sleep(0.05)
        result = tidy(execution.outcome())
    finally:
        execution.stop()
    save(book, target, result)
    return target, claims_in(result, text.stem)


# ---------------------------------------------------------------- the ledger


def claims_in(notebook: Any, name: str) -> list[dict[str, Any]]:
    """The rows that an executed notebook carries in its outputs."""
    return [
        {**output.data[CLAIM], "notebook": name}
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if CLAIM in output.get("data", {})
    ]


def collect(book: Book) -> list[dict[str, Any]]:
    """Gather what the executed notebooks ruled into one ledger, and write it to `_build/claims`.

    Returns
    -------
    list of dict
        One row for each id of the index.

    Raises
    ------
    BookError
        If an id is ruled on twice, or is none of the index.
    """
    import nbformat

    from bdpo import ledger

    rows = [
        row
        for text in book.texts
        for row in claims_in(nbformat.read(book.executed(text.stem), as_version=4), text.stem)
    ]
    owner: dict[str, str] = {}
    for row in rows:
        if row["id"] in owner:
            places = " and ".join(dict.fromkeys([owner[row["id"]], row["notebook"]]))
            raise BookError(f"claim {row['id']} is displayed twice, in {places}; one cell may rule on it")
        owner[row["id"]] = row["notebook"]
    try:
        whole = ledger.collect(rows)
    except ValueError as error:
        raise BookError(str(error)) from None
    folder = book.out / "claims"
    for stale in {p.stem for p in folder.glob("*.json")} - {row["id"] for row in whole}:
        (folder / f"{stale}.json").unlink()
    for row in whole:
        write(folder / f"{row['id']}.json", as_json(row))
    return whole


def provenance(book: Book) -> dict[str, Any]:
    """What the ledger was made with; nothing of the machine beyond its kind."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=book.root, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    changes = git("status", "--porcelain", "--untracked-files=no")
    packages = {}
    for name in ("numpy", "sympy", "mpmath", "python-flint", "hypothesis", "torch", "matplotlib", "jupyter-book"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "version": bdpo.__version__,
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": packages,
        "seconds": read_json(book.out / "seconds.json"),
    }


def claims(book: Book) -> list[dict[str, Any]]:
    """The collected ledger.

    Raises
    ------
    BookError
        If nothing is collected yet.
    """
    path = book.out / "claims.json"
    if not path.is_file():
        raise BookError(f"no verdicts yet; {BUILD}")
    return read_json(path)["claims"]


# ---------------------------------------------------------------- the site


def pages(book: Book) -> list[str]:
    """The pages that the table of contents names."""
    from sphinx_external_toc.parsing import parse_toc_yaml

    return list(parse_toc_yaml(book.root / "_toc.yml"))


def missing_pages(book: Book) -> list[str]:
    """The pages of the table of contents that the site does not have."""
    return [page for page in pages(book) if not (book.html / f"{page}.html").is_file()]


def site(book: Book) -> None:
    """Build the HTML with warnings as errors.

    Raises
    ------
    BookError
        If Jupyter Book warns or fails, or a page of the table of contents is missing.
    """
    doctrees, state = book.out / ".doctrees", book.out / "state.json"
    environment, pickle = site_environment(book), doctrees / "environment.pickle"
    # Sphinx reuses pages that an older extension read, and forgets warnings it has given once.
    before = read_json(state)
    if not pickle.is_file() or before != {**before, "environment": environment, "pickle": pickle.stat().st_mtime_ns}:
        shutil.rmtree(doctrees, ignore_errors=True)
    shutil.rmtree(book.html, ignore_errors=True)  # else removed pages and old assets stay for ever
    log = book.out / "logs" / "html.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    order = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", order, "build", ".", "-W", "-n", "--keep-going"]
    path = os.pathsep.join(filter(None, [str(book.root), os.environ.get("PYTHONPATH")]))
    try:
        with log.open("wb") as out:
            code = subprocess.run(
                command,
                cwd=book.root,
                env={**os.environ, "PYTHONPATH": path, "PYTHONUTF8": "1", "NO_COLOR": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            ).returncode
        if code:
            told = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text("utf-8", "replace")).replace(f"{book.root}{os.sep}", "")
            told = re.sub(r"(?<=\.ipynb):(\d+)(\d{4})\b", lambda m: f", cell {m[1]}, line {int(m[2])}", told)
            lines = told.splitlines()
            said = [line for line in lines if re.search(r"\b(WARNING|ERROR|CRITICAL)\b", line)] or lines[-15:]
            raise BookError("\n".join(["the pages have warnings:", *dict.fromkeys(said), f"log: {book.short(log)}"]))
        if missing := missing_pages(book):
            raise BookError(f"{len(missing)} of {len(pages(book))} pages are missing: {', '.join(missing)}")
    except BaseException:
        shutil.rmtree(doctrees, ignore_errors=True)
        raise
    write(state, as_json({"environment": environment, "pickle": pickle.stat().st_mtime_ns}))


def site_environment(book: Book) -> str:
    """Hash of what makes all pages out of date: configuration, extension, versions."""
    extension = list(tree(book.root / "book" / "_ext"))
    code = "\n".join(path.read_text("utf-8") for path in extension if path.suffix == ".py")
    top = [book.root / name for name in ("_config.yml", "_toc.yml", "requirements.lock")]
    files = {*extension, *closure(book.root, code), *filter(Path.is_file, top)}
    return digest([platform.python_version(), *contents(book.root, files)])


def site_inputs(book: Book) -> str:
    """Hash of all that the site is made from."""
    folders = [book.root / name for name in ("book", "notebooks", "bdpo", "_build/notebooks")]
    top = [*book.root.glob("*.md"), *book.root.glob("_*.yml"), *book.root.glob("requirements.lock")]
    return digest([platform.python_version(), *contents(book.root, {*tree(*folders), *top})])


def build(
    book: Book,
    *,
    jobs: int | None = None,
    timeout: float = 600.0,
    keep_going: bool = False,
    force: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Pair, execute, collect, build; each only where something changed. Knobs as in :func:`execute`.

    Returns
    -------
    dict
        The ledger with its provenance, as it lies in `_build/html/claims.json`.

    Raises
    ------
    BookError
        If any step fails, or another build runs in the same folder.
    """
    import filelock

    book.out.mkdir(exist_ok=True)
    try:
        with filelock.FileLock(book.out / ".lock", timeout=0):
            for path in sync(book):
                say(f"wrote {book.short(path)}")
            execute(book, jobs=jobs, timeout=timeout, keep_going=keep_going, force=force, say=say)
            stamp, published = book.out / "site.sha256", book.html / "claims.json"
            inputs = site_inputs(book)
            if not published.is_file() or missing_pages(book) or not stamp.is_file() or stamp.read_text() != inputs:
                stamp.unlink(missing_ok=True)
                rows = collect(book)
                write(book.out / "claims.json", as_json({"claims": rows, "provenance": provenance(book)}))
                began = time.monotonic()
                site(book)
                say(f"built {len(pages(book))} pages in {time.monotonic() - began:.1f} s")
                stamp.write_text(inputs)
            whole = {"claims": claims(book), "provenance": provenance(book)}
            for path in (book.out / "claims.json", published):
                write(path, as_json(whole))
            return whole
    except filelock.Timeout:
        raise BookError(f"another build is running in {book.root}; wait for it to end") from None


def server(book: Book, port: int = 8000) -> http.server.ThreadingHTTPServer:
    """A server of the site for this machine only; call its ``serve_forever``.

    Raises
    ------
    BookError
        If the site is not built, or the port is taken.
    """
    if not (book.html / "index.html").is_file():
        raise BookError(f"the book is not built yet; {BUILD}")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(book.html))
    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        raise BookError(f"cannot serve on port {port} ({error}); choose another with --port") from None
