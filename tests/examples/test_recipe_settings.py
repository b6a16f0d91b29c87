"""The settings of `--paper` are those of the table in SETTINGS.md, for every recipe and both ways."""

import ast
import json
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
NAMES = sorted(file.stem for file in RECIPES.glob("*.py") if "PAPER" in file.read_text())


def table():
    """The rows of the table: recipe, task, setting, value, source."""
    lines = (RECIPES / "SETTINGS.md").read_text().splitlines()
    first = lines.index("| recipe | task | setting | value | source |") + 2
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:] if line.startswith("|")]
    assert all(len(row) == 5 and all(row) for row in rows)
    return rows


def paper(name):
    """The dictionary of a recipe, which is imported."""
    try:
        return __import__(name).PAPER
    except ModuleNotFoundError as error:
        pytest.skip(f"{name} needs {error.name}")


def test_the_table_names_recipes_that_exist():
    assert {row[0] for row in table()} == {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_are_those_of_the_table(name):
    expected = paper(name)
    rows = [row for row in table() if row[0] == name]
    assert {task for _, task, *_ in rows} <= {*expected, "all"}
    assert len({(task, setting) for _, task, setting, *_ in rows}) == len(rows)
    found = {task: {} for task in expected}
    for own in (False, True):  # a row of a task goes before one of all
        for _, task, setting, value, _ in rows:
            for each in expected if task == "all" and not own else [task] if task != "all" and own else []:
                found[each][setting] = json.loads(value)
    assert found == expected


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_an_argument_and_every_recipe_is_short(name):
    lines = (RECIPES / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 150
    module = ast.parse("\n".join(lines))
    own = {
        node.target.id
        for cls in module.body
        if isinstance(cls, ast.ClassDef)
        for node in cls.body
        if isinstance(node, ast.AnnAssign)
    }
    shared = {*__import__("recipe.arguments").arguments.RecipeArguments.__dataclass_fields__}
    assert {setting for settings in paper(name).values() for setting in settings} <= own | shared


@pytest.mark.parametrize(
    "name, task, settings",
    [
        ("glue_t5", "mnli", {"epochs": 1, "max_length": 128, "learning_rate": 5e-4, "batch_size": 32, "rho": 0.05}),
        ("glue_t5", "bi-mnli", {"epochs": 3, "max_length": 256}),
        ("glue_t5", "copa", {"epochs": 50, "rho": 0.1}),
        ("glue_roberta", "qnli", {"learning_rate": 2e-4, "epochs": 10, "weight_decay": 0.1, "warmup_ratio": 0.06}),
        ("glue_roberta", "few-trec", {"few_shot": 512, "seeds": [0, 1, 2]}),
        ("image_classification", "svhn", {"image_size": 224, "epochs": 10, "weight_decay": 0.1, "rho": 0.15, "r": 8}),
    ],
)
def test_literal_values_of_the_papers(name, task, settings):
    assert {key: paper(name)[task][key] for key in settings} == settings


def test_the_rates_of_glue():
    tasks = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
    settings = [paper("glue_roberta")[task] for task in tasks]
    assert [x["learning_rate"] for x in settings] == [3e-4, 4e-4, 3e-4, 3e-4, 2e-4, 3e-4, 4e-4, 3e-4]
    assert [x["epochs"] for x in settings] == [10, 10, 20, 20, 10, 20, 20, 10]


def test_the_epochs_of_t5():
    settings = paper("glue_t5")
    tasks = ("mnli", "sst2", "cola", "qnli", "mrpc")
    assert [settings[task]["epochs"] for task in tasks] == [1, 10, 10, 1, 10]
    assert [settings[f"bi-{task}"]["epochs"] for task in tasks] == [3, 3, 10, 3, 10]
    superglue = [settings[task] for task in ("boolq", "cb", "copa", "rte", "wic")]
    assert [x["epochs"] for x in superglue] == [10, 50, 50, 10, 10] and {x["rho"] for x in superglue} == {0.1}
