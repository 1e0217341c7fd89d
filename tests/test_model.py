"""The U-Net is that of diffusers, the surgery follows the paper, features are what they claim to be."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from common import (
    ANSWERS, FILE, HALF_FILE, PARAMETERS, SIZES, UNETS, WEIGHTS, digest, draw, fill, filled, inputs, refusal,
    relative_error, same)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model
import oracle
from model import (
    CONFIGS, FEATURE_TYPES, Features, UNet, UNetConfig, feature_paths, inherit, load_unet, save_unet, stages,
    student_config)

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


# Exactness


@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_unet_gives_the_stored_answers(name):
    answers, ours = load_file(ANSWERS), filled(UNETS[name])
    for size in SIZES:
        assert relative_error(ours(**inputs(UNETS[name], size)), answers[f"{name} {size}"]) <= 1e-5, size


def test_tensors_are_the_official_ones():
    for name, parameters in PARAMETERS.items():
        with torch.device("meta"), safe_open(ANSWERS, framework="pt") as file:
            network = UNet(CONFIGS[name])
            assert sum(p.numel() for p in network.parameters()) == parameters
            assert digest(network) == file.metadata()[name]
    for name, parameters in (None, 859_520_964), ("base", 579_384_964), ("small", 482_346_884):
        with torch.device("meta"):
            network = UNet(student_config(SD1, name) if name else SD1)
        assert sum(p.numel() for p in network.parameters()) == parameters, name


# Configurations


def test_official_files_are_the_presets():
    assert UNetConfig.from_diffusers(SDXL_FILE) == UNetConfig() == CONFIGS["sdxl"]
    for name, changed in oracle.SURGERIES.items():
        assert UNetConfig.from_diffusers(SDXL_FILE | changed) == CONFIGS[name]
    written = UNetConfig().to_diffusers()
    for key in SDXL_FILE.keys() & written.keys():
        assert written[key] == SDXL_FILE[key], key
    for config in (*CONFIGS.values(), *map(UNetConfig.from_diffusers, UNETS.values()), TINY):
        assert UNetConfig.from_diffusers(json.loads(json.dumps(config.to_diffusers()))) == config


def test_what_absent_old_and_unused_entries_mean():
    assert not UNetConfig.from_diffusers(UNETS["sd1"]).linear_projection
    old = UNETS["sd1"] | {"_diffusers_version": "0.6.0", "sample_size": 32}
    assert UNetConfig.from_diffusers(old).sample_size == 64
    unused = {"transformer_layers_per_block": (0, 2, 10), "upcast_attention": True}  # and not refused
    assert UNetConfig.from_diffusers(SDXL_FILE | unused) == UNetConfig()


@pytest.mark.parametrize("changed", [
    {"act_fn": "gelu"}, {"norm_eps": 1e-6}, {"mid_block_type": "UNetMidBlock2D"}, {"something_new": 1},
    {"down_block_types": ["AttnDownBlock2D"] * 3}], ids=lambda changed: next(iter(changed)))
def test_unsupported_values_are_named(changed):
    assert next(iter(changed)) in refusal(UNetConfig.from_diffusers, SDXL_FILE | changed)


# From teacher to student


def test_surgery_of_teachers():
    shallow = UNetConfig((32, 48, 64), (0, 2, 3), mid_depth=3, heads=(1, 2, 4), context_dim=64, groups=8)
    assert student_config(shallow, "1b") == replace(shallow, pairs=1)  # nothing to cut, and nothing is added
    for teacher in (CONFIGS["1b"], replace(shallow, mid_depth=0), replace(shallow, pairs=3)):
        refusal(student_config, teacher, "700m")


@pytest.mark.parametrize("name", ["1b", "700m"])
def test_every_tensor_is_the_teachers_at_the_same_place(name):
    """Pair 1 of a decoder stage is the teacher's pair 2."""
    teacher = filled(UNETS["sdxl"])
    student, weights = UNet(student_config(teacher.config, name)), teacher.state_dict()
    inherit(student, teacher)
    for path, tensor in student.state_dict().items():
        source = re.sub(r"(up_blocks\.\d\.(resnets|attentions))\.1\.", r"\1.2.", path)
        assert torch.equal(tensor, weights[source]) and tensor.data_ptr() != weights[source].data_ptr(), path
    assert [*stages(student.config)] == [stage for stage in oracle.STAGES if name != "700m" or stage != "Mid"]


# Features


def test_checkpointing_changes_no_bit():
    """And the backward pass captures nothing."""
    network, given, convolved, runs = filled(UNETS["1b"]), inputs(UNETS["1b"], "odd"), [], []
    paths = [feature_paths(network, kind, stage) for kind in FEATURE_TYPES for stage in oracle.STAGES]
    features = Features(network, sum(paths, []))
    network.up_blocks[0].resnets[0].conv1.register_forward_hook(lambda *args: convolved.append(True))
    for checkpointing in (False, True):
        network.set_checkpointing(checkpointing)
        network.zero_grad()
        with features as captured:
            output = network(**given)
        before = dict(captured)
        sum(feature.square().mean() for feature in (output, *captured.values())).backward()
        assert captured.keys() == before.keys() and all(captured[path] is before[path] for path in before)
        runs.append([output, *(parameter.grad for parameter in network.parameters())])
    assert all(map(torch.equal, *runs)) and len(convolved) == 3
    assert all(tensor.any() for tensor in runs[0])


def test_a_feature_that_is_not_captured_is_an_error():
    network = UNet(TINY)
    with pytest.raises(RuntimeError, match="down_blocks.0"):
        with Features(network, ["down_blocks.0", "conv_in"]):
            network.conv_in(draw("latent", 1, 4, 8, 8))


# Weights in and out


@pytest.fixture
def folder(tmp_path):
    save_unet(fill(UNet(TINY)), tmp_path / "net")
    return tmp_path / "net"


@pytest.fixture
def weights(folder):
    return load_file(folder / FILE)


def test_which_file_is_read_and_in_which_dtype(folder, weights):
    half = {name: (tensor + 1).half() for name, tensor in weights.items()}  # tells the two files apart
    save_file(half, folder / HALF_FILE)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, None):
        stored = half if dtype in model.HALF else weights
        assert torch.equal(load_unet(folder, dtype).conv_in.bias, stored["conv_in.bias"].to(dtype)), dtype
    (folder / FILE).unlink()
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config, encoding="utf-8-sig")  # as some editors write it
    assert same(load_unet(folder), half)  # the only one there is


@pytest.mark.parametrize("variant, dtype", [("", torch.float32), (".fp16", torch.float16)])
def test_shards_come_before_a_single_file(folder, weights, variant, dtype):
    """As in diffusers, which names them so."""
    other = {name: (tensor + 1).to(dtype) for name, tensor in weights.items()}
    shards = [f"{WEIGHTS}{variant}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {name: shards[i % 2] for i, name in enumerate(weights)}
    for file in shards:
        save_file({name: other[name] for name in index if index[name] == file}, folder / file)
    path = folder / f"{WEIGHTS}.safetensors.index{variant}.json"
    path.write_text(json.dumps({"weight_map": index}))
    (folder / FILE).rename(folder / f"{WEIGHTS}{variant}.safetensors")
    assert same(load_unet(folder, dtype), other)
    (folder / shards[1]).unlink()
    assert shards[1] in refusal(load_unet, folder, dtype)
    path.write_text("{}")
    assert path.name in refusal(load_unet, folder, dtype)


@pytest.mark.parametrize("name, content", [
    ("config.json", None), ("config.json", b"{"), ("config.json", b'{"act_fn": "silu"}'),
    (FILE, None), (FILE, b"<!DOCTYPE html>"), (FILE, -1), (FILE, 500)])
def test_a_file_that_is_missing_cut_or_something_else(folder, name, content):
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(whole[:content] if isinstance(content, int) else content)
    message = refusal(load_unet, folder)
    assert str(folder) in message and name in message


def test_a_pickle_is_not_opened(folder):
    (folder / FILE).rename(folder / f"{WEIGHTS}.bin")
    assert "pickle" in refusal(load_unet, folder)


@pytest.mark.parametrize("change, word", [
    (lambda weights: weights.pop("conv_in.bias"), "conv_in.bias"),
    (lambda weights: weights.update({"stranger": torch.zeros(0)}), "stranger"),
    (lambda weights: weights.update({"conv_in.bias": torch.zeros(9)}), "conv_in.bias"),
    (lambda weights: weights.update({"input_blocks.0.0.bias": torch.zeros(8)}), "single-file"),
    (lambda weights: weights["conv_out.weight"].view(-1)[5].fill_(torch.nan), "conv_out.weight"),
    (lambda weights: weights.update({"conv_in.bias": weights["conv_in.bias"].long()}), "conv_in.bias")])
def test_tensors_that_do_not_fit(folder, weights, change, word):
    change(weights)
    save_file(weights, folder / FILE)
    message = refusal(load_unet, folder)
    assert str(folder) in message and word in message


def test_model_py_stands_alone(folder):
    shutil.copy(model.__file__, folder)
    code = """import sys; sys.path.insert(0, "."); from model import *
save_unet(load_unet("."), "student"); print({"support", "transformers", "PIL"} & {*sys.modules})"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
    assert same(load_unet(folder / "student"), load_file(folder / FILE))
