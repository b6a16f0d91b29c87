import math
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
import drift
import growth
import measure
import parts
import plot
import roofline
import step
from add_remove import AddAndRemove
from workload import KINDS, METHODS, Lora, Workload, base_model

TINY = Workload("tiny", tokens=16, length=8, r=4, dtype="fp64", adapters="base")
CPU = torch.device("cpu")


@pytest.fixture
def trained():
    return Lora(base_model("tiny", "fp64", CPU), TINY)


def adapted(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def dense_noise(model, rho, seed):
    """eps of every layer by its formula: merged weight, norms of its rows, z of one generator through the layers."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted(model):
        W, A, B = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        norms = (W + layer.scaling["default"] * B @ A).norm(dim=1, keepdim=True)
        yield rho / math.sqrt(W.shape[1]) * norms * torch.empty_like(W).normal_(generator=generator)


def test_add_and_remove_is_the_dense_reference(trained):
    with torch.no_grad():
        epsilon = list(dense_noise(trained.model, 0.1, seed=3))
    layers = adapted(trained.model)
    clean = [layer.base_layer.weight.clone() for layer in layers]
    with AddAndRemove(trained.model, rho=0.1, seed=3).noise():
        loss = trained.loss()
        loss.backward()
    gradients = [p.grad.clone() for p in trained.parameters]
    for layer, W in zip(layers, clean, strict=True):  # restored within the rounding of one sum and one difference
        torch.testing.assert_close(layer.base_layer.weight, W, rtol=0, atol=4 * torch.finfo(W.dtype).eps)

    for layer, W, eps in zip(layers, clean, epsilon, strict=True):
        layer.base_layer.weight = torch.nn.Parameter(W + eps, requires_grad=False)
    trained.optimizer.zero_grad()
    reference = trained.loss()
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-12, atol=0)
    for found, p in zip(gradients, trained.parameters, strict=True):
        torch.testing.assert_close(found, p.grad, rtol=1e-9, atol=1e-14)
    assert any(float(eps.abs().max()) > 1e-3 for eps in epsilon)


def test_add_and_remove_takes_the_noise_out_after_an_error_and_draws_anew(trained):
    scheme = AddAndRemove(trained.model, rho=0.1)
    weight = adapted(trained.model)[0].base_layer.weight
    clean, noisy, state = weight.clone(), [], torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="inside"), scheme.noise():
            noisy.append(weight.clone())
            raise RuntimeError("inside")
        torch.testing.assert_close(weight, clean, rtol=0, atol=1e-15)
    assert not torch.allclose(*noisy)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_step_trains_the_adapters(method, checkpointing):
    work = Workload("tiny", tokens=16, length=8, r=4, dtype="fp32", checkpointing=checkpointing)
    trained = METHODS[method](base_model("tiny", "fp32", CPU), work, 0)
    before = [p.clone() for p in trained.parameters]
    trained()
    assert all(not torch.equal(p, q) and p.isfinite().all() for p, q in zip(trained.parameters, before, strict=True))
    assert all(p.grad is None for p in trained.parameters)


def test_two_passes_take_the_gradient_at_the_moved_factors(trained):
    sam = METHODS["two passes"](base_model("tiny", "fp64", CPU), TINY, 0)
    trained.gradients()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trained.parameters))
    with torch.no_grad():
        for p in trained.parameters:
            p += 0.05 * p.grad / norm
    trained.optimizer.zero_grad()
    trained.gradients()
    sam.gradients()
    for p, q in zip(sam.parameters, trained.parameters, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    "n,k",  # the k-th smallest and largest: tables of the sign test, two-sided 5 %
    [(6, 1), (8, 1), (9, 2), (10, 2), (15, 4), (20, 6), (25, 8), (50, 18), (100, 40)],
)
def test_interval_of_the_median(n, k):
    values = torch.randperm(n).add(1).tolist()
    assert measure.median_interval(values) == (k, n + 1 - k)


def test_interval_of_the_median_of_too_few():
    assert all(math.isnan(end) for end in measure.median_interval([1.0, 2.0, 3.0, 4.0, 5.0]))


def test_ratios_are_paired_by_round():
    lora = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    columns = measure.compared({"lora": lora, "twice": [2 * t for t in lora]}, "lora")
    assert [float(columns["twice"][name]) for name in ("ratio", "ratio low", "ratio high")] == [2, 2, 2]
    assert (float(columns["lora"]["median s"]), float(columns["lora"]["least s"])) == (6, 1)


def test_every_round_has_every_run_once(monkeypatch):
    monkeypatch.setattr(measure, "SHORTEST", 0)
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = measure.alternate(runs, 8)
    assert {name: len(values) for name, values in times.items()} == {"a": 8, "b": 8, "c": 8}
    rounds = [calls[i : i + 3] for i in range(6, len(calls), 3)]
    assert len(rounds) == 8 and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert len(measure.alternate({"a": lambda: time.sleep(0.001)}, 100, limit=0.0)["a"]) == measure.LEAST_ROUNDS


def test_peak_bytes_of_known_allocations():
    def run():
        x = torch.empty(2**20, dtype=torch.uint8)
        y = torch.empty(2**21, dtype=torch.uint8)
        del x
        z = torch.empty(2**19, dtype=torch.uint8)
        return y, z

    assert measure.peak_bytes(run) == 3 * 2**20


@pytest.fixture
def quick(monkeypatch):
    """Single steps on one thread."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(measure, "SHORTEST", 0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "4bit"])
def test_each_kind_trains_as_plain_lora_of_the_same_kind_without_noise(monkeypatch, kind):
    monkeypatch.setattr("workload.RHO", 0.0)
    work = Workload("tiny", tokens=32, length=16, dtype="fp32", kind=kind)
    base = base_model("tiny", "fp32", torch.device("cpu"))
    steps = [METHODS[name](base, work) for name in ("lora", "flat")]
    for one in steps:
        torch.manual_seed(0)
        one()
    assert len({sum("lora_A" in name for name, _ in one.model.named_parameters()) for one in steps}) == 1
    pairs = zip(*(one.parameters for one in steps), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_table_of_kinds_is_that_of_the_page():
    page = (Path(__file__).parents[2] / ".docs/pages/cost.md").read_text()
    assert all(line in page for line in plot.kinds(measure.RESULTS).splitlines()[2:])


@pytest.mark.usefixtures("matplotlib")
def test_step_writes_a_row_per_method_and_goes_on(quick, tmp_path, capsys):
    path = tmp_path / "step.csv"
    arguments = ["--quick", "--dtype", "fp32", "--checkpointing", "off", "--threads", "1"]
    arguments += ["--csv", str(path)]
    step.main([*arguments, "--method", "flat", "add and remove", "--budget", "0"])
    assert not path.exists() and "time is over" in capsys.readouterr().out
    step.main([*arguments, "--method", "flat"])
    rows = measure.read(path)
    assert [(row["r"], row["method"]) for row in rows] == [(r, m) for r in ("8", "16") for m in ("lora", "flat")]
    step.main([*arguments, "--method", "flat", "add and remove"])
    more = measure.read(path)
    assert more[:4] == rows and [row["method"] for row in more[4:]] == ["add and remove"] * 2
    for row in more:
        assert float(row["ratio low"]) <= float(row["ratio"]) <= float(row["ratio high"])
        assert int(row["peak bytes"]) > 0 and int(row["model bytes"]) > 0 and row["rounds"] == "6"
        assert row["command"].startswith("python examples/benchmarks/") and "torch" in row["versions"]
    done = path.read_text()
    step.main([*arguments, "--method", "flat", "add and remove"])
    assert path.read_text() == done

    text = plot.table(tmp_path, "tiny", ["64"], "8")
    assert text.splitlines()[0].count("|") == text.splitlines()[2].count("|") == 7
    plot.main(["--results", str(tmp_path)])
    assert all((tmp_path / f"step_{name}.png").stat().st_size > 10_000 for name in ("time", "memory", "rank"))
    with pytest.raises(ValueError, match="run step.py first"):
        plot.table(tmp_path, "smollm2", ["64"], "8")


def test_a_table_of_other_columns_is_not_added_to(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column 'c'"):
        measure.Table(tmp_path / "t.csv", ["a", "c"])
    table = measure.Table(tmp_path / "t.csv", ["a"])
    assert table.has({"a": 1}) and not table.has({"a": 2})
    with pytest.raises(ValueError, match="other columns"):
        table.add([{"a": 3, "c": 4}])


@pytest.mark.usefixtures("matplotlib")
def test_growth_and_drift(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "TOKENS", 8)
    growth.main(["--quick", "--dtype", "fp32", "--threads", "1", "--csv", str(tmp_path / "growth.csv")])
    assert {row["sweep"] for row in measure.read(tmp_path / "growth.csv")} == {"size", "layers", "threads"}
    drift.main(["--quick", "--csv", str(tmp_path / "drift.csv")])
    last = {(row["dtype"], row["method"]): row for row in measure.read(tmp_path / "drift.csv")}
    for dtype in ("bf16", "fp32"):
        assert last[dtype, "flat"]["changed"] == "0" and last[dtype, "flat"]["relative norm"] == "0"
        assert float(last[dtype, "add and remove"]["changed share"]) > 0.01
    assert {path.name for path in plot.draw(tmp_path)} == {"growth.png", "drift.png"}


def test_drift_of_known_change():
    before = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 0.0])}
    found = drift.drift(before, {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([0.0, 0.0])})
    assert (found["changed"], found["changed share"], found["relative norm"]) == (1, "0.25", "0.1")


@pytest.mark.usefixtures("matplotlib")
def test_roofline_from_its_counts(tmp_path):
    h100 = roofline.GPUS[0]
    assert roofline.limits(h100, "bf16")["memory"] == pytest.approx(4 / 3.35)
    for kernel in ("perturb", "merged"):
        total = sum(roofline.COUNTS[90, kernel, "dense"].values())
        assert roofline.limits(h100, "bf16", kernel)["issue"] == pytest.approx(total / (128 * 132 * 1.83e-3))
    assert roofline.limits(h100, "nf4")["memory"] == pytest.approx((0.5 + 4 / 64 + 2) / 3.35)
    half, whole = (roofline.overhead(h100, "bf16", 4096, u) for u in (0.5, 1.0))
    assert whole == pytest.approx(2 * half) and half == pytest.approx(2 * roofline.overhead(h100, "bf16", 8192, 0.5))
    roofline.main(["--csv", str(tmp_path / "roofline.csv")])
    assert {row["source"] for row in measure.read(tmp_path / "roofline.csv")} == {"computed, not measured"}
    assert [path.name for path in plot.draw(tmp_path)] == ["roofline.png"]


def test_instructions_are_classified():
    text = """
        /*0000*/                   IMAD.WIDE.U32 R4, R0, -0x2daee0ad, RZ ;
        /*0010*/              @!P0 IMAD.MOV.U32 R1, RZ, RZ, R2 ;
        /*0020*/                   LOP3.LUT R5, R5, R6, R7, 0x96, !PT ;
        /*0030*/                   FFMA R5, R5, R6, R7 ;
        /*0040*/                   MUFU.SQRT R5, R5 ;
        /*0050*/                   I2FP.F32.S32 R5, R5 ;
        /*0060*/               @P1 LDG.E.64 R5, desc[UR4][R6.64] ;
        /*0070*/                   NOP;
    """
    expected = {"wide product": 1, "product": 1, "integer": 2, "float": 1, "special": 1, "other": 1}
    assert roofline.classify(text) == expected


def test_innermost_loops_of_a_disassembly():
    text = """
.L_x_0:
 one
.L_x_1:
 two
 @P0 BRA `(.L_x_1) ;
 @P1 BRA `(.L_x_0) ;
 BRA `(.L_x_3) ;
.L_x_2:
 three
 @!P0 BRA `(.L_x_2) ;
.L_x_3:
"""
    first, second = roofline.loops(text)
    assert "two" in first and "one" not in first and "three" in second


def test_a_step_of_a_saved_model(tiny_model):
    work = Workload(str(tiny_model), tokens=16, length=8, r=2)
    trained = METHODS["flat"](base_model(work.model, "bf16", CPU), work, 0)
    trained()
    assert {weight.dtype for weight in trained.frozen().values()} == {torch.bfloat16}
    assert {p.dtype for p in trained.parameters} == {torch.float32}


def test_parts_of_a_step(tmp_path):
    library = parts.native.LIBRARY
    parts.main(
        ["--model", "tiny", "--tokens", "16", "--length", "8", "--rounds", "2", "--csv", str(tmp_path / "p.csv")]
    )
    assert parts.native.LIBRARY is library
    (row,) = measure.read(tmp_path / "p.csv")
    assert 0 < float(row["perturb ms"]) + float(row["add_product ms"]) < 1000 * 60
    assert min(float(row[f"{name} ms"]) for name in parts.METHOD_NAMES) > 0


def test_parts_are_the_time_of_the_calls():
    timed = parts.Timed(type("Library", (), {"flatlora_perturb": staticmethod(lambda seconds: time.sleep(seconds))}))
    timed.flatlora_perturb(0.02)
    timed.flatlora_perturb(0.01)
    assert timed.seconds["perturb"] >= 0.03 and timed.seconds["factor"] == 0
