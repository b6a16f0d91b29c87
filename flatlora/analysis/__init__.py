"""Measure flatness: sharpness, Hessian and loss landscape of any model, with their uncertainty.

The functions take a model (any `nn.Module`, with or without adapters), ``loss_fn(model, batch) -> scalar`` and batches,
and measure in the space of the merged weights W' = W + s B A or of the adapters' factors. No weight is written.
"""

from .disturbance import (
    Degradation,
    add_noise,
    replace_tokens,
    under_corruption,
    under_rounding,
    under_weight_noise,
)
from .hessian import (
    Eigenvalues,
    Hessian,
    SpectralDensity,
    hessian_vector_product,
    spectral_density,
    top_eigenvalues,
    trace,
)
from .landscape import LossLine, LossSurface, loss_line, loss_surface
from .merged_norms import merged_row_norms
from .serialization import load, save
from .sharpness import ExpectedSharpness, SamSharpness, expected_sharpness, sam_sharpness
from .stats import Estimate

__all__ = [
    "Degradation",
    "Eigenvalues",
    "Estimate",
    "ExpectedSharpness",
    "Hessian",
    "LossLine",
    "LossSurface",
    "SamSharpness",
    "SpectralDensity",
    "add_noise",
    "expected_sharpness",
    "hessian_vector_product",
    "load",
    "loss_line",
    "loss_surface",
    "merged_row_norms",
    "replace_tokens",
    "sam_sharpness",
    "save",
    "spectral_density",
    "top_eigenvalues",
    "trace",
    "under_corruption",
    "under_rounding",
    "under_weight_noise",
]
