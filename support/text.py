"""
Text conditions: CLIP text encoders (Radford et al., arXiv 2103.00020), each with its tokenizer.

SDXL has two, OpenAI's and OpenCLIP's: one network in two sizes, with modules named as in the official
checkpoints. Stable Diffusion 1 has the first alone, Stable Diffusion 2 another of OpenCLIP's. Shapes: B batch,
L text tokens (77 in the official models), D token width, P pooled width.
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

from model import build, check_numbers, read_config, read_json, read_weights, save_network
from support.files import error_summary

ENCODERS, TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")  # folders of a model
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
    bos_token_id: int = 49406
    eos_token_id: int = 49407

    def __post_init__(self):
        check_numbers(self, may_be_zero=("bos_token_id", "eos_token_id"))
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act cannot be {self.hidden_act!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into "
                             f"{self.num_attention_heads} heads")

    @classmethod
    def from_dict(cls, config: dict) -> "CLIPConfig":
        """Reads the official config.json of a text encoder. Raises ValueError."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in config.items() if key in known})


OPENCLIP = CLIPConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                      hidden_act="gelu", projection_dim=1280)  # SDXL's second encoder


# ------------------------------------------------------------------------------------------------------------
# The network


class CLIPAttention(nn.Module):
    """Causal multi-head self-attention: a token sees itself and those before it."""

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
    """
    Token ids (B, L) to hidden states (B, L, D) and a pooled text (B, P).

    The hidden states are those of the second-to-last layer, as SDXL reads them, or with `last` those of the
    last one, normalized, as Stable Diffusion 1 and 2 do. Only an encoder with a `text_projection`, SDXL's
    second, has a pooled text; P is 0 elsewhere.
    """

    def __init__(self, config: CLIPConfig, projection: bool, last: bool = False):
        super().__init__()
        self.config, self.last, dim = config, last, config.hidden_size
        # Left empty, for weights to come: nn.Embedding's own initialization is slow on the meta device.
        tokens, positions = (nn.Embedding.from_pretrained(torch.empty(rows, dim), freeze=False)
                             for rows in (config.vocab_size, config.max_position_embeddings))
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({"token_embedding": tokens, "position_embedding": positions}),
            "encoder": nn.ModuleDict({
                "layers": nn.ModuleList([CLIPLayer(config) for _ in range(config.num_hidden_layers)])}),
            "final_layer_norm": nn.LayerNorm(dim, config.layer_norm_eps)})
        self.text_projection = nn.Linear(dim, config.projection_dim, bias=False) if projection else None

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        embeddings = self.text_model["embeddings"]
        *layers, last_layer = self.text_model["encoder"]["layers"]
        x = embeddings["token_embedding"](ids) + embeddings["position_embedding"].weight[:ids.shape[1]]
        for layer in layers:
            x = layer(x)                                         # (B, L, D)
        if self.text_projection is None:
            x = self.text_model["final_layer_norm"](last_layer(x)) if self.last else x
            return x, x.new_empty(len(x), 0)
        # The pooled text is that of the end token. Older configs, SDXL's too, have 2 but mean the largest id.
        end = self.config.eos_token_id
        ends = ids.argmax(1) if end == 2 else (ids == end).int().argmax(1)
        final = self.text_model["final_layer_norm"](last_layer(x))  # (B, L, D)
        return x, self.text_projection(final[torch.arange(len(x), device=x.device), ends])


# ------------------------------------------------------------------------------------------------------------
# The tokenizer


WORD = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")


def added_token(token: str | dict) -> AddedToken:
    """A token that is no byte pair; files give it as a string, or as a dictionary with its options."""
    if isinstance(token, str):
        token = {"content": token}
    if not token["content"]:
        raise TypeError("a special token is empty")
    known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(**{"normalized": False} | {name: token[name] for name in known if name in token})


def read_bpe(folder: Path, added: dict[int, AddedToken], special: list[AddedToken]) -> Tokenizer:
    """
    CLIP's byte-pair encoding, from vocab.json and merges.txt, or from the tokenizer.json of newer transformers.

    `added` are tokens that are no byte pairs, by their ids, and `special` start, end and padding. Raises
    FileNotFoundError or ValueError.
    """
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    if not vocab_file.is_file() and (folder / "tokenizer.json").is_file():
        bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))
        bpe.no_truncation()
        bpe.no_padding()
        return bpe                                               # has the added tokens already
    for file in (vocab_file, merges_file):
        if not file.is_file() or not file.read_bytes().strip():
            raise FileNotFoundError(f"no {file.name}, or an empty one, in the folder {folder}")
    vocab, merges = BPE.read_file(str(vocab_file), str(merges_file))
    reachable = {first + second for first, second in merges}
    reachable |= {token.content for token in (*added.values(), *special)}
    lacking = [token for token in vocab if len(token.removesuffix("</w>")) > 1 and token not in reachable]
    if lacking:
        raise ValueError(f"no merge makes {len(lacking)} of its tokens, such as {min(lacking)}")
    if len(set(vocab.values())) < len(vocab):
        raise ValueError("two of its tokens have one id")
    bpe = Tokenizer(BPE(vocab, merges, unk_token=special[1].content, end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORD, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for i, token in sorted(added.items()):
        (bpe.add_special_tokens if token.special else bpe.add_tokens)([token])
        if bpe.token_to_id(token.content) != i:
            raise ValueError(f"the id of {token.content} is not {i}")
    bpe.add_special_tokens(special)
    return bpe


class CLIPTokenizer:
    """
    Byte-pair encoding of lower-cased words, from the files of a tokenizer's folder.

    `words` are the words of a small vocabulary, such as the toy's, and None if it can spell any word. Raises
    FileNotFoundError or ValueError, one line that says what is wrong.
    """

    SMALL = 1000                                                 # tokens

    def __init__(self, folder: Path):
        options, special_tokens, added_tokens = read_json(folder / "tokenizer_config.json"), {}, {}
        if (folder / "special_tokens_map.json").is_file():
            special_tokens = read_json(folder / "special_tokens_map.json")
        if (folder / "added_tokens.json").is_file():
            added_tokens = read_json(folder / "added_tokens.json")
        options |= special_tokens                                # where they differ, as transformers has it
        try:
            self.length = options["model_max_length"]
            if type(self.length) is not int or not 3 <= self.length <= 2**17:
                raise TypeError(f"model_max_length is {self.length!r}")
            start = added_token(options.get("bos_token", "<|startoftext|>"))
            end, pad = (added_token(options.get(f"{name}_token", "<|endoftext|>")) for name in ("eos", "pad"))
            added = {i: AddedToken(token, normalized=True) for token, i in added_tokens.items()}
            for i, token in options.get("added_tokens_decoder", {}).items():
                added[int(i)] = added_token(token)
            self.bpe = read_bpe(folder, added, [start, end, pad])
        except FileNotFoundError:
            raise
        except Exception as error:                               # the library has no narrower kind
            raise ValueError(f"the tokenizer in {folder} is damaged, in tokenizer_config.json, vocab.json or "
                             f"merges.txt: {error_summary(error)}; download it again") from None
        self.start, self.end, self.pad = (self.bpe.token_to_id(token.content) for token in (start, end, pad))
        self.words = None
        if self.bpe.get_vocab_size() < self.SMALL:
            ends = sorted(token for token in self.bpe.get_vocab() if token.endswith("</w>"))
            self.words = []
            for word in ends:
                if sum(token.endswith(word) for token in ends) == 1:  # a whole word, and not a part of one
                    self.words.append(word.removesuffix("</w>"))

    def __call__(self, texts: list[str]) -> Tensor:
        """
        Token ids (B, L): start, as much of the text as there is room for, end, padding.

        Raises ValueError for words that are not in a small vocabulary.
        """
        unknown = sorted(set(" ".join(texts).lower().split()) - set(self.words)) if self.words else []
        if unknown:
            raise ValueError(f"this small model does not know {', '.join(unknown)}; it knows "
                             f"{', '.join(self.words)}. A larger one knows more, such as 700m")
        rows = []
        for encoding in self.bpe.encode_batch(texts, add_special_tokens=False):
            row = [self.start, *encoding.ids[:self.length - 2], self.end]
            rows.append(row + [self.pad] * (self.length - len(row)))
        return torch.tensor(rows)

    def overflow(self, text: str) -> str:
        """The end of a text that does not fit into `length` tokens."""
        offsets = self.bpe.encode(text, add_special_tokens=False).offsets[self.length - 2:]
        return text[offsets[0][0]:] if offsets else ""


# ------------------------------------------------------------------------------------------------------------
# The two encoders together


class TextEncoders(nn.Module):
    """Prompts to SDXL's text conditions; made by `load_text`."""

    def __init__(self, encoders: list[CLIP], tokenizers: list[CLIPTokenizer]):
        super().__init__()
        self.encoders, self.tokenizers = nn.ModuleList(encoders), tokenizers

    def warn_of_cuts(self, prompts: list[str]):
        """Prints what CLIP does not read of the prompts."""
        for prompt in dict.fromkeys(prompts):
            rest = self.tokenizers[0].overflow(prompt)
            if rest:
                print(f"warning: a prompt is longer than the {self.tokenizers[0].length - 2} tokens that "
                      f"CLIP reads; cut: {rest!r}", file=sys.stderr)

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Text sequences (B, L, D), of all encoders side by side, and pooled texts (B, P) of the last."""
        device = next(self.parameters()).device
        sequences = []
        for encoder, tokenizer in zip(self.encoders, self.tokenizers):
            sequence, pooled = encoder(tokenizer(prompts).to(device))
            sequences.append(sequence)
        return torch.cat(sequences, dim=2), pooled


def encoder_names(folder: str | Path) -> list[str]:
    """The ENCODERS that a model has: both, or the first alone. Raises FileNotFoundError."""
    names = [name for name in ENCODERS if Path(folder, name).is_dir()]
    if ENCODERS[0] not in names:
        raise FileNotFoundError(f"no {ENCODERS[0]} in the folder {folder}: it is a part of a model, or a "
                                f"refiner, and draws nothing from text alone")
    return names


def load_text(folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> TextEncoders:
    """Loads a model's text encoders and tokenizers; raises as `load_unet`."""
    names = encoder_names(folder)
    encoders = [load_clip(Path(folder, name), dtype, device, last=len(names) == 1) for name in names]
    tokenizers = [CLIPTokenizer(Path(folder, name)) for name in TOKENIZERS[:len(names)]]
    for encoder, tokenizer in zip(encoders, tokenizers):
        length, size = encoder.config.max_position_embeddings, encoder.config.vocab_size
        kinds = max(tokenizer.bpe.get_vocab().values()) + 1
        if not tokenizer.length == tokenizers[0].length <= length or kinds > size:
            raise ValueError(f"a tokenizer of {folder} gives {tokenizer.length} tokens of {kinds} kinds, its "
                             f"text encoder reads {length} of {size}, and the first tokenizer gives "
                             f"{tokenizers[0].length}: they belong to different models")
    return TextEncoders(encoders, tokenizers)


def load_clip(folder: Path, dtype: torch.dtype | None = None, device: str = "cpu", last: bool = False) -> CLIP:
    """Loads one text encoder from its folder; `last` as in `CLIP`. Raises as `load_text`."""
    config = read_config(folder, CLIPConfig.from_dict)
    weights = {}
    for name, tensor in read_weights(folder, "model", dtype).items():
        if not name.endswith("position_ids"):                    # 0, 1, 2, ... in some files
            weights[name if name.startswith("text_") else f"text_model.{name}"] = tensor  # as older files say
    network = partial(CLIP, config, projection=folder.name == ENCODERS[1], last=last)
    return build(network, weights, folder, dtype, device)


def save_clip(clip: CLIP, folder: str | Path):
    """Writes config.json and the weights, in their own dtype, in the official layout."""
    kind = "CLIPTextModel" if clip.text_projection is None else "CLIPTextModelWithProjection"
    # "dtype" is what transformers is to compute in; the weights may have another.
    config = {"architectures": [kind], "model_type": "clip_text_model", "dtype": "float32"}
    save_network(clip, config | asdict(clip.config), Path(folder), "model")
