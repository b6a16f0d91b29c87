"""A UNet and a diffusion transformer of diffusers, and inputs for each."""

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel


def unet():
    torch.manual_seed(0)
    blocks = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        **blocks,
    )


def unet_inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    sample, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 8)))
    return {"sample": sample, "timestep": torch.tensor([3, 9]), "encoder_hidden_states": text}


def transformer():
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2, "caption_projection_dim": 8}
    more = {"joint_attention_dim": 8, "pooled_projection_dim": 8, "pos_embed_max_size": 8}
    return SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, out_channels=4, **sizes, **more)


def transformer_inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 8), "pooled_projections": (2, 8)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | {
        "timestep": torch.tensor([3, 9])
    }
