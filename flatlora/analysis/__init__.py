"""See flatness: sharpness and landscape of any model, with their uncertainty, never writing a weight.

Every function takes a model (any `nn.Module`, with or without adapters), ``loss_fn(model, batch) -> scalar`` and
batches, and measures in the space of the merged weights W' = W + s B A or of the adapters' factors.
"""

from .landscape import LossLine, loss_line, merged_row_norms
from .sharpness import ExpectedSharpness, expected_sharpness
from .stats import Estimate

__all__ = ["Estimate", "ExpectedSharpness", "LossLine", "expected_sharpness", "loss_line", "merged_row_norms"]
