"""consistency_loss, forward + backward: against the published operations, eager and compiled.

Memory: a row of its own beside the gradients, which are outputs; see the test of it.
"""

import functools

import torch
from dashpot._measure import Peer
from torch.nn import functional

from bench import peers

OP = "consistency_loss"
GRADIENT = (0, 1)
SIZES = {
    torch.float32: [(1, 0, "mean", 0, 512, 10_000), (1, 0, "mean", 0, 256, 50_257)],
    torch.bfloat16: [(1, 0, "mean", 0, 256, 50_257)],
}


def FLOOR(logits1, logits2, target, *options):
    """Both logits read once forward and once backward, both gradients written."""
    size = logits1.numel() * logits1.element_size()
    return 6 * size + 8 * target.numel(), 40 * logits1.numel()


def published(logits1, logits2, target, alpha, label_smoothing, ignore_index, reduction, early):
    """Probabilities in float32, rows chosen by a mask, logs of probabilities."""
    keep = target != ignore_index
    p = functional.softmax(logits1, dim=-1, dtype=torch.float32)[keep]
    q = functional.softmax(logits2, dim=-1, dtype=torch.float32)[keep]
    symmetric = ((p - q) * (p.log() - q.log())).sum() / 2
    nll = sum(
        functional.nll_loss(
            functional.log_softmax(logits, dim=-1, dtype=torch.float32), target,
            ignore_index=ignore_index, reduction="sum",
        )
        for logits in (logits1, logits2)
    )  # fmt: skip
    return (nll + alpha * symmetric) / keep.sum()


@functools.cache
def _compiled():
    return torch.compile(masked)


def compiled(*args):
    return _compiled()(*args)


def masked(logits1, logits2, target, alpha, label_smoothing, ignore_index, reduction, early):
    """The same for a compiler: rows by a factor, since their number would break the graph."""
    keep = (target != ignore_index).float()
    p = functional.softmax(logits1, dim=-1, dtype=torch.float32)
    q = functional.softmax(logits2, dim=-1, dtype=torch.float32)
    symmetric = (((p - q) * (p.log() - q.log())).sum(-1) * keep).sum() / 2
    nll = sum(
        functional.nll_loss(
            functional.log_softmax(logits, dim=-1, dtype=torch.float32), target,
            ignore_index=ignore_index, reduction="sum",
        )
        for logits in (logits1, logits2)
    )  # fmt: skip
    return (nll + alpha * symmetric) / keep.sum()


def liger(logits1, logits2, target, alpha, label_smoothing, ignore_index, *_):
    """A yardstick, forward and backward: its cross entropies, which write gradients over their
    input, and its KL divergence both ways, of ignored rows too, without the target's gradient."""
    loss = peers.load("liger_kernel.transformers.functional")
    with torch.enable_grad():
        log_p, log_q = (z.log_softmax(-1) for z in (logits1, logits2))
        pairs = ((log_q, log_p), (log_p, log_q))
        symmetric = sum(
            loss.liger_kl_div(one, other.detach(), reduction="batchmean", log_target=True)
            for one, other in pairs
        )
        nll = sum(
            loss.liger_cross_entropy(z.clone(), target, ignore_index=ignore_index)
            for z in (logits1, logits2)
        )
        return torch.autograd.grad(nll + alpha / 2 * symmetric, (logits1, logits2))


PEERS = {
    "published form": Peer(published),
    "published, compiled": Peer(compiled),
    "Liger": Peer(liger, peers.on_a_gpu, checked=False, needs="liger_kernel"),
}


def test_consistency_loss(measure):
    measure()
