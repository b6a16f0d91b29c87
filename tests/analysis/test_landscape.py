"""Loss lines: closed forms, a model whose weights are really displaced, and a model that stays as it was."""

import copy
import gc
import weakref

import pytest
import torch
from helpers.landscapes import Quadratic, Snapshot, token_loss, value
from helpers.memory import allocations
from peft import LoraConfig, get_peft_model
from torch import nn

from flatlora.analysis import displacement as weights_module
from flatlora.analysis import loss_line, merged_row_norms, sam_sharpness
from flatlora.analysis.directions import Directions
from flatlora.analysis.displacement import find_weights
from flatlora.analysis.merged_norms import all_row_norms


def test_line_of_a_quadratic_is_a_parabola(dense_noise):
    model = Quadratic(slope=1.0)
    line = loss_line(model, value, model.batches, directions=4)
    (weight,) = find_weights(model)
    for k in range(4):
        z = dense_noise(weight, k)
        d = (z / z.norm(dim=1, keepdim=True) * model.w0.norm(dim=1, keepdim=True)).flatten()
        expected = line.distances**2 / 2 * (d @ model.H @ d) + line.distances * (model.slope @ d)
        torch.testing.assert_close(line.losses[k], expected, rtol=1e-6, atol=1e-8)
    assert line.center == 0 and line.distances[10] == 0 and (line.losses[:, 10] == 0).all()


@pytest.mark.parametrize("noise", ["filter", "filter_normalised", "layer", "plain"])
def test_noise_kinds(noise, dense_noise):
    model = Quadratic()
    (weight,) = find_weights(model)
    z, norms = dense_noise(weight, 0), model.w0.norm(dim=1, keepdim=True)
    unit = {
        "filter": norms / 2,
        "filter_normalised": norms / z.norm(dim=1, keepdim=True),
        "layer": model.w0.norm() / 12**0.5,
        "plain": 1,
    }[noise]
    d = (unit * z).flatten()
    line = loss_line(model, value, model.batches, noise=noise, directions=1, distances=[0.1])
    torch.testing.assert_close(line.losses[0, 0], 0.005 * (d @ model.H @ d), rtol=1e-6, atol=0)


def test_equals_a_model_whose_weights_were_moved(net, ids, dense_noise):
    net.eval()
    line = loss_line(net, token_loss, ids, distances=[0.3], directions=1, noise="filter")
    moved, norms = copy.deepcopy(net), merged_row_norms(net)
    with torch.no_grad():
        done = set()
        for weight in find_weights(moved):
            if weight.index in done:  # tied: moved once, with the noise of the first name
                continue
            done.add(weight.index)
            std = 0.3 * norms[weight.name] / weight.shape[1] ** 0.5
            step = std[:, None].double() * dense_noise(weight, 0)
            weight.parameter().add_(step.reshape(weight.parameter().shape).float())
        expected = sum(token_loss(moved, batch) for batch in ids) / 2
    assert {w.name for w in find_weights(net)} == {"embedding", "convolution", "linear", "head"}
    assert abs(line.losses.item() - expected.item()) < 1e-6
    assert abs(line.losses.item() - line.center) > 1e-4


def test_leaves_nothing_behind(net, ids):
    token_loss(net, ids[0]).backward()
    before = Snapshot(net)
    first = loss_line(net, token_loss, ids, distances=[-0.5, 0.5], directions=1)
    before.assert_same()
    assert torch.equal(first.losses, loss_line(net, token_loss, ids, distances=[-0.5, 0.5], directions=1).losses)


def test_leaves_nothing_behind_when_the_loss_raises(net, ids):
    before, calls = Snapshot(net), []

    def failing(model, batch):
        model.drop.train()  # a loss that changes the model
        torch.rand(3)
        calls.append(1)
        if len(calls) > 3:
            model.convolution.register_forward_hook(lambda *_: 1 / 0)
        return token_loss(model, batch)

    with pytest.raises(ZeroDivisionError):
        loss_line(net, failing, ids)
    net.convolution._forward_hooks.clear()
    before.assert_same()


def test_a_forward_that_someone_else_replaced_comes_back(net, ids):
    run = net.linear.forward
    net.linear.forward = lambda x: 2 * run(x)
    mine = net.linear.forward
    line = loss_line(net, token_loss, ids, distances=[0.0, 0.5], directions=1)
    assert net.linear.forward is mine and line.losses[0, 0] != line.losses[0, 1]


def test_a_random_loss_draws_the_same_numbers_at_every_point():
    model = Quadratic()
    line = loss_line(model, lambda m, b: m(b) + torch.rand(()), model.batches, distances=[-1e-9, 0, 1e-9], directions=2)
    assert (line.losses - line.center).abs().max() < 1e-8


def test_one_displaced_weight_at_a_time(monkeypatch):
    alive, most = [], []
    make = weights_module.Weight.stored

    def counting(self, rows):
        gc.collect()
        alive[:] = [ref for ref in alive if ref() is not None]
        most.append(len(alive) + 1)
        out = make(self, rows)
        alive.append(weakref.ref(rows))
        return out

    monkeypatch.setattr(weights_module.Weight, "stored", counting)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    loss_line(model, lambda m, b: m(b).square().mean(), [torch.randn(2, 8)], distances=[0.5], directions=1)
    assert max(most) == 1 and len(most) == 6


def test_batches_count_by_their_size():
    model = Quadratic()
    loss = lambda m, b: b * (m(model.batches[0]) + 1)  # noqa: E731
    ones = [torch.tensor(1.0), torch.tensor(4.0)]
    assert loss_line(model, loss, iter(ones), distances=[0.0]).center == 2.5
    assert loss_line(model, loss, ones, distances=[0.0], sizes=[2, 1]).center == 2.0


def test_directions_do_not_depend_on_which_layers_are_chosen(net, ids):
    net.eval()
    some = loss_line(net, token_loss, ids, layers=lambda name: name == "linear", distances=[0.5])
    alone = loss_line(nn.ModuleDict({"linear": net.linear}), lambda m, b: token_loss(net, b), ids, distances=[0.5])
    assert torch.equal(some.losses, alone.losses)


def test_two_adapters_over_one_base_move_along_the_same_directions_to_the_bit():
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    norms, moved = merged_row_norms(base), []
    for seed in range(2):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        weights = find_weights(get_peft_model(copy.deepcopy(base), config))
        for given in (norms, all_row_norms(weights)):
            at = Directions(weights, "filter_normalised", 0, given).at([(0.3, 1)])
            moved.append(torch.cat([at(weight, weight.values()).flatten() for weight in weights]))
    assert torch.equal(moved[0], moved[2])  # D is added to the base weight, which both models share
    assert not torch.equal(moved[1], moved[3])  # each relative to its own rows


def test_a_line_of_a_large_layer_needs_room_for_one_displaced_weight():
    """Two layers of 16 MiB, three directions, five points: the peak of memory beside the model."""
    model = nn.Sequential(nn.Linear(2048, 2048, bias=False), nn.Linear(2048, 2048, bias=False))
    batches = [torch.randn(2, 2048)]

    def peak(directions, distances):
        return allocations(
            lambda: loss_line(model, lambda m, b: m(b).mean(), batches, directions=directions, distances=distances)
        )[1]

    MiB = 2**20
    one, many = peak(1, [0.1]), peak(3, [-0.2, -0.1, 0.1, 0.2])
    assert 16 * MiB <= one < 2.5 * 16 * MiB and many < one + MiB


def test_progress_is_shown_if_asked_and_on_a_terminal_only(capsys):
    model = Quadratic()
    loss_line(model, value, model.batches, progress=True)
    assert "0/63" in capsys.readouterr().err
    loss_line(model, value, model.batches)
    assert capsys.readouterr().err == ""


def test_unused_layers_are_named(net, ids):
    net.spare = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match="1 chosen layers never ran.*spare"):
        loss_line(net, token_loss, ids, distances=[0.5], directions=1)


def test_resumes_from_its_file(tmp_path):
    model, file, calls = Quadratic(), tmp_path / "line.jsonl", []

    def loss(m, b):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return m(b)

    whole = loss_line(model, value, model.batches, distances=[-1, 0, 1], directions=3)
    with pytest.raises(KeyboardInterrupt):
        loss_line(model, loss, model.batches, distances=[-1, 0, 1], directions=3, file=file)
    with file.open("a") as out:
        out.write('["1.0 D2", 12')  # an incomplete line
    again = loss_line(model, loss, model.batches, distances=[-1, 0, 1], directions=3, file=file)
    assert torch.equal(whole.losses, again.losses)
    assert len(calls) == 6 + 1 + 2  # the center is measured again, to check that the model has not changed
    with pytest.raises(ValueError, match="differs in seed"):
        loss_line(model, value, model.batches, seed=1, file=file)
    with pytest.raises(ValueError, match="other norms: its norms is"):
        loss_line(model, value, model.batches, norms={"layer": torch.ones(3)}, file=file)
    model.layer.weight.data += 1
    with pytest.raises(ValueError, match="another model"):
        loss_line(model, value, model.batches, file=file)


def test_paired_difference_and_curvature():
    a, b = Quadratic(slope=1.0), Quadratic(slope=1.0)
    b.H = b.H / 2
    lines = [loss_line(m, value, m.batches, directions=5) for m in (a, b)]
    difference = lines[0].minus(lines[1])
    torch.testing.assert_close(difference.mean, lines[0].mean - lines[1].mean)
    assert (difference.stderr <= lines[0].stderr + 1e-12).all()
    assert lines[0].curvature().estimate == pytest.approx(2 * lines[1].curvature().estimate)
    with pytest.raises(ValueError, match="same seed"):
        lines[0].minus(loss_line(a, value, a.batches, directions=5, seed=1))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"directions": 0}, "directions must be an integer >= 1, got 0"),
        ({"distances": [float("nan")]}, "distances must be at least one finite number"),
        ({"distances": []}, "distances must be at least one finite number"),
        ({"noise": "pink"}, "noise must be one of"),
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
        ({"space": "full"}, "space must be one of"),
        ({"space": "adapter"}, "at least one active LoRA adapter"),
        ({"layers": lambda name: False}, "no layer of Quadratic matched"),
        ({"layers": "q_proj"}, "layers must be None, 'all' or a function"),
        ({"sizes": [1.0, 2.0]}, "sizes must be 1 positive numbers"),
        ({"norms": {}}, "'layer' is missing"),
        ({"norms": {"layer": torch.ones(2)}}, r"must have shape \(3,\), got \(2,\)"),
    ],
)
def test_mistakes_are_answered(wrong, message):
    model = Quadratic()
    with pytest.raises(ValueError, match=message):
        loss_line(model, value, model.batches, **wrong)


def test_a_loss_that_is_no_scalar_and_no_batch():
    model = Quadratic()
    with pytest.raises(ValueError, match=r"scalar tensor, the mean over the batch, got \(3, 4\)"):
        loss_line(model, lambda m, b: m.layer.weight, model.batches)
    with pytest.raises(ValueError, match="at least one batch"):
        loss_line(model, value, [])


def test_the_middle_of_a_grid_is_the_center():
    model = Quadratic()
    for grid in (torch.linspace(-1, 1, 21), torch.linspace(-1, 1, 21, dtype=torch.float64), None):
        distances = loss_line(model, value, model.batches, distances=grid, directions=1).distances
        assert distances[10] == 0 and distances.tolist() == pytest.approx([k / 10 for k in range(-10, 11)])


@pytest.mark.parametrize("warm", [False, True])
def test_a_compiled_model_is_measured_without_its_compiled_code(net, ids, warm):
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager")
    if warm:
        with torch.no_grad():
            token_loss(compiled.eval(), ids[0])
    for model in (net, compiled):
        model.train()
    expected = loss_line(net, token_loss, ids, distances=[-0.2, 0.0, 0.1, 0.3]).losses
    before = Snapshot(net)
    assert torch.equal(loss_line(compiled, token_loss, ids, distances=[-0.2, 0.0, 0.1, 0.3]).losses, expected)
    before.assert_same()
    sam = [sam_sharpness(model, token_loss, ids, rho=0.1).rises for model in (net, compiled)]
    assert torch.equal(*sam)
