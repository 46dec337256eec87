"""The command `flax-pref`, and the programs that it and `python -m` run."""
