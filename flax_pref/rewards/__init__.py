"""Rewards: what scores images for their prompts, one file for each."""
