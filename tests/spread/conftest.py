"""Fixtures of the engines' tests: each training runs once for all tests of a class."""

import pytest
import torch
from helpers import launch_tests, method_runs, processes, tiny
from helpers.engine_runs import names_of, record
from helpers.engines import ENGINES


@pytest.fixture(scope="class")
def ranks(request, engine, tmp_path_factory):
    """The results that the processes of one engine saved."""
    folder, count = tmp_path_factory.mktemp(engine), ENGINES[engine].processes
    processes.run(record, engine, names_of(engine, request.cls.four_bit), str(folder), processes=count)
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


@pytest.fixture(scope="class", name="method_runs")
def folder_of_method_runs(engine, tmp_path_factory):
    """The folder where the processes of one engine saved their runs with the methods that use gradients."""
    folder = tmp_path_factory.mktemp(engine)
    processes.run(method_runs.record, engine, str(folder), processes=ENGINES[engine].processes)
    return folder


@pytest.fixture(scope="class")
def base(tmp_path_factory):
    """The folder of a tiny Llama."""
    folder = tmp_path_factory.mktemp("base")
    tiny.base_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="class")
def runs(request, launcher, engine, base, tmp_path_factory):
    """Folders of a whole run, and of a run resumed in the middle of it."""
    return launch_tests.run_and_resume(launcher, engine, base, tmp_path_factory.mktemp(engine), request.cls.method)


@pytest.fixture(scope="class")
def expected(request, base):
    """Losses and adapter of the same training in one process."""
    return launch_tests.train_alone(base, request.cls.method)
