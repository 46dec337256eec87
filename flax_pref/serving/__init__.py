"""Samplers as files: programs that were traced once, exported, and are loaded without the code of the networks."""
