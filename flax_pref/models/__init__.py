"""Network architectures of Stable Diffusion: UNet, autoencoder, CLIP text encoder."""
