"""Plans: what a run or a sampler takes of a TPU slice, known before one is paid for."""
