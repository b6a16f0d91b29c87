import io
import itertools
import json
import sys
import tarfile
import types

import pytest
from common import data
from common.data import Encoder, Example

PROMPT = "Review: {text}\nSentiment:"
LABELS = ("negative", "positive")


def test_ratings_become_labels_and_unclear_ones_are_left_out():
    lines = "1\t2.5\tA &amp; B\r\n2\t-0.5\tdull \r\n3\t0.45\tso-so\r\n4\t-2\tA & B\r\n"
    assert data.parse_vader(lines.encode()) == [Example("A & B", 1), Example("dull", 0)]


def nested(path, contents):
    """An archive with an archive of these files, as the package has them."""

    def add(archive, name, content):
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))

    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name, content in contents.items():
            add(archive, f"folder/{data.VADER_FILES[name]}_GroundTruth.txt", content.encode())
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "package/hutto_ICWSM_2014.tar.gz", inner.getvalue())


def test_the_four_domains_are_read_from_the_nested_archive(tmp_path):
    nested(tmp_path / "outer.tar.gz", {name: f"1\t1.0\t{file}" for name, file in data.VADER_FILES.items()})
    domains = data.read_vader(tmp_path / "outer.tar.gz")
    assert domains == {name: [Example(file, 1)] for name, file in data.VADER_FILES.items()}


def test_editorials_are_whole_and_in_order(tmp_path):
    lines = "7_1\t0.1\tA &amp; B\r\n7_2\t-2\tdull \r\n12_1\t0\tnew\r\n7_3\t0\tlate"
    nested(tmp_path / "outer.tar.gz", dict.fromkeys(data.VADER_FILES, lines))
    assert data.read_editorials(tmp_path / "outer.tar.gz") == [["A & B", "dull", "late"], ["new"]]


def test_a_file_missing_from_the_archive_is_named(tmp_path):
    with tarfile.open(tmp_path / "empty.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match="hutto_ICWSM_2014.tar.gz, found 0"):
        data.read_vader(tmp_path / "empty.tar.gz")


def test_the_split_is_fixed_and_loses_nothing():
    rows = list(range(50))
    train, test = data.split(rows)
    assert (len(train), len(test)) == (40, 10) and sorted(train + test) == rows
    assert data.split(rows) == (train, test)


@pytest.fixture
def files(tmp_path):
    rows = [(f"text {i}", LABELS[i % 2]) for i in range(10)]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f'"{t}, really",{y}\n' for t, y in rows))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows))
    return tmp_path


def test_files_become_a_task(files):
    task = data.load_task(str(files / "a.csv"), [str(files / "b.jsonl")])
    assert task.labels == LABELS and list(task.tests) == ["held-out", "b"]
    assert (len(task.train), len(task.tests["held-out"]), len(task.tests["b"])) == (8, 2, 10)
    assert task.tests["b"][3] == Example("text 3", 1)
    assert not set(task.train) & set(task.tests["held-out"])
    assert all(example.text.endswith(", really") for example in task.train)


def test_bad_files_are_answered_with_what_was_found(files):
    with pytest.raises(ValueError, match="must have a column 'review', got text, label"):
        data.load_task(str(files / "a.csv"), text_column="review")
    (files / "c.csv").write_text("text,label\nfine,neutral\n")
    with pytest.raises(ValueError, match="neutral"):
        data.load_task(str(files / "a.csv"), [str(files / "c.csv")])
    (files / "d.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match="at least one row"):
        data.load_task(str(files / "d.csv"))


@pytest.mark.parametrize("parts", [("train", "validation", "test"), ("train", "test"), ("train",)], ids=len)
def test_hub_datasets_with_named_labels(monkeypatch, parts):
    class Part(dict):
        features = {"sentence": None, "y": types.SimpleNamespace(names=["negative", "positive"])}

    asked = []
    splits = {part: Part(sentence=[f"{part} {i}" for i in range(10)], y=[0, 1] * 4 + [-1, None]) for part in parts}
    hub = types.ModuleType("datasets")
    hub.load_dataset = lambda *args: asked.append(args) or splits
    monkeypatch.setitem(sys.modules, "datasets", hub)
    task = data.load_task("glue:sst2", text_column="sentence", label_column="y")
    assert asked == [("glue", "sst2")] and task.labels == LABELS
    held_out = task.tests["held-out"]
    assert len(task.train) + len(held_out) == 8 * min(2, len(parts))  # those without a label are left out
    source = "train" if len(parts) == 1 else parts[1]
    assert all(e.text.startswith(source) and e.label == int(e.text.split()[1]) % 2 for e in held_out)


def test_prompts_are_padded_on_the_left_and_labels_are_the_next_word(tokenizer):
    encode = Encoder(tokenizer, PROMPT, LABELS)
    inputs, targets = encode([Example("good", 1), Example("a very bad film", 0)])
    assert tokenizer.convert_ids_to_tokens(targets) == ["positive", "negative"]
    assert tokenizer.decode(inputs["input_ids"][0]) == "<pad> <pad> <pad> Review : good Sentiment :"
    assert inputs["attention_mask"][0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert inputs["position_ids"][0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    assert inputs["position_ids"][1].tolist() == list(range(8))


def test_braces_in_a_text_stay(tokenizer):
    inputs, _ = Encoder(tokenizer, "{text} :", LABELS)([Example("{text} {x} film", 0)])
    assert tokenizer.decode(inputs["input_ids"][0]).endswith("film :")


def test_long_texts_keep_the_end_of_the_prompt(tokenizer):
    tokenizer.truncation_side = "left"
    inputs, _ = Encoder(tokenizer, PROMPT, LABELS, max_tokens=4)([Example("good " * 50, 1)])
    assert tokenizer.decode(inputs["input_ids"][0]) == "good good Sentiment :"


@pytest.mark.parametrize(
    "prompt,labels,message",
    [
        ("Review:", LABELS, "must hold {text}"),
        (PROMPT, ("good", "good film"), "different tokens"),
        (PROMPT, ("positive", ""), "a new token starts"),
    ],
    ids=["no text", "same first token", "no token"],
)
def test_prompts_that_cannot_work(tokenizer, prompt, labels, message):
    with pytest.raises(ValueError, match=message):
        Encoder(tokenizer, prompt, labels)


def test_batches_are_whole_shuffled_and_of_similar_lengths():
    examples = [Example("x" * (1 + 7 * i % 97), i % 2) for i in range(97)]
    first = list(itertools.islice(data.endless_batches(examples, 4, seed=1), 60))
    assert first == list(itertools.islice(data.endless_batches(examples, 4, seed=1), 60))
    assert first != list(itertools.islice(data.endless_batches(examples, 4, seed=2), 60))
    assert all(len(batch) == 4 for batch in first)
    epoch = [example for batch in first[:24] for example in batch]
    assert len(set(epoch)) == 96  # nothing twice; one of the 97 does not fill a batch
    spread = [max(len(e.text) for e in batch) - min(len(e.text) for e in batch) for batch in first[:24]]
    assert sum(spread) / len(spread) < 97 / 4
