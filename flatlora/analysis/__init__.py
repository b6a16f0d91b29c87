"""See flatness: sharpness, Hessian and landscape of any model, with their uncertainty, never writing a weight.

Every function takes a model (any `nn.Module`, with or without adapters), ``loss_fn(model, batch) -> scalar`` and
batches, and measures in the space of the merged weights W' = W + s B A or of the adapters' factors.
"""

from .hessian import (
    Eigenvalues,
    Hessian,
    SpectralDensity,
    hessian_vector_product,
    spectral_density,
    top_eigenvalues,
    trace,
)
from .landscape import LossLine, loss_line, merged_row_norms
from .sharpness import ExpectedSharpness, SamSharpness, expected_sharpness, sam_sharpness
from .stats import Estimate

__all__ = [
    "Eigenvalues",
    "Estimate",
    "ExpectedSharpness",
    "Hessian",
    "LossLine",
    "SamSharpness",
    "SpectralDensity",
    "expected_sharpness",
    "hessian_vector_product",
    "loss_line",
    "merged_row_norms",
    "sam_sharpness",
    "spectral_density",
    "top_eigenvalues",
    "trace",
]
