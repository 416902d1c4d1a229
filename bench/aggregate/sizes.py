"""What the benchmarks of the rules share: p workers, d coordinates, and who is timed where."""

import torch

# Ten times the coordinates twice, at one number of workers; then other numbers of workers.
RULES = {
    torch.float32: [
        (15, 100_000), (15, 1_000_000), (15, 10_000_000), (30, 100_000), (60, 100_000),
    ],
    torch.bfloat16: [(15, 1_000_000)],
}  # fmt: skip
FLOAT32 = {torch.float32: RULES[torch.float32]}


def up_to_a_million(size, *_):
    """Peers that take seconds a call beyond, or would not fit."""
    return size[1] <= 1_000_000


def float32_up_to_a_million(size, dtype, *_):
    """Peers that convert 16-bit rows first, or decide ties between equal distances by chance."""
    return dtype == torch.float32 and size[1] <= 1_000_000


def float32_up_to_100_000(size, dtype, *_):
    """Peers whose rounded distances fall the other way for a few of a million coordinates."""
    return dtype == torch.float32 and size[1] <= 100_000
