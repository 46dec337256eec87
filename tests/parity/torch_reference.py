"""Small reference networks of diffusers and transformers, and how their numbers are compared with ours."""

import numpy as np
import torch

SD15_UNET = {
    "sample_size": 8,
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
SDXL_UNET = {
    "sample_size": 8,
    "block_out_channels": [8, 16, 24],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 20,
    "attention_head_dim": [1, 2, 4],
    "transformer_layers_per_block": [1, 2, 3],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 46,
    "norm_num_groups": 4,
}
# With two blocks, for tests that compile many programs.
TWO = {"block_out_channels": [8, 16], "layers_per_block": 1}
TWO_BLOCKS = {
    "sd15": SD15_UNET
    | TWO
    | {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "sdxl": SDXL_UNET
    | TWO
    | {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [1, 2],
        "transformer_layers_per_block": [1, 2],
    },
}
VAE = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "sample_size": 32,
}
CLIP = {
    "vocab_size": 99,
    "hidden_size": 12,
    "intermediate_size": 24,
    "projection_dim": 10,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 97,
    "eos_token_id": 98,
}


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model with noise on every parameter, so that no weight of zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def nchw(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def relative_error(ours, reference) -> float:
    """Largest error relative to the largest reference value."""
    ours = np.asarray(ours)
    reference = reference.detach().numpy() if isinstance(reference, torch.Tensor) else reference
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def gradient_errors(ours: dict[str, np.ndarray], model: torch.nn.Module) -> dict[str, float]:
    """Relative error of every parameter's gradient.

    Gradients that vanish in exact arithmetic, such as that of a key's bias, are rounding noise in both libraries: they
    are measured against a thousandth of the largest gradient.
    """
    reference = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    assert ours.keys() == reference.keys()
    floor = 1e-3 * max(np.abs(gradient).max() for gradient in reference.values())
    return {
        name: float(np.abs(ours[name] - gradient).max() / max(np.abs(gradient).max(), floor))
        for name, gradient in reference.items()
    }
