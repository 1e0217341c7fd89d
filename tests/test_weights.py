"""Weights are read and written bit by bit, as diffusers does; a bad file is refused in one line."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common import FILE, HALF_FILE, STEM, UNETS, VAES, fill, refusal, same, save_shards
from model import UNet, UNetConfig, load_unet, save_unet

CONFIG = UNetConfig((8, 16), (0, 1), 1, 1, (1, 2), context_dim=8, pooled_dim=4, size_dim=4, groups=4)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with a very small U-Net of SDXL's kind."""
    folder = tmp_path_factory.mktemp("saved")
    save_unet(fill(UNet(CONFIG)), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "net")


@pytest.fixture
def weights(saved):
    return load_file(saved / FILE)


# ------------------------------------------------------------------------------------------------------------
# In and out


@pytest.mark.parametrize("name", ["sdxl", "700m", "sd1", "bk-sdm-tiny"])
def test_diffusers_and_we_read_each_other(name, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    ours = fill(UNet(UNetConfig.from_diffusers(UNETS[name])))
    save_unet(ours, tmp_path / "ours")
    theirs, report = diffusers.UNet2DConditionModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True)
    assert same(ours, theirs.state_dict()) and not any(report.values())
    theirs.save_pretrained(tmp_path / "theirs" / "unet")
    for source in (tmp_path / "theirs", f"{tmp_path}/theirs/unet/"):
        again = load_unet(source)
        assert same(again, theirs.state_dict()) and again.config == UNetConfig.from_diffusers(UNETS[name])
        assert all(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_of_diffusers_are_read(variant, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    theirs = fill(diffusers.UNet2DConditionModel.from_config(UNETS["700m"]))
    theirs.save_pretrained(tmp_path, max_shard_size="500KB", variant=variant)
    assert len([*tmp_path.glob("*.safetensors")]) > 2
    assert same(load_unet(tmp_path), theirs.state_dict())


@pytest.mark.parametrize("half", [False, True])
def test_shards(folder, weights, half):
    (folder / FILE).unlink()
    shards = save_shards(weights, folder, half)
    assert same(load_unet(folder), weights)
    shards[1].rename(folder.parent / shards[1].name)  # a path in the index does not lead out of the folder
    index = next(folder.glob("*.index*.json"))
    text = index.read_text()
    index.write_text(text.replace(f'"{shards[1].name}"', f'"../{shards[1].name}"'))
    assert shards[1].name in refusal(load_unet, folder)
    for broken in ("{}", "[]", text[:-9], '{"weight_map": [1]}', '{"weight_map": {"conv_in.bias": 1}}'):
        index.write_text(broken)
        assert index.name in refusal(load_unet, folder), broken


def test_which_variant_is_read(folder, weights):
    half = {name: tensor.half() for name, tensor in weights.items()}
    plain = half | {"conv_in.bias": half["conv_in.bias"] + 1}  # tells the two files apart
    save_file(half, folder / HALF_FILE)
    save_file(plain, folder / FILE)
    files = {torch.float16: half, torch.bfloat16: half, torch.float32: plain, None: plain}
    for dtype, expected in files.items():
        bias = load_unet(folder, dtype).conv_in.bias
        assert torch.equal(bias, expected["conv_in.bias"].to(dtype or torch.float16)), dtype
    (folder / FILE).rename(folder / "aside")
    for dtype in (torch.float32, torch.float16, None):  # the only one there is
        assert torch.equal(load_unet(folder, dtype).conv_in.bias.half(), half["conv_in.bias"])
    (folder / "aside").rename(folder / FILE)
    (folder / HALF_FILE).unlink()
    assert same(load_unet(folder, torch.float16), plain)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_weights_have_the_dtype_asked_for(folder, weights, dtype):
    assert same(load_unet(folder, dtype), {name: tensor.to(dtype) for name, tensor in weights.items()})


def test_halves_are_written_as_they_are(folder, tmp_path):
    network = load_unet(folder).bfloat16()
    save_unet(network, tmp_path / "half")
    assert same(load_unet(tmp_path / "half"), network.state_dict())


def test_loading_and_saving_in_one_folder(folder, weights):
    network = load_unet(folder)
    save_unet(network, folder)
    assert same(network, weights) and same(load_unet(folder), weights)
    with torch.no_grad():
        network.conv_in.bias += 1  # the file may be mapped into memory, and must not change with it
    assert same(load_unet(folder), weights)


def test_what_is_written_is_the_official_layout(saved):
    assert sorted(os.listdir(saved)) == ["config.json", FILE]
    assert (saved / FILE).stat().st_mode & 0o777 == 0o644
    with safe_open(saved / FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert UNetConfig.from_diffusers(json.loads((saved / "config.json").read_text())) == CONFIG


def test_saving_that_fails_leaves_the_old_files(folder, weights, monkeypatch):
    network = fill(UNet(CONFIG)).half()
    replace = os.replace

    def fail_at_the_end(source, target):
        assert Path(source).parent == folder and same(load_unet(folder), weights)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        save_unet(network, folder)
    assert sorted(os.listdir(folder)) == ["config.json", FILE] and same(load_unet(folder), weights)
    monkeypatch.setattr(os, "replace", replace)

    def fail_at_once(*args):
        raise OSError(28, "No space left")

    monkeypatch.setattr("model.save_file", fail_at_once)
    with pytest.raises(OSError, match="No space left"):
        save_unet(network, folder)
    assert sorted(os.listdir(folder)) == ["config.json", FILE] and same(load_unet(folder), weights)


# ------------------------------------------------------------------------------------------------------------
# Bad files


def test_no_such_folder(tmp_path):
    assert f"{tmp_path}/nowhere" in refusal(load_unet, tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", FILE])
def test_a_file_that_is_missing(folder, name):
    (folder / name).unlink()
    message = refusal(load_unet, folder)
    assert name in message and str(folder) in message


@pytest.mark.parametrize("text", [
    "", "{", "<!DOCTYPE html>", "version https://git-lfs.github.com/spec/v1\n", "\x80\x02", "{}", "[]",
    "null", "[" * 100_000, '{"block_out_channels": 320}'])
def test_a_config_that_is_damaged(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin1"))
    message = refusal(load_unet, folder)
    assert str(folder / "config.json") in message and message.count("config.json") <= 2


def test_a_config_of_another_network(folder):
    (folder / "config.json").write_text(json.dumps(VAES["vae"]))
    message = refusal(load_unet, folder)
    assert "cross_attention_dim" in message and str(folder / "config.json") in message


def test_a_config_that_is_not_supported(folder):
    config = CONFIG.to_diffusers() | {"act_fn": "gelu", "dual_cross_attention": True}
    (folder / "config.json").write_text(json.dumps(config))
    message = refusal(load_unet, folder)
    assert "act_fn" in message and "dual_cross_attention" in message and "config.json" in message


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", [f"{STEM}.bin", f"{STEM}.fp16.bin", FILE])
def test_a_pickle_is_not_opened(folder, tmp_path, name, protocol):
    marker = tmp_path / "marker"
    (folder / FILE).unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(marker), protocol))
    message = refusal(load_unet, folder)
    assert not marker.exists()
    assert str(folder) in message and (protocol < 2 and name == FILE or "pickle" in message)
    pickle.loads((folder / name).read_bytes())
    assert marker.exists()  # the trap works


def test_an_archive_of_torch_is_not_opened(folder):
    for zipped in (True, False):
        torch.save({"a": torch.ones(2)}, folder / FILE, _use_new_zipfile_serialization=zipped)
        assert "pickle" in refusal(load_unet, folder)


@pytest.mark.parametrize("text, reason", [
    ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5135149760\n", "git-lfs"),
    ("<!DOCTYPE html>\n<html><body>Not found</body></html>", "HTML"), ("\n <html>", "HTML"), ("", "cut"),
    ("Not Found", "damaged")])
def test_text_in_place_of_weights(folder, text, reason):
    (folder / FILE).write_text(text)
    message = refusal(load_unet, folder)
    assert reason in message and FILE in message


def test_a_file_that_was_cut(folder, saved):
    whole = (saved / FILE).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (1, 7, 8, 9, 500, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        (folder / FILE).write_bytes(whole[:length])
        message = refusal(load_unet, folder)
        assert "cut or damaged" in message and FILE in message, length
    (folder / FILE).write_bytes(whole + b"\0")
    assert "cut or damaged" in refusal(load_unet, folder)
    (folder / FILE).write_bytes((1 << 62).to_bytes(8, "little") + whole[8:])
    assert "cut or damaged" in refusal(load_unet, folder)


@pytest.mark.parametrize("length", [0x80, 0x480])  # of the header: the file's first bytes, as in a pickle
def test_a_cut_file_is_not_taken_for_a_pickle(folder, length):
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    (folder / FILE).write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0")
    assert "cut or damaged" in refusal(load_unet, folder)


def test_a_bit_flipped_in_the_header(folder, saved, weights):
    whole = (saved / FILE).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for bit in [*range(0, 8 * 96, 29), *range(8 * 96, 8 * header, 6007)]:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / FILE).write_bytes(damaged)
        try:
            assert same(load_unet(folder), weights)  # nothing depends on this bit
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("changed", [
    {"mid_block.resnets.0.norm1.weight": None}, {"stranger": torch.zeros(1)}, {"stranger": torch.zeros(0)},
    {"conv_in.bias": torch.zeros(9)}, {"conv_in.bias": torch.zeros(0)}, {"conv_in.bias": torch.zeros(())},
    {"conv_in.bias": torch.zeros(9), "stranger": torch.zeros(1), "conv_out.bias": None},
], ids=lambda changed: ", ".join(f"{name} {tensor}" for name, tensor in changed.items()))
def test_tensors_that_do_not_fit(folder, weights, changed):
    weights = {name: tensor for name, tensor in (weights | changed).items() if tensor is not None}
    save_file(weights, folder / FILE)
    message = refusal(load_unet, folder)
    assert str(folder) in message and "config.json" in message
    assert all(name in message for name in changed)


def test_a_message_about_many_tensors_is_short(folder):
    save_file({f"stranger.{i}": torch.zeros(1) for i in range(1000)}, folder / FILE)
    assert len(refusal(load_unet, folder)) < 500 + len(str(folder))


@pytest.mark.parametrize("start", ["model.diffusion_model.input_blocks.0.0.", "input_blocks.0.0."])
def test_the_single_file_format_is_recognized(folder, start):
    save_file({f"{start}weight": torch.zeros(8, 4, 3, 3), f"{start}bias": torch.zeros(8)}, folder / FILE)
    assert "single-file" in refusal(load_unet, folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite(folder, weights, value, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    weights["conv_out.weight"][1, 2, 0, 1] = value
    save_file(weights, folder / FILE)
    message = refusal(load_unet, folder)
    assert "NaN" in message and "conv_out.weight" in message and str(folder) in message


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("stored", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.float64])
def test_weights_of_another_kind_of_number(folder, weights, stored, dtype):
    weights["conv_in.bias"] = weights["conv_in.bias"].to(stored)
    save_file(weights, folder / FILE)
    message = refusal(load_unet, folder, dtype=dtype)
    assert "conv_in.bias" in message and str(stored) in message
