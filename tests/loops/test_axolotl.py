"""The plug-in for axolotl, called in axolotl's order on a stand-in for its base class.

`.ci/axolotl` runs axolotl itself, which asks for other versions than these tests.
"""

import re
import sys
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType

import peft
import pytest
from helpers import tiny
from helpers.runs import adapter, assert_same_adapter, plain_model, trainer
from transformers import Trainer

import flatlora
from flatlora import FlatLoraCallback, FlatLoraConfig, TwoPassTrainerMixin, perturbation
from flatlora.integrations.flat_arguments import FlatArguments

pytest.importorskip("pydantic")
NAME = "flatlora.integrations.axolotl"
KERNELS = ["lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"]


@pytest.fixture
def module(monkeypatch):
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})  # its methods do nothing
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield __import__(NAME, fromlist=["FlatLoraPlugin"])
    del sys.modules[NAME]


def load(module, yaml):
    """The plug-in, and the configuration after `register` and axolotl's validation, which drops what is None."""
    plugin = module.FlatLoraPlugin()
    plugin.register(yaml)
    arguments = module.FlatLoraArgs(**{key: value for key, value in yaml.items() if key.startswith("flat_")})
    others = {key: value for key, value in yaml.items() if not key.startswith("flat_")}
    return plugin, {**others, **arguments.model_dump(exclude_none=True)}


def test_the_entry_point_names_the_plug_in(module):
    text = (Path(flatlora.__file__).parents[1] / "pyproject.toml").read_text()
    (target,) = re.findall(r'\[project.entry-points."axolotl.plugins"\]\nflatlora = "(.*)"', text)
    assert target == f"{NAME}:FlatLoraPlugin" and hasattr(module, "FlatLoraPlugin")


def test_axolotl_learns_of_every_key(module):
    path, name = module.FlatLoraPlugin().get_input_args().rsplit(".", 1)
    arguments = getattr(sys.modules[path], name)
    assert arguments.model_fields.keys() == {f.name for f in fields(FlatArguments)}
    assert arguments(flat_rho="5e-2").flat_rho == 0.05  # YAML reads 5e-2 as text


@pytest.mark.parametrize("yaml", [{"adapter": "lora", "lora_mlp_kernel": True}, {"adapter": None}, {"adapter": "mora"}])
def test_without_a_key_the_plug_in_does_nothing(module, yaml, tmp_path):
    before, model = dict(yaml), plain_model()
    plugin, cfg = load(module, yaml)
    run = trainer(model, tmp_path)
    callbacks = [*run.callback_handler.callbacks]
    plugin.post_lora_load(cfg, model)
    plugin.post_trainer_create(cfg, run)
    assert yaml == before == cfg and run.callback_handler.callbacks == callbacks
    assert type(model.peft_config["default"]) is peft.LoraConfig


@pytest.mark.parametrize(
    "yaml, adapter",
    [
        ({"adapter": "flatlora"}, "lora"),
        ({"adapter": "flatlora", "load_in_4bit": True}, "qlora"),
        ({"adapter": "lora", "flat_rho": 0.1}, "lora"),
        ({"adapter": "qlora", "flat_rho": 0.1}, "qlora"),
    ],
)
def test_for_axolotl_the_adapter_is_lora_without_kernels(module, yaml, adapter):
    _, cfg = load(module, {**yaml, "lora_o_kernel": False})
    assert cfg["adapter"] == adapter and cfg["flat_method"] == "flatlora"
    assert [cfg[name] for name in KERNELS] == [False] * 4
    again = dict(cfg)
    module.FlatLoraPlugin().register(again)  # a worker reads the configuration that its parent has translated
    assert again == cfg


@pytest.mark.parametrize(
    "yaml, seed",
    [
        ({"seed": 3}, 3),
        ({"seed": 3, "flat_seed": 0}, 0),
        ({}, None),
        ({"seed": 3, "flat_method": "bilora"}, None),
        ({"seed": 3, "flat_method": "efmlora"}, None),
    ],
)
def test_the_noise_has_the_seed_of_the_run(module, yaml, seed):
    assert load(module, {"adapter": "flatlora", **yaml})[1].get("flat_seed") == seed


@pytest.mark.parametrize(
    "yaml, message",
    [
        *(({name: True}, f"{name} must be false, got true: these kernels") for name in KERNELS),
        ({"dsv4_shared_mlp_lora_kernel": True}, "dsv4_shared_mlp_lora_kernel must be false"),
        ({"relora": True}, "relora must be false, got true"),
        ({"flat_roh": 0.1}, "flat_roh: no setting of FlatLoraConfig"),
        ({"flat_method": "bar", "flat_seed": 1}, "flat_seed: no setting of BarConfig"),
        ({"flat_rho": -1}, "rho must be finite and >= 0, got -1"),
        ({"flat_rho": "much"}, "flat_rho"),
        ({"adapter": "llama-adapter", "flat_rho": 0.1}, "flat_rho: the adapter must be flatlora, lora, or qlora, got"),
    ],
)
def test_mistakes_are_errors(module, yaml, message):
    with pytest.raises(ValueError, match=message):
        module.FlatLoraPlugin().register({"adapter": "flatlora", **yaml})


@pytest.mark.parametrize("method, kind", [("flatlora", FlatLoraConfig), ("fmlora", flatlora.FMLoraConfig)])
def test_a_model_of_axolotl_trains_like_a_flat_one(module, method, kind, tmp_path):
    own = {"rho": 0.2, **({"seed": 7} if method == "flatlora" else {})}
    yaml = {"adapter": "flatlora", "flat_method": method, **{f"flat_{name}": value for name, value in own.items()}}
    plugin, cfg = load(module, yaml)
    model, flat = plain_model(), plain_model(kind=kind, **own)
    plugin.post_lora_load(cfg, model)
    run = trainer(model, tmp_path, max_steps=4)
    plugin.post_trainer_create(cfg, run)
    run.train()
    two_passes = type("", (TwoPassTrainerMixin, Trainer), {})
    kinds = {"kind": two_passes} if method == "fmlora" else {}
    trainer(flat, tmp_path, **kinds, max_steps=4, callbacks=[FlatLoraCallback()]).train()
    assert_same_adapter(model, adapter(flat))
    model.save_pretrained(tmp_path)
    assert asdict(kind.from_pretrained(str(tmp_path)))["rho"] == 0.2
    assert type(peft.PeftConfig.from_pretrained(str(tmp_path))) is peft.LoraConfig


def test_an_adapter_that_the_trainer_creates_becomes_flat(module, tmp_path):
    plugin, cfg = load(module, {"adapter": "flatlora", "flat_rho": 0.2})
    base = tiny.base_model()
    plugin.post_lora_load(cfg, base)  # DPO and KTO: there is no adapter yet
    run = trainer(peft.get_peft_model(base, peft.LoraConfig(**tiny.LORA)), tmp_path, max_steps=2)
    plugin.post_trainer_create(cfg, run)
    run.train()
    assert perturbation(run.model).rho == 0.2
    assert [logs["flat_rho"] for logs in run.state.log_history if "loss" in logs] == pytest.approx([0.1, 0.2])
