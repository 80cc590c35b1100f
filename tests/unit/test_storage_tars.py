"""Members of tars are read where they are: the same facts and pixels as of the extracted files."""

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unit.data_sets import write_clip
from titans_video.media.opening import UnreadableMedia
from titans_video.media.probe import probe
from titans_video.media.reading import read_image, read_indices
from titans_video.parsing import Malformed
from titans_video.storage.files import open_file, status, tar_members
from titans_video.storage.places import is_plain, place, shown, split_tar, url_of


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a clip and pictures of the kinds that different readers read."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "deep").mkdir()
    write_clip(folder / "deep" / "a clip é.mp4", 3, (16, 24))
    picture = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    for name in ("rgb.png", "lossy.jpg", "plain.tif", "still.webp", "still.avif"):
        Image.fromarray(picture).save(folder / name)
    Image.fromarray(picture).convert("CMYK").save(folder / "inks.tif")
    Image.fromarray(picture[..., 0].astype(np.float32) / 255).save(folder / "float.tif")
    return folder


@pytest.fixture(scope="module")
def packed(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tar = tmp_path_factory.mktemp("tars") / "0000.tar"
    with tarfile.open(tar, "w") as out:
        out.add(files, ".")
    return tar


def test_what_is_read_from_a_tar_is_what_is_in_the_file(files: Path, packed: Path) -> None:
    names = sorted(str(p.relative_to(files)) for p in files.rglob("*.*"))
    assert len(names) == 8
    for name in names:
        member = packed / name
        with open_file(member) as file:
            assert file.read() == (files / name).read_bytes()
        if name.endswith((".mp4", ".avif")):
            own, other = probe(files / name), probe(member)
            assert other.path == member
            assert (other.pts, other.width, other.colour, other.file_size) == (
                *(own.pts, own.width, own.colour),
                (files / name).stat().st_size,
            )
            every = range(own.frames)
            np.testing.assert_array_equal(read_indices(member, other, every), read_indices(files / name, own, every))
        if not name.endswith(".mp4"):
            np.testing.assert_array_equal(read_image(member), read_image(files / name))


def test_a_member_has_the_time_of_its_tar(packed: Path) -> None:
    member = packed / "rgb.png"
    before = status(member)
    assert before.modified == packed.stat().st_mtime_ns
    os.utime(packed, ns=(1, before.modified + 10**9))
    assert status(member).modified == before.modified + 10**9


def test_a_missing_member_is_a_missing_file(packed: Path) -> None:
    with pytest.raises(UnreadableMedia) as e:
        probe(packed / "none.mp4")
    assert e.value.reason == "missing"
    assert "no such member" in str(e.value)


def test_a_folder_may_have_the_name_of_a_tar(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "deep", tmp_path / "clips.tar")
    path = next((tmp_path / "clips.tar").iterdir())
    assert is_plain(path)
    assert probe(path).frames == 6


def cut(tar: Path) -> None:
    os.truncate(tar, tar.stat().st_size // 2)


def cut_in_the_last_member(tar: Path) -> None:
    os.truncate(tar, tar_members(tar)[-1].start + 3)


def compress(tar: Path) -> None:
    data = tar.read_bytes()
    with tarfile.open(tar, "w:gz") as out:
        info = tarfile.TarInfo("a.txt")
        out.addfile(info)
    assert tar.read_bytes() != data


def leave(tar: Path) -> None:
    with tarfile.open(tar, "w") as out:
        out.addfile(tarfile.TarInfo("../up.mp4"))


@pytest.mark.parametrize("damage", [cut, cut_in_the_last_member, compress, leave])
def test_a_damaged_tar_has_a_reason(packed: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    tar = Path(shutil.copy(packed, tmp_path / "bad.tar"))
    damage(tar)
    with pytest.raises(Malformed):
        tar_members(tar)
    with pytest.raises(UnreadableMedia) as e:
        probe(tar / "rgb.png")
    assert e.value.reason == "damaged"


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("s3://bucket/a b/c.mp4", "s3:/bucket/a b/c.mp4"),
        ("HTTPS://host:81/x.mp4?key=a/b", "https:/host:81/x.mp4?key=a/b"),
        ("hf://datasets/user/name@main/c.mp4", "hf:/datasets/user/name@main/c.mp4"),
    ],
)
def test_a_url_is_a_path_and_back(url: str, path: str) -> None:
    assert place(url) == Path(path)
    assert url_of(place(url)).lower() == url.lower()
    assert "key" not in shown(place(url))


@pytest.mark.parametrize("url", ["s3://bucket//a.mp4", "https://host/./a.mp4", "https://host/x/../a.mp4", "s3://b/a/"])
def test_a_url_that_a_path_would_change_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"part"):
        place(url)


def test_a_path_through_a_remote_tar_is_a_member() -> None:
    assert split_tar(place("s3://b/0.tar/x/1.mp4")) == (place("s3://b/0.tar"), "x/1.mp4")
    assert split_tar(place("s3://b/0.tar")) is None
    assert split_tar(Path("gs://b/0.tar/1.mp4")) is None  # a local path: nothing reads this scheme
