"""Codes of whole numbers, packed bits, cells, and the Walsh-Hadamard transform, for the quantizers."""
