"""The model zoo, and the flat vector and its layers."""

from fedlq_ray.models.flat import FlatModel, Layer
from fedlq_ray.models.flops import training_flops
from fedlq_ray.models.zoo import MODELS, build, check_output, resolve_name

__all__ = ["MODELS", "FlatModel", "Layer", "build", "check_output", "resolve_name", "training_flops"]
