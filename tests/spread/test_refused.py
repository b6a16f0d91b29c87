"""What an engine cannot train raises an error that names it, and never trains without noise."""

from contextlib import nullcontext

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from helpers import processes, tiny
from helpers import tensor_parallel as split
from helpers.engine_runs import step_with_gradients
from helpers.runs import flat_model, trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from flatlora import (
    BarConfig,
    BiLoraConfig,
    EFMLoraConfig,
    FlatLoraCallback,
    FlatLoraConfig,
    FMLoraConfig,
    LoraSamConfig,
    RwpConfig,
    get_flat_peft_model,
    perturbation,
)


@pytest.mark.slow
@processes.patient
def test_methods_that_use_gradients_refuse_fsdp1():
    processes.run(step_with_gradients, ("fsdp1", "fsdp1-flat"))


METHODS = (FMLoraConfig, EFMLoraConfig, LoraSamConfig, BiLoraConfig, BarConfig, RwpConfig)


def refuse_split_weights(rank, folder):
    split.environment(rank)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    by_torch = parallelize_module(tiny.base_model(), mesh, {"model.layers.*.self_attn.q_proj": ColwiseParallel()})
    with pytest.raises(ValueError, match="q_proj' .*split by tensor parallelism, and peft does not split the factors"):
        get_flat_peft_model(by_torch, FlatLoraConfig(**tiny.LORA))

    if split.BY_TRANSFORMERS:
        refuse_what_transformers_splits(folder)
    refuse_what_is_split_later(mesh)


def refuse_what_transformers_splits(folder):
    def base():
        return LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))

    for method in METHODS:
        with pytest.raises(ValueError, match="q_proj' .*split by tensor parallelism, and .* needs .*FlatLoraConfig"):
            get_flat_peft_model(base(), method(**tiny.LORA))
    with pytest.raises(ValueError, match="use_dora must be False for the layer .*_proj'.*Use FSDP2, or plain LoRA"):
        get_flat_peft_model(base(), FlatLoraConfig(use_dora=True, **tiny.LORA))
    with pytest.warns(UserWarning, match="q_proj' .*trained without noise"):
        warned = split.with_adapter(base(), RwpConfig(on_unsupported="warn", **tiny.LORA))
    tiny.loss(warned).backward()


def refuse_what_is_split_later(mesh):
    later = tiny.flat_model()
    parallelize_module(later, mesh, {"base_model.model.model.layers.*.self_attn.q_proj.base_layer": ColwiseParallel()})
    with pytest.raises(RuntimeError, match="split by its rows, and the factors .*not split with it.*lora_B.<adapter>"):
        tiny.loss(later)
    for config, message in (
        (LoraSamConfig(**tiny.LORA), "LoraSam needs whole factors"),
        (RwpConfig(**tiny.LORA), "Rwp needs the norms of all rows"),
        (FlatLoraConfig(use_dora=True, schedule="constant", **tiny.LORA), "DoraLinearVariant is supported whole only"),
    ):
        model = tiny.adapted(config)
        parallelize_module(model, mesh, split.plan())
        with pytest.raises(RuntimeError, match=f"split by tensor parallelism, and {message}"):
            tiny.loss(model)
    unnamed = init_device_mesh("cpu", (1, 2), mesh_dim_names=("x", "y"))
    model = tiny.flat_model()
    parallelize_module(model, unnamed["y"], split.plan())
    with pytest.raises(RuntimeError, match=r"names \('y',\).*Name the dimension 'tp'"):
        tiny.loss(model)
    perturbation(model).rank = 0
    tiny.loss(model).backward()


@pytest.mark.slow
@processes.patient
def test_what_cannot_be_split_is_refused(tmp_path):
    tiny.base_model().save_pretrained(tmp_path)
    processes.run(refuse_split_weights, str(tmp_path))


@pytest.mark.parametrize("version, kind", [(1, "FULL_STATE_DICT"), (1, "SHARDED_STATE_DICT"), (2, "FULL_STATE_DICT")])
def test_a_checkpoint_that_fsdp1_loads_in_one_process_only(version, kind, monkeypatch, tmp_path):
    def make():
        return trainer(flat_model(), tmp_path, callbacks=[FlatLoraCallback()], save_strategy="steps", save_steps=2)

    make().train()
    resumed = make()  # a model of one process that the callback takes for a sharded one
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version, state_dict_type=kind)
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)
    expected = pytest.raises(RuntimeError, match="FULL_STATE_DICT.*first process only.*Train with SHARDED_STATE_DICT")
    with expected if (version, kind) == (1, "FULL_STATE_DICT") else nullcontext():
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
