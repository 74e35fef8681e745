r"""Sweeps of the synthetic experiment: many runs in chunks, resumed after a kill; and the ones the book is made from.

``python -m bdpo.toy table1`` makes the rows of ``book/results/toy/table1.parquet`` again.

**The central reading.** Section 6.1 and Appendix B fix the world, :math:`\alpha`, :math:`\beta`, the clip and the 300
steps of the reference. What they leave open is set here as somebody would who has only the paper to go by, before
looking at a result:

===============  =============================================  =====================================================
left open        central                                        reason
===============  =============================================  =====================================================
policy           network, one-hot prompts, one hidden layer     the toy that the paper extends has networks on one-hot
                 of 64 ReLU units, torch's initialisation       prompts; width and layers are our choice
optimiser        Adam, rate 1e-3                                torch's defaults
steps            300                                            as many as the reference is given
data             2000 sampled pairs, batches of 64              "the training dataset"; sizes are our choice
masks            that share of all cells, at random by seed     "randomly mask some (prompt, response) pairs"
reference        DPO on the same data, from the first policy;   Appendix B; starting there is what DPO does
                 every method starts from it
reward           R1, :math:`\sum_x\mathbb{E}_\pi[u]` with       Eq 34 up to its factor; R2, normalised by prompt, is
                 :math:`u = e^{-\alpha(y-x)^2}`                 in the rows, too
seeds            128                                            masks, first policies and data are drawn anew in each
===============  =============================================  =====================================================
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bdpo import results
from bdpo.toy import distances
from bdpo.toy.engine import MEASURES, OPTIONAL, Settings, grid, run
from bdpo.toy.methods import METHODS, PAPER

if TYPE_CHECKING:
    import pandas as pd

#: The central reading; Table 1 varies its method, mask rate and seed.
CENTRAL = Settings(
    policy="mlp",
    width=64,
    init="random",
    optimizer="adam",
    learning_rate=1e-3,
    steps=300,
    data="fixed",
    pairs=2000,
    batch=64,
)
MASK_RATES = (0.0, 0.2, 0.4)


# ---------------------------------------------------------------- the runner


def sweep(
    settings: Sequence[Settings],
    folder: str | Path,
    *,
    workers: int = 1,
    chunk: int = 200,
    columns: Sequence[str] | None = None,
    rows: Callable[[Sequence[Settings]], pd.DataFrame] = run,
    progress: bool = True,
) -> tuple[pd.DataFrame, float]:
    """Many runs, chunk by chunk, each chunk kept in a file; a sweep that was killed goes on where it was.

    Parameters
    ----------
    settings
        The runs, at least 1. Runs that share a reference are best next to each other: method is the last axis.
    folder
        Where the chunks are kept. A chunk is written under another name and renamed, so what is there is whole.
    workers
        Processes at work. The rows do not depend on it.
    chunk
        Runs a file.
    columns
        The columns to keep of the table, all without it.
    rows
        What makes a chunk's table, `bdpo.toy.run` without it.
    progress
        Whether to show a bar.

    Returns
    -------
    tuple
        The rows of all runs, in the order of the settings, and the seconds that their chunks took together.

    Raises
    ------
    ValueError
        If there is no run, a number is below 1, or the folder holds chunks of another sweep.
    """
    import pandas as pd
    from tqdm import tqdm

    settings, folder = list(settings), Path(folder)
    if not settings or chunk < 1 or workers < 1:
        raise ValueError(f"{len(settings)} runs, chunk = {chunk}, workers = {workers}; allowed: at least 1 of each")
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, settings, chunk, columns)
    parts = [settings[k : k + chunk] for k in range(0, len(settings), chunk)]
    files = [folder / f"{k:05d}.parquet" for k in range(len(parts))]
    open_ = [k for k, file in enumerate(files) if not file.is_file()]
    with tqdm(total=len(settings), unit="run", disable=not progress, mininterval=1) as bar:
        bar.update(sum(len(part) for part, file in zip(parts, files, strict=True) if file.is_file()))
        for k in _each(workers, [(parts[k], files[k], columns, k, rows) for k in open_]):
            bar.update(len(parts[k]))
    table = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
    seconds = float(table.groupby("chunk").chunk_seconds.first().sum())
    return table.drop(columns=["chunk", "chunk_seconds"]), seconds


def _claim(folder: Path, settings: list[Settings], chunk: int, columns: Sequence[str] | None) -> None:
    """Say in the folder which sweep it holds, or refuse if it holds another."""
    what = json.dumps([[asdict(s) for s in settings], chunk, columns], default=float)
    digest = hashlib.sha256(what.encode()).hexdigest()
    note = folder / "sweep.txt"
    if note.is_file() and note.read_text("utf-8") != digest:
        raise ValueError(f"{folder} holds chunks of another sweep; remove it, or choose another folder")
    half = note.with_name(f".{note.name}.{os.getpid()}")
    half.write_text(digest, "utf-8")
    half.replace(note)


def _each(workers: int, jobs: list[tuple[Any, ...]]) -> Iterator[int]:
    """Numbers of chunks, as they are done."""
    if workers == 1:
        yield from (_chunk(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(_chunk, *job) for job in jobs]
        try:
            for done in as_completed(waiting):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _chunk(
    settings: list[Settings],
    file: Path,
    columns: Sequence[str] | None,
    number: int,
    rows: Callable[[Sequence[Settings]], pd.DataFrame],
) -> int:
    start = time.perf_counter()
    table = rows(settings)
    table = (table if columns is None else table[list(columns)]).copy()
    table["chunk"], table["chunk_seconds"] = number, time.perf_counter() - start
    half = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        table.to_parquet(half, engine="pyarrow", compression="zstd", index=False)
        half.replace(file)
    finally:
        half.unlink(missing_ok=True)
    return number


# ---------------------------------------------------------------- the recorded sweeps


@dataclass(frozen=True)
class Recorded:
    """A sweep the book is made from."""

    title: str  #: what it is
    settings: Callable[[int], list[Settings]]  #: its runs, from how many seeds, 0 on
    seeds: int  #: how many it was recorded with
    columns: tuple[str, ...] | None = None  #: the columns kept; all without
    narrow: bool = False  #: whether measures are rounded to float32 to save room
    rows: Callable[[Sequence[Settings]], pd.DataFrame] = run  #: what makes a table of runs
    chunk: int = 200  #: runs a file of a sweep that is not yet whole


def table1(seeds: int = 128) -> list[Settings]:
    """Table 1 under the central reading: the paper's six, one peer, and three ways to learn from a reward."""
    base = replace(CENTRAL, record=(0, 30, 100))
    methods = (*PAPER, "ipo", "rlhf", "ppo", "oracle")
    return grid(base, mask_rate=MASK_RATES, seed=range(seeds), method=methods)


_SAMPLED = (("fixed", 500), ("fixed", 5000), ("fresh", 2000))
_ALL = (("expectation", 2000), *_SAMPLED)
#: Policy, first policy, optimiser, rates (a decade or more around the paper's level of reward), data and size of a
#: fixed set. The network sees no exact expectation, which would cost as much as all else and is close to 5000 pairs.
LEARNERS: tuple[tuple[str, str, str, tuple[float, ...], tuple[tuple[str, int], ...]], ...] = (
    ("tabular", "uniform", "sgd", (0.3, 3.0, 30.0), _ALL),
    ("tabular", "uniform", "adam", (0.001, 0.01, 0.1), _ALL),
    ("tabular", "random", "sgd", (0.3, 3.0, 30.0), _ALL),
    ("tabular", "random", "adam", (0.001, 0.01, 0.1), _ALL),
    ("mlp", "random", "sgd", (0.1, 0.3, 3.0), _SAMPLED),
    ("mlp", "random", "adam", (0.0003, 0.001, 0.01), _SAMPLED),
)


def multiverse(seeds: int = 16) -> list[Settings]:
    """Every reading that we could think of, crossed: learner, rate, steps, data, and where a method starts.

    Steps 100, 300 and 1000 are rows of one run. Starts other than the reference are crossed with fresh
    data only.
    """
    runs = []
    for policy, init, optimizer, rates, sources in LEARNERS:
        for data, pairs in sources:
            base = Settings(
                policy=policy, init=init, optimizer=optimizer, data=data, pairs=pairs, steps=1000, record=(100, 300)
            )
            starts = ("reference", "initial") if data == "fresh" else ("reference",)
            axes = {"learning_rate": rates, "mask_rate": MASK_RATES, "seed": range(seeds), "start": starts}
            runs += grid(base, **axes, method=PAPER)
    return runs


#: Readings that differ from the central one in one thing that `multiverse` does not vary, by name.
VARIATIONS: dict[str, dict[str, Any]] = {
    "central": {},
    "gradient through λ": {"detach_lambda": False},
    "16 hidden units": {"width": 16},
    "256 hidden units": {"width": 256},
    "batches of 16": {"batch": 16},
    "batches of 256": {"batch": 256},
    "all pairs each step": {"batch": 0},
    "exact expectation": {"data": "expectation"},
    "first policy even": {"init": "uniform"},
    "pairs from the first policy": {"sampling": "initial"},
    "masks: each cell by itself": {"mask_rule": "independent"},
    "masks: as many a prompt": {"mask_rule": "prompt"},
    "masks: never the best": {"mask_rule": "spare_best"},
    "masked pairs dropped": {"masked_pairs": "dropped"},
}


def variations(seeds: int = 16) -> list[Settings]:
    """The central reading with one thing changed at a time, each at three rates; steps 100 and 300 are its rows."""
    axes: dict[str, Any] = {"learning_rate": (0.0003, 0.001, 0.01), "mask_rate": MASK_RATES, "seed": range(seeds)}
    base = replace(CENTRAL, record=(100,), watch_every=0)
    return [s for change in VARIATIONS.values() for s in grid(replace(base, **change), **axes, method=PAPER)]


def stability(seeds: int = 8) -> list[Settings]:
    r"""How loss and reward fare as beta and label noise grow, in both policies, at rates below and above the threshold.

    For a table of logits, DPO's loss has a curvature of at most
    :math:`\frac{\beta^2}{4}\cdot\frac1n\cdot\frac{2}{m-1}` at a prompt with :math:`m` responses that are not masked, so
    that plain descent at a rate up to :math:`\eta = 4n(m-1)/\beta^2` lets it fall at every step: 1520 at beta = 1
    without a mask.
    """
    methods = (*PAPER, "ipo", "conservative_dpo", "robust_dpo")
    axes: dict[str, Any] = {"label_noise": (0.0, 0.1, 0.2, 0.3, 0.4), "seed": range(seeds)}
    betas = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    base = Settings(mask_rate=0.2, init="random", init_scale=0.1, watch_every=1)
    table = grid(base, learning_rate=(10.0, 100.0), **axes, beta=betas, method=methods)
    network = replace(base, policy="mlp", init_scale=1.0, learning_rate=1.0)
    return table + grid(network, **axes, beta=betas, method=methods)


_FEW = (
    *("policy", "init", "optimizer", "learning_rate", "data", "pairs", "start", "mask_rate", "seed", "method", "step"),
    *("status", "reward", "reward_normalised", "masked_mass", "reference_masked_mass", "kl", "rise_max", "rebound"),
)
_VARIED = (
    *("detach_lambda", "width", "batch", "data", "init", "sampling", "mask_rule", "masked_pairs", "learning_rate"),
    *("mask_rate", "seed", "method", "step", "status", "reward", "reward_normalised", "masked_mass"),
    *("reference_masked_mass", "kl"),
)
_NEAR = (
    *(
        "policy",
        "init",
        "reward_start",
        "shift",
        "sampling",
        "mask_rate",
        "label_noise",
        "seed",
        "method",
        "step",
        "status",
    ),
    *("reward", "kl", "masked_mass", "ratio_probability", "ratio_log", "ratio_logit"),
    *("reference_reward", "reference_masked_mass", "tv_rlhf", "tv_ppo", "tv_rlhf_end", "tv_ppo_end"),
)
RECORDED = {
    "table1": Recorded("Table 1 under the central reading", table1, 128),
    "multiverse": Recorded("Every reading of the synthetic experiment", multiverse, 16, _FEW, narrow=True),
    "variations": Recorded("The central reading with one thing changed", variations, 16, _VARIED, narrow=True),
    "against_ppo": Recorded(
        "Distances to PPO under masks, label noise and distribution shift",
        distances.against_ppo,
        16,
        _NEAR,
        narrow=True,
        rows=distances.rows,
        chunk=10 * len(METHODS),
    ),
    "stability": Recorded("Stability over beta and label noise", stability, 8, narrow=True),
}


def record(
    name: str,
    *,
    seeds: int | None = None,
    workers: int = 1,
    folder: str | Path | None = None,
    root: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Run one of the recorded sweeps and write its rows, as ``toy/NAME``.

    Parameters
    ----------
    name
        One of ``RECORDED``.
    seeds
        How many; as recorded without it.
    workers, progress
        As in `sweep`.
    folder
        Where chunks are kept until the sweep is whole; ``_build/toy/NAME`` of the book without it.
    root
        Where results are kept; ``book/results`` without it.

    Returns
    -------
    Path
        The Parquet file.

    Raises
    ------
    ValueError
        If the name is unknown, or seeds is below 1.
    """
    if name not in RECORDED:
        raise ValueError(f"name is {name!r}; allowed: {', '.join(RECORDED)}")
    what = RECORDED[name]
    seeds = what.seeds if seeds is None else seeds
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; allowed: whole numbers of at least 1")
    settings = what.settings(seeds)
    folder = results.folder(root).parent.parent / "_build" / "toy" / name if folder is None else Path(folder)
    table, seconds = sweep(
        settings, folder, workers=workers, columns=what.columns, rows=what.rows, chunk=what.chunk, progress=progress
    )
    measures = [column for column in table if column in MEASURES or column.startswith("tv_")]
    if what.narrow:
        most = float(np.finfo("float32").max)  # a loss beyond it is written as this number
        table[measures] = table[measures].clip(-most, most).astype("float32")
    return results.write(
        table,
        f"toy/{name}",
        parameters={
            "sweep": name,
            "title": what.title,
            "seeds": seeds,
            "runs": len(settings),
            "command": f"python -m bdpo.toy {name}",
        },
        seconds=seconds,
        seeds=range(seeds),
        optional=[column for column in OPTIONAL if column in table],
        root=root,
    )
