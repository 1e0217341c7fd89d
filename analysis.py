"""
The paper's figures and tables. Each command writes a PNG to look at, and beside it its numbers as CSV.

    python analysis.py attention --model toy runs/sa runs/lf     # Figures 4 and 9: what self-attention sees
    python analysis.py similarity                                # Figure 8: what each transformer block adds
    python analysis.py budget                                    # Figure 2, Tables 1 and 2: parameters, work
    python analysis.py latency --model sdxl 1b 700m              # Table 2, Figure 5: seconds and memory
    python analysis.py ablation --table 3a --seeds 3             # Table 3: which features to distil

A model is the toy, or sdxl, 1b or 700m, or a hub id, or a folder such as a finished run of distill.py.
`budget` and `latency` need no weights.
"""

import argparse
from pathlib import Path

from options import PRECISIONS, PRESETS, begin, check, filled, number, parser_of, preset, program


def command_line(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, "COMMAND [options]")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands",
                                     prog=parser.prog)

    def command(name: str, meaning: str, models: str = ""):
        one = commands.add_parser(name, help=meaning, description=meaning, usage="%(prog)s [options]",
                                  allow_abbrev=False, formatter_class=parser.formatter_class)
        one.error = parser.error
        add = one.add_argument
        if models:
            add("--model", nargs="+", default=models.split(), metavar="NAME",
                help=f"{', '.join(PRESETS)}, a hub id or a folder [{models}]")
        if models and name != "budget":
            add("--device", type=filled(str), help="[a GPU if there is one]")
        add("--out", type=filled(Path), default=Path(f"{name}.png"), metavar="PNG",
            help="and a .csv beside it")
        return add

    for name, meaning in (("attention", "self-attention maps of each stage: components, and one query"),
                          ("similarity", "cosine of each transformer block's output to the one before")):
        add = command(name, meaning, "toy")
        add("--prompts", type=filled(Path), metavar="FILE", help="one per line, instead of the built-in ones")
        add("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N", help="of the first noise")
        add("--steps", type=number(int, 1, 1000), metavar="N", help="Euler steps, if not the preset's")
        if name == "attention":
            add("--at", type=number(float, 0, 1), default=0.5, metavar="X",
                help="share of the steps done when the maps are taken")
            add("--rows", type=number(int, 1, 100), default=2, metavar="N", help="prompts to draw")

    command("budget", "parameters and multiply-adds, by stage and by kind", "sdxl 1b 700m")

    add = command("latency", "seconds per image and peak memory here, beside the paper's", "sdxl 1b 700m")
    add("--size", type=number(int, 8, 8192, multiple=8), metavar="N", help="in pixels, if not its own")
    add("--steps", type=number(int, 1, 1000), default=25, metavar="N", help="of denoising, with guidance")
    add("--repeat", type=number(int, 1, 1000), default=3, metavar="N", help="runs, after one to warm up")
    add("--precision", choices=PRECISIONS, metavar="P",
        help="fp32, fp16 or bf16 [fp16 on a GPU, fp32 elsewhere]")

    add = command("ablation", "runs distill.py for each row of Table 3")
    add("--table", choices=["3a", "3b", "3c", "3d", "all"], default="3a", help="which part of Table 3")
    add("--seeds", type=number(int, 1, 1000), default=3, metavar="N", help="runs of each row")
    add("--steps", type=number(int, 1, 10**9), default=120, metavar="N", help="of each run")
    add("--batch", type=number(int, 1, 10**6), default=16, metavar="N", help="images in a step")
    add("--judge", type=number(int, 1, 10**5), default=64, metavar="N", help="captions to score on")
    add("--jobs", type=number(int, 1, 1000), default=1, metavar="N", help="runs at the same time")
    add("--runs", type=filled(Path), default=Path("runs/ablation"), metavar="FOLDER",
        help="where the runs are kept")
    add("distill", nargs="*", metavar="-- FLAGS", help="more for distill.py, such as --teacher and --data")
    args = parser.parse_args(argv)
    check(parser, args)
    return args


if __name__ == "__main__":
    ARGS = begin(command_line)

import contextlib
import math
import statistics
from collections import defaultdict
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import chart
import files
import model
from ablation import ablation
from costs import ORDER, budget, latency
from data import PROMPTS
from sample import Pipeline, load_pipeline
from text import CLIPTokenizer
from toy import shapes


def prompts_of(args: argparse.Namespace, count: int) -> list[str]:
    """The file's prompts; else captions of two objects if all models are toys; else prompts of ours."""
    if args.prompts:
        try:
            prompts = [line.strip() for line in args.prompts.read_text().splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise ValueError(f"--prompts {args.prompts} is not a text in UTF-8") from None
        if not prompts:
            raise ValueError(f"--prompts {args.prompts} has no prompts")
        return prompts
    vocabularies = [files.find(preset(name).source, "tokenizer/vocab.json") for name in args.model]
    if any(path is None or len(files.read_json(path)) >= CLIPTokenizer.SMALL for path in vocabularies):
        return PROMPTS
    captions = (shapes.caption(shapes.JUDGE_SEED, i) for i in range(10 * count))
    return [caption for caption in captions if shapes.parse(caption)[1]][:count]


@contextlib.contextmanager
def watch(unet: model.UNet, paths: list[str], each: Callable[[dict[str, Tensor]], None]) -> Iterator[None]:
    """After each forward pass within `with`, calls `each` with the outputs of the modules at these paths."""
    outputs = {}
    keep = lambda path: lambda module, args, output: outputs.__setitem__(path, output)
    handles = [unet.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    handles.append(unet.register_forward_hook(lambda *_: each(outputs)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------------------
# Figures 4 and 9: self-attention maps


def attention_map(attention: model.Attention, x: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) for what enters self-attention, x (B, T, D): (B, T, T), the heads' mean."""
    q, k = attention.split(attention.to_q(x)), attention.split(attention.to_k(x))  # (B, heads, T, d)
    maps = ((q[:, i] @ k[:, i].transpose(1, 2) / math.sqrt(q.shape[3])).float().softmax(dim=2)
            for i in range(attention.heads))                     # one by one: (B, T, T) is large enough
    return sum(maps) / attention.heads


def principal_components(rows: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    """
    Rows (N, M) along their `count` principal components, (N, count), and the share of the variance that each
    explains, (count,). A component's sign is such that the largest entry of its direction is positive.
    """
    centred = rows.double() - rows.double().mean(dim=0)
    variances, vectors = torch.linalg.eigh(centred.T @ centred)  # in ascending order
    vectors = vectors.flip(1)[:, :count]                         # (M, count)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return centred @ (vectors * largest.sign()), variances.flip(0)[:count] / variances.sum()


@torch.inference_mode()
def stage_maps(pipeline: Pipeline, prompt: str, seed: int, steps: int | None,
               at: float) -> tuple[Image.Image, dict[str, Tensor]]:
    """
    The image of a prompt, and of each stage with self-attention its map (T, T): the mean over all heads and
    transformer blocks of the stage, at this share of the steps, in the half of guidance that sees the prompt.

    The paper does not say which step, block and heads it shows. Tumanyan et al. (arXiv 2211.12572), whom it
    follows, look half way through the sampling; a mean does not depend on how deep a stage is.
    """
    unet, maps, seen = pipeline.unet, {}, 0
    steps = steps or pipeline.preset.steps
    paths = {stage: model.feature_paths(unet, "SA", stage) for stage in model.stages(unet.config)}
    entering = lambda path: path.removesuffix("attn1") + "norm1"

    def each(outputs: dict[str, Tensor]):
        nonlocal seen
        if seen == min(int(at * steps), steps - 1):
            for stage in (stage for stage in paths if paths[stage]):
                maps[stage] = sum(attention_map(unet.get_submodule(path), outputs[entering(path)][-1:])[0]
                                  for path in paths[stage]).cpu() / len(paths[stage])
        seen += 1

    with watch(unet, [entering(path) for stage in paths.values() for path in stage], each):
        image, = pipeline([prompt], seed=seed, steps=steps)
    return image, maps


def query_of(image: Image.Image, prompt: str) -> tuple[float, float, shapes.Object | None]:
    """The query, as shares of width and height: on what the toy's caption names first, else in the middle."""
    with contextlib.suppress(ValueError):  # the prompt or the picture is not the toy's
        (colour, _), *_ = shapes.parse(prompt)[0]
        for found in shapes.read(image):
            if found.colour == colour:
                found = found._replace(shape=found.shape or "square")  # a blob is about as large
                return found.x / shapes.SIZE, found.y / shapes.SIZE, found
    return 0.5, 0.5, None


def on_object(row: Tensor, found: shapes.Object | None) -> float:
    """How many times more of a query's attention (T,) falls on its object than if it fell everywhere."""
    if found is None:
        return math.nan
    side = math.isqrt(len(row))
    area = F.adaptive_avg_pool2d(torch.from_numpy(shapes.coverage(found))[None], side).flatten()  # (T,)
    return ((row * area).sum() / area.mean()).item()


def painted(colours: Tensor, size: int) -> Image.Image:
    """Colours (T, 3) in 0..1 as the pixels of a square."""
    side = math.isqrt(len(colours))
    pixels = (colours.float() * 255).round().byte().view(side, side, 3).numpy()
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)


def boxed(image: Image.Image, x: float, y: float) -> Image.Image:
    """The image with a red box around the query at (x, y), shares of width and height."""
    image, half = image.copy(), image.width / 32
    x, y = x * image.width, y * image.height
    ImageDraw.Draw(image).rectangle((x - half, y - half, x + half, y + half), outline="red", width=3)
    return image


def attention(args: argparse.Namespace):
    """Measures the maps of all prompts and draws some: (b) their components, (c) their row of one query."""
    prompts, measured, drawn = prompts_of(args, 24), [], []
    stages, cell = ORDER[1:6], 152                               # those with self-attention
    bar = tqdm(total=len(args.model) * len(prompts), desc="attention", unit="image")
    for name in args.model:
        pipeline = load_pipeline(name, device=args.device)
        for i, prompt in enumerate(prompts):
            image, maps = stage_maps(pipeline, prompt, args.seed + i, args.steps, args.at)
            x, y, found = query_of(image, prompt)
            image = image.resize((cell, cell))
            top, bottom = [image], [boxed(image, x, y)]
            for stage in stages:
                if stage not in maps:                            # KOALA-700M has no Mid
                    top.append(None)
                    bottom.append(None)
                    continue
                side = math.isqrt(len(maps[stage]))
                scores, explained = principal_components(maps[stage])
                query = maps[stage][int(y * side) * side + int(x * side)]  # (T,)
                measured.append([name, prompt, stage, side**2, *explained.tolist(), on_object(query, found)])
                low, high = scores.amin(0), scores.amax(0)
                top.append(painted((scores - low) / (high - low), cell))
                bottom.append(painted((query / query.max())[:, None].expand(-1, 3), cell))
            if i < args.rows:
                drawn.append((i, Path(name).name, top, bottom))
            bar.update()
        del pipeline
    bar.close()
    header = ["model", "prompt", "stage", "tokens", "PC1", "PC2", "PC3", "on object"]
    files.write_csv(args.out.with_suffix(".csv"), header, measured)
    groups = defaultdict(list)
    for name, _, stage, _, *numbers in measured:
        groups[name, stage].append(numbers)
    chart.show(["model", "stage", *header[4:]],
               [[*group, *map(mean, zip(*rows))] for group, rows in groups.items()])

    drawn.sort(key=lambda row: row[0])                           # the models of a prompt below each other
    names = [name for _, name, _, _ in drawn]
    picture = chart.titled(
        "Self-attention: (b) principal components of the map, (c) its row for the query in the red box",
        chart.sheet([row[2] for row in drawn], names, ["(a)", *(f"(b) {stage}" for stage in stages)]),
        chart.sheet([row[3] for row in drawn], names, ["query", *(f"(c) {stage}" for stage in stages)]))
    files.write(args.out, lambda path: picture.save(path))


def mean(values) -> float:
    """Of those that are numbers; nan if none is."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


# ------------------------------------------------------------------------------------------------------------
# Figure 8: cosine similarity of transformer blocks


def block_similarity(outputs: list[Tensor]) -> Tensor:
    """Cosines (B, N - 1) of N consecutive outputs (B, T, D), each to the one before; tokens' mean."""
    dot = lambda a, b: (a.double() * b.double()).sum(dim=2)      # (B, T)
    return torch.stack([(dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()).mean(dim=1)
                        for a, b in zip(outputs, outputs[1:])], dim=1)


@torch.inference_mode()
def stage_similarity(pipeline: Pipeline, prompt: str, seed: int, steps: int | None) -> dict[str, Tensor]:
    """Of each stage with transformers the cosines (N - 1,), the mean over its transformers and all steps.

    Only blocks of one transformer are compared: between two transformers there are residual blocks.
    """
    unet, sums, count = pipeline.unet, defaultdict(float), 0
    series = {stage: [[f"{path}.attentions.{i}.transformer_blocks.{j}"
                       for j in range(len(transformer.transformer_blocks))]
                      for i, transformer in enumerate(unet.get_submodule(path).attentions)]
              for stage, path in model.stages(unet.config).items()}

    def each(outputs: dict[str, Tensor]):
        nonlocal count
        count += 1
        for stage, transformers in series.items():
            for blocks in (blocks for blocks in transformers if len(blocks) > 1):
                cosines = block_similarity([outputs[block][-1:] for block in blocks])[0]
                sums[stage] += cosines.cpu() / len(transformers)

    with watch(unet, [path for stage in series.values() for blocks in stage for path in blocks], each):
        pipeline([prompt], seed=seed, steps=steps)
    return {stage: total / count for stage, total in sums.items()}


def similarity(args: argparse.Namespace):
    """Draws a curve for each stage: the mean over prompts, and its spread."""
    prompts, rows, pictures = prompts_of(args, 32), [], []
    for name in args.model:
        pipeline = load_pipeline(name, device=args.device)
        found = [stage_similarity(pipeline, prompt, args.seed + i, args.steps)
                 for i, prompt in enumerate(tqdm(prompts, f"similarity {name}", unit="image"))]
        curves = {}
        for stage in found[0]:
            values = torch.stack([one[stage] for one in found])  # (prompts, N - 1)
            spread = values.std(dim=0) if len(values) > 1 else torch.zeros(values.shape[1])
            places = [(i + 1) / values.shape[1] for i in range(values.shape[1])]
            curves[stage] = list(zip(places, values.mean(0).tolist(), spread.tolist()))
            rows += [[name, stage, i + 2, *point] for i, point in enumerate(curves[stage])]
        pictures.append(chart.lines(
            f"{name}: cosine similarity of each transformer block's output to the one before",
            "normalised index of the block in its transformer",
            "cosine, and its standard deviation over prompts", curves))
        del pipeline
    header = ["model", "stage", "block", "normalised index", "cosine", "spread"]
    files.write_csv(args.out.with_suffix(".csv"), header, rows)
    chart.show(header, rows)
    files.write(args.out, lambda path: chart.stack(*pictures).save(path))


if __name__ == "__main__":
    commands = {"attention": attention, "similarity": similarity, "budget": budget, "latency": latency,
                "ablation": ablation}
    program(lambda: commands[ARGS.command](ARGS), "lower --rows, --size or the number of models")
