"""The U-Net is that of diffusers, the surgery follows the paper, features are what they claim to be."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from common import (
    ANSWERS, FILE, HALF_FILE, SIZES, STEM, UNETS, VAES, digest, draw, fill, filled, inputs, refusal,
    relative_error, same, save_shards)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model
import oracle
from model import (
    CONFIGS, FEATURE_TYPES, Features, UNet, UNetConfig, feature_paths, inherit, load_unet, save_unet, stages,
    student_config)

PARAMETERS = {"sdxl": 2_567_463_684, "1b": 1_161_184_324, "700m": 782_822_724}  # Table 2
SDXL_FILE = oracle.FULL | {  # with FULL, unet/config.json of stabilityai/stable-diffusion-xl-base-1.0
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.19.0.dev0", "act_fn": "silu",
    "addition_embed_type_num_heads": 64, "conv_in_kernel": 3, "conv_out_kernel": 3, "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "mid_block_scale_factor": 1,
    "norm_eps": 1e-05, "out_channels": 4, "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default", "time_embedding_type": "positional",
    **dict.fromkeys(("center_input_sample", "class_embeddings_concat", "dual_cross_attention",
                     "only_cross_attention", "resnet_skip_time_act"), False),
    **dict.fromkeys(("class_embed_type", "cross_attention_norm", "encoder_hid_dim", "encoder_hid_dim_type",
                     "mid_block_only_cross_attention", "num_attention_heads", "num_class_embeds",
                     "time_cond_proj_dim", "time_embedding_act_fn", "time_embedding_dim", "timestep_post_act",
                     "upcast_attention"))}
TINY = UNetConfig((32, 64), (0, 1), 1, 2, (2, 4), context_dim=40, pooled_dim=24, size_dim=8, groups=8)
SD1 = UNetConfig((320, 640, 1280, 1280), (1, 1, 1, 0), 1, 2, (8,) * 4, context_dim=768, pooled_dim=0,
                 size_dim=0, linear_projection=False, sample_size=64)


# ------------------------------------------------------------------------------------------------------------
# Exactness


@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_unet_gives_the_stored_answers(name):
    answers, ours = load_file(ANSWERS), filled(UNETS[name])
    for size in SIZES:
        assert relative_error(ours(**inputs(UNETS[name], size)), answers[f"{name} {size}"]) <= 1e-5, size


@pytest.mark.parametrize("name", ["sdxl", "sd2"])
@torch.no_grad()
def test_unet_equals_diffusers(name):
    pytest.importorskip("diffusers")
    ours, theirs = filled(UNETS[name]), oracle.unet(UNETS[name])
    assert digest(ours) == digest(theirs)
    given = inputs(UNETS[name], "odd batch")
    assert relative_error(ours(**given), oracle.predict(theirs, **given)) <= 1e-5


@pytest.mark.parametrize("name", PARAMETERS)
def test_tensors_are_the_official_ones(name):
    with torch.device("meta"):
        network = UNet(CONFIGS[name])
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]
    with safe_open(ANSWERS, framework="pt") as file:
        assert digest(network) == file.metadata()[name]


# ------------------------------------------------------------------------------------------------------------
# Configurations


def test_official_files_are_the_presets():
    assert UNetConfig.from_diffusers(SDXL_FILE) == UNetConfig() == CONFIGS["sdxl"]
    for name, changed in oracle.SURGERIES.items():
        assert UNetConfig.from_diffusers(SDXL_FILE | changed) == CONFIGS[name]
    written = UNetConfig().to_diffusers()
    for key in SDXL_FILE.keys() & written.keys():
        assert written[key] == SDXL_FILE[key], key


@pytest.mark.parametrize("config", [*CONFIGS.values(), *map(UNetConfig.from_diffusers, UNETS.values()), TINY])
def test_config_survives_its_file(config):
    assert UNetConfig.from_diffusers(json.loads(json.dumps(config.to_diffusers()))) == config


def test_what_absent_and_old_entries_mean():
    absent = {key: value for key, value in SDXL_FILE.items() if key != "mid_block_type"}
    assert UNetConfig.from_diffusers(absent).mid_depth == 10
    sd1 = UNetConfig.from_diffusers(UNETS["sd1"])  # says little more than its widths
    assert (sd1.depths, sd1.mid_depth, sd1.heads) == ((1, 1, 1, 0), 1, (8, 8, 8, 8))
    assert (sd1.linear_projection, sd1.pooled_dim) == (False, 0)
    for version, side, latents in ("0.6.0", 32, 64), ("0.8.1", 96, 96), ("0.9.0", 32, 32), ("0.10.2", 32, 32):
        found = UNetConfig.from_diffusers(UNETS["sd1"] | {"_diffusers_version": version, "sample_size": side})
        assert found.sample_size == latents, version
    unused = {"transformer_layers_per_block": (0, 2, 10), "upcast_attention": True}  # and not refused
    assert UNetConfig.from_diffusers(SDXL_FILE | unused) == UNetConfig()


@pytest.mark.parametrize("changed", [
    {"act_fn": "gelu"}, {"time_cond_proj_dim": 256}, {"class_embed_type": "timestep"}, {"norm_eps": 1e-6},
    {"mid_block_type": "UNetMidBlock2D"}, {"resnet_time_scale_shift": "scale_shift"},
    {"down_block_types": ["AttnDownBlock2D"] * 3}, {"num_attention_heads": 8}, {"flip_sin_to_cos": False},
    {"addition_embed_type": "text"}, {"something_new": 1},
    {"reverse_transformer_layers_per_block": [10, 2, 1]}], ids=lambda changed: next(iter(changed)))
def test_unsupported_values_are_named(changed):
    assert next(iter(changed)) in refusal(UNetConfig.from_diffusers, SDXL_FILE | changed)


# ------------------------------------------------------------------------------------------------------------
# From teacher to student


def test_surgery_of_teachers():
    for name in ("1b", "700m"):
        assert student_config(CONFIGS["sdxl"], name) == CONFIGS[name]
    toy = UNetConfig((32, 48, 64), (0, 2, 10), 10, 2, (1, 2, 4), context_dim=64, pooled_dim=32, groups=8)
    assert student_config(toy, "1b") == replace(toy, pairs=1, depths=(0, 2, 6), mid_depth=6)
    assert student_config(toy, "700m") == replace(toy, pairs=1, depths=(0, 2, 5), mid_depth=0)
    shallow = replace(toy, depths=(0, 2, 3), mid_depth=3)  # nothing to cut, and nothing is added
    assert student_config(shallow, "1b") == replace(shallow, pairs=1)
    for teacher in (CONFIGS["1b"], replace(toy, mid_depth=0), replace(toy, pairs=3)):
        assert "Mid" in refusal(student_config, teacher, "700m")
    assert "tiny" in refusal(student_config, UNetConfig.from_diffusers(UNETS["sd1"]), "tiny")


@pytest.mark.parametrize("name, parameters", [
    (None, 859_520_964), ("base", 579_384_964), ("small", 482_346_884), ("tiny", 323_384_964)])
def test_bk_sdm_has_the_published_sizes(name, parameters):
    with torch.device("meta"):
        network = UNet(student_config(SD1, name) if name else SD1)
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("teacher, name", [
    (UNETS["sdxl"], "1b"), (UNETS["sdxl"], "700m"),
    (UNETS["sd1"] | {"block_out_channels": [32, 64, 96, 96]}, "tiny")], ids=["1b", "700m", "tiny"])
def test_every_tensor_is_the_teachers_at_the_same_place(teacher, name):
    """Pair 1 of a decoder stage is the teacher's pair 2; the tiny decoder starts at the second stage."""
    teacher = filled(teacher)
    student = UNet(student_config(teacher.config, name))
    inherit(student, teacher)
    weights, moved = teacher.state_dict(), Counter()
    for path, tensor in student.state_dict().items():
        block, stage, kind, pair, *rest = [*path.split("."), "", ""]
        if block == "up_blocks":
            stage = str(int(stage) + (name == "tiny"))
            pair = "2" if kind != "upsamplers" and pair == "1" else pair
        source = ".".join([block, stage, kind, pair, *rest]).strip(".")
        moved[block, kind] += path != source
        assert torch.equal(tensor, weights[source]) and tensor.data_ptr() != weights[source].data_ptr(), path
    assert moved["up_blocks", "resnets"] and moved["up_blocks", "attentions"]


# ------------------------------------------------------------------------------------------------------------
# Features


def all_paths(network: UNet) -> list[str]:
    return [path for kind in FEATURE_TYPES for stage in stages(network.config)
            for path in feature_paths(network, kind, stage)]


def hook_by_definition(network: UNet) -> dict:
    """Collects the features of a run as the paper defines them, at other modules than `Features` does."""
    collected = {}

    def collect(path: str, module: torch.nn.Module, of_input: bool = False):
        module.register_forward_hook(
            lambda module, args, output: collected.update({path: args[0] if of_input else output}))

    for path, module in network.named_modules():
        if path.endswith(("attn1", "attn2", ".ff")):
            collect(path, module.net[2] if path.endswith("ff") else module.to_out[0])
        elif isinstance(module, model.ResBlock):
            collect(path, module)
    for i in range(2):
        collect(f"down_blocks.{i}", network.down_blocks[i].downsamplers[0])
        collect(f"up_blocks.{i}", network.up_blocks[i].upsamplers[0])
    collect("up_blocks.2", network.conv_norm_out, of_input=True)
    collect("down_blocks.2", network.down_blocks[2].attentions[-1])
    if network.config.mid_depth:
        collect("mid_block", network.mid_block.resnets[1])
    return collected


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_features_are_those_of_the_paper(name):
    network = filled(UNETS[name])
    assert [*stages(network.config)] == [stage for stage in oracle.STAGES if name != "700m" or stage != "Mid"]
    expected = hook_by_definition(network)
    with Features(network, all_paths(network)) as captured:
        network(**inputs(UNETS[name], "odd"))
    assert captured.keys() == expected.keys()
    for path, feature in captured.items():
        assert torch.equal(feature, expected[path]), path


def gradients(network: torch.nn.Module, features: Features, given: dict) -> tuple:
    """A loss of the U-Net's features and output, and its gradients."""
    with features as captured:
        output = network(**given)
    before = dict(captured)
    (output.square().mean() + sum(feature.square().mean() for feature in captured.values())).backward()
    assert features.captured is None and captured.keys() == before.keys() == set(features.paths)
    assert all(captured[path] is before[path] for path in before)  # the backward pass captures nothing
    grads = [parameter.grad for parameter in network.parameters()]
    network.zero_grad()
    return output.detach(), *grads


def test_checkpointing_changes_no_bit():
    network, given, convolved = filled(UNETS["1b"]), inputs(UNETS["1b"], "odd"), []
    features = Features(network, all_paths(network))
    network.up_blocks[0].resnets[0].conv1.register_forward_hook(lambda *args: convolved.append(True))
    plain = gradients(network, features, given)
    network.set_checkpointing(True)
    recomputed = gradients(network, features, given)
    assert all(map(torch.equal, plain, recomputed)) and len(convolved) == 3
    assert all(gradient.any() for gradient in plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_kind_of_feature_has_a_gradient(checkpointing):
    student = UNet(student_config(TINY, "1b"))
    student.set_checkpointing(checkpointing)
    features = Features(student, all_paths(student))
    for kind in FEATURE_TYPES:
        path = feature_paths(student, kind, "UP-1")[-1]
        student.zero_grad()
        with features as captured:
            student(**inputs(UNETS["sdxl"], "odd"))
        captured[path].square().mean().backward()                # a loss of this feature alone
        own = student.get_submodule(path).parameters()
        assert all(parameter.grad.any() for parameter in own) and student.conv_in.weight.grad.any()
        assert student.conv_out.weight.grad is None


def test_what_is_captured_and_what_is_an_error():
    network, given = UNet(TINY), inputs(UNETS["sdxl"], "odd")
    features = Features(network, ["down_blocks.1"])
    network(**given)
    with features as first:
        network(**given)
    before = first["down_blocks.1"]
    network(**given)  # captures nothing
    assert first["down_blocks.1"] is before and features.captured is None
    with pytest.raises(RuntimeError, match="down_blocks.0"):
        with Features(network, ["down_blocks.0", "mid_block", "conv_in"]):
            network.conv_in(draw("latent", 1, 4, 8, 8))
    with pytest.raises(ZeroDivisionError):  # the first error is the one to report
        with Features(network, ["mid_block"]):
            1 / 0


# ------------------------------------------------------------------------------------------------------------
# Weights in and out


@pytest.fixture
def folder(tmp_path):
    """A folder with a very small U-Net."""
    save_unet(fill(UNet(TINY)), tmp_path / "net")
    return tmp_path / "net"


@pytest.fixture
def weights(folder):
    return load_file(folder / FILE)


@pytest.mark.parametrize("name", ["700m", "sd1"])
def test_diffusers_and_we_read_each_other(name, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    ours = filled(UNETS[name])
    save_unet(ours, tmp_path / "ours")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours")
    assert same(ours, theirs.state_dict())
    theirs.save_pretrained(tmp_path / "theirs" / "unet", max_shard_size="500KB", variant="fp16")
    again = load_unet(tmp_path / "theirs")
    assert same(again, theirs.state_dict()) and again.config == ours.config


@pytest.mark.parametrize("half", [False, True])
def test_shards(folder, weights, half):
    dtype = torch.float16 if half else torch.float32
    other = {name: (tensor + 1).to(dtype) for name, tensor in weights.items()}
    shards = save_shards(other, folder, half)
    assert same(load_unet(folder, dtype), other)  # and not the single file beside them, as in diffusers
    (folder / FILE).unlink()
    assert same(load_unet(folder), other)
    shards[1].unlink()
    assert shards[1].name in refusal(load_unet, folder)


def test_which_variant_is_read_and_in_which_dtype(folder, weights):
    half = {name: (tensor + 1).half() for name, tensor in weights.items()}  # tells the two files apart
    save_file(half, folder / HALF_FILE)

    for dtype in (torch.float16, torch.bfloat16, torch.float32, None):
        stored = half if dtype in model.HALF else weights
        assert torch.equal(load_unet(folder, dtype).conv_in.bias, stored["conv_in.bias"].to(dtype)), dtype
    (folder / FILE).unlink()
    assert same(load_unet(folder), half)  # the only one there is


def test_files_are_written_whole_and_by_the_umask(folder, weights, monkeypatch):
    network = load_unet(folder)
    with torch.no_grad():
        network.conv_in.bias += 1
    assert same(load_unet(folder), weights)  # though the file may be mapped into memory
    old = os.umask(0o027)
    save_unet(network, folder)
    os.umask(old)
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o640, 0o640]
    for where, name in ((os, "replace"), (model, "save_file")):
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(where, name, lambda *args: os.stat("/nowhere"))
            save_unet(fill(UNet(TINY)), folder)
        assert same(load_unet(folder), network.state_dict()) and len(os.listdir(folder)) == 2


@pytest.mark.parametrize("name, content, words", [
    ("config.json", None, ["config.json"]), (FILE, None, [FILE]), ("config.json", b"{", ["config.json"]),
    ("config.json", json.dumps(VAES["vae"]).encode(), ["cross_attention_dim"]),
    (FILE, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", [FILE, "git-lfs"]),
    (FILE, b"<!DOCTYPE html>", [FILE, "damaged"]), (FILE, b"", [FILE, "damaged"]),
    *[(FILE, -length, [FILE, "damaged"]) for length in (1, 9, 500, 70_000)]])
def test_a_file_that_is_missing_cut_or_something_else(folder, name, content, words):
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(whole[:content] if isinstance(content, int) else content)
    message = refusal(load_unet, folder)
    assert all(word in message for word in [str(folder), *words])


@pytest.mark.parametrize("name", [f"{STEM}.bin", FILE])
def test_a_pickle_is_not_opened(folder, name):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(folder / "trap"),)

    (folder / FILE).unlink()
    torch.save(Trap(), folder / name)
    assert "pickle" in refusal(load_unet, folder) and not (folder / "trap").exists()


@pytest.mark.parametrize("change, words", [
    (lambda weights: weights.pop("conv_in.bias"), ["conv_in.bias"]),
    (lambda weights: weights.update({"stranger": torch.zeros(0)}), ["stranger"]),
    (lambda weights: weights.update({"conv_in.bias": torch.zeros(9)}), ["conv_in.bias"]),
    (lambda weights: weights.update({f"module._orig_mod.{name}": weights.pop(name) for name in [*weights]}),
     ["missing", " conv_in.weight", "unexpected", "module._orig_mod."]),
    (lambda weights: weights.update({"input_blocks.0.0.bias": torch.zeros(8)}), ["single-file"]),
    (lambda weights: weights["conv_out.weight"].view(-1)[5].fill_(torch.nan), ["conv_out.weight"]),
    (lambda weights: weights.update({"conv_in.bias": weights["conv_in.bias"].long()}), ["conv_in.bias"])])
def test_tensors_that_do_not_fit(folder, weights, change, words):
    change(weights)
    save_file(weights, folder / FILE)
    message = refusal(load_unet, folder)
    assert all(word in message for word in [str(folder), *words]) and len(message) < 500 + len(str(folder))


def test_model_py_stands_alone(tmp_path):
    save_unet(fill(UNet(TINY)), tmp_path / "teacher")
    shutil.copy(model.__file__, tmp_path)
    code = """import sys; sys.path.insert(0, "."); from model import *
save_unet(load_unet("teacher"), "student"); print({"support", "transformers", "PIL"} & {*sys.modules})"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
    assert same(load_unet(tmp_path / "student"), fill(UNet(TINY)).state_dict())
