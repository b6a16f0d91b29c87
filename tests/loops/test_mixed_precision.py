"""`Trainer(fp16=True)` on a CPU, where accelerate uses float32: the tests put in a GradScaler by hand."""

import pytest
import torch
from helpers import tiny
from helpers.runs import cosine, flat_model, trainer
from transformers import Trainer

from flatlora import FlatLoraCallback, perturbation


class Overflowing(Trainer):
    """The loss of the third step is infinite, and the scaler skips that step."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu")

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * torch.inf if self.state.global_step == 2 else loss


@pytest.mark.parametrize("callbacks", [[FlatLoraCallback()], []], ids=["callback", "without"])
def test_steps_that_the_scaler_skips(callbacks, passes, tmp_path):
    """A skipped step does not change the strength, although the trainer counts it."""
    model = flat_model(total_steps=6)
    seen = passes(model)
    trainer(model, tmp_path, kind=Overflowing, callbacks=callbacks, max_steps=6, bf16=True).train()
    assert [p.rho for p in seen] == pytest.approx([cosine(step, 6) for step in [0, 1, 2, 2, 3, 4]], abs=1e-5)
    assert perturbation(model).steps == 5
    assert all(p.isfinite().all() for p in tiny.trainable(model))
