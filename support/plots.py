"""
Tables in the terminal, and pictures: grids of images, charts of lines, bars and dots. Sizes are in pixels.
"""

import math
from functools import cache
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from support.files import read_csv

INK, PALE = "#222222", "#dddddd"
COLORS = [  # Okabe and Ito's
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#7f7f7f"]
LOSSES = ("task", "outKD", "featKD")  # columns of log.csv
WIDTH = 1600  # of a chart: twice as wide as a README shows it, and so sharp on every screen


@cache
def font(size: int = 26) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def format_number(value: object) -> str:
    """A number with commas or four digits; nan as blank; a pair as "mean ± spread"; text unchanged."""
    if isinstance(value, tuple):
        return " ± ".join(format_number(number) for number in value if not math.isnan(number))
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_table(header: list[str], rows: list[list]):
    """Prints a table, the first column to the left, the others to the right."""
    table = [list(map(format_number, row)) for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *rest in table:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
        print(first.ljust(widths[0]), *cells, sep="  ")


def image_grid(rows: list[list[Image.Image | None]], row_names: Sequence[str] = (),
               column_names: Sequence[str] = (), gap: int = 0) -> Image.Image:
    """Images of one width, and of one height in each row, `gap` pixels apart; None leaves a place empty."""
    width = max(image.width for row in rows for image in row if image)
    heights = [max(image.height for image in row if image) for row in rows]
    across = width + gap
    left = 16 + int(max(font().getlength(name) for name in row_names)) if row_names else 0
    top = 38 if column_names else 0
    tops = [top + sum(heights[:y]) + gap * y for y in range(len(rows))]
    right = left + across * max(len(row) for row in rows) - gap
    picture = Image.new("RGB", (right, tops[-1] + heights[-1]), "white")
    draw = ImageDraw.Draw(picture)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            if image:
                picture.paste(image, (left + x * across, tops[y]))
    for y, name in enumerate(row_names):
        draw.text((left // 2, tops[y] + heights[y] // 2), name, INK, font(), "mm")
    for x, name in enumerate(column_names):
        draw.text((left + x * across + width // 2, top // 2), name, INK, font(), "mm")
    return picture


# ------------------------------------------------------------------------------------------------------------
# Charts


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers that cover the range from `low` to `high`."""
    step = 10 ** math.floor(math.log10((high - low) / count or 1.0))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [round(step * i, 10) for i in range(first, last + 1)]


def axes(title: str, names: list[str], x_name: str, x_ticks: list[float], y_ticks: dict[float, str],
         y_name: str = "") -> tuple[Image.Image, ImageDraw.ImageDraw, Callable]:
    """
    An empty chart, a pen for it, and a function from (x, y) to pixels. `names` are the legend's, in COLORS.

    Ticks reach from one end of an axis to the other. Without `y_name` they are rows, 0, 1, ... from the top.
    """
    low, high, height = min(y_ticks), max(y_ticks), 560
    if not y_name:
        low, high, height = len(y_ticks) - 0.5, -0.5, max(40, 14 * len(names)) * len(y_ticks)
    left, top = 56 + max(font().getlength(label) for label in y_ticks.values()), 176 if y_name else 130
    right, bottom = WIDTH - 48, top + height
    picture = Image.new("RGB", (WIDTH, bottom + 110), "white")
    draw = ImageDraw.Draw(picture, "RGBA")

    def place(x: float, y: float) -> tuple[float, float]:
        return (left + (right - left) * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]),
                bottom - height * (y - low) / (high - low))

    draw.text((24, 38), title, INK, font(30), "lm")
    draw.text((24, 142), y_name, INK, font(), "lm")
    draw.text(((left + right) // 2, bottom + 72), x_name, INK, font(), "mm")
    x = 24
    for name, color in zip(names, COLORS):
        draw.rectangle((x, 78, x + 24, 102), color)
        draw.text((x + 36, 91), name, INK, font(), "lm")
        x += 84 + font().getlength(name)
    for value in x_ticks:
        x, _ = place(value, 0)
        draw.line((x, top, x, bottom), PALE, 2)
        draw.text((x, bottom + 26), f"{value:,g}", INK, font(), "mm")
    for value, label in y_ticks.items():
        _, y = place(0, value)
        draw.text((left - 16, y), label, INK, font(), "rm")
        if y_name:
            draw.line((left, y, right, y), PALE, 2)
    return picture, draw, place


def line_chart(title: str, x_name: str, y_name: str, curves: dict[str, list[tuple[float, float, float]]],
               log: bool = False) -> Image.Image:
    """Curves of points (x, y, spread), each in a band; with `log`, y and spread are decimal logarithms."""
    xs, ys, spreads = np.array(sum(curves.values(), [])).T       # (points,) each
    y_ticks = {y: f"{10**y:.2g}" if log else f"{y:g}" for y in ticks(min(ys - spreads), max(ys + spreads))}
    picture, draw, place = axes(title, list(curves), x_name, ticks(min(xs), max(xs)), y_ticks, y_name)
    for curve, color in zip(curves.values(), COLORS):
        if not curve:
            continue                                             # but it keeps its color
        upper = [place(x, y + spread) for x, y, spread in curve]
        lower = [place(x, y - spread) for x, y, spread in curve]
        draw.polygon(upper + lower[::-1], color + "28")         # mostly transparent
        draw.line([place(x, y) for x, y, _ in curve], color, 4, "curve")
        for x, y, _ in curve if len(curve) <= 20 else []:
            draw.circle(place(x, y), 8, color)
    return picture


def bar_chart(title: str, names: list[str], rows: dict[str, list[float]], x_name: str) -> Image.Image:
    """A stacked bar for each row, with its total and a part for each name."""
    longest = max(sum(lengths) for lengths in rows.values())
    picture, draw, place = axes(title, names, x_name, ticks(0, 1.1 * longest), dict(enumerate(rows)))
    for y, lengths in enumerate(rows.values()):
        total = 0.0
        for length, color in zip(lengths, COLORS):
            draw.rectangle((*place(total, y - 0.4), *place(total + length, y + 0.4)), color)
            total += length
        end, middle = place(total, y)
        draw.text((end + 12, middle), format_number(total), INK, font(), "lm")
    return picture


def dot_chart(title: str, names: list[str], rows: dict[str, list[tuple[float, float]]], x_name: str,
              share: bool = False) -> Image.Image:
    """Rows of dots (value, spread), one for each of `names`, possibly nan; `share`: the axis is 0 to 1."""
    dots = np.array(list(rows.values()))                         # (rows, names, 2)
    values, spreads = dots[..., 0], np.nan_to_num(dots[..., 1])
    low, high = (0.0, 1.0) if share else (np.nanmin(values - spreads), np.nanmax(values + spreads))
    picture, draw, place = axes(title, names, x_name, ticks(low, high), dict(enumerate(rows)))
    for (row, i), value in np.ndenumerate(values):
        if not math.isnan(value):
            y = row + 0.7 * (i - (len(names) - 1) / 2) / len(names)  # dots of a row do not hide each other
            start, end = np.clip([value - spreads[row, i], value + spreads[row, i]], low, high)
            color = COLORS[i % len(COLORS)]
            draw.line((*place(start, y), *place(end, y)), color, 4)
            draw.circle(place(value, y), 8, color)
    return picture


def loss_curves(runs: list[Path]) -> Image.Image:
    """
    The losses of runs, from their log.csv: means and spreads of their logarithms over a hundredth of the run.

    Losses that are 0 or not finite are left out. Raises FileNotFoundError or ValueError.
    """
    logs, charts = {str(run): read_csv(run / "log.csv", ("step", *LOSSES)) for run in runs}, []
    for loss in LOSSES:
        curves = {}
        for name, log in logs.items():
            values = [(float(row["step"]), float(row[loss])) for row in log]
            points = [(step, math.log10(value)) for step, value in values if 0 < value < math.inf]
            parts = np.array_split(np.array(points), min(100, len(points))) if points else []
            curves[name] = [(*part.mean(axis=0), part[:, 1].std()) for part in parts]
        if any(curves.values()):
            charts.append(line_chart(loss, "step", "loss and its spread, smoothed", curves, log=True))
    if not charts:
        raise ValueError(f"{runs[0] / 'log.csv'} has no losses yet")
    return image_grid([[chart] for chart in charts])
