"""What a loss costs beside DPO, and what sequence log-probs cost beside the plain computation.

    python bench/losses.py                 print two tables, some four minutes
    python bench/losses.py --rounds 3      a quick look
    python bench/losses.py --record        also write the raw rows to book/results/bench

The step is that of a small language model: 8 pairs of 32 tokens, two layers of width 128, 512 tokens of vocabulary,
forward, backward, AdamW. In the second table a step is one forward and backward pass from hidden states of
16 sequences of 32 scored tokens; memory is how far the high-water mark of a child process rises, the gradients that
both variants return included. Reading that mark needs Linux.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import pandas as pd
import torch
from _lib import measure
from torch import Tensor, nn

from bdpo import results
from bdpo.logps import sequence_logps
from bdpo.losses import LOSSES

PAIRS, LENGTH, WIDTH, VOCABULARY = 8, 32, 128, 512
SHAPES = ((512, 192), (32_000, 192), (128_000, 192), (128_000, 768))  # vocabulary and hidden size of the second table


class Model(nn.Module):
    """A small causal transformer that returns hidden states and log-probs; embedding and head share their weights."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.layers(self.embedding(ids), mask=self.mask, is_causal=True)
        return hidden, sequence_logps(hidden[:, :-1], ids[:, 1:], weight=self.embedding.weight)


def inputs_of(loss: str, hidden: Tensor, logps: Tensor, reference: Tensor, weight: Tensor) -> list[Tensor]:
    """What the loss takes, by name, made from one batch as a trainer would make it; ``kl`` is taken as known."""
    win, lose = logps.chunk(2)
    ref_win, ref_lose = reference.chunk(2)
    lengths = torch.full((PAIRS,), float(LENGTH - 1))
    margin = ((win - ref_win) - (lose - ref_lose)).detach()
    make: dict[str, Callable[[], Tensor]] = {
        "policy_chosen_logps": lambda: win,
        "policy_rejected_logps": lambda: lose,
        "ref_chosen_logps": lambda: ref_win,
        "ref_rejected_logps": lambda: ref_lose,
        "chosen_lengths": lambda: lengths,
        "rejected_lengths": lambda: lengths,
        "margin_mean": margin.mean,
        "margin_std": lambda: margin.std() + 1e-3,
        "kl": lambda: torch.tensor(0.1),
        "policy_logps": lambda: logps,
        "ref_logps": lambda: reference,
        "desirable": lambda: torch.arange(2 * PAIRS) < PAIRS,
        "chosen_rewards": lambda: hidden[:PAIRS, -1, 0],
        "rejected_rewards": lambda: hidden[PAIRS:, -1, 0],
        "logits": lambda: hidden[:, -1] @ weight.T,
        "ref_logits": lambda: torch.zeros(2 * PAIRS, VOCABULARY),
        "rewards": lambda: torch.linspace(0, 1, VOCABULARY).expand(2 * PAIRS, -1),
    }
    return [make[name]() for name in LOSSES[loss].needs]


def training_steps() -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], object]]]:
    """A whole step with each loss; and the loss alone, forward and backward, on the same numbers."""
    torch.manual_seed(0)
    model, ids = Model(), torch.randint(VOCABULARY, (2 * PAIRS, LENGTH))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6)
    with torch.no_grad():
        hidden, reference = model(ids)

    def step(loss: str) -> None:
        optimiser.zero_grad()
        LOSSES[loss](*inputs_of(loss, *model(ids), reference, model.embedding.weight)).mean().backward()
        optimiser.step()

    def alone(loss: str) -> None:
        leaves = hidden.detach().requires_grad_(), (1.01 * reference).requires_grad_()
        LOSSES[loss](*inputs_of(loss, *leaves, reference, model.embedding.weight)).mean().backward()

    return tuple({loss: functools.partial(run, loss) for loss in LOSSES} for run in (step, alone))


def plain(hidden: Tensor, labels: Tensor, *, weight: Tensor) -> Tensor:
    """Logits, log_softmax, gather, sum."""
    return torch.log_softmax(hidden @ weight.T, -1).gather(-1, labels[..., None]).squeeze(-1).sum(-1)


def scoring_steps(vocabulary: int, width: int, *, frozen: bool) -> dict[str, Callable[[], object]]:
    """Forward and backward from hidden states to log-probs, both ways."""
    torch.manual_seed(0)
    hidden = torch.randn(2 * PAIRS, LENGTH, width, requires_grad=True)
    weight = torch.randn(vocabulary, width).div_(width**0.5).requires_grad_(not frozen)
    labels = torch.randint(vocabulary, (2 * PAIRS, LENGTH))
    leaves = [hidden] if frozen else [hidden, weight]

    def run(function: Callable[..., Tensor]) -> None:
        torch.autograd.grad(function(hidden, labels, weight=weight), leaves, torch.linspace(-1, 1, 2 * PAIRS))

    return {"plain": lambda: run(plain), "chunked": lambda: run(sequence_logps)}


def table_of_losses(rounds: int) -> pd.DataFrame:
    steps, alone = training_steps()
    in_step = measure.interleave(steps, rounds=rounds, title="training steps")
    by_itself = measure.interleave(alone, rounds=10 * rounds, title="losses alone")
    print(f"{'loss':18} {'step, ms':>9} {'× DPO (quartiles)':>22} {'loss alone, µs':>15} {'× DPO':>7}")
    for loss in LOSSES:
        (middle, low, high), (other, *_) = (measure.ratio(t, loss, "dpo") for t in (in_step, by_itself))
        milliseconds, microseconds = (pd.Series(t[loss]).median() * f for t, f in ((in_step, 1e3), (by_itself, 1e6)))
        spread = f"{middle:.3f} ({low:.3f}–{high:.3f})"
        print(f"{loss:18} {milliseconds:9.1f} {spread:>22} {microseconds:15.0f} {other:7.2f}")
    rows = [("step", in_step), ("alone", by_itself)]
    return pd.DataFrame(
        [(what, loss, i, s) for what, t in rows for loss in t for i, s in enumerate(t[loss])],
        columns=["what", "loss", "round", "seconds"],
    )


def table_of_log_probs(rounds: int) -> pd.DataFrame:
    print(f"{'vocabulary':>10} {'hidden':>6} {'head':>8} {'plain, ms':>10} {'time ratio (quartiles)':>23}", end="")
    print(f" {'plain, MiB':>11} {'chunked, MiB':>13} {'ratio':>6}")
    rows = []
    for vocabulary, width in SHAPES:
        for head in ("trained", "frozen"):
            steps = scoring_steps(vocabulary, width, frozen=head == "frozen")
            seconds = measure.interleave(steps, rounds=rounds * (10 if vocabulary < 1000 else 1), title="log-probs")
            child = ["--child", str(vocabulary), str(width), head]
            peaks = {name: measure.peak_of_child(__file__, *child, name) for name in steps}
            middle, low, high = measure.ratio(seconds, "chunked", "plain")
            milliseconds, spread = pd.Series(seconds["plain"]).median() * 1e3, f"{middle:.2f} ({low:.2f}–{high:.2f})"
            print(f"{vocabulary:10} {width:6} {head:>8} {milliseconds:10.1f} {spread:>23}", end="")
            print(f" {peaks['plain']:11.1f} {peaks['chunked']:13.1f} {peaks['chunked'] / peaks['plain']:6.2f}")
            rows += [
                (vocabulary, width, head, name, i, s, peaks[name])
                for name in steps
                for i, s in enumerate(seconds[name])
            ]
    return pd.DataFrame(rows, columns=["vocabulary", "hidden", "head", "variant", "round", "seconds", "peak_mib"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="rounds that are counted, at least 2")
    parser.add_argument("--record", action="store_true", help="write the raw rows to book/results/bench")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds is {arguments.rounds}; at least 2 are needed for a spread")
    if arguments.child:
        vocabulary, width, head, name = arguments.child
        run, warm = (scoring_steps(v, int(width), frozen=head == "frozen")[name] for v in (int(vocabulary), 2))
        measure.growth(run, warm=warm)
        return
    for name, table in (("bench/losses", table_of_losses), ("bench/log-probs", table_of_log_probs)):
        start = time.perf_counter()
        rows = table(arguments.rounds if table is table_of_losses else max(2, arguments.rounds // 2))
        print()
        if arguments.record:
            parameters = {"rounds": arguments.rounds, "threads": 1, "clock": "CPU seconds of the process"}
            results.write(rows, name, parameters=parameters, seconds=time.perf_counter() - start, seeds=[0])


if __name__ == "__main__":
    main()
