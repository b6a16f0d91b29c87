"""peft's own LoRA tests with FlatLoraConfig in place of LoraConfig: does anything that passes plain fail flat?

    pip install -e ".[test]" diffusers parameterized attrs scipy
    python tests/peft_suite/run.py                         # writes tests/peft_suite/results.csv
    python tests/peft_suite/run.py test_lora_ga.py         # the rows of these files anew

peft's source distribution of the installed version is fetched from PyPI, and its tests run three times: plain, with rho
= 0 and with rho = 0.1. The hub is not asked: tiny models of the same classes stand in for those of stand_ins.MODELS. A
test that needs another one fails in all three runs. What must differ by design is in DIFFERS, with the reason; any
other test that passes plain and not flat makes this script fail.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from stand_ins import build

HERE = Path(__file__).parent
FILES = {  # file -> tests of it, as pytest's -k takes them
    "test_custom_models.py": "-LoraConfig-",
    "test_decoder_models.py": "-LoraConfig-",
    "test_lora_ga.py": "",
    "test_lorafa.py": "",
    "test_loraplus.py": "",
    "test_riemannian_lora.py": "",
    "test_velora.py": "",
    "test_bdlora.py": "",
    "test_lora_variants.py": "",
    "test_target_parameters.py": "",
    "test_low_level_api.py": "",
    "test_mixed.py": "",
    "test_initialization.py": "Lora or lora",
    "test_tuners_utils.py": "",
    "test_other.py": "",
}
RUNS = {"plain": None, "rho 0": "0", "rho 0.1": "0.1"}
BY_HAND = "makes a layer of peft's by hand from our config: an error, since it would train without noise"
WRAPPED = "puts LoRA around another kind of adapter on one layer: refused, the merged weight is not W + sBA"
NAMED = "expects the name of a layer's class, which is FlatLinear here"
TRAINING = "compares a pass in training mode, which is perturbed, with a clean one"
DIFFERS = {  # part of a test's id -> why it must differ
    "test_unregistered_variant_raises_error": BY_HAND,
    "test_invalid_variant_combination_raises_error": BY_HAND,
    "test_unsorted_variant_keys_raises_error": BY_HAND,
    **{f"test_target_{which}_layer_{i}_Lora_": WRAPPED for which in ("first", "last") for i in range(3)},
    "test_modules_to_save_targets_lora_layer_raises": NAMED,
    "test_trainable_token_indices_targets_lora_layer_raises": NAMED,
    "test_targeting_trainable_tokens_raises": NAMED,
    "test_module_type_small": NAMED,
    "test_module_type_large": NAMED,
    "test_model_with_injected_layers": NAMED,
    "test_target_parameters_and_target_modules": NAMED,
    "test_target_parameters_works_with_existing_parametrization": TRAINING,
    "test_unload_with_inactive_modules_to_save[merge_and_unload]": TRAINING,
    "test_lora_mica_embedding_init_default": TRAINING,
}


def fetch(folder: Path) -> Path:
    """The tests of the installed peft."""
    name = f"peft=={version('peft')}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder, name]
    subprocess.run(command, check=True)
    (archive,) = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(folder.glob("peft-*/tests"))


def outcomes(tests: Path, cache: Path, file: str, select: str, rho: str | None) -> dict[str, str]:
    """Test id -> passed, failed or skipped."""
    report = cache / f"{file}.{rho}.xml"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    plugin = ["-p", "stand_ins"] + ([] if rho is None else ["-p", "flat_lora_config"])
    if rho is not None:
        environment["FLATLORA_RHO"] = rho
    # peft's settings make an error of the names that transformers 5.23 has changed and peft 0.21 still uses
    options = ["-q", "-o", "addopts=", "-W", "ignore::FutureWarning", "-p", "no:cacheprovider", "--tb=line"]
    options += [f"--junitxml={report}", f"-k={select}"]
    command = [sys.executable, "-m", "pytest", *plugin, *options, f"tests/{file}"]
    found = subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True)
    if not report.exists():
        raise RuntimeError(f"{file} did not run:\n{found.stdout[-3000:]}{found.stderr[-3000:]}")
    result = {}
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        result[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return result


def write(rows: list[dict]) -> None:
    """Put these rows into results.csv, in the place of those of the same files."""
    columns = ["file", "run", "passed", "failed", "skipped", "differ by design", "wrong", "peft", "torch"]
    path, new = HERE / "results.csv", {row["file"] for row in rows}
    kept = [row for row in csv.DictReader(path.open()) if row["file"] not in new] if path.exists() else []
    with path.open("w", newline="") as out:
        writer = csv.DictWriter(out, columns, restval=0)
        writer.writeheader()
        writer.writerows(sorted(kept + rows, key=lambda row: list(FILES).index(row["file"])))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="default: all")
    parser.add_argument("--tests", type=Path, help="folder of peft's tests, if they are here already")
    options = parser.parse_args()
    rows, wrong = [], []
    with tempfile.TemporaryDirectory() as folder:
        tests, cache = options.tests or fetch(Path(folder)), Path(folder) / "hub"
        build(cache)
        (tests / "__init__.py").touch()  # left out of the distribution, and some tests import from one another
        for file in options.files or FILES:
            with ThreadPoolExecutor() as pool:  # each waits for a process of its own
                waiting = {
                    name: pool.submit(outcomes, tests, cache, file, FILES.get(file, ""), rho)
                    for name, rho in RUNS.items()
                }
            runs = {name: future.result() for name, future in waiting.items()}
            plain = runs.pop("plain")
            rows.append({"file": file, "run": "plain", **Counter(plain.values()), "differ by design": 0, "wrong": 0})
            for name, flat in runs.items():
                lost = [test for test, outcome in plain.items() if outcome == "passed" and flat.get(test) != "passed"]
                bad = [test for test in lost if not any(part in test for part in DIFFERS)]
                counts = Counter(flat.values())
                rows.append(
                    {"file": file, "run": name, **counts, "differ by design": len(lost) - len(bad), "wrong": len(bad)}
                )
                wrong += [f"{name}: {test}" for test in bad]
            for row in rows[-3:]:
                print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    write([row | {"peft": version("peft"), "torch": version("torch")} for row in rows])
    print("\n".join(["Passed plain and not flat:", *wrong] if wrong else ["Nothing that passes plain fails flat."]))
    return len(wrong) > 0


if __name__ == "__main__":
    sys.exit(main())
