"""Every odd image becomes upright RGB as stated, and every bad one a sentence."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from step3vl.data.array_image import ArrayImage
from step3vl.data.decode import FORMATS, MAX_ASPECT, MAX_PIXELS, TURNS, check_size, open_image
from step3vl.data.images import plan
from step3vl.data.shards import FORMATS as SHARD_FORMATS
from step3vl.types import MultiCrop
from tests.data.released_views import jpeg, landscape, page

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)
GREYS = RNG.integers(0, 256, (12, 20), dtype=np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG by hand; `rows` are the raw samples, each row with its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pixels(source: bytes) -> np.ndarray:
    image = open_image(source, "x")
    assert image.mode == "RGB"
    return np.asarray(image)


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_by_its_content(format, tmp_path):
    options = {"quality": 95} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    smooth = np.add.outer(np.arange(12) * 8, np.arange(20) * 6).astype(np.uint8)
    path = tmp_path / "named.txt"  # a name says nothing
    path.write_bytes(encoded(Image.fromarray(three(smooth)), format, **options))
    for source in (path, path.read_bytes()):
        image = open_image(source, "x")
        assert image.mode == "RGB" and image.size == (20, 12)
        assert np.abs(np.asarray(image).astype(int) - three(smooth)).max() <= (4 if format == "JPEG" else 0)


def test_grey_and_bits():
    assert np.array_equal(pixels(encoded(Image.fromarray(GREYS))), three(GREYS))
    bits = GREYS > 127
    assert np.array_equal(pixels(encoded(Image.fromarray(bits))), three(bits * np.uint8(255)))


def test_alpha_is_dropped_not_composited():
    alpha = RNG.integers(0, 256, (12, 20), dtype=np.uint8)
    rgba = Image.fromarray(np.dstack([COLOURS, alpha]), "RGBA")
    grey_alpha = Image.fromarray(np.dstack([GREYS, alpha]), "LA")
    assert np.array_equal(pixels(encoded(rgba)), COLOURS)
    assert np.array_equal(pixels(encoded(grey_alpha)), three(GREYS))
    assert np.array_equal(pixels(encoded(rgba, "TIFF")), COLOURS)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(0, 160, 10))])
@pytest.mark.filterwarnings("error")
def test_palettes_with_and_without_transparency(transparency):
    numbers = RNG.integers(0, 16, (12, 20), dtype=np.uint8)
    palette = RNG.integers(0, 256, (16, 3), dtype=np.uint8)
    image = Image.fromarray(numbers, "P")
    image.putpalette(palette.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    assert np.array_equal(pixels(encoded(image, **options)), palette[numbers])


def test_cmyk_is_subtractive():
    cmyk = RNG.integers(0, 256, (12, 20, 4), dtype=np.uint8)
    ink = 255 - cmyk.astype(int)
    expected = ink[..., :3] * ink[..., 3:] / 255
    found = pixels(encoded(Image.fromarray(cmyk, "CMYK"), "TIFF"))
    assert np.abs(found - expected).max() <= 1
    plain = Image.fromarray(np.full((16, 16, 4), [0, 255, 255, 0], np.uint8), "CMYK")
    red = pixels(encoded(plain, "JPEG", quality=95))
    assert np.abs(red.astype(int) - [255, 0, 0]).max() <= 4


def test_16_bits_are_scaled_not_clipped():
    deep = RNG.integers(0, 65536, (12, 20)).astype(np.uint16)
    deep[0, :3] = 0, 257, 65535
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    grey = pixels(png(20, 12, 16, 0, rows))
    assert np.array_equal(grey, three((deep >> 8).astype(np.uint8)))
    assert grey[0, :3, 0].tolist() == [0, 1, 255]
    colour = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in deep)
    assert np.array_equal(pixels(png(20, 12, 16, 2, colour)), grey)  # grey stored as colour is the same picture
    assert np.array_equal(pixels(encoded(Image.fromarray(deep), "TIFF")), grey)


@pytest.mark.parametrize("array", [np.zeros((4, 4), np.int32), np.zeros((4, 4), np.float32)])
def test_pixels_of_unknown_range_are_refused(array):
    with pytest.raises(
        ValueError, match=r"^x cannot be decoded: its pixels are .* of unknown range; accepted are 8 and"
    ):
        open_image(encoded(Image.fromarray(array), "TIFF"), "x")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_carried_out(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(COLOURS), format, exif=exif)
    stored = Image.open(io.BytesIO(data))
    expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    assert expected.shape[:2] == ((20, 12) if orientation > 4 else (12, 20))
    assert np.array_equal(pixels(data), expected)


def test_a_photo_held_upright():
    """Orientation 6: the camera was turned, so the stored top row is the right column of the picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(COLOURS)
    assert np.array_equal(pixels(encoded(stored, exif=exif))[:, -1], COLOURS[0])
    assert set(TURNS) == set(range(2, 9))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0junk" * 9])
def test_a_damaged_exif_block_leaves_the_image_as_stored(block):
    assert np.array_equal(pixels(encoded(Image.fromarray(COLOURS), exif=block)), COLOURS)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_frame_of_many(format):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (pixels(data) == [255, 0, 0]).all()


def test_colour_profiles_are_ignored():
    profile = zlib.compress(b"not a profile at all")
    plain = encoded(Image.fromarray(COLOURS))
    tagged = encoded(Image.fromarray(COLOURS), icc_profile=profile)
    assert tagged != plain and np.array_equal(pixels(tagged), pixels(plain))


# ------------------------------------------------------------------------------------------------ ordinary JPEGs


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0", "grey", "RGB", "restarts"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (8, 8), (17, 33), (31, 16), (301, 203)])
def test_both_decoders_give_the_same_pixels(sampling, size):
    noise = Image.fromarray(RNG.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    for image in (noise, landscape(*size), page(*size)):
        for quality in (30, 75, 95):
            match sampling:
                case "grey":
                    data = jpeg(image.convert("L"), quality=quality)
                case "RGB":
                    data = jpeg(image, quality=quality, keep_rgb=True)
                case "restarts":
                    data = jpeg(image, quality=quality, restart_marker_blocks=2)
                case _:
                    data = jpeg(image, quality=quality, subsampling=sampling)
            found = open_image(data, "x")
            assert isinstance(found, ArrayImage) and found.pixels is not None
            assert np.array_equal(found.pixels, by_pillow(data))


def test_rare_jpegs_are_left_to_pillow(tmp_path):
    image = landscape(64, 48)
    array = np.asarray(image)
    plain = jpeg(image)
    rare = [jpeg(image, progressive=True), jpeg(image.convert("CMYK"))]
    rare += [simplejpeg.encode_jpeg(array, colorsubsampling=sampling) for sampling in ("440", "411")]
    rare += [plain[:300] + b"\0\0" + plain[300:]]  # a warning to the strict decoder
    for data in rare:
        found = open_image(data, "x")
        assert not isinstance(found, ArrayImage)
        assert np.array_equal(found, by_pillow(data))
    (tmp_path / "a").write_bytes(plain)
    assert np.array_equal(open_image(tmp_path / "a", "x"), open_image(plain, "x"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_jpegs_have_the_outcome_they_have_with_pillow(monkeypatch):
    def outcome(data: bytes) -> bytes | str:
        try:
            return open_image(data, "x").tobytes()
        except ValueError as error:
            return str(error)

    whole = jpeg(landscape(40, 24), quality=50)
    damaged = [whole[:n] for n in range(0, len(whole), 9)]
    for place in range(0, len(whole), 3):
        for mask in (0xFF, 0x01, 0x10):
            bad = bytearray(whole)
            bad[place] ^= mask
            damaged.append(bytes(bad))
    ours = [outcome(data) for data in damaged]
    monkeypatch.setattr("step3vl.data.decode._plain_jpeg", lambda source, image: None)
    theirs = [outcome(data) for data in damaged]
    assert ours == theirs
    assert 50 < sum(isinstance(found, str) for found in ours) < len(ours) - 50


def test_an_oversized_jpeg_is_refused_by_its_header(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels were decoded"))
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *_: pytest.fail("pixels were decoded"))
    data = bytearray(jpeg(Image.new("RGB", (16, 16))))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 9000, 9000)
    refusal(bytes(data), "9000x9000 is above the limit of 67108864 pixels")
    data[at : at + 4] = struct.pack(">HH", 4, 4000)
    refusal(bytes(data), "4000x4 is too thin")


# ------------------------------------------------------------------------------------------------ what is refused


def refusal(source, *words: str, formats=FORMATS) -> str:
    with pytest.raises(ValueError) as error:
        open_image(source, "folder/name.png", formats)
    message = str(error.value)
    assert message.startswith("folder/name.png ") and "\n" not in message and len(message) < 300
    assert all(word in message for word in words), message
    assert error.value.__cause__ is None
    return message


def test_files_that_are_not_images(tmp_path):
    text = tmp_path / "name.png"
    text.write_text("hello, this is a text")
    refusal(text, "cannot be decoded", "hello, this is", *FORMATS)
    text.write_bytes(b"")
    refusal(text, "0 bytes", *FORMATS)
    refusal(b"", "0 bytes")
    refusal(tmp_path / "nowhere.png", "cannot be opened", "No such file")
    refusal(tmp_path, "cannot be opened", "directory")
    refusal(b"%PDF-1.7 and so on", "%PDF-1.7", "none of PNG")
    refusal(encoded(Image.new("RGB", (16, 16)), "ICO"), "none of PNG")
    refusal(encoded(Image.new("RGB", (4, 4)), "PPM"), "none of PNG")


def test_only_the_formats_asked_for():
    jpeg = encoded(Image.new("RGB", (4, 4)), "JPEG")
    refusal(jpeg, "none of PNG", formats=("PNG",))
    assert open_image(jpeg, "x", ("JPEG",)).size == (4, 4)
    assert set(SHARD_FORMATS.values()) <= set(FORMATS)


@pytest.mark.parametrize("format", FORMATS)
def test_files_cut_short(format):
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = encoded(noise, format)
    assert open_image(whole, "x").size == (64, 64)
    for kept in (0.7, 0.4, 0.1):
        refusal(whole[: int(kept * len(whole))], "cannot be decoded")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_flipped_byte_is_an_image_or_a_sentence():
    noise = Image.fromarray(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for format in FORMATS:
        whole = encoded(noise, format)
        for place in range(0, len(whole), max(1, len(whole) // 60)):
            bad = bytearray(whole)
            bad[place] ^= 0xFF
            try:
                assert open_image(bytes(bad), "x").mode == "RGB"
            except ValueError as error:
                assert str(error).startswith("x cannot be decoded")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(8193, 8192), (13000, 13000), (60000, 60000)])
def test_a_bomb_is_refused_by_its_header(width, height, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels were decoded"))
    message = refusal(png(width, height, 8, 2, b""), "above the limit of 67108864 pixels")
    assert f"{width}x{height}" in message or width == 60000  # Pillow itself stops there


def test_the_size_limits():
    assert MAX_PIXELS == 8192 * 8192
    check_size(8192, 8192, "x")
    check_size(200, 1, "x")
    check_size(31, 6200, "x")
    strip = refusal(encoded(Image.new("L", (1, 20000))), "1x20000", "too thin", "factor of 200")
    assert strip == refusal(encoded(Image.new("L", (1, 20000)), "TIFF"))
    with pytest.raises(ValueError, match="x cannot be decoded: 201x1 is too thin"):
        check_size(201, 1, "x")


def test_no_accepted_image_is_padded_beyond_the_pixel_limit():
    layout = MultiCrop()
    thinnest = layout.min_side - 1, (layout.min_side - 1) * MAX_ASPECT
    crops = plan(*thinnest, layout)
    assert crops.square_pad and max(thinnest) ** 2 <= MAX_PIXELS
