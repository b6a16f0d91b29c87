"""The saved files are those of peft, and one file of our own."""

import json
import os
import sys
from pathlib import Path

import peft
import pytest
import torch
from helpers import processes, tiny
from helpers.runs import RHO, adapter, assert_same_adapter, flat_model, plain_model
from peft import LoraConfig, PeftModel
from safetensors import safe_open

import flatlora
from flatlora import FlatLoraConfig, perturbation

# peft warns, for plain LoRA too, that it saves the whole embeddings if they are adapted
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")

OURS = "flatlora_config.json"
SETTINGS = {"rho": RHO, "schedule": "linear", "total_steps": 50, "resample": "step", "seed": 3, "backend": "reference"}

ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def files(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def config_of(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return {name: sorted(value) if name == "target_modules" else value for name, value in config.items()}


def weights_of(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a file of safetensors is no dict)


def assert_saved_as_plain(flat, plain, folder=""):
    """Assert that `flat` has our file and those of `plain`, with the same bytes where no date and no order differs."""
    assert files(flat) == files(plain) | {str(Path(folder, OURS))}
    assert config_of(flat / folder) == config_of(plain / folder)
    (flat_metadata, flat_weights), (metadata, weights) = weights_of(flat / folder), weights_of(plain / folder)
    assert flat_metadata == metadata
    assert flat_weights.keys() == weights.keys()
    for name, weight in weights.items():
        assert flat_weights[name].dtype == weight.dtype
        assert torch.equal(flat_weights[name], weight)
    for card in files(plain) & {"README.md"}:
        assert (flat / card).read_text() == (plain / card).read_text()


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_files_and_keys_are_those_of_plain_lora(settings, name, tmp_path):
    flat, plain = flat_model(adapter_name=name, **SETTINGS, **settings), plain_model(adapter_name=name, **settings)
    for model, folder in ((flat, "flat"), (plain, "plain")):
        with torch.no_grad():
            for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.01 * i)
        model.save_pretrained(tmp_path / folder)
    assert_saved_as_plain(tmp_path / "flat", tmp_path / "plain", "" if name == "default" else name)


def test_a_file_without_a_tensor_is_said_to_be_empty(tmp_path):
    with pytest.warns(UserWarning, match="adapter_model.safetensors holds no tensor.*accelerator.get_state_dict"):
        flat_model().save_pretrained(tmp_path, state_dict={})  # as a sharded model has it in most processes


STOCK = """
import sys, warnings
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM
warnings.simplefilter("error")
# peft 0.21 uses a name that transformers 5.23 has renamed, with any adapter
warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
base, *folders = sys.argv[1:]
for folder in folders:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    assert type(model.peft_config["default"]) is LoraConfig
    expected = torch.load(folder + "/expected.pt")
    assert torch.equal(model(**expected["batch"]).logits, expected["logits"]), folder
    assert torch.equal(model.merge_and_unload()(**expected["batch"]).logits, expected["merged"]), folder
assert "flatlora" not in sys.modules
"""


@pytest.mark.slow
@processes.patient
def test_stock_peft_loads_it_without_a_warning(tmp_path):
    tiny.base_model().save_pretrained(tmp_path / "base")
    batch = {"input_ids": tiny.tokens()}
    for name, settings in ADAPTERS.items():
        model = flat_model(**SETTINGS, **settings)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.1)
        model.save_pretrained(tmp_path / name)
        logits = model.eval()(**batch).logits
        expected = {"batch": batch, "logits": logits, "merged": model.merge_and_unload()(**batch).logits}
        torch.save(expected, tmp_path / name / "expected.pt")
    folders = [str(tmp_path / name) for name in ("base", *ADAPTERS)]
    command, one_thread = [sys.executable, "-c", STOCK, *folders], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = processes.run_command(command, cwd=tmp_path, env=one_thread)
    assert done.returncode == 0, done.stderr


def training_loss(model):
    perturbation(model).progress = 0.5
    torch.manual_seed(0)
    return tiny.loss(model.train())


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_load_brings_it_back_perturbed_as_it_was(settings, tmp_path):
    model = flat_model(**SETTINGS, **settings)
    model.save_pretrained(tmp_path / "sub")
    again = flatlora.load(tiny.base_model(), str(tmp_path), subfolder="sub")
    config = again.peft_config["default"]
    assert type(config) is FlatLoraConfig
    assert {name: getattr(config, name) for name in SETTINGS} == SETTINGS
    assert perturbation(again).settings == perturbation(model).settings
    assert_same_adapter(again, adapter(model))
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    assert torch.equal(training_loss(again), training_loss(model))


def test_a_stock_adapter_is_plain_until_attach(tmp_path):
    model = flat_model(**SETTINGS)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(tiny.base_model(), tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match="no flat LoRA layer"):
        perturbation(stock)
    assert torch.equal(training_loss(flatlora.attach(stock, **SETTINGS)), training_loss(model))


def test_the_config_alone(tmp_path):
    config = FlatLoraConfig(**tiny.LORA, **SETTINGS)
    config.save_pretrained(tmp_path)
    assert files(tmp_path) == {"adapter_config.json", OURS}
    assert FlatLoraConfig.from_pretrained(tmp_path) == config
    assert type(peft.PeftConfig.from_pretrained(tmp_path)) is LoraConfig
    assert json.loads((tmp_path / OURS).read_text()) == {**SETTINGS, "on_unsupported": "error"}
    assert FlatLoraConfig.from_pretrained(tmp_path, rho=0.5, total_steps=9).rho == 0.5


@pytest.mark.parametrize("attached", [False, True], ids=["plain", "attached"])
def test_an_adapter_that_was_saved_without_our_settings(attached, tmp_path):
    model = plain_model()
    (flatlora.attach(model, rho=0.1) if attached else model).save_pretrained(tmp_path)
    for read in (FlatLoraConfig.from_pretrained, lambda path: flatlora.load(tiny.base_model(), path)):
        with pytest.raises(
            ValueError, match=f"has no {OURS}: it was saved without settings.*attach saves none.*Pass rho="
        ):
            read(tmp_path)
    assert FlatLoraConfig.from_pretrained(tmp_path, rho=0.1) == FlatLoraConfig(
        **{**LoraConfig.from_pretrained(tmp_path).to_dict(), "rho": 0.1}
    )


def test_an_adapter_that_is_no_lora(tmp_path):
    peft.get_peft_model(tiny.base_model(), peft.IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a IA3Config, not a LoRA adapter"):
        flatlora.load(tiny.base_model(), tmp_path)


def test_transformers_add_adapter(tmp_path, any_peft):
    for config, folder in ((FlatLoraConfig(**tiny.LORA, **SETTINGS), "flat"), (LoraConfig(**tiny.LORA), "plain")):
        model = tiny.base_model()
        model.add_adapter(config)
        if folder == "flat":
            flat, loss = model, training_loss(model)
        model.save_pretrained(tmp_path / folder)
    assert_saved_as_plain(tmp_path / "flat", tmp_path / "plain")
    with flatlora.unperturbed(flat):
        assert training_loss(flat) != loss
    assert torch.equal(training_loss(flatlora.load(tiny.base_model(), tmp_path / "flat")), loss)


def test_a_revision_of_a_hub_repository(tmp_path):
    """In the hub's cache each revision has files of its own."""
    repository = tmp_path / "models--someone--adapter"
    for revision, rho in (("main", 0.1), ("second", 0.3)):
        commit = {"main": "a", "second": "b"}[revision] * 40
        flat_model(**{**SETTINGS, "rho": rho}).save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    where = {"cache_dir": str(tmp_path)}
    assert FlatLoraConfig.from_pretrained("someone/adapter", **where).rho == 0.1
    assert FlatLoraConfig.from_pretrained("someone/adapter", revision="second", **where).rho == 0.3
    assert perturbation(flatlora.load(tiny.base_model(), "someone/adapter", revision="second", **where)).rho == 0.3
