"""The synthetic experiment a second time, slowly: the paper's equations, torch's gradients, nothing of the engine.

Only the random streams are shared, since a run is to be reproduced number for number; they are spelled out here.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bdpo import toy

N, WIDTH = 20, 64
BASE = toy.Settings(seed=7, mask_rate=0.2, init="random", reference_steps=12, steps=12, learning_rate=0.01, width=WIDTH,
                    watch_every=0, pairs=400)  # fmt: skip


def stream(seed, *key):
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


def masked_cells(seed, rate):
    """The first cells of a random order, but never so many that a prompt keeps fewer than two."""
    mask = np.zeros((N, N), bool)
    for cell in stream(seed, 0).permutation(N * N):
        if mask.sum() < round(rate * N * N) and mask[cell // N].sum() < N - 2:
            mask[cell // N, cell % N] = True
    return mask


def pair_law(mask, noise, alpha=0.6):
    """Eqs 33 and 34: how likely the data hold (prompt, winner, loser)."""
    law = np.zeros((N, N, N))
    for x in range(N):
        open_ = [y for y in range(N) if not mask[x, y]]
        for i in open_:
            for j in open_:
                right = 1 / (1 + math.exp(alpha * ((i - x) ** 2 - (j - x) ** 2)))
                share = (1 - noise) * right + noise * (1 - right)
                law[x, i, j] = (i != j) * 2 * share / (len(open_) * (len(open_) - 1) * N)
    return law


def pair_loss(method, w, x, rw, rx, detach=True, beta=1.0, clip=0.5):
    """Eqs 1, 25 to 29 as printed (Eq 25 with its parenthesis where the text wants it)."""
    hold = (lambda t: t.detach()) if detach else (lambda t: t)
    win, lose = w - rw, x - rx
    if method == "dpo":
        margin = win - lose
    elif method == "bdpo":
        lam = hold(x / (w + x))
        margin = lam * win - (1 - lam) * lose
    else:
        lam = hold(1 + (w - x).clamp(1 / (1 + clip) - 1 if method.endswith("_sym") else 0.0, clip))
        margin = lam * win - lose - (0 if "_v2_" in method else (lam - 1) * (w.detach() - rw))
    return -torch.nn.functional.logsigmoid(beta * margin)


def first_parameters(s):
    random = stream(s.seed, 1)
    if s.policy == "tabular":
        return random.standard_normal(N * N)
    theta, below = random.uniform(-1, 1, N * WIDTH + WIDTH + WIDTH * N + N), N * WIDTH + WIDTH
    return np.concatenate([theta[:below] / math.sqrt(N), theta[below:] / math.sqrt(WIDTH)])


def logits(theta, s):
    if s.policy == "tabular":
        return theta.reshape(N, N)
    a, b, c, d = theta.split([N * WIDTH, WIDTH, WIDTH * N, N])
    return torch.relu(torch.eye(N, dtype=torch.double) @ a.view(N, WIDTH) + b) @ c.view(WIDTH, N) + d


def train(theta, s, steps, objective):
    """Parameters after plain descent or Adam on `objective(logits, step)`."""
    theta = torch.tensor(theta, requires_grad=True)
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[s.optimizer]([theta], lr=s.learning_rate)
    for t in range(steps):
        optimizer.zero_grad()
        objective(logits(theta, s), t).backward()
        optimizer.step()
    return theta.detach().numpy()


def draw(law, shape, random):
    upto = np.cumsum(law.ravel())
    cells = np.searchsorted(upto, random.random(shape) * upto[-1], side="right")
    return np.stack(np.unravel_index(cells, law.shape))


def again(s):
    """Log-probabilities at the end of a run."""
    law = pair_law(masked_cells(s.seed, s.mask_rate), s.label_noise)
    fixed = draw(law, s.pairs, stream(s.seed, 2, 0))
    every = np.stack(np.nonzero(law))

    def on_pairs(loss, stage):
        random = stream(s.seed, 2, stage)
        at = {"expectation": lambda: None, "fresh": lambda: draw(law, (s.steps, s.batch), random),
              "fixed": lambda: fixed[:, random.integers(s.pairs, size=(s.steps, s.batch))]}[s.data]()  # fmt: skip

        def objective(z, t):
            x, i, j = every if at is None else at[:, t]
            weight = torch.tensor(law[x, i, j] if at is None else np.full(s.batch, 1 / s.batch))
            return (weight * loss(z, x, i, j)).sum()

        return objective

    def preferences(method, reference):
        def loss(z, x, i, j):
            lp = z.log_softmax(-1)
            return pair_loss(method, lp[x, i], lp[x, j], reference[x, i], reference[x, j], s.detach_lambda)

        return loss

    def policy(theta):
        return logits(torch.tensor(theta), s).log_softmax(-1)

    first = first_parameters(s)
    start = train(first, s, s.reference_steps, on_pairs(preferences("dpo", policy(first)), 1))
    reference = policy(start)
    if s.method != "rlhf":
        return policy(train(start, s, s.steps, on_pairs(preferences(s.method, reference), 2)))
    scores = np.zeros(N * N) if s.policy == "tabular" else first
    bradley_terry = lambda z, x, i, j: -torch.nn.functional.logsigmoid(z[x, i] - z[x, j])  # noqa: E731
    scores = train(scores, s, s.steps, on_pairs(bradley_terry, 2))
    reward = logits(torch.tensor(scores), s)

    def divergence_minus_reward(z, _):
        lp = z.log_softmax(-1)
        return (lp.exp() * (lp - reference - reward)).sum() / N

    return policy(train(start, s, s.steps, divergence_minus_reward))


RUNS = [
    replace(BASE, method="bdpo", learning_rate=20.0),
    replace(BASE, method="nbdpo_v2_asym", learning_rate=20.0, label_noise=0.3, detach_lambda=False),
    replace(BASE, method="nbdpo_sym", optimizer="adam", data="fixed", mask_rate=0.4),
    replace(BASE, method="rlhf", optimizer="adam", data="fixed", label_noise=0.2),
    replace(BASE, method="nbdpo_v2_sym", policy="mlp", optimizer="adam", data="fixed"),
    replace(BASE, method="bdpo", policy="mlp", learning_rate=1.0, data="fresh", detach_lambda=False),
    replace(BASE, method="nbdpo_asym", policy="mlp", optimizer="adam"),
    replace(BASE, method="rlhf", policy="mlp", optimizer="adam", data="fixed", mask_rate=0.0),
]


@pytest.mark.parametrize("s", RUNS, ids=lambda s: f"{s.policy}-{s.optimizer}-{s.data}-{s.method}")
def test_the_engine_runs_the_experiment_of_the_paper(s):
    found = toy.run([s], policies=True).logps[0]
    assert found == pytest.approx(again(s).numpy(), abs=1e-9)
    untouched = toy.run([replace(s, steps=0)], policies=True).logps[0]
    assert np.abs(found - untouched).max() > 1e-3
