"""Figures show the measured values and are readable without color."""

import itertools
import sys

import pytest
import torch
from helpers import processes

from flatlora import plotting
from flatlora.analysis import Degradation, ExpectedSharpness, LossLine, LossSurface, SamSharpness, SpectralDensity

matplotlib = pytest.importorskip("matplotlib", reason="the plot extra is not installed")
GRID = torch.linspace(-1, 1, 5, dtype=torch.float64)
SOME = torch.linspace(0, 1, 5, dtype=torch.float64)


def line(scale=1.0, directions=3, noise="filter_normalised"):
    losses = 1 + scale * GRID**2 * torch.arange(1, directions + 1)[:, None]
    return LossLine(GRID, losses, 1.0, noise, "merged", 0)


def surface(scale=1.0):
    return LossSurface(GRID, SOME, scale * (GRID**2 + SOME[:, None] ** 2), 0.0, "filter", "merged", 0)


def history(ramp=True):
    rows = [{"step": k, "loss": 1 / (k + 1), **({"flat_rho": 0.01 * k} if ramp else {})} for k in range(5)]
    return [*rows, {"step": 4, "eval_loss": 0.5}, {"train_runtime": 3.0}]


RISES = torch.rand(4, 5, dtype=torch.float64)
FIGURES = {
    "line": lambda **kw: plotting.plot_loss_line({"LoRA": line(2.0), "Flat-LoRA": line()}, **kw),
    "line-one-direction": lambda **kw: plotting.plot_loss_line({"LoRA": line(directions=1)}, relative=True, **kw),
    "sharpness": lambda **kw: plotting.plot_sharpness(
        {"LoRA": ExpectedSharpness(SOME, RISES, 1.0, "filter", "merged", 0)}, **kw
    ),
    "sam": lambda **kw: plotting.plot_sharpness({"LoRA": SamSharpness(SOME, RISES, RISES, 1.0, "merged", 1)}, **kw),
    "noise": lambda **kw: plotting.plot_degradation(
        {"LoRA": Degradation(SOME, RISES, 1.0, "weight noise", "rho", 0, "accuracy")}, **kw
    ),
    "rounding": lambda **kw: plotting.plot_degradation(
        {"LoRA": Degradation(torch.tensor([8.0, 4.0]), RISES[:, :2], 1.0, "rounding", "bits per weight", 0)}, **kw
    ),
    "spectrum": lambda **kw: plotting.plot_spectrum(
        {"LoRA": SpectralDensity(GRID, RISES, 0.1, RISES, RISES, 100)}, **kw
    ),
    "training": lambda **kw: plotting.plot_training({"LoRA": history(False), "Flat-LoRA": history()}, **kw),
    "contour": lambda **kw: plotting.plot_surface({"LoRA": surface(2.0), "Flat-LoRA": surface()}, **kw),
    "3d": lambda **kw: plotting.plot_surface({"LoRA": surface()}, kind="3d", **kw),
}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_saved_and_leaves_matplotlib_as_it_was(name, theme, tmp_path):
    before = dict(matplotlib.rcParams)
    figure = FIGURES[name](theme=theme, title="A title")
    for kind in ("png", "svg"):
        figure.savefig(tmp_path / f"figure.{kind}")
        assert (tmp_path / f"figure.{kind}").stat().st_size > 5000
    assert dict(matplotlib.rcParams) == before
    assert figure.get_facecolor() == matplotlib.colors.to_rgba(plotting.style.THEMES[theme]["paper"])


def test_the_line_that_is_drawn_is_the_mean_and_the_band_its_interval():
    one = line(2.0)
    (axes,) = plotting.plot_loss_line({"LoRA": one}, level=0.9).axes
    (drawn,) = [artist for artist in axes.lines if artist.get_label() == "LoRA"]
    assert torch.equal(torch.tensor(drawn.get_xydata()[:, 1]), one.mean)
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    low, high = one.interval(0.9)
    assert band.min() == pytest.approx(low.min().item()) and band.max() == pytest.approx(high.max().item())
    assert "row norm" in axes.get_xlabel()


GRAY = [[0.2126, 0.7152, 0.0722]] * 3
EYES = {  # linear RGB as seen: Machado, Oliveira and Fernandes 2009, full severity; and what a gray printer leaves
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    "gray": GRAY,
}
XYZ = [[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0178, 0.1095, 0.8727]]  # of sRGB, over the white point


def linear(color):
    """Linear RGB."""
    c = torch.tensor(matplotlib.colors.to_rgb(color))
    return torch.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def luminance(color):
    """WCAG relative luminance."""
    return float(torch.tensor(GRAY[0]) @ linear(color))


def lab(color, eyes):
    """CIE L*a*b* of a color as these eyes see it."""
    x, y, z = torch.tensor(XYZ) @ (torch.tensor(EYES[eyes]).float() @ linear(color)).clamp(0, 1)
    x, y, z = (t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29 for t in (x, y, z))
    return torch.tensor([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("eyes", EYES)
def test_the_first_three_colors_are_told_apart_by_every_eye_and_in_gray(eyes, theme):
    seen = [lab(plotting.style.look(k, theme)["color"], eyes) for k in range(3)]
    distances = [torch.dist(a, b).item() for a, b in itertools.combinations(seen, 2)]
    assert min(distances) > (10 if eyes == "gray" else 25)  # 2.3 is just noticeable side by side


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_series_are_told_apart_without_color_and_text_is_readable(theme):
    looks = [plotting.style.look(k, theme) for k in range(6)]
    assert all(
        a["linestyle"] != b["linestyle"] and a["marker"] != b["marker"] for a, b in itertools.combinations(looks, 2)
    )
    paper = luminance(plotting.style.THEMES[theme]["paper"])

    def contrast(color):
        low, high = sorted((luminance(color), paper))
        return (high + 0.05) / (low + 0.05)

    assert contrast(plotting.style.THEMES[theme]["ink"]) > 7
    assert all(contrast(look["color"]) > 3 for look in looks[:3])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: plotting.plot_loss_line({}), "lines must be a mapping of at least one label to a result"),
        (lambda: plotting.plot_loss_line([line()]), "lines must be a mapping"),
        (lambda: plotting.plot_loss_line({"a": line()}, theme="sepia"), "theme must be one of .* got 'sepia'"),
        (lambda: plotting.plot_surface({"a": surface()}, kind="4d"), "kind must be 'contour' or '3d', got '4d'"),
        (lambda: plotting.plot_training({"a": [{"step": 1}]}), r"histories\['a'\] must log at least one of"),
        (
            lambda: plotting.plot_degradation(
                {k: Degradation(SOME, RISES, 1.0, k, "u", 0) for k in ("rounding", "corruption")}
            ),
            "results must be of one score under one disturbance",
        ),
    ],
)
def test_mistakes_are_answered(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
@processes.patient
def test_neither_matplotlib_nor_pyplot_is_imported_before_it_is_needed():
    code = (
        "import sys, flatlora.plotting as p, flatlora.analysis\n"
        "assert not any(m.startswith('matplotlib') for m in sys.modules), 'on import'\n"
        "assert p.plot_training({'a': [{'step': 1, 'loss': 2.0}]}) is not None\n"
        "assert 'matplotlib.pyplot' not in sys.modules, 'pyplot'"
    )
    done = processes.run_command([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["analysis", "plotting"])
def test_these_packages_never_import_peft(package):
    import ast
    import importlib
    from pathlib import Path

    folder = Path(importlib.import_module(f"flatlora.{package}").__file__).parent
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            ours = [n for n in names if n.startswith("flatlora")]
            assert all(n.startswith(("flatlora.ops", "flatlora.analysis")) for n in ours), (file, ours)
            assert not any(n.split(".")[0] in ("peft", "transformers") for n in names), (file, names)
