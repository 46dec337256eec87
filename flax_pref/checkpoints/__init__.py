"""Checkpoints: diffusers folders in and out."""
