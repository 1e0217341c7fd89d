"""
SDXL's text conditions: two CLIP text encoders (Radford et al., arXiv 2103.00020), each with its tokenizer.

The first is OpenAI's, the second OpenCLIP's: one network in two sizes, with modules named as in the official
checkpoints. Shapes: B batch, L text tokens (77 in the official models), D token width, P pooled width.
"""

import sys
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor, nn

import files
from options import one_line
from weights import HALF, check_numbers, with_weights, write_weights

ENCODERS, TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")  # their folders
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


@dataclass(frozen=True)
class CLIPConfig:
    """A text encoder in numbers, named as in its config.json; the defaults are the first encoder's."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_size: int = 768                        # D
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    projection_dim: int = 768                     # P
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self):
        check_numbers(self)
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act cannot be {self.hidden_act!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} cannot be parted into "
                             f"{self.num_attention_heads} heads")


OPENCLIP = CLIPConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                      hidden_act="gelu", projection_dim=1280)  # SDXL's second encoder


# ------------------------------------------------------------------------------------------------------------
# The network


class CLIPAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and those before it."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, heads, L, D / heads) each
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(h.transpose(1, 2).flatten(2))       # (B, L, D)


class CLIPLayer(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        dim, inner, self.act = config.hidden_size, config.intermediate_size, ACTIVATIONS[config.hidden_act]
        self.layer_norm1 = nn.LayerNorm(dim, config.layer_norm_eps)
        self.self_attn = CLIPAttention(dim, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(dim, config.layer_norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, inner), "fc2": nn.Linear(inner, dim)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp["fc2"](self.act(self.mlp["fc1"](self.layer_norm2(x))))


class CLIP(nn.Module):
    """Token ids (B, L) to a sequence (B, L, D), the second-to-last layer's, and a pooled text (B, P).

    Only an encoder with a `text_projection`, SDXL's second, has a pooled text; the other gives None for it.
    """

    def __init__(self, config: CLIPConfig, projection: bool):
        super().__init__()
        self.config, dim = config, config.hidden_size
        # Left empty, to be loaded or drawn: PyTorch's own filling imports its compiler on the meta device.
        table = lambda rows: nn.Embedding.from_pretrained(torch.empty(rows, dim), freeze=False)
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "token_embedding": table(config.vocab_size),
                "position_embedding": table(config.max_position_embeddings)}),
            "encoder": nn.ModuleDict({
                "layers": nn.ModuleList([CLIPLayer(config) for _ in range(config.num_hidden_layers)])}),
            "final_layer_norm": nn.LayerNorm(dim, config.layer_norm_eps)})
        self.text_projection = nn.Linear(dim, config.projection_dim, bias=False) if projection else None

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        embeddings = self.text_model["embeddings"]
        *layers, last = self.text_model["encoder"]["layers"]
        x = embeddings["token_embedding"](ids) + embeddings["position_embedding"].weight[:ids.shape[1]]
        for layer in layers:
            x = layer(x)                                         # (B, L, D)
        if self.text_projection is None:
            return x, None
        # The pooled text is where the text ends. Older files, SDXL's too, say 2 for that token and mean the
        # largest id.
        end = self.config.eos_token_id
        ends = ids.argmax(1) if end == 2 else (ids == end).int().argmax(1)
        final = self.text_model["final_layer_norm"](last(x))     # (B, L, D)
        return x, self.text_projection(final[torch.arange(len(x), device=x.device), ends])


# ------------------------------------------------------------------------------------------------------------
# The tokenizer


class CLIPTokenizer:
    """Byte-pair encoding of lower-cased words, from the files of a tokenizer's folder."""

    FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
    WORDS = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    SMALL = 1000                                                 # tokens; more can spell any word

    def __init__(self, vocab_path: Path, merges_path: Path, config_path: Path):
        options = files.read_json(config_path)
        try:
            self.length = options["model_max_length"]
            if type(self.length) is not int or self.length < 3:
                raise TypeError(f"model_max_length is {self.length!r}")
            start, end, pad = (self.special(options, f"{name}_token") for name in ("bos", "eos", "pad"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{config_path} is not a tokenizer's, fetch it anew ({error})") from None
        try:
            pairs = BPE.from_file(str(vocab_path), str(merges_path), unk_token=end.content,
                                  end_of_word_suffix="</w>")
        except Exception as error:                               # the library has no narrower kind
            raise ValueError(f"{vocab_path} or {merges_path.name} is damaged, fetch it anew "
                             f"({one_line(error)})") from None
        if not merges_path.read_text().strip():
            raise ValueError(f"{merges_path} is empty, fetch it anew")
        self.bpe = Tokenizer(pairs)
        self.bpe.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        self.bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(self.WORDS, "removed", invert=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False)])
        self.bpe.add_special_tokens([start, end, pad])
        self.start, self.end, self.pad = (self.bpe.token_to_id(token.content) for token in (start, end, pad))

    @staticmethod
    def special(options: dict, name: str) -> AddedToken:
        """The official files have a token as a string or, with how it is found in a text, as a dictionary."""
        token = options.get(name, "<|startoftext|>" if name == "bos_token" else "<|endoftext|>")
        found = token if isinstance(token, dict) else {"content": token}
        if not isinstance(found["content"], str) or not found["content"]:
            raise TypeError(f"{name} is {token!r}")
        return AddedToken(found["content"], normalized=found.get("normalized", False))

    def __call__(self, texts: list[str]) -> Tensor:
        """Token ids (B, L): start, as much of the text as there is room for, end, padding."""
        rows = []
        for encoding in self.bpe.encode_batch(texts, add_special_tokens=False):
            row = [self.start, *encoding.ids[:self.length - 2], self.end]
            rows.append(row + [self.pad] * (self.length - len(row)))
        return torch.tensor(rows)

    def cut_off(self, text: str) -> str:
        """The end of a text that there is no room for."""
        offsets = self.bpe.encode(text, add_special_tokens=False).offsets[self.length - 2:]
        return text[offsets[0][0]:] if offsets else ""

    def check_words(self, texts: list[str]):
        """Raises ValueError for words that a small vocabulary lacks."""
        tokens = self.bpe.get_vocab()
        if len(tokens) >= self.SMALL:
            return
        ends = [token for token in tokens if token.endswith("</w>")]
        words = sorted(end[:-4] for end in ends  # but not the parts that words were merged from
                       if not any(longer != end and longer.endswith(end) for longer in ends))
        if unknown := sorted(set(" ".join(texts).lower().split()) - set(words)):
            raise ValueError(f"this small model does not know {', '.join(unknown)}; it knows "
                             f"{', '.join(words)}. A larger one knows more, such as 700m")


# ------------------------------------------------------------------------------------------------------------
# Both as one


class TextEncoders(nn.Module):
    """Prompts to SDXL's conditions; made by `load_text`."""

    def __init__(self, encoders: list[CLIP], tokenizers: list[CLIPTokenizer]):
        super().__init__()
        self.encoders, self.tokenizers = nn.ModuleList(encoders), tokenizers

    def check(self, prompts: list[str]):
        """Tells what is cut off; raises ValueError for words that a small vocabulary lacks."""
        self.tokenizers[0].check_words(prompts)
        for prompt in dict.fromkeys(prompts):
            if rest := self.tokenizers[0].cut_off(prompt):
                print(f"warning: a prompt is longer than the {self.tokenizers[0].length - 2} tokens that "
                      f"CLIP reads; cut: {rest!r}", file=sys.stderr)

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Text sequences (B, L, D), of both encoders side by side, and pooled texts (B, P) of the second."""
        device = next(self.parameters()).device
        (first, _), (second, pooled) = (encoder(tokenizer(prompts).to(device))
                                        for encoder, tokenizer in zip(self.encoders, self.tokenizers))
        return torch.cat([first, second], dim=2), pooled


def load_text(source: str | Path, dtype: torch.dtype) -> TextEncoders:
    """The text encoders of a bundle. Raises FileNotFoundError or ValueError, of one line, as `load_unet`."""
    encoders = [load_clip(source, name, dtype) for name in ENCODERS]
    tokenizers = [CLIPTokenizer(*(files.needed(source, f"{name}/{file}") for file in CLIPTokenizer.FILES))
                  for name in TOKENIZERS]
    for encoder, tokenizer in zip(encoders, tokenizers):
        reads = encoder.config.max_position_embeddings, encoder.config.vocab_size
        given = tokenizer.length, tokenizer.bpe.get_vocab_size()
        if given[0] > reads[0] or given[1] > reads[1]:
            raise ValueError(f"a tokenizer of {source} gives {given[0]} tokens of {given[1]} kinds, and its "
                             f"text encoder reads {reads[0]} of {reads[1]}: they belong to different models")
    return TextEncoders(encoders, tokenizers)


def read_config(source: str | Path, name: str) -> CLIPConfig:
    """The configuration of a bundle's text encoder, by its folder's name."""
    path = files.needed(source, f"{name}/config.json")
    known = {field.name for field in fields(CLIPConfig)}
    try:
        return CLIPConfig(**{key: value for key, value in files.read_json(path).items() if key in known})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_clip(source: str | Path, name: str, dtype: torch.dtype) -> CLIP:
    """A text encoder of a bundle, by its folder's name; raises as `load_text`."""
    plain, half = f"{name}/model.safetensors", f"{name}/model.fp16.safetensors"
    path = files.needed(source, *((half, plain) if dtype in HALF else (plain, half)))
    weights = {}
    for key, tensor in files.read_tensors(path).items():
        if not key.endswith("position_ids"):                     # which some files have: 0, 1, 2, ...
            weights[key if key.startswith("text_") else f"text_model.{key}"] = tensor  # as older ones have it
    make = partial(CLIP, read_config(source, name), projection=name == ENCODERS[1])
    return with_weights(make, weights, path.parent, dtype)


def save_clip(clip: CLIP, folder: str | Path):
    """Writes config.json and the weights, as they are typed, in the official layout."""
    write_weights(clip, Path(folder, "model.safetensors"))
    kind = "CLIPTextModel" + "WithProjection" * (clip.text_projection is not None)
    # "dtype" is what transformers is to compute in; the file itself may be of another.
    files.write_json(Path(folder, "config.json"), {
        "architectures": [kind], "model_type": "clip_text_model", "dtype": "float32", **asdict(clip.config)})
