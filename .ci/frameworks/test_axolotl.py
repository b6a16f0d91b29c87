"""axolotl's own command line with the plug-in. `.ci/axolotl` makes the environment and runs this."""

import json
from importlib.metadata import version

import pytest
import tiny  # first: it sets the environment
import torch
import yaml
from axolotl.cli import merge_lora
from axolotl.cli import train as cli_train
from transformers import AutoModelForCausalLM

import flatlora

STEPS = 6
NEW = tuple(map(int, version("axolotl").split(".")[:2])) >= (0, 21)
# axolotl 0.19 does not seed the adapters that it creates
START = {} if NEW else {"lora_model_dir": "start"}
SMALL = {
    **{"datasets": [{"path": "chat.jsonl", "type": "chat_template"}], "base_model": "model", "sequence_len": 64},
    **{"max_steps": STEPS, "save_steps": 3, "logging_steps": 1, "micro_batch_size": 4, "learning_rate": "1e-2"},
    **{"bf16": False, "fp16": False, "tf32": False, "warmup_ratio": None, "lr_scheduler": "constant"},
}
LORA = {"adapter": "lora", "flat_rho": None, **dict.fromkeys(["lora_mlp_kernel", "lora_qkv_kernel"], False)}
LORA |= dict.fromkeys(["lora_o_kernel", "lora_embedding_kernel"], False)
PAIRS = {"rl": "dpo", "datasets": [{"path": "pairs.jsonl", "type": "chat_template.default", "split": "train"}]}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("axolotl")
    tiny.write(folder)
    return folder


def call(folder, name, command=cli_train.do_cli, **settings):
    example = yaml.safe_load((tiny.ROOT / "examples/yaml/axolotl.yaml").read_text())
    values = {**example, **SMALL, **START, "output_dir": name, **settings}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    if command is None:
        return tiny.run(folder, "axolotl", "train", f"{name}.yaml")
    return tiny.forked(folder, command, f"{name}.yaml")


def train(folder, name, **settings):
    code, output = call(folder, name, **settings)
    assert code == 0, output
    return folder / name


@pytest.fixture(scope="session")
def trained(folder):
    return train(folder, "flat", command=None)


@pytest.fixture(scope="session")
def plain(folder):
    return train(folder, "plain", **LORA)


def test_the_strength_follows_the_schedule_of_the_run(trained):
    ramp = [0.05 * (1 - torch.cos(torch.tensor(torch.pi * step / STEPS)).item()) / 2 for step in range(1, STEPS + 1)]
    assert tiny.strengths(trained / f"checkpoint-{STEPS}") == pytest.approx(ramp)


def test_the_noise_changes_the_training_and_rho_zero_does_not(folder, trained, plain):
    assert not tiny.equal(trained, plain)
    assert tiny.equal(train(folder, "zero", flat_rho=0), plain)


def test_without_a_key_the_plug_in_does_nothing(folder, plain):
    assert tiny.equal(train(folder, "without", **LORA, plugins=None), plain)
    assert not (plain / "flatlora_config.json").exists()
    assert tiny.strengths(plain / f"checkpoint-{STEPS}") == [None] * STEPS


@pytest.mark.skipif(not NEW, reason="axolotl 0.21 is the first to look for entry points")
def test_the_entry_point_is_enough(folder, trained):
    assert tiny.equal(train(folder, "entry", plugins=None), trained)


def test_what_is_saved_is_a_plain_adapter(folder, trained, plain):
    first, second = (json.loads((path / "adapter_config.json").read_text()) for path in (trained, plain))
    first["target_modules"], second["target_modules"] = map(sorted, (first["target_modules"], second["target_modules"]))
    assert first == second
    assert json.loads((trained / "flatlora_config.json").read_text())["rho"] == 0.05
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = flatlora.load(base, str(trained), is_trainable=False).eval()
    with torch.no_grad():
        assert torch.equal(model(torch.arange(20)[None]).logits, tiny.stock_logits(folder, trained))


@pytest.mark.parametrize("method", ["flatlora", "rwp", "fmlora", "efmlora", "lora_sam", "bilora", "bar"])
def test_every_method_trains_and_resumes_bit_for_bit(folder, method, plain):
    settings = {"flat_method": method, "flat_schedule": "constant", "flat_rho": 0.2}
    whole = train(folder, method, **settings)
    assert not tiny.equal(whole, plain)
    assert tiny.strengths(whole / f"checkpoint-{STEPS}") == [0.2] * STEPS
    resumed = train(folder, f"{method}_2", **settings, resume_from_checkpoint=f"{method}/checkpoint-3")
    assert tiny.equal(resumed, whole)


def test_checkpointing_changes_no_bit(folder, trained):
    assert tiny.equal(train(folder, "recompute", gradient_checkpointing=True), trained)


@pytest.mark.parametrize("start", [None, "start"], ids=["new", "saved"])
def test_new_and_saved_adapters_become_flat(folder, start):
    flat = train(folder, f"from_{start}", lora_model_dir=start, flat_schedule="constant")
    assert tiny.strengths(flat / f"checkpoint-{STEPS}") == [0.05] * STEPS
    assert json.loads((flat / "flatlora_config.json").read_text())["schedule"] == "constant"


def test_a_four_bit_model_is_quantized_and_flat(folder):
    four = train(folder, "four", load_in_4bit=True, flat_schedule="constant")
    assert json.loads((four / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    assert tiny.strengths(four / f"checkpoint-{STEPS}") == [0.05] * STEPS


def test_dpo_trains_with_noise(folder):
    flat = train(folder, "dpo", **PAIRS, flat_schedule="constant")
    assert tiny.strengths(flat / f"checkpoint-{STEPS}") == [0.05] * STEPS
    zero, plain = train(folder, "dpo_0", **PAIRS, flat_rho=0), train(folder, "dpo_1", **PAIRS, **LORA)
    assert tiny.equal(zero, plain) or not NEW
    assert not tiny.equal(flat, plain)


def test_merging(folder, trained):
    train(folder, "merged", command=merge_lora.do_cli, lora_model_dir="flat")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged" / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = merged(torch.arange(20)[None]).logits
    assert torch.allclose(logits, tiny.stock_logits(folder, trained), atol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lora_mlp_kernel": True}, "lora_mlp_kernel must be false, got true: these kernels compute LoRA layers"),
        ({"flat_roh": 0.1}, "flat_roh: no setting of FlatLoraConfig. It has flat_method and flat_backend,"),
        ({"flat_rho": -1}, "rho must be finite and >= 0, got -1"),
        ({"flat_method": "sam"}, "flat_method must be one of bar, bilora, efmlora, flatlora, fmlora, lorasam, rwp"),
        ({"adapter": None}, "flat_rho: the adapter must be flatlora, lora, or qlora, got None"),
        ({"relora": True, "jagged_restart_steps": 2}, "relora must be false, got true"),
    ],
)
def test_mistakes_are_errors(folder, settings, message):
    code, output = call(folder, "mistake", **settings)
    assert code != 0
    assert message in output
