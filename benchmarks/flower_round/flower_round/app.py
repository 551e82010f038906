"""Flower's own FedAvg over a model of float32 arrays of 4 MiB; clients send what they got, slightly changed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

ELEMENTS = 2**20

server = ServerApp()
client = ClientApp()


class TimedFedAvg(FedAvg):
    """FedAvg that notes the seconds of each round, from the first message to the new model."""

    def __init__(self, **options: object):
        super().__init__(**options)
        self.seconds: list[float] = []

    def configure_train(self, server_round, arrays, config, grid):
        self._begun = time.monotonic()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        assert not any(reply.has_error() for reply in replies)
        result = super().aggregate_train(server_round, replies)
        self.seconds.append(time.monotonic() - self._begun)
        return result


@server.main()
def serve(grid: Grid, context: Context) -> None:
    config, rng = context.run_config, np.random.default_rng(0)
    model = ArrayRecord({f"w{at}": Array(rng.random(ELEMENTS, np.float32)) for at in range(int(config["arrays"]))})
    clients = int(config["clients"])
    strategy = TimedFedAvg(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
    )
    strategy.start(grid=grid, initial_arrays=model, num_rounds=int(config["rounds"]), timeout=3600)
    temporary = Path(config["out"]).with_suffix(".tmp")
    temporary.write_text(json.dumps(strategy.seconds))
    temporary.replace(config["out"])


@client.train()
def train(message: Message, context: Context) -> Message:
    number = int(context.node_config.get("partition-id", 0))
    change = np.float32(0.001 * (number + 1))
    arrays = {name: Array(value.numpy() + change) for name, value in message.content["arrays"].items()}
    content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1.0})}
    return Message(RecordDict(content), reply_to=message)
