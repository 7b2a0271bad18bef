"""The one way an image enters: bytes or a file become an upright 8-bit RGB image, or one sentence says why not.

Colour follows the released model's preprocessing, which is PIL's plain `convert("RGB")`: an alpha channel or a
transparent palette entry is dropped, not composited, and colour profiles are ignored. Limits are read off the header,
before a pixel is decoded. Ordinary JPEG bytes are decoded by simplejpeg, to the same pixels as by Pillow but straight
into an array.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile, get_sampling

from step3vl.data.array_image import ArrayImage, Pixels

MAX_PIXELS = 64 * 2**20
"""Largest image accepted: 64 megapixels, 192 MiB as RGB."""
MAX_ASPECT = 200
"""Long side over short side. A thin strip is later padded to a square, so this also bounds that square: an image is
padded below 32 px of short side, hence to at most 6,200 px a side."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # our own limit is below Pillow's

ORIENTATION = 0x0112
"""EXIF tag that says how the camera was held."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SAMPLINGS = (0, 1, 2)
"""Pillow's numbers of 4:4:4, 4:2:2 and 4:2:0, the chroma samplings of ordinary JPEG files."""


def open_image(source: bytes | Path, where: str, formats: Sequence[str] = FORMATS) -> Image.Image:
    """An RGB image in reading position. The content decides what a file is, never its name.

    Of an animation or a file of several pages the first is taken. EXIF orientation is carried out; where the EXIF block
    cannot be read the image stays as stored. 16-bit grey keeps its high byte, as Pillow does for 16-bit colour.

    Args:
        source: the encoded bytes, or the file that holds them.
        where: names the image in errors.
        formats: Pillow's names of the formats accepted here.

    Raises:
        ValueError: one sentence: there is no such file, it is no image of these formats, it is cut short or damaged, it
            has more than 64 megapixels, or its sides differ by more than a factor of 200.
    """
    try:
        stream = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    except OSError as error:
        raise ValueError(f"{where} cannot be opened: {error.strerror or error}") from None
    with stream:
        try:
            head = stream.read(16)
            stream.seek(0)
        except OSError as error:
            raise ValueError(f"{where} cannot be read: {error.strerror or error}") from None
        if not head:
            raise ValueError(f"{where} cannot be decoded: it has 0 bytes; accepted are {_names(formats)} images")
        try:
            with Image.open(stream, formats=list(formats)) as image:
                check_size(*image.size, where)
                pixels = _plain_jpeg(source, image) if isinstance(source, bytes) else None
                if pixels is not None:
                    return _upright(ArrayImage(pixels), _orientation(image))
                image.load()
                return _upright(_rgb(image, where), _orientation(image))
        except Refused:
            raise
        except Image.UnidentifiedImageError:
            raise ValueError(
                f"{where} cannot be decoded: it begins with {head!r}, which is none of {_names(formats)}"
            ) from None
        except Image.DecompressionBombError:
            raise ValueError(
                f"{where} cannot be decoded: by its header it is far above the limit of {MAX_PIXELS} pixels"
            ) from None
        except Exception as error:  # what a damaged file raises is up to its bytes
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise ValueError(f"{where} cannot be decoded: the file is cut short or damaged ({reason})") from None


def image_size(source: bytes, where: str, formats: Sequence[str] = FORMATS) -> tuple[int, int]:
    """(width, height) of what `open_image` would return, from the header alone. Raises ValueError as it does."""
    try:
        with Image.open(io.BytesIO(source), formats=list(formats)) as image:
            check_size(*image.size, where)
            width, height = image.size
            return (height, width) if _orientation(image) >= 5 else (width, height)  # 5 to 8 lie on their side
    except Refused:
        raise
    except Exception as error:  # what a damaged file raises is up to its bytes
        raise ValueError(f"{where} cannot be decoded: {type(error).__name__} in its header") from None


def check_size(width: int, height: int, where: str) -> None:
    """Raises ValueError with one sentence for an image that is too large or too thin."""
    if width < 1 or height < 1:
        raise Refused(f"{where} cannot be decoded: it has no pixels, its size is {width}x{height}")
    if width * height > MAX_PIXELS:
        raise Refused(f"{where} cannot be decoded: {width}x{height} is above the limit of {MAX_PIXELS} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Refused(
            f"{where} cannot be decoded: {width}x{height} is too thin, its sides may differ by a factor of {MAX_ASPECT}"
        )


class Refused(ValueError):
    """A limit of ours, in a sentence that is already whole."""


def _plain_jpeg(source: bytes, image: Image.Image) -> Pixels | None:
    """Pixels [H,W,3] of a baseline JPEG, colour or grey, of ordinary sampling; None where Pillow has to decide.

    Both decoders are libjpeg-turbo with the same settings. Progressive files (whose number of scans is not bounded),
    CMYK, rare samplings, and whatever makes the strict decoder as much as warn, are left to Pillow.
    """
    if not isinstance(image, JpegImageFile) or image.mode not in ("RGB", "L") or "progressive" in image.info:
        return None
    if image.mode == "RGB" and get_sampling(image) not in SAMPLINGS:
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(source)
        return simplejpeg.decode_jpeg(source, "RGB") if (width, height) == image.size else None
    except ValueError:
        return None


def _rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise Refused(
            f"{where} cannot be decoded: its pixels are {kind} of unknown range; accepted are 8 and 16 bits a channel"
        )
    image.info.pop("transparency", None)  # it is dropped, and Pillow would warn about it
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a damaged EXIF block may raise anything, and the pixels are whole
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _names(formats: Sequence[str]) -> str:
    return ", ".join(formats)
