"""Questions about images: prompts by the model's own chat template, targets, answers, and their scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.utils import is_torchvision_available

from .arguments import RecipeArguments
from .files import Row
from .models import device, loading


class QwenImages(Qwen2_5_VLProcessor):
    """The processor of Qwen2.5-VL for images alone: that for videos, which the original has too, needs torchvision."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **_: Any
    ) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def processor(name: str) -> Any:
    """The processor of a model; left-padded, so that all answers of a batch start at the same place."""
    kind = AutoConfig.from_pretrained(name).model_type
    own = kind in ("qwen2_vl", "qwen2_5_vl") and not is_torchvision_available()
    made = (QwenImages if own else AutoProcessor).from_pretrained(name)
    made.tokenizer.padding_side = "left"
    if made.tokenizer.pad_token is None:
        made.tokenizer.pad_token = made.tokenizer.eos_token
    return made


def model(folder: str, args: RecipeArguments) -> PreTrainedModel:
    """A model that answers questions about images."""
    made = AutoModelForImageTextToText.from_pretrained(folder, **loading(args))
    return made if args.load_in_4bit else made.to(device())


def image(row: Row, folder: Path) -> Image.Image:
    """The image of a row, which is one already, or the path of a file, also relative to `folder`."""
    found = row["image"]
    if isinstance(found, Image.Image):
        return found.convert("RGB")
    path = Path(found) if Path(found).is_absolute() else folder / found
    if not path.exists():
        raise FileNotFoundError(f"there is no image {path}, which a row of the dataset names")
    return Image.open(path).convert("RGB")


def prompts(made: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
    """The model's inputs up to where the answers begin."""
    texts = []
    for row in rows:
        content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        texts.append(made.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    return dict(made(text=texts, images=[[row["image"]] for row in rows], padding=True, return_tensors="pt"))


def collate(made: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Prompts, answers and the end token; the loss is on the answers alone.

    The tokens of an answer are put behind those of the prompt, so what is trained is what `answers` continues.
    """
    batch, tokens = prompts(made, rows), made.tokenizer
    ids = [[*tokens(row["answer"], add_special_tokens=False).input_ids, tokens.eos_token_id] for row in rows]
    longest = max(map(len, ids))
    added = torch.tensor([some + [tokens.pad_token_id] * (longest - len(some)) for some in ids])
    real = torch.tensor([[1] * len(some) + [0] * (longest - len(some)) for some in ids])
    before = batch["input_ids"]
    for name, part in {"input_ids": added, "attention_mask": real}.items():
        batch[name] = torch.cat([batch[name], part], 1)
    for name in {"mm_token_type_ids", "token_type_ids"} & batch.keys():
        batch[name] = torch.cat([batch[name], torch.zeros_like(added)], 1)
    batch["labels"] = torch.cat([torch.full_like(before, -100), added.masked_fill(real == 0, -100)], 1)
    return batch


@torch.inference_mode()
def answers(
    answering: Any, made: Any, rows: Sequence[Row], new_tokens: int, batch_size: int, dtype: torch.dtype
) -> list[str]:
    """The greedy answers."""
    answering.eval()
    found = []
    for start in tqdm(range(0, len(rows), batch_size), desc="answers", leave=False):
        batch = prompts(made, rows[start : start + batch_size])
        batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
        on_device = {name: value.to(answering.device) for name, value in batch.items()}
        made_ids = answering.generate(**on_device, max_new_tokens=new_tokens, do_sample=False)
        found += made.tokenizer.batch_decode(made_ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def normalized(answer: str) -> str:
    """Lower case, without spaces around and a full stop at the end."""
    return answer.strip().lower().rstrip(".")


def score(answer: str, row: Row) -> float:
    """1 if the answer is the row's, else 0; of several people's answers, the accuracy of VQA.

    That is the mean over each person left out of min(1, how many of the others say so / 3) (arXiv 1505.00468).
    """
    given = [normalized(each) for each in row.get("answers", [row["answer"]])]
    same = [each == normalized(answer) for each in given]
    if len(given) == 1:
        return float(same[0])
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


def mean_score(found: Sequence[str], rows: Sequence[Row]) -> float:
    """The mean of `score`."""
    return sum(map(score, found, rows)) / len(rows)


def most_common(given: Sequence[Any]) -> list[str]:
    """Several people's answers, the most frequent first; each a text, or an object with `answer` as in VizWiz."""
    texts = [str(each["answer"] if isinstance(each, dict) else each) for each in given]
    return sorted(texts, key=lambda text: -Counter(map(normalized, texts))[normalized(text)])


def sheet(rows: Sequence[Row], found: Sequence[str], columns: int = 4) -> Image.Image:
    """Images with their questions, answers, and what the model answered."""
    width, side, height = 200, 96, 160
    made = Image.new("RGB", (columns * width, -(-len(rows) // columns) * height), "white")
    pen = ImageDraw.Draw(made)
    for k, (row, answer) in enumerate(zip(rows, found, strict=True)):
        x, y = k % columns * width + 8, k // columns * height + 8
        made.paste(row["image"].resize((side, side), Image.Resampling.NEAREST), (x, y))
        lines = [row["question"][:32], f"{row['answer']}; the model: {answer.strip()[:16]}"]
        pen.text((x, y + side + 4), "\n".join(lines), fill="black" if score(answer, row) else "firebrick")
    return made


class Counted(nn.Module):
    """Qwen2.5-VL on tokens of images and text alike, for the estimate, which cannot read the sizes of images.

    The vision tower is frozen and below all adapters, so nothing of it is saved. Its linear layers run on as many rows
    as there are patches, those after the merging of 2 x 2 patches on a quarter. Its attention is not counted.
    """

    def __init__(self, made: PreTrainedModel, patches: int) -> None:
        super().__init__()
        self.made, self.patches = made, patches

    def forward(self, tokens: Tensor) -> Any:
        visual = self.made.model.visual
        with torch.no_grad():
            for part, rows in ((visual.blocks, self.patches), (visual.merger, self.patches // 4)):
                for layer in part.modules():
                    if isinstance(layer, nn.Linear):
                        layer(torch.ones(rows, layer.in_features, dtype=layer.weight.dtype, device=tokens.device))
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(3, *tokens.shape)
        given = {"inputs_embeds": self.made.get_input_embeddings()(tokens), "position_ids": positions}
        hidden = self.made.model.language_model(**given, use_cache=False).last_hidden_state
        logits = self.made.lm_head(hidden).float()
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
