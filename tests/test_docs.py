"""README and the pages of the documentation: their code runs, and the names, tests, and files in them exist."""

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

ROOT = Path(__file__).parents[1]
PAGES = ROOT / ".docs" / "pages"
ALL = [ROOT / "README.md", *sorted(PAGES.rglob("*.md"))]
ADVICE = "ignore:of Lightning on data loaders"
if importlib.util.find_spec("lightning"):  # pytest imports the class
    ADVICE = "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
WITH_CODE = [page for page in ALL if "```python" in page.read_text()]


def title(page):
    return page.relative_to(PAGES).with_suffix("").as_posix() if PAGES in page.parents else page.name


def known(folder):
    """Return the names that the pages use without defining them: a base model, data, a tokenizer, a UNet."""
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
@pytest.mark.parametrize("page", WITH_CODE, ids=title)
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


def test_the_readme_fits_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_script_of_the_readme_runs_before_and_after_the_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for side in "-+":
        code = "\n".join(line[1:] for line in lines.splitlines() if line[:1] in ("", " ", side))
        names = known(tmp_path)
        exec(compile(code, f"README.md, lines with {side}", "exec"), names)
        assert (tmp_path / "out" / "flatlora_config.json").exists() == (side == "+")


@pytest.mark.parametrize("page", ALL, ids=title)
def test_every_test_that_is_named_exists(page):
    named = re.findall(r"\b(tests/[\w/]+\.py)(?:::(\w+))?", page.read_text())
    gone = [f"{file}::{name}" for file, name in named if not defines(ROOT / file, name)]
    assert gone == []


def defines(file, name):
    return file.exists() and (not name or re.search(rf"^def {name}\(", file.read_text(), re.MULTILINE) is not None)


@pytest.mark.parametrize("page", ALL, ids=title)
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
