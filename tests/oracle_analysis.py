"""
Makes answers/analysis.safetensors: self-attention maps of diffusers, for the tests of analysis.py.

    python tests/oracle_analysis.py        run by hand; the file was made with diffusers 0.42 and torch 2.13

Of each stage's first self-attention, the mean over heads of what diffusers' own softmax gives.
"""

import argparse
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from common import ANSWERS, UNETS, fill, inputs
from oracle import predict


class Probabilities:
    """diffusers' self-attention, written out, that keeps its probabilities."""

    def __call__(self, attention, hidden_states: Tensor, **rest) -> Tensor:
        q, k, v = (attention.head_to_batch_dim(layer(hidden_states))
                   for layer in (attention.to_q, attention.to_k, attention.to_v))
        self.kept = attention.get_attention_scores(q, k)         # (B * heads, T, T)
        out = attention.batch_to_head_dim(torch.bmm(self.kept, v))
        return attention.to_out[0](out)


@torch.no_grad()
def attention_maps(paths: list[str], name: str = "sdxl", size: str = "batch") -> dict[str, Tensor]:
    """Self-attention maps (B, T, T) of these modules, the mean over heads."""
    unet = fill(UNet2DConditionModel.from_config(UNETS[name]))
    processors = {path: Probabilities() for path in paths}
    for path, processor in processors.items():
        unet.get_submodule(path).set_processor(processor)
    question = inputs(UNETS[name], size)
    predict(unet, **question)
    return {path: one.kept.unflatten(0, (len(question["sample"]), -1)).mean(1)
            for path, one in processors.items()}


FIRST = [f"{stage}.attentions.0.transformer_blocks.0.attn1"
         for stage in ("down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1")]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    save_file({path: found.contiguous() for path, found in attention_maps(FIRST).items()},
              ANSWERS.with_name("analysis.safetensors"))
