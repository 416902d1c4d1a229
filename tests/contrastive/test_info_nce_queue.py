"""info_nce_queue: a key of its own for each query, and negatives for all."""

from __future__ import annotations

import dashpot
import pytest
import torch
from torch.nn import functional


def test_vector(backend64, spec_views):
    query, key = spec_views(backend64.device)
    queue = torch.tensor([[1, 1, 1], [0, -1, 2]], dtype=torch.float64, device=query.device)
    loss = dashpot.info_nce_queue(query, key, queue, temperature=0.1)
    assert loss.item() == pytest.approx(0.38556915547625037, abs=1e-14)
    grad = torch.autograd.grad(loss, query)[0]
    want = [-0.0629595125, -0.0809835535, 0.0314797562]
    assert grad[0].tolist() == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_against_cross_entropy(backend64, views, normalize, temperature):
    query, key = views(70, 9, device=backend64.device)
    queue = views(131, 9, 1, device=backend64.device)[0].detach()
    got = dashpot.info_nce_queue(query, key, queue, temperature=temperature, normalize=normalize)
    u, v, n = (functional.normalize(z) if normalize else z for z in (query, key, queue))
    logits = torch.cat([(u * v).sum(1, keepdim=True), u @ n.T], 1) / temperature
    want = functional.cross_entropy(logits, torch.zeros_like(logits[:, 0]).long())
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, (query, key)), torch.autograd.grad(want, (query, key)),
        rtol=1e-6, atol=1e-10,
    )  # fmt: skip


def test_the_queue_has_no_gradient(backend, views):
    query, key = views(4, 5, dtype=torch.float32, device=backend.device)
    queue = views(6, 5, 1, dtype=torch.float32, device=backend.device)[0]
    dashpot.info_nce_queue(query, key, queue).backward()
    assert queue.grad is None and query.grad.any() and key.grad.any()


def test_empty(backend, views):
    """Without negatives the loss is 0; without rows too."""
    query, key = views(4, 5, dtype=torch.float32, device=backend.device)
    none = query.detach()[:0]
    loss = dashpot.info_nce_queue(query, key, none)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert torch.autograd.grad(loss, query)[0].abs().max() < 1e-3
    assert dashpot.info_nce_queue(none, none, key).item() == 0


Z = torch.ones(3, 4)
BAD = [
    (lambda: dashpot.info_nce_queue(None, Z, Z), TypeError, r"query: .*Tensor.*NoneType"),
    (lambda: dashpot.info_nce_queue(Z, Z[:2], Z), ValueError, r"key: .*\(3, 4\).*got \(2, 4\)"),
    (lambda: dashpot.info_nce_queue(Z, Z, Z[:, :2]), ValueError, r"queue: .*\(N, 4\).*\(3, 2\)"),
    (lambda: dashpot.info_nce_queue(Z, Z, Z.half()), ValueError, r"queue: .*float32.*float16"),
    (lambda: dashpot.info_nce_queue(Z, Z, Z, temperature=-1), ValueError, r"temperature: .*-1"),
    (lambda: dashpot.info_nce_queue(Z, Z, Z, normalize=0), TypeError, r"normalize: .*bool"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[bad[2] for bad in BAD])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
