"""How fast the synthetic experiment is, against plain loops of one run at a time that compute the same.

Seven methods, three masks, 32 seeds; all pairs, a table of logits, plain descent; one core. The plain loops are timed
on a few runs of each kind, in the same process, turn and turn about with the compiled one, and must end at the same
policies. Times are those of the processor, so that other programs disturb them less. ``--compilers`` also times the
inner update as torch.compile makes it (it needs a C++ compiler).
"""

import argparse
import time
from dataclasses import replace

import numpy as np
import torch

from bdpo import losses, toy
from bdpo.toy import engine, kernel, world

METHODS = (*toy.PAPER, "ipo")
MASKS = (0.0, 0.2, 0.4)
BASE = toy.Settings(init="random", learning_rate=1.0, watch_every=0)
WANTED = 25


def numpy_gradient(method, law, lp, ref, clip):
    """The gradient of the mean loss in the logits, on dense [prompt, winner, loser] arrays; beta is 1."""
    p, h = np.exp(lp), lp - ref
    if method == "bdpo":
        total = lp[:, :, None] + lp[:, None, :]
        win, lose = lp[:, None, :] / total, lp[:, :, None] / total
        z = win * h[:, :, None] - lose * h[:, None, :]
    else:
        low = -clip / (1 + clip) if method.endswith("_sym") else 0.0
        high = clip if method.startswith("nbdpo") else 0.0
        win, lose = 1 + np.clip(lp[:, :, None] - lp[:, None, :], low, high), 1.0
        z = (win if "v2" in method else 1.0) * h[:, :, None] - h[:, None, :]
    if method == "ipo":
        slope = 2 * (z - 0.5)
    else:
        tail = np.exp(-np.abs(z))
        slope = -np.where(z >= 0, tail, 1.0) / (1 + tail)
    d = law * slope
    g = (win * d).sum(2) - (lose * d).sum(1)
    return g - p * g.sum(1, keepdims=True)


def log_softmax(theta):
    shifted = theta - theta.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def numpy_loop(s, start, law, ref):
    theta = start.copy()
    for _ in range(s.steps):
        theta -= s.learning_rate * numpy_gradient(s.method, law, log_softmax(theta), ref, s.clip)
    return log_softmax(theta)


def torch_loop(s, start, law, ref):
    """The same on dense arrays by automatic differentiation, with torch's optimiser."""
    law, ref = torch.tensor(law), torch.tensor(ref)
    theta = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=s.learning_rate)
    low = -s.clip / (1 + s.clip) if s.method.endswith("_sym") else 0.0
    for _ in range(s.steps):
        lp = theta.log_softmax(-1)
        h, fixed = lp - ref, lp.detach()
        win = lose = 1.0
        if s.method == "bdpo":
            total = fixed[:, :, None] + fixed[:, None, :]
            win, lose = fixed[:, None, :] / total, fixed[:, :, None] / total
        elif s.method.startswith("nbdpo"):
            win = 1 + (fixed[:, :, None] - fixed[:, None, :]).clamp(low, s.clip)
        z = win * h[:, :, None] - lose * h[:, None, :]
        if s.method.startswith("nbdpo") and "v2" not in s.method:  # only the gradient is weighted
            z = z - (win - 1) * h.detach()[:, :, None]
        loss = (z - 0.5).square() if s.method == "ipo" else -torch.nn.functional.logsigmoid(z)
        optimizer.zero_grad()
        (law * loss).sum().backward()
        optimizer.step()
    return theta.detach().log_softmax(-1).numpy()


def losses_loop(s, start, law, ref):
    """The loop of somebody who trains with `bdpo.losses`: pairs gathered, inputs checked at every call."""
    x, i, j = np.nonzero(law)
    weight, ref = torch.tensor(law[x, i, j]), torch.tensor(ref)
    flat_w, flat_l = torch.tensor(x * s.n + i), torch.tensor(x * s.n + j)
    ref_w, ref_l = ref.reshape(-1)[flat_w], ref.reshape(-1)[flat_l]
    theta = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=s.learning_rate)
    settings = {k: v for k, v in {"beta": 1.0, "clip": s.clip}.items() if k in losses.LOSSES[s.method].settings}
    for _ in range(s.steps):
        lp = theta.log_softmax(-1).reshape(-1)
        loss = losses.LOSSES[s.method](lp[flat_w], lp[flat_l], ref_w, ref_l, **settings)
        optimizer.zero_grad()
        (weight * loss).sum().backward()
        optimizer.step()
    return theta.detach().log_softmax(-1).numpy()


PLAIN = {
    "closed form, NumPy": numpy_loop,
    "autograd, dense": torch_loop,
    "autograd, bdpo.losses": losses_loop,
}


def seconds(work):
    start = time.process_time()
    done = work()
    return time.process_time() - start, done


def one(s):
    """Seconds of the compiled and of each plain loop for the same run, best of three turns; how far apart they end."""
    start = engine._initial(s).reshape(s.n, s.n)
    ref = log_softmax(start)
    w = engine._world(s, ref)
    how = (kernel.EXPECTATION, *toy.coefficients(s.method))
    ends = {}

    def compiled():
        ends["compiled"] = start.ravel().copy()
        engine._stage(s, w, how, ends["compiled"], ref, 2, s.steps)

    work = {"compiled": compiled} | {
        name: lambda name=name, loop=loop: ends.update({name: loop(s, start, w.law, ref)})
        for name, loop in PLAIN.items()
    }
    best = {name: min(seconds(some)[0] for _ in range(3)) for name, some in work.items()}
    end = log_softmax(ends["compiled"].reshape(s.n, s.n))
    return best, {name: float(np.abs(ends[name] - end).max()) for name in PLAIN}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compilers", action="store_true", help="also time torch.compile")
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30, help="steps of the plain loops")
    given = parser.parse_args()
    torch.set_num_threads(1)

    cold, _ = seconds(lambda: toy.run([replace(BASE, steps=1, reference_steps=1)]))
    print(f"first run of the process, with compiling or loading from the cache: {cold:.1f} s")
    settings = toy.grid(BASE, mask_rate=MASKS, seed=range(given.seeds), method=METHODS)
    references = len(MASKS) * given.seeds
    steps = sum(s.steps for s in settings) + references * BASE.reference_steps
    print(f"{len(settings)} runs and {references} references, {steps} steps, measures included:")
    for dtype in engine.DTYPES:
        runs = [replace(s, dtype=dtype) for s in settings]
        toy.run(runs[:1])  # compiles
        spent, table = seconds(lambda runs=runs: toy.run(runs))
        assert (table.status == "ok").all()
        print(f"  {dtype}: {spent:.1f} s, {spent / steps * 1e6:.1f} µs a step")

    runs = toy.grid(replace(BASE, steps=given.steps, seed=1), mask_rate=MASKS, method=METHODS)
    found = [one(s) for s in runs]
    total = {name: sum(best[name] for best, _ in found) for name in ("compiled", *PLAIN)}
    per = 1e6 / (len(runs) * given.steps)
    print(f"float64, the same run alone: compiled {total['compiled'] * per:.1f} µs a step")
    for name in PLAIN:
        off = max(some[name] for _, some in found)
        print(
            f"  {name}: {total[name] * per:.0f} µs a step, {total[name] / total['compiled']:.0f} times"
            f" (autograd: {WANTED} wanted); log-probs differ by {off:.0e} at most"
        )
        assert off < 1e-12, "the loops do not compute the same"
    if given.compilers:
        compilers()


def compilers():
    """The update of one method, DPO, on all pairs: numba, torch.compile, eager torch, NumPy; runs in one operation."""
    runs, n = 96, 20
    law = torch.tensor(world.pair_weights(world.log_utility(n), np.zeros((n, n), bool)))
    ref = torch.zeros(runs, n, n, dtype=torch.float64).log_softmax(-1)
    theta = torch.tensor(np.random.default_rng(0).standard_normal((runs, n, n)))

    def update(theta, ref, law):
        lp = theta.log_softmax(-1)
        h = lp - ref
        z = h[..., :, None] - h[..., None, :]
        d = -law * torch.sigmoid(-z)
        g = d.sum(-1) - d.sum(-2)
        return theta - (g - lp.exp() * g.sum(-1, keepdim=True))

    fused = torch.compile(update, fullgraph=True, dynamic=False)
    first, _ = seconds(lambda: fused(theta, ref, law))
    for name, function in (("torch, eager", update), ("torch.compile", fused)):
        for block in (1, 8, runs):
            a, b = theta[:block].contiguous(), ref[:block].contiguous()
            function(a, b, law)
            times = 2000 // block
            spent, _ = seconds(lambda f=function, a=a, b=b, times=times: [f(a, b, law) for _ in range(times)])
            print(f"{name}, {block} runs a block: {spent / (times * block) * 1e6:.1f} µs a step")
    s = replace(BASE, steps=2000, reference_steps=0)
    w = engine._world(s, ref[0].numpy())
    how = (kernel.EXPECTATION, *toy.coefficients("dpo"))
    start = theta[0].numpy().ravel().copy()
    spent, _ = seconds(lambda: engine._stage(s, w, how, start, ref[0].numpy(), 2, s.steps))
    print(f"numba, a run at a time: {spent / s.steps * 1e6:.1f} µs a step")
    print(f"torch.compile took {first:.1f} s of this process to compile the first shape")


if __name__ == "__main__":
    main()
