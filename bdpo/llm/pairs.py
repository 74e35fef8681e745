r"""Pairs of responses to one prompt as tokens, and their log-probs in one forward pass that reads the prompt once.

A pair is scored as one row ``[prompt, chosen, rejected]``. The rejected response starts at the position where the
chosen one started, and a mask keeps the two from seeing each other:

====================  ======  ======  ========
a token of ... sees   prompt  chosen  rejected
====================  ======  ======  ========
prompt                causal
chosen                all     causal
rejected              all             causal
====================  ======  ======  ========

Both first tokens are predicted by the prompt's last position. The log-probs are those of the two rows ``[prompt,
chosen]`` and ``[prompt, rejected]`` up to rounding, for :math:`P + C + R` positions instead of :math:`2P + C + R`.
Only the attention works on rows, which are as long as the longest; everything else sees the tokens of the batch one
after another, without padding. And the last layer's MLP skips the positions that predict nothing.
Only the positions that predict a token of a response meet the output head, through `bdpo.logps.token_logps`, so that no
table [batch, length, vocabulary] exists.

`add_pair_scoring` teaches a model the call ``model(pairs=batch)``. It goes through the model's own ``forward``, and so
through any wrapper around it: what bypasses the ``forward`` of DistributedDataParallel also bypasses its averaging of
gradients, without an error.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from bdpo.logps import token_logps

#: Architectures whose shared pass is tested against two separate passes (tests/test_llm_trainer.py), and whose logits
#: are the output head's, with nothing after it.
SHARING = ("gpt2", "gpt_neox", "llama", "mistral", "olmo2", "qwen2", "qwen3")

#: Attention implementations that take a mask with a row for every position.
ATTENTION = ("eager", "sdpa")

#: What to do with a pair that is longer than the context.
TRUNCATION = ("error", "prompt", "response", "drop")

_ATTENTION_NAMES = ("self_attn", "attn", "attention")  # of a layer's module, over all architectures that share
_TEXTS = ("prompt", "chosen", "rejected")
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
_PROMPT, _CHOSEN, _REJECTED = 1, 2, 3  # segments of a row; 0 is padding


# ---------------------------------------------------------------- tokens


class Pairs(Dataset):
    """Tokenised pairs. An item is a dict of `prompt_ids`, `chosen_ids`, `rejected_ids`, and of the log-probs of the
    reference where they are known (`ref_chosen_logps`, `ref_rejected_logps`).

    Parameters
    ----------
    prompts, chosen, rejected
        Lists of token ids, none empty; a response's last id is normally the end-of-sequence token.
    reference
        Two arrays [rows]: the reference's log-probs of the chosen and of the rejected response, summed over tokens.
    counts
        What happened on the way here: how many rows were read, truncated, dropped.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        chosen: Sequence[Sequence[int]],
        rejected: Sequence[Sequence[int]],
        reference: tuple[np.ndarray, np.ndarray] | None = None,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        if not len(prompts) == len(chosen) == len(rejected):
            raise ValueError(f"{len(prompts)} prompts, {len(chosen)} chosen and {len(rejected)} rejected responses")
        for name, lists in zip(_IDS, (prompts, chosen, rejected), strict=True):
            for row, ids in enumerate(lists):
                if not len(ids):
                    raise ValueError(f"row {row}: {name} is empty; {_EMPTY[name]}")
        self.prompts, self.chosen, self.rejected = prompts, chosen, rejected
        self.reference = reference
        self.counts = Counter(counts or {"read": len(prompts)})

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, row: int) -> dict[str, Any]:
        item: dict[str, Any] = {
            "prompt_ids": self.prompts[row],
            "chosen_ids": self.chosen[row],
            "rejected_ids": self.rejected[row],
        }
        if self.reference is not None:
            item.update(zip(_REFERENCE, (values[row] for values in self.reference), strict=True))
        return item

    def lengths(self) -> np.ndarray:
        """Tokens of prompt, chosen and rejected: an array [rows, 3]."""
        return np.array([[len(ids) for ids in lists] for lists in (self.prompts, self.chosen, self.rejected)]).T


_EMPTY = {
    "prompt_ids": "the first token of a response is predicted by the prompt's last: give the tokenizer a BOS token",
    "chosen_ids": "a response has at least its end-of-sequence token: leave add_eos on",
    "rejected_ids": "a response has at least its end-of-sequence token: leave add_eos on",
}


def tokenize(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int,
    truncation: str = "error",
    add_eos: bool = True,
) -> Pairs:
    """Rows with explicit prompts as tokens: the prompt with the tokenizer's own special tokens, a response without, and
    the end-of-sequence token after each response.

    Prompt and response are tokenised separately, so that both responses follow the very same prompt and the border
    between them is where the text says it is.

    Parameters
    ----------
    rows
        Mappings with the texts `prompt`, `chosen`, `rejected`, or with the token ids `prompt_ids`, `chosen_ids`,
        `rejected_ids`, which are taken as they are; in both cases also `ref_chosen_logps` and `ref_rejected_logps`
        (numbers), if every row has them. Other columns are ignored.
    tokenizer
        Of transformers. A prompt that comes back with an end-of-sequence token behind it loses that.
    max_length
        In tokens: prompt and the longer response together must not exceed it. At most the model's context.
    truncation
        What to do with a longer pair. ``"error"``: raise, naming the row. ``"prompt"``: keep the prompt's end (and its
        BOS token); ``"response"``: cut the responses' ends, whose end-of-sequence token then goes too; ``"drop"``:
        leave the pair out. The last three are counted in `Pairs.counts`.
    add_eos
        Whether a response ends with the tokenizer's end-of-sequence token. Without it no model learns to stop.

    Returns
    -------
    Pairs

    Raises
    ------
    ValueError
        For no rows, a missing column, an unknown ``truncation``, a pair that does not fit, a tokenizer without an
        end-of-sequence token. The message names the row (0-based) and the way out.
    TypeError
        For texts that are no strings, such as lists of messages.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("no rows: the dataset is empty")
    if truncation not in TRUNCATION:
        raise ValueError(f"truncation = {truncation!r}: choose one of {', '.join(TRUNCATION)}")
    eos = getattr(tokenizer, "eos_token_id", None)
    if all(name in rows[0] for name in _IDS):
        prompts, chosen, rejected = ([list(row[name]) for row in rows] for name in _IDS)
    else:
        for number, row in enumerate(rows):
            _check_texts(number, row)
        if add_eos and eos is None:
            raise ValueError("the tokenizer has no end-of-sequence token: set tokenizer.eos_token, or add_eos=False")
        prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
        prompts = [ids[:-1] if eos is not None and ids[-1:] == [eos] else ids for ids in prompts]
        chosen, rejected = (
            [
                ids + [eos] * add_eos
                for ids in tokenizer([row[name] for row in rows], add_special_tokens=False)["input_ids"]
            ]
            for name in ("chosen", "rejected")
        )
    kept, counts = [], Counter(read=len(rows))
    bos = getattr(tokenizer, "bos_token_id", None)
    for number, (prompt, *responses) in enumerate(zip(prompts, chosen, rejected, strict=True)):
        longest = max(map(len, responses))
        if len(prompt) + longest > max_length:
            where = (
                f"row {number}: the prompt has {len(prompt)} tokens and the longer response {longest}, "
                f"but max_length is {max_length}"
            )
            if truncation == "drop":
                counts["dropped: longer than max_length"] += 1
                continue
            if truncation == "error":
                raise ValueError(f"{where}; choose truncation='prompt', 'response' or 'drop', or a longer context")
            if truncation == "prompt":
                head = prompt[:1] if bos is not None and prompt[:1] == [bos] else []
                room = max_length - longest - len(head)
                if room < 1:
                    raise ValueError(f"{where}: the response alone fills it; choose truncation='response' or 'drop'")
                prompt = head + prompt[-room:]
            elif len(prompt) >= max_length:
                raise ValueError(f"{where}: the prompt alone fills it; choose truncation='prompt' or 'drop'")
            else:
                responses = [ids[: max_length - len(prompt)] for ids in responses]
            counts[f"truncated: {truncation}"] += 1
        kept.append((number, prompt, *responses))
    if not kept:
        raise ValueError(f"none of {len(rows)} rows is left: all are longer than max_length = {max_length}")
    numbers, prompts, chosen, rejected = map(list, zip(*kept, strict=True))
    reference = None
    if all(name in row for row in rows for name in _REFERENCE):
        win, lose = (np.array([rows[n][name] for n in numbers], dtype=np.float32) for name in _REFERENCE)
        reference = (win, lose)
    return Pairs(prompts, chosen, rejected, reference, counts)


def _check_texts(number: int, row: Mapping[str, Any]) -> None:
    for name in _TEXTS:
        if name not in row:
            raise ValueError(f"row {number}: no column {name!r}; a row has prompt, chosen, rejected, not {list(row)}")
        if not isinstance(row[name], str):
            raise TypeError(
                f"row {number}: {name} is a {type(row[name]).__name__}, not a text; "
                "render messages with tokenizer.apply_chat_template first"
            )


# ---------------------------------------------------------------- batches


class PairCollator:
    """Items of `Pairs` as one batch of tensors.

    Parameters
    ----------
    share_prompt
        ``True``: one row [prompt, chosen, rejected] a pair. ``False``: one row a response, first all that were chosen.

    Returns
    -------
    dict[str, Tensor]
        ``chosen_lengths``, ``rejected_lengths`` [pairs]; ``segments`` [rows, length] (0 padding, 1 prompt, 2 chosen, 3
        rejected) and ``input_ids`` of the same shape; for every scored token ``targets`` (its id), ``sources`` (the
        position that predicts it, counted through all rows) and ``owners`` (which response it belongs to: pair k's
        chosen is k, its rejected is pairs + k); and the reference's log-probs [pairs] if the items have them.

        With a shared prompt ``input_ids`` [1, tokens] has no padding, nor has the count of ``sources``; beside them lie
        ``position_ids`` [1, tokens], ``places`` [tokens] (where in ``segments``, counted through all rows, a token
        is), and ``predicting``, the sources in order and without repetition.
    """

    def __init__(self, share_prompt: bool = True) -> None:
        self.share_prompt = share_prompt

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        lists = [[item[name] for item in items] for name in _IDS]
        prompt, chosen, rejected = (np.array([len(ids) for ids in column]) for column in lists)
        count = len(items)
        if self.share_prompt:
            columns = lists
            bounds = np.stack([prompt, prompt + chosen, prompt + chosen + rejected], 1)
        else:
            columns = [lists[0] * 2, lists[1] + lists[2]]
            twice, response = np.tile(prompt, 2), np.concatenate([chosen, rejected])
            bounds = np.stack([twice, twice + response], 1)
        place = np.arange(bounds[:, -1].max())
        segments = np.zeros((len(bounds), len(place)), dtype=np.int64)
        start = np.zeros(len(bounds), dtype=np.int64)
        for number, stop in enumerate(bounds.T, _PROMPT):
            segments[(place >= start[:, None]) & (place < stop[:, None])] = number
            start = stop
        ids = np.zeros_like(segments)
        ids[segments > 0] = np.fromiter(chain.from_iterable(chain.from_iterable(zip(*columns, strict=True))), np.int64)
        row, at = np.nonzero(segments >= _CHOSEN)
        second = segments[row, at] == _REJECTED  # only where the prompt is shared
        before = np.where(second & (at == bounds[row, 1]), bounds[row, 0] - 1, at - 1)
        batch = {
            "chosen_lengths": chosen,
            "rejected_lengths": rejected,
            "input_ids": ids,
            "segments": segments,
            "targets": ids[row, at],
            "sources": row * len(place) + before,
            "owners": row + count * second,
        }
        if self.share_prompt:
            places = np.flatnonzero(segments)
            positions = np.where(segments == _REJECTED, place - chosen[:, None], place)
            sources = np.searchsorted(places, batch["sources"])
            batch |= {
                "input_ids": ids.take(places)[None],
                "position_ids": positions.take(places)[None],
                "places": places,
                "sources": sources,
                "predicting": np.unique(sources),
            }
        tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
        if _REFERENCE[0] in items[0]:
            tensors.update({n: torch.tensor([x[n] for x in items], dtype=torch.float32) for n in _REFERENCE})
        return tensors


# ---------------------------------------------------------------- the model


def check_model(model: Any, share_prompt: bool) -> None:
    """Refuse a model whose pairs cannot be scored so.

    Raises
    ------
    ValueError
        For an encoder–decoder; for an auxiliary loss of a mixture of experts, which would be left out; and with
        ``share_prompt`` for architectures, attention implementations and sliding windows that are not known to give the
        log-probs of two separate rows. The message says what to set.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model type {config.model_type!r} is an encoder–decoder; only decoders are supported")
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "config.output_router_logits is on, but the auxiliary loss of the experts is not added here: turn it off"
        )
    if not share_prompt:
        return
    way_out = "set share_prompt=False to score the two responses as separate rows"
    if config.model_type not in SHARING:
        raise ValueError(
            f"sharing the prompt is checked for {', '.join(SHARING)}, not for {config.model_type!r}: {way_out}"
        )
    attention = config._attn_implementation
    if attention not in ATTENTION:
        raise ValueError(
            f"attention {attention!r} takes no mask with a row for every position: load the model with "
            f"attn_implementation='sdpa', or {way_out}"
        )
    if getattr(config, "sliding_window", None) is not None:
        raise ValueError(
            f"config.sliding_window = {config.sliding_window}: the shared row would not keep to it; {way_out}"
        )


def add_pair_scoring(model: Any) -> None:
    """Teach a model the call ``model(pairs=batch)``; any other call is as before, and so is what is saved.

    ``model(pairs=batch)`` takes a batch of `PairCollator` and returns one tensor [2 · pairs] of summed log-probs, the
    chosen responses first. A model inside PEFT is found and taught.

    Parameters
    ----------
    model
        A causal language model of transformers, or a PeftModel around one. Before it is wrapped for distribution.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    _teach(model, "pairs", _pair_logps)
    if model.config.model_type not in SHARING:
        return
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    _teach(layers[-1], "predicting", _predicting_only)
    for layer in layers:
        _teach(next(m for name, m in layer.named_children() if name in _ATTENTION_NAMES), "places", _in_rows)
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear:
        # Through the head's own call, and not by reading its weights: a wrapper that shards them gathers them then.
        _teach(head, "labels", lambda head, _, labels, x: token_logps(x, labels, weight=head.weight, bias=head.bias))


def _teach(module: Any, word: str, answer: Any) -> None:
    """From now on ``module(..., word=x)`` is ``answer(module, plain, x, ...)``, ``plain`` its forward until now."""
    original = module.forward
    if word in getattr(original, "taught", ()):
        return
    plain = getattr(original, "__func__", lambda _, *args, **kwargs: original(*args, **kwargs))  # a copy calls its own

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.pop(word, None)
        return plain(self, *args, **kwargs) if asked is None else answer(self, plain, asked, *args, **kwargs)

    forward.taught = (*getattr(original, "taught", ()), word)  # type: ignore[attr-defined]
    module.forward = types.MethodType(forward, module)


def _pair_logps(model: Any, plain: Any, pairs: Mapping[str, Tensor]) -> Tensor:
    segments, sources, labels = pairs["segments"], pairs["sources"], pairs["targets"]
    inputs = {"input_ids": pairs["input_ids"], "use_cache": False}
    if "places" in pairs:
        inputs |= {name: pairs[name] for name in ("position_ids", "places", "predicting")}
        inputs["attention_mask"] = _shared_mask(model, segments)
    else:
        inputs["attention_mask"] = (segments > 0).long()
    head = model.get_output_embeddings()
    if "labels" in getattr(head.forward, "taught", ()):
        hidden = getattr(model, model.base_model_prefix)(**inputs).last_hidden_state
        logps = head(hidden.flatten(0, 1).index_select(0, sources), labels=labels)
    else:
        # What follows the head is the architecture's affair: the model computes its logits, of scored positions alone.
        def select(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return args[0].flatten(0, 1).index_select(0, sources)[None], *args[1:]

        hook = head.register_forward_pre_hook(select)
        try:
            logps = token_logps(plain(model, **inputs).logits[0], labels)
        finally:
            hook.remove()
    return logps.new_zeros(2 * len(pairs["chosen_lengths"])).index_add(0, pairs["owners"], logps)


def _shared_mask(model: Any, segments: Tensor) -> Tensor:
    """Which position sees which, [rows, 1, length, length]; padding sees what it likes, and nobody sees it."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    seen = causal & ((segments[:, :, None] == segments[:, None, :]) | (segments == _PROMPT)[:, None, :])
    dtype = model.dtype
    if torch.is_autocast_enabled(segments.device.type):
        dtype = torch.get_autocast_dtype(segments.device.type)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def _in_rows(attention: Any, plain: Any, places: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Attention, of a row a pair. All other parts of the model see the tokens one after another, without padding."""
    rows, length = kwargs["attention_mask"].shape[::3]

    def pad(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.shape[:2] != (1, len(places)):
            return x
        return x.new_zeros(rows * length, *x.shape[2:]).index_copy(0, places, x[0]).unflatten(0, (rows, length))

    args, kwargs = tree_map(pad, (args, kwargs))
    out, *others = plain(attention, *args, **kwargs)
    return out.flatten(0, 1).index_select(0, places)[None], *others


def _predicting_only(layer: Any, plain: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The last layer, whose MLP skips positions that predict nothing: what it adds there reaches no log-prob."""
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return plain(layer, *args, **kwargs)  # which runs once more in the backward pass, then without these hooks

    whole = positions

    def select(_: Any, given: tuple[Tensor]) -> tuple[Tensor]:
        nonlocal whole
        whole = given[0]
        return (whole.index_select(1, positions),)

    def spread(_: Any, __: Any, out: Tensor) -> Tensor:
        return torch.zeros_like(whole, dtype=out.dtype).index_copy(1, positions, out)

    hooks = layer.mlp.register_forward_pre_hook(select), layer.mlp.register_forward_hook(spread)
    try:
        return plain(layer, *args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------- scores without gradients


def score(
    model: Any,
    pairs: Pairs,
    *,
    batch_size: int = 32,
    share_prompt: bool = True,
    progress: str | None = None,
    ranks: tuple[int, int] = (0, 1),
    gather: Any = None,
    context: AbstractContextManager | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The log-probs of all responses, in evaluation mode and without gradients.

    Parameters
    ----------
    model
        Taught by `add_pair_scoring`, wrapped or not.
    pairs
        Of any order: rows of similar length are scored together, which saves padding.
    batch_size
        Pairs at a time.
    share_prompt
        As in `PairCollator`.
    progress
        What a progress bar should say; none without.
    ranks, gather
        This process's number and how many there are; and the function that stacks a tensor of every process. All
        processes then get all scores.
    context
        Entered around the passes, for instance PEFT's ``disable_adapter()``.

    Returns
    -------
    tuple[numpy.ndarray, numpy.ndarray]
        log π(chosen) and log π(rejected), [rows], float32, in the order of ``pairs``.
    """
    rank, world = ranks
    device = next(model.parameters()).device
    collate = PairCollator(share_prompt)
    order = np.argsort(pairs.lengths().sum(1), kind="stable")
    rounds = -(-len(order) // (batch_size * world))
    order = np.resize(order, rounds * batch_size * world) if world > 1 else order  # every process makes as many calls
    values = np.empty((2, len(pairs)), dtype=np.float32)
    mode = model.training
    model.eval()
    try:
        with torch.no_grad(), context or nullcontext():
            for turn in tqdm(range(rounds), desc=progress, disable=progress is None or rank > 0, leave=False):
                together = order[turn * batch_size * world : (turn + 1) * batch_size * world]
                mine = together[rank * batch_size : (rank + 1) * batch_size]
                batch = {k: v.to(device) for k, v in collate([pairs[int(row)] for row in mine]).items()}
                scores = model(pairs=batch).float().view(2, -1).T.contiguous()
                values[:, together] = (gather(scores) if world > 1 else scores).T.cpu().numpy()
    finally:
        model.train(mode)
    return values[0], values[1]
