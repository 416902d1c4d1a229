"""python -m bench.models.byzantine_rank [--json FILE]: DistributedDataParallel with a bad rank.

Four processes (gloo) train the demo's classifier on scikit-learn's digits, one of them sends
something else than its gradient: the claim of the Flag Aggregator's paper (arXiv 2302.05865) in
small. Each rule is swapped in with one line, `register_comm_hook`; "DDP" is without it. The same
model at the start, the same minibatches, the same learning rate. Prints the accuracy on held-out
images after the last step; the JSON is read by `python -m bench.report`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from dashpot import _demo
from dashpot.distributed import RobustState, ddp_hook
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.models import _run

RANKS, BATCH = 4, 16

RULES: dict[str, dict | None] = {
    "DDP (mean)": None,
    "flag, rescaled": {"rule": "flag", "output": "rescaled"},
    "flag, rescaled, per bucket": {"rule": "flag", "output": "rescaled", "scope": "bucket"},
    "geometric median": {"rule": "geometric_median"},
    "mda": {"rule": "mda", "f": 1},
    "median": {"rule": "coordinate_median"},
    "trimmed mean": {"rule": "trimmed_mean", "f": 1},
}

# What the last rank's backward pass leaves in place of each gradient.
ATTACKS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "sign-flip": lambda grad: -grad,
    "reverse-10": lambda grad: -10 * grad,
    "uniform": torch.rand_like,
    "NaN": lambda grad: torch.full_like(grad, torch.nan),
}


def train(rank: int, data: _demo.Digits, rule: str, attack: str, steps: int) -> float:
    """The accuracy after the last step."""
    torch.manual_seed(0)
    model = _demo.classifier()
    if rank == RANKS - 1 and ATTACKS[attack] is not None:
        for parameter in model.parameters():
            parameter.register_hook(ATTACKS[attack])
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.02)
    if RULES[rule] is not None:
        ddp.register_comm_hook(RobustState(**RULES[rule]), ddp_hook)
    optimizer = torch.optim.SGD(model.parameters(), _demo.LEARNING_RATE, _demo.MOMENTUM)
    everything = torch.cat(data.shards)
    mine = everything[rank::RANKS]
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        batch = mine[torch.randint(len(mine), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(data.images[batch]), data.labels[batch]).backward()
        optimizer.step()
    return _demo.accuracy(model, data)


def run(rank: int, folder: str, steps: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    data = _demo.load_digits()
    accuracy = {
        f"{rule}|{attack}": train(rank, data, rule, attack, steps)
        for attack in ATTACKS
        for rule in RULES
    }
    if rank == 0:
        Path(folder, "accuracy.json").write_text(json.dumps(accuracy))
    dist.barrier()
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    parser = _run.parser("byzantine_rank", __doc__)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            run, (folder, options.steps), RANKS, start_method="fork"
        )
        accuracy = json.loads(Path(folder, "accuracy.json").read_text())
    rows = [
        _run.row("byzantine_rank", "rule", rule, attack, value, f"{value:.3f}")
        for key, value in accuracy.items()
        for rule, _, attack in (key.partition("|"),)
    ]
    _run.publish(rows, options.json)


if __name__ == "__main__":
    main()
