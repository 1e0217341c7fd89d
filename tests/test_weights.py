"""Weights come in and go out bit by bit, as diffusers has them; what is no network is refused in a line."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import files
import model
from common import UNETS, VAES, fill
from model import VAE, UNet, UNetConfig, VAEConfig, load_unet, load_vae, save_unet, save_vae
from run import claim
from weights import WEIGHTS

FILE = f"{WEIGHTS}.safetensors"
HALF_FILE = f"{WEIGHTS}.fp16.safetensors"
CONFIG = UNetConfig((8, 16), (0, 1), 1, 1, (1, 2), context_dim=8, pooled_dim=4, size_dim=4, groups=4)


def same(network: nn.Module, tensors: dict) -> bool:
    """Whether names, types and bits are equal."""
    ours = network.state_dict()
    return ours.keys() == tensors.keys() and all(
        ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)
        for name, tensor in tensors.items())


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with the smallest U-Net of SDXL's kind."""
    folder = tmp_path_factory.mktemp("saved")
    save_unet(fill(UNet(CONFIG)), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "net")


@pytest.fixture
def weights(saved):
    return load_file(saved / FILE)


def refusal(source, load=load_unet, **options) -> str:
    """The one line with which `source` is refused."""
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        load(source, **options)
    assert type(caught.value) in (FileNotFoundError, ValueError)  # not a library's own
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------------------
# In and out


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_reads_what_we_write(name, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    ours = fill(UNet(UNetConfig.from_diffusers(UNETS[name])))
    save_unet(ours, tmp_path)
    theirs, report = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert same(ours, theirs.state_dict()) and not any(report.values())
    assert same(load_unet(tmp_path), theirs.state_dict())


@pytest.mark.parametrize("name", UNETS)
def test_we_read_what_diffusers_writes(name, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    theirs = fill(diffusers.UNet2DConditionModel.from_config(UNETS[name]))
    theirs.save_pretrained(tmp_path / "unet")
    for source in (tmp_path, tmp_path / "unet", f"{tmp_path}/unet/"):
        ours = load_unet(source)
        assert same(ours, theirs.state_dict()) and ours.config == UNetConfig.from_diffusers(UNETS[name])
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_vae_and_diffusers_read_each_other(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    ours = VAE(VAEConfig.from_diffusers(VAES["vae"]))
    theirs = fill(diffusers.AutoencoderKL.from_config(VAES["vae"]))
    save_vae(ours, tmp_path / "ours")
    assert same(ours, diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours").state_dict())
    theirs.save_pretrained(tmp_path / "theirs" / "vae")
    assert same(load_vae(tmp_path / "theirs"), theirs.state_dict())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_read(variant, tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    theirs = fill(diffusers.UNet2DConditionModel.from_config(UNETS["700m"]))
    theirs.save_pretrained(tmp_path, max_shard_size="500KB", variant=variant)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert same(load_unet(tmp_path), theirs.state_dict())
    assert capsys.readouterr().err.count("\n") == (variant == "fp16")  # not what was asked for
    (tmp_path / shards[1]).unlink()
    message = refusal(tmp_path)
    assert shards[1] in message and "index" in message
    index = next(tmp_path.glob("*.index*.json"))
    index.write_text("{}")
    assert index.name in refusal(tmp_path)


def test_which_file_is_read_and_what_is_printed(folder, weights, capsys):
    half = {name: tensor.half() for name, tensor in weights.items()}
    plain = half | {"conv_in.bias": half["conv_in.bias"] + 1}

    def read(dtype: torch.dtype | None) -> tuple[dict, str]:
        return load_unet(folder, dtype).state_dict(), capsys.readouterr().err

    save_file(half, folder / HALF_FILE)
    save_file(plain, folder / FILE)  # told apart by one tensor; both hold half precision
    files = {torch.float16: half, torch.bfloat16: half, torch.float32: plain, None: plain}
    for dtype, expected in files.items():
        found, printed = read(dtype)
        assert torch.equal(found["conv_in.bias"], expected["conv_in.bias"].to(dtype or torch.float16)), dtype
        assert printed == "", dtype

    (folder / HALF_FILE).rename(folder / "aside")
    _, printed = read(torch.float16)
    assert FILE in printed and str(folder) in printed and printed.count("\n") == 1
    (folder / "aside").rename(folder / HALF_FILE)
    (folder / FILE).unlink()
    for dtype in (torch.float32, None):
        _, printed = read(dtype)
        assert HALF_FILE in printed and printed.count("\n") == 1
    assert read(torch.float16)[1] == ""


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_weights_come_in_the_type_asked_for(folder, weights, dtype):
    found = load_unet(folder, dtype).state_dict()
    assert all(torch.equal(found[name], tensor.to(dtype)) and found[name].dtype == (dtype or tensor.dtype)
               for name, tensor in weights.items())


def test_half_precision_is_written_as_it_is(folder, tmp_path):
    network = load_unet(folder).bfloat16()
    save_unet(network, tmp_path / "half")
    assert same(load_unet(tmp_path / "half"), network.state_dict())


def test_older_names_in_a_vae(tmp_path):
    network = fill(VAE(VAEConfig.from_diffusers(VAES["vae"])))
    save_vae(network, tmp_path)
    new = ("to_q", "to_k", "to_v", "to_out.0")
    old = load_file(tmp_path / FILE)
    for a, b in zip(new, ("query", "key", "value", "proj_attn")):
        for half in ("encoder", "decoder"):
            for kind in ("weight", "bias"):
                place = f"{half}.mid_block.attentions.0"
                old[f"{place}.{b}.{kind}"] = old.pop(f"{place}.{a}.{kind}")
    save_file(old, tmp_path / FILE)
    assert same(load_vae(tmp_path), network.state_dict())


def test_loading_and_saving_to_one_path(folder, weights):
    network = load_unet(folder)
    save_unet(network, folder)
    assert same(network, weights) and same(load_unet(folder), weights)
    with torch.no_grad():
        network.conv_in.bias += 1  # the file may be mapped into memory, and is not to be changed by that
    assert same(load_unet(folder), weights)


def test_what_is_written_is_the_official_layout(saved):
    assert sorted(os.listdir(saved)) == ["config.json", FILE]
    assert all((saved / name).stat().st_mode & 0o777 == 0o644 for name in os.listdir(saved))
    with safe_open(saved / FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert UNetConfig.from_diffusers(json.loads((saved / "config.json").read_text())) == CONFIG


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "file"
    files.write(path, lambda beside: beside.write_text("old"))

    def fails(beside: Path):
        beside.write_text("ne")
        assert path.read_text() == "old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write(path, fails)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file"]


def test_two_writers_of_a_folder_do_not_meet(tmp_path):
    def slow(beside: Path):
        beside.write_text("slow")
        files.write(tmp_path / "other", lambda beside: beside.write_text("quick"))

    files.write(tmp_path / "file", slow)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "slow", "other": "quick"}


def test_what_a_killed_write_left_goes_when_the_run_is_taken_up(tmp_path):
    (tmp_path / "unet" / f"{files.WRITING}abc").mkdir(parents=True)
    (tmp_path / "unet" / f"{files.WRITING}abc" / "file").write_text("half of a file")
    (tmp_path / "log.csv").write_text("step\n")
    with claim(tmp_path):
        assert os.listdir(tmp_path / "unet") == []


def test_a_write_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        def noted(*args, name=name, call=getattr(os, name)):
            calls.append(name)
            call(*args)

        monkeypatch.setattr(os, name, noted)
    files.write(tmp_path / "file", lambda beside: beside.write_text("new"))
    assert calls == ["fsync", "replace", "fsync"]


# ------------------------------------------------------------------------------------------------------------
# Bad input


def test_no_such_folder(tmp_path):
    message = refusal(tmp_path / "nowhere")
    assert f"{tmp_path}/nowhere" in message and "hub id" in message
    file = tmp_path / "sdxl.ckpt"
    file.write_bytes(b"\x80\x02")
    message = refusal(file)
    assert str(file) in message and "file" in message and "folder" in message


def test_a_file_by_a_relative_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sdxl.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    assert "folder" in refusal("models/sdxl.safetensors")


def test_a_folder_without_config(folder):
    (folder / "config.json").unlink()
    assert "config.json" in (message := refusal(folder)) and str(folder) in message
    assert "vae/config.json" in refusal(folder, load_vae)


@pytest.mark.parametrize("text", ["", "{", "<!DOCTYPE html>", "version https://git-lfs.github.com/spec/v1\n",
                                  "\x80\x02"])
def test_a_config_that_is_not_json(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin1"))
    message = refusal(folder)
    assert "not JSON" in message and message.count("config.json") == 1


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"block_out_channels": 320}'])
def test_a_config_of_something_else(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


def test_a_config_of_another_network(folder):
    assert "down_block_types" in refusal(folder, load_vae)
    (folder / "config.json").write_text(json.dumps(VAES["vae"]))
    assert "cross_attention_dim" in refusal(folder)


def test_an_unsupported_config(folder):
    config = CONFIG.to_diffusers() | {"act_fn": "gelu", "dual_cross_attention": True}
    (folder / "config.json").write_text(json.dumps(config))
    message = refusal(folder)
    assert "act_fn='gelu'" in message and "dual_cross_attention=True" in message and "config.json" in message


def test_no_weights(folder):
    (folder / FILE).unlink()
    assert FILE in (message := refusal(folder)) and str(folder) in message


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", [f"{WEIGHTS}.bin", f"{WEIGHTS}.fp16.bin", FILE])
def test_a_pickle_is_not_opened(folder, tmp_path, name, protocol):
    marker = tmp_path / "marker"
    (folder / FILE).unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(marker), protocol))
    message = refusal(folder)
    assert not marker.exists()
    assert name in message and (protocol < 2 and name == FILE or "pickle" in message)
    pickle.loads((folder / name).read_bytes())
    assert marker.exists()  # the trap works


def test_an_archive_of_torch_is_not_opened(folder):
    for new in (True, False):
        torch.save({"a": torch.ones(2)}, folder / FILE, _use_new_zipfile_serialization=new)
        assert "pickle" in refusal(folder)


@pytest.mark.parametrize("text, word", [
    ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5135149760\n", "git-lfs"),
    ("<!DOCTYPE html>\n<html><body>Not found</body></html>", "HTML"), ("\n <html>", "HTML"), ("", "cut"),
    ("Not Found", "damaged")])
def test_text_in_place_of_weights(folder, text, word):
    (folder / FILE).write_text(text)
    assert word in (message := refusal(folder)) and FILE in message


def test_a_file_that_was_cut(folder, saved):
    whole = (saved / FILE).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (1, 7, 8, 9, 500, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        (folder / FILE).write_bytes(whole[:length])
        assert "cut or damaged" in (message := refusal(folder)) and FILE in message, length
    (folder / FILE).write_bytes(whole + b"\0")
    assert "cut or damaged" in refusal(folder)
    (folder / FILE).write_bytes((1 << 62).to_bytes(8, "little") + whole[8:])
    assert "cut or damaged" in refusal(folder)


@pytest.mark.parametrize("length", [0x80, 0x480])  # of the header, which the file begins with
def test_a_cut_file_is_not_taken_for_a_pickle(folder, length):
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    (folder / FILE).write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0")
    assert "cut or damaged" in refusal(folder)


def test_a_flipped_header(folder, saved, weights, monkeypatch):
    monkeypatch.setattr(model, "CONFIGS", {})  # a renamed tensor makes each of them, only to compare it
    whole = (saved / FILE).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for bit in [*range(0, 8 * 96, 19), *range(8 * 96, 8 * header, 4001)]:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / FILE).write_bytes(damaged)
        try:
            assert same(load_unet(folder), weights)  # the flip was in what does not matter
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 40


def test_missing_unexpected_and_misshapen_tensors(folder, weights):
    for name in [name for name in weights if name.startswith("mid_block.resnets.0.")]:
        del weights[name]
    weights |= {"conv_in.bias": torch.zeros(9), "stranger": torch.zeros(1)}
    save_file(weights, folder / FILE)
    message = refusal(folder)
    assert "10 missing (mid_block.resnets.0." in message
    assert message.count("mid_block") == 5 and ", ..." in message  # the first few
    assert "1 unexpected (stranger)" in message and "1 of another shape (conv_in.bias)" in message
    assert str(folder) in message and "fits" not in message


def test_the_preset_that_does_fit_is_named(folder, weights, monkeypatch):
    small = {"sdxl": CONFIG, "700m": replace(CONFIG, mid_depth=0)}
    monkeypatch.setattr(model, "CONFIGS", small)
    (folder / "config.json").write_text(json.dumps(small["700m"].to_diffusers()))
    message = refusal(folder)
    assert "fits sdxl" in message and "unexpected" in message
    save_file({name: tensor for name, tensor in weights.items() if "mid_block" not in name}, folder / FILE)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_diffusers()))
    assert "fits 700m" in refusal(folder)


@pytest.mark.parametrize("start", ["model.diffusion_model.input_blocks.0.0.", "input_blocks.0.0."])
def test_the_single_file_format_is_named(folder, start):
    save_file({f"{start}weight": torch.zeros(8, 4, 3, 3), f"{start}bias": torch.zeros(8)}, folder / FILE)
    assert "single-file" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_numbers(folder, weights, value, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    weights["conv_out.weight"][1, 2, 0, 1] = value
    save_file(weights, folder / FILE)
    message = refusal(folder)
    assert "NaN" in message and "conv_out.weight" in message and str(folder) in message


@pytest.mark.parametrize("asked", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("stored", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.float64])
def test_weights_of_another_type(folder, weights, stored, asked):
    weights["conv_in.bias"] = weights["conv_in.bias"].to(stored)
    save_file(weights, folder / FILE)
    message = refusal(folder, dtype=asked)
    assert "conv_in.bias" in message and str(stored) in message


# ------------------------------------------------------------------------------------------------------------
# The hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub's library, with an empty cache and switched off, so that no test is on the network."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    return hub


@pytest.mark.parametrize("load", [load_unet, load_vae])
def test_the_hub_is_switched_off(hub, load):
    message = refusal("etri-vilab/koala-700m", load)
    assert "no folder etri-vilab/koala-700m" in message and "config.json of it" in message
    assert "hf download etri-vilab/koala-700m" in message


def test_the_hub_is_out_of_reach(tmp_path):
    """In another process, since the hub's library reads the environment when it is imported."""
    code = """if True:
        import time, model
        start = time.monotonic()
        try:
            model.load_unet("etri-vilab/koala-700m")
        except FileNotFoundError as error:
            print(round(time.monotonic() - start), error)"""
    place = {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1", "HF_HOME": str(tmp_path),
             "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90,
                          cwd=Path(model.__file__).parent, env=os.environ | place)
    assert done.stdout.count("\n") == 1, done.stderr
    seconds, message = done.stdout.split(" ", 1)
    assert "hf download etri-vilab/koala-700m" in message and int(seconds) < 10


@pytest.fixture
def served(hub, monkeypatch, tmp_path):
    """A hub that serves a folder, and the names that it was asked for."""
    asked = []

    def serve(repository: str, name: str, **options) -> str:
        asked.append(name)
        if not (tmp_path / "hub" / name).is_file():
            raise hub.errors.EntryNotFoundError("404 Client Error.\n\nEntry Not Found")
        return str(tmp_path / "hub" / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", serve)
    return asked


def test_only_the_files_needed_are_fetched(served, tmp_path, capsys):
    network, vae = fill(UNet(CONFIG)), fill(VAE(VAEConfig.from_diffusers(VAES["vae"])))
    save_unet(network, tmp_path / "hub" / "unet")
    save_vae(vae, tmp_path / "hub")
    assert same(load_unet("a/hub"), network.state_dict())
    assert served == ["unet/config.json", f"unet/{FILE}"]
    served.clear()
    assert same(load_vae("a/hub"), vae.state_dict())  # as in a repository of a VAE alone
    assert served == ["vae/config.json", "config.json", FILE] and capsys.readouterr().err == ""


def test_what_the_hub_lacks(served, tmp_path):
    message = refusal("a/hub")
    assert "unet/config.json" in message and "a/hub on the hub" in message
    save_unet(fill(UNet(CONFIG)), tmp_path / "hub" / "unet")
    (tmp_path / "hub" / "unet" / FILE).rename(tmp_path / "hub" / "unet" / f"{WEIGHTS}.bin")
    assert "pickle" in refusal("a/hub")


def test_a_hub_that_refuses(hub, monkeypatch):
    for error, word in ((hub.errors.RepositoryNotFoundError, "HF_TOKEN"),
                        (hub.errors.HfHubHTTPError, "a/hub"),
                        (hub.errors.HFValidationError, "a/hub"), (hub.errors.HTTPError, "a/hub"),
                        (OSError, "a/hub")):
        def serve(*args, **options):
            problem = error.__new__(error)
            problem.args = ("It went wrong.\n\nA second line",)
            raise problem

        monkeypatch.setattr("huggingface_hub.hf_hub_download", serve)
        assert word in refusal("a/hub"), error


def test_a_local_folder_comes_before_the_hub(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    monkeypatch.chdir(folder.parent)
    (folder / "unet").mkdir()
    for name in ("config.json", FILE):
        (folder / name).rename(folder / "unet" / name)
    load_unet("net")
    load_unet("net/unet")
