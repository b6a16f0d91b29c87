"""A tiny BERT for sentence-transformers."""

import torch
from transformers import BertConfig, BertModel

from helpers import tiny
from helpers.trl_runs import tokenizer


def saved_bert(path):
    """Save a tiny BERT and its tokenizer, and return the folder."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=tiny.TOKENS, **sizes)).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)
