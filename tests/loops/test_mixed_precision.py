"""`Trainer(fp16=True)` as far as a CPU has it: accelerate makes that float32 there, so its scaler is put in by hand."""

import pytest
import tiny
import torch
from loops.runs import cosine, flat_model, trainer
from transformers import Trainer

from flatlora import FlatLoraCallback


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
    """The trainer counts them, and so does the callback, whose ramp is as long as the trainer's run. By itself the
    library counts the optimizer's steps, of which it was none."""
    model = flat_model(total_steps=6)
    seen = passes(model)
    trainer(model, tmp_path, kind=Overflowing, callbacks=callbacks, max_steps=6, bf16=True).train()
    steps = range(6) if callbacks else [0, 1, 2, 2, 3, 4]
    assert [p.rho for p in seen] == pytest.approx([cosine(step, 6) for step in steps], abs=1e-5)
    assert all(p.isfinite().all() for p in tiny.trainable(model))
