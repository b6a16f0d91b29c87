"""Datasets of the hub, as rows: a stand-in for `load_dataset` gives them."""

import pytest
from recipe import files

datasets = pytest.importorskip("datasets")


@pytest.fixture
def asked(monkeypatch):
    """What `load_dataset` was asked for. Each answer is three rows, of which the last has no label."""
    asked = []

    def load(name, configuration, split):
        asked.append((name, configuration, split))
        kind = datasets.ClassLabel(names=["not_equivalent", "equivalent"])
        features = datasets.Features({"sentence": datasets.Value("string"), "label": kind})
        return datasets.Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(files, "announce", lambda name, kind: None)
    return asked


def test_classes_have_their_names_and_rows_without_one_drop_out(asked):
    rows = [{"sentence": "a", "label": "equivalent"}, {"sentence": "b", "label": "not_equivalent"}]
    assert files.load_rows("nyu-mll/glue:mrpc", ["sentence", "label"]) == rows
    assert files.load_rows("nyu-mll/glue:mrpc", ["sentence", "label"], limit=1) == rows[:1]
    assert files.load_rows("nyu-mll/glue", ["label"], "test")[0]["label"] == "equivalent"
    assert asked == [("nyu-mll/glue", "mrpc", "train")] * 2 + [("nyu-mll/glue", None, "test")]


def test_the_test_is_the_split_that_has_labels(asked):
    files.splits("nyu-mll/glue:mrpc", ["sentence"])
    files.splits("nyu-mll/glue:mnli", ["sentence"], "validation_matched")
    assert [split for _, _, split in asked] == ["train", "validation", "train", "validation_matched"]


def test_a_missing_column_is_named(asked):
    with pytest.raises(ValueError, match="glue:mrpc must have a column 'text', got sentence, label"):
        files.load_rows("nyu-mll/glue:mrpc", ["label", "text"])


def test_the_copy_in_parquet_is_read_where_there_is_a_script(asked, monkeypatch):
    load = datasets.load_dataset

    def script(name, configuration, split, revision=None):
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found e2e_nlg.py")
        assert revision == "refs/convert/parquet"
        return load(name, configuration, split)

    monkeypatch.setattr(datasets, "load_dataset", script)
    assert len(files.load_rows("tuetschek/e2e_nlg", ["sentence"])) == 3
    assert asked == [("tuetschek/e2e_nlg", None, "train")]

    def broken(name, configuration, split):
        raise RuntimeError("something else")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(RuntimeError, match="something else"):
        files.load_rows("tuetschek/e2e_nlg", ["sentence"])


def test_classes_of_images_are_those_of_the_dataset(asked):
    import image_classification

    columns = ["--image_column", "sentence", "--train_samples", "2", "--eval_samples", "1"]
    args = image_classification.parse(image_classification.Arguments, {}, ["--dataset", "a/b", *columns])
    train, test, names = image_classification.load(args)
    assert names == ["not_equivalent", "equivalent"]
    assert list(train) == [{"image": "a", "label": 1}, {"image": "b", "label": 0}] and len(test) == 1


def test_the_label_columns_of_the_few_shot_tasks(asked):
    import glue_roberta

    args = glue_roberta.parse(glue_roberta.Arguments, glue_roberta.PAPER, ["--task", "few-sst2", "--paper"])
    train, test, columns = glue_roberta.load(args)
    assert (len(train), len(test), columns) == (2, 2, ["sentence"])
    assert (args.few_shot, args.seeds, args.dataset) == (512, [0, 1, 2], "nyu-mll/glue:sst2")
    assert asked == [("nyu-mll/glue", "sst2", "train"), ("nyu-mll/glue", "sst2", "validation")]
