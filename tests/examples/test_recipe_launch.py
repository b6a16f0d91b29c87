"""A recipe in two processes, with accelerate's configurations of examples/distributed: the same training as in one."""

import csv
import json
import os
import sys
from pathlib import Path

import glue_roberta
import pytest
import torch
from helpers import processes
from recipe.arguments import parse
from recipe.training import training_arguments
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(tiny_bert, reviews):
    file = tiny_bert / "config.json"  # without dropout, whose masks differ between the processes
    file.write_text(json.dumps({k: 0.0 if "dropout_prob" in k else v for k, v in json.loads(file.read_text()).items()}))
    data = ["--dataset", str(reviews / "movies.csv"), "--text_columns", "text", "--model", str(tiny_bert)]
    sizes = ["--max_steps", "4", "--batch_size", "4", "--r", "2", "--learning_rate", "0.001", "--save_steps", "2"]
    return [*data, *sizes, "--dtype", "float32"]


def launch(engine, arguments, folder):
    """Run the recipe in two processes of `accelerate launch`."""
    (folder / "arguments.json").write_text(json.dumps(arguments))
    config = ["--config_file", str(ROOT / "examples" / "distributed" / f"{engine}.yaml"), "--main_process_port", "0"]
    if engine == "fsdp2":  # transformers names the embeddings of BERT too, and accelerate would divide them twice
        config += ["--fsdp_transformer_layer_cls_to_wrap", "BertLayer"]
    script = [str(ROOT / "tests" / "examples" / "launched_recipe.py"), str(folder / "arguments.json")]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if engine == "ddp":
        environment["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, *script]
    done = processes.run_command(command, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def results(folder):
    with open(folder / "results.csv") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def adapter(folder, method):
    return load_file(folder / f"{method}-seed0" / "adapter" / "adapter_model.safetensors")


ENGINES = ["ddp", *(pytest.param(engine, marks=pytest.mark.thorough) for engine in ("fsdp2", "zero3"))]


@processes.patient
@pytest.mark.slow
@pytest.mark.usefixtures("matplotlib")
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one_does(engine, command, reviews):
    if engine == "zero3":
        pytest.importorskip("deepspeed")
    alone, together = reviews / "alone", reviews / "together"
    glue_roberta.main([*command, "--output_dir", str(alone)])
    launch(engine, [*command, "--output_dir", str(together)], reviews)
    expected, found = results(alone), results(together)
    assert list(found) == ["lora", "flat"] and {row["steps"] for row in found.values()} == {"4"}
    for metric in ("nll", "train_loss"):
        assert float(found["lora"][metric]) == pytest.approx(float(expected["lora"][metric]), abs=1e-4)
    first, second = adapter(alone, "lora"), adapter(together, "lora")
    assert first.keys() == second.keys()
    for name, weight in first.items():  # AdamW turns a rounding error of a small gradient into one of a whole step
        assert (second[name] - weight).norm() < 0.05 * weight.norm(), name
    flat = adapter(together, "flat")
    assert flat.keys() == second.keys()
    assert any(not torch.equal(flat[name], second[name]) for name in flat)


def test_processes_share_the_batch(command, monkeypatch, tmp_path):
    from recipe import training

    monkeypatch.setattr(training, "count", lambda: 2)

    def shared(*more):
        args = parse(glue_roberta.Arguments, {}, [*command, *more])
        made = training_arguments(args, tmp_path, 0, 40)
        return made["per_device_train_batch_size"], made["gradient_accumulation_steps"]

    assert shared() == (2, 1)
    assert shared("--micro_batch_size", "1") == (1, 2)
    assert shared("--batch_size", "12", "--micro_batch_size", "3") == (3, 2)
    with pytest.raises(ValueError, match=r"--batch_size must be a multiple of .* 2 \* 2, got 5"):
        shared("--batch_size", "5")
    with pytest.raises(ValueError, match=r"the processes, 4 \* 2, got 4"):
        shared("--micro_batch_size", "4")
