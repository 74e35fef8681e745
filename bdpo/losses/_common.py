r"""What all losses share: the checks of their input, and :math:`-\log\sigma`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

#: The arguments of a loss of pairs, in the order in which all of them take them.
PAIR = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
LENGTHS = ("chosen_lengths", "rejected_lengths")


class _Domain(NamedTuple):
    """Where the values of an argument lie, and what to say when one does not."""

    low: float
    high: float
    includes_low: bool
    includes_high: bool
    rule: str


_LOG_PROB = _Domain(
    -math.inf,
    0,
    False,
    True,
    "a log-prob is finite and at most 0; pass sums of token log-probs, not probabilities or logits, and for -inf or"
    " NaN look for a wrong label mask or an overflow",
)
_UNCERTAIN = _LOG_PROB._replace(
    includes_high=False,
    rule="a log-prob is finite and here below 0, since a certain response has infinite odds; clamp it to -1e-7, and"
    " for positive numbers, -inf or NaN look for a wrong label mask or an overflow",
)
_LENGTH = _Domain(1, math.inf, True, False, "a length is the number of tokens summed over, at least 1; drop empty ones")
_FINITE = _Domain(-math.inf, math.inf, False, False, "it must be finite; look for an overflow upstream")
_DOMAINS = {
    **dict.fromkeys((*PAIR, "policy_logps", "ref_logps"), _LOG_PROB),
    **dict.fromkeys(LENGTHS, _LENGTH),
    **dict.fromkeys(("margins", "margin_mean", "chosen_rewards", "rejected_rewards", "rewards"), _FINITE),
    **dict.fromkeys(
        ("logits", "ref_logits"),
        _FINITE._replace(rule="it must be finite; leave a forbidden response out instead of giving it -inf"),
    ),
    "margin_std": _Domain(
        0,
        math.inf,
        False,
        False,
        "a standard deviation to divide by is finite and above 0; of one margin it is NaN, of equal ones 0: start"
        " from a batch of two or more",
    ),
    "kl": _Domain(0, math.inf, True, False, "the reference point is finite and at least 0; kto_kl() estimates it"),
}

#: Arguments that ride along with the log-probs: of any real type, converted to the dtype of the computation.
_COMPANIONS = {*LENGTHS, "margin_mean", "margin_std", "kl", "desirable"}

#: Settings: lower bound, upper bound, whether each is allowed, and what to know when choosing.
_SETTINGS: dict[str, tuple[float, float, bool, str]] = {
    "beta": (0, math.inf, False, "it must be finite and above 0; 0.1 is customary for language models"),
    "clip": (0, math.inf, True, "it must be finite and at least 0; 0 gives DPO, the paper uses 0.3 and 0.5"),
    "label_smoothing": (0, 0.5, True, "it is the share of flipped labels, at least 0 and below 0.5; 0 gives DPO"),
    "gamma": (0, math.inf, True, "the target margin is finite and at least 0, in units of beta times a log-prob"),
    "alpha": (0, math.inf, True, "it must be finite and at least 0; 0 switches the dependence on the margin off"),
    "beta_min": (0, math.inf, False, "the floor of the batch's beta is finite and above 0"),
    "delta": (0, math.inf, True, "the margin is finite and at least 0, in nats"),
    "sft_weight": (0, math.inf, True, "it must be finite and at least 0; 0 leaves the likelihood of the winner out"),
    "odds_weight": (0, math.inf, True, "it must be finite and at least 0; 0 leaves the likelihood of the winner alone"),
    "desirable_weight": (0, math.inf, True, "it must be finite and at least 0"),
    "undesirable_weight": (0, math.inf, True, "it must be finite and at least 0"),
}


def minus_log_sigmoid(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``-log(sigmoid(x))``, which is accurate for large x only if the sigmoid is never formed."""
    return -logsigmoid(x).to(dtype)


def check_settings(**settings: float | bool) -> None:
    """Refuse a setting of the wrong type or outside its range."""
    for name, value in settings.items():
        if name not in _SETTINGS:
            if not isinstance(value, bool):
                raise TypeError(f"{name} = {value!r}: it must be True or False")
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} = {value!r}: it must be a number, not a {type(value).__name__}; pass a float")
        low, high, includes_low, rule = _SETTINGS[name]
        if not (low <= value < high and (includes_low or value > low)):
            raise ValueError(f"{name} = {value!r}: {rule}")


def read(names: tuple[str, ...], *tensors: Tensor, certain: bool = True) -> tuple[Tensor, ...]:
    """The arguments, checked, in the dtype to compute in: that of the log-probs, or float32 if that is wider.

    ``certain`` says whether a log-prob may be exactly 0.
    """
    given = dict(zip(names, tensors, strict=True))
    for name, x in given.items():
        _check_type(name, x)
    dtypes = {name: x.dtype for name, x in given.items() if name not in _COMPANIONS}
    if len(set(dtypes.values())) > 1:
        raise TypeError(f"{_list(dtypes, 'dtype')}: the dtypes must agree; convert with .to(torch.float32)")
    if len({x.device for x in tensors}) > 1:
        devices = {name: x.device for name, x in given.items()}
        raise ValueError(f"{_list(devices, 'device')}: the devices must agree; move the tensors with .to(device)")
    try:
        torch.broadcast_shapes(*(x.shape for x in tensors))
    except RuntimeError as error:
        shapes = {name: x.shape for name, x in given.items()}
        raise ValueError(f"{_list(shapes, 'shape')}: the shapes must broadcast; give one log-prob a pair") from error
    dtype = tensors[0].dtype if tensors[0].dtype.itemsize >= 4 else torch.float32
    ready = tuple(x if x.dtype in (dtype, torch.bool) else x.to(dtype) for x in tensors)
    if not torch.compiler.is_compiling():
        numbers = {name: x.detach() for name, x in zip(names, ready, strict=True) if name != "desirable"}
        domains = (
            (name, _UNCERTAIN if _DOMAINS[name] is _LOG_PROB and not certain else _DOMAINS[name]) for name in numbers
        )
        _Look.apply(tuple(domains), *numbers.values())
    return ready


def _check_type(name: str, x: Any) -> None:
    """Refuse what is not a tensor of the right kind of numbers."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}: it must be a tensor; wrap it in torch.as_tensor")
    if name == "desirable":
        if x.dtype is not torch.bool:
            raise TypeError(f"{name} has dtype {x.dtype}: labels are bool; compare them first, as in labels == 1")
    elif name in _COMPANIONS:
        if x.is_complex() or x.dtype is torch.bool:
            raise TypeError(f"{name} has dtype {x.dtype}: it holds real numbers; convert it with .float()")
    elif not x.is_floating_point():
        what = "log-probs" if name.endswith("logps") else name.removeprefix("ref_")
        raise TypeError(f"{name} has dtype {x.dtype}: {what} are floating-point; convert them with .float()")


def _list(values: dict[str, Any], what: str) -> str:
    """``name has what value`` for all of them, for a message."""
    return ", ".join(f"{name} has {what} {value}" for name, value in values.items())


class _Look(torch.autograd.Function):
    """A look at the values: two extremes a tensor, read together, so that a GPU is waited for once.

    Under ``torch.func.vmap`` a tensor cannot decide an ``if``. An autograd function can say there what it does with
    the batch as a whole: here the same, look at all of it.
    """

    @staticmethod
    def forward(domains: tuple[tuple[str, _Domain], ...], *tensors: Tensor) -> Tensor:
        looked = [(name, domain, x) for (name, domain), x in zip(domains, tensors, strict=True) if x.numel()]
        extremes = torch.stack([e for *_, x in looked for e in x.aminmax()]).tolist() if looked else []
        for (name, domain, x), least, most in zip(looked, extremes[::2], extremes[1::2], strict=True):
            low, high, includes_low, includes_high, rule = domain
            if (low < least or (includes_low and low == least)) and (most < high or (includes_high and most == high)):
                continue  # NaN makes both extremes NaN, and no comparison with it is true
            fine = ((x > low) | (x == low) & includes_low) & ((x < high) | (x == high) & includes_high)
            raise ValueError(f"{name} contains {x[~fine][0].item()}: {rule}")
        return torch.empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is differentiated, so nothing is kept."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *looked_at: Any) -> tuple[Tensor, None]:
        return _Look.apply(*looked_at), None
