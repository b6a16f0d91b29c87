"""torch's MultiheadAttention: eps in the in_proj and out_proj that peft merges for each call."""
