"""Text encoders and tokenizers give the numbers and tokens of transformers."""

import json
import shutil
from collections import Counter

import pytest
import torch
import transformers
from bundles import bundle
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AddedToken, CLIPTextModel, CLIPTextModelWithProjection

from common import refusal, same
from support.text import CLIPTokenizer, load_clip, load_text, save_clip

PROMPTS = [
    "a portrait of a koala", "", "   ", "Don't  stop\n\tTHE koala's!!! -- it's 3.14 o'clock, we'll",
    "l'été à Zürich, İstanbul, ǅ", "コアラ 考拉 👩‍🚀🐨 x²½ ٣", "a koala! ! a!b",
    "é vs e\u0301", "_snake_case__ a-b a_b ''s", "koala<|endoftext|>koala",
    "<|STARTOFTEXT|> koala <|startoftext|>", "\u200b\x00\ufffd\xa0koala\u3000x",
    "the koala and the koala " * 30]
WORDS = "the koala portrait painting with don't !!! ... 1999 Zürich été".lower().split()


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A tokenizer's folder as the official ones are, with all bytes and a few merges."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(ByteLevel.alphabet())
    level = ByteLevel(add_prefix_space=False)
    words = [[*piece[:-1], piece[-1] + "</w>"] for word in WORDS for piece, _ in level.pre_tokenize_str(word)]
    tokens, merges = ["!", *alphabet, *(letter + "</w>" for letter in alphabet)], []
    while pairs := Counter(pair for word in words for pair in zip(word, word[1:])):
        (first, second), _ = pairs.most_common(1)[0]
        merges.append(f"{first} {second}")
        tokens.append(first + second)
        for word in words:
            for i in reversed(range(len(word) - 1)):
                if word[i:i + 2] == [first, second]:
                    word[i:i + 2] = [first + second]
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return folder


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "as in the official files"])
def test_tokens_are_those_of_transformers(vocabulary, pad, wrapped):
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    if wrapped:
        special = {name: {"__type": "AddedToken", "content": token, "lstrip": False, "normalized": True,
                          "rstrip": False, "single_word": False} for name, token in special.items()}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad, **special}
    (vocabulary / "tokenizer_config.json").write_text(json.dumps(config))
    ours = CLIPTokenizer(vocabulary)
    ours.words = None  # a large one spells what it lacks
    theirs = transformers.CLIPTokenizer.from_pretrained(vocabulary)
    expected = theirs(PROMPTS, padding="max_length", max_length=77, truncation=True,
                      return_tensors="pt").input_ids
    assert torch.equal(ours(PROMPTS), expected)
    assert len({tuple(row.tolist()) for row in expected}) >= len(PROMPTS) - 1  # they differ in their tokens


@pytest.mark.parametrize("older", [False, True], ids=["tokenizer.json", "vocab.json"])
def test_added_tokens_are_those_of_transformers(vocabulary, tmp_path, older):
    """As textual inversion adds them; transformers 5 saves tokenizer.json, older versions had more files."""
    (vocabulary / "tokenizer_config.json").write_text('{"model_max_length": 77, "pad_token": "!"}')
    theirs = transformers.CLIPTokenizer.from_pretrained(vocabulary)
    theirs.add_tokens(["<koala-style>", "sks"])
    theirs.add_tokens([AddedToken("<cat>", lstrip=True)], special_tokens=True)
    theirs.save_pretrained(tmp_path)
    if older:
        added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
        (tmp_path / "tokenizer.json").unlink()
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(vocabulary / name, tmp_path / name)
        path = tmp_path / "tokenizer_config.json"
        decoder = {str(token.pop("id")): token for token in added}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": decoder}))
    ours = CLIPTokenizer(tmp_path)
    ours.words = None
    prompts = [*PROMPTS, "a <koala-style> portrait", "koala<koala-style>koala", "a  <cat> sksy SKS sks", "<CAT>"]
    expected = theirs(prompts, padding="max_length", max_length=77, truncation=True,
                      return_tensors="pt").input_ids
    assert torch.equal(ours(prompts), expected) and (expected >= theirs.vocab_size).any()


def test_where_files_name_different_padding_the_map_counts(vocabulary, tmp_path):
    shutil.copytree(vocabulary, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 77, "pad_token": "<|endoftext|>"}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    ours = CLIPTokenizer(tmp_path)
    assert ours.pad == theirs.pad_token_id == 0


def test_the_overflow_is_what_follows_the_last_token(vocabulary):
    (vocabulary / "tokenizer_config.json").write_text('{"model_max_length": 7}')
    tokenizer = CLIPTokenizer(vocabulary)
    assert tokenizer.overflow("the koala the koala the") == ""
    assert tokenizer.overflow("the  koala The koala the  KOALA painting") == "KOALA painting"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bundle(tmp_path_factory.mktemp("bundle"))


@pytest.mark.parametrize("eos", [2, 11], ids=["the largest id", "a token's id"])
@pytest.mark.parametrize("name, kind", [
    ("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)])
def test_numbers_are_those_of_transformers(folder, tmp_path, name, kind, eos):
    config = json.loads((folder / name / "config.json").read_text()) | {
        "eos_token_id": eos, "num_hidden_layers": 2}
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    save_file(load_file(folder / name / "model.safetensors"), tmp_path / name / "model.safetensors",
              {"format": "pt"})
    ids = torch.randint(3, config["vocab_size"] - 1, (3, 77), generator=torch.Generator().manual_seed(0))
    ids[torch.arange(3), torch.tensor([0, 40, 76])] = config["vocab_size"] - 1 if eos == 2 else eos
    sequence, pooled = load_clip(tmp_path / name, torch.float32)(ids)
    expected = kind.from_pretrained(tmp_path / name, dtype=torch.float32).eval()(
        ids, output_hidden_states=True)
    torch.testing.assert_close(sequence, expected.hidden_states[-2], rtol=1e-5, atol=1e-5)
    if name == "text_encoder":
        assert pooled.shape == (3, 0)
        final, _ = load_clip(tmp_path / name, torch.float32, last=True)(ids)  # as Stable Diffusion reads it
        torch.testing.assert_close(final, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(pooled, expected.text_embeds, rtol=1e-5, atol=1e-5)


def test_older_files_have_position_ids_and_newer_ones_no_prefix(folder, tmp_path):
    source, target = folder / "text_encoder", tmp_path / "text_encoder"
    expected = load_clip(source, torch.float32).state_dict()
    weights = load_file(source / "model.safetensors")
    older = weights | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    newer = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    for stored in (older, newer):
        save_file(stored, target / "model.safetensors")
        assert same(load_clip(target, torch.float32), expected)


@pytest.mark.parametrize("name, kind", [
    ("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)])
def test_transformers_loads_what_is_saved(folder, tmp_path, name, kind):
    clip = load_clip(folder / name, torch.float16)
    save_clip(clip, tmp_path / name)
    again = load_clip(tmp_path / name)
    assert again.config == clip.config and same(again, clip.state_dict())
    theirs, report = kind.from_pretrained(tmp_path / name, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and theirs.dtype == torch.float32


@pytest.mark.parametrize("merges", ["x y\n", "", "#version: 0.2\na b c d\n"])
def test_a_damaged_vocabulary(tmp_path, merges):
    path = bundle(tmp_path) / "tokenizer" / "merges.txt"
    path.write_text(merges)
    message = refusal(load_text, tmp_path, torch.float32)
    assert "merges.txt" in message and str(path.parent) in message


def test_a_vocabulary_cut_at_a_lines_end_or_with_a_changed_digit(tmp_path):
    folder = bundle(tmp_path) / "tokenizer"
    merges, vocab = ((folder / name).read_text() for name in ("merges.txt", "vocab.json"))
    (folder / "merges.txt").write_text("\n".join(merges.split("\n")[:-2]) + "\n")
    assert "no merge makes 1 of its tokens" in refusal(load_text, tmp_path)
    (folder / "merges.txt").write_text(merges)
    for twice, digits in (("one id", "5"), ("belong", "999")):
        (folder / "vocab.json").write_text(vocab.replace('": 4,', f'": {digits},'))
        assert twice in refusal(load_text, tmp_path)


def test_a_tokenizer_of_another_model(tmp_path):
    path = bundle(tmp_path) / "tokenizer_2" / "tokenizer_config.json"
    for length in (78, 76):  # the text encoder reads 77, and so does the other tokenizer
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))
        assert str(length) in refusal(load_text, tmp_path)


def test_a_part_of_a_model_is_no_model(tmp_path):
    shutil.rmtree(bundle(tmp_path) / "text_encoder")  # as in SDXL's refiner
    assert "refiner" in refusal(load_text, tmp_path)


def test_an_activation_that_is_not_supported(tmp_path):
    path = bundle(tmp_path) / "text_encoder" / "config.json"
    path.write_text(path.read_text().replace("quick_gelu", "relu"))
    message = refusal(load_text, tmp_path, torch.float32)
    assert "hidden_act" in message and "relu" in message and str(path) in message
