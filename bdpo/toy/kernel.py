r"""The compiled part of the synthetic experiment: many runs, each from its first step to its last.

Everything here works on plain arrays and is compiled by Numba, once a machine (the code is cached). A run is trained
from start to end before the next begins, so that its few hundred kilobytes stay in the processor's cache; pairs are
taken in blocks, whose margins, slopes and gradients are computed in separate short loops that the compiler turns into
vector instructions. Gradients are closed forms: for a pair with winner :math:`i` and loser :math:`j`,

.. math:: z = \beta\,(a\,h_i - b\,h_j) - \gamma, \qquad
   \frac{\partial\ell}{\partial\log\pi_i} = \beta\,\lambda_i\,\ell'(z), \qquad
   \frac{\partial\ell}{\partial\log\pi_j} = -\beta\,\lambda_j\,\ell'(z),

with :math:`h` the log-ratio to the reference, or what a method compares instead. `bdpo.toy.methods` says which numbers
make which loss of `bdpo.losses`, and the tests compare the two.

All compiled functions stand in this file, because Numba's cache notices only changes of the file a function is in.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

# A loss is six integers and ten numbers. First the links, then where an integer or a number stands.
LOGISTIC, SQUARE, HINGE = 0, 1, 2
LINK, SHARE, ODDS, FREE, HEAD, THROUGH = range(6)
# Numbers of a run.
BETA, LOW, HIGH, VALUE, GAMMA, RIGHT, WRONG, SFT, CENTRE, SCALE = range(10)
# What a step follows.
EXPECTATION, BATCH, POLICY, PPO = 0, 1, 2, 3

# No re-association: results do not depend on how a loop is cut. Divisions by zero give infinities, as in NumPy.
_plain: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
# What only other compiled functions call needs no way in from Python, and is kept with its caller.
_inner: dict[str, Any] = {**_plain, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


# ---------------------------------------------------------------- exponentials that vectorise


@intrinsic
def _times_power_of_two(context: Any, p: Any, t: Any) -> Any:
    """``p`` times two to the integer that stands in the lowest bits of ``t``: an addition to the exponent's bits."""
    wide = p == types.float64

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = ir.IntType(64 if wide else 32)
        p, t = (builder.bitcast(a, whole) for a in arguments)
        moved = builder.add(p, builder.shl(t, ir.Constant(whole, 52 if wide else 23)))
        return builder.bitcast(moved, ir.DoubleType() if wide else ir.FloatType())

    return p(p, p), build


def exp_minus(x: float) -> float:
    """``exp(-x)`` for ``x`` of at least 0; past the smallest normal number it stays there."""
    return math.exp(-x)


# Cody and Waite: -x = k log 2 + r with |r| <= (log 2) / 2, and the Taylor polynomial of exp(r), whose remainder is
# below the rounding error. Adding 1.5 * 2^52 (float32: 1.5 * 2^23) rounds to an integer and leaves it in the low bits.
@overload(exp_minus, jit_options=_plain)  # type: ignore[arg-type]
def _exp_minus(x: Any) -> Any:
    if x == types.float64:

        def wide(x: Any) -> Any:
            x = min(x, 708.0)
            t = x * -1.4426950408889634 + 6755399441055744.0
            k = t - 6755399441055744.0
            r = (-x - k * 0.6931471803691238) - k * 1.9082149292705877e-10
            p = r * (1 / 6227020800) + 1 / 479001600
            p = p * r + 1 / 39916800
            p = p * r + 1 / 3628800
            p = p * r + 1 / 362880
            p = p * r + 1 / 40320
            p = p * r + 1 / 5040
            p = p * r + 1 / 720
            p = p * r + 1 / 120
            p = p * r + 1 / 24
            p = p * r + 1 / 6
            p = p * r + 0.5
            p = p * r + 1.0
            p = p * r + 1.0
            return _times_power_of_two(p, t)  # type: ignore[call-arg]

        return wide

    c = [np.float32(v) for v in (87, -1.4426950408889634, 12582912, 0.693359375, -2.12194440e-4)]
    t7, t6, t5, t4, t3, half, one = (np.float32(1 / v) for v in (5040, 720, 120, 24, 6, 2, 1))
    c0, c1, c2, c3, c4 = c

    def narrow(x: Any) -> Any:
        x = min(x, c0)
        t = x * c1 + c2
        k = t - c2
        r = (-x - k * c3) - k * c4
        p = r * t7 + t6
        p = p * r + t5
        p = p * r + t4
        p = p * r + t3
        p = p * r + half
        p = p * r + one
        p = p * r + one
        return _times_power_of_two(p, t)  # type: ignore[call-arg]

    return narrow


# ---------------------------------------------------------------- one pair, readably


@njit(cache=True, **_plain)
def pair(
    switches: Any, numbers: Any, lp_w: float, lp_l: float, h_w: float, h_l: float
) -> tuple[float, float, float, float, float]:
    """Of one pair: loss, margin z, slope dl/dz, and the weights of winner and loser in the gradient."""
    win, lose, value, other = weights(switches, numbers, lp_w, lp_l, h_w, h_l)
    z = numbers[BETA] * (value * h_w - other * h_l) - numbers[GAMMA]
    loss, slope = link(switches, numbers, z)
    return loss, z, slope, win, lose


@njit(**_inner)
def weights(
    switches: Any, numbers: Any, lp_w: float, lp_l: float, h_w: float, h_l: float
) -> tuple[float, float, float, float]:
    """What multiplies winner and loser in the gradient, and what multiplies them in the value."""
    through = switches[THROUGH] != 0  # whether the gradient passes through lambda
    if switches[SHARE]:
        total = lp_w + lp_l
        if total == 0:
            return 0.0 if through else 0.5, 0.0 if through else 0.5, 0.5, 0.5
        share, rest = lp_l / total, lp_w / total
        scale = (total - h_w - h_l) / total if through else 1.0  # the reference's log-probs over the policy's
        return scale * share, scale * rest, share, rest
    gap = lp_w - lp_l
    lam = 1 + min(max(gap, numbers[LOW]), numbers[HIGH])
    more = numbers[VALUE] * h_w if through and numbers[LOW] <= gap <= numbers[HIGH] else 0.0
    return lam + more, 1 + more, 1 + numbers[VALUE] * (lam - 1), 1.0


@njit(**_inner)
def link(switches: Any, numbers: Any, z: float) -> tuple[float, float]:
    """Loss and slope at a margin."""
    if switches[LINK] == SQUARE:
        gap = z - numbers[CENTRE]
        return numbers[SCALE] * gap * gap, numbers[SCALE] * 2 * gap
    if switches[LINK] == HINGE:
        gap = numbers[CENTRE] - z
        return numbers[SCALE] * max(gap, 0.0), -numbers[SCALE] if gap > 0 else 0.0
    tail = math.log1p(math.exp(-abs(z)))
    right, wrong = tail + max(-z, 0.0), tail + max(z, 0.0)  # -log sigma(z), -log sigma(-z)
    loss = numbers[RIGHT] * right + numbers[WRONG] * wrong
    return loss, numbers[WRONG] * math.exp(-right) - numbers[RIGHT] * math.exp(-wrong)


# ---------------------------------------------------------------- a block of pairs, in short loops
#
# A block is `rows` times `wide` pairs: of row r and column x, the members are a[r, x] and b[x]. Both orders of a pair
# are handled at once: z[0], d[0], w[0] belong to "a wins", z[1], d[1], w[1] to "b wins".


@njit(**_inner)
def _mirrored(switches: Any, numbers: Any) -> bool:
    """Whether swapping the winner and the loser does nothing but change the margin's sign."""
    return switches[LINK] == LOGISTIC and numbers[VALUE] == 0 and numbers[GAMMA] == 0


@njit(**_inner)
def _margins(
    switches: Any, numbers: Any, rows: int, wide: int, lp_a: Any, lp_b: Any, h_a: Any, h_b: Any, both: bool, z: Any
) -> None:
    beta, gamma, low, high, value = numbers[BETA], numbers[GAMMA], numbers[LOW], numbers[HIGH], numbers[VALUE]
    one = h_b.dtype.type(1)
    if switches[SHARE]:
        for r in range(rows):
            for x in range(wide):
                total = lp_a[r, x] + lp_b[x]
                z[0, r * wide + x] = (lp_b[x] * h_a[r, x] - lp_a[r, x] * h_b[x]) * beta / (total if total != 0 else one)
    else:
        for r in range(rows):
            for x in range(wide):
                lam = one + value * min(max(lp_a[r, x] - lp_b[x], low), high)
                z[0, r * wide + x] = beta * (lam * h_a[r, x] - h_b[x]) - gamma
    if both:
        for r in range(rows):
            for x in range(wide):
                lam = one + value * min(max(lp_b[x] - lp_a[r, x], low), high)
                z[1, r * wide + x] = beta * (lam * h_b[x] - h_a[r, x]) - gamma


@njit(**_inner)
def _slopes(switches: Any, numbers: Any, z: Any, start: int, size: int, w: Any) -> None:
    """Margins become slopes times weights, in one order."""
    right, wrong, centre, scale = numbers[RIGHT], numbers[WRONG], numbers[CENTRE], numbers[SCALE]
    one, two = z.dtype.type(1), z.dtype.type(2)
    if switches[LINK] == SQUARE:
        for k in range(size):
            z[k] = w[start + k] * scale * two * (z[k] - centre)
    elif switches[LINK] == HINGE:
        for k in range(size):
            z[k] = -w[start + k] * scale if z[k] < centre else one - one
    else:
        for k in range(size):
            e = exp_minus(abs(z[k]))
            near = one / (one + e)
            far = e * near
            z[k] = w[start + k] * (wrong * near - right * far if z[k] >= 0 else wrong * far - right * near)


@njit(**_inner)
def _slopes_of_both(numbers: Any, z: Any, start: int, size: int, w: Any) -> None:
    """The same in both orders, where a margin only changes its sign: one exponential serves both."""
    right, wrong = numbers[RIGHT], numbers[WRONG]
    one = z.dtype.type(1)
    for k in range(size):
        e = exp_minus(abs(z[0, k]))
        near = one / (one + e)
        far = e * near
        below, above = (far, near) if z[0, k] >= 0 else (near, far)  # sigma(-z), sigma(z)
        z[0, k] = w[0, start + k] * (wrong * above - right * below)
        z[1, k] = w[1, start + k] * (wrong * below - right * above)


@njit(**_inner)
def _pull(switches: Any, numbers: Any, rows: int, wide: int, lp_a: Any, lp_b: Any, d: Any, g_a: Any, g_b: Any) -> None:
    """Adds dL/dh of both members; for the methods with weights, dL/dlog pi."""
    beta, low, high = numbers[BETA], numbers[LOW], numbers[HIGH]
    one = d.dtype.type(1)
    half = one / (one + one)
    if switches[SHARE]:
        for r in range(rows):
            for x in range(wide):
                total = lp_a[r, x] + lp_b[x]
                pull = beta * (d[0, r * wide + x] - d[1, r * wide + x]) / (total if total != 0 else one)
                g_a[r, x] += pull * (lp_b[x] if total != 0 else half)
                g_b[x] -= pull * (lp_a[r, x] if total != 0 else half)
    else:
        for r in range(rows):
            for x in range(wide):
                gap = lp_a[r, x] - lp_b[x]
                a, b = beta * d[0, r * wide + x], beta * d[1, r * wide + x]
                g_a[r, x] += (one + min(max(gap, low), high)) * a - b
                g_b[x] += (one + min(max(-gap, low), high)) * b - a


@njit(**_inner)
def _pull_through(
    switches: Any,
    numbers: Any,
    rows: int,
    wide: int,
    lp_a: Any,
    lp_b: Any,
    h_a: Any,
    h_b: Any,
    d: Any,
    g_a: Any,
    g_b: Any,
) -> None:
    """The same pair by pair, for the methods whose gradient passes through lambda."""
    beta = numbers[BETA]
    for r in range(rows):
        for x in range(wide):
            win, lose, _, _ = weights(switches, numbers, lp_a[r, x], lp_b[x], h_a[r, x], h_b[x])
            g_a[r, x] += beta * win * d[0, r * wide + x]
            g_b[x] -= beta * lose * d[0, r * wide + x]
            win, lose, _, _ = weights(switches, numbers, lp_b[x], lp_a[r, x], h_b[x], h_a[r, x])
            g_b[x] += beta * win * d[1, r * wide + x]
            g_a[r, x] -= beta * lose * d[1, r * wide + x]


@njit(**_inner)
def table_gradient(switches: Any, numbers: Any, lp: Any, h: Any, depth: Any, w: Any, g: Any, z: Any) -> None:
    """dL/dh of all pairs of all prompts, added to ``g``.

    ``lp``, ``h`` and ``g`` are [slot, prompt]: a prompt's responses that occur in pairs come first, and prompts that
    have more of them come first, so that the prompts with more than ``j`` are the first ``depth[j]``. The pairs of
    slots i < j lie side by side, in the order j, i, prompt; so do their weights ``w``, of "i wins" and of "j wins".
    ``z`` is room to work in.
    """
    mirrored = _mirrored(switches, numbers)
    start = 0
    for j in range(1, len(depth)):
        wide = depth[j]
        size = j * wide
        _margins(switches, numbers, j, wide, lp, lp[j], h, h[j], not mirrored, z)
        if mirrored:
            _slopes_of_both(numbers, z, start, size, w)
        else:
            for order in range(2):
                _slopes(switches, numbers, z[order], start, size, w[order])
        if switches[THROUGH]:
            _pull_through(switches, numbers, j, wide, lp, lp[j], h, h[j], z, g, g[j])
        else:
            _pull(switches, numbers, j, wide, lp, lp[j], z, g, g[j])
        start += size


@njit(**_inner)
def batch_gradient(switches: Any, numbers: Any, lp: Any, h: Any, pairs: Any, g: Any, row: Any, room: Any) -> None:
    """The same for a list of pairs of equal weight, [pair, 2], by their places in the flat tables.

    ``row`` [3, 1, pairs] and ``room`` [6, pairs] are to work in; ``room[5]`` must hold zeros.
    """
    size = len(pairs)
    for k in range(size):
        row[0, 0, k], room[0, k] = lp[pairs[k, 0]], lp[pairs[k, 1]]
        row[1, 0, k], room[1, k] = h[pairs[k, 0]], h[pairs[k, 1]]
        row[2, 0, k], room[2, k] = 0, 0
        room[3, k] = 1 / lp.dtype.type(size)
    _margins(switches, numbers, 1, size, row[0], room[0], row[1], room[1], False, room[4:])
    _slopes(switches, numbers, room[4], 0, size, room[3])
    if switches[THROUGH]:
        _pull_through(switches, numbers, 1, size, row[0], room[0], row[1], room[1], room[4:], row[2], room[2])
    else:
        _pull(switches, numbers, 1, size, row[0], room[0], room[4:], row[2], room[2])
    for k in range(size):
        g[pairs[k, 0]] += row[2, 0, k]
        g[pairs[k, 1]] += room[2, k]


@njit(**_inner)
def _log1p(e: float) -> float:
    """``log(1 + e)`` for ``e`` in [0, 1], by the series of 2 artanh(s) with s = e / (2 + e), at most 1/3."""
    s = e / (e + 2)
    q = s * s
    p = q * (1 / 35) + 1 / 33
    p = p * q + 1 / 31
    p = p * q + 1 / 29
    p = p * q + 1 / 27
    p = p * q + 1 / 25
    p = p * q + 1 / 23
    p = p * q + 1 / 21
    p = p * q + 1 / 19
    p = p * q + 1 / 17
    p = p * q + 1 / 15
    p = p * q + 1 / 13
    p = p * q + 1 / 11
    p = p * q + 1 / 9
    p = p * q + 1 / 7
    p = p * q + 1 / 5
    p = p * q + 1 / 3
    p = p * q + 1
    return 2 * s * p


@njit(**_inner)
def _losses(switches: Any, numbers: Any, z: Any, start: int, size: int, w: Any) -> float:
    """Margins become losses times weights, in one order; their sum."""
    right, wrong, centre, scale = numbers[RIGHT], numbers[WRONG], numbers[CENTRE], numbers[SCALE]
    zero = z.dtype.type(0)
    if switches[LINK] == SQUARE:
        for k in range(size):
            z[k] = w[start + k] * scale * (z[k] - centre) * (z[k] - centre)
    elif switches[LINK] == HINGE:
        for k in range(size):
            z[k] = w[start + k] * scale * max(centre - z[k], zero)
    else:
        for k in range(size):
            tail = _log1p(exp_minus(abs(z[k])))
            z[k] = w[start + k] * (right * (tail + max(-z[k], zero)) + wrong * (tail + max(z[k], zero)))
    total = 0.0
    for k in range(size):
        total += z[k]
    return total


@njit(**_inner)
def table_loss(switches: Any, numbers: Any, lp: Any, h: Any, depth: Any, w: Any, z: Any) -> float:
    """The mean loss, without the likelihood term, over the pairs of :func:`table_gradient`."""
    mirrored = _mirrored(switches, numbers)
    total, start = 0.0, 0
    for j in range(1, len(depth)):
        wide = depth[j]
        size = j * wide
        _margins(switches, numbers, j, wide, lp, lp[j], h, h[j], not mirrored, z)
        if mirrored:
            for k in range(size):
                z[1, k] = -z[0, k]
        for order in range(2):
            total += _losses(switches, numbers, z[order], start, size, w[order])
        start += size
    return total


# ---------------------------------------------------------------- policies


@njit(cache=True, **_plain)
def forward(parameters: Any, width: int, n: int, hidden: Any, logits: Any) -> None:
    """Logits [prompt, response]: the parameters themselves, or a network with one hidden layer on one-hot prompts.

    A network's parameters lie one after the other: weights [prompt, unit], biases, weights [unit, response], biases.
    """
    if width == 0:
        for x in range(n):
            for y in range(n):
                logits[x, y] = parameters[x * n + y]
        return
    bias, second = n * width, n * width + width
    offset = second + width * n
    zero = parameters.dtype.type(0)
    for x in range(n):
        for k in range(width):
            hidden[x, k] = max(parameters[x * width + k] + parameters[bias + k], zero)
    np.dot(hidden, parameters[second:offset].reshape(width, n), logits)
    for x in range(n):
        for y in range(n):
            logits[x, y] += parameters[offset + y]


@njit(**_inner)
def _backward(parameters: Any, width: int, n: int, hidden: Any, back: Any, d_logits: Any, gradient: Any) -> None:
    """The gradient in the parameters, from that in the logits; ``back`` is room for that in the hidden units."""
    if width == 0:
        for x in range(n):
            for y in range(n):
                gradient[x * n + y] = d_logits[x, y]
        return
    bias, second = n * width, n * width + width
    offset = second + width * n
    np.dot(hidden.T, d_logits, gradient[second:offset].reshape(width, n))
    np.dot(d_logits, parameters[second:offset].reshape(width, n).T, back)
    zero = parameters.dtype.type(0)
    for k in range(bias, second):
        gradient[k] = zero
    for k in range(offset, offset + n):
        gradient[k] = zero
    for x in range(n):
        for y in range(n):
            gradient[offset + y] += d_logits[x, y]
        for k in range(width):
            pull = back[x, k] if hidden[x, k] > 0 else zero
            gradient[x * width + k] = pull
            gradient[bias + k] += pull


@njit(cache=True, **_plain)
def log_softmax(logits: Any, lp: Any, p: Any) -> bool:
    """Log-probabilities and probabilities of each row; whether all are numbers."""
    n = logits.shape[1]
    for x in range(logits.shape[0]):
        top = logits[x, 0]
        for y in range(1, n):
            top = max(top, logits[x, y])
        for y in range(n):
            lp[x, y] = logits[x, y] - top
            p[x, y] = exp_minus(-lp[x, y])
        total = logits.dtype.type(0)
        for y in range(n):
            total += p[x, y]
        if not total >= 1:
            return False
        shift, scale = math.log(total), 1 / total
        for y in range(n):
            lp[x, y] -= shift
            p[x, y] *= scale
    return True


# ---------------------------------------------------------------- a run


@njit(**_inner)
def _clear(table: Any) -> None:
    for x in range(table.shape[0]):
        for y in range(table.shape[1]):
            table[x, y] = 0


@njit(**_inner)
def _copy(table: Any, to: Any) -> None:
    for x in range(table.shape[0]):
        for y in range(table.shape[1]):
            to[x, y] = table[x, y]


@njit(**_inner)
def _scores(switches: Any, logits: Any, lp: Any, p: Any, reference: Any, h: Any) -> None:
    """What a method compares: log-ratios, log-probabilities, log-odds, or the logits themselves of a reward model."""
    for x in range(logits.shape[0]):
        for y in range(logits.shape[1]):
            if switches[HEAD]:
                h[x, y] = logits[x, y]
            elif switches[ODDS]:
                h[x, y] = lp[x, y] - math.log(-math.expm1(lp[x, y]))
            elif switches[FREE]:
                h[x, y] = lp[x, y]
            else:
                h[x, y] = lp[x, y] - reference[x, y]


@njit(nogil=True, cache=True, **_plain)
def train(
    mode: int,
    switches: Any,
    numbers: Any,
    width: int,
    adam: bool,
    rate: float,
    steps: int,
    parameters: Any,
    reference: Any,
    cells: Any,
    depth: Any,
    weights: Any,
    draws: Any,
    uniforms: Any,
    table: Any,
    ppo: Any,
    record: Any,
    every: int,
    checks: Any,
    logits_at: Any,
    losses_at: Any,
    wins: Any,
) -> int:
    """One run from its first step to its last; the step before which it left the numbers, or -1.

    mode
        EXPECTATION: all pairs of ``weights``. BATCH: ``draws`` [steps, pairs, 2], places of winners and losers.
        POLICY: the exact gradient of reward ``table`` minus BETA times the divergence from ``reference``. PPO: the same
        goal on samples, drawn with ``uniforms`` [samples, responses, 2]; ``ppo`` = (clip, updates a sample).
    parameters
        Changed in place. ``width`` 0: a table of logits; else a network with one hidden layer.
    cells, depth, weights, checks
        The layout of :func:`table_gradient`: place of each [slot, prompt] in the flat tables, depths, and both orders'
        weights, of the pairs trained on and of those that losses are watched on.
    record, logits_at
        Steps, ascending, after which the logits are kept.
    every, losses_at
        Every how many steps the loss is watched, 0 for never; where it is kept.
    wins
        How much each place is pulled up by the likelihood term: its share of the wins, in ``weights``.
    """
    n = reference.shape[0]
    kind = parameters.dtype
    one = kind.type(1)
    size = len(parameters)
    tables = np.zeros((10, n, n), kind)
    logits, lp, p, h, g = tables[0], tables[1], tables[2], tables[3], tables[4]
    lp_at, h_at, g_at = tables[5], tables[6], tables[7]  # as table_gradient wants them
    old, advantage = tables[8], tables[9]
    hidden, back, gradient = np.zeros((n, width), kind), np.zeros((n, width), kind), np.zeros(size, kind)
    first, second = np.zeros(size if adam else 0, kind), np.zeros(size if adam else 0, kind)
    z = np.zeros((2, n * n), kind)
    row, room = np.zeros((3, 1, draws.shape[1]), kind), np.zeros((6, draws.shape[1]), kind)
    flat_lp, flat_h, flat_g = lp.reshape(-1), h.reshape(-1), g.reshape(-1)
    beta, like = numbers[BETA], numbers[SFT]
    clip, updates = kind.type(ppo[0]), int(ppo[1])
    places = np.zeros(uniforms.shape[1], np.int64)
    rate = kind.type(rate)
    kept = 0
    for step in range(steps + 1):
        forward(parameters, width, n, hidden, logits)
        if not log_softmax(logits, lp, p):
            return step
        while kept < len(record) and record[kept] == step:
            _copy(logits, logits_at[kept])
            kept += 1
        _scores(switches, logits, lp, p, reference, h)
        if mode == EXPECTATION or (every and step % every == 0 and mode <= BATCH):
            for s in range(n):
                for x in range(n):
                    lp_at[s, x], h_at[s, x] = flat_lp[cells[s, x]], flat_h[cells[s, x]]
        if every and step % every == 0 and mode <= BATCH:
            losses_at[step // every] = table_loss(switches, numbers, lp_at, h_at, depth, checks, z)
        if step == steps:
            break
        _clear(g)
        if mode == EXPECTATION:
            _clear(g_at)
            table_gradient(switches, numbers, lp_at, h_at, depth, weights, g_at, z)
            for s in range(n):
                for x in range(n):
                    flat_g[cells[s, x]] = g_at[s, x]
        elif mode == BATCH:
            batch_gradient(switches, numbers, flat_lp, flat_h, draws[step], flat_g, row, room)
        elif mode == POLICY:
            for x in range(n):
                for y in range(n):
                    g[x, y] = p[x, y] * (beta * h[x, y] - table[x, y]) / n
        else:
            if step % updates == 0:
                _sample(p, uniforms[step // updates], places)
                _copy(lp, old)
                for x in range(n):
                    value = kind.type(0)
                    for y in range(n):
                        advantage[x, y] = table[x, y] - beta * h[x, y]
                        value += p[x, y] * advantage[x, y]
                    for y in range(n):
                        advantage[x, y] -= value
            _surrogate(places, flat_lp, old.reshape(-1), advantage.reshape(-1), clip, flat_g)
        if switches[ODDS]:
            for k in range(n * n):
                flat_g[k] *= -one / kind.type(math.expm1(flat_lp[k]))
        if like != 0 and mode == BATCH:
            for k in range(draws.shape[1]):
                flat_g[draws[step, k, 0]] -= like / kind.type(draws.shape[1])
        elif like != 0:
            for k in range(n * n):
                flat_g[k] -= like * wins[k]
        if not switches[HEAD]:
            for x in range(n):
                total = kind.type(0)
                for y in range(n):
                    total += g[x, y]
                for y in range(n):
                    g[x, y] -= total * p[x, y]
        _backward(parameters, width, n, hidden, back, g, gradient)
        if adam:
            _adam(parameters, gradient, first, second, rate, step + 1)
        else:
            for k in range(size):
                parameters[k] -= rate * gradient[k]
    return -1


@njit(**_inner)
def _sample(p: Any, uniform: Any, places: Any) -> None:
    """Places of responses drawn from the policy, for prompts drawn evenly, by inverting the distribution function."""
    n = p.shape[0]
    for k in range(len(places)):
        x, y = int(uniform[k, 0] * n), 0
        below = float(p[x, 0])
        while below <= uniform[k, 1] and y < n - 1:
            y += 1
            below += p[x, y]
        places[k] = x * n + y


@njit(**_inner)
def _surrogate(places: Any, lp: Any, old: Any, advantage: Any, clip: float, g: Any) -> None:
    """Minus the gradient of PPO's clipped surrogate in the log-probabilities: none where a ratio left its bounds."""
    one = lp.dtype.type(1)
    for k in range(len(places)):
        at = places[k]
        ratio, gain = math.exp(lp[at] - old[at]), advantage[at]
        if (gain > 0 and ratio <= one + clip) or (gain < 0 and ratio >= one - clip):
            g[at] -= gain * ratio / len(places)


@njit(**_inner)
def _adam(parameters: Any, gradient: Any, first: Any, second: Any, rate: float, step: int) -> None:
    """Adam as in torch.optim.Adam, with its default constants."""
    kind = parameters.dtype
    keep1, keep2, tiny, one = kind.type(0.9), kind.type(0.999), kind.type(1e-8), kind.type(1)
    size1 = kind.type(rate / (1 - 0.9**step))
    root2 = kind.type(math.sqrt(1 - 0.999**step))
    for k in range(len(parameters)):
        first[k] = keep1 * first[k] + (one - keep1) * gradient[k]
        second[k] = keep2 * second[k] + (one - keep2) * gradient[k] * gradient[k]
        parameters[k] -= size1 * first[k] / (math.sqrt(second[k]) / root2 + tiny)


# ---------------------------------------------------------------- what is measured of a policy


@njit(cache=True, **_plain)
def measure(switches: Any, numbers: Any, lp: Any, reference: Any, weights: Any, out: Any) -> None:
    """Mean loss, and mean sizes of the pairs' derivatives for winner and loser in three coordinates, as logarithms.

    ``out`` = loss, then winner and loser in probabilities, in log-probabilities, in logits. Sizes in probabilities are
    summed relative to the least likely response that occurs, since 1/pi may overflow.
    """
    n = lp.shape[0]
    for k in range(7):
        out[k] = 0
    top = 0.0
    for x in range(n):
        for i in range(n):
            if weights[x, i].sum() + weights[x, :, i].sum() > 0:
                top = max(top, -lp[x, i])
    h = np.zeros((n, n))
    p = np.exp(lp)
    _scores(switches, lp, lp, p, reference, h)
    for x in range(n):
        for i in range(n):
            for j in range(n):
                w = weights[x, i, j]
                if w == 0:
                    continue
                loss, _, slope, win, lose = pair(switches, numbers, lp[x, i], lp[x, j], h[x, i], h[x, j])
                g_i, g_j = numbers[BETA] * win * slope, -numbers[BETA] * lose * slope
                if switches[ODDS]:
                    g_i, g_j = -g_i / math.expm1(lp[x, i]), -g_j / math.expm1(lp[x, j])
                g_i -= numbers[SFT]
                both = g_i + g_j
                out[0] += w * (loss - numbers[SFT] * lp[x, i])
                out[1] += w * abs(g_i) * math.exp(-lp[x, i] - top)
                out[2] += w * abs(g_j) * math.exp(-lp[x, j] - top)
                out[3] += w * abs(g_i)
                out[4] += w * abs(g_j)
                out[5] += w * abs(g_i - p[x, i] * both)
                out[6] += w * abs(g_j - p[x, j] * both)
    for k in range(1, 7):
        out[k] = math.log(out[k])
    out[1] += top
    out[2] += top
