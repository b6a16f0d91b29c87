"""ms-swift's own command line with the tuner. `.ci/ms-swift` makes the environment and runs this."""

import json

import pytest
import tiny  # first: it sets the environment
import torch
import yaml
from swift.cli.main import parse_yaml_args
from swift.pipelines import export_main, rlhf_main, sft_main
from transformers import AutoModelForCausalLM

from flatlora.integrations import ms_swift

STEPS = 6
SMALL = {
    **{"model": "model", "model_type": "llama", "template": "llama", "use_hf": None, "dataset": "chat.jsonl"},
    **{"max_steps": STEPS, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4},
    **{"learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_ratio": None, "torch_dtype": "float32"},
    **{
        "max_length": 64,
        "system": "one",
        "check_model": False,
        "add_version": False,
        "report_to": "none",
        "external_plugins": "plugin.py",
    },
    **{"dataset_num_proc": 1, "dataloader_num_workers": 0, "gradient_checkpointing": False},
}
PLAIN = {"tuner_type": "lora", "callbacks": None, "model_kwargs": None}
LINEAR = {"flat_rho": 0.05, "flat_schedule": "linear"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swift")
    tiny.write(folder)
    (folder / "plugin.py").write_text((tiny.ROOT / "examples/yaml/ms_swift_plugin.py").read_text())
    return folder


def call(folder, name, main=sft_main, environment=None, **settings):
    example = yaml.safe_load((tiny.ROOT / "examples/yaml/ms_swift.yaml").read_text())
    values = {**example, **SMALL, "output_dir": name, **settings}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    if main is None:
        return tiny.run(folder, "swift", "sft", f"{name}.yaml")
    return tiny.forked(folder, with_file, main, f"{name}.yaml", **(environment or {}))


def with_file(main, file):
    """What `swift sft FILE` does in the process that it starts."""
    arguments = [file]
    parse_yaml_args(arguments)
    main(arguments)


def train(folder, name, **settings):
    code, output = call(folder, name, **settings)
    assert code == 0, output
    return folder / name / f"checkpoint-{STEPS}"


@pytest.fixture(scope="session")
def trained(folder):
    return train(folder, "flat", main=None, model_kwargs=LINEAR)


@pytest.fixture(scope="session")
def plain(folder):
    return train(folder, "plain", **PLAIN)


def test_the_strength_follows_the_schedule_of_the_run(trained):
    assert tiny.strengths(trained) == pytest.approx([0.05 * step / STEPS for step in range(1, STEPS + 1)])


def test_the_noise_changes_the_training_and_rho_zero_does_not(folder, trained, plain):
    assert not tiny.equal(trained, plain)
    assert tiny.equal(train(folder, "zero", model_kwargs={"flat_rho": 0}), plain)


def test_the_environment_and_the_file_itself_do_the_same(folder, trained):
    kwargs = {"model_kwargs": None, "ENV": {"FLAT_RHO": 0.05, "FLAT_SCHEDULE": "linear"}}
    assert tiny.equal(train(folder, "file", **kwargs, external_plugins=ms_swift.__file__), trained)


def test_what_is_saved_is_a_plain_adapter(folder, trained, plain):
    first, second = (json.loads((path / "adapter_config.json").read_text()) for path in (trained, plain))
    first["target_modules"], second["target_modules"] = map(sorted, (first["target_modules"], second["target_modules"]))
    assert first == second
    assert json.loads((trained / "flatlora_config.json").read_text())["rho"] == 0.05
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    with torch.no_grad():
        assert not torch.allclose(base(torch.arange(20)[None]).logits, tiny.stock_logits(folder, trained), atol=1e-3)


@pytest.mark.parametrize("method", ["flatlora", "rwp", "fmlora", "efmlora", "lora_sam", "bilora", "bar"])
def test_every_method_trains_and_resumes_bit_for_bit(folder, method, plain):
    settings = {"model_kwargs": {"flat_method": method, "flat_schedule": "constant", "flat_rho": 0.2}}
    whole = train(folder, method, **settings)
    assert not tiny.equal(whole, plain)
    assert tiny.strengths(whole) == [0.2] * STEPS
    resumed = train(folder, f"{method}_2", resume_from_checkpoint=f"{method}/checkpoint-3", **settings)
    assert tiny.equal(resumed, whole)


def test_an_adapter_continues_to_train_with_its_settings(folder, trained):
    more = train(folder, "more", adapters=str(trained), model_kwargs=None)
    assert json.loads((more / "flatlora_config.json").read_text())["schedule"] == "linear"
    assert tiny.strengths(more) == pytest.approx([0.05 * step / STEPS for step in range(1, STEPS + 1)])
    changed = train(folder, "changed", adapters=str(trained), model_kwargs={"flat_rho": 0.1})
    assert tiny.strengths(changed)[-1] == pytest.approx(0.1)


def test_checkpointing_changes_no_bit(folder, trained):
    assert tiny.equal(train(folder, "recompute", gradient_checkpointing=True, model_kwargs=LINEAR), trained)


def test_lora_plus_remains(folder, trained):
    lora_plus = {"optimizer": "lorap", "lorap_lr_ratio": 16}
    plain = train(folder, "plus", **PLAIN, **lora_plus)
    assert tiny.equal(train(folder, "plus_0", model_kwargs={"flat_rho": 0}, **lora_plus), plain)


def test_dpo_trains_with_noise(folder):
    pairs = {"main": rlhf_main, "rlhf_type": "dpo", "dataset": "pairs.jsonl"}
    constant = {"flat_rho": 0.05, "flat_schedule": "constant"}
    flat = train(folder, "dpo", model_kwargs=constant, **pairs)
    assert tiny.strengths(flat) == [0.05] * STEPS
    zero, plain = (
        train(folder, "dpo_0", model_kwargs={"flat_rho": 0}, **pairs),
        train(folder, "dpo_1", **PLAIN, **pairs),
    )
    assert tiny.equal(zero, plain)
    assert not tiny.equal(flat, plain)


def test_merging(folder, trained):
    (folder / "merge.yaml").write_text(f"adapters: {trained}\nmerge_lora: true\noutput_dir: merged\n")
    code, output = tiny.forked(folder, with_file, export_main, "merge.yaml")
    assert code == 0, output
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = merged(torch.arange(20)[None]).logits
    assert torch.allclose(logits, tiny.stock_logits(folder, trained), atol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"callbacks": None}, "tuner_type flatlora needs callbacks flatlora"),
        ({"model_kwargs": {"flat_roh": 0.1}}, "flat_roh: no setting of FlatLoraConfig. It has flat_method and"),
        ({"model_kwargs": {"flat_rho": -1}}, "rho must be finite and >= 0, got -1"),
        ({"init_weights": "lora-ga"}, "init_weights lora-ga is not possible with tuner_type flatlora"),
    ],
)
def test_mistakes_are_errors(folder, settings, message):
    code, output = call(folder, "mistake", **settings)
    assert code != 0
    assert message in output
