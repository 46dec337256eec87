"""Whether this machine computes what it should: kernels, meshes, noise, a drawing and a training, and how fast."""
