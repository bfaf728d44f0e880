"""Measures how much each layer matters, and allocates levels by it under a budget."""

from fedlq_ray.significance.allocation import Allocation, best, bounded, exact, greedy
from fedlq_ray.significance.metrics import METRICS, Evidence
from fedlq_ray.significance.probe import Drops, Measurement, gather, in_blocks, measure, memory_saving

__all__ = [
    "METRICS",
    "Allocation",
    "Drops",
    "Evidence",
    "Measurement",
    "best",
    "bounded",
    "exact",
    "gather",
    "greedy",
    "in_blocks",
    "measure",
    "memory_saving",
]
