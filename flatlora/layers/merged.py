"""What attention and experts have in common: peft computes their merged weight W + sBA as a tensor for each call.

The merged weight has the size of W, and autograd keeps it: that is peft's cost. This library adds a block of rows,
because eps is added in place. The row norms are computed from the merged weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import add_noise_
from ..ops.inplace import matrices
from ..ops.norms import row_norms
from .flat_layer import FlatLayer


class MergedLayer(FlatLayer):
    """A flat layer whose merged weight is a tensor."""

    def add_noise(self, weight: Tensor, key: Tensor, stream: int, transposed: bool = False) -> Tensor:
        """`weight` + eps, in place.

        Args:
            weight: a matrix, or a stack of matrices, with outputs as rows.
            key: key of the noise.
            stream: noise stream.
            transposed: outputs are columns.
        """
        rows = matrices(weight.detach(), transposed)
        norms = torch.cat([row_norms(matrix) for matrix in rows])
        row_std = self.row_std(norms, rows[0].shape[1])
        backend = self.perturbation.settings.backend
        return add_noise_(weight, row_std, key, stream, transposed=transposed, backend=backend)
