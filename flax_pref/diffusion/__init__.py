"""From noise to latents: noise schedules, solvers, guidance rules and the sampler that joins them."""
