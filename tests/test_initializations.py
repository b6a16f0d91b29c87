"""LoraConfig's initializations and other options: training has the right noise, and with rho = 0 it is peft's."""

import peft
import pytest
import torch
from helpers import tiny, versions
from helpers.dense import assert_dense
from helpers.internals import row_norms
from peft import EvaConfig, LoftQConfig, LoraConfig, initialize_lora_eva_weights
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga

from flatlora import FlatLoraConfig, perturbation

LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]
INITIAL = {
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-fast": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=8)},
    "corda": {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")},
    "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.5)},
    "lora-ga": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
}
SHAPED = {
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "^model.layers.1.mlp.up_proj": 6}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 3}},
    "lora_bias": {"lora_bias": True, "target_modules": ["v_proj"]},
    "layers_to_transform": {"layers_to_transform": [1]},
    "exclude_modules": {"exclude_modules": r".*layers\.0.*", "target_modules": r".*(q_proj|up_proj)"},
    "layer_replication": {"layer_replication": [[0, 2], [0, 2]]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable tokens": {"trainable_token_indices": [1, 5, 9]},
}
OPTIMIZERS = {
    "lora+": lambda model: create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4),
    "lora-fa": lambda model: create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2),
    **versions.riemannian(),
}


def run(model):
    with torch.no_grad():
        model(input_ids=tiny.tokens(batch=1, seed=2))  # CorDA takes one sequence at a time


def step(model):
    tiny.loss(model, seed=2).backward()


def needs_scipy(settings):
    if settings.get("init_lora_weights") == "loftq":
        pytest.importorskip("scipy")


def make(kind, settings, **base):
    """A tiny Llama with an adapter, initialized as peft's documentation says."""
    needs_scipy(settings)
    model = tiny.base_model(attention_bias=True, **base)
    config = kind(**{**tiny.LORA, "target_modules": LINEAR, **settings})
    way = config.init_lora_weights
    if way == "corda":
        preprocess_corda(model, config, lambda: run(model))
    if way == "lora_ga":
        preprocess_loraga(model, config, lambda: step(model))
    torch.manual_seed(4)
    model = peft.get_peft_model(model, config, low_cpu_mem_usage=way == "eva")
    if way == "eva":
        batches = [{"input_ids": tiny.tokens(8, seed=seed)} for seed in range(4)]
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and ("B" in name or "bias" in name):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def flat(settings, **base):
    return make(FlatLoraConfig, {"rho": 0.2, "schedule": "constant", "seed": 7, **settings}, **base)


@pytest.fixture(autouse=True)
def _loftq_without_cuda(monkeypatch):
    """Replace LoftQ's rounding, which needs a GPU: round to 16 levels, and let the factors take up the rest."""

    def rounded(weight, num_bits, reduced_rank, num_iter):
        size = weight.abs().max() / 8
        quantized = (weight / size).round() * size
        U, S, V = torch.linalg.svd(weight - quantized, full_matrices=False)
        return quantized, V[:reduced_rank], U[:, :reduced_rank] * S[:reduced_rank]

    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", rounded)


# of LoRA-GA's own hooks
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
every_setting = pytest.mark.parametrize("settings", (INITIAL | SHAPED).values(), ids=INITIAL | SHAPED)


@every_setting
def test_loss_and_gradients_are_those_of_the_dense_expression(settings):
    assert_dense(flat(settings).double())


@every_setting
def test_without_strength_three_steps_are_those_of_plain_lora(settings):
    losses = []
    for model in (flat({"rho": 0.0, **settings}), make(LoraConfig, settings)):
        optimizer = torch.optim.AdamW(tiny.trainable(model), lr=1e-2)
        for seed in range(3):
            losses.append(tiny.loss(model, seed))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[:3] == losses[3:]


@pytest.mark.parametrize("way", ["pissa", "olora", "loftq"])
def test_a_second_adapter_that_changes_the_base_weight_renews_its_norms(way):
    needs_scipy(INITIAL[way])
    model = flat({})
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    tiny.loss(model)
    before = layer.base_layer.weight.clone()
    settings = {**tiny.LORA, "target_modules": LINEAR, "rho": 0.2, "schedule": "constant", "seed": 7, **INITIAL[way]}
    model.add_adapter("second", FlatLoraConfig(**settings))
    assert not torch.equal(layer.base_layer.weight, before)
    model.set_adapter("second")
    weight = layer.base_layer.weight + layer.get_delta_weight("second")
    torch.testing.assert_close(row_norms(layer), weight.norm(dim=1))
    assert_dense(model.double())


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_pefts_optimizers_are_counted_and_renew_the_norms(make_optimizer):
    model = flat({}).double()
    optimizer, state = make_optimizer(model), perturbation(model)
    for count in range(3):
        assert state.steps == count
        assert_dense(model)
        tiny.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("one_adapter", [False, True], ids=["two-adapters", "tied-adapters"])
def test_a_tied_weight_has_one_noise_and_two_uses(one_adapter):
    """Both uses see the same z; the norms are those of each use's own merged rows."""
    settings = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": one_adapter}
    model = flat(settings, tie_word_embeddings=True).double()
    inner = model.base_model.model
    assert inner.lm_head.get_base_layer().weight is inner.model.embed_tokens.get_base_layer().weight
    assert inner.lm_head.stream == inner.model.embed_tokens.stream
    assert_dense(model)
