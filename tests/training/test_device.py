"""Training on a GPU: close to the CPU's numbers, the same bytes each time; without a GPU only what is told."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from faults import round_of

import fedlq_ray
from fedlq_ray.config.load import load
from fedlq_ray.config.settings import TrainConfig
from fedlq_ray.errors import ConfigError, FedLQError
from fedlq_ray.federation.task import Job, Parts, Worker, prepare
from fedlq_ray.models import FlatModel, build
from fedlq_ray.significance.metrics import METRICS
from fedlq_ray.strategies import Probe
from fedlq_ray.training.device import reproducible
from fedlq_ray.training.sgd import LocalSGD

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU here")
SERIAL = ["clients.hosting=serial", "tracking.uri=null"]
QUICK = ["rounds=4", "clients.count=6", "clients.cohort=3", "strategy.error_feedback=true", "tracking.uri=null"]
GPU = ["train.device=cuda", "clients.num_gpus=0.2"]


def contents(result):
    return [(result.path / name).read_bytes() for name in ("rounds.jsonl", "summary.json", "model.safetensors")]


def simulated(folder, *overrides):
    return fedlq_ray.simulate(load(None, [*QUICK, *overrides, f"out={folder}"]))


def test_settings_that_lack_a_gpu_are_told():
    with pytest.raises(ConfigError, match="train.device=cuda needs clients.num_gpus"):
        load(None, ["train.device=cuda"])
    load(None, [*GPU, "clients.hosting=packed"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path):
    with pytest.raises(ConfigError, match="PyTorch finds no GPU"):
        simulated(tmp_path / "run", "clients.hosting=serial", "train.device=cuda")
    assert not (tmp_path / "run").exists()


@pytest.mark.ray
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_in_the_cluster_ray_says_so(tmp_path, ray_here):
    with pytest.raises(FedLQError, match="an actor requests 0.2 GPU, but the cluster has 0"):
        simulated(tmp_path / "run", *GPU)


def test_what_is_set_for_training_is_taken_back():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with reproducible("cpu"):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


@gpu
@pytest.mark.parametrize(
    "name", ["mlp", "cnn", "lenet5", "resnet8_gn", "mobilenetv2_gn", "vgg9", "torchvision:resnet18"]
)
def test_a_clients_round_is_near_the_cpus_and_the_same_again(name):
    found = []
    with reproducible("cuda"):
        for device in ("cpu", "cuda", "cuda"):
            module = build(name, (3, 32, 32), 10, {})
            torch.manual_seed(0)
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.05)
            task = prepare(load(None, [*SERIAL, f"train.device={device}", "data.holdout=0"]), Parts(data=pictures()))
            task = dataclasses.replace(task, module=module, layers=FlatModel(module).layers)
            worker = Worker(task)
            weights = worker.initial_weights()
            plan = worker.context.at_levels([32] * len(worker.context.quantized))
            reply, _ = worker.train(Job(0, 0, plan, 8), weights, None)
            found.append((reply.payload, worker.model.read() - weights, worker.evaluate(weights)))
    (_, expected, by_cpu), (payload, update, by_gpu), (again, *_) = found
    assert payload == again
    assert float((update - expected).norm() / expected.norm()) < 2e-3
    assert abs(by_gpu.loss - by_cpu.loss) < 1e-3 * by_cpu.loss


def pictures():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (600, 32, 32, 3), dtype=np.uint8), np.arange(600) % 10
    return x[:500], y[:500], x[500:], y[500:]


@gpu
@pytest.mark.parametrize("metric", METRICS)
def test_each_metric_is_near_the_cpus(metric):
    tables = []
    with reproducible("cuda"):
        for device in ("cpu", "cuda"):
            settings = [*SERIAL, "model.name=cnn", "clients.count=4", "clients.cohort=2", f"train.device={device}"]
            worker = Worker(prepare(load(None, settings), Parts(data=pictures())))
            weights = worker.initial_weights()
            quantizers = tuple(worker.context.quantizer_at(level) for level in (1, 4))
            tables.append(worker.probe(Probe(quantizers, 64, metric), torch.zeros_like(weights), weights, 1).drop)
    near = 2 / 64 if metric == "accuracy" else 0.02 * np.abs(tables[0]).max()  # two samples may be at a tie
    assert np.abs(tables[0] - tables[1]).max() <= near


@gpu
def test_the_same_settings_give_the_same_bytes_and_learn(tmp_path):
    first = simulated(tmp_path / "one", "clients.hosting=serial", "train.device=cuda", "rounds=20")
    again = simulated(tmp_path / "two", "clients.hosting=serial", "train.device=cuda", "rounds=20")
    plain = simulated(tmp_path / "cpu", "clients.hosting=serial", "rounds=20")
    assert contents(first) == contents(again)
    assert abs(first.summary["final_accuracy"] - plain.summary["final_accuracy"]) < 0.05
    assert first.summary["final_accuracy"] > 0.5


@gpu
@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_hosting_changes_no_byte(tmp_path):
    settings = ["strategy.name=fedlq_rd", "strategy.metric=fisher", "strategy.probe_every=2"]
    expected = contents(simulated(tmp_path / "serial", *settings, "clients.hosting=serial", "train.device=cuda"))
    for hosting in ("packed", "dedicated"):
        share = "clients.num_gpus=0.125"
        result = simulated(tmp_path / hosting, *settings, *GPU, share, f"clients.hosting={hosting}")
        assert contents(result) == expected, hosting


@gpu
@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_a_gpu_that_one_actor_takes_whole_leaves_none_to_evaluate(tmp_path):
    with pytest.raises(FedLQError, match="no GPU left for the actor that evaluates; set 0.5 or less"):
        simulated(tmp_path / "run", *GPU, "clients.num_gpus=1", "clients.hosting=packed")


@gpu
def test_a_run_that_is_cut_short_goes_on_to_the_same_bytes(tmp_path):
    settings = ["train.device=cuda", "clients.hosting=serial", "checkpoint.every_rounds=1"]
    whole = simulated(tmp_path / "whole", *settings)

    def cut(event):
        if round_of(event) == 1:
            raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        fedlq_ray.simulate(load(None, [*QUICK, *settings, f"out={tmp_path / 'cut'}"]), watch=cut)
    assert contents(fedlq_ray.resume(tmp_path / "cut")) == contents(whole)


@gpu
@pytest.mark.parametrize("name", ["cnn", "resnet8_gn", "vgg9"])
def test_recorded_steps_are_those_taken_one_by_one(name):
    """Over two clients, of which the second's shard is not a multiple of the batch, and seen twice."""
    x, y = np.random.default_rng(0).standard_normal((70, 32, 32, 3), np.float32), np.arange(70) % 10
    settings = TrainConfig(batch_size=16, momentum=0.9, prox_mu=0.1, max_grad_norm=1.0, weight_decay=0.01, lr=0.05)

    def normalise(x):
        return torch.from_numpy(x).permute(0, 3, 1, 2).to("cuda")

    ends = []
    with reproducible("cuda"):
        module = build(name, (3, 32, 32), 10, {})
        for record in (False, True):
            model = FlatModel(copy.deepcopy(module), "cuda")
            sgd, start = LocalSGD(model, settings, record=record), model.read()
            for size, samples in ((64, 64), (70, 140)):
                model.load(start)
                rng = np.random.default_rng(size)
                loss = sgd.train(x[:size], y[:size], normalise=normalise, samples=samples, rng=rng)
                ends.append((loss, model.read()))
            assert set(sgd.recorded) == ({16, 6} if record else set())
    (loss, vector), (other_loss, other), *recorded = ends
    assert [loss, other_loss] == [found for found, _ in recorded]
    assert torch.equal(vector, recorded[0][1]) and torch.equal(other, recorded[1][1])
    assert torch.isfinite(other).all() and not torch.equal(vector, other)
