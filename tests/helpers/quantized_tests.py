"""Tests of a quantized layer: what peft computes, plus x eps^T.

eps is relative to the rows of the dequantized merged weight. A file of tests derives a class from `QuantizedLayerTests`
and names its cases.
"""

import copy
import gc
import io

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flatlora.ops.blocks
from flatlora import EFMLoraConfig, detach, get_flat_peft_model, perturbation, unperturbed
from helpers.internals import row_norms
from helpers.layer_cases import RHO, SEED
from helpers.memory import saved_bytes
from helpers.noise import epsilon
from helpers.quantized_cases import SETTINGS, Holder, M, N, flat_model


def clean(model, x):
    torch.manual_seed(5)
    with unperturbed(model):
        return model(x)


def noisy(model, x):
    torch.manual_seed(5)
    return model(x)


def merged_weight(model, layer):
    """W' of shape (m, n), from the outputs of the unit vectors."""
    layer.lora_dropout.eval()
    # with gradients, because bitsandbytes has other kernels without
    out = clean(model, torch.cat([torch.eye(N), torch.zeros(1, N)]).requires_grad_()).detach()
    layer.lora_dropout.train()
    return (out[:-1] - out[-1]).T


def dense_noise(model, layer, sample=0):
    return epsilon(merged_weight(model, layer), layer.stream, rho=RHO, seed=SEED, sample=sample)


def trained(layer):
    return [p for p in layer.parameters() if p.requires_grad]


def assert_close(first, second, tolerance):
    for a, b in zip(first, second, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def dense_copies():
    """The number of live float32 tensors of the weight's size."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.layout is torch.strided]
    return sum(t.is_floating_point() and t.untyped_storage().nbytes() == 4 * M * N for t in tensors)


def frozen_bits(base):
    """Copies of all tensors of a quantized layer, with its quantization state."""
    found = {name: t.detach() for name, t in base.state_dict().items()}
    weight = base._parameters.get("weight")
    if hasattr(weight, "quant_state"):
        found |= weight.quant_state.as_dict(packed=True)
    if type(weight).__module__.startswith("torchao."):
        found = {name: getattr(weight, name) for name in ("qdata", "scale")}
    return {name: t.clone().reshape(-1).view(torch.uint8) for name, t in found.items() if isinstance(t, torch.Tensor)}


def only(keep):
    """A test of the cases for which `keep(case)` is true."""

    def mark(test):
        test.keep = keep
        return test

    return mark


def linear_in_x(case):
    return case.made_by_peft and not case.config.get("use_dora") and case.name != "inc"  # INC rounds x


class QuantizedLayerTests:
    """Each test runs once for each of `cases`."""

    cases = ()
    pytestmark = [
        pytest.mark.filterwarnings("ignore:Merge lora module to .-bit linear:UserWarning"),
        pytest.mark.filterwarnings("ignore:Unmerge lora module to .-bit linear:UserWarning"),
        pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning"),
    ]

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            keep = getattr(metafunc.function, "keep", lambda case: True)
            cases = [case for case in self.cases if keep(case)]
            metafunc.parametrize("case", cases, ids=[case.name for case in cases])

    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    def test_what_peft_computes_and_the_noise(self, case, dropout):
        model, layer = flat_model(case, lora_dropout=dropout)
        x = torch.randn(3, 5, N, requires_grad=True)
        out, expected = noisy(model, x), clean(model, x) + F.linear(x, dense_noise(model, layer))
        assert_close([out], [expected], case.tolerance)
        assert (out - clean(model, x)).norm() > 0.1 * RHO * out.norm()
        target = torch.randn_like(out)
        leaves = [x, *trained(layer)]
        got = torch.autograd.grad(((out - target) ** 2).sum(), leaves)
        want = torch.autograd.grad(((expected - target) ** 2).sum(), leaves)
        assert_close(got, want, 2 * case.tolerance)

    def test_many_small_blocks_give_the_same(self, case, monkeypatch):
        model, _ = flat_model(case)
        x = torch.randn(3, N, requires_grad=True)
        start = perturbation(model).state_dict()
        whole = model(x)
        (grad,) = torch.autograd.grad(whole.sum(), [x], retain_graph=True)
        perturbation(model).load_state_dict(start)  # the same sample again
        monkeypatch.setattr(flatlora.ops.blocks, "BLOCK_BYTES", 1)
        monkeypatch.setattr(flatlora.ops.blocks, "ROW_MULTIPLE", 2)
        out = model(x)
        assert_close(
            [out, *torch.autograd.grad(out.sum(), [x])], [whole, grad], 1e-6 if case.tolerance < 1e-3 else 0.02
        )

    def test_row_norms_are_those_of_the_dequantized_merged_weight(self, case):
        model, layer = flat_model(case)
        model(torch.randn(3, N))
        optimizer = torch.optim.SGD(trained(layer), lr=0.1)
        for _ in range(2):
            torch.testing.assert_close(
                row_norms(layer), merged_weight(model, layer).norm(dim=1), rtol=case.tolerance, atol=0
            )
            model(torch.randn(3, N)).square().sum().backward()
            optimizer.step()

    def test_the_quantized_weight_is_never_written_and_no_copy_of_it_is_kept(self, case):
        model, layer = flat_model(case)
        base = layer.get_base_layer()
        model(torch.randn(2, N))  # some quantize at their first forward
        before, attributes, copies = frozen_bits(base), set(base.__dict__), dense_copies()
        optimizer = torch.optim.AdamW(trained(layer), lr=0.1)
        for _ in range(3):
            model(torch.randn(2, N)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        after = frozen_bits(base)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert set(base.__dict__) == attributes
        assert dense_copies() == copies

    @only(lambda case: case.made_by_peft)
    def test_without_strength_it_is_peft_bit_for_bit(self, case):
        flat, flat_layer = flat_model(case, rho=0.0)
        torch.manual_seed(1)
        plain = peft.get_peft_model(case.make(), peft.LoraConfig(**SETTINGS | case.config))
        layer = plain.base_model.model.layer
        for p, q in zip(trained(layer), trained(flat_layer), strict=True):
            p.data.copy_(q)
        plain.train()
        optimizers = [torch.optim.SGD(trained(one), lr=0.1) for one in (layer, flat_layer)]
        for seed in range(3):
            x = torch.randn(4, N, generator=torch.Generator().manual_seed(seed))
            for model, optimizer in zip((plain, flat), optimizers, strict=True):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(trained(layer), trained(flat_layer), strict=True))

    def test_what_is_saved_for_backward_is_of_order_m(self, case):
        model, _layer = flat_model(case)
        x = torch.randn(3, N, requires_grad=True)
        model(x)
        frozen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if t.data_ptr()}
        with unperturbed(model):
            plain, _keep = saved_bytes(lambda: model(x), frozen)
        flat, _keep2 = saved_bytes(lambda: model(x), frozen)
        assert flat - plain <= 4 * M + 64

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_changes_no_bit(self, case, reentrant):
        results = []
        for way in (None, reentrant):
            model, layer = flat_model(case, lora_dropout=0.2)
            holder = model if case.wrapper else model.base_model.model
            holder.checkpointing = way
            torch.manual_seed(3)
            x = torch.randn(4, N, requires_grad=True)
            model(x).square().sum().backward()
            results.append([x.grad, *(p.grad for p in trained(layer))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_evaluation_is_clean_and_training_goes_on_after_it(self, case):
        model, layer = flat_model(case)
        x = torch.randn(3, 5, N, requires_grad=True)
        start, results = perturbation(model).state_dict(), []
        for _ in range(2):
            out = model(x)
            results.append([out, *torch.autograd.grad(out.square().sum(), [x, *trained(layer)])])
            perturbation(model).load_state_dict(start)  # the same sample again
            with torch.no_grad():
                assert torch.equal(model.eval()(x), clean(model, x))
            model.train()
        # on some CPUs bitsandbytes packs its weight for inference at its first evaluation, with scales in bfloat16
        assert_close(*results, max(case.tolerance, 0.01))

    def test_a_copy_and_a_pickle_go_on_alike_and_detach_leaves_no_trace(self, case):
        model, layer = flat_model(case)
        x = torch.randn(3, N)
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        if case.name not in ("torchao", "nf4-dora"):  # peft's own cannot be pickled either
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            assert torch.equal(torch.load(file, weights_only=False)(x), expected)
        with unperturbed(model):
            expected = model(x)
        detach(model)
        assert type(layer).__module__.startswith("peft.") and not hasattr(layer, "perturbation")
        assert torch.equal(model(x), expected)

    @only(lambda case: case.made_by_peft)
    def test_the_saved_adapter_is_plain(self, case, tmp_path):
        model, _ = flat_model(case)
        model.save_pretrained(tmp_path)
        plain = peft.get_peft_model(case.make(), peft.LoraConfig(**SETTINGS | case.config))
        assert peft.get_peft_model_state_dict(plain).keys() == peft.utils.load_peft_weights(str(tmp_path)).keys()

    @only(linear_in_x)
    def test_efmlora_on_a_quantized_base_is_efmlora_on_its_dequantized_weight(self, case):
        config = EFMLoraConfig(**SETTINGS, rho=0.1, schedule="constant")
        torch.manual_seed(1)
        model = get_flat_peft_model(case.make(), config).train()
        layer = model.base_model.model.layer
        twin = Holder(nn.Linear(N, M))
        with torch.no_grad():
            twin.layer.weight.copy_(merged_weight(model, layer))  # B = 0
            twin.layer.bias.copy_(clean(model, torch.zeros(1, N))[0])
        twin = get_flat_peft_model(twin, config).train()
        for p, q in zip(trained(twin), trained(layer), strict=True):
            p.data.copy_(q)
        for one in (model, twin):
            optimizer = torch.optim.SGD(trained(one), lr=0.1)
            for seed in range(4):
                x = torch.randn(8, N, generator=torch.Generator().manual_seed(seed))
                optimizer.zero_grad()
                one(x).square().mean().backward()
                optimizer.step()
        assert layer.offsets["lora_B", "default"].norm() > 0
        assert_close(trained(model), trained(twin), 20 * case.tolerance)

    def test_compiled_it_is_the_same(self, case):
        model, _ = flat_model(case)
        x = torch.randn(3, N)
        eager = model(x)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), eager, rtol=0, atol=0)
