"""A tiny T5 made here, since no package ships one: the architecture and the text-to-text form of T5, not its knowledge.

C. Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", arXiv 1910.10683.
A vocabulary of 4,096 pieces is learned from the packaged sentences of three domains (Amazon reviews, tweets, NYT
editorials), and a model of 0.5 million weights is then trained on their sentiment for about a minute:
`sst2 sentence: <text>` -> `positive`. The fourth domain, movie reviews, is for the adapters.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as token_models
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from common.data import VADER, Example, read_vader
from common.packages import cache_dir, check_hashes, fetch, make_once, write_hashes

PREFIX, WORDS = "sst2 sentence: ", ("negative", "positive")
VOCABULARY, LENGTH = 4096, 48
STEPS, BATCH, RATE = 400, 64, 3e-3


def tiny_t5_folder() -> Path:
    """The tiny T5 and its tokenizer as `from_pretrained` takes them, made the first time.

    The hashes of its files are written down when they are made, and checked at each call. Its weights depend on the
    machine that made it.
    """
    folder = make_once(cache_dir() / "tiny-t5", _make)
    check_hashes(folder)
    return folder


def _make(folder: Path) -> None:
    domains = read_vader(fetch(VADER))
    examples = [x for name, own in domains.items() if name != "movie" for x in own]
    print(f"Training a tiny T5 once on {len(examples)} sentences, into {cache_dir()}; about two minutes", flush=True)
    tokenizer = make_tokenizer([x.text for x in examples])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = train(make_model(len(tokenizer)), tokenizer, examples)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_hashes(folder)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte pairs of lower-case words, with the special tokens of T5: `<pad>` is 0, `</s>` ends a text, `<unk>` is 2."""
    made = Tokenizer(token_models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    made.train_from_iterator([*texts, PREFIX, *WORDS * 100], trainer)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_model(vocabulary: int) -> T5ForConditionalGeneration:
    """Two layers of width 64 in the encoder, one in the decoder."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary, d_model=64, d_kv=16, d_ff=256, num_layers=2, num_decoder_layers=1, num_heads=4,
            dropout_rate=0.1, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )
    )  # fmt: skip


def train(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> T5ForConditionalGeneration:
    """Train all weights on the words of the labels, and return the model."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = OneCycleLR(optimizer, RATE, STEPS)
    targets = tokenizer(list(WORDS), return_tensors="pt").input_ids
    for _ in tqdm(range(STEPS), desc="tiny T5"):
        batch = rng.sample(examples, min(BATCH, len(examples)))
        texts = [PREFIX + x.text for x in batch]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=LENGTH)
        mask = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
        loss = model.train()(**mask, labels=targets[[x.label for x in batch]]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()
