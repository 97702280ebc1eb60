"""Tables and shards that claim more than they hold: an error that names the file, in little time and memory."""

from __future__ import annotations

import io
import json
import signal
import tarfile
import tracemalloc

import pytest
from PIL import Image

from clipsteer import FileFormatError, data


@pytest.fixture(autouse=True)
def soon():
    """A reader that goes round for ever fails."""

    def late(*_):
        pytest.fail("still reading after 20 s")  # no Exception, which a reader would take for damage

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (9, 8, 7)).save(file, "PNG")
    return file.getvalue()


def block(name: str, size: int, kind: bytes = tarfile.REGTYPE, claimed: bytes | None = None) -> bytes:
    """A tar header; `claimed` replaces its size field, whatever that means."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.type = kind
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if claimed is not None:
        head[124:136] = claimed.ljust(12, b"\0")
        head[148:156] = b"        "
        head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def member(name: str, content: bytes) -> bytes:
    return block(name, len(content)) + padded(content)


def pax(**fields: str) -> bytes:
    records = b""
    for key, value in fields.items():
        record = f" {key.replace('_', '.')}={value}\n".encode()
        length = len(record) + 1
        while len(str(length)) + len(record) != length:
            length += 1
        records += str(length).encode() + record
    return block("pax", len(records), tarfile.XHDTYPE) + padded(records)


NEGATIVE = tarfile.itn(-1536, 12, tarfile.GNU_FORMAT)
SAMPLE = member("0.png", png()) + member("0.txt", b"text")
SHARDS = {
    "a negative size": SAMPLE + block("1.png", 0, claimed=NEGATIVE) + bytes(512),
    "a negative size of another kind of member": SAMPLE + block("1", 0, b"Z", NEGATIVE) + bytes(512),
    "a negative size in an extended header": SAMPLE + pax(size="-1536") + member("1.png", png()),
    "a size that is no number": SAMPLE + pax(size="many") + member("1.png", png()),
    "a size beyond the file": SAMPLE + block("1.png", 1 << 40) + png(),
    "the text's size beyond the file": SAMPLE + block("1.txt", 1 << 33) + b"x" * 512,
    "a sparse member of the old kind": SAMPLE + block("1.txt", 0, tarfile.GNUTYPE_SPARSE) + bytes(512),
    "a sparse member of the new kind": SAMPLE + pax(GNU_sparse_size=str(1 << 34), GNU_sparse_numblocks="0")
    + member("1.txt", b"x"),
    "long names within long names": b"".join(block("././@LongLink", 0, tarfile.GNUTYPE_LONGNAME) for _ in range(3000))
    + SAMPLE,
    "a damaged header in the middle": SAMPLE + b"\x07" * 512 + member("1.png", png()) + member("1.txt", b"lost"),
    "cut within a header": SAMPLE + member("1.png", png())[:300],
    "cut within an image": SAMPLE + member("1.txt", b"text") + member("1.png", png())[:520],
    "JSON within JSON": member("0.png", png()) + member("0.json", b"[" * 200_000),
    "a number of many digits": member("0.png", png())
    + member("0.json", b'{"caption": "x", "id": ' + b"9" * 5000 + b"}"),
    "half a letter": member("0.png", png()) + member("0.json", b'{"caption": "\\ud800"}'),
    "a caption of many letters": member("0.png", png()) + member("0.txt", b"x" * 200_000),
    "much text": member("0.png", png()) + member("0.txt", b" " * (17 << 20)),
}  # fmt: skip


@pytest.mark.parametrize("what", SHARDS)
def test_a_shard_that_is_not_what_it_says(tmp_path, what):
    path = tmp_path / "s.tar"
    path.write_bytes(SHARDS[what] + bytes(0 if what.startswith("cut") else 1024))
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match=r"s\.tar"):
            data.shards(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * path.stat().st_size + (32 << 20)
    finally:
        tracemalloc.stop()


def test_a_whole_shard_opens_with_and_without_the_blocks_at_its_end(tmp_path):
    for end in (b"", bytes(512), bytes(1024), bytes(10240)):
        (tmp_path / "s.tar").write_bytes(SAMPLE + end)
        assert data.shards(tmp_path / "s.tar").targets == ["text"]
        assert data.shards(tmp_path / "s.tar")[0][0].getpixel((0, 0)) == (9, 8, 7)


def test_json_without_a_caption_leaves_its_sample_out(tmp_path):
    for other in (b"[1, 2]", b'{"id": 3}', b'{"caption": 5}', b"7"):
        sample = member("1.png", png()) + member("1.json", other)
        (tmp_path / "s.tar").write_bytes(SAMPLE + sample + bytes(1024))
        assert data.shards(tmp_path / "s.tar").targets == ["text"]


def test_long_names_in_shards(tmp_path):
    name = "a" * 300
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "s.tar", "w", format=form) as tar:
            for suffix, body in (("png", png()), ("txt", "naïve".encode())):
                info = tarfile.TarInfo(f"{name}/café.{suffix}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
        assert data.shards(tmp_path / "s.tar").targets == ["naïve"]


def test_brace_ranges_have_a_limit(tmp_path):
    with pytest.raises(ValueError, match=r"stands for 10,000,000,000 names; at most 10,000,000"):
        data.shards(tmp_path / "x-{0000..9999999999}.tar")
    with pytest.raises(ValueError, match="names; at most"):
        data.open_dataset(tmp_path / "x-{0000..9999}-{0000..9999}.tar")
    with pytest.raises(ValueError, match=r"no such file: .*x-0000000\.tar"):  # the first is missed, the rest never made
        data.shards(tmp_path / "x-{0000000..9999998}.tar")
    with pytest.raises(ValueError, match="empty brace range"):
        data.shards(tmp_path / "x-{5..2}.tar")
    for name in ("{" + "0" * 5000 + "..9}", "{0.." + "9" * 5000 + "}", "y" * 5000, "y\0z"):
        with pytest.raises(ValueError, match="no such file"):
            data.shards(f"{tmp_path}/{name}.tar")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "image,text\na.png," + "x" * 200_000, "field larger than field limit"),
        ("t.jsonl", json.dumps({"image": "a.png", "text": "x" * 200_000}), "line 1: a caption of 200,000 characters"),
        ("t.jsonl", '{"image": "a.png", "text": "\\udfff"}', "line 1: the caption is no Unicode text"),
        ("t.jsonl", "[" * 200_000, "line 1: not JSON"),
        ("t.jsonl", '{"image": "a.png", "text": "x", "id": ' + "9" * 5000 + "}", "line 1: not JSON"),
        ("t.jsonl", '{"image": 1, "text": "' + "x" * 9000 + '"}', r"must be strings, got .{300}…$"),
        ("t.jsonl", " " * (17 << 20), "line 1: longer than"),
        ("t.tsv", "image\ttext\n\0\0\n", "line 2"),
    ],
)
def test_a_table_that_is_not_what_it_says(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(FileFormatError, match=message) as caught:
        data.open_dataset(tmp_path / name)
    assert name in str(caught.value)


def test_images_that_a_table_cannot_mean(tmp_path):
    rows = [{"image": name, "text": "x"} for name in ("a\0b.png", "x" * 5000 + ".png")]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = data.open_dataset(tmp_path / "t.jsonl")
    for row in range(2):
        with pytest.raises(FileFormatError, match="cannot be read as an image"):
            found[row]
