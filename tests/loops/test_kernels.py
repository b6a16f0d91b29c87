"""Kernels that read the LoRA weights directly, so that no LoRA layer's forward runs: an error that names the layer.

What Unsloth 2026.10.9 does, read in its wheel and tried there on a CPU with Triton's interpreter (it asks for
transformers below 5.18, so it cannot be installed beside what these tests run with):

- `patch_peft_model` gives the MLP the forward `apply_lora_mlp_swiglu` (or `_geglu_...`), the attention `apply_lora_qkv`
  and `apply_lora_o`. Each asks `get_lora_parameters` for W, A, B and s and never calls the projections; dropout and a
  bias of B are inside of the kernels too. All are errors here, whether one block is patched or all.
- DoRA, other variants, several active adapters, a base in float32: the same functions then call the projections, and
  the noise is there. Without a GPU the package leaves the layers alone.
- Its checkpointing (`Unsloth_Gradient_Checkpointer`, `..._Offloaded_...`) is of the reentrant kind: no bit changes.
- It also replaces the forward of peft's layer classes; a flat layer calls whatever peft's class has.
"""

import copy
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from helpers import processes, tiny
from helpers.runs import flat_model, trainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flatlora import EFMLoraConfig, FlatLoraCallback, FlatLoraConfig, get_flat_peft_model, perturbation, unperturbed

PASSED_BY = r"'(?P<name>[\w.]+)' \(FlatLinear\)(?P<others>.*) has gradients, but its forward has not run"


def lora_parameters(projection):
    """What Unsloth's `get_lora_parameters` reads."""
    name = projection.active_adapters[0]
    A, B = projection.lora_A[name].weight, projection.lora_B[name].weight
    return projection.base_layer.weight, A, B, projection.scaling[name]


def by_kernel(projection, x):
    W, A, B, s = lora_parameters(projection)
    return F.linear(x, W) + F.linear(F.linear(x, A), B) * s


def fused_mlp(self, x):
    """As Unsloth's `apply_lora_mlp_swiglu` in place of the MLP's forward."""
    return by_kernel(self.down_proj, F.silu(by_kernel(self.gate_proj, x)) * by_kernel(self.up_proj, x))


def patched(model, blocks=2):
    for block in model.base_model.model.model.layers[:blocks]:
        block.mlp.forward = MethodType(fused_mlp, block.mlp)
    return model


def optimizer_of(model):
    return torch.optim.SGD(tiny.trainable(model), lr=0.1)


def step(model, optimizer, loss=tiny.loss):
    loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("config", [FlatLoraConfig, EFMLoraConfig])
def test_a_fused_forward_is_an_error_that_names_the_layer(config, blocks):
    model = patched(tiny.adapted(config(rho=0.2, schedule="constant", **tiny.LORA)), blocks)
    with pytest.raises(RuntimeError, match=PASSED_BY) as error:
        step(model, optimizer_of(model))
    assert f"layers.0.mlp.gate_proj' (FlatLinear) (and {3 * blocks - 1} more)" in str(error.value)
    assert "Load the model without these kernels, or set on_unsupported='warn'" in str(error.value)


def test_a_single_layer_that_is_passed_by_is_named_alone():
    model = tiny.adapted(FlatLoraConfig(rho=0.2, schedule="constant", **tiny.LORA | {"target_modules": ["up_proj"]}))
    mlp = model.base_model.model.model.layers[0].mlp
    mlp.up_proj.forward = MethodType(by_kernel, mlp.up_proj)
    with pytest.raises(RuntimeError, match=PASSED_BY) as error:
        step(model, optimizer_of(model))
    assert "layers.0.mlp.up_proj' (FlatLinear) has gradients" in str(error.value)


@pytest.mark.parametrize("before", ["step", "forward", "evaluation"])
def test_also_when_the_layers_have_run_before(before):
    model = tiny.flat_model()
    optimizer = optimizer_of(model)
    if before == "step":
        step(model, optimizer)
    elif before == "forward":
        tiny.loss(model)
    else:
        with torch.no_grad():
            tiny.loss(model.eval())
        model.train()
    with pytest.raises(RuntimeError, match=PASSED_BY):
        step(patched(model), optimizer)


def test_also_in_the_step_after_another_optimizer_has_begun_to_count():
    model = tiny.flat_model()
    parameters = tiny.trainable(model)
    optimizers = [torch.optim.SGD(part, lr=0.1) for part in (parameters[2:], parameters[:2])]
    tiny.loss(model).backward()
    for optimizer in optimizers:  # the second one holds the first factor
        optimizer.step()
    assert perturbation(model).steps == 1
    tiny.loss(patched(model)).backward()
    optimizers[0].step()
    with pytest.raises(RuntimeError, match=PASSED_BY):
        optimizers[1].step()


def test_only_a_warning_if_that_was_asked_for(recwarn):
    model = patched(tiny.flat_model(on_unsupported="warn"))
    optimizer = optimizer_of(model)
    for _ in range(2):
        step(model, optimizer)
    assert sum("its forward has not run" in str(w.message) for w in recwarn) == 1
    assert perturbation(model).steps == 2


def test_in_a_trainer(tmp_path):
    with pytest.raises(RuntimeError, match=PASSED_BY):
        trainer(patched(flat_model()), tmp_path, callbacks=[FlatLoraCallback()], max_steps=1).train()


def test_plain_lora_and_rho_zero_may_use_kernels():
    models = [patched(tiny.plain_model()), patched(tiny.flat_model(rho=0.0))]
    before = [p.detach().clone() for p in tiny.trainable(models[0])]
    for model in models:
        step(model, optimizer_of(model))
    assert tiny.same(*map(tiny.trainable, models)) and not tiny.same(before, tiny.trainable(models[0]))


# ---- layers that do not run, and are no mistake ----


class Experts(nn.Module):
    """A mixture of experts of which a batch uses one."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, chosen):
        return self.experts[chosen](x)


def experts(**settings):
    torch.manual_seed(0)
    config = FlatLoraConfig(target_modules=["0", "1", "2"], rho=0.1, schedule="constant", **settings)
    return get_flat_peft_model(Experts(), config).train()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_experts_that_are_not_chosen(set_to_none):
    model = experts()
    optimizer = optimizer_of(model)
    for chosen in (0, 1, 1, 2, 0):
        model(torch.randn(2, 4), chosen).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none)
    assert perturbation(model).steps == 5


def _two_processes(rank):
    model = experts()
    wrapped, optimizer = DistributedDataParallel(model, find_unused_parameters=True), optimizer_of(model)
    for _ in range(2):
        wrapped(torch.randn(2, 4), rank).sum().backward()
        unused = model.base_model.model.experts[1 - rank]
        assert unused.lora_B["default"].weight.grad.any()  # the other process has chosen it
        optimizer.step()
        optimizer.zero_grad()
    assert perturbation(model).steps == 2

    mlp = {**tiny.LORA, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    model = patched(tiny.adapted(FlatLoraConfig(rho=0.2, schedule="constant", **mlp)))
    with pytest.raises(RuntimeError, match=PASSED_BY):
        step(DistributedDataParallel(model), optimizer_of(model))


@pytest.mark.slow
@processes.patient
def test_experts_that_another_process_has_chosen_and_kernels_in_both():
    processes.run(_two_processes)


def unperturbed_loss(model):
    with unperturbed(model):
        return tiny.loss(model)


def off(model):
    perturbation(model).enabled = False
    loss = tiny.loss(model)
    perturbation(model).enabled = True
    return loss


def checkpointed(model):
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return tiny.loss(model)


@pytest.mark.parametrize("loss", [unperturbed_loss, off, checkpointed], ids=lambda f: f.__name__)
def test_layers_that_run(loss):
    model = tiny.flat_model()
    optimizer = optimizer_of(model)
    for _ in range(3):
        step(model, optimizer, loss)
    assert perturbation(model).steps == 3


def test_layers_in_evaluation_mode_beside_others_that_train_are_warned_of_once():
    model = tiny.flat_model()
    optimizer = optimizer_of(model)
    model.base_model.model.model.layers[0].eval()
    with pytest.warns(
        UserWarning, match=r"'model.layers.0.self_attn.q_proj' \(and 6 more\) trains without noise"
    ) as caught:
        for _ in range(3):
            step(model, optimizer)
    assert len(caught) == 1
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and "layers.0" not in name)
    perturbation(model).diagnostics.warned_of.clear()
    step(model, optimizer_of(model))  # a frozen part in evaluation mode is in order


def test_layers_that_run_compiled_without_noise():
    """Compiled code without noise reports no forward, and no error is raised."""
    model = experts()
    run, optimizer = torch.compile(model, backend="eager", fullgraph=True), optimizer_of(model)
    for _ in range(2):
        with unperturbed(model):
            run(torch.randn(2, 4), 0).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert perturbation(model).diagnostics.compiled


def test_a_copy_made_between_backward_and_step():
    model = tiny.flat_model()
    tiny.loss(model).backward()
    other = copy.deepcopy(model)
    for m in (other, model):
        optimizer_of(m).step()
        assert perturbation(m).steps == 1


def test_adapters_added_and_deleted_later():
    model = tiny.flat_model()
    optimizer = optimizer_of(model)
    step(model, optimizer)
    model.add_adapter("other", FlatLoraConfig(**tiny.LORA, rho=0.1, schedule="constant", seed=7))
    model.set_adapter("other")
    step(model, optimizer_of(model))
    model.delete_adapter("default")
    step(model, optimizer_of(model))
    patched(model)
    with pytest.raises(RuntimeError, match=PASSED_BY):
        step(model, optimizer_of(model))


def test_the_check_looks_at_no_layer_where_all_have_run(monkeypatch):
    """A step's cost must not grow with the number of modules."""
    model = tiny.flat_model()
    optimizer, state = optimizer_of(model), perturbation(model)
    step(model, optimizer)
    walks, walk = [], state.flat_layers
    monkeypatch.setattr(state, "flat_layers", lambda: walks.append(1) or walk())
    step(model, optimizer)
    assert not walks


def test_gradients_that_come_from_elsewhere_are_no_mistake():
    model = tiny.flat_model()
    optimizer = torch.optim.SGD(tiny.trainable(model), lr=0.1)
    tiny.loss(model).backward()
    optimizer.step()
    for parameter in tiny.trainable(model):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert perturbation(model).steps == 2
