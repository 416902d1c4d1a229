"""`TopKPlan`: the forms that a plan is delivered in."""

import sys
import types

import numpy as np
import pytest
import torch
from dashpot.transport import TopKPlan
from scipy import sparse

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


@pytest.mark.parametrize("make", [by_columns, by_rows])
def test_what_cupy_is_handed(make, monkeypatch):
    """A stand-in of CuPy, for there is no GPU here: `from_dlpack` takes an object with
    `__dlpack__` without a copy, and csc_matrix((data, (row, col)), shape=) is SciPy's signature."""
    handed = []

    def from_dlpack(tensor):
        assert tensor.is_contiguous() and not tensor.requires_grad
        array = np.from_dlpack(tensor)
        assert array.ctypes.data == tensor.data_ptr()
        handed.append(array)
        return array

    def csc_matrix(entries, *, shape):
        values, (rows, columns) = entries
        assert any(values is array for array in handed) and rows.dtype == columns.dtype == np.int64
        return sparse.csc_matrix((values, (rows, columns)), shape=shape)

    cupyx = types.ModuleType("cupyx.scipy")
    cupyx.sparse = types.SimpleNamespace(csc_matrix=csc_matrix)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(from_dlpack=from_dlpack))
    monkeypatch.setitem(sys.modules, "cupyx", types.ModuleType("cupyx"))
    monkeypatch.setitem(sys.modules, "cupyx.scipy", cupyx)
    plan = make()
    plan = plan._replace(values=plan.values.clone().requires_grad_())  # leaves its graph behind
    matrix = plan.to_cupy()
    assert len(handed) == 3 and matrix.format == "csc"
    assert matrix.shape == (3, 3) and matrix.nnz == 4 and matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix.toarray(), DENSE.numpy())


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
