"""One model while it trains: `Perturbation` and its parts."""
