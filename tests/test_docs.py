"""The pages of the documentation: their code runs, and every public name is in the reference."""

import importlib.util
import inspect
import re
from pathlib import Path

import peft
import pytest
import torch
from helpers import tiny
from helpers.runs import batches, rows
from helpers.sentences import saved_bert
from helpers.trl_runs import texts, tokenizer
from torch.utils.data import DataLoader

PAGES = Path(__file__).parents[1] / ".docs" / "pages"
ADVICE = "ignore:of Lightning on data loaders"
if importlib.util.find_spec("lightning"):  # pytest imports the class
    ADVICE = "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
WITH_CODE = [page for page in sorted(PAGES.rglob("*.md")) if "```python" in page.read_text()]


def known(folder):
    """What the pages take as given: a base model, data, a tokenizer, a UNet."""
    datasets, diffusion = pytest.importorskip("datasets"), pytest.importorskip("helpers.diffusion")
    unet, unet_inputs = diffusion.unet, diffusion.unet_inputs
    prompts = [unet_inputs(seed) for seed in range(3)]
    return {
        "torch": torch,
        "LoraConfig": peft.LoraConfig,
        "get_peft_model": peft.get_peft_model,
        "base": tiny.base_model(),
        "fresh_base": tiny.base_model,
        "loader": DataLoader(rows(8), batch_size=2),
        "rows": rows(8),
        "held_out": batches(2),
        "embedder": saved_bert(folder / "bert"),
        "pairs": texts("anchor", "positive"),
        "unet": unet(),
        "fresh_unet": unet,
        "latents": [(*inputs.values(), torch.randn(2, 4, 8, 8)) for inputs in prompts],
        "texts": datasets.Dataset.from_dict({"text": ["one two three", "four five six"] * 4}),
        "tokenizer": tokenizer(),
    }


# the pages show what a user writes, and on a machine with an accelerator there is no such warning
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.filterwarnings(ADVICE)
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # Lightning's own
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`")
@pytest.mark.usefixtures("any_peft")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    exec(compile(code, str(page), "exec"), known(tmp_path))


@pytest.mark.parametrize("module", ["flatlora", "analysis", "methods", "ops", "plotting"])
def test_every_public_name_is_in_the_reference(module):
    name = module if module == "flatlora" else f"flatlora.{module}"
    public = set(importlib.import_module(name).__all__)
    if module == "flatlora":  # the methods have a page of their own
        public -= set(importlib.import_module("flatlora.methods").__all__)
    listed = set(
        re.findall(rf"::: {re.escape(name)}\.(\w+)$", (PAGES / "reference" / f"{module}.md").read_text(), re.M)
    )
    assert public == listed - {"config", "state"}


def has_docstring(thing):
    doc = inspect.getdoc(thing)
    return bool(doc) and not doc.startswith(f"{thing.__name__}(")  # what `dataclass` writes where nobody did


@pytest.mark.parametrize("module", ["flatlora", "analysis", "methods", "ops", "plotting"])
def test_every_public_name_has_a_docstring(module):
    module = importlib.import_module(module if module == "flatlora" else f"flatlora.{module}")
    public = {name: getattr(module, name) for name in module.__all__}
    assert [name for name, thing in public.items() if callable(thing) and not has_docstring(thing)] == []


def test_every_page_is_in_the_menu():
    menu = (PAGES.parent / "mkdocs.yml").read_text()
    assert [page for page in PAGES.rglob("*.md") if f"- {page.relative_to(PAGES).as_posix()}\n" not in menu] == []
