"""Every public function with right arguments, and which of fifty values are right for each of them."""

import functools
import math
from decimal import Decimal
from pathlib import Path

import numpy as np
import peft
import torch
from torch import nn

import flatlora
from flatlora import analysis, ops, plotting, report
from flatlora.analysis import Degradation, ExpectedSharpness, LossLine, LossSurface, SamSharpness, SpectralDensity

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

# kinds of arguments: the values that are right for them; all others are wrong
NONE = "None"
WORD = ""  # one of some words, none of which is among the values
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
OTHER = ""  # a result, an operator, a tensor of some shape: none is among the values


@functools.cache
def plain():
    return peft.get_peft_model(model(), peft.LoraConfig(**LORA))


@functools.cache
def flat(kind=flatlora.FlatLoraConfig):
    return flatlora.get_flat_peft_model(model(), kind(**LORA, schedule="constant"))


@functools.cache
def hessian():
    return analysis.Hessian(model(), loss, [torch.ones(2, 4)])


@functools.cache
def result(kind):
    return {
        LossLine: lambda: LossLine(LINE, SQUARE, 1.0, "filter", "merged", 0),
        LossSurface: lambda: LossSurface(LINE, LINE, SQUARE, 1.0, "filter", "merged", 0),
        ExpectedSharpness: lambda: ExpectedSharpness(LINE, SQUARE, 1.0, "filter", "merged", 0),
        SamSharpness: lambda: SamSharpness(LINE, SQUARE, SQUARE, 1.0, "merged", 1),
        SpectralDensity: lambda: SpectralDensity(LINE, SQUARE, 1.0, SQUARE, SQUARE, 3),
        Degradation: lambda: Degradation(LINE, SQUARE, 1.0, "rounding", "bits", 0),
        analysis.Estimate: lambda: analysis.Estimate(1.0, 0.1, LINE),
        analysis.Eigenvalues: lambda: analysis.Eigenvalues(ONE(), ONE(), ONE(1)),
    }[kind]()


def made_again(kind):
    return lambda **given: type(result(kind))(**{**vars(result(kind)), **given})


def with_defaults(function, *makers, **defaults):
    """A call with right arguments, but for those given; the values of `makers` are made once, when they are needed."""
    names = ("model", "config", "loss_fn")
    made = dict(zip(names, makers, strict=False))
    return lambda **given: function(**{**{k: v() for k, v in made.items() if k not in given}, **defaults, **given})


def entered(context):
    def call(**given):
        with context(**given):
            pass

    return call


def setting(name):
    return lambda value: setattr(flatlora.perturbation(flat()), name, value)


MEASURED = {
    "model": MODULE, "batches": BATCHES, "seed": INTEGER, "noise": WORD, "space": WORD, "layers": LAYERS, "norms": NONE,
    "sizes": NONE, "progress": OPTIONAL_BOOL, "file": f"None {PATH}",
}  # fmt: skip
LOSS, SCORE = {"loss_fn": FUNCTION}, {"score_fn": FUNCTION, "score": TEXT}
NO_NOISE = {name: kind for name, kind in MEASURED.items() if name not in ("noise", "norms")}
OPERATOR = {"operator": OTHER, "seed": INTEGER, "progress": OPTIONAL_BOOL}
HOW = {"center": ANY_REAL, "noise": WORD, "space": WORD, "seed": INTEGER}
TRAINED = {"rho": RHO, "schedule": WORD, "total_steps": f"None {COUNT}", "on_unsupported": WORD}
DRAWN = {"resample": WORD, "seed": f"None {INTEGER}", "backend": WORD}
FIGURE = {"title": f"None {TEXT}", "theme": WORD, "size": OTHER}
TWO = {"batches": [torch.ones(2, 4)] * 2, "progress": False}


def measured(function, name="loss_fn", **more):
    return lambda **given: function(**{"model": plain(), name: loss, **TWO, **more, **given})


def config(kind, **own):
    return lambda **given: kind(**LORA, **given), {**TRAINED, **own}


def figure(function, name, kind, **more):
    return lambda **given: function(**{name: {"a": result(kind)}, **given}), {name: OTHER, **FIGURE, **more}


X, W, A, B, STD, KEY = (
    torch.ones(2, 4),
    torch.ones(3, 4),
    torch.ones(2, 4),
    torch.ones(3, 2),
    torch.ones(3),
    torch.ones(2, dtype=torch.int64),
)
NOISE = {"row_std": OTHER, "key": OTHER, "layer": INTEGER, "backend": WORD}
NOISY = {"row_std": STD, "key": KEY, "layer": 0}


def with_tensors(function, **right):
    return lambda **given: function(**{**right, **given})


CASES = {
    "flatlora.FlatLoraConfig": config(flatlora.FlatLoraConfig, **DRAWN),
    "flatlora.RwpConfig": config(flatlora.RwpConfig, **DRAWN, space=WORD),
    "flatlora.BarConfig": config(flatlora.BarConfig, variant=WORD),
    "flatlora.BiLoraConfig": config(flatlora.BiLoraConfig, ascent_r=COUNT, seed=f"None {INTEGER}"),
    "flatlora.FMLoraConfig": config(flatlora.FMLoraConfig, rtol="None 0 0.5"),
    "flatlora.EFMLoraConfig": config(flatlora.EFMLoraConfig, rtol="None 0 0.5", beta="0.5 1"),
    "flatlora.LoraSamConfig": config(flatlora.LoraSamConfig),
    "flatlora.FlatLoraConfig.save_pretrained": (flatlora.FlatLoraConfig().save_pretrained, {"save_directory": PATH}),
    "flatlora.FlatLoraConfig.from_pretrained": (
        with_tensors(flatlora.FlatLoraConfig.from_pretrained, pretrained_model_name_or_path="."),
        {"pretrained_model_name_or_path": PATH, "subfolder": f"None {TEXT}"},
    ),
    "flatlora.FlatLoraCallback": (
        with_tensors(flatlora.FlatLoraCallback, sharpness_steps=1, sharpness_batches=[1]),
        {"sharpness_steps": f"None {COUNT}", "sharpness_batches": f"None {BATCHES}",
         "sharpness_loss": f"None {FUNCTION}",
         "sharpness_rho": "None 0.5 1", "sharpness_samples": COUNT},
    ),
    "flatlora.FlatLoraCallback.add_to": (lambda trainer: flatlora.FlatLoraCallback().add_to(trainer),
        {"trainer": OTHER}),
    "flatlora.TwoPassTrainerMixin": (None, {}),  # its step has the arguments that the Trainer gives it
    "flatlora.ascent": (entered(flatlora.ascent), {"model": MODULE}),
    "flatlora.attach": (
        lambda **given: flatlora.attach(**{"model": plain(), **given}),
        {"model": MODULE, **TRAINED, **DRAWN, "adapter_names": NONE},
    ),
    "flatlora.detach": (flatlora.detach, {"model": MODULE}),
    "flatlora.get_flat_peft_model": (
        lambda **given: flatlora.get_flat_peft_model(**{"model": model(), "config": flatlora.FlatLoraConfig(**LORA),
            **given}),
        {"model": MODULE, "config": OTHER, "adapter_name": NAME},
    ),
    "flatlora.load": (
        lambda **given: flatlora.load(**{"model": model(), "path": ".", **given}),
        {"model": MODULE, "path": PATH, "adapter_name": NAME, "is_trainable": BOOL},
    ),
    "flatlora.perturbation": (flatlora.perturbation, {"model": MODULE}),
    "flatlora.unperturbed": (entered(flatlora.unperturbed), {"model": MODULE}),
    "flatlora.perturbed": (
        entered(lambda **given: flatlora.perturbed(**{"model": flat(), **given})),
        {"model": MODULE, "sample": f"None {INDEX}"},
    ),
    **{
        f"flatlora.perturbation.{name}": (lambda name=name, **given: setting(name)(given[name]), {name: kind})
        for name, kind in {
            "rho": RHO, "progress": RHO, "total_steps": f"None {COUNT}", "sample": INDEX, "seed": INTEGER,
            "rank": f"None {INDEX}", "enabled": BOOL,
        }.items()
    },
    "flatlora.analysis.Degradation": (
        made_again(Degradation),
        {"levels": OTHER, "scores": OTHER, "center": ANY_REAL, "disturbance": WORD, "unit": TEXT, "seed": INTEGER,
         "score": TEXT},
    ),
    "flatlora.analysis.Eigenvalues": (
        made_again(analysis.Eigenvalues), {"values": "empty nans", "residuals": OTHER, "vectors": OTHER},
    ),
    "flatlora.analysis.Estimate": (
        made_again(analysis.Estimate), {"estimate": ANY_REAL, "stderr": ANY_REAL, "samples": "empty nans"},
    ),
    "flatlora.analysis.Estimate.of": (analysis.Estimate.of, {"samples": "nans"}),
    "flatlora.analysis.Estimate.interval": (result(analysis.Estimate).interval, {"level": LEVEL}),
    "flatlora.analysis.ExpectedSharpness": (made_again(ExpectedSharpness), {"rho": OTHER, "rises": OTHER, **HOW}),
    "flatlora.analysis.LossLine": (made_again(LossLine), {"distances": OTHER, "losses": OTHER, **HOW}),
    "flatlora.analysis.LossLine.minus": (result(LossLine).minus, {"other": OTHER}),
    "flatlora.analysis.LossLine.interval": (result(LossLine).interval, {"level": LEVEL}),
    "flatlora.analysis.LossSurface": (made_again(LossSurface), {"x": OTHER, "y": OTHER, "losses": OTHER, **HOW}),
    "flatlora.analysis.SamSharpness": (
        made_again(SamSharpness),
        {"rho": OTHER, "rises": OTHER, "first_order": OTHER, "center": ANY_REAL, "space": WORD, "steps": COUNT},
    ),
    "flatlora.analysis.SpectralDensity": (
        made_again(SpectralDensity),
        {"eigenvalues": OTHER, "densities": OTHER, "width": ABOVE_ZERO, "nodes": OTHER, "weights": OTHER,
         "size": COUNT},
    ),
    "flatlora.analysis.Hessian": (measured(lambda progress, **given: analysis.Hessian(**given)), {
        **LOSS, **{name: NO_NOISE[name] for name in ("model", "batches", "space", "layers", "sizes")},
    }),
    "flatlora.analysis.Hessian.split": (lambda **given: hessian().split(**given), {"vector": OTHER}),
    "flatlora.analysis.Hessian.__matmul__": (lambda vector: hessian() @ vector, {"vector": OTHER}),
    "flatlora.analysis.hessian_vector_product": (
        lambda **given: analysis.hessian_vector_product(
            **{"model": plain(), "loss_fn": loss, "batches": TWO["batches"], "vectors": {"0": torch.ones(3, 4)},
                **given}
        ),
        {**LOSS, "vectors": OTHER, **{name: NO_NOISE[name] for name in ("model", "batches", "space", "layers",
         "sizes")}},
    ),
    "flatlora.analysis.top_eigenvalues": (
        lambda **given: analysis.top_eigenvalues(**{"operator": hessian(), "progress": False, **given}),
        {**OPERATOR, "count": COUNT, "smallest": BOOL, "steps": f"None {COUNT}", "tolerance": "0 0.5 1 1e300 2**64"},
    ),
    "flatlora.analysis.trace": (
        lambda **given: analysis.trace(**{"operator": hessian(), "progress": False, **given}), {**OPERATOR,
            "samples": COUNT},
    ),
    "flatlora.analysis.spectral_density": (
        lambda **given: analysis.spectral_density(**{"operator": hessian(), "progress": False, **given}),
        {**OPERATOR, "samples": COUNT, "steps": COUNT, "points": COUNT, "width": f"None {ABOVE_ZERO}"},
    ),
    "flatlora.analysis.add_noise": (analysis.add_noise, {"field": FIELD}),
    "flatlora.analysis.replace_tokens": (
        with_tensors(analysis.replace_tokens, vocabulary=5), {"vocabulary": COUNT, "field": FIELD, "keep": INTEGERS},
    ),
    "flatlora.analysis.expected_sharpness": (
        measured(analysis.expected_sharpness), {**MEASURED, **LOSS, "rho": STRENGTHS, "samples": COUNT},
    ),
    "flatlora.analysis.sam_sharpness": (
        measured(analysis.sam_sharpness), {**NO_NOISE, **LOSS, "rho": STRENGTHS, "steps": COUNT, "per_batch": BOOL},
    ),
    "flatlora.analysis.loss_line": (
        measured(analysis.loss_line), {**MEASURED, **LOSS, "distances": f"None {REALS}", "directions": COUNT},
    ),
    "flatlora.analysis.loss_surface": (
        measured(analysis.loss_surface), {**MEASURED, **LOSS, "x": f"None {REALS}", "y": f"None {REALS}"},
    ),
    "flatlora.analysis.merged_row_norms": (
        lambda **given: analysis.merged_row_norms(**{"model": plain(), **given}),
        {"model": MODULE, "layers": LAYERS, "space": WORD},
    ),
    "flatlora.analysis.under_weight_noise": (
        measured(analysis.under_weight_noise, "score_fn"), {**MEASURED, **SCORE, "rho": STRENGTHS, "samples": COUNT},
    ),
    "flatlora.analysis.under_rounding": (
        measured(analysis.under_rounding, "score_fn"),
        {**SCORE, "bits": OTHER, **{k: MEASURED[k] for k in ("model", "batches", "layers", "progress", "file")}},
    ),
    "flatlora.analysis.under_corruption": (
        measured(analysis.under_corruption, "score_fn", corrupt=lambda batch, level, generator: batch, levels=[1]),
        {**SCORE, **{k: MEASURED[k] for k in ("model", "batches", "seed", "sizes", "progress", "file")},
         "corrupt": FUNCTION, "levels": REALS, "samples": COUNT, "unit": TEXT},
    ),
    "flatlora.analysis.save": (
        lambda **given: analysis.save(**{"result": result(LossLine), "path": "x", **given}), {"result": OTHER,
            "path": PATH},
    ),
    "flatlora.analysis.load": (analysis.load, {"path": PATH}),
    "flatlora.plotting.plot_loss_line": figure(plotting.plot_loss_line, "lines", LossLine, level=LEVEL, relative=BOOL),
    "flatlora.plotting.plot_sharpness": figure(plotting.plot_sharpness, "results", SamSharpness, level=LEVEL),
    "flatlora.plotting.plot_degradation": figure(plotting.plot_degradation, "results", Degradation, level=LEVEL),
    "flatlora.plotting.plot_spectrum": figure(plotting.plot_spectrum, "spectra", SpectralDensity),
    "flatlora.plotting.plot_surface": (
        lambda **given: plotting.plot_surface(**{"surfaces": {"a": result(LossSurface)}, **given}),
        {"surfaces": OTHER, "kind": WORD, **FIGURE, "size": NONE},
    ),
    "flatlora.plotting.plot_training": (
        with_tensors(plotting.plot_training, histories={"a": [{"step": 1, "loss": 1.0}]}), {"histories": OTHER,
            **FIGURE},
    ),
    "flatlora.report.build": (with_tensors(report.build, runs=["."]), {"runs": "['x']", "labels": "None ['x']"}),
    "flatlora.report.main": (report.main, {"arguments": "None [] () set ['x'] np.empty"}),
    "flatlora.ops.RowNoise": (
        lambda **given: ops.lora_linear(X, W, None, A, B, 1.0, ops.RowNoise(**{"norms": STD, "relative": 1.0,
            "key": KEY, "layer": 0, **given})),
        {"norms": OTHER, "relative": ANY_REAL, "key": OTHER, "layer": INTEGER, "stale": BOOL},
    ),
    "flatlora.ops.lora_linear": (
        with_tensors(ops.lora_linear, x=X, weight=W, bias=None, A=A, B=B, scaling=1.0, noise=ops.RowNoise(STD, 1.0,
            KEY, 0)),
        {"x": OTHER, "weight": OTHER, "bias": NONE, "A": OTHER, "B": OTHER, "scaling": ANY_REAL, "noise": NONE,
         "dropped": NONE, "backend": WORD, "began": f"None {FUNCTION}"},
    ),
    "flatlora.ops.perturbed_linear": (
        with_tensors(ops.perturbed_linear, x=X, weight=W, bias=None, **NOISY), {"x": OTHER, "weight": OTHER,
            "bias": NONE, **NOISE},
    ),
    "flatlora.ops.rebuilt_linear": (
        with_tensors(ops.rebuilt_linear, x=X, weight=W, bias=None, **NOISY), {"x": OTHER, "weight": OTHER,
            "bias": NONE, **NOISE},
    ),
    "flatlora.ops.perturbed_conv": (
        with_tensors(ops.perturbed_conv, x=torch.ones(2, 4, 5), weight=torch.ones(3, 4, 1), bias=None, **NOISY,
            stride=(1,),
                     padding=(0,), dilation=(1,), groups=1),
        {"x": OTHER, "weight": OTHER, "bias": NONE, **NOISE, "groups": COUNT},
    ),
    "flatlora.ops.add_noise_": (
        lambda **given: ops.add_noise_(**{"weight": W.clone(), **NOISY, **given}), {"weight": OTHER, **NOISE,
            "transposed": BOOL},
    ),
    "flatlora.ops.perturb_weight": (
        with_tensors(ops.perturb_weight, weight=W, **NOISY),
        {"weight": OTHER, **NOISE, "first_row": INDEX, "dtype": "None dtype", "out": NONE, "relative": ANY_REAL,
         "factors": NONE},
    ),
    "flatlora.ops.row_noise": (
        with_tensors(ops.row_noise, rows=torch.arange(3), **NOISY, columns=4),
        {"rows": OTHER, **NOISE, "columns": INDEX, "dtype": "None dtype"},
    ),
    "flatlora.ops.merged_row_norms": (
        with_tensors(ops.merged_row_norms, weight=W, squared=None, B=B, A=A),
        {"weight": OTHER, "squared": NONE, "B": OTHER, "A": OTHER, "scaling": ANY_REAL, "whole": NONE},
    ),
    "flatlora.ops.squared_row_norms": (ops.squared_row_norms, {"weight": OTHER}),
    "flatlora.ops.sums_merged_rows": (ops.sums_merged_rows, {"weight": TENSOR}),
    "flatlora.ops.makes_norms": (with_tensors(ops.makes_norms, weight=W, backend="auto"), {"weight": TENSOR,
        "backend": WORD}),
    "flatlora.ops.resolve_backend": (
        with_tensors(ops.resolve_backend, backend="auto", device=torch.device("cpu")), {"backend": WORD,
            "device": "device"},
    ),
    "flatlora.ops.row_norms_of_sum": (
        with_tensors(ops.row_norms_of_sum, squared=STD, cross=torch.ones(2, 3), B=B, A=A),
        {"squared": "empty nans", "cross": OTHER, "B": OTHER, "A": OTHER, "scaling": ANY_REAL},
    ),
}  # fmt: skip
