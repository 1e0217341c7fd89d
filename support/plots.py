"""
Pictures of pictures and of numbers, drawn with Pillow: sheets of images, line and bar charts, tables.

What draws returns an RGB image; sizes are in pixels. `show` prints a table and returns its cells.
"""

import math
from functools import cache

from PIL import Image, ImageDraw, ImageFont

INK, PALE = "#222222", "#dddddd"
COLOURS = [  # Okabe and Ito
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#7f7f7f"]
WIDTH = 960  # of a chart: sharp at a README's width


@cache
def font(size: int = 16) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def text_width(text: str, size: int = 16) -> int:
    return math.ceil(font(size).getlength(text))


def shown(value: object) -> str:
    """A number as people read it; nan is nothing."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def image_grid(rows: list[list[Image.Image | None]], names: list[str] | None = None,
          columns: list[str] | None = None) -> Image.Image:
    """Images of one size side by side, with the names of rows and columns if there are any; None is a gap."""
    width, height = next(image for row in rows for image in row if image).size
    size = 16 if width >= 96 else 12
    left = 16 + max(text_width(name, size) for name in names) if names else 0
    top = size + 12 if columns else 0
    picture = Image.new("RGB", (left + width * max(map(len, rows)), top + height * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            if image:
                picture.paste(image, (left + x * width, top + y * height))
    for y, name in enumerate(names or []):
        draw.text((left // 2, top + y * height + height // 2), name, INK, font(size), "mm")
    for x, name in enumerate(columns or []):
        draw.text((left + x * width + width // 2, top // 2), name, INK, font(size), "mm")
    return picture


def stack(*images: Image.Image, gap: int = 12) -> Image.Image:
    """Images below each other."""
    picture = Image.new("RGB", (max(image.width for image in images),
                                sum(image.height for image in images) + gap * (len(images) - 1)), "white")
    y = 0
    for image in images:
        picture.paste(image, (0, y))
        y += image.height + gap
    return picture


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers that reach from `low` or below to `high` or above."""
    step = 10 ** math.floor(math.log10((high - low) / count or 1.0))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [round(step * i, 10) for i in range(first, last + 1)]


def legend(names: list[str]) -> Image.Image:
    """A row of the colours of a chart, each with its name."""
    width = max(WIDTH, 72 + sum(46 + text_width(name) for name in names))
    picture = Image.new("RGB", (width, 32), "white")
    draw, x = ImageDraw.Draw(picture), 72
    for name, colour in zip(names, COLOURS):
        draw.rectangle((x, 10, x + 14, 24), colour)
        draw.text((x + 22, 17), name, INK, font(), "lm")
        x += 46 + text_width(name)
    return picture


def titled(title: str, *parts: Image.Image) -> Image.Image:
    """Images below a title and each other."""
    head = Image.new("RGB", (max(WIDTH, text_width(title, 18) + 32), 40), "white")
    ImageDraw.Draw(head).text((16, 22), title, INK, font(18), "lm")
    return stack(head, *parts, gap=0)


def lines(title: str, x_name: str, y_name: str,
          curves: dict[str, list[tuple[float, float, float]]]) -> Image.Image:
    """Curves of points (x, y, spread): y with a bar of one spread to either side."""
    points = [point for curve in curves.values() for point in curve]
    across = ticks(min(x for x, _, _ in points), max(x for x, _, _ in points))
    up = ticks(min(y - spread for _, y, spread in points), max(y + spread for _, y, spread in points))
    left, right, top, bottom = 72, WIDTH - 24, 44, 420
    picture = Image.new("RGB", (WIDTH, bottom + 64), "white")
    draw = ImageDraw.Draw(picture)
    place = lambda x, y: (left + (right - left) * (x - across[0]) / (across[-1] - across[0]),
                          bottom - (bottom - top) * (y - up[0]) / (up[-1] - up[0]))
    for value in up:
        draw.line((*place(across[0], value), *place(across[-1], value)), PALE)
        draw.text((left - 8, place(across[0], value)[1]), f"{value:g}", INK, font(14), "rm")
    for value in across:
        draw.text((place(value, up[0])[0], bottom + 14), f"{value:g}", INK, font(14), "mm")
    draw.line((left, bottom, right, bottom), INK)
    draw.text(((left + right) // 2, bottom + 42), x_name, INK, font(), "mm")
    draw.text((16, 20), y_name, INK, font(), "lm")
    for curve, colour in zip(curves.values(), COLOURS):
        for x, y, spread in curve:
            if spread:
                draw.line((*place(x, y - spread), *place(x, y + spread)), colour, 1)
            (px, py) = place(x, y)
            draw.ellipse((px - 4, py - 4, px + 4, py + 4), colour)
        draw.line([place(x, y) for x, y, _ in curve], colour, 2)
    return titled(title, legend(list(curves)), picture)


def bars(title: str, groups: dict[str, list[list[float]]], kinds: list[str]) -> Image.Image:
    """Horizontal bars in groups, with their totals; a bar is a list of parts, one for each of `kinds`."""
    thick, gap = 20, 14
    count = sum(len(group) for group in groups.values())
    left = 24 + max(map(text_width, groups))
    right = WIDTH - 24 - max(text_width(shown(float(sum(bar)))) for group in groups.values() for bar in group)
    picture = Image.new("RGB", (WIDTH, count * thick + (len(groups) + 1) * gap), "white")
    draw = ImageDraw.Draw(picture)
    scale = (right - left) / (max(sum(bar) for group in groups.values() for bar in group) or 1)
    y = gap
    for name, group in groups.items():
        draw.text((left - 10, y + len(group) * thick / 2), name, INK, font(), "rm")
        for bar in group:
            x = left
            for part, colour in zip(bar, COLOURS):
                draw.rectangle((x, y + 2, x + part * scale, y + thick - 2), colour)
                x += part * scale
            draw.text((x + 8, y + thick / 2), shown(float(sum(bar))), INK, font(14), "lm")
            y += thick
        y += gap
    return titled(title, legend(kinds), picture)


def table(title: str, header: list[str], rows: list[list[str]]) -> Image.Image:
    """Cells as text, the first column to the left, the others to the right."""
    widths = [max(text_width(str(row[i]), 15) for row in [header, *rows]) + 28 for i in range(len(header))]
    line = 26
    picture = Image.new("RGB", (max(WIDTH, sum(widths) + 16), line * (len(rows) + 1) + 16), "white")
    draw = ImageDraw.Draw(picture)
    for i, row in enumerate([header, *rows]):
        x, y = 8, line * i + line // 2 + 4
        for j, (cell, width) in enumerate(zip(row, widths)):
            at, anchor = (x + 8, "lm") if j == 0 else (x + width - 8, "rm")
            draw.text((at, y), str(cell), INK, font(15), anchor)
            x += width
        if i == 0:
            draw.line((8, line + 4, 8 + sum(widths), line + 4), INK)
    return titled(title, picture)


def show(header: list[str], rows: list[list]) -> list[list[str]]:
    """Prints a table, and returns its cells as text."""
    cells = [[shown(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    for first, *rest in [header, *cells]:
        print(first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:])), sep="  ")
    return cells


def paragraph(texts: list[str]) -> Image.Image:
    """Lines of text."""
    width = max(WIDTH, *(text_width(line, 15) + 32 for line in texts))
    picture = Image.new("RGB", (width, 24 * len(texts) + 8), "white")
    for i, line in enumerate(texts):
        ImageDraw.Draw(picture).text((16, 24 * i + 12), line, INK, font(15), "lm")
    return picture
