r"""The Hessian of the loss with respect to the merged weights (or the adapters' factors), by products with vectors.

Algorithms take any symmetric `Operator`, `Hessian` being one; nothing N x N is made. `Hessian.to_curvlinops` hands the
operator to the curvlinops package (the `analysis` extra) for everything that is not here (XTrace, Hutch++, norms, ...).
The estimators below are our own because they state their uncertainty and draw from the library's noise, not from the
global random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..utils.arguments import boolean, check_fields, integer, mapping, number, tensor
from .directions import probe
from .evaluate import LossFn, MeanLoss, bar
from .gradients import Variables
from .options import above_zero, check_seed, points, result, same_length, samples
from .options import operator as check_operator
from .stats import Estimate, standard_error
from .weights import find_weights


class Operator(Protocol):
    """A symmetric matrix of size N, known by its products."""

    size: int
    dtype: torch.dtype
    device: torch.device

    def __matmul__(self, vector: Tensor) -> Tensor:
        """The product, (N,)."""


class Hessian:
    """The Hessian of the mean loss over the batches; ``hessian @ v`` is one product, (N,).

    The model is only read, in evaluation mode, as in `loss_line`. A product costs about four passes over the batches
    and holds the graph of one batch; products of half-precision models are coarse, so measure in float32.

    Args:
        model, loss_fn, batches, sizes, layers, space: as in `loss_line`.

    Attributes:
        size: N, entries of all chosen weights.
        names: of the layers, in the order of the vector; each holds its weight row by row, one row per output.

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
        layers: str | Callable[[str], bool] | None = None,
        sizes: Sequence[float] | None = None,
    ) -> None:
        weights = find_weights(model, layers, space)
        self._variables = Variables(MeanLoss(model, loss_fn, batches, weights, sizes))
        self.size, self.dtype, self.device = self._variables.size, self._variables.dtype, self._variables.device
        self.names = [weight.name for weight in self._variables.unique.values()]

    def __matmul__(self, vector: Tensor) -> Tensor:
        tensor("vector", vector, shape=(self.size,))
        return self._variables.product(vector.to(self.device, self.dtype))

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector (N,) as views by layer name, each (m, n)."""
        tensor("vector", vector, shape=(self.size,))
        return dict(zip(self.names, self._variables.split(vector).values(), strict=True))

    def to_curvlinops(self) -> Any:
        """This operator as a `curvlinops.PyTorchLinearOperator`.

        curvlinops comes with the `analysis` extra and brings torchvision, which it never imports. PyPI's Linux build of
        torchvision is for CUDA, and beside a CPU build of torch it breaks transformers: there, install curvlinops and
        backpack-for-pytorch with `--no-deps`, then scipy, einops, einconv, opt-einsum, unfoldNd and linear_operator.

        Raises:
            ImportError: curvlinops is not installed.
        """
        try:
            from curvlinops._torch_base import PyTorchLinearOperator
        except ImportError as error:
            raise ImportError(
                "to_curvlinops needs curvlinops: pip install 'flatlora[analysis]', or, beside a CPU build of torch, "
                "curvlinops-for-pytorch and backpack-for-pytorch with --no-deps"
            ) from error

        hessian = self

        class Adapter(PyTorchLinearOperator):
            SELF_ADJOINT = True
            device, dtype = property(lambda self: hessian.device), property(lambda self: hessian.dtype)

            def __init__(self) -> None:
                super().__init__([(hessian.size,)], [(hessian.size,)])

            def _matmat(self, X: list[Tensor]) -> list[Tensor]:
                return [torch.stack([hessian @ x for x in X[0].T], dim=1)]

        return Adapter()


def hessian_vector_product(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], vectors: dict[str, Tensor], **settings: Any
) -> dict[str, Tensor]:
    """H v by layer name, each (m, n) like the given vectors; settings as for `Hessian`.

    Raises:
        ValueError: the vectors are not exactly one per chosen layer.
    """
    mapping("vectors", vectors, "a mapping of layer names to tensors", empty=True)
    hessian = Hessian(model, loss_fn, batches, **settings)
    shapes = {weight.name: weight.shape for weight in hessian._variables.unique.values()}
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
        values: largest first.
        residuals: ||H v - lambda v||: an eigenvalue of H lies within this distance of each value.
        vectors: unit eigenvectors.
    """

    values: Tensor = result(tensor, dims=1)  # (count,)
    residuals: Tensor = result(tensor, dims=1)  # (count,)
    vectors: Tensor = samples()  # (N, count)

    def __post_init__(self) -> None:
        check_fields(self)
        same_length("residuals", self.residuals, 0, "values", len(self.values))
        same_length("vectors", self.vectors, 1, "values", len(self.values))


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
    """The algebraically largest (or smallest) eigenvalues, by Lanczos with full reorthogonalisation.

    Args:
        operator: symmetric, for instance a `Hessian`.
        count: of eigenvalues.
        smallest: the most negative ones instead; they come smallest first.
        steps: products at most; default min(N, 20 + 10 count). steps vectors of N entries are held: for a large model
            choose layers or the adapter space.
        tolerance: stop when every residual is below this times the largest |eigenvalue|; not reaching it is no error,
            the residuals say how good the values are.
        seed: of the start vector.
        progress: a progress bar; None shows one on a terminal.
    """
    check_operator("operator", operator)
    count = integer("count", count, 1)
    smallest = boolean("smallest", smallest)
    steps = integer("steps", steps, 1, optional=True)
    tolerance = number("tolerance", tolerance, 0, expected="a finite number >= 0")
    seed = check_seed("seed", seed)
    boolean("progress", progress, optional=True)
    if count > operator.size:
        raise ValueError(f"count must be at most the operator's size, {operator.size}, got {count}")
    steps = min(operator.size, 20 + 10 * count if steps is None else steps)
    if steps < count:
        raise ValueError(f"steps must be at least count, {count}, got {steps}")
    with bar(steps, "eigenvalues", progress) as tick:
        lanczos = Lanczos(operator, probe(operator, seed, 0))
        while lanczos.step():
            tick.update()
            values, small = lanczos.eigen()
            order = torch.argsort(values, descending=not smallest)[:count]
            bounds = lanczos.last_beta * small[-1, order].abs()
            if len(values) >= steps or (
                len(values) >= count and (bounds <= 0.1 * tolerance * values.abs().max()).all()
            ):
                break
        values, small = lanczos.eigen()
        order = torch.argsort(values, descending=not smallest)[:count]
        vectors = torch.stack(lanczos.basis[: len(values)], dim=1) @ small[:, order].to(operator.device, operator.dtype)
        vectors = vectors / vectors.norm(dim=0)
    products = torch.stack([operator @ v for v in vectors.T], dim=1)
    kept = (vectors * products).sum(dim=0)
    return Eigenvalues(kept, (products - kept * vectors).norm(dim=0), vectors)


def trace(operator: Operator, *, samples: int = 16, seed: int = 0, progress: bool | None = None) -> Estimate:
    r"""The trace by Hutchinson's estimator, mean of v^T H v over random signs v; unbiased, with its standard error.

    Args:
        operator: symmetric.
        samples: products.
        seed, progress: as in `top_eigenvalues`.
    """
    check_operator("operator", operator)
    samples, seed = integer("samples", samples, 1), check_seed("seed", seed)
    boolean("progress", progress, optional=True)
    found = torch.empty(samples, dtype=torch.float64)
    with bar(samples, "trace", progress) as tick:
        for k in range(samples):
            v = probe(operator, seed, k)
            v = torch.where(v >= 0, 1.0, -1.0).to(operator.dtype)
            found[k] = (v.double() @ (operator @ v).double()).item()
            tick.update()
    return Estimate.of(found)


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """The density of eigenvalues, smoothed by a Gaussian.

    Attributes:
        eigenvalues: where it is evaluated.
        densities: one estimate per random start vector; each integrates to 1.
        width: standard deviation of the smoothing Gaussian.
        nodes, weights: of the Gauss quadrature of each start vector, for other smoothings.
        size: N.
    """

    eigenvalues: Tensor = points()  # (points,)
    densities: Tensor = samples()  # (samples, points)
    width: float = result(above_zero)
    nodes: Tensor = samples()  # (samples, steps), NaN where Lanczos ended early
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
        """Its standard error, (points,)."""
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
    r"""The density of eigenvalues by stochastic Lanczos quadrature (Lin, Saad and Yang 2016; Ghorbani et al. 2019,
    arXiv 1901.10159).

    .. math::
        \phi(t) = \frac{1}{N} \sum_i g(t - \lambda_i) \approx \sum_k \omega_k\, g(t - \theta_k)

    Args:
        operator: symmetric.
        samples: random start vectors.
        steps: Lanczos steps for each; so many vectors of N entries are held.
        points: of the grid, 10 % wider than the eigenvalues seen.
        width: of the Gaussian g; default 1 % of the range of the eigenvalues seen.
        seed, progress: as in `top_eigenvalues`.
    """
    check_operator("operator", operator)
    samples, steps, points = (
        integer(name, value, 1) for name, value in (("samples", samples), ("steps", steps), ("points", points))
    )
    width = above_zero("width", width, optional=True)
    seed = check_seed("seed", seed)
    boolean("progress", progress, optional=True)
    steps = min(steps, operator.size)
    nodes = torch.full((samples, steps), math.nan, dtype=torch.float64)
    weights = torch.zeros(samples, steps, dtype=torch.float64)
    with bar(samples * steps, "spectrum", progress) as tick:
        for k in range(samples):
            lanczos = Lanczos(operator, probe(operator, seed, k))
            while len(lanczos.alphas) < steps and lanczos.step():
                tick.update()
            values, small = lanczos.eigen()
            nodes[k, : len(values)], weights[k, : len(values)] = values, small[0].square()
    seen = nodes[~nodes.isnan()]
    low, high = float(seen.min()), float(seen.max())
    span = max(high - low, 1e-12 * max(abs(high), 1.0))
    width = 0.01 * span if width is None else width
    grid = torch.linspace(low - 0.05 * span - 3 * width, high + 0.05 * span + 3 * width, points, dtype=torch.float64)
    bumps = torch.exp(-0.5 * ((grid - nodes.nan_to_num()[..., None]) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    return SpectralDensity(grid, (weights[..., None] * bumps).sum(dim=1), width, nodes, weights, operator.size)


class Lanczos:
    """H Q = Q T + beta q e^T, T tridiagonal, the basis Q kept and every new vector orthogonalised against it twice."""

    def __init__(self, operator: Operator, start: Tensor) -> None:
        self.operator = operator
        self.basis = [start / start.norm()]
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.ended = False

    @property
    def last_beta(self) -> float:
        """The norm of what is left of the newest product."""
        return self.betas[-1]

    def step(self) -> bool:
        """One product; False if the space is exhausted and nothing was done."""
        if self.ended or len(self.alphas) == self.operator.size:
            return False
        product = self.operator @ self.basis[-1]
        scale = float(product.norm())
        self.alphas.append(float(product @ self.basis[-1]))
        for _ in range(2):
            for q in self.basis:
                product -= (product @ q) * q
        beta = float(product.norm())
        self.betas.append(beta)
        self.ended = beta <= 100 * torch.finfo(product.dtype).eps * max(scale, abs(self.alphas[0]))
        if not self.ended:
            self.basis.append(product / beta)
        return True

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (k,) and eigenvectors (k, k) of T, float64."""
        off = torch.tensor(self.betas[:-1], dtype=torch.float64)
        T = torch.diag(torch.tensor(self.alphas, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
        return torch.linalg.eigh(T)
