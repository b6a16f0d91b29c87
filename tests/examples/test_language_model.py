import itertools
import subprocess
import sys
from pathlib import Path

import language_model
import pytest
import torch
from common import tables
from helpers import processes


@pytest.mark.slow
@processes.patient
@pytest.mark.usefixtures("matplotlib")
def test_from_the_model_to_the_table_and_the_picture(arguments, reviews, capfd):
    results = language_model.main(arguments)
    out = reviews / "out"
    accuracy = tables.read_csv(out / "accuracy.csv")
    assert [(row["method"], row["domain"]) for row in accuracy] == list(
        itertools.product(("before", "lora", "flat"), ("held-out", "books"))
    )
    training = tables.read_csv(out / "training.csv")
    assert [row["method"] for row in training] == ["lora"] * 6 + ["flat"] * 6
    rho = [float(row["rho"]) for row in training if row["method"] == "flat"]
    assert rho[0] == 0 and rho == sorted(rho) and 0 < rho[-1] <= 0.05
    assert (out / "loss_line.png").read_bytes().startswith(b"\x89PNG")
    assert results["command"].startswith("python examples/language_model.py --model")
    assert results["arguments"]["seed"] == 0 and results["machine"]["torch"] == torch.__version__
    assert {"train LoRA", "train Flat-LoRA", "save and reload"} <= set(results["seconds"])
    for method in ("lora", "flat"):
        check = results["reloaded"][method]
        assert check["same_answers"] == check["examples"] == check["same_answers_merged"]
        assert (out / method / "adapter" / "adapter_model.safetensors").exists()
        assert (out / method / "merged" / "model.safetensors").exists()
    printed = capfd.readouterr()
    assert "Flat-LoRA minus LoRA" in printed.out and "rho=" in printed.err and "loss=" in printed.err


def test_without_noise_both_methods_are_the_same_run(arguments):
    (args,) = language_model.HfArgumentParser(language_model.Arguments).parse_args_into_dataclasses(
        [*arguments, "--rho", "0"]
    )
    encode, task = language_model.prepare(args)
    histories = []
    for method in ("lora", "flat"):
        model = language_model.adapt(
            language_model.load_model(args.model, torch.float32, torch.device("cpu")), method, args
        )
        histories.append([step["loss"] for step in language_model.train(model, method, encode, task.train, args)])
    assert histories[0] == histories[1]


@pytest.mark.slow
@processes.patient
def test_an_adapter_that_answers_differently_is_an_error(arguments, monkeypatch):
    run = subprocess.run

    def damage(command, **kwargs):
        from safetensors.torch import load_file, save_file

        path = Path(command[-1]).parent / "flat" / "adapter" / "adapter_model.safetensors"
        save_file({key: -50 * torch.randn_like(value) for key, value in load_file(path).items()}, path)
        return run(command, **kwargs)

    monkeypatch.setattr(language_model.subprocess, "run", damage)
    with pytest.raises(RuntimeError, match="must give the same 7 answers, got"):
        language_model.main([*arguments, "--method", "flat", "--picture_samples", "0"])


@pytest.mark.parametrize("option", ["steps", "eval_samples", "batch_size"])
def test_impossible_sizes_are_answered_at_once(arguments, option):
    with pytest.raises(ValueError, match=f"{option} must be .*1.*got 0"):
        language_model.main([*arguments, f"--{option}", "0"])


@pytest.mark.slow
@processes.patient
def test_the_fresh_process_cannot_import_flatlora():
    examples = Path(language_model.__file__).parent
    code = "import common.reload_adapter, flatlora"
    done = processes.run_command([sys.executable, "-c", code], cwd=examples)
    assert done.returncode == 1 and "import of flatlora halted" in done.stderr
