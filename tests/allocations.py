"""What a piece of code allocates on the CPU."""

from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def allocations(run):
    """(largest single allocation, peak of all that was alive) during `run()`, in bytes, from torch's own profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    sizes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sizes  # negative where memory is given back
    return max(sizes), max(accumulate(sizes))
