"""Helpers that are independent of LoRA: argument checks, JSON files, dtypes."""
