"""Operators on tensors: noise in a weight, products with perturbed weights, row norms of merged weights.

This package imports torch only, and `flatlora.utils`.
"""

from . import custom_ops  # noqa: F401  (registers the operators)
from .convolution import perturbed_conv
from .four_bit import DoubleScales, FourBitWeight
from .fused_dora import dora_linear
from .fused_lora import Branch, RowNoise, adapted_linear, lora_linear
from .inplace import add_noise_
from .norms import merged_row_norms, row_norms_of_sum, squared_row_norms, sums_merged_rows
from .perturb import BACKENDS, makes_norms, perturb_weight, resolve_backend, row_noise
from .products import perturbed_linear, rebuilt_linear

__all__ = [
    "BACKENDS",
    "Branch",
    "DoubleScales",
    "FourBitWeight",
    "RowNoise",
    "adapted_linear",
    "add_noise_",
    "dora_linear",
    "lora_linear",
    "makes_norms",
    "merged_row_norms",
    "perturb_weight",
    "perturbed_conv",
    "perturbed_linear",
    "rebuilt_linear",
    "resolve_backend",
    "row_noise",
    "row_norms_of_sum",
    "squared_row_norms",
    "sums_merged_rows",
]
