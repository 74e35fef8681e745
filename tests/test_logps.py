"""Sequence log-probs against the plain computation, and what they do at the edges.

``assert_matches_plain`` is the suite: value and gradients of `sequence_logps`, and of each mutant with one mistake,
against logits, ``log_softmax`` and ``gather`` in float64. The mutants must fail it.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bdpo import logps
from bdpo.logps import sequence_logps, token_logps

IGNORE = -100
TOLERANCE = 1e-6


def plain(inputs, labels, *, weight=None, bias=None, ignore_index=IGNORE):
    """The textbook computation, with the whole table."""
    logits = inputs if weight is None else nn.functional.linear(inputs, weight, bias)
    scored = labels != ignore_index
    tokens = torch.log_softmax(logits, -1).gather(-1, labels.where(scored, 0)[..., None]).squeeze(-1)
    return (tokens * scored).sum(-1)


def batch(rows=3, length=5, vocabulary=11, hidden=4, dtype=torch.float64, seed=0):
    """Hidden states, labels (a prompt, a padded row, and a row without a response), head and incoming gradients."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (rows, length), generator=generator)
    labels[:, 0] = IGNORE
    labels[0, length // 2 + 1 :] = IGNORE
    labels[-1] = IGNORE
    head = draw(vocabulary, hidden) / hidden**0.5, draw(vocabulary)
    hidden_states, grad = draw(rows, length, hidden), draw(rows)
    return [x.to(dtype) for x in (hidden_states, *head)], labels, grad


def value_and_gradients(function: Callable, tensors: list[Tensor], labels: Tensor, grad: Tensor, **settings):
    """The value and the gradients in hidden states, weight and bias; None stands for what is not given."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    value = function(leaves[0], labels, weight=leaves[1], bias=leaves[2], **settings)
    given = [x for x in leaves if x is not None]
    return value.detach(), *torch.autograd.grad(value, given, grad.to(value.dtype), materialize_grads=True)


def close(a, b, tolerance=TOLERANCE):
    """Equal to the tolerance, relative to the largest entry; equal shapes."""
    assert a.shape == b.shape
    scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
    assert (a.double() - b.double()).abs().max().item() <= tolerance * scale if b.numel() else True


def assert_matches_plain(function: Callable, *, head: bool = True, dtype=torch.float32) -> None:
    """The suite: chunks that divide and that do not, from one logit to more than there are; also other ignored ids.
    None, some and all chunks are kept for the backward pass."""
    shapes = [(3, 5, 11, 4), (2, 3, 1, 3), (4, 7, 300, 16)]
    chunks = [(1, 0.5), (37, 0), (37, 0.5), (37, 1), (100, 0.5), (10**6, 0.5)]  # their size, and the share that is kept
    for shape, (chunk_size, keep) in itertools.product(shapes, chunks):
        tensors, labels, grad = batch(*shape, seed=len(shapes) + shape[0])
        ignored = IGNORE if shape[2] < 300 else 299  # a padding id inside the vocabulary
        labels = labels.where(labels != IGNORE, ignored)
        if not head:
            tensors = [nn.functional.linear(*tensors), None, None]
        expected = value_and_gradients(plain, tensors, labels, grad, ignore_index=ignored)
        given = [None if x is None else x.to(dtype) for x in tensors]
        settings = {"ignore_index": ignored, "chunk_size": chunk_size, "keep": keep}
        got = value_and_gradients(function, given, labels, grad, **settings)
        for a, b in zip(got, expected, strict=True):
            close(a, b)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradients_are_those_of_the_plain_computation(head, dtype):
    assert_matches_plain(sequence_logps, head=head, dtype=dtype)


@pytest.mark.parametrize("needs", [s for s in itertools.product([True, False], repeat=3) if any(s)])
@pytest.mark.parametrize("chunk_size", [4, 10**6])
@pytest.mark.parametrize("keep", [0, 0.4])
def test_gradcheck_whichever_of_hidden_states_weight_and_bias_need_a_gradient(needs, chunk_size, keep):
    tensors, labels, _ = batch()
    leaves = [x.requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
    tokens = lambda h, w, b: token_logps(h, labels, weight=w, bias=b, chunk_size=chunk_size, keep=keep)  # noqa: E731
    assert torch.autograd.gradcheck(tokens, leaves)


def test_gradcheck_from_logits():
    tensors, labels, _ = batch()
    logits = nn.functional.linear(*tensors).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: token_logps(z, labels, chunk_size=20), logits)


def test_a_uniform_head_gives_minus_length_times_log_vocabulary():
    labels = torch.tensor([[IGNORE, 1, 2, 0], [IGNORE, IGNORE, 6, IGNORE]])
    value = sequence_logps(torch.ones(2, 4, 3), labels, weight=torch.zeros(7, 3), bias=torch.full((7,), 5.0))
    torch.testing.assert_close(value, torch.tensor([-3 * math.log(7), -math.log(7)]))


def test_two_tokens_are_a_log_sigmoid():
    gap = torch.tensor([0.5, -3.0, 40.0], dtype=torch.float64)
    logits = torch.stack([gap, torch.zeros(3, dtype=torch.float64)], -1)
    torch.testing.assert_close(token_logps(logits, torch.zeros(3, dtype=torch.int64)), nn.functional.logsigmoid(gap))


def test_tokens_sum_to_the_sequence_and_are_zero_where_ignored():
    (hidden, weight, bias), labels, _ = batch()
    tokens = token_logps(hidden, labels, weight=weight, bias=bias)
    assert tokens.shape == labels.shape
    assert (tokens[labels == IGNORE] == 0).all()
    assert (tokens[labels != IGNORE] < 0).all()
    torch.testing.assert_close(tokens.sum(-1), sequence_logps(hidden, labels, weight=weight, bias=bias))


def test_hidden_states_with_a_head_and_their_logits_agree():
    (hidden, weight, bias), labels, _ = batch()
    by_logits = sequence_logps(nn.functional.linear(hidden, weight, bias), labels)
    torch.testing.assert_close(by_logits, sequence_logps(hidden, labels, weight=weight, bias=bias))


# --- mutants: one mistake each, and the suite rejects it --------------------------------------------------------------


def in_plain(head=nn.functional.linear, tokens=None, reduce=lambda t, scored: (t * scored).sum(-1), shift=0):
    """The plain computation with parts to replace; without replacements, the control."""
    tokens = tokens or (lambda z, at: z.gather(-1, at).squeeze(-1) - z.logsumexp(-1))

    def mutant(inputs, labels, *, weight=None, bias=None, ignore_index=IGNORE, chunk_size=None, keep=None):
        scored = labels != ignore_index
        at = labels.where(scored, 0).roll(shift, -1)[..., None]
        return reduce(tokens(head(inputs, weight, bias), at), scored)

    return mutant


def from_here(x: Tensor) -> Tensor:
    return x.gather(-1, torch.zeros_like(x[..., :1], dtype=torch.int64)).squeeze(-1)


OUTSIDE = {
    "labels shifted to the right": in_plain(shift=1),
    "labels shifted to the left": in_plain(shift=-1),
    "mean over the scored tokens": in_plain(reduce=lambda t, m: (t * m).sum(-1) / m.sum(-1).clamp(min=1)),
    "mean over the length": in_plain(reduce=lambda t, m: (t * m).mean(-1)),
    "mask left out": in_plain(reduce=lambda t, m: t.sum(-1)),
    "mask turned round": in_plain(reduce=lambda t, m: (t * ~m).sum(-1)),
    "the last token left out": in_plain(reduce=lambda t, m: (t * m)[..., :-1].sum(-1)),
    "summed over the batch": in_plain(reduce=lambda t, m: (t * m).sum().expand(t.shape[:1])),
    "logits for log-probs": in_plain(tokens=lambda z, at: z.gather(-1, at).squeeze(-1)),
    "probabilities for log-probs": in_plain(tokens=lambda z, at: z.softmax(-1).gather(-1, at).squeeze(-1)),
    "bits for nats": in_plain(tokens=lambda z, at: z.log_softmax(-1).gather(-1, at).squeeze(-1) / math.log(2)),
    "the first token of the vocabulary": in_plain(tokens=lambda z, at: from_here(z.log_softmax(-1))),
    "normaliser detached": in_plain(tokens=lambda z, at: z.gather(-1, at).squeeze(-1) - z.logsumexp(-1).detach()),
    "normalised over the length": in_plain(tokens=lambda z, at: z.log_softmax(-2).gather(-1, at).squeeze(-1)),
    "bias left out": in_plain(head=lambda h, w, b: nn.functional.linear(h, w) + 0 * b),
    "bias subtracted": in_plain(head=lambda h, w, b: nn.functional.linear(h, w, -b)),
    "bias without a gradient": in_plain(head=lambda h, w, b: nn.functional.linear(h, w, b.detach())),
    "weight without a gradient": in_plain(head=lambda h, w, b: nn.functional.linear(h, w.detach(), b)),
    "hidden states without a gradient": in_plain(head=lambda h, w, b: nn.functional.linear(h.detach(), w, b)),
}


def with_top(kept: list[Tensor], top: list[Tensor]) -> list[Tensor]:
    """What was kept, but the first block has this top."""
    return kept[:1] + top + kept[2:] if kept else kept


def from_first(parts: list[slice]) -> list[slice]:
    """As many slices of these lengths, but from the first column on."""
    return [slice(part.start - parts[0].start, part.stop - parts[0].start) for part in parts]


#: Mistakes in parts of the module itself: the name of the part, and what stands in its place.
INSIDE = {
    "the last block left out": ("_slices", lambda f: lambda *a: f(*a)[: max(1, len(f(*a)) - 1)]),
    "blocks that overlap": ("_slices", lambda f: lambda n, *a: [slice(max(0, s.start - 1), s.stop) for s in f(n, *a)]),
    "the top of a block not added": ("_exp_", lambda f: lambda z: (lambda m, t: (0 * m, t))(*f(z))),
    "one too many in every sum": ("_exp_", lambda f: lambda z: (lambda m, t: (m, t + 1))(*f(z))),
    "labels found one to the right": ("_locate", lambda f: lambda labels, columns: f(labels + 1, columns)),
    "every label in every block": ("_locate", lambda f: lambda *a: (torch.ones_like(f(*a)[0]), f(*a)[1])),
    "gradient of the wrong sign": ("_softmax_gradient_", lambda f: lambda z, t, g, *a: f(z, t, -g, *a)),
    "gradient without the label": ("_softmax_gradient_", lambda f: lambda *a: f(*a[:3], a[3] & False, a[4])),
    "gradient without the factor": ("_softmax_gradient_", lambda f: lambda z, t, g, *a: f(z, t, g * 0 + 1, *a)),
    "gradient not normalised": ("_softmax_gradient_", lambda f: lambda z, t, *a: f(z, t * 0 + 1, *a)),
    "the kept blocks in the wrong order": ("_exps", lambda f: lambda *a: f(*a[:5], a[5][2:] + a[5][:2])),
    "a kept block in place of its neighbour": ("_exps", lambda f: lambda *a: f(*a[:5], a[5][2:4] + a[5][2:])),
    "a kept block with another's top": ("_exps", lambda f: lambda *a: f(*a[:5], with_top(a[5], a[5][-1:]))),
    "a kept block that the top left behind": ("_exps", lambda f: lambda *a: f(*a[:5], with_top(a[5], [a[4]]))),
    "blocks made anew from the first on": (
        "_blocks",
        lambda f: lambda h, w, b, p, own=0: f(h, w, b, from_first(p), own),
    ),
    "products of absolute values": ("_matmul", lambda f: lambda a, b, out=None: f(a.abs(), b, out=out)),
}


def test_what_the_mutants_are_built_from_passes_without_the_mistake():
    assert_matches_plain(in_plain(), dtype=torch.float64)
    assert_matches_plain(lambda *a, **k: WithFactors.of(1, 1, 1)(*a, **k))


class WithFactors(torch.autograd.Function):
    """The identity, but each gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx, factors, *tensors):
        ctx.factors = factors
        return tuple(x.clone() for x in tensors)

    @staticmethod
    def backward(ctx, *grads):
        return None, *(g * f for g, f in zip(grads, ctx.factors, strict=True))

    @classmethod
    def of(cls, *factors):
        def mutant(inputs, labels, *, weight, bias, **settings):
            hidden, weight, bias = cls.apply(factors, inputs, weight, bias)
            return sequence_logps(hidden, labels, weight=weight, bias=bias, **settings)

        return mutant


FACTORS = {
    f"{name} gradient times {factor}": WithFactors.of(*(factor if i == j else 1 for j in range(3)))
    for (i, name), factor in itertools.product(enumerate(["hidden", "weight", "bias"]), [-1, 0.5, 1 + 1e-4])
}


@pytest.mark.parametrize("what", [*OUTSIDE, *FACTORS])
def test_a_mutant_of_the_formula_is_rejected(what):
    mutant = (OUTSIDE | FACTORS)[what]
    with pytest.raises(AssertionError):
        assert_matches_plain(mutant, dtype=torch.float64)


@pytest.mark.parametrize("what", INSIDE)
def test_a_mutant_of_the_module_is_rejected(what, monkeypatch):
    name, change = INSIDE[what]
    monkeypatch.setattr(logps, name, change(getattr(logps, name)))
    with pytest.raises(AssertionError):
        assert_matches_plain(sequence_logps, dtype=torch.float64)


# --- memory: what is never made ---------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor made inside, forward or backward, apart from gradients of leaves."""

    def __init__(self, *allowed: torch.Size):
        super().__init__()
        self.allowed, self.size, self.products = allowed, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        made = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        self.size = max([self.size, *(x.numel() for x in made if x.shape not in self.allowed)])
        return out


def largest(function, tensors, labels, **settings):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    weight = leaves[1] if len(leaves) > 1 else None
    shapes = [*(x.shape for x in leaves), leaves[1].T.shape] if len(leaves) > 1 else [leaves[0].shape]
    with Largest(*shapes) as seen:
        function(leaves[0], labels, weight=weight, **settings).sum().backward()
    return seen.size


def test_neither_the_table_of_log_probs_nor_the_logits_are_ever_made():
    (hidden, weight, _), labels, _ = batch(4, 16, 1000, 8, dtype=torch.float32)
    table = labels.numel() * len(weight)
    assert largest(plain, [hidden, weight], labels) == table  # the instrument sees it where it is made
    assert largest(sequence_logps, [hidden, weight], labels, chunk_size=2000) <= 2000


def test_given_logits_only_their_gradient_has_their_size():
    (hidden, weight, bias), labels, _ = batch(4, 16, 1000, 8, dtype=torch.float32)
    logits = nn.functional.linear(hidden, weight, bias)
    sizes = largest(sequence_logps, [logits], labels, chunk_size=2000)
    assert sizes <= logits.numel()
    with torch.no_grad(), Largest() as seen:
        sequence_logps(logits, labels, chunk_size=2000)
    assert seen.size <= logits.numel()  # the view of the logits as rows
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        sequence_logps(logits.requires_grad_(), labels, chunk_size=2000)
    assert {x.data_ptr() for x in saved if x.numel() >= 2000} == {logits.data_ptr()}  # kept, not copied


def test_with_no_chunk_kept_what_is_saved_has_the_size_of_the_hidden_states_and_the_head():
    (hidden, weight, bias), labels, _ = batch(4, 16, 1000, 8, dtype=torch.float32)
    for head_needs in (True, False):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # noqa: B023
            sequence_logps(hidden.requires_grad_(), labels, weight=weight.requires_grad_(head_needs), bias=bias, keep=0)
        assert max(x.numel() for x in saved) <= weight.numel()


@pytest.mark.parametrize("keep", [0, 0.01, 0.5, 1])
@pytest.mark.parametrize(
    ("needs", "products", "again"), [((True, True), 3, 1), ((True, False), 2, 0), ((False, True), 2, 1)]
)
def test_only_chunks_that_are_not_kept_cost_a_product_again(needs, products, again, keep):
    (hidden, weight, _), labels, _ = batch()
    hidden.requires_grad_(needs[0]), weight.requires_grad_(needs[1])
    scored = int((labels != IGNORE).sum())
    with Largest() as seen:
        sequence_logps(hidden, labels, weight=weight, chunk_size=scored, keep=keep).sum().backward()
    chunks = len(weight)  # of one token each
    assert seen.products == products * chunks + again * (chunks - math.ceil(keep * chunks))


@pytest.mark.parametrize("keep", [0, 0.25, 0.3, 1])
def test_kept_is_the_share_that_was_asked_for(keep):
    (hidden, weight, _), labels, _ = batch(4, 16, 1000, 8, dtype=torch.float32)
    scored = int((labels != IGNORE).sum())
    for frozen in (False, True):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # noqa: B023
            settings = {"weight": weight.requires_grad_(not frozen), "chunk_size": 100 * scored, "keep": keep}
            sequence_logps(hidden.requires_grad_(), labels, **settings)
        blocks = [x for x in saved if x.shape == (scored, 100)]
        assert len({x.data_ptr() for x in blocks}) == len(blocks) == (0 if frozen else math.ceil(10 * keep))


def test_without_gradients_one_product():
    (hidden, weight, _), labels, _ = batch()
    with torch.no_grad(), Largest() as seen:
        sequence_logps(hidden.requires_grad_(), labels, weight=weight)
    assert seen.products == 1


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [7, 10**6])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_row_without_a_response_is_zero_with_a_zero_gradient(chunk_size, frozen):
    (hidden, weight, bias), labels, _ = batch()
    hidden.requires_grad_()
    value = sequence_logps(hidden, labels, weight=weight.requires_grad_(not frozen), bias=bias, chunk_size=chunk_size)
    assert value[-1] == 0
    value.sum().backward()
    assert (hidden.grad[-1] == 0).all()
    assert (hidden.grad[0, 1] != 0).all()


def test_a_batch_without_any_scored_token_still_gives_zero_gradients():
    """On one process of several this happens, and a missing gradient would leave the others waiting."""
    (hidden, weight, bias), labels, _ = batch()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    value = sequence_logps(hidden, torch.full_like(labels, IGNORE), weight=weight, bias=bias)
    value.sum().backward()
    assert (value == 0).all()
    assert all((x.grad == 0).all() for x in leaves)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (0,)])
@pytest.mark.parametrize("head", [True, False])
def test_empty_batch_and_empty_length(shape, head):
    labels = torch.zeros(shape, dtype=torch.int64)
    inputs = torch.zeros(*shape, 4, requires_grad=True)
    value = sequence_logps(inputs, labels, weight=torch.ones(7, 4, requires_grad=True) if head else None)
    assert value.shape == shape[:-1]
    value.sum().backward()
    assert inputs.grad.shape == inputs.shape


def test_one_sequence_without_a_batch_and_many_dimensions():
    (hidden, weight, bias), labels, _ = batch(6)
    whole = sequence_logps(hidden, labels, weight=weight, bias=bias)
    torch.testing.assert_close(sequence_logps(hidden[0], labels[0], weight=weight, bias=bias), whole[0])
    folded = sequence_logps(hidden.view(2, 3, 5, 4), labels.view(2, 3, 5), weight=weight, bias=bias)
    torch.testing.assert_close(folded, whole.view(2, 3))


@pytest.mark.parametrize("chunk_size", [1, 10**6])
def test_vocabulary_of_one_token_is_certain(chunk_size):
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    weight = torch.randn(1, 4, requires_grad=True)
    value = sequence_logps(hidden, torch.zeros(2, 3, dtype=torch.int64), weight=weight, chunk_size=chunk_size)
    value.sum().backward()
    assert (value == 0).all()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_vocabulary_of_128_000_is_no_less_accurate_than_the_plain_computation():
    """A gradient that sums 128 000 products has an error of 5e-6 in float32 however it is computed."""
    tensors, labels, grad = batch(2, 4, 128_000, 8)
    expected = value_and_gradients(plain, tensors, labels, grad)
    single = [x.float() for x in tensors]
    by_table = value_and_gradients(plain, single, labels, grad)
    by_block = value_and_gradients(sequence_logps, single, labels, grad, chunk_size=2**16)
    for ours, theirs, exact in zip(by_block, by_table, expected, strict=True):
        close(ours, exact, max(TOLERANCE, (theirs - exact).abs().max().item()))


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded"])
def test_inputs_that_are_not_contiguous(view):
    (hidden, weight, bias), labels, grad = batch()
    change = {
        "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": lambda x: torch.stack([x, -x], -1)[..., 0],
        "expanded": lambda x: x[:1].expand_as(x),
    }[view]
    tensors = [change(hidden), weight.T.contiguous().T, torch.stack([bias, -bias], -1)[:, 0]]
    labels = torch.stack([labels, labels], -1)[..., 0]
    copies = [x.contiguous() for x in tensors]
    for settings in ({"chunk_size": 20}, {}):
        run = lambda t: value_and_gradients(sequence_logps, t, labels, grad, **settings)  # noqa: B023, E731
        torch.testing.assert_close(run(tensors), run(copies))
    logits = change(nn.functional.linear(*copies))
    torch.testing.assert_close(sequence_logps(logits, labels), sequence_logps(logits.contiguous(), labels))
    incoming = torch.ones((), dtype=torch.float64).expand(len(labels))  # as .sum().backward() makes it
    torch.testing.assert_close(
        value_and_gradients(sequence_logps, tensors, labels, incoming),
        value_and_gradients(plain, copies, labels, incoming),
    )


@pytest.mark.parametrize("head", [True, False])
def test_logits_of_a_thousand_neither_overflow_nor_lose_the_gradient(head):
    logits = torch.tensor([[1000.0, -1000.0, 0.0], [-1e4, 1e4, 1e4], [-1e4, -1e4, -1e4]], requires_grad=True)
    weight = torch.eye(3) if head else None
    value = token_logps(logits, torch.tensor([1, 2, 0]), weight=weight, chunk_size=3)
    torch.testing.assert_close(value, torch.tensor([-2000.0, -math.log(2), -math.log(3)]))
    value.sum().backward()
    slopes = [[-1.0, 1.0, 0.0], [0.0, -0.5, 0.5], [2 / 3, -1 / 3, -1 / 3]]
    torch.testing.assert_close(logits.grad, torch.tensor(slopes))


@pytest.mark.parametrize("chunk_size", [1, 10**6])
@pytest.mark.parametrize("frozen", [False, True])
def test_forbidden_tokens_of_minus_infinity_are_left_out(chunk_size, frozen):
    """A bias of -inf forbids a token; whole blocks of them, first or last, must not become NaN."""
    (hidden, weight, bias), labels, grad = batch()
    allowed = (labels[labels >= 0]).unique()
    bias = torch.full_like(bias, -math.inf).index_put((allowed,), bias[allowed])
    tensors = [x.requires_grad_(not frozen) for x in (weight, bias)]
    for function, settings in ((plain, {}), (sequence_logps, {"chunk_size": chunk_size})):
        leaf = hidden.detach().clone().requires_grad_()
        value = function(leaf, labels, weight=tensors[0], bias=tensors[1], **settings)
        tensors.append((value.detach(), torch.autograd.grad(value, leaf, grad)[0]))
    torch.testing.assert_close(tensors[3], tensors[2])


def test_a_certain_token_never_has_a_positive_log_prob():
    """`bdpo.losses` refuses positive log-probs, and a normaliser from another sum than the logit's could give them."""
    hidden = torch.randn(64, 5, 16) * torch.logspace(-1, 1.5, 64)[:, None, None]
    weight = torch.randn(50, 16)
    labels = (hidden @ weight.T).argmax(-1)
    for chunk_size in (1, 320, 5000, 10**6):
        assert (token_logps(hidden, labels, weight=weight, chunk_size=chunk_size) <= 0).all()


# --- low precision, autocast, training loops --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [True, False])
def test_low_precision_is_float32_inside(dtype, head):
    """Against float64 on the same rounded numbers: the value has float32's error, a gradient one rounding."""
    tensors, labels, grad = batch(4, 200, 300, 16, dtype=dtype)
    if not head:
        tensors = [nn.functional.linear(*tensors), None, None]
    double = [None if x is None else x.double() for x in tensors]
    expected = value_and_gradients(plain, double, labels, grad)
    got = value_and_gradients(sequence_logps, tensors, labels, grad, chunk_size=2**14)
    assert got[0].dtype == torch.float32
    close(got[0], expected[0])
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert a.dtype == dtype
        close(a, b, torch.finfo(dtype).eps)
    naive = plain(*tensors[:1], labels, weight=tensors[1], bias=tensors[2])  # the same, summed in its own dtype
    assert (naive.double() - expected[0]).abs().max() > 1e-4 * expected[0].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
def test_products_in_low_precision_as_on_tensor_cores(dtype, frozen, monkeypatch):
    monkeypatch.setattr(logps, "_factor_dtype", lambda factor: factor.dtype)
    tensors, labels, grad = batch(4, 20, 300, 16, dtype=dtype)
    expected = value_and_gradients(plain, [x.double() for x in tensors], labels, grad)
    hidden, weight, bias = (x.requires_grad_(not frozen) for x in tensors)
    value = sequence_logps(hidden.requires_grad_(), labels, weight=weight, bias=bias, chunk_size=2**10)
    leaves = [hidden] if frozen else [hidden, weight, bias]
    got = value, *torch.autograd.grad(value, leaves, grad.float())
    for a, b in zip(got, expected, strict=False):
        close(a, b, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("head", [True, False])
def test_under_autocast_dtypes_and_gradients_are_those_of_a_linear_layer(head):
    (hidden, weight, bias), labels, grad = batch(4, 20, 300, 16, dtype=torch.float32)
    rounded = [x.bfloat16().double() for x in (hidden, weight, bias)]
    tensors = [hidden, weight, bias] if head else [nn.functional.linear(hidden, weight, bias), None, None]
    expected = value_and_gradients(plain, rounded if head else tensors, labels, grad)
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_gradients(sequence_logps, tensors, labels, grad)
    assert all(x.dtype == torch.float32 for x in got)
    close(got[0], expected[0])
    for a, b in zip(got[1:], expected[1:], strict=True):
        close(a, b, torch.finfo(torch.bfloat16).eps if head else TOLERANCE)


def test_a_head_shared_with_the_embedding_collects_both_gradients():
    (_, weight, _), labels, grad = batch()
    ids = labels.clamp(min=0)
    collected = []
    for function in (plain, sequence_logps):
        table = weight.detach().clone().requires_grad_()
        function(nn.functional.embedding(ids, table).tanh(), labels, weight=table).backward(grad)
        collected.append(table.grad)
    torch.testing.assert_close(*collected)


def test_gradients_of_two_halves_accumulate_to_that_of_the_batch():
    tensors, labels, _ = batch(4)
    leaves = [x.requires_grad_() for x in tensors]
    whole = torch.autograd.grad(sequence_logps(leaves[0], labels, weight=leaves[1], bias=leaves[2]).sum(), leaves)
    for half in (slice(0, 2), slice(2, 4)):
        sequence_logps(leaves[0][half], labels[half], weight=leaves[1], bias=leaves[2]).sum().backward()
    torch.testing.assert_close([x.grad for x in leaves], list(whole))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_second_backward_pass_through_a_retained_graph_gives_the_same(frozen):
    (hidden, weight, _), labels, grad = batch()
    hidden.requires_grad_(), weight.requires_grad_(not frozen)
    value = sequence_logps(hidden, labels, weight=weight)
    first, second = (torch.autograd.grad(value, hidden, grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_under_gradient_checkpointing():
    tensors, labels, grad = batch()
    expected = value_and_gradients(sequence_logps, tensors, labels, grad)
    run = lambda h, y, weight, bias: sequence_logps(h, y, weight=weight, bias=bias)  # noqa: E731
    checkpointed = lambda h, y, **k: torch.utils.checkpoint.checkpoint(  # noqa: E731
        run, h, y, k["weight"], k["bias"], use_reentrant=False
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(value_and_gradients(checkpointed, tensors, labels, grad), expected, strict=True)
    )


def test_weights_changed_between_forward_and_backward_are_noticed():
    (hidden, weight, _), labels, _ = batch()
    value = sequence_logps(hidden.requires_grad_(), labels, weight=weight.requires_grad_())
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_a_second_derivative_is_refused_and_not_wrong():
    (hidden, weight, _), labels, _ = batch()
    value = sequence_logps(hidden.requires_grad_(), labels, weight=weight.requires_grad_())
    (first,) = torch.autograd.grad(value.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


class Scorer(nn.Module):
    """A head whose ``forward`` returns log-probs, as a wrapper for several processes needs it."""

    def __init__(self, weight):
        super().__init__()
        self.head = nn.Linear(*weight.shape[::-1], bias=False)
        self.head.weight = nn.Parameter(weight.clone())

    def forward(self, hidden, labels):
        return sequence_logps(hidden, labels, weight=self.head.weight)


def test_inside_distributed_data_parallel(tmp_path):
    (hidden, weight, _), labels, grad = batch()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        alone = Scorer(weight)
        wrapped = nn.parallel.DistributedDataParallel(Scorer(weight))
        for module in (alone, wrapped):
            module(hidden, labels).backward(grad)
        assert torch.equal(wrapped.module.head.weight.grad, alone.head.weight.grad)
    finally:
        torch.distributed.destroy_process_group()


# --- bad input --------------------------------------------------------------------------------------------------------


def call(**changes):
    (hidden, weight, bias), labels, _ = batch()
    arguments = {"inputs": hidden, "labels": labels, "weight": weight, "bias": bias} | changes
    return sequence_logps(arguments.pop("inputs"), arguments.pop("labels"), **arguments)


@pytest.mark.parametrize("value", [-1, 11, -99, 2**40])
@pytest.mark.parametrize("head", [True, False])
def test_labels_outside_the_vocabulary_are_refused(value, head):
    (hidden, weight, bias), labels, _ = batch()
    labels[0, 1] = value
    given = {} if head else {"inputs": nn.functional.linear(hidden, weight, bias), "weight": None, "bias": None}
    with pytest.raises(ValueError, match=rf"labels contains {value}: it must be from 0 to 10, or -100"):
        call(labels=labels, **given)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"inputs": torch.zeros(3, 4, 4)}, TypeError, "inputs has dtype torch.float32, weight has dtype torch.float64"),
        ({"inputs": torch.zeros(3, 4, 4).double()}, ValueError, "inputs has shape [3, 4, 4], labels has shape [3, 5]"),
        ({"inputs": torch.zeros(3, 5, 4, dtype=torch.int64)}, TypeError, "inputs has dtype torch.int64"),
        ({"inputs": [[0.0]]}, TypeError, "inputs has type list"),
        ({"inputs": torch.zeros(()).double()}, ValueError, "inputs has shape []"),
        ({"labels": torch.zeros(3, 5)}, TypeError, "labels has dtype torch.float32: token ids are int64 or int32"),
        ({"labels": torch.ones(3, 5, dtype=torch.bool)}, TypeError, "labels has dtype torch.bool"),
        ({"labels": [0]}, TypeError, "labels has type list"),
        ({"labels": torch.tensor(0)}, ValueError, "labels has shape (): a sequence has a length"),
        ({"weight": torch.zeros(4, 11).double()}, ValueError, "weight has shape [4, 11], inputs has shape [3, 5, 4]"),
        ({"weight": torch.zeros(11).double()}, ValueError, "weight has shape [11]"),
        ({"weight": None}, ValueError, "bias is given without weight"),
        ({"bias": torch.zeros(4).double()}, ValueError, "bias has shape [4]: it must be [11]"),
        ({"bias": torch.zeros(11)}, TypeError, "bias has dtype torch.float32"),
        ({"weight": torch.zeros(11, 4, device="meta").double()}, ValueError, "weight is on meta"),
        ({"chunk_size": 0}, ValueError, "chunk_size = 0: it must be at least 1"),
        ({"chunk_size": 0.5}, TypeError, "chunk_size = 0.5: it must be an integer"),
        ({"chunk_size": True}, TypeError, "chunk_size = True: it must be an integer"),
        ({"keep": -0.1}, ValueError, "keep = -0.1: it must be from 0"),
        ({"keep": 1.01}, ValueError, "keep = 1.01: it must be from 0"),
        ({"keep": math.nan}, ValueError, "keep = nan: it must be from 0"),
        ({"keep": "all"}, TypeError, "keep = 'all': it must be a number from 0 to 1"),
        ({"keep": True}, TypeError, "keep = True: it must be a number from 0 to 1"),
        ({"ignore_index": None}, TypeError, "ignore_index = None: it must be an integer"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(**changes)


def test_labels_of_32_bits_are_taken():
    (_, _, _), labels, _ = batch()
    torch.testing.assert_close(call(labels=labels.int()), call())
