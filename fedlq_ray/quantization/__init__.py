"""Quantizers, the wire format that carries what they make, and error feedback."""

from fedlq_ray.quantization.quantizers import QUANTIZERS, Float16, Float32, MinMax, Qsgd, Quantizer, resolve
from fedlq_ray.quantization.wire import LAYER_HEADER, PAYLOAD_HEADER, Payload, decode, encode

__all__ = [
    "LAYER_HEADER",
    "PAYLOAD_HEADER",
    "QUANTIZERS",
    "Float16",
    "Float32",
    "MinMax",
    "Payload",
    "Qsgd",
    "Quantizer",
    "decode",
    "encode",
    "resolve",
]
