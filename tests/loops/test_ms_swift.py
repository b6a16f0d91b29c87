"""The tuner for ms-swift, on stand-ins for the few names of ms-swift that it uses.

`.ci/ms-swift` runs ms-swift itself, which asks for other versions than these tests.
"""

import json
import sys
from dataclasses import dataclass, field
from types import ModuleType

import peft
import pytest
import torch
from helpers import tiny
from helpers.runs import adapter, assert_same_adapter, plain_model, trainer
from transformers import Trainer

import flatlora
from flatlora import FlatLoraConfig, TwoPassTrainerMixin, perturbation
from flatlora.integrations.callback import FlatLoraCallback

NAME = "flatlora.integrations.ms_swift"


class PeftTuner:
    """What ms-swift's class of this name does."""

    @staticmethod
    def save_pretrained(model, save_directory, state_dict=None, safe_serialization=True, **kwargs):
        model.save_pretrained(save_directory, selected_adapters=["default"], **kwargs)

    @staticmethod
    def from_pretrained(model, model_id, **kwargs):
        return peft.PeftModel.from_pretrained(model, model_id, **kwargs)


@dataclass
class Arguments:
    tuner_type: str = "flatlora"
    tuner_backend: str = "peft"
    use_swift_lora: bool = False
    init_weights: str = "true"
    callbacks: list[str] = field(default_factory=lambda: ["flatlora"])


def prepare_adapter(args, model):
    """ms-swift's LoRA."""
    assert args.tuner_type == "lora"
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(**tiny.LORA))


@pytest.fixture
def swift(monkeypatch):
    """The module under test, imported on the stand-ins."""
    names = {
        "swift": {},
        "swift.callbacks": {"callbacks_map": {}},
        "swift.tuner_plugin": {"PeftTuner": PeftTuner, "tuners_map": {}},
        "swift.pipelines": {},
        "swift.pipelines.train": {},
        "swift.pipelines.train.tuner": {"prepare_adapter": prepare_adapter},
    }
    for name, content in names.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield __import__(NAME, fromlist=["FlatLoraTuner"])
    del sys.modules[NAME]


@pytest.fixture
def environment(monkeypatch):
    def set_all(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return set_all


def run(swift, model, folder, **settings):
    """A Trainer with the callback, as ms-swift makes it: first the callback, then the Trainer."""
    made = trainer(model, folder, **settings)
    callback = swift.callbacks_map["flatlora"](made.args, made)
    made.add_callback(callback)
    callback.on_init_end(made.args, made.state, made.control)
    return made


def test_the_tuner_and_the_callback_are_registered(swift):
    assert swift.tuners_map == {"flatlora": swift.FlatLoraTuner}
    assert swift.callbacks_map == {"flatlora": swift.SwiftFlatLoraCallback}


@pytest.mark.parametrize("method, kind", [("flatlora", FlatLoraConfig), ("fmlora", flatlora.FMLoraConfig)])
def test_a_model_of_ms_swift_trains_like_a_flat_one(swift, environment, method, kind, tmp_path):
    environment(FLAT_METHOD=method, FLAT_RHO=0.2, FLAT_SCHEDULE="linear")
    model = swift.FlatLoraTuner.prepare_model(Arguments(), tiny.base_model())
    made = run(swift, model, tmp_path, max_steps=4)
    assert isinstance(made, TwoPassTrainerMixin) == (method == "fmlora")
    made.train()
    flat = plain_model(kind=kind, rho=0.2, schedule="linear")
    two_passes = type("", (TwoPassTrainerMixin, Trainer), {})
    kinds = {"kind": two_passes} if method == "fmlora" else {}
    trainer(flat, tmp_path, max_steps=4, callbacks=[FlatLoraCallback()], **kinds).train()
    assert_same_adapter(model, adapter(flat))
    assert "SwiftFlatLoraCallback" in made.state.stateful_callbacks


def test_settings_are_numbers_where_they_are_numbers(swift, environment):
    environment(FLAT_RHO="5e-2", FLAT_SEED="3", FLAT_METHOD="efmlora", FLATPAK="1", OTHER="2")
    assert swift.settings_of_environment() == {"flat_rho": 0.05, "flat_seed": 3, "flat_method": "efmlora"}


def test_what_is_saved_continues_with_its_settings(swift, environment, monkeypatch, tmp_path):
    environment(FLAT_METHOD="rwp", FLAT_RHO=0.2, FLAT_SPACE="adapter", FLAT_SEED=4)
    tuner = swift.FlatLoraTuner
    model = tuner.prepare_model(Arguments(), tiny.base_model())
    tuner.save_pretrained(model, str(tmp_path), state_dict=None)
    saved = json.loads((tmp_path / "flatlora_config.json").read_text())
    assert (saved["config_class"], saved["rho"], saved["space"], saved["seed"]) == ("RwpConfig", 0.2, "adapter", 4)
    assert type(peft.PeftConfig.from_pretrained(str(tmp_path))) is peft.LoraConfig

    for name in ("FLAT_METHOD", "FLAT_SPACE", "FLAT_SEED"):
        monkeypatch.delenv(name)
    environment(FLAT_RHO=0.3)
    again = tuner.from_pretrained(tiny.base_model(), str(tmp_path), is_trainable=True)
    settings = perturbation(again).settings
    assert settings.method == flatlora.RwpConfig(space="adapter").make_method()
    assert (perturbation(again).rho, settings.seed) == (0.3, 4)

    environment(FLAT_METHOD="efmlora")  # its settings are not those that were saved
    other = tuner.from_pretrained(tiny.base_model(), str(tmp_path), is_trainable=True)
    assert perturbation(other).settings.method == flatlora.EFMLoraConfig().make_method()


def test_an_adapter_for_inference_or_reference_stays_plain(swift, tmp_path):
    tuner = swift.FlatLoraTuner
    tuner.save_pretrained(tuner.prepare_model(Arguments(), tiny.base_model()), str(tmp_path))
    for options in ({}, {"is_trainable": True, "adapter_name": "ref_adapter"}):
        model = tuner.from_pretrained(tiny.base_model(), str(tmp_path), **options)
        with pytest.raises(ValueError, match="no flat LoRA layer"):
            perturbation(model)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"callbacks": ["early_stop"]}, r"needs callbacks flatlora.*got callbacks \['early_stop'\]"),
        ({"tuner_backend": "unsloth"}, "tuner_backend must be 'peft' for tuner_type flatlora, got 'unsloth'"),
        ({"use_swift_lora": True}, "use_swift_lora must be false for tuner_type flatlora, got true"),
        ({"init_weights": "lora-ga"}, "init_weights lora-ga is not possible with tuner_type flatlora"),
    ],
)
def test_mistakes_are_errors(swift, arguments, message):
    with pytest.raises(ValueError, match=message):
        swift.FlatLoraTuner.prepare_model(Arguments(**arguments), tiny.base_model())


def test_unknown_settings_are_errors(swift, environment):
    environment(FLAT_ROH=0.1)
    with pytest.raises(ValueError, match="flat_roh: no setting of FlatLoraConfig"):
        swift.FlatLoraTuner.prepare_model(Arguments(), tiny.base_model())
