"""Train an adapter in several processes, however the model is spread over them.

    accelerate launch --config_file examples/distributed/fsdp2.yaml examples/distributed/train.py
    torchrun --nproc-per-node 2 examples/distributed/train.py --config examples/distributed/fsdp2.yaml

The files beside this one are accelerate's: ddp, fsdp2, fsdp1, zero2, zero3. Without `--model`, a small random Llama is
trained on random tokens; with one (a hub name or a folder), give it `--text`. `--trainer` takes `transformers.Trainer`
in place of the loop below. The adapter is saved in `--out`/adapter, a checkpoint of the middle of the run in
`--out`/checkpoint-..., and `--resume` goes on from one.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Trainer, TrainingArguments

from flatlora import (
    FlatLoraCallback,
    FlatLoraConfig,
    TwoPassTrainerMixin,
    ascent,
    get_flat_peft_model,
    methods,
    perturbation,
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="accelerate's configuration file, where accelerate is not the launcher")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--trainer", action="store_true", help="transformers.Trainer in place of the loop")
    parser.add_argument("--model", help="hub name or folder; default: a small random Llama")
    parser.add_argument("--text", help="file to train on; default: random tokens")
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    parser.add_argument("--method", default="FlatLoraConfig", help="a configuration class of flatlora")
    parser.add_argument("--rho", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=2, help="rows of each process")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--out", default="distributed_out")
    parser.add_argument("--resume", help="a checkpoint of an earlier run")
    return parser.parse_args(argv)


def read_config(file: str) -> None:
    """torchrun starts processes and no more: what the file says is put where `accelerate launch` puts it."""
    config = yaml.safe_load(Path(file).read_text())
    os.environ["ACCELERATE_MIXED_PRECISION"] = config.get("mixed_precision", "no")
    for engine, prefix in (("fsdp", "FSDP_"), ("deepspeed", "ACCELERATE_DEEPSPEED_")):
        for name, value in config.get(f"{engine}_config", {}).items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            os.environ[prefix + name.removeprefix("fsdp_").upper()] = text
            os.environ[f"ACCELERATE_USE_{engine.upper()}"] = "true"


def make_model(args: argparse.Namespace) -> torch.nn.Module:
    if args.model:
        base = AutoModelForCausalLM.from_pretrained(args.model)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
        base = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    kind = FlatLoraConfig if args.method == "FlatLoraConfig" else getattr(methods, args.method)
    return get_flat_peft_model(base, kind(rho=args.rho, schedule="linear", total_steps=args.steps, **lora))


def make_rows(args: argparse.Namespace, model: torch.nn.Module, count: int) -> list[dict[str, torch.Tensor]]:
    if args.text:
        tokens = torch.tensor(AutoTokenizer.from_pretrained(args.model)(Path(args.text).read_text())["input_ids"])
        rows = list(tokens[: len(tokens) // args.length * args.length].view(-1, args.length))
        rows = [rows[i % len(rows)] for i in range(count)]
    else:
        config: Any = model.config
        rows = list(torch.randint(config.vocab_size, (count, args.length), generator=torch.Generator().manual_seed(0)))
    return [{"input_ids": row, "labels": row} for row in rows]


def is_fsdp1(accelerator: Accelerator) -> bool:
    return getattr(getattr(accelerator.state, "fsdp_plugin", None), "fsdp_version", None) == 1


def make_state(model: torch.nn.Module, optimizer: Any) -> None:
    """Create the state of a new AdamW, because accelerate loads only what an optimizer of FSDP1 has a place for."""
    get_optimizer_state_dict(model, optimizer)


def loop(args: argparse.Namespace) -> dict[str, Any]:
    accelerator = Accelerator(cpu=args.cpu)
    set_seed(0)
    model = make_model(args)
    rows = make_rows(args, model, args.steps * args.batch_size * accelerator.num_processes)
    fsdp1 = is_fsdp1(accelerator)
    if fsdp1:  # adapters are wrapped by themselves, frozen layers together; the optimizer needs what comes out of it
        accelerator.state.fsdp_plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)
        model = accelerator.prepare(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.lr)
    loader = DataLoader(rows, batch_size=args.batch_size)
    if fsdp1:
        optimizer, loader = accelerator.prepare(optimizer, loader)
    else:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    state = perturbation(model)
    accelerator.register_for_checkpointing(state)
    first = 0
    if args.resume:
        if fsdp1:
            make_state(model, optimizer)
        accelerator.load_state(args.resume)
        first = state.steps
        loader = accelerator.skip_first_batches(loader, first)
    model.train()
    losses, strengths = [], []
    for step, batch in enumerate(loader, start=first + 1):
        if state.settings.method.passes == 2:  # FMLoRA and LoRA-SAM
            with ascent(model):
                accelerator.backward(model(**batch).loss)
        loss = model(**batch).loss
        strengths.append(state.rho_t)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        if step == args.steps // 2:
            accelerator.save_state(f"{args.out}/checkpoint-{step}")
    weights = accelerator.get_state_dict(model)  # whole again, on the main process
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(f"{args.out}/adapter", state_dict=weights)
    return {"losses": losses, "strengths": strengths, "steps": state.steps, "main": accelerator.is_main_process}


class ResumingTrainer(Trainer):
    def create_optimizer(self, *model: Any) -> Any:  # transformers 5.0 passes none
        optimizer = super().create_optimizer(*model)
        if is_fsdp1(self.accelerator):
            make_state(model[0] if model else self.model, optimizer)
        return optimizer


class TwoPassTrainer(TwoPassTrainerMixin, ResumingTrainer):
    pass


def train(args: argparse.Namespace) -> dict[str, Any]:
    arguments = TrainingArguments(
        args.out,
        use_cpu=args.cpu,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        logging_steps=1,
        save_steps=args.steps // 2,
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    set_seed(0)
    model = make_model(args)
    rows = make_rows(args, model, args.steps * args.batch_size * arguments.world_size)
    kind: type[Trainer] = ResumingTrainer if args.resume else Trainer
    if perturbation(model).settings.method.passes == 2:
        kind = TwoPassTrainer
    trainer = kind(model, arguments, train_dataset=rows, callbacks=[FlatLoraCallback()])
    trainer.train(resume_from_checkpoint=args.resume)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(f"{args.out}/adapter")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses, strengths = ([entry[name] for entry in logs] for name in ("loss", "flat_rho"))
    main = trainer.is_world_process_zero()
    return {"losses": losses, "strengths": strengths, "steps": perturbation(model).steps, "main": main}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.config:
        read_config(args.config)
    found = (train if args.trainer else loop)(args)
    if found.pop("main"):
        Path(args.out, "run.json").write_text(json.dumps(found))
        print(found)


if __name__ == "__main__":
    main()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
