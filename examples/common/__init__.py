"""What the examples share: data, models from packages, evaluation, tables."""
