"""The script that the tests launch: `examples/distributed/train.py`, once for each list of arguments in a JSON file.

accelerate shards models only over accelerators. The script tells it that each process has one with the name "cpu".
"""

import importlib.util
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp._flat_param import FlatParamHandle

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed" / "train.py"


def pretend():
    def set_device(self):
        self.device = torch.device("cpu")

    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = set_device
    FlatParamHandle.to_cpu = lambda self: nullcontext()  # it would free what it "copies" from the CPU
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # gloo works without this kernel, which would be compiled here
        )


def main():
    specification = importlib.util.spec_from_file_location("train", EXAMPLE)
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    config = next((argv[argv.index("--config") + 1] for argv in jobs if "--config" in argv), None)
    if config is not None:
        example.read_config(config)
    if any(os.environ.get(f"ACCELERATE_USE_{engine}") for engine in ("FSDP", "DEEPSPEED")):
        pretend()
    for argv in jobs:
        example.main(argv)
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # exit without destructors, see helpers/processes.py


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
