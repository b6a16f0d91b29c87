"""Fine-tune a tiny language model with Flat-LoRA in a plain PyTorch loop. No download; ten seconds on a CPU.

python examples/minimal.py
"""

import tempfile

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from flatlora import FlatLoraConfig, get_flat_peft_model, perturbation

STEPS = 60


def base_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))


def batch():
    """Sequences that count up from a random number."""
    return (torch.randint(32, (16, 1)) + torch.arange(12)) % 32


# the two lines that differ from LoRA: the configuration, and the function that takes it
config = FlatLoraConfig(r=8, lora_alpha=16, target_modules="all-linear", rho=0.05, total_steps=STEPS)
model = get_flat_peft_model(base_model(), config)

model.train()
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for step in range(STEPS):
    tokens = batch()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.3f}, rho_t {perturbation(model).rho_t:.3f}")

model.eval()
tokens = batch()
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model.save_pretrained(folder)
    served = PeftModel.from_pretrained(base_model(), folder).eval()  # stock peft
    print("stock peft answers the same:", torch.equal(served(tokens).logits, model(tokens).logits))
