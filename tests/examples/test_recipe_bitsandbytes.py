"""QLoRA in the recipes: the base model in 4 bits, the head in float32."""

import glue_roberta
import pytest
import torch
from common import tiny_t5
from recipe import images, models
from recipe.methods import adapt
from transformers import CLIPConfig, CLIPModel

bitsandbytes = pytest.importorskip("bitsandbytes")

LAYERS = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def parsed(folder, *more):
    return glue_roberta.parse(glue_roberta.Arguments, {}, ["--model", str(folder), "--load_in_4bit", "--r", "2", *more])


def kinds(model):
    """(names of the layers in 4 bits, names of the other linear layers)."""
    linear = {name.rpartition(".")[2]: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    small = {name for name, m in linear.items() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    return small, {*linear} - small


@pytest.mark.slow
def test_an_encoder_trains_on_four_bits(tiny_bert):
    args = parsed(tiny_bert)
    base = models.encoder(args, 2, seed=0)
    small, large = kinds(base)
    assert {"query", "value", "dense"} <= small and large == {"classifier"}
    model = adapt(base, "flat", args, seed=0, task_type="SEQ_CLS").train()
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.warns(UserWarning, match="needs the length of the run"):
        model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32} and all(p.grad is not None for p in trained)


def test_t5_and_clip_load_in_four_bits(tmp_path, tokenizer):
    torch.manual_seed(0)
    tiny_t5.make_model(20).save_pretrained(tmp_path / "t5")
    small, large = kinds(models.seq2seq(parsed(tmp_path / "t5")))
    assert {"q", "v", "wi"} <= small and large == {"lm_head", "wo"}  # transformers keeps wo of T5 in float32
    text = {"vocab_size": len(tokenizer), "eos_token_id": 1, "pad_token_id": 1, **LAYERS}
    vision = {"image_size": 16, "patch_size": 8, **LAYERS}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=512)).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    model, _ = images.classifier(parsed(tmp_path / "clip"), ["good", "bad"], seed=0)
    assert {"q_proj", "v_proj", "fc1"} <= kinds(model)[0]
    pixels = torch.ones(2, 3, 16, 16, dtype=torch.bfloat16)
    assert model.eval()(pixel_values=pixels).logits.shape == (2, 2)
