"""Image classification with CLIP, ViT or DINOv2, as in the paper of Flat-LoRA (arXiv 2409.14396).

    python examples/recipes/image_classification.py                              # DINOv2-small, Fashion-MNIST
    python examples/recipes/image_classification.py --task cifar100 --paper --seeds 0 1 2    # CLIP, as in the paper
    python examples/recipes/image_classification.py --dataset my_images --model google/vit-base-patch16-224-in21k \
        --image_size 224

A folder of one's own has one folder of images per label, or images with a `metadata.csv` (columns `file_name` and
`label`); in the folders `train` and `test`, or a tenth is held out for the test. CLIP answers by the frozen embeddings
of the labels' names, so these should be words; other models get a new head, which is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from recipe import files, images, metrics
from recipe.arguments import RecipeArguments, parse
from recipe.estimate import estimate
from recipe.methods import adapt
from recipe.results import run_all
from recipe.training import fit
from transformers import CLIPVisionConfig

DATASETS = {  # on the hub, columns of the images and of the labels, training images
    "cifar10": ("uoft-cs/cifar10", "img", "label", 50_000),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label", 50_000),
    "cars": ("tanganke/stanford_cars", "image", "label", 8_144),
    "svhn": ("ufldl-stanford/svhn:cropped_digits", "image", "label", 73_257),
    "dtd": ("tanganke/dtd", "image", "label", 3_760),
}
CLASSES = {"cifar10": 10, "cifar100": 100, "cars": 196, "svhn": 10, "dtd": 47}
PAPER = {
    task: {
        "model": "openai/clip-vit-base-patch32",
        "dataset": dataset,
        "image_column": image,
        "label_column": label,
        "image_size": 224,
        "r": 8,
        "lora_alpha": 16,
        "learning_rate": 5e-4,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.03,
        "epochs": 10,
        "max_steps": -1,
        "batch_size": 128,
        "rho": 0.15,
        "train_samples": None,
        "eval_samples": None,
    }
    for task, (dataset, image, label, _) in DATASETS.items()
}


@dataclass
class Arguments(RecipeArguments):
    """Image classification with CLIP, ViT or DINOv2."""

    task: str = field(default="fashion", metadata={"help": f"one of {', '.join(DATASETS)}, for --paper"})
    image_size: int = field(default=84, metadata={"help": "pixels; ViT and CLIP take the size of their pretraining"})
    image_column: str = field(default="image", metadata={"help": "of a dataset on the hub"})
    label_column: str = field(default="label", metadata={"help": "of a dataset on the hub"})
    model: str = "dinov2"
    dataset: str = "fashion"
    max_steps: int = 40
    batch_size: int = 24
    train_samples: int | None = 960
    eval_samples: int | None = 500
    learning_rate: float = 1e-3


def load(args: Arguments) -> tuple[Any, Any, list[Any]]:
    """(training rows, test rows, names of the classes). The rows of the hub have the number of a class as label."""
    if args.dataset == "fashion":
        return *images.fashion(args.train_samples, args.eval_samples), list(images.FASHION)
    if Path(args.dataset).is_dir():
        train, test = files.image_splits(Path(args.dataset))
        metrics.check_labels(metrics.labels(train), test)
        return train[: args.train_samples], test[: args.eval_samples], metrics.labels(train)
    parts = []
    for split, limit in (("train", args.train_samples), ("test", args.eval_samples)):
        part = files.hub_dataset(args.dataset, [args.image_column, args.label_column], split)
        columns = {args.image_column: "image", args.label_column: "label"}
        part = part.rename_columns({old: new for old, new in columns.items() if old != new})
        parts.append(part if limit is None else part.select(range(min(limit, len(part)))))
    return *parts, parts[0].features["label"].names


def micro_batch(args: Arguments) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """CLIP ViT-B/32 and a micro-batch, for the estimate."""
    sizes = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    model = images.ClipClassifier(CLIPVisionConfig(**sizes, patch_size=32, image_size=224, projection_dim=512))
    model = model.to(getattr(torch, args.dtype)).set_head(torch.ones(CLASSES[args.task], 512), 100.0)
    count = args.micro_batch_size or args.batch_size
    pixels = torch.ones(count, 3, args.image_size, args.image_size, dtype=getattr(torch, args.dtype))
    return model, {"pixel_values": pixels, "labels": torch.zeros(count, dtype=torch.long)}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(Arguments, PAPER, arguments)
    if args.estimate:
        print(estimate(lambda: micro_batch(args), args, DATASETS[args.task][-1]))
        return []
    train, test, names = load(args)
    mean, std = images.normalization(args.model)

    def collate(rows: list[files.Row]) -> dict[str, torch.Tensor]:
        targets = [row["label"] if isinstance(row["label"], int) else names.index(row["label"]) for row in rows]
        values = images.pixels([row["image"] for row in rows], args.image_size, mean, std)
        return {"pixel_values": values.to(getattr(torch, args.dtype)), "labels": torch.tensor(targets)}

    def run(method: str, seed: int, folder: Path) -> dict[str, float]:
        base, trained_too = images.classifier(args, names, seed)
        model = adapt(base, method, args, seed, modules_to_save=trained_too or None)
        trained = fit(model, method, args, folder, seed, train, collate)
        return {**metrics.classification(model, test, collate), **trained}

    return run_all(args, run, arguments)


if __name__ == "__main__":
    main()
