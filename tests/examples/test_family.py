import family
import pytest
import torch
from common.data import Example, Task
from transformers import BertConfig, BertForSequenceClassification

WORDS = [("good", 1), ("fine", 1), ("great", 1), ("bad", 0), ("poor", 0), ("dull", 0)]
EXAMPLES = [Example(f"the {noun} is {word}", label) for noun in ("film", "plot") for word, label in WORDS]


@pytest.fixture
def arguments(tmp_path, tokenizer, monkeypatch):
    """A random BERT and twelve sentences in place of the downloads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=1, **sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(family, "minilm_folder", lambda: tmp_path / "tiny")
    task = Task(("negative", "positive"), EXAMPLES, {"movie": EXAMPLES[:6], "books": EXAMPLES[6:]})
    monkeypatch.setattr(family, "load_task", lambda name: task)
    sizes = ["--train_samples", "8", "--steps", "3", "--batch_size", "4", "--r", "2"]
    return [*sizes, "--output_dir", str(tmp_path / "runs")]


def row(method, seed, domain, accuracy):
    return {"method": method, "seed": seed, "domain": domain, "accuracy": accuracy}


def test_differences_are_paired_by_seed_with_students_interval():
    rows = [row("lora", seed, domain, 0.5 + seed / 10) for seed in range(3) for domain in "ab"]
    rows += [row("flat", seed, "a", 0.5 + seed / 10 + d) for seed, d in enumerate((0.2, 0.0, 0.1))]
    rows += [row("flat", seed, "b", 0.5 + seed / 10) for seed in range(3)]
    lines = {(line["method"], line["domain"]): line for line in family.summary(rows, ["lora", "flat"])}
    half = 4.302653 * 0.1 / 3**0.5  # t of 2 degrees of freedom
    a, mean = lines["flat", "a"], lines["flat", "mean"]
    assert (a["accuracy"], a["difference"]) == pytest.approx((0.7, 0.1))
    assert (a["low"], a["high"]) == pytest.approx((0.1 - half, 0.1 + half), abs=1e-6)
    assert (mean["low"], mean["high"]) == pytest.approx((0.05 - half / 2, 0.05 + half / 2), abs=1e-6)
    assert lines["lora", "a"]["difference"] == ""


def test_a_seed_that_one_method_lacks_is_left_out():
    rows = [row("lora", 0, "a", 0.5), row("lora", 1, "a", 0.6), row("flat", 1, "a", 0.6)]
    last = family.summary(rows, ["lora", "flat"])[-1]
    assert (last["seeds"], last["accuracy"], last["difference"]) == (1, 0.6, "")


@pytest.mark.parametrize("validate", [False, True], ids=["", "validate"])
def test_every_method_runs_and_an_interrupted_comparison_goes_on(arguments, validate, monkeypatch, tmp_path):
    methods = ["lora", "flat", "flat:0", "rwp", "efmlora", "fmlora", "lora-sam", "bilora", "bar"]
    arguments = [*arguments, "--methods", *methods, "--seeds", "0", "1", *(["--validate"] if validate else [])]
    lines = family.main(arguments)
    domains = ["validation", "mean"] if validate else ["movie", "books", "mean"]
    assert [(line["method"], line["domain"]) for line in lines] == [(m, d) for m in methods for d in domains]
    of_none = [line["difference"] for line in lines if line["method"] == "flat:0"]
    assert of_none == [0.0] * len(domains)  # rho = 0 is LoRA

    file = tmp_path / "runs" / "runs.csv"
    whole = file.read_text().splitlines()
    file.write_text("\n".join(whole[: -len(domains) + 1]) + "\n")  # the last run is lost
    calls, run = [], family.run
    monkeypatch.setattr(family, "run", lambda *args: calls.append(args[:2]) or run(*args))
    assert family.main(arguments) == lines and calls == [("bar", 1)]


def test_the_same_sentences_for_every_method_and_others_for_another_seed(arguments, monkeypatch):
    seen = {}

    def train(model, method, encode, examples, seed, args):
        seen[method, seed] = examples
        return 0.0

    monkeypatch.setattr(family, "train", train)
    family.main([*arguments, "--methods", "lora", "flat", "--seeds", "0", "1"])
    assert seen["lora", 0] == seen["flat", 0] != seen["lora", 1] == seen["flat", 1]


@pytest.mark.parametrize(
    "options, match",
    [(["--methods", "lora", "sgd"], r"methods must be of .*'sgd'"), (["--seeds", "1", "1"], "seeds must differ")],
)
def test_mistakes(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        family.main([*arguments, *options])
