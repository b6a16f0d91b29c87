"""TRL's trainers with nothing but `peft_config=`: noise where they train, none where they compare or generate."""

import peft
import pytest
from helpers import tiny
from helpers.runs import RHO, adapter, assert_same_adapter, flat_model
from helpers.trl_runs import (
    FLAT,
    GENERATES,
    LENGTH,
    STEPS,
    assert_clean_but_for_training,
    number_of_words,
    reward_model,
    texts,
    train,
)

from flatlora import BiLoraConfig, EFMLoraConfig, FlatLoraConfig, perturbation

pytest.importorskip("trl")
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer


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
    """TRL adds an adapter "ref" with the config of the trained one."""
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
