import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    # several threads are slower than one on tensors this small
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
