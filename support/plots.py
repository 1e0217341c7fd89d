"""
Charts, tables and grids of images, drawn with Pillow as RGB images; sizes are in pixels.
"""

import math
import statistics
from functools import cache
from pathlib import Path
from typing import Callable

from PIL import Image, ImageColor, ImageDraw, ImageFont

from support.files import read_csv

INK, PALE = "#222222", "#dddddd"
COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#7f7f7f"]  # Okabe and Ito
WIDTH = 960  # of a chart: sharp at a README's width


@cache
def font(size: int = 16) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def text_width(text: str, size: int = 16) -> int:
    return math.ceil(font(size).getlength(text))


def format_number(value: object) -> str:
    """A number with commas or four digits; nan is blank, and text is itself."""
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_table(header: list[str], rows: list[list]) -> list[list[str]]:
    """Prints a table, and returns its cells as text."""
    cells = [list(map(format_number, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    for first, *rest in [header, *cells]:
        print(first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:])), sep="  ")
    return cells


def image_grid(rows: list[list[Image.Image | None]], row_names: list[str] | None = None,
               column_names: list[str] | None = None) -> Image.Image:
    """Images of one size side by side, with the names of rows and columns if there are any; None is a gap."""
    width, height = next(image for row in rows for image in row if image).size
    size = 16 if width >= 96 else 12
    left = 16 + max(text_width(name, size) for name in row_names) if row_names else 0
    top = size + 12 if column_names else 0
    picture = Image.new("RGB", (left + width * max(map(len, rows)), top + height * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            if image:
                picture.paste(image, (left + x * width, top + y * height))
    for y, name in enumerate(row_names or []):
        draw.text((left // 2, top + y * height + height // 2), name, INK, font(size), "mm")
    for x, name in enumerate(column_names or []):
        draw.text((left + x * width + width // 2, top // 2), name, INK, font(size), "mm")
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
    """Images below a title and each other."""
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


def axes(x_name: str, y_name: str, x_ticks: list[float], y_ticks: list[float], log: bool = False,
         height: int = 420) -> tuple[Image.Image, Callable[[float, float], tuple[float, float]]]:
    """The axes of a chart, and where in the picture a point (x, y) lies; `log`: y is a decimal logarithm."""
    left, right, top, bottom = 72, WIDTH - 24, 44, height
    picture = Image.new("RGB", (WIDTH, bottom + 64), "white")
    draw = ImageDraw.Draw(picture)

    def place(x: float, y: float) -> tuple[float, float]:
        return (left + (right - left) * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]),
                bottom - (bottom - top) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))

    for value in y_ticks:
        draw.line((*place(x_ticks[0], value), *place(x_ticks[-1], value)), PALE)
        text = f"{10**value:.3g}" if log else f"{value:g}"
        draw.text((left - 8, place(x_ticks[0], value)[1]), text, INK, font(14), "rm")
    for value in x_ticks:
        draw.text((place(value, y_ticks[0])[0], bottom + 14), f"{value:g}", INK, font(14), "mm")
    draw.line((left, bottom, right, bottom), INK)
    draw.text(((left + right) // 2, bottom + 42), x_name, INK, font(), "mm")
    draw.text((16, 20), y_name, INK, font(), "lm")
    return picture, place


def line_chart(title: str, x_name: str, y_name: str,
               curves: dict[str, list[tuple[float, float, float]]]) -> Image.Image:
    """Curves of points (x, y, spread): y with an error bar of one spread to either side."""
    points = [point for curve in curves.values() for point in curve]
    x_ticks = ticks(min(x for x, _, _ in points), max(x for x, _, _ in points))
    y_ticks = ticks(min(y - spread for _, y, spread in points), max(y + spread for _, y, spread in points))
    picture, place = axes(x_name, y_name, x_ticks, y_ticks)
    draw = ImageDraw.Draw(picture)
    for curve, colour in zip(curves.values(), COLOURS):
        for x, y, spread in curve:
            draw.line((*place(x, y - spread), *place(x, y + spread)), colour, 1)
            draw.circle(place(x, y), 4, colour)
        draw.line([place(x, y) for x, y, _ in curve], colour, 2)
    return add_title(title, legend(list(curves)), picture)


def loss_curves(runs: list[Path]) -> Image.Image:
    """
    The three losses of runs, from their log.csv: smoothed over a twentieth of the run, each step pale behind.

    Losses are on a logarithmic scale; those that are 0 throughout, or not finite, are left out. Raises
    FileNotFoundError or ValueError.
    """
    logs = {run.name: read_csv(run / "log.csv") for run in runs}
    charts = []
    for loss in ("task", "outKD", "featKD"):
        curves = {}
        for name, rows in logs.items():
            points = [(int(row["step"]), float(row[loss])) for row in rows]
            points = [(step, math.log10(value)) for step, value in points if 0 < value < math.inf]
            if points:
                curves[name] = points
        if not curves:
            continue
        points = sum(curves.values(), [])
        picture, place = axes("step", loss,
                              ticks(0, max(step for step, _ in points)),
                              ticks(min(y for _, y in points), max(y for _, y in points)), log=True, height=260)
        draw = ImageDraw.Draw(picture)
        for curve, colour in zip(curves.values(), COLOURS):
            pale = tuple((channel + 2 * 255) // 3 for channel in ImageColor.getrgb(colour))
            draw.line([place(*point) for point in curve], pale, 1)
        for curve, colour in zip(curves.values(), COLOURS):
            window = max(1, len(curve) // 20)
            smooth = [(step, statistics.fmean(y for _, y in curve[max(0, i - window + 1):i + 1]))
                      for i, (step, _) in enumerate(curve)]
            draw.line([place(*point) for point in smooth], colour, 2)
        charts.append(picture)
    if not charts:
        raise ValueError(f"{runs[0] / 'log.csv'} has no losses yet")
    return add_title("Losses, smoothed over a twentieth of the run", legend(list(logs)), *charts)


def bar_chart(title: str, groups: dict[str, list[list[float]]], parts: list[str]) -> Image.Image:
    """Horizontal bars in groups, with their totals; a bar is a list of lengths, one for each of `parts`."""
    thickness, gap = 20, 14
    totals = [float(sum(bar)) for group in groups.values() for bar in group]
    left = 24 + max(map(text_width, groups))
    right = WIDTH - 24 - max(text_width(format_number(total)) for total in totals)
    scale = (right - left) / (max(totals) or 1)
    picture, y = Image.new("RGB", (WIDTH, len(totals) * thickness + (len(groups) + 1) * gap), "white"), gap
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


def draw_table(title: str, header: list[str], cells: list[list[str]]) -> Image.Image:
    """Cells of text, the first column to the left, the others to the right."""
    widths = [math.ceil(max(map(font(15).getlength, column))) + 28 for column in zip(header, *cells)]
    line = 26
    picture = Image.new("RGB", (max(WIDTH, sum(widths) + 16), line * (len(cells) + 1) + 16), "white")
    draw = ImageDraw.Draw(picture)
    for i, row in enumerate([header, *cells]):
        x, y = 8, line * i + line // 2 + 4
        for j, (cell, width) in enumerate(zip(row, widths)):
            at, anchor = (x + 8, "lm") if j == 0 else (x + width - 8, "rm")
            draw.text((at, y), cell, INK, font(15), anchor)
            x += width
    draw.line((8, line + 4, 8 + sum(widths), line + 4), INK)
    return add_title(title, picture)
