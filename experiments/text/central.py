"""What plain SGD reaches on the shipped text without federation: the same model, steps and passes as a run's clients.

python experiments/text/central.py [PASSES]
"""

import sys

import torch

from fedlq_ray.config.load import load
from fedlq_ray.federation.task import prepare
from fedlq_ray.training.local import evaluate


def main() -> None:
    """Prints the test accuracy after each pass over all clients' training samples."""
    passes = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    torch.set_num_threads(1)
    config = load(None, ["data.name=shakespeare"])
    task = prepare(config)
    model = task.flat_model()
    chosen = torch.cat([torch.from_numpy(shard) for shard in task.shards])
    x, y = torch.from_numpy(task.data.x_train).long()[chosen], torch.from_numpy(task.data.y_train)[chosen]
    tests = torch.from_numpy(task.data.x_test).long(), torch.from_numpy(task.data.y_test)
    optimizer = torch.optim.SGD(model.module.parameters(), config.train.lr)
    torch.manual_seed(config.seed)
    for done in range(1, passes + 1):
        model.module.train()
        for batch in torch.randperm(len(x)).split(config.train.batch_size):
            optimizer.zero_grad(set_to_none=False)
            task.problem.loss(model.module(x[batch]), y[batch]).backward()
            torch.nn.utils.clip_grad_norm_(model.module.parameters(), config.train.max_grad_norm or float("inf"))
            optimizer.step()
        found = evaluate(model, model.read(), *tests, task.problem)
        print(f"pass {done}: {100 * found.metrics['accuracy']:.1f} %, loss {found.loss:.3f}", flush=True)


if __name__ == "__main__":
    main()
