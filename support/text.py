"""
SDXL's text conditioning, with the frozen CLIP text encoders and tokenizers of transformers.

SDXL has two encoders, OpenAI's and OpenCLIP's; Stable Diffusion 1 and 2 have one. Shapes: B batch, L text
tokens (77 in the official models), D token width of all encoders together, P pooled width.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from model import read_weights
from support.files import error_summary

ENCODERS, TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")  # folders of a model
SMALL_VOCABULARY = 1000  # tokens; with fewer, as in the toy, words can be unknown


class TextEncoders(nn.Module):
    """A model's text encoders and tokenizers; made by `load_text`."""

    def __init__(self, encoders: list[nn.Module], tokenizers: list):
        super().__init__()
        self.encoders, self.tokenizers = nn.ModuleList(encoders), tokenizers
        positions = encoders[0].config.max_position_embeddings   # a tokenizer's file may lack its own limit
        self.length = min(tokenizers[0].model_max_length, positions)  # L

    def tokenize(self, tokenizer, prompts: list[str]) -> Tensor:
        """Token ids (B, L). Raises ValueError for words that a small vocabulary lacks."""
        if len(tokenizer) < SMALL_VOCABULARY:
            words = dict.fromkeys(" ".join(prompts).lower().split())
            unknown = [word for word in words if f"{word}</w>" not in tokenizer.get_vocab()]
            if unknown:
                raise ValueError(f"the toy does not know: {', '.join(unknown)}. It reads captions such as "
                                 f'"a red circle left of a blue square" (see docs/toy.md)')
        return tokenizer(prompts, padding="max_length", truncation=True, max_length=self.length,
                         return_tensors="pt").input_ids

    def forward(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """
        Text sequences (B, L, D) and pooled texts (B, P).

        SDXL reads the second-to-last layer of both encoders, side by side, and the pooled text of the second;
        Stable Diffusion 1 and 2 read the last layer of their one encoder, and P is 0.
        """
        device, outputs = self.encoders[0].device, []
        for encoder, tokenizer in zip(self.encoders, self.tokenizers):
            ids = self.tokenize(tokenizer, prompts).to(device, non_blocking=True)
            outputs.append(encoder(ids, output_hidden_states=True))
        if len(outputs) == 1:
            sequence = outputs[0].last_hidden_state              # (B, L, D)
            return sequence, sequence.new_empty(len(sequence), 0)
        return torch.cat([output.hidden_states[-2] for output in outputs], dim=2), outputs[1].text_embeds

    def warn_of_cuts(self, prompts: list[str]):
        """Prints the part of each prompt that CLIP cuts off."""
        tokenizer = self.tokenizers[0]
        for prompt in dict.fromkeys(prompts):
            rest = tokenizer(prompt, verbose=False).input_ids[self.length - 1:-1]
            if rest:
                print(f"warning: a prompt is longer than the {self.length - 2} tokens that CLIP reads; cut: "
                      f"{tokenizer.decode(rest)!r}", file=sys.stderr)

    def save(self, folder: Path):
        """Writes the encoders in the official layout."""
        for name, encoder in zip(ENCODERS, self.encoders):
            encoder.save_pretrained(folder / name)


def encoder_names(folder: str | Path) -> list[str]:
    """The ENCODERS that a model has: both, or the first alone. Raises FileNotFoundError."""
    names = [name for name in ENCODERS if Path(folder, name).is_dir()]
    if ENCODERS[0] not in names:
        raise FileNotFoundError(f"no {ENCODERS[0]} in the folder {folder}: it is part of a model, or a "
                                f"refiner, and cannot draw from text alone")
    return names


def load_text(folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> TextEncoders:
    """Loads a model's text encoders, in `dtype` or else float32, and tokenizers; raises as `load_unet`."""
    import transformers                                          # takes seconds, and --help does not need it
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    encoders, tokenizers = [], []
    for encoder_name, tokenizer_name in zip(encoder_names(folder), TOKENIZERS):
        path = Path(folder, encoder_name)
        kind = transformers.CLIPTextModelWithProjection if encoders else transformers.CLIPTextModel
        weights = read_weights(path, "model", dtype)
        try:
            encoder, report = kind.from_pretrained(
                None, config=transformers.CLIPTextConfig.from_pretrained(path), state_dict=weights,
                dtype=dtype or torch.float32, output_loading_info=True)
            tokenizer = transformers.CLIPTokenizer.from_pretrained(Path(folder, tokenizer_name))
        except Exception as error:                               # which kind depends on the damage
            raise ValueError(f"{path} or {tokenizer_name} does not load: {error_summary(error)}") from None
        if report["missing_keys"]:
            raise ValueError(f"the weights in {path} do not fit their config.json: missing "
                             f"{', '.join(sorted(report['missing_keys'])[:3])}")
        encoders.append(encoder.to(device).eval())
        tokenizers.append(tokenizer)
    return TextEncoders(encoders, tokenizers)
