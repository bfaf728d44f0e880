"""Flower's side, its simulation with the Ray backend, an actor a core: python flower_app.py WORK

FedAvg in float32 by today's message API; nothing evaluated. A client trains by the same loop as the bare one, and
each actor reads the data once."""

import json
import os
import sys
import time

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from net import train, work


class Timed(FedAvg):
    """FedAvg that notes when the first round starts and when each ends."""

    def __init__(self, marks: list[float], **settings) -> None:
        super().__init__(**settings)
        self.marks = marks

    def configure_train(self, *arguments):
        self.marks or self.marks.append(time.time())
        return super().configure_train(*arguments)

    def aggregate_train(self, *arguments):
        found = super().aggregate_train(*arguments)
        self.marks.append(time.time())
        return found


def client(folder: str) -> ClientApp:
    app = ClientApp()

    @app.train()
    def fit(message: Message, context) -> Message:
        torch.set_num_threads(1)
        here = work(folder)
        model = here.model()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        x, y = here.shard(context.node_config["partition-id"])
        train(model, x, y, here.settings["lr"], here.settings["batch_size"])
        metrics = MetricRecord({"num-examples": len(y)})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content=content, reply_to=message)

    return app


def main(folder: str) -> None:
    here, marks, app = work(folder), [], ServerApp()
    told, clients = here.settings, len(here.shards)

    @app.main()
    def serve(grid, context) -> None:
        strategy = Timed(marks, fraction_train=told["cohort"] / clients, fraction_evaluate=0.0)
        arrays = ArrayRecord(here.model().state_dict())
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=told["rounds"])

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": told["cores"]}}
    run_simulation(server_app=app, client_app=client(folder), num_supernodes=clients, backend_config=resources)
    print(json.dumps({"marks": marks}))


if __name__ == "__main__":
    main(sys.argv[1])
