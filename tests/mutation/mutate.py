"""Mutation run: change one expression of flatlora at a time, and see whether a test fails.

    python tests/mutation/mutate.py                                 # a sample of every module
    python tests/mutation/mutate.py --sample 50 training/schedule.py
    python tests/mutation/mutate.py --again                         # survivors without a final verdict, once more

The tests are collected once. A run of new tests in a forked child adds the lines and the time of each to the file
--lines; delete it when tests or code have changed. Each mutant is a forked child, in which the functions of one module
get the code of the mutant. It runs the tests that execute the changed line, the fast ones of each file first, until one
fails. So a mutant costs seconds, but only code inside functions is changed, and tests with the markers slow and
processes do not run. Results go to results.csv, and mutants that are in it do not run again. Its last column is written
by hand.
"""

import argparse
import ast
import collections
import csv
import json
import os
import pathlib
import random
import sys
import tempfile
import time

import pytest
from mutants import exchange, in_child, sites

HERE = pathlib.Path(__file__).resolve().parent
TESTS, PACKAGE = HERE.parent, HERE.parents[1] / "flatlora"
PATHS = [path for name in ("layers", "training", "methods") for path in PACKAGE.glob(f"{name}/*.py")]
LEFT_OUT = ["docs", "packaging", "plotting", "memory", "processes", "collection", "threads", "architecture", "report"]
LOOPS = ["closures", "kernels", "odd_loops", "plain_loop", "resume", "saving", "mixed_precision"]
FILES = [path for path in TESTS.glob("test_*.py") if path.stem.removeprefix("test_") not in LEFT_OUT]
FILES += [TESTS / "methods", TESTS / "spread" / "test_moved_weight.py"]
FILES += [TESTS / "loops" / f"test_{name}.py" for name in LOOPS]
COLUMNS = ("module", "line", "mutation", "result", "killed by", "verdict")


class Mutation:
    """Plugin of pytest that replaces the loop over the tests."""

    def __init__(self, options):
        self.options, self.failed = options, False

    def pytest_runtest_logreport(self, report):
        self.failed = self.failed or report.failed

    def pytest_runtestloop(self, session):
        session.config.pluginmanager.unregister(name="terminalreporter")
        self.items = {item.nodeid: item for item in session.items}
        lines = self.options.lines
        self.tests = json.loads(lines.read_text()) if lines.exists() else {}
        if new := [name for name in self.items if name not in self.tests]:
            self.tests |= in_child(lambda: self.measure(new))
            lines.write_text(json.dumps(self.tests))
        path = HERE / "results.csv"
        rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
        for name in self.options.modules or sorted(str(path.relative_to(PACKAGE)) for path in PATHS):
            for row in self.of_module(name, rows):
                print(*row.values(), sep=" | ", file=sys.__stdout__, flush=True)
                with path.open("w", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(sorted(rows, key=lambda row: (row["module"], int(row["line"]))))
        return True

    def run(self, names):
        """Run tests one after the other; yield the name of each, its time, and whether it has failed."""
        items = [self.items[name] for name in names]
        for item, after in zip(items, [*items[1:], None], strict=True):
            self.failed, start = False, time.monotonic()
            item.ihook.pytest_runtest_protocol(item=item, nextitem=after)
            yield item.nodeid, time.monotonic() - start, self.failed

    def measure(self, names):
        """The time of each test that passes, and the lines of the package that it executes."""
        lines, tests = set(), {}

        def trace(frame, event, arg):
            if event == "line":
                lines.add((frame.f_code.co_filename, frame.f_lineno))
            return trace if frame.f_code.co_filename.startswith(str(PACKAGE)) else None

        sys.settrace(trace)
        for name, seconds, failed in self.run(names):
            sys.settrace(trace)  # a test may have ended it
            if not failed:
                tests[name] = seconds, [f"{os.path.relpath(file, PACKAGE)}:{line}" for file, line in lines]
            lines.clear()
        return tests

    def of_module(self, name, rows):
        """Run mutants of one module that have no result yet; yield the row of each."""
        found = list(enumerate(sites(ast.parse((PACKAGE / name).read_text()))))
        sample = random.Random(name).sample(found, min(self.options.sample, len(found)))
        for number, (parent, field, index, statement, mutant) in sorted(sample, key=lambda site: site[0]):
            old = getattr(parent, field) if index is None else getattr(parent, field)[index]
            change = " -> ".join(" ".join(ast.unparse(node).split())[:100] for node in (old, mutant))
            key = {"module": name, "line": str(old.lineno), "mutation": change}
            row = next((row for row in rows if row.items() >= key.items()), None)
            if row is None:
                row = key | dict.fromkeys(COLUMNS[3:], "")
                rows.append(row)
            if not row["result"] or (
                self.options.again and row["verdict"][:4] in ("", "open") and row["result"] != "killed"
            ):
                row["result"], row["killed by"] = self.of_mutant(name, number, statement)
                yield row

    def of_mutant(self, name, number, statement):
        """The result, and the test that fails."""
        body = getattr(statement, "body", None)
        last = max(statement.lineno, body[0].lineno - 1) if isinstance(body, list) else statement.end_lineno
        touched = {f"{name}:{line}" for line in range(statement.lineno, last + 1)}
        ranked, in_file, chosen, total = [], collections.Counter(), [], 0.0
        for test, (seconds, lines) in sorted(self.tests.items(), key=lambda item: item[1][0]):
            if test in self.items and not touched.isdisjoint(lines):
                file = test.partition("::")[0]
                in_file[file] += 1
                ranked.append((seconds * in_file[file], seconds, test))
        for _, seconds, test in sorted(ranked):
            if total + seconds < self.options.budget:
                chosen, total = [*chosen, test], total + seconds
        if not chosen:  # what runs only while torch.compile traces it is not seen line by line
            chosen = [test for test in self.tests if test in self.items and "test_compile.py" in test]
            total = sum(self.tests[test][0] for test in chosen)

        def killer():
            exchange(PACKAGE / name, number)
            return next((test for test, _, failed in self.run(chosen) if failed), None)

        answer = in_child(killer, 20 + 3 * total)
        if answer in ("timeout", "crash"):
            return answer, ""
        return ("killed", answer) if answer else (f"survived {len(chosen)} tests", "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="such as training/schedule.py; all by default")
    parser.add_argument("--sample", type=int, default=6, help="mutants of a module")
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests for a mutant")
    parser.add_argument("--lines", type=pathlib.Path, default=f"{tempfile.gettempdir()}/flatlora_lines.json")
    parser.add_argument("--again", action="store_true", help="run mutants that survived without a final verdict")
    options = ["-m", "not slow and not processes and not gpu", "-p", "no:cacheprovider", "--capture=sys"]
    sys.exit(pytest.main([*options, *map(str, FILES)], [Mutation(parser.parse_args())]))
