"""The tables in the recipes' README are those of the CSV files beside it, and every recipe has one."""

import re
from pathlib import Path

import publish
import pytest

CSV = (
    "method,seed,accuracy,train_seconds,steps,command,machine\n"
    "lora,0,0.25,8.5,60,python examples/recipes/own.py,here\n"
    "lora,1,0.75,8.5,60,python examples/recipes/own.py,here\n"
    "flat,0,0.5,9.5,60,python examples/recipes/own.py,here\n"
    "flat,1,1,9.5,60,python examples/recipes/own.py,here\n"
)
ROW = "| [own.py](own.py) | what it shows | 1 s | `examples` | `python examples/recipes/own.py` |"
TABLE = """\
```text
method  n  accuracy
---------------------------------------------
lora    2  0.5 ± 0.25
flat    2  0.75 ± 0.25 (+0.25 [+0.25, +0.25])
Mean ± standard error over the seeds; in parentheses the difference to the first method, paired by seed, with its 95 % \
interval.
```
"""
HEAD = "| script | what it shows | time here | extras | command |\n|---|---|---|---|---|"
PAGE = f"{HEAD}\n{ROW}\n\n<!-- table: own -->\n{TABLE}<!-- /table -->\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "own.csv").write_text(CSV)
    return tmp_path


def test_the_page_has_the_tables_of_the_csv_files():
    """Else `python examples/recipes/publish.py` writes them."""
    page, examples = publish.README.read_text(), publish.ALL_EXAMPLES.read_text()
    assert publish.faults(page, publish.RESULTS, publish.recipes()) == []
    assert publish.listed(examples, page) == examples and examples.count("](recipes/text_to_image.py)") == 1


def test_a_table_is_that_of_its_rows(folder):
    """Mean 1/2, deviations of 1/4 and 1/4: an error of sqrt((1/16 + 1/16) / 1 / 2); both differences are 1/4."""
    assert publish.table(folder / "own.csv") == TABLE
    assert publish.faults(PAGE, folder, {"own"}) == []


@pytest.mark.parametrize(
    "old, new, fault",
    [
        ("0.75 ±", "0.76 ±", "the table of own is not that of its CSV file"),
        ("<!-- /table -->", "<!-- /table -->\n<!-- table: own -->\n<!-- /table -->", "own has 2 tables"),
        ("table: own", "table: other", "own has 0 tables"),
        ("table: own", "table: other", "other has no CSV file"),
        ("[own.py]", "[one.py]", "own must have one row, with the command of its CSV file"),
        ("own.py` |", "own.py --seeds 1` |", "own must have one row, with the command of its CSV file"),
        (ROW, f"{ROW}\n{ROW}", "own must have one row, with the command of its CSV file"),
    ],
)
def test_a_fault_of_the_page_is_found(folder, old, new, fault):
    assert old in PAGE
    assert any(found.startswith(fault) for found in publish.faults(PAGE.replace(old, new), folder, {"own"}))


def test_a_file_without_a_recipe_is_found(folder):
    (folder / "more.csv").write_text(CSV)
    assert publish.faults(PAGE, folder, {"own"}) == ["more.csv is of no recipe"]
    assert "new has no CSV file" in publish.faults(PAGE, folder, {"own", "new"})


def test_the_command_writes_what_its_check_asks_for(folder, monkeypatch, capsys):
    (folder / "README.md").write_text(PAGE.replace("0.75 ±", "0.76 ±"))
    monkeypatch.setattr(publish, "README", folder / "README.md")
    (folder / "all.md").write_text("a\n<!-- recipes -->\nold\n<!-- /recipes -->\nb\n")
    monkeypatch.setattr(publish, "ALL_EXAMPLES", folder / "all.md")
    monkeypatch.setattr(publish, "RESULTS", folder)
    monkeypatch.setattr(publish, "recipes", lambda: {"own"})
    before = (folder / "README.md").read_text()
    assert publish.main(["--check"]) == 1 and (folder / "README.md").read_text() == before
    old, copy = capsys.readouterr().out.splitlines()
    assert old == "the table of own is not that of its CSV file" and copy.startswith("the list of the recipes")
    assert publish.main([]) == 0 and publish.main(["--check"]) == 0
    assert (folder / "README.md").read_text() == PAGE
    row = ROW.replace("(own.py)", "(recipes/own.py)")
    assert (folder / "all.md").read_text() == f"a\n<!-- recipes -->\n{HEAD}\n{row}\n<!-- /recipes -->\nb\n"


def test_the_page_of_the_documentation_has_every_recipe():
    page = Path(__file__).parents[2] / ".docs" / "pages" / "recipes.md"
    assert set(re.findall(r"^\| `(\w+)\.py` \|", page.read_text(), re.MULTILINE)) == publish.recipes()
