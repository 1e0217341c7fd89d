"""
The paper's figures and tables. Each command writes a PNG and, except `curves`, its numbers as CSV beside it.

    python analysis.py attention --model toy toy-1b-sa toy-1b-lf # Figures 4 and 9: what self-attention sees
    python analysis.py similarity                                # Figure 8: what each transformer block adds
    python analysis.py knockout                                  # beyond Table 3: what pictures depend on
    python analysis.py budget                                    # Figure 2, Tables 1 and 2: parameters, work
    python analysis.py latency --model sdxl 1b 700m              # Table 2, Figure 5: seconds and memory
    python analysis.py ablation --table 3a --seeds 3             # Table 3: which features to distill
    python analysis.py quality --model toy runs/toy-700m         # Table 4: what pictures score, and cost
    python analysis.py curves runs/toy-700m                      # the losses of runs

A model is a name such as toy, sdxl, 1b or 700m, a hub id, or a folder such as a finished run of distill.py.
`budget` and `latency` need no weights.
"""

import argparse
import math
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

import model
from sample import Pipeline, load_pipeline
from support.costs import budget, latency
from support.files import atomic_write, write_csv
from support.hub import (
    PRECISIONS, PRESETS, ArgumentParser, model_name, nonempty, number, path, png_path, run)
from support.plots import dot_chart, image_grid, line_chart, loss_curves, print_table
from support.table3 import ablation, picture_distance
from support.table4 import SCORERS, UNKNOWN, all_toys, mean_and_error, quality, read_prompts
from toy import shapes


def choose_prompts(args: argparse.Namespace, count: int) -> list[str]:
    """The prompts of `read_prompts`; for toys without a file, `count` captions that state a relation."""
    if args.prompts or not all_toys(args.model):
        return sum(read_prompts(args.prompts, args.limit).values(), [])
    count = args.limit or count
    return [caption for caption in shapes.judge_captions(10 * count) if shapes.parse(caption)[1]][:count]


# ------------------------------------------------------------------------------------------------------------
# Figures 4 and 9: self-attention maps

SA_STAGES = [*model.stages(model.CONFIGS["sdxl"])][1:-1]  # those with self-attention
PICTURE = 152  # pixels of a small picture


def attention_map(attention: model.Attention, x: Tensor) -> Tensor:
    """Self-attention's softmax(Q K^T / sqrt(d)) for its input x (B, T, D): (B, T, T), the mean over heads."""
    q = attention.split_heads(attention.to_q(x))                 # (B, heads, T, d)
    k = attention.split_heads(attention.to_k(x))                 # (B, heads, T, d)
    total = 0
    for i in range(attention.heads):                             # one by one: (B, T, T) is large enough
        scores = q[:, i].float() @ k[:, i].float().transpose(1, 2)  # in float16 they could overflow
        total += (scores / math.sqrt(q.shape[3])).softmax(dim=2)
    return total / attention.heads


def principal_components(rows: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    """
    The first `count` principal components of rows (N, M): scores (N, count), and the share of the variance
    that each explains, (count,). Signs are fixed so that each direction's largest entry is positive.
    """
    centered = rows.double() - rows.double().mean(dim=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a randomized SVD: for 4096 tokens the exact one takes ten times as long
        _, scales, vectors = torch.svd_lowrank(centered, q=min(24, *centered.shape), niter=20)
    vectors = vectors[:, :count]                                 # (M, count)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return centered @ (vectors * largest.sign()), scales[:count].square() / centered.square().sum()


def stage_maps(pipeline: Pipeline, prompts: list[str], seed: int, steps: int | None,
               at: float) -> Iterator[tuple[Image.Image, dict[str, Tensor]]]:
    """
    The image of each prompt, and the map (T, T) of each stage with self-attention: the mean over its
    blocks and heads, after fraction `at` of the steps, for the conditional prediction.

    The paper does not say which step, block and heads it shows. Tumanyan et al. (arXiv 2211.12572), whom it
    follows, look halfway through sampling; a mean works for stages of any depth.
    """
    unet, steps, maps = pipeline.unet, steps or pipeline.preset.steps, {}
    layers = {stage: model.feature_paths(unet, "SA", stage) for stage in model.stages(unet.config)}
    layers = {stage: paths for stage, paths in layers.items() if paths and stage in SA_STAGES}
    # The inputs of the self-attention layers: fused attention does not keep its maps.
    inputs = {path: path.removesuffix("attn1") + "norm1" for path in sum(layers.values(), [])}
    features = model.Features(unet, [*inputs.values()])

    def measure(step: int):
        if step == min(int(at * steps), steps - 1):
            for stage, paths in layers.items():
                total = 0
                for path in paths:
                    total += attention_map(unet.get_submodule(path), captured[inputs[path]][-1:])[0]
                maps[stage] = total.cpu() / len(paths)

    for i, prompt in enumerate(tqdm(prompts, "attention", unit="image")):
        with features as captured:
            image, = pipeline([prompt], seed=seed + i, steps=steps, callback=measure)
        yield image, maps.copy()


def find_object(image: Image.Image, prompt: str) -> shapes.Object | None:
    """The object that a toy caption names first; None if it is missing or for any other prompt."""
    try:
        color, _ = shapes.parse(prompt)[0][0]
        found = [item for item in shapes.read(image) if item.color == color]
    except ValueError:                                           # not the toy's
        return None
    return found[0]._replace(shape=found[0].shape or "square") if found else None  # a blob: about as large


def on_object(row: Tensor, target: shapes.Object | None) -> float:
    """A query's attention (T,) on an object, relative to uniform attention."""
    if target is None:
        return math.nan
    coverage = torch.from_numpy(shapes.coverage(target))         # (H, W), 0..1
    area = F.adaptive_avg_pool2d(coverage[None], math.isqrt(len(row))).flatten()  # (T,)
    return ((row * area).sum() / area.mean()).item()


def draw_tokens(colors: Tensor) -> Image.Image:
    """Colors (T, 3) in 0..1 of the tokens of a square image, as a picture."""
    side = math.isqrt(len(colors))
    pixels = (colors.float() * 255).round().byte().view(side, side, 3).numpy()
    return Image.fromarray(pixels).resize((PICTURE, PICTURE), Image.Resampling.NEAREST)


def attention(args: argparse.Namespace) -> Image.Image:
    """Measures all prompts' maps; draws (b) components and (c) one query's row of the first `--rows`."""
    prompts, rows, drawn = choose_prompts(args, 24), [], []
    for name in args.model:
        pipeline = load_pipeline(name, device=args.device)
        for i, (image, maps) in enumerate(stage_maps(pipeline, prompts, args.seed, args.steps, args.at)):
            target = find_object(image, prompts[i])              # the query is on it, or in the center
            x, y = (target.x / shapes.SIZE, target.y / shapes.SIZE) if target else (0.5, 0.5)
            components = dict.fromkeys(SA_STAGES)                # None, a gap, at Mid if there is none
            queries = dict.fromkeys(SA_STAGES)
            for stage, weights in maps.items():                  # (T, T)
                side = math.isqrt(len(weights))
                scores, explained = principal_components(weights)
                query = weights[int(y * side) * side + int(x * side)]  # (T,)
                rows.append([name, prompts[i], stage, len(weights), *explained.tolist(),
                             on_object(query, target)])
                low, high = scores.amin(0), scores.amax(0)
                components[stage] = draw_tokens((scores - low) / (high - low))  # as red, green, blue
                queries[stage] = draw_tokens((query / query.max())[:, None].expand(-1, 3))
            if i < args.rows:
                image, x, y = image.resize((PICTURE, PICTURE)), x * PICTURE, y * PICTURE
                ImageDraw.Draw(image).rectangle((x - 5, y - 5, x + 5, y + 5), outline="red", width=3)
                drawn.append((i, Path(name).name, [image, *components.values(), *queries.values()]))
        del pipeline                                             # before the next is loaded
    header = ["model", "prompt", "stage", "tokens", "PC1", "PC2", "PC3", "on object"]
    write_csv(args.out.with_suffix(".csv"), header, rows)
    groups = defaultdict(list)
    for name, _, stage, _, *numbers in rows:
        groups[name, stage].append(numbers)
    means = [[*group, *torch.tensor(numbers).nanmean(dim=0).tolist()] for group, numbers in groups.items()]
    print_table(["model", "stage", *header[4:]], means)
    print("(a) image, with a query; (b) principal components of the maps; (c) the query's row of the maps")
    drawn.sort(key=lambda row: row[0])                           # the models of a prompt below each other
    columns = ["(a)", *[f"(b) {stage}" for stage in SA_STAGES], *[f"(c) {stage}" for stage in SA_STAGES]]
    return image_grid([images for _, _, images in drawn], [name for _, name, _ in drawn], columns, gap=4)


# ------------------------------------------------------------------------------------------------------------
# Figure 8: cosine similarity of transformer blocks


def block_similarity(outputs: Tensor) -> Tensor:
    """Cosines (N - 1,) between neighbors of N consecutive outputs (N, T, D), averaged over tokens."""
    return F.cosine_similarity(outputs[:-1].float(), outputs[1:].float(), dim=2).mean(dim=1)


def stage_similarities(pipeline: Pipeline, prompts: list[str], seed: int,
                       steps: int | None) -> dict[str, Tensor]:
    """
    Each stage's cosines (prompts, N - 1), averaged over its transformers and all steps.

    Only blocks of one transformer are compared: between two transformers there are residual blocks.
    """
    unet = pipeline.unet
    transformers = defaultdict(list)                             # each with the paths of its blocks
    for stage in model.stages(unet.config):
        for path in model.feature_paths(unet, "SA", stage):
            block = path.removesuffix(".attn1")
            transformers[stage, block.rpartition(".")[0]].append(block)
    features = model.Features(unet, sum(transformers.values(), []))
    cosines = defaultdict(list)                                  # by stage

    def measure(step: int):
        for (stage, _), blocks in transformers.items():
            if len(blocks) > 1:
                outputs = torch.stack([captured[block][-1] for block in blocks])  # (N, T, D), with the prompt
                cosines[stage].append(block_similarity(outputs).cpu())

    for i, prompt in enumerate(tqdm(prompts, "similarity", unit="image")):
        with features as captured:
            pipeline([prompt], seed=seed + i, steps=steps, callback=measure)
    return {stage: torch.stack(values).unflatten(0, (len(prompts), -1)).mean(dim=1)
            for stage, values in cosines.items()}


def similarity(args: argparse.Namespace) -> Image.Image:
    """Draws a curve for each stage: the mean over prompts, and its spread."""
    prompts, rows, charts = choose_prompts(args, 32), [], []
    for name in args.model:
        pipeline = load_pipeline(name, device=args.device)
        curves = {}
        for stage, values in stage_similarities(pipeline, prompts, args.seed, args.steps).items():
            means, spreads = values.mean(dim=0), values.std(dim=0, correction=int(len(values) > 1))
            index = torch.arange(1, len(means) + 1, dtype=torch.float64) / len(means)
            curves[stage] = torch.stack([index, means, spreads], dim=1).tolist()
            rows += [[name, stage, i + 2, *point] for i, point in enumerate(curves[stage])]
        if not curves:
            raise ValueError(f"{name} has one block in each transformer: there is nothing to compare")
        charts.append([line_chart(
            f"{Path(name).name}: each transformer block's output compared to that of the block before",
            "normalized index of the block in its transformer",
            "cosine, and its spread over prompts", curves)])
        del pipeline
    header = ["model", "stage", "block", "normalized index", "cosine", "spread"]
    write_csv(args.out.with_suffix(".csv"), header, rows)
    print_table(header, rows)
    return image_grid(charts)


# ------------------------------------------------------------------------------------------------------------
# A causal test beyond Table 3: pictures without the features of one type

ALL = "all stages"


@contextmanager
def knock_out(unet: nn.Module, paths: list[str], zero: bool = False) -> Iterator[None]:
    """Makes modules return their output's mean over a picture's tokens or pixels, or zero."""
    def replace(module: nn.Module, args: tuple, output: Tensor) -> Tensor:  # (B, T, D) or (B, C, H, W)
        if zero:
            return torch.zeros_like(output)
        return output.mean(dim=(2, 3) if output.dim() == 4 else 1, keepdim=True).expand_as(output)

    hooks = [unet.get_submodule(path).register_forward_hook(replace) for path in paths]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def feature_groups(unet: model.UNet) -> dict[tuple[str, str], list[str]]:
    """Module paths by type of feature and stage, or ALL; a stage without a type is left out."""
    groups = {}
    for kind in model.FEATURE_TYPES:
        paths = {stage: model.feature_paths(unet, kind, stage) for stage in model.stages(unet.config)}
        groups[kind, ALL] = sum(paths.values(), [])
        groups |= {(kind, stage): paths[stage] for stage in paths if paths[stage]}
    return groups


def compare(image: Image.Image, intact: Image.Image, prompt: str) -> list[float]:
    """A picture's distance to the intact one, and the judge's scores, nan if the prompt is not the toy's."""
    try:
        scores = shapes.judge(image, prompt).values()
    except ValueError:
        scores = [math.nan] * len(shapes.SCORES)
    return [picture_distance(image, intact), *scores]


def draw_knockouts(title: str, stages: list[str], images: dict[tuple[str, str], Image.Image],
                   results: dict[tuple[str, str], list[tuple[float, float]]]) -> list[Image.Image]:
    """Pictures of knockouts, a chart of distances by stage, and one of scores at all stages, if any."""
    kinds, pictures, distances = [*model.FEATURE_TYPES], [], {}
    for kind in kinds:
        pictures.append([images["intact", ALL], *[images.get((kind, stage)) for stage in stages]])
    for stage in stages:
        distances[stage] = [results.get((kind, stage), [UNKNOWN])[0] for kind in kinds]
    charts = [image_grid(pictures, kinds, ["intact", *stages], gap=4),
              dot_chart(f"{title}: how far pictures are from the intact ones", kinds, distances,
                        "root mean square distance in 0..1, and its standard error over prompts")]
    scores = {kind: results[kind, ALL][1:] for kind in ("intact", *kinds)}
    if not math.isnan(scores["intact"][0][0]):
        charts.append(dot_chart(f"{title} at all stages: scores", shapes.SCORES, scores,
                                "mean, and its standard error over prompts", share=True))
    return charts


def knockout(args: argparse.Namespace) -> Image.Image:
    """Replaces each group of features, draws from the same noise, and compares with intact pictures."""
    prompts, rows, charts = choose_prompts(args, 24), [], []
    seeds = [args.seed + i for i in range(len(prompts))]
    for name in args.model:
        pipeline = load_pipeline(name, device=args.device)
        images, results, intact = {}, {}, []
        groups = {("intact", ALL): []} | feature_groups(pipeline.unet)
        for group, paths in tqdm(groups.items(), f"knockout {name}", unit="batch"):
            with knock_out(pipeline.unet, paths, args.zero):
                drawn = pipeline(prompts, seed=seeds, steps=args.steps)
            intact = intact or drawn
            compared = [compare(*pictures) for pictures in zip(drawn, intact, prompts)]
            results[group] = [mean_and_error(column) for column in zip(*compared)]
            rows.append([name, *group, *sum(results[group], ())])
            images[group] = drawn[0].resize((PICTURE, PICTURE))
        title = f"{name}, features of one type {'set to zero' if args.zero else 'averaged'}"
        charts += draw_knockouts(title, [ALL, *model.stages(pipeline.unet.config)], images, results)
        del pipeline                                             # before the next is loaded
    columns = [column + kind for column in ("distance", *shapes.SCORES) for kind in ("", " error")]
    header = ["model", "features", "stage", *columns]
    write_csv(args.out.with_suffix(".csv"), header, rows)
    print_table(header, rows)
    print(f'the pictures are of "{prompts[0]}"')
    return image_grid([[chart] for chart in charts])


# ------------------------------------------------------------------------------------------------------------
# The program


def curves(args: argparse.Namespace) -> Image.Image:
    """Draws the losses of runs."""
    return loss_curves(args.run)


def main(argv: list[str] | None = None):
    parser = ArgumentParser(__doc__, "%(prog)s COMMAND [options]")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands", prog=parser.prog)

    def add_command(draw: Callable, meaning: str, models: str = "") -> Callable:
        """Adds a command named after its function; returns the function that adds its flags."""
        command = commands.add_parser(draw.__name__, help=meaning, description=meaning)
        command.set_defaults(draw=draw)
        command.add_argument("--out", type=png_path, default=f"{draw.__name__}.png", metavar="PNG",
                             help="the picture; numbers, if there are any, go into a .csv beside it")
        if models:
            command.add_argument("--model", type=model_name, nargs="+", default=models.split(),
                                 metavar="NAME", help=f"{', '.join(PRESETS)}, a hub id, a folder [{models}]")
        return command.add_argument

    maps = add_command(attention, "self-attention maps of each stage: components, and one query", "toy")
    cosines = add_command(similarity, "cosine between outputs of neighboring transformer blocks", "toy")
    knockouts = add_command(knockout, "what pictures depend on: features replaced by type and stage", "toy")
    add_command(budget, "parameters and multiply-adds, by stage and by kind", "sdxl 1b 700m")
    times = add_command(latency, "seconds per image and peak memory here, beside the paper's", "sdxl 1b 700m")
    table3 = add_command(ablation, "runs distill.py for each row of Table 3")
    table4 = add_command(quality, "Table 4: scores and costs of several models' pictures", "toy")
    losses = add_command(curves, "the losses of one or several runs, step by step")

    for add in (maps, cosines, knockouts, table4):
        add("--prompts", type=path, metavar="FILE", help="one per line, a JSON list, or a folder of those")
        add("--limit", type=number(int, 1, 10**6), metavar="N", help="prompts per file [all; toys: 24-256]")
        add("--seed", type=number(int, 0, 2**62), default=0, metavar="N", help="of the first prompt's noise")
        add("--steps", type=number(int, 1, 1000), metavar="N", help="Euler steps [preset; Table 4 has 50]")
    maps("--at", type=number(float, 0, 1), default=0.5, metavar="X", help="share of steps before the maps")
    maps("--rows", type=number(int, 1, 100), default=2, metavar="N", help="prompts to draw")
    knockouts("--zero", action="store_true", help="replace with zero, not the mean over the picture")
    times("--size", type=number(int, 8, 8192, multiple=8), metavar="N", help="in pixels [the model's own]")
    times("--steps", type=number(int, 1, 1000), default=25, metavar="N", help="of denoising, with guidance")
    times("--repeat", type=number(int, 1, 1000), default=3, metavar="N", help="runs, after a warm-up")
    table3("--table", choices=["3a", "3b", "3c", "3d", "all"], default="3a", help="which part of Table 3")
    table3("--seeds", type=number(int, 1, 1000), default=3, metavar="N", help="runs of each row")
    table3("--steps", type=number(int, 1, 10**9), default=200, metavar="N", help="of each run")
    table3("--judge", type=number(int, 1, 10**5), default=64, metavar="N", help="captions to score on")
    table3("--jobs", type=number(int, 1, 1000), default=1, metavar="N", help="runs at the same time")
    table3("--runs", type=path, default=Path("runs/ablation"), metavar="FOLDER", help="where runs are kept")
    table3("--scorer", type=nonempty, metavar="NAME", help="also score by this CLIP, such as hpsv2")
    table3("distill", nargs="*", metavar="-- FLAGS", help="distill.py flags: --teacher, --data, --batch")
    table4("--scorer", type=nonempty, metavar="NAME",
           help=f"{', '.join(SCORERS)}, or a hub id or folder of a CLIPModel [judge for toys, else hpsv2]")
    table4("--pictures", type=path, default=Path("runs/quality"), metavar="FOLDER", help="where they stay")
    table4("--low-memory", action="store_true", help="hold one network at a time, decode in tiles")
    for add in (times, table4):
        add("--precision", choices=PRECISIONS, help="[fp16 on a GPU, fp32 elsewhere]")
    for add in (maps, cosines, knockouts, times, table4):
        add("--device", type=nonempty, help="[a GPU if there is one]")
    losses("run", type=path, nargs="+", metavar="RUN", help="the folder of a run of distill.py")
    args = parser.parse_args(argv)
    picture = args.draw(args)
    atomic_write(args.out, picture.save)


if __name__ == "__main__":
    run(main, "lower --rows, --size or the number of models")
