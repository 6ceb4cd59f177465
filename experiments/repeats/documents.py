"""Documents and screens, drawn: pages of text, tables, charts, slides, windows, and two controls without repeats.

All are drawn at a height and width of their own, with text and lines in proportion, as a scan or a screen of a higher
resolution has them. Fonts are those that come with matplotlib. Nothing of other people is in them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import cache, partial

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

TEXT = (
    "the of and to in that is was for on are as with his they at be this from have or by one had not but what "
    "all were when we there can an your which their said if do will each about how up out them then she many "
    "some so these would other into has more her two like him see time could no make than first been its who "
    "now people my made over did down only way find use may water long little very after words called just "
    "where most know"
)
WORDS = TEXT.split()
Draw = Callable[[np.random.Generator, int, int], Image.Image]


@cache
def font(size: int, family: str = "DejaVu Sans") -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_manager.findfont(family), max(6, size))


def lines(rng: np.random.Generator, width: int, type_: ImageFont.FreeTypeFont) -> str:
    """Words that fill a line."""
    text = ""
    while type_.getlength(longer := f"{text} {WORDS[rng.integers(len(WORDS))]}".strip()) < width:
        text = longer
    return text


def paragraphs(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: tuple[int, int, int, int], size: int, family: str
) -> None:
    """Text from the top of a box to its bottom, a gap after every few lines."""
    left, top, right, bottom = box
    type_, y = font(size, family), top
    while y + size < bottom:
        for _ in range(int(rng.integers(3, 9))):
            if y + size >= bottom:
                return
            draw.text((left, y), lines(rng, right - left, type_), fill="black", font=type_)
            y += round(1.4 * size)
        y += size


def page(rng: np.random.Generator, w: int, h: int, columns: int = 1, share: float = 1.0) -> Image.Image:
    """A page of a book or a paper: margins of a tenth, a title, text in columns, a number below."""
    picture = Image.new("RGB", (w, h), "white")
    draw, margin, size = ImageDraw.Draw(picture), w // 10, h // 75
    draw.text((margin, margin), lines(rng, w // 2, font(2 * size)), fill="black", font=font(2 * size))
    gap = w // 30
    width = (w - 2 * margin - (columns - 1) * gap) // columns
    bottom = round(margin + 4 * size + share * (h - 2 * margin - 4 * size))
    for column in range(columns):
        left = margin + column * (width + gap)
        paragraphs(draw, rng, (left, margin + 4 * size, left + width, bottom), size, "DejaVu Serif")
    draw.text((w // 2, h - margin + size), str(rng.integers(1, 400)), fill="black", font=font(size))
    return picture


def table(rng: np.random.Generator, w: int, h: int) -> Image.Image:
    """A ruled table of names and numbers, every second row shaded."""
    picture = Image.new("RGB", (w, h), "white")
    draw, margin, size = ImageDraw.Draw(picture), w // 16, h // 60
    rows, columns = 22, 6
    height, width = (h - 3 * margin) // rows, (w - 2 * margin) // columns
    draw.text((margin, margin), lines(rng, w // 2, font(round(1.5 * size))), fill="black", font=font(round(1.5 * size)))
    for row in range(rows):
        top = 2 * margin + row * height
        fill = (60, 80, 120) if row == 0 else (238, 242, 248) if row % 2 else "white"
        draw.rectangle((margin, top, margin + columns * width, top + height), fill=fill)
        for column in range(columns):
            left = margin + column * width
            name = WORDS[rng.integers(len(WORDS))] if column == 0 or row == 0 else f"{rng.normal(0, 900):,.2f}"
            ink = "white" if row == 0 else "black"
            draw.text((left + size // 2, top + (height - size) // 2), name, fill=ink, font=font(size))
            draw.line((left, top, left, top + height), fill=(170, 170, 170), width=max(1, size // 12))
        draw.line((margin, top, margin + columns * width, top), fill=(170, 170, 170), width=max(1, size // 12))
    return picture


def chart(rng: np.random.Generator, w: int, h: int, kind: str = "bars") -> Image.Image:
    """Bars or lines, with axes, a grid and a legend, by matplotlib."""
    figure = Figure(figsize=(w / 100, h / 100), dpi=100)
    FigureCanvasAgg(figure)
    scale = math.sqrt(w * h) / 1000
    with matplotlib.rc_context({"font.size": 12 * scale, "lines.linewidth": 2 * scale, "font.family": "DejaVu Sans"}):
        axis = figure.subplots()
        steps = np.arange(12)
        for number in range(3):
            values = np.abs(rng.normal(6, 2, 12)).cumsum() if kind == "lines" else np.abs(rng.normal(6, 2, 12))
            name = WORDS[rng.integers(len(WORDS))]
            if kind == "lines":
                axis.plot(steps, values, marker="o", markersize=5 * scale, label=name)
            else:
                axis.bar(steps + 0.27 * number, values, 0.25, label=name)
        axis.set_title(" ".join(rng.choice(WORDS, 4)))
        axis.set_xlabel(rng.choice(WORDS))
        axis.grid(axis="y", alpha=0.4)
        axis.legend()
        figure.tight_layout()
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    return (
        Image.fromarray(np.ascontiguousarray(pixels)).resize((w, h))
        if pixels.shape[:2] != (h, w)
        else Image.fromarray(np.ascontiguousarray(pixels))
    )


def slide(rng: np.random.Generator, w: int, h: int) -> Image.Image:
    """A title on a coloured band, and a few lines."""
    picture = Image.new("RGB", (w, h), (250, 250, 252))
    draw, size = ImageDraw.Draw(picture), h // 22
    draw.rectangle((0, 0, w, h // 6), fill=(20, 60, 110))
    draw.text((w // 20, h // 20), lines(rng, w // 2, font(2 * size)), fill="white", font=font(round(1.5 * size)))
    for number in range(5):
        y = h // 4 + number * h // 8
        draw.ellipse((w // 20, y + size // 3, w // 20 + size // 2, y + 5 * size // 6), fill=(20, 60, 110))
        draw.text((w // 10, y), lines(rng, int(w * rng.uniform(0.3, 0.75)), font(size)), fill="black", font=font(size))
    return picture


def window(rng: np.random.Generator, w: int, h: int) -> Image.Image:
    """A mail program: a bar with buttons, folders, a list, and a message."""
    picture = Image.new("RGB", (w, h), "white")
    draw, size = ImageDraw.Draw(picture), h // 60
    draw.rectangle((0, 0, w, 3 * size), fill=(236, 238, 241))
    for number in range(8):
        left = 2 * size + number * 8 * size
        box = (left, size // 2, left + 6 * size, 5 * size // 2)
        draw.rounded_rectangle(box, size // 3, fill="white", outline=(190, 195, 200))
        draw.text((left + size // 2, size), WORDS[rng.integers(len(WORDS))], fill=(40, 40, 40), font=font(size))
    draw.rectangle((0, 3 * size, w // 6, h), fill=(247, 248, 250))
    for number in range(14):
        y = 5 * size + number * 2 * size
        draw.text((size, y), WORDS[rng.integers(len(WORDS))], fill=(60, 60, 60), font=font(size))
    middle = w // 6 + w // 4
    for number in range(int((h - 3 * size) / (5 * size))):
        y = 3 * size + number * 5 * size
        if number == 2:
            draw.rectangle((w // 6, y, middle, y + 5 * size), fill=(214, 230, 252))
        for line, ink in ((0, "black"), (1, (110, 110, 110))):
            text = lines(rng, w // 4 - 3 * size, font(size))
            draw.text((w // 6 + size, y + size + line * round(1.5 * size)), text, fill=ink, font=font(size))
        draw.line((w // 6, y, middle, y), fill=(225, 228, 232))
    paragraphs(draw, rng, (middle + 2 * size, 8 * size, w - 2 * size, round(h * 0.55)), size, "DejaVu Sans")
    return picture


def editor(rng: np.random.Generator, w: int, h: int) -> Image.Image:
    """Program text on a dark ground, with line numbers and a bar on the left."""
    picture = Image.new("RGB", (w, h), (30, 30, 36))
    draw, size = ImageDraw.Draw(picture), h // 60
    type_ = font(size, "DejaVu Sans Mono")
    draw.rectangle((0, 0, w // 7, h), fill=(37, 37, 44))
    for number in range(20):
        draw.text(
            (size, 2 * size + number * 2 * size), f"{rng.choice(WORDS)}.py", fill=(200, 200, 200), font=font(size)
        )
    indent = 0
    for number in range(int(h / (1.5 * size))):
        y = number * round(1.5 * size)
        draw.text((w // 7 + size, y), f"{number + 1:>3}", fill=(110, 110, 120), font=type_)
        if rng.random() < 0.15:
            continue
        indent = int(np.clip(indent + rng.integers(-1, 2), 0, 4))
        x = w // 7 + 4 * size + indent * 2 * size
        for _ in range(int(rng.integers(2, 7))):
            word = f"{rng.choice(WORDS)}{rng.choice(['(', ')', ' =', ':', '.', ''])} "
            ink = [(220, 220, 220), (130, 180, 250), (230, 160, 110), (150, 210, 140)][rng.integers(4)]
            draw.text((x, y), word, fill=ink, font=type_)
            x += round(type_.getlength(word))
    return picture


def scan(rng: np.random.Generator, w: int, h: int) -> Image.Image:
    """A page through a scanner: turned by half a degree, and with noise in every pixel."""
    turned = page(rng, w, h).rotate(0.5, Image.Resampling.BICUBIC, fillcolor="white")
    noisy = np.asarray(turned).astype(np.float32) * 0.97 + rng.normal(0, 2.5, (h, w, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def photo(rng: np.random.Generator, w: int, h: int) -> Image.Image:
    """Noise whose strength falls with the frequency, as in photographs."""
    fy, fx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None]
    falling = 1 / np.maximum(np.hypot(fy, fx), 1 / max(w, h))
    planes = []
    for _ in range(3):
        phase = np.exp(2j * np.pi * rng.random((h, w // 2 + 1)))
        plane = np.fft.irfft2(falling * phase, (h, w))
        planes.append((plane - plane.min()) / (plane.max() - plane.min()))
    return Image.fromarray((255 * np.stack(planes, -1)).astype(np.uint8))


TALL, WIDE = 1 / math.sqrt(2), 16 / 9
KINDS: dict[str, tuple[Draw, float]] = {
    "page, one column": (page, TALL),
    "page, two columns": (partial(page, columns=2), TALL),
    "letter, a third full": (partial(page, share=0.3), TALL),
    "table": (table, TALL),
    "chart, bars": (chart, 4 / 3),
    "chart, lines": (partial(chart, kind="lines"), 4 / 3),
    "slide": (slide, WIDE),
    "screen, mail": (window, WIDE),
    "screen, editor": (editor, WIDE),
    "scan of a page": (scan, TALL),
    "photograph": (photo, 4 / 3),
}
"""Kind -> how it is drawn, and its width by its height."""


def draw(kind: str, megapixels: float, seed: int, quality: int | None = None) -> Image.Image:
    """One picture; with `quality`, through JPEG."""
    make, ratio = KINDS[kind]
    height = round(math.sqrt(1e6 * megapixels / ratio))
    picture = make(np.random.default_rng(seed), round(height * ratio), height)
    if quality is None:
        return picture
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")
