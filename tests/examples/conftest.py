import itertools
import random
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # what `python examples/quickstart.py` does
sys.path.insert(0, str(EXAMPLES / "recipes"))

WORDS = [
    *("good", "fine", "great", "bad", "poor", "dull", "film", "plot", "is", "a", "the", "very", "not"),
    *("Review", ":", "Sentiment", "negative", "positive"),
]


@pytest.fixture
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", padding_side="left")


@pytest.fixture
def tiny_model(tmp_path, tokenizer):
    """A folder with a random Llama of 20k parameters and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    folder = tmp_path / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_bert(tmp_path, tokenizer):
    """A folder with a random BERT and its tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=1,
    )  # fmt: skip
    folder = tmp_path / "tiny-bert"
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def reviews(tmp_path):
    """Forty reviews whose label follows from one word, and ten from another domain."""
    words = [("good", 1), ("fine", 1), ("great", 1), ("bad", 0), ("poor", 0), ("dull", 0)]
    nouns, adverbs = ("film", "plot"), ("", "very ", "not ")
    rows = [(f"the {n} is {a}{w}", y) for n, a, (w, y) in itertools.product(nouns, adverbs, words)]
    for name, some in (("movies", rows), ("books", rows[:10])):
        lines = [f"{text},{('negative', 'positive')[label]}" for text, label in some]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    return tmp_path


@pytest.fixture
def arguments(tiny_model, reviews):
    files = ["--dataset", str(reviews / "movies.csv"), "--other_domains", str(reviews / "books.csv")]
    sizes = ["--steps", "6", "--batch_size", "4", "--eval_samples", "8", "--picture_samples", "4", "--r", "2"]
    kind = ["--dtype", "float32", "--device", "cpu", "--lr", "0.01"]
    return ["--model", str(tiny_model), *files, *sizes, *kind, "--output_dir", str(reviews / "out")]


@pytest.fixture
def matplotlib():
    """Asked for by tests that draw."""
    return pytest.importorskip("matplotlib", reason="the plot extra is not installed")


@pytest.fixture
def task(tiny_bert):
    """(task, its tests): forty sentences whose label follows from one word."""
    from common.data import Example
    from study import tasks

    words = [("good", 1), ("fine", 1), ("great", 1), ("bad", 0), ("poor", 0), ("dull", 0)]
    texts = [Example(f"the {n} is {a} {w}", y) for n in ("film", "plot") for a in ("", "very", "not") for w, y in words]
    random.Random(0).shuffle(texts)
    cell = tasks.Cell("128-clean", 8, 0.25, 4, ("lora", "smoothing", "early-stopping", "average", "flat"), 2)
    task = tasks.Text(
        "text", texts[:20], texts[20:], texts[20:26], [cell], ["movie", "books"], batch_size=4, eigen_steps=3,
        probe=4, pairs=1, folder=str(tiny_bert),
    )  # fmt: skip
    return task, {"movie": texts[:12], "books": texts[12:24]}
