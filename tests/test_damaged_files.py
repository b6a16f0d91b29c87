"""What is read from a file is checked whole, named in the error, and changes nothing if it is wrong."""

import copy
import json
import math

import pytest
import tiny
import torch

import flatlora
from flatlora import BiLoraConfig, FlatLoraConfig, get_flat_peft_model, perturbation, report

OURS = "flatlora_config.json"
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
        with pytest.raises(ValueError) as error:
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
    **{f"without {name}": lambda s, name=name: s.pop(name) for name in ("seed", "sample", "stale", "steps", "rhos")},
    **{f"rho {rho}": lambda s, rho=rho: s["rhos"].update(default=rho) for rho in (math.nan, -1, 1e300, "x", None)},
    "adapter": lambda s: s["rhos"].update(stranger=0.1),
    "seed": lambda s: s.update(seed=10**400),
    "sample": lambda s: s.update(sample=-1),
    "stale": lambda s: s.update(stale="yes"),
    "origin": lambda s: s.update(origin=[2.0, 0]),
    "short origin": lambda s: s.update(origin=[0.5]),
    "unknown": lambda s: s.update(more=1),
    "layer": lambda s: s["tensors"].update({"nowhere.ascent_A.default": torch.zeros(1)}),
    "rank": lambda s: s["tensors"].update({k: t[:1] for k, t in s["tensors"].items() if "ascent_A" in k}),
    "nan": lambda s: next(iter(s["tensors"].values())).fill_(math.nan),
    "climber": lambda s: s.update(climber={"state": 3}),
}


@pytest.mark.parametrize("damage", STATES.values(), ids=STATES)
def test_a_damaged_state_changes_nothing(damage):
    model = tiny.adapted(BiLoraConfig(rho=0.1, **tiny.LORA))
    state = perturbation(model)
    good = copy.deepcopy(state.state_dict())
    bad = copy.deepcopy(good)
    bad.update(seed=1234, steps=77)
    damage(bad)
    with pytest.raises(ValueError, match="the state of the noise cannot be loaded.*nothing has been changed"):
        state.load_state_dict(bad)
    now = state.state_dict()
    assert all(torch.equal(t, now["tensors"][k]) for k, t in good["tensors"].items())
    assert {k: v for k, v in now.items() if k != "tensors"} == {k: v for k, v in good.items() if k != "tensors"}
    state.load_state_dict({k: v for k, v in good.items() if k not in ("tensors", "climber")})  # of an older version


@pytest.mark.parametrize("name", ["trainer_state.json", "adapter_config.json", "loss_line.json"])
@pytest.mark.parametrize("content", [b"", b'{"result": "LossLine", "los', b'{"result": "LossLine", "log_history": 3}'])
def test_the_report_answers_with_a_sentence(name, content, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    if name == "adapter_config.json" and content.endswith(b"3}"):
        pytest.skip("a JSON object, and nothing in it is ours")
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and name in said and said.count("\n") == 1
