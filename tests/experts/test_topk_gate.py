"""topk_gate: the k most probable experts and their weights."""

from __future__ import annotations

import dashpot
import pytest
import torch

LOGITS = [[1, 2, 0.5], [0, -1, 1.5], [2, 2.5, -0.5], [0.3, 0.2, 0.1]]


def test_vector(backend):
    logits = torch.tensor(LOGITS, device=backend.device)
    idx, weights = dashpot.topk_gate(logits, 2, normalize=True)
    assert idx.dtype == torch.int32 and weights.dtype == torch.float32
    assert idx.tolist() == [[1, 0], [2, 0], [1, 0], [0, 1]]
    want = torch.tensor([0.5249791875, 0.4750208125])
    torch.testing.assert_close(weights[3].cpu(), want)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("experts", "k"), [(9, 3), (64, 64), (1, 1)])
def test_is_softmax_then_topk(backend, experts, k, normalize):
    """Both orders of Hugging Face's models: softmax, top-k, divide = top-k, softmax."""
    logits = torch.randn(300, experts, device=backend.device)
    idx, weights = dashpot.topk_gate(logits, k, normalize=normalize)
    values, want = logits.softmax(1).topk(k)
    assert torch.equal(idx.long(), want)
    torch.testing.assert_close(
        weights, values / values.sum(1, keepdim=True) if normalize else values
    )
    if normalize:
        torch.testing.assert_close(weights, logits.topk(k).values.softmax(1))


def test_ties_masks_and_nan(backend):
    """Ties to the lower id, also among experts masked with -inf; NaN shows in the weights."""
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [[1, 1, 1, 1], [-inf, 2, -inf, -inf], [0, 3, 0, 3], [0, nan, 5, 1]], device=backend.device
    )
    idx, weights = dashpot.topk_gate(logits, 3)
    assert idx.tolist() == [[0, 1, 2], [1, 0, 2], [1, 3, 0], [1, 2, 3]]
    assert weights[1].tolist() == [1, 0, 0] and weights[3].isnan().all()


def test_float16_ties_are_those_of_the_values(backend):
    logits = torch.tensor([[1.0, 1.0001, 0.9999]]).half().to(backend.device)
    assert dashpot.topk_gate(logits, 2)[0].tolist() == [[0, 1]]


def test_far_apart_logits(backend):
    """A renormalised weight is never 0/0."""
    logits = torch.tensor([[500.0, -500, -400]], device=backend.device)
    assert dashpot.topk_gate(logits, 2, normalize=True)[1].tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [((torch.ones(3), 1), ValueError, r"logits: expected \(T, E\), E >= 1, got \(3,\)"),
     ((torch.ones(3, 0), 1), ValueError, r"logits: expected \(T, E\), E >= 1, got \(3, 0\)"),
     ((torch.ones(3, 2), 3), ValueError, "k: expected 1 <= k <= 2, got 3"),
     ((torch.ones(3, 2), True), TypeError, "k: expected an int, got bool"),
     ((torch.ones(3, 2).int(), 1), TypeError, "logits: expected float64, float32")],
)  # fmt: skip
def test_errors(args, error, message):
    with pytest.raises(error, match=message):
        dashpot.topk_gate(*args)
