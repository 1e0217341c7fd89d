"""Text conditions are those of diffusers' pipelines; what CLIP does not read is said, or refused."""

import shutil
from pathlib import Path

import pytest
import torch
from common import ENCODERS, TOKENIZERS, bundle, read_json, refusal, same, write_json
from safetensors.torch import load_file, save_file

from support.text import load_text

PROMPTS = ["a red box", "", "blue sky on my box", " A  Red\nbox ", "on my box " * 30]


@pytest.fixture
def folder(tmp_path):
    return bundle(tmp_path / "model")


@pytest.mark.parametrize("name", ["700m", "sd1", "sd2"])
@torch.no_grad()
def test_conditions_are_those_of_diffusers(tmp_path, name):
    diffusers, folder = pytest.importorskip("diffusers"), bundle(tmp_path, name)
    expected = diffusers.DiffusionPipeline.from_pretrained(folder).encode_prompt(
        PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    sequence, pooled = load_text(folder)(PROMPTS)
    torch.testing.assert_close(sequence, expected[0], rtol=0, atol=1e-6)
    pooled_of_theirs = expected[2] if name == "700m" else sequence.new_empty(len(PROMPTS), 0)
    torch.testing.assert_close(pooled, pooled_of_theirs, rtol=0, atol=1e-6)


def test_long_prompts_and_unknown_words(folder, capsys):
    text = load_text(folder)
    words = ["a", "red", "box"] * 25
    text.warn_of_cuts([" ".join(words)] * 2)
    assert capsys.readouterr().err == ""
    text.warn_of_cuts([" ".join(words + ["blue", "sky"])] * 2)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "75" in warning and "'blue sky'" in warning
    refusal(text, ["a Pink box"])


def test_files_of_other_times(folder):
    """With position ids, without a prefix, and without the tokenizer's limit."""
    expected, path = load_text(folder), folder / ENCODERS[1] / "model.safetensors"
    tensors, tokenizer = load_file(path), folder / TOKENIZERS[0] / "tokenizer_config.json"
    with_ids = tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    for stored in (with_ids, {name.removeprefix("text_model."): tensors[name] for name in tensors}):
        save_file(stored, path, {"format": "pt"})
        assert same(load_text(folder), expected.state_dict())
    settings = read_json(tokenizer)
    del settings["model_max_length"]
    write_json(tokenizer, settings)
    assert load_text(folder).length == 77


def test_the_half_variant_alone(folder):
    expected, path = load_text(folder), folder / ENCODERS[1] / "model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file(tensors, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
    path.unlink()
    expected.encoders[1].half().float()
    assert same(load_text(folder), expected.state_dict())
    assert next(load_text(folder, torch.float16).parameters()).dtype == torch.float16


def test_what_is_missing_is_named(folder):
    path = folder / ENCODERS[1] / "model.safetensors"
    tensors = load_file(path)
    del tensors["text_projection.weight"]
    save_file(tensors, path, {"format": "pt"})
    message = refusal(load_text, folder)
    assert "text_projection.weight" in message and str(path.parent) in message


@pytest.mark.parametrize("name", [
    "text_encoder", "tokenizer_2", "text_encoder/config.json", "tokenizer/merges.txt"])
def test_a_part_that_is_missing_is_named(folder, name):
    (shutil.rmtree if (folder / name).is_dir() else Path.unlink)(folder / name)
    assert name.split("/")[0] in refusal(load_text, folder)
