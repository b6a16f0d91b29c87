"""Dialogue: prompts by a chat template or in Alpaca's form, TRL's trainers, and files for a judge."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from .arguments import RecipeArguments
from .files import Row, write_jsonl
from .generation import ALPACA, answers
from .training import callbacks, finish, trainer_class, training_arguments

Turn = dict[str, str]  # role, content


def prompt(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The text after which the assistant's next turn follows.

    Args:
        template: "chat", that of the tokenizer, or "alpaca", whose instruction and response are repeated per turn.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if template == "chat":
        if tokenizer.chat_template is None:
            raise ValueError('--template must be "alpaca" for a tokenizer without a chat template, got "chat"')
        return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
    text = ALPACA.format(instruction=turns[0]["content"])
    for turn in turns[1:]:
        text += (
            turn["content"]
            if turn["role"] == "assistant"
            else f"\n\n### Instruction:\n{turn['content']}\n\n### Response:\n"
        )
    return text


def user(text: str) -> list[Turn]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[Turn]:
    return [{"role": "assistant", "content": text}]


def _shaped(rows: Sequence[Row], template: str, columns: Sequence[str]) -> Dataset:
    """A dataset of TRL: conversations for a chat template, else texts; `columns` are the assistant's."""
    if template == "chat":
        made = [{"prompt": user(row["prompt"]), **{c: assistant(row[c]) for c in columns}} for row in rows]
    else:
        made = [{"prompt": ALPACA.format(instruction=row["prompt"]), **{c: row[c] for c in columns}} for row in rows]
    return Dataset.from_list(made)


def _plain(args: RecipeArguments) -> dict[str, Any]:
    """In place of TRL's own defaults: no autocast, and checkpointing only if it is asked for."""
    return {"bf16": False, "gradient_checkpointing": args.gradient_checkpointing}


def sft(
    model: PeftModel,
    method: str,
    args: RecipeArguments,
    folder: Path,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    template: str,
) -> dict[str, float]:
    """Train on `prompt` and `completion` of the rows with TRL's SFTTrainer; the loss is over the completion."""
    data = _shaped(rows, template, ["completion"])
    options = training_arguments(args, folder, seed, len(data), **_plain(args))
    config = SFTConfig(**options, max_length=args.max_length)
    kind = trainer_class(SFTTrainer, model, method)
    return finish(
        kind(model, config, train_dataset=data, processing_class=tokenizer, callbacks=callbacks(method)), folder
    )


def dpo(
    model: PeftModel,
    method: str,
    args: RecipeArguments,
    folder: Path,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    template: str,
    **more: Any,
) -> dict[str, float]:
    """Go on with TRL's DPOTrainer on `prompt`, `chosen` and `rejected` (Rafailov et al., arXiv 2305.18290).

    The reference is the adapter as it is now, which TRL copies as "ref". It is removed afterwards.

    Args:
        more: of `DPOConfig`, in place of the arguments': learning_rate, max_steps, beta.
    """
    data = _shaped(rows, template, ["chosen", "rejected"])
    options = training_arguments(args, folder, seed, len(data), **_plain(args), **more)
    config = DPOConfig(**options, max_length=args.max_length)
    kind = trainer_class(DPOTrainer, model, method)
    made = kind(model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=callbacks(method))
    found = finish(made, folder)
    model.delete_adapter("ref")
    shutil.rmtree(folder / "adapter" / "ref", ignore_errors=True)
    return {f"dpo_{name}": value for name, value in found.items()}


def converse(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Sequence[str]],
    template: str,
    max_new_tokens: int,
    **options: Any,
) -> list[list[str]]:
    """The model's answers to the turns of each question, greedy by default. A question has one turn or more."""
    talks: list[list[Turn]] = [[] for _ in questions]
    found: list[list[str]] = [[] for _ in questions]
    for k in range(max(map(len, questions), default=0)):
        asked = [i for i, turns in enumerate(questions) if k < len(turns)]
        for i in asked:
            talks[i] += user(questions[i][k])
        prompts = [prompt(talks[i], tokenizer, template) for i in asked]
        texts = answers(model, tokenizer, prompts, max_new_tokens, special_tokens=template != "chat", **options)
        for i, text in zip(asked, texts, strict=True):
            talks[i] += assistant(text)
            found[i].append(text.strip())
    return found


def write_for_judge(folder: Path, questions: Sequence[Row], answered: Sequence[Sequence[str]], model_id: str) -> None:
    """`question.jsonl` and `model_answer/MODEL.jsonl` in the form of FastChat's llm_judge, whose judge reads them.

    Args:
        questions: `question_id`, `category`, `turns`, and `reference` where there is one.
        answered: the answers to the turns of each.
        model_id: names the file.
    """
    write_jsonl(folder / "question.jsonl", questions)
    rows = [
        {
            "question_id": question["question_id"],
            "answer_id": f"{model_id}-{question['question_id']}",
            "model_id": model_id,
            "choices": [{"index": 0, "turns": list(turns)}],
            "tstamp": time.time(),
        }
        for question, turns in zip(questions, answered, strict=True)
    ]
    write_jsonl(folder / "model_answer" / f"{model_id}.jsonl", rows)


def as_question(row: Row, number: int) -> Row:
    """A question of llm_judge: its own rows, or those of the hub's copy of MT-Bench (`prompt_id`, `prompt`)."""
    turns = row.get("turns") or row["prompt"]
    turns = json.loads(turns) if isinstance(turns, str) and turns.startswith("[") else turns
    found = {
        "question_id": row.get("question_id", row.get("prompt_id", number)),
        "category": row.get("category", "general"),
        "turns": [turns] if isinstance(turns, str) else list(turns),
    }
    return found | ({"reference": list(row["reference"])} if row.get("reference") else {})
