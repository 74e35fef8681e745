r"""The world of the synthetic experiment: preferences, masks, pairs.

Prompts and responses are numbered 0 to n - 1. The utility of response :math:`y` to prompt :math:`x` is
:math:`u(y \mid x) \propto e^{-\alpha(y-x)^2}` (Eq 34), and :math:`y_1` is preferred to :math:`y_2` with probability
:math:`\frac{u(y_1 \mid x)}{u(y_1 \mid x) + u(y_2 \mid x)}` (Eq 33), computed as :math:`\sigma` of the difference of the
log-utilities, because utilities themselves underflow (in float32 they are 0 in 42 of the 400 cells).

A masked response never occurs in the training data of its prompt. What the paper leaves open about masks and pairs is
our choice: which cells are masked is drawn at random for every seed, and the masks of one seed are nested, so that a
higher rate only adds to a lower one; the prompt of a pair is drawn evenly, and its two responses evenly from those that
are not masked.

Source: Section 6.1.1 and Appendix B of arXiv:2502.20847v1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Table = NDArray[Any]  # [prompt, response]

MASK_RULES = ("table", "independent", "prompt", "spare_best")
# The independent streams of random numbers of one seed.
MASK, INIT, DATA, POLICY = range(4)


def generator(seed: int, stream: int, *more: int) -> np.random.Generator:
    """The random numbers of one stream of one seed; the same on every machine, whatever else is drawn.

    Parameters
    ----------
    seed
        At least 0.
    stream, more
        ``MASK``, ``INIT``, ``DATA`` or ``POLICY``, and what else tells streams apart.

    Returns
    -------
    numpy.random.Generator
        Philox, keyed by seed and stream.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(stream, *more))))


def log_utility(n: int = 20, alpha: float = 0.6) -> Table:
    r""":math:`\log u(y \mid x) = -\alpha(y-x)^2`, so that the best response of a prompt has 0.

    Parameters
    ----------
    n
        Prompts and responses, at least 2.
    alpha
        Above 0; a larger one makes preferences sharper. The paper has 0.6.

    Returns
    -------
    array
        [prompt, response].
    """
    y = np.arange(n)
    return -alpha * (y[None, :] - y[:, None]) ** 2.0


def preference(log_u: Table) -> NDArray[Any]:
    r"""How likely the first response is preferred to the second: :math:`\sigma(\log u(y_1) - \log u(y_2))`.

    Parameters
    ----------
    log_u
        [prompt, response].

    Returns
    -------
    array
        [prompt, first, second]; ½ on the diagonal.
    """
    gap = log_u[:, :, None] - log_u[:, None, :]
    tail = np.exp(-np.abs(gap))
    return np.where(gap >= 0, 1.0, tail) / (1 + tail)


def draw_mask(n: int, rate: float, seed: int, rule: str = "table") -> NDArray[np.bool_]:
    """Which (prompt, response) cells are masked.

    Parameters
    ----------
    n
        Prompts and responses.
    rate
        The share of masked cells, from 0 to below 1; rounded to whole cells.
    seed
        Draws an order of the cells; a rate masks the first of them, so that masks of one seed are nested.
    rule
        ``"table"``: that share of all cells. ``"independent"``: each cell with that probability, so that the share is
        random. ``"prompt"``: that share of each prompt's responses. ``"spare_best"``: of all cells, but never a
        prompt's best response. Every rule passes over a cell if its prompt would keep fewer than two.

    Returns
    -------
    array of bool
        [prompt, response], true where masked.

    Raises
    ------
    ValueError
        If the rule is unknown, or no mask of that rate leaves every prompt a pair.
    """
    if rule not in MASK_RULES:
        raise ValueError(f"mask_rule is {rule!r}; allowed: {', '.join(MASK_RULES)}")
    random = generator(seed, MASK)
    if rule == "independent":
        lots = random.random((n, n))
        second = np.partition(lots, n - 2, axis=1)[:, n - 2 : n - 1]  # so that two responses are always kept
        return (lots < rate) & (lots < second)
    wanted = n * round(rate * n) if rule == "prompt" else round(rate * n * n)
    order = random.permutation(n * n)
    mask = np.zeros((n, n), bool)
    limit = round(rate * n) if rule == "prompt" else n - 2
    for cell in order:
        if mask.sum() == wanted:
            break
        x, y = divmod(int(cell), n)
        if mask[x].sum() < limit and not (rule == "spare_best" and x == y):
            mask[x, y] = True
    if mask.sum() < wanted or n - mask.sum(1).max() < 2:
        most = (n - 2) / n
        raise ValueError(
            f"mask_rate is {rate}; allowed: 0 to {most:g} at n = {n} under mask_rule {rule!r}, since every prompt needs"
            " two responses that are not masked to form a pair"
        )
    return mask


def check_mask(mask: NDArray[np.bool_]) -> None:
    """Refuse a mask that leaves a prompt without a pair.

    Parameters
    ----------
    mask
        [prompt, response], true where masked.

    Raises
    ------
    ValueError
        If it is not a square table of bools, or a prompt keeps fewer than two responses.
    """
    if mask.dtype != bool or mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
        raise ValueError(f"mask has shape {mask.shape} and dtype {mask.dtype}; allowed: a square table of bools")
    short = np.flatnonzero((~mask).sum(1) < 2)
    if len(short):
        raise ValueError(
            f"the mask leaves prompt {short[0]} {(~mask[short[0]]).sum()} response(s); allowed: at least 2 a prompt,"
            " since one response forms no pair"
        )


def pair_weights(
    log_u: Table, mask: NDArray[np.bool_], *, label_noise: float = 0.0, sampling: Table | None = None
) -> NDArray[Any]:
    r"""How likely a training pair is: prompt :math:`x`, winner :math:`i`, loser :math:`j`.

    Parameters
    ----------
    log_u, mask
        [prompt, response].
    label_noise
        The share of labels that are flipped, from 0 to 1.
    sampling
        Probabilities [prompt, response] that the two responses are drawn from, given that they differ and neither is
        masked; evenly without it.

    Returns
    -------
    array
        [prompt, winner, loser], summing to 1, every prompt weighing 1/n.
    """
    right = preference(log_u)
    noisy = right + label_noise * (right.transpose(0, 2, 1) - right)
    p = np.where(mask, 0.0, 1.0 if sampling is None else sampling)
    both = p[:, :, None] * p[:, None, :]
    both[:, np.arange(len(mask)), np.arange(len(mask))] = 0
    return noisy * 2 * both / (both.sum((1, 2), keepdims=True) * len(mask))


def drop_masked(weights: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[Any]:
    """Weights of pairs once those with a masked response are struck out, so that prompts with fewer left weigh less.

    Parameters
    ----------
    weights
        [prompt, winner, loser], as of :func:`pair_weights` without a mask.
    mask
        [prompt, response].

    Returns
    -------
    array
        [prompt, winner, loser], summing to 1.
    """
    left = np.where(mask[:, :, None] | mask[:, None, :], 0.0, weights)
    return left / left.sum()


def draw_pairs(weights: NDArray[Any], shape: tuple[int, ...], random: np.random.Generator) -> NDArray[np.int64]:
    """Pairs drawn independently in proportion to their weights, as places in the flat [prompt, response] table.

    Parameters
    ----------
    weights
        [prompt, winner, loser], as of :func:`pair_weights`.
    shape
        How many pairs, in how many dimensions.
    random
        The source.

    Returns
    -------
    array of int
        Of shape ``(*shape, 2)``: places of winner and loser.
    """
    n = weights.shape[0]
    upto = np.cumsum(weights.ravel())
    cell = np.searchsorted(upto, random.random(shape) * upto[-1], side="right")
    cell = np.minimum(cell, np.flatnonzero(weights.ravel())[-1])
    x, rest = np.divmod(cell, n * n)
    winner, loser = np.divmod(rest, n)
    return np.stack([x * n + winner, x * n + loser], -1).astype(np.int64)


def count_pairs(pairs: NDArray[np.int64], n: int) -> NDArray[Any]:
    """The weights of a fixed set of pairs: each counts the same.

    Parameters
    ----------
    pairs
        [pair, 2], as of :func:`draw_pairs`.
    n
        Prompts and responses.

    Returns
    -------
    array
        [prompt, winner, loser], summing to 1.
    """
    at = pairs[:, 0] * n + pairs[:, 1] % n
    return np.bincount(at, minlength=n**3).reshape(n, n, n) / len(pairs)
