"""The mathematics on tensors; imports torch only."""

from . import custom_ops  # noqa: F401  (registers the operators)
from .adapted import RowNoise, lora_linear
from .merged import add_noise_, rebuilt_linear
from .norms import merged_row_norms, row_norms_of_sum, squared_row_norms, sums_merged_rows
from .perturb import BACKENDS, makes_norms, perturb_weight, resolve_backend, row_noise
from .products import perturbed_conv, perturbed_linear

__all__ = [
    "BACKENDS",
    "RowNoise",
    "add_noise_",
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
