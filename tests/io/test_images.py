"""Images of every mode and format come in as one thing: RGB, upright, on white."""

from __future__ import annotations

import ast
import io
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clipsteer
from clipsteer import FileFormatError, data
from clipsteer.clip.pixels import as_pixels
from clipsteer.io.images import as_rgb, open_image, read_image

PACKAGE = Path(clipsteer.__file__).parent
RAMP = np.tile(np.linspace(0, 1, 64), (48, 1))
GREY = Image.fromarray((RAMP * 255).astype(np.uint8)).convert("RGB")


@pytest.fixture(scope="module")
def emojiclip():
    return clipsteer.load()


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def off_by(image: Image.Image, other: Image.Image = GREY) -> int:
    assert (image.mode, image.size) == ("RGB", other.size)
    return int(np.abs(values(image) - values(other)).max())


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def seen_alike(content: bytes) -> Image.Image:
    """What a file is read as; the same from Pillow's image, before and after its pixels are read."""
    expected = read_image(content)
    image = Image.open(io.BytesIO(content))
    assert off_by(as_rgb(image), expected) == 0
    image.load()
    assert off_by(as_rgb(image), expected) == 0
    assert off_by(as_rgb(expected), expected) == 0
    return expected


# greys of more than 8 bits


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_grey_of_16_bits_is_that_of_8(order):
    wide = Image.fromarray((RAMP * 65535).astype(order))
    assert off_by(as_rgb(wide)) <= 1
    assert as_rgb(wide).getextrema() == ((0, 255),) * 3
    for kind in ("PNG", "TIFF"):
        assert off_by(seen_alike(saved(wide, kind))) <= 1


def test_grey_of_16_bits_in_a_ppm_whose_mode_is_i():
    for top in (65535, 1023):
        body = (RAMP * top).astype(">u2").tobytes()
        assert off_by(seen_alike(b"P5 64 48 %d\n" % top + body)) <= 1


def tiff(rows: bytes, bits: int, photometric: int) -> bytes:
    """One strip of grey, 64 × 48, little endian."""
    tags = {256: 64, 257: 48, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 48, 279: len(rows)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(rows)) + rows + directory


def test_tiff_of_12_bits_and_with_white_at_zero():
    twelve = (RAMP * 4095).astype(np.uint16)
    first, second = twelve[:, ::2], twelve[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8)
    assert off_by(seen_alike(tiff(packed.tobytes(), 12, 1))) <= 1
    negative = (65535 - RAMP * 65535).astype("<u2")
    assert off_by(seen_alike(tiff(negative.tobytes(), 16, 0))) <= 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_known_range_are_refused(mode, tmp_path, emojiclip):
    image = Image.fromarray((RAMP * 70000).astype({"I": np.int32, "F": np.float32}[mode]))
    assert image.mode == mode
    with pytest.raises(ValueError, match=f"mode '{mode}' have no known range; make it 8-bit grey"):
        as_rgb(image)
    with pytest.raises(ValueError, match="no known range"):
        emojiclip.encode_images([image])
    image.save(tmp_path / "x.tiff")
    with pytest.raises(FileFormatError, match=r"x\.tiff.*no known range"):
        read_image(tmp_path / "x.tiff")


# PNG by hand: depths that Pillow does not write


def png(depth: int, colour: int, rows: np.ndarray, clear: bytes = b"", more: bytes = b"") -> bytes:
    """rows: (H, bytes a row)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    width = rows.shape[1] * 8 // (depth * channels)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0))
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n" + head + (chunk(b"tRNS", clear) if clear else b"") + more
        + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )  # fmt: skip


def test_colours_of_16_bits_and_what_is_clear_among_them():
    rgb = np.full((4, 6, 3), (0x1200, 0x8034, 0xFF56), ">u2")
    rgb[:, :3] = (0xC833, 0x6411, 0x3222)
    raw = rgb.reshape(4, -1).view(np.uint8)
    image = seen_alike(png(16, 2, raw))
    assert [image.getpixel((x, 0)) for x in (0, 5)] == [(0xC8, 0x64, 0x32), (0x12, 0x80, 0xFF)]
    image = seen_alike(png(16, 2, raw, clear=struct.pack(">3H", 0xC833, 0x6411, 0x3222)))
    assert [image.getpixel((x, 0)) for x in (0, 5)] == [(255, 255, 255), (0x12, 0x80, 0xFF)]
    rgba = np.concatenate([rgb, np.where(np.arange(6) < 3, 0, 65535)[None, :, None].repeat(4, 0)], -1)
    image = seen_alike(png(16, 6, rgba.astype(">u2").reshape(4, -1).view(np.uint8)))
    assert [image.getpixel((x, 0)) for x in (0, 5)] == [(255, 255, 255), (0x12, 0x80, 0xFF)]
    alpha = np.stack([np.full((4, 6), 0x8000), np.full((4, 6), 0xFFFF) * (np.arange(6) < 3)], -1)
    image = seen_alike(png(16, 4, alpha.astype(">u2").reshape(4, -1).view(np.uint8)))
    assert [image.getpixel((x, 0))[0] for x in (0, 5)] == [128, 255]


def test_a_clear_grey_of_every_depth():
    wide = np.full((4, 6), 0x1234, ">u2")
    wide[:, 3:] = 0x8000
    image = seen_alike(png(16, 0, wide.view(np.uint8), clear=struct.pack(">H", 0x1234)))
    assert [image.getpixel((x, 0))[0] for x in (0, 5)] == [255, 128]
    for depth, packed, grey in ((1, 0b00001111, 255), (2, 0b01011111, 85), (4, 0x5F, 85), (8, 85, 85)):
        plain = png(depth, 0, np.full((3, 4), packed, np.uint8))
        level = grey * (2**depth - 1) // 255  # what tRNS names, in the depth of the samples
        content = png(depth, 0, np.full((3, 4), packed, np.uint8), clear=struct.pack(">H", level))
        was = values(read_image(plain))
        now = values(read_image(content))
        assert (was == grey).any()
        assert np.array_equal(now, np.where(was == grey, 255, was))


# every mode


def picture(mode: str) -> Image.Image:
    """Half clear where the mode can, in several colours."""
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (40, 56, 4), dtype=np.uint8)
    pixels[..., 3] = rng.choice([0, 90, 255], (40, 56))
    rgba = Image.fromarray(pixels, "RGBA")
    if mode == "P, clear entry":
        image = rgba.convert("RGB").quantize(16)
        image.info["transparency"] = 3
        return image
    if mode == "P, RGBA palette":
        return rgba.quantize(16)
    if mode == "PA":
        image = Image.new("PA", rgba.size, 7)
        image.putalpha(rgba.getchannel("A"))
        return image
    if mode == "La":
        return rgba.convert("LA").convert("La")
    if mode == "L, clear grey":
        image = rgba.convert("RGB").quantize(4).convert("L")
        image.info["transparency"] = image.getpixel((0, 0))
        return image
    if mode == "LAB":
        return Image.merge("LAB", rgba.convert("RGB").split())
    return rgba.convert("RGB").convert(mode) if mode not in ("LA", "RGBa") else rgba.convert(mode)


FILES = {
    "1": ("PNG", "TIFF", "BMP"), "L": ("PNG", "TIFF"), "LA": ("PNG",), "P": ("PNG", "GIF", "BMP"),
    "P, clear entry": ("PNG", "GIF"), "P, RGBA palette": ("PNG",), "RGB": ("PNG", "TIFF", "BMP", "PPM"),
    "RGBX": ("TIFF",), "CMYK": ("TIFF", "JPEG"), "YCbCr": ("JPEG",), "LAB": ("TIFF",), "L, clear grey": ("PNG",),
    "HSV": (), "PA": (), "La": (), "RGBa": (),
}  # fmt: skip


@pytest.mark.parametrize("mode", FILES)
def test_an_image_is_seen_as_its_file(mode, tmp_path, emojiclip):
    image = picture(mode)
    if mode in ("HSV", "PA", "La", "RGBa"):  # no format keeps them: as what they were made into
        rgba = image.convert("LA").convert("RGBA") if mode == "La" else image.convert("RGBA")
        content = saved(rgba, "PNG")
        assert off_by(as_rgb(image), read_image(content)) == 0
    for kind in FILES[mode]:
        content = saved(image, kind)
        expected = seen_alike(content)
        if kind != "JPEG":
            assert off_by(as_rgb(image), expected) == 0
        path = tmp_path / f"x.{kind.lower()}"
        path.write_bytes(content)
        if kind == "JPEG":
            path = path.rename(tmp_path / "x.jpg")
        opened = Image.open(path)
        by_file, by_image, by_hand = (
            emojiclip.encode_images(images)
            for images in ([path], [opened], [emojiclip.preprocess(opened)])
        )  # fmt: skip
        assert torch.equal(by_file, by_image)
        assert torch.equal(by_file, by_hand)


def test_a_transparent_picture_at_two_sizes_is_one_picture(emojiclip):
    small = Image.new("RGBA", (64, 64), (250, 240, 0, 0))  # a colour that nobody sees
    small.paste((200, 30, 30, 255), (16, 16, 48, 48))
    large = small.resize((128, 128), Image.Resampling.NEAREST)
    found = emojiclip.encode_images([small, large])
    assert float(found[0] @ found[1]) > 0.95


def test_samples_of_somebody_elses_data_set_are_seen_as_files(tmp_path, emojiclip):
    clear = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    clear.save(tmp_path / "x.png")
    assert torch.equal(as_pixels(clear, emojiclip.preprocess), as_pixels(tmp_path / "x.png", emojiclip.preprocess))
    assert torch.equal(emojiclip.encode_images([(clear, 0)]), emojiclip.encode_images([tmp_path / "x.png"]))


# orientation, several frames, colours of printers


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_upright_in_every_way_of_coming_in(kind, orientation):
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste((200, 20, 20), (0, 0, 24, 16))
    upright.paste((20, 20, 200), (24, 0, 48, 16))
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what undoes the orientation
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(turn[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    found = seen_alike(saved(stored, kind, exif=exif, **options))
    assert found.size == (48, 32)
    middles = [(12, 8), (36, 8), (12, 24), (36, 24)]
    assert np.abs(np.subtract([found.getpixel(p) for p in middles], [upright.getpixel(p) for p in middles])).max() < 9


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames(kind):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "lime")]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(content)).n_frames == 3
    first = seen_alike(content)
    assert np.abs(values(first) - (255, 0, 0)).max() < 9
    image = Image.open(io.BytesIO(content))
    image.seek(2)  # somebody's choice stands
    assert np.abs(values(as_rgb(image)) - (0, 255, 0)).max() < 9


def test_the_photograph_of_a_telephone_that_keeps_several_in_one():
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    content = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.abs(values(seen_alike(content)) - (254, 0, 0)).max() < 9


def test_inks_as_adobe_keeps_them():
    """Pillow writes what Adobe does: inverted inks, and a marker that says so."""
    content = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert b"Adobe" in content
    assert np.abs(values(seen_alike(content)) - (255, 0, 0)).max() < 12


# what is opened, and with what


def test_only_the_formats_of_the_accepted_suffixes_are_opened(tmp_path):
    """Some of Pillow's readers start other programs: what a name promises is not what is opened."""
    image = Image.new("RGB", (8, 8), "red")
    for kind in ("EPS", "ICO", "TGA", "PCX", "SGI", "JPEG2000"):
        path = tmp_path / f"{kind}.png"
        path.write_bytes(saved(image, kind))
        for source in (path, path.read_bytes()):
            with pytest.raises(FileFormatError, match="expected one of JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM"):
                read_image(source)
        with pytest.raises(FileFormatError, match=path.name), open_image(path):
            pass


def test_what_is_no_regular_file_is_neither_listed_nor_opened(tmp_path, monkeypatch, emojiclip):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)  # the name of a socket may take 100 letters
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        assert data.sample_names(data.open_dataset(tmp_path)) == ["a.png"]
        for name in ("pipe.png", "folder.png", "socket.png", "zero.png"):
            with pytest.raises(FileFormatError, match=rf"{name}: not a regular file"):
                read_image(tmp_path / name)
            with pytest.raises(FileFormatError, match="not a regular file"):
                emojiclip.encode_images([tmp_path / name])
            (tmp_path / "t.csv").write_text(f"image,text\n{name},one\n")
            with pytest.raises(FileFormatError, match="not a regular file"):
                data.open_dataset(tmp_path / "t.csv")[0]


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 5000 + ".png", "caf\udce9.png"])
def test_names_that_no_file_can_have(name, tmp_path):
    with pytest.raises((FileFormatError, FileNotFoundError)):
        read_image(str(tmp_path / name))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow's, about damaged tags
def test_damage_of_any_kind_is_one_error():
    rng = np.random.default_rng(0)
    messages = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        exif = Image.Exif()
        exif[0x0112] = 6
        whole = saved(GREY, kind, exif=exif) if kind not in ("GIF", "BMP", "PPM") else saved(GREY, kind)
        for _ in range(60):
            content = bytearray(whole)
            for at in rng.integers(0, min(len(content), 400), 3):
                content[at] = rng.integers(256)
            content = bytes(content[: rng.integers(1, len(content) + 1)])
            try:
                assert read_image(content, "x").mode == "RGB"
            except FileFormatError as error:
                messages.append(str(error))
    assert len(messages) > 100
    assert all(message.startswith("x: ") for message in messages)


def test_nothing_else_in_the_package_opens_an_image():
    """No other ``Image.open`` anywhere, and that one names its formats."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "open" and "Image" in ast.unparse(node.value):
                found.append(path.relative_to(PACKAGE).as_posix())
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("PIL.Image", "torchvision.io")):
                assert {alias.name for alias in node.names} <= {"Image"}
    assert found == ["io/images.py"]
    assert "Image.open(file, formats=" in (PACKAGE / "io" / "images.py").read_text(encoding="utf-8")
