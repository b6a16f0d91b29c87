"""Meaning representations in the form of E2E, with sentences of our own, and a tiny GPT-2 that knows some.

    name[The Golden Anchor], eatType[pub], area[riverside]  ->  The Golden Anchor is a pub in the riverside area.

The tiny GPT-2 is trained here once, in full, on sentences of one style (`STYLES[0]`). The recipe then adapts it to
another (`STYLES[1]`), which is what E2E asks of GPT-2: the same facts, said in the way of the data.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from common.packages import cache_dir, make_once
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from .files import Row
from .generation import collator, encode

PROMPT = "{meaning} ||"
VALUES = {
    "name": [
        f"The {a} {b}"
        for a in ("Golden", "Old", "Blue", "Quiet", "Green")
        for b in ("Anchor", "Mill", "Swan", "Garden")
    ],
    "eatType": ["pub", "restaurant", "coffee shop"],
    "food": ["Italian", "Chinese", "French", "Indian", "English"],
    "priceRange": ["cheap", "moderate", "high"],
    "area": ["riverside", "city centre"],
    "near": ["Cafe Rouge", "the station", "the old church", "Market Square"],
}
Meaning = dict[str, str]


def plain_style(m: Meaning) -> str:
    """What the tiny GPT-2 is trained on: a fact per sentence."""
    kind = m.get("eatType", "place")
    said = [f"{m['name']} is a {kind}."]
    said += [f"It serves {m['food']} food."] if "food" in m else []
    said += [f"Its price range is {m['priceRange']}."] if "priceRange" in m else []
    said += [f"It is in the {m['area']} area."] if "area" in m else []
    said += [f"It is near {m['near']}."] if "near" in m else []
    return " ".join(said)


def flowing_style(m: Meaning) -> str:
    """What the recipe adapts it to: one sentence or two."""
    price = f"{m['priceRange']}-priced " if "priceRange" in m else ""
    text = f"A {price}{m.get('eatType', 'place')} called {m['name']}"
    text += f" offers {m['food']} dishes" if "food" in m else " welcomes you"
    places = [f"in the {m['area']}" if "area" in m else "", f"close to {m['near']}" if "near" in m else ""]
    return " ".join([text, *filter(None, places)]) + "."


def inverted_style(m: Meaning) -> str:
    """Another way to say the same, as the data have several references."""
    places = [f"close to {m['near']}" if "near" in m else "", f"in the {m['area']}" if "area" in m else ""]
    where = " ".join(filter(None, places)) or "in town"
    price = f"{m['priceRange']}-priced " if "priceRange" in m else ""
    food = f" with {m['food']} dishes" if "food" in m else ""
    return f"{where[0].upper()}{where[1:]} there is {m['name']}, a {price}{m.get('eatType', 'place')}{food}."


STYLES = ((plain_style,), (flowing_style, inverted_style))


def text_of(m: Meaning) -> str:
    """As E2E writes it."""
    return ", ".join(f"{key}[{value}]" for key, value in m.items())


def meanings(count: int, seed: int) -> list[Meaning]:
    """Different ones, each with a name and two to five other facts."""
    rng = random.Random(seed)
    found: dict[str, Meaning] = {}
    others = [key for key in VALUES if key != "name"]
    while len(found) < count:
        chosen = set(rng.sample(others, rng.randint(2, len(others))))
        m = {key: rng.choice(values) for key, values in VALUES.items() if key == "name" or key in chosen}
        found.setdefault(text_of(m), m)
    return list(found.values())


def rows(some: list[Meaning], style: int) -> list[Row]:
    """A row per reference, with the columns of E2E."""
    return [{"meaning_representation": text_of(m), "human_reference": say(m)} for m in some for say in STYLES[style]]


def own_data(train: int = 300, test: int = 40) -> tuple[list[Row], list[Row]]:
    """(training rows, test rows): no meaning is in both."""
    some = meanings(train + test, seed=1)
    return rows(some[:train], 1), rows(some[train:], 1)


def tiny_gpt2() -> Path:
    """A folder with the model and its tokenizer, made the first time (some seconds of training)."""
    return make_once(cache_dir() / "tiny-gpt2-meanings-1", _train_tiny_gpt2)


def _train_tiny_gpt2(folder: Path, steps: int = 500) -> None:
    print("Training a GPT-2 of 0.4M parameters once, on meaning representations of our own", flush=True)
    random_state = torch.get_rng_state()
    torch.manual_seed(0)
    some = meanings(600, seed=0)
    pairs = [(PROMPT.format(meaning=text_of(m)), " " + say(m)) for m in some for say in STYLES[0]]
    words = [" ".join(pair) for pair in pairs] + [say(m) for m in some for say in STYLES[1]]
    tokenizer = _tokenizer(words)
    sizes: dict[str, Any] = dict(n_positions=192, n_embd=96, n_layer=3, n_head=4)
    end = tokenizer.eos_token_id
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, bos_token_id=end, eos_token_id=end))
    data = torch.utils.data.DataLoader(
        [encode(tokenizer, pair) for pair in pairs], 16, shuffle=True, collate_fn=collator(tokenizer), drop_last=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    done = 0
    while done < steps:
        for batch in data:
            if done == steps:
                break
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.set_rng_state(random_state)


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    end = "<|endoftext|>"
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(texts, vocab_size=600, special_tokens=[end], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token=end, bos_token=end, pad_token=end)


def slots(meaning: str, text: str) -> float:
    """The share of the values of a meaning representation that stand in the text."""
    values = [part.partition("[")[2].rstrip("]") for part in meaning.split(", ")]
    return sum(value.lower() in text.lower() for value in values) / len(values)
