"""LoRA's variants: their own forward plus x eps^T, with eps relative to the rows of their merged weight."""

import peft
import pytest
import torch
import torch.nn.functional as F
from helpers import versions
from helpers.internals import row_norms
from helpers.layer_cases import SEED, Holder
from helpers.noise import epsilon
from peft.tuners.lora import BdLoraConfig, MontecloraConfig, VeloraConfig
from torch import nn

from flatlora import EFMLoraConfig, FlatLoraConfig, get_flat_peft_model, unperturbed

RHO = 0.3
VARIANTS = {
    "alora": {"alora_invocation_tokens": [1]},
    "velora": {"velora_config": VeloraConfig(num_groups=2)},
    "bdlora-a": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["layer"], nblocks=2)},
    "bdlora-b": {"use_bdlora": BdLoraConfig(target_modules_bd_b=["layer"], nblocks=2)},
    **versions.kasa(),
    "monteclora": {"monteclora_config": MontecloraConfig()},
    "mica": {"init_lora_weights": "mica"},
}
# peft warns so of a model with one layer
pytestmark = pytest.mark.filterwarnings("ignore:aLoRA is currently only supported for CAUSAL_LM task:UserWarning")
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def flat_layer(variant, **settings):
    torch.manual_seed(2)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["layer"], "rho": RHO, "schedule": "constant", "seed": SEED}
    config = FlatLoraConfig(**options | variant | settings)
    base = Holder(nn.Linear(12, 8))  # peft wants float32 for MiCA's initialization
    model = get_flat_peft_model(base, config, autocast_adapter_dtype=False).double().train()
    layer = model.base_model.model.layer
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if "lora_A" in name or "lora_B" in name or "lora_diag" in name:
                p.copy_(0.3 * torch.randn_like(p))
    return model, layer


def call(layer, x):
    """The layer's forward, with the same random numbers of the variant and of dropout each time."""
    torch.manual_seed(4)
    alora = isinstance(layer.lora_variant.get("default"), peft.tuners.lora.variants.ALoraLinearVariant)
    for sampler in getattr(layer, "lora_monteclora_sampler", {}).values():
        sampler.sampler.index = 0
    return layer(x, **({"alora_offsets": [2, None, 3]} if alora else {}))


def merged_weight(layer):
    weight, variant = layer.base_layer.weight.detach().clone(), layer.lora_variant["default"]
    if isinstance(variant, peft.tuners.lora.variants.ALoraLinearVariant):  # peft does not merge it
        return weight + layer.get_delta_weight("default")
    return variant.merge_safe(layer, "default", weight)


def dense_noise(layer):
    return epsilon(merged_weight(layer), layer.stream, rho=RHO, seed=SEED)


@every_variant
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_variants_own_forward_and_the_noise(variant, dropout):
    model, layer = flat_layer(variant, lora_dropout=dropout)
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    out = call(layer, x)
    with unperturbed(model):
        clean = call(layer, x)
    expected = clean + F.linear(x, dense_noise(layer))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert (out - clean).abs().max() > 1e-2
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    target = torch.randn_like(out)
    got = torch.autograd.grad(((out - target) ** 2).sum(), leaves, allow_unused=True)
    want = torch.autograd.grad(((expected - target) ** 2).sum(), leaves, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@every_variant
def test_without_strength_it_is_peft_bit_for_bit(variant):
    flat, _ = flat_layer(variant, rho=0.0)
    torch.manual_seed(2)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["layer"]}
    holder = Holder(nn.Linear(12, 8))
    plain = peft.get_peft_model(holder, peft.LoraConfig(**options | variant), autocast_adapter_dtype=False)
    plain = plain.double().train()
    plain.load_state_dict(flat.state_dict())
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    assert torch.equal(call(flat.base_model.model.layer, x), call(plain.base_model.model.layer, x))


@every_variant
def test_row_norms_follow_the_factors(variant):
    """After a step the norms are those of the new merged weight."""
    _, layer = flat_layer(variant)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    optimizer = torch.optim.SGD((p for p in layer.parameters() if p.requires_grad), lr=0.1)
    call(layer, x).square().sum().backward()
    optimizer.step()
    merged = merged_weight(layer)
    torch.testing.assert_close(row_norms(layer), merged.norm(dim=1), rtol=1e-10, atol=0)


@every_variant
def test_methods_of_the_factors_refuse_it(variant):
    with pytest.raises(ValueError, match="EFMLora is not defined for .*Variant"):
        get_flat_peft_model(Holder(nn.Linear(12, 8)), EFMLoraConfig(r=4, target_modules=["layer"], **variant))


def test_arrow_is_an_error_that_names_it():
    _, layer = flat_layer({})
    layer.lora_variant["default"] = peft.tuners.lora.variants.ArrowLinearVariant()
    from flatlora.layers.supported import unsupported

    assert unsupported(layer, "default").startswith("Arrow mixes the adapters for each token")
