"""Helpers that know nothing of LoRA: checks of arguments, JSON files."""
