"""router_z_loss: mean of squared log-sum-exps."""

from __future__ import annotations

import dashpot
import pytest
import torch

LOGITS = [[1, 2, 0.5], [0, -1, 1.5], [2, 2.5, -0.5], [0.3, 0.2, 0.1]]


def test_vector(backend):
    loss = dashpot.router_z_loss(torch.tensor(LOGITS, device=backend.device))
    assert loss.item() == pytest.approx(4.9789566968, rel=1e-6)


def test_far_from_zero(backend):
    """No exponential overflows; the gradient is (2/T) lse p."""
    logits = torch.tensor([[900.0, 899.0], [-900, -950]], device=backend.device, requires_grad=True)
    loss = dashpot.router_z_loss(logits)
    loss.backward()
    lse = logits.detach().logsumexp(1)
    torch.testing.assert_close(loss, lse.square().mean())
    torch.testing.assert_close(
        logits.grad, lse[:, None] * logits.detach().softmax(1), rtol=1e-4, atol=0
    )


def test_no_token(backend):
    logits = torch.empty(0, 3, device=backend.device, requires_grad=True)
    loss = dashpot.router_z_loss(logits)
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, 3)


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [(torch.ones(3), ValueError, r"logits: expected \(T, E\), E >= 1, got \(3,\)"),
     (None, TypeError, "logits: expected a torch.Tensor, got NoneType")],
)  # fmt: skip
def test_errors(logits, error, message):
    with pytest.raises(error, match=message):
        dashpot.router_z_loss(logits)
