"""Scores under noise, rounding and corruption; results in files."""

import copy
import math

import pytest
import torch
from helpers.landscapes import Quadratic, Snapshot, draws_from_all, token_loss, value
from peft import LoraConfig, get_peft_model
from torch import nn

from flatlora.analysis import (
    Degradation,
    Hessian,
    add_noise,
    expected_sharpness,
    load,
    loss_line,
    loss_surface,
    replace_tokens,
    sam_sharpness,
    save,
    spectral_density,
    top_eigenvalues,
    trace,
    under_corruption,
    under_rounding,
    under_weight_noise,
)
from flatlora.analysis.disturbance import round_rows


def test_weight_noise_is_the_expected_sharpness_seen_from_below(net, ids):
    before = Snapshot(net)
    noisy = under_weight_noise(net, token_loss, ids, rho=[0, 0.3], samples=3)
    before.assert_same()
    sharp = expected_sharpness(net, token_loss, ids, rho=[0, 0.3], samples=3)
    torch.testing.assert_close(noisy.scores - noisy.center, sharp.rises)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_of_rows(bits):
    w = torch.randn(5, 40, dtype=torch.float64)
    w[3] = 0
    rounded = round_rows(w, bits)
    scale = w.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((rounded - w).abs() <= scale / 2 + 1e-12).all() and (rounded[3] == 0).all()
    assert all(len(row.unique()) <= 2**bits - 1 for row in rounded)
    assert torch.equal(rounded.abs().amax(dim=1), w.abs().amax(dim=1))


def test_rounding_rounds_the_merged_weight_not_the_base():
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
        LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False),
    )
    batches = [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(3)]
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    before = Snapshot(model)
    found = under_rounding(model, loss, iter(batches), bits=(8, 3))
    before.assert_same()
    for p, bits in enumerate((8, 3)):
        merged = copy.deepcopy(model).merge_and_unload()
        with torch.no_grad():
            for k in (0, 2):
                merged[k].weight.copy_(round_rows(merged[k].weight, bits))
            expected = torch.tensor([loss(merged, b).item() for b in batches], dtype=torch.float64)
        torch.testing.assert_close(found.scores[:, p], expected, rtol=1e-5, atol=1e-6)
    dora = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(target_modules=["0"], use_dora=True))
    with pytest.raises(ValueError, match="'0': its merged weight cannot be rounded in place; merge the adapter first"):
        under_rounding(dora, loss, batches)
    with pytest.raises(ValueError, match=r"bits must be one or more integers >= 2, got \[1\]"):
        under_rounding(model, loss, batches, bits=[1])


def test_corruption_is_the_same_for_every_model_and_level(net, ids):
    before, seen = Snapshot(net), []

    def spy(model, batch):
        seen.append(batch)
        return token_loss(model, batch)

    corrupt = replace_tokens(11, field=None, keep=[0])
    first = under_corruption(net, spy, ids, corrupt, levels=[0, 0.2, 1.0], samples=2)
    before.assert_same()
    clean, low, all_of_it = seen[0], seen[4], seen[6]
    assert torch.equal(clean, ids[0]) and (first.scores[:, 0] == first.center).all()
    changed = low != clean
    assert changed.any() and torch.equal(low[changed], all_of_it[changed])  # a higher level changes more, not others
    assert torch.equal(all_of_it[clean == 0], clean[clean == 0])
    again = under_corruption(net, token_loss, ids, corrupt, levels=[0, 0.2, 1.0], samples=2)
    assert torch.equal(first.scores, again.scores)
    assert (first.minus(again).mean == 0).all()


@pytest.mark.parametrize(
    "batch, field",
    [
        (torch.ones(3, 4), None),
        ((torch.ones(3, 4), 1), 0),
        ([1, torch.ones(3, 4)], -1),
        ({"x": torch.ones(3, 4)}, "x"),
    ],
)
def test_noise_on_one_field_of_a_batch(batch, field):
    x = batch if field is None else batch[field]
    x[0] = 0
    original = x.clone()
    out = add_noise(field)(batch, 0.5, torch.Generator().manual_seed(0))
    assert type(out) is type(batch) and torch.equal(x, original)
    moved = out if field is None else out[field]
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved, original + 0.5 * original.std() * z)


def test_tokens_at_a_position_from_the_end_are_replaced():
    batch = torch.zeros(4, 50, dtype=torch.long), torch.zeros(4, 50, dtype=torch.long)
    out = [replace_tokens(9, field=k)(batch, 1.0, torch.Generator().manual_seed(0)) for k in (1, -1)]
    assert torch.equal(out[0][1], out[1][1]) and out[1][1].any() and not out[1][0].any()
    with pytest.raises(IndexError):
        replace_tokens(9, field=-3)(batch, 1.0, torch.Generator())


def test_surface_holds_the_lines():
    model = Quadratic(slope=1.0)
    before = Snapshot(model)
    surface = loss_surface(model, value, model.batches, x=[-1, 0, 0.5], y=[0, 0.7])
    before.assert_same()
    line = loss_line(model, value, model.batches, distances=[-1, 0, 0.5], directions=1)
    assert surface.losses.shape == (2, 3)
    torch.testing.assert_close(surface.losses[0], line.losses[0])
    along = loss_line(model, value, model.batches, distances=[0.7], directions=2)
    torch.testing.assert_close(surface.losses[1, 1], along.losses[1, 0])


def test_results_come_back_from_files(tmp_path):
    model = Quadratic(slope=1.0)
    args = model, value, model.batches
    results = [
        loss_line(*args, distances=[-1, 1]),
        loss_surface(*args, x=[-1, 1], y=[0.5]),
        expected_sharpness(*args, samples=2),
        sam_sharpness(*args),
        Degradation(torch.ones(1), torch.full((1, 1), math.nan), 1.0, "rounding", "bits per weight", 0),
    ]
    for k, result in enumerate(results):
        save(result, tmp_path / f"deep/{k}.json")
        again = load(tmp_path / f"deep/{k}.json")
        assert type(again) is type(result)
        for name, kept in vars(result).items():
            got = getattr(again, name)
            tensor = torch.is_tensor(kept)
            assert torch.equal(got.nan_to_num(-1), kept.nan_to_num(-1).double()) if tensor else got == kept, name
    with pytest.raises(ValueError, match="result must be one of .*, got dict"):
        save({}, tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"result": "LossLine"}')
    with pytest.raises(ValueError, match="path must be a file that save"):
        load(tmp_path / "x.json")


MEASUREMENTS = {
    "line": lambda m, loss, ids, **kw: loss_line(m, loss, ids, distances=[-0.1, 0.1], directions=2, **kw),
    "surface": lambda m, loss, ids, **kw: loss_surface(m, loss, ids, x=[-0.1, 0.1], y=[-0.1, 0.1], **kw),
    "sharpness": lambda m, loss, ids, **kw: expected_sharpness(m, loss, ids, rho=[0.1, 0.2], samples=2, **kw),
    "sam": lambda m, loss, ids, **kw: sam_sharpness(m, loss, ids, rho=[0.1, 0.2], steps=2, **kw),
    "noise": lambda m, loss, ids, **kw: under_weight_noise(m, loss, ids, rho=[0.1, 0.2], samples=2, **kw),
    "rounding": lambda m, loss, ids, **kw: under_rounding(m, loss, ids, bits=[4, 3], **kw),
    "corruption": lambda m, loss, ids, **kw: under_corruption(
        m, loss, ids, replace_tokens(11, None), levels=[0.2, 0.4], samples=2, **kw
    ),
}
every_measurement = pytest.mark.parametrize("measure", MEASUREMENTS.values(), ids=MEASUREMENTS)
HESSIANS = {
    "trace": lambda m, loss, ids: trace(Hessian(m, loss, ids), samples=2),
    "eigenvalues": lambda m, loss, ids: top_eigenvalues(Hessian(m, loss, ids), steps=2),
    "spectrum": lambda m, loss, ids: spectral_density(Hessian(m, loss, ids), samples=2, steps=2),
}


@pytest.mark.parametrize("measure", (MEASUREMENTS | HESSIANS).values(), ids=MEASUREMENTS | HESSIANS)
def test_every_generator_is_put_back_also_after_an_exception(measure, net, ids):
    calls = []

    def breaks(model, batch):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return draws_from_all(model, batch)

    before = Snapshot(net)
    measure(net, draws_from_all, ids)
    before.assert_same()
    with pytest.raises(KeyboardInterrupt):
        measure(net, breaks, ids)
    before.assert_same()


@every_measurement
def test_an_interrupted_measurement_goes_on_from_its_file(measure, net, ids, tmp_path):
    calls = {"first": 0, "again": 0}

    def count(name, stop=None):
        def loss(model, batch):
            calls[name] += 1
            if calls[name] == stop:
                raise KeyboardInterrupt
            return token_loss(model, batch)

        return loss

    whole = measure(net, count("first"), ids)
    total, calls["first"] = calls["first"], 0
    file = tmp_path / "journal.jsonl"
    with pytest.raises(KeyboardInterrupt):
        measure(net, count("first", stop=total - 1), ids, file=file)
    again = measure(net, count("again"), ids, file=file)
    assert calls["again"] <= total - 2  # most of it was in the file
    assert (
        torch.equal(getattr(again, again.SAMPLES), getattr(whole, whole.SAMPLES))
        if hasattr(again, "SAMPLES")
        else (torch.equal(again.losses, whole.losses))
    )
    if measure is not MEASUREMENTS["corruption"]:  # which displaces no weight
        with pytest.raises(ValueError, match="differs in weights"):
            measure(net, token_loss, ids, file=file, layers=lambda name: name != "linear")
    net.head.weight.data += 1
    with pytest.raises(ValueError, match="another model"):
        measure(net, token_loss, ids, file=file)
