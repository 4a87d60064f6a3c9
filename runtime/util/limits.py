"""Limits: how much of what comes from outside is taken in, checked before work is done on it.

One frozen dataclass, so that an application sees all limits in one place and changes them in one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from llava_edge.profiles.errors import RequestError
from llava_edge.runtime.util.image_formats import DEFAULT_FORMATS, READABLE_FORMATS
from llava_edge.runtime.util.validation import NamedOptions, require_count, require_name, settle

VIDEO_FORMATS = ("MP4", "WEBM", "AVI", "TS")
"""Video containers, recognised by content; MOV counts as MP4, Matroska as WEBM; TS is MPEG-TS."""

VIDEO_CODECS = ("av1", "h264", "hevc", "mjpeg", "mpeg4", "vp8", "vp9")
"""Video codecs, in FFmpeg's names."""

HighBitDepth = Literal["scale", "clip"]
"""What becomes of pixels of more than 8 bits; see ``Limits``."""


@dataclass(frozen=True)
class Limits(NamedOptions):
    """Upper bounds for images, videos and prompts; each must be at least 1.

    Attributes:
        max_image_bytes: size of an image file.
        max_image_pixels: width times height; a decoded pixel takes 4 bytes in Pillow.
        max_image_side: longer side in pixels.
        max_image_ratio: longer side over shorter side.
        max_image_frames: frames of an animated image, of which the first is used.
        image_formats: file formats, out of ``READABLE_FORMATS``; recognised by content, not by
            name. TIFF is read only where it is listed.
        high_bit_depth: ``scale`` makes 8 bits of 16-bit and float pictures by the rules of
            ``high_bit_depth`` and notes it in the answer; ``clip`` cuts off at 255, bit for bit as
            the reference does.
        max_images: images of one request.
        max_video_bytes: size of a video file.
        max_video_pixels: width times height of a frame; 9.4 million take in 4K.
        max_video_frames: frames of a video, of which a few are looked at.
        max_video_seconds: what a video may last by its time stamps.
        video_formats: containers, out of ``VIDEO_FORMATS``; told by content, not by name.
        video_codecs: codecs, out of ``VIDEO_CODECS``.
        max_prompt_characters: characters of one prompt.

    Raises:
        RequestError: a bound is below 1, a format, codec, choice or limit is unknown, or a list is
            empty; all are named.
    """

    max_image_bytes: int = 128 * 2**20
    max_image_pixels: int = 2**26
    max_image_side: int = 32_768
    max_image_ratio: int = 1_000
    max_image_frames: int = 1_000
    image_formats: tuple[str, ...] = DEFAULT_FORMATS
    high_bit_depth: HighBitDepth = "scale"
    max_images: int = 64
    max_video_bytes: int = 2**30
    max_video_pixels: int = 4096 * 2304
    max_video_frames: int = 100_000
    max_video_seconds: int = 3_600
    video_formats: tuple[str, ...] = VIDEO_FORMATS
    video_codecs: tuple[str, ...] = VIDEO_CODECS
    max_prompt_characters: int = 2**20

    def __post_init__(self) -> None:
        faults = []
        for field in fields(self):
            if field.name.startswith("max_"):
                try:
                    value = require_count(field.name, getattr(self, field.name), 1)
                    settle(self, **{field.name: value})
                except RequestError as error:
                    faults.append(str(error))
        for name, known in (
            ("image_formats", READABLE_FORMATS),
            ("video_formats", VIDEO_FORMATS),
            ("video_codecs", VIDEO_CODECS),
        ):
            given = getattr(self, name)
            if isinstance(given, (list, set, frozenset)):
                given = tuple(given)
                settle(self, **{name: given})
            if not isinstance(given, tuple) or not all(isinstance(item, str) for item in given):
                faults.append(f"{name} is {given!r:.60}; it must be a tuple of names")
            elif not given:
                faults.append(f"{name} is empty; readable are {', '.join(known)}")
            elif unknown := sorted(set(given) - set(known)):
                faults.append(f"{name} holds {', '.join(unknown)}; readable are {', '.join(known)}")
        try:
            require_name("high_bit_depth", "choices", self.high_bit_depth, get_args(HighBitDepth))
        except RequestError as error:
            faults.append(str(error))
        if faults:
            raise RequestError("limits: " + "; ".join(faults))
