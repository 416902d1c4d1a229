"""flag_aggregate: two reads and one write, against the same algorithm in plain PyTorch and against
the published algorithm: random start, SVD of the workers' gradients as columns (and of their
differences for lam > 0). p workers, d coordinates, m = p/2 rounded up, one reweighting step.
"""

import torch
from dashpot._demo import flag_by_svd
from dashpot._measure import Peer

OP = "flag_aggregate"
SIZES = {
    torch.float32: [
        (15, 100_000), (15, 1_000_000), (15, 10_000_000), (7, 1_000_000), (60, 1_000_000),
    ],
    torch.bfloat16: [(15, 1_000_000)],
}  # fmt: skip
OPTIONS = [{"lam": 0.0}, {"lam": 1.0}]
EPS = 1e-7


def pair_weight(p: int, lam: float) -> float:
    """Weight of an unordered pair in the first step, both of its orders together."""
    return 2 * (lam / (p * (p - 1))) ** 2 * (1 + EPS) ** -0.5


def torch_gram(grads, lam):
    """The same algorithm in Gram space, as a user would write it."""
    p = grads.shape[0]
    m = (p + 1) // 2
    k = (grads @ grads.mT).double()  # (p, p), the product in the gradients' dtype
    inverse = k.diagonal().rsqrt()  # (p,)
    values, q = torch.linalg.eigh(inverse[:, None] * k * inverse)  # (p,), (p, p)
    root = values.clamp(min=1e-12).sqrt()
    f = root[:, None] * q.mT  # (p, p), column i is worker i
    laplacian = p * torch.eye(p, dtype=f.dtype, device=f.device) - 1
    weights = (1 + EPS) ** -0.5 * torch.eye(p, dtype=f.dtype, device=f.device)
    weights = weights + pair_weight(p, lam) * laplacian  # (p, p)
    y = torch.linalg.eigh(f @ weights @ f.mT)[1][:, -m:]  # (p, m)
    c = inverse * (q @ ((y @ (y.mT @ f.sum(1))) / root)) / m  # (p,)
    return c.to(grads.dtype) @ grads  # (d,)


def official_when(size, dtype, device, options):
    """Seconds to minutes beyond these sizes; bfloat16 would be converted to float32 first."""
    p, d = size
    return dtype == torch.float32 and p <= 15 and d <= (100_000 if options["lam"] else 1_000_000)


PEERS = {"torch gram": Peer(torch_gram), "official svd": Peer(flag_by_svd, official_when)}


def test_flag_aggregate(measure):
    measure()
