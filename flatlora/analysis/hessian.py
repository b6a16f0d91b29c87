r"""Hessian of the loss with respect to the merged weights (or the adapters' factors), by Hessian-vector products.

The algorithms take any symmetric `Operator`, such as a `Hessian`; no N x N matrix is formed. `Hessian.to_curvlinops`
converts to an operator of the curvlinops package (the `analysis` extra) for other algorithms (XTrace, Hutch++, norms,
...). The estimators here report their uncertainty and draw from the library's noise instead of the global random state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from ..utils.arguments import WrongType, boolean, check_fields, integer, keywords, mapping, number, refuse, tensor
from .directions import probe
from .displacement import find_weights
from .fields import points, result, same_length, samples
from .gradients import WeightVector
from .lanczos import Lanczos, Operator
from .mean_loss import LossFn, MeanLoss
from .options import Layers, check_positive, check_progress, check_seed
from .stats import Estimate, standard_error
from .table import progress_bar

if TYPE_CHECKING:
    from typing_extensions import Unpack


class HessianKeywords(TypedDict, total=False):
    """Keywords of `Hessian`, for type checkers."""

    space: str
    layers: Layers
    sizes: Sequence[float] | None


class Hessian:
    """The Hessian of the mean loss over batches; ``hessian @ v`` is a Hessian-vector product, (N,).

    The model is only read, in evaluation mode, as in `loss_line`. A product costs about four passes over the batches
    and holds the autograd graph of one batch. Products of half-precision models are inaccurate: use float32.

    Args:
        model, loss_fn, batches: see `loss_line`.
        space, layers, sizes: see `flatlora.analysis.options.Options`.

    Attributes:
        size: N, the number of entries of all chosen weights.
        names: of the layers in the order of the vector, which holds each weight row by row, one row per output.

    Example:
        >>> hessian = Hessian(model, loss_fn, batches)
        >>> top_eigenvalues(hessian, count=3).values
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Any],
        *,
        space: str = "merged",
        layers: Layers = None,
        sizes: Sequence[float] | None = None,
    ) -> None:
        weights = find_weights(model, layers, space)
        self._vector = WeightVector(MeanLoss(model, loss_fn, batches, weights, sizes))
        self.size, self.dtype, self.device = self._vector.size, self._vector.dtype, self._vector.device
        self.names = [weight.name for weight in self._vector.unique.values()]

    def __matmul__(self, vector: Tensor) -> Tensor:
        tensor("vector", vector, shape=(self.size,))
        return self._vector.product(vector.to(self.device, self.dtype))

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector (N,) as views by layer name, each (m, n)."""
        tensor("vector", vector, shape=(self.size,))
        return dict(zip(self.names, self._vector.split(vector).values(), strict=True))

    def to_curvlinops(self) -> Any:
        """Convert to a `curvlinops.PyTorchLinearOperator`.

        The `analysis` extra installs curvlinops, whose dependencies include torchvision, which it does not import.
        PyPI's Linux build of torchvision is for CUDA and breaks transformers if torch is a CPU build. In that case
        install curvlinops and backpack-for-pytorch with `--no-deps`, then scipy, einops, einconv, opt-einsum, unfoldNd
        and linear_operator.

        Raises:
            ImportError: curvlinops is not installed.
        """
        try:
            from curvlinops._torch_base import PyTorchLinearOperator
        except ImportError as error:
            raise ImportError(
                "to_curvlinops needs curvlinops: pip install 'flatlora[analysis]', or, with a CPU build of torch, "
                "curvlinops-for-pytorch and backpack-for-pytorch with --no-deps"
            ) from error

        hessian = self

        class Adapter(PyTorchLinearOperator):  # type: ignore[misc]  # curvlinops has no types
            SELF_ADJOINT = True
            device, dtype = property(lambda self: hessian.device), property(lambda self: hessian.dtype)

            def __init__(self) -> None:
                super().__init__([(hessian.size,)], [(hessian.size,)])

            def _matmat(self, X: list[Tensor]) -> list[Tensor]:
                return [torch.stack([hessian @ x for x in X[0].T], dim=1)]

        return Adapter()


def hessian_vector_product(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    vectors: dict[str, Tensor],
    **settings: Unpack[HessianKeywords],
) -> dict[str, Tensor]:
    """The product H v, by layer name.

    Args:
        model, loss_fn, batches: see `loss_line`.
        vectors: v by layer name, each (m, n): one for each chosen layer.
        settings: `space`, `layers` and `sizes`, see `Hessian`.

    Returns:
        (m, n) for each layer.

    Raises:
        ValueError: the names of the vectors are not those of the chosen layers.
    """
    keywords("hessian_vector_product", settings, HessianKeywords.__annotations__)
    mapping("vectors", vectors, "a mapping of layer names to tensors", empty=True)
    hessian = Hessian(model, loss_fn, batches, **settings)
    shapes = {weight.name: weight.shape for weight in hessian._vector.unique.values()}
    if set(vectors) != set(hessian.names):
        raise ValueError(f"vectors must have the keys {hessian.names}, got {list(vectors)}")
    for name, shape in shapes.items():
        tensor(f"vectors[{name!r}]", vectors[name], shape=shape)
    flat = torch.cat([vectors[name].reshape(-1).to(hessian.device, hessian.dtype) for name in hessian.names])
    return hessian.split(hessian @ flat)


@dataclass(frozen=True, eq=False)
class Eigenvalues:
    """Extreme eigenvalues.

    Attributes:
        values: largest first (smallest first for ``smallest=True``).
        residuals: ||H v - lambda v||. An eigenvalue of H lies within this distance of each value.
        vectors: eigenvectors of norm 1.
    """

    values: Tensor = result(tensor, dims=1)  # (count,)
    residuals: Tensor = result(tensor, dims=1)  # (count,)
    vectors: Tensor = samples()  # (N, count)

    def __post_init__(self) -> None:
        check_fields(self)
        same_length("residuals", self.residuals, 0, "values", len(self.values))
        same_length("vectors", self.vectors, 1, "values", len(self.values))


def _check_estimator(operator: Operator, seed: int, progress: bool | None) -> int:
    """Check the arguments that all estimators take; the seed as an int."""
    whole = isinstance(getattr(operator, "size", None), int) and not isinstance(operator.size, bool)
    known = whole and all(hasattr(operator, part) for part in ("dtype", "device", "__matmul__"))
    if not known or not isinstance(operator.dtype, torch.dtype) or isinstance(operator, type):
        refuse("operator", "an operator: a Hessian, or an object with size, dtype, device and @", operator, WrongType)
    check_progress(progress)
    return check_seed("seed", seed)


def top_eigenvalues(
    operator: Operator,
    count: int = 1,
    *,
    smallest: bool = False,
    steps: int | None = None,
    tolerance: float = 1e-3,
    seed: int = 0,
    progress: bool | None = None,
) -> Eigenvalues:
    """The algebraically largest (or smallest) eigenvalues, by Lanczos with full reorthogonalization.

    A repeated eigenvalue is listed as often as it occurs if Lanczos exhausts its Krylov spaces within `steps`, as for a
    small matrix or one of low rank: it then goes on in the orthogonal complement. Otherwise it may be listed once.

    Args:
        operator: symmetric, for instance a `Hessian`.
        count: number of eigenvalues.
        smallest: compute the most negative ones instead, smallest first.
        steps: maximal number of products; default min(N, 20 + 10 count). `steps` vectors of N entries are held: for a
            large model choose layers or the adapter space.
        tolerance: stop when each residual is below this times the largest |eigenvalue|. Reaching `steps` first is not
            an error; the residuals then show the accuracy.
        seed: of the start vector.
        progress: show a progress bar; None shows one on a terminal.

    Raises:
        ValueError: an argument out of bounds.
    """
    seed = _check_estimator(operator, seed, progress)
    count = integer("count", count, 1)
    smallest = boolean("smallest", smallest)
    steps = integer("steps", steps, 1, optional=True)
    tolerance = number("tolerance", tolerance, 0, expected="a finite number >= 0")
    if count > operator.size:
        raise ValueError(f"count must be at most the operator's size, {operator.size}, got {count}")
    steps = min(operator.size, 20 + 10 * count if steps is None else steps)
    if steps < count:
        raise ValueError(f"steps must be at least count, {count}, got {steps}")
    lanczos, starts = Lanczos(operator, probe(operator, seed, 0)), 1
    with progress_bar(steps, "eigenvalues", progress) as bar:
        while lanczos.step():
            bar.update()
            if len(lanczos.alphas) >= steps or _is_done(lanczos, count, smallest, tolerance):
                break
            if lanczos.exhausted:
                lanczos.restart(probe(operator, seed, starts))
                starts += 1
    values, small = lanczos.eigen()
    order = torch.argsort(values, descending=not smallest)[:count]
    vectors = torch.stack(lanczos.basis[: len(values)], dim=1) @ small[:, order].to(operator.device, operator.dtype)
    vectors = vectors / vectors.norm(dim=0)
    products = torch.stack([operator @ v for v in vectors.T], dim=1)
    eigenvalues = (vectors * products).sum(dim=0)
    return Eigenvalues(eigenvalues, (products - eigenvalues * vectors).norm(dim=0), vectors)


def _is_done(lanczos: Lanczos, count: int, smallest: bool, tolerance: float) -> bool:
    """Whether the `count` extreme eigenvalues have converged, and no further Krylov space can hold one of them."""
    values, small = lanczos.eigen()
    slack = 0.1 * tolerance * float(values.abs().max())
    order = torch.argsort(values, descending=not smallest)[:count]
    bounds = lanczos.last_beta * small[-1, order].abs()
    if len(values) < count or (bounds > slack).any():
        return False
    if not lanczos.exhausted:
        return lanczos.block == 0
    # the extreme eigenvalue of the newest space is that of all that was left before it
    newest, last = lanczos.newest_eigenvalues(), float(values[order[-1]])
    return bool(newest[0] >= last - slack if smallest else newest[-1] <= last + slack)


def trace(operator: Operator, *, samples: int = 16, seed: int = 0, progress: bool | None = None) -> Estimate:
    r"""The trace by Hutchinson's estimator, the mean of v^T H v over random signs v; unbiased, with standard error.

    Args:
        operator: symmetric.
        samples: number of products.
        seed, progress: see `top_eigenvalues`.

    Raises:
        ValueError: an argument out of bounds.
    """
    seed = _check_estimator(operator, seed, progress)
    samples = integer("samples", samples, 1)
    found = torch.empty(samples, dtype=torch.float64)
    with progress_bar(samples, "trace", progress) as bar:
        for k in range(samples):
            v = probe(operator, seed, k)
            v = torch.where(v >= 0, 1.0, -1.0).to(operator.dtype)
            found[k] = (v.double() @ (operator @ v).double()).item()
            bar.update()
    return Estimate.of(found)


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """Density of the eigenvalues, smoothed by a Gaussian.

    Attributes:
        eigenvalues: grid on which the density is evaluated.
        densities: one estimate per random start vector; each integrates to 1.
        width: standard deviation of the smoothing Gaussian.
        nodes, weights: of the Gauss quadrature of each start vector, for smoothing with another width.
        size: N.
    """

    eigenvalues: Tensor = points()  # (points,)
    densities: Tensor = samples()  # (samples, points)
    width: float = result(check_positive)
    nodes: Tensor = samples()  # (samples, steps), NaN after Lanczos has exhausted the space
    weights: Tensor = samples()  # (samples, steps), 0 there
    size: int = result(integer, 1)

    def __post_init__(self) -> None:
        check_fields(self)
        same_length("densities", self.densities, 1, "eigenvalues", len(self.eigenvalues))
        tensor("weights", self.weights, shape=tuple(self.nodes.shape))

    @property
    def mean(self) -> Tensor:
        """Mean over the start vectors, (points,)."""
        return self.densities.mean(dim=0)

    @property
    def stderr(self) -> Tensor:
        """Standard error of `mean`, (points,)."""
        return standard_error(self.densities, dim=0)


def spectral_density(
    operator: Operator,
    *,
    samples: int = 4,
    steps: int = 40,
    points: int = 512,
    width: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> SpectralDensity:
    r"""Density of the eigenvalues, by stochastic Lanczos quadrature.

    Source: Lin, Saad and Yang 2016; Ghorbani et al. 2019, arXiv 1901.10159.

    .. math::
        \phi(t) = \frac{1}{N} \sum_i g(t - \lambda_i) \approx \sum_k \omega_k\, g(t - \theta_k)

    Args:
        operator: symmetric.
        samples: number of random start vectors.
        steps: Lanczos steps for each of them; `steps` vectors of N entries are held.
        points: of the grid, whose range is 10 % wider than that of the eigenvalues found.
        width: of the Gaussian g; default: 1 % of the range of the eigenvalues found.
        seed, progress: see `top_eigenvalues`.

    Raises:
        ValueError: an argument out of bounds.
    """
    seed = _check_estimator(operator, seed, progress)
    samples, steps, points = (
        integer(name, value, 1) for name, value in (("samples", samples), ("steps", steps), ("points", points))
    )
    width = None if width is None else check_positive("width", width)
    nodes, weights = _quadrature(operator, samples, min(steps, operator.size), seed, progress)
    seen = nodes[~nodes.isnan()]
    low, high = float(seen.min()), float(seen.max())
    span = max(high - low, 1e-12 * max(abs(high), 1.0))
    width = 0.01 * span if width is None else width
    grid = torch.linspace(low - 0.05 * span - 3 * width, high + 0.05 * span + 3 * width, points, dtype=torch.float64)
    bumps = torch.exp(-0.5 * ((grid - nodes.nan_to_num()[..., None]) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    return SpectralDensity(grid, (weights[..., None] * bumps).sum(dim=1), width, nodes, weights, operator.size)


def _quadrature(
    operator: Operator, samples: int, steps: int, seed: int, progress: bool | None
) -> tuple[Tensor, Tensor]:
    """Nodes theta and weights omega of the Gauss quadrature of each start vector, (samples, steps) each."""
    nodes = torch.full((samples, steps), math.nan, dtype=torch.float64)
    weights = torch.zeros(samples, steps, dtype=torch.float64)
    with progress_bar(samples * steps, "spectrum", progress) as bar:
        for k in range(samples):
            lanczos = Lanczos(operator, probe(operator, seed, k))
            while len(lanczos.alphas) < steps and lanczos.step():
                bar.update()
            values, small = lanczos.eigen()
            nodes[k, : len(values)], weights[k, : len(values)] = values, small[0].square()
    return nodes, weights
