"""Connections to the training loops of other libraries."""
