"""Lightning, which runs forward and backward inside of `optimizer.step(closure)`."""

import pytest
import torch
from helpers.runs import RHO, adapter, assert_same_adapter, batches, cosine, flat_model, plain_model
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from flatlora import EFMLoraConfig, FlatLoraConfig, FMLoraConfig, ascent, perturbation

pytest.importorskip("lightning")
import lightning

STEPS = 6  # three epochs of two
pytestmark = [
    # Lightning's advice on data loaders and loggers
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`"),
    pytest.mark.filterwarnings(
        "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"
    ),  # Lightning's own, with torch 2.13
]


class Tuned(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model, self.losses = model, []

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def on_train_start(self):
        perturbation(self.model).set_step(self.global_step, self.trainer.estimated_stepping_batches)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["perturbation"] = perturbation(self.model).state_dict()

    def on_load_checkpoint(self, checkpoint):
        perturbation(self.model).load_state_dict(checkpoint["perturbation"])


def fit(module, folder, *, data=None, validate=False, resume=None, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings = {"max_epochs": 3, "enable_checkpointing": False, "num_sanity_val_steps": 0, **quiet, **settings}
    run = lightning.Trainer(default_root_dir=folder, **settings)
    loaders = [DataLoader(batches(4), batch_size=None) if data is None else data]
    run.fit(
        module.train(), *loaders, *([DataLoader(batches(1), batch_size=None)] if validate else []), ckpt_path=resume
    )
    return run


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_ramp_and_samples(precision, passes, tmp_path):
    model = flat_model()
    seen = passes(model)
    fit(Tuned(model), tmp_path, accumulate_grad_batches=2, validate=True, precision=precision)
    training = [p for p in seen if p.training]
    assert [p.rho for p in training] == pytest.approx(
        [cosine(step, STEPS) for step in range(STEPS) for _ in range(2)], abs=1e-5
    )
    assert [p.samples for p in training] == [{i} for i in range(2 * STEPS)]
    assert len(seen) == len(training) + 3 and not any(p.strengths for p in seen if not p.training)
    assert perturbation(model).steps == perturbation(model).total_steps == STEPS


CONFIGS = {"flat": FlatLoraConfig, "efmlora": EFMLoraConfig}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_is_the_run_of_the_plain_loop(config, tmp_path):
    module = Tuned(plain_model(kind=config, rho=RHO, total_steps=STEPS))
    fit(module, tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.1)
    model = plain_model(kind=config, rho=RHO, total_steps=STEPS).train()
    optimizer = Tuned(model).configure_optimizers()
    for i, batch in enumerate(batches(4) * 3):
        (model(**batch).loss / 2).backward()
        if i % 2:
            clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_adapter(module.model, adapter(model))


class Resumable:
    """A data loader with a state, which Lightning needs to resume in the middle of an epoch."""

    def __init__(self):
        self.batches, self.next = batches(4), 0

    def __iter__(self):
        self.next %= len(self)
        while self.next < len(self):
            self.next += 1
            yield self.batches[self.next - 1]

    def __len__(self):
        return len(self.batches)

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


@pytest.mark.parametrize("step", [2, 3], ids=["epoch", "mid-epoch"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(config, step, tmp_path):
    class Saves(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if len(module.losses) == 2 * step:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    whole, rest = (Tuned(plain_model(n, config, rho=RHO)) for n in (0, 1))
    fit(whole, tmp_path, data=Resumable(), accumulate_grad_batches=2, callbacks=[Saves()])
    fit(rest, tmp_path, data=Resumable(), accumulate_grad_batches=2, resume=tmp_path / "saved.ckpt")
    assert whole.losses[2 * step :] == rest.losses and len(whole.losses) == 2 * STEPS
    assert perturbation(rest.model).steps == STEPS
    assert_same_adapter(rest.model, adapter(whole.model))


class ByHand(Tuned):
    """Manual optimization, which two passes need."""

    automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        with ascent(self.model):
            self.manual_backward(self.model(**batch).loss)
        self.manual_backward(self.model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()


def test_two_passes_in_manual_optimization(tmp_path):
    def make():
        return plain_model(kind=FMLoraConfig, rho=RHO).train()

    module, model = ByHand(make()), make()
    fit(module, tmp_path, max_epochs=1)
    optimizer = Tuned(model).configure_optimizers()
    for batch in batches(4):
        with ascent(model):
            model(**batch).loss.backward()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_adapter(module.model, adapter(model))


def test_two_passes_in_automatic_optimization_are_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="FMLora takes two passes, and this optimizer step had one"):
        fit(Tuned(plain_model(kind=FMLoraConfig, rho=RHO)), tmp_path)


def test_without_strength_it_is_plain_lora(tmp_path):
    modules = [Tuned(flat_model(rho=0.0, lora_dropout=0.1)), Tuned(plain_model(lora_dropout=0.1))]
    modules[1].on_train_start = lambda: None
    for module in modules:
        torch.manual_seed(5)
        fit(module, tmp_path)
    assert_same_adapter(modules[0].model, adapter(modules[1].model))
