"""The keys `flat_...` of a configuration file, and what frameworks do with them."""

import runpy
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import peft
import pytest
import yaml
from helpers import tiny
from helpers.runs import adapter, assert_same_adapter, plain_model, trainer
from transformers import HfArgumentParser

import flatlora
from flatlora import FlatLoraCallback, FlatLoraConfig, TwoPassTrainerMixin, perturbation
from flatlora.config import own_fields
from flatlora.integrations.flat_arguments import FlatArguments, flat_config, make_model_flat, prepare_trainer
from flatlora.methods import WeightNoise

EXAMPLES = Path(__file__).parents[2] / "examples" / "yaml"
METHODS = {
    "flatlora": (FlatLoraConfig, {"schedule": "linear", "resample": "step", "seed": 5}),
    "rwp": (flatlora.RwpConfig, {"space": "adapter", "seed": 5}),
    "fmlora": (flatlora.FMLoraConfig, {"rtol": 1e-4}),
    "efmlora": (flatlora.EFMLoraConfig, {"beta": 0.5}),
    "lora_sam": (flatlora.LoraSamConfig, {"schedule": "cosine"}),
    "bilora": (flatlora.BiLoraConfig, {"ascent_r": 2, "seed": 3}),
    "bar": (flatlora.BarConfig, {"variant": "nbar", "rho": 0.4}),
}


def keys(method, own):
    return {"flat_method": method, **{f"flat_{name}": value for name, value in own.items()}}


def test_every_setting_of_every_method_has_a_key():
    own = set().union(*(own_fields(kind) for kind, _ in METHODS.values()))
    assert {f.name for f in fields(FlatArguments)} == {"flat_method"} | {f"flat_{name}" for name in own}


@pytest.mark.parametrize("method", METHODS)
def test_keys_give_the_configuration_of_the_method(method):
    kind, own = METHODS[method]
    made = flat_config({**keys(method, own), "learning_rate": 1.0, "flat_backend": None}, peft.LoraConfig(**tiny.LORA))
    assert type(made) is kind and asdict(made) == asdict(kind(**tiny.LORA, **own))


def test_defaults_are_those_of_the_method():
    for kind, _ in METHODS.values():
        made = flat_config({"flat_method": kind.__name__.removesuffix("Config")})
        assert type(made) is kind and asdict(made) == asdict(kind())
    assert type(flat_config({})) is FlatLoraConfig


def test_a_method_of_ones_own_has_a_name_too():
    @dataclass
    class ShoutConfig(FlatLoraConfig):
        def make_method(self):
            return WeightNoise()

    assert type(flat_config({"flat_method": "shout"})) is ShoutConfig


@pytest.mark.parametrize(
    "values, message",
    [
        ({"flat_method": "sam"}, "flat_method must be one of .*efmlora.*, got 'sam'"),
        ({"flat_method": "PerturbedLora"}, "flat_method must be one of"),
        ({"flat_roh": 0.1}, r"flat_roh: no setting of FlatLoraConfig. It has flat_method and flat_backend, .*flat_rho"),
        ({"flat_method": "efmlora", "flat_seed": 1}, "flat_seed: no setting of EFMLoraConfig"),
        ({"flat_rho": -0.1}, "rho must be finite and >= 0, got -0.1"),
        ({"flat_schedule": "up"}, "schedule must be"),
    ],
)
def test_mistakes_are_errors(values, message):
    with pytest.raises(ValueError, match=message):
        flat_config(values)


def test_a_dataclass_parser_reads_the_keys(tmp_path):
    file = tmp_path / "flat.yaml"
    file.write_text("flat_method: efmlora\nflat_rho: 0.1\n")
    (arguments,) = HfArgumentParser(FlatArguments).parse_yaml_file(str(file))
    assert asdict(arguments.config()) == asdict(flatlora.EFMLoraConfig(rho=0.1))
    (arguments,) = HfArgumentParser(FlatArguments).parse_args_into_dataclasses(
        ["--flat_rho", "0.2", "--flat_seed", "3"]
    )
    assert asdict(arguments.config()) == asdict(FlatLoraConfig(rho=0.2, seed=3))


@pytest.mark.parametrize("method", METHODS)
def test_making_a_plain_model_flat_trains_like_a_flat_one(method, tmp_path):
    kind, own = METHODS[method]
    own = {"rho": 0.2, **own}
    plain, flat = plain_model(), plain_model(kind=kind, **own)
    config = make_model_flat(plain, keys(method, own))
    assert type(plain.peft_config["default"]) is peft.LoraConfig
    assert asdict(config) == asdict(flat.peft_config["default"])
    runs = []
    for model in (plain, flat):
        run = trainer(model, tmp_path, max_steps=4)
        prepare_trainer(run, FlatLoraCallback())
        run.train()
        runs.append([logs["flat_rho"] for logs in run.state.log_history if "loss" in logs])
    assert runs[0] == runs[1] and len(runs[0]) == 4
    assert_same_adapter(plain, adapter(flat))


def test_a_layer_that_cannot_be_perturbed_leaves_the_model_plain():
    model = plain_model(use_dora=True)
    with pytest.raises(ValueError, match="cannot be perturbed"):
        make_model_flat(model, {"flat_method": "efmlora"})
    assert not any(type(module).__name__.startswith("Flat") for module in model.modules())


@pytest.mark.parametrize("method", ["fmlora", "efmlora"])
def test_the_trainer_makes_as_many_passes_as_the_method(method, tmp_path):
    model = plain_model()
    make_model_flat(model, {"flat_method": method})
    run = trainer(model, tmp_path)
    prepare_trainer(run, FlatLoraCallback())
    prepare_trainer(run, FlatLoraCallback())  # the second pass is not added twice
    assert type(run).__mro__.count(TwoPassTrainerMixin) == (method == "fmlora")
    assert isinstance(run.callback_handler.callbacks[0], FlatLoraCallback)


def test_the_script_for_trl_trains_what_its_file_says(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from helpers.trl_runs import texts, tokenizer

    tiny.base_model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    texts("text").to_json(tmp_path / "data" / "train.jsonl")
    example = yaml.safe_load((EXAMPLES / "trl.yaml").read_text())
    small = {"model_name_or_path": "model", "dataset_name": "data", "max_steps": 4, "save_steps": 2, "logging_steps": 1}
    quiet = {"report_to": "none", "bf16": False, "use_cpu": True, "warmup_ratio": None, "dataset_num_proc": None}
    values = {**example, **small, **quiet, "flat_schedule": "linear", "per_device_train_batch_size": 2}
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", ["trl_sft.py", "--config", "trl.yaml"])
    run = runpy.run_path(str(EXAMPLES / "trl_sft.py"), run_name="__main__")["trainer"]
    assert perturbation(run.model).rho == 0.05
    logged = [logs["flat_rho"] for logs in run.state.log_history if "loss" in logs]
    assert logged == pytest.approx([0.05 * step / 4 for step in (1, 2, 3, 4)])
    loaded = peft.PeftConfig.from_pretrained("out")
    assert type(loaded) is peft.LoraConfig and FlatLoraConfig.from_pretrained("out").rho == 0.05


def test_the_command_line_of_trl_creates_a_plain_configuration():
    scripts = pytest.importorskip("trl.scripts.sft")
    from trl import ModelConfig, get_peft_config

    assert type(get_peft_config(ModelConfig(use_peft=True))) is peft.LoraConfig
    command = ["--dataset_name", "d", "--output_dir", "o", "--bf16", "False"]
    parser = scripts.make_parser()
    parser.parse_args_and_config([*command, "--use_peft"], fail_with_unknown_args=False)
    with pytest.raises(ValueError, match="flat_rho"):
        parser.parse_args_and_config([*command, "--flat_rho", "0.1"], fail_with_unknown_args=True)
