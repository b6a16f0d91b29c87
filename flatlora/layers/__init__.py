"""One adapted layer: when and how its forward is perturbed, and how a layer of peft becomes flat."""
