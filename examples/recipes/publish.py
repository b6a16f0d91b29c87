"""Write the tables of README.md in this folder, out of results/*.csv, which are the results.csv of one run each.

The list of the recipes at its top is copied into the README.md of all examples.

    python examples/recipes/publish.py            # after a new CSV file
    python examples/recipes/publish.py --check    # says what is not up to date or missing

README.md holds `<!-- table: RECIPE -->` and `<!-- /table -->`; what stands between them is written by this script. The
text around them is written by hand, and must be read again after a new run.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import recipe  # noqa: F401  puts `common` on the path
from common import tables
from recipe.results import as_text, summary

HERE = Path(__file__).resolve().parent
README, RESULTS = HERE / "README.md", HERE / "results"
ALL_EXAMPLES = HERE.parent / "README.md"
LIST = re.compile(r"(<!-- recipes -->\n).*?(<!-- /recipes -->)", re.DOTALL)
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def recipes() -> set[str]:
    """The names of all recipes."""
    return {file.stem for file in HERE.glob("*.py")} - {Path(__file__).stem}


def table(file: Path) -> str:
    """What a recipe printed, from its results.csv, as a block of Markdown."""
    rows = tables.read_csv(file)
    methods, seeds = (list(dict.fromkeys(row[name] for row in rows)) for name in ("method", "seed"))
    return f"```text\n{as_text(summary(rows, methods, [int(seed) for seed in seeds]))}\n```\n"


def filled(page: str, results: Path) -> str:
    """The page with the tables of the CSV files in `results`; a block without a file stays as it is."""
    made = {file.stem: table(file) for file in results.glob("*.csv")}
    return BLOCK.sub(lambda m: m[1] + made[m[2]] + m[3] if m[2] in made else m[0], page)


def listed(examples: str, page: str) -> str:
    """The page of all examples with the list of the recipes as it stands on their own page."""
    rows = re.search(r"^\| script \|.*?(?=\n\n)", page, re.DOTALL | re.MULTILINE)[0].replace("](", "](recipes/")
    return LIST.sub(lambda m: f"{m[1]}{rows}\n{m[2]}", examples)


def faults(page: str, results: Path, names: set[str]) -> list[str]:
    """What is wrong with the page: an old table, or a recipe without row, command, table or CSV file."""
    files = {file.stem: file for file in results.glob("*.csv")}
    blocks = [(m[2], m[0] == filled(m[0], results)) for m in BLOCK.finditer(page)]
    found = [f"the table of {name} is not that of its CSV file" for name, right in blocks if not right]
    count = Counter(name for name, _ in blocks)
    found += [f"{name} has {count[name]} tables" for name in sorted({*names, *count}) if count[name] != 1]
    found += [f"{name} has no CSV file" for name in sorted({*names, *count} - files.keys())]
    found += [f"{name}.csv is of no recipe" for name in sorted(files.keys() - names)]
    for name in sorted(names & files.keys()):
        rows = [line for line in page.splitlines() if line.startswith(f"| [{name}.py]({name}.py) |")]
        commands = {row["command"] for row in tables.read_csv(files[name])}
        if [line.rpartition("| `")[2] for line in rows] != [f"{command}` |" for command in commands]:
            found.append(f"{name} must have one row, with the command of its CSV file: {', '.join(commands)}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something is wrong")
    if not parser.parse_args(arguments).check:
        README.write_text(filled(README.read_text(), RESULTS))
        ALL_EXAMPLES.write_text(listed(ALL_EXAMPLES.read_text(), README.read_text()))
    found = faults(README.read_text(), RESULTS, recipes())
    if ALL_EXAMPLES.read_text() != listed(ALL_EXAMPLES.read_text(), README.read_text()):
        found.append("the list of the recipes in the README.md of all examples is not that of their own page")
    for fault in found:
        print(fault)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
