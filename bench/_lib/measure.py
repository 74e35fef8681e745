"""What the benchmarks share: one thread, interleaved rounds, medians with their spread, peak memory of a child.

Times are CPU seconds of this process at one thread. On a machine that does other things too they vary far less than
the clock on the wall; what is left, other work in the shared cache and clock rates, is taken out by interleaving: every
round runs each variant once, in another order, and ratios are formed within a round.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything loads torch or NumPy

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

torch.set_num_threads(1)


def interleave(variants: Mapping[str, Callable[[], object]], *, rounds: int, title: str = "") -> dict[str, list[float]]:
    """CPU seconds of each variant in each round; one round before them warms up and is not counted."""
    order, seconds = list(variants), {name: [] for name in variants}
    shuffle = random.Random(0).shuffle
    for count in tqdm(range(rounds + 1), desc=title, file=sys.stderr, disable=None, leave=False):
        shuffle(order)
        for name in order:
            start = time.process_time()
            variants[name]()
            if count:
                seconds[name].append(time.process_time() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, to: str) -> tuple[float, float, float]:
    """The median of the ratios within a round, and their lower and upper quartile."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def peak_of_child(script: str, *arguments: str) -> float:
    """MiB by which the high-water mark of a child process rises inside `growth`, which the child must call.

    The mark is a fact of a whole process, so each variant has its own.
    """
    command = [sys.executable, script, *arguments]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(answer.splitlines()[-1])


def growth(run: Callable[[], object], *, warm: Callable[[], object]) -> None:
    """In the child: run once, and print how far the high-water mark rose above the memory held before.

    ``warm`` does the same on a tiny input first, so that what libraries set up once is held before.
    """
    warm()
    before = _resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the mark down to what is held now
    run()
    print(_resident_mib("VmHWM") - before)


def _resident_mib(what: str) -> float:
    """A line of Linux's account of this process. ``getrusage`` will not do: a child inherits its parent's mark."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(f"{what}:")) / 2**10
