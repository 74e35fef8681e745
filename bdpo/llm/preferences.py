r"""Preference files as rows with an explicit prompt: ``prompt``, ``chosen``, ``rejected``.

Three forms are read, from JSON Lines (also gzipped), Parquet, the hub, or rows in memory:

=============  ==========================================  ==================================================
form           columns                                     which response is chosen
=============  ==========================================  ==================================================
``hh``         ``chosen``, ``rejected``: two transcripts   the file says so: one label
``safe-rlhf``  ``prompt``, ``response_0``, ``response_1``  ``label``: ``helpful`` reads ``better_response_id``,
               and ids                                     ``safe`` ``safer_response_id``, ``overall``
                                                           ``overall_response_id``
``explicit``   ``prompt``, ``chosen``, ``rejected``        the file says so: one label
=============  ==========================================  ==================================================

The paper does not say which of PKU-SafeRLHF's labels it trains on, so there is no default for that form.

A pair that cannot be trained on is dropped and counted under its reason (:data:`DROPPED`); a change of text that is
harmless but worth knowing is a note (:data:`NOTES`). A file that is not what it claims to be is an error that names
the file, the line and the remedy: nothing is guessed.

**Transcripts.** A turn begins with ``\n\nHuman:`` or ``\n\nAssistant:``; the words ``Human:`` inside a line or after a
single newline are text, and so are blank lines. Consecutive turns of one speaker are joined by a newline. The prompt
is every turn before the first in which the Assistant's words differ, with ``\n\nAssistant:`` at its end, and the
response is that turn with a leading blank. The longest common *prefix of characters*, which TRL's ``extract_prompt``
takes, would give to the prompt the first words of two responses that begin alike. A loss that is a difference of
log-probs does not notice; those that weight the two responses by their log-probs, as bDPO does, do.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

FORMS = ("hh", "safe-rlhf", "explicit")
#: The label's name on the command line, and the column that holds it in the ``safe-rlhf`` form.
LABELS = {"helpful": "better_response_id", "safe": "safer_response_id", "overall": "overall_response_id"}
#: Datasets on the hub, by the names used here.
HUB = {"hh": "Anthropic/hh-rlhf", "safe-rlhf": "PKU-Alignment/PKU-SafeRLHF"}
#: Folders of `Anthropic/hh-rlhf` that a label stands for.
HH_FOLDERS = {
    "helpful": ("helpful-base", "helpful-online", "helpful-rejection-sampled"),
    "safe": ("harmless-base",),
    "overall": ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"),
}
#: The labels of these datasets; PKU-SafeRLHF has none for both at once.
HUB_LABELS = {"hh": tuple(HH_FOLDERS), "safe-rlhf": ("helpful", "safe")}
#: Why a pair is dropped.
DROPPED = {
    "empty response": "one of the responses has no words",
    "equal responses": "the two responses are the same text",
    "no label": "the label is null: nobody judged the pair",
    "label against flags": "the label `safer` names the unsafe response of a safe and an unsafe one",
    "empty prompt": "the prompt has no words",
    "one transcript goes on": "one transcript ends where the other has further turns: no two responses to compare",
    "human turns differ": "the transcripts part in a Human turn: the responses answer different prompts",
    "human has the last word": "a transcript does not end with a turn of the Assistant",
}
#: What is changed or worth knowing in pairs that are kept.
NOTES = {
    "turns joined": "consecutive turns of one speaker were joined",
    "differ before the last turn": "the responses hold further turns, since the transcripts part before the last one",
    "longer response chosen": "the chosen response has more characters",
}


class PreferenceError(ValueError):
    """A preference file that cannot be read; the message names the file, the line where there is one, and the fix."""


class _Drop(Exception):
    """The reason for which a pair is dropped."""


@dataclass
class Report:
    """What was read, kept and dropped. Reasons are the keys of :data:`DROPPED`, notes those of :data:`NOTES`."""

    source: str
    form: str
    label: str | None
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return vars(self) | {"dropped": dict(self.dropped), "notes": dict(self.notes)}

    def __str__(self) -> str:
        label = f", label {self.label}" if self.label else ""
        lines = [f"{self.source} ({self.form}{label}): {self.read} pairs read, {self.kept} kept"]
        lines += [f"  dropped {n}: {reason} ({DROPPED[reason]})" for reason, n in sorted(self.dropped.items())]
        lines += [f"  note {n}: {note} ({NOTES[note]})" for note, n in sorted(self.notes.items())]
        return "\n".join(lines)


@dataclass(frozen=True)
class Preferences:
    """Pairs with explicit prompts, and the report on how they were read.

    Each row has ``prompt``, ``chosen``, ``rejected``, and ``line``: its line in the file, or its number from 1. The
    form ``safe-rlhf`` adds ``chosen_safe`` and ``rejected_safe`` where the file has these flags, and pairs of the
    controlled language also have ``chosen_help``, ``chosen_harm``, ``rejected_help``, ``rejected_harm``.
    """

    rows: list[dict[str, Any]]
    report: Report

    def __len__(self) -> int:
        return len(self.rows)


def read(
    source: str | Path,
    *,
    label: str | None = None,
    form: str | None = None,
    split: str = "train",
    limit: int | None = None,
) -> Preferences:
    """Read a preference file, or a dataset of the hub.

    Parameters
    ----------
    source
        A path to ``.jsonl`` (gzipped or not: the first bytes decide) or ``.parquet``; or ``"hh"`` or ``"safe-rlhf"``
        for the dataset on the hub, which needs the network or a filled cache.
    label
        ``"helpful"``, ``"safe"`` or ``"overall"``. Must be given for the ``safe-rlhf`` form and for ``"hh"`` of the
        hub, where it chooses the folders. Other files carry one label; it is then only noted in the report.
    form
        One of ``hh``, ``safe-rlhf``, ``explicit``; by default, the one that the columns of the first row fit.
    split
        Of a dataset on the hub: ``"train"`` or ``"test"``. A file is read whole.
    limit
        Read only so many pairs, from the start; by default, all.

    Returns
    -------
    Preferences
        At least one row, in the order of the file.

    Raises
    ------
    PreferenceError
        For a file that is missing, empty, of another format, or a pointer of Git LFS; for a line that is no JSON
        object; for missing columns and values of the wrong type; for a label that the file does not have; if no pair
        is left; if the hub cannot be reached.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise PreferenceError(f"limit is {limit!r}; allowed: a whole number of at least 1, or None for all pairs")
    _check_label(label)
    if isinstance(source, str) and source in HUB:
        if label not in HUB_LABELS[source]:
            raise PreferenceError(f"{HUB[source]}: label is {label!r}; choose {_or(HUB_LABELS[source])}")
        return _read(_hub_rows(source, label, split), f"{HUB[source]} {split}", label, form or source, limit)
    path = Path(source)
    return _read(_file_rows(path), str(path), label, form, limit)


def from_rows(
    rows: Iterable[Mapping[str, Any]], *, label: str | None = None, form: str | None = None, name: str = "rows"
) -> Preferences:
    """The same for rows in memory, such as the pairs of the controlled language.

    Parameters
    ----------
    rows
        Mappings with the columns of one of the forms.
    label, form
        As in `read`.
    name
        What to call the rows in messages.

    Raises
    ------
    PreferenceError
        As `read`.
    """
    _check_label(label)
    return _read(enumerate(rows, start=1), name, label, form, None)


def turns(transcript: str) -> list[tuple[str, str]]:
    r"""The turns of a transcript as (speaker, text), text stripped; consecutive turns of one speaker joined.

    Raises
    ------
    ValueError
        If the transcript does not begin with ``\n\nHuman:`` or ``\n\nAssistant:``.
    """
    return _joined(_marked(transcript))


# ---------------------------------------------------------------- one pair


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _marked(transcript: str) -> list[tuple[str, str]]:
    before, *parts = _TURN.split(transcript if transcript.startswith("\n\n") else "\n\n" + transcript.lstrip())
    if before.strip() or not parts:
        raise ValueError(r"a transcript begins with '\n\nHuman:' or '\n\nAssistant:'")
    return [(who, text.strip()) for who, text in zip(parts[::2], parts[1::2], strict=True)]


def _joined(marked: list[tuple[str, str]]) -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    for who, text in marked:
        if out and out[-1][0] == who:
            out[-1] = (who, f"{out[-1][1]}\n{text}".strip())  # a blank line would make a mark of a text's "Human:"
        else:
            out.append((who, text))
    return out


def _written(part: list[tuple[str, str]]) -> str:
    return "".join(f"\n\n{who}: {text}".rstrip() for who, text in part)


def _hh(row: Mapping[str, Any], label: str | None, notes: Counter[str]) -> dict[str, Any]:
    both = [_marked(row[side]) for side in ("chosen", "rejected")]
    chosen, rejected = (_joined(marked) for marked in both)
    if chosen == rejected:
        raise _Drop("equal responses")
    if chosen[-1][0] != "Assistant" or rejected[-1][0] != "Assistant":
        raise _Drop("human has the last word")
    at = next((k for k, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if at is None:
        raise _Drop("one transcript goes on")
    if chosen[at][0] != "Assistant" or rejected[at][0] != "Assistant":
        raise _Drop("human turns differ")
    if at == 0:
        raise _Drop("empty prompt")
    if not chosen[at][1] or not rejected[at][1] or not chosen[-1][1] or not rejected[-1][1]:
        raise _Drop("empty response")
    prompt = _written(chosen[:at]) + "\n\nAssistant:"
    answers = [_written(side[at:]).removeprefix("\n\nAssistant:") for side in (chosen, rejected)]
    notes["turns joined"] += any(len(_joined(marked)) < len(marked) for marked in both)
    notes["differ before the last turn"] += at < max(len(chosen), len(rejected)) - 1
    return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}


def _safe_rlhf(row: Mapping[str, Any], label: str | None, notes: Counter[str]) -> dict[str, Any]:
    assert label is not None
    pick = row[LABELS[label]]
    if pick is None or pick != pick:  # Parquet and pandas say null by NaN
        raise _Drop("no label")
    if pick not in (0, 1):
        raise ValueError(f"{LABELS[label]} is {pick!r}; allowed: 0, 1, or null")
    pick = int(pick)
    safe = [row.get("is_response_0_safe"), row.get("is_response_1_safe")]
    if label == "safe" and safe[1 - pick] is True and safe[pick] is False:
        raise _Drop("label against flags")
    out = {"prompt": row["prompt"], "chosen": row[f"response_{pick}"], "rejected": row[f"response_{1 - pick}"]}
    if all(isinstance(flag, bool) for flag in safe):
        out |= {"chosen_safe": safe[pick], "rejected_safe": safe[1 - pick]}
    for name in ("help", "harm"):
        if f"{name}_0" in row and f"{name}_1" in row:
            out |= {f"chosen_{name}": row[f"{name}_{pick}"], f"rejected_{name}": row[f"{name}_{1 - pick}"]}
    return out


def _explicit(row: Mapping[str, Any], label: str | None, notes: Counter[str]) -> dict[str, Any]:
    return {side: row[side] for side in ("prompt", "chosen", "rejected")}


_TEXTS = {
    "hh": ("chosen", "rejected"),
    "safe-rlhf": ("prompt", "response_0", "response_1"),
    "explicit": ("prompt", "chosen", "rejected"),
}
_CONVERT: dict[str, Callable[[Mapping[str, Any], str | None, Counter[str]], dict[str, Any]]] = {
    "hh": _hh,
    "safe-rlhf": _safe_rlhf,
    "explicit": _explicit,
}


def _read(
    numbered: Iterable[tuple[int, Mapping[str, Any]]], name: str, label: str | None, form: str | None, limit: int | None
) -> Preferences:
    if form is not None and form not in FORMS:
        raise PreferenceError(f"form is {form!r}; allowed: {_or(FORMS)}, or None to go by the columns")
    report, rows = Report(name, form or "", label), []
    bar = {"desc": f"reading {name}", "unit": " pairs", "delay": 2, "leave": False, "disable": None}
    for line, row in tqdm(islice(numbered, limit), **bar):
        if not report.read:
            report.form = form = form or _form(row, name, line)
            _check_columns(row, form, label, name, line)
        assert form is not None
        report.read += 1
        where = f"{name}, line {line}"
        for column in _TEXTS[form]:
            if not isinstance(row.get(column), str):
                raise PreferenceError(f"{where}: {column} is {_short(row.get(column))}; it must be a text")
        try:
            notes: Counter[str] = Counter()
            try:
                pair = _CONVERT[form](row, label, notes)
            except (KeyError, ValueError) as problem:
                raise PreferenceError(f"{where}: {problem}; mend or remove the line") from problem
            _check_pair(pair)
        except _Drop as reason:
            report.dropped[str(reason)] += 1
            continue
        notes["longer response chosen"] += len(pair["chosen"]) > len(pair["rejected"])
        report.notes += notes  # a Counter's sum keeps what is above 0
        rows.append(pair | {"line": line})
    report.kept = len(rows)
    if not report.read:
        raise PreferenceError(f"{name}: no pairs in it; give a file with one JSON object a line")
    if not rows:
        raise PreferenceError(f"no pair of the file can be trained on. {report}")
    return Preferences(rows, report)


def _check_pair(pair: Mapping[str, Any]) -> None:
    if not pair["prompt"].strip():
        raise _Drop("empty prompt")
    if not pair["chosen"].strip() or not pair["rejected"].strip():
        raise _Drop("empty response")
    if pair["chosen"].strip() == pair["rejected"].strip():
        raise _Drop("equal responses")


def _check_label(label: str | None) -> None:
    if label is not None and label not in LABELS:
        raise PreferenceError(f"label is {label!r}; allowed: {_or(LABELS)}")


def _form(row: Mapping[str, Any], name: str, line: int) -> str:
    for form in ("safe-rlhf", "explicit", "hh"):  # the columns of hh are among those of explicit
        if all(column in row for column in _TEXTS[form]):
            return form
    wanted = "; ".join(f"{form}: {', '.join(_TEXTS[form])}" for form in FORMS)
    raise PreferenceError(f"{name}, line {line}: the columns are {', '.join(row) or 'none'}; expected {wanted}")


def _check_columns(row: Mapping[str, Any], form: str, label: str | None, name: str, line: int) -> None:
    if missing := [column for column in _TEXTS[form] if column not in row]:
        raise PreferenceError(
            f"{name}, line {line}: no column {', '.join(missing)}, which the form {form} has; "
            f"the columns are {', '.join(row) or 'none'}: choose another form or rename them"
        )
    if form != "safe-rlhf":
        return
    there = [key for key, column in LABELS.items() if column in row]
    if label is None:
        raise PreferenceError(f"{name}: the rows have several labels; choose the label {_or(there or LABELS)}")
    if label not in there:
        raise PreferenceError(
            f"{name}, line {line}: no column {LABELS[label]} for the label {label}; "
            f"this file has {_or(there) if there else 'no column of labels'}"
        )


# ---------------------------------------------------------------- where rows come from


def _file_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if path.is_dir() or not path.exists():
        kind = "is a folder" if path.is_dir() else "no such file"
        raise PreferenceError(f"{path}: {kind}; give a .jsonl, .jsonl.gz or .parquet file, or {_or(HUB)} for the hub")
    with path.open("rb") as stream:
        start = stream.read(40)
    if not start:
        raise PreferenceError(f"{path}: the file is empty; give a file with one JSON object a line")
    if start.startswith(b"version https://git-lfs"):
        raise PreferenceError(f"{path}: a pointer of Git LFS, not the data; fetch it with: git lfs pull")
    if start.startswith(b"PAR1"):
        return _parquet_rows(path)
    return _json_rows(path, gzip.open if start.startswith(b"\x1f\x8b") else open)


def _json_rows(path: Path, opener: Callable[..., Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    line = 0
    try:
        with opener(path, "rt", encoding="utf-8", newline="\n") as stream:
            for line, text in enumerate(stream, start=1):
                if not text.strip():
                    continue
                row = json.loads(text)
                if not isinstance(row, dict):
                    raise PreferenceError(
                        f"{path}, line {line}: {_short(row)} is no JSON object; expected one object a line (JSON Lines)"
                    )
                yield line, row
    except json.JSONDecodeError as problem:
        odd = "" if opener is gzip.open or path.suffix != ".gz" else ", and the file is not gzipped, as its name says"
        raise PreferenceError(f"{path}, line {line}: no JSON ({problem}){odd}; expected one object a line") from problem
    except UnicodeDecodeError as problem:
        raise PreferenceError(f"{path}, after line {line}: not UTF-8 ({problem.reason}); save it as UTF-8") from problem
    except (EOFError, gzip.BadGzipFile, OSError) as problem:
        raise PreferenceError(f"{path}, after line {line}: cannot be read on ({problem}); fetch it again") from problem


def _parquet_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    line = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    yield (line := line + 1), row
    except (pyarrow.ArrowException, OSError) as problem:
        raise PreferenceError(f"{path}, after row {line}: no readable Parquet ({problem}); fetch it again") from problem


def _hub_rows(name: str, label: str | None, split: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import datasets  # type: ignore[import-untyped]

    folders: tuple[str | None, ...] = HH_FOLDERS[str(label)] if name == "hh" else (None,)
    line = 0
    for folder in folders:
        where = HUB[name] + (f"/{folder}" if folder else "")
        try:
            part = datasets.load_dataset(HUB[name], data_dir=folder, split=split)
        except Exception as problem:  # the hub's errors have no common base
            if isinstance(problem, ValueError) and "split" in str(problem):
                raise PreferenceError(f"{where}: no split {split!r} ({problem})") from problem
            raise PreferenceError(
                f"{where} cannot be loaded from the hub ({type(problem).__name__}: {_short(str(problem))}). "
                "Without a network, give the path of a local .jsonl, .jsonl.gz or .parquet file of the same form"
            ) from problem
        for row in part:
            yield (line := line + 1), row


def _or(names: Iterable[str]) -> str:
    *some, last = map(repr, names)
    return f"{', '.join(some)} or {last}" if some else last


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
