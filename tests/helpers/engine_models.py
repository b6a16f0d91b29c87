"""Models with other layers than plain linear ones. Each is made from fixed seeds."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from flatlora import FlatLoraConfig
from helpers import tiny


def gpt2():
    """GPT-2: its layers are transformers' Conv1D."""
    torch.manual_seed(3)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": tiny.TOKENS, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def mixtral():
    """Mixtral: its experts are parameters."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": tiny.TOKENS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=2, num_experts_per_tok=2))


def four_bit():
    """The tiny Llama in 4 bits of bitsandbytes, stored as float32, which FSDP can shard."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    model, stored = tiny.base_model(), {"quant_type": "nf4", "quant_storage": torch.float32}
    for name, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            n, m = layer.in_features, layer.out_features
            packed = Linear4bit(n, m, bias=False, compute_dtype=torch.float32, **stored)
            packed.weight = Params4bit(layer.weight.detach(), requires_grad=False, module=packed, **stored)
            model.model.layers.set_submodule(name, packed.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = {
    "dora": (tiny.base_model, {"use_dora": True}),
    "conv1d": (gpt2, {"fan_in_fan_out": True}),
    "4-bit": (four_bit, {}),
    "4-bit-dora": (four_bit, {"use_dora": True}),
    "embedding": (tiny.base_model, {"target_modules": ["embed_tokens", "q_proj"]}),
    "experts": (mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
}


def make(kind, **settings):
    base, options = KINDS[kind]
    return tiny.adapted(FlatLoraConfig(seed=7, **{**tiny.LORA, **options}, **settings), base())
