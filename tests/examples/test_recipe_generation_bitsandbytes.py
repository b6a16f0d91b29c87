"""A recipe with a language model in 4 bits (QLoRA)."""

import json

import pytest
from helpers import byte_llama

pytest.importorskip("bitsandbytes")

import bitsandbytes
import mathematics
from recipe import models


@pytest.mark.slow
def test_the_base_model_is_in_four_bits_and_the_recipe_runs(tmp_path, monkeypatch):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"question": f"{k} + 1?", "answer": str(k + 1)}) + "\n" for k in range(20)))
    loaded = []
    causal = models.causal
    monkeypatch.setattr(models, "causal", lambda args: loaded.append(causal(args)) or loaded[-1])
    more = ["--dataset", file, "--method", "flat", "--load_in_4bit"]
    arguments = byte_llama.arguments(tmp_path, *more, width=64)  # a block of bitsandbytes has 64 values
    lines = mathematics.main([*arguments, "--max_new_tokens", "3"])
    assert {line["metric"] for line in lines} == {"accuracy_test", "train_loss"}
    quantized = [m for m in loaded[0].modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(quantized) == 14  # seven in each of two layers; the adapters are in float32
