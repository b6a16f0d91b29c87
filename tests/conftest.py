import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)  # tiny models: waking a second thread costs more than it saves


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
