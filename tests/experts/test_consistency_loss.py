"""consistency_loss: two cross entropies and a symmetric KL."""

from __future__ import annotations

import dashpot
import pytest
import torch
from dashpot._measure import peak_memory
from torch.nn import functional

Z1 = [[1, 2, 0.5, -1], [0, 0, 3, 1], [2, -2, 0, 0.5]]
Z2 = [[0.5, 2.5, 0, -0.5], [1, 0, 2, 1], [1, 1, 1, 1]]
Y = [1, 2, -100]


def spec(dtype=torch.float64, device="cpu"):
    pair = (torch.tensor(z, dtype=dtype, device=device, requires_grad=True) for z in (Z1, Z2))
    return *pair, torch.tensor(Y, device=device)


def composed(z1, z2, target, alpha=1.0, smoothing=0.0):
    """The same by torch's losses, in log space."""
    keep = target != -100
    log_p, log_q = z1[keep].log_softmax(-1), z2[keep].log_softmax(-1)
    forth = functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
    back = functional.kl_div(log_p, log_q, log_target=True, reduction="sum")
    ce = sum(
        functional.cross_entropy(z, target, label_smoothing=smoothing, reduction="sum")
        for z in (z1, z2)
    )
    return (ce + alpha / 2 * (forth + back)) / keep.sum()


@pytest.mark.parametrize("gradients", ["backward", "forward"])
def test_vectors(backend64, gradients):
    z1, z2, y = spec(device=backend64.device)
    loss = dashpot.consistency_loss(z1, z2, y, gradients=gradients)
    assert loss.item() == pytest.approx(0.9398210412, abs=1e-10)
    first, second = torch.autograd.grad(loss, (z1, z2))
    want = [0.1773185728, -0.2950705598, 0.1075491509, 0.0102028361]
    assert first[0].tolist() == pytest.approx(want, abs=1e-10)
    want = [0.2031384240, 0.0502768759, -0.3900820180, 0.1366667181]
    assert second[1].tolist() == pytest.approx(want, abs=1e-10)
    assert not first[2].any() and not second[2].any()
    loss = dashpot.consistency_loss(z1, z2, y, alpha=5, label_smoothing=0.1, gradients=gradients)
    assert loss.item() == pytest.approx(1.8725683282, abs=1e-10)
    want = [0.4256772278, -0.6567728740, 0.2532679230, -0.0221722769]
    assert torch.autograd.grad(loss, z1)[0][0].tolist() == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize("gradients", ["backward", "forward"])
@pytest.mark.parametrize(("alpha", "smoothing"), [(1.0, 0.0), (5.0, 0.1), (0.0, 1.0)])
def test_is_cross_entropy_and_kl(backend, alpha, smoothing, gradients):
    z1 = (3 * torch.randn(5, 2100, device=backend.device)).requires_grad_()
    z2 = (z1.detach() + torch.randn(5, 2100, device=backend.device)).requires_grad_()
    y = torch.tensor([5, -100, 0, 2099, 7], device=backend.device)
    got = dashpot.consistency_loss(
        z1, z2, y, alpha=alpha, label_smoothing=smoothing, gradients=gradients
    )
    want = composed(z1, z2, y, alpha, smoothing)
    torch.testing.assert_close(got, want, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(
        torch.autograd.grad(3 * got, (z1, z2)), torch.autograd.grad(3 * want, (z1, z2)),
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip


def test_far_apart(backend):
    """J of a 200-logit gap is 200 - the published probability form gives inf, and NaN where both
    passes underflow the same class."""
    z1 = torch.tensor([[200.0, 0, -150]], device=backend.device, requires_grad=True)
    z2 = torch.tensor([[0.0, 200, -150]], device=backend.device, requires_grad=True)
    y = torch.tensor([0], device=backend.device)
    p, q = z1.detach().softmax(1), z2.detach().softmax(1)
    assert not ((p - q) * (p.log() - q.log())).sum().isfinite()
    loss = dashpot.consistency_loss(z1, z2, y)
    assert loss.item() == pytest.approx(200 + 200)  # CE2 and J
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (z1, z2)))


def test_masked_classes(backend):
    """-inf in both passes: no probability, no gradient."""
    z1, z2, y = spec(torch.float32, backend.device)
    wide = [
        torch.cat([z.detach(), z.new_full((3, 2), -torch.inf)], 1).requires_grad_()
        for z in (z1, z2)
    ]
    loss = dashpot.consistency_loss(*wide, y)
    torch.testing.assert_close(loss, dashpot.consistency_loss(z1, z2, y))
    for got, want in zip(
        torch.autograd.grad(loss, wide),
        torch.autograd.grad(dashpot.consistency_loss(z1, z2, y), (z1, z2)),
        strict=True,
    ):
        torch.testing.assert_close(got[:, :4], want)
        assert not got[:, 4:].any()


def test_shift_and_row_sums(backend):
    """Unmoved by a constant on a row of one pass; a row's gradients sum to zero."""
    z1, z2, y = spec(torch.float32, backend.device)
    moved = dashpot.consistency_loss(z1 + 40, z2 - 30, y)
    torch.testing.assert_close(moved, dashpot.consistency_loss(z1, z2, y), rtol=1e-5, atol=1e-5)
    for grad in torch.autograd.grad(dashpot.consistency_loss(z1, z2, y), (z1, z2)):
        torch.testing.assert_close(
            grad.sum(1), torch.zeros(3, device=grad.device), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("gradients", ["backward", "forward"])
def test_reductions_and_shapes(backend, gradients):
    z1, z2, y = spec(torch.float32, backend.device)
    z1, z2, y = z1.detach().reshape(3, 1, 4), z2.detach().reshape(3, 1, 4), y.reshape(3, 1)
    z1.requires_grad_()
    each = dashpot.consistency_loss(z1, z2, y.int(), reduction="none", gradients=gradients)
    assert each.shape == (3, 1) and each[2].item() == 0
    total = dashpot.consistency_loss(z1, z2, y, reduction="sum")
    torch.testing.assert_close(each.sum(), total)
    torch.testing.assert_close(total / 2, dashpot.consistency_loss(z1, z2, y))
    weights = torch.tensor([[1.0], [0], [2]], device=backend.device)
    (grad,) = torch.autograd.grad((each * weights).sum(), z1)
    assert grad[0].any() and not grad[1:].any()


def test_no_row_counts(backend):
    z1, z2, y = spec(torch.float32, backend.device)
    loss = dashpot.consistency_loss(z1, z2, torch.full_like(y, 7), ignore_index=7)
    loss.backward()
    assert loss.item() == 0 and not z1.grad.any() and not z2.grad.any()


def test_nan_shows(backend):
    z1, z2, y = spec(torch.float32, backend.device)
    bad = z1.detach().clone()
    bad[1, 3] = torch.nan
    assert dashpot.consistency_loss(bad, z2, y).isnan()
    bad[1, 3], bad[2, 0] = 1, torch.nan  # an ignored row
    assert dashpot.consistency_loss(bad, z2, y).isfinite()


@pytest.mark.backends("cpp")
def test_memory(backend):
    """Beyond the logits and their gradients: four numbers a row, far below one copy of a logits
    tensor. Extra: the most allocated at one time in forward and backward, less both gradients."""
    m, classes = 16, 4096
    z1, z2 = (torch.randn(m, classes, requires_grad=True) for _ in "12")
    y = torch.randint(0, classes, (m,))

    def step(z1, z2):
        with torch.enable_grad():
            return torch.autograd.grad(dashpot.consistency_loss(z1, z2, y), (z1, z2))

    one = m * classes * 4
    assert peak_memory(step, (z1, z2), "cpu") - 2 * one < 0.05 * one


@pytest.mark.backends("native")
def test_offsets_beyond_32_bits(backend, lazy):
    """Elements beyond 2^31, bytes beyond 2^32; only the last row counts, and is read."""
    rows, classes = (1 << 15) + 2, 1 << 16
    y = torch.full((rows,), -100, device=backend.device)
    y[-1] = 7
    z1, z2 = (lazy(rows, classes, device=backend.device) for _ in "12")
    z1[-1, 7], z2[-1, -1] = 9, 8
    got = dashpot.consistency_loss(z1, z2, y)
    want = dashpot.consistency_loss(z1[-1:].double(), z2[-1:].double(), y[-1:])
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.backends("cpp")
@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_class_out_of_range(backend, bad):
    z1, z2, y = spec()
    y[0] = bad
    with pytest.raises(ValueError, match=f"target: expected classes in .0, 4. or .*, got {bad}"):
        dashpot.consistency_loss(z1, z2, y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [({"logits2": torch.ones(3, 5)}, ValueError, r"logits2: expected \(3, 4\), got \(3, 5\)"),
     ({"logits2": torch.ones(3, 4).double()}, TypeError, "logits2: expected torch.float32, got"),
     ({"logits1": torch.ones(3, 0)}, ValueError, r"logits1: expected \(..., V\), V >= 1"),
     ({"target": torch.zeros(2).long()}, ValueError, r"target: expected \(3,\) on cpu, got \(2,\)"),
     ({"target": torch.zeros(3)}, TypeError, "target: expected int64 or int32, got torch.float32"),
     ({"alpha": -1}, ValueError, "alpha: expected a number from 0 to inf, got -1"),
     ({"alpha": torch.tensor(1.0)}, TypeError, "alpha: expected a float, got Tensor"),
     ({"label_smoothing": 1.5}, ValueError, "label_smoothing: expected a number from 0 to 1.0"),
     ({"reduction": "batchmean"}, ValueError, "reduction: expected one of mean, sum, none"),
     ({"gradients": "early"}, ValueError, "gradients: expected one of backward, forward"),
     ({"ignore_index": None}, TypeError, "ignore_index: expected an int, got NoneType")],
)  # fmt: skip
def test_errors(change, error, message):
    z1, z2, y = spec(torch.float32)
    kwargs = {"logits1": z1, "logits2": z2, "target": y, **change}
    with pytest.raises(error, match=message):
        dashpot.consistency_loss(**kwargs)
