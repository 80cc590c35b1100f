"""Convert decoded frames to upright 8-bit RGB, resize them, and convert them to and from tensors.

FFmpeg's swscale converts YCbCr to RGB with the matrix and range from the probe, with accurate rounding and full chroma
interpolation; its fast default is darker by one to two levels of 255. (16 bits are converted through planes, because
its packed 16-bit output wraps around with bilinear full chroma.)

HDR is tone-mapped so that it matches SDR clips: BT.2100 PQ or HLG to light, BT.2390's curve from 1000 to 203 cd/m2
(BT.2408's reference white) on the largest of R, G, B, which keeps hues, BT.2020 to BT.709 primaries, and BT.1886's
gamma of 2.4.
"""

from fractions import Fraction
from functools import cache, lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray
from PIL import Image, ImageCms
from torch import Tensor

from titans_video.media.headers import has_alpha
from titans_video.media.info import Colour, Crop, Matrix, Orientation, Primaries, VideoInfo

_ICC_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of a profile: Pillow's mode
Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
HDR_PEAK = 1000.0  # cd/m2: the mastering peak of HDR video and HLG's nominal display
WHITE = 65280  # 255 x 256: swscale's 16-bit white
SDR_PEAK = 203.0  # cd/m2: the level of SDR white in HDR (BT.2408)


# Giving both ranges and the matrix explicitly leaves nothing for swscale to guess.
_MATRIX: dict[Matrix, Colorspace | None] = {
    "bt601": Colorspace.ITU601,
    "bt709": Colorspace.ITU709,
    "bt2020": Colorspace.BT2020,
    "smpte240m": Colorspace.SMPTE240M,
    "fcc": Colorspace.FCC,
    "rgb": None,
}

ACCURATE = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


# BT.2087: linear BT.2020 to linear BT.709.
_BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32
)
_BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)

# ITU-T H.273: x, y of red, green, blue and white.
_CHROMATICITIES: dict[Primaries, tuple[tuple[float, float], ...]] = {
    "bt709": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), (0.3127, 0.3290)),
    "p3": ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06), (0.3127, 0.3290)),
    "dci-p3": ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06), (0.314, 0.351)),
    "bt470m": ((0.67, 0.33), (0.21, 0.71), (0.14, 0.08), (0.310, 0.316)),
    "film": ((0.681, 0.319), (0.243, 0.692), (0.145, 0.049), (0.310, 0.316)),
}
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


class FrameReader:
    """Convert the frames of one video to RGB as displayed; `profile` is the ICC profile if `info.colour.profile`."""

    def __init__(self, info: VideoInfo, profile: bytes = b"") -> None:
        self.info, self._profile = info, profile
        self._scaler = VideoReformatter()
        self._cropper: Graph | None = None

    def __call__(self, frame: VideoFrame) -> Pixels:
        """Return uint8 (height, width, 3): square pixels, upright, BT.709 SDR, black where transparent."""
        colour, alpha = self.info.colour, has_alpha(frame, self.info.codec)
        rest = self.info.crop
        if rest != Crop():
            frame, rest = self._cut(frame)
        if colour.primaries != "bt709" or colour.transfer != "sdr":
            codes = self._convert(frame, "gbrap16le" if alpha else "gbrp16le")
            image = to_sdr(codes[..., :3], colour)
            opacity = codes[..., 3:] // 257
        else:
            image = self._convert(frame, "rgba" if alpha else "rgb24")
            image, opacity = image[..., :3], image[..., 3:]
        if colour.profile:
            image = to_srgb(image, self._profile)
        if alpha:
            image = on_black(np.concatenate([image, opacity.astype(np.uint8)], axis=-1))
        if self.info.crop != Crop():
            height, width = image.shape[:2]
            image = np.ascontiguousarray(image[rest.top : height - rest.bottom, rest.left : width - rest.right])
            image = self._stretch(image)
        return turn(image, self.info.orientation)

    def _cut(self, frame: VideoFrame) -> tuple[VideoFrame, Crop]:
        """Crop in whole samples of chroma, so that none blends with hidden pixels; return what else must be cropped."""
        crop, kind = self.info.crop, frame.format
        across, down = 64 // kind.chroma_width(64), 64 // kind.chroma_height(64)
        rest = Crop(crop.left % across, crop.top % down, crop.right % across, crop.bottom % down)
        left, top = crop.left - rest.left, crop.top - rest.top
        if self._cropper is None:
            width = frame.width - left - (crop.right - rest.right)
            height = frame.height - top - (crop.bottom - rest.bottom)
            self._cropper = Graph()
            source = self._cropper.add_buffer(
                width=frame.width, height=frame.height, format=kind, time_base=frame.time_base or Fraction(1, 25)
            )
            cropper = self._cropper.add("crop", f"{width}:{height}:{left}:{top}:exact=1")
            source.link_to(cropper)
            cropper.link_to(self._cropper.add("buffersink"))
            self._cropper.configure()
        self._cropper.vpush(frame)
        return self._cropper.vpull(), rest

    def _stretch(self, image: Pixels) -> Pixels:
        """Give a cropped image square pixels."""
        height, width = image.shape[:2]
        if width == self.info.square_width:
            return image
        frame = VideoFrame.from_ndarray(image, format="rgb24")
        found: Any = self._scaler.reformat(
            frame, width=self.info.square_width, height=height, interpolation=ACCURATE, threads=1
        ).to_ndarray()
        return np.asarray(found, np.uint8)

    def _convert(self, frame: VideoFrame, format: str) -> Any:
        colour = self.info.colour
        return self._scaler.reformat(
            frame,
            width=self.info.square_width if self.info.crop == Crop() else frame.width,
            height=frame.height,
            format=format,
            src_colorspace=_MATRIX[colour.matrix],
            src_color_range=ColorRange.JPEG if colour.full_range else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
            interpolation=ACCURATE,
            threads=1,
        ).to_ndarray()


def turn(image: Pixels, orientation: Orientation) -> Pixels:
    """Turn a stored image (H, W, 3) upright: transpose it, then mirror it."""
    if orientation.transpose:
        image = image.transpose(1, 0, 2)
    if orientation.flip_x:
        image = image[:, ::-1]
    if orientation.flip_y:
        image = image[::-1]
    return np.ascontiguousarray(image)


def on_black(rgba: Pixels) -> Pixels:
    """Composite (H, W, 4) with straight alpha over black: (H, W, 3)."""
    colour, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3:].astype(np.uint16)
    return ((colour * alpha + 127) // 255).astype(np.uint8)


def to_sdr(codes: NDArray[np.uint16], colour: Colour) -> Pixels:
    """Tone-map full-range R'G'B' codes (H, W, 3), 0..WHITE, to uint8 (H, W, 3) in BT.709."""
    light = np.take(_light_of_codes(colour.transfer), codes)  # (H, W, 3); 1 is SDR white, for HLG the scene's peak
    if colour.transfer == "pq":
        light *= np.take(_gain_of_pq_codes(), codes.max(axis=-1))[..., None]
    elif colour.transfer == "hlg":
        by_luma = np.take(_hlg_system_gain(), _steps(light @ _BT2020_LUMA))  # (H, W)
        brightest = light.max(axis=-1) * by_luma
        light *= (by_luma * np.take(_gain_of_light(), _steps(brightest * (SDR_PEAK / HDR_PEAK))))[..., None]
    if colour.primaries != "bt709":
        light = light @ to_bt709(colour.primaries).T
    return np.take(_codes_of_light(colour.transfer), _steps(light))


@cache
def to_bt709(primaries: Primaries) -> Floats:
    """Return the matrix (3, 3) from linear light with these primaries to BT.709; another white becomes that of D65."""
    if primaries == "bt2020":
        return _BT2020_TO_BT709
    (there, white), (here, own) = _to_xyz(primaries), _to_xyz("bt709")
    adapted = np.linalg.inv(_BRADFORD) @ np.diag((_BRADFORD @ own) / (_BRADFORD @ white)) @ _BRADFORD
    return (np.linalg.inv(here) @ adapted @ there).astype(np.float32)


def _to_xyz(primaries: Primaries) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    columns = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in _CHROMATICITIES[primaries]]).T  # (3, 4)
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3]), columns[:, 3]


def to_srgb(image: Pixels, profile: bytes) -> Pixels:
    """Convert (H, W, 3) from an ICC profile to sRGB; a profile that is damaged or of another kind changes nothing."""
    transform = icc_transform(profile)
    if transform is None or transform.input_mode == "CMYK":
        return image
    mode = transform.input_mode
    source = Image.fromarray(np.ascontiguousarray(image if mode == "RGB" else image[..., 0]), mode)
    return np.array(ImageCms.applyTransform(source, transform))  # writable, unlike Pillow's own


@lru_cache(maxsize=16)
def icc_transform(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of an ICC profile to sRGB, relative colorimetric with black point compensation.

    It is None if the profile cannot be used, or would change nothing by more than one level.
    """
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        mode = _ICC_MODES.get(source.profile.xcolor_space.strip())
        if mode is None:
            return None
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, mode, "RGB", intent, flags)
    except (ImageCms.PyCMSError, OSError, ValueError):  # Pillow decodes the names in a profile as ASCII
        return None
    if mode == "CMYK":
        return transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    if mode == "L":
        grid = np.repeat(levels[None, :, None], 3, axis=-1)
    seen = np.asarray(
        ImageCms.applyTransform(
            Image.fromarray(np.ascontiguousarray(grid if mode == "RGB" else grid[..., 0])), transform
        )
    )
    return transform if np.abs(seen.astype(int) - grid).max() > 1 else None


def _steps(values: Floats) -> NDArray[np.uint16]:
    return (np.clip(values, 0.0, 1.0) * 65535.0 + 0.5).astype(np.uint16)


@cache
def _light_of_codes(transfer: str) -> Floats:
    """Return (65536,) light of each code: 1 is SDR white, for HLG the scene's peak."""
    code = np.minimum(np.arange(65536) / WHITE, 1.0)
    if transfer == "pq":
        return (pq_to_light(code) / SDR_PEAK).astype(np.float32)
    if transfer == "hlg":  # BT.2100, inverse OETF
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)
    if transfer == "srgb":  # IEC 61966-2-1
        return np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4).astype(np.float32)
    return (code**2.4).astype(np.float32)


@cache
def _codes_of_light(transfer: str) -> Pixels:
    """Return (65536,) 8-bit codes of light 0..1: inverse BT.1886, or sRGB's curve for what came with it."""
    light = np.linspace(0.0, 1.0, 65536)
    if transfer == "srgb":
        return np.round(np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255).astype(
            np.uint8
        )
    return np.round(light ** (1 / 2.4) * 255).astype(np.uint8)


@cache
def _hlg_system_gain() -> Floats:
    """Return (65536,) the gain from scene light to a 1000 cd/m2 display for scene luma 0..1 (BT.2100, gamma 1.2)."""
    return (HDR_PEAK / SDR_PEAK * np.linspace(0.0, 1.0, 65536) ** 0.2).astype(np.float32)


@cache
def _gain_of_pq_codes() -> Floats:
    """Return (65536,) the tone curve's gain if the brightest channel has this code."""
    return tone_gain(_light_of_codes("pq").astype(np.float64)).astype(np.float32)


@cache
def _gain_of_light() -> Floats:
    """Return (65536,) the tone curve's gain if the brightest channel has this light, 0..HDR_PEAK."""
    return tone_gain(np.linspace(0.0, HDR_PEAK / SDR_PEAK, 65536)).astype(np.float32)


def tone_gain(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the gain that maps light (1 is SDR white) into 0..1: BT.2390's EETF in PQ, from 1000 to 203 cd/m2."""
    top = light_to_pq(np.array(HDR_PEAK))
    coded = np.minimum(light_to_pq(light * SDR_PEAK) / top, 1.0)
    ceiling = light_to_pq(np.array(SDR_PEAK)) / top
    knee = 1.5 * ceiling - 0.5
    t = np.clip((coded - knee) / (1 - knee), 0, 1)
    bent = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * ceiling
    mapped = pq_to_light(bent * top) / SDR_PEAK
    return np.where(coded < knee, 1.0, mapped / np.maximum(light, 1e-9))


_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128


def pq_to_light(code: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert code 0..1 to cd/m2 (SMPTE ST 2084)."""
    power = code ** (1 / _M2)
    return np.asarray(10000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1))


def light_to_pq(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert cd/m2 to code 0..1 (SMPTE ST 2084)."""
    power = (light / 10000) ** _M1
    return np.asarray(((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2)


def cover_crop(frames: Pixels, height: int, width: int, crop: tuple[float, float] = (0.5, 0.5)) -> Pixels:
    """Scale frames, uint8 (T, H, W, 3), until they just cover height x width, then crop the rest.

    The scaling is bicubic with antialiasing in torch's 8-bit kernel: Pillow's filter, about four times as fast. `crop`
    is the part to keep, (down, right), each from 0 (top, left) to 1.
    """
    _, source_height, source_width, _ = frames.shape
    scaled_height, scaled_width = covering_size(source_height, source_width, height, width)
    if (scaled_height, scaled_width) != (source_height, source_width):
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)  # (T, 3, H, W), channels last
        pixels = F.interpolate(
            pixels, (scaled_height, scaled_width), mode="bicubic", antialias=True, align_corners=False
        )
        frames = pixels.permute(0, 2, 3, 1).numpy()
    top = round((scaled_height - height) * min(max(crop[0], 0.0), 1.0))
    left = round((scaled_width - width) * min(max(crop[1], 0.0), 1.0))
    return np.ascontiguousarray(frames[:, top : top + height, left : left + width])


def covering_size(source_height: int, source_width: int, height: int, width: int) -> tuple[int, int]:
    """Return the smallest (height, width) with the source's aspect that covers the target, in whole pixels."""
    scale = max(height / source_height, width / source_width)
    return max(height, round(source_height * scale)), max(width, round(source_width * scale))


def to_tensor(frames: Pixels) -> Tensor:
    """Convert uint8 (T, H, W, 3) to float32 (3, T, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)  # (3, T, H, W)
    return pixels.to(torch.float32).div_(127.5).sub_(1.0).contiguous()


def to_uint8(pixels: Tensor) -> Pixels:
    """Convert float (3, T, H, W) in [-1, 1] to uint8 (T, H, W, 3), rounded and clamped."""
    frames = pixels.detach().to("cpu", torch.float32).permute(1, 2, 3, 0)  # (T, H, W, 3)
    return ((frames + 1.0) * 127.5).round_().clamp_(0, 255).to(torch.uint8).contiguous().numpy()
