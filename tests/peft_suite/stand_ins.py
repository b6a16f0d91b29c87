"""Models for peft's tests where there is no hub: tiny random ones of the same classes, in a cache as the hub's client
keeps it. As a pytest plugin it keeps the tests from asking the hub."""

import sys
from collections import defaultdict
from pathlib import Path

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 1000}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512}
OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2, "vocab_size": 1000}
OPT |= {"num_attention_heads": 4, "max_position_embeddings": 512}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1000, "n_positions": 512}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
MODELS = {  # name on the hub -> model type, sizes
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("opt", OPT),
    "peft-internal-testing/opt-125m": ("opt", OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("gpt2", GPT),
    "peft-internal-testing/tiny-random-gpt2": ("gpt2", GPT),
    "hf-internal-testing/tiny-random-gpt2": ("gpt2", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("gptj", GPT | {"rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("llama", SIZES),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("llama", SIZES),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("llama", SIZES),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("mistral", SIZES),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("gemma3_text", SIZES | {"head_dim": 8}),
    "peft-internal-testing/tiny-dummy-qwen2": ("qwen2", SIZES),
    "trl-internal-testing/tiny-Llama4ForCausalLM": ("llama4_text", SIZES | EXPERTS | {"intermediate_size_mlp": 64}),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("gpt_oss", SIZES | EXPERTS),
}


def build(cache: Path) -> None:
    """Put MODELS and a tokenizer into `cache`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(999)} | {"<unk>": 999}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="w1", pad_token="w0")
    for name, (kind, sizes) in MODELS.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        torch.manual_seed(0)
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **special))
        for part in (model, tokenizer):
            part.save_pretrained(repository / "snapshots" / ("0" * 40))


class EveryModel(defaultdict):
    """peft's tests ask the hub once for each model that is not in here."""

    def __contains__(self, name: object) -> bool:
        return True


def pytest_collection_finish(session) -> None:
    utils = sys.modules.get("tests.testing_utils")  # which some files do without
    if utils is not None:
        utils._HUB_MODEL_ACCESSES = EveryModel(int)  # type: ignore[attr-defined]
