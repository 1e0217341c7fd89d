"""The data of distill.py: which pictures and captions are used, which are skipped, and what sample p is."""

import io
import json
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

from data import Pairs, Samples, Shapes, Skip, positions

T = Image.Transpose
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
    source = Pairs(str(write(tmp_path, pair("good") | {name: content, f"{name.split('.')[0]}.txt": TEXT})))
    assert one_pass(source) == (1, {reason: 1})


@pytest.mark.parametrize("text", BAD_CAPTIONS, ids=ascii)
def test_a_blank_caption_is_skipped(tmp_path, text):
    source = Pairs(str(write(tmp_path, pair("good") | pair("bad", text=text.encode()))))
    assert one_pass(source) == (1, {BAD_CAPTIONS[text]: 1})
    lines = [json.dumps({"file_name": "good.png", "text": words}) for words in (text, "a box")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert one_pass(Pairs(str(tmp_path))) == (1, {BAD_CAPTIONS[text]: 1})


@pytest.mark.parametrize("text, read", [
    (b"\xef\xbb\xbfa box", "a box"), (b"a\r\n  box\r\n", "a box"),
    ("größer\u3000Koala 🐨".encode(), "größer Koala 🐨"),
    (b"\xff\xfea\0", None), ("Größe".encode("latin-1"), None)])
def test_the_encoding_of_a_caption(tmp_path, text, read):
    source = Pairs(str(write(tmp_path, pair("x", text=text))))
    if read:
        assert source.load(0)[1] == read
    else:
        with pytest.raises(Skip, match="bad_encoding"):
            source.load(0)


@pytest.mark.parametrize("text", [None, ["a box"], {"en": "a box"}], ids=str)
def test_a_caption_in_metadata_that_is_not_text_is_skipped(tmp_path, text):
    line = json.dumps({"file_name": "x.png", "text": text})
    (write(tmp_path, pair("x")) / "metadata.jsonl").write_text(line)
    with pytest.raises(Skip, match="caption"):
        Pairs(str(tmp_path)).load(0)


def test_half_a_surrogate_pair_in_metadata_is_skipped(tmp_path):
    line = r'{"file_name": "x.png", "text": "a \ud83d box"}'
    (write(tmp_path, pair("x")) / "metadata.jsonl").write_text(line)
    with pytest.raises(Skip, match="bad_encoding"):  # no tokenizer can read it
        Pairs(str(tmp_path)).load(0)


def test_what_has_no_partner_is_counted(tmp_path):
    alone = {"lonely.png": GOOD} | {f"{name}.txt": TEXT for name in ("silent", "folder", "link")}
    write(tmp_path, pair("good") | alone | {"notes.md": TEXT})
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    assert one_pass(Pairs(str(tmp_path))) == (1, {"no_caption": 1, "no_image": 3})


def test_names(tmp_path):
    """Endings in capitals, dots, folders; and one name with two pictures, of which the first is used."""
    files = pair("A", ending=".JPG") | pair("b.c.d", text=b"dots") | pair("b.c", text=b"fewer dots") \
        | pair("deep/er/x", text=b"deep") | pair("deep/x", text=b"less deep") | {"deep/x.webp": noisy("WEBP")}
    source = Pairs(str(write(tmp_path, files)))
    assert sorted(source.load(i)[1] for i in range(len(source))) == [
        "a red box", "deep", "dots", "fewer dots", "less deep"]
    assert source.skipped == {"duplicate": 1}


def test_metadata(tmp_path):
    write(tmp_path, {"a.png": GOOD, "b.png": GOOD, "good.txt": TEXT})
    lines = ['{"file_name": "a.png", "text": "one"}', "", "{broken", "[1]", '{"text": "no name"}',
             '{"file_name": "b.png"}',
             '{"file_name": "absent.png", "text": "two"}', '{"file_name": "b.png", "text": "three"}',
             '{"a":' * 100_000]
    (tmp_path / "metadata.jsonl").write_bytes("\r\n".join(lines).encode())
    good, skipped = one_pass(Pairs(str(tmp_path)))
    assert (good, skipped) == (2, {"bad_line": 4, "no_caption": 1, "unreadable": 1})
    assert good + skipped.total() == len([line for line in lines if line])


def test_one_caption_for_all(tmp_path):
    source = Pairs(str(write(tmp_path, pair("a") | {"b.jpg": encoded(plain(), "JPEG")})), "a [V] dog")
    assert [source.load(i)[1] for i in range(len(source))] == ["a [V] dog"] * 2


@pytest.mark.parametrize("files, message", [
    ({}, "no image with a caption"), ({"a.png": GOOD, "b.txt": TEXT}, "no_caption 1, no_image 1"),
    ({"a.tar": b""}, "bad_shard 1"), (None, "no folder")])
def test_a_folder_without_pairs_is_an_error(tmp_path, files, message):
    folder = tmp_path if files is not None else tmp_path / "absent"
    with pytest.raises((FileNotFoundError, ValueError), match=message) as found:
        Pairs(str(write(folder, files or {})))
    assert "\n" not in str(found.value)


def test_pairs_of_which_none_is_good_are_an_error(tmp_path):
    files = pair("a", b"") | pair("b", text=b"") | pair("c", b"")
    data = samples(Pairs(str(write(tmp_path, files))))
    told = data[1]["error"]  # for the main process to raise
    assert re.search("no sample can be used.*bad_image 2.*blank_caption 1", told) and "\n" not in told


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
    source = Pairs(str(write(tmp_path, files)))
    good, skipped = one_pass(source)
    assert good + skipped.total() == len(source) and 0 < good < len(source)


# Shards

def test_shards(tmp_path):
    """Keys with dots and capitals, one that is repeated or in another shard, a caption or a picture alone."""
    info = json.dumps({"original_width": 999, "original_height": 500}).encode()
    first = [("0.png", GOOD), ("0.txt", b"zero"), ("0.json", info), ("1.a.JPG", GOOD), ("1.a.txt", b"one"),
             ("1.b.txt", TEXT),
             ("0.png", b""), ("0.txt", b"again"), ("2.json", info), ("3.png", GOOD), ("3.json", info)]
    shards = {"b/1.tar": tar(pair("0", text=b"other")), "a.tar": tar(first), "a_stats.json": b"{}"}
    source = Pairs(str(write(tmp_path, shards)))
    found = [source.load(i) for i in range(len(source))]
    expected = [("zero", (500, 999)), ("one", (24, 40)), ("other", (24, 40))]
    assert [(text, size) for _, text, size in found] == expected
    assert source.skipped["no_image"] == source.skipped["no_caption"] == 1 <= source.skipped["duplicate"]


def test_a_repeated_pair_is_one_skip(tmp_path):
    repeated = [*pair("0").items(), *pair("0").items()]
    good, skipped = one_pass(Pairs(str(write(tmp_path, {"a.tar": tar(repeated)}))))
    assert (good, skipped) == (1, {"duplicate": 1})


def test_a_shard_that_is_cut_anywhere(tmp_path, capsys):
    """What is whole before the cut is used; the cut is told, unless it only takes zeros after the end."""
    files = {name: content for i in range(3) for name, content in pair(str(i)).items()}
    whole = tar(files)
    ends = [512 * sum(1 + -(-len(content) // 512) for content in list(files.values())[:2 * i])
            for i in range(4)]
    write(tmp_path, {"z.tar": tar(pair("other"))})
    for border in range(0, ends[-1] + 2048, 512):
        for cut in {max(border - 1, 0), border, border + 1}:
            write(tmp_path, {"a.tar": whole[:cut]})
            source = Pairs(str(tmp_path))
            told = "a.tar is cut" in capsys.readouterr().err
            assert len(source) == 1 + sum(end <= cut for end in ends[1:]), cut
            assert told == (source.skipped["bad_shard"] == 1) == (cut < ends[-1] + 512), cut


@pytest.mark.parametrize("content", [
    bytes(10240), b"<html>", tar(pair("0"), end=False), zlib.compress(tar(pair("0"))),
    tar(pair("0"))[:512] + bytes(512)])
def test_a_bad_shard_is_told(tmp_path, capsys, content):
    write(tmp_path, {"a.tar": content, "z.tar": tar(pair("other"))})
    source = Pairs(str(tmp_path))
    assert source.skipped["bad_shard"] == 1 and str(tmp_path / "a.tar") in capsys.readouterr().err


def test_a_damaged_header_ends_a_shard(tmp_path, capsys):
    files = pair("0") | pair("1")
    damaged = bytearray(tar(files))
    second = len(tar(pair("0"), end=False))
    damaged[second] ^= 1  # in the name of its picture
    source = Pairs(str(write(tmp_path, {"a.tar": bytes(damaged)})))
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
    source = Pairs(str(folder))
    assert one_pass(source) == (3, {"no_image": 3})
    assert sorted(tmp_path.rglob("*")) == before


def test_a_member_of_ten_gigabytes_is_not_read(tmp_path):
    member = tarfile.TarInfo("0.png")
    member.size = 10 * 2**30
    write(tmp_path, {"a.tar": tar(pair("1"), end=False) + member.tobuf() + bytes(1024)})
    source = Pairs(str(tmp_path))
    assert len(source) == 1 and source.skipped["bad_shard"] == 1


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
    image, _, size = Pairs(str(write(tmp_path, pair("x", content, ending=".jpg")))).load(0)
    assert image.mode == "RGB" and image.size == (40, 24) and size == (24, 40)
    assert np.abs(np.asarray(image).astype(int) - colour).max() <= 2 * ("JPEG" in name or name == "CMYK")


def test_pictures_are_turned_upright_and_measured_after_it(tmp_path):
    stored = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
              6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
    for orientation, turn in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encoded(upright if turn is None else upright.transpose(turn), exif=exif)
        image, _, size = Pairs(str(write(tmp_path, pair("x", content)))).load(0)
        assert image.tobytes() == upright.tobytes() and size == (24, 40), orientation


@pytest.mark.parametrize("info", ["", "[]", "{}", '{"original_width": null, "original_height": 9}',
                                  '{"original_width": 1e999, "original_height": 9}'])
def test_without_an_original_size_it_is_the_picture_s(tmp_path, info):
    source = Pairs(str(write(tmp_path, pair("x") | {"x.json": info.encode()})))
    assert source.load(0)[2] == (24, 40)


def coordinates(height, width):
    """A picture that is red by column and green by row."""
    y, x = np.mgrid[:height, :width]
    return encoded(Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8)))


@pytest.mark.parametrize("height, width", [(64, 200), (150, 64), (64, 64)])
def test_the_crop_is_where_its_conditions_say_and_flips_come_first(tmp_path, height, width):
    data = samples(Pairs(str(write(tmp_path, pair("x", coordinates(height, width))))), size=64, flip=True)
    seen = set()
    for p in range(24):
        sample = data[p]
        red, green, _ = ((sample["pixels"] + 1) * 127.5).round().int()
        original_height, original_width, top, left, *target = sample["time_ids"].int().tolist()
        flipped = bool(red[0, 0] > red[0, 1])
        assert (original_height, original_width, target) == (height, width, [64, 64])
        assert green[0, 0] == top and green[-1, 0] == top + 63
        assert red[0, 0] == (width - 1 - left if flipped else left)
        seen.add((flipped, top, left))
    assert {flipped for flipped, *_ in seen} == {False, True}
    assert len({place for _, *place in seen for place in place}) > 10 or height == width


def test_a_crop_of_a_picture_that_is_resized(tmp_path):
    """By its short side; the crop's place counts in pixels after it, the original size in those before."""
    source = Pairs(str(write(tmp_path, pair("x", coordinates(48, 120)) | {
        "x.json": b'{"original_height": 480, "original_width": 1200}'})))
    for p in range(8):
        sample = samples(source)[p]
        height, width, top, left, *_ = sample["time_ids"].tolist()
        red, green, _ = (sample["pixels"][:, 8, 8] + 1) * 127.5
        assert (height, width, top) == (480, 1200, 0) and 0 <= left <= 24
        assert sample["pixels"].shape == (3, 16, 16)
        assert abs(red - 3 * (left + 8.5)) < 2 and abs(green - 3 * 8.5) < 2


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
    return Pairs(str(write(folder, files)))


def test_sample_p_is_the_same_in_any_batch_and_any_process(tmp_path):
    source = many(tmp_path)
    straight = {p: samples(source, dropout=0.5, flip=True)[p] for p in reversed(range(24))}
    for workers, batch, micro, world in ((0, 6, 3, 1), (0, 8, 2, 2), (2, 8, 4, 1), (2, 8, 2, 2)):
        found = {}
        for rank in range(world):
            batches = list(positions(0, 24 // batch, batch, micro, rank, world))
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
            parts = [list(positions(start, 5, 8, micro, rank, world)) for rank in range(world)]
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
    data = samples(Pairs(str(write(tmp_path, files))))
    orders = [[data[p]["caption"] for p in range(12 * epoch, 12 * epoch + 12)] for epoch in range(3)]
    assert all(sorted(order, key=int) == [str(i) for i in range(12)] for order in orders)
    assert len(set(map(tuple, orders))) == 3 and orders[0] != sorted(orders[0], key=int)
    crops = {tuple(data[p]["time_ids"].tolist()) for p in range(36)}
    assert len(crops) > 3  # a new crop each time it is seen


def test_a_bad_pair_is_replaced_by_the_next_good_one(tmp_path):
    source = many(tmp_path)
    data = samples(source)
    order = [data.index(p) for p in range(36)]
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
    assert all(sample["pixels"].shape == (3, 64, 64)
               and -1 <= sample["pixels"].min() < sample["pixels"].max() <= 1
               for sample in found)
