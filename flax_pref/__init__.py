"""Preference alignment of Stable Diffusion in JAX/Flax."""
