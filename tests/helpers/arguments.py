"""Every public function with valid arguments, and which of fifty values are valid for each argument."""

import functools
import inspect
import math
from decimal import Decimal
from pathlib import Path

import numpy as np
import peft
import torch
from torch import nn

import flatlora
from flatlora import analysis, ops, plotting, report
from flatlora.analysis import (
    Degradation,
    Eigenvalues,
    Estimate,
    ExpectedSharpness,
    LossLine,
    LossSurface,
    SamSharpness,
    SpectralDensity,
)
from flatlora.config import own_fields

LORA = {"r": 2, "target_modules": ["0"]}
LINE = torch.linspace(0, 1, 3, dtype=torch.float64)
SQUARE = torch.ones(3, 3, dtype=torch.float64)
ONE = functools.partial(torch.ones, 1, dtype=torch.float64)


class Mute:
    def __repr__(self):
        raise RuntimeError("no repr")


def model():
    return nn.Sequential(nn.Linear(4, 3))


def loss(model, batch):
    return model(batch).square().mean()


VALUES = {
    "None": None, "True": True, "False": False, "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "-1": -1,
    "-0.5": -0.5, "0": 0, "0.5": 0.5, "1": 1, "1e300": 1e300, "10**400": 10**400, "-10**400": -(10**400),
    "2**64": 2**64, "1j": 1j, "'x'": "x", "''": "", "'0.1'": "0.1", "nul": "a\0b", "b'x'": b"x",
    "bytearray": bytearray(b"1"), "[]": [], "()": (), "{}": {}, "set": set(), "[None]": [None], "['x']": ["x"],
    "[nan]": [math.nan], "[-1]": [-1], "{1:2}": {1: 2}, "{'x':None}": {"x": None}, "object": object(), "int": int,
    "mute": Mute(), "lambda": lambda *args: None, "iter": iter(()), "...": ..., "empty": torch.empty(0),
    "nans": torch.full((2,), math.nan), "whole": torch.ones(2, 2, dtype=torch.int64), "1jt": torch.tensor(1j),
    "meta": torch.empty((), device="meta"), "dtype": torch.float32, "device": torch.device("cpu"),
    "np.empty": np.array([]), "np.nan": np.float64("nan"), "np.x": np.array("x"), "date": np.datetime64("2024-01-01"),
    "decimal": Decimal("0.5"), "path": Path("x\0y"), "model": model(),
}  # fmt: skip

# kinds of arguments: names of their valid values
NONE = "None"
WORD = ""  # a keyword; none of the values is one
RHO, LEVEL, ABOVE_ZERO = "0 0.5 1", "0.5", "0.5 1 1e300 2**64"
COUNT, INDEX, INTEGER = "1", "0 1", "-1 0 1"
STRENGTHS = "0 0.5 1 1e300 2**64 whole"
REALS = f"{STRENGTHS} -1 -0.5 [-1]"
ANY_REAL = "-1 -0.5 0 0.5 1 1e300 2**64 nan inf -inf np.nan"
INTEGERS = "-1 0 1 [] () [-1] whole empty np.empty"
BOOL, OPTIONAL_BOOL = "True False", "None True False"
TEXT, NAME, PATH = "'x' '' '0.1' nul", "'x' '0.1' nul", "'x' '0.1'"
FIELD = f"None {TEXT} {INTEGER}"
FUNCTION, LAYERS = "lambda int model", "None lambda int model"
MODULE, BATCHES = "model", "[None] ['x'] [nan] [-1] nans whole"
TENSOR = "empty nans whole 1jt meta"
OTHER = ""  # a result, an operator, a tensor of some shape; none of the values is one


@functools.cache
def plain():
    return peft.get_peft_model(model(), peft.LoraConfig(**LORA))


@functools.cache
def flat():
    return flatlora.get_flat_peft_model(model(), flatlora.FlatLoraConfig(**LORA, schedule="constant"))


@functools.cache
def hessian():
    return analysis.Hessian(model(), loss, [torch.ones(2, 4)])


RESULTS = {
    LossLine: LossLine(LINE, SQUARE, 1.0, "filter", "merged", 0),
    LossSurface: LossSurface(LINE, LINE, SQUARE, 1.0, "filter", "merged", 0),
    ExpectedSharpness: ExpectedSharpness(LINE, SQUARE, 1.0, "filter", "merged", 0),
    SamSharpness: SamSharpness(LINE, SQUARE, SQUARE, 1.0, "merged", 1),
    SpectralDensity: SpectralDensity(LINE, SQUARE, 1.0, SQUARE, SQUARE, 3),
    Degradation: Degradation(LINE, SQUARE, 1.0, "rounding", "bits", 0),
    Estimate: Estimate(1.0, 0.1, LINE),
    Eigenvalues: Eigenvalues(ONE(), ONE(), ONE(1)),
}
KINDS = {  # kinds of arguments with the same meaning in most functions; for all others no value is valid
    "model": MODULE, "batches": BATCHES, "seed": INTEGER, "layers": LAYERS, "sizes": NONE, "progress": OPTIONAL_BOOL,
    "file": f"None {PATH}", "path": PATH, "loss_fn": FUNCTION, "score_fn": FUNCTION, "score": TEXT, "unit": TEXT,
    "rho": STRENGTHS, "samples": COUNT, "steps": COUNT, "center": ANY_REAL, "level": LEVEL, "title": f"None {TEXT}",
    "norms": NONE, "total_steps": f"None {COUNT}", "layer": INTEGER, "bias": NONE, "scaling": ANY_REAL,
    "relative": ANY_REAL, "dtype": "None dtype", "adapter_name": NAME, "field": FIELD,
}  # fmt: skip


def case(function, right=None, *, of=None, call=None, skip=(), **kinds):
    """Describe a public function or class, and how to call it.

    Args:
        right: valid arguments.
        of: names of its arguments; by default all of its signature.
        call: the function to call in its place.
        skip: arguments to ignore.
        kinds: kinds of arguments that differ from `KINDS`.

    Returns:
        The call, and the kind of each argument.
    """
    found = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = [name for name in of or found if name not in skip]
    assert kinds.keys() <= set(names)
    run = call or function
    return lambda **given: run(**{**(right or {}), **given}), {n: kinds.get(n, KINDS.get(n, OTHER)) for n in names}


def config(kind, **kinds):
    kinds = {"rho": RHO, **({"seed": f"None {INTEGER}"} if "seed" in own_fields(kind) else {}), **kinds}
    return case(kind, LORA, of=sorted(own_fields(kind)), **kinds)


def made(kind, **kinds):
    return case(kind, vars(RESULTS[kind]), **kinds)


def figure(function, name, kind, **kinds):
    return case(function, {name: {"a": RESULTS[kind]}}, **kinds)


def measured(function, name="loss_fn", more=None, **kinds):
    right = {"model": plain(), name: loss, "batches": [torch.ones(2, 4)] * 2, **(more or {})}
    return case(function, right, **kinds)


def entered(context):
    def call(**given):
        with context(**given):
            pass

    return call


def attribute(name, kind):
    return lambda **given: setattr(flatlora.perturbation(flat()), name, given[name]), {name: kind}


X, W, A, B, STD = torch.ones(2, 4), torch.ones(3, 4), torch.ones(2, 4), torch.ones(3, 2), torch.ones(3)
KEY = torch.ones(2, dtype=torch.int64)
NOISY, LINEAR = {"row_std": STD, "key": KEY, "layer": 0}, {"x": X, "weight": W, "bias": None}
ROW_NOISE = {"norms": STD, "relative": 1.0, "key": KEY, "layer": 0}
LORA_LINEAR = {**LINEAR, "A": A, "B": B, "scaling": 1.0, "noise": ops.RowNoise(**ROW_NOISE)}
CONV = {"x": torch.ones(2, 4, 5), "weight": W[..., None], "stride": (1,), "padding": (0,), "dilation": (1,)}


def with_noise(**given):
    return ops.lora_linear(**{**LORA_LINEAR, "noise": ops.RowNoise(**given)})


OF_LIBRARY = {
    "FlatLoraConfig": config(flatlora.FlatLoraConfig),
    "RwpConfig": config(flatlora.RwpConfig),
    "BarConfig": config(flatlora.BarConfig),
    "BiLoraConfig": config(flatlora.BiLoraConfig, ascent_r=COUNT),
    "FMLoraConfig": config(flatlora.FMLoraConfig, rtol="None 0 0.5"),
    "EFMLoraConfig": config(flatlora.EFMLoraConfig, rtol="None 0 0.5", beta="0.5 1"),
    "LoraSamConfig": config(flatlora.LoraSamConfig),
    "FlatLoraConfig.save_pretrained": case(flatlora.FlatLoraConfig().save_pretrained, save_directory=PATH),
    "FlatLoraConfig.from_pretrained": case(
        flatlora.FlatLoraConfig.from_pretrained, {"pretrained_model_name_or_path": "."},
        pretrained_model_name_or_path=PATH, subfolder=f"None {TEXT}",
    ),
    "FlatLoraCallback": case(
        flatlora.FlatLoraCallback, {"sharpness_steps": 1, "sharpness_batches": [1]}, sharpness_steps=f"None {COUNT}",
        sharpness_batches=f"None {BATCHES}", sharpness_loss=f"None {FUNCTION}", sharpness_rho="None 0.5 1",
        sharpness_samples=COUNT,
    ),
    "FlatLoraCallback.add_to": case(flatlora.FlatLoraCallback().add_to),
    "TwoPassTrainerMixin": case(flatlora.TwoPassTrainerMixin, of=[]),  # the Trainer calls it
    "ascent": case(flatlora.ascent, call=entered(flatlora.ascent)),
    "attach": case(flatlora.attach, {"model": plain()}, rho=RHO, seed=f"None {INTEGER}", adapter_names=NONE),
    "detach": case(flatlora.detach),
    "get_flat_peft_model": case(
        flatlora.get_flat_peft_model, {"model": model(), "config": flatlora.FlatLoraConfig(**LORA)}
    ),
    "load": case(flatlora.load, {"model": model(), "path": "."}, is_trainable=BOOL),
    "perturbation": case(flatlora.perturbation),
    "unperturbed": case(flatlora.unperturbed, call=entered(flatlora.unperturbed)),
    "perturbed": case(
        flatlora.perturbed,
        {"model": flat()},
        call=entered(flatlora.perturbed),
        sample=f"None {INDEX}",
        rho=f"None {RHO}",
    ),
    "averaged": case(flatlora.averaged, {"model": flat()}, samples=COUNT, rho=f"None {RHO}", of=WORD),
    "perturbation.rho": attribute("rho", RHO),
    "perturbation.progress": attribute("progress", RHO),
    "perturbation.total_steps": attribute("total_steps", f"None {COUNT}"),
    "perturbation.sample": attribute("sample", INDEX),
    "perturbation.steps": attribute("steps", INDEX),
    "perturbation.seed": attribute("seed", INTEGER),
    "perturbation.rank": attribute("rank", f"None {INDEX}"),
    "perturbation.enabled": attribute("enabled", BOOL),
}  # fmt: skip
OF_ANALYSIS = {
    "Degradation": made(Degradation),
    "Eigenvalues": made(Eigenvalues, values="empty nans"),
    "Estimate": made(Estimate, estimate=ANY_REAL, stderr=ANY_REAL, samples="empty nans"),
    "Estimate.of": case(Estimate.of, samples="nans"),
    "Estimate.interval": case(RESULTS[Estimate].interval),
    "ExpectedSharpness": made(ExpectedSharpness, rho=OTHER),
    "LossLine": made(LossLine),
    "LossLine.minus": case(RESULTS[LossLine].minus),
    "LossLine.interval": case(RESULTS[LossLine].interval),
    "LossSurface": made(LossSurface),
    "SamSharpness": made(SamSharpness, rho=OTHER),
    "SpectralDensity": made(SpectralDensity, width=ABOVE_ZERO, size=COUNT),
    "Hessian": measured(analysis.Hessian),
    "Hessian.split": case(hessian().split),
    "Hessian.__matmul__": case(hessian().__matmul__),
    "hessian_vector_product": measured(analysis.hessian_vector_product, more={"vectors": {"0": torch.ones(3, 4)}}),
    "top_eigenvalues": case(
        analysis.top_eigenvalues, {"operator": hessian()}, count=COUNT, smallest=BOOL, steps=f"None {COUNT}",
        tolerance="0 0.5 1 1e300 2**64",
    ),
    "trace": case(analysis.trace, {"operator": hessian()}),
    "spectral_density": case(
        analysis.spectral_density, {"operator": hessian()}, points=COUNT, width=f"None {ABOVE_ZERO}"
    ),
    "add_noise": case(analysis.add_noise),
    "replace_tokens": case(analysis.replace_tokens, {"vocabulary": 5}, vocabulary=COUNT, keep=INTEGERS),
    "expected_sharpness": measured(analysis.expected_sharpness),
    "sam_sharpness": measured(analysis.sam_sharpness, per_batch=BOOL),
    "loss_line": measured(analysis.loss_line, distances=f"None {REALS}", directions=COUNT),
    "loss_surface": measured(analysis.loss_surface, x=f"None {REALS}", y=f"None {REALS}"),
    "merged_row_norms": case(analysis.merged_row_norms, {"model": plain()}),
    "under_weight_noise": measured(analysis.under_weight_noise, "score_fn"),
    "under_rounding": measured(analysis.under_rounding, "score_fn"),
    "under_corruption": measured(
        analysis.under_corruption, "score_fn", {"corrupt": lambda batch, level, generator: batch, "levels": [1]},
        corrupt=FUNCTION, levels=REALS,
    ),
    "save": case(analysis.save, {"result": RESULTS[LossLine], "path": "x"}),
    "load": case(analysis.load),
}  # fmt: skip
OF_PLOTTING = {
    "plot_loss_line": figure(plotting.plot_loss_line, "lines", LossLine, relative=BOOL),
    "plot_sharpness": figure(plotting.plot_sharpness, "results", SamSharpness),
    "plot_degradation": figure(plotting.plot_degradation, "results", Degradation),
    "plot_spectrum": figure(plotting.plot_spectrum, "spectra", SpectralDensity),
    "plot_surface": figure(plotting.plot_surface, "surfaces", LossSurface, size=NONE),
    "plot_training": case(plotting.plot_training, {"histories": {"a": [{"step": 1, "loss": 1.0}]}}),
}
OF_REPORT = {
    "build": case(report.build, {"runs": ["."]}, runs="['x']", labels="None ['x']", introduction=TEXT),
    "main": case(report.main, arguments="None [] () set ['x'] np.empty"),
}
OF_OPS = {
    "RowNoise": case(ops.RowNoise, ROW_NOISE, call=with_noise, norms=OTHER, compute_norms=BOOL, stale=OPTIONAL_BOOL),
    "lora_linear": case(ops.lora_linear, LORA_LINEAR, noise=NONE, dropped=NONE, owner=INDEX),
    "perturbed_linear": case(
        ops.perturbed_linear, {**LINEAR, **NOISY}, owner=INDEX, first_row=INDEX, first_column=INDEX
    ),
    "rebuilt_linear": case(ops.rebuilt_linear, {**LINEAR, **NOISY}),
    "perturbed_conv": case(  # torch checks the geometry
        ops.perturbed_conv, {**CONV, "bias": None, "groups": 1, **NOISY}, skip=["stride", "padding", "dilation"],
        groups=COUNT,
    ),
    "add_noise_": case(ops.add_noise_, {"weight": W.clone(), **NOISY}, transposed=BOOL),
    "perturb_weight": case(
        ops.perturb_weight, {"weight": W, **NOISY}, first_row=INDEX, first_column=INDEX, out=NONE, factors=NONE
    ),
    "row_noise": case(ops.row_noise, {"rows": torch.arange(3), **NOISY, "columns": 4}, columns=INDEX),
    "merged_row_norms": case(
        ops.merged_row_norms, {"weight": W, "squared": None, "B": B, "A": A}, squared=NONE, whole=NONE
    ),
    "squared_row_norms": case(ops.squared_row_norms),
    "sums_merged_rows": case(ops.sums_merged_rows, weight=TENSOR),
    "makes_norms": case(ops.makes_norms, {"weight": W, "backend": "auto"}, weight=TENSOR),
    "resolve_backend": case(
        ops.resolve_backend, {"backend": "auto", "device": torch.device("cpu")}, device="device"
    ),
    "row_norms_of_sum": case(
        ops.row_norms_of_sum, {"squared": STD, "cross": torch.ones(2, 3), "B": B, "A": A}, squared="empty nans"
    ),
}  # fmt: skip
ROOMS = {"": OF_LIBRARY, "analysis": OF_ANALYSIS, "plotting": OF_PLOTTING, "report": OF_REPORT, "ops": OF_OPS}
CASES = {f"{room}.{name}".strip("."): case for room, cases in ROOMS.items() for name, case in cases.items()}
