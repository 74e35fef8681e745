r"""Runs of the synthetic experiment: from settings to a tidy table, a whole grid in one call.

>>> from bdpo import toy
>>> table = toy.run_grid(method=("dpo", "bdpo"), mask_rate=(0.0, 0.2), seed=range(4))

A run goes through these stages, each with a fresh optimiser of the same kind and rate:

1. an initial policy;
2. ``reference_steps`` of DPO from there, whose reference is the initial policy: the reference (Appendix B);
3. for the methods that learn from a reward, a Bradley-Terry model, on the pairs of stage 4;
4. ``steps`` of the method, from the reference unless ``start`` says otherwise.

A row of step 100 is that of a run of 100 steps (for ``rlhf`` and ``ppo`` if ``reward_steps`` is the same).
Same seed, same world: all methods see the same mask, initial policy, reference and pairs, so that their differences are
paired. Rows do not depend on threads, on the order of the grid, or on what else is in it.

Source: Section 6.1 and Appendix B of arXiv:2502.20847v1; each choice it leaves open is named in `Settings`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bdpo.toy import kernel, world
from bdpo.toy.methods import METHODS, REWARD, coefficients

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

POLICIES = ("tabular", "mlp")
OPTIMIZERS = ("sgd", "adam")
DATA = ("expectation", "fixed", "fresh")
INITS = ("uniform", "random", "shifted")
STARTS = ("reference", "initial")
SAMPLING = ("uniform", "initial")
MASKED_PAIRS = ("redrawn", "dropped")
REWARD_STARTS = ("initial", "reference")
DTYPES = ("float64", "float32")


@dataclass(frozen=True)
class Settings:
    r"""One run. Where the paper says a value, it is the default, with its place; all others are our choice.

    The defaults are not the paper's experiment, which the paper does not determine: `bdpo.toy.sweeps` holds the central
    reading and the grid of readings around it.
    """

    method: str = "dpo"  #: one of ``METHODS``
    seed: int = 0  #: draws mask, initial policy, data and PPO's samples; at least 0
    n: int = 20  #: prompts, and responses; Section 6.1.1
    alpha: float = 0.6  #: sharpness of the preferences (Eq 34); Appendix B
    mask_rate: float = 0.0  #: share of masked cells; Table 1 has 0, 0.2 and 0.4
    mask_rule: str = "table"  #: one of ``MASK_RULES`` of `bdpo.toy.world`, see its `draw_mask`
    mask: tuple[tuple[bool, ...], ...] | None = None  #: a mask of your own, [prompt][response], instead of a drawn one
    masked_pairs: str = "redrawn"  #: a drawn pair that meets a mask is drawn again; or ``"dropped"``, which costs data
    policy: str = "tabular"  #: ``"tabular"``, a table of logits, or ``"mlp"``, one hidden ReLU layer on one-hot prompts
    width: int = 64  #: units of the hidden layer
    init: str = "uniform"  #: first policy, ``"uniform"``, ``"random"`` or ``"shifted"``, a bump around ``x + shift``
    init_scale: float = 1.0  #: deviation of the logits of a ``"random"`` table, or factor on a network's weights
    shift: float = 0.0  #: how far the mode of a ``"shifted"`` first policy is from the best response
    optimizer: str = "sgd"  #: ``"sgd"`` or ``"adam"``, both without momentum settings or decay
    learning_rate: float = 1.0  #: finite, above 0
    steps: int = 300  #: updates of the method; the paper names only those of the reference
    reference_steps: int = 300  #: updates of DPO that make the reference; Appendix B
    reference_beta: float = 1.0  #: its beta; Appendix B ("for all algorithms")
    start: str = "reference"  #: where a method starts, as is usual; or ``"initial"``, from the first policy
    data: str = "expectation"  #: all pairs weighted by their probability; ``"fixed"`` data set; ``"fresh"`` every step
    pairs: int = 2000  #: size of a ``"fixed"`` data set
    batch: int = 64  #: pairs a step; for a ``"fixed"`` data set, 0 takes all of it each step
    sampling: str = "uniform"  #: responses of a pair, even or ``"initial"``, in proportion to the first policy
    label_noise: float = 0.0  #: share of flipped labels in training, from 0 to 1
    beta: float = 1.0  #: Appendix B
    clip: float = 0.5  #: of the four nbDPO; Appendix B
    detach_lambda: bool = True  #: whether lambda is held constant in the gradient; the paper does not say
    label_smoothing: float = 0.1  #: of ``conservative_dpo`` and ``robust_dpo``
    sft_weight: float | None = None  #: of ``dpo_sft``, ``cpo``, ``slic``; ``None``: the default of `bdpo.losses`
    gamma: float = 0.5  #: of ``simpo``
    delta: float = 1.0  #: of ``slic``
    odds_weight: float = 0.1  #: of ``orpo``
    reward_steps: int | None = None  #: updates of the reward model, if ``None`` as many as ``steps``
    reward_start: str = "initial"  #: a reward network's first policy, or ``"reference"``, last layer new and zero
    ppo_clip: float = 0.2  #: bounds of PPO's ratio, 1 minus and plus this
    ppo_updates: int = 4  #: updates of the policy for each sample of ``batch`` responses
    record: tuple[int, ...] = field(default=())  #: steps of the method to keep a row of, besides the last
    watch_every: int = 10  #: every how many steps the loss is looked at, for the columns of instability; 0 is never
    dtype: str = "float64"  #: of parameters and arithmetic; or ``"float32"``

    def __post_init__(self) -> None:
        for name, options in _CHOICES.items():
            if getattr(self, name) not in options:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(options)}")
        for name, whole in _WHOLE.items():
            _check_whole(name, getattr(self, name), *whole)
        for name, real in _REAL.items():
            _check_real(name, getattr(self, name), *real)
        if not isinstance(self.detach_lambda, bool):
            raise ValueError(f"detach_lambda is {self.detach_lambda!r}; allowed: True or False")
        if self.policy == "mlp" and self.init == "shifted":
            raise ValueError("init is 'shifted' and policy 'mlp'; allowed: a table of logits, or another init")
        if self.data == "fresh" and self.batch == 0:
            raise ValueError("batch is 0; allowed: 1 or more where data is 'fresh'; 0 takes all of a fixed data set")
        if self.method == "ppo" and self.batch == 0:
            raise ValueError("batch is 0; allowed: 1 or more for method 'ppo', which samples as many responses")
        if any(
            isinstance(s, bool) or not isinstance(s, int | np.integer) or not 0 <= s <= self.steps for s in self.record
        ):
            raise ValueError(f"record is {self.record!r}; allowed: whole numbers from 0 to steps = {self.steps}")
        if self.mask is not None:
            mask = np.array(self.mask)
            world.check_mask(mask)
            if len(mask) != self.n:
                raise ValueError(f"mask has {len(mask)} rows; allowed: n = {self.n}")
        elif self.mask_rate > (self.n - 2) / self.n:
            raise ValueError(
                f"mask_rate is {self.mask_rate}; allowed: 0 to {(self.n - 2) / self.n:g} at n = {self.n}, since every"
                " prompt needs two responses that are not masked to form a pair"
            )


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    if value is None and name == "reward_steps":
        return
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; allowed: whole numbers from {low} to {high}")


def _check_real(name: str, value: Any, low: float, high: float, open_low: bool, open_high: bool) -> None:
    if value is None and name == "sft_weight":
        return
    fine = isinstance(value, int | float | np.floating) and not isinstance(value, bool) and math.isfinite(value)
    if not fine or value < low or value > high or (open_low and value == low) or (open_high and value == high):
        bounds = f"{'above' if open_low else 'from'} {low:g} {'to below' if open_high else 'to'} {high:g}"
        raise ValueError(f"{name} is {value!r}; allowed: finite numbers {bounds}")


_CHOICES = {
    "method": METHODS,
    "mask_rule": world.MASK_RULES,
    "policy": POLICIES,
    "init": INITS,
    "optimizer": OPTIMIZERS,
    "data": DATA,
    "start": STARTS,
    "sampling": SAMPLING,
    "masked_pairs": MASKED_PAIRS,
    "reward_start": REWARD_STARTS,
    "dtype": DTYPES,
}
_WHOLE = {
    "seed": (0, 2**32 - 1),
    "n": (2, 200),
    "width": (1, 4096),
    "steps": (0, 10_000_000),
    "reference_steps": (0, 10_000_000),
    "reward_steps": (0, 10_000_000),
    "pairs": (1, 10_000_000),
    "batch": (0, 1_000_000),
    "ppo_updates": (1, 1000),
    "watch_every": (0, 10_000_000),
}
_REAL: dict[str, tuple[float, float, bool, bool]] = {  # from, to, whether the ends are excluded
    "alpha": (0, 100, True, False),
    "mask_rate": (0, 1, False, True),
    "init_scale": (0, 1000, False, False),
    "shift": (-1000, 1000, False, False),
    "learning_rate": (0, 1e9, True, False),
    "reference_beta": (0, 1e6, True, False),
    "label_noise": (0, 1, False, False),
    "beta": (0, 1e6, True, False),
    "clip": (0, 1e6, False, False),
    "label_smoothing": (0, 0.5, False, True),
    "sft_weight": (0, 1e6, False, False),
    "gamma": (0, 1e6, False, False),
    "delta": (0, 1e6, False, False),
    "odds_weight": (0, 1e6, False, False),
    "ppo_clip": (0, 1, True, True),
}

#: The columns that are measured, in the table's order; `run` says what they mean.
MEASURES = (
    "reward",
    "reward_normalised",
    "best_mass",
    "masked_mass",
    "kl",
    "loss",
    "ratio_probability",
    "ratio_log",
    "ratio_logit",
    "rise_max",
    "rise_share",
    "rebound",
    "reference_reward",
    "reference_masked_mass",
)
#: Of these, the ones that some methods do not have: such rows hold NaN and are no failures.
OPTIONAL = ("ratio_probability", "ratio_log", "ratio_logit", "rise_max", "rise_share", "rebound")


def grid(base: Settings | None = None, **axes: Iterable[Any]) -> list[Settings]:
    """All combinations of some settings, the last axis fastest.

    Parameters
    ----------
    base
        The settings that no axis names; the defaults without it.
    **axes
        Values by the name of a setting, such as ``seed=range(64)``.

    Returns
    -------
    list of Settings
        All checked, before anything runs.

    Raises
    ------
    TypeError
        If an axis is no setting, or its values are no collection.
    ValueError
        If a value is not allowed, or an axis is empty.
    """
    known = {f.name for f in fields(Settings)}
    values = {}
    for name, some in axes.items():
        if name not in known:
            raise TypeError(f"{name!r} is no setting; settings: {', '.join(sorted(known))}")
        if isinstance(some, str) or not isinstance(some, Iterable):
            raise TypeError(f"{name} = {some!r}: give an axis as a collection of values, such as [{some!r}]")
        values[name] = list(some)
        if not values[name]:
            raise ValueError(f"{name} has no value; allowed: at least 1")
    base = base or Settings()
    return [replace(base, **dict(zip(values, one, strict=True))) for one in itertools.product(*values.values())]


def run_grid(
    base: Settings | None = None,
    *,
    threads: int = 1,
    progress: bool = False,
    policies: bool = False,
    **axes: Iterable[Any],
) -> pd.DataFrame:
    """All combinations of some settings, as one table; `grid` and `run` in one call.

    Parameters
    ----------
    base, axes
        As in `grid`.
    threads, progress, policies
        As in `run`.

    Returns
    -------
    DataFrame
        As of `run`.

    Raises
    ------
    TypeError, ValueError
        As of `grid` and `run`.
    """
    return run(grid(base, **axes), threads=threads, progress=progress, policies=policies)


def run(
    settings: Sequence[Settings], *, threads: int = 1, progress: bool = False, policies: bool = False
) -> pd.DataFrame:
    r"""Runs, one after another or some at a time; a row for each run and recorded step.

    Parameters
    ----------
    settings
        The runs, at least 1.
    threads
        How many work at a time; the numbers do not depend on it.
    progress
        Whether to show a bar.
    policies
        Whether to keep the policies: a column ``logps`` of arrays [prompt, response].

    Returns
    -------
    DataFrame
        All settings (without ``record``, ``mask``), ``step``, ``status`` (``"ok"``, or ``"diverged"``: numbers left the
        floating-point range at step ``diverged_at``, and the measures of the row are NaN), and, of the policy
        :math:`\pi` after that step,

        ``reward``
            R1: :math:`\sum_x \mathbb{E}_{y\sim\pi(x)}[e^{-\alpha(y-x)^2}]`, from 0 to n; 2.2138 for the uniform policy
            at n = 20.
        ``reward_normalised``
            R2: the same with utilities that add to 1 for each prompt; 1 for the uniform policy.
        ``best_mass``, ``masked_mass``
            Mean probability of a prompt's best response, and of its masked ones together.
        ``kl``
            Mean of :math:`\mathrm{KL}(\pi\,\|\,\pi_{\mathrm{ref}})` over prompts, in nats.
        ``loss``
            The method's mean loss on the pairs of the world: not masked, labels not flipped, weighted by probability.
            For the methods that learn from a reward, minus their objective, with the reward they maximise.
        ``ratio_probability``, ``ratio_log``, ``ratio_logit``
            How much harder winners are pulled than losers in that coordinate:
            :math:`\log\mathbb{E}|g_w| - \log\mathbb{E}|g_l|` over the same pairs, as
            `bdpo.imbalance.mean_log_ratio`; 0 where neither is pulled. NaN for methods without pairs.
        ``rise_max``, ``rise_share``, ``rebound``
            Instability up to this step, from the loss at every ``watch_every``-th step: its largest rise from one look
            to the next; the share of looks at which it rose (by more than rounding); the most it ever stood above its
            lowest value so far. The likelihood term of a loss is left out. NaN for methods without pairs.
        ``reference_reward``, ``reference_masked_mass``
            Of the reference.

    Raises
    ------
    ValueError
        If there is no run, or threads is below 1.
    """
    import pandas as pd

    settings = list(settings)
    if not settings:
        raise ValueError("there is no run; give at least 1 Settings")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads is {threads!r}; allowed: whole numbers of at least 1")
    groups: dict[Settings, list[int]] = {}
    for k, one in enumerate(settings):
        groups.setdefault(_reference_settings(one), []).append(k)

    def work(of: list[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        return zip(of, _group([settings[k] for k in of], policies), strict=True)

    rows: list[list[dict[str, Any]]] = [[] for _ in settings]
    with _bar(len(settings), progress) as bar:
        for of, done in zip(groups.values(), _map(work, list(groups.values()), threads), strict=True):
            for k, some in done:
                rows[k] = some
            bar.update(len(of))
    return pd.DataFrame([row for some in rows for row in some])


def _map(work: Callable[[Any], Any], items: list[Any], threads: int) -> Iterator[Any]:
    """Results in the order of the items; the compiled loops let other threads run."""
    if threads == 1:
        yield from (list(work(item)) for item in items)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda item: list(work(item)), items)


def _bar(total: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="run", disable=not shown, mininterval=0.5)


# ---------------------------------------------------------------- worlds


@dataclass
class _World:
    """What all runs of one seed and one kind of data share."""

    log_u: NDArray[Any]
    mask: NDArray[np.bool_]
    law: NDArray[Any]  # of the pairs trained on, [prompt, winner, loser]
    clean: NDArray[Any]  # the same without flipped labels: of the pairs that losses are measured on
    cells: NDArray[np.int64]
    depth: NDArray[np.int64]
    fixed: NDArray[np.int64] | None  # a fixed data set
    kept: dict[Any, Any] = field(default_factory=dict)  # what several stages use again

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """What is made the first time it is asked for."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]


def _world(s: Settings, initial: NDArray[Any]) -> _World:
    log_u = world.log_utility(s.n, s.alpha)
    mask = world.draw_mask(s.n, s.mask_rate, s.seed, s.mask_rule) if s.mask is None else np.array(s.mask)
    sampling = np.exp(initial) if s.sampling == "initial" else None
    drop = s.masked_pairs == "dropped"
    drawn, clean = (
        world.pair_weights(log_u, np.zeros_like(mask) if drop else mask, label_noise=noise, sampling=sampling)
        for noise in (s.label_noise, 0.0)
    )
    fixed = None
    if s.data == "fixed":
        fixed = world.draw_pairs(drawn, (s.pairs,), world.generator(s.seed, world.DATA, 0))
    if drop:
        drawn, clean = world.drop_masked(drawn, mask), world.drop_masked(clean, mask)
        fixed = None if fixed is None else fixed[~mask.ravel()[fixed].any(1)]
        if fixed is not None and not len(fixed):
            raise ValueError(f"pairs is {s.pairs}, all dropped at mask_rate {s.mask_rate}; give more pairs")
    return _World(log_u, mask, drawn, clean, *layout(mask), fixed)


def layout(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the compiled loop keeps a prompt's responses: those that occur first, prompts with more of them first.

    Parameters
    ----------
    mask
        [prompt, response], true where masked.

    Returns
    -------
    tuple of arrays
        Places in the flat [prompt, response] table, [slot, prompt]; how many prompts have more than ``j`` responses.
    """
    n = len(mask)
    count = (~mask).sum(1)
    prompts = np.argsort(-count, kind="stable")
    cells = prompts[None, :] * n + np.argsort(mask[prompts], axis=1, kind="stable").T
    return np.ascontiguousarray(cells), (count[None, :] > np.arange(n)[:, None]).sum(1)


def packed(weights: NDArray[Any], cells: NDArray[np.int64], depth: NDArray[np.int64], dtype: Any) -> NDArray[Any]:
    """Weights of pairs in the order of the compiled loop: of slots i < j, "i wins" and "j wins".

    Parameters
    ----------
    weights
        [prompt, winner, loser].
    cells, depth
        As of `layout`.
    dtype
        Of the result.

    Returns
    -------
    array
        [2, pair].
    """
    n = len(cells)
    first = np.concatenate([cells[:j, : depth[j]].ravel() for j in range(1, n)])
    second = np.concatenate([np.tile(cells[j, : depth[j]], j) for j in range(1, n)])
    x, i, j = first // n, first % n, second % n
    return np.stack([weights[x, i, j], weights[x, j, i]]).astype(dtype)


def _initial(s: Settings) -> NDArray[Any]:
    """Parameters of the first policy."""
    random = world.generator(s.seed, world.INIT)
    if s.policy == "tabular":
        if s.init == "uniform":
            return np.zeros(s.n**2)
        if s.init == "random":
            return s.init_scale * random.standard_normal(s.n**2)
        y = np.arange(s.n)
        return (-s.alpha * (y[None, :] - y[:, None] - s.shift) ** 2.0).ravel()
    # torch.nn.Linear's default: uniform within one over the root of the number of inputs, biases too.
    bounds = np.repeat(
        [s.n**-0.5, s.width**-0.5 * (s.init == "random")], [s.n * s.width + s.width, s.width * s.n + s.n]
    )
    return s.init_scale * bounds * random.uniform(-1, 1, len(bounds))


# ---------------------------------------------------------------- stages


def _stage(
    s: Settings,
    w: _World,
    how: tuple[int, Any, Any],
    parameters: NDArray[Any],
    reference: NDArray[Any],
    stage: int,
    steps: int,
    *,
    table: NDArray[Any] | None = None,
    record: Sequence[int] = (),
    watch: int = 0,
) -> tuple[int, NDArray[Any], NDArray[Any]]:
    """One training; ``parameters`` change in place. When it diverged (or -1), recorded logits, watched losses."""
    mode, switches, numbers = how
    kind = np.dtype(s.dtype)
    n, none = s.n, np.zeros((1, 1, 2))
    weights, draws, uniforms = np.zeros((2, 0), kind), none.astype(np.int64), none
    law = w.law
    if mode == kernel.EXPECTATION:
        law = w.law if w.fixed is None else world.count_pairs(w.fixed, n)
        weights = w.once("weights", lambda: packed(law, w.cells, w.depth, kind))
    elif mode == kernel.BATCH:
        draws = w.once(("draws", stage, steps), lambda: _draws(s, w, stage, steps))
    elif mode == kernel.PPO:
        uniforms = world.generator(s.seed, world.POLICY).random((-(-steps // s.ppo_updates), s.batch, 2))
    logits_at = np.full((len(record), n, n), np.nan, kind)
    losses_at = np.full(steps // watch + 1 if watch else 0, np.nan)
    lost = kernel.train(
        mode,
        switches,
        numbers,
        s.width if s.policy == "mlp" else 0,
        s.optimizer == "adam",
        float(s.learning_rate),
        steps,
        parameters,
        reference.astype(kind),
        w.cells,
        w.depth,
        weights,
        draws,
        uniforms,
        np.zeros((n, n), kind) if table is None else table.astype(kind),
        np.array([s.ppo_clip, s.ppo_updates], float),
        np.array(record, np.int64),
        watch,
        w.once("checks", lambda: packed(w.clean, w.cells, w.depth, kind)) if watch else np.zeros((2, 0), kind),
        logits_at,
        losses_at,
        law.sum(2).ravel().astype(kind),
    )
    return lost, logits_at, losses_at


def _draws(s: Settings, w: _World, stage: int, steps: int) -> NDArray[np.int64]:
    """The pairs of every step: new ones, or some of the fixed data set."""
    random = world.generator(s.seed, world.DATA, stage)
    if w.fixed is None:
        return world.draw_pairs(w.law, (steps, s.batch), random)
    return w.fixed[random.integers(len(w.fixed), size=(steps, s.batch))]


def _pair_mode(s: Settings) -> int:
    every = s.data == "expectation" or (s.data == "fixed" and s.batch == 0)
    return kernel.EXPECTATION if every else kernel.BATCH


def _log_policy(logits: NDArray[Any]) -> NDArray[Any]:
    lp, p = np.empty_like(logits, float), np.empty_like(logits, float)
    fine = kernel.log_softmax(logits.astype(float), lp, p)
    return lp if fine else np.full_like(lp, np.nan)


def _reference_settings(s: Settings) -> Settings:
    """What the reference depends on, and nothing else: runs that agree in it share one."""
    plain: dict[str, Any] = {f.name: f.default for f in fields(Settings) if f.name in _ONLY_METHOD}
    return replace(s, **{**plain, "method": "dpo", "beta": s.reference_beta, "record": (), "steps": 0})


_ONLY_METHOD = {
    *("clip", "label_smoothing", "sft_weight", "gamma", "delta", "odds_weight"),
    *("detach_lambda", "reward_steps", "reward_start", "ppo_clip", "ppo_updates", "watch_every", "start"),
}


def _group(settings: list[Settings], policies: bool) -> Iterator[list[dict[str, Any]]]:
    """The rows of runs that share a reference."""
    s = settings[0]
    kind = np.dtype(s.dtype)
    start = _initial(s).astype(kind)
    initial = _logps_of(s, start)
    w = _world(s, initial)
    parameters = start.copy()
    how = (_pair_mode(s), *coefficients("dpo", beta=s.reference_beta, dtype=kind))
    lost, _, _ = _stage(s, w, how, parameters, initial, 1, s.reference_steps)
    reference = _logps_of(s, parameters) if lost < 0 else np.full((s.n, s.n), np.nan)
    models: dict[Any, NDArray[Any]] = {}
    for one in settings:
        begin = parameters if one.start == "reference" else start
        yield _rows(one, w, begin.copy(), reference, (start, parameters), models, policies)


def _logps_of(s: Settings, parameters: NDArray[Any]) -> NDArray[Any]:
    logits = np.empty((s.n, s.n), parameters.dtype)
    width = s.width if s.policy == "mlp" else 0
    kernel.forward(parameters, width, s.n, np.empty((s.n, width), parameters.dtype), logits)
    return _log_policy(logits)


def _reward_model(s: Settings, w: _World, stages: tuple[NDArray[Any], NDArray[Any]]) -> NDArray[Any]:
    """Scores [prompt, response] of a Bradley-Terry model of the policy's shape, trained on the pairs of the method.

    ``stages`` are the parameters of the first policy and of the reference. A table starts from zeros, that is, from no
    opinion, rather than from logits; so does the last layer of a network that takes over the reference's hidden layer.
    """
    scores = stages[REWARD_STARTS.index(s.reward_start)].copy()
    if s.policy == "tabular":
        scores[:] = 0
    elif s.reward_start == "reference":
        scores[s.n * s.width + s.width :] = 0
    steps = s.steps if s.reward_steps is None else s.reward_steps
    how = (_pair_mode(s), *coefficients("reward_bt", dtype=np.dtype(s.dtype)))
    _, logits, _ = _stage(s, w, how, scores, np.zeros((s.n, s.n)), 2, steps, record=[steps])
    return logits[0].astype(float)


def _rows(
    s: Settings,
    w: _World,
    parameters: NDArray[Any],
    reference: NDArray[Any],
    stages: tuple[NDArray[Any], NDArray[Any]],
    models: dict[Any, NDArray[Any]],
    policies: bool,
) -> list[dict[str, Any]]:
    kind = np.dtype(s.dtype)
    record = sorted({*s.record, s.steps})
    options = {name: getattr(s, name) for name in ("beta", "clip", "label_smoothing", "sft_weight")}
    options |= {name: getattr(s, name) for name in ("gamma", "delta", "odds_weight", "detach_lambda")}
    switches, numbers = coefficients(s.method, dtype=kind, **options)
    table, watch = None, s.watch_every
    mode = _pair_mode(s)
    if s.method in REWARD:
        mode, watch = kernel.PPO if s.method == "ppo" else kernel.POLICY, 0
        if s.method == "oracle":
            table = w.log_u
        else:
            key = (s.steps, s.reward_steps, s.reward_start)
            if key not in models:
                models[key] = _reward_model(s, w, stages)
            table = models[key]
    if np.isfinite(reference).all() and (table is None or np.isfinite(table).all()):
        lost, logits, losses = _stage(
            *(s, w, (mode, switches, numbers), parameters, reference, 2, s.steps),
            table=table,
            record=record,
            watch=watch,
        )
    else:
        lost, logits, losses = 0, np.full((len(record), s.n, s.n), np.nan), np.zeros(0)
    told = {f.name: getattr(s, f.name) for f in fields(s) if f.name not in ("record", "mask")}
    told |= {
        "sft_weight": float(numbers[kernel.SFT]),
        "reward_steps": s.steps if s.reward_steps is None else s.reward_steps,
    }
    rows = []
    clear = coefficients(s.method, **options)
    if lost < 0 and not np.isfinite(losses).all():
        lost = watch * int(np.isfinite(losses).argmin())
    for step, at in zip(record, logits, strict=True):
        lp = _log_policy(at)
        measures = _measures(s, w, clear, lp, reference, table)
        measures |= _unrest(losses[: step // watch + 1] if watch else losses)
        whole = all(math.isfinite(v) or (name in OPTIONAL and math.isnan(v)) for name, v in measures.items())
        fine = whole and (lost < 0 or step < lost)
        if not fine:
            measures = dict.fromkeys(measures, math.nan)
        row = {**told, "step": step, "status": "ok" if fine else "diverged", "diverged_at": lost, **measures}
        rows.append(row | ({"logps": lp} if policies else {}))
    return rows


# ---------------------------------------------------------------- measures


def _measures(
    s: Settings, w: _World, how: tuple[Any, Any], lp: NDArray[Any], reference: NDArray[Any], table: NDArray[Any] | None
) -> dict[str, float]:
    p, u = np.exp(lp), np.exp(w.log_u)
    kl = float((p * (lp - reference)).sum() / s.n)
    out = np.full(7, np.nan)
    if table is None:
        kernel.measure(*how, lp, reference, w.clean, out)
        out[1:] = np.where(np.isneginf(out[1:]), -745.0, out[1:])  # of no pull at all: the log of the smallest double
    else:
        out[0] = float(s.beta * kl - (p * table).sum() / s.n)
    return {
        "reward": float((p * u).sum()),
        "reward_normalised": float((p * u / u.sum(1, keepdims=True)).sum()),
        "best_mass": float(np.trace(p) / s.n),
        "masked_mass": float((p * w.mask).sum() / s.n),
        "kl": kl,
        "loss": float(out[0]),
        "ratio_probability": float(out[1] - out[2]),
        "ratio_log": float(out[3] - out[4]),
        "ratio_logit": float(out[5] - out[6]),
        "reference_reward": float((np.exp(reference) * u).sum()),
        "reference_masked_mass": float((np.exp(reference) * w.mask).sum() / s.n),
    }


def _unrest(losses: NDArray[Any]) -> dict[str, float]:
    """Three numbers of how a loss rose; rises below rounding do not count."""
    if len(losses) < 2 or not np.isfinite(losses).all():
        return {"rise_max": math.nan, "rise_share": math.nan, "rebound": math.nan}
    rises = np.diff(losses)
    real = rises > 1e-12 * (1 + np.abs(losses[:-1]))
    lowest = np.minimum.accumulate(losses)
    return {
        "rise_max": float(rises[real].max(initial=0.0)),
        "rise_share": float(real.mean()),
        "rebound": float((losses - lowest).max()) if real.any() else 0.0,
    }
