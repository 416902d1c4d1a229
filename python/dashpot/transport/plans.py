"""Transport plans as delivered: the nonzeros of each column, and other libraries' forms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TopKPlan(NamedTuple):
    """Nonzeros of T (..., m, n), at most k along `sparse_dim`.

    indices: int32 (..., k, n), rows of each column, descending values, -1 where there are fewer;
        with sparse_dim=-1 (..., m, k), columns of each row. values: the same shape, 0 there.
    """

    indices: Tensor
    values: Tensor
    m: int
    n: int
    sparse_dim: int = -2

    def to_dense(self) -> Tensor:
        """(..., m, n)."""
        shape = (*self.values.shape[:-2], self.m, self.n)
        empty = self.values.new_zeros(shape)
        return empty.scatter_add(self.sparse_dim, self.indices.clamp(min=0).long(), self.values)

    def nnz(self) -> Tensor:
        """Nonzeros of each problem (...), without a host synchronisation."""
        return (self.values > 0).sum((-2, -1))

    def _entries(self) -> tuple[Tensor, Tensor]:
        """Coordinates (axes, nnz) and values (nnz,), sorted; how many there are synchronises."""
        kept = (self.values > 0).nonzero(as_tuple=True)
        values = self.values[kept]
        found = self.indices[kept].long()
        coordinates = list(kept)
        coordinates[self.sparse_dim] = found
        stacked = torch.stack(coordinates)
        size = (*self.values.shape[:-2], self.m, self.n)
        coo = torch.sparse_coo_tensor(stacked, values, size, check_invariants=False).coalesce()
        return coo.indices(), coo.values()

    def to_torch_sparse(self, layout: str = "coo") -> Tensor:
        """A `torch.sparse` tensor (..., m, n): "coo", or "csc" for one problem. Waits for the
        device, whose count of nonzeros is a shape."""
        if layout not in ("coo", "csc"):
            raise ValueError(f'layout: expected "coo" or "csc", got {layout!r}')
        if layout == "csc" and self.values.dim() != 2:
            raise ValueError(
                f"layout: csc holds one problem, got a batch {tuple(self.values.shape[:-2])}"
            )
        indices, values = self._entries()
        size = (*self.values.shape[:-2], self.m, self.n)
        coo = torch.sparse_coo_tensor(indices, values, size, is_coalesced=True)
        return coo if layout == "coo" else coo.to_sparse_csc()

    def to_scipy(self):
        """A `scipy.sparse.csc_array` (m, n) of one problem, on the host."""
        from scipy import sparse

        (rows, columns), values = self._one_problem()
        entries = (values.cpu().numpy(), (rows.cpu().numpy(), columns.cpu().numpy()))
        return sparse.csc_array(entries, shape=(self.m, self.n))

    def to_cupy(self):
        """A `cupyx.scipy.sparse.csc_matrix` (m, n) of one problem on a GPU, without a copy through
        the host."""
        import cupy
        from cupyx.scipy import sparse

        (rows, columns), values = self._one_problem()
        rows, columns, values = (cupy.from_dlpack(x.contiguous()) for x in (rows, columns, values))
        return sparse.csc_matrix((values, (rows, columns)), shape=(self.m, self.n))

    def _one_problem(self) -> tuple[Tensor, Tensor]:
        if self.values.dim() != 2:
            raise ValueError(f"expected one problem, got a batch {tuple(self.values.shape[:-2])}")
        indices, values = self._entries()
        return indices, values.detach()
