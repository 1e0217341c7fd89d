"""
Charts, tables and grids of images, drawn with Pillow as RGB images; sizes are in pixels.
"""

import math
from functools import cache
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from support.files import read_csv

INK, PALE = "#222222", "#dddddd"
COLOURS = [  # Okabe and Ito's
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#7f7f7f"]
LOSSES = ("task", "outKD", "featKD")  # columns of log.csv
WIDTH = 960  # of a chart: sharp at a README's width


@cache
def font(size: int = 16) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def text_width(text: str, size: int = 16) -> int:
    return math.ceil(font(size).getlength(text))


def format_number(value: object) -> str:
    """A number with commas or with four digits; nan is blank, and text stays as it is."""
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def format_score(mean: float, spread: float = math.nan, digits: int = 3) -> str:
    """A mean, with its spread unless that is nan; blank if the mean is nan."""
    if math.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" if math.isnan(spread) else f"{mean:.{digits}f} ± {spread:.{digits}f}"


def print_table(header: list[str], rows: list[list]):
    """Prints a table, the first column to the left, the others to the right."""
    table = [list(map(format_number, row)) for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *rest in table:
        print(first.ljust(widths[0]), *map(str.rjust, rest, widths[1:]), sep="  ")


def image_grid(rows: list[list[Image.Image | None]], row_names: list[str] | None = None,
               column_names: list[str] | None = None, gap: int = 0) -> Image.Image:
    """
    Images of one size side by side, `gap` pixels apart, with the names of rows and columns if there are any;
    None leaves a place empty.
    """
    width, height = next(image for row in rows for image in row if image).size
    size = 16 if width >= 96 else 12
    across, down = width + gap, height + gap
    left = 16 + max(text_width(name, size) for name in row_names) if row_names else 0
    top = size + 12 if column_names else 0
    right, bottom = left + across * max(map(len, rows)) - gap, top + down * len(rows) - gap
    picture = Image.new("RGB", (right, bottom), "white")
    draw = ImageDraw.Draw(picture)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            if image:
                picture.paste(image, (left + x * across, top + y * down))
    for y, name in enumerate(row_names or []):
        draw.text((left // 2, top + y * down + height // 2), name, INK, font(size), "mm")
    for x, name in enumerate(column_names or []):
        draw.text((left + x * across + width // 2, top // 2), name, INK, font(size), "mm")
    return picture


def stack(*images: Image.Image, gap: int = 12) -> Image.Image:
    """Images below each other."""
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    picture, y = Image.new("RGB", (max(image.width for image in images), height), "white"), 0
    for image in images:
        picture.paste(image, (0, y))
        y += image.height + gap
    return picture


def add_title(title: str, *images: Image.Image) -> Image.Image:
    """Images below each other, under a title."""
    head = Image.new("RGB", (max(WIDTH, text_width(title, 18) + 32), 40), "white")
    ImageDraw.Draw(head).text((16, 22), title, INK, font(18), "lm")
    return stack(head, *images, gap=0)


def legend(names: list[str]) -> Image.Image:
    """A row of the colours of a chart, each with its name."""
    width = max(WIDTH, 72 + sum(46 + text_width(name) for name in names))
    picture, x = Image.new("RGB", (width, 32), "white"), 72
    draw = ImageDraw.Draw(picture)
    for name, colour in zip(names, COLOURS):
        draw.rectangle((x, 10, x + 14, 24), colour)
        draw.text((x + 22, 17), name, INK, font(), "lm")
        x += 46 + text_width(name)
    return picture


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers that reach from `low` or below to `high` or above."""
    step = 10 ** math.floor(math.log10((high - low) / count or 1.0))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [round(step * i, 10) for i in range(first, last + 1)]


def axes(x_name: str, y_name: str, points: list[tuple[float, float]], log: bool = False,
         height: int = 420) -> tuple[Image.Image, Callable[[float, float], tuple[float, float]]]:
    """Axes for these points, and a function from (x, y) to pixels; `log`: y is a decimal logarithm."""
    xs, ys = zip(*points)
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    left, right, top, bottom = 72, WIDTH - 24, 44, height
    picture = Image.new("RGB", (WIDTH, bottom + 64), "white")
    draw = ImageDraw.Draw(picture)

    def place(x: float, y: float) -> tuple[float, float]:
        return (left + (right - left) * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]),
                bottom - (bottom - top) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))

    for value in y_ticks:
        _, y = place(x_ticks[0], value)
        draw.line((left, y, right, y), PALE)
        draw.text((left - 8, y), f"{10**value:.3g}" if log else f"{value:g}", INK, font(14), "rm")
    for value in x_ticks:
        x, _ = place(value, y_ticks[0])
        draw.text((x, bottom + 14), f"{value:g}", INK, font(14), "mm")
    draw.line((left, bottom, right, bottom), INK)
    draw.text(((left + right) // 2, bottom + 42), x_name, INK, font(), "mm")
    draw.text((16, 20), y_name, INK, font(), "lm")
    return picture, place


def line_chart(title: str, x_name: str, y_name: str,
               curves: dict[str, list[tuple[float, float, float]]]) -> Image.Image:
    """Curves of points (x, y, spread): y with an error bar of one spread to either side."""
    points = sum(curves.values(), [])
    ends = [(x, y - spread) for x, y, spread in points] + [(x, y + spread) for x, y, spread in points]
    picture, place = axes(x_name, y_name, ends)
    draw = ImageDraw.Draw(picture)
    for curve, colour in zip(curves.values(), COLOURS):
        for x, y, spread in curve:
            draw.line((*place(x, y - spread), *place(x, y + spread)), colour, 1)
            draw.circle(place(x, y), 4, colour)
        draw.line([place(x, y) for x, y, _ in curve], colour, 2)
    return add_title(title, legend(list(curves)), picture)


def dot_chart(title: str, names: list[str],
              groups: dict[str, dict[str, list[tuple[float, float]]]]) -> Image.Image:
    """
    Dots with error bars: `groups[heading][label]` has a (value, spread) for each of `names`.

    A bar reaches one spread to either side; there is none if the spread is nan.
    """
    values = [point for rows in groups.values() for points in rows.values() for point in points]
    reach = [(mean, 0.0 if math.isnan(spread) else spread) for mean, spread in values]
    x_ticks = ticks(min(mean - spread for mean, spread in reach), max(mean + spread for mean, spread in reach))
    row, size = 26, 15
    left = 32 + max(text_width(label, size) for rows in groups.values() for label in (*rows, *groups))
    height = row * sum(len(rows) + 2 for rows in groups.values()) + 24
    picture = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(picture)

    def place(value: float) -> float:
        return left + (WIDTH - 40 - left) * (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    y = 0
    for heading, rows in groups.items():
        top, bottom = y + row, y + row * (len(rows) + 1)
        draw.text((16, y + row // 2), heading, INK, font(size), "lm")
        for value in x_ticks:
            draw.line((place(value), top, place(value), bottom), PALE)
            draw.text((place(value), bottom + 12), f"{value:g}", INK, font(13), "mm")
        for i, (label, points) in enumerate(rows.items()):
            middle = top + row * i + row // 2
            draw.text((left - 16, middle), label, INK, font(size), "rm")
            for series, ((mean, spread), colour) in enumerate(zip(points, COLOURS)):
                y_dot = middle + 6 * series - 3 * (len(points) - 1)  # dots of one row do not hide each other
                if not math.isnan(spread):
                    draw.line((place(mean - spread), y_dot, place(mean + spread), y_dot), colour, 2)
                draw.circle((place(mean), y_dot), 4, colour)
        y = bottom + row
    return add_title(title, legend(names), picture)


def moving_average(values: list[float], window: int) -> list[float]:
    """The mean of each value and those before it, `window` in all, or as many as there are."""
    sums = np.cumsum([0.0, *values])
    last = np.arange(1, len(sums))
    first = np.maximum(last - window, 0)
    return ((sums[last] - sums[first]) / (last - first)).tolist()


def loss_curves(runs: list[Path]) -> Image.Image:
    """
    The three losses of runs, from their log.csv: smoothed over a twentieth of the run, each step pale behind.

    Losses are on a logarithmic scale; those that are 0 throughout, or not finite, are left out. Raises
    FileNotFoundError or ValueError.
    """
    logs, charts = [read_csv(run / "log.csv", ("step", *LOSSES)) for run in runs], []
    for loss in LOSSES:
        curves = []                                              # one of each run, in the legend's order
        for log in logs:
            points = [(float(row["step"]), float(row[loss])) for row in log]
            curves.append([(step, math.log10(value)) for step, value in points if 0 < value < math.inf])
        points = sum(curves, [])
        if not points:
            continue
        picture, place = axes("step", loss, [(0, points[0][1]), *points], log=True, height=260)
        draw = ImageDraw.Draw(picture)
        for curve, colour in zip(curves, COLOURS):
            pale = tuple((channel + 2 * 255) // 3 for channel in ImageColor.getrgb(colour))
            draw.line([place(*point) for point in curve], pale, 1)
        for curve, colour in zip(curves, COLOURS):
            smooth = moving_average([y for _, y in curve], max(1, len(curve) // 20))
            draw.line([place(step, y) for (step, _), y in zip(curve, smooth)], colour, 2)
        charts.append(picture)
    if not charts:
        raise ValueError(f"{runs[0] / 'log.csv'} has no losses yet")
    names = [run.name for run in runs]
    return add_title("Losses, smoothed over a twentieth of the run", legend(names), *charts)


def bar_chart(title: str, groups: dict[str, list[list[float]]], parts: list[str]) -> Image.Image:
    """Horizontal bars in groups, with their totals; a bar is a list of lengths, one for each of `parts`."""
    thickness, gap = 20, 14
    totals = [float(sum(bar)) for group in groups.values() for bar in group]
    left = 24 + max(map(text_width, groups))
    right = WIDTH - 24 - max(text_width(format_number(total)) for total in totals)
    scale = (right - left) / (max(totals) or 1)
    height = len(totals) * thickness + (len(groups) + 1) * gap
    picture, y = Image.new("RGB", (WIDTH, height), "white"), gap
    draw = ImageDraw.Draw(picture)
    for name, group in groups.items():
        draw.text((left - 10, y + len(group) * thickness / 2), name, INK, font(), "rm")
        for bar in group:
            x = left
            for length, colour in zip(bar, COLOURS):
                draw.rectangle((x, y + 2, x + length * scale, y + thickness - 2), colour)
                x += length * scale
            draw.text((x + 8, y + thickness / 2), format_number(float(sum(bar))), INK, font(14), "lm")
            y += thickness
        y += gap
    return add_title(title, legend(parts), picture)


def draw_table(title: str, header: list[str], rows: list[list]) -> Image.Image:
    """A table as `print_table` prints it, below a title."""
    table = [list(map(format_number, row)) for row in [header, *rows]]
    widths = [math.ceil(max(map(font(15).getlength, column))) + 28 for column in zip(*table)]
    line = 26
    picture = Image.new("RGB", (max(WIDTH, sum(widths) + 16), line * len(table) + 16), "white")
    draw = ImageDraw.Draw(picture)
    for i, row in enumerate(table):
        x, y = 8, line * i + line // 2 + 4
        draw.text((x + 8, y), row[0], INK, font(15), "lm")
        x += widths[0]
        for cell, width in zip(row[1:], widths[1:]):
            x += width
            draw.text((x - 8, y), cell, INK, font(15), "rm")
    draw.line((8, line + 4, 8 + sum(widths), line + 4), INK)
    return add_title(title, picture)
