"""pfl-research's side, a process a core: python -m torch.distributed.run --nproc_per_node CORES pfl_app.py WORK

Federated averaging in float32, channels_last; a user's data is normalised when its turn comes; nothing evaluated."""

import itertools
import json
import os
import sys
import time
import types

import torch
from net import Work
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch.nn.functional import cross_entropy


class Clock(TrainingProcessCallback):
    """Notes when the first round starts and when each ends."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_begin(self, *, model):
        self.marks.append(time.time())
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        self.marks.append(time.time())
        return False, Metrics()


def loss(self, x, y, eval=False):
    self.train(not eval)
    return cross_entropy(self(x), y)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    work = Work(folder)
    told = work.settings
    module = work.model()
    module.loss = types.MethodType(loss, module)
    module.metrics = types.MethodType(lambda self, x, y, eval=False: {}, module)
    central = torch.optim.SGD(module.parameters(), lr=1.0)
    model = PyTorchModel(module, local_optimizer_create=torch.optim.SGD, central_optimizer=central)
    drawn = itertools.cycle(work.cohorts.ravel().tolist())
    users = FederatedDataset(lambda user: Dataset(raw_data=list(work.shard(user))), lambda: next(drawn))
    clock = Clock()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=told["rounds"],
            evaluation_frequency=told["rounds"] + 1,
            train_cohort_size=told["cohort"],
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(users, None),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=told["lr"], local_batch_size=told["batch_size"]
        ),
        callbacks=[clock],
    )
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"marks": clock.marks}), flush=True)
    if torch.distributed.is_initialized():  # else its threads may still run when the program ends, which aborts it
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
