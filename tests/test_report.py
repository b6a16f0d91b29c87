"""The report: one self-contained page with the numbers of the files."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from flatlora import report
from flatlora.analysis import Degradation, ExpectedSharpness, LossLine, LossSurface, save

pytest.importorskip("matplotlib", reason="the plot extra is not installed")
GRID = torch.linspace(-1, 1, 5, dtype=torch.float64)
VOID = ("meta", "img", "source")


def make_run(folder, rho, scale, noise="filter", surface=False):
    folder.mkdir()
    adapter = {"peft_type": "LORA", "r": 8, "target_modules": ["v_proj", "q_proj"], "auto_mapping": None}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "flatlora_config.json").write_text(json.dumps({"rho": rho}))
    history = [{"step": k, "loss": scale / k, "flat_rho": rho} for k in range(1, 9)]
    for step, rows in ((4, history[:4]), (8, history)):
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps({"log_history": rows}))
    losses = 1 + scale * GRID**2 * torch.tensor([[1.0], [2.0], [3.0]])
    save(LossLine(GRID, losses, 1.0, noise, "merged", 0), folder / "analysis/loss_line.json")
    if surface:
        save(LossSurface(GRID, GRID, losses[:1] + GRID[:, None], 1.0, noise, "merged", 0), folder / "surface.json")
    save(ExpectedSharpness(GRID.abs(), losses - 1, 1.0, noise, "merged", 0), folder / "analysis/<sharp>.json")
    return folder


class Checker(HTMLParser):
    """Check that every tag is closed and nothing is loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check(page):
    parsed = Checker()
    parsed.feed(page)
    parsed.close()
    assert not parsed.open
    assert parsed.sources and all(source.startswith("data:image/svg+xml;base64,") for source in parsed.sources)
    return " ".join(" ".join(parsed.text).split())


def test_two_runs_compared(tmp_path):
    runs = [
        make_run(tmp_path / name, rho, scale, surface=True) for name, rho, scale in (("lora", 0, 2), ("flat", 0.05, 1))
    ]
    page = report.build(runs)
    text = check(page)
    assert "lora against flat" in text and "rho 0 0.05" in text
    assert page.count("<tr class=differs>") == 1  # rho; the targets are the same in any order
    assert "q_proj, v_proj" in text and "auto_mapping" not in text
    assert "flat − lora, paired" in text and "<sharp>" in text
    assert "5 [0.0317, 9.97]" in text  # LoRA's line at t = 1 is 3, 5, 7: 5 ± 4.303 * 2 / sqrt(3)
    assert page.count("<picture>") == 5  # training, the line, the sharpness, the surface twice


def test_command_line_and_one_run(tmp_path, capsys):
    run = make_run(tmp_path / "one", 0.1, 1.0)
    report.main([str(run), "--labels", "A & B", "-o", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "A & B" in check(page)
    assert page == report.build([run], ["A & B"])  # the page does not depend on the date
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")


def test_runs_that_cannot_be_compared_are_still_shown(tmp_path):
    runs = [make_run(tmp_path / "a", 0.1, 1.0), make_run(tmp_path / "b", 0.1, 1.0, noise="plain")]
    assert "No paired difference: other must have the same noise" in check(report.build(runs))
    save(LossLine(GRID, GRID[None], 1.0, "plain", "merged", 0), runs[0] / "analysis/loss_line.json")
    save(LossSurface(GRID, GRID, GRID + GRID[:, None], 1.0, "plain", "merged", 0), runs[1] / "analysis/loss_line.json")
    assert "Not compared: LossLine, LossSurface" in check(report.build(runs))


@pytest.mark.parametrize("falls", [False, True])
def test_the_table_has_the_points_of_all_runs(tmp_path, falls):
    grids, rows = ([0.5, 2.0], [0.5, 1.0, 4.0]), ["0.5", "1", "2", "4"]
    for name, grid in zip("ab", grids, strict=True):
        levels = torch.tensor(sorted(grid, reverse=falls)).double()
        result = Degradation(levels, levels * torch.ones(2, 1).double(), 0.0, "rounding", "bits", 0)
        save(result, tmp_path / name / "analysis/rounding.json")
    page = report.build([tmp_path / "a", tmp_path / "b"])
    found = re.findall(r"<tr[^>]*><t[hd]>([\d.]+)</t[hd]>(.*)</tr>", page)
    assert [x for x, _ in found] == sorted(rows, key=float, reverse=falls)
    assert {x: cells.count("—") for x, cells in found} == {"0.5": 0, "1": 1, "2": 1, "4": 1}


def test_folders_of_one_name_are_told_apart(tmp_path):
    for parent in "ab":
        (tmp_path / parent).mkdir()
    runs = [make_run(tmp_path / parent / "run", 0.1, 1.0) for parent in "ab"]
    assert "a/run against b/run" in check(report.build(runs))


def test_mistakes_are_answered(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    run = make_run(tmp_path / "run", 0.1, 1.0)
    with pytest.raises(ValueError, match="empty must hold an adapter, trainer_state.json or results"):
        report.build([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="nowhere must be a folder"):
        report.build([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="labels must be 2 different names"):
        report.build([run, run], ["a", "a"])
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "nowhere")])
    assert "nowhere must be a folder" in capsys.readouterr().err
