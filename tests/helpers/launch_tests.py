"""Tests of examples/distributed with `accelerate launch` (the loop) and `torchrun` (the Trainer).

A file of tests derives a class and names its engines. Each engine starts from the same saved model (ZeRO-3: under
`zero.Init`) and has to meet the training of one process to 1e-5. A run that is resumed in its middle ends with the same
bits.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging import version
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils.data import default_collate
from transformers import set_seed

from flatlora import ascent, perturbation
from helpers import processes, tiny
from helpers.engine_runs import STEPS, train_together

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "distributed"
ENGINES = [*sorted(file.stem for file in EXAMPLES.glob("*.yaml")), "fsdp1-flat"]
LAUNCHERS = {"accelerate": "accelerate.commands.launch", "torchrun": "torch.distributed.run"}
HALF = STEPS // 2
RHO = 0.5


def configuration(engine, folder):
    """accelerate's configuration file of this engine. "fsdp1-flat" is FSDP1 with use_orig_params: false."""
    text = (EXAMPLES / f"{engine.removesuffix('-flat')}.yaml").read_text()
    if engine == "fsdp1-flat":
        text = text.replace("fsdp_use_orig_params: true", "fsdp_use_orig_params: false")
    file = folder / f"{engine}.yaml"
    file.write_text(text)
    return str(file)


def launch(launcher, engine, jobs, folder):
    """Run the example in two processes, once for each list of arguments."""
    config = configuration(engine, folder)
    options = ["--config_file", config, "--main_process_port", "0"]
    if launcher == "torchrun":
        options, jobs = ["--nproc-per-node", "2", "--standalone"], [[*job, "--config", config] for job in jobs]
    (folder / "jobs.json").write_text(json.dumps([[*job, *["--cpu"] * (engine == "ddp")] for job in jobs]))
    script = [str(ROOT / "tests" / "spread" / "launched.py"), str(folder / "jobs.json")]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", LAUNCHERS[launcher], *options, *script]
    done = processes.run_command(command, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def run_and_resume(launcher, engine, base, folder, method):
    """Folders of a whole run, and of a run resumed in the middle of it."""
    common = ["--model", base, "--method", method, "--rho", str(RHO), *["--trainer"] * (launcher == "torchrun")]
    whole, resumed = folder / "whole", folder / "resumed"
    again = ["--resume", str(whole / f"checkpoint-{HALF}")]
    launch(launcher, engine, [[*common, "--out", str(whole)], [*common, *again, "--out", str(resumed)]], folder)
    return whole, resumed


def train_alone(base, method):
    """Losses and adapter of the same training in one process."""
    specification = importlib.util.spec_from_file_location("distributed_train", EXAMPLES / "train.py")
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    args = example.parse(["--model", base, "--method", method, "--rho", str(RHO)])

    def make():
        set_seed(0)
        return example.make_model(args).train()

    models = [make(), make()] if method == "FlatLoraConfig" else [make()]
    rows = example.make_rows(args, models[0], 2 * STEPS * args.batch_size)
    optimizers = [torch.optim.AdamW(tiny.trainable(model), lr=args.lr) for model in models]

    def loss(model, step, rank):
        first = (2 * step + rank) * args.batch_size
        return model(**default_collate(rows[first : first + args.batch_size])).loss

    def mean_loss(model, step, rank):
        """Of both processes' batches, for a method without noise."""

        def compute():
            return (loss(model, step, 0) + loss(model, step, 1)) / 2

        if perturbation(model).settings.method.passes == 2:
            with ascent(model):
                compute().backward()
        return compute()

    losses = train_together(models, optimizers, loss if len(models) == 2 else mean_loss)
    return losses, {name: p.detach() for name, p in models[0].named_parameters() if p.requires_grad}


several_cpus = pytest.mark.xfail(
    version.parse(transformers.__version__) < version.parse("5.18"),
    reason="transformers before 5.18 loads no optimizer to the CPU of one process among several ('tagged with cpu:0')",
    strict=True,
)


def found(folder):
    return json.loads((folder / "run.json").read_text())


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


class LaunchTests:
    """The fixtures are in `spread/conftest.py`."""

    pytestmark = [processes.patient, pytest.mark.slow]
    engines = ()
    method = "FlatLoraConfig"

    def pytest_generate_tests(self, metafunc):
        if "engine" in metafunc.fixturenames:
            runs = [
                pytest.param(launcher, engine, marks=several_cpus if (launcher, engine) == ("torchrun", "ddp") else ())
                for launcher in LAUNCHERS
                for engine in self.engines
            ]
            metafunc.parametrize("launcher, engine", runs, scope="class")

    def test_the_training_is_that_of_one_process(self, launcher, runs, expected):
        whole, _ = runs
        losses, parameters = expected
        if launcher == "accelerate":  # the Trainer shuffles the rows
            assert found(whole)["losses"] == pytest.approx(losses, abs=1e-5)
            assert len(adapter(whole)) == len(parameters)
            for name, weight in adapter(whole).items():
                torch.testing.assert_close(
                    weight, parameters[name.replace(".weight", ".default.weight")], rtol=1e-4, atol=1e-5
                )

    def test_the_schedule_follows_the_optimizer_steps(self, launcher, runs):
        whole, _ = runs
        done = launcher == "torchrun"  # the Trainer logs after the step, the loop before it
        assert found(whole)["steps"] == STEPS
        assert found(whole)["strengths"] == pytest.approx([RHO * (step + done) / STEPS for step in range(STEPS)])

    def test_a_resumed_run_ends_with_the_same_bits(self, runs):
        whole, resumed = runs
        assert found(resumed)["steps"] == STEPS
        assert found(resumed)["strengths"][-HALF:] == found(whole)["strengths"][-HALF:]
        assert found(resumed)["losses"][-HALF:] == found(whole)["losses"][-HALF:]
        first, second = adapter(whole), adapter(resumed)
        assert first.keys() == second.keys() and all(
            torch.equal(weight, second[name]) for name, weight in first.items()
        )

    def test_stock_peft_loads_the_adapter(self, runs):
        whole, _ = runs
        model = PeftModel.from_pretrained(tiny.base_model(), whole / "adapter")
        loaded = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
        saved = adapter(whole)
        assert loaded.keys() == saved.keys() and all(torch.equal(p, saved[name]) for name, p in loaded.items())
