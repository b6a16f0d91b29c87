"""The tables on the page of the study that put several cells, or several machines, together."""

import itertools

import pytest
import torch
from common import tables
from study import design, publish, records, report, tasks, train
from study.arms import BY_NAME

ARMS = ("lora", "dropout", "flat")
# The first plans an arm that the other does not have, so that it is not compared, nor counted in the correction.
CELLS = [tasks.Cell("one", 8, 0.0, 4, (*ARMS, "smoothing"), 4), tasks.Cell("two", 8, 0.2, 4, ARMS, 4)]
TABLE = tasks.Text("text", [], [], [], CELLS, ["movie", "books", "news"])
SCORES = [f"{score}_{domain}" for domain in TABLE.domains for score in ("acc", "nll", "brier", "ece")]


def row(part, cell, arm, strength, seed, value, **more):
    made = dict.fromkeys([*records.KEY, *records.ORIGIN, *train.columns(TABLE)], "") | dict.fromkeys(SCORES, value)
    made |= {"part": part, "cell": cell, "arm": arm, "strength": strength, "lr": 0.001, "seed": seed, "status": "ok"}
    return {k: str(v) for k, v in (made | {"acc_validation": 0.5, "nll_validation": 1, "machine": "A"} | more).items()}


@pytest.fixture
def rows(monkeypatch):
    """Two cells, tuned and tested; the strength of each arm is the first of its grid."""
    monkeypatch.setattr(publish, "CELLS", {"text": CELLS})
    numbers = torch.rand(len(CELLS), len(ARMS), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = []
    for k, cell in enumerate(CELLS):
        for j, arm in enumerate(BY_NAME[name] for name in ARMS):
            for strength, seed in itertools.product(arm.grid, design.TUNING_SEEDS):
                lr, best = strength if arm.is_base else BY_NAME["lora"].grid[0], strength == arm.grid[0]
                made.append(row("tuning", cell.name, arm.name, strength, seed, 0, lr=lr, acc_validation=0.5 + best))
            lr = BY_NAME["lora"].grid[0]
            made += [
                row("final", cell.name, arm.name, arm.grid[0], s, numbers[k, j, s].item(), lr=lr) for s in range(4)
            ]
    return numbers, made


def cells(text, start):
    return [part.strip() for part in next(x for x in text.splitlines() if x.startswith(start)).split("|")[1:-1]]


def test_all_cells_together_are_compared_seed_by_seed(rows):
    numbers, made = rows
    text = publish.pooled({"text": made})
    assert text.startswith("text `one`, text `two`; n = 4 seeds.")
    lora, dropout, flat = numbers.mean(0)
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=4)), dtype=torch.float64)
    p = {}
    for name, d in (("dropout", dropout - lora), ("flat", flat - lora)):
        p[name] = ((signs @ d).abs() >= d.sum().abs() - 1e-12).double().mean().item()
    line = cells(text, "| Flat-LoRA |")
    mean = (flat - lora).mean().item()
    assert line[1].startswith(f"{100 * mean:+.1f} [") and line[5].startswith(f"{mean:+.3f} [")
    smallest = min(p, key=lambda name: p[name])
    corrected = min(1.0, 2 * p["flat"]) if smallest == "flat" else max(p["flat"], min(1.0, 2 * p[smallest]))
    assert line[2] == f"{corrected:.3f}"


@pytest.mark.parametrize("missing", [{"seed": "3"}, {}], ids=["one seed", "all seeds"])
def test_a_cell_without_all_runs_of_an_arm_is_left_out(rows, missing):
    numbers, made = rows
    lacks = {"part": "final", "cell": "two", "arm": "dropout"} | missing
    made = [r for r in made if not lacks.items() <= r.items()]
    text = publish.pooled({"text": made})
    assert text.startswith("text `one`; n = 4 seeds.")
    mean = (numbers[0, 2] - numbers[0, 0]).mean().item()
    assert cells(text, "| Flat-LoRA |")[1].startswith(f"{100 * mean:+.1f} [")
    assert publish.pooled({"text": [r for r in made if r["seed"] != "0"]}) == "No complete cell yet."


def test_runs_on_two_processors_are_compared(rows, monkeypatch, tmp_path):
    _, made = rows
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    finals = [r for r in made if r["part"] == "final"][:2]
    moved = [0.01, -0.03]
    other = [r | {"machine": "B", "acc_books": float(r["acc_books"]) + d} for r, d in zip(finals, moved, strict=True)]
    other.append(finals[0] | {"acc_books": "9"})  # of the same processor
    made.append(finals[0] | {"part": "tuning", "acc_books": ""})  # which has no tests
    other.append(made[-1] | {"machine": "B"})
    tables.write_csv(tmp_path / "text_other_machine.csv", other)
    line = cells(publish.machines({"text": made}), "| Accuracy out of domain, % |")
    assert line[1:] == ["2", "1.00", "1.50"]  # books is one of two domains


def test_described_parts_stand_under_the_cell_that_has_them(rows):
    _, made = rows
    assert publish.described({"text": made}, report.ablation, 1) == "No runs yet."
    made += [row("ablation", "two", "lora", 0.001, seed, 0.5, variant=design.ABLATION_REFERENCE) for seed in (0, 1)]
    made += [row("ablation", "two", "flat", 0.2, seed, 0.6, variant="rho", acc_movie=0) for seed in (0, 1)]
    text = publish.described({"text": made}, report.ablation, 1)
    assert text.startswith("**text `two`**") and "`one`" not in text and "NLL" not in text
    assert cells(text, "| rho |")[4:] == ["60.0 ± 0.0", "+10.0 [+10.0, +10.0]"]


def test_ablations_are_compared_with_one_another_by_seed(rows):
    _, made = rows

    def add(variant, arm, strength, accuracies):
        runs = [
            row("ablation", "two", arm, strength, seed, value, variant=variant) for seed, value in accuracies.items()
        ]
        made.extend(runs)

    add("rho", "flat", 0.1, {0: 0.5, 1: 0.6, 2: 0.9})
    add("schedule=constant", "flat", 0.1, {0: 0.4, 1: 0.4})
    add("schedule=linear", "flat", 0.2, {0: 0.1})  # its cosine is missing
    add("float32", "lora", 0.003, {0: 0.7, 1: 0.7})
    add(design.ABLATION_REFERENCE, "lora", 0.003, {0: 0.6, 1: 0.6})
    text = publish.described({"text": made}, report.ablation_pairs, 1)
    assert cells(text, "| constant minus cosine schedule, rho 0.1 |")[1:] == ["2", "-15.0 [-20.0, -10.0]"]
    assert cells(text, "| float32 minus bf16 base, LoRA |")[1:] == ["2", "+10.0 [+10.0, +10.0]"]
    assert text.count("minus cosine") == 1 and text.startswith("**text `two`**")


def test_pairs_of_ablations_are_of_runs_that_are_planned():
    planned = {
        (recipe.variant, recipe.arm, None if recipe.arm == "lora" else recipe.strength)
        for cell in tasks.TEXT_CELLS
        for recipe in design.ablations(cell, 1e-3)
    }
    for _, one, other in design.ABLATION_PAIRS:
        assert {one, other} <= planned and one != other
