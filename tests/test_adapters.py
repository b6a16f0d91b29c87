"""Several adapters, flat and plain: add, switch, weight, delete, merge, swap, load."""

import copy
from dataclasses import dataclass

import peft
import pytest
import torch
from helpers import tiny
from helpers.dense import assert_dense, cross_entropy
from helpers.internals import strength
from peft import LoHaConfig, LoraConfig, PeftModel, XLoraConfig, inject_adapter_in_model
from peft.utils import load_peft_weights
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

import flatlora
from flatlora import EFMLoraConfig, FlatLoraConfig, attach, get_flat_peft_model, perturbation, perturbed
from flatlora.layers.flat_layer import flat_layers

SHARED = {"schedule": "constant", "seed": 7}
FLAT = {"rho": 0.3, **SHARED}
COMBINATIONS = ["svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd"]
COMBINATIONS += ["dare_linear_svd", "magnitude_prune", "magnitude_prune_svd"]


several = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")


def flat_config(rho=0.3, **kwargs):
    return FlatLoraConfig(**{**tiny.LORA, **SHARED, "rho": rho, **kwargs})


def plain_config(**kwargs):
    return LoraConfig(**{**tiny.LORA, **kwargs})


def randomized(model):
    """The model in float64, with different random numbers in every adapter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.double().train()


def model_of(**configs):
    """A model with these adapters; the first one is active."""
    (name, config), *others = configs.items()
    model = peft.get_peft_model(tiny.base_model(), config, name)
    for name, config in others:
        model.add_adapter(name, config)
    return randomized(model)


def strengths(model):
    return {strength(layer) for layer in flat_layers(model)}


@pytest.fixture
def saved(tmp_path):
    """The folder of a flat adapter in float32."""
    model = model_of(default=flat_config(r=2, lora_alpha=6)).float()
    model.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


# ---- several adapters of one model ----


def test_each_adapter_keeps_its_strength_and_of_several_the_largest_counts():
    model = model_of(strong=flat_config(0.3), weak=flat_config(0.1, r=2), plain=plain_config())
    for active, rho in [
        (["weak"], 0.1),
        (["strong"], 0.3),
        (["plain", "weak"], 0.1),
        (["weak", "strong", "plain"], 0.3),
    ]:
        model.base_model.set_adapter(active)
        assert strengths(model) == {rho}
        assert_dense(model)
    model.set_adapter("plain")
    assert strengths(model) == {0.0}
    assert torch.equal(tiny.loss(model), tiny.loss(model.eval()))


def test_a_plain_adapter_first_and_a_flat_one_beside_it():
    model = model_of(plain=plain_config(), flat=plain_config(r=2))
    attach(model, adapter_names=["flat"], rho=0.3, **SHARED)
    assert perturbation(model).rhos == {"flat": 0.3}
    assert torch.equal(tiny.loss(model), tiny.loss(model.eval()))
    model.train().set_adapter("flat")
    assert_dense(model)
    attach(model, adapter_names=["plain"], rho=0.1, **SHARED)
    model.set_adapter("plain")
    assert strengths(model) == {0.1}
    assert_dense(model)


@several
def test_a_flat_config_on_layers_that_a_plain_one_made_is_an_error_that_names_the_way_out():
    model = model_of(plain=plain_config())
    before = [type(module) for module in model.modules()]
    for add in (
        lambda: model.add_adapter("flat", flat_config()),
        lambda: inject_adapter_in_model(flat_config(), model.base_model.model, "flat"),
    ):
        with pytest.raises(ValueError, match=r"layers of a plain LoraConfig.*flatlora.attach\(model, adapter_names="):
            add()
    assert [type(module) for module in model.modules()] == before


def test_attach_by_name_refuses_what_it_does_not_know_and_what_is_flat():
    model = model_of(default=flat_config(), plain=plain_config())
    with pytest.raises(ValueError, match=r"among the LoRA adapters \['default', 'plain'\], got \['plane'\]"):
        attach(model, adapter_names=["plane"])
    with pytest.raises(TypeError, match="must be a list of names, got the string 'plain'"):
        attach(model, adapter_names="plain")
    with pytest.raises(ValueError, match=r"is flat already.*flat are \['default'\]"):
        attach(model, adapter_names=["default", "plain"], rho=0.1, **SHARED)
    with pytest.raises(ValueError, match="schedule is 'constant' for the flat adapters .* got 'cosine'"):
        attach(model, adapter_names=["plain"], rho=0.1, seed=7)
    assert perturbation(model).rhos == {"default": 0.3}


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_weighted_adapter_is_flat_with_the_strength_of_the_first(combination):
    model = model_of(default=flat_config(0.3), second=flat_config(0.1))
    tiny.loss(model)
    model.add_weighted_adapter(["default", "second"], [0.7, 0.4], "both", combination, density=0.5)
    model.set_adapter("both")
    assert strengths(model) == {0.3}
    model.set_requires_grad("both")
    assert_dense(model)


def test_deleting_leaves_the_others_as_they_were():
    model = model_of(default=flat_config())
    before = tiny.loss(model)
    model.add_adapter("second", flat_config(0.1))
    model.delete_adapter("second")
    assert perturbation(model).rhos == {"default": 0.3}
    assert torch.equal(tiny.loss(model), before)
    model.add_adapter("second", flat_config(0.2))
    model.set_adapter("second")
    assert strengths(model) == {0.2}


def test_a_batch_of_several_adapters_is_clean_in_evaluation_and_an_error_under_noise():
    model, plain = (model_of(first=kind(), second=kind()).eval() for kind in (flat_config, plain_config))
    batch = {"input_ids": tiny.tokens(), "adapter_names": ["first", "second"]}
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    with (
        perturbed(model),
        pytest.raises(ValueError, match="adapter_names gives each row .* its own merged weight"),
    ):
        model(**batch)
    with pytest.raises(ValueError, match="in training mode"):  # peft's own
        model.train()(**batch)


@pytest.mark.parametrize("deleted, kept", [("default", "second"), ("second", "default")])
def test_with_an_adapter_goes_what_the_method_keeps_for_it_and_nothing_else(deleted, kept):
    model = model_of(**{name: EFMLoraConfig(**tiny.LORA, rho=0.3) for name in ("default", "second")})
    model.base_model.set_adapter(["default", "second"])
    optimizer = torch.optim.SGD(tiny.trainable(model), lr=0.1)
    tiny.loss(model).backward()
    optimizer.step()
    before = perturbation(model).tensors()
    model.delete_adapter(deleted)
    after = perturbation(model).tensors()
    assert after.keys() == {name for name in before if name.endswith(f".{kept}")} < before.keys()
    perturbation(model).load_state_dict(perturbation(model).state_dict())


# ---- merged ----


def test_merged_unmerged_and_merged_for_good_it_is_peft():
    flat, plain = (
        model_of(default=flat_config(), second=flat_config()),
        model_of(default=plain_config(), second=plain_config()),
    )
    assert_dense(flat)
    for model in (flat, plain):
        model.merge_adapter(["default"])
    assert torch.equal(tiny.loss(flat), tiny.loss(plain))  # no noise in a merged layer
    for model in (flat, plain):
        model.unmerge_adapter()
    assert_dense(flat)
    flat, plain = (model.merge_and_unload(safe_merge=True) for model in (flat, plain))
    assert tiny.same(list(flat.state_dict().values()), list(plain.state_dict().values()))


# ---- swapped ----


@pytest.mark.parametrize("prepared", [False, True])
def test_hot_swapped_weights_are_seen_by_the_norms(saved, prepared):
    """peft swaps through `.data`, which no version counter sees, in the middle of a step too."""
    model = model_of(default=flat_config(r=2, lora_alpha=6))
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=4, config=model.peft_config)
    tiny.loss(model)
    hotswap_adapter(model, saved, "default")
    assert_dense(model)
    optimizer = torch.optim.SGD(tiny.trainable(model), lr=0.1)
    tiny.loss(model).backward()
    optimizer.step()
    tiny.loss(model)
    for layer in flat_layers(model):
        layer.lora_B["default"].weight.data.mul_(3)
    assert_dense(model)


# ---- other ways in ----


def test_a_mixed_model_perturbs_the_layers_of_its_flat_adapter():
    model = peft.get_peft_model(tiny.base_model(), flat_config(target_modules=["q_proj"]), mixed=True)
    model.add_adapter("loha", LoHaConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter(["default", "loha"])
    assert_dense(randomized(model))
    model.set_adapter("loha")
    assert torch.equal(tiny.loss(model), tiny.loss(model.eval()))


def test_adapters_of_two_kinds_on_one_layer_are_refused():
    model = peft.get_peft_model(tiny.base_model(), LoHaConfig(r=2, target_modules=["q_proj"]), mixed=True)
    with pytest.raises(
        ValueError, match="'.*q_proj' .* cannot be perturbed: it is wrapped around another adapter layer"
    ):
        model.add_adapter("flat", flat_config(target_modules=["q_proj"]))


@several
def test_injected_and_added_by_transformers_as_by_peft(any_peft):
    injected = inject_adapter_in_model(flat_config(), tiny.base_model(), "default")
    added = tiny.base_model()
    added.add_adapter(flat_config(), "default")
    losses = {tiny.loss(randomized(model)).item() for model in (injected, added, model_of(default=flat_config()))}
    assert len(losses) == 1
    for model in (injected, added):
        assert_dense(model)
    added.add_adapter(flat_config(0.1, r=2), "second")
    randomized(added).set_adapter("second")
    assert strengths(added) == {0.1}
    assert_dense(added)
    copied = copy.deepcopy(added)
    assert torch.equal(cross_entropy(copied), cross_entropy(added))
    assert_dense(copied)
    added.disable_adapters()
    assert torch.equal(tiny.loss(added), tiny.loss(added.eval()))


def test_x_lora_is_refused(saved):
    base = tiny.base_model(use_cache=False)
    model = peft.get_peft_model(base, XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={"0": saved}))
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="cannot be perturbed: its forward was replaced, as by X-LoRA"):
        attach(model, rho=0.1)
    assert [type(module) for module in model.modules()] == before


def test_a_copy_for_reference_is_clean_where_it_serves_and_leaves_the_first_alone():
    """TRL copies the config and the weights of the trained adapter, and runs it under `no_grad`."""
    model = model_of(default=flat_config())
    before = tiny.loss(model)
    model.add_adapter("ref", copy.deepcopy(model.peft_config["default"]))
    for name, parameter in model.double().named_parameters():
        if ".ref." in name:
            parameter.data.copy_(model.get_parameter(name.replace(".ref.", ".default.")))
    model.set_adapter("ref")
    with torch.no_grad():
        reference = tiny.loss(model)
    assert torch.equal(reference, tiny.loss(model.eval()))
    model.train().set_adapter("default")
    assert torch.equal(tiny.loss(model), before)
    assert_dense(model)


# ---- loaded ----


def assert_loaded(model, path, name):
    weights = load_peft_weights(path)
    found = peft.get_peft_model_state_dict(model, adapter_name=name)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key].float(), weights[key].float()) for key in weights)


def test_load_adds_to_a_flat_model_an_adapter_perturbed_as_it_was(saved):
    model = flatlora.load(model_of(default=flat_config(0.1)), saved, "other")
    assert perturbation(model).rhos == {"default": 0.1, "other": 0.3} and model.active_adapter == "default"
    assert_loaded(model, saved, "other")
    model.set_adapter("other")
    assert_dense(model.double())
    frozen = flatlora.load(model_of(default=flat_config()), saved, "other", is_trainable=False)
    assert not any(p.requires_grad for name, p in frozen.named_parameters() if ".other." in name)


def test_what_peft_loads_into_a_flat_model_is_plain_until_attach(saved):
    model = model_of(default=flat_config(0.1))
    model.load_adapter(saved, "other", is_trainable=True)
    model.double().set_adapter("other")
    assert strengths(model) == {0.0}
    attach(model, adapter_names=["other"], rho=0.3, **SHARED)
    assert_loaded(model, saved, "other")
    assert_dense(model)


def test_load_into_a_model_that_a_plain_config_made_names_the_way_out(saved):
    with pytest.raises(ValueError, match="layers of a plain LoraConfig.*flatlora.attach"):
        flatlora.load(model_of(default=plain_config()), saved, "other")


def test_from_pretrained_with_our_config_is_flat(saved):
    config = FlatLoraConfig.from_pretrained(saved)
    model = PeftModel.from_pretrained(tiny.base_model(), saved, config=config, is_trainable=True)
    assert type(model.peft_config["default"]) is FlatLoraConfig
    assert_loaded(model, saved, "default")
    assert_dense(model.double().train())


def test_loaded_by_transformers_it_is_plain_until_attach(saved, any_peft):
    model = tiny.base_model()
    model.load_adapter(saved, is_trainable=True)
    attach(model.double().train(), rho=0.3, **SHARED)
    assert_dense(model)


# ---- classes derived from ours and from peft's ----


@dataclass
class Derived(FlatLoraConfig):
    rho: float = 0.3
    note: str = "mine"


@dataclass
class DerivedPlain(LoraConfig):
    note: str = "mine"


def test_a_class_derived_from_our_config_is_flat_saved_and_loaded(tmp_path):
    model = get_flat_peft_model(tiny.base_model(), Derived(**tiny.LORA, **SHARED, note="new"))
    model.save_pretrained(tmp_path)
    again = flatlora.load(tiny.base_model(), tmp_path)
    assert type(again.peft_config["default"]) is Derived and again.peft_config["default"].note == "new"
    assert type(PeftModel.from_pretrained(tiny.base_model(), tmp_path).peft_config["default"]) is LoraConfig
    assert_dense(randomized(again))
    with pytest.raises(ValueError, match="layers of a plain LoraConfig"):
        model_of(default=plain_config(), second=Derived(**tiny.LORA, **SHARED))


def test_a_class_derived_from_pefts_config_stays_plain():
    model = model_of(flat=flat_config(), plain=DerivedPlain(**tiny.LORA))
    assert type(model.peft_config["plain"]) is DerivedPlain
    model.set_adapter("plain")
    assert strengths(model) == {0.0}
    assert_dense(attach(model_of(default=DerivedPlain(**tiny.LORA)), rho=0.3, **SHARED))
