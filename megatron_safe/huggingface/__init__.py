"""Hugging Face checkpoints: read, written, and mapped to our models."""
