"""LoRA-SAM, RWP, Bi-LoRA and BAR against the equations of their papers, and properties of every method."""

import copy
import itertools
import json
import random

import numpy as np
import peft
import pytest
import torch
from helpers import tiny, twin
from helpers.methods import every_method, step
from helpers.noise import unit_noise

import flatlora
from flatlora import (
    BarConfig,
    BiLoraConfig,
    EFMLoraConfig,
    FMLoraConfig,
    LoraSamConfig,
    RwpConfig,
    ascent,
    attach,
    get_flat_peft_model,
    perturbation,
    perturbed,
)

S = twin.SCALING
# ---- each from its equations ----


def test_lora_sam_takes_the_gradient_at_the_factors_moved_along_their_gradient():
    model = twin.adapted(LoraSamConfig, rho=0.3)
    tensors = twin.factors(model)
    optimizer = torch.optim.AdamW(twin.trainable(model), lr=1e-2)
    own = torch.optim.AdamW(twin.leaves(tensors), lr=1e-2)

    def gradients(offsets, i):
        pairs = zip(offsets[::2], offsets[1::2], strict=True)
        weights = [W + S * (B + E) @ (A + D) for (W, A, B), (D, E) in zip(tensors, pairs, strict=True)]
        return torch.autograd.grad(twin.dense_loss(weights, i), twin.leaves(tensors))

    for i in range(20):
        step(model, optimizer, i)
        first = gradients([torch.zeros_like(p) for p in twin.leaves(tensors)], i)
        norm = torch.cat([g.flatten() for g in first]).norm()  # over all layers
        for p, grad in zip(twin.leaves(tensors), gradients([0.3 * g / norm for g in first], i), strict=True):
            p.grad = grad
        own.step()
    twin.assert_close(model, tensors)


@pytest.mark.parametrize("factor", [0.0, float("inf")], ids=["zero", "infinite"])
def test_lora_sam_does_not_move_along_a_gradient_without_a_direction(factor):
    model = twin.adapted(LoraSamConfig, rho=0.3)
    with ascent(model):
        (factor * twin.loss(model, 0)).backward()
    offsets = perturbation(model).tensors()
    assert len(offsets) == len(twin.trainable(model)) and not any(tensor.any() for tensor in offsets.values())
    assert torch.equal(twin.loss(model, 0), twin.loss(model.eval(), 0))


def test_rwp_noise_has_one_standard_deviation_for_a_layer():
    model = twin.adapted(RwpConfig, rho=0.2, schedule="constant", seed=5)
    weights = []
    for stream, (W, A, B) in enumerate(twin.factors(model)):
        merged = (W + S * B @ A).detach()
        std = 0.2 * torch.linalg.matrix_norm(merged) / merged.numel() ** 0.5
        weights.append(W + S * B @ A + std * unit_noise(*W.shape, stream, seed=5))
    assert abs(twin.loss(model, 0) - twin.dense_loss(weights, 0)) < 1e-10
    assert abs(twin.loss(model.eval(), 0) - twin.dense_loss(weights, 0)) > 1e-4


def test_rwp_in_the_adapter_moves_A_and_B():
    model = twin.adapted(RwpConfig, rho=0.2, schedule="constant", seed=5, space="adapter")
    tensors, weights = twin.factors(model), []
    for layer, (W, A, B) in zip(model.base_model.model.layers, tensors, strict=True):
        method = perturbation(model).settings.method
        _key, _ = perturbation(model).draw(W.device)
        made = method.offsets(layer, perturbation(model))
        for factor, tensor in (("lora_A", A), ("lora_B", B)):
            eps = made[factor, "default"]
            relative = torch.linalg.matrix_norm(eps) / torch.linalg.matrix_norm(tensor)
            assert abs(relative - 0.2) < 0.2 * 5 / (2 * tensor.numel()) ** 0.5  # five standard errors of a norm
        weights.append(W + S * (B + made["lora_B", "default"]) @ (A + made["lora_A", "default"]))
    loss = twin.loss(model, 0)
    expected = twin.dense_loss(weights, 0)
    assert abs(loss - expected) < 1e-7
    loss.backward()
    for p, grad in zip(twin.trainable(model), torch.autograd.grad(expected, twin.leaves(tensors)), strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-5, atol=1e-8)
    assert abs(twin.loss(model, 0) - loss) > 1e-6  # the next forward has other noise


def lora_plus(pairs, rates):
    """Parameter groups with a learning rate of their own for all A and for all B (LoRA+, arXiv 2402.12354)."""
    return [{"params": list(p), "lr": lr} for p, lr in zip(zip(*pairs, strict=True), rates, strict=True)]


def pairs_of(model):
    layers = model.base_model.model.layers
    return [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in layers]


@pytest.mark.parametrize("kind, rates", [(torch.optim.SGD, (0.5, 0.8)), (torch.optim.AdamW, (1e-2, 4e-2))])
def test_bilora_descends_with_one_module_and_ascends_with_the_other(kind, rates):
    rho = 0.05
    model = twin.adapted(BiLoraConfig, rho=rho, ascent_r=2, seed=3)
    tensors = twin.factors(model)
    layers = list(model.base_model.model.layers)
    second = [
        [layer.offsets[name, "default"].detach().clone().requires_grad_() for name in ("ascent_A", "ascent_B")]
        for layer in layers
    ]
    assert not any(B.any() for _, B in second)
    descend = kind(lora_plus([(A, B) for _, A, B in tensors], rates))
    ascend = kind(lora_plus(second, rates), maximize=True)
    optimizer, at_the_bound = kind(lora_plus(pairs_of(model), rates)), 0
    for i in range(30):
        step(model, optimizer, i)
        weights = [W + S * B @ A + S * B2 @ A2 for (W, A, B), (A2, B2) in zip(tensors, second, strict=True)]
        twin.dense_loss(weights, i).backward()
        for own in (descend, ascend):
            own.step()
            own.zero_grad()
        c = sum(torch.linalg.matrix_norm(B2 @ A2).square() for A2, B2 in second).sqrt().item()
        if c > rho:
            at_the_bound += 1
            with torch.no_grad():
                for p in itertools.chain(*second):
                    p.mul_((rho / c) ** 0.5)
    assert at_the_bound > 5
    twin.assert_close(model, tensors)
    for layer, (A2, B2) in zip(layers, second, strict=True):
        torch.testing.assert_close(layer.offsets["ascent_A", "default"], A2, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(layer.offsets["ascent_B", "default"], B2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ["obar", "nbar"])
def test_bar_scales_the_factors_just_before_the_update(variant):
    model = twin.adapted(BarConfig, rho=0.25, variant=variant, schedule="linear_decay", total_steps=20)
    tensors = twin.factors(model)
    rates = 0.3, 0.1
    own = torch.optim.SGD(lora_plus([(A, B) for _, A, B in tensors], rates))
    optimizer = torch.optim.SGD(lora_plus(pairs_of(model), rates))
    for i in range(20):
        step(model, optimizer, i)
        alpha = 0.25 * (1 - i / 20)
        twin.dense_loss([W + S * B @ A for W, A, B in tensors], i).backward()
        with torch.no_grad():
            for _, A, B in tensors:
                sizes = (A.norm(), B.norm()) if variant == "obar" else (A.grad.norm(), B.grad.norm())
                sign = -1 if variant == "obar" else 1  # of the larger one's growth
                sign = sign if sizes[0] > sizes[1] else -sign
                A.mul_(1 + sign * alpha * rates[0])
                B.mul_(1 - sign * alpha * rates[1])
        own.step()
        own.zero_grad()
    twin.assert_close(model, tensors)


# ---- what holds for all ----


@every_method
def test_rho_zero_is_plain_lora_bit_for_bit(kind, settings):
    options = {"lora_dropout": 0.3, **tiny.LORA}
    models = [
        tiny.adapted(c) for c in (peft.LoraConfig(**options), kind(rho=0.0, total_steps=3, **options, **settings))
    ]
    losses = []
    for model in models:
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(tiny.trainable(model), lr=1e-2)
        losses.append([step(model, optimizer, i, tiny.loss) for i in range(3)])
    assert losses[0] == losses[1]
    assert tiny.same([*models[0].parameters()], [*models[1].parameters()])


@every_method
def test_it_trains_and_leaves_the_base_and_the_generator_alone(kind, settings):
    model, plain = tiny.adapted(kind(rho=0.1, **tiny.LORA, **settings, total_steps=4)), tiny.plain_model()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(tiny.trainable(model), lr=1e-2)
    torch.manual_seed(9)
    for i in range(3):
        step(model, optimizer, i, tiny.loss)
    after = torch.rand(3)
    torch.manual_seed(9)
    assert torch.equal(after, torch.rand(3))
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    own = torch.optim.AdamW(tiny.trainable(plain), lr=1e-2)
    for i in range(3):
        step(plain, own, i, tiny.loss)
    assert not tiny.same(tiny.trainable(model), tiny.trainable(plain))


@every_method
def test_what_is_saved_is_a_plain_adapter_that_stock_peft_loads(kind, settings, tmp_path, recwarn):
    model = tiny.adapted(kind(rho=0.1, **tiny.LORA, **settings, total_steps=4))
    optimizer = torch.optim.AdamW(tiny.trainable(model), lr=1e-2)
    for i in range(2):
        step(model, optimizer, i, tiny.loss)
    model.eval()
    expected = tiny.loss(model)
    model.save_pretrained(tmp_path)
    keys = json.loads((tmp_path / "adapter_config.json").read_text()).keys()
    assert keys == peft.LoraConfig(**tiny.LORA).to_dict().keys()
    recwarn.clear()
    loaded = peft.PeftModel.from_pretrained(tiny.base_model(), tmp_path).eval()
    assert [w for w in recwarn if "FutureWarning" not in str(w.category)] == []
    assert torch.equal(tiny.loss(loaded), expected)
    plain = peft.get_peft_model_state_dict(tiny.plain_model()).keys()
    assert peft.get_peft_model_state_dict(model).keys() == plain
    merged = copy.deepcopy(model).merge_and_unload()
    assert abs(tiny.loss(merged) - expected) < 1e-4
    assert not any("ascent" in name for name, _ in merged.named_parameters())
    again = flatlora.load(tiny.base_model(), tmp_path)
    assert type(again.peft_config["default"]) is kind
    assert perturbation(again).settings.method == perturbation(model).settings.method


@every_method
def test_evaluation_is_clean_and_detach_leaves_no_trace(kind, settings):
    model = tiny.adapted(kind(rho=0.3, **tiny.LORA, **settings, total_steps=4))
    optimizer = torch.optim.AdamW(tiny.trainable(model), lr=1e-2)
    for i in range(2):
        step(model, optimizer, i, tiny.loss)
    plain = tiny.plain_model()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(tiny.loss(model.eval()), tiny.loss(plain.eval()))
    with torch.no_grad():
        assert torch.equal(tiny.loss(model.train()), tiny.loss(plain.train()))
    flatlora.detach(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [sorted(vars(m)) for m in model.modules()] == [sorted(vars(m)) for m in plain.modules()]
    assert torch.equal(tiny.loss(model), tiny.loss(plain))


@every_method
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_fused_layer_takes_the_step_of_pefts_modules(kind, settings, dropout):
    results = []
    for watched in (False, True):
        model = twin.adapted(kind, rho=0.3, lora_dropout=dropout, **settings, total_steps=6)
        calls = []
        if watched:  # by a hook on lora_A: the layer then calls its modules
            for layer in model.base_model.model.layers:
                layer.lora_A["default"].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(4)
        optimizer = torch.optim.AdamW(twin.trainable(model), lr=1e-2)
        losses = [step(model, optimizer, i) for i in range(5)]
        assert bool(calls) is watched
        results.append([torch.tensor(losses), *twin.trainable(model)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@every_method
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_bit(kind, settings, reentrant):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny.adapted(kind(rho=0.3, **tiny.LORA, **settings, total_steps=4))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        optimizer = torch.optim.AdamW(tiny.trainable(model), lr=1e-2)
        losses = [step(model, optimizer, i, tiny.loss) for i in range(3)]
        results.append((losses, [p.detach().clone() for p in tiny.trainable(model)]))
    assert results[0][0] == results[1][0]
    assert tiny.same(results[0][1], results[1][1])


@every_method
def test_state_resumes_bit_for_bit_in_a_plain_loop(kind, settings, tmp_path):
    def make():
        model = tiny.adapted(kind(rho=0.3, **tiny.LORA, **settings, total_steps=6))
        return model, torch.optim.AdamW(tiny.trainable(model), lr=1e-2)

    model, optimizer = make()
    for i in range(3):
        step(model, optimizer, i, tiny.loss)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "flat": perturbation(model).state_dict()}
    torch.save(saved, tmp_path / "state.pt")
    losses = [step(model, optimizer, i, tiny.loss) for i in range(3, 6)]

    other, optimizer = make()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    perturbation(other).load_state_dict(saved["flat"])
    assert losses == [step(other, optimizer, i, tiny.loss) for i in range(3, 6)]
    assert tiny.same(tiny.trainable(model), tiny.trainable(other))


@every_method
def test_a_state_of_before_the_first_step_starts_the_run_again(kind, settings):
    model = tiny.adapted(kind(rho=0.3, **tiny.LORA, **settings, total_steps=6))
    start, flat = copy.deepcopy((model.state_dict(), perturbation(model).state_dict()))
    losses = []
    for _ in range(2):
        model.load_state_dict(start)
        perturbation(model).load_state_dict(flat)
        assert perturbation(model).tensors().keys() == flat["tensors"].keys()
        optimizer = torch.optim.AdamW(tiny.trainable(model), lr=1e-2)
        losses.append([step(model, optimizer, i, tiny.loss) for i in range(3)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", [FMLoraConfig, LoraSamConfig])
def test_a_state_of_between_the_two_passes_is_of_between_the_two_passes(kind):
    one, two = (tiny.adapted(kind(rho=0.3, **tiny.LORA)) for _ in range(2))
    before = perturbation(one).state_dict()
    with ascent(one):
        tiny.loss(one, 0).backward()
    between = copy.deepcopy(perturbation(one).state_dict())
    perturbation(two).load_state_dict(between)
    for model in (one, two):
        optimizer = torch.optim.SGD(tiny.trainable(model), lr=1e-2)
        tiny.loss(model, 0).backward()
        optimizer.step()
    assert tiny.same(tiny.trainable(one), tiny.trainable(two))
    perturbation(one).load_state_dict(between)
    perturbation(one).load_state_dict(before)
    tiny.loss(one, 0).backward()
    with pytest.raises(RuntimeError, match="takes two passes"):
        torch.optim.SGD(tiny.trainable(one), lr=1e-2).step()
    for damaged in ({"done": 2}, {"finished": True}, True):
        with pytest.raises(ValueError, match="method"):
            perturbation(one).load_state_dict({**before, "method": damaged})


@every_method
def test_an_adapter_that_is_loaded_without_a_first_initialization_trains_with_the_same_bits(kind, settings, tmp_path):
    tiny.adapted(kind(rho=0.3, **tiny.LORA, **settings, total_steps=4)).save_pretrained(tmp_path)
    losses = []
    for low in (False, True):
        model = flatlora.load(tiny.base_model(), str(tmp_path), low_cpu_mem_usage=low).train()
        optimizer = torch.optim.AdamW(tiny.trainable(model), lr=1e-2)
        losses.append([step(model, optimizer, i, tiny.loss) for i in range(3)])
    assert losses[0] == losses[1]


@every_method
def test_a_copy_goes_on_by_itself(kind, settings):
    model = tiny.adapted(kind(rho=0.3, **tiny.LORA, **settings, total_steps=6))
    optimizer = torch.optim.SGD(tiny.trainable(model), lr=1e-2)
    step(model, optimizer, 0, tiny.loss)
    other = copy.deepcopy(model)
    step(model, optimizer, 1, tiny.loss)
    step(other, torch.optim.SGD(tiny.trainable(other), lr=1e-2), 1, tiny.loss)
    assert tiny.same(tiny.trainable(model), tiny.trainable(other))


# ---- the first pass ----


def test_ascent_keeps_gradients_that_are_there_also_when_it_fails():
    model = tiny.adapted(FMLoraConfig(**tiny.LORA))
    tiny.loss(model, 0).backward()
    before = tiny.gradients(model)
    with pytest.raises(KeyboardInterrupt), ascent(model):
        tiny.loss(model, 1).backward()
        raise KeyboardInterrupt
    assert tiny.same(before, tiny.gradients(model))
    with ascent(model):
        tiny.loss(model, 1).backward()
    assert tiny.same(before, tiny.gradients(model))


def test_the_first_pass_leaves_batch_norm_as_it_was():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    model = get_flat_peft_model(model, FMLoraConfig(target_modules=["0", "2"])).train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    with ascent(model):
        model(torch.randn(8, 4)).sum().backward()
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


@pytest.mark.parametrize("which", ["a part", "the model", "a module with the model and a head"])
def test_the_first_pass_leaves_no_gradient_also_if_ascent_is_given_a_part(which):
    def backward():
        head(model(torch.ones(8, 4))).sum().backward()

    base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    config = FMLoraConfig(target_modules=["0", "2"], modules_to_save=["1"])
    model, head = get_flat_peft_model(base, config).train(), torch.nn.Identity()
    passed = {"a part": model.base_model.model[0], "the model": model}.get(which)
    if passed is None:
        passed = torch.nn.Sequential(model, head := torch.nn.Linear(2, 1))
    parts = torch.nn.ModuleList([model, head])
    before = {name: b.clone() for name, b in parts.named_buffers()}
    backward()
    grads = {name: p.grad.clone() for name, p in parts.named_parameters() if p.grad is not None}
    for name, b in parts.named_buffers():
        b.copy_(before[name])
    with ascent(passed):
        backward()
    assert all(torch.equal(b, before[name]) for name, b in parts.named_buffers())
    assert all(torch.equal(p.grad, grads[name]) for name, p in parts.named_parameters() if p.grad is not None)
    assert sum("modules_to_save" in name for name in grads) == 2


@pytest.mark.parametrize(
    "seed, draw",
    [(torch.manual_seed, torch.rand), (np.random.seed, np.random.rand), (random.seed, lambda n: [random.random()])],
    ids=["torch", "numpy", "random"],
)
def test_both_passes_draw_the_random_numbers_of_plain_lora(seed, draw):
    """As SpecAugment of Wav2Vec2 does, which draws its masks with NumPy."""

    class Masked(torch.nn.Sequential):
        def forward(self, x):
            drawn.append(float(draw(1)[0]))
            return super().forward(x * drawn[-1])

    seed(0)
    plain, drawn = [float(draw(1)[0]) for _ in range(3)], []
    model = get_flat_peft_model(Masked(torch.nn.Linear(4, 1)), LoraSamConfig(target_modules=["0"])).train()
    seed(0)
    for _ in range(3):
        with ascent(model):
            model(torch.ones(2, 4)).sum().backward()
        model(torch.ones(2, 4)).sum().backward()
    assert drawn[::2] == drawn[1::2] == plain


def test_perturbed_shows_the_moved_point_in_evaluation_mode():
    model = tiny.adapted(EFMLoraConfig(rho=0.5, **tiny.LORA))
    step(model, torch.optim.SGD(tiny.trainable(model), lr=0.1), 0, tiny.loss)
    model.eval()
    with perturbed(model):
        assert tiny.loss(model) != tiny.loss(attach_free(model))


def attach_free(model):
    plain = copy.deepcopy(model)
    flatlora.detach(plain)
    attach(plain, rho=0.0)
    return plain
