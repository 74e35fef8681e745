"""``python -m bdpo.toy NAME`` makes the rows of a recorded sweep again, and goes on where it was stopped."""

from __future__ import annotations

import argparse

from bdpo.toy.sweeps import RECORDED, record


def main(arguments: list[str] | None = None) -> None:
    """The command.

    Parameters
    ----------
    arguments
        Those of the command line without it.
    """
    parser = argparse.ArgumentParser(prog="python -m bdpo.toy", description=__doc__)
    parser.add_argument("name", choices=list(RECORDED), help="; ".join(f"{k}: {v.title}" for k, v in RECORDED.items()))
    parser.add_argument("--seeds", type=int, help="how many seeds (as recorded)")
    parser.add_argument("--workers", type=int, default=1, help="processes at work (1)")
    parser.add_argument("--chunks", help="folder of finished chunks (_build/toy/NAME)")
    parser.add_argument("--out", help="folder of results (book/results)")
    given = parser.parse_args(arguments)
    print(record(given.name, seeds=given.seeds, workers=given.workers, folder=given.chunks, root=given.out))


if __name__ == "__main__":
    main()
