"""The model zoo, the flat vector of a model, and its layers."""

from fedlq_ray.models.flat import FlatModel, Layer, float_buffers, require_trainable
from fedlq_ray.models.flops import saved_bytes, training_flops
from fedlq_ray.models.zoo import MODELS, GivenModel, build, check_output, copied, require_logits, resolve_name

__all__ = [
    "GivenModel",
    "MODELS", "FlatModel", "Layer", "build", "check_output", "copied", "float_buffers", "require_logits",
    "require_trainable", "resolve_name", "saved_bytes", "training_flops",
]  # fmt: skip
