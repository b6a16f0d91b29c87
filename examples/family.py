"""Do the flatness methods generalise better than LoRA? A small encoder, few sentences, several seeds.

    python examples/family.py --methods lora flat flat:0.1 rwp efmlora lora-sam --seeds 0 1 2 3 4

MiniLM (22.7M parameters, fetched from a package on PyPI) learns the sentiment of 512 movie reviews, to a training loss
of almost nothing, and is tested on held-out movie reviews and on three domains that it was never trained on. A seed
sets the sentences, the initialization, their order and the noise; every method gets the same. `method:rho` sets a
strength, without it each method has its default. Measurements are written to runs.csv as soon as they are made, and a
run that was interrupted goes on from there.

    python examples/family.py --methods lora --seeds 100 --validate --lr 1e-3     # to choose the learning rate
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from common import tables
from common.data import Example, Task, endless_batches, load_task
from common.models import minilm_folder
from compare import same_settings
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

import flatlora
from flatlora.analysis import Estimate

CONFIGS = {
    "lora": LoraConfig,
    "flat": flatlora.FlatLoraConfig,
    "rwp": flatlora.RwpConfig,
    "efmlora": flatlora.EFMLoraConfig,
    "fmlora": flatlora.FMLoraConfig,
    "lora-sam": flatlora.LoraSamConfig,
    "bilora": flatlora.BiLoraConfig,
    "bar": flatlora.BarConfig,
}


@dataclass
class Arguments:
    """Compare methods over seeds on a small encoder."""

    methods: list[str] = field(
        default_factory=lambda: ["lora", "flat", "rwp", "efmlora"],
        metadata={"help": f"method or method:rho, of {', '.join(CONFIGS)}; differences are to the first"},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "one run of each method per seed"})
    train_samples: int = field(default=512, metadata={"help": "training sentences, drawn anew for each seed"})
    steps: int = field(default=320, metadata={"help": "optimizer steps"})
    batch_size: int = field(default=16, metadata={"help": "sentences per step"})
    lr: float = field(default=3e-4, metadata={"help": "peak learning rate, the same for every method"})
    r: int = field(default=8, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=16, metadata={"help": "the update is scaled by lora_alpha / r"})
    max_tokens: int = field(default=64, metadata={"help": "longer sentences are cut"})
    dtype: Literal["bfloat16", "float32"] = field(
        default="bfloat16", metadata={"help": "of the base model; adapters are float32"}
    )
    validate: bool = field(
        default=False, metadata={"help": "test on 1,000 in-domain sentences of the training part that were not drawn"}
    )
    output_dir: str = field(default="out-family", metadata={"help": "where runs.csv and summary.csv go"})


class Encoder:
    """Examples to (inputs of the model, labels)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def __call__(self, examples: list[Example]) -> tuple[dict[str, Tensor], Tensor]:
        texts = [example.text for example in examples]
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=self.max_tokens)
        return dict(inputs), torch.tensor([example.label for example in examples])


def adapt(base: nn.Module, method: str, seed: int, args: Arguments) -> PeftModel:
    """The base model with new adapters."""
    name, _, rho = method.partition(":")
    options = dict(r=args.r, lora_alpha=args.lora_alpha, target_modules="all-linear", task_type="SEQ_CLS")
    torch.manual_seed(seed)
    if name == "lora":
        return get_peft_model(base, LoraConfig(**options))
    noise = {"seed": seed} if name in ("flat", "rwp", "bilora") else {}
    strength = {"rho": float(rho)} if rho else {}
    return flatlora.get_flat_peft_model(base, CONFIGS[name](**options, **noise, **strength, total_steps=args.steps))


def train(model: PeftModel, method: str, encode: Encoder, examples: list[Example], seed: int, args: Arguments) -> float:
    """Returns the mean training loss of the last 20 steps."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.lr, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    two_passes = method != "lora" and flatlora.perturbation(model).settings.method.passes == 2
    losses = []
    model.train()
    for batch in itertools.islice(endless_batches(examples, args.batch_size, seed), args.steps):
        inputs, labels = encode(batch)
        if two_passes:
            with flatlora.ascent(model):
                F.cross_entropy(model(**inputs).logits.float(), labels).backward()
        loss = F.cross_entropy(model(**inputs).logits.float(), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / len(losses[-20:])


@torch.inference_mode()
def count_correct(model: nn.Module, encode: Encoder, examples: list[Example], batch_size: int = 64) -> int:
    """Right answers; batches hold texts of similar length."""
    order, correct = sorted(examples, key=lambda example: len(example.text)), 0
    for start in range(0, len(order), batch_size):
        inputs, labels = encode(order[start : start + batch_size])
        correct += int((model(**inputs).logits.argmax(-1) == labels).sum())
    return correct


def run(method: str, seed: int, encode: Encoder, task: Task, args: Arguments) -> list[dict]:
    """Train once; one row per domain."""
    drawn = random.Random(seed).sample(range(len(task.train)), args.train_samples)
    torch.manual_seed(seed)
    dtype = getattr(torch, args.dtype)
    base = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=len(task.labels), dtype=dtype)
    model = adapt(base, method, seed, args)
    start = time.perf_counter()
    loss = train(model, method, encode, [task.train[k] for k in drawn], seed, args)
    seconds = time.perf_counter() - start
    rho = 0.0 if method == "lora" else flatlora.perturbation(model).rho
    model.eval()
    if args.validate:
        left = sorted(set(range(len(task.train))) - set(drawn))
        tests = {"validation": [task.train[k] for k in random.Random(0).sample(left, min(1000, len(left)))]}
    else:
        tests = task.tests
    rows = []
    for domain, examples in tests.items():
        n, hits = len(examples), count_correct(model, encode, examples)
        row = {"method": method, "seed": seed, "domain": domain, "examples": n, "correct": hits, "accuracy": hits / n}
        rows.append(row | {"rho": rho, "training loss": f"{loss:.5f}", "training seconds": f"{seconds:.1f}"})
    return rows


def summary(rows: list[dict], methods: list[str]) -> list[dict]:
    """Mean accuracy over seeds per method and domain, and its difference to the first method.

    The difference is paired by seed, with Student's 95 % interval over the seeds that both methods have.
    """
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    accuracy = {(row["method"], row["seed"], row["domain"]): row["accuracy"] for row in rows}
    lines = []
    for method in methods:
        seeds = sorted({s for m, s, _ in accuracy if m == method} & {s for m, s, _ in accuracy if m == methods[0]})
        own, first = (
            torch.tensor([[accuracy[name, seed, d] for d in domains] for seed in seeds], dtype=torch.float64)
            for name in (method, methods[0])
        )  # (seeds, domains)
        for domain, columns in [*((domain, [k]) for k, domain in enumerate(domains)), ("mean", range(len(domains)))]:
            mean = own[:, list(columns)].mean(1)
            line = {"method": method, "domain": domain, "seeds": len(seeds), "accuracy": mean.mean().item()}
            line |= {"difference": "", "low": "", "high": ""}
            if method != methods[0] and len(seeds) > 1:
                difference = Estimate.of(mean - first[:, list(columns)].mean(1))
                low, high = difference.interval()
                line |= {"difference": difference.estimate, "low": low, "high": high}
            lines.append(line)
    return lines


def show(lines: list[dict]) -> None:
    """Print the summary."""
    for line in lines:
        text = f"{line['method']:10s} {line['domain']:10s} {100 * line['accuracy']:.1f}"
        if line["difference"] != "":
            text += f"  {100 * line['difference']:+.1f} [{100 * line['low']:+.1f}, {100 * line['high']:+.1f}]"
        print(f"{text}  ({line['seeds']} seeds)")


def check(args: Arguments) -> None:
    """Check the methods and seeds.

    Raises:
        ValueError: a method is unknown, or a method or seed is given twice.
    """
    for name in ("methods", "seeds"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            raise ValueError(f"{name} must differ, got {getattr(args, name)}")
    if unknown := [method for method in args.methods if method.partition(":")[0] not in CONFIGS]:
        raise ValueError(f"methods must be of {list(CONFIGS)}, with :rho if you like, got {unknown}")


def main(arguments: list[str] | None = None) -> list[dict]:
    """Run what is missing from runs.csv, then print and write the summary."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    check(args)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name not in ("methods", "seeds")}
    rows = same_settings(folder, settings)
    task = load_task("movie")
    encode = Encoder(AutoTokenizer.from_pretrained(minilm_folder()), args.max_tokens)
    for seed, method in itertools.product(args.seeds, args.methods):
        if (method, seed) not in {(row["method"], row["seed"]) for row in rows}:
            new = run(method, seed, encode, task, args)
            hits = ", ".join(f"{row['domain']} {100 * row['accuracy']:.1f}" for row in new)
            print(f"seed {seed}, {method}: {hits}", flush=True)
            rows += new
            tables.write_csv(folder / "runs.csv", rows)
    lines = summary([row for row in rows if row["seed"] in args.seeds], args.methods)
    tables.write_csv(folder / "summary.csv", lines)
    (folder / "machine.json").write_text(json.dumps(tables.machine(torch.device("cpu")), indent=2) + "\n")
    show(lines)
    return lines


if __name__ == "__main__":
    main()
