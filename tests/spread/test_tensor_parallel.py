"""Two processes that split the weights train as one process with whole weights."""

import json
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import processes, tiny
from helpers import tensor_parallel as split
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from flatlora import FlatLoraConfig, perturbation, perturbed
from flatlora.ops.philox import mix_rank

pytestmark = [
    processes.patient,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),  # peft's own notice
]
CONFIG = {**split.FLAT, **tiny.LORA}
EMBEDDING = {**CONFIG, "target_modules": ["embed_tokens", "v_proj", "down_proj"]}
CASES = {  # how it is split, the config, options of from_pretrained, checkpointing
    "transformers": ("transformers", CONFIG, {}, None),
    "float64": ("transformers", CONFIG, {"dtype": torch.float64}, None),
    "bfloat16": ("transformers", CONFIG, {"dtype": torch.bfloat16}, None),
    "reentrant": ("transformers", CONFIG, {}, True),
    "non-reentrant": ("transformers", CONFIG, {}, False),
    "reference": ("transformers", {**CONFIG, "backend": "reference"}, {}, None),
    "step": ("transformers", {**CONFIG, "resample": "step"}, {}, None),
    "embedding": ("transformers", EMBEDDING, {}, None),
    "torch": ("torch", CONFIG, {}, None),
    "torch reentrant": ("torch", CONFIG, {}, True),
}
CASES = {name: case for name, case in CASES.items() if split.BY_TRANSFORMERS or case[0] == "torch"}
ROUNDING = {"rtol": 1e-4, "atol": 3e-5}  # of float32, relative to the largest element; in float64 there is almost none

COARSE = {"rtol": 0, "atol": 0.05}  # of sums of bfloat16


def make(folder, mesh, how, config, options, checkpointing):
    config = FlatLoraConfig(**config)
    if how == "torch" and mesh is not None:
        model = split.by_torch(folder, mesh, config, **options)
    else:
        model = (split.whole if mesh is None else split.by_transformers)(folder, config, **options)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    return model


def train_parts(rank, folder):
    split.environment(rank)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    for name, case in CASES.items():
        model = make(folder, mesh, *case)
        found = split.train(model)
        if case[0] == "transformers":
            model.save_pretrained(f"{folder}/{name}", is_main_process=rank == 0)
        model.eval()
        with torch.no_grad():
            found["evaluation"] = tiny.loss(model)
        torch.save(found, f"{folder}/{name}.{rank}.pt")
    if split.BY_TRANSFORMERS:
        found = split.gradients_of_a_pass(split.with_two_adapters(split.by_transformers(folder)))
        torch.save(found, f"{folder}/two.{rank}.pt")
    found = split.gradients_of_blocks(split.blocks_by_sequence(mesh), slice(3 * rank, 3 * rank + 3))
    torch.save(found, f"{folder}/sequence.{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of both processes."""
    folder = tmp_path_factory.mktemp("split")
    split.save_base(folder)
    processes.run(train_parts, str(folder))
    return folder


@pytest.fixture(params=CASES)
def case(request, folder):
    """(name, result of one process, results of two processes)."""
    model = make(folder, None, *CASES[request.param])
    one = split.train(model)
    model.save_pretrained(folder / f"{request.param}.whole")
    model.eval()
    with torch.no_grad():
        one["evaluation"] = tiny.loss(model)
    return request.param, one, [torch.load(folder / f"{request.param}.{rank}.pt") for rank in range(2)]


def test_two_processes_train_as_one(case):
    name, one, both = case
    if name == "bfloat16":
        return is_near(one, both)
    rounding = {"rtol": 1e-9, "atol": 1e-10} if name == "float64" else ROUNDING
    for two in both:
        pairs = [(two["losses"], one["losses"]), (two["evaluation"], one["evaluation"])]
        for step, expected in enumerate([*one["gradients"], one["parameters"]]):
            actual = [*two["gradients"], two["parameters"]][step]
            assert actual.keys() == expected.keys()
            pairs += [(actual[key], expected[key]) for key in expected]
        for actual, expected in pairs:
            scale = expected.abs().max()
            torch.testing.assert_close(actual / scale, expected / scale, **rounding)


def is_near(one, both):
    """In bfloat16 the gradients of a step differ by 0.4 %, as those of one process differ from float32 (0.5 %)."""
    first, *others = (torch.cat([g.flatten() for g in run["gradients"][0].values()]) for run in (one, *both))
    for two, gradients in zip(both, others, strict=True):
        assert (gradients - first).norm() < 0.01 * first.norm()
        torch.testing.assert_close(two["losses"], one["losses"], rtol=0, atol=2e-3)


def test_both_have_the_noise_of_one_process(case, folder):
    """The same seed, rank, sample and streams; and each part of W begins where its noise begins."""
    name, one, both = case
    seed, sample = one["noise"][3], split.STEPS - 1 if name == "step" else one["noise"][1]
    base = dict(LlamaForCausalLM.from_pretrained(folder, **CASES[name][2]).named_parameters())
    covered = {}
    for two in both:
        assert two["noise"] == one["noise"] and two["streams"] == one["streams"]
        for stream, (weight, row, column, key) in two["products"].items():
            assert key.tolist() == [seed, sample]
            whole = base[one["streams"][stream].removeprefix("base_model.model.") + ".weight"]
            here = (slice(row, row + weight.shape[0]), slice(column, column + weight.shape[1]))
            assert torch.equal(weight, whole[here])
            covered.setdefault(stream, torch.zeros_like(whole))[here] += 1
    assert covered and all((count == 1).all() for count in covered.values())
    offsets = {(row, column) for _, row, column, _ in both[1]["products"].values()}
    assert {(0, 25)} <= offsets  # inside a tile


def test_row_norms_are_summed_once_a_step(case):
    """Over two batches and a recompute; before the first step of a run is seen, once for each pass."""
    name, _, both = case
    counted = [split.ACCUMULATED, *[1] * (split.STEPS - 1)]
    if CASES[name][3]:  # transformers sums x A^T, without gradients, by the same function: 2 layers, W and A of 2 each
        counted = [count + (8 * split.ACCUMULATED if CASES[name][0] == "transformers" else 0) for count in counted]
    assert [two["sums"] for two in both] == [counted] * 2


def settings(file):
    found = json.loads(file.read_text())
    found["target_modules"] = sorted(found.get("target_modules", []))  # peft saves a set in any order
    return found


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name][0] == "transformers"], indirect=True)
def test_the_adapter_is_saved_as_by_one_process(case, folder):
    name, _, both = case
    saved, expected = (folder / f"{name}{end}" for end in ("", ".whole"))
    assert {file.name for file in saved.iterdir()} == {file.name for file in expected.iterdir()}
    tensors, whole = load_file(saved / "adapter_model.safetensors"), load_file(expected / "adapter_model.safetensors")
    assert tensors.keys() == whole.keys()
    for key, tensor in whole.items():
        assert tensors[key].dtype == tensor.dtype
        torch.testing.assert_close(tensors[key], tensor, **(COARSE if name == "bfloat16" else ROUNDING))
    for file in ("adapter_config.json", "flatlora_config.json"):
        if (expected / file).exists():
            assert settings(saved / file) == settings(expected / file)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder, **CASES[name][2]), saved)
    with torch.no_grad():
        torch.testing.assert_close(
            tiny.loss(loaded), both[0]["evaluation"], **(COARSE if name == "bfloat16" else ROUNDING)
        )


@pytest.mark.skipif(not split.BY_TRANSFORMERS, reason="transformers splits weights from 5.17 on")
def test_two_adapters(folder):
    expected = split.gradients_of_a_pass(split.with_two_adapters(split.whole(folder)))
    assert any("second" in name for name in expected)
    for rank in range(2):
        found = torch.load(folder / f"two.{rank}.pt")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key] / value.abs().max(), value / value.abs().max(), **ROUNDING)


def test_sequence_parallelism(folder):
    expected = split.gradients_of_blocks(split.blocks())
    for rank in range(2):
        found = torch.load(folder / f"sequence.{rank}.pt")
        for step in range(2):
            assert found[step].keys() == expected[step].keys()
            for key, gradient in expected[step].items():
                scale = gradient.abs().max()
                torch.testing.assert_close(found[step][key] / scale, gradient / scale, **ROUNDING)


def test_fsdp2_of_a_base_layer_is_no_tensor_parallelism(tmp_path):
    """Its weight is a DTensor until the base layer is called."""
    expected = tiny.loss(tiny.flat_model())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny.flat_model()
        for layer in model.base_model.model.model.layers:
            fully_shard(layer.self_attn.q_proj.base_layer)
            assert isinstance(layer.self_attn.q_proj.base_layer.weight, DTensor)
        assert torch.equal(tiny.loss(model), expected)
    finally:
        dist.destroy_process_group()


# ---- together with data parallelism: two groups of two processes ----


def gradients_of_two_steps(rank, folder):
    split.environment(rank)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    group = mesh["dp"].get_local_rank()
    for name in ("replicated", "fsdp2"):
        model = split.by_torch(folder, mesh["tp"], FlatLoraConfig(**CONFIG))
        if name == "fsdp2":
            for layer in model.base_model.model.model.layers:
                fully_shard(layer, mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
        parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
        optimizer, found = torch.optim.SGD(parameters.values(), lr=0.5, foreach=False), []
        for step in range(2):
            with mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as reduced:
                tiny.loss(model, seed=2 * step + group).backward()
            if name == "replicated":
                for parameter in parameters.values():
                    gradient = getattr(parameter.grad, "_local_tensor", parameter.grad)
                    dist.all_reduce(gradient.div_(2), group=mesh["dp"].get_group())
            found.append({key: split.as_whole(p.grad) for key, p in parameters.items()})
            optimizer.step()
            optimizer.zero_grad()
        noise = (perturbation(model).rank, perturbation(model).noise.mixed_seed(), reduced.call_count)
        torch.save((found, noise), f"{folder}/{name}.{rank}.pt")


@pytest.mark.thorough
def test_groups_have_noise_of_their_own(tmp_path):
    """Gradients are the mean over both groups, each with its batch and the noise of its data-parallel rank."""
    split.save_base(tmp_path)
    processes.run(gradients_of_two_steps, str(tmp_path), processes=4)
    model = split.whole(tmp_path, FlatLoraConfig(**CONFIG))
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    optimizer, expected = torch.optim.SGD(parameters.values(), lr=0.5, foreach=False), []
    for step in range(2):
        for group in range(2):
            perturbation(model).rank = group
            with perturbed(model, sample=step):
                (tiny.loss(model, seed=2 * step + group) / 2).backward()
        expected.append({key: p.grad.clone() for key, p in parameters.items()})
        optimizer.step()
        optimizer.zero_grad()
    for name, sums in (("replicated", 1), ("fsdp2", 2)):  # once for each block that FSDP2 gathers
        for rank in range(4):
            found, noise = torch.load(tmp_path / f"{name}.{rank}.pt")
            assert noise == (rank // 2, mix_rank(7, rank // 2), sums)
            for step in range(2):
                for key, gradient in expected[step].items():
                    scale = gradient.abs().max()
                    torch.testing.assert_close(found[step][key] / scale, gradient / scale, **ROUNDING)
