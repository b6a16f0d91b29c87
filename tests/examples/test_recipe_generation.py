"""Training on pairs and answering in batches, against one example at a time."""

import pytest
import torch
from helpers import byte_llama
from peft import LoraConfig, get_peft_model
from recipe import generation
from transformers import AutoModelForCausalLM

PROMPTS = ["a", "longer prompt", "the longest of all prompts here", "mid", "b"]


@pytest.fixture
def model(tmp_path):
    return AutoModelForCausalLM.from_pretrained(byte_llama.save(tmp_path))


def test_only_the_answer_and_its_end_have_labels():
    tokenizer = byte_llama.tokenizer()
    encoded = generation.encode(tokenizer, ("ask ", "say"))
    assert tokenizer.decode(encoded["input_ids"]) == "ask say<|end|>"
    assert encoded["labels"] == [-100] * 4 + encoded["input_ids"][4:]


def test_pairs_that_are_too_long_are_left_out_and_the_limit_counts_what_is_kept():
    tokenizer = byte_llama.tokenizer()
    pairs = [("aa", "b" * n) for n in (9, 2, 3, 8, 1)]
    kept = generation.encode_short(tokenizer, pairs, max_length=6, limit=2)
    assert [tokenizer.decode(row["input_ids"]) for row in kept] == ["aabb<|end|>", "aabbb<|end|>"]
    with pytest.raises(ValueError, match="--max_length must leave at least one example, got 3"):
        generation.encode_short(tokenizer, pairs, max_length=3)


def test_the_loss_of_a_batch_is_the_mean_over_the_answers_tokens(model):
    tokenizer = byte_llama.tokenizer()
    rows = [generation.encode(tokenizer, pair) for pair in (("a", "bc"), ("longer prompt", "d"), ("e", "fghi"))]
    losses, counts = [], []
    for row in rows:
        ids, n = torch.tensor([row["input_ids"]]), sum(label != -100 for label in row["labels"])
        scores = model(ids).logits[0, -n - 1 : -1].log_softmax(-1)
        losses.append(-scores.gather(1, ids[0, -n:, None]).sum())
        counts.append(n)
    batch = generation.collator(tokenizer)(rows)
    torch.testing.assert_close(model(**batch).loss, sum(losses) / sum(counts))


def test_answers_of_a_batch_are_those_of_one_prompt_at_a_time_in_their_order(model):
    tokenizer = byte_llama.tokenizer()
    tokenizer.padding_side = "right"  # as it is for training
    found = generation.answers(model, tokenizer, PROMPTS, 6, batch_size=3)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        for _ in range(6):
            following = model(ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], 1)
            if following.item() == tokenizer.eos_token_id:
                break
        assert answer == tokenizer.decode(ids[0, len(tokenizer(prompt).input_ids) :], skip_special_tokens=True)


def test_sampled_answers_follow_the_seed(model):
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(generation.answers(model, byte_llama.tokenizer(), PROMPTS, 8, do_sample=True, top_k=0))
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("size", generation.SIZES)
def test_the_sizes_are_those_of_the_papers_models(size):
    from transformers import LlamaConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**generation.SIZES[size]))
        count = sum(p.numel() for p in model.parameters())
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert count == {"llama-2-7b": 6_738_415_616, "llama-3.1-8b": 8_030_261_248}[size]  # of their model cards
    assert not any("lm_head" in name for name, p in adapted.named_parameters() if p.requires_grad)
