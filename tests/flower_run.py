"""What test_flower.py runs: a federation of real clients in Flower's simulation (ray).

    python tests/flower_run.py

Five clients hold scikit-learn's digits in equal shares and train a linear classifier; the last one
is Byzantine and sends its step turned round and amplified. One server app trains with FedAvg and
with RobustStrategy, from the same model. Prints one line of JSON: accuracies, what was left out.
"""

from __future__ import annotations

import json
import logging
import os
import sys

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"

import numpy
import torch
from dashpot.flower import RobustStrategy
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from sklearn.datasets import load_digits
from torch import nn

CLIENTS, ROUNDS = 5, 3
BYZANTINE = CLIENTS - 1

client = ClientApp()
server = ServerApp()


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 64) in [0, 1] and labels (n,), in an order of their own."""
    data = load_digits()
    order = numpy.random.default_rng(0).permutation(len(data.target))
    images = torch.tensor(data.data[order] / 16, dtype=torch.float32)
    return images, torch.tensor(data.target[order])


def model(arrays: ArrayRecord | None = None) -> nn.Linear:
    torch.manual_seed(0)
    net = nn.Linear(64, 10)
    if arrays is not None:
        state = {name: torch.from_numpy(arrays[name].numpy().copy()) for name in net.state_dict()}
        net.load_state_dict(state)
    return net


def record(state: dict[str, torch.Tensor]) -> ArrayRecord:
    arrays = {name: Array(value.detach().numpy()) for name, value in state.items()}
    return ArrayRecord({**arrays, "rounds": Array(numpy.array([7], dtype=numpy.int64))})


@client.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    number = context.node_config["partition-id"]
    images, labels = (part[number :: CLIENTS + 1] for part in digits())
    arrays = message.content["arrays"]
    net = model(arrays)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    state = net.state_dict()
    if number == BYZANTINE:
        state = {name: start[name] - 20 * (value - start[name]) for name, value in state.items()}
        config = message.content["config"]
        if config["server-round"] == config["malformed-round"]:
            state = {name: value[:1] for name, value in state.items()}  # of the wrong shape
    metrics = MetricRecord({"num-examples": len(labels)})
    return Message(RecordDict({"arrays": record(state), "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    images, labels = (part[CLIENTS :: CLIENTS + 1] for part in digits())
    results = {}
    for name, make in {
        "FedAvg": lambda **o: FedAvg(**o),
        "flag": lambda **o: RobustStrategy("flag", rule_options={"output": "rescaled"}, **o),
        "geometric_median": lambda **o: RobustStrategy("geometric_median", weighted=True, **o),
    }.items():
        strategy = make(min_available_nodes=CLIENTS, fraction_evaluate=0.0)
        # FedAvg would end with an error there.
        config = ConfigRecord({"malformed-round": 0 if name == "FedAvg" else 2})
        start = record(model().state_dict())
        arrays = strategy.start(grid, start, num_rounds=ROUNDS, train_config=config).arrays
        with torch.no_grad():
            guess = model(arrays)(images).argmax(1)
        results[name] = {
            "accuracy": (guess == labels).float().mean().item(),
            "counter": arrays["rounds"].numpy().tolist(),
            "kind": str(arrays["weight"].dtype),
        }
    sys.__stdout__.write(json.dumps(results) + "\n")
    sys.__stdout__.flush()


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.WARNING)
    run_simulation(
        server, client, num_supernodes=CLIENTS,
        backend_config={
            "client_resources": {"num_cpus": 1.0, "num_gpus": 0.0},
            "init_args": {"num_cpus": 1, "include_dashboard": False, "log_to_driver": False},
        },
    )  # fmt: skip
