"""hard_pair_mixup: rows, random mixtures, hard mixtures; soft labels and integer groups."""

from __future__ import annotations

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

F5 = torch.tensor([[1, 2, 0], [2, 1, 1], [0, 1, 3], [1, 0, 1], [3, 1, 0]], dtype=torch.float64)
Y5 = torch.tensor([0, 1, 0, 1, 0])
GIVEN = {
    "perm": torch.tensor([1, 0, 3, 4, 2]),
    "lam_neg": torch.tensor([0.1, 0.9, 0.85, 0.3, 0.5], dtype=torch.float64),
    "lam_pos": torch.tensor([0.2, 0.7, 0.5, 0.9, 0.4], dtype=torch.float64),
}


def given_on(device) -> dict:
    return {name: value.to(device) for name, value in GIVEN.items()}


def random_call(b, d, seed, device="cpu", dtype=torch.float64):
    """Arguments of the public function with everything given."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(b, d, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (b,), generator=generator)
    draws = {
        "perm": torch.randperm(b, generator=generator),
        "lam_neg": torch.rand(b, generator=generator, dtype=torch.float64),
        "lam_pos": torch.rand(b, generator=generator, dtype=torch.float64),
        "indices": tuple(torch.randint(0, b, (2, b), generator=generator).unbind(0)),
    }
    draws["indices"] = tuple(one.to(device) for one in draws["indices"])
    for name in ("perm", "lam_neg", "lam_pos"):
        draws[name] = draws[name].to(device)
    return features.to(device, dtype), labels.to(device), 4, draws


def test_vectors(backend64):
    f, y = F5.to(backend64.device), Y5.to(backend64.device)
    mixed, soft, groups = dashpot.hard_pair_mixup(f, y, 2, **given_on(f.device))
    want = torch.tensor([[1.8, 1.2, 0.8], [0.85, 0.15, 1.3], [0.6, 1, 2.4], [2, 0.5, 0.5]])
    torch.testing.assert_close(mixed[[5, 7, 9, 12]].cpu(), want.double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(soft[7].cpu(), torch.tensor([0.15, 0.85], dtype=torch.float64))
    assert torch.equal(mixed[:5], f) and soft[:5].argmax(1).tolist() == Y5.tolist()
    loss = dashpot.focal_supcon_loss(normalize(mixed), groups)
    assert loss.item() == pytest.approx(1.1125059179769738, abs=1e-13)


def test_groups(backend64):
    """Rows of one group have equal soft labels, rows of two have not."""
    f, y, k, draws = random_call(60, 5, 3, backend64.device)
    draws["lam_pos"][::7] = 1.0
    draws["lam_pos"][1::7] = 0.0
    _, soft, groups = dashpot.hard_pair_mixup(f, y, k, **draws)
    alike = (groups[:, None] == groups[None, :]).cpu()
    close = ((soft[:, None] - soft[None]).abs().amax(2) < 1e-12).cpu()
    assert torch.equal(alike, close)
    assert (groups[:60] == y).all() and 0 < (groups[60:] >= k).sum() < 120
    clipped = groups[60:120][draws["lam_neg"] <= 0.8]
    assert clipped.unique().numel() < clipped.numel()  # alike among the mixed rows too


@given(b=st.integers(1, 40), d=st.integers(0, 40), seed=st.integers(0, 99),
       detach=st.booleans())  # fmt: skip
def test_backward_is_the_adjoint(backend64, b, d, seed, detach):
    """<A f, g> = <f, A^T g>."""
    f, y, k, draws = random_call(b, d, seed, backend64.device)
    leaf = f.clone().requires_grad_()
    mixed, _, _ = dashpot.hard_pair_mixup(leaf, y, k, detach_first=detach, **draws)
    g = torch.randn_like(mixed)
    (back,) = torch.autograd.grad(mixed, leaf, g)
    forward = (mixed * g)[b if detach else 0 :].sum()
    torch.testing.assert_close(forward.detach(), (back * f).sum(), rtol=1e-10, atol=1e-10)


def test_linear_twice_differentiable(backend64):
    f, y, k, draws = random_call(6, 3, 0, backend64.device)
    leaf = f.requires_grad_()
    (grad,) = torch.autograd.grad(
        dashpot.hard_pair_mixup(leaf, y, k, **draws)[0].square().sum(), leaf, create_graph=True
    )
    (again,) = torch.autograd.grad(grad.sum(), leaf)
    with dashpot.backend("reference"):
        (want,) = torch.autograd.grad(
            dashpot.hard_pair_mixup(leaf, y, k, **draws)[0].square().sum(), leaf, create_graph=True
        )
        (want,) = torch.autograd.grad(want.sum(), leaf)
    torch.testing.assert_close(again, want)


def test_soft_labels_are_shares(backend64):
    f, y, k, draws = random_call(50, 3, 1, backend64.device)
    _, soft, _ = dashpot.hard_pair_mixup(f, y, k, **draws)
    torch.testing.assert_close(soft.sum(1), torch.ones_like(soft[:, 0]))
    assert (soft >= 0).all() and ((soft > 0).sum(1) <= 2).all()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_draws(alpha):
    """l is never below the clip; m has mean 1/2 and the variance of Beta(alpha, alpha)."""
    b = 4000
    features, labels = torch.eye(2)[torch.arange(b) % 2], torch.arange(b) % 2
    indices = torch.zeros(b, dtype=torch.int64), torch.ones(b, dtype=torch.int64)
    generator = torch.Generator().manual_seed(3)
    mixed, _, _ = dashpot.hard_pair_mixup(
        features, labels, 2, alpha=alpha, indices=indices, generator=generator
    )
    m = mixed[2 * b :, 0]
    assert m.mean().item() == pytest.approx(0.5, abs=0.02)
    assert m.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)
    # A row whose partner is of the other kind shows its l as the partner's coordinate.
    random = mixed[b : 2 * b].gather(1, 1 - labels[:, None])[:, 0]
    assert random[random > 0].min() >= 0.8 - 1e-6 and random.max() > 0.8
    generator.manual_seed(3)
    again = dashpot.hard_pair_mixup(
        features, labels, 2, alpha=alpha, indices=indices, generator=generator
    )[0]
    assert torch.equal(again, mixed)


def test_finds_the_pairs_itself(backend64):
    f, y, k, draws = random_call(30, 5, 0, backend64.device)
    del draws["indices"]
    a = dashpot.hard_pair_mixup(f, y, k, **draws)
    b = dashpot.hard_pair_mixup(f, y, k, indices=dashpot.hard_pair_indices(f, y), **draws)
    assert all(torch.equal(one, two) for one, two in zip(a, b, strict=True))


def test_detached_copies(backend64):
    """detach_first: only the mixed rows send gradient, as in the release."""
    f, y = F5.to(backend64.device).requires_grad_(), Y5.to(backend64.device)
    grads = [
        torch.autograd.grad(
            dashpot.hard_pair_mixup(f, y, 2, detach_first=flag, **given_on(f.device))[0].sum(), f
        )[0]
        for flag in (False, True)
    ]
    torch.testing.assert_close(grads[0] - grads[1], torch.ones_like(F5).to(f.device))


I2 = torch.tensor([0, 1, 2, 3, 4])
BAD = [
    ((F5[0], Y5, 2), {}, ValueError, r"features: .*got \(3,\)"),
    ((F5, Y5.double(), 2), {}, TypeError, r"labels: expected integers"),
    ((F5, Y5, 1), {}, ValueError, r"labels: expected values in 0..0, got 0..1"),
    ((F5, Y5, 2.0), {}, TypeError, r"num_classes: .*int, got float"),
    ((F5, Y5, 0), {}, ValueError, r"num_classes: expected at least 1, got 0"),
    ((F5, Y5, 2), {"alpha": 0.0}, ValueError, r"alpha: .*> 0, got 0"),
    ((F5, Y5, 2), {"neg_clip": 1.5}, ValueError, r"neg_clip: .*\[0, 1\], got 1.5"),
    ((F5, Y5, 2), {"perm": I2 + 1}, ValueError, r"perm: expected values in 0..4, got 1..5"),
    ((F5, Y5, 2), {"perm": I2[:3]}, ValueError, r"perm: expected \(5,\).*got \(3,\)"),
    ((F5, Y5, 2), {"lam_neg": I2}, TypeError, r"lam_neg: .*floating.*got torch.int64"),
    ((F5, Y5, 2), {"lam_pos": torch.rand(3)}, ValueError, r"lam_pos: expected \(5,\).*\(3,\)"),
    ((F5, Y5, 2), {"lam_pos": 0.5}, TypeError, r"lam_pos: .*Tensor, got float"),
    ((F5, Y5, 2), {"indices": I2}, TypeError, r"indices: expected a pair"),
    ((F5, Y5, 2), {"indices": (I2, I2 - 1)}, ValueError, r"indices\[1\]: .*0..4, got -1..3"),
    ((F5, Y5, 2), {"detach_first": 1}, TypeError, r"detach_first: .*bool, got int"),
]


@pytest.mark.parametrize(("args", "options", "kind", "message"), BAD, ids=[bad[3] for bad in BAD])
def test_errors(args, options, kind, message):
    with pytest.raises(kind, match=message):
        dashpot.hard_pair_mixup(*args, **options)
