"""Several processes of one process group (gloo) on this machine, and commands. Both may take as long as they progress.

On a busy machine the time that something takes says little. Processes that wait for one another for ever use no
processor time. They are stopped when none of them has used more than `STALLED / 100` seconds of it for `STALLED`
seconds (while they wait, torch's heartbeats take a third of that). The limit grows with the load of the machine.
"""

import contextlib
import faulthandler
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

STALLED = 120  # seconds, on an idle machine
LARGEST_FACTOR = 8  # of all time limits on a busy machine
# Seconds of one test, in place of pyproject's 600: stops processes that compute for ever. conftest.py applies it to all
# tests with the marker `processes`. A stall is found first: STALLED * LARGEST_FACTOR is a quarter of it.
LONGEST = 4 * STALLED * LARGEST_FACTOR
patient = pytest.mark.processes


def load_factor():
    """How much longer something takes because of the load: running processes for each processor, from 1 to 8."""
    if not hasattr(os, "getloadavg"):
        return 1.0
    return min(max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), LARGEST_FACTOR)


def deadline(seconds):
    """The `time.monotonic()` at which something that takes `seconds` on an idle machine is late."""
    return time.monotonic() + seconds * load_factor()


class Watch:
    """Says when processes, and all that they have started, make no progress any more.

    Attributes:
        limit: seconds without progress after which they are stopped. It follows the largest load since they last made
            progress.
    """

    def __init__(self, processes, stalled=STALLED):
        self.processes = [psutil.Process(pid) for pid in processes]
        self.stalled, self.limit, self.since, self.used = stalled, stalled, time.monotonic(), {}

    def tree(self):
        found = []
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [process, *process.children(recursive=True)]
        return found

    def is_stalled(self):
        now = {}
        for process in self.tree():
            try:
                times = process.cpu_times()
                now[process.pid] = times.user + times.system
            except psutil.Error:  # it has ended
                pass
        if any(used - self.used.get(pid, 0.0) > self.stalled / 100 for pid, used in now.items()):
            self.since, self.used, self.limit = time.monotonic(), now, self.stalled
        self.limit = max(self.limit, self.stalled * load_factor())
        return time.monotonic() - self.since > self.limit

    def kill(self):
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def run(worker, *arguments, processes=2, stalled=STALLED):
    """Call `worker(rank, *arguments)` in each process of a default group. An error in one is raised here.

    Raises:
        TimeoutError: nothing makes progress any more. The message has the stack of each process.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(_enter, (worker, arguments, processes, folder), processes, join=False)
        watch = Watch(context.pids(), stalled)
        while not context.join(timeout=min(5, stalled / 10)):
            if watch.is_stalled():
                stacks = _stacks(context, Path(folder))
                watch.kill()
                for process in context.processes:
                    process.join()
                raise TimeoutError(f"{worker.__name__}: no process has moved for {watch.limit:.0f} s.\n{stacks}")


def run_command(command, *, stalled=STALLED, **options):
    """`subprocess.run` with its output as text.

    Raises:
        TimeoutError: nothing makes progress any more. The message has the output until then.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, text=True, **options)
        watch = Watch([process.pid], stalled)
        try:
            while process.poll() is None and not watch.is_stalled():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(1, stalled / 10))
            moved = process.poll() is not None
        finally:  # also if the test is interrupted
            if process.poll() is None:
                watch.kill()
                process.wait()
        texts = [(file.seek(0), file.read())[1] for file in (out, err)]
        if not moved:
            raise TimeoutError(f"{command}: no process has moved for {watch.limit:.0f} s.\n{texts[0]}\n{texts[1]}")
        return subprocess.CompletedProcess(command, process.returncode, *texts)


def _enter(rank, worker, arguments, processes, folder):
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, open(f"{folder}/{rank}.stack", "w"))  # must stay open
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    worker(rank, *arguments)
    dist.barrier()
    # Exit without destructors: DDP's holds the GIL while it joins gloo's threads, and one of them may wait for the GIL
    os._exit(0)


def _stacks(context, folder):
    """Where each process is, innermost call first."""
    if hasattr(signal, "SIGUSR1"):
        for process in context.processes:
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1)
    return "\n".join(f"rank {file.stem}: {file.read_text()}" for file in sorted(folder.glob("*.stack")))
