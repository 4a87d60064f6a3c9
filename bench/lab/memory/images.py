"""``python -m llava_edge.bench.lab.memory.images``: host memory of decoding, beside the plan.

Every kind of image file (format, mode, transparency, EXIF orientation, progressive or interlaced,
animated) and every mode of an image in memory becomes RGB in a process of its own; the growth of
its peak is compared with what the runtime asks for and with what a plan reserves.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_edge.profiles.memory.buffers import image_conversion_bytes, image_decoding_bytes
from llava_edge.runtime.util.image_formats import READABLE_FORMATS

_MIB = 1 << 20
_CODE = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
from llava_edge.runtime.processing.images.loading import convert_to_rgb, open_image
from llava_edge.runtime.util.limits import Limits
limits = Limits(max_image_pixels=1 << 28, max_image_bytes=1 << 30, image_formats=%r)
path, kind, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
open_image(path.with_name("small"), limits)
if kind == "memory":
    width, height = map(int, path.read_text().split("x"))
    source = Image.new(mode, (width, height), 0 if len(mode) < 2 else None)
elif kind == "array":
    width, height = map(int, path.read_text().split("x"))
    dtype, _, channels = mode.partition(" ")
    source = np.ones((height, width, *map(int, channels.split())), dtype)
else:
    source = path
def status(name):
    text = Path("/proc/self/status").read_text()
    return int(text.split(name + ":")[1].split()[0]) * 1024
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
image = open_image(source, limits)
assert image.mode == "RGB"
print(status("VmHWM") - before)
"""


@dataclass(frozen=True)
class ImageCase:
    """One kind of image.

    Attributes:
        name: for the table.
        format: of the file; "memory" for a Pillow image, "array" for one of numpy.
        mode: that Pillow opens it in; of an array its type and channels.
        save: options of ``Image.save``.
        frames: of an animation.
    """

    name: str
    format: str
    mode: str
    save: tuple[tuple[str, Any], ...] = ()
    frames: int = 1


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def image_cases() -> Iterator[ImageCase]:
    """All kinds, files first."""
    rotated = (("exif", _exif()),)
    for mode in ("L", "RGB", "CMYK"):
        for progressive in (False, True):
            for exif in ((), rotated):
                name = f"JPEG {mode}{' progressive' * progressive}{' EXIF' * bool(exif)}"
                save = (("quality", 90), ("progressive", progressive), *exif)
                yield ImageCase(name, "JPEG", mode, save)
    full = (("quality", 95), ("subsampling", 0), ("progressive", True))
    yield ImageCase("JPEG RGB 4:4:4 progressive EXIF", "JPEG", "RGB", full + rotated)
    clear: dict[str, Any] = {"1": 0, "L": 7, "P": 3, "RGB": (1, 2, 3), "I;16": 500}
    fast = (("compress_level", 1),)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        for exif in ((), rotated):
            yield ImageCase(f"PNG {mode}{' EXIF' * bool(exif)}", "PNG", mode, fast + exif)
            if mode in clear:
                save = (*fast, ("transparency", clear[mode]), *exif)
                yield ImageCase(f"PNG {mode} tRNS{' EXIF' * bool(exif)}", "PNG", mode, save)
    every = (*fast, ("transparency", bytes(range(256))), *rotated)
    yield ImageCase("PNG P tRNS bytes EXIF", "PNG", "P", every)
    yield ImageCase("PNG RGB animated", "PNG", "RGB", (*fast, ("save_all", True)), 3)
    yield ImageCase("GIF P", "GIF", "P")
    yield ImageCase("GIF P transparent", "GIF", "P", (("transparency", 3),))
    yield ImageCase("GIF P animated", "GIF", "P", (("save_all", True), ("transparency", 3)), 3)
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        yield ImageCase(f"BMP {mode}", "BMP", mode)
    quick = (("method", 0), ("quality", 60))
    for mode in ("RGB", "RGBA"):
        for exif in ((), rotated):
            yield ImageCase(f"WEBP {mode}{' EXIF' * bool(exif)}", "WEBP", mode, quick + exif)
        lossless = (("method", 0), ("lossless", True), *rotated)
        yield ImageCase(f"WEBP {mode} lossless EXIF", "WEBP", mode, lossless)
    yield ImageCase("WEBP RGB animated", "WEBP", "RGB", (*quick, ("save_all", True)), 3)
    speed = (("speed", 10), ("quality", 60))
    for mode in ("L", "RGB", "RGBA"):
        yield ImageCase(f"AVIF {mode} EXIF", "AVIF", mode, speed + rotated)
    yield ImageCase("AVIF RGB 4:4:4", "AVIF", "RGB", (*speed, ("subsampling", "4:4:4")))
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "LAB", "YCbCr", "I;16", "I", "F"):
        for exif in ((), rotated):
            yield ImageCase(f"TIFF {mode}{' EXIF' * bool(exif)}", "TIFF", mode, exif)
    packed = (("compression", "tiff_adobe_deflate"),)
    for mode in ("RGB", "CMYK", "I;16"):
        yield ImageCase(f"TIFF {mode} deflate EXIF", "TIFF", mode, packed + rotated)
    for mode in ("1", "L", "LA", "P", "PA", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"):
        yield ImageCase(f"memory {mode}", "memory", mode)
    for mode in ("I;16", "I", "F"):
        yield ImageCase(f"memory {mode}", "memory", mode)
    for mode in ("bool", "uint8", "uint8 3", "uint8 4", "uint16 3", "float32 3", "float64 4"):
        yield ImageCase(f"array {mode}", "array", mode)


def encoded(case: ImageCase, height: int, width: int) -> bytes:
    """A file of that kind with as much detail as a photo has, and some noise."""
    image = _picture(case.mode, height, width)
    options = dict(case.save)
    if case.frames > 1:
        options["append_images"] = [_picture(case.mode, height, width)] * (case.frames - 1)
    file = io.BytesIO()
    image.save(file, case.format, **options)
    return file.getvalue()


def _picture(mode: str, height: int, width: int) -> Image.Image:
    draw = np.random.default_rng(7)
    block = draw.integers(0, 256, (256, 256, 3), np.uint8)
    soft = np.asarray(Image.fromarray(block).resize((64, 64)).resize((256, 256)))
    tile = (soft // 8 * 8 + block // 32).astype(np.uint8)
    repeats = (math.ceil(height / 256), math.ceil(width / 256), 1)
    pixels = np.tile(tile, repeats)[:height, :width]
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
    if mode == "P":
        return Image.fromarray(np.ascontiguousarray(pixels[..., 0])).convert("P")
    image = Image.fromarray(pixels)
    if mode == "LAB":
        return Image.merge("LAB", image.split())
    return image.convert(mode)


def measure(case: ImageCase, height: int, width: int, folder: Path) -> int:
    """Bytes by which the peak of a fresh process grows while the image becomes RGB.

    An image in memory is there already; a file's content counts.
    """
    path = folder / "image"
    in_memory = case.format in ("memory", "array")
    if in_memory:
        path.write_text(f"{width}x{height}", "ascii")
    else:
        path.write_bytes(encoded(case, height, width))
    small = ImageCase("small", "PNG", "P", (("transparency", 3),))
    (folder / "small").write_bytes(encoded(small, 64, 64))
    code = _CODE % (READABLE_FORMATS,)
    kind = case.format if in_memory else "file"
    command = [sys.executable, "-c", code, str(path), kind, case.mode]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    path.unlink()
    if done.returncode:
        raise RuntimeError(f"{case.name}: {done.stderr.strip()[-500:]}")
    return int(done.stdout)


def asked_bytes(case: ImageCase, num_pixels: int) -> int:
    """What the runtime asks of the system for it."""
    if case.format in ("memory", "array"):
        return image_conversion_bytes(num_pixels)
    return image_decoding_bytes(
        num_pixels,
        case.format,
        bands=len(Image.new(case.mode, (1, 1), None).getbands()),
        is_progressive=dict(case.save).get("progressive", False),
    )


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and say whether all is within what is asked."""
    parser = argparse.ArgumentParser(description="Host memory of decoding images.")
    parser.add_argument("--megapixels", type=float, nargs="+", default=[24.0])
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    rows, over = [], 0
    print(
        "| case | MP | measured MiB | bytes a pixel | asked MiB |\n|---|---|---|---|---|",
        file=sys.stderr,
    )
    with tempfile.TemporaryDirectory() as name:
        for megapixels in options.megapixels:
            height = int(math.sqrt(megapixels * 1e6 * 2 / 3))
            width = height * 3 // 2
            for case in image_cases():
                if not case.name.startswith(options.only):
                    continue
                found = measure(case, height, width, Path(name))
                asked = asked_bytes(case, height * width)
                over += found > asked
                rows.append(
                    {
                        "case": case.name,
                        "pixels": height * width,
                        "measured_bytes": found,
                        "asked_bytes": asked,
                    }
                )
                print(
                    f"| {case.name} | {megapixels:g} | {found / _MIB:.0f} | "
                    f"{found / (height * width):.2f} | {asked / _MIB:.0f}"
                    f"{' EXCEEDED' if found > asked else ''} |",
                    file=sys.stderr,
                    flush=True,
                )
    if options.json:
        print(json.dumps({"rows": rows, "exceeded": over}))
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
