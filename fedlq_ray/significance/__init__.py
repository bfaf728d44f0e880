"""How much a layer matters, and the levels that follow from it under a budget."""

from fedlq_ray.significance.allocation import Allocation, exact, greedy
from fedlq_ray.significance.probe import Drops, Measurement, measure, memory_saving

__all__ = ["Allocation", "Drops", "Measurement", "exact", "greedy", "measure", "memory_saving"]
