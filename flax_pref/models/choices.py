"""Choices that configs and flags offer, without the code that they choose among: `--help` needs no JAX."""

from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Kernel = Literal["auto", "xla", "cudnn", "flash", "blocked"]
"""Of attention, see `models.attention`."""
QuantizedType = Literal["int8", "fp8"]
"""Of weights, see `models.quantized`."""
