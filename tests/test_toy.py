"""The synthetic experiment: the compiled loop against automatic differentiation of the losses, and against torch."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from bdpo import losses, toy
from bdpo.imbalance import mean_log_ratio
from bdpo.toy import engine, kernel, world

N = 5
FIELDS = ("beta", "clip", "label_smoothing", "sft_weight", "gamma", "delta", "odds_weight", "detach_lambda")
# Every pair loss as it comes, and those whose gradient can pass through lambda also in that reading.
READINGS = [
    *((method, {}) for method in toy.PAIRS),
    *((method, {"detach_lambda": False}) for method in ("nbdpo_v2_asym", "nbdpo_v2_sym", "bdpo")),
]
each_reading = pytest.mark.parametrize(
    ("method", "more"), READINGS, ids=[m + "_through" * bool(k) for m, k in READINGS]
)


def loss_of(method, lp_w, lp_l, ref_w, ref_l, **settings):
    """The loss of bdpo.losses, fed by name."""
    given = {
        "policy_chosen_logps": lp_w,
        "policy_rejected_logps": lp_l,
        "ref_chosen_logps": ref_w,
        "ref_rejected_logps": ref_l,
        "chosen_lengths": torch.ones_like(lp_w),
        "rejected_lengths": torch.ones_like(lp_w),
    }
    spec = losses.LOSSES[method]
    return spec(*(given[name] for name in spec.needs), **{k: v for k, v in settings.items() if k in spec.settings})


def settings_of(method, **more):
    """What both sides are given: each loss's own default of the likelihood weight, and numbers that are no defaults."""
    some = {"beta": 0.7, "clip": 0.4, "label_smoothing": 0.2, "gamma": 0.3, "delta": 0.8, "odds_weight": 0.6} | more
    default = losses.LOSSES[method].settings.get("sft_weight")
    return some if default is None else some | {"sft_weight": default}


# ---------------------------------------------------------------- one pair


@each_reading
def test_a_pair_has_the_value_and_the_gradient_of_the_loss(method, more):
    random = np.random.default_rng(0)
    lp, ref = (torch.tensor(-np.exp(random.uniform(-4, 3, (200, 2)))) for _ in range(2))
    lp.requires_grad_()
    expected = loss_of(method, lp[:, 0], lp[:, 1], ref[:, 0], ref[:, 1], **settings_of(method, **more))
    (gradient,) = torch.autograd.grad(expected.sum(), lp)
    how = toy.coefficients(method, **settings_of(method, **more))
    for k in range(len(lp)):
        at = lp[k].tolist()
        h = [x - math.log(-math.expm1(x)) if how[0][kernel.ODDS] else x for x in at]
        if not how[0][kernel.FREE]:
            h = [x - float(r) for x, r in zip(at, ref[k], strict=True)]
        value, _, slope, win, lose = kernel.pair(*how, *at, *h)
        value -= how[1][kernel.SFT] * at[0]
        inner = [-1 / math.expm1(x) if how[0][kernel.ODDS] else 1.0 for x in at]
        g_w = how[1][kernel.BETA] * win * slope * inner[0] - how[1][kernel.SFT]
        g_l = -how[1][kernel.BETA] * lose * slope * inner[1]
        assert value == pytest.approx(float(expected[k].detach()), rel=1e-10, abs=1e-12)
        assert (g_w, g_l) == pytest.approx(tuple(map(float, gradient[k])), rel=1e-10, abs=1e-12)


def test_every_pair_loss_is_here_or_needs_its_batch():
    assert set(losses.PAIRS) - set(toy.PAIRS) == {"kto_pair", "alpha_dpo", "beta_dpo"}
    assert toy.PAPER == losses.PAPER


# ---------------------------------------------------------------- a step


def world_of(mask_rate, seed=0, n=N):
    mask = world.draw_mask(n, mask_rate, seed)
    return mask, world.pair_weights(world.log_utility(n), mask)


def one_step(method, mask_rate, s, logits, reference, batch=None):
    """The update that the compiled loop makes of a table of logits in one step of plain descent."""
    kind = np.dtype(s.dtype)
    how = toy.coefficients(method, **{k: getattr(s, k) for k in FIELDS}, dtype=kind)
    mask, law = world_of(mask_rate)
    w = engine._World(world.log_utility(N), mask, law, law, *engine.layout(mask), None)
    after = logits.ravel().astype(kind)
    mode = kernel.EXPECTATION if batch is None else kernel.BATCH
    lost, _, _ = engine._stage(s, w, (mode, *how), after, reference, 2, 1)
    assert lost == -1
    return logits - after.reshape(N, N)


def descent(method, law, logits, reference, **settings):
    """The same by automatic differentiation of bdpo.losses."""
    theta = torch.tensor(logits, requires_grad=True)
    lp = theta.log_softmax(-1)
    x, i, j = np.nonzero(law)
    ref = torch.tensor(reference)
    value = loss_of(method, lp[x, i], lp[x, j], ref[x, i], ref[x, j], **settings)
    (torch.tensor(law[x, i, j]) * value).sum().backward()
    return theta.grad.numpy()


def tables(seed=1, size=3.0):
    random = np.random.default_rng(seed)
    logits = size * random.standard_normal((N, N))
    return logits, torch.tensor(random.standard_normal((N, N))).log_softmax(-1).numpy()


@each_reading
@pytest.mark.parametrize("mask_rate", [0.0, 0.4])
def test_a_step_on_all_pairs_descends_the_gradient_of_autograd(method, more, mask_rate):
    logits, reference = tables()
    some = settings_of(method, **more)
    s = toy.Settings(method=method, n=N, mask_rate=mask_rate, **some)
    moved = one_step(method, mask_rate, s, logits, reference)
    expected = descent(method, world_of(mask_rate)[1], logits, reference, **some)
    assert moved == pytest.approx(expected, rel=1e-10, abs=1e-13)
    assert np.abs(expected).max() > 1e-3


@each_reading
def test_a_step_on_a_batch_descends_the_gradient_of_autograd(method, more):
    logits, reference = tables()
    some = settings_of(method, **more)
    s = toy.Settings(method=method, n=N, data="fresh", batch=7, **some)
    moved = one_step(method, 0.2, s, logits, reference, batch=7)
    drawn = world.draw_pairs(world_of(0.2)[1], (1, 7), world.generator(0, world.DATA, 2))[0]
    assert len(drawn) == 7
    assert moved == pytest.approx(
        descent(method, world.count_pairs(drawn, N), logits, reference, **some), rel=1e-10, abs=1e-13
    )


@pytest.mark.parametrize("detach_lambda", [True, False])
@pytest.mark.parametrize("method", toy.PAPER)
def test_a_step_where_responses_are_as_good_as_impossible_stays_exact(method, detach_lambda):
    logits, reference = tables(size=200.0)
    some = {"beta": 1.0, "clip": 0.5, "detach_lambda": detach_lambda}
    s = toy.Settings(method=method, n=N, **some)
    expected = descent(method, world_of(0.0)[1], logits, reference, **some)
    assert one_step(method, 0.0, s, logits, reference) == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("method", ["nbdpo_asym", "nbdpo_sym", "nbdpo_v2_asym", "nbdpo_v2_sym", "bdpo"])
def test_through_lambda_or_not_differs_for_v2_and_bdpo_alone_and_agrees_at_the_kink_of_an_equal_pair(method):
    logits, reference = tables()
    moved = [one_step(method, 0.0, toy.Settings(method=method, n=N, detach_lambda=d), logits, reference)
             for d in (True, False)]  # fmt: skip
    assert (moved[0] == moved[1]).all() == (method in ("nbdpo_asym", "nbdpo_sym"))
    even = np.zeros((N, N))
    s = toy.Settings(method=method, n=N, detach_lambda=False)
    expected = descent(method, world_of(0.0)[1], even, reference, beta=1.0, clip=0.5, detach_lambda=False)
    assert one_step(method, 0.0, s, even, reference) == pytest.approx(expected, rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("method", ["dpo", "nbdpo_v2_sym", "bdpo", "ipo", "hinge"])
def test_float32_is_computed_in_float32(method):
    logits, reference = (x.astype(np.float32).astype(float) for x in tables())
    some = settings_of(method)
    s = toy.Settings(method=method, n=N, dtype="float32", **some)
    moved = one_step(method, 0.2, s, logits, reference)
    expected = descent(method, world_of(0.2)[1], logits, reference, **some)
    assert moved == pytest.approx(expected, abs=3e-6)
    assert moved != pytest.approx(expected, rel=1e-10, abs=1e-13)


def test_the_exact_policy_gradient_is_that_of_the_tabular_objective():
    logits, reference = tables()
    scores = world.log_utility(N)
    s = toy.Settings(method="oracle", n=N, beta=0.7)
    mask, law = world_of(0.0)
    w = engine._World(scores, mask, law, law, *engine.layout(mask), None)
    after = logits.ravel().copy()
    engine._stage(s, w, (kernel.POLICY, *toy.coefficients("oracle", beta=0.7)), after, reference, 2, 1, table=scores)
    theta = torch.tensor(logits, requires_grad=True)
    losses.LOSSES["rlhf_tabular"](theta, torch.tensor(reference), torch.tensor(scores), beta=0.7).mean().backward()
    assert logits - after.reshape(N, N) == pytest.approx(theta.grad.numpy(), rel=1e-10, abs=1e-13)


# ---------------------------------------------------------------- whole runs


def network(parameters, n, width):
    """torch's own network from the flat parameters."""
    sizes = [n * width, width, width * n, n]
    a, b, c, d = torch.tensor(parameters).split(sizes)
    net = torch.nn.Sequential(torch.nn.Linear(n, width), torch.nn.ReLU(), torch.nn.Linear(width, n)).double()
    with torch.no_grad():
        net[0].weight.copy_(a.reshape(n, width).T)
        net[0].bias.copy_(b)
        net[2].weight.copy_(c.reshape(width, n).T)
        net[2].bias.copy_(d)
    return lambda: net(torch.eye(n, dtype=torch.float64)), list(net.parameters())


def table_policy(parameters, n, width):
    theta = torch.tensor(parameters.reshape(n, n), requires_grad=True)
    return lambda: theta, [theta]


def by_torch(s, steps, method, start, reference=None):
    """A training by torch.optim and bdpo.losses, from flat parameters; log-probs after it."""
    law = world.pair_weights(world.log_utility(s.n, s.alpha), world.draw_mask(s.n, s.mask_rate, s.seed))
    x, i, j = np.nonzero(law)
    logits, parameters = (network if s.policy == "mlp" else table_policy)(start, s.n, s.width)
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[s.optimizer](parameters, lr=s.learning_rate)
    reference = logits().log_softmax(-1).detach() if reference is None else reference
    for _ in range(steps):
        lp = logits().log_softmax(-1)
        value = loss_of(method, lp[x, i], lp[x, j], reference[x, i], reference[x, j], beta=s.beta, clip=s.clip)
        optimizer.zero_grad()
        (torch.tensor(law[x, i, j]) * value).sum().backward()
        optimizer.step()
    with torch.no_grad():
        return logits().log_softmax(-1)


@pytest.mark.parametrize("policy", ["tabular", "mlp"])
@pytest.mark.parametrize(("optimizer", "rate", "tolerance"), [("sgd", 0.5, 1e-12), ("adam", 0.02, 1e-8)])
@pytest.mark.parametrize("method", ["dpo", "nbdpo_v2_sym"])
def test_a_run_is_that_of_torch(policy, optimizer, rate, tolerance, method):
    base = toy.Settings(n=N, mask_rate=0.2, width=6, init="random", seed=3, steps=20, reference_steps=0)
    s = replace(base, method=method, policy=policy, optimizer=optimizer, learning_rate=rate)
    start = engine._initial(s)
    expected = by_torch(s, 20, method, start)
    found = toy.run([s], policies=True).logps[0]
    assert found == pytest.approx(expected.numpy(), abs=tolerance)


def test_the_reference_is_the_policy_after_the_first_stage():
    s = toy.Settings(method="bdpo", n=N, seed=2, init="random", reference_steps=15, steps=10, record=(0,))
    first = by_torch(s, 15, "dpo", engine._initial(s))
    rows = toy.run([s], policies=True)
    assert list(rows.step) == [0, 10]
    assert rows.logps[0] == pytest.approx(first.numpy(), abs=1e-12)
    assert rows.kl[0] == pytest.approx(0, abs=1e-14)
    assert rows.reward[0] == pytest.approx(rows.reference_reward[1], abs=1e-13)
    # the first stage's parameters are not log-probs, but the softmax forgets the difference
    second = by_torch(s, 10, "bdpo", first.numpy().ravel(), first)
    assert rows.logps[1] == pytest.approx(second.numpy(), abs=1e-12)


def test_the_optimum_of_dpo_is_the_reference_tilted_by_the_utility():
    s = toy.Settings(n=4, steps=40_000, reference_steps=5, learning_rate=4.0, beta=2.0, watch_every=0, init="random")
    rows = toy.run([s, replace(s, steps=0)], policies=True)
    tilted = torch.tensor(rows.logps[1] + world.log_utility(4) / 2.0).log_softmax(-1).numpy()
    assert np.exp(rows.logps[0]) == pytest.approx(np.exp(tilted), abs=1e-6)


def test_rlhf_and_ppo_reach_the_optimum_of_dpo():
    s = toy.Settings(n=4, steps=6000, reference_steps=0, learning_rate=1.0, batch=512, seed=1)
    rows = toy.run_grid(s, method=["dpo", "rlhf", "ppo"], policies=True)
    target = np.exp(torch.tensor(world.log_utility(4)).log_softmax(-1).numpy())
    for method, lp in zip(rows.method, rows.logps, strict=True):
        assert np.exp(lp) == pytest.approx(target, abs=0.05), method


def test_a_reward_network_may_take_over_the_hidden_layer_of_the_reference():
    """By torch: the reference's hidden layer, a new last layer of zeros, Bradley-Terry on the pairs of the method."""
    base = toy.Settings(n=N, policy="mlp", width=6, init="random", seed=3, reference_steps=9, learning_rate=0.5)
    s = replace(base, method="rlhf", steps=7, reward_start="reference")
    start, law = engine._initial(s), world_of(0.0, 3)[1]
    w = engine._world(s, engine._logps_of(s, start))
    parameters = start.copy()
    engine._stage(s, w, (kernel.EXPECTATION, *toy.coefficients("dpo")), parameters, engine._logps_of(s, start), 1, 9)
    parameters[N * 6 + 6 :] = 0
    scores, weights = network(parameters, N, 6)
    optimizer = torch.optim.SGD(weights, lr=0.5)
    x, i, j = np.nonzero(law)
    for _ in range(7):
        optimizer.zero_grad()
        gap = scores()[x, i] - scores()[x, j]
        (torch.tensor(law[x, i, j]) * -torch.nn.functional.logsigmoid(gap)).sum().backward()
        optimizer.step()
    found = engine._reward_model(s, w, (start, parameters))
    assert found == pytest.approx(scores().detach().numpy(), abs=1e-12)
    fresh = engine._reward_model(replace(s, reward_start="initial"), w, (start, parameters))
    assert np.abs(fresh - found).max() > 1e-3
    rows = toy.run_grid(s, reward_start=["initial", "reference"], method=["rlhf", "ppo", "dpo"]).reward
    assert rows[0] != rows[3]
    assert rows[1] != rows[4]
    assert rows[2] == rows[5]


# ---------------------------------------------------------------- measures


def test_rewards_of_known_policies():
    uniform = toy.run([toy.Settings(steps=0, reference_steps=0)]).iloc[0]
    u = np.exp(world.log_utility())
    assert uniform.reward == pytest.approx(u.sum() / 20)
    assert uniform.reward == pytest.approx(2.2138, abs=5e-5)
    assert uniform.reward_normalised == pytest.approx(1)
    assert uniform.best_mass == pytest.approx(1 / 20)
    bump = toy.run([toy.Settings(steps=0, reference_steps=0, init="shifted")]).iloc[0]
    assert bump.reward == pytest.approx((u**2 / u.sum(1, keepdims=True)).sum())
    assert bump.reward == pytest.approx(14.3845, abs=5e-5)
    assert bump.reward_normalised == pytest.approx(6.588, abs=5e-4)


def test_masked_mass_of_the_uniform_policy_is_the_mask_rate():
    rows = toy.run_grid(toy.Settings(steps=0, reference_steps=0), mask_rate=(0.0, 0.2, 0.4), seed=range(3))
    assert rows.masked_mass.to_numpy() == pytest.approx(rows.mask_rate.to_numpy())


@pytest.mark.parametrize("method", toy.PAIRS)
def test_loss_and_ratios_are_those_of_losses_and_imbalance(method):
    some = settings_of(method)
    row = toy.run(
        [
            toy.Settings(
                method=method, n=N, init="random", mask_rate=0.2, steps=3, reference_steps=2, record=(0,), **some
            )
        ],
        policies=True,
    )
    reference, lp = (torch.tensor(x) for x in row.logps)
    law = world_of(0.2)[1]
    x, i, j = np.nonzero(law)
    w = torch.tensor(law[x, i, j])
    a, b = (lp[x, k].clone().requires_grad_() for k in (i, j))
    value = loss_of(method, a, b, reference[x, i], reference[x, j], **some)
    assert row.loss[1] == pytest.approx(float((w * value.detach()).sum()), rel=1e-10)
    g_w, g_l = torch.autograd.grad(value.sum(), (a, b))
    # a weight is a pair that occurs more often: it multiplies both derivatives
    for name in ("probability", "log"):
        expected = mean_log_ratio(w * g_w, w * g_l, a.detach(), b.detach(), coordinate=name)
        assert row[f"ratio_{name}"][1] == pytest.approx(float(expected), rel=1e-9, abs=1e-12)
    expected = mean_log_ratio(w * g_w, w * g_l, a.detach(), b.detach(), coordinate="logit")
    assert row.ratio_logit[1] == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("method", toy.PAIRS)
def test_the_watched_loss_is_the_measured_one(method):
    """After one huge step, `rise_max` and `rebound` are the change of the loss, where it rose."""
    base = toy.Settings(n=N, init="random", steps=1, reference_steps=0, record=(0,), watch_every=1)
    s = replace(base, method=method, learning_rate=400.0, sft_weight=0.0)
    row = toy.run([s])
    change = row.loss[1] - row.loss[0]
    if method == "orpo":
        pytest.skip("the likelihood term of orpo cannot be switched off, and the watched loss leaves it out")
    assert row.rise_max[1] == pytest.approx(max(change, 0), rel=1e-9)
    assert row.rise_share[1] == float(change > 0)
    assert row.rebound[1] == row.rise_max[1]


def test_unrest_by_hand():
    found = engine._unrest(np.array([4.0, 3.0, 3.5, 3.0, 5.0, 2.0]))
    assert found == {"rise_max": 2.0, "rise_share": 2 / 5, "rebound": 2.0}
    assert engine._unrest(np.array([3.0, 2.0, 1.0])) == {"rise_max": 0.0, "rise_share": 0.0, "rebound": 0.0}
    rounding = engine._unrest(np.array([1.0, 1.0 + 1e-15]))
    assert rounding == {"rise_max": 0.0, "rise_share": 0.0, "rebound": 0.0}


# ---------------------------------------------------------------- the grid


def test_rows_do_not_depend_on_threads_order_or_company():
    axes = {
        "method": ["dpo", "nbdpo_v2_sym", "ppo"],
        "mask_rate": [0.0, 0.4],
        "seed": [0, 5],
        "data": ["fixed", "fresh"],
    }
    base = toy.Settings(n=N, steps=6, reference_steps=4, batch=8, pairs=50, init="random")
    alone = pd.concat([toy.run([s]) for s in toy.grid(base, **axes)], ignore_index=True)
    pd.testing.assert_frame_equal(toy.run_grid(base, **axes), alone, check_exact=True)
    pd.testing.assert_frame_equal(toy.run_grid(base, threads=3, **axes), alone, check_exact=True)
    back = toy.run(toy.grid(base, **axes)[::-1])[::-1].reset_index(drop=True)
    pd.testing.assert_frame_equal(back, alone, check_exact=True)


def test_methods_of_one_seed_share_world_and_reference():
    rows = toy.run_grid(toy.Settings(n=N, steps=4, reference_steps=3, init="random"), method=toy.METHODS, seed=[0, 1])
    assert (rows.groupby("seed").reference_reward.nunique() == 1).all()
    assert rows.reference_reward.nunique() == 2


@pytest.mark.parametrize("data", ["expectation", "fixed", "fresh"])
def test_a_row_on_the_way_is_that_of_a_shorter_run(data):
    base = toy.Settings(
        n=N, data=data, reference_steps=5, init="random", learning_rate=30.0, watch_every=2, reward_steps=7
    )
    for method in ("dpo", "nbdpo_v2_sym", "orpo", "rlhf", "ppo"):
        long = toy.run([replace(base, method=method, steps=20, record=(8,))]).iloc[[0]]
        short = toy.run([replace(base, method=method, steps=8)])
        pd.testing.assert_frame_equal(long.drop(columns="steps"), short.drop(columns="steps"), check_exact=True)


def test_a_start_from_the_first_policy_keeps_the_reference():
    base = toy.Settings(n=N, reference_steps=5, steps=0, init="random")
    rows = toy.run_grid(base, start=["reference", "initial"], policies=True)
    first = toy.run([replace(base, reference_steps=0)], policies=True)
    assert rows.logps[1] == pytest.approx(first.logps[0], abs=1e-14)
    assert rows.reference_reward[0] == rows.reference_reward[1] != first.reference_reward[0]
    assert rows.kl[0] == pytest.approx(0, abs=1e-14)
    assert rows.kl[1] > 1e-6


def test_a_diverged_run_is_a_row_that_says_so():
    s = toy.Settings(method="ipo", n=N, steps=2000, reference_steps=0, learning_rate=1e6, record=(0,))
    rows = toy.run([s, toy.Settings(n=N, steps=2)])
    assert list(rows.status) == ["ok", "diverged", "ok"]
    assert 0 < rows.diverged_at[1] <= 2000
    assert rows.loc[1, list(toy.MEASURES)].isna().all()
    assert rows.loc[0, "reward"] > 0
    assert rows.diverged_at[2] == -1


def test_a_reference_that_diverged_takes_its_runs_along():
    s = toy.Settings(n=N, policy="mlp", steps=3, reference_steps=200, learning_rate=1e9, optimizer="sgd", init="random")
    row = toy.run([s]).iloc[0]
    assert row.status in ("ok", "diverged")
    nan = np.full((N, N), np.nan)
    rows = engine._rows(s, engine._world(s, nan * 0), engine._initial(s), nan, (nan, nan), {}, False)
    assert [r["status"] for r in rows] == ["diverged"]


def test_a_hinge_that_pulls_at_nothing_has_ratio_zero():
    law = np.zeros((2, 2, 2))
    law[0, 0, 1] = 1.0  # one pair, told apart by more than the hinge asks for
    lp = np.log([[0.99, 0.01], [0.5, 0.5]])
    w = engine._World(
        world.log_utility(2), np.zeros((2, 2), bool), law, law, *engine.layout(np.zeros((2, 2), bool)), None
    )
    found = engine._measures(toy.Settings(n=2), w, toy.coefficients("hinge"), lp, np.log(np.full((2, 2), 0.5)), None)
    assert [found[f"ratio_{c}"] for c in ("probability", "log", "logit")] == [0.0, 0.0, 0.0]


def test_label_noise_of_one_half_teaches_nothing():
    rows = toy.run_grid(toy.Settings(steps=30, reference_steps=0), label_noise=[0.0, 0.5, 1.0])
    assert rows.kl[1] == pytest.approx(0, abs=1e-15)
    assert rows.reward[0] > rows.reward[1] > rows.reward[2]


# ---------------------------------------------------------------- bad input


BAD = [
    ({"mask_rate": 1.0}, "mask_rate is 1.0; allowed: finite numbers from 0 to below 1"),
    ({"mask_rate": 0.95}, "mask_rate is 0.95; allowed: 0 to 0.9"),
    ({"mask_rate": -0.1}, "mask_rate is -0.1"),
    ({"steps": -1}, "steps is -1; allowed: whole numbers from 0"),
    ({"steps": 3.0}, "steps is 3.0"),
    ({"steps": True}, "steps is True"),
    ({"reference_steps": -3}, "reference_steps is -3"),
    ({"method": "dop"}, "method is 'dop'; allowed: dpo"),
    ({"learning_rate": math.nan}, "learning_rate is nan"),
    ({"learning_rate": math.inf}, "learning_rate is inf"),
    ({"learning_rate": 0.0}, "learning_rate is 0.0; allowed: finite numbers above 0"),
    ({"learning_rate": "1"}, "learning_rate is '1'"),
    ({"beta": 0.0}, "beta is 0.0"),
    ({"seed": -1}, "seed is -1"),
    ({"n": 1}, "n is 1"),
    ({"policy": "tree"}, "policy is 'tree'; allowed: tabular, mlp"),
    ({"label_noise": 1.1}, "label_noise is 1.1"),
    ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
    ({"data": "fresh", "batch": 0}, "batch is 0"),
    ({"method": "ppo", "batch": 0}, "batch is 0"),
    ({"policy": "mlp", "init": "shifted"}, "init is 'shifted'"),
    ({"record": (301,)}, "record is .*from 0 to steps = 300"),
    ({"record": (-1,)}, "record is"),
    ({"n": 2, "mask": ((True, False), (False, False))}, "leaves prompt 0 1 response"),
    ({"n": 3, "mask": ((False, False), (False, False))}, "mask has 2 rows"),
    ({"n": 2, "mask": ((0, 0), (0, 0))}, "a square table of bools"),
    ({"mask_rule": "rows"}, "mask_rule is 'rows'"),
    ({"ppo_clip": 1.0}, "ppo_clip is 1.0"),
    ({"detach_lambda": 1}, "detach_lambda is 1; allowed: True or False"),
    ({"masked_pairs": "kept"}, "masked_pairs is 'kept'; allowed: redrawn, dropped"),
    ({"reward_start": "zero"}, "reward_start is 'zero'; allowed: initial, reference"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_settings_are_refused_before_anything_runs(settings, message):
    with pytest.raises(ValueError, match=message):
        toy.Settings(**settings)


def test_bad_grids_are_refused():
    with pytest.raises(TypeError, match="'learningrate' is no setting"):
        toy.grid(learningrate=[1.0])
    with pytest.raises(TypeError, match="as a collection"):
        toy.grid(seed=3)
    with pytest.raises(TypeError, match="as a collection"):
        toy.grid(method="dpo")
    with pytest.raises(ValueError, match="seed has no value"):
        toy.grid(seed=range(0))
    with pytest.raises(ValueError, match="mask_rate is 1"):
        toy.run_grid(seed=range(3), mask_rate=[0.0, 1])
    with pytest.raises(ValueError, match="no run"):
        toy.run([])
    with pytest.raises(ValueError, match="threads is 0"):
        toy.run([toy.Settings(steps=0)], threads=0)


# ---------------------------------------------------------------- masks and pairs


@pytest.mark.parametrize("rule", world.MASK_RULES)
def test_masks_have_their_rate_are_nested_and_leave_pairs(rule):
    for seed in range(20):
        masks = [world.draw_mask(20, rate, seed, rule) for rate in (0.0, 0.2, 0.4, 0.85)]
        if rule != "independent":
            assert [m.mean() for m in masks] == pytest.approx([0.0, 0.2, 0.4, 0.85])
        for small, large in itertools.pairwise(masks):
            assert not (small & ~large).any()
        assert (~masks[-1]).sum(1).min() >= 2
    if rule == "spare_best":
        assert not np.diag(masks[-1]).any()
    if rule == "prompt":
        assert (masks[-1].sum(1) == 17).all()
    if rule == "table":
        assert len(set(masks[1].sum(1))) > 1


def test_independent_masks_have_their_rate_on_average_and_differ_in_number():
    shares = np.array([[world.draw_mask(20, r, seed, "independent").mean() for r in (0.2, 0.4)] for seed in range(200)])
    assert shares.mean(0) == pytest.approx([0.2, 0.4], abs=4 * 0.5 / 20 / 200**0.5)
    assert (shares.std(0) > 0.01).all()
    assert (~world.draw_mask(20, 0.9, 0, "independent")).sum(1).min() == 2


def test_dropped_pairs_leave_fewer_data_and_weigh_prompts_by_their_pairs():
    base = toy.Settings(n=6, mask_rate=0.4, seed=3, data="fixed", pairs=5000, label_noise=0.2, masked_pairs="dropped")
    w = engine._world(base, np.zeros((6, 6)))
    kept = (~w.mask).sum(1)
    assert w.law.sum((1, 2)) == pytest.approx(kept * (kept - 1) / (kept * (kept - 1)).sum())
    assert not w.mask.ravel()[w.fixed].any()
    assert len(w.fixed) == pytest.approx(5000 * (kept * (kept - 1)).sum() / (6 * 30), abs=4 * 35)
    assert world.count_pairs(w.fixed, 6) == pytest.approx(w.law, abs=0.02)
    whole = engine._world(replace(base, mask_rate=0.0), np.zeros((6, 6)))
    redrawn = engine._world(replace(base, mask_rate=0.0, masked_pairs="redrawn"), np.zeros((6, 6)))
    assert (whole.law == redrawn.law).all()
    assert (whole.fixed == redrawn.fixed).all()
    only = world.draw_pairs(world.pair_weights(world.log_utility(6), np.zeros((6, 6), bool)), (1,), _first(base))[0]
    mask = np.zeros((6, 6), bool)
    mask.ravel()[only[0]] = True
    alone = replace(base, mask_rate=0.0, mask=tuple(map(tuple, mask)), pairs=1, label_noise=0.0)
    with pytest.raises(ValueError, match="pairs is 1, all dropped"):
        engine._world(alone, np.zeros((6, 6)))


def _first(s):
    return world.generator(s.seed, world.DATA, 0)


def test_masks_of_different_seeds_differ():
    assert (world.draw_mask(20, 0.4, 0) != world.draw_mask(20, 0.4, 1)).any()


def test_preferences_are_those_of_equations_33_and_34_where_these_do_not_underflow():
    log_u = world.log_utility(6)
    u = np.exp(log_u)
    naive = u[:, :, None] / (u[:, :, None] + u[:, None, :])
    assert world.preference(log_u) == pytest.approx(naive, rel=1e-12)


def test_preferences_survive_where_utilities_underflow():
    log_u = world.log_utility(60)
    with np.errstate(invalid="ignore"):
        u = np.exp(log_u)
        naive = u[0, 58] / (u[0, 58] + u[0, 59])
    assert math.isnan(naive)
    assert world.preference(log_u)[0, 58, 59] == 1.0
    assert world.preference(log_u)[0, 59, 58] == pytest.approx(math.exp(-0.6 * 117))


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_pair_weights_sum_to_one_and_give_prompts_the_same(noise):
    mask = world.draw_mask(20, 0.4, 0)
    law = world.pair_weights(world.log_utility(), mask, label_noise=noise)
    assert law.sum((1, 2)) == pytest.approx(np.full(20, 1 / 20))
    assert law.sum(2)[mask].max() == 0
    assert law.sum(1)[mask].max() == 0
    both = law + law.transpose(0, 2, 1)
    share = np.divide(law, both, where=both > 0, out=np.zeros_like(law))
    right = world.preference(world.log_utility())
    assert share[both > 0] == pytest.approx(((1 - noise) * right + noise * (1 - right))[both > 0])


def test_drawn_pairs_follow_their_weights():
    law = world.pair_weights(world.log_utility(4), world.draw_mask(4, 0.25, 0))
    pairs = world.draw_pairs(law, (200_000,), np.random.default_rng(0))
    counted = world.count_pairs(pairs, 4)
    assert counted == pytest.approx(law, abs=5 * math.sqrt(law.max() / 200_000))
    assert counted[law == 0].max() == 0


def test_sampling_in_proportion_to_a_policy():
    p = np.array([[0.1, 0.2, 0.7]] * 3)
    law = world.pair_weights(world.log_utility(3), np.zeros((3, 3), bool), sampling=p)
    both = (law + law.transpose(0, 2, 1))[0]
    assert both[0, 1] / both[1, 2] == pytest.approx(0.02 / 0.14)


def test_importing_the_package_compiles_nothing(root):
    import subprocess
    import sys

    code = "import sys, bdpo, bdpo.losses; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
