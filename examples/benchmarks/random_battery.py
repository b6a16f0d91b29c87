"""The uniform words of the noise through dieharder (Debian and Ubuntu: `apt install dieharder`; R. G. Brown's battery).

    python examples/benchmarks/random_battery.py

Four streams of 32-bit words, all from the C kernel, so that every counter word has its turn to be the one that counts:
`columns` is a weight of 4,096 columns read row by row; in `rows` the 64 words of a tile are followed by those of the
next row, in `layers` and `samples` the 1,024 words of 16 rows by those of the next layer or sample, all else held.
The first stream goes through the whole battery, the others through a shorter one. The report goes to
results/dieharder.txt, with a last line that counts the verdicts. A true generator gets a WEAK (p below 0.5 % or above
99.5 %) once in a hundred tests and never a FAILED (p below 1e-6).
"""

import argparse
import contextlib
import itertools
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

from flatlora.ops import native

# dieharder's numbers; all its tests but those marked suspect, the slowest, and those that need files of 2^31 words
TESTS = ["0", "1", "2", "3", "4", "8", "9", "10", "11", "12", "13", "15", "16", "100", "101", "102", "202", "204",
         "205", "206", "207", "208", "209"]  # fmt: skip
SHORT = ["0", "8", "15", "100", "101", "102", "202", "205", "206", "209"]


def stream(name: str, seed: int):
    """Bytes without end."""
    for batch in itertools.count():
        if name == "columns":
            rows, columns = torch.arange(batch * 256, (batch + 1) * 256), 4096
            yield to_bytes(native.words(rows, columns, torch.tensor([seed, 0]), 0))
        elif name == "rows":
            rows = torch.arange(batch * 4096, (batch + 1) * 4096)
            yield to_bytes(native.words(rows, 64, torch.tensor([seed, 0]), 0))
        else:
            for i in range(batch * 256, (batch + 1) * 256):
                layer, sample = (i, 0) if name == "layers" else (0, i)
                yield to_bytes(native.words(torch.arange(16), 64, torch.tensor([seed, sample]), layer))


def to_bytes(words: torch.Tensor) -> bytes:
    return words.to(torch.int32).numpy().tobytes()


def run(name: str, test: str, seed: int) -> list[str]:
    """The result lines of one test of dieharder on one stream, from its beginning."""
    command = ["dieharder", "-g", "200", "-d", test, "-D", "test_name", "-D", "ntuple", "-D", "tsamples",
               "-D", "psamples", "-D", "pvalues", "-D", "assessment", "-c", "|"]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            for data in stream(name, seed):
                process.stdin.write(data)
        except BrokenPipeError:  # it has read enough
            pass
        output = process.stdout.read().decode()
        with contextlib.suppress(BrokenPipeError):  # what is left in the buffer
            process.stdin.close()
    return [line for line in output.splitlines() if line.count("|") >= 4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", nargs="+", default=["columns", "rows", "layers", "samples"])
    parser.add_argument("--tests", nargs="+", help="numbers of dieharder's tests (dieharder -l), for every stream")
    parser.add_argument("--seed", type=int, default=20240914)
    parser.add_argument("--report", type=Path, default=Path(__file__).parent / "results" / "dieharder.txt")
    options = parser.parse_args()
    if shutil.which("dieharder") is None or native.LIBRARY is None:
        sys.exit("random_battery needs dieharder on the PATH and flatlora's C kernel")
    verdicts = Counter()
    with options.report.open("w") as report:
        print(f"dieharder on Philox4x32-10 words, seed {options.seed}", file=report)
        print("stream | test | ntuple | samples | repetitions | p | verdict", file=report)
        for name in options.streams:
            for test in options.tests or (TESTS if name == "columns" else SHORT):
                for line in run(name, test, options.seed):
                    print(name, "|", line, file=report, flush=True)
                    verdicts[line.split("|")[-1].strip()] += 1
        print(", ".join(f"{verdict}: {count}" for verdict, count in sorted(verdicts.items())), file=report)


if __name__ == "__main__":
    main()
