"""Hide the optional packages, as a plugin of pytest: `pytest -p without_optional`, with `tests` on the PYTHONPATH.

The tests are then collected as if only flatlora, its dependencies and pytest were installed.
"""

import sys

import pytest

OPTIONAL = (
    "bitsandbytes", "curvlinops", "datasets", "deepspeed", "diffusers", "hqq", "lightning", "liger_kernel",
    "matplotlib", "onnx", "rouge_score", "sacrebleu", "scipy", "sentence_transformers", "tensorboard", "torchao",
    "triton", "trl",
)  # fmt: skip
HIDDEN = (*OPTIONAL, "sklearn")  # it needs scipy, and transformers 5.6 imports it if it is there


class WithoutOptional:
    """A module finder that does not find the optional packages."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


def hide():
    found = [name for name in HIDDEN if name in sys.modules]
    if found:
        raise RuntimeError(f"imported before they could be hidden: {found}")
    sys.meta_path[:] = [WithoutOptional(finder) for finder in sys.meta_path]


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests():
    hide()
