"""Gradients of sequence log-probs: each number by a second route, and the measurements of one tiny seed."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bdpo import results
from bdpo.llm import experiment, geometry
from bdpo.llm import language as lang
from bdpo.losses import LOSSES

PROMPT = lang.tokenizer()("tell briefly river clock ?").input_ids
WATER, HOURS, END = (lang.VOCABULARY.index(word) for word in ("water", "hours", "<eos>"))


@pytest.fixture(scope="module")
def model() -> Any:
    return lang.model(layers=1, width=16, seed=1).double().eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> experiment.World:
    setup = experiment.Setup(
        layers=1,
        width=16,
        demonstrations=200,
        sft_steps=20,
        sft_batch=16,
        pairs=24,
        epochs=1,
        batch=8,
        validation_pairs=8,
    )
    return experiment.World(setup, 0, folder=tmp_path_factory.mktemp("world"))


# ---------------------------------------------------------------- log-probs and gradients


def test_logps_are_sums_of_the_tokens_own_whatever_the_padding(model: Any) -> None:
    responses = [[WATER, HOURS, END], [END]]
    with torch.no_grad():
        found = geometry.logps(model, [PROMPT, PROMPT], responses)
        for row, response in zip(found, responses, strict=True):
            table = model(input_ids=torch.tensor([PROMPT + response])).logits[0].log_softmax(-1)
            tokens = [table[len(PROMPT) - 1 + k, token] for k, token in enumerate(response)]
            assert float(row) == pytest.approx(float(sum(tokens)), abs=1e-6)  # Llama's norms compute in float32


def test_gradient_predicts_a_small_step_along_any_direction(model: Any) -> None:
    where = [PROMPT] * 2, [[WATER, END], [HOURS, WATER, END]]
    rows = geometry.gradients(model, *where)
    direction = torch.randn(rows.shape[1], dtype=torch.double, generator=torch.Generator().manual_seed(0))
    change = geometry.after(model, 1e-3 * direction, *where) - geometry.after(model, -1e-3 * direction, *where)
    torch.testing.assert_close(change / 2e-3, rows @ direction, rtol=1e-3, atol=1e-3)


def test_gradients_weighted_by_all_probabilities_cancel(model: Any) -> None:
    where = [PROMPT] * len(lang.VOCABULARY), [[token] for token in range(len(lang.VOCABULARY))]
    rows = geometry.gradients(model, *where)
    with torch.no_grad():
        p = geometry.logps(model, *where).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-6)
    assert float((p @ rows).norm()) < 1e-5 * float(rows.norm(dim=1).mean())


def test_after_leaves_the_model_where_it_is_and_refuses_a_step_of_another_length(model: Any) -> None:
    before = [weight.clone() for weight in model.parameters()]
    size = sum(weight.numel() for weight in before)
    geometry.after(model, torch.ones(size, dtype=torch.double), [PROMPT], [[END]])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match=f"{size} parameters"):
        geometry.after(model, torch.ones(3, dtype=torch.double), [PROMPT], [[END]])


@pytest.mark.parametrize(("prompts", "responses"), [([], []), ([PROMPT], []), ([PROMPT], [[]]), ([[]], [[END]])])
def test_no_response_or_an_empty_one_is_refused(model: Any, prompts: Any, responses: Any) -> None:
    with pytest.raises(ValueError, match="none empty"):
        geometry.logps(model, prompts, responses)


# ---------------------------------------------------------------- norms, cosines, distances


def test_a_table_has_equal_norms_no_cosines_and_equal_distances() -> None:
    found = geometry.describe(3 * torch.eye(4, dtype=torch.double) + 0, [1, 2, 3, 4])
    for name in ("spread of norms", "mean c", "mean |c|", "spread of distances", "mean product"):
        assert found[name] == 0
    assert found["spread of norms per token"] > 0
    assert "parting" not in found


def test_a_common_vector_moves_cosines_and_no_distance() -> None:
    rows = torch.randn(5, 7, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    plain, shifted = (geometry.describe(x, [1] * 5) for x in (rows, rows + 100))
    assert shifted["spread of distances"] == pytest.approx(plain["spread of distances"], rel=1e-8)
    assert shifted["mean c"] > 0.99 > plain["mean c"] + 0.5


def test_two_opposite_gradients_by_hand() -> None:
    found = geometry.describe(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]), [1, 9])
    assert found["mean c"] == -1
    assert found["mean |c|"] == 1
    assert found["spread of norms"] == 0.5  # 1 and 3: mean 2, deviation 1
    assert found["spread of norms per root of tokens"] == 0  # 1/1 and 3/3
    assert found["mean product"] == pytest.approx(-3 / 5)


def test_distance_by_tokens_after_the_parting_is_seen() -> None:
    responses = [[1, 2, 3], [1, 2, 4], [5]]
    shared = geometry.beginnings(responses)
    assert shared.tolist() == [[3, 2, 0], [2, 3, 0], [0, 0, 1]]
    square = torch.diag(torch.tensor([1.0, 1.0, 3.0], dtype=torch.double).sqrt())  # squared distances 2, 4, 4
    assert geometry.describe(square, [3, 3, 1], shared)["parting"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("rows", "lengths", "words"),
    [
        (torch.ones(1, 2), [1], "at least 2"),
        (torch.ones(2, 2), [1], "1 lengths"),
        (torch.tensor([[1.0, 0.0], [0.0, 0.0]]), [1, 1], "zero"),
    ],
)
def test_what_has_no_angle_is_refused(rows: Tensor, lengths: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        geometry.describe(rows, lengths)


# ---------------------------------------------------------------- predictions

POLICY = torch.tensor([0.4, 0.3, 0.1], dtype=torch.double).log()
REFERENCE = torch.tensor([0.2, 0.3, 0.3], dtype=torch.double).log()
PREFERRED = torch.tensor([[0.5, 0.9, 0.8], [0.1, 0.5, 0.6], [0.2, 0.4, 0.5]], dtype=torch.double)


def whole_loss(loss: str, policy: Tensor, **settings: Any) -> Tensor:
    total = policy.new_zeros(())
    for i in range(3):
        for j in range(3):
            if i != j:
                one = LOSSES[loss](
                    policy[i : i + 1], policy[j : j + 1], REFERENCE[i : i + 1], REFERENCE[j : j + 1], **settings
                )
                total = total + PREFERRED[i, j] * one.sum()
    return total


@pytest.mark.parametrize("loss", ["dpo", "bdpo", "ipo"])
def test_slopes_are_those_of_automatic_differentiation(loss: str) -> None:
    policy = POLICY.clone().requires_grad_()
    (automatic,) = torch.autograd.grad(whole_loss(loss, policy, beta=0.3), policy)
    torch.testing.assert_close(geometry.slopes(loss, POLICY, REFERENCE, PREFERRED, beta=0.3), automatic)


def test_dpo_at_the_reference_counts_wins_above_one_half() -> None:
    found = geometry.slopes("dpo", REFERENCE, REFERENCE, PREFERRED, beta=0.3)
    torch.testing.assert_close(found, -0.3 * (PREFERRED - 0.5).sum(1))
    assert float(found.sum()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", ["dpo", "bdpo"])
def test_table_step_is_the_derivative_of_a_softmax_of_all_responses(loss: str) -> None:
    logits = torch.tensor([0.4, 0.3, 0.1, 0.2], dtype=torch.double).log().requires_grad_()  # the last is not listed
    value = whole_loss(loss, logits.log_softmax(0)[:3], beta=0.3)
    (downhill,) = torch.autograd.grad(-value, logits)
    exact = torch.autograd.functional.jacobian(lambda s: s.log_softmax(0), logits) @ downhill
    slope = geometry.slopes(loss, POLICY, REFERENCE, PREFERRED, beta=0.3)
    collision = 0.4**2 + 0.3**2 + 0.1**2 + 0.2**2
    torch.testing.assert_close(geometry.table_step(slope, POLICY, collision), exact[:3])


def test_printed_balanced_step_by_hand() -> None:
    w, p = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.25])
    found = geometry.printed_balanced_step(-w, p.log())
    torch.testing.assert_close(found, torch.tensor([0.5, -0.25]) - (0.25 - 0.0625))


def test_explained_perfectly_by_half_backwards_and_not_at_all() -> None:
    real = torch.tensor([1.0, -2.0])
    assert geometry.explained(real, real) == {"share": pytest.approx(1), "as is": 1, "sign": 1}
    assert geometry.explained(real / 2, real) == {"share": pytest.approx(1), "as is": 0.75, "sign": 1}
    assert geometry.explained(-real, real) == {"share": 0, "as is": -3, "sign": 0}
    assert geometry.explained(0 * real, real) == {"share": 0, "as is": 0, "sign": 0}


@pytest.mark.parametrize("real", [torch.zeros(2), torch.ones(3)])
def test_no_change_or_another_shape_is_refused(real: Tensor) -> None:
    with pytest.raises(ValueError, match="must agree"):
        geometry.explained(torch.ones(2), real)


def test_adam_scale_after_one_step_is_one_over_the_gradient() -> None:
    net = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(net.parameters(), eps=1e-8)
    with pytest.raises(ValueError, match="take a step first"):
        geometry.adam_scale(optimizer, net)
    net.weight.grad = torch.tensor([[1.0, 3.0]])
    optimizer.step()
    torch.testing.assert_close(geometry.adam_scale(optimizer, net), torch.tensor([1.5, 0.5]).double())


# ---------------------------------------------------------------- one seed


def test_one_seed_has_all_stages_and_the_gram_matrix_predicts_its_steps(world: experiment.World) -> None:
    sizes = geometry.Sizes(prompts=2, responses=4, draws=4, pairs=4, halvings=3)
    rows = geometry.measure(world, sizes, {"dpo": (0.2, 1e-3)})
    assert {row["stage"] for row in rows} == {"initialisation", "SFT", "dpo, a third", "dpo"}
    assert {row["part"] for row in rows} == {"data", "policy", "across", "prompt", "batch", "size"}
    assert all(math.isfinite(row["value"]) for row in rows)
    gram = [row["value"] for row in rows if row["case"].endswith("differences/Gram") and row["name"] == "as is"]
    assert min(gram) > 0.97
    orders = [row["value"] for row in rows if row["part"] == "size" and row["name"] == "all"]
    assert len(orders) == 4
    assert all(1.7 < order < 2.3 for order in orders)
    assert rows == geometry.measure(world, sizes, {"dpo": (0.2, 1e-3)}), "the same numbers again"


def test_too_many_different_responses_are_refused(world: experiment.World) -> None:
    same = experiment.World(world.setup, 0, folder=Path("unused"))
    always = lang.Behaviour(**{name: float(name in ("harmless", "hazardous")) for name in lang.Behaviour().__dict__})
    same.language = lang.Language(behaviour=always)
    assert len(geometry.groups(same, geometry.Sizes(prompts=1, responses=1))) == 1
    with pytest.raises(ValueError, match="ask for fewer"):
        geometry.groups(same, geometry.Sizes(prompts=1, responses=2))


def test_coordinates_shift_the_mean_imbalance_of_all_methods_alike(world: experiment.World) -> None:
    rows = geometry.reference_logps(world, "overall")
    assert len(rows) == world.setup.pairs
    win, lose, *lengths = (torch.tensor([row[k] for row in rows]) for k in ("win", "lose", "win_tokens", "lose_tokens"))
    methods = ["dpo", "bdpo", "simpo", "dpo_sft"]
    told = geometry.imbalance_at((win.double(), lose.double()), (lengths[0], lengths[1]), dict.fromkeys(methods, 0.5))
    found = {(row["method"], row["coordinate"]): row for row in told}
    assert found["dpo", "log"]["mean"] == found["dpo", "log"]["of means"] == 0
    gaps = [found[name, "probability"]["mean"] - found[name, "log"]["mean"] for name in methods]
    assert gaps == pytest.approx([float((lose.double() - win.double()).mean())] * len(methods))


def test_reference_logps_are_the_models_own(world: experiment.World) -> None:
    row, pairs = geometry.reference_logps(world, "safe")[3], world.pairs("safe")[0]
    with torch.no_grad():
        own = geometry.logps(world.reference, [pairs.prompts[3]] * 2, [pairs.chosen[3], pairs.rejected[3]])
    assert [row["win"], row["lose"]] == pytest.approx(own.tolist(), abs=1e-4)
    assert (row["win_tokens"], row["lose_tokens"]) == (len(pairs.chosen[3]), len(pairs.rejected[3]))


def test_recording_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(world: experiment.World, sizes: geometry.Sizes) -> list[dict[str, Any]]:
        asked.append(world.seed)
        return [{"seed": world.seed, "value": 1.0}]

    monkeypatch.setattr(geometry, "measure", measure)
    geometry.record([0], folder=tmp_path, root=tmp_path)
    geometry.record([0, 1], folder=tmp_path, root=tmp_path)
    assert asked == [0, 1]
    assert results.read("llm/geometry", root=tmp_path)["seed"].tolist() == [0, 1]
