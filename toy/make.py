"""
How toy/checkpoint was made: a whole SDXL in miniature, trained on captioned shapes with this project's own networks.

    python -m toy.make                 # tokenizers, VAE, then U-Net and text encoders together; resumes by itself

Everything has SDXL's form at a smaller size: two CLIP text encoders whose second-to-last hidden states are joined, the
second one's pooled output and six size numbers as further conditions, latents of an AutoencoderKL, noise prediction.
"""

import argparse
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from model import UNet, UNetConfig, VAE, VAEConfig
from sample import Schedule, euler
from toy import shapes

VAE_CONFIG = VAEConfig(channels=(16, 32), layers=1, groups=8, force_upcast=False, sample_size=shapes.SIZE)
UNET_CONFIG = UNetConfig(channels=(16, 32, 64), heads=(1, 2, 4), context_dim=32 + 64, pooled_dim=64, size_dim=32, groups=8,
                         sample_size=shapes.SIZE // VAE_CONFIG.downscale)
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 1,
    "interpolation_type": "linear", "use_karras_sigmas": False, "trained_betas": None,
}
LATENT_STD = 0.5  # Below SDXL's 1: shapes are so coarse that, at 1, the strongest noise would still show where they are.
TEXT_LENGTH = 16


# Tokenizers


def byte_pairs(words: tuple[str, ...]) -> tuple[dict[str, int], list[str]]:
    """A byte-pair vocabulary in which each of the words is one token, and the merges that lead there."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    vocabulary = ["!", *sorted({letter for word in spelled for letter in word})]
    merges = []
    while pairs := Counter(pair for word in spelled for pair in zip(word, word[1:])):
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(f"{left} {right}")
        vocabulary.append(left + right)
        for word in spelled:
            for i in range(len(word) - 2, -1, -1):
                if word[i:i + 2] == [left, right]:
                    word[i:i + 2] = [left + right]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]  # last: CLIP pools at the position of the largest id
    return {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}, merges


def write_tokenizers(folder: Path):
    """tokenizer/ and tokenizer_2/ as SDXL has them: the second pads with id 0."""
    vocabulary, merges = byte_pairs(shapes.WORDS)
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        path = folder / name
        path.mkdir(parents=True, exist_ok=True)
        special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad}
        (path / "vocab.json").write_text(json.dumps(vocabulary))
        (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        (path / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
        (path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_LENGTH, **special}, indent=2))


def text_config(width: int, vocabulary: dict[str, int]) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
        num_attention_heads=width // 16, projection_dim=width, max_position_embeddings=TEXT_LENGTH,
        bos_token_id=vocabulary["<|startoftext|>"], eos_token_id=vocabulary["<|endoftext|>"], pad_token_id=0)


# Training


class Toy(nn.Module):
    """The networks that are trained together."""

    def __init__(self, vocabulary: dict[str, int]):
        super().__init__()
        self.text_encoder = CLIPTextModel(text_config(32, vocabulary))
        self.text_encoder_2 = CLIPTextModelWithProjection(text_config(64, vocabulary))
        self.unet = UNet(UNET_CONFIG)
        for name, parameter in self.named_parameters():
            if name.endswith("token_embedding.weight"):
                nn.init.normal_(parameter, std=0.7)  # at CLIP's 0.02 the cross-attention learns next to nothing
            if name.endswith(("proj_out.weight", "proj_out.bias", "conv2.weight", "conv2.bias")) or "conv_out" in name:
                nn.init.zeros_(parameter)            # as SDXL's own code starts: every block adds nothing at first

    def encode(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids_2, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=2), second.text_embeds

    def forward(self, latents: Tensor, timesteps: Tensor, ids: Tensor, ids_2: Tensor, dropped: Tensor) -> Tensor:
        context, pooled = self.encode(ids, ids_2)
        context, pooled = context * ~dropped[:, None, None], pooled * ~dropped[:, None]
        time_ids = torch.tensor([[shapes.SIZE, shapes.SIZE, 0, 0, shapes.SIZE, shapes.SIZE]]).expand(len(latents), 6)
        return self.unet(latents, timesteps, context, pooled, time_ids)


def pictures(indices: range) -> tuple[Tensor, list[str]]:
    """Training pictures (B, 3, 64, 64) in [-1, 1] and their captions."""
    images, captions = zip(*(shapes.sample(0, index) for index in indices))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1, list(captions)


def train_vae(steps: int, batch: int) -> VAE:
    vae = VAE(VAE_CONFIG).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in (bar := tqdm(range(steps), "VAE")):
        images, _ = pictures(range(step * batch, (step + 1) * batch))
        mean, logvar = vae.encode(images)
        error = vae.decode(mean + (logvar / 2).exp() * torch.randn_like(mean)) - images
        divergence = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        loss = error.square().mean() + 0.5 * error.abs().mean() + 1e-3 * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        bar.set_postfix(mse=f"{error.square().mean():.4f}", std=f"{mean.std():.2f}")
    return vae


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--vae-steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.3, help="share of the steps, at the end, in which the rate falls to zero")
    parser.add_argument("--out", type=Path, default=Path("runs/toy"))
    args = parser.parse_args()

    import os
    import torch.distributed as dist
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    write_tokenizers(args.out)
    tokenizers = [CLIPTokenizer.from_pretrained(args.out / name) for name in ("tokenizer", "tokenizer_2")]

    vae = VAE(VAE_CONFIG)
    vae_file = args.out / "vae.safetensors"
    if not vae_file.exists():
        vae = train_vae(args.vae_steps, 16)
        images, _ = pictures(range(10_000_000, 10_000_512))
        with torch.no_grad():
            mean, _ = vae.encode(images)
        save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, vae_file, {"std": str(mean.std().item())})
    vae.load_state_dict(load_file(vae_file))
    with safe_open(vae_file, "pt") as file:
        scaling = LATENT_STD / float(file.metadata()["std"])
    vae.requires_grad_(False).to(memory_format=torch.channels_last)

    toy = Toy(json.loads((args.out / "tokenizer/vocab.json").read_text()))
    toy.unet.to(memory_format=torch.channels_last)
    ema = {name: p.detach().clone() for name, p in toy.named_parameters()}
    optimizer = torch.optim.AdamW(toy.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, state_file = 0, args.out / "state.safetensors"
    if state_file.exists():
        state = load_file(state_file)
        with safe_open(state_file, "pt") as file:
            start = int(file.metadata()["step"])
        for name, p in toy.named_parameters():
            p.data.copy_(state[name])
            ema[name].copy_(state["ema." + name])
            if "m." + name in state: optimizer.state[p] = {"step": torch.tensor(float(start)), "exp_avg": state["m." + name].clone(),
                                  "exp_avg_sq": state["v." + name].clone()}

    def save(step):
        state = {}
        for name, p in toy.named_parameters():
            state |= {name: p.detach().contiguous(), "ema." + name: ema[name].contiguous()}
            if "exp_avg" in optimizer.state[p]:
                state |= {"m." + name: optimizer.state[p]["exp_avg"].contiguous(),
                          "v." + name: optimizer.state[p]["exp_avg_sq"].contiguous()}
        save_file(state, args.out / "state.tmp", {"step": str(step)})
        (args.out / "state.tmp").replace(state_file)

    schedule = Schedule(SCHEDULER)
    bar = tqdm(range(start, args.steps), "U-Net", initial=start, total=args.steps, disable=rank > 0, mininterval=5)
    smooth = None
    for step in bar:
        if (args.out / "steps").exists():
            args.steps = int((args.out / "steps").read_text())
        if step >= args.steps:
            break
        torch.manual_seed(step * world + rank)
        share = args.batch // world
        first = step * args.batch + rank * share
        images, captions = pictures(range(first, first + share))
        mean, logvar = vae.encode(images.contiguous(memory_format=torch.channels_last))
        latents = (mean + (logvar / 2).exp() * torch.randn_like(mean)) * scaling
        ids = [t(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids for t in tokenizers]
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (share,))
        # Cosine-free: constant, then down to zero at the end.
        rate = args.lr * min(1, (step + 1) / 100, (args.steps - step) / (args.decay * args.steps))
        optimizer.param_groups[0]["lr"] = rate
        prediction = toy(schedule.add_noise(latents, noise, timesteps), timesteps, *ids, torch.rand(share) < 0.1)
        # What a caption decides is decided at high noise, where the plain loss is tiny: the weight of Karras et al., capped.
        weight = (1 + (schedule.all_sigmas[timesteps].float() / LATENT_STD) ** 2).clamp(max=50)
        loss = (weight * (prediction - noise).square().mean((1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        if world > 1:
            grads = [p.grad for p in toy.parameters() if p.grad is not None]
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            for g, part in zip(grads, flat.split([g.numel() for g in grads])):
                g.copy_(part.view_as(g) / world)
        norm = nn.utils.clip_grad_norm_(toy.parameters(), 1.0)
        optimizer.step()
        decay = min(0.996, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in toy.parameters()], 1 - decay)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", norm=f"{norm:.2f}", rate=f"{rate:.1e}")
        if rank == 0 and ((step + 1) % 50 == 0 or step + 1 == args.steps):
            save(step + 1)
        if rank == 0 and (step + 1) % 250 == 0:
            own = {name: p.detach().clone() for name, p in toy.named_parameters()}
            with torch.no_grad():
                for name, p in toy.named_parameters():
                    p.copy_(ema[name])
                count = 48
                wanted = [shapes.caption(1, i) for i in range(count)]
                ids = [t(wanted, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids for t in tokenizers]
                dropped = torch.tensor([True] * count + [False] * count)

                def denoise(x, t):
                    out = toy(torch.cat([x, x]), torch.full((2 * count,), t), torch.cat([ids[0]] * 2), torch.cat([ids[1]] * 2), dropped)
                    free, led = out.chunk(2)
                    return free + 4.0 * (led - free)

                z = torch.randn(count, 4, 32, 32, generator=torch.Generator().manual_seed(0))
                decoded = vae.decode(euler(denoise, z, schedule, 15) / scaling)
                pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
                from PIL import Image
                drawn = [Image.fromarray(x) for x in pixels]
                tqdm.write(f"step {step + 1}: loss {smooth:.4f} {shapes.scores(drawn, wanted)}")
                Image.fromarray(np.concatenate([np.concatenate(pixels[r:r + 12], 1) for r in range(0, 48, 12)], 0)).resize((768 * 2, 512)).save(args.out / "grid.png")
                for name, p in toy.named_parameters():
                    p.copy_(own[name])


if __name__ == "__main__":
    main()
