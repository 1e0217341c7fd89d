"""
Makes answers/diffusers.safetensors: what diffusers computes where the tests ask model.py and support/vae.py.

    python tests/oracle.py        run by hand; the file was made with diffusers 0.42 and torch 2.13

Outputs of its networks on small configurations, and as metadata a digest of the names and shapes of all
tensors of the official networks. None of it uses our networks.
"""

import argparse
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from common import ANSWERS, PICTURES, SIZES, UNETS, VAES, digest, fill, inputs, pictures

FULL = {  # the official configurations, where they differ from diffusers' defaults
    "block_out_channels": [320, 640, 1280], "layers_per_block": 2, "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816}
FULL_UNETS = {
    "sdxl": FULL,
    "1b": FULL | {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6]},
    "700m": FULL | {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5], "mid_block_type": None},
}
FULL_VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}


def predict(unet: UNet2DConditionModel, sample: Tensor, timestep: Tensor, context: Tensor, **added) -> Tensor:
    """The prediction of diffusers' U-Net for inputs with our names."""
    conditions = {"text_embeds": added["pooled"], "time_ids": added["time_ids"]} if added else None
    return unet(sample, timestep, context, added_cond_kwargs=conditions).sample


@torch.no_grad()
def main():
    answers = {}
    for name, config in UNETS.items():
        unet = fill(UNet2DConditionModel.from_config(config))
        answers |= {f"{name} {size}": predict(unet, **inputs(config, size)) for size in SIZES}
    for name, config in VAES.items():
        vae = fill(AutoencoderKL.from_config(config))
        for size in PICTURES:
            image, latent = pictures(size)
            latents = vae.encode(image).latent_dist
            answers |= {f"{name} {size} mean": latents.mean, f"{name} {size} logvar": latents.logvar}
            answers[f"{name} {size} image"] = vae.decode(latent).sample
    with torch.device("meta"):
        networks = {name: UNet2DConditionModel.from_config(config) for name, config in FULL_UNETS.items()}
        networks["vae"] = AutoencoderKL.from_config(FULL_VAE)
    digests = {name: digest(network) for name, network in networks.items()}
    ANSWERS.parent.mkdir(exist_ok=True)
    save_file({name: answer.contiguous() for name, answer in answers.items()}, ANSWERS, digests)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
