"""A file is checked as a whole. The error names what is wrong, and nothing has changed."""

import copy
import errno
import json
import math
import os
import sys

import pytest
import torch
from helpers import tiny

import flatlora
from flatlora import BiLoraConfig, FlatLoraConfig, get_flat_peft_model, perturbation, report
from flatlora.analysis import LossLine, loss_line, save
from flatlora.plotting import plot_loss_line

OURS = "flatlora_config.json"
X = torch.ones(2, 3)
LINE = LossLine(torch.ones(1), torch.ones(2, 1), 1.0, "filter", "merged", 0)
SETTINGS = {"rho": 0.3, "seed": 5, "schedule": "linear", "total_steps": 9}


def replaced(**values):
    return lambda content: json.dumps({**json.loads(content), **values}).encode()


def without(name):
    return lambda content: json.dumps({k: v for k, v in json.loads(content).items() if k != name}).encode()


FIELDS = ("rho", "schedule", "total_steps", "resample", "seed", "backend", "on_unsupported")
DAMAGED = {
    **{f"cut at {k}": lambda content, k=k: content[:k] for k in (0, 1, 5, 40)},
    **{f"without {name}": without(name) for name in FIELDS},
    **{f"{name} is {bad!r}": replaced(**{name: bad}) for name in FIELDS for bad in ([], {}, True, "x", -1.5)},
    **{f"rho is {bad}": replaced(rho=bad) for bad in (math.nan, math.inf, -math.inf, None, 1e300, 10**400)},
    **{f"is {text}": lambda _, text=text: text.encode() for text in ("{}", "[]", "3", "null", "text", '{"rho": 1, }')},
    "utf-16": lambda content: content.decode().encode("utf-16"),
    "zeros": lambda content: bytes(len(content)),
    "twice": lambda content: content.replace(b"{", b'{"rho": 0.1,', 1),
    "unknown": replaced(sigma=1),
    "class": replaced(config_class="Nothing"),
    "class is a list": replaced(config_class=[]),
    "deep": lambda _: b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_of_settings_is_named(damage, tmp_path):
    FlatLoraConfig(**SETTINGS).save_pretrained(tmp_path)
    file = tmp_path / OURS
    file.write_bytes(damage(file.read_bytes()))
    for read in (FlatLoraConfig.from_pretrained, lambda path: flatlora.load(tiny.base_model(), path)):
        with pytest.raises(ValueError, match=".") as error:
            read(tmp_path)
        assert OURS in str(error.value) and "." in str(error.value)


def test_a_folder_in_place_of_the_file_is_named(tmp_path):
    FlatLoraConfig(**SETTINGS).save_pretrained(tmp_path)
    (tmp_path / OURS).unlink()
    (tmp_path / OURS).mkdir()
    with pytest.raises(ValueError, match=OURS):
        FlatLoraConfig.from_pretrained(tmp_path)


def test_a_damaged_adapter_does_not_stop_the_settings_from_being_saved(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.warns(UserWarning, match="adapter_model.safetensors is damaged"):
        FlatLoraConfig(**SETTINGS).save_pretrained(tmp_path)
    assert FlatLoraConfig.from_pretrained(tmp_path).rho == 0.3


def test_no_keyword_is_swallowed(tmp_path):
    tiny.flat_model(**SETTINGS).save_pretrained(tmp_path)
    model = flatlora.load(tiny.base_model(), tmp_path, rho=0.1, seed=8, schedule="cosine", torch_device="cpu")
    state = perturbation(model)
    assert (state.rho, state.seed, state.settings.schedule) == (0.1, 8, "cosine")
    for call in (
        lambda: flatlora.load(tiny.base_model(), tmp_path, rhoo=0.1),
        lambda: FlatLoraConfig.from_pretrained(tmp_path, rhoo=0.1),
    ):
        with pytest.raises(TypeError, match="'rhoo'; did you mean rho"):
            call()
    with pytest.raises(TypeError, match="'mixd'; did you mean mixed"):
        get_flat_peft_model(tiny.base_model(), FlatLoraConfig(**tiny.LORA), mixd=True)


@pytest.mark.parametrize("name, value", [("rho", -1), ("on_unsupported", "x"), ("schedule", 3), ("seed", 0.5)])
def test_settings_are_looked_at_again_when_they_are_used(name, value, tmp_path):
    config = FlatLoraConfig(**tiny.LORA)
    setattr(config, name, value)
    for use in (lambda: get_flat_peft_model(tiny.base_model(), config), lambda: config.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=f"{name} must be .*got {value!r}"):
            use()
    assert not list(tmp_path.iterdir())


def test_a_configuration_of_the_fields_of_another_is_asked_for_rho():
    config = FlatLoraConfig(**tiny.LORA, **SETTINGS)
    with pytest.raises(ValueError, match="rho must be given.*copy.deepcopy"):
        FlatLoraConfig(**config.to_dict())
    assert FlatLoraConfig(**config.to_dict(), **SETTINGS) == config == copy.deepcopy(config)


STATES = {
    **{
        f"without {name}": lambda s, name=name: s.pop(name)
        for name in ("seed", "sample", "sample_used", "steps", "rhos")
    },
    **{f"rho {rho}": lambda s, rho=rho: s["rhos"].update(default=rho) for rho in (math.nan, -1, 1e300, "x", None)},
    "adapter": lambda s: s["rhos"].update(stranger=0.1),
    "seed": lambda s: s.update(seed=10**400),
    "sample": lambda s: s.update(sample=-1),
    "sample_used": lambda s: s.update(sample_used="yes"),
    "steps": lambda s: s.update(steps=-1),
    "length": lambda s: s.update(total_steps=0),
    "step of the origin": lambda s: s.update(origin=[0.5, -1]),
    "origin": lambda s: s.update(origin=[2.0, 0]),
    "short origin": lambda s: s.update(origin=[0.5]),
    "unknown": lambda s: s.update(more=1),
    "layer": lambda s: s["tensors"].update({"nowhere.ascent_A.default": torch.zeros(1)}),
    "rank": lambda s: s["tensors"].update({k: t[:1] for k, t in s["tensors"].items() if "ascent_A" in k}),
    "nan": lambda s: next(iter(s["tensors"].values())).fill_(math.nan),
    "method": lambda s: s.update(method={"state": 3}),
}


@pytest.mark.parametrize("damage", STATES.values(), ids=STATES)
def test_a_damaged_state_changes_nothing(damage):
    model = tiny.adapted(BiLoraConfig(rho=0.1, **tiny.LORA))
    state = perturbation(model)
    good = copy.deepcopy(state.state_dict())
    bad = copy.deepcopy(good)
    bad.update(seed=1234, steps=77)
    damage(bad)
    with pytest.raises(ValueError, match="the state of the perturbation cannot be loaded.*nothing has been changed"):
        state.load_state_dict(bad)
    now = state.state_dict()
    assert all(torch.equal(t, now["tensors"][k]) for k, t in good["tensors"].items())
    assert {k: v for k, v in now.items() if k != "tensors"} == {k: v for k, v in good.items() if k != "tensors"}
    state.load_state_dict({k: v for k, v in good.items() if k not in ("tensors", "method")})  # of an older version
    older = {"sample_used": "stale", "method": "climber"}
    state.load_state_dict({older.get(k, k): v for k, v in good.items()})


NOT_WHOLE = (b"", b'{"result": "LossLine", "los')
OF_A_RUN = {
    "trainer_state.json": (*NOT_WHOLE, b'{"log_history": 3}', b'{"log_history": [{"step": "x"}]}'),
    "adapter_config.json": (*NOT_WHOLE, b"[]"),
    "loss_line.json": (*NOT_WHOLE, b'{"result": "LossLine", "losses": 3}'),
}


@pytest.mark.parametrize("name, content", [(name, content) for name in OF_A_RUN for content in OF_A_RUN[name]])
def test_the_report_answers_with_a_sentence(name, content, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and name in said and said.count("\n") == 1


def measure(file):
    return loss_line(torch.nn.Linear(3, 2), lambda model, batch: model(batch).sum(), [X], distances=[1], file=file)


JOURNALS = {
    "empty line": lambda lines: [b"", *lines],
    "no settings": lambda lines: lines[1:],
    "a list": lambda lines: [b"[]", *lines[1:]],
    "no pair": lambda lines: [*lines, b'["1.0 D0"]'],
    "no loss": lambda lines: [*lines, b'["1.0 D0", "x"]'],
    "no name": lambda lines: [*lines, b"[3, 1.0]"],
    "a huge loss": lambda lines: [*lines, b'["1.0 D0", %d]' % 10**400],
    "an object": lambda lines: [*lines, b"{}"],
    "utf-16": lambda lines: [*lines, "é".encode("utf-16")],
    "zeros": lambda lines: [*lines, bytes(9)],
    "deep": lambda lines: [*lines, b"[" * 100_000],
}


@pytest.mark.parametrize("damage", JOURNALS.values(), ids=JOURNALS)
def test_a_malformed_journal_is_named_and_left_alone(damage, tmp_path):
    file = tmp_path / "journal"
    torch.manual_seed(0)
    measure(file)
    bad = b"\n".join(damage(file.read_bytes().splitlines())) + b"\n"
    file.write_bytes(bad)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="journal is no journal of a measurement.*delete this one"):
        measure(file)
    assert file.read_bytes() == bad


def test_a_journal_that_was_cut_short_goes_on(tmp_path):
    file = tmp_path / "journal"
    torch.manual_seed(0)
    whole = measure(file)
    content = file.read_bytes()
    for length in range(content.index(b"\n") + 1, len(content)):
        file.write_bytes(content[:length])
        torch.manual_seed(0)
        assert torch.equal(measure(file).losses, whole.losses) and file.read_bytes() == content


@pytest.mark.parametrize("use", [measure, lambda path: save(LINE, path)], ids=["journal", "save"])
@pytest.mark.parametrize("place", ["folder", "file/below"])
def test_a_path_that_cannot_be_written_is_named(use, place, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"{place} cannot be .*Give another"):
        use(tmp_path / place)


@pytest.mark.parametrize("place", ["folder", "file/below", "missing/page.html"])
def test_a_report_that_cannot_be_written_is_a_sentence(place, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    save(LINE, tmp_path / "run" / "line.json")
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path / "run"), "-o", str(tmp_path / place)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and f"{place} cannot be written" in said and said.count("\n") == 1
    assert not list(tmp_path.glob(".*"))  # what was begun is taken away


def test_without_matplotlib_figures_and_report_say_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # its import fails
    save(LINE, tmp_path / "line.json")
    with pytest.raises(ImportError, match=r"pip install 'flatlora\[plot\]'"):
        plot_loss_line({"one": LINE})
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path), "-o", str(tmp_path / "page.html")])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "pip install 'flatlora[plot]'" in said and said.count("\n") == 1


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_full_disk_leaves_the_old_file_whole(step, tmp_path, monkeypatch):
    FlatLoraConfig(**SETTINGS).save_pretrained(tmp_path)
    before = (tmp_path / OURS).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, step, full_disk)
        with pytest.raises(OSError, match="No space left"):
            FlatLoraConfig(rho=0.7).save_pretrained(tmp_path)
    assert (tmp_path / OURS).read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    assert FlatLoraConfig.from_pretrained(tmp_path).rho == 0.3
