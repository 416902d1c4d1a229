"""load_balancing_loss: E sum f P, 1 at its minimum."""

from __future__ import annotations

import dashpot
import pytest
import torch

LOGITS = [[1, 2, 0.5], [0, -1, 1.5], [2, 2.5, -0.5], [0.3, 0.2, 0.1]]
IDS = [[1, 0], [2, 0], [1, 0], [0, 1]]


@pytest.mark.parametrize(("k", "want"), [(1, 1.0551366792), (2, 0.9995056997)])
def test_vector(backend, k, want):
    logits = torch.tensor(LOGITS, device=backend.device)
    ids = torch.tensor(IDS, device=backend.device)[:, :k]
    assert dashpot.load_balancing_loss(logits, ids).item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("experts", [1, 4, 33])
def test_even_load_is_one(backend, experts):
    ids = torch.arange(experts * 3, device=backend.device) % experts
    logits = torch.zeros(experts * 3, experts, device=backend.device)
    assert dashpot.load_balancing_loss(logits, ids).item() == pytest.approx(1, rel=1e-6)


def test_unrouted_choices_count_in_the_denominator_alone(backend):
    logits = torch.randn(6, 4, device=backend.device)
    ids = torch.tensor([0, 1, 2, 3, -1, 9], device=backend.device)
    want = (logits.softmax(1).mean(0) / 6).sum() * 4
    torch.testing.assert_close(dashpot.load_balancing_loss(logits, ids), want)


def test_bfloat16_logits_give_float32(backend):
    logits = torch.randn(50, 4, device=backend.device).bfloat16().requires_grad_()
    ids = torch.zeros(50, dtype=torch.int32, device=backend.device)
    loss = dashpot.load_balancing_loss(logits, ids)
    loss.backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16


def test_no_token(backend):
    logits = torch.empty(0, 3, device=backend.device, requires_grad=True)
    loss = dashpot.load_balancing_loss(
        logits, torch.empty(0, dtype=torch.int32, device=logits.device)
    )
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, 3)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [(torch.zeros(3).int(), ValueError, "expert_idx: expected 4 tokens as logits, got 3"),
     (torch.zeros(4), TypeError, "expert_idx: expected int32 or int64, got torch.float32"),
     ([0] * 4, TypeError, "expert_idx: expected a torch.Tensor, got list")],
)  # fmt: skip
def test_errors(ids, error, message):
    with pytest.raises(error, match=message):
        dashpot.load_balancing_loss(torch.ones(4, 2), ids)
