"""A tiny Llama with plain LoRA and with Flat-LoRA, from the same seeds."""

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flatlora import FlatLoraConfig

TOKENS = 64
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def base_model(**kwargs):
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": TOKENS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **kwargs))


def adapted(config, base=None):
    model = base_model() if base is None else base
    torch.manual_seed(4)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():  # B starts at zero, and then half of the gradients are zero
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model.train()


def plain_model(**kwargs):
    return adapted(peft.LoraConfig(**LORA, **kwargs))


def flat_model(rho=0.2, schedule="constant", seed=7, **kwargs):
    return adapted(FlatLoraConfig(rho=rho, schedule=schedule, seed=seed, **LORA, **kwargs))


def tokens(batch=2, length=10, seed=0):
    return torch.randint(TOKENS, (batch, length), generator=torch.Generator().manual_seed(seed))


def loss(model, seed=0):
    x = tokens(seed=seed)
    return model(input_ids=x, labels=x).loss


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model):
    return [p.grad.clone() for p in trainable(model)]


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
