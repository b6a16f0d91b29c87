"""transformers' Trainer: the schedule, the logs, evaluation without noise, and the Trainer's other features."""

import pytest
from helpers import tiny
from helpers.runs import RHO, adapter, assert_same_adapter, batches, cosine, flat_model, plain_model, rows, trainer
from peft import PeftModel
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

from flatlora import FlatLoraCallback, FlatLoraConfig, get_flat_peft_model, perturbation
from flatlora.analysis import expected_sharpness


def with_callback(**settings):
    return flat_model(**settings), [FlatLoraCallback()]


def without(**settings):
    return flat_model(**{"total_steps": 6, **settings}), []


# ---- the ramp ----


@pytest.mark.parametrize("way", [with_callback, without])
@pytest.mark.parametrize(
    "accumulation, windows",
    [(1, [1, 1, 1]), (2, [2, 2, 1]), (3, [3, 3, 2])],  # batches in each optimizer step of one of the two epochs
    ids=["every-batch", "two-and-a-rest", "three-and-a-rest"],
)
def test_ramp(way, accumulation, windows, passes, tmp_path):
    model, callbacks = way()
    seen = passes(model)
    run = trainer(
        model,
        tmp_path,
        callbacks=callbacks,
        data=rows(sum(windows)),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
    )
    run.train()
    expected = [cosine(step, 6) for step, count in enumerate(windows * 2) for _ in range(count)]
    assert [p.rho for p in seen] == pytest.approx(expected, abs=1e-6)
    assert perturbation(model).steps == perturbation(model).total_steps == run.state.max_steps == 6
    assert perturbation(model).rho_t == RHO


@pytest.mark.parametrize("resample", ["forward", "step"])
def test_samples(resample, passes, tmp_path):
    model, callbacks = with_callback(resample=resample, schedule="constant")
    seen = passes(model)
    trainer(model, tmp_path, callbacks=callbacks, gradient_accumulation_steps=2).train()
    samples = [sample for p in seen for sample in p.samples]
    batches = 3 * 4
    assert len(samples) == batches
    assert len(set(samples)) == {"forward": batches, "step": batches // 2}[resample]


def test_total_steps_of_the_config_wins(passes, tmp_path):
    model, callbacks = with_callback(total_steps=10)
    seen = passes(model)
    trainer(model, tmp_path, callbacks=callbacks, max_steps=4).train()
    assert [p.rho for p in seen] == pytest.approx([cosine(step, 10) for step in range(4)], abs=1e-6)


def test_a_second_training_starts_the_ramp_again(passes, tmp_path):
    model, callbacks = with_callback()
    seen = passes(model)
    trainer(model, tmp_path, callbacks=callbacks, max_steps=2).train()
    trainer(model, tmp_path, callbacks=callbacks, max_steps=3).train()
    expected = [cosine(0, 2), cosine(1, 2), cosine(0, 3), cosine(1, 3), cosine(2, 3)]
    assert [p.rho for p in seen] == pytest.approx(expected, abs=1e-6)


def test_a_model_that_is_not_flat(tmp_path):
    with pytest.raises(ValueError, match="no flat LoRA layer"):
        trainer(plain_model(), tmp_path, callbacks=[FlatLoraCallback()]).train()


# ---- what is logged ----


class Report(TrainerCallback):
    """A stand-in for TensorBoard and others: it keeps the numbers that are logged."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.seen.append(dict(logs))


def test_logs(tmp_path):
    model, callbacks = with_callback()
    before, after = Report(), Report()  # before: as those of `report_to` are
    run = trainer(model, tmp_path, callbacks=[before, *callbacks, after], max_steps=4, logging_steps=2)
    run.train()
    for logs in (after.seen, run.state.log_history):
        assert [entry["flat_rho"] for entry in logs if "loss" in entry] == pytest.approx([cosine(2, 4), cosine(4, 4)])
        assert all("flat_rho" not in entry for entry in logs if "loss" not in entry)
    assert not any("flat_rho" in entry for entry in before.seen)


def test_added_first_the_loggers_of_report_to_see_it(tmp_path):
    model, (ours,) = with_callback()
    before = Report()
    run = trainer(model, tmp_path, callbacks=[before, ours], max_steps=2)
    ours.add_to(run)
    assert run.callback_handler.callbacks.count(ours) == 1
    run.train()
    assert [entry["flat_rho"] for entry in before.seen if "loss" in entry] == pytest.approx([cosine(1, 2), RHO])


def sharpness(model, **settings):
    data = batches(2)
    found = expected_sharpness(model, lambda m, b: m(**b).loss, data, samples=4, progress=False, **settings)
    return found.mean.item(), found.stderr.item()


class Measured(TrainerCallback):
    """Measure the same at each step by hand."""

    def __init__(self):
        self.values = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.values[state.global_step] = sharpness(model, rho=RHO)


def test_sharpness_is_logged_and_training_does_not_notice(tmp_path):
    options = {"lora_dropout": 0.2}
    model, other = flat_model(**options), flat_model(**options)
    measured, ours = Measured(), FlatLoraCallback(sharpness_steps=2, sharpness_batches=batches(2))
    settings = {"max_steps": 5, "logging_steps": 5}
    run = trainer(model, tmp_path, callbacks=[ours, measured], **settings)
    run.train()
    logs = {entry["step"]: entry for entry in run.state.log_history if "loss" in entry}
    assert list(logs) == [2, 4, 5]
    for step in (2, 4):
        assert (logs[step]["flat_sharpness"], logs[step]["flat_sharpness_stderr"]) == measured.values[step]
    assert "flat_sharpness" not in logs[5] and logs[2]["flat_sharpness"] > 0
    trainer(other, tmp_path, callbacks=[FlatLoraCallback()], **settings).train()
    assert_same_adapter(model, adapter(other))


def test_sharpness_of_the_users_own_loss_and_strength(tmp_path):
    model, seen = flat_model(rho=0.0), []

    def loss(model, batch):
        seen.append(model.training)
        return model(**batch).loss * 2

    ours = FlatLoraCallback(sharpness_steps=1, sharpness_batches=batches(2), sharpness_rho=0.3, sharpness_loss=loss)
    run = trainer(model, tmp_path, callbacks=[ours], max_steps=1)
    run.train()
    assert run.state.log_history[0]["flat_sharpness"] == pytest.approx(2 * sharpness(model, rho=0.3)[0])
    assert seen == [False] * 2 * (2 * 4 + 1)


def test_a_resumed_run_logs_the_same_sharpness(tmp_path):
    def train(folder, **how):
        ours = FlatLoraCallback(sharpness_steps=1, sharpness_batches=batches(1))
        run = trainer(flat_model(), folder, callbacks=[ours], max_steps=4, save_strategy="steps", save_steps=2)
        run.train(**how)
        return [entry["flat_sharpness"] for entry in run.state.log_history if "loss" in entry]

    whole = train(tmp_path / "a")
    assert len(whole) == 4
    assert train(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2")) == whole


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sharpness_steps": 0, "sharpness_batches": [{}]}, "sharpness_steps must be an integer >= 1 or None, got 0"),
        ({"sharpness_steps": 5}, "belong together.*sharpness_steps=5 and no batches"),
        ({"sharpness_batches": [{}]}, "belong together.*sharpness_steps=None and batches"),
        ({"sharpness_steps": 5, "sharpness_batches": []}, "at least one batch, got none"),
        ({"sharpness_samples": 0}, "sharpness_samples must be an integer >= 1, got 0"),
        ({"sharpness_rho": 0.0}, "sharpness_rho must be > 0, got 0"),
        ({"sharpness_rho": -1.0}, "rho must be finite and >= 0, got -1.0"),
    ],
)
def test_what_is_to_be_measured_is_checked_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        FlatLoraCallback(**settings)


@pytest.mark.parametrize("bar", [True, False], ids=["bar", "no-bar"])
def test_progress_shows_the_strength(bar, capsys, tmp_path):
    model, callbacks = with_callback()
    trainer(model, tmp_path, callbacks=callbacks, max_steps=1, disable_tqdm=not bar).train()
    assert f"'flat_rho': '{RHO}'" in capsys.readouterr().out


# ---- evaluation ----


class Evaluated(TrainerCallback):
    def __init__(self):
        self.losses = {}

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.losses[state.global_step] = metrics["eval_loss"]


def test_evaluation_during_training_is_that_of_plain_lora(passes, tmp_path):
    model, callbacks = with_callback(schedule="constant")
    seen, evaluated = passes(model), Evaluated()
    trainer(
        model,
        tmp_path,
        callbacks=[*callbacks, evaluated],
        more={"eval_dataset": rows(6)},
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    ).train()
    assert [p.rho for p in seen if p.training] == pytest.approx([RHO] * 3)
    assert not any(p.strengths for p in seen if not p.training)
    for step, loss in evaluated.losses.items():
        plain = PeftModel.from_pretrained(tiny.base_model(), tmp_path / f"checkpoint-{step}")
        assert trainer(plain, tmp_path).evaluate(rows(6))["eval_loss"] == loss


def test_early_stopping_and_the_best_model(tmp_path):
    model, callbacks = with_callback()
    run = trainer(
        model,
        tmp_path,
        callbacks=[*callbacks, EarlyStoppingCallback(early_stopping_patience=1)],
        more={"eval_dataset": rows(4, length=5)},
        learning_rate=1.0,  # far too much: the first evaluation stays the best
        max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    run.train()
    stopped = run.state.global_step
    assert stopped < 6 and perturbation(model).steps == stopped and perturbation(model).total_steps == 6
    best = PeftModel.from_pretrained(tiny.base_model(), run.state.best_model_checkpoint)
    assert run.state.best_global_step < stopped
    assert_same_adapter(model, adapter(best))


# ---- the trainer's other features, beside us ----

BESIDE = {
    "dropout": {},
    "label-smoothing": {"label_smoothing_factor": 0.1},
    "neftune": {"neftune_noise_alpha": 5.0},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "bf16": {"bf16": True},
    "clipping": {"max_grad_norm": 0.01},
    "group-by-length": {"train_sampling_strategy": "group_by_length"},
    "accumulation": {"gradient_accumulation_steps": 3},
}


@pytest.mark.parametrize("settings", BESIDE.values(), ids=BESIDE)
def test_without_strength_it_is_plain_lora(settings, tmp_path):
    plain, flat = plain_model(lora_dropout=0.1), flat_model(rho=0.0, lora_dropout=0.1)
    trainer(plain, tmp_path, max_steps=3, **settings).train()
    trainer(flat, tmp_path, callbacks=[FlatLoraCallback()], max_steps=3, **settings).train()
    assert_same_adapter(flat, adapter(plain))


@pytest.mark.parametrize("settings", BESIDE.values(), ids=BESIDE)
def test_every_training_pass_is_perturbed(settings, passes, tmp_path):
    model, callbacks = with_callback(schedule="constant")
    seen = passes(model)
    trainer(model, tmp_path, callbacks=callbacks, data=rows(18), max_steps=3, **settings).train()
    assert len(seen) == 3 * settings.get("gradient_accumulation_steps", 1)
    layers = sum(hasattr(module, "lora_A") for module in model.modules())
    for p in seen:
        assert len(p.strengths) == layers and p.rho == pytest.approx(RHO)


def test_compiled(tmp_path):
    """Noise and schedule equal those of the eager run; the rest differs by rounding."""
    losses = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        model, callbacks = with_callback()
        run = trainer(model, tmp_path, callbacks=callbacks, max_steps=4, **settings)
        run.train()
        logs = [entry for entry in run.state.log_history if "loss" in entry]
        assert [entry["flat_rho"] for entry in logs] == pytest.approx([cosine(step, 4) for step in (1, 2, 3, 4)])
        losses.append([entry["loss"] for entry in logs])
        assert perturbation(model).sample == 3
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)


class LittleMemory(Trainer):
    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


def test_a_batch_size_that_is_found(passes, tmp_path):
    model, callbacks = with_callback()
    seen = passes(model)
    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 8, "num_train_epochs": 1}
    run = trainer(model, tmp_path, kind=LittleMemory, callbacks=callbacks, **settings)
    run.train()
    steps = run.state.max_steps
    assert steps == perturbation(model).steps == perturbation(model).total_steps == len(seen) > 3
    assert [p.rho for p in seen] == pytest.approx([cosine(step, steps) for step in range(steps)], abs=1e-6)


def t5():
    sizes = dict(vocab_size=tiny.TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)), ["q", "wi"]


def bart():
    sizes = dict(vocab_size=tiny.TOKENS, d_model=32, max_position_embeddings=32)
    halves = {f"{half}_{name}": n for half in ("encoder", "decoder") for name, n in HALF.items()}
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2)
    return BartForConditionalGeneration(BartConfig(**sizes, **halves, **tokens)), ["q_proj", "fc1"]


HALF = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


@pytest.mark.parametrize("make", [t5, bart])
def test_seq2seq_trainer_generates_during_training(make, passes, tmp_path):
    base, targets = make()
    config = FlatLoraConfig(r=4, target_modules=targets, rho=RHO, schedule="constant", task_type="SEQ_2_SEQ_LM")
    model = get_flat_peft_model(base, config)
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None  # all of the length
    seen = passes(model)
    length, generated = 4, []
    run = trainer(
        model,
        tmp_path,
        kind=Seq2SeqTrainer,
        arguments=Seq2SeqTrainingArguments,
        callbacks=[FlatLoraCallback()],
        more={
            "eval_dataset": rows(2),
            "compute_metrics": lambda output: generated.append(output.predictions) or {"n": len(output.predictions)},
        },
        max_steps=2,
        predict_with_generate=True,
        generation_max_length=length,
        eval_strategy="steps",
        eval_steps=1,
    )
    run.train()
    training = [p for p in seen if p.training]
    layers = sum(hasattr(module, "lora_A") for module in model.modules())
    assert [(p.rho, len(p.strengths)) for p in training] == [(pytest.approx(RHO), layers)] * 2
    assert not any(p.strengths for p in seen if not p.training)
    assert [len(predictions) for predictions in generated] == [2] * 2
    encoding, loss = 1, 1
    assert len(seen) - len(training) == 2 * (encoding + length - 1 + loss)
