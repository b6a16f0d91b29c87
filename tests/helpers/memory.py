"""Bytes that a piece of code allocates on the CPU, and bytes that autograd keeps for its backward."""

from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


def allocations(run):
    """(largest allocation, peak of all live allocations) during `run()`, in bytes, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    sizes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sizes  # negative where memory is freed
    return max(sizes), max(accumulate(sizes))


def saved_bytes(run, frozen):
    """Bytes that autograd keeps for backward after `run()`, without the frozen parameters."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return sum(storages.values()), out
