"""A random Llama of 35k parameters that reads any text: a token per byte, with a chat template."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(chat=True):
    words = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({word: k for k, word in enumerate(words)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(words[:4])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|pad|>")
    if chat:
        fast.chat_template = CHAT
    return fast


def save(folder, chat=True, width=32):
    """Save model and tokenizer, and return the folder as text."""
    torch.manual_seed(0)
    own = tokenizer(chat)
    config = LlamaConfig(
        vocab_size=len(own), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=1, bos_token_id=None, eos_token_id=0, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    own.save_pretrained(folder)
    return str(folder)


def arguments(folder, *more, width=32):
    """Of a recipe: four steps of four examples with the model in `folder`/model, results in `folder`/out."""
    sizes = ["--max_steps", "4", "--batch_size", "4", "--r", "2", "--max_length", "512", "--dtype", "float32"]
    return [
        "--model",
        save(folder / "model", width=width),
        *sizes,
        "--output_dir",
        str(folder / "out"),
        *map(str, more),
    ]
