"""The data of distill.py: which pictures and captions are used, which are skipped, and what sample p is."""

import io
import json
import os
import re
import struct
import tarfile
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch.utils.data import DataLoader

from support.data import LARGEST_CAPTION, LARGEST_FILE, CaptionedImages, Samples, Shapes, Skip, micro_batches

TEXT = b"a red box"


def samples(source, size=16, dropout=0.0, flip=False, seed=0, cache=None):
    return Samples(source, size, (4, 4, 4), seed, dropout, flip, cache)


def encoded(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(colour=(200, 30, 40), size=(40, 24), mode="RGB"):
    return Image.new(mode, size, colour)


def noisy(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), kind)


def png_header(width, height) -> bytes:
    """A picture that says how large it is, and ends where its pixels would begin."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + checksum + struct.pack(">I", 99) + b"IDAT"


GOOD = encoded(plain())


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def pair(name, image=GOOD, text=TEXT, ending=".png"):
    return {name + ending: image, name + ".txt": text}


def tar(files, end=True) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files if isinstance(files, list) else files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        if not end:
            return file.getvalue()
    return file.getvalue()


def one_pass(source):
    """How many of a source's pairs are good, and the reasons that all others were skipped for."""
    data, skipped = samples(source), {}
    for p in range(len(source)):
        skipped |= data[p]["skipped"]
    return len(source) - len(skipped), Counter(skipped.values()) + source.skipped


# ------------------------------------------------------------------------------------------------------------
# What is skipped, and why

BAD_IMAGES = {
    "zero.jpg": (b"", "bad_image"),
    "cut.jpg": (noisy("JPEG")[:900], "bad_image"),
    "cut.png": (noisy("PNG")[:900], "bad_image"),
    "cut.webp": (noisy("WEBP")[:900], "bad_image"),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", "bad_image"),
    "random.png": (np.random.default_rng(0).bytes(999), "bad_image"),
    "large.png": (png_header(10_000, 10_000), "too_large"),
    "huge.png": (png_header(60_000, 60_000), "too_large"),
    "dot.png": (encoded(plain(size=(1, 1))), "too_small"),
    "line.png": (encoded(plain(size=(9999, 1))), "too_small"),
}
BAD_CAPTIONS = {
    "": "blank_caption", " \t\r\n": "blank_caption", "\u3000": "blank_caption", "\ufeff": "blank_caption",
    "\ufeff\ufeff ": "blank_caption", "\u200b": "blank_caption", "\0": "blank_caption"}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_skipped_for_its_reason(tmp_path, name):
    content, reason = BAD_IMAGES[name]
    source = CaptionedImages(write(tmp_path, pair("good") | {name: content, f"{name.split('.')[0]}.txt": TEXT}))
    assert one_pass(source) == (1, {reason: 1})


@pytest.mark.parametrize("text", BAD_CAPTIONS, ids=ascii)
def test_a_blank_caption_is_skipped(tmp_path, text):
    source = CaptionedImages(write(tmp_path, pair("good") | pair("bad", text=text.encode())))
    assert one_pass(source) == (1, {BAD_CAPTIONS[text]: 1})
    lines = [json.dumps({"file_name": "good.png", "text": words}) for words in (text, "a box")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "bad.png").unlink()
    assert one_pass(CaptionedImages(tmp_path)) == (1, {BAD_CAPTIONS[text]: 1})


@pytest.mark.parametrize("text, read", [
    (b"\xef\xbb\xbfa box", "a box"), (b"a\r\n  box\r\n", "a box"),
    ("größer\u3000Koala 🐨".encode(), "größer Koala 🐨"),
    (b"\xff\xfea\0", None), ("Größe".encode("latin-1"), None)])
def test_the_encoding_of_a_caption(tmp_path, text, read):
    source = CaptionedImages(write(tmp_path, pair("x", text=text)))
    if read:
        assert source.load(0)[1] == read
    else:
        with pytest.raises(Skip, match="bad_encoding"):
            source.load(0)


def test_a_long_caption_is_cut(tmp_path):
    """No caption takes more memory than this, and none ends in half a character."""
    text = "ä" * LARGEST_CAPTION
    write(tmp_path, pair("x", text=b"a" + text.encode()))
    read = CaptionedImages(tmp_path).load(0)[1]
    assert read == "a" + "ä" * (LARGEST_CAPTION // 2 - 1)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", "text": text * 3}))
    assert CaptionedImages(tmp_path).load(0)[1] == text
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "x.txt").write_text("a red circle " * LARGEST_CAPTION)
    assert {*CaptionedImages(tmp_path).load(0)[1].split()} == {"a", "red", "circle"}, "no word is cut"


def test_a_file_too_large_for_an_image_is_not_read(tmp_path):
    write(tmp_path, pair("x") | pair("huge"))
    with open(tmp_path / "huge.png", "r+b") as file:
        file.truncate(LARGEST_FILE + 1)
    assert one_pass(CaptionedImages(tmp_path)) == (1, {"too_large": 1})
    with open(tmp_path / "huge.png", "r+b") as file:
        file.truncate(LARGEST_FILE)
    assert one_pass(CaptionedImages(tmp_path)) == (2, {})
    (tmp_path / "huge.png").unlink()


@pytest.mark.parametrize("text", [None, ["a box"], {"en": "a box"}], ids=str)
def test_a_caption_in_metadata_that_is_not_text_is_skipped(tmp_path, text):
    line = json.dumps({"file_name": "x.png", "text": text})
    (write(tmp_path, pair("x")) / "metadata.jsonl").write_text(line)
    with pytest.raises(Skip, match="caption"):
        CaptionedImages(tmp_path).load(0)


def test_half_a_surrogate_pair_in_metadata_is_skipped(tmp_path):
    line = r'{"file_name": "x.png", "text": "a \ud83d box"}'
    (write(tmp_path, pair("x")) / "metadata.jsonl").write_text(line)
    with pytest.raises(Skip, match="bad_encoding"):  # no tokenizer can read it
        CaptionedImages(tmp_path).load(0)


def test_what_has_no_partner_is_counted(tmp_path):
    alone = {"lonely.png": GOOD} | {f"{name}.txt": TEXT for name in ("silent", "folder", "link")}
    write(tmp_path, pair("good") | alone | {"notes.md": TEXT})
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    assert one_pass(CaptionedImages(tmp_path)) == (1, {"no_caption": 1, "no_image": 3})


def test_names(tmp_path):
    """Endings in capitals, dots, folders; and one name with two pictures, of which the first is used."""
    files = pair("A", ending=".JPG") | pair("b.c.d", text=b"dots") | pair("b.c", text=b"fewer dots") \
        | pair("deep/er/x", text=b"deep") | pair("deep/x", text=b"less deep") | {"deep/x.webp": noisy("WEBP")}
    source = CaptionedImages(write(tmp_path, files))
    assert sorted(source.load(i)[1] for i in range(len(source))) == [
        "a red box", "deep", "dots", "fewer dots", "less deep"]
    assert source.skipped == {"duplicate": 1}


def test_metadata(tmp_path):
    tmp_path = write(tmp_path / "data", {"a.png": GOOD, "b.png": GOOD, "good.txt": TEXT})
    lines = ['{"file_name": "a.png", "text": "one"}', "", "{broken", "[1]", '{"text": "no name"}',
             '{"file_name": "b.png"}',
             '{"file_name": "absent.png", "text": "two"}', '{"file_name": "b.png", "text": "three"}',
             '{"a":' * 100_000, *(json.dumps({"file_name": name, "text": "outside"}) for name in (
                 "../secret.png", "sub/../../secret.png", str(tmp_path / "secret.png"), 7))]
    write(tmp_path, {"../secret.png": GOOD})
    (tmp_path / "metadata.jsonl").write_bytes("\r\n".join(lines).encode())
    good, skipped = one_pass(CaptionedImages(tmp_path))
    assert (good, skipped) == (2, {"bad_line": 8, "no_caption": 1, "unreadable": 1})
    assert good + skipped.total() == len([line for line in lines if line])


def test_what_a_shard_or_metadata_hides_is_counted(tmp_path, capsys):
    write(tmp_path, pair("a") | pair("b") | {"0.tar": tar(pair("c"))})
    assert one_pass(CaptionedImages(tmp_path)) == (1, {"not_in_shards": 2})
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}')
    assert one_pass(CaptionedImages(tmp_path)) == (1, {"not_in_metadata.jsonl": 2})
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and all(str(tmp_path) in line for line in warnings)


def test_names_in_metadata_that_no_system_has_and_pipes(tmp_path):
    names = ["x" * 5000, "a\0b", "pipe.png", "a.png"]
    os.mkfifo(write(tmp_path, {"a.png": GOOD}) / "pipe.png")
    lines = [json.dumps({"file_name": name, "text": "one"}) for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    good, skipped = one_pass(CaptionedImages(tmp_path))
    assert good == 1 and skipped.total() == 3


def test_one_caption_for_all(tmp_path):
    source = CaptionedImages(write(tmp_path, pair("a") | {"b.jpg": encoded(plain(), "JPEG")}), "a [V] dog")
    assert [source.load(i)[1] for i in range(len(source))] == ["a [V] dog"] * 2


@pytest.mark.parametrize("files, message", [
    ({}, "no image with a caption"), ({"a.png": GOOD, "b.txt": TEXT}, "no_caption 1, no_image 1"),
    ({"a.tar": b""}, "bad_shard 1"), (None, "no folder")])
def test_a_folder_without_pairs_is_an_error(tmp_path, files, message):
    folder = tmp_path if files is not None else tmp_path / "absent"
    with pytest.raises((FileNotFoundError, ValueError), match=message) as found:
        CaptionedImages(write(folder, files or {}))
    assert "\n" not in str(found.value)


def test_pairs_of_which_none_is_good_are_an_error(tmp_path):
    files = pair("a", b"") | pair("b", text=b"") | pair("c", b"")
    data = samples(CaptionedImages(write(tmp_path, files)))
    error = data[1]["error"]  # for the main process to raise
    assert re.search("no sample can be used.*bad_image 2.*blank_caption 1", error) and "\n" not in error


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_pictures_that_are_damaged_anywhere_never_stop_a_run(tmp_path):
    """What Pillow raises for a changed byte is not only OSError."""
    rng, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112], exif[0x010e] = 6, "words"
    kinds = {"PNG": {"exif": exif}, "JPEG": {"exif": exif}, "WEBP": {"exif": exif}, "TIFF": {}, "GIF": {}}
    kinds |= {"AVIF": {}} if features.check("avif") else {}
    files = {}
    for kind, options in kinds.items():
        whole = np.frombuffer(encoded(plain(), kind, **options), np.uint8)
        for i in range(60):
            damaged = whole.copy()
            damaged[rng.integers(len(whole), size=3)] = rng.integers(256, size=3)
            files |= pair(f"{kind}-{i}", damaged.tobytes(), ending=".jpg")
    source = CaptionedImages(write(tmp_path, files))
    good, skipped = one_pass(source)
    assert good + skipped.total() == len(source) and 0 < good < len(source)


# ------------------------------------------------------------------------------------------------------------
# Shards

def test_shards(tmp_path):
    """Keys with dots and capitals, one that is repeated or in another shard, a caption or a picture alone."""
    info = json.dumps({"original_width": 999, "original_height": 500}).encode()
    first = [("0.png", GOOD), ("0.txt", b"zero"), ("0.json", info), ("1.a.JPG", GOOD), ("1.a.txt", b"one"),
             ("1.b.txt", TEXT),
             ("0.png", b""), ("0.txt", b"again"), ("2.json", info), ("3.png", GOOD), ("3.json", info)]
    shards = {"b/1.tar": tar(pair("0", text=b"other")), "a.tar": tar(first), "a_stats.json": b"{}"}
    source = CaptionedImages(write(tmp_path, shards))
    found = [source.load(i) for i in range(len(source))]
    expected = [("zero", (500, 999)), ("one", (24, 40)), ("other", (24, 40))]
    assert [(text, size) for _, text, size in found] == expected
    assert source.skipped["no_image"] == source.skipped["no_caption"] == 1 <= source.skipped["duplicate"]


def test_a_repeated_pair_is_one_skip(tmp_path):
    repeated = [*pair("0").items(), *pair("0").items()]
    good, skipped = one_pass(CaptionedImages(write(tmp_path, {"a.tar": tar(repeated)})))
    assert (good, skipped) == (1, {"duplicate": 1})


def test_a_shard_that_is_cut_anywhere(tmp_path, capsys):
    """What is whole before the cut is used; a cut gives a warning, unless it takes only zeros at the end."""
    files = {name: content for i in range(3) for name, content in pair(str(i)).items()}
    whole = tar(files)
    ends = [512 * sum(1 + -(-len(content) // 512) for content in list(files.values())[:2 * i])
            for i in range(4)]
    write(tmp_path, {"z.tar": tar(pair("other"))})
    for border in range(0, ends[-1] + 2048, 512):
        for cut in {max(border - 1, 0), border, border + 1}:
            write(tmp_path, {"a.tar": whole[:cut]})
            source = CaptionedImages(tmp_path)
            warned = "a.tar is cut" in capsys.readouterr().err
            assert len(source) == 1 + sum(end <= cut for end in ends[1:]), cut
            assert warned == (source.skipped["bad_shard"] == 1) == (cut < ends[-1] + 512), cut


@pytest.mark.parametrize("content", [
    bytes(10240), b"<html>", tar(pair("0"), end=False), zlib.compress(tar(pair("0"))),
    tar(pair("0"))[:512] + bytes(512)])
def test_a_bad_shard_gives_a_warning(tmp_path, capsys, content):
    write(tmp_path, {"a.tar": content, "z.tar": tar(pair("other"))})
    source = CaptionedImages(tmp_path)
    assert source.skipped["bad_shard"] == 1 and str(tmp_path / "a.tar") in capsys.readouterr().err


def test_a_damaged_header_ends_a_shard(tmp_path, capsys):
    files = pair("0") | pair("1")
    damaged = bytearray(tar(files))
    second = len(tar(pair("0"), end=False))
    damaged[second] ^= 1  # in the name of its picture
    source = CaptionedImages(write(tmp_path, {"a.tar": bytes(damaged)}))
    assert len(source) == 1 and source.skipped["bad_shard"] == 1


def test_nothing_of_a_shard_is_written_to_disk(tmp_path):
    names = ["../../x", "/tmp/distill-test-x", "a/../../b"]
    content = tar({key: data for name in names for key, data in pair(name).items()})
    links = io.BytesIO()
    with tarfile.open(fileobj=links, mode="w") as archive:
        for name, kind in (("l.png", tarfile.SYMTYPE), ("d.png", tarfile.CHRTYPE),
                           ("h.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            archive.addfile(member)
            caption = tarfile.TarInfo(name[0] + ".txt")
            caption.size = len(TEXT)
            archive.addfile(caption, io.BytesIO(TEXT))
    folder = write(tmp_path / "one" / "two", {"a.tar": content, "b.tar": links.getvalue()})
    before = sorted(tmp_path.rglob("*"))
    source = CaptionedImages(folder)
    assert one_pass(source) == (3, {"no_image": 3})
    assert sorted(tmp_path.rglob("*")) == before


def in_shards(folder):
    """Two shards of three images, of which one is bad."""
    return write(folder, {"a.tar": tar(pair("0") | pair("1", b"")), "b/c.tar": tar(pair("2") | {"3.png": GOOD})})


def test_the_index_of_shards_is_made_once(tmp_path, monkeypatch):
    index = tmp_path / "index"
    first = CaptionedImages(in_shards(tmp_path / "data"), index=index)
    before = index.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        for name in ("data", "elsewhere"):
            again = CaptionedImages((tmp_path / "data").rename(tmp_path / name), index=index)
            assert (again.paths, again.fingerprint) == (first.paths, first.fingerprint)
            assert np.array_equal(again.spans, first.spans)
            assert one_pass(again) == (2, {"bad_image": 1, "no_caption": 1})
    assert index.read_bytes() == before


@pytest.mark.parametrize("change", ["time", "size", "more", "less", "name", "caption"])
def test_the_index_of_shards_that_changed_is_made_again(tmp_path, change):
    folder, index = in_shards(tmp_path / "data"), tmp_path / "index"
    first = CaptionedImages(folder, index=index)
    shard, caption = folder / "a.tar", None
    if change == "time":
        shard.write_bytes(tar(pair("1") | pair("0", b"")))       # as large, and other images
        os.utime(shard, ns=(1, 1))
    elif change == "size":
        shard.write_bytes(tar(pair("0")))
    elif change == "more":
        write(folder, {"d.tar": tar(pair("4"))})
    elif change == "less":
        shard.unlink()
    elif change == "name":
        shard.rename(folder / "z.tar")
    else:
        caption = "a [V] dog"
    source, expected = CaptionedImages(folder, caption, index), CaptionedImages(folder, caption)
    assert one_pass(source) == one_pass(expected) and np.array_equal(source.spans, expected.spans)
    assert source.fingerprint == expected.fingerprint != first.fingerprint or change == "time"


def test_an_index_that_is_damaged_anywhere_is_made_again(tmp_path):
    folder, index = in_shards(tmp_path / "data"), tmp_path / "index"
    whole, rng = CaptionedImages(folder, index=index), np.random.default_rng(0)
    content = index.read_bytes()
    damaged = [content[:cut] for cut in range(0, len(content), 90)]
    for i in range(0, len(content), 5):
        damaged.append(bytearray(content))
        damaged[-1][i] ^= 1 << int(rng.integers(8))
    for bad in damaged:
        index.write_bytes(bad)
        source = CaptionedImages(folder, index=index)
        assert (source.paths, source.skipped) == (whole.paths, whole.skipped)
        assert np.array_equal(source.spans, whole.spans)


@pytest.mark.parametrize("shards", [False, True], ids=["files", "shards"])
def test_a_fingerprint_tells_data_from_other_data(tmp_path, shards):
    def fingerprint(**files: bytes) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        content = {name.replace("_", "."): content for name, content in files.items()}
        return CaptionedImages(write(folder, {"a.tar": tar(content)} if shards else content)).fingerprint

    files = {"a_png": GOOD, "a_txt": TEXT, "b_png": GOOD, "b_txt": TEXT}
    changes = [{}, files | {"a_png": GOOD + b"more"}, files | {"b_txt": b"other"},
               files | {"c_png": GOOD, "c_txt": TEXT}, {name: files[name] for name in ("a_png", "a_txt")}]
    if not shards:                                               # whose members are known by their places
        changes.append({name.replace("b", "c"): content for name, content in files.items()})
    found = [fingerprint(**(change or files)) for change in changes]
    assert len(set(found)) == len(found) and fingerprint(**files) == found[0]


def test_a_member_of_ten_gigabytes_is_not_read(tmp_path):
    member = tarfile.TarInfo("0.png")
    member.size = 10 * 2**30
    write(tmp_path, {"a.tar": tar(pair("1"), end=False) + member.tobuf() + bytes(1024)})
    source = CaptionedImages(tmp_path)
    assert len(source) == 1 and source.skipped["bad_shard"] == 1


# ------------------------------------------------------------------------------------------------------------
# What is made of a picture

def half(colour, other):
    image = plain(colour)
    image.paste(other, (20, 0, 40, 24))
    return image


def palette(**options):
    image = Image.new("P", (40, 24), 1)
    image.putpalette([9, 9, 9, 10, 20, 200])
    return encoded(image, **options)


MOVING = {"save_all": True, "append_images": [plain((0, 0, 250))]}
MODES = {  # contents, and the colour they show
    "1": (encoded(plain(1, mode="1")), (255, 255, 255)),
    "L": (encoded(plain(100, mode="L")), (100, 100, 100)),
    "LA": (encoded(plain((100, 0), mode="LA")), (255, 255, 255)),
    "P": (palette(), (10, 20, 200)),
    "P, transparent": (palette(transparency=1), (255, 255, 255)),
    "RGB, transparent": (encoded(plain((1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255)),
    "RGBA": (encoded(plain((255, 0, 0, 51), mode="RGBA")), (255, 204, 204)),
    "CMYK": (encoded(plain((0, 255, 255, 0), mode="CMYK"), "JPEG", quality=100), (255, 0, 0)),
    "I;16": (encoded(Image.fromarray(np.full((24, 40), 100 * 257, np.uint16))), (100, 100, 100)),
    "JPEG": (encoded(plain((200, 30, 40)), "JPEG", quality=100), (200, 30, 40)),
    "PNG named .jpg": (GOOD, (200, 30, 40)),
    "GIF, animated": (encoded(plain((250, 0, 0)), "GIF", **MOVING), (250, 0, 0)),
    "PNG, animated": (encoded(plain((250, 0, 0)), "PNG", **MOVING), (250, 0, 0)),
    "WEBP, animated": (encoded(plain((250, 0, 0)), "WEBP", lossless=True, **MOVING), (250, 0, 0)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_kind_of_picture_becomes_rgb(tmp_path, name):
    content, colour = MODES[name]
    image, _, size = CaptionedImages(write(tmp_path, pair("x", content, ending=".jpg"))).load(0)
    assert image.mode == "RGB" and image.size == (40, 24) and size == (24, 40)
    assert np.abs(np.asarray(image).astype(int) - colour).max() <= 2 * ("JPEG" in name or name == "CMYK")


def test_pictures_are_turned_upright_and_measured_after_it(tmp_path):
    how = Image.Transpose
    stored = {1: None, 2: how.FLIP_LEFT_RIGHT, 3: how.ROTATE_180, 4: how.FLIP_TOP_BOTTOM, 5: how.TRANSPOSE,
              6: how.ROTATE_90, 7: how.TRANSVERSE, 8: how.ROTATE_270}
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
    for orientation, turn in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encoded(upright if turn is None else upright.transpose(turn), exif=exif)
        image, _, size = CaptionedImages(write(tmp_path, pair("x", content))).load(0)
        assert image.tobytes() == upright.tobytes() and size == (24, 40), orientation


@pytest.mark.parametrize("info", [
    "", "[]", "{}", '{"original_width": 9}', "\xff", '{"a":' * 100_000,
    *[f'{{"original_width": {width}, "original_height": 9}}' for width in
      ("null", "0", "-9", "65537", "1e999", "NaN", '"wide"', "[]", "9" * 5000)]], ids=lambda info: info[:40])
def test_without_a_sensible_original_size_it_is_the_images(tmp_path, info):
    source = CaptionedImages(write(tmp_path, pair("x") | {"x.json": info.encode("latin-1")}))
    assert source.load(0)[2] == (24, 40)


def coordinates(height, width):
    """A picture that is red by column and green by row."""
    y, x = np.mgrid[:height, :width]
    return encoded(Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8)))


@pytest.mark.parametrize("height, width", [(64, 200), (150, 64), (64, 64)])
def test_the_crop_is_where_its_conditions_say_and_flips_come_first(tmp_path, height, width):
    data = samples(CaptionedImages(write(tmp_path, pair("x", coordinates(height, width)))), size=64, flip=True)
    seen = set()
    for p in range(24):
        sample = data[p]
        red, green, _ = sample["pixels"].int()
        original_height, original_width, top, left, *target = sample["time_ids"].int().tolist()
        flipped = bool(red[0, 0] > red[0, 1])
        assert (original_height, original_width, target) == (height, width, [64, 64])
        assert green[0, 0] == top and green[-1, 0] == top + 63
        assert red[0, 0] == (width - 1 - left if flipped else left)
        seen.add((flipped, top, left))
    assert {flipped for flipped, *_ in seen} == {False, True}
    assert len({place for _, *place in seen for place in place}) > 10 or height == width


def test_a_crop_of_a_picture_that_is_resized(tmp_path):
    """The crop's place is in pixels after resizing by the short side, the original size in those before."""
    source = CaptionedImages(write(tmp_path, pair("x", coordinates(48, 120)) | {
        "x.json": b'{"original_height": 480, "original_width": 1200}'}))
    for p in range(8):
        sample = samples(source)[p]
        height, width, top, left, *_ = sample["time_ids"].tolist()
        red, green, _ = sample["pixels"][:, 8, 8].float()
        assert (height, width, top) == (480, 1200, 0) and 0 <= left <= 24
        assert sample["pixels"].shape == (3, 16, 16)
        assert abs(red - 3 * (left + 8.5)) < 2 and abs(green - 3 * 8.5) < 2


# ------------------------------------------------------------------------------------------------------------
# What sample p is

def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(x, b[key]) if isinstance(x, torch.Tensor) else x == b[key] for key, x in a.items())


def many(folder):
    """Twelve pairs, of which five are bad."""
    rng = np.random.default_rng(1)
    files = {}
    for i in range(12):
        image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
        files |= pair(f"{i:02}", b"" if i % 3 == 0 else encoded(image), b" " if i == 5 else b"number %d" % i)
    return CaptionedImages(write(folder, files))


def test_sample_p_is_the_same_in_any_batch_and_any_process(tmp_path):
    source = many(tmp_path)
    straight = {p: samples(source, dropout=0.5, flip=True)[p] for p in reversed(range(24))}
    for workers, batch, micro, world in ((0, 6, 3, 1), (0, 8, 2, 2), (2, 8, 4, 1), (2, 8, 2, 2)):
        found = {}
        for rank in range(world):
            batches = list(micro_batches(0, 24 // batch, batch, micro, rank, world))
            loader = DataLoader(samples(source, dropout=0.5, flip=True), batch_sampler=batches,
                                num_workers=workers, collate_fn=list)
            for places, loaded in zip(batches, loader, strict=True):
                found |= zip(places, loaded, strict=True)
        assert found.keys() == straight.keys()
        assert all(equal(found[p], straight[p]) for p in straight)
    assert not equal(straight[0], samples(source, dropout=0.5, flip=True, seed=1)[0])


def test_each_step_has_the_same_positions_on_any_number_of_processes():
    for start in (0, 3):
        for world, micro in ((1, 8), (1, 2), (2, 2), (4, 1)):
            parts = [list(micro_batches(start, 5, 8, micro, rank, world)) for rank in range(world)]
            assert {len(part) for part in parts} == {(5 - start) * 8 // micro // world}
            for step in range(5 - start):
                count = 8 // micro // world
                one = sorted(p for part in parts for places in part[step * count:(step + 1) * count]
                             for p in places)
                assert one == list(range((start + step) * 8, (start + step + 1) * 8))


def test_an_epoch_has_each_pair_once_in_an_order_of_its_own(tmp_path):
    files = {}
    for i in range(12):
        files |= pair(str(i), text=str(i).encode())
    data = samples(CaptionedImages(write(tmp_path, files)))
    orders = [[data[p]["caption"] for p in range(12 * epoch, 12 * epoch + 12)] for epoch in range(3)]
    assert all(sorted(order, key=int) == [str(i) for i in range(12)] for order in orders)
    assert len(set(map(tuple, orders))) == 3 and orders[0] != sorted(orders[0], key=int)
    crops = {tuple(data[p]["time_ids"].tolist()) for p in range(36)}
    assert len(crops) > 3  # a new crop each time it is seen


def test_a_bad_pair_is_replaced_by_the_next_good_one(tmp_path):
    source = many(tmp_path)
    data = samples(source)
    order = [data.index_at(p) for p in range(36)]
    bad = {i: "bad_image" if i % 3 == 0 else "blank_caption" for i in (0, 3, 5, 6, 9)}
    for p in range(24):
        next_good = next(place for place in range(p, 36) if order[place] not in bad)
        assert data[p]["caption"] == f"number {order[next_good]}"
        assert data[p]["skipped"] == {order[place]: bad[order[place]] for place in range(p, next_good)}
    good, skipped = one_pass(source)
    assert (good, skipped) == (7, {"bad_image": 4, "blank_caption": 1}) and good + skipped.total() == 12


def test_noise_timestep_and_dropout():
    data = samples(Shapes(), size=64, dropout=0.25)
    found = [data[p] for p in range(300)]
    noise = torch.stack([sample["noise"] for sample in found] + [sample["latent_noise"] for sample in found])
    timesteps = [sample["timestep"] for sample in found]
    assert noise.dtype == torch.float32 and abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert len({tuple(tensor.flatten()[:3].tolist()) for tensor in noise}) == 600
    assert min(timesteps) < 20 and max(timesteps) > 980 and abs(np.mean(timesteps) - 499.5) < 60
    assert 45 < sum(sample["dropped"] for sample in found) < 105
    assert not any(samples(Shapes(), size=64)[p]["dropped"] for p in range(20))
    assert all(samples(Shapes(), size=64, dropout=1.0)[p]["dropped"] for p in range(20))
    assert all(sample["pixels"].shape == (3, 64, 64) and sample["pixels"].dtype == torch.uint8
               and sample["pixels"].min() < 100 < 200 < sample["pixels"].max() for sample in found)


class Kept:
    """A cache in memory."""

    def __init__(self):
        self.records = {}
        self.read = self.records.get


def test_with_a_cache_an_image_has_one_crop(tmp_path):
    """It is the same in every epoch and for every seed; all else random is as without a cache."""
    source = many(tmp_path)
    cached, other, without = samples(source, cache=Kept()), samples(source, seed=1, cache=Kept()), samples(source)
    crops = {}
    for p in range(24):
        for sample in (cached[p], other[p]):
            crops.setdefault(sample["index"], []).append(sample["time_ids"])
        ours, theirs = cached[p], without[p]
        for name in ("noise", "latent_noise", "timestep", "dropped", "index", "skipped"):
            assert equal({name: ours[name]}, {name: theirs[name]})
    assert all(torch.equal(crop, first) for first, *rest in crops.values() for crop in rest)
    assert len({tuple(first.tolist()) for first, *_ in crops.values()}) > 2
    index = cached[0]["index"]
    cached.cache.records[index] = {"mean": torch.ones(1), "time_ids": torch.zeros(6)}
    assert "pixels" not in cached[0] and torch.equal(cached[0]["mean"], torch.ones(1))
    assert torch.equal(cached[0]["noise"], without[0]["noise"])
