"""Several processes of one process group, gloo, on this machine."""

import os
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(worker, *arguments, processes=2, timeout=300):
    """`worker(rank, *arguments)` in each process, the default group initialised; an error in one is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(_enter, (worker, arguments, processes, f"file://{folder}/store"), processes, join=False)
        end = time.monotonic() + timeout
        while not context.join(timeout=5):
            if time.monotonic() > end:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{worker.__name__} has not ended after {timeout} s")


def _enter(rank, worker, arguments, processes, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    worker(rank, *arguments)
    dist.barrier()
    # Without the destructors: DDP's holds the GIL while it joins gloo's threads, one of which may be waiting for it
    os._exit(0)
