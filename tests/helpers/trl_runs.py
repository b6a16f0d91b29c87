"""Run TRL's trainers, and tell the passes that must have noise from those that must not."""

import peft
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from flatlora import FlatLoraCallback, FlatLoraConfig, perturbation
from helpers import tiny
from helpers.runs import RHO, trainer

STEPS = 4
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
FLAT = {"rho": RHO, "seed": 7, "schedule": "constant"}
LENGTH = 4  # generated tokens
GENERATES = {
    "num_generations": 2,
    "beta": 0.1,  # a reference model is needed
    "max_completion_length": LENGTH,
    "generation_kwargs": {"suppress_tokens": [2]},  # no end token before this length
}


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def texts(*columns):
    """Eight rows of three words in each column, a space before those of the later columns."""
    from datasets import Dataset

    words = [[" ".join(WORDS[(i + 3 * j + k) % 10] for k in range(3)) for i in range(8)] for j in range(len(columns))]
    return Dataset.from_dict({name: [" " * bool(j) + text for text in words[j]] for j, name in enumerate(columns)})


def reward_model():
    config = tiny.base_model().config
    config.num_labels, config.pad_token_id = 1, 0
    return LlamaForSequenceClassification(config)


def number_of_words(completions, **kwargs):
    return [float(len(text.split())) for text in completions]


def train(kind, arguments, model, data, folder, passes, *, config=None, more=None, **settings):
    config = config or FlatLoraConfig(**tiny.LORA, **FLAT)
    seen = passes(model)
    wrapped = isinstance(model, peft.PeftModel)
    run = trainer(
        model,
        folder,
        kind=kind,
        arguments=arguments,
        callbacks=[FlatLoraCallback()],
        data=data,
        more={"processing_class": tokenizer(), **({} if wrapped else {"peft_config": config}), **(more or {})},
        max_steps=STEPS,
        bf16=False,
        **settings,
    )
    run.train()
    assert perturbation(run.model).total_steps == STEPS
    assert [logs["flat_rho"] for logs in run.state.log_history if "loss" in logs] == [RHO] * STEPS
    return run, seen


def assert_clean_but_for_training(run, seen, *, training, other):
    layers = sum(isinstance(module, peft.tuners.lora.LoraLayer) for module in run.model.modules())
    perturbed = [p for p in seen if p.strengths]
    assert [p.grad and p.training for p in seen] == [bool(p.strengths) for p in seen]
    assert [p.rho for p in perturbed] == pytest.approx([RHO] * training)
    assert all(len(p.strengths) == layers for p in perturbed)
    assert len(set().union(*(p.samples for p in perturbed))) == training
    assert len(seen) - training == other
