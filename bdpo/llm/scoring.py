r"""What a policy's responses are worth: by the language's program, and by learned reward and cost models.

The paper's columns are **Help** (larger is better), **Harm** (smaller is better) and **S.R.**, the share of safe
responses. Its numbers come from a reward and a cost model trained on the same kind of labels as the policy. Here the
same models are trained (`JudgeTrainer`) and stand beside the exact scores (`exact`), and `agreement` says how far the
two go together.

Every function takes any causal language model of transformers; only `exact` is about the controlled language.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    EvalPrediction,
    GenerationConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bdpo.llm import language
from bdpo.llm.pairs import tokenize
from bdpo.llm.supervised import StopsAtNaN
from bdpo.losses import reward_bt

JUDGES = ("reward", "cost")
ESTIMATORS = ("exact", "k1", "k3")


@dataclass(frozen=True)
class Samples:
    """One sampled response for each prompt.

    ``response_ids`` end with the end-of-sequence token where ``ended`` is true, and ``responses`` are their texts
    without it. Other special tokens stay in the text: a policy that utters them has made an error.
    """

    prompts: list[str]
    responses: list[str]
    ended: list[bool]
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    temperature: float

    def __len__(self) -> int:
        return len(self.prompts)


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    seed: int,
    max_new_tokens: int = language.RESPONSE_TOKENS,
    temperature: float = 1.0,
    batch_size: int = 256,
    progress: bool = False,
) -> Samples:
    """Sample one response for each prompt.

    Parameters
    ----------
    model, tokenizer
        A causal language model and its tokenizer, which needs tokens for padding and for the end of a sequence.
    prompts
        Texts, none empty. To sample several responses for a prompt, repeat it.
    seed
        The same seed, prompts and batch size give the same responses on one machine. The global generators of torch
        are left as they were.
    max_new_tokens
        At least 1. A response that is longer is cut off, and ``ended`` is false.
    temperature
        At least 0. Larger makes responses more varied; 1 samples from the model itself, 0 takes the likeliest token.
    batch_size
        Prompts at a time.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Samples
        In the order of the prompts.

    Raises
    ------
    ValueError
        For no prompts, a tokenizer without the two tokens, a setting out of its range.
    """
    prompts = list(prompts)
    _at_least_one(prompts=len(prompts), max_new_tokens=max_new_tokens, batch_size=batch_size)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature!r}; allowed: a finite number of at least 0")
    pad, end = _pad(tokenizer), _end(tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        pad_token_id=pad,
        eos_token_id=end,
        **({"temperature": float(temperature), "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
    )
    device, training = model.device, model.training
    prompt_ids = [_without_end(ids, end) for ids in tokenizer(prompts)["input_ids"]]
    response_ids: list[list[int]] = []
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for part in tqdm(list(_batches(prompt_ids, batch_size)), "sampling", disable=not progress):
                ids, mask = _padded(part, pad, left=True)
                out = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
                for row in out[:, ids.shape[1] :].tolist():
                    response_ids.append(row[: row.index(end) + 1] if end in row else row)
    finally:
        model.train(training)
    ended = [ids[-1] == end for ids in response_ids]
    words = [ids[:-1] if done else ids for ids, done in zip(response_ids, ended, strict=True)]
    texts = tokenizer.batch_decode(words, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Samples(prompts, list(texts), ended, prompt_ids, response_ids, float(temperature))


def exact(samples: Samples) -> list[dict[str, Any]]:
    """The exact scores of samples of the controlled language, one row a sample.

    Returns
    -------
    list of dict
        ``help``, ``harm``, ``safe``, ``well_formed``, ``ended``, and ``length`` in tokens, the end among them.

    Raises
    ------
    ValueError
        If a prompt is not one of the language.
    """
    scores = language.scores(samples.prompts, samples.responses, samples.ended)
    rows = zip(samples.prompts, samples.responses, samples.ended, samples.response_ids, scores, strict=True)
    return [
        score._asdict() | {"well_formed": language.well_formed(p, r, ended=e), "ended": e, "length": len(ids)}
        for p, r, e, ids, score in rows
    ]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    r"""The paper's columns with standard errors, over the samples of one policy.

    :math:`\mathrm{Help} = \frac1n\sum_i \mathrm{help}_i`, :math:`\mathrm{Harm} = \frac1n\sum_i \mathrm{harm}_i`,
    :math:`\mathrm{S.R.} = \frac{100}n\#\{i: \mathrm{safe}_i\}`

    Parameters
    ----------
    rows
        With ``help``, ``harm`` and ``safe``, by `exact`, or by learned models with ``safe`` for a cost below 0.

    Returns
    -------
    dict
        ``Help``, ``Harm``, ``S.R.`` (in per cent), each with ``…_se``, its standard error (0 for one sample); ``n``.
        The errors are those of sampling prompts and responses; they say nothing of training with another seed.

    Raises
    ------
    ValueError
        For no rows.
    """
    _at_least_one(rows=len(rows))
    out: dict[str, float] = {"n": len(rows)}
    for name, column, unit in (("Help", "help", 1.0), ("Harm", "harm", 1.0), ("S.R.", "safe", 100.0)):
        out[name], out[f"{name}_se"] = _mean([unit * float(row[column]) for row in rows])
    return out


# ---------------------------------------------------------------- distance from the reference


@torch.no_grad()
def kl(
    model: Any,
    reference: Any,
    tokenizer: Any,
    samples: Samples,
    *,
    estimator: str = "exact",
    batch_size: int = 64,
) -> np.ndarray:
    r"""Divergence of a policy from its reference, estimated on the policy's own samples: one number a sample.

    .. math:: \mathrm{KL}(\pi\|\pi_{\mathrm{ref}}) = \mathbb{E}_{y\sim\pi}\sum_t k_t

    ``"exact"`` has for :math:`k_t` the sum over the vocabulary of
    :math:`\pi(v)\log\frac{\pi(v)}{\pi_{\mathrm{ref}}(v)}` after the tokens before t: each number is at least 0, and no
    estimator from the same samples that looks at single tokens varies less. With
    :math:`\rho = \log\frac{\pi(y_t)}{\pi_{\mathrm{ref}}(y_t)}`, ``"k1"`` is :math:`\rho`, and ``"k3"`` is
    :math:`e^{-\rho} - 1 + \rho`, which is at least 0. All three have the same expectation; but far from the reference
    ``"k3"`` gets a part of it from tokens that are almost never sampled, and comes out too small.

    Parameters
    ----------
    model, reference
        Causal language models with one vocabulary.
    tokenizer
        Theirs, with a padding token.
    samples
        Of ``model``, at temperature 1: at another the expectation is another.
    estimator
        ``"exact"``, ``"k1"`` or ``"k3"``.
    batch_size
        Samples at a time. A smaller one needs less memory: [batch, length, vocabulary] numbers for either model.

    Returns
    -------
    ndarray
        In nats, shape [samples]. Its mean estimates the divergence, its standard deviation over the root of their
        number is the standard error. Where responses were cut off, it is the divergence up to the cut.

    Raises
    ------
    ValueError
        For no samples, samples at another temperature, an unknown estimator, models of different vocabularies.
    """
    _at_least_one(samples=len(samples), batch_size=batch_size)
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}; allowed: {', '.join(ESTIMATORS)}")
    if samples.temperature != 1:
        raise ValueError(f"samples at temperature {samples.temperature}; the divergence needs samples at temperature 1")
    modes = [(net, net.training) for net in (model, reference)]
    pad, out = _pad(tokenizer), []
    try:
        for net, _ in modes:
            net.eval()
        both = list(zip(samples.prompt_ids, samples.response_ids, strict=True))
        for part in _batches(both, batch_size):
            ids, mask = _padded([p for p, _ in part], pad, left=True)
            answer, scored = _padded([r for _, r in part], pad, left=False)
            ids, mask = torch.cat([ids, answer], 1), torch.cat([mask, scored], 1)
            log_p, log_q = (_logprobs(net, ids, mask, answer.shape[1]) for net in (model, reference))
            if log_p.shape != log_q.shape:
                raise ValueError(
                    f"vocabularies of {log_p.shape[-1]} and {log_q.shape[-1]} tokens; allowed: the same one"
                )
            if estimator == "exact":
                terms = (log_p.exp() * (log_p - log_q)).sum(-1)
            else:
                rho = (log_p - log_q).gather(-1, answer[..., None].to(log_p.device)).squeeze(-1)
                terms = rho if estimator == "k1" else torch.expm1(-rho) + rho
            out.append((terms * scored.to(terms.device)).sum(-1).double().cpu().numpy())
    finally:
        for net, training in modes:
            net.train(training)
    return np.concatenate(out)


def _logprobs(model: Any, ids: Tensor, mask: Tensor, last: int) -> Tensor:
    """Log-probs of every token at the last positions, [batch, last, vocabulary], in float32."""
    where = (mask.cumsum(1) - 1).clamp(min=0)
    ids, mask, where = (x.to(model.device) for x in (ids, mask, where))
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=where, use_cache=False, logits_to_keep=last + 1
    ).logits
    return logits[:, -last - 1 : -1].float().log_softmax(-1)


# ---------------------------------------------------------------- learned judges


def judge(backbone: Any, *, pad_token_id: int) -> Any:
    """A model with one score a text, on a copy of the body of a causal language model.

    The score's weights are 0, so that an untrained judge gives 0 to everything.

    Parameters
    ----------
    backbone
        A causal language model of transformers, usually the supervised one. It is not changed.
    pad_token_id
        Of the tokenizer: the score is read at the last token that is no padding.

    Returns
    -------
    transformers.PreTrainedModel
        Of the architecture's ``…ForSequenceClassification``, in the backbone's dtype and on its device.

    Raises
    ------
    TypeError
        For a PeftModel: merge its adapter first, by ``merge_and_unload()``.
    """
    if hasattr(backbone, "peft_config"):
        raise TypeError("the backbone is a PeftModel; merge its adapter first: model.merge_and_unload()")
    config = copy.deepcopy(backbone.config)
    config.num_labels, config.pad_token_id = 1, pad_token_id
    model = AutoModelForSequenceClassification.from_config(config).to(backbone.dtype)
    getattr(model, model.base_model_prefix).load_state_dict(backbone.base_model.state_dict())
    torch.nn.init.zeros_(model.score.weight)
    return model.to(backbone.device)


def cost_loss(safer: Tensor, other: Tensor, safer_safe: Tensor, other_safe: Tensor) -> Tensor:
    r"""The loss of a cost model: the less safe response costs more, and unsafe ones cost more than 0.

    :math:`\mathcal{L} = -\log\sigma(C(y_o) - C(y_s)) - \log\sigma(z_s C(y_s)) - \log\sigma(z_o C(y_o))` with
    :math:`z = -1` for a safe response and :math:`+1` for an unsafe one

    Parameters
    ----------
    safer, other
        Costs :math:`C(y_s)` of the response that is labelled safer, :math:`C(y_o)` of the other: any finite numbers of
        one shape.
    safer_safe, other_safe
        Whether each is safe, boolean, of that shape.

    Returns
    -------
    Tensor
        One loss a pair, at least 0.

    Raises
    ------
    TypeError, ValueError
        For costs as in `bdpo.losses.reward_bt`, and for flags that are not boolean.

    Notes
    -----
    Source: Eq 6 of arXiv:2310.12773v1.
    """
    for name, flags in (("safer_safe", safer_safe), ("other_safe", other_safe)):
        if flags.dtype != torch.bool:
            raise TypeError(f"{name} is {flags.dtype}; allowed: torch.bool, true where the response is safe")
    signs = (1 - 2 * flags.to(safer.dtype) for flags in (safer_safe, other_safe))
    return reward_bt(other, safer) - sum(
        (logsigmoid(sign * cost) for sign, cost in zip(signs, (safer, other), strict=True)), torch.zeros_like(safer)
    )


class Comparisons(Dataset):
    """Tokenised pairs for a judge: prompt and response in one list of tokens, and the flags of safety if there are any.

    Parameters
    ----------
    rows
        With the texts ``prompt``, ``chosen``, ``rejected``; for a cost model also ``chosen_safe`` and
        ``rejected_safe``, as `bdpo.llm.preferences` gives them, where chosen is the safer response.
    kind
        ``"reward"`` or ``"cost"``.
    tokenizer, max_length, truncation
        As in `bdpo.llm.pairs.tokenize`; ``"drop"`` is not allowed.

    Raises
    ------
    ValueError, TypeError
        As `bdpo.llm.pairs.tokenize`; for an unknown kind; for a cost model, if a row lacks its two flags.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        kind: str,
        tokenizer: Any,
        *,
        max_length: int,
        truncation: str = "error",
    ) -> None:
        rows = list(rows)
        if kind not in JUDGES:
            raise ValueError(f"kind is {kind!r}; allowed: {', '.join(JUDGES)}")
        if truncation == "drop":
            raise ValueError("truncation is 'drop'; a judge takes 'error', 'prompt' or 'response'")
        pairs = tokenize(rows, tokenizer, max_length=max_length, truncation=truncation)
        flags: list[list[bool]] = [[] for _ in rows]
        if kind == "cost":
            for number, row in enumerate(rows):
                flags[number] = [row.get(name) for name in ("chosen_safe", "rejected_safe")]  # type: ignore[misc]
                if not all(isinstance(flag, bool) for flag in flags[number]):
                    raise ValueError(
                        f"row {number}: chosen_safe and rejected_safe are {flags[number]}; a cost model needs true or "
                        "false for both, as in PKU-SafeRLHF with the label 'safe'"
                    )
        self.kind, self.counts = kind, pairs.counts
        self.items = [
            {"chosen": [*p, *c], "rejected": [*p, *r], "safe": safe}
            for p, c, r, safe in zip(pairs.prompts, pairs.chosen, pairs.rejected, flags, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.items[row]


class JudgeTrainer(Trainer):
    """Trains a reward model or a cost model on pairs.

    A reward model minimises `bdpo.losses.reward_bt`, a cost model `cost_loss`. Chosen and rejected responses go through
    the model in one batch. ``evaluate`` gives ``eval_accuracy``, the share of pairs in the order of their label (ties
    count half), and for a cost model ``eval_sign_accuracy``, the share of responses whose sign of cost fits their flag.

    Parameters
    ----------
    model
        With one score a text, as `judge` makes it.
    args
        Of ``Trainer``.
    rows, kind, tokenizer, max_length, truncation
        As in `Comparisons`; or `Comparisons` themselves, which are taken as they are.
    validation
        Of the same form, or None.
    callbacks
        Further callbacks.

    Raises
    ------
    ValueError, TypeError
        As `Comparisons`; for a model with more than one score, or a tokenizer without a padding token. A loss that is
        not finite ends the run with `bdpo.llm.trainer.TrainingDiverged`.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        rows: Comparisons | Iterable[Mapping[str, Any]],
        tokenizer: Any,
        *,
        kind: str = "reward",
        max_length: int = 0,
        truncation: str = "error",
        validation: Comparisons | Iterable[Mapping[str, Any]] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        if model.config.num_labels != 1:
            raise ValueError(f"the model gives {model.config.num_labels} scores a text; a judge gives 1 (num_labels=1)")
        model.config.pad_token_id = _pad(tokenizer)
        args.remove_unused_columns = False
        args.logging_nan_inf_filter = False

        def read(rows: Any) -> Comparisons:
            if isinstance(rows, Comparisons):
                return rows
            return Comparisons(rows, kind, tokenizer, max_length=max_length, truncation=truncation)

        told = read(rows)
        super().__init__(
            model,
            args,
            functools.partial(_compare, pad=model.config.pad_token_id),
            train_dataset=told,
            eval_dataset=None if validation is None else read(validation),
            processing_class=tokenizer,
            compute_metrics=_accuracy,
            callbacks=[*callbacks, StopsAtNaN()],
        )
        self.kind = told.kind
        self.model_accepts_loss_kwargs = False
        self.label_names = []

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of the batch's pairs, and the scores [pairs, 2] of chosen and rejected response."""
        scores = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.squeeze(-1)
        chosen, rejected = scores.float().chunk(2)
        if self.kind == "reward":
            loss = reward_bt(chosen, rejected).mean()
        else:
            loss = cost_loss(chosen, rejected, *inputs["safe"].unbind(1)).mean()
        return (loss, {"scores": torch.stack([chosen, rejected], 1)}) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """Loss, scores and flags of one batch."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss, out = self.compute_loss(model, inputs, return_outputs=True)
        # A reward model has no flags; NaN in their place keeps the shape that is gathered over processes.
        flags = inputs["safe"].float() if self.kind == "cost" else torch.full_like(out["scores"], torch.nan)
        return loss.detach(), out["scores"], flags


def _compare(items: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Tensor]:
    """Pairs as one batch, padded on the right: first the chosen ones, then the rejected ones."""
    ids, mask = _padded([item[side] for side in ("chosen", "rejected") for item in items], pad, left=False)
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch | ({"safe": torch.tensor([item["safe"] for item in items])} if items[0]["safe"] else {})


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    scores, flags = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    if np.isnan(flags).all():
        return {"accuracy": _ordered(scores[:, 0], scores[:, 1])}
    return {"accuracy": _ordered(-scores[:, 0], -scores[:, 1]), "sign_accuracy": float(((scores < 0) == flags).mean())}


def _ordered(larger: np.ndarray, smaller: np.ndarray) -> float:
    """Share of pairs in this order; ties count half."""
    return float(((larger > smaller) + 0.5 * (larger == smaller)).mean())


@torch.no_grad()
def judged(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    ended: Sequence[bool] | None = None,
    batch_size: int = 256,
) -> np.ndarray:
    """The scores that a judge gives: rewards or costs.

    Parameters
    ----------
    model, tokenizer
        A trained judge and its tokenizer.
    prompts, responses
        Texts, one response a prompt.
    ended
        Whether each response came to its end; the end-of-sequence token follows those that did. By default, all.
    batch_size
        Texts at a time.

    Returns
    -------
    ndarray
        Shape [responses]. A reward is larger for better responses; its zero means nothing. A cost is larger for more
        harmful ones, and the model calls a response safe if its cost is below 0.

    Raises
    ------
    ValueError
        For no responses, lists of different lengths, a text that is longer than the model's context.
    """
    ended = [True] * len(responses) if ended is None else ended
    _at_least_one(responses=len(responses), batch_size=batch_size)
    if not len(prompts) == len(responses) == len(ended):
        raise ValueError(f"{len(prompts)} prompts, {len(responses)} responses, {len(ended)} ends: give one of each")
    pad, end = _pad(tokenizer), _end(tokenizer)
    texts = zip(
        tokenizer(list(prompts))["input_ids"],
        tokenizer(list(responses), add_special_tokens=False)["input_ids"],
        ended,
        strict=True,
    )
    rows = [_without_end(p, end) + r + [end] * bool(e) for p, r, e in texts]
    context = getattr(model.config, "max_position_embeddings", None)
    longest = max(range(len(rows)), key=lambda k: len(rows[k]))
    if context is not None and len(rows[longest]) > context:
        raise ValueError(f"text {longest} has {len(rows[longest])} tokens; the judge's context has {context}")
    training = model.training
    model.eval()
    try:
        out = []
        for part in _batches(rows, batch_size):
            ids, mask = (x.to(model.device) for x in _padded(part, pad, left=False))
            out.append(model(input_ids=ids, attention_mask=mask).logits.squeeze(-1).double().cpu().numpy())
    finally:
        model.train(training)
    return np.concatenate(out)


def agreement(true: Sequence[float], learned: Sequence[float]) -> dict[str, float]:
    """How far two evaluators go together, on the same responses.

    Parameters
    ----------
    true, learned
        Scores of the same direction: Help and rewards, or Harm and costs.

    Returns
    -------
    dict
        ``rank_correlation``: Spearman's, from -1 to 1. ``pairs``: the share of all pairs of responses that differ in
        the true score which the learned one orders alike, ties counted half; one half is chance. ``sign``: the share
        whose scores lie on the same side of 0, which means something for Harm and costs only. Correlation and pairs
        are NaN where one evaluator gives one score to everything.

    Raises
    ------
    ValueError
        For fewer than two responses, lists of different lengths, scores that are not finite.
    """
    a, b = np.asarray(true, dtype=float), np.asarray(learned, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"scores of shapes {a.shape} and {b.shape}; allowed: two lists of one length, at least 2")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a score is not finite; look for a diverged judge")
    constant = np.ptp(a) == 0 or np.ptp(b) == 0
    # Sums over pairs, a row at a time: the table of all pairs of 10 000 responses would have 10^8 cells.
    alike = differ = 0.0
    for k in range(len(a) - 1):
        signs = np.sign(a[k + 1 :] - a[k])
        alike += float(((1 + signs * np.sign(b[k + 1 :] - b[k])) / 2)[signs != 0].sum())
        differ += float(np.count_nonzero(signs))
    return {
        "rank_correlation": float("nan") if constant else float(spearmanr(a, b).statistic),
        "pairs": float("nan") if constant else alike / differ,
        "sign": float(((a < 0) == (b < 0)).mean()),
    }


# ---------------------------------------------------------------- small helpers


def _padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one tensor, and its mask."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for k, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(len(row))
        ids[k, where], mask[k, where] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def _batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error."""
    x = np.asarray(values, dtype=float)
    return float(x.mean()), float(x.std(ddof=1) / len(x) ** 0.5) if len(x) > 1 else 0.0


def _without_end(ids: list[int], end: int) -> list[int]:
    return ids[:-1] if ids[-1:] == [end] else ids


def _pad(tokenizer: Any) -> int:
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no padding token; set tokenizer.pad_token, for instance to its eos_token")
    return int(tokenizer.pad_token_id)


def _end(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
    return int(tokenizer.eos_token_id)


def _at_least_one(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}: {value} given; allowed: at least 1")
