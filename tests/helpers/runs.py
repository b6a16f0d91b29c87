"""A flat Llama, random tokens, a Trainer, and the schedule in closed form."""

import math

import peft
import torch
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments

from flatlora import FlatLoraConfig
from helpers import tiny

RHO = 0.2


def plain_model(torch_seed=0, kind=peft.LoraConfig, adapter_name="default", **settings):
    """A Llama whose adapter is made after `torch.manual_seed(torch_seed)`. The base model is the same for all seeds."""
    base = tiny.base_model()
    torch.manual_seed(torch_seed)
    return peft.get_peft_model(base, kind(**{**tiny.LORA, **settings}), adapter_name)


def flat_model(torch_seed=0, **settings):
    return plain_model(torch_seed, FlatLoraConfig, **{"rho": RHO, "seed": 7, **settings})


def rows(count, length=6):
    """A data set for a Trainer: random tokens, which are their own labels."""
    tokens = torch.randint(tiny.TOKENS, (count, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def batches(count, size=2):
    data = rows(count * size)
    return [default_collate(data[i : i + size]) for i in range(0, len(data), size)]


def trainer(
    model, folder, *, kind=Trainer, arguments=TrainingArguments, callbacks=(), data=None, more=None, **settings
):
    """A Trainer with batches of two rows that writes nothing by default. `more` goes to the Trainer itself."""
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "use_cpu": True}
    defaults = {"output_dir": str(folder), "per_device_train_batch_size": 2, "learning_rate": 1e-2, **quiet}
    args = arguments(**{**defaults, **settings})
    data = rows(8) if data is None else data
    return kind(model, args=args, train_dataset=data, callbacks=[*callbacks], **(more or {}))


def adapter(model):
    """Copies of the trained parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def assert_same_adapter(model, expected):
    found = adapter(model)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def cosine(step, total):
    """rho_t after `step` of `total` optimizer steps, in closed form (arXiv 2409.14396)."""
    return RHO * 0.5 * (1 - math.cos(math.pi * min(step / total, 1)))
