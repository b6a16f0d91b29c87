"""sentence-transformers: losses that compare the outputs of several forwards, before one backward."""

import pytest
import torch
from helpers.runs import RHO, adapter, assert_same_adapter
from helpers.sentences import saved_bert
from helpers.trl_runs import texts
from peft import LoraConfig
from transformers.models.bert.modeling_bert import BertEncoder

from flatlora import FlatLoraCallback, FlatLoraConfig, perturbation, perturbed

pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

STEPS = 4
COLUMNS = ("anchor", "positive", "negative")
pytestmark = pytest.mark.usefixtures("any_peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_bert(tmp_path_factory.mktemp("bert"))


def embedder(folder, kind=FlatLoraConfig, dropout=0.0, **settings):
    transformer = Transformer(folder)
    model = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")
    torch.manual_seed(4)
    settings = {"rho": RHO, "seed": 7, "schedule": "constant", **settings} if kind is FlatLoraConfig else {}
    model.add_adapter(kind(r=4, target_modules=["query", "value", "dense"], lora_dropout=dropout, **settings))
    for module in model.modules():  # BERT's own dropout would differ between the runs
        if isinstance(module, torch.nn.Dropout) and not dropout:
            module.p = 0.0
    return model


def train(model, folder, *, kind=SentenceTransformerTrainer, loss=MultipleNegativesRankingLoss, **settings):
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "use_cpu": True}
    args = {"output_dir": str(folder), "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": STEPS}
    flat = any(hasattr(module, "perturbation") for module in model.modules())
    run = kind(
        model=model,
        args=SentenceTransformerTrainingArguments(**{**args, **quiet, **settings}),
        train_dataset=texts(*COLUMNS),
        loss=loss(model),
        callbacks=[FlatLoraCallback()] if flat else [],
    )
    run.train()
    return run


def test_the_forwards_of_a_batch_share_their_noise(folder, passes, tmp_path):
    model = embedder(folder)
    seen = passes(model, BertEncoder)  # sentence-transformers calls the model's `forward`, without its hooks
    run = train(model, tmp_path)
    forwards = 2  # one of the anchors, and one of all others
    assert [p.rho for p in seen] == pytest.approx([RHO] * STEPS * forwards)
    assert [p.samples for p in seen] == [{step} for step in range(STEPS) for _ in range(forwards)]
    assert [logs["flat_rho"] for logs in run.state.log_history if "loss" in logs] == [RHO] * STEPS
    count = len(seen)
    model.train()
    model.encode(["one two", "three"])
    assert len(seen) == count + 1 and not seen[-1].strengths


def test_without_strength_it_is_plain_lora(folder, tmp_path):
    flat, plain = embedder(folder, dropout=0.1, rho=0.0), embedder(folder, LoraConfig, dropout=0.1)
    for model in (flat, plain):
        train(model, tmp_path)
    assert_same_adapter(flat, adapter(plain))


def test_what_is_saved_is_loaded_again(folder, tmp_path):
    model = embedder(folder)
    train(model, tmp_path / "run")
    model.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    sentences = ["one two three", "four five"]
    assert torch.equal(torch.tensor(again.encode(sentences)), torch.tensor(model.encode(sentences)))


def test_a_loss_that_caches_gradients_is_an_error(folder, tmp_path):
    with pytest.raises(RuntimeError, match=r"recomputed in a backward.*flatlora.perturbed\(model, sample=step\)"):
        train(embedder(folder), tmp_path, loss=CachedMultipleNegativesRankingLoss)


class AtOneSample(SentenceTransformerTrainer):
    """What the error message recommends."""

    def training_step(self, *args, **kwargs):
        with perturbed(self.model, sample=self.state.global_step):
            return super().training_step(*args, **kwargs)


def test_the_way_out_has_the_gradients_of_the_loss_that_does_not_cache(folder, tmp_path):
    cached, whole = embedder(folder), embedder(folder)
    train(cached, tmp_path, kind=AtOneSample, loss=lambda m: CachedMultipleNegativesRankingLoss(m, mini_batch_size=2))
    train(whole, tmp_path, kind=AtOneSample)
    start, expected = adapter(embedder(folder)), adapter(whole)
    for name, found in adapter(cached).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-4)
        assert "pooler" in name or not torch.equal(found, start[name])
    assert perturbation(cached).steps == STEPS


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(reentrant, folder, tmp_path):
    """sentence-transformers calls `model.forward`, so no hook of the model itself runs."""
    whole, checkpointed = embedder(folder, dropout=0.1), embedder(folder, dropout=0.1)
    checkpointed[0].model.enable_input_require_grads()
    train(whole, tmp_path)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    train(checkpointed, tmp_path, **options)
    assert_same_adapter(checkpointed, adapter(whole))
