"""Images: bombs, lies in headers, containers that run programs elsewhere."""

import io
import struct
import zlib

from PIL import Image, PngImagePlugin

from step3vl.data.decode import open_image


def of(data):
    return lambda folder: lambda: open_image(data() if callable(data) else data, "the image")


def encoded(kind, size=(64, 64), mode="RGB", **options):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, *more):
    """A PNG that claims a size; `more` are (name, data) chunks."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        *more,
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def text_bomb():
    return png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26))))


def gif(num):
    buffer = io.BytesIO()
    frames = [Image.new("P", (8, 8), k % 256) for k in range(num)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def tiff_loop():
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + struct.pack("<HHII", 256, 3, 1, 8) + struct.pack("<I", 8)


JPEG = encoded("JPEG")
CASES = {
    "png of 13,000 x 13,000": of(lambda: encoded("PNG", (13_000, 13_000), "1")),
    "png that claims 30,000 x 30,000": of(png(30_000, 30_000)),
    "png that claims 2**31": of(png(2**31 - 1, 2**31 - 1)),
    "png without pixels": of(png(8, 8)),
    "png of nothing": of(png(0, 0)),
    "png with a text of 64 MB": of(text_bomb),
    "png with 10,000 texts": of(lambda: png(8, 8, *[(b"tEXt", b"a\0b")] * 10_000)),
    "a strip of 1 x 100,000": of(lambda: encoded("PNG", (1, 100_000), "L")),
    "jpeg cut in half": of(JPEG[: len(JPEG) // 2]),
    "jpeg that claims 65,535": of(JPEG.replace(struct.pack(">HH", 64, 64), b"\xff\xff\xff\xff", 1)),
    "jpeg with 60 kB of EXIF": of(lambda: encoded("JPEG", exif=b"Exif\0\0" + b"II*\0" + bytes(60_000))),
    "jpeg of noise": of(b"\xff\xd8\xff" + bytes(range(256)) * 200),
    "gif of 5,000 frames": of(lambda: gif(5_000)),
    "tiff that points to itself": of(tiff_loop()),
    "bmp of negative height": of(encoded("BMP")[:22] + struct.pack("<i", -(2**31)) + encoded("BMP")[26:]),
    "webp of noise": of(b"RIFF\xff\xff\xff\x7fWEBPVP8 " + bytes(1000)),
    "postscript": of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(../../owned) (w) file closefile\n"),
    "pdf": of(b"%PDF-1.4\n1 0 obj<<>>endobj"),
    "svg": of(b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
    "xml with a billion laughs": of(b'<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><a>&c;</a>'),
    "a zip": of(b"PK\x03\x04" + bytes(100)),
    "empty": of(b""),
    "one byte": of(b"\x89"),
    "text chunk with a name of nothing": of(png(8, 8, (b"iTXt", b""))),
    "png in png": of(lambda: encoded("PNG", pnginfo=_info(encoded("PNG")))),
    "a file that is a folder": lambda folder: lambda: open_image(folder, "the image"),
    "a file that is a device": lambda folder: lambda: open_image(__import__("pathlib").Path("/dev/null"), "the image"),
}


def _info(data):
    info = PngImagePlugin.PngInfo()
    info.add_text("a", data.decode("latin1"))
    return info
