"""`helpers/processes.py` stops processes that make no progress, and no others."""

import os
import sys
import time

import psutil
import pytest
import torch.distributed as dist
from helpers import processes

pytestmark = processes.patient
STALLED = 3  # seconds, in place of 120
WORK = "import time; start = time.monotonic()\nwhile time.monotonic() - start < {}: pass\nprint('done')"


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    """The limits are those of an idle machine."""
    monkeypatch.setattr(processes, "load_factor", lambda: 1.0)


LOADS = {"idle": (0.0, 1.0), "full": (4.0, 1.0), "busy": (10.0, 2.5), "overloaded": (1000.0, 8)}


@pytest.mark.parametrize("load, factor", LOADS.values(), ids=LOADS)
def test_limits_grow_with_the_load_for_each_processor(load, factor, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert processes.load_factor() == factor
    watch = processes.Watch([os.getpid()], stalled=STALLED)
    watch.is_stalled()
    assert watch.limit == STALLED * factor
    assert 10 * factor - 1 < processes.deadline(10) - time.monotonic() <= 10 * factor


def test_a_stall_is_found_before_the_test_is_broken_off(request):
    assert processes.STALLED * processes.LARGEST_FACTOR < processes.LONGEST
    assert request.node.get_closest_marker("timeout").args == (processes.LONGEST,)


def spend(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


def meet_after_work(rank):
    """One process works, the other waits."""
    if rank == 0:
        spend(3 * STALLED)
    dist.barrier()


def wait_for_nobody(rank):
    if rank == 0:
        time.sleep(3600)
    dist.barrier()


def fail_in_one(rank):
    if rank == 1:
        raise ZeroDivisionError("in one of them")
    time.sleep(3600)


def children():
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_processes_that_work_may_take_longer_than_the_limit():
    processes.run(meet_after_work, stalled=STALLED)


@pytest.mark.slow
def test_processes_that_wait_for_ever_are_stopped_and_say_where_they_are():
    before = children()
    with pytest.raises(TimeoutError, match="wait_for_nobody: no process has moved for 3 s") as error:
        processes.run(wait_for_nobody, stalled=STALLED)
    assert "rank 0" in str(error.value) and "in barrier" in str(error.value)
    assert children() == before


def test_an_error_in_one_process_is_raised_at_once():
    with pytest.raises(Exception, match="in one of them"):
        processes.run(fail_in_one)


@pytest.mark.slow
def test_a_command_that_works_may_take_longer_than_the_limit():
    done = processes.run_command([sys.executable, "-c", WORK.format(2 * STALLED)], stalled=STALLED)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.slow
def test_a_command_whose_child_works_moves():
    work = WORK.format(2 * STALLED)
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}], check=True)"
    assert processes.run_command([sys.executable, "-c", script], stalled=STALLED).stdout == "done\n"


def test_a_command_that_sleeps_is_stopped_with_its_children_and_shows_its_output():
    child = [sys.executable, "-c", "import time; time.sleep(3600)"]
    script = f"import subprocess; print('so far', flush=True); subprocess.run({child!r})"
    before = children()
    with pytest.raises(TimeoutError, match="no process has moved for 3 s.\nso far"):
        processes.run_command([sys.executable, "-c", script], stalled=STALLED)
    assert children() == before


def test_the_output_of_a_command_that_fails_is_kept():
    done = processes.run_command([sys.executable, "-c", "import sys; print('out'); sys.exit('bad')"])
    assert (done.returncode, done.stdout, done.stderr) == (1, "out\n", "bad\n")
