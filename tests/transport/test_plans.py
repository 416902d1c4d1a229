"""`TopKPlan`: the forms that a plan is delivered in."""

import numpy as np
import pytest
import torch
from dashpot.transport import TopKPlan

DENSE = torch.tensor([[0.5, 0, 0.1], [0, 0, 0.3], [0.2, 0, 0]])


def by_columns():
    """At most two entries per column; the second column has none."""
    indices = torch.tensor([[0, -1, 1], [2, -1, 0]], dtype=torch.int32)
    values = torch.tensor([[0.5, 0, 0.3], [0.2, 0, 0.1]])
    return TopKPlan(indices, values, 3, 3)


def by_rows():
    indices = torch.tensor([[0, 2], [2, -1], [0, -1]], dtype=torch.int32)
    values = torch.tensor([[0.5, 0.1], [0.3, 0], [0.2, 0]])
    return TopKPlan(indices, values, 3, 3, -1)


@pytest.mark.parametrize("make", [by_columns, by_rows])
def test_every_form_says_the_same(make):
    plan = make()
    assert torch.equal(plan.to_dense(), DENSE)
    assert plan.nnz().item() == 4
    for layout in ("coo", "csc"):
        sparse = plan.to_torch_sparse(layout)
        assert torch.equal(sparse.to_dense(), DENSE) and sparse.values().numel() == 4
    np.testing.assert_array_equal(plan.to_scipy().toarray(), DENSE.numpy())
    assert plan.to_scipy().nnz == 4


def test_batches():
    one = by_columns()
    plan = TopKPlan(one.indices.expand(2, 2, 3), one.values.expand(2, 2, 3), 3, 3)
    assert torch.equal(plan.to_dense(), DENSE.expand(2, 3, 3))
    assert torch.equal(plan.to_torch_sparse().to_dense(), DENSE.expand(2, 3, 3))
    assert plan.nnz().tolist() == [4, 4]


def test_gradient_reaches_the_values():
    one = by_columns()
    values = one.values.clone().requires_grad_()
    TopKPlan(one.indices, values, 3, 3).to_dense().sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))


def test_errors():
    with pytest.raises(ValueError, match="layout: expected"):
        by_columns().to_torch_sparse("csr")
    one = by_columns()
    batch = TopKPlan(one.indices[None], one.values[None], 3, 3)
    with pytest.raises(ValueError, match="csc holds one problem, got a batch"):
        batch.to_torch_sparse("csc")
    with pytest.raises(ValueError, match="expected one problem, got a batch"):
        batch.to_scipy()
