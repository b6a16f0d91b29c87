"""Several processes of one process group, gloo, on this machine; commands. Both may take as long as they make progress.

How long something takes says little on a busy machine. Processes that wait for one another for ever use no processor:
they are stopped when for `STALLED` seconds none of them has used one for more than a hundredth of that time (waiting,
torch's heartbeats take a third of that).
"""

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

STALLED = 120  # seconds
patient = pytest.mark.timeout(3600)  # in place of pyproject's 600 s: against processes that turn for ever


class Watch:
    """Says when processes and all that they have started make no progress any more."""

    def __init__(self, processes, stalled=STALLED):
        self.processes = [psutil.Process(pid) for pid in processes]
        self.stalled, self.since, self.used = stalled, time.monotonic(), {}

    def tree(self):
        found = []
        for process in self.processes:
            try:
                found += [process, *process.children(recursive=True)]
            except psutil.NoSuchProcess:
                pass
        return found

    def is_stalled(self):
        now = {}
        for process in self.tree():
            try:
                times = process.cpu_times()
                now[process.pid] = times.user + times.system
            except psutil.Error:  # it has ended meanwhile
                pass
        if any(used - self.used.get(pid, 0.0) > self.stalled / 100 for pid, used in now.items()):
            self.since, self.used = time.monotonic(), now
        return time.monotonic() - self.since > self.stalled

    def kill(self):
        for process in self.tree():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass


def run(worker, *arguments, processes=2, stalled=STALLED):
    """`worker(rank, *arguments)` in each process, the default group initialised; an error in one is raised here.

    Raises:
        TimeoutError: nothing moves any more; with what each process is at.
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
                raise TimeoutError(f"{worker.__name__}: no process has moved for {stalled} s.\n{stacks}")


def run_command(command, *, stalled=STALLED, **options):
    """`subprocess.run` with its output as text.

    Raises:
        TimeoutError: nothing moves any more; with the output until then.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, text=True, **options)
        watch = Watch([process.pid], stalled)
        try:
            while process.poll() is None and not watch.is_stalled():
                try:
                    process.wait(min(1, stalled / 10))
                except subprocess.TimeoutExpired:
                    pass
            moved = process.poll() is not None
        finally:  # also where the test is broken off
            if process.poll() is None:
                watch.kill()
                process.wait()
        texts = [(file.seek(0), file.read())[1] for file in (out, err)]
        if not moved:
            raise TimeoutError(f"{command}: no process has moved for {stalled} s.\n{texts[0]}\n{texts[1]}")
        return subprocess.CompletedProcess(command, process.returncode, *texts)


def _enter(rank, worker, arguments, processes, folder):
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, open(f"{folder}/{rank}.stack", "w"))  # it stays open
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    worker(rank, *arguments)
    dist.barrier()
    # Without the destructors: DDP's holds the GIL while it joins gloo's threads, one of which may be waiting for it
    os._exit(0)


def _stacks(context, folder):
    """Where each process is, innermost call first."""
    if hasattr(signal, "SIGUSR1"):
        for process in context.processes:
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1)
    return "\n".join(f"rank {file.stem}: {file.read_text()}" for file in sorted(folder.glob("*.stack")))
