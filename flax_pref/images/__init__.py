"""Evaluation images as files: resumable sets, tar shards, grids."""
