"""Read image files that FFmpeg reads wrongly or not at all, and those that are read as a first frame.

Pillow reads floating-point and 32-bit samples, CMYK and Lab; HEIF pictures of several coded items are assembled here.
All other images are read as videos of one frame. Each picture is upright 8-bit sRGB, black where transparent.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

from titans_video.media.colour import FrameReader, Pixels, icc_transform, on_black, to_srgb
from titans_video.media.frames import colour_of, still_info
from titans_video.media.headers import aperture_crop, track_properties
from titans_video.media.heif import Heif, Picture, read_heif
from titans_video.media.opening import (
    IMAGE_FORMATS,
    Deadline,
    UnreadableMedia,
    open_container,
    use_one_thread,
)
from titans_video.storage.files import open_file

_PILLOW_ONLY = ("F", "I", "CMYK", "LAB")  # modes of TIFF and JPEG images that FFmpeg cannot read or reads wrongly
_TIFF, _JPEG = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), b"\xff\xd8\xff"
_BITS, _SAMPLE_FORMAT = 258, 339  # TIFF tags
_PROFILES = (b"prof", b"rICC")  # kinds of `colr` that hold an ICC profile
_LARGEST = 1 << 28  # pixels of a grid


class Still(NamedTuple):
    """A picture, and what is special about how it was read (see `VideoInfo.reading`)."""

    pixels: Pixels
    reading: str


def read_still(path: Path, deadline: Deadline) -> Still | None:
    """Read a picture that FFmpeg misreads as a video of one frame, else None; raise UnreadableMedia if damaged."""
    if _needs_pillow(path):
        return read_with_pillow(path)
    heif = read_heif(path)
    return _compose(path, heif, deadline) if heif is not None and heif.is_composed else None


def _needs_pillow(path: Path) -> bool:
    with open_file(path) as file:
        head = file.read(4)
    if head not in _TIFF and not head.startswith(_JPEG):
        return False
    try:
        with open_file(path) as file, Image.open(file, formats=("TIFF", "JPEG")) as opened:
            return opened.mode in _PILLOW_ONLY
    except Exception:  # Pillow raises many types; FFmpeg will tell what is wrong
        return False


def has_wide_png_colours(path: Path) -> bool:
    """Tell whether a PNG file names its colour space by code, which FFmpeg follows and Pillow does not."""
    with open_file(path) as file:
        head = file.read(4096)
    return head.startswith(b"\x89PNG") and b"cICP" in head


def read_with_pillow(path: Path) -> Still | None:
    """Read an image with Pillow; None for an unknown format, UnreadableMedia if it is damaged or cannot be shown."""
    try:
        with open_file(path) as file, Image.open(file, formats=IMAGE_FORMATS) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            profile = opened.info.get("icc_profile") or b""
            tags = dict(opened.tag_v2) if isinstance(opened, TiffImagePlugin.TiffImageFile) else {}
    except UnidentifiedImageError:
        return None
    except Image.DecompressionBombError as error:
        raise UnreadableMedia("not-an-image", path, f"this is not an image that Pillow reads ({error}).") from error
    except Exception as error:  # its decoders raise many types for damaged files
        raise UnreadableMedia("damaged", path, f"the image is damaged ({error}).") from error
    if image.mode == "F":
        return Still(_grey(_float_levels(np.asarray(image), path)), "float")
    if image.mode == "I" and tags.get(_BITS, (16,))[0] == 32:
        is_signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == 2
        return Still(_grey(_long_levels(np.asarray(image), path, is_signed=is_signed)), "32 bit")
    if image.mode.startswith("I;16") or image.mode == "I":
        return Still(_grey(np.clip(np.asarray(image).astype(np.int64) // 257, 0, 255).astype(np.uint8)), "")
    if image.mode in ("CMYK", "LAB"):
        return _other_inks(image, profile)
    reading = "icc" if icc_transform(profile) is not None else ""
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
        return Still(on_black(np.dstack([to_srgb(rgba[..., :3], profile), rgba[..., 3]])), reading)
    return Still(np.array(to_srgb(np.asarray(image.convert("RGB")), profile)), reading)


def _grey(levels: Pixels) -> Pixels:
    return np.repeat(levels[..., None], 3, axis=-1)


def _float_levels(values: NDArray[np.float32], path: Path) -> Pixels:
    low, high = float(values.min()), float(values.max())
    if not (low >= -0.5 and high <= 2):  # false for NaN
        explanation = f"its floating-point samples reach from {low:g} to {high:g}; scale them to 0 to 1."
        raise UnreadableMedia("unsupported-colour", path, explanation)
    return (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)


def _long_levels(values: NDArray[np.int32], path: Path, *, is_signed: bool) -> Pixels:
    """Return the levels of 32-bit samples; if the largest would be black, what they mean is unknown."""
    samples = np.clip(values, 0, None).astype(np.int64) if is_signed else values.view(np.uint32).astype(np.int64)
    white = 2**31 - 1 if is_signed else 2**32 - 1
    if 0 < samples.max() * 255 < white:
        explanation = f"its 32-bit samples only reach {samples.max()} of {white}; scale them, or save 8 or 16 bits."
        raise UnreadableMedia("unsupported-colour", path, explanation)
    return np.asarray((samples * 255 + white // 2) // white, np.uint8)


def _other_inks(image: Image.Image, profile: bytes) -> Still:
    transform = icc_transform(profile)
    if image.mode == "LAB":
        transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    elif transform is None or transform.input_mode != "CMYK":
        return Still(np.array(image.convert("RGB")), "")
    return Still(np.array(ImageCms.applyTransform(image, transform)), "icc")


def _compose(path: Path, heif: Heif, deadline: Deadline) -> Still:
    """Put a HEIF picture together: its tiles, its transparency, then what crops and turns it."""
    if not heif.main.is_readable:
        kind = heif.main.kind.decode("latin-1")
        raise UnreadableMedia("no-decoder", path, f"its main picture is of the kind {kind!r}, which is not read.")
    image = _assemble(path, heif.main, deadline)
    image = to_srgb(image, _heif_profile(heif))
    if heif.alpha is not None:
        alpha = _assemble(path, heif.alpha, deadline)[..., :1] if heif.alpha.is_readable else image[:0]
        if alpha.shape[:2] != image.shape[:2]:
            raise UnreadableMedia("unsupported-alpha", path, "its transparency has another size than the picture.")
        image = image if heif.premultiplied else on_black(np.concatenate([image, alpha], axis=-1))
    return Still(_turned(image, heif.main), "heif")


def icc_profile(path: Path, container: InputContainer, stream: VideoStream) -> bytes:
    """Return the ICC profile that an image or a track of an ISO media file declares; empty if there is none."""
    formats = container.format.name.split(",")
    if "mov" in formats:
        heif = read_heif(path)
        if heif is not None:
            return _heif_profile(heif)
        with open_file(path) as file:
            found = track_properties(file, stream.id, b"colr")
        return next((colr[4:] for colr in found if colr[:4] in _PROFILES), b"")
    if not any(name in ("apng", "gif") or name.endswith("_pipe") for name in formats):
        return b""
    try:
        with open_file(path) as file, Image.open(file, formats=IMAGE_FORMATS) as opened:
            return bytes(opened.info.get("icc_profile") or b"")
    except Exception:  # Pillow raises many types; FFmpeg will tell what is wrong
        return b""


def _heif_profile(heif: Heif) -> bytes:
    return next((colr[4:] for kind in _PROFILES if (colr := heif.main.property(b"colr", kind))), b"")


def _turned(image: Pixels, picture: Picture) -> Pixels:
    """Apply the properties that crop, rotate and mirror, in their order."""
    for kind, data in picture.properties:
        if kind == b"clap":
            height, width = image.shape[:2]
            crop = aperture_crop(data, width, height)
            if min(crop.left, crop.top, crop.right, crop.bottom) >= 0:
                image = image[crop.top : height - crop.bottom, crop.left : width - crop.right]
        elif kind == b"irot" and data:
            image = np.rot90(image, data[0] & 3)
        elif kind == b"imir" and data:
            image = image[:, ::-1] if data[0] & 1 else image[::-1]
    return np.ascontiguousarray(image)


def _assemble(path: Path, picture: Picture, deadline: Deadline) -> Pixels:
    """Decode the tiles of a picture, and place them row by row."""
    canvas: Pixels | None = None
    for number, tile in _tiles(path, picture, deadline):
        height, width = tile.shape[:2]
        if canvas is None:
            whole = picture.rows * height, picture.columns * width
            size = picture.size or whole
            if not (0 < size[0] <= whole[0] and 0 < size[1] <= whole[1] and whole[0] * whole[1] <= _LARGEST):
                raise UnreadableMedia("damaged", path, f"its tiles do not cover {size[1]}x{size[0]} pixels.")
            canvas = np.zeros((*whole, 3), np.uint8)
        row, column = divmod(number, picture.columns)
        place = canvas[row * height : (row + 1) * height, column * width : (column + 1) * width]
        if place.shape != tile.shape:
            raise UnreadableMedia("damaged", path, "its tiles differ in size.")
        place[:] = tile
    assert canvas is not None, "a readable picture has a tile, and each is decoded or reported"
    size = picture.size or canvas.shape[:2]
    return canvas[: size[0], : size[1]]


def _tiles(path: Path, picture: Picture, deadline: Deadline) -> Iterator[tuple[int, Pixels]]:
    """Decode each tile of a picture, as (number, RGB)."""
    wanted = {tile: number for number, tile in enumerate(picture.tiles)}
    with open_container(path, deadline) as container:
        streams = [s for s in container.streams.video if s.id in wanted and s.codec_context is not None]
        for each in streams:
            use_one_thread(each)
        missing = set(wanted)
        for packet in container.demux(streams):
            deadline.check()
            stream = packet.stream
            if not isinstance(stream, VideoStream) or stream.id not in missing:
                continue
            try:
                frames = stream.codec_context.decode(packet)
            except (av.FFmpegError, ValueError):  # the latter from PyAV 19 on: a tile without a known codec
                continue
            for frame in frames[:1]:
                colour = colour_of(frame, path)
                names = {"codec": stream.codec_context.name, "pix_fmt": frame.format.name}
                missing.discard(stream.id)
                yield (
                    wanted[stream.id],
                    FrameReader(still_info(path, frame.height, frame.width, colour, **names))(frame),
                )
    if missing:
        raise UnreadableMedia("damaged", path, f"{len(missing)} of its {len(wanted)} tiles do not decode.")
