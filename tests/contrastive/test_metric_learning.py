"""pytorch-metric-learning's names: its values and gradients where covered, errors elsewhere."""

from __future__ import annotations

import pytest
import torch
from dashpot.contrastive.metric_learning import NTXentLoss, SupConLoss

LOSSES = "pytorch_metric_learning.losses"


def agree(ours, theirs, leaves):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (ours, theirs)]
    assert all(bool(grad.any()) for grad in grads[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-8, atol=1e-11)


@pytest.mark.peers
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_nt_xent_of_two_views(peers, views, temperature):
    """Labels in any order, of both signs."""
    z1, z2 = views(35, 9)
    rows = torch.cat([z1, z2])[torch.randperm(70, generator=torch.Generator().manual_seed(0))]
    labels = torch.arange(35).repeat(2)[
        torch.randperm(70, generator=torch.Generator().manual_seed(0))
    ] * 3 - 20  # fmt: skip
    peer = peers.load(LOSSES).NTXentLoss(temperature=temperature)
    agree(NTXentLoss(temperature)(rows, labels), peer(rows, labels), (z1, z2))


@pytest.mark.peers
def test_nt_xent_with_references(peers, views):
    z1, z2 = views(20, 9)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    labels, ref_labels = torch.arange(20)[:12], torch.arange(20)[order]
    call = z1[:12], labels, None, z2[order], ref_labels
    agree(NTXentLoss()(*call), peers.load(LOSSES).NTXentLoss()(*call), (z1, z2))


@pytest.mark.peers
def test_nt_xent_of_one_pair(peers, views):
    """Without negatives: 0, as there."""
    z1, z2 = views(1, 5)
    rows, labels = torch.cat([z1, z2]), torch.zeros(2, dtype=torch.int64)
    loss = NTXentLoss()(rows, labels)
    assert peers.load(LOSSES).NTXentLoss()(rows, labels).item() == 0
    assert abs(loss.item()) < 1e-13
    assert torch.autograd.grad(loss, z1)[0].abs().max() < 1e-13


@pytest.mark.peers
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_supcon(peers, views, temperature):
    """Some labels stand alone."""
    rows, _ = views(50, 7)
    labels = torch.randint(0, 20, (50,), generator=torch.Generator().manual_seed(2))
    assert (labels.bincount() == 1).any()
    module = peers.load("pytorch_metric_learning.distances").CosineSimilarity
    peer = peers.load(LOSSES).SupConLoss(temperature=temperature, distance=module())
    agree(SupConLoss(temperature, distance=module())(rows, labels), peer(rows, labels), rows)


@pytest.mark.peers
def test_supcon_of_one_label_and_of_none_alike(peers, views):
    rows, _ = views(6, 4)
    for labels in (torch.zeros(6, dtype=torch.int64), torch.arange(6)):
        loss = SupConLoss()(rows, labels)
        assert loss.item() == float(peers.load(LOSSES).SupConLoss()(rows.detach(), labels)) == 0
        assert not torch.autograd.grad(loss, rows)[0].any()


class MeanReducer:
    pass


Z, Y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
BAD = [
    (lambda: NTXentLoss(distance=MeanReducer()), r"distance: .*CosineSimilarity.*MeanReducer"),
    (lambda: SupConLoss(reducer=MeanReducer()), r"reducer: expected None, got MeanReducer"),
    (lambda: SupConLoss(embedding_regularizer=MeanReducer()), r"embedding_regularizer: .*None"),
    (lambda: SupConLoss(collect_stats=True), r"collect_stats: expected False, got True"),
    (lambda: SupConLoss(temperature=0.0), r"temperature: .*got 0"),
    (lambda: NTXentLoss()(Z, Y, (Y, Y, Y)), r"indices_tuple: expected None, got tuple"),
    (lambda: NTXentLoss()(Z, Y[:2]), r"labels: expected \(4,\).*got \(2,\)"),
    (lambda: NTXentLoss()(Z, torch.zeros_like(Y)), r"labels: .*exactly two rows"),
    (lambda: NTXentLoss()(Z[:3], Y[:3]), r"labels: .*exactly two rows"),
    (lambda: NTXentLoss()(Z, Y, ref_emb=Z), r"ref_labels: .*together with ref_emb"),
    (lambda: NTXentLoss()(Z, Y, None, Z, Y), r"ref_labels: .*exactly one row"),
    (lambda: SupConLoss()(Z, Y, None, Z, Y), r"ref_emb: expected None, got a tensor"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[bad[1] for bad in BAD])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_labels_are_needed():
    with pytest.raises(TypeError, match=r"labels: .*Tensor.*NoneType"):
        SupConLoss()(Z)
    assert "temperature=0.1" in repr(SupConLoss()) and "0.07" in repr(NTXentLoss())
