"""tcm_loss: hard pairs beyond a margin, positives and negatives averaged separately."""

from __future__ import annotations

import dashpot
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from bench import peers

E6 = [[1, 0, 0.5], [0.8, 0.6, 0], [0, 1, 0.3], [0.5, 0.9, -0.2], [0.2, 0.1, 1], [-0.3, 0.4, 0.9]]
Y6 = [0, 0, 1, 1, 2, 2]


def batch(n, d, classes, seed=0, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return rows.to(device, dtype), torch.randint(-1, classes - 1, (n,), generator=generator).to(
        device
    )


def by_pairs(u, y, v, ref, self_pairs, m_pos=0.9, m_neg=0.5, w_pos=1.0, w_neg=1.0):
    """The definition, pair by pair, in float64."""
    pos, neg = [], []
    s = u @ v.mT
    for i in range(len(u)):
        for j in range(len(v)):
            if y[i] == ref[j] and (self_pairs or i != j) and s[i, j] <= m_pos:
                pos.append(m_pos - s[i, j])
            if y[i] != ref[j] and s[i, j] >= m_neg:
                neg.append(s[i, j] - m_neg)
    loss = s.sum() * 0
    loss = loss + w_pos * torch.stack(pos).mean() if pos else loss
    return (loss + w_neg * torch.stack(neg).mean() if neg else loss), (len(pos), len(neg))


# --------------------------------------------------------------------------------------------
# The specification's vectors


@pytest.mark.parametrize(
    ("options", "value", "counts", "row", "grad"),
    [
        ({}, 0.3040507557276527, (6, 8), 0, [-0.126261224, -0.1570636492, 0.252522448]),
        ({"margin_pos": 0.95, "margin_neg": 0.2, "weight_pos": 0.5, "weight_neg": 2.0},
         0.7274352866399866, (6, 14), 5, [-0.0205388572, 0.2352658769, -0.1114088977]),
    ],
)  # fmt: skip
def test_vectors(backend64, options, value, counts, row, grad):
    e = torch.tensor(E6, dtype=torch.float64, device=backend64.device, requires_grad=True)
    y = torch.tensor(Y6, device=e.device)
    loss, stats = dashpot.tcm_loss(e, y, return_stats=True, **options)
    assert loss.item() == pytest.approx(value, abs=1e-14)
    assert (stats.pairs_pos.item(), stats.pairs_neg.item()) == counts
    (got,) = torch.autograd.grad(loss, e)
    want = torch.tensor(grad, dtype=torch.float64)
    torch.testing.assert_close(got[row].cpu(), want, rtol=0, atol=1e-10)


def test_vectors_with_references(backend64):
    e = torch.tensor(E6, dtype=torch.float64, device=backend64.device)
    y = torch.tensor(Y6, device=e.device)
    loss = dashpot.tcm_loss(e[:2], y[:2], e[2:], y[2:])
    assert loss.item() == pytest.approx(0.19398689922810872, abs=1e-14)
    loss = dashpot.tcm_loss(e[:2], y[:2], e[2:], y[2:], margin_neg=0.3)
    assert loss.item() == pytest.approx(0.30577046096332566, abs=1e-14)


def test_vector_of_four_rows(backend64):
    e = torch.tensor([[0, 1], [0.43, 0.9], [1, 0], [0.5, 0.5]], dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 1], device=backend64.device)
    loss = dashpot.tcm_loss(e.to(y.device), y)
    assert loss.item() == pytest.approx(0.5178763012667884, abs=1e-14)


# --------------------------------------------------------------------------------------------
# Against the definition and the peer


@given(n=st.integers(1, 80), classes=st.integers(1, 9), seed=st.integers(0, 99),
       refs=st.integers(0, 70))  # fmt: skip
def test_definition(backend64, n, classes, seed, refs):
    rows, y = batch(n, 5, classes, seed, device=backend64.device)
    ref, ref_y = (
        batch(refs, 5, classes, seed + 1, device=backend64.device) if refs else (None, None)
    )
    leaf = rows.clone().requires_grad_()
    other = ref.clone().requires_grad_() if refs else None
    options = {"margin_neg": 0.1, "weight_pos": 0.7, "weight_neg": 1.3}
    loss, stats = dashpot.tcm_loss(leaf, y, other, ref_y, return_stats=True, **options)
    u = normalize(leaf, dim=1)
    v = normalize(other, dim=1) if refs else u
    want, counts = by_pairs(u, y, v, ref_y if refs else y, bool(refs), 0.9, 0.1, 0.7, 1.3)
    assert (stats.pairs_pos.item(), stats.pairs_neg.item()) == counts
    torch.testing.assert_close(loss, want, rtol=1e-11, atol=1e-14)
    leaves = [leaf, other] if refs else [leaf]
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), rtol=1e-9, atol=1e-12
    )


@pytest.mark.peers
@given(seed=st.integers(0, 99))
def test_pytorch_metric_learning(seed):
    peer = peers.load("pytorch_metric_learning.losses").ThresholdConsistentMarginLoss
    options = {"lambda_plus": 0.5, "margin_minus": 0.2}
    rows, y = batch(40, 6, 5, seed)
    leaf = rows.requires_grad_()
    want = peer(**options)(leaf, y)
    loss = dashpot.contrastive.ThresholdConsistentMarginLoss(**options)(leaf, y)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf), torch.autograd.grad(want, leaf))


def test_module_adds_its_base_loss(backend64):
    rows, y = batch(30, 5, 4, device=backend64.device)
    base = dashpot.contrastive.SupConLoss(0.2)
    module = dashpot.contrastive.ThresholdConsistentMarginLoss(base_loss=base)
    torch.testing.assert_close(module(rows, y), dashpot.tcm_loss(rows, y) + base(rows, y))
    assert base in list(module.children()) and "margin_minus=0.5" in repr(module)
    alone = dashpot.contrastive.ThresholdConsistentMarginLoss()
    ref, ref_y = batch(9, 5, 4, 1, device=rows.device)
    assert torch.equal(alone(rows, y, ref, ref_y), dashpot.tcm_loss(rows, y, ref, ref_y))


# --------------------------------------------------------------------------------------------
# Properties and edges


@given(seed=st.integers(0, 99))
def test_invariants(backend64, seed):
    """Scale and order of the rows do not matter; the value keeps its bounds."""
    rows, y = batch(66, 5, 6, seed, device=backend64.device)
    loss = dashpot.tcm_loss(rows, y)
    scale = torch.rand(66, 1, dtype=rows.dtype, device=rows.device) + 0.1
    torch.testing.assert_close(dashpot.tcm_loss(rows * scale, y), loss)
    order = torch.randperm(66)
    torch.testing.assert_close(dashpot.tcm_loss(rows[order], y[order]), loss)
    assert 0 <= loss <= (1 + 0.9) + (1 - 0.5)
    leaf = rows.clone().requires_grad_()
    (grad,) = torch.autograd.grad(dashpot.tcm_loss(leaf, y), leaf)
    assert (grad * rows).sum(1).abs().max() < 1e-14


def test_pairs_on_a_margin_count(backend64):
    """They add 0 to the sum and 1 to the count."""
    e = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]], dtype=torch.float64)
    y = torch.tensor([0, 0, 0, 1], device=backend64.device)
    loss, stats = dashpot.tcm_loss(
        e.to(y.device), y, margin_pos=1.0, margin_neg=1.0, return_stats=True
    )
    assert stats.pairs_pos.item() == 6 and stats.pairs_neg.item() == 2
    assert loss.item() == pytest.approx(4 / 6)


@pytest.mark.parametrize("kind", ["one row", "one class, equal rows", "distinct, orthogonal"])
def test_nothing_hard(backend, kind):
    """0, attached to the graph, with zero gradient."""
    rows = torch.eye(4, device=backend.device)
    y = torch.arange(4, device=backend.device)
    if kind == "one row":
        rows, y = rows[:1], y[:1]
    elif kind == "one class, equal rows":
        rows, y = torch.ones(4, 3, device=backend.device), 0 * y
    rows = rows.requires_grad_()
    loss = dashpot.tcm_loss(rows, y)
    assert loss.item() == 0
    (grad,) = torch.autograd.grad(loss, rows)
    assert torch.equal(grad, torch.zeros_like(rows))


def test_zero_duplicated_and_antipodal_rows(backend64):
    rows, y = batch(72, 4, 5, device=backend64.device)
    rows[3], rows[1::4], rows[2::4] = 0, rows[0::4], -rows[0::4]
    loss = dashpot.tcm_loss(rows, y)
    u = normalize(rows, dim=1)
    want, _ = by_pairs(u, y, u, y, False)
    torch.testing.assert_close(loss, want)
    leaf = rows.clone().requires_grad_()
    assert torch.autograd.grad(dashpot.tcm_loss(leaf, y), leaf)[0].isfinite().all()


def test_nan_shows(backend):
    rows, y = batch(70, 4, 5, dtype=torch.float32, device=backend.device)
    rows[65, 1] = torch.nan
    assert dashpot.tcm_loss(rows, y).isnan()


def test_bfloat16(backend):
    rows, y = batch(100, 16, 6, dtype=torch.bfloat16, device=backend.device)
    loss = dashpot.tcm_loss(rows, y, margin_neg=0.1)
    with dashpot.backend("reference"):
        want = dashpot.tcm_loss(rows.double(), y, margin_neg=0.1)
    assert loss.item() == pytest.approx(want.item(), rel=2e-2)


def test_memory(resident_growth):
    """Forward and backward of 8192 rows: a tenth of two N x N matrices; the peer's list of pairs
    would take 69 GB at half as many."""
    growth = resident_growth(
        "z = torch.randn(8192, 128, requires_grad=True)",
        "labels = torch.randint(0, 200, (8192,))",
        step="dashpot.tcm_loss(z, labels, margin_neg=0.1).backward()",
    )
    assert 0 < growth < 2 * 8192**2 * 4 / 10


# --------------------------------------------------------------------------------------------
# Several processes


def across(rank: int, ranks: int, store: str, queue) -> None:
    """One rank: its part of the batch, and the gradient of a shared weight averaged as by DDP."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    results = {}
    for case, (n, classes, m_neg) in enumerate([(24, 5, 0.1), (8, 1, 0.5), (132, 12, 0.3)]):
        rows, y = batch(n, 6, classes, case)
        mine = slice(rank * n // ranks, (rank + 1) * n // ranks)
        weight = torch.linspace(0.5, 1.5, 6, dtype=torch.float64, requires_grad=True)
        loss, stats = dashpot.tcm_loss(
            rows[mine] * weight, y[mine], margin_neg=m_neg, group=dist.group.WORLD,
            return_stats=True,
        )  # fmt: skip
        loss.backward()
        dist.all_reduce(weight.grad)
        results[case] = (loss.item(), stats.pairs_pos.item(), stats.pairs_neg.item(),
                         (weight.grad / ranks).tolist())  # fmt: skip
    queue.put((rank, results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_processes_are_one(tmp_path, ranks):
    """Loss, counts and averaged gradients of the ranks are those of the whole batch at once."""
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(across, (ranks, str(tmp_path / "store"), queue), nprocs=ranks)
    found = dict(queue.get() for _ in range(ranks))
    for case, (n, classes, m_neg) in enumerate([(24, 5, 0.1), (8, 1, 0.5), (132, 12, 0.3)]):
        rows, y = batch(n, 6, classes, case)
        weight = torch.linspace(0.5, 1.5, 6, dtype=torch.float64, requires_grad=True)
        loss, stats = dashpot.tcm_loss(rows * weight, y, margin_neg=m_neg, return_stats=True)
        loss.backward()
        for rank in range(ranks):
            value, pos, neg, grad = found[rank][case]
            assert (pos, neg) == (stats.pairs_pos.item(), stats.pairs_neg.item())
            assert value == pytest.approx(loss.item(), rel=1e-12)
            assert grad == pytest.approx(weight.grad.tolist(), rel=1e-9, abs=1e-12)


# --------------------------------------------------------------------------------------------
# Errors


Z, Y = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)
MODULE = dashpot.contrastive.ThresholdConsistentMarginLoss
BAD = [
    (lambda: dashpot.tcm_loss(Z[0], Y), ValueError, r"embeddings: .*got \(3,\)"),
    (lambda: dashpot.tcm_loss(Z, Y[:3]), ValueError, r"labels: expected \(4,\).*got \(3,\)"),
    (lambda: dashpot.tcm_loss(Z, Y, Z), ValueError, r"ref_labels: expected together"),
    (lambda: dashpot.tcm_loss(Z, Y, Z[:, :2], Y), ValueError, r"ref_embeddings: .*got \(4, 2\)"),
    (lambda: dashpot.tcm_loss(Z, Y, Z, Y[:1]), ValueError, r"ref_labels: expected \(4,\)"),
    (lambda: dashpot.tcm_loss(Z, Y, margin_pos=torch.inf), ValueError, r"margin_pos: .*got inf"),
    (lambda: dashpot.tcm_loss(Z, Y, weight_neg="1"), TypeError, r"weight_neg: .*got str"),
    (lambda: dashpot.tcm_loss(Z, Y, return_stats=1), TypeError, r"return_stats: .*got int"),
    (lambda: dashpot.tcm_loss(Z, Y, Z, Y, group=7), ValueError, r"group: expected None with ref"),
    (lambda: MODULE(base_loss=3), TypeError, r"base_loss: expected a callable, got int"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[bad[2] for bad in BAD])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
