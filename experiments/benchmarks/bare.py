"""The bare training loop: a process a core, each training its part of the cohort one client after another.

Data in memory and normalised, channels_last, `torch.optim.SGD`, nothing sent and nothing averaged: python bare.py WORK
"""

import json
import multiprocessing
import sys
import time

import torch
from net import Work, train


def serve(folder, pipe) -> None:
    """Told which clients to train, it answers when it has."""
    torch.set_num_threads(1)
    work = Work(folder)
    lr, batch_size = work.settings["lr"], work.settings["batch_size"]
    model, shards = work.model(), [work.shard(client) for client in range(len(work.shards))]
    start = {name: value.clone() for name, value in model.state_dict().items()}
    pipe.send("ready")
    while (clients := pipe.recv()) is not None:
        for client in clients:
            model.load_state_dict(start)
            train(model, *shards[client], lr, batch_size)
        pipe.send("done")


def main(folder: str) -> None:
    work = Work(folder)
    cores, context = work.settings["cores"], multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(cores):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(folder, theirs)))
        processes[-1].start()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    marks = [time.time()]
    for members in work.cohorts.tolist():
        for index, pipe in enumerate(pipes):
            pipe.send(members[index::cores])
        for pipe in pipes:
            pipe.recv()
        marks.append(time.time())
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()
    print(json.dumps({"marks": marks}))


if __name__ == "__main__":
    main(sys.argv[1])
