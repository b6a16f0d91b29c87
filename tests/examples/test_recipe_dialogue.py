"""Prompts, files for a judge, and the recipe with TRL's trainers on a tiny model."""

import json

import pytest
from helpers import byte_llama

pytest.importorskip("datasets")
pytest.importorskip("trl")

import dialogue
from common import tables
from recipe import chat, generation
from recipe.instructions import all_instructions

TURNS = [*chat.user("hi"), *chat.assistant("yes"), *chat.user("and?")]


def test_prompts_of_both_templates():
    tokenizer = byte_llama.tokenizer()
    assert (
        chat.prompt(TURNS, tokenizer, "chat")
        == "<|user|>hi<|end|><|assistant|>yes<|end|><|user|>and?<|end|><|assistant|>"
    )
    text = chat.prompt(TURNS, tokenizer, "alpaca")
    assert text == generation.ALPACA.format(instruction="hi") + "yes\n\n### Instruction:\nand?\n\n### Response:\n"
    with pytest.raises(ValueError, match='--template must be "alpaca"'):
        chat.prompt(TURNS, byte_llama.tokenizer(chat=False), "chat")


def test_a_conversation_goes_on_from_its_own_answers(monkeypatch):
    asked = []

    def echo(model, tokenizer, prompts, max_new_tokens, special_tokens, **options):
        asked.append(list(prompts))
        return [f" answer {len(asked)}.{k} " for k in range(len(prompts))]

    monkeypatch.setattr(chat, "answers", echo)
    tokenizer = byte_llama.tokenizer()
    found = chat.converse(None, tokenizer, [["a", "b"], ["c"], ["d", "e"]], "chat", 5)
    assert found == [["answer 1.0", "answer 2.0"], ["answer 1.1"], ["answer 1.2", "answer 2.1"]]
    assert asked[1][1] == chat.prompt(
        [*chat.user("d"), *chat.assistant(" answer 1.2 "), *chat.user("e")], tokenizer, "chat"
    )
    assert chat.converse(None, tokenizer, [], "chat", 5) == []


def test_files_for_the_judge(tmp_path):
    questions = [chat.as_question(row, k) for k, row in enumerate([
        {"prompt_id": 81, "category": "writing", "prompt": ["one", "two"], "reference": []},
        {"question_id": 82, "category": "math", "turns": ["three"], "reference": ["3"]},
        {"turns": '["four", "five"]'},
    ])]  # fmt: skip
    chat.write_for_judge(tmp_path, questions, [["a", "b"], ["c"], ["d", "e"]], "flat-seed0")
    asked = [json.loads(line) for line in (tmp_path / "question.jsonl").read_text().splitlines()]
    assert asked == [
        {"question_id": 81, "category": "writing", "turns": ["one", "two"]},
        {"question_id": 82, "category": "math", "turns": ["three"], "reference": ["3"]},
        {"question_id": 2, "category": "general", "turns": ["four", "five"]},
    ]
    answered = [json.loads(line) for line in (tmp_path / "model_answer/flat-seed0.jsonl").read_text().splitlines()]
    assert [row["choices"] for row in answered] == [
        [{"index": 0, "turns": turns}] for turns in (["a", "b"], ["c"], ["d", "e"])
    ]
    assert {row["model_id"] for row in answered} == {"flat-seed0"}
    assert [row["question_id"] for row in answered] == [81, 82, 2] and len({row["answer_id"] for row in answered}) == 3


def test_refusals_are_dropped_for_dialogue_only(tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [("q", "", "fine"), ("q", "in", "Sorry, no"), ("q", "", "As an AI I"), ("q", "more", "good")]
    file.write_text("".join(json.dumps({"instruction": a, "input": b, "output": c}) + "\n" for a, b, c in rows))
    found = dialogue.rows_of(dialogue.Arguments(dataset=str(file)))
    assert [(row["prompt"], row["completion"]) for row in found] == [("q", "fine"), ("q\n\nmore", "good")]
    assert len(dialogue.rows_of(dialogue.Arguments(dataset=str(file), task="instruct_eval"))) == 4
    with pytest.raises(ValueError, match="line 1: column 'rejected' is missing"):
        dialogue.rows_of(dialogue.Arguments(dataset=str(file), dpo=True))


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_sft_sees_prompt_and_answer_and_trains_on_the_answer(template, tmp_path, monkeypatch):
    """The tokens are those of the prompt that is used for answering, then those of the answer and its end."""
    seen = {}

    class Stop(Exception):
        pass

    def look(trainer, folder):
        seen.update(trainer.data_collator([trainer.train_dataset[0]]))
        raise Stop

    monkeypatch.setattr(chat, "finish", look)
    args = dialogue.Arguments(**{"model": byte_llama.save(tmp_path / "model"), "dtype": "float32", "max_length": 512})
    model = dialogue.adapt(dialogue.models.causal(args), "lora", args, 0, task_type="CAUSAL_LM")
    tokenizer, rows = byte_llama.tokenizer(), [{"prompt": "ask", "completion": "say"}]
    with pytest.raises(Stop):
        chat.sft(model, "lora", args, tmp_path / "run", 0, tokenizer, rows, template)
    asked = chat.prompt(chat.user("ask"), tokenizer, template)
    assert tokenizer.decode(seen["input_ids"][0]) == f"{asked}say<|end|>"
    assert tokenizer.decode(seen["labels"][0][seen["labels"][0] != -100]) == "say<|end|>"


@pytest.mark.slow
def test_the_recipe_with_dpo(tmp_path):
    more = ["--dpo", "--dpo_steps", 3, "--eval_samples", 2, "--max_new_tokens", 4, "--train_samples", 12]
    lines = dialogue.main(byte_llama.arguments(tmp_path, *more, "--method", "lora", "flat"))
    means = {(line["method"], line["metric"]): line["mean"] for line in lines}
    rows = tables.read_csv(tmp_path / "out/results.csv")
    assert [(row["steps"], row["dpo_steps"]) for row in rows] == [("4", "3")] * 2
    for method in ("lora", "flat"):
        assert means[method, "follows"] == 0  # a random model
        assert means[method, "dpo_train_loss"] > 0
        run = tmp_path / f"out/{method}-seed0"
        assert sorted(path.name for path in (run / "dpo/adapter").iterdir() if path.is_dir()) == []  # no "ref"
        asked = [json.loads(line) for line in (run / "judge/question.jsonl").read_text().splitlines()]
        assert [row["turns"] for row in asked] == [[i.text] for i in all_instructions()[:2]]
        assert (run / f"judge/model_answer/{method}-seed0.jsonl").exists()


@pytest.mark.slow
def test_questions_of_ones_own_are_answered_for_a_judge(tmp_path):
    questions, data = tmp_path / "question.jsonl", tmp_path / "mine.jsonl"
    questions.write_text(json.dumps({"question_id": 7, "category": "x", "turns": ["first", "second"]}) + "\n")
    data.write_text(json.dumps({"instruction": "ask", "output": "say"}) + "\n")
    more = ["--dataset", data, "--questions", questions, "--template", "alpaca", "--max_new_tokens", 4]
    lines = dialogue.main(byte_llama.arguments(tmp_path, *more, "--method", "lora-sam"))  # with a second pass
    assert {line["metric"] for line in lines} == {"train_loss"}
    answered = json.loads((tmp_path / "out/lora-sam-seed0/judge/model_answer/lora-sam-seed0.jsonl").read_text())
    assert answered["question_id"] == 7 and len(answered["choices"][0]["turns"]) == 2


def test_only_short_rows_are_kept():
    rows = [{"prompt": "a" * n, "completion": "b"} for n in (90, 5, 95, 6, 7)]
    tokenizer = byte_llama.tokenizer()
    kept = dialogue.short(rows, tokenizer, dialogue.Arguments(max_length=40, train_samples=2))
    assert [len(row["prompt"]) for row in kept] == [5, 6]
    with pytest.raises(ValueError, match="--max_length must leave at least one example"):
        dialogue.short(rows[:1], tokenizer, dialogue.Arguments(max_length=40))
