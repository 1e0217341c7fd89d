"""
Makes answers/analysis.safetensors: self-attention maps of diffusers, where the tests ask analysis.py.

    python tests/oracle_analysis.py        run by hand; the file was made with diffusers 0.42 and torch 2.13

Of each stage's first self-attention, the mean over heads of what diffusers' own softmax gives.
"""

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from common import ANSWERS, UNETS, fill, inputs
from oracle import predict


class Probabilities:
    """diffusers' attention, written out, that keeps its probabilities."""

    def __call__(self, attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 **rest) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (attention.head_to_batch_dim(layer(x)) for layer, x in (
            (attention.to_q, hidden_states), (attention.to_k, context), (attention.to_v, context)))
        self.kept = attention.get_attention_scores(q, k)         # (B * heads, T, T or L)
        out = attention.batch_to_head_dim(torch.bmm(self.kept, v))
        return attention.to_out[0](out)


@torch.no_grad()
def maps(paths: list[str], name: str = "sdxl", size: str = "batch") -> dict[str, Tensor]:
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
    save_file({path: map.contiguous() for path, map in maps(FIRST).items()},
              ANSWERS.with_name("analysis.safetensors"))
