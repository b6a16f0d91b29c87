"""Operators name an argument that does not fit before a kernel reads or writes its memory."""

import pytest
import torch
from helpers.noise_cases import key_of, random_case
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from flatlora.ops import (
    RowNoise,
    add_noise_,
    blocks,
    lora_linear,
    merged_row_norms,
    native,
    perturb_weight,
    perturbed_conv,
    perturbed_linear,
    rebuilt_linear,
    row_noise,
    row_norms_of_sum,
    squared_row_norms,
)
from flatlora.ops.checks import overlaps_itself

needs_c = pytest.mark.skipif(native.LIBRARY is None, reason="the C kernel was not built")
BACKENDS = ["reference", "torch", pytest.param("c", marks=needs_c)]
M, N, R = 9, 7, 3
W, STD, KEY = torch.ones(M, N), torch.ones(M), key_of(1, 2)
B, A = torch.ones(M, R), torch.ones(R, N)
X = torch.ones(2, N)


class Rebuilt:
    """A stored weight that is not at hand as a tensor."""

    shape, dtype = torch.Size((M, N)), torch.float32

    def __len__(self):
        return M

    def __getitem__(self, rows):
        return W[rows]


def conv(row_std=STD, key=KEY, layer=0, bias=None, **options):
    geometry = {"stride": (1,), "padding": (0,), "dilation": (1,), "groups": 1}
    return perturbed_conv(torch.ones(1, N, 4), W[:, :, None], bias, row_std, key, layer, **geometry, **options)


def lora(row_std=STD, key=KEY, layer=0, weight=W, bias=None, A=A, B=B, **options):
    return lora_linear(X, weight, bias, A, B, 1.0, RowNoise(row_std, 1.0, key, layer), **options)


# every operator that makes noise, as a function of the standard deviations, the key and the layer
NOISY = {
    "perturb_weight": lambda std=STD, key=KEY, layer=0, **o: perturb_weight(W, std, key, layer, **o),
    "row_noise": lambda std=STD, key=KEY, layer=0, **o: row_noise(torch.arange(M), std, key, layer, N, **o),
    "perturbed_linear": lambda std=STD, key=KEY, layer=0, **o: perturbed_linear(X, W, None, std, key, layer, **o),
    "rebuilt_linear": lambda std=STD, key=KEY, layer=0, **o: rebuilt_linear(X, Rebuilt(), None, std, key, layer, **o),
    "perturbed_conv": conv,
    "add_noise_": lambda std=STD, key=KEY, layer=0, **o: add_noise_(W.clone(), std, key, layer, **o),
    "lora_linear": lora,
}
WRONG_STD = [
    torch.ones(1), torch.ones(0), torch.ones(M - 1), torch.ones(M + 1), torch.ones(M, 1), torch.ones(()),
    None, [1.0] * M,
    torch.ones(M, dtype=torch.int64), torch.ones(M, dtype=torch.bool), torch.ones(M, dtype=torch.complex64),
    torch.ones(M, device="meta"),
]  # fmt: skip
WRONG_KEYS = [
    torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64),
    torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int32), torch.zeros(2), (1, 2), None,
    torch.zeros(2, dtype=torch.int64, device="meta"),
]  # fmt: skip


@pytest.mark.parametrize("block", [2**24, 64], ids=["", "blocks"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", NOISY)
def test_noise_of_wrong_arguments(monkeypatch, operator, backend, block):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    run = NOISY[operator]
    run(backend=backend)
    for std in WRONG_STD:
        with pytest.raises((ValueError, TypeError), match="(row_std|norms) must be"):
            run(std, backend=backend)
    for key in WRONG_KEYS:
        with pytest.raises((ValueError, TypeError), match="key must be"):
            run(STD, key, backend=backend)
    for layer in (2**63, -(2**63) - 1, 2**80, 10**400, 1.0, "1", None):
        with pytest.raises((ValueError, TypeError), match="layer must be an integer"):
            run(STD, KEY, layer, backend=backend)
    for layer in (-1, 2**32 - 1, 2**63 - 1):  # modulo 2^32
        run(STD, KEY, layer, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_block_of_rows_lies_within_what_the_contract_counts(backend):
    for first in (-1, 2**32 - M + 1, 2**32, 2**80, 0.5, None):
        with pytest.raises((ValueError, TypeError), match="first_row must be an integer"):
            perturb_weight(W, STD, KEY, 0, first, backend=backend)
    perturb_weight(W, STD, KEY, 0, 2**32 - M, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_rows(backend):
    def run(rows, columns=4):
        return row_noise(rows, torch.ones(2), KEY, 0, columns, backend=backend)

    wrong = [torch.zeros(2), torch.zeros(2, dtype=torch.bool), torch.zeros(2, 1, dtype=torch.int64)]
    for rows in (*wrong, torch.tensor([0, -1]), torch.tensor([2**32, 0])):
        with pytest.raises((ValueError, TypeError), match="rows must be"):
            run(rows)
    for columns in (-1, 2**40, 2**80, 1.0):
        with pytest.raises((ValueError, TypeError), match="columns must be an integer"):
            run(torch.tensor([0, 1]), columns)
    with pytest.raises(ValueError, match="(row_std|norms) must be of shape"):
        row_noise(torch.zeros(3, dtype=torch.int64), torch.ones(2), KEY, 0, 4, backend=backend)
    assert torch.equal(run(torch.tensor([5, 2**32 - 1]))[:1], run(torch.tensor([5, 6], dtype=torch.uint8))[:1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_has_memory_of_its_own(backend):
    def run(out, weight=W):
        return perturb_weight(weight, STD, KEY, 0, out=out, backend=backend)

    for out in (
        torch.zeros(1).expand(M, N),
        torch.zeros(N).expand(M, N),
        torch.zeros(M + N).as_strided((M, N), (1, 1)),
    ):
        with pytest.raises(ValueError, match="out must not overlap itself"):
            run(out)
    both = torch.zeros(M, 2 * N)
    for weight, out in ((W, W), (both[:, :N], both[:, N - 1 : -1]), (both.view(-1)[: M * N].view(M, N), both[:, :N])):
        with pytest.raises(ValueError, match="out must not overlap weight"):
            run(out, weight)
    with pytest.raises(ValueError, match="out must not overlap row_std"):
        perturb_weight(W, both.view(-1)[:M], KEY, 0, out=both[:, :N], backend=backend)
    # side by side, or one between the other: these are right
    expected = perturb_weight(torch.zeros(M, N), STD, KEY, 0, backend=backend)
    for weight, out in ((both[:, :N], both[:, N:]), (both[:, ::2], both[:, 1::2])):
        assert torch.equal(run(out, weight.zero_()), expected) and not weight.any()


def test_overlap_by_brute_force():
    for m in range(1, 5):
        for n in range(1, 5):
            for down in range(7):
                for right in range(7):
                    offsets = [i * down + j * right for i in range(m) for j in range(n)]
                    view = torch.zeros(100).as_strided((m, n), (down, right))
                    assert overlaps_itself(view) == (len(set(offsets)) < m * n), (m, n, down, right)


def fake():
    with FakeTensorMode():
        return torch.ones(M, N)


def shortened(elements):
    tensor = torch.ones(M, N)
    tensor.untyped_storage().resize_(4 * elements)
    return tensor


# float32 (9, 7) matrices whose numbers are not where a kernel would look for them
WITHOUT_MEMORY = {
    "fake": fake,
    "wrapper": lambda: TwoTensor(torch.ones(M, N), torch.ones(M, N)),
    "sparse": lambda: torch.ones(M, N).to_sparse(),
    "freed": lambda: shortened(0),
    "too short": lambda: shortened(M * N - 1),
    "functional": lambda: torch._to_functional_tensor(torch.ones(M, N)),
    "negative": lambda: torch.full((M, N), 1 + 1j).conj().imag,
    "not aligned": lambda: torch.frombuffer(bytearray(4 * M * N + 1), dtype=torch.float32, offset=1).view(M, N),
}


@needs_c
@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_no_memory(name):
    tensor = WITHOUT_MEMORY[name]()
    taken = {
        "weight": lambda: native.perturb(tensor, STD, KEY, 0, torch.empty(M, N)),
        "out": lambda: native.perturb(W, STD, KEY, 0, tensor),
        "A": lambda: native.merged_row_norms(torch.ones(5, N), torch.ones(5, M), tensor, 1.0),
        "right": lambda: native.add_product(torch.ones(2, N), torch.ones(2, M), tensor),
        "weight ": lambda: native.merged_row_norms(tensor, B, A, 1.0),
        "out ": lambda: native.add_product(tensor, B, A),
    }
    if name == "negative":  # factors are copied where they are not contiguous, and the copy has the right sign
        opposite = torch.full((5, N), float(M))  # of a product of M ones and minus ones
        assert torch.equal(native.merged_row_norms(opposite, torch.ones(5, M), tensor, 1.0), torch.zeros(5))
        del taken["A"], taken["right"]
    for argument, run in taken.items():
        own = f"^{argument.strip()} .*(must|needs)|memory format"  # torch makes no sparse tensor contiguous
        with pytest.raises((ValueError, TypeError, RuntimeError), match=own):
            run()


@needs_c
def test_no_memory_inside_of_transforms():
    def vmapped(weight):
        native.perturb(weight, STD, KEY, 0, torch.empty(M, N))
        return weight

    with pytest.raises(TypeError, match="(weight|out) must be a plain strided tensor"):
        torch.vmap(vmapped)(torch.ones(2, M, N))
    with pytest.raises(TypeError, match="(weight|out) must be a plain strided tensor"):
        torch.func.grad(lambda weight: vmapped(weight).sum())(W)


def test_meta_tensors_say_so():
    with pytest.raises(ValueError, match="'meta' has no memory"):
        perturb_weight(W.to("meta"), STD.to("meta"), KEY.to("meta"), 0)


WRONG_FACTORS = [
    (B[:2], A, "B"), (B[:, :2], A, "B"), (torch.cat([B, B]), A, "B"), (B.int(), A, "B"), (B.to("meta"), A, "B"),
    (None, A, "B"),
    (B, A[:, :2], "A"), (B, A.T, "A"), (B, A.int(), "A"), (B, A.to("meta"), "A"), (B, A[0], "A"), (B, None, "A"),
]  # fmt: skip


@pytest.mark.parametrize("block", [2**24, 64], ids=["", "blocks"])
@pytest.mark.parametrize("b, a, name", WRONG_FACTORS)
def test_factors_that_do_not_fit(monkeypatch, b, a, name, block):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    squared = squared_row_norms(W)
    runs = [
        lambda: merged_row_norms(W, squared, b, a),
        lambda: merged_row_norms(W.half(), squared, b, a),
        lambda: lora(A=a, B=b),
        lambda: lora_linear(X, W, None, a, b, 1.0),
    ]
    if native.LIBRARY is not None:
        norms = torch.empty(M)
        runs.append(lambda: perturb_weight(W, norms, KEY, 0, factors=(b, a, 1.0)))
    if a is not None and a.ndim == 2 and a.shape[1] == N:
        runs.append(lambda: row_norms_of_sum(squared, torch.ones(a.shape[0], M), b, a))
    for run in runs:
        with pytest.raises((ValueError, TypeError), match=f"{name} must be"):
            run()


@needs_c
def test_norms_are_written_to_the_tensor_that_was_given_or_not_at_all():
    strided, wide = torch.ones(M, 2)[:, 0], torch.ones(M, dtype=torch.float64)
    for norms in (strided, wide, torch.ones(M, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="row_std is written"):
            perturb_weight(W, norms, KEY, 0, factors=(B, A, 1.0), backend="c")
    for weight in (W.double(), W.half(), W.T.contiguous().T):
        with pytest.raises(ValueError, match="row_std is written"):
            perturb_weight(weight, STD.clone(), KEY, 0, factors=(B, A, 1.0), backend="c")
    both = torch.ones(M * N)
    with pytest.raises(ValueError, match="row_std must not overlap weight"):
        perturb_weight(both.view(M, N), both[:M], KEY, 0, factors=(B, A, 1.0), backend="c")
    with pytest.raises(ValueError, match="factors must be None"):
        perturb_weight(W, STD.clone(), KEY, 0, factors=(B, A, 1.0), backend="reference")


@needs_c
@pytest.mark.parametrize("m, n, r", [(4, 5, 0), (4, 0, 2), (0, 5, 2), (0, 0, 0)])
def test_empty_sizes(m, n, r):
    weight, b, a = torch.randn(m, n), torch.randn(m, r), torch.randn(r, n)
    expected = (weight + b @ a).norm(dim=1)
    norms = torch.full((m,), float("nan"))
    out = perturb_weight(weight, norms, KEY, 0, factors=(b, a, 1.0), backend="c")
    torch.testing.assert_close(norms, expected)
    torch.testing.assert_close(merged_row_norms(weight, None, b, a), expected)
    torch.testing.assert_close(squared_row_norms(weight), weight.square().sum(dim=1))
    for backend in ("c", "torch", "reference"):
        assert perturb_weight(weight, norms, KEY, 0, backend=backend).shape == out.shape == (m, n)


@needs_c
def test_wrong_kernels_and_products():
    for kernel in (-1, native.BEST + 1, 2**40, "avx2"):
        with pytest.raises((ValueError, TypeError), match="kernel must be an integer"):
            native.perturb(W, STD, KEY, 0, torch.empty(M, N), kernel=kernel)
    out = torch.zeros(M, N)
    for bad, name in [((out, B[:2], A), "left"), ((out, B, A[:, :2]), "right"), ((out, B.double(), A), "left")]:
        with pytest.raises((ValueError, TypeError), match=f"{name} must be"):
            native.add_product(*bad)
    for bad in (out.T.contiguous().T, torch.zeros(N).expand(M, N)):
        with pytest.raises(ValueError, match="out must be on the CPU, of contiguous rows"):
            native.add_product(bad, B, A)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_fits_is_taken_as_it_comes(backend):
    """Standard deviations in any layout and floating dtype, a strided key, a Parameter, a subclass without tricks."""

    class Named(torch.Tensor):
        pass

    weight, std = random_case(M, N, torch.float32)
    std = std.bfloat16().float()
    expected = perturb_weight(weight, std, KEY, 3, backend=backend)
    keys = torch.stack([KEY, KEY], dim=1)[:, 0]
    forms = [std.double(), std.bfloat16(), torch.stack([std, std], dim=1)[:, 1]]
    for form in forms:
        assert torch.equal(perturb_weight(weight, form, keys, 3, backend=backend), expected)
    for form in (torch.nn.Parameter(weight, requires_grad=False), weight.as_subclass(Named)):
        assert torch.equal(perturb_weight(form, std, KEY, 3, backend=backend).as_subclass(torch.Tensor), expected)
    one = perturb_weight(weight, std[:1].expand(M), KEY, 3, backend=backend)
    assert torch.equal(one, perturb_weight(weight, std[:1].repeat(M), KEY, 3, backend=backend))


@pytest.mark.parametrize("bias", [torch.ones(M + 1), torch.ones(1), torch.ones(M, 1)], ids=str)
def test_wrong_bias(bias):
    for run in (lambda: lora(bias=bias), lambda: perturbed_linear(X, W, bias, STD, KEY, 0)):
        with pytest.raises(ValueError, match="bias must be of shape"):
            run()


def test_too_many_elements():
    with pytest.raises(ValueError, match="m n < 2\\^60"):
        perturb_weight(torch.zeros(1).expand(2**32, 2**30), torch.ones(1).expand(2**32), KEY, 0)
