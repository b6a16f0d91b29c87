"""The strength and the sharpness that transformers' Trainer logs to TensorBoard."""

import pytest
from helpers.runs import batches, cosine, flat_model, trainer

from flatlora import FlatLoraCallback

events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    model, ours = flat_model(), FlatLoraCallback(sharpness_steps=2, sharpness_batches=batches(2))
    run = trainer(model, tmp_path, max_steps=4, report_to="tensorboard")
    ours.add_to(run)
    run.train()
    logged_events = events.EventAccumulator(str(tmp_path / "logs")).Reload()
    found = {event.step: event.value for event in logged_events.Scalars("train/flat_rho")}
    assert found == pytest.approx({step: cosine(step, 4) for step in (1, 2, 3, 4)})
    logged = {entry["step"]: entry for entry in run.state.log_history if "flat_sharpness" in entry}
    for name in ("flat_sharpness", "flat_sharpness_stderr"):
        found = {event.step: event.value for event in logged_events.Scalars(f"train/{name}")}
        assert found == pytest.approx({step: logged[step][name] for step in (2, 4)})
