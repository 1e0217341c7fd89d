"""The U-Net equals diffusers', the surgery follows the paper, features are the outputs they claim to be."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import model
from common import (
    ANSWERS, FILE, HALF_FILE, SIZES, UNETS, digest, draw, fill, inputs, refusal, relative_error, same,
    save_shards)
from model import (
    CONFIGS, FEATURE_TYPES, Features, UNet, UNetConfig, feature_paths, inherit, load_unet, save_unet, stages,
    student_config)

PARAMETERS = {"sdxl": 2_567_463_684, "1b": 1_161_184_324, "700m": 782_822_724}  # Table 2
SDXL_FILE = {  # unet/config.json of stabilityai/stable-diffusion-xl-base-1.0
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.19.0.dev0", "act_fn": "silu",
    "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "center_input_sample": False,
    "class_embed_type": None, "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "cross_attention_dim": 2048, "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1, "dual_cross_attention": False, "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-05,
    "norm_num_groups": 32, "num_attention_heads": None, "num_class_embeds": None,
    "only_cross_attention": False, "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816, "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False, "resnet_time_scale_shift": "default", "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None, "time_embedding_dim": None, "time_embedding_type": "positional",
    "timestep_post_act": None, "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "upcast_attention": None,
    "use_linear_projection": True}
KOALA = {"1b": {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6]},
         "700m": {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5], "mid_block_type": None}}
TINY = UNetConfig((32, 64), (0, 1), 1, 2, (2, 4), context_dim=40, pooled_dim=24, size_dim=8, groups=8)


def unet(name: str) -> UNet:
    return fill(UNet(UNetConfig.from_diffusers(UNETS[name])))


@pytest.fixture(scope="module")
def answers():
    with safe_open(ANSWERS, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


# ------------------------------------------------------------------------------------------------------------
# Exactness


@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_unet_gives_the_stored_answers(name, answers):
    ours = unet(name)
    for size in SIZES:
        assert relative_error(ours(**inputs(UNETS[name], size)), answers[f"{name} {size}"]) <= 1e-5, size


@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_unet_equals_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    from oracle import predict
    ours, theirs = unet(name), fill(diffusers.UNet2DConditionModel.from_config(UNETS[name]))
    assert digest(ours) == digest(theirs)
    for size in SIZES:
        given = inputs(UNETS[name], size)
        assert relative_error(ours(**given), predict(theirs, **given)) <= 1e-5, size


@torch.no_grad()
def test_timestep_may_be_one_number():
    ours, given = unet("700m"), inputs(UNETS["700m"], "batch")
    expected = ours(**given | {"timestep": torch.tensor([381] * 3)})
    for timestep in (381, 381.0, torch.tensor(381), torch.tensor([381]), torch.tensor([381] * 3).int()):
        assert torch.equal(ours(**given | {"timestep": timestep}), expected), timestep


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
    for name, changed in KOALA.items():
        assert UNetConfig.from_diffusers(SDXL_FILE | changed) == CONFIGS[name]
    written = UNetConfig().to_diffusers()
    for key in SDXL_FILE.keys() & written.keys():
        assert written[key] == SDXL_FILE[key], key


@pytest.mark.parametrize("config", [*CONFIGS.values(), *map(UNetConfig.from_diffusers, UNETS.values()), TINY])
def test_config_survives_its_file(config):
    assert UNetConfig.from_diffusers(json.loads(json.dumps(config.to_diffusers()))) == config


def test_what_is_not_read_is_not_refused():
    refiner = SDXL_FILE | {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
                           "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                           "transformer_layers_per_block": 4}
    assert UNetConfig.from_diffusers(refiner) == replace(UNetConfig(), depths=(0, 4, 0), mid_depth=4)
    unused = {"transformer_layers_per_block": (0, 2, 10), "upcast_attention": True}
    assert UNetConfig.from_diffusers(SDXL_FILE | unused) == UNetConfig()


def test_what_an_absent_entry_means():
    absent = {key: value for key, value in SDXL_FILE.items() if key != "mid_block_type"}
    assert UNetConfig.from_diffusers(absent).mid_depth == 10
    assert UNetConfig.from_diffusers(absent | {"mid_block_type": None}).mid_depth == 0
    sd1 = UNetConfig.from_diffusers(UNETS["sd1"])  # says little more than its widths
    assert (sd1.depths, sd1.mid_depth, sd1.heads) == ((1, 1, 1, 0), 1, (8, 8, 8, 8))
    assert (sd1.linear_projection, sd1.pooled_dim) == (False, 0)


@pytest.mark.parametrize("changed", [
    {"act_fn": "gelu"}, {"time_cond_proj_dim": 256}, {"class_embed_type": "timestep"}, {"norm_eps": 1e-6},
    {"mid_block_type": "UNetMidBlock2D"}, {"only_cross_attention": True},
    {"resnet_time_scale_shift": "scale_shift"}, {"encoder_hid_dim_type": "text_proj"},
    {"down_block_types": ["AttnDownBlock2D"] * 3}, {"num_attention_heads": 8}, {"flip_sin_to_cos": False},
    {"addition_embed_type": "text"}, {"something_new": 1},
    {"reverse_transformer_layers_per_block": [10, 2, 1]},
], ids=lambda changed: next(iter(changed)))
def test_unsupported_values_are_named(changed):
    assert next(iter(changed)) in refusal(UNetConfig.from_diffusers, SDXL_FILE | changed)


@pytest.mark.parametrize("key, value", [
    ("layers_per_block", [2, 2, 2]), ("transformer_layers_per_block", [1, [2, 2], [4, 4]]),
    ("cross_attention_dim", [768, 2048, 2048])])
def test_lists_that_are_not_supported_are_shown(key, value):
    assert str(value[1:])[1:-1] in refusal(UNetConfig.from_diffusers, SDXL_FILE | {key: value})


# ------------------------------------------------------------------------------------------------------------
# From teacher to student


def test_surgery_makes_the_presets():
    for name in ("1b", "700m"):
        assert student_config(CONFIGS["sdxl"], name) == CONFIGS[name]


def test_surgery_of_other_teachers():
    toy = UNetConfig((32, 48, 64), (0, 2, 10), 10, 2, (1, 2, 4), context_dim=64, pooled_dim=32, groups=8)
    assert student_config(toy, "1b") == replace(toy, pairs=1, depths=(0, 2, 6), mid_depth=6)
    assert student_config(toy, "700m") == replace(toy, pairs=1, depths=(0, 2, 5), mid_depth=0)
    shallow = replace(toy, depths=(0, 2, 3), mid_depth=3)  # nothing to cut, and nothing is added
    assert student_config(shallow, "1b") == replace(shallow, pairs=1)
    assert student_config(shallow, "700m") == replace(shallow, pairs=1, mid_depth=0)


SD1 = UNetConfig((320, 640, 1280, 1280), (1, 1, 1, 0), 1, 2, (8,) * 4, context_dim=768, pooled_dim=0, size_dim=0,
                 linear_projection=False, sample_size=64)


@pytest.mark.parametrize("name, parameters", [
    (None, 859_520_964), ("base", 579_384_964), ("small", 482_346_884), ("tiny", 323_384_964)])
def test_bk_sdm_has_the_published_sizes(name, parameters):
    with torch.device("meta"):
        network = UNet(student_config(SD1, name) if name else SD1)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert UNetConfig.from_diffusers(network.config.to_diffusers()) == network.config


def test_of_the_tiny_student_the_decoder_starts_at_the_teachers_second_stage():
    config = UNETS["sd1"] | {"block_out_channels": [32, 64, 96, 96]}
    teacher = fill(UNet(UNetConfig.from_diffusers(config)))
    student = UNet(student_config(teacher.config, "tiny"))
    assert student.config == UNetConfig.from_diffusers(UNETS["bk-sdm-tiny"])
    inherit(student, teacher)
    ours, theirs = student.state_dict(), teacher.state_dict()
    for path, source in (("down_blocks.2.resnets.0.conv1", "down_blocks.2.resnets.0.conv1"),
                         ("up_blocks.0.resnets.0.conv1", "up_blocks.1.resnets.0.conv1"),
                         ("up_blocks.0.resnets.1.conv1", "up_blocks.1.resnets.2.conv1"),
                         ("up_blocks.2.attentions.1.proj_in", "up_blocks.3.attentions.2.proj_in"),
                         ("up_blocks.1.upsamplers.0.conv", "up_blocks.2.upsamplers.0.conv")):
        assert torch.equal(ours[f"{path}.weight"], theirs[f"{source}.weight"]), path
    assert "equally wide" in refusal(student_config, unet("sd1").config, "tiny")


@pytest.mark.parametrize("teacher", [
    CONFIGS["1b"], replace(CONFIGS["sdxl"], mid_depth=0), replace(CONFIGS["sdxl"], pairs=3)])
def test_surgery_needs_a_teacher_of_this_shape(teacher):
    with pytest.raises(ValueError, match="Mid"):
        student_config(teacher, "700m")


@pytest.mark.parametrize("name", ["1b", "700m"])
def test_every_tensor_is_the_teachers_at_the_same_place(name):
    teacher = unet("sdxl")
    student = UNet(student_config(teacher.config, name))
    inherit(student, teacher)
    moved = {"up_blocks.0.resnets.1.": "up_blocks.0.resnets.2.",
             "up_blocks.0.attentions.1.": "up_blocks.0.attentions.2.",
             "up_blocks.1.resnets.1.": "up_blocks.1.resnets.2.",
             "up_blocks.1.attentions.1.": "up_blocks.1.attentions.2.",
             "up_blocks.2.resnets.1.": "up_blocks.2.resnets.2."}
    weights, used = teacher.state_dict(), Counter()
    for path, tensor in student.state_dict().items():
        start = next((start for start in moved if path.startswith(start)), "")
        used[start] += 1
        expected = weights[path.replace(start, moved[start]) if start else path]
        assert torch.equal(tensor, expected) and tensor.data_ptr() != expected.data_ptr(), path
    assert all(used[start] for start in moved)


# ------------------------------------------------------------------------------------------------------------
# Features

COUNTS = {  # of the transformer blocks, and so of SA, CA and FFN; and of Res
    "sdxl": ({"DW-2": 4, "DW-3": 20, "Mid": 10, "UP-1": 30, "UP-2": 6},
             {"DW-1": 2, "DW-2": 2, "DW-3": 2, "Mid": 2, "UP-1": 3, "UP-2": 3, "UP-3": 3}),
    "1b": ({"DW-2": 2, "DW-3": 6, "Mid": 6, "UP-1": 12, "UP-2": 4},
           {"DW-1": 1, "DW-2": 1, "DW-3": 1, "Mid": 2, "UP-1": 2, "UP-2": 2, "UP-3": 2}),
    "700m": ({"DW-2": 2, "DW-3": 5, "UP-1": 10, "UP-2": 4},
             {"DW-1": 1, "DW-2": 1, "DW-3": 1, "UP-1": 2, "UP-2": 2, "UP-3": 2}),
}


def all_paths(network: UNet) -> list[str]:
    return [path for kind in FEATURE_TYPES for stage in stages(network.config)
            for path in feature_paths(network, kind, stage)]


@pytest.mark.parametrize("name", CONFIGS)
def test_features_of_every_stage(name):
    with torch.device("meta"):
        network = UNet(CONFIGS[name])
    blocks, residual = COUNTS[name]
    order = [stage for stage in ("DW-1", "DW-2", "DW-3", "Mid", "UP-1", "UP-2", "UP-3") if stage in residual]
    assert list(stages(network.config)) == order
    for kind in FEATURE_TYPES:
        expected = {"Res": residual, "LF": dict.fromkeys(order, 1)}.get(kind, blocks)
        assert {s: n for s in order if (n := len(feature_paths(network, kind, s)))} == expected, kind


def hook_by_definition(network: UNet) -> dict:
    """Collects the features of a run as the paper defines them, at other modules than `Features` does."""
    collected = {}

    def take_output(path: str, module: torch.nn.Module):
        module.register_forward_hook(lambda module, args, output: collected.update({path: output}))

    def take_input(path: str, module: torch.nn.Module):
        module.register_forward_pre_hook(lambda module, args: collected.update({path: args[0]}))

    for path, module in network.named_modules():
        if path.endswith(("attn1", "attn2")):
            take_output(path, module.to_out[0])
        elif path.endswith(".ff"):
            take_output(path, module.net[2])
        elif re.search(r"resnets\.\d+$", path):
            take_output(path, module)
    for blocks in ("down_blocks", "up_blocks"):
        for i, stage in enumerate(getattr(network, blocks)[:-1]):
            samplers = stage.downsamplers if blocks == "down_blocks" else stage.upsamplers
            take_output(f"{blocks}.{i}", samplers[0])
    bottom = f"down_blocks.{len(network.down_blocks) - 1}"
    if network.config.mid_depth:
        take_input(bottom, network.mid_block)
        take_output("mid_block", network.mid_block.resnets[1])
    else:
        take_output(bottom, network.down_blocks[-1].attentions[-1])
    take_input(f"up_blocks.{len(network.up_blocks) - 1}", network.conv_norm_out)
    return collected


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_features_are_those_of_the_paper(name):
    network = unet(name)
    expected = hook_by_definition(network)
    features = Features(network, all_paths(network))
    with features as captured:
        network(**inputs(UNETS[name], "odd"))
    assert captured.keys() == expected.keys()
    for path, feature in captured.items():
        assert torch.equal(feature, expected[path]), path


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that are computed."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.aten.convolution.default
        return op(*args, **(kwargs or {}))


def gradients(network: torch.nn.Module, features: Features, given: dict) -> tuple:
    """A loss of the U-Net's features and output, and its gradients."""
    with features as captured:
        output = network(**given)
    before = dict(captured)
    loss = output.square().mean() + sum(feature.square().mean() for feature in captured.values())
    loss.backward()
    assert features.captured is None
    assert captured.keys() == before.keys() == set(features.paths)
    assert all(captured[path] is before[path] for path in before)  # the backward pass captures nothing
    grads = [parameter.grad for parameter in network.parameters()]
    network.zero_grad()
    return loss.detach(), *grads


def equal(ones: tuple, others: tuple) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def test_checkpointing_changes_no_bit():
    network, given = unet("1b"), inputs(UNETS["1b"], "odd")
    features = Features(network, all_paths(network))
    results, computed = {}, {}
    for mode in ("none", "selective", "full"):
        network.set_checkpointing(mode)
        with Convolutions() as convolutions:
            results[mode] = gradients(network, features, given)
        computed[mode] = convolutions.count
    assert equal(results["none"], results["selective"]) and equal(results["none"], results["full"])
    assert all(gradient.any() for gradient in results["none"][1:])
    assert computed["none"] == computed["selective"] < computed["full"]


@pytest.mark.parametrize("name", ["1b", "700m"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_every_feature_of_a_student_has_a_gradient(mode, name):
    student = UNet(student_config(TINY, name))
    inherit(student, UNet(TINY))
    student.set_checkpointing(mode)
    features = Features(student, all_paths(student))
    for kind in FEATURE_TYPES:
        path = feature_paths(student, kind, "UP-1")[-1]
        student.zero_grad()
        with features as captured:
            student(**inputs(UNETS["sdxl"], "odd"))
        assert captured.keys() == set(features.paths)
        assert all(feature.requires_grad for feature in captured.values())
        captured[path].square().mean().backward()                # a loss of this feature alone
        own = student.get_submodule(path).parameters()
        assert all(parameter.grad.any() for parameter in own) and student.conv_in.weight.grad.any()
        assert student.conv_out.weight.grad is None


def test_nothing_is_captured_outside_of_with():
    network = UNet(TINY)
    given = inputs(UNETS["sdxl"], "odd")
    features = Features(network, ["down_blocks.1"])
    network(**given)
    assert features.captured is None
    with features as first:
        network(**given)
    before = first["down_blocks.1"]
    with features as second:
        network(**given)
    assert first["down_blocks.1"] is before is not second["down_blocks.1"] and features.captured is None


def test_a_forward_pass_can_stop_at_its_last_feature():
    network, given = UNet(TINY), inputs(UNETS["sdxl"], "odd")
    for paths, stops in ((["down_blocks.0", "down_blocks.1"], True), (["down_blocks.1", "conv_out"], False)):
        finished = []
        handle = network.conv_out.register_forward_hook(lambda *args: finished.append(True), prepend=True)
        with Features(network, paths, stop=True) as captured:
            network(**given)
        handle.remove()
        assert [*captured] == paths and bool(finished) != stops


def test_a_feature_that_was_not_captured_is_an_error():
    network = UNet(TINY)
    with pytest.raises(RuntimeError, match="down_blocks.0"):
        with Features(network, ["down_blocks.0", "mid_block", "conv_in"]):
            network.conv_in(draw("latent", 1, 4, 8, 8))
    with pytest.raises(ZeroDivisionError):  # the first error is the one to report
        with Features(network, ["mid_block"]):
            1 / 0
    with pytest.raises(AttributeError, match="mid_bloc"):
        Features(network, ["mid_bloc"])


def test_features_of_a_distributed_unet(tmp_path):
    network, given = fill(UNet(TINY)), inputs(UNETS["sdxl"], "batch")
    features = Features(network, all_paths(network))
    network.set_checkpointing("full")
    expected = gradients(network, features, given)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(network)
        assert equal(gradients(wrapped, features, given), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_unet_is_one_graph():
    network, given = fill(UNet(TINY)), inputs(UNETS["sdxl"], "odd")
    network.set_checkpointing("full")
    features = Features(network, all_paths(network))
    expected = gradients(network, features, given)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert equal(gradients(compiled, features, given), expected)


# ------------------------------------------------------------------------------------------------------------
# model.py in an empty folder

ALONE = """
import importlib.util, sys, torch
sys.path.insert(0, ".")
from model import Features, UNet, feature_paths, inherit, load_unet, save_unet, student_config

teacher = load_unet("teacher")
student = UNet(student_config(teacher.config, "700m"))
inherit(student, teacher)
given = torch.load("inputs.pt")
path = feature_paths(student, "SA", "UP-2")[-1]
with Features(student, [path]) as captured:
    output = student(**given)
torch.save([captured[path], output], "outputs.pt")
save_unet(student, "student")
save_unet(load_unet("shards"), "from shards")
save_unet(load_unet("half", torch.float16), "from half")
print(*{"support", "sample", "transformers", "huggingface_hub", "diffusers", "PIL"} & set(sys.modules),
      *[name for name in ("support", "sample", "toy") if importlib.util.find_spec(name)])
"""


@torch.no_grad()
def test_model_py_stands_alone(tmp_path):
    teacher = unet("sdxl")
    halves = {name: tensor.half() for name, tensor in teacher.state_dict().items()}
    for name in ("teacher", "shards", "half"):
        save_unet(teacher, tmp_path / name)
    (tmp_path / "shards" / FILE).unlink()
    save_shards(teacher.state_dict(), tmp_path / "shards")
    (tmp_path / "half" / FILE).unlink()
    save_file(halves, tmp_path / "half" / HALF_FILE)
    given = inputs(UNETS["sdxl"], "odd")
    torch.save(given, tmp_path / "inputs.pt")
    shutil.copy(model.__file__, tmp_path)

    done = subprocess.run([sys.executable, "-I", "-c", ALONE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "\n", done.stderr + done.stdout
    student = UNet(student_config(teacher.config, "700m"))
    inherit(student, teacher)
    assert same(load_unet(tmp_path / "student"), student.state_dict())
    assert same(load_unet(tmp_path / "from shards"), teacher.state_dict())
    assert same(load_unet(tmp_path / "from half"), halves)
    path = feature_paths(student, "SA", "UP-2")[-1]
    with Features(student, [path]) as captured:
        output = student(**given)
    feature, prediction = torch.load(tmp_path / "outputs.pt")
    assert torch.equal(feature, captured[path]) and torch.equal(prediction, output)
