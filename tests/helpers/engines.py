"""Engines that shard or replicate a model over the processes of the default group, with the interface of `Run`."""

import torch
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from helpers.engine_models import KINDS

LEARNING_RATE = 0.05


class Run:
    """A model under one engine, and its optimizer."""

    processes = 2
    kinds = ()  # names of models in engine_models.py
    micro_batches = 1  # of an optimizer step
    largest_norm = 1e9  # of the gradients
    half = False  # forward and backward in bfloat16, and the optimizer in float32

    def __init__(self, model):
        self.module = model
        self.model = self.spread(model)
        self.optimizer = torch.optim.SGD(self.trainable(), lr=LEARNING_RATE, momentum=0.9)

    def trainable(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    def spread(self, model):
        return model

    def step(self, loss):
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(self, loss):
        loss.backward()

    def step_over(self, losses):
        """A step over micro-batches, with clipped gradients. `losses` computes a loss when it is asked for the next."""
        for place in range(self.micro_batches):
            self.reduce_gradients(place == self.micro_batches - 1)
            (next(losses) / self.micro_batches).backward()
        self.update()

    def reduce_gradients(self, now):
        """Whether the next backward reduces the gradients."""

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.trainable(), self.largest_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def whole(self):
        """Copies of all parameters, by their names in one process."""
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def shards(self):
        """Copies of this process's shards of the frozen parameters."""
        return [p.detach().clone() for p in self.model.parameters() if not p.requires_grad]


class DDP(Run):
    kinds = ("4-bit",)

    def spread(self, model):
        return DistributedDataParallel(model)


class FSDP2(Run):
    kinds = tuple(KINDS)

    def spread(self, model):
        mesh, decoder_layers = self.mesh(), model.get_base_model()._no_split_modules
        for layer in [module for module in model.modules() if type(module).__name__ in decoder_layers]:
            fully_shard(layer, mesh=mesh, mp_policy=self.precision())
        return fully_shard(model, mesh=mesh, mp_policy=self.precision())

    def precision(self):
        half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if self.half else {}
        return MixedPrecisionPolicy(**half)

    def mesh(self):
        return None  # all processes

    def reduce_gradients(self, now):
        self.model.set_requires_gradient_sync(now)

    def save(self, folder):
        states = get_state_dict(self.model, self.optimizer)
        torch.save(states, f"{folder}/{torch.distributed.get_rank()}")

    def load(self, folder):
        model, optimizer = torch.load(f"{folder}/{torch.distributed.get_rank()}", weights_only=False)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)

    def whole(self):
        return {name: p.detach().full_tensor() for name, p in self.module.named_parameters()}

    def shards(self):
        return [p.detach().to_local().clone() for p in self.model.parameters() if not p.requires_grad]


class HSDP(FSDP2):
    """Two replicas, each sharded over two processes."""

    processes, kinds, shape = 4, ("dora",), (2, 2)

    def mesh(self):
        return init_device_mesh("cpu", self.shape, mesh_dim_names=("replicate", "shard"))


class ShardedReplica(HSDP):
    """One replica, sharded over two processes."""

    processes, kinds, shape = 2, (), (1, 2)


class TwoReplicas(ShardedReplica):
    """Two replicas, each in one process."""

    shape = (2, 1)


class FSDP1(Run):
    kinds = tuple(KINDS)
    use_orig_params = True

    def spread(self, model):
        policy = fsdp_auto_wrap_policy(model)
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=self.use_orig_params, device_id=torch.device("cpu")
        )

    def whole(self):
        with FullyShardedDataParallel.summon_full_params(self.model):
            return {
                name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
                for name, p in self.model.named_parameters()
            }

    def shards(self):
        handles = [m._handle for m in FullyShardedDataParallel.fsdp_modules(self.model) if m._handle is not None]
        return [h.flat_param.detach().clone() for h in handles if not h.flat_param.requires_grad]


class FSDP1Flat(FSDP1):
    kinds = ("dora", "experts")
    use_orig_params = False


class Zero2(Run):
    stage = 2

    def __init__(self, model):
        import deepspeed

        # gloo works without this kernel, which would be compiled here
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 0},
            "bf16": {"enabled": self.half},
            "gradient_accumulation_steps": self.micro_batches,
            "gradient_clipping": self.largest_norm,  # the default is 1
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.module = model
        optimizer = torch.optim.SGD(self.trainable_of(model), lr=LEARNING_RATE, momentum=0.9)
        self.model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def trainable_of(self, model):
        return [p for p in model.parameters() if p.requires_grad]

    def step(self, loss):
        self.model.backward(loss)
        self.model.step()

    def backward(self, loss):
        self.model.backward(loss)

    def step_over(self, losses):
        for _ in range(self.micro_batches):
            self.step(next(losses))

    def update(self):
        self.model.step()

    def save(self, folder):
        self.model.save_checkpoint(folder)

    def load(self, folder):
        self.model.load_checkpoint(folder)

    def whole(self):
        import deepspeed

        found = {}
        for name, p in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([p]):
                found[name] = p.detach().clone()
        return found

    def shards(self):
        frozen = [p for p in self.module.parameters() if not p.requires_grad]
        return [getattr(p, "ds_tensor", p).detach().clone() for p in frozen]


class Zero3(Zero2):
    kinds = tuple(KINDS)
    stage = 3


ENGINES = {
    "ddp": DDP,
    "fsdp2": FSDP2,
    "hsdp": HSDP,
    "hsdp-1x2": ShardedReplica,
    "hsdp-2x1": TwoReplicas,
    "fsdp1": FSDP1,
    "fsdp1-flat": FSDP1Flat,
    "zero2": Zero2,
    "zero3": Zero3,
}
