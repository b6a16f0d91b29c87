"""Drawn bar charts with questions, and tiny models of the classes of Qwen2.5-VL and LLaVA that are trained on them.

No package has a vision-language model. The tiny ones have a tokenizer of whole words, see 32 x 32 pixels, and are
trained here from scratch to count the bars of a chart and to name the color of its first bar.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from common.packages import cache_dir, make_once
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import trange
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from .files import Row
from .image_text import QwenImages, collate

SIDE = 32  # pixels of a chart
COLORS = {"red": (214, 69, 65), "green": (63, 159, 91), "blue": (58, 110, 201), "orange": (240, 150, 40)}
COUNT, FIRST, HIGHEST = "how many bars are there", "what color is the first bar", "what color is the highest bar"
NUMBERS = ("one", "two", "three", "four")
SPECIAL = ("<unk>", "<pad>", "<s>", "</s>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} : {% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
STEPS = 800  # of the training from scratch


def charts(count: int, seed: int, questions: tuple[str, ...] = (HIGHEST,)) -> list[Row]:
    """Charts of one to four bars, each bar of another color and height, with one question each."""
    rng = random.Random(seed)
    rows = []
    for k in range(count):
        bars = rng.randint(2, 4)
        colors = rng.sample(list(COLORS), bars)
        heights = rng.sample([6, 12, 18, 24], bars)
        highest = colors[heights.index(max(heights))]
        question = questions[k % len(questions)]
        answer = {COUNT: NUMBERS[bars - 1], FIRST: colors[0], HIGHEST: highest}[question]
        rows.append({"image": _draw(colors, heights), "question": question, "answer": answer})
    return rows


def _draw(colors: list[str], heights: list[int]) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(image)
    for k, (color, height) in enumerate(zip(colors, heights, strict=True)):
        pen.rectangle((8 * k + 1, SIDE - height, 8 * k + 6, SIDE - 1), fill=COLORS[color])
    return image


def tiny_folder(kind: str) -> Path:
    """A tiny model and its processor as `save_pretrained` writes them, made the first time (a minute on one core).

    Args:
        kind: "tiny-qwen" or "tiny-llava".
    """
    return make_once(cache_dir() / f"{kind}-charts", lambda folder: make(folder, kind, STEPS))


def make(folder: Path, kind: str, steps: int) -> None:
    """Train a tiny model from scratch and save it."""
    print(f"Training a {kind} from scratch, once: {steps} steps", flush=True)
    model, processor = untrained(kind)
    rows = charts(2000, seed=0, questions=(COUNT, FIRST))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    rng = random.Random(0)
    for _ in trange(steps, desc=kind, leave=False):
        model(**collate(processor, rng.sample(rows, 16))).loss.backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def untrained(kind: str) -> tuple[PreTrainedModel, Any]:
    """(a model with random weights, its processor)."""
    torch.manual_seed(0)
    tokens = _tokenizer()
    text = dict(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, max_position_embeddings=256,
        bos_token_id=2, eos_token_id=3, pad_token_id=1,
    )  # fmt: skip
    special = {name: tokens.convert_tokens_to_ids(name) for name in SPECIAL}
    if kind == "tiny-llava":
        vision = CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE,
            patch_size=8, initializer_range=0.1,
        )  # fmt: skip
        llava = LlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**text), image_token_index=special["<|image_pad|>"]
        )
        size = {"height": SIDE, "width": SIDE}
        images = CLIPImageProcessorPil(size=size, crop_size=size)
        processor: Any = LlavaProcessor(
            images, tokens, patch_size=8, vision_feature_select_strategy="default", image_token="<|image_pad|>",
            num_additional_image_tokens=1, chat_template=TEMPLATE.replace("IMAGE", "<|image_pad|>"),
        )  # fmt: skip
        return _ended(LlavaForConditionalGeneration(llava)), processor
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=4, patch_size=4, spatial_merge_size=2, window_size=32,
        out_hidden_size=64, fullatt_block_indexes=[1], initializer_range=0.1,
    )  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
    ids = {f"{name}_token_id": special[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    ids |= {f"{name}_token_id": special[f"<|{name}_pad|>"] for name in ("image", "video")}
    config = Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, **ids)
    images = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": SIDE**2, "longest_edge": SIDE**2})
    template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return _ended(Qwen2_5_VLForConditionalGeneration(config)), QwenImages(images, tokens, chat_template=template)


def _ended(model: PreTrainedModel) -> PreTrainedModel:
    """The model, whose answers end where those that it is trained on do."""
    model.generation_config.update(bos_token_id=2, eos_token_id=3, pad_token_id=1)
    return model


def _tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, "user", "assistant", ":", *COLORS, *NUMBERS, *f"{COUNT} {FIRST} {HIGHEST}".split()]
    vocabulary = {word: k for k, word in enumerate(dict.fromkeys(words))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=list(SPECIAL[4:]), padding_side="left",
    )  # fmt: skip
