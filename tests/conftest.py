import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

pytest.register_assert_rewrite("helpers")

torch.set_num_threads(1)  # several threads are slower than one on tiny models


def pytest_collection_modifyitems(config, items):
    """Set the time limit of tests that start processes. Leave out tests that need a GPU if there is none."""
    from helpers import processes

    for item in items:
        if item.get_closest_marker("processes") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(processes.LONGEST))
    if not torch.cuda.is_available():
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def any_peft(monkeypatch):
    """Let transformers accept the installed peft.

    transformers 5.24 refuses `add_adapter` with a peft below 0.22, which is not released yet. Everything that it then
    calls works with peft 0.21.
    """
    from transformers.integrations import peft

    monkeypatch.setattr(peft, "check_peft_version", lambda min_version: None)
