"""What an engine cannot train raises an error that names it, and never trains without noise."""

import os
from contextlib import nullcontext

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from helpers import processes, tiny
from helpers.engine_runs import step_with_gradients
from helpers.runs import flat_model, trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from flatlora import (
    FlatLoraCallback,
    FlatLoraConfig,
    get_flat_peft_model,
)


@pytest.mark.slow
@processes.patient
def test_methods_that_use_gradients_refuse_fsdp1():
    processes.run(step_with_gradients, ("fsdp1", "fsdp1-flat"))


def split(rank, folder):
    mesh = init_device_mesh("cpu", (2,))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    plan = {"tp_plan": "auto"}
    if "tp_plan" in DistributedConfig.__dataclass_fields__:  # its name in newer versions of transformers
        plan = {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=2)}
    by_transformers = LlamaForCausalLM.from_pretrained(folder, **plan)
    by_torch = parallelize_module(tiny.base_model(), mesh, {"model.layers.*.self_attn.q_proj": ColwiseParallel()})
    for model in (by_transformers, by_torch):
        with pytest.raises(ValueError, match="q_proj' .* its weight is split by tensor parallelism"):
            get_flat_peft_model(model, FlatLoraConfig(**tiny.LORA))
    later = tiny.flat_model()
    parallelize_module(later, mesh, {"base_model.model.model.layers.*.self_attn.q_proj.base_layer": ColwiseParallel()})
    with pytest.raises(RuntimeError, match="split by tensor parallelism.*Use DDP"):
        tiny.loss(later)


@pytest.mark.slow
@processes.patient
def test_tensor_parallelism_is_refused(tmp_path):
    tiny.base_model().save_pretrained(tmp_path)
    processes.run(split, str(tmp_path))


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
