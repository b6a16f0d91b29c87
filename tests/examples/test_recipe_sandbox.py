"""Attacks of generated code on the machine and on its own verdict, each in every way of isolation that works here.

What an attack does is bounded, so that one that is not contained does little: 50 processes that end after 30 seconds,
1 GB of memory, 64 MB of files in the folder of the test.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from helpers.processes import patient
from helpers.sandboxed import CONTAINED, FILTERED, NAMESPACES, TRY, UNFILTERED, none_left, started, value_of, verdict
from recipe import sandbox
from recipe.sandbox import Limits

pytestmark = [patient, pytest.mark.skipif(sys.platform != "linux", reason="generated code runs on Linux only")]


# --- what the code tries to do to the machine


@pytest.mark.parametrize("mode", FILTERED)
@pytest.mark.parametrize(
    "call",
    [
        "os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "subprocess.Popen(['/bin/true'])",
        "os.system('true') == 0 or refuse()",
        "threading.Thread(target=print).start()",
        "multiprocessing.Process(target=print).start()",
    ],
)
def test_no_process_and_no_thread_can_be_started(mode, call):
    code = f"""
        import os, subprocess, threading, multiprocessing
        def refuse(): raise OSError
        def attack():
            try: {call}
            except (OSError, RuntimeError): return 'refused'
            return 'started'
    """
    assert value_of(code, mode=mode) == "'refused'"


@pytest.mark.parametrize("mode", FILTERED)
def test_a_fork_bomb(mode):
    code = """
        import os, time
        def attack():
            made = 0
            for _ in range(50):
                try:
                    if os.fork() == 0: time.sleep(30); os._exit(0)
                    made += 1
                except OSError: pass
            return made
    """
    assert value_of(code, mode=mode) == "0"


@pytest.mark.parametrize("mode", NAMESPACES)
def test_background_children_end_with_the_namespace_even_without_the_filter(mode):
    code = """
        import os, signal, time
        def attack():
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    for k in range(1, 32):
                        try: signal.signal(k, signal.SIG_IGN)
                        except OSError: pass
                    time.sleep(60)
                os._exit(0)
            return 'left'
    """
    before = started()
    assert value_of(code, mode=mode, limits=UNFILTERED) in ("'left'", "CandidateError: BlockingIOError: [Errno 11] ")
    assert none_left(before)


@pytest.mark.parametrize("mode", [*NAMESPACES, "none"])
@pytest.mark.parametrize("attack", ["loop", "sleep", "swallow"])
def test_code_without_end_is_killed(mode, attack):
    body = {
        "loop": "while True: pass",
        "sleep": "time.sleep(1000)",
        "swallow": """
            for k in set(range(1, 65)) - {9, 19, 32, 33}: signal.signal(k, signal.SIG_IGN)
            while True:
                try:
                    while True: pass
                except BaseException: pass
        """,
    }[attack]
    code = "import signal, time\ndef double(x):\n" + textwrap.indent(textwrap.dedent(body), "    ")
    before, start = started(), time.monotonic()
    assert verdict(code, mode, limits=Limits(seconds=1.5)).reason == "no verdict after 1.5 seconds"
    assert time.monotonic() - start < 30
    assert none_left(before)


@pytest.mark.parametrize("mode", [*NAMESPACES, "none"])
def test_gigabytes_of_memory(mode):
    code = """
        def attack():
            kept = []
            try:
                for _ in range(64): kept.append(bytearray(2**24))
            except MemoryError: pass
            return len(kept)
    """
    assert 0 < int(value_of(code, mode=mode)) < 512 / 16  # of 16 MB each


@pytest.mark.parametrize("mode", NAMESPACES)
@pytest.mark.parametrize("limits", [None, UNFILTERED], ids=["filtered", "unfiltered"])
def test_the_home_folder_and_other_files_cannot_be_read(mode, limits, tmp_path):
    (tmp_path / "canary").write_text("secret")
    code = """
        import os
        def attack(file, home):
            try: return open(file).read()
            except OSError: pass
            seen = [os.path.join(top, name) for top, _, names in os.walk(home) for name in names]
            return sorted({'/'.join(path.split('/')[:3]) for path in seen}), os.path.exists('/etc')
    """
    found = value_of(code, str(tmp_path / "canary"), str(Path.home()) + "/", mode=mode, limits=limits)
    assert "secret" not in found
    python = Path(sys.base_prefix)
    kept = []
    if python.is_relative_to(Path.home()):  # an interpreter in the home folder is the only thing there
        kept = [str(Path.home() / python.relative_to(Path.home()).parts[0])]
    assert eval(found) == (kept, False)


@pytest.mark.parametrize("mode", NAMESPACES)
def test_only_libraries_and_an_empty_folder_are_there(mode):
    code = "import os\ndef attack(): return os.listdir('/'), os.getcwd(), os.listdir('.')"
    top, folder, inside = eval(value_of(code, mode=mode))
    allowed = {path.split("/")[1] for path in sandbox._folders()}
    assert (set(top), folder, inside) == ({*allowed, "empty"}, "/empty", [])


@pytest.mark.parametrize("mode, limits", [*((m, None) for m in FILTERED), *((m, UNFILTERED) for m in NAMESPACES)])
def test_nothing_can_be_written_removed_or_made(mode, limits, tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("kept")
    code = (
        TRY
        + """
    import os, shutil
    def attack(folder):
        file = folder + '/canary'
        def write(name): open(name, 'w').write('x')
        places = [folder, '/empty', '.', '/', '/usr', '/tmp', '/dev/shm', '/var/tmp']
        return all([
            *(refused(write, place + '/new') for place in places), refused(write, file), refused(os.remove, file),
            *(refused(os.mkdir, place + '/new') for place in places), refused(os.rename, file, folder + '/moved'),
            refused(os.symlink, file, folder + '/link'), refused(os.truncate, file, 0), refused(os.chmod, file, 0),
            refused(os.utime, file), refused(os.chown, file, 1, 1), refused(os.mkfifo, folder + '/pipe'),
        ])
    """
    )
    assert value_of(textwrap.dedent(code), str(tmp_path), mode=mode, limits=limits) == "True"
    assert [path.name for path in tmp_path.iterdir()] == ["canary"] and canary.read_text() == "kept"


@pytest.mark.parametrize("mode", FILTERED)
def test_gigabytes_of_files(mode, tmp_path):
    code = """
        import os
        def attack(folder):
            written = 0
            for k in range(64):
                for place in (folder, '.', '/empty', '/tmp', '/dev/shm'):
                    try: written += os.write(os.open(f'{place}/{k}', os.O_CREAT | os.O_RDWR), bytes(2**20))
                    except OSError: pass
            return written
    """
    assert value_of(code, str(tmp_path), mode=mode) == "0"


@pytest.mark.parametrize("mode, limits", [*((m, None) for m in FILTERED), *((m, UNFILTERED) for m in NAMESPACES)])
def test_no_socket_reaches_anything(mode, limits, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "socket"))
        local.listen()
        code = (
            TRY
            + """
    import socket
    def connect(family, address):
        with socket.socket(family) as s:
            s.settimeout(2)
            s.connect(address)
    def attack(port, path):
        return (
            refused(connect, socket.AF_INET, ('127.0.0.1', port)), refused(connect, socket.AF_UNIX, path),
            refused(connect, socket.AF_INET, ('1.1.1.1', 53)), refused(socket.getaddrinfo, 'localhost', port),
        )
        """
        )
        port = tcp.getsockname()[1]
        found = eval(value_of(textwrap.dedent(code), port, str(tmp_path / "socket"), mode=mode, limits=limits))
        assert found[:3] == (True, True, True)
        for server in (tcp, local):
            server.settimeout(0.2)
            with pytest.raises(TimeoutError):
                server.accept()


@pytest.mark.parametrize("mode, limits", [*((m, None) for m in FILTERED), *((m, UNFILTERED) for m in NAMESPACES)])
def test_no_other_process_can_be_killed(mode, limits):
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    code = (
        TRY
        + """
    import os, signal, fcntl
    def attack(victim, runner):
        answer = [refused(os.kill, pid, 9) for pid in (victim, runner)]
        try: fcntl.fcntl(0, fcntl.F_SETOWN, victim); fcntl.fcntl(0, fcntl.F_SETFL, os.O_ASYNC)
        except OSError: pass
        return answer
    """
    )
    try:
        found = value_of(textwrap.dedent(code), victim.pid, os.getpid(), mode=mode, limits=limits)
        assert found == "[True, True]"
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@pytest.mark.parametrize("mode", [*NAMESPACES, "none"])
def test_huge_output_goes_nowhere_and_changes_nothing(mode):
    code = """
        import os, sys
        for _ in range(2000): print('x' * 2**15)
        for _ in range(200): os.write(2, bytes(2**20))
        def double(x):
            sys.stdout.write('y' * 2**20)
            return 2 * x
    """
    before = psutil.Process().memory_info().rss
    assert verdict(code, mode).passed
    assert psutil.Process().memory_info().rss - before < 50 * 2**20


@pytest.mark.parametrize("mode", FILTERED)
def test_raw_system_calls_are_refused(mode):
    """Anonymous memory files, tracing, namespaces, mounts, io_uring, keys, BPF, shared memory, user ids."""
    numbers = {
        **{"memfd_create": 319, "ptrace": 101, "unshare": 272, "mount": 165, "io_uring_setup": 425, "keyctl": 250},
        **{"bpf": 321, "shmget": 29, "setuid": 105, "process_vm_readv": 310, "prctl": 157, "prlimit64": 302},
        **{"chroot": 161, "ioctl": 16, "pidfd_open": 434, "userfaultfd": 323, "execveat": 322, "openat2": 437},
        **{"clone3": 435, "open_by_handle_at": 304, "x32 getpid": 0x40000027, "none": 999},
    }
    code = """
        import ctypes
        def attack(numbers):
            libc = ctypes.CDLL(None, use_errno=True)
            return [n for n in numbers if libc.syscall(n, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1]
    """
    assert value_of(code, list(numbers.values()), mode=mode) == "[]"


@pytest.mark.parametrize("mode", FILTERED)
def test_limits_cannot_be_raised(mode):
    code = """
        import resource
        def attack():
            kinds = [resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU]
            for kind in kinds:
                try: resource.setrlimit(kind, (2**40, 2**40))
                except (OSError, ValueError): continue
                return kind
    """
    assert value_of(code, mode=mode) == "None"


@pytest.mark.parametrize("mode", [*NAMESPACES, "none"])
def test_the_code_ends_with_the_process_that_runs_it(mode):
    """Killed by a signal that it cannot see."""
    script = f"""
        import sys
        sys.path[:0] = {[str(Path(p)) for p in sys.path if "examples" in p]!r}
        from recipe.sandbox import Limits, Program, run
        print("ready", flush=True)
        sleep = "import time\\ndef f(): time.sleep(60)"
        run(Program(sleep, "f", "def check(candidate): candidate()"), {mode!r}, Limits(seconds=60))
    """
    before = started()
    runner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert runner.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 30
    while len(started() - before) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(started() - before) >= 2
    time.sleep(1)
    runner.send_signal(signal.SIGKILL)
    runner.communicate()
    assert none_left(before)


# --- what is said


def test_the_best_way_that_works_is_taken_and_said(capsys):
    assert sandbox.check_isolation(accept_risk=not CONTAINED) == [*NAMESPACES, "none"][0]
    assert f"isolated by: {[*NAMESPACES, 'none'][0]}" in capsys.readouterr().out


def test_without_namespaces_it_says_what_can_be_read_and_asks(monkeypatch, capsys):
    monkeypatch.setattr(sandbox, "mode", lambda: "none")
    with pytest.raises(sandbox.NotIsolated, match=r"can read every file that you can read(.|\n)*--accept_risk"):
        sandbox.check_isolation()
    assert sandbox.check_isolation(accept_risk=True) == "none"
    assert "not contained: Neither bubblewrap" in capsys.readouterr().out


def test_what_can_be_read_without_namespaces_is_as_said(tmp_path):
    (tmp_path / "canary").write_text("read")
    code = "def attack(file): return open(file).read()"
    assert value_of(code, str(tmp_path / "canary"), mode="none") == "'read'"


def test_without_the_filter_it_says_so(monkeypatch):
    monkeypatch.setattr(sandbox.sandbox_inside.platform, "machine", lambda: "aarch64")
    assert not Limits().filter
    assert [len(sandbox.missing(name)) for name in ("bwrap", "none")] == [1, 3]
    assert "System calls are not filtered" in sandbox.missing("bwrap")[0]
    monkeypatch.setattr(sandbox, "mode", lambda: "bwrap")
    with pytest.raises(sandbox.NotIsolated, match="attack the kernel"):
        sandbox.check_isolation()


def test_nothing_runs_on_another_system(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    sandbox.mode.cache_clear()
    with pytest.raises(sandbox.NotIsolated, match="Linux"):
        sandbox.mode()
    sandbox.mode.cache_clear()


def test_a_way_whose_program_is_not_installed_does_not_work(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sandbox, "_wrapped", lambda name, folder: ["no-such-program-here"])
    assert not sandbox.works("bwrap")
