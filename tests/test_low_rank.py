"""Adapters of the least error: against the bound of Eckart and Young, with another root of the same moments."""

import pytest
import torch

from qat.low_rank import best_for_inputs, best_of_rank
from qat.ptq.gptq import factorize


def moments(columns, seed=0):
    """Return H of inputs whose directions differ in strength by some orders of magnitude."""
    torch.manual_seed(seed)
    x = torch.randn(4 * columns, columns) @ (torch.randn(columns, columns) * torch.logspace(0, -2, columns))
    return x.T @ x / len(x)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(24, 40, 5), (40, 24, 1), (17, 17, 16), (12, 40, 12)])
def test_the_output_error_left_is_the_least_there_is(rows, columns, rank):
    weight, hessian = torch.randn(rows, columns), moments(columns)
    factor = factorize(hessian, 0.01, act_order=True)
    a, b = best_for_inputs(weight[:, factor.order], factor.inverse, rank)
    rest = (weight - b @ a[:, factor.order.argsort()]).double()
    damped = hessian.double() + factor.damping * hessian.double().diagonal().mean() * torch.eye(columns).double()
    left = ((rest @ damped) * rest).sum()
    values, vectors = torch.linalg.eigh(damped)
    singular = torch.linalg.svdvals(weight.double() @ (vectors * values.sqrt()))
    assert left == pytest.approx(
        singular[rank:].square().sum().item(), rel=1e-3, abs=1e-6 * singular.square().sum().item()
    )
    assert a.shape == (rank, columns) and b.shape == (rows, rank)
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-3)  # shared evenly


def test_equal_inputs_are_the_plain_case():
    weight = torch.randn(20, 30)
    a, b = best_for_inputs(weight, torch.eye(30) / 3, 6)
    plain_a, plain_b = best_of_rank(weight, 6)
    torch.testing.assert_close(b @ a, plain_b @ plain_a, rtol=1e-3, atol=1e-4)
