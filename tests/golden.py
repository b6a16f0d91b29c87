"""Losses and parameters of 20 optimizer steps for each kind of layer and method.

    PYTHONPATH=. python tests/golden.py    # writes golden.json; run it before a change that must keep every bit

`test_golden.py` compares bit for bit on a machine of the same kind, and within the precision of the dtype on another.
"""

import hashlib
import json
import platform
import warnings
from pathlib import Path

import torch
from helpers import layer_cases, merged_cases, quantized_cases, tiny, twin

import flatlora

FILE, STEPS = Path(__file__).with_suffix(".json"), 20
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
ONE_PASS = [
    ("FlatLoraConfig", {"schedule": "cosine"}),
    ("FlatLoraConfig", {"schedule": "cosine", "resample": "step"}),
    ("RwpConfig", {}),
    ("RwpConfig", {"space": "adapter"}),
    ("EFMLoraConfig", {}),
    ("BiLoraConfig", {}),
    ("BarConfig", {}),
    ("BarConfig", {"variant": "nbar"}),
]
PACKAGES = {f"quantized {case.name}": case.package for case in quantized_cases.CASES if case.package}  # that cases need
CHECKPOINTING = {"": None, "reentrant": {"use_reentrant": True}, "frames": {"use_reentrant": False}}
TRAINING = [{}, {"lora_dropout": 0.1}, {"use_dora": True}, {"resample": "step"}]


def machine():
    """Identify what the bits of a matrix product depend on, beside the code."""
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("model name", "flags"))
    ]
    return hashlib.sha256(f"{platform.machine()} {models[:2]} {torch.__version__}".encode()).hexdigest()[:16]


def digest(tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        wide = tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()
        found.update(wide.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def train(model, loss, optimizer=torch.optim.AdamW):
    """Take 20 steps. `loss(step)` is the loss of one."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    made, losses = optimizer(parameters, lr=1e-2), []
    for step in range(STEPS):
        value = loss(step)
        value.backward()
        made.step()
        made.zero_grad()
        losses.append(value.detach())
    norm = torch.stack([p.detach().double().norm() for p in parameters]).norm()
    bits = digest(losses) + digest(parameters)
    return {"losses": [float(x) for x in losses], "norm": float(norm), "bits": bits}


def mean_square(out):
    return (out[0] if isinstance(out, tuple) else out).float().square().mean()


def exact_mean_square(out):
    return (out[0] if isinstance(out, tuple) else out).square().mean()


def layer_case(case, dtype):
    model, _, x = layer_cases.flat_model(case, dtype=dtype)
    return train(model, lambda step: exact_mean_square(model(x)))


def quantized_case(case):
    model, _layer = quantized_cases.flat_model(case)
    x = torch.randn(4, quantized_cases.N)
    return train(model, lambda step: mean_square(model(x)))


def merged_case(case):
    model = merged_cases.flat_model(case)
    x = merged_cases.input_of(case)
    return train(model.train(), lambda step: exact_mean_square(model(x)))


def one_pass_case(name, settings):
    settings = {"rho": 0.2, "schedule": "constant", "total_steps": STEPS} | settings
    model = twin.adapted(getattr(flatlora, name), **settings)
    return train(model, lambda step: twin.loss(model, step), torch.optim.SGD)


def two_pass_case(name):
    model = twin.adapted(getattr(flatlora, name), rho=0.2, schedule="constant")

    def loss(step):
        with flatlora.ascent(model):
            twin.loss(model, step).backward()
        return twin.loss(model, step)

    return train(model, loss)


def llama_case(checkpointing, settings, dtype):
    model = tiny.flat_model(schedule="cosine", total_steps=STEPS, **settings).to(dtype)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(checkpointing)
    torch.manual_seed(0)
    return train(model, lambda step: tiny.loss(model, step))


def cases():
    """name -> (dtype of the model, function that trains it)."""
    found = {}
    for case in layer_cases.CASES:
        for name, dtype in DTYPES.items():
            found[f"layer {case.name} {name}"] = name, lambda case=case, dtype=dtype: layer_case(case, dtype)
    for case in quantized_cases.CASES:
        dtype = "bfloat16" if "bf16" in case.name else "float32"
        found[f"quantized {case.name}"] = dtype, lambda case=case: quantized_case(case)
    for case in (merged_cases.ATTENTION, merged_cases.OUT_IN, merged_cases.IN_OUT):
        found[f"merged {case.name}"] = "float64", lambda case=case: merged_case(case)
    for name, settings in ONE_PASS:
        extra = "".join(f" {value}" for value in settings.values())
        found[f"method {name}{extra}"] = "float32", lambda n=name, s=settings: one_pass_case(n, s)
    for name in ("FMLoraConfig", "LoraSamConfig"):
        found[f"method {name}"] = "float32", lambda name=name: two_pass_case(name)
    for how, checkpointing in CHECKPOINTING.items():
        for settings in TRAINING:
            for dtype in ("float32", "bfloat16"):
                extra = "".join(f" {key}={value}" for key, value in settings.items())
                run = lambda c=checkpointing, s=settings, d=dtype: llama_case(c, s, DTYPES[d])  # noqa: E731
                found[f"llama {how or 'whole'}{extra} {dtype}"] = dtype, run
    return found


def run(train_case):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_case()


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {name: run(case) for name, (_, case) in cases().items()}
    FILE.write_text(json.dumps({"machine": machine(), "cases": results}, indent=0) + "\n")
    print(len(results), "cases")
