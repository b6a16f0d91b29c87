"""A layer of peft that cannot be perturbed raises an error that names it and says why."""

import ast
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
from peft.tuners.lora.te import TeLinear
from peft.tuners.lora.tp_layer import LoraParallelLinear
from torch import nn

from flatlora import FlatLoraConfig, attach, get_flat_peft_model
from flatlora.layers.supported import LAYERS_OF_PEFT, QUANTIZED, REASONS, VARIANTS


class RowParallelLinear(nn.Linear):
    """Megatron's layer, as far as peft uses it."""

    input_is_parallel = True

    def __init__(self, input_size, output_size, bias=True, **_):
        super().__init__(input_size, output_size, bias=bias)


def megatron():
    backend = SimpleNamespace(RowParallelLinear=RowParallelLinear)
    options = {"backend": backend, "megatron_config": SimpleNamespace()}
    config = peft.LoraConfig(r=2, init_lora_weights=False)  # peft 0.21 fails to initialize these
    return LoraParallelLinear(RowParallelLinear(8, 6), "default", config, r=2, **options)


def transformer_engine():
    return TeLinear(nn.Linear(8, 6), "default", peft.LoraConfig(r=2), r=2)


CASES = [(megatron, "tensor parallelism"), (transformer_engine, "may normali.e x inside the layer")]


@pytest.mark.parametrize("make, reason", CASES, ids=["megatron", "transformer-engine"])
def test_attach_names_the_layer_and_the_reason(make, reason):
    model = nn.ModuleDict({"wide": make()})
    with pytest.raises(ValueError, match=f"'wide' .*cannot be perturbed: .*{reason}"):
        attach(model)
    with pytest.warns(UserWarning, match=f"'wide' .*{reason}.*trained without noise"):
        attach(model, on_unsupported="warn", schedule="constant")


def test_a_layer_split_by_tensor_parallelism():
    model = nn.ModuleDict({"wide": nn.Linear(8, 6)})
    model["wide"]._hf_tp_plan, model["wide"]._hf_device_mesh = "colwise", None
    with pytest.raises(ValueError, match="'wide' .*split by tensor parallelism, and the row norms of a part"):
        get_flat_peft_model(model, FlatLoraConfig(target_modules=["wide"]))


def test_a_base_layer_whose_forward_was_replaced():
    """compressed-tensors replaces the forward to quantize x."""
    model = nn.ModuleDict({"wide": nn.Linear(8, 6)})
    model["wide"].forward = lambda x: nn.functional.linear(x.round(), model["wide"].weight)
    with pytest.raises(ValueError, match="'wide' .*the forward of its Linear was replaced"):
        get_flat_peft_model(model, FlatLoraConfig(target_modules=["wide"]))


def classes_of_peft():
    """Class name -> names of its bases, for all classes of peft's LoRA, defined here or not."""
    folder = Path(peft.tuners.lora.__file__).parent
    found = [node for file in folder.glob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    return {c.name: {ast.unparse(base) for base in c.bases} for c in found if isinstance(c, ast.ClassDef)}


@pytest.mark.parametrize("kind", ["LoraLayer", "LoraVariant"])
def test_each_layer_and_variant_of_peft_works_or_has_a_reason(kind):
    """A class that peft adds later is refused by its name, and fails this test."""
    bases, found = classes_of_peft(), set()
    while new := {name for name in bases if bases[name] & {kind, *found}} - found:
        found |= new
    merged = {"MultiheadAttention", "ParamWrapper"}
    known = {c.__name__ for c in LAYERS_OF_PEFT + VARIANTS} | {*QUANTIZED, *REASONS} | merged
    assert {name for name in found if not name.startswith("_")} - known - {"DoraEmbeddingVariant"} == set()
