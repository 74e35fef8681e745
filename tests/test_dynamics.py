"""First-order updates: exact on fractions, equal to autograd, and conserving what they must."""

from fractions import Fraction as F

import pytest
import torch

from bdpo import dynamics, worlds

SMALL = [*worlds.policies(2, 5), *worlds.policies(3, 6), *worlds.policies(4, 6)]


@pytest.mark.parametrize("p", SMALL)
def test_jacobian_rows_and_columns_cancel_exactly(p):
    jacobian = dynamics.softmax_jacobian(p)
    assert all(sum(row) == 0 for row in jacobian)
    assert all(sum(column) == 0 for column in zip(*jacobian, strict=True))


def test_jacobian_agrees_with_autograd():
    s = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(lambda t: torch.softmax(t, 0), s)
    got = torch.tensor(dynamics.softmax_jacobian(torch.softmax(s, 0).tolist()), dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


def test_to_logits_agrees_with_autograd_through_the_softmax():
    s = torch.tensor([0.1, 0.7, -0.4, 1.1], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    p = torch.softmax(s, 0)
    (p**2 @ weights).backward()
    gradient = (2 * p * weights).tolist()
    torch.testing.assert_close(torch.tensor(dynamics.to_logits(p.tolist(), gradient), dtype=torch.float64), s.grad)


@pytest.mark.parametrize("p", SMALL)
def test_a_common_shift_of_the_gradient_does_not_act(p):
    g = [F(k) for k in range(len(p))]
    assert dynamics.to_logits(p, g) == dynamics.to_logits(p, [a + 7 for a in g])


def test_kappa_is_the_dpo_confidence_in_closed_form():
    assert dynamics.kappa([F(2, 3), F(1, 3)], 0, 1) == F(2, 3)
    assert dynamics.kappa([F(2, 3), F(1, 3)], 0, 1, reference=[F(2, 3), F(1, 3)]) == F(1, 2)


def test_pair_weights_are_minus_the_logit_gradient_of_dpo():
    p, reference = [F(1, 2), F(1, 3), F(1, 6)], [F(1, 4), F(1, 4), F(1, 2)]
    data = [(0, 1, F(1)), (2, 0, F(2)), (1, 2, F(1))]
    s = torch.tensor([float(x) for x in p], dtype=torch.float64).log().requires_grad_()
    q = torch.tensor([float(x) for x in reference], dtype=torch.float64).log()
    loss = -sum(float(c) * torch.nn.functional.logsigmoid(s[a] - s[b] - q[a] + q[b]) for a, b, c in data)
    loss.backward()
    expected = [float(x) for x in dynamics.pair_weights(p, data, reference)]
    torch.testing.assert_close(-s.grad, torch.tensor(expected, dtype=torch.float64))


def test_pair_weights_add_up_to_zero():
    for p in SMALL:
        assert sum(dynamics.pair_weights(p, dynamics.expected_pairs([F(k + 1) for k in range(len(p))]))) == 0


def test_alpha_of_all_responses_averages_half():
    for p in SMALL:
        n = len(p)
        assert sum(dynamics.alpha(p)) == F(n * (n - 1), 2)


def test_worlds_are_complete_distinct_and_simplest_first():
    found = list(worlds.policies(3, 6))
    assert len(found) == len(set(found))
    assert all(sum(p) == 1 and min(p) > 0 for p in found)
    assert found[0] == (F(1, 3),) * 3
    assert {p for p in found if max(x.denominator for x in p) == 4} == {
        (F(1, 2), F(1, 4), F(1, 4)),
        (F(1, 4), F(1, 2), F(1, 4)),
        (F(1, 4), F(1, 4), F(1, 2)),
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: list(worlds.policies(1, 4)), "n is 1"),
        (lambda: list(worlds.policies(4, 3)), "denominator is 3"),
        (lambda: list(worlds.utilities(1, 4)), "n is 1"),
        (lambda: list(worlds.utilities(2, 0)), "largest is 0"),
        (lambda: list(worlds.datasets(2, 0)), "pairs is 0"),
    ],
)
def test_impossible_worlds_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_datasets_are_all_multisets_of_labelled_pairs():
    found = list(worlds.datasets(2, 2))
    assert [[(a, b) for a, b, _ in d] for d in found] == [
        [(0, 1)],
        [(1, 0)],
        [(0, 1), (0, 1)],
        [(0, 1), (1, 0)],
        [(1, 0), (1, 0)],
    ]


def test_utilities_are_distinct_up_to_scale():
    found = list(worlds.utilities(2, 3))
    assert len({a / b for a, b in found}) == len(found)
