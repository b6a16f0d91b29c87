"""TRL's trainers, told of us by `peft_config=` alone: noise where they train, none where they compare or generate."""

import peft
import pytest
import tiny
from datasets import Dataset
from loops.runs import RHO, adapter, assert_same_adapter, flat_model, trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from flatlora import BiLoraConfig, EFMLoraConfig, FlatLoraCallback, FlatLoraConfig, perturbation

STEPS = 4
WORDS = "one two three four five six seven eight nine ten".split()
FLAT = {"rho": RHO, "seed": 7, "schedule": "constant"}
LENGTH = 4  # of what is generated
GENERATES = {
    "num_generations": 2,
    "beta": 0.1,  # so there is a reference
    "max_completion_length": LENGTH,
    "generation_kwargs": {"suppress_tokens": [2]},  # no end before the length
}


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def texts(*columns):
    """Eight rows of three words in each column, the later columns with the space that parts them from the first."""
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


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
def test_sft(reentrant, passes, tmp_path):
    settings = {"gradient_checkpointing": reentrant is not None}
    if reentrant is not None:
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    run, seen = train(SFTTrainer, SFTConfig, tiny.base_model(), texts("text"), tmp_path, passes, **settings)
    assert_clean_but_for_training(run, seen, training=STEPS, other=0)
    run.save_model()
    plain = peft.PeftModel.from_pretrained(tiny.base_model(), tmp_path)
    assert type(plain.peft_config["default"]) is peft.LoraConfig
    assert_same_adapter(plain, adapter(run.model))


def test_dpo_against_the_base_model(passes, tmp_path):
    data = texts("prompt", "chosen", "rejected")
    run, seen = train(DPOTrainer, DPOConfig, tiny.base_model(), data, tmp_path, passes)
    assert_clean_but_for_training(run, seen, training=STEPS, other=STEPS)


def test_dpo_against_the_adapter_as_it_was(passes, tmp_path):
    """TRL then adds an adapter "ref" with the config of the one that trains."""
    data = texts("prompt", "chosen", "rejected")
    run, seen = train(DPOTrainer, DPOConfig, flat_model(schedule="constant"), data, tmp_path, passes)
    assert "ref" in run.model.peft_config
    assert_clean_but_for_training(run, seen, training=STEPS, other=STEPS)


def test_dpo_with_the_reference_computed_beforehand(passes, tmp_path):
    data = texts("prompt", "chosen", "rejected")
    run, seen = train(DPOTrainer, DPOConfig, tiny.base_model(), data, tmp_path, passes, precompute_ref_log_probs=True)
    assert_clean_but_for_training(run, seen, training=STEPS, other=len(data) // 2)


def test_reward(passes, tmp_path):
    data = texts("prompt", "chosen", "rejected")
    config = FlatLoraConfig(**{**tiny.LORA, **FLAT, "task_type": "SEQ_CLS"})
    run, seen = train(RewardTrainer, RewardConfig, reward_model(), data, tmp_path, passes, config=config)
    assert_clean_but_for_training(run, seen, training=STEPS, other=0)


def test_grpo(passes, tmp_path):
    data, more, rounds = texts("prompt"), {"reward_funcs": number_of_words}, STEPS // 2
    settings = {**GENERATES, "num_iterations": 2}  # steps to a generation, so old log-probabilities are needed
    run, seen = train(GRPOTrainer, GRPOConfig, tiny.base_model(), data, tmp_path, passes, more=more, **settings)
    old, reference = 1, 1
    assert_clean_but_for_training(run, seen, training=STEPS, other=rounds * (LENGTH + old + reference))


@pytest.mark.parametrize("config", [EFMLoraConfig, BiLoraConfig], ids=["efmlora", "bilora"])
def test_sft_with_another_method(config, passes, tmp_path):
    config = config(**tiny.LORA, rho=RHO, schedule="constant")
    run, _ = train(SFTTrainer, SFTConfig, tiny.base_model(), texts("text"), tmp_path, passes, config=config)
    tensors = perturbation(run.model).tensors()
    layers = sum(isinstance(module, peft.tuners.lora.LoraLayer) for module in run.model.modules())
    assert len(tensors) == layers * (1 if isinstance(config, EFMLoraConfig) else 2)
    assert all(tensor.any() for tensor in tensors.values())
    run.save_model(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors", "flatlora_config.json"} <= {
        path.name for path in tmp_path.iterdir()
    }
