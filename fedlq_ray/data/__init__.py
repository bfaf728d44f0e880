"""Datasets, and their partition among clients."""

from fedlq_ray.data.arrays import Dataset, GivenData, as_dataset, inputs
from fedlq_ray.data.datasets import DATASETS, load
from fedlq_ray.data.partition import PARTITIONS, Split, hold_out, label_counts, partition

__all__ = [
    "GivenData",
    "DATASETS",
    "PARTITIONS",
    "Dataset",
    "Split",
    "as_dataset",
    "hold_out",
    "inputs",
    "label_counts",
    "load",
    "partition",
]
