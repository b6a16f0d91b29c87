"""Questions about images, with Qwen2.5-VL, LLaVA, and other models that transformers loads as image-text-to-text.

    python examples/recipes/vision_language.py                                   # a tiny Qwen2.5-VL, drawn charts
    python examples/recipes/vision_language.py --model tiny-llava
    python examples/recipes/vision_language.py --task scienceqa --paper --load_in_4bit
    python examples/recipes/vision_language.py --task vizwiz --paper --dataset VizWiz/train.jsonl
    python examples/recipes/vision_language.py --task own --dataset mine.jsonl --model llava-hf/llava-1.5-7b-hf

A .jsonl file of one's own has `image` (a path, also relative to the file), `question` and `answer`. VizWiz is published
as JSON lists, with `answers` of several people: `jq -c '.[]' train.json > train.jsonl` makes lines of them. A tenth of
a local file is held out for the test.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from recipe import charts, files, image_text, models
from recipe.arguments import RecipeArguments, parse
from recipe.estimate import estimate
from recipe.methods import adapt
from recipe.results import run_all
from recipe.training import fit
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

COLUMNS = {
    "charts": ["image", "question", "answer"],
    "scienceqa": ["question", "choices", "answer"],  # some rows have no image: they are left out
    "vizwiz": ["image", "question", "answers"],
    "own": ["image", "question", "answer"],
}
PAPER = {
    task: {
        "method": ["lora", "efmlora"],
        "model": "Qwen/Qwen2.5-VL-7B-Instruct",  # the paper's Qwen-VL-Chat is not among the classes of transformers
        "dataset": dataset,
        "rho": rho,
        "learning_rate": 1e-4,
        "batch_size": 32,
        "micro_batch_size": 4,
        "max_steps": -1,
        "epochs": 1.0,
        "train_samples": None,
        "eval_samples": None,
        "answer_tokens": tokens,
        "dtype": "bfloat16",
    }
    for task, dataset, rho, tokens in [
        ("scienceqa", "derek-thomas/ScienceQA", 0.2, 4),
        ("vizwiz", "VizWiz/train.jsonl", 0.05, 10),
    ]
}
ROWS = {"scienceqa": 6_218, "vizwiz": 20_523}  # with an image, of the training data, for --estimate


@dataclass
class Arguments(RecipeArguments):
    """Questions about images."""

    task: str = field(default="charts", metadata={"help": f"form of the data: one of {', '.join(COLUMNS)}"})
    answer_tokens: int = field(default=3, metadata={"help": "at most so many are generated"})
    max_pixels: int = field(default=28 * 28 * 576, metadata={"help": "larger images are reduced"})
    model: str = "tiny-qwen"
    dataset: str = "charts"
    target_modules: str = "q_proj,k_proj,v_proj,o_proj"
    learning_rate: float = 5e-3
    batch_size: int = 16
    max_steps: int = 100
    train_samples: int | None = 512
    eval_samples: int | None = 200
    dtype: str = "float32"


def load(args: Arguments) -> tuple[list[files.Row], list[files.Row]]:
    """(training rows, test rows), each with image, question and answer."""
    if args.task not in COLUMNS:
        raise ValueError(f"--task must be one of {', '.join(COLUMNS)}, got {args.task}")
    if args.dataset == "charts":
        return charts.charts(args.train_samples or 512, seed=1), charts.charts(args.eval_samples or 200, seed=2)
    folder = Path(args.dataset).parent
    parts, limits = [], (args.train_samples, args.eval_samples)
    for rows, limit in zip(files.splits(args.dataset, COLUMNS[args.task]), limits, strict=True):
        some = [one(row, args.task) for row in rows if row.get("image") is not None][:limit]
        parts.append([{**row, "image": reduced(image_text.image(row, folder), args)} for row in some])
    return parts[0], parts[1]


def one(row: files.Row, task: str) -> files.Row:
    """A row with `question` and `answer` as texts."""
    if task == "scienceqa":
        hint, letters = row.get("hint") or "", "ABCDEFGH"
        choices = [f"{letter}. {text}" for letter, text in zip(letters, row["choices"], strict=False)]
        question = "\n".join([row["question"], *([hint] if hint else []), *choices, "Answer with the letter."])
        return {"image": row["image"], "question": question, "answer": letters[int(row["answer"])]}
    if task == "vizwiz":
        given = image_text.most_common(row["answers"])
        return {"image": row["image"], "question": row["question"], "answer": given[0], "answers": given}
    return {"image": row["image"], "question": str(row["question"]), "answer": str(row["answer"])}


def reduced(image: Any, args: Arguments) -> Any:
    """The image, with at most `max_pixels`."""
    scale = (args.max_pixels / (image.width * image.height)) ** 0.5
    return image if scale >= 1 else image.resize([max(1, int(scale * side)) for side in image.size])


def micro_batch(args: Arguments) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Qwen2.5-VL-7B and a micro-batch of images of `max_pixels`, each with 64 tokens of text, for the estimate."""
    text = dict(hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28)
    text |= dict(num_key_value_heads=4, vocab_size=152_064)
    vision = dict(hidden_size=1280, out_hidden_size=3584)  # the rest are the defaults of the classes
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=getattr(torch, args.dtype))
    size = args.micro_batch_size or args.batch_size
    tokens = torch.ones(size, args.max_pixels // 28**2 + 64, dtype=torch.long)
    return image_text.Counted(model, patches=size * args.max_pixels // 14**2), {"tokens": tokens}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(Arguments, PAPER, arguments)
    if args.estimate:
        print(estimate(lambda: micro_batch(args), args, ROWS.get(args.task, args.train_samples or 512)))
        return []
    train, test = load(args)
    tiny = args.model in ("tiny-qwen", "tiny-llava")
    name = str(charts.tiny_folder(args.model)) if tiny else models.source(args.model)
    processor, dtype = image_text.processor(name), getattr(torch, args.dtype)

    def collate(rows: list[files.Row]) -> dict[str, torch.Tensor]:
        return image_text.collate(processor, rows)

    how = processor, test, args.answer_tokens, args.batch_size, dtype
    before = image_text.mean_score(image_text.answers(image_text.model(name, args), *how), test)

    def run(method: str, seed: int, folder: Path) -> dict[str, float]:
        model = adapt(image_text.model(name, args), method, args, seed)
        trained = fit(model, method, args, folder, seed, train, collate)
        after = image_text.answers(model, *how)
        image_text.sheet(test[:12], after[:12]).save(folder / "answers.png")
        return {"before": before, "score": image_text.mean_score(after, test), **trained}

    return run_all(args, run, arguments)


if __name__ == "__main__":
    main()
