r"""How the gradients of sequence log-probs lie to each other, and what that says about a training step.

Write :math:`g_i = \nabla_\theta\log\pi(y_i\mid x_i)` and :math:`G_{ij} = g_i\cdot g_j`. A step of gradient descent on a
loss with the derivatives :math:`\ell_j = \partial L/\partial\log\pi(y_j\mid x_j)` changes the log-probs by

.. math:: \Delta\log\pi(y_i\mid x_i) = -\eta\sum_j G_{ij}\,\ell_j + O(\eta^2),

and a step that is scaled coordinate by coordinate, as Adam's is, by the same with
:math:`G_{ij} = \sum_k d_k\,g_{ik}\,g_{jk}`. What the paper assumes of :math:`G` is measured here beside what it is:

.. code-block:: console

    $ python -m bdpo.llm.geometry gradients --seeds 5  # book/results/llm/geometry
    $ python -m bdpo.llm.geometry reference --seeds 5  # book/results/llm/reference: log-probs, for `imbalance_at`

Source: Assumptions 1 and 2 and Theorem 2, arXiv:2502.20847v1.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PrinterCallback

from bdpo import imbalance
from bdpo.llm import experiment, scoring
from bdpo.llm import language as lang
from bdpo.llm.pairs import add_pair_scoring, score
from bdpo.llm.trainer import PreferenceArguments, PreferenceTrainer
from bdpo.logps import sequence_logps
from bdpo.losses import LOSSES

LABEL = "overall"  # which label decides the winner
IGNORED = -100

Ids = Sequence[Sequence[int]]


# ---------------------------------------------------------------- gradients of log-probs


def logps(model: Any, prompts: Ids, responses: Ids) -> Tensor:
    r"""The log-probs of responses to prompts, each the sum over the response's tokens.

    Parameters
    ----------
    model
        A causal language model of transformers, in evaluation mode.
    prompts, responses
        Token ids, one prompt for each response, none empty.

    Returns
    -------
    Tensor
        [responses], in nats.

    Raises
    ------
    ValueError
        If there is no response, one is empty, or the lists differ in length.
    """
    if not responses or len(prompts) != len(responses) or not all(map(len, [*prompts, *responses])):
        raise ValueError(f"{len(prompts)} prompts, {len(responses)} responses: give one prompt each, none empty")
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.zeros(len(responses), width, dtype=torch.long)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for k, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        ids[k, : len(p) + len(r)] = torch.tensor([*p, *r])
        labels[k, len(p) : len(p) + len(r)] = torch.tensor(r)
        mask[k, : len(p) + len(r)] = 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return sequence_logps(logits[:, :-1], labels[:, 1:])


def gradients(model: Any, prompts: Ids, responses: Ids) -> Tensor:
    r"""The gradient of each response's log-prob in all parameters.

    :math:`g_i = \nabla_\theta\log\pi(y_i\mid x_i)`

    Parameters
    ----------
    model, prompts, responses
        As in `logps`.

    Returns
    -------
    Tensor
        [responses, parameters], in the order of ``model.parameters()``.

    Raises
    ------
    ValueError
        As `logps`.
    """
    weights = list(model.parameters())
    rows = torch.empty(len(responses), sum(w.numel() for w in weights), dtype=weights[0].dtype)
    for k, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        parts = torch.autograd.grad(logps(model, [p], [r]).sum(), weights)
        torch.cat([part.flatten() for part in parts], out=rows[k])
    return rows


def after(model: Any, step: Tensor, prompts: Ids, responses: Ids) -> Tensor:
    """`logps` after all parameters moved by a step, given as one vector; the model itself stays where it is.

    Raises
    ------
    ValueError
        As `logps`; for a step of another length than the parameters.
    """
    moved = copy.deepcopy(model)
    weights = torch.nn.utils.parameters_to_vector(moved.parameters()).detach()
    if step.shape != weights.shape:
        raise ValueError(f"the step has the shape {tuple(step.shape)}, the model {len(weights)} parameters")
    torch.nn.utils.vector_to_parameters(weights + step, moved.parameters())
    with torch.no_grad():
        return logps(moved, prompts, responses)


# ---------------------------------------------------------------- what is assumed of them


def describe(rows: Tensor, lengths: Sequence[int], shared: Tensor | None = None) -> dict[str, float]:
    r"""Norms, cosines and distances of some gradients.

    ``spread`` is the standard deviation divided by the mean. Cosines, products and distances are of pairs
    :math:`i\ne j`. ``1/mean c^2`` is the number of directions that independent vectors would have to have.

    Parameters
    ----------
    rows
        Gradients [responses, parameters], at least two, none zero.
    lengths
        Tokens of each response.
    shared
        Symmetric [responses, responses]: with how many equal tokens two responses begin. None leaves out what needs it.

    Returns
    -------
    dict
        ``spread of norms``, the same of :math:`\|g\|/\sqrt{T}` and of :math:`\|g\|/T`; ``mean c``, ``mean |c|``,
        ``1/mean c^2``, ``spread of distances`` (squared ones); ``mean product`` in units of the mean squared norm; with
        ``shared`` also ``parting``, the squared correlation of the squared distance with the tokens not shared.

    Raises
    ------
    ValueError
        For fewer than two gradients, a zero gradient, or another number of lengths.
    """
    if len(rows) < 2 or len(rows) != len(lengths):
        raise ValueError(f"{len(rows)} gradients and {len(lengths)} lengths; give as many, at least 2")
    gram = rows @ rows.T
    squares = gram.diagonal()
    if bool((squares == 0).any()):
        raise ValueError("a gradient is zero: it has no direction")
    norms, tokens = squares.sqrt(), torch.tensor(lengths, dtype=rows.dtype)
    pairs = torch.ones_like(gram, dtype=torch.bool).triu(1)
    cosines = (gram / norms[:, None] / norms)[pairs]
    distances = (squares[:, None] + squares - 2 * gram)[pairs]
    found = {
        "spread of norms": _spread(norms),
        "spread of norms per root of tokens": _spread(norms / tokens.sqrt()),
        "spread of norms per token": _spread(norms / tokens),
        "mean c": float(cosines.mean()),
        "mean |c|": float(cosines.abs().mean()),
        "1/mean c^2": float(1 / cosines.square().mean()),
        "spread of distances": _spread(distances),
        "mean product": float(gram[pairs].mean() / squares.mean()),
    }
    if shared is not None:
        apart = (tokens[:, None] + tokens - 2 * shared)[pairs]
        found["parting"] = float(torch.corrcoef(torch.stack([distances, apart]))[0, 1] ** 2)
    return found


def _spread(values: Tensor) -> float:
    return float(values.std(correction=0) / values.mean())


def beginnings(responses: Ids) -> Tensor:
    """With how many equal tokens two responses begin, for all pairs; its own length on the diagonal."""

    def common(a: Sequence[int], b: Sequence[int]) -> int:
        return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    return torch.tensor([[common(a, b) for b in responses] for a in responses], dtype=torch.double)


# ---------------------------------------------------------------- what is predicted of a step


def slopes(loss: str, policy: Tensor, reference: Tensor, preferred: Tensor, **settings: Any) -> Tensor:
    r"""Derivatives of a loss of all pairs of responses to one prompt, in each response's log-prob.

    :math:`\ell_k = \frac{\partial}{\partial\log\pi_k}\sum_{i\ne j} P(y_i\succ y_j)\,L(y_i, y_j)`: for DPO,
    :math:`-\ell_k` is :math:`\beta` times the :math:`w_k` of Theorem 2, averaged over annotators.

    Source: Theorem 2, arXiv:2502.20847v1.

    Parameters
    ----------
    loss
        A pair loss that needs the four log-probs only.
    policy, reference
        Log-probs [responses].
    preferred
        [responses, responses]: the probability that the row's response is preferred to the column's.
    **settings
        Of the loss.

    Returns
    -------
    Tensor
        [responses].
    """
    i, j = (~torch.eye(len(policy), dtype=torch.bool)).nonzero(as_tuple=True)
    win, lose = imbalance.closed(loss, policy[i], policy[j], reference[i], reference[j], **settings)
    each = preferred[i, j]
    return torch.zeros_like(policy).index_add(0, i, each * win).index_add(0, j, each * lose)


def table_step(slope: Tensor, policy: Tensor, collision: float) -> Tensor:
    r"""The first-order change of log-probs that Theorem 2 gives to a policy with one parameter for each logit.

    :math:`\Delta\log\pi_i = F_i - \sum_k\pi_kF_k` with :math:`F_k = -\ell_k + \pi_k\sum_j\ell_j`, in units of
    :math:`\gamma=\eta g^2`

    Source: Theorem 2 (Eq 12), arXiv:2502.20847v1; the chapter "An epoch moves the probabilities" for all losses.

    Parameters
    ----------
    slope
        :math:`\ell_j`, the derivatives in the log-probs [responses]; 0 for all responses that are not listed.
    policy
        Log-probs [responses].
    collision
        :math:`\sum_k\pi_k^2` over *all* responses. Without effect where the derivatives add up to zero, as DPO's do.

    Returns
    -------
    Tensor
        [responses].
    """
    p, total = policy.exp(), slope.sum()
    return -slope + p * total - (-(p * slope).sum() + collision * total)


def printed_balanced_step(slope: Tensor, policy: Tensor) -> Tensor:
    r"""The change of log-probs that the paper prints for balanced losses, from DPO's derivatives.

    :math:`\Delta\log\pi_i = w_i\pi_i - \sum_j w_j\pi_j^2` with :math:`w=-\ell`

    Source: Theorem 2 (Eq 14), arXiv:2502.20847v1.

    Parameters
    ----------
    slope, policy
        As in `table_step`, for DPO.

    Returns
    -------
    Tensor
        [responses], in units of :math:`C\gamma`.
    """
    p = policy.exp()
    return -slope * p + (slope * p**2).sum()


def explained(predicted: Tensor, real: Tensor) -> dict[str, float]:
    r"""How much of some changes a prediction explains.

    ``share`` :math:`= \max(0, \cos)^2` is the share of the squared change that is explained with the best positive
    factor; ``as is`` :math:`= 1-\|r-p\|^2/\|r\|^2` the share without a factor, which may be negative; ``sign`` the
    share of changes whose sign is right.

    Parameters
    ----------
    predicted, real
        Changes, of one shape; the real ones are not all zero.

    Returns
    -------
    dict
        The three shares.

    Raises
    ------
    ValueError
        If shapes differ or nothing changed.
    """
    if predicted.shape != real.shape or not bool(real.any()):
        raise ValueError(f"changes of shapes {tuple(predicted.shape)} and {tuple(real.shape)}; they must agree, not 0")
    length = float(predicted.norm())
    cosine = float(predicted.flatten() @ real.flatten()) / (length * float(real.norm())) if length else 0.0
    return {
        "share": max(0.0, cosine) ** 2,
        "as is": 1 - float((real - predicted).norm() / real.norm()) ** 2,
        "sign": float((predicted.sign() == real.sign()).double().mean()),
    }


# ---------------------------------------------------------------- one seed


@dataclass(frozen=True)
class Sizes:
    """How much is measured at each stage of training; all our choice."""

    prompts: int = 4  #: at which the responses of one prompt are compared
    responses: int = 12  #: different ones that the behaviour policy writes to each
    draws: int = 12  #: independent ones that the model itself gives to each
    pairs: int = 24  #: of the training data, as one batch
    change: float = 0.1  #: the largest predicted change of a log-prob, in nats
    largest: float = 0.8  #: the same for the largest step of the study of step sizes,
    halvings: int = 6  #: which is halved so often
    temperature: float = 0.25  #: of the annotators


#: beta and learning rate of the runs that are measured: what ``llm/tuning`` chose.
TRAINED = {"dpo": (0.2, 2e-3), "bdpo": (0.05, 2e-3)}
SETTINGS = {loss: {"beta": beta} for loss, (beta, _) in TRAINED.items()}


@dataclass
class Stage:
    """A model somewhere on its way, in float64, and the scale of Adam's steps there (None before any)."""

    name: str
    model: Any
    scale: Tensor | None = None


def stages(world: experiment.World, trained: Mapping[str, tuple[float, float]] | None = None) -> Iterator[Stage]:
    """The models of one seed: initialisation, reference, DPO after a third and at its end, and other losses' ends.

    Parameters
    ----------
    world
        One seed of the controlled language.
    trained
        Loss to (beta, learning rate), by default `TRAINED`.

    Yields
    ------
    Stage
        Named ``initialisation``, ``SFT``, ``dpo, a third``, ``dpo``, and so on.
    """
    s = world.setup
    yield Stage("initialisation", lang.model(layers=s.layers, width=s.width, seed=world.seed).double().eval())
    yield Stage("SFT", copy.deepcopy(world.reference).double().eval())
    for loss, (beta, rate) in (trained or TRAINED).items():
        yield from _train(world, loss, beta, rate)


def _train(world: experiment.World, loss: str, beta: float, rate: float) -> list[Stage]:
    """Training as in table 2, without its evaluations; DPO is kept after a third, too."""
    s, (train, _) = world.setup, world.pairs(LABEL)
    steps = s.epochs * math.ceil(len(train) / s.batch)
    marks = {math.ceil(steps / 3): f"{loss}, a third"} if loss == "dpo" else {}
    marks[steps] = loss
    kept: list[Stage] = []
    args = PreferenceArguments(
        **experiment.quiet(
            world.folder / "geometry",
            loss=loss,
            loss_settings={"beta": beta},
            per_device_train_batch_size=s.batch,
            num_train_epochs=s.epochs,
            learning_rate=rate,
            lr_scheduler_type="linear",
            warmup_steps=steps // 10,
            logging_steps=steps,
            seed=world.seed,
        )
    )

    def keep(step: int) -> None:
        model = lang.model(layers=s.layers, width=s.width)
        model.load_state_dict(trainer.model.state_dict())
        kept.append(Stage(marks[step], model.double().eval(), adam_scale(trainer.optimizer, trainer.model)))

    trainer = PreferenceTrainer(copy.deepcopy(world.reference), args, train, callbacks=[experiment.At(marks, keep)])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return kept


def adam_scale(optimizer: Any, model: Any) -> Tensor:
    r"""By what Adam multiplies each coordinate of a gradient, momentum apart.

    :math:`d_k = 1/(\sqrt{\hat v_k}+\epsilon)`

    Parameters
    ----------
    optimizer
        Of the kind of ``torch.optim.AdamW``, after at least one step.
    model
        Whose parameters it moves.

    Returns
    -------
    Tensor
        [parameters], float64, divided by its mean.

    Raises
    ------
    ValueError
        If the optimizer has not moved a parameter yet.
    """
    settings = optimizer.param_groups[0]
    parts = []
    for weight in model.parameters():
        state = optimizer.state.get(weight)
        if not state:
            raise ValueError("the optimizer has no second moments of a parameter: take a step first")
        v = state["exp_avg_sq"].double() / (1 - settings["betas"][1] ** float(state["step"]))
        parts.append(1 / (v.sqrt() + settings["eps"]).flatten())
    scale = torch.cat(parts)
    return scale / scale.mean()


@dataclass(frozen=True)
class Group:
    """Responses to one prompt: those of the data with their annotators."""

    prompt: list[int]
    responses: list[list[int]]
    preferred: Tensor

    @property
    def prompts(self) -> list[list[int]]:
        return [self.prompt] * len(self.responses)


def groups(world: experiment.World, sizes: Sizes) -> list[Group]:
    """Prompts of the test split with different responses of the behaviour policy and how annotators compare them.

    Raises
    ------
    ValueError
        If the behaviour policy has not that many responses to a prompt.
    """
    writer = random.Random(f"bdpo.llm.geometry {world.seed}")
    found = []
    for prompt in world.language.prompts(sizes.prompts, world.seed, "test"):
        texts: dict[str, None] = {}
        for _ in range(100 * sizes.responses):
            texts[world.language.behaviour.respond(prompt, writer)] = None
            if len(texts) == sizes.responses:
                break
        else:
            raise ValueError(f"fewer than {sizes.responses} responses to {prompt!r} were found; ask for fewer")
        scores = [lang.score(prompt, text) for text in texts]
        utility = torch.tensor([x.help - world.language.trade_off * x.harm for x in scores], dtype=torch.double)
        preferred = ((utility[:, None] - utility) / sizes.temperature).sigmoid()
        end = [world.tokenizer.eos_token_id]
        ids = [world.tokenizer(text, add_special_tokens=False).input_ids + end for text in texts]
        found.append(Group(world.tokenizer(prompt).input_ids, ids, preferred))
    return found


Row = dict[str, Any]


def measure(
    world: experiment.World, sizes: Sizes, trained: Mapping[str, tuple[float, float]] | None = None
) -> list[Row]:
    """All measurements of one seed.

    Parameters
    ----------
    world
        One seed of the controlled language.
    sizes
        How much is measured.
    trained
        As in `stages`.

    Returns
    -------
    list of dict
        Rows with ``seed``, ``stage``, ``part``, ``case``, ``name``, ``value``; means over the prompts. Parts: ``data``
        and ``policy`` (responses of one prompt, see `describe`), ``across`` (of different prompts), ``prompt`` and
        ``batch`` (predicted and realised steps; the case is ``loss/metric/target/prediction``), ``size`` (step sizes).
    """
    rows: list[Row] = []
    told = groups(world, sizes)
    batch = world.rows(LABEL)[0][: sizes.pairs]
    reference = copy.deepcopy(world.reference).double().eval()
    for stage in stages(world, trained):
        each = [gradients(stage.model, group.prompts, group.responses) for group in told]
        found = [
            *_responses(world, stage, told, each, sizes),
            *_prompt_steps(stage, reference, told, each, sizes),
            *_batch_step(world, stage, reference, batch, sizes),
        ]
        keys: dict[tuple[str, str, str], list[float]] = {}
        for part, case, values in found:
            for name, value in values.items():
                keys.setdefault((part, case, name), []).append(value)
        rows += [
            {"seed": world.seed, "stage": stage.name, "part": part, "case": case, "name": name}
            | {"value": math.fsum(values) / len(values)}
            for (part, case, name), values in keys.items()
        ]
    return rows


Found = tuple[str, str, dict[str, float]]


def _draws(world: experiment.World, model: Any, group: Group, n: int) -> list[list[int]]:
    text = str(world.tokenizer.decode(group.prompt, skip_special_tokens=True))
    return scoring.sample(model, world.tokenizer, [text] * n, seed=world.seed).response_ids


def _responses(
    world: experiment.World, stage: Stage, told: Sequence[Group], each: Sequence[Tensor], sizes: Sizes
) -> Iterator[Found]:
    """Norms, cosines, distances: of the data's responses, of the policy's own, and across prompts."""
    for group, rows in zip(told, each, strict=True):
        lengths = list(map(len, group.responses))
        yield "data", "sgd", describe(rows, lengths, beginnings(group.responses))
        if stage.scale is not None:
            yield "data", "adam", describe(rows * stage.scale.sqrt(), lengths, beginnings(group.responses))
        draws = _draws(world, stage.model, group, sizes.draws)
        own = gradients(stage.model, [group.prompt] * len(draws), draws)
        gram = own @ own.T
        square, count = gram.diagonal().mean(), len(draws)
        apart = torch.tensor([[a != b for b in draws] for a in draws])
        products = {"mean product": float((gram.sum() - gram.trace()) / (count * (count - 1)) / square)}
        if bool(apart.any()):
            products["mean product of different ones"] = float(gram[apart].mean() / square)
        yield "policy", "sgd", products
    if len(told) > 1:
        units = [rows / rows.norm(dim=1, keepdim=True) for rows in each]
        cosines = torch.cat([(a @ b.T).flatten() for k, a in enumerate(units) for b in units[:k]])
        yield "across", "sgd", {"mean c": float(cosines.mean()), "mean |c|": float(cosines.abs().mean())}


def _prompt_steps(
    stage: Stage, reference: Any, told: Sequence[Group], each: Sequence[Tensor], sizes: Sizes
) -> Iterator[Found]:
    """One step on all pairs of one prompt, predicted and taken."""
    for group, rows in zip(told, each, strict=True):
        where = group.prompts, group.responses
        with torch.no_grad():
            now, ref = logps(stage.model, *where), logps(reference, *where)
        i, j = torch.triu_indices(len(now), len(now), 1)
        plain = slopes("dpo", now, ref, group.preferred, **SETTINGS["dpo"])
        collision = float(now.exp().square().sum())  # what these responses alone give, the least it can be
        for loss in SETTINGS:
            slope = slopes(loss, now, ref, group.preferred, **SETTINGS[loss])
            guesses = {"Theorem 2": table_step(slope, now, collision)}
            if loss != "dpo":
                guesses["Eq 14"] = printed_balanced_step(plain, now)
            for metric, scale in _metrics(stage):
                scaled = rows * scale
                gram = scaled @ rows.T
                exact = -gram @ slope
                eta = sizes.change / float(exact.abs().max())
                real = after(stage.model, -eta * (slope @ scaled), *where) - now
                half = float((gram.diagonal()[:, None] + gram.diagonal() - 2 * gram)[i, j].mean()) / 2
                every = {"Gram": exact, "norms": -gram.diagonal() * slope}
                every |= {name: half * guess for name, guess in guesses.items()}
                for name, guess in every.items():
                    case = f"{loss}/{metric}"
                    yield "prompt", f"{case}/log-probs/{name}", explained(eta * guess, real)
                    differences = explained(eta * (guess[i] - guess[j]), real[i] - real[j])
                    yield "prompt", f"{case}/differences/{name}", differences
        yield from _sizes_of_steps(stage, where, now, rows, plain, sizes)


def _metrics(stage: Stage) -> list[tuple[str, Any]]:
    """Gradient descent, and Adam's scale of the coordinates where there is one."""
    return [("sgd", 1.0)] + ([] if stage.scale is None else [("adam", stage.scale)])


def _sizes_of_steps(
    stage: Stage, where: tuple[Ids, Ids], now: Tensor, rows: Tensor, slope: Tensor, sizes: Sizes
) -> Iterator[Found]:
    """How the error of the first-order prediction falls with the step."""
    exact = -(rows @ rows.T) @ slope
    largest = sizes.largest / float(exact.abs().max())
    steps = [largest / 2**k for k in range(sizes.halvings)]
    errors = [float((after(stage.model, -eta * (slope @ rows), *where) - now - eta * exact).norm()) for eta in steps]
    for k, error in enumerate(errors):
        yield "size", "error", {f"{sizes.largest / 2**k:g}": error}
    logs = torch.tensor([steps, errors], dtype=torch.double).log()
    centred = logs - logs.mean(1, keepdim=True)
    yield "size", "slope", {"all": float((centred[0] @ centred[1]) / (centred[0] @ centred[0]))}


def _batch_step(
    world: experiment.World, stage: Stage, reference: Any, batch: Sequence[Mapping[str, Any]], sizes: Sizes
) -> Iterator[Found]:
    """One step on a batch of training pairs of different prompts, predicted and taken."""
    prompts = [world.tokenizer(row["prompt"]).input_ids for row in batch] * 2
    end = [world.tokenizer.eos_token_id]
    texts = [row["chosen"] for row in batch] + [row["rejected"] for row in batch]
    where = prompts, [world.tokenizer(text, add_special_tokens=False).input_ids + end for text in texts]
    with torch.no_grad():
        now, ref = logps(stage.model, *where), logps(reference, *where)
    rows, n = gradients(stage.model, *where), len(batch)
    own = torch.eye(n, dtype=torch.double).repeat(2, 2)  # which responses belong to one pair
    for loss in SETTINGS:
        slope = torch.cat(imbalance.closed(loss, now[:n], now[n:], ref[:n], ref[n:], **SETTINGS[loss])) / n
        for metric, scale in _metrics(stage):
            gram = (rows * scale) @ rows.T
            exact = -gram @ slope
            eta = sizes.change / float(exact.abs().max())
            real = after(stage.model, -eta * scale * (slope @ rows), *where) - now
            guesses = {"Gram": exact, "own pair": -(gram * own) @ slope}
            guesses |= {"norms": -gram.diagonal() * slope, "Theorem 2": -slope * gram.diagonal().mean()}
            for name, guess in guesses.items():
                case = f"{loss}/{metric}"
                yield "batch", f"{case}/log-probs/{name}", explained(eta * guess, real)
                margins = eta * (guess[:n] - guess[n:])
                yield "batch", f"{case}/differences/{name}", explained(margins, real[:n] - real[n:])
                if name != "norms":
                    falls = {"winner falls": float((guess[:n] < 0).double().mean())}
                    yield "batch", f"{case}/falls/{name}", falls
            falls = {"winner falls": float((real[:n] < 0).double().mean())}
            yield "batch", f"{case}/falls/realised", falls | {"margin": float((real[:n] > real[n:]).double().mean())}


# ---------------------------------------------------------------- imbalance at the reference


def imbalance_at(logps: tuple[Tensor, Tensor], lengths: tuple[Tensor, Tensor], betas: Mapping[str, float]) -> list[Row]:
    """The imbalance of objectives on pairs at the reference, where training starts.

    Parameters
    ----------
    logps
        The reference's log-probs of winners and of losers [pairs].
    lengths
        Their tokens [pairs].
    betas
        For each method, a key of ``experiment.METHODS`` with a pair loss, its beta.

    Returns
    -------
    list of dict
        Rows with ``method``, ``coordinate``, ``of means`` (`bdpo.imbalance.mean_log_ratio`) and ``mean`` (of
        `bdpo.imbalance.log_ratio` over the pairs), in nats.

    Raises
    ------
    KeyError
        For a method that does not exist.
    """
    names = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    fed = dict(zip((*names, "chosen_lengths", "rejected_lengths"), (*logps, *logps, *lengths), strict=True))
    rows = []
    for method, beta in betas.items():
        spec = experiment.METHODS[method]
        needed = (fed[name] for name in LOSSES[spec.loss].needs)
        slope = imbalance.closed(spec.loss, *needed, **{**spec.settings, "beta": beta})
        for coordinate in imbalance.COORDINATES:
            of_means = float(imbalance.mean_log_ratio(*slope, *logps, coordinate=coordinate))
            mean = float(imbalance.log_ratio(*slope, *logps, coordinate=coordinate).mean())
            rows.append({"method": method, "coordinate": coordinate, "of means": of_means, "mean": mean})
    return rows


def reference_logps(world: experiment.World, label: str) -> list[Row]:
    """The reference's log-probs of a world's training pairs: rows with ``win``, ``lose`` and their ``tokens``."""
    pairs, _ = world.pairs(label)
    model = copy.deepcopy(world.reference)
    add_pair_scoring(model)
    columns = (*score(model, pairs), *pairs.lengths().T[1:])
    names = ("win", "lose", "win_tokens", "lose_tokens")
    return [
        {"seed": world.seed, "label": label, **dict(zip(names, row, strict=True))} for row in zip(*columns, strict=True)
    ]


# ---------------------------------------------------------------- recording


def record(
    seeds: Iterable[int], *, folder: Path, setup: experiment.Setup | None = None, root: Path | None = None
) -> None:
    """Record ``llm/geometry``, a seed at a time, going on where it ends.

    Parameters
    ----------
    seeds
        Which.
    folder
        Where models are kept.
    setup
        Sizes of the experiment, by default those of table 2.
    root
        As in `bdpo.results.write`.
    """
    setup, sizes = setup or experiment.Setup(), Sizes()
    same = {"setup": dataclasses.asdict(setup), "sizes": dataclasses.asdict(sizes), "trained": TRAINED, "label": LABEL}
    table = experiment.Record("llm/geometry", same, root)
    for seed in tqdm(list(seeds), "seeds"):
        if not table.has(seed=seed):
            table.rows += measure(experiment.World(setup, seed, folder=folder), sizes)
            table.save()


def record_reference(
    seeds: Iterable[int], *, folder: Path, setup: experiment.Setup | None = None, root: Path | None = None
) -> None:
    """Record ``llm/reference``: `reference_logps` of every seed and label. Parameters as in `record`."""
    setup = setup or experiment.Setup()
    table = experiment.Record("llm/reference", {"setup": dataclasses.asdict(setup)}, root)
    for seed in tqdm(list(seeds), "seeds"):
        world = experiment.World(setup, seed, folder=folder)
        for label in experiment.LABELS:
            if not table.has(seed=seed, label=label):
                table.rows += reference_logps(world, label)
        table.save()


def main(arguments: Sequence[str] | None = None) -> None:
    """Record measurements."""
    parser = argparse.ArgumentParser(prog="python -m bdpo.llm.geometry", description="Record measurements.")
    parser.add_argument("name", choices=["gradients", "reference"])
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="record the seeds 0 to N-1 (default: 5)")
    parser.add_argument("--work", type=Path, default=Path("_build/llm"), help="where models are kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the recorded numbers belong to one thread
    transformers.utils.logging.disable_progress_bar()
    {"gradients": record, "reference": record_reference}[options.name](range(options.seeds), folder=options.work)


if __name__ == "__main__":
    main()
