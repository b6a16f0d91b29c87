"""The script that the tests launch: the recipe for encoders, with the arguments of a JSON file, on the CPU."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def main():
    if os.environ.get("ACCELERATE_USE_CPU") != "true":  # accelerate shards models only over accelerators
        specification = importlib.util.spec_from_file_location("launched", ROOT / "tests" / "spread" / "launched.py")
        launched = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(launched)
        launched.pretend()
    sys.path.insert(0, str(ROOT / "examples" / "recipes"))
    import glue_roberta
    from recipe import processes

    if processes.count() != 2:
        raise RuntimeError(f"there must be two processes, found {processes.count()}")
    glue_roberta.main(json.loads(Path(sys.argv[1]).read_text()))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # exit without destructors, see helpers/processes.py


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
