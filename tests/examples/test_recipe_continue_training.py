"""The recipe for continued training and merging, on a tiny Llama."""

import csv
import json

import continue_training
import peft
import pytest
import torch
from recipe.logits import difference, nll
from transformers import AutoModelForCausalLM


@pytest.fixture
def texts(tmp_path):
    for name, word in (("first", "good"), ("second", "bad")):
        rows = [json.dumps({"text": f"Review : the film is {word} {k * 'very '}"}) for k in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return tmp_path


@pytest.fixture
def given(tiny_model, texts):
    sizes = ["--max_steps", "3", "--batch_size", "4", "--dtype", "float32", "--learning_rate", "0.01"]
    files = ["--dataset", str(texts / "first.jsonl"), "--more", str(texts / "second.jsonl")]
    return ["--model", str(tiny_model), *sizes, *files, "--output_dir", str(texts / "out")]


def results(folder):
    with open(folder / "results.csv") as file:
        return list(csv.DictReader(file))


def test_methods_go_on_and_their_copies_answer_the_same(given, texts):
    """Noise, a second pass, and a second module that is dropped."""
    methods = ["lora", "flat", "fmlora", "bilora"]
    continue_training.main([*given, "--method", *methods])
    rows = results(texts / "out")
    assert [row["method"] for row in rows] == methods
    for row in rows:
        assert float(row["peft_differs_by"]) == 0.0
        assert float(row["merged_differs_by"]) < 1e-4
        assert len({row["nll_base"], row["nll_first"], row["nll_second"]}) == 3


def test_the_second_training_starts_at_the_saved_adapter_with_its_noise(given, texts, tiny_model):
    continue_training.main([*given, "--method", "flat", "--rho", "0.2"])
    folder = texts / "out" / "flat-seed0"
    for part in (folder / "first", folder):
        settings = json.loads((part / "adapter" / "flatlora_config.json").read_text())
        assert settings["rho"] == 0.2
        history = json.loads((part / "trainer_state.json").read_text())["log_history"]
        assert max(row.get("flat_rho", 0) for row in history) == pytest.approx(0.2)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    stock = peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    assert all(torch.equal(p, q) for p, q in zip(merged.parameters(), stock.parameters(), strict=True))


def test_the_commands_name_what_was_saved(given, texts, capsys):
    continue_training.main([*given, "--method", "lora"])
    printed, folder = capsys.readouterr().out, texts / "out" / "lora-seed0"
    for path in (folder / "merged", folder / "adapter"):
        assert str(path) in printed and path.is_dir()


def test_nll_and_difference_leave_padding_out():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 5), torch.tensor([[1, 2, 3, 4], [1, 2, -100, -100]])
    batch = {"labels": labels, "attention_mask": (labels != -100).long()}
    log = logits.log_softmax(-1)
    expected = -(log[0, 0, 2] + log[0, 1, 3] + log[0, 2, 4] + log[1, 0, 2]) / 4
    assert nll([logits], [batch]) == pytest.approx(expected.item(), rel=1e-5)
    other = logits.clone()
    other[0, 0, 0] += 0.5
    other[1, 3, 0] += 9
    assert difference([other], [logits], [batch]) == pytest.approx(0.5)


def test_there_are_no_settings_of_a_paper():
    with pytest.raises(ValueError, match="--paper must be left out"):
        continue_training.main(["--paper"])


@pytest.mark.thorough
@pytest.mark.slow
def test_estimate(capsys):
    assert continue_training.main(["--estimate"]) == []
    assert "Computed, not measured" in capsys.readouterr().out
