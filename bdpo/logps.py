r"""Log-probs of a response without the table [batch, length, vocabulary].

The log-prob of a sequence is :math:`\log\pi(y\mid x) = \sum_t \big(z_{t,y_t} - \log\sum_v e^{z_{t,v}}\big)` with the
logits :math:`z_t = W h_t + b`. Written that way it needs one number a position, but ``log_softmax`` and ``gather`` make
a table of them all, and autograd keeps it. `token_logps` and `sequence_logps` go through the vocabulary a chunk at a
time, keep one number a scored position and a share of the chunks, and compute the other chunks once more when the
gradient

.. math:: \frac{\partial \log\pi(y_t)}{\partial z_{t,v}} = [v = y_t] - \mathrm{softmax}(z_t)_v

is asked for. Positions that are not scored are never multiplied with the output head.

**Accuracy.** Logits and the sum over the vocabulary are float32 for inputs of float16, bfloat16 and float32, float64
for float64, and so is the result: a sum of hundreds of log-probs has no place in 8 bits. Value and gradients agree with
the plain computation to 1e-6 in float32. Products with a head in low precision are formed in float32 on a CPU, where
that is also faster, and by the tensor cores elsewhere.

**Cost.** The plain computation makes three products with the head. The backward pass repeats the first of them for the
chunks that were not kept: ``keep``, the share of the chunks that are, trades ``keep`` times the memory of one table for
``keep`` times the time of one product. If only the hidden states need a gradient, as with a frozen head or with LoRA,
nothing is repeated and no chunk is kept: the forward pass keeps :math:`W_{y_t} - \sum_v \mathrm{softmax}(z_t)_v W_v`,
which is the gradient up to the incoming factor.
``bench/losses.py`` measures both.

**Distributed.** Call these inside the ``forward`` of the module that is wrapped. What bypasses the wrapper's
``forward`` also bypasses its averaging of gradients, without an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: How many logits are held at a time: 4 MiB in float32, which leaves room in a cache for what they are made of.
CHUNK_SIZE = 2**20

#: Which share of the chunks is kept for the backward pass where the head is trained: of the three tables that the plain
#: computation holds at its peak, a tenth.
KEEP = 0.3


def sequence_logps(
    inputs: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk_size: int = CHUNK_SIZE,
    keep: float = KEEP,
) -> Tensor:
    r"""The log-prob of each sequence: the sum over its scored tokens, which is what `bdpo.losses` takes.

    :math:`\log\pi(y\mid x) = \sum_{t:\,y_t \ne \text{ignore}} \log\mathrm{softmax}(W h_t + b)_{y_t}`

    Parameters
    ----------
    inputs, labels, weight, bias, ignore_index, chunk_size, keep
        As in `token_logps`, with labels of shape [..., length].

    Returns
    -------
    Tensor
        Shape [...], in nats: 0, with a zero gradient, for a sequence without scored tokens.

    Raises
    ------
    TypeError, ValueError
        As in `token_logps`; also for labels without a length.
    """
    if isinstance(labels, Tensor) and labels.ndim == 0:
        raise ValueError("labels has shape (): a sequence has a length; pass labels of shape [batch, length]")
    tokens = token_logps(
        inputs, labels, weight=weight, bias=bias, ignore_index=ignore_index, chunk_size=chunk_size, keep=keep
    )
    return tokens.sum(-1)


def token_logps(
    inputs: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk_size: int = CHUNK_SIZE,
    keep: float = KEEP,
) -> Tensor:
    r"""The log-prob of each label, 0 where the label is ``ignore_index``.

    :math:`\log\mathrm{softmax}(z_t)_{y_t} = z_{t,y_t} - \log\sum_v e^{z_{t,v}}` with :math:`z_t = W h_t + b`

    Parameters
    ----------
    inputs
        The hidden states :math:`h` of shape [..., hidden], if ``weight`` is given; else the logits :math:`z` of shape
        [..., vocabulary].
    labels
        Integers of shape [...]: ``labels[t]`` is the token that position t predicts, that is, already shifted by one:
        ``inputs[:, :-1]`` goes with ``input_ids[:, 1:]``.
    weight, bias
        The output head: :math:`W` of shape [vocabulary, hidden], as in ``torch.nn.Linear``, and :math:`b` of shape
        [vocabulary]. Under autocast they and the hidden states are cast as ``torch.nn.functional.linear`` casts them.
    ignore_index
        The label of a position that is not scored: prompt, padding.
    chunk_size
        How many logits are held at a time, at least 1. A smaller chunk takes less memory; a larger one saves calls,
        until it leaves the cache. Between 2**19 and 2**23 the time hardly depends on it.
    keep
        The share of the chunks, rounded up, that are kept for the backward pass and not computed twice: from 0, the
        least memory, to 1, the least time. Only for a head that is trained; elsewhere nothing is computed twice.

    Returns
    -------
    Tensor
        Shape [...], at most 0, in nats. float64 for float64 inputs, else float32.

    Raises
    ------
    TypeError
        For inputs that are not floating-point tensors of one dtype, labels that are not integers, a ``chunk_size`` or
        ``ignore_index`` that is not an integer, a ``keep`` that is not a number.
    ValueError
        For shapes that do not fit, tensors on different devices, a bias without a weight, a label outside of the
        vocabulary, a ``chunk_size`` below 1, a ``keep`` outside of [0, 1].

    Notes
    -----
    Differentiable once. Values of labels are looked at, which costs a GPU one synchronisation; the positions that are
    scored are looked up anyway.
    """
    _check(inputs, labels, weight, bias, ignore_index, chunk_size, keep)
    scored = labels != ignore_index
    if weight is None:
        rows = scored.flatten().nonzero().squeeze(-1)
        values = _FromLogits.apply(inputs.reshape(-1, inputs.shape[-1]), labels[scored].long(), rows, chunk_size)
    else:
        inputs, weight, bias = _autocast(inputs), _autocast(weight), None if bias is None else _autocast(bias)
        kept = keep if torch.is_grad_enabled() else None  # inside the function gradients are always off
        values = _FromHidden.apply(inputs[scored], labels[scored].long(), weight, bias, chunk_size, kept)
    return values.new_zeros(labels.shape).masked_scatter(scored, values)


class _FromHidden(torch.autograd.Function):
    """Log-probs of n labels from n hidden states and the head, a block of the vocabulary at a time.

    The blocks divide the vocabulary and not the rows: the head is then read, and its gradient written, once a pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        chunk_size: int,
        keep: float | None,
    ) -> Tensor:
        top, total, picked = (_wide(hidden).new_full((len(hidden),), v) for v in (_lowest(hidden), 0, 0))
        trained = any(ctx.needs_input_grad[2:4])
        frozen_head = keep is not None and ctx.needs_input_grad[0] and not trained
        mean = torch.zeros_like(hidden, dtype=top.dtype) if frozen_head else None  # of the rows of W under the softmax
        parts = _slices(len(weight), len(hidden), chunk_size)
        count = math.ceil(keep * len(parts)) if keep is not None and trained else 0
        kept: list[Tensor] = []  # of the first blocks: exp(logits - top of the block), and that top
        for columns, logits in _blocks(hidden, weight, bias, parts, own=count):
            here, at = _locate(labels, columns)
            picked = torch.where(here, logits.gather(1, at).squeeze(1), picked)
            block_top, block_total = _exp_(logits)
            before, top = top, torch.maximum(top, block_top)
            old, new = (before - top).exp_(), (block_top - top).exp_()  # from one top to the other
            total = total * old + block_total * new
            if mean is not None:
                mean.mul_(old[:, None]).addcmul_(_matmul(logits, weight[columns]), new[:, None])
            if len(kept) < 2 * count:
                kept += [logits, block_top]
        if mean is None:
            ctx.save_for_backward(hidden, labels, weight, bias, top, total, *kept)
        else:
            ctx.save_for_backward(weight[labels] - mean.div_(total[:, None]))
        ctx.parts, ctx.dtype = parts, hidden.dtype
        return (picked - top) - total.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if len(saved) == 1:
            return (grad[:, None] * saved[0]).to(ctx.dtype), None, None, None, None, None
        hidden, labels, weight, bias, top, total, *kept = saved
        need_hidden, _, need_weight, need_bias, *_ = ctx.needs_input_grad
        to_hidden = torch.zeros_like(hidden, dtype=top.dtype) if need_hidden else None
        to_weight = torch.empty_like(weight) if need_weight else None
        to_bias = torch.empty_like(bias) if need_bias else None
        for columns, exps in _exps(hidden, weight, bias, ctx.parts, top, kept):
            to_logits = _softmax_gradient_(exps, total, grad, *_locate(labels, columns))
            if to_hidden is not None:
                to_hidden += _matmul(to_logits, weight[columns])
            if to_weight is not None:
                _matmul(to_logits.T, hidden, out=to_weight[columns])
            if to_bias is not None:
                to_bias[columns] = to_logits.sum(0)
        return None if to_hidden is None else to_hidden.to(ctx.dtype), None, to_weight, to_bias, None, None


class _FromLogits(torch.autograd.Function):
    """Log-probs of n labels from n of the rows of given logits, some rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, rows: Tensor, chunk_size: int) -> Tensor:
        parts = _slices(len(rows), logits.shape[1], chunk_size)
        top, total, picked = (_wide(logits[:0, :0]).new_empty(len(rows)) for _ in range(3))
        for part in parts:
            chunk = _wide(logits[rows[part]])
            picked[part] = chunk.gather(1, labels[part, None]).squeeze(1)
            top[part], total[part] = _exp_(chunk)
        ctx.save_for_backward(logits, labels, rows, top, total)
        ctx.parts = parts
        return (picked - top) - total.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, rows, top, total = ctx.saved_tensors
        to_logits = torch.zeros_like(logits)
        for part in ctx.parts:
            chunk, everywhere = _wide(logits[rows[part]]), _locate(labels[part], slice(0, logits.shape[1]))
            chunk.sub_(top[part, None]).exp_()
            _softmax_gradient_(chunk, total[part], grad[part], *everywhere)
            to_logits[rows[part]] = chunk.to(logits.dtype)
        return to_logits, None, None, None


def _blocks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, parts: list[slice], own: int = 0
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the vocabulary and the logits of all rows there, in memory that the next block overwrites; the first
    ``own`` blocks have memory of their own."""
    hidden = hidden.to(_factor_dtype(weight))
    for number, columns in enumerate(parts):
        if number <= own:
            memory = _wide(hidden.new_empty(0))
        memory.resize_(len(hidden), columns.stop - columns.start)
        logits = _matmul(hidden, weight[columns].T, out=memory)
        yield columns, logits if bias is None else logits.add_(bias[columns])


def _exps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, parts: list[slice], top: Tensor, kept: list[Tensor]
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the vocabulary and exp(logits - top) of all rows there: of what the forward pass kept, then anew."""
    blocks, tops = kept[::2], kept[1::2]
    memory = _wide(hidden.new_empty(0))
    for columns, block, block_top in zip(parts, blocks, tops, strict=False):
        memory.resize_(block.shape)
        yield columns, torch.mul(block, (block_top - top).exp_()[:, None], out=memory)  # a later pass finds them whole
    for columns, logits in _blocks(hidden, weight, bias, parts[len(blocks) :]):
        yield columns, logits.sub_(top[:, None]).exp_()


def _slices(count: int, other: int, chunk_size: int) -> list[slice]:
    """Ranges that cover ``count`` indices, each of which stands for ``other`` logits."""
    step = max(1, chunk_size // max(1, other))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _factor_dtype(factor: Tensor) -> torch.dtype:
    """What a product is computed in: low precision only where there are tensor cores for it."""
    return _wide_dtype(factor) if factor.device.type == "cpu" else factor.dtype


def _matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b``, where b is of the model and a may be wider, in float32 or wider."""
    dtype = _factor_dtype(b)
    if out is not None and out.dtype == dtype:
        return torch.mm(a.to(dtype), b.to(dtype), out=out)
    product = _wide(a.to(dtype) @ b.to(dtype))
    return product if out is None else out.copy_(product)


def _locate(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which labels lie in these columns of the vocabulary; and where, as a column for ``gather``."""
    at = labels - columns.start
    here = (at >= 0) & (at < columns.stop - columns.start)
    return here, torch.where(here, at, 0)[:, None]


def _exp_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The top of each row and the sum of what the logits become, exp(logits - top)."""
    top = logits.amax(1).clamp_(min=_lowest(logits))  # a row of -inf has no top, and a sum of 0
    return top, logits.sub_(top[:, None]).exp_().sum(1)


def _softmax_gradient_(exps: Tensor, total: Tensor, grad: Tensor, here: Tensor, at: Tensor) -> Tensor:
    """exp(logits - top) becomes grad · ([v = label] - softmax)."""
    return exps.mul_((-grad / total)[:, None]).scatter_add_(1, at, torch.where(here, grad, 0)[:, None])


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_dtype(x))


def _lowest(x: Tensor) -> float:
    return torch.finfo(_wide_dtype(x)).min


def _autocast(x: Tensor) -> Tensor:
    """The tensor as autocast would hand it to a linear layer."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _check(
    inputs: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ignore_index: int,
    chunk_size: int,
    keep: float,
) -> None:
    """Refuse what does not fit, by name."""
    tensors = {"inputs": inputs, "weight": weight, "bias": bias}
    floats = {name: x for name, x in tensors.items() if x is not None}
    for name, x in floats.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} has {_kind(x)}: it must be a floating-point tensor")
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels has {_kind(labels)}: token ids are int64 or int32; convert them with .long()")
    for name, value in (("ignore_index", ignore_index), ("chunk_size", chunk_size)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} = {value!r}: it must be an integer")
    if chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size}: it must be at least 1; the default is {CHUNK_SIZE}")
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise TypeError(f"keep = {keep!r}: it must be a number from 0 to 1")
    if not 0 <= keep <= 1:
        raise ValueError(
            f"keep = {keep}: it must be from 0, keep nothing, to 1, keep all chunks; the default is {KEEP}"
        )
    if bias is not None and weight is None:
        raise ValueError(
            "bias is given without weight: logits have it already; pass hidden states with weight and bias"
        )
    if not torch.is_autocast_enabled(inputs.device.type) and len({x.dtype for x in floats.values()}) > 1:
        kinds = ", ".join(f"{name} has dtype {x.dtype}" for name, x in floats.items())
        raise TypeError(f"{kinds}: the dtypes must agree; convert with .to(weight.dtype), or use autocast")
    if len({x.device for x in (labels, *floats.values())}) > 1:
        kinds = ", ".join(f"{name} is on {x.device}" for name, x in {"labels": labels, **floats}.items())
        raise ValueError(f"{kinds}: the devices must agree; move the tensors with .to(device)")
    if inputs.ndim == 0 or inputs.shape[:-1] != labels.shape:
        raise ValueError(
            f"inputs has shape {_shape(inputs)}, labels has shape {_shape(labels)}: inputs needs labels' shape and one"
            " more dimension; labels[t] is the token that position t predicts: pass inputs[:, :-1] with ids[:, 1:]"
        )
    if weight is not None and (weight.ndim != 2 or weight.shape[1] != inputs.shape[-1]):
        raise ValueError(
            f"weight has shape {_shape(weight)}, inputs has shape {_shape(inputs)}: weight must be [vocabulary, hidden]"
            " with the hidden size of inputs, as in torch.nn.Linear"
        )
    if bias is not None and weight is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {_shape(bias)}: it must be {_shape(weight[:, 0])}, one number a token")
    vocabulary = inputs.shape[-1] if weight is None else len(weight)
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if outside.any():
        raise ValueError(
            f"labels contains {labels[outside][0].item()}: it must be from 0 to {vocabulary - 1}, or"
            f" {ignore_index} for a position that is not scored; look for a mask value other than ignore_index"
        )


def _kind(x: object) -> str:
    return f"dtype {x.dtype}" if isinstance(x, Tensor) else f"type {type(x).__name__}"


def _shape(x: Tensor) -> str:
    return str(list(x.shape))
