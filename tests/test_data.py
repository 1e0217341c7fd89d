"""Which pictures and captions distill.py uses, what it skips and why, and what sample p is."""

import io
import json
import os
import pickle
import tarfile
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features
from torch.utils.data import DataLoader

from common import equal, refusal
from support.data import (
    LARGEST_FILE, REASONS, CaptionedImages, Samples, Shapes, Skip, collate, micro_batches)

TEXT = b"a red box"


def encoded(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(color=(200, 30, 40), size=(40, 24), mode="RGB"):
    return Image.new(mode, size, color)


def noisy(kind="PNG", size=(64, 64)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), kind)


GOOD = encoded(plain())


def pair(name, image=GOOD, text=TEXT, ending=".png"):
    return {name + ending: image, name + ".txt": text}


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def tar(files) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files if isinstance(files, list) else files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def source(tmp_path):
    """Adds files to a folder and reads it; its index is beside it."""
    def source(files={}, caption=None):
        (tmp_path / "data").mkdir(exist_ok=True)
        write(tmp_path / "data", files)
        return CaptionedImages(tmp_path / "data", tmp_path / "index", caption)
    return source


def samples(source, size=16, seed=0, cached=None):
    return Samples(source, size, (4, 4, 4), seed, cached)


def one_pass(source) -> tuple[int, Counter]:
    """How many of a source's pairs are good, and the reasons for which others are left out."""
    data = samples(source)
    counts = Counter([None, *REASONS][data[p]["skipped"]] for p in range(len(source)))
    return counts.pop(None, 0), counts + source.skipped


# What is skipped, and why


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_each_bad_image_is_counted_by_its_reason(source):
    bad = {"zero.jpg": b"", "cut.jpg": noisy("JPEG")[:900], "cut2.png": noisy()[:900], "page.webp": b"<html>"}
    bad |= {f"{side}.png": encoded(plain(0, (side, 10_000), "1")) for side in (9_000, 18_000)}
    bad |= {"dot.png": encoded(plain(size=(1, 1))), "line.png": encoded(plain(size=(99, 1))), "file.png": b""}
    bad |= {"chunk.png": GOOD[:11] + b"\x0c" + GOOD[12:]}         # for which Pillow raises ValueError
    made = source(pair("good") | bad | {f"{name.split('.')[0]}.txt": TEXT for name in [*bad, "link"]})
    os.truncate(made.root / "file.png", LARGEST_FILE + 1)
    (made.root / "link.png").symlink_to("nowhere.png")
    assert one_pass(source()) == (1, {"bad_image": 5, "too_large": 3, "too_small": 2, "unreadable": 1})
    strip = source({"0.tar": tar(pair("strip", encoded(plain(0, (11_000, 128), "L"))))})
    with pytest.raises(Skip, match="too_large"):                 # when its short side is 1024
        samples(strip, 1024).picture(0, 0)


@pytest.mark.parametrize("text, read", [
    ("\ufeffa box".encode(), "a box"), (b"a\r\n  box\r\n", "a box"), (b"a b " * 10**6, "a b " * 2**14),
    ("größer\u3000Koala 🐨".encode(), "größer Koala 🐨"), ("Größe".encode("latin-1"), "bad_encoding"),
    *[(text.encode(), "no_caption") for text in ("", " \t\r\n\u3000", "\u200b", "\0")]],
    ids=lambda text: ascii(text[:9]))
def test_captions(source, text, read):
    def caption(made):
        try:
            return made.load(0)[1]
        except Skip as reason:
            return str(reason)

    assert caption(source(pair("x", text=text))) == read.strip()
    if read != "bad_encoding":
        line = json.dumps({"file_name": "x.png", "text": text.decode("utf-8-sig")})
        assert caption(source({"metadata.jsonl": line.encode()})) == read.strip()


def test_names_hidden_files_and_linked_folders(source, tmp_path):
    """Endings in capitals, dots, folders; of two pictures of a name the first; each folder once."""
    files = pair("A", ending=".JPG") | pair("b.c.d", text=b"dots") | pair("b.c", text=b"few") | pair(".x")
    files |= pair("deep/x", text=b"deep") | {"deep/x.webp": b""} | pair(".ipynb_checkpoints/y")
    made = source(files | {"lonely.bmp": GOOD, "silent.txt": TEXT, "notes.md": TEXT})
    write(tmp_path / "elsewhere", pair("z", text=b"linked"))
    (made.root / "link").symlink_to(tmp_path / "elsewhere")
    (made.root / "deep" / "loop").symlink_to(made.root)
    made = source()
    assert [made.load(i)[1] for i in range(len(made))] == ["a red box", "few", "dots", "deep", "linked"]
    assert made.skipped == {"no_caption": 1, "no_image": 1}
    made = source(caption="a [V] dog")
    assert [made.load(i)[1] for i in range(len(made))] == ["a [V] dog"] * 6


def test_metadata(source):
    lines = ['{"file_name": "a.png", "text": "one"}', "", "{broken", "[1]", '{"text": "no name"}',
             '{"file_name": "b.png"}', '{"file_name": "b.png", "text": ["list"]}', '{"a":' * 100_000,
             '{"file_name": "absent.png", "text": "two"}', r'{"file_name": "b.png", "text": "a \ud83d box"}',
             r'{"file_name": "a\u0000b", "text": "three"}', '{"file_name": "sub/b.png", "text": "three"}']
    files = {"a.png": GOOD, "sub/b.png": GOOD, "metadata.jsonl": "\r\n".join(lines).encode()}
    skipped = {"bad_line": 4, "no_caption": 2, "unreadable": 2, "bad_encoding": 1}
    assert one_pass(source(files | pair("c") | {"0.tar": tar(pair("d"))})) == (2, skipped)


def test_a_folder_without_pairs_or_without_good_ones_is_refused(source, tmp_path):
    assert str(tmp_path / "no") in refusal(CaptionedImages, tmp_path / "no", tmp_path / "index")
    assert "no_caption 1, no_image 1" in refusal(source, {"a.png": GOOD, "b.txt": TEXT})
    assert "bad_shard 1" in refusal(source, {"a.tar": b""})
    bad = source({"a.tar": tar(pair("a", b"") | pair("b", text=b""))})
    assert refusal(samples(bad).__getitem__, 0).endswith(" bad_image, no_caption")


def test_shards(source, tmp_path):
    """Keys with dots and capitals, one repeated, in two shards or without a partner, links, ../."""
    info = b'{"original_width": 999, "original_height": 500}'
    first = [("0.png", GOOD), ("0.txt", b"zero"), ("0.json", info), ("1.a.JPG", GOOD), ("1.a.txt", b"one"),
             ("1.b.txt", TEXT), ("0.png", b""), ("0.txt", b"again"), ("3.png", GOOD), ("3.json", info),
             *pair("../../x", text=b"up").items()]
    link = tarfile.TarInfo("d.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    made = source({"b/1.tar": tar(pair("0", text=b"other")), "a.tar": tar(first), "a_stats.json": b"{}",
                   "c.tar": link.tobuf() + tar({"d.txt": TEXT})} | pair("beside"))
    found = {text: size for _, text, size in map(made.load, range(len(made)))}
    assert found == {"zero": (500, 999)} | dict.fromkeys(["one", "other", "up"], (24, 40))
    assert made.skipped == {"no_image": 2, "no_caption": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "index"]  # nothing is unpacked


def test_a_shard_that_is_cut_anywhere(source, capsys):
    """What is whole before the cut is used; a cut gives a warning, unless it takes only zeros at the end."""
    files = pair("0") | pair("1")
    whole, blocks = tar(files), [1 + -(-len(content) // 512) for content in files.values()]
    ends = [512 * sum(blocks[:2 * i]) for i in range(3)]
    for border in range(0, ends[-1] + 2048, 512):
        for cut in {max(border - 1, 0), border, border + 1}:
            made = source({"a.tar": whole[:cut], "z.tar": tar(pair("other"))})
            assert len(made) == 1 + sum(end <= cut for end in ends[1:]), cut
            warned = "a.tar" in capsys.readouterr().err
            assert warned == (made.skipped["bad_shard"] == 1) == (cut < ends[-1] + 512), cut
    flipped = bytearray(whole)
    flipped[ends[1]] ^= 1                                        # in the name of the second picture
    assert source({"a.tar": flipped, "b.tar": b"<html>"}).skipped == {"bad_shard": 2}


def test_the_index_of_shards_is_used_again_until_they_change(source, monkeypatch):
    first = source({"a.tar": tar(pair("0") | pair("1", b"")), "b/c.tar": tar(pair("2") | {"3.png": GOOD})})
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        again = source()
    assert one_pass(again) == (2, {"bad_image": 1, "no_caption": 1})
    assert again.fingerprint == first.fingerprint and len(pickle.dumps(again)) < 1000
    assert pickle.loads(pickle.dumps(again)).load(0)[1] == "a red box"
    assert len(source(caption="a [V] dog")) == 4
    made = source({"a.tar": tar(pair("0"))})
    assert one_pass(made) == (2, {"no_caption": 1}) and made.fingerprint != first.fingerprint


# What is made of a picture

# A profile in which red is green and green is red, and one that says that it is sRGB.
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
NAMED = SRGB.replace(b"rXYZ", b"####").replace(b"gXYZ", b"rXYZ").replace(b"####", b"gXYZ")
SWAPPED = NAMED.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
MODES = {  # contents, and the color they show
    "LA": (encoded(plain((100, 0), mode="LA")), (255, 255, 255)),
    "P": (encoded(plain().quantize(2)), (200, 30, 40)),
    "P, transparent": (encoded(plain().quantize(2), transparency=0), (255, 255, 255)),
    "RGBA": (encoded(plain((255, 0, 0, 51), mode="RGBA")), (255, 204, 204)),
    "CMYK JPEG": (encoded(plain((0, 255, 255, 0), mode="CMYK"), "JPEG", quality=100), (255, 0, 0)),
    "I;16": (encoded(Image.fromarray(np.full((24, 40), 100 * 257, np.uint16))), (100, 100, 100)),
    "GIF, animated": (encoded(plain(), "GIF", save_all=True, append_images=[plain(0)]), (200, 30, 40)),
    "profile, JPEG": (encoded(plain(), "JPEG", quality=100, icc_profile=SWAPPED), (30, 200, 40)),
    "profile, RGBA": (encoded(plain((200, 30, 40, 255), mode="RGBA"), icc_profile=SWAPPED), (30, 200, 40)),
    "profile, P": (encoded(plain().quantize(2), icc_profile=SWAPPED), (30, 200, 40)),
    "profile, sRGB": (encoded(plain(), icc_profile=NAMED), (200, 30, 40)),
    "profile, damaged": (encoded(plain(), icc_profile=SWAPPED[:200]), (200, 30, 40)),
}


def test_every_format_is_used(source):
    kinds = ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"] + ["AVIF"] * features.check("avif")
    images = source({f"{kind}.{kind.lower()}": encoded(plain(), kind) for kind in kinds}, caption="a dog")
    assert [images.load(i)[0].size for i in range(len(images))] == [(40, 24)] * len(kinds)
    images = source({"a.png": encoded(plain(), "PPM")}, caption="a dog")
    with pytest.raises(Skip, match="bad_image"):                 # Pillow reads it, but FORMATS lacks it
        images.load(len(kinds))


@pytest.mark.parametrize("name", MODES)
def test_every_kind_of_picture_becomes_srgb(source, name):
    content, color = MODES[name]
    image, _, size = source(pair("x", content, ending=".jpg")).load(0)  # whatever its name says
    assert image.mode == "RGB" and image.size == (40, 24) and size == (24, 40)
    assert np.abs(np.asarray(image).astype(int) - color).max() <= 3 * ("JPEG" in name)


def test_pictures_are_turned_upright_and_measured_after_it(source):
    """So are the sizes in img2dataset's sidecar, which are of the file as it was stored."""
    how = Image.Transpose
    stored = (how.FLIP_LEFT_RIGHT, how.ROTATE_180, how.FLIP_TOP_BOTTOM, how.TRANSPOSE, how.ROTATE_90,
              how.TRANSVERSE, how.ROTATE_270)
    upright, exif = Image.open(io.BytesIO(noisy(size=(24, 40)))), Image.Exif()
    for exif[0x0112], turn in enumerate(stored, 2):
        content = encoded(upright.transpose(turn), exif=exif)
        image, _, size = source(pair("x", content) | {"x.json": b""}).load(0)
        assert image.tobytes() == upright.tobytes() and size == (24, 40), turn
        info = {"original_height": 480, "original_width": 800}
        if exif[0x0112] >= 5:
            info = {"original_height": 800, "original_width": 480}
        assert source({"x.json": json.dumps(info).encode()}).load(0)[2] == (480, 800), turn


def test_original_sizes_that_make_no_sense(source):
    for text in (b"{}", b"[]", b'{"a":' * 100_000, b'{"original_width": 9, "original_height": 1e999}'):
        assert source(pair("x") | {"x.json": text}).load(0)[2] == (24, 40), text[:50]


@pytest.mark.parametrize("height, width, scale", [(64, 200, 1), (150, 64, 1), (64, 64, 1), (192, 480, 3)])
def test_the_crop_is_where_its_conditions_say(source, height, width, scale):
    """In pixels after resizing by the short side; the original size is of before."""
    y, x = np.mgrid[:height, :width] // scale
    image = Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))
    data = samples(source(pair("x", encoded(image))), 64)
    places = set()
    for p in range(16):
        *original, top, left, target, also = data[p]["time_ids"].int().tolist()
        red, green, _ = data[p]["pixels"].int()
        assert (original, target, also) == ([height, width], 64, 64) and red.shape == (64, 64)
        assert abs(green[0, 0] - top) <= (scale > 1) and abs(red[-1, -1] - left - 63) <= (scale > 1)
        places.add((top, left))
    assert len(places) > 8 or height == width


# What sample p is


@pytest.fixture
def many(source):
    """Twelve pairs, of which five are bad."""
    files, sizes = {}, [(20, 30), (30, 20), (16, 16)]
    for i in range(12):
        image, text = noisy(size=sizes[i % 3]) if i % 3 else b"", b" " if i == 5 else b"number %d" % i
        files |= pair(f"{i:02}", image, text)
    return source(files)


@pytest.mark.parametrize("shapes, expected", [(True, 1067137719), (False, 1719387373)])
def test_a_run_sees_the_numbers_that_the_first_version_saw(many, shapes, expected):
    data, checksum = samples(Shapes(), 64, 7) if shapes else samples(many, seed=7), 0
    for p in range(200):
        sample = data[p]
        facts = [sample["index"], sample["timestep"], sample["dropped"], sample["time_ids"].tolist()]
        noise = (100 * torch.stack([sample["noise"], sample["latent_noise"]])).round().int()
        checksum = zlib.crc32(noise.numpy().tobytes(), zlib.crc32(json.dumps(facts).encode(), checksum))
    assert checksum == expected


def test_sample_p_is_the_same_in_any_batch_and_any_process(many):
    straight = [samples(many)[p] for p in range(24)]
    for workers, batch, micro, world in ((0, 6, 3, 1), (2, 8, 2, 2), (0, 24, 1, 4)):
        steps = [set() for _ in range(24 // batch)]
        for rank in range(world):
            positions = list(micro_batches(0, len(steps), batch, micro, rank, world))
            loader = DataLoader(samples(many), batch_sampler=positions, num_workers=workers,
                                collate_fn=collate)
            for i, (places, loaded) in enumerate(zip(positions, loader, strict=True)):
                expected = collate([straight[p] for p in places])
                assert all(loaded.pop(name) == expected.pop(name) for name in ("caption", "index", "new"))
                assert equal(loaded, expected)
                steps[i * micro * world // batch] |= {*places}
        assert steps == [{*range(i * batch, (i + 1) * batch)} for i in range(len(steps))]
    assert not torch.equal(straight[0]["noise"], samples(many, seed=1)[0]["noise"])


def test_an_epoch_has_each_pair_once_and_a_bad_one_is_replaced_by_the_next_good_one(many):
    data = samples(many)
    order = [data.index_at(p) for p in range(36)]
    assert [sorted(order[e:e + 12]) for e in (0, 12, 24)] == [[*range(12)]] * 3
    assert len({tuple(order[e:e + 12]) for e in (0, 12, 24)} | {tuple(range(12))}) == 4
    bad = {i: "bad_image" if i % 3 == 0 else "no_caption" for i in (0, 3, 5, 6, 9)}
    for p in range(24):
        next_good = next(i for i in order[p:] if i not in bad)
        assert (data[p]["caption"], data[p]["index"]) == (f"number {next_good}", next_good)
        assert [None, *REASONS][data[p]["skipped"]] == bad.get(order[p])
    assert many.prompts(3) == ["number 0", "number 1", "number 2"] and len(many.prompts(99)) == 11


def test_with_a_cache_an_image_has_one_crop(many):
    """It is the same in every epoch and for every seed; all else random is as without a cache."""
    crops, cached, without = {}, samples(many, cached=lambda index: None), samples(many)
    for p in range(24):
        for sample in (cached[p], samples(many, seed=1, cached=lambda index: None)[p]):
            crops.setdefault(sample["index"], set()).add(tuple(sample["time_ids"].tolist()))
        assert torch.equal(cached[p]["noise"], without[p]["noise"]) and all(
            cached[p][name] == without[p][name] for name in ("timestep", "dropped", "index", "skipped"))
    assert {len(places) for places in crops.values()} == {1}
    half = samples(many, cached=lambda index: {"record": torch.ones(2)} if index % 2 else None)
    batch = collate([half[p] for p in range(12)])
    assert batch["new"] == [index % 2 == 0 for index in batch["index"]]
    assert len(batch["pixels"]) == len(batch["caption"]) == sum(batch["new"]) == 12 - len(batch["record"])
