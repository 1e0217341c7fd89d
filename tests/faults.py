"""
Injects faults of every known kind and counts what they break: `python tests/faults.py` prints a table.

Each function of KINDS damages something in a folder of its own, or says which signal to send, and returns an
Injection: what to run then, and what has to come of it. `judge` alone decides. The table counts
    tracebacks   a traceback, or anything but one clear line, where the program ends with an error
    hangs        a program that is still running after LIMIT seconds
    accepted     a fault that should have been refused or reported, and was not
    losses       a run that does not end with the weights of the run without a fault, a step that was reported
                 as saved and is not, or a file that had to stay as it was
The same --seed injects the same faults; only moments of signals differ. All on the CPU, without network.
"""

import contextlib
import json
import multiprocessing
import multiprocessing.util
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import analysis  # noqa: E402
import distill  # noqa: E402
import sample  # noqa: E402
from runs import checkpoint, equal, write_pairs, write_tar, write_teacher, write_vae  # noqa: E402
from support import cli, data, files, table3  # noqa: E402
from support.checkpoint import load_checkpoint  # noqa: E402
from support.cli import ArgumentParser, number  # noqa: E402
from toy import make  # noqa: E402

LIMIT = 120  # seconds; far more than any program here takes
NUMBERS = (
    10**12, 10**6, 10**400, -1, 0, 1e300, 1000.0, 0.5, True, None, "8", [8], {}, [10**12] * 3, [10**6] * 3)
DEEP = "[" * 100_000


class Injection(NamedTuple):
    """What runs once the damage is done, and what has to come of it."""

    program: Callable[[], int | None]
    says: str = ""                       # a part of its output; "error: " means that it has to fail
    run: Path | None = None              # a run that has to end as the one without a fault does
    kept: tuple[Path, ...] = ()          # files that may not change
    signals: tuple[int, ...] = ()        # sent at a random moment; then the program is run once more
    to: str = "group"                    # group, main, reader


class Outcome(NamedTuple):
    code: int | None                     # None: it had to be killed
    output: str


class Box:
    """The folder of an injection, with its own copies of what can be damaged, and its own random numbers."""

    def __init__(self, world: Path, folder: Path, rng: random.Random):
        self.world, self.folder, self.rng = world, folder, rng

    def copy(self, name: str) -> Path:
        target = self.folder / name
        return target if target.exists() else shutil.copytree(self.world / name, target)

    def pick(self, folder: Path, pattern: str = "*") -> Path:
        return self.rng.choice(sorted(path for path in folder.rglob(pattern) if path.is_file()))

    def cut(self, path: Path):
        path.write_bytes(path.read_bytes()[:self.rng.randrange(path.stat().st_size)])

    def flip(self, path: Path, first: int = 0, last: int | None = None):
        """Changes one bit of the bytes from `first` to `last`."""
        content = bytearray(path.read_bytes())
        content[self.rng.randrange(first, last or len(content))] ^= 1 << self.rng.randrange(8)
        path.write_bytes(content)

    def mutate(self, path: Path):
        """Changes a few bytes, or cuts, repeats or removes some."""
        content = bytearray(path.read_bytes())
        for _ in range(self.rng.randint(1, 4)):
            at, length = self.rng.randrange(len(content) or 1), self.rng.randint(1, 40)
            part = self.rng.choice([b"", self.rng.randbytes(length), content[at:at + length] * 2])
            content[at:at + length] = part
        path.write_bytes(content)

    def train(self, *flags: str, run: str = "begun", pairs: str = "pairs", out: Path | None = None):
        """A program: distill.py up to step 6 on pairs, with the small teacher."""
        teacher = self.folder / "teacher" if (self.folder / "teacher").exists() else self.world / "teacher"
        pairs = self.folder / pairs if (self.folder / pairs).exists() else self.world / pairs
        cache = ["--cache", self.folder / "cache"] if run == "cached" else []
        return partial(distill.main, [*map(str, (
            "--teacher", teacher, "--data", pairs, "--out", out or self.folder / run, "--batch", 2,
            "--micro-batch", 1, "--steps", 6, "--save-every", 1, "--preview-every", 0, "--judge", 0,
            "--workers", 0, *cache, *flags))])

    def draw(self, *flags: str, model: str = "teacher"):
        """A program: sample.py with two steps."""
        return partial(sample.main, [*map(str, (
            "--model", self.folder / model, "--prompt", "a red circle", "--steps", 2, "--guidance", 2,
            "--out", self.folder / "out.png", *flags))])

    def make(self, *flags: str, out: str = "made"):
        """A program: toy.make, as short as it can be."""
        return partial(make.main, [*map(str, (
            "--steps", 2, "--vae-steps", 1, "--batch", 2, "--mean-steps", 0, "--captions", 1,
            "--judge-every", 9, "--out", self.folder / out, *flags))])

    def read(self, folder: Path, caption: str | None = None):
        """A program: reads 8 training samples as a run would, and reports what was skipped."""
        def program():
            source, skipped = data.CaptionedImages(folder, caption), {}
            for position in range(8):
                sample = data.Samples(source, 64, (4, 16, 16), 0, 0.1, True)[position]
                if "error" in sample:
                    raise ValueError(sample["error"])
                assert sample["pixels"].shape == (3, 64, 64) and sample["time_ids"].isfinite().all()
                skipped |= sample["skipped"]
            print(distill.data_report(source, skipped, 8))
        return program


# ------------------------------------------------------------------------------------------------------------
# A run's folder


def cut_checkpoint(box: Box) -> Injection:
    """a file of the newest checkpoint cut"""
    run = box.copy("begun")
    box.cut(box.pick(max(run.glob("step-*"))))
    return Injection(box.train(), "warning: ", run)


def flip_checkpoint(box: Box) -> Injection:
    """a bit of the newest checkpoint flipped"""
    run = box.copy("begun")
    box.flip(box.pick(max(run.glob("step-*"))))
    return Injection(box.train(), "warning: ", run)


def lose_checkpoint_file(box: Box) -> Injection:
    """a file of the newest checkpoint deleted, empty, or a folder"""
    run = box.copy("begun")
    path = box.pick(max(run.glob("step-*")))
    path.unlink()
    box.rng.choice([lambda: None, path.touch, path.mkdir])()
    return Injection(box.train(), "warning: ", run)


def damage_all_checkpoints(box: Box) -> Injection:
    """every checkpoint damaged"""
    for folder in box.copy("begun").glob("step-*"):
        box.rng.choice([box.cut, box.flip])(box.pick(folder))
    return Injection(box.train(), "error: ")


def damage_log(box: Box) -> Injection:
    """log.csv damaged"""
    box.mutate(box.copy("begun") / "log.csv")
    return Injection(box.train())


def draw_damaged_log(box: Box) -> Injection:
    """analysis.py curves of a damaged log.csv"""
    box.mutate(box.copy("begun") / "log.csv")
    return Injection(partial(analysis.main, ["curves", str(box.folder / "begun"), "--out",
                                             str(box.folder / "curves.png")]))


def odd_lock(box: Box) -> Injection:
    """.lock a symbolic link or a pipe"""
    run, victim = box.copy("begun"), box.folder / "victim"
    victim.write_text("kept")
    (run / ".lock").unlink(missing_ok=True)
    box.rng.choice([lambda: (run / ".lock").symlink_to(victim), lambda: os.mkfifo(run / ".lock")])()
    return Injection(box.train(), "error: ", kept=(victim,))


def leave_leftovers(box: Box) -> Injection:
    """half-written files of a killed process"""
    run = box.copy("begun")
    shutil.copytree(max(run.glob("step-*")), run / f"{files.WRITING}x" / "step-00000009")
    (max(run.glob("step-*")) / f"{files.WRITING}y").write_bytes(b"half")
    return Injection(box.train(), run=run)


def change_teacher(box: Box) -> Injection:
    """another teacher or VAE under a run"""
    teacher = box.copy("teacher")
    box.copy("begun")
    if box.rng.random() < 0.5:
        write_vae(teacher, teacher / "vae")
    else:
        path = teacher / "unet" / "diffusion_pytorch_model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-40000] + content[-80000:-40000])
    return Injection(box.train(), "error: ", kept=tuple((box.folder / "begun").glob("step-*/*")))


def change_pictures(box: Box) -> Injection:
    """a picture added, removed, renamed or replaced under a run"""
    pairs, run = box.copy("pairs"), box.rng.choice(["begun", "cached"])
    box.copy(run)
    if run == "cached":
        box.copy("cache")
    path = box.pick(pairs, "[0235].png")
    box.rng.choice([
        path.unlink, lambda: path.rename(path.with_name("x.png")),
        lambda: Image.effect_noise((64, 64), 9).save(path),
        lambda: [shutil.copy(file, file.with_stem("9")) for file in (path, path.with_suffix(".txt"))]])()
    return Injection(box.train(run=run), "error: ")


def mix_programs(box: Box) -> Injection:
    """a run of toy.make as --out of distill.py, and the reverse"""
    if box.rng.random() < 0.5:
        run = box.copy("made")
        return Injection(box.train(out=run), "error: ", kept=tuple(run.rglob("*.*")))
    run = box.copy("begun")
    return Injection(box.make(out="begun"), "error: ", kept=tuple(run.rglob("*.*")))


def damage_index(box: Box) -> Injection:
    """the index of shards damaged"""
    pairs, run = box.copy("pairs"), box.folder / "new"
    write_tar(pairs)
    run.mkdir()
    data.CaptionedImages(pairs, index=run / "index.safetensors")
    box.mutate(run / "index.safetensors")
    return Injection(box.train(out=run), run=run)


def diverge(box: Box) -> Injection:
    """gradients that are not finite, before and after a resumption"""
    losses, run = distill.losses, box.folder / "new"
    distill.losses = lambda *inputs: tuple(term * float("nan") for term in losses(*inputs))
    program = box.train("--steps", 30, out=run)                  # too few for twice 20 such steps

    def twice() -> int:
        with contextlib.suppress(FloatingPointError):
            program()
        return program()
    return Injection(twice, "error: 20 steps")


# ------------------------------------------------------------------------------------------------------------
# Signals


def signal_group(box: Box) -> Injection:
    """SIGTERM or SIGINT to all processes of a run, once or twice"""
    run = box.folder / "new"
    signals = (box.rng.choice([signal.SIGTERM, signal.SIGINT]),) * box.rng.choice([1, 2])
    return Injection(box.train("--workers", 2, out=run), run=run, signals=signals)


def signal_main(box: Box) -> Injection:
    """SIGTERM or SIGINT to the main process"""
    run = box.folder / "new"
    signals = (box.rng.choice([signal.SIGTERM, signal.SIGINT]),)
    return Injection(box.train("--workers", 2, out=run), run=run, signals=signals, to="main")


def kill_main(box: Box) -> Injection:
    """SIGKILL of the main process, and the same command at once"""
    run = box.folder / "new"
    return Injection(box.train("--workers", 2, out=run), run=run, signals=(signal.SIGKILL,), to="main")


def kill_reader(box: Box) -> Injection:
    """SIGKILL or SIGSEGV of a reader of data"""
    run = box.folder / "new"
    signals = (box.rng.choice([signal.SIGKILL, signal.SIGSEGV]),)
    return Injection(box.train("--workers", 2, out=run), run=run, signals=signals, to="reader")


def signal_ranks(box: Box) -> Injection:
    """SIGTERM to both processes of a run on two, and again"""
    run = box.folder / "new"
    port = str(box.rng.randrange(20000, 30000))
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def ranks() -> int:
        child = os.fork()
        os.environ |= {"RANK": str(int(child == 0)), "LOCAL_RANK": "0"}
        code = 1
        try:
            code = box.train("--workers", 1, out=run)()
        except BaseException:
            traceback.print_exc()
        if child == 0:
            os._exit(code)
        other = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return max(code, other) if min(code, other) >= 0 else 1

    return Injection(ranks, run=run, signals=(signal.SIGTERM, signal.SIGTERM))


def kill_make(box: Box) -> Injection:
    """SIGKILL of toy.make at any moment"""
    return Injection(box.make(), run=box.folder / "made", signals=(signal.SIGKILL,), to="main")


# ------------------------------------------------------------------------------------------------------------
# A model's files


def cut_weights(box: Box) -> Injection:
    """a weight file of a model cut"""
    box.cut(box.pick(box.copy("teacher"), "*.safetensors"))
    return Injection(box.draw(), "error: ")


def mutate_header(box: Box) -> Injection:
    """the header of a weight file changed, with escapes for a terminal too"""
    path = box.pick(box.copy("teacher"), "*.safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8:8 + length]
    if box.rng.random() < 0.3:
        name = box.rng.choice(re.findall(rb'"(\w+\.[\w.]+)":', header))
        header = header.replace(name, rb"\u001b[31m" + name, 1)
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length:])
    else:
        box.flip(path, 0, 8 + length)
    return Injection(box.draw())


def other_weights(box: Box) -> Injection:
    """a pickle, a page, a pointer, an archive or NaN for weights"""
    path = box.pick(box.copy("teacher"), "*.safetensors")
    size = path.stat().st_size
    path.write_bytes(box.rng.choice([
        b"\x80\x02}q\x00." + bytes(99), b"PK\x03\x04" + bytes(99), b"<!DOCTYPE html><html>", b"",
        b"version https://git-lfs.github.com/spec/v1\n", bytes(size),
        path.read_bytes()[:-4] + b"\0\0\xc0\x7f"]))
    return Injection(box.draw(), "error: ")


READ = ("model_index.json", "scheduler/*.json", "tokenizer*/tokenizer_config.json", "*/config.json")


def change_config(box: Box) -> Injection:
    """an entry of a model's JSON files changed to an extreme or another type"""
    path = box.pick(box.copy("teacher"), box.rng.choice(READ))
    entries = json.loads(path.read_text())
    entries[box.rng.choice(sorted(entries))] = box.rng.choice(NUMBERS)
    path.write_text(json.dumps(entries))
    return Injection(box.draw())


def deep_config(box: Box) -> Injection:
    """deep JSON, or a number of 5,000 digits, in a model's files"""
    path = box.pick(box.copy("teacher"), box.rng.choice(READ))
    path.write_text(box.rng.choice([DEEP, '{"a": ' + "9" * 5000 + "}"]))
    return Injection(box.draw(), "error: ")


def mutate_config(box: Box) -> Injection:
    """bytes of a model's JSON files changed"""
    box.mutate(box.pick(box.copy("teacher"), "*.json"))
    return Injection(box.draw())


def damage_preset(box: Box) -> Injection:
    """preset.json of a model damaged"""
    path = box.copy("teacher") / "preset.json"
    entries = {"steps": 2, "guidance": 2.0, "spacing": None}
    entries[box.rng.choice(sorted(entries))] = box.rng.choice(NUMBERS)
    path.write_text(box.rng.choice([json.dumps(entries), DEEP, "{", '{"steps": ' + "9" * 5000 + "}"]))
    return Injection(box.draw())


def cut_merges(box: Box) -> Injection:
    """merges.txt cut, at a line's end too"""
    path = box.pick(box.copy("teacher"), "merges.txt")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:box.rng.randrange(len(lines))]))
    return Injection(box.draw(), "error: ")


def change_vocabulary(box: Box) -> Injection:
    """an id of vocab.json beyond the table"""
    path = box.pick(box.copy("teacher"), "vocab.json")
    ids = json.loads(path.read_text())
    ids[box.rng.choice(sorted(ids))] = box.rng.choice([len(ids) + 50, 10**6, 2**31 - 1])
    path.write_text(json.dumps(ids))
    return Injection(box.draw(), "error: ")


def unequal_tokenizers(box: Box) -> Injection:
    """tokenizers of two lengths"""
    path = box.pick(box.copy("teacher"), "tokenizer_config.json")
    options = json.loads(path.read_text())
    options["model_max_length"] = box.rng.choice([76, 40, 3])
    path.write_text(json.dumps(options))
    return Injection(box.draw(), "error: ")


def mutate_tokenizer(box: Box) -> Injection:
    """bytes of a tokenizer's files changed"""
    box.mutate(box.pick(box.copy("teacher"), "*.txt"))
    return Injection(box.draw())


# ------------------------------------------------------------------------------------------------------------
# Data


def mutate_picture(box: Box) -> Injection:
    """bytes of a picture changed"""
    pairs = box.copy("pairs")
    path = pairs / "2.png"
    ending = box.rng.choice(["png", "jpg", "webp"])
    exif = Image.Exif()
    exif[0x0112] = box.rng.randint(1, 8)
    Image.effect_noise((70, 64), 40).convert("RGB").save(path.with_suffix(f".{ending}"), exif=exif)
    if ending != "png":
        path.unlink()
    box.mutate(path.with_suffix(f".{ending}"))
    return Injection(box.read(pairs), "pairs used")


def odd_picture(box: Box) -> Injection:
    """a picture that is empty, huge, a pipe, a device, a page or a folder"""
    pairs = box.copy("pairs")
    path = pairs / "2.png"
    path.unlink()
    box.rng.choice([
        path.touch, path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("nowhere"), lambda: path.write_text("<html>"),
        lambda: (path.touch(), os.truncate(path, 30 * 2**30)),
        lambda: Image.new("1", (40000, 40000)).save(path)])()
    return Injection(box.read(pairs, box.rng.choice([None, "a red circle"])), "pairs used")


def odd_caption(box: Box) -> Injection:
    """a caption that is not UTF-8, blank, a device, or 10 MB long"""
    pairs = box.copy("pairs")
    path = pairs / "2.txt"
    content = box.rng.choice([
        b"\xff\xfe", b"\x00", "\u200b\ufeff".encode(), b"", b"a red circle " * 800_000, b"x" * 10**7,
        box.rng.randbytes(99)])
    if content:
        path.write_bytes(content)
    else:
        path.unlink()
        box.rng.choice([lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")])()
    return Injection(box.read(pairs), "pairs used")


def long_captions(box: Box) -> Injection:
    """captions of 10 MB in training"""
    pairs = box.copy("pairs")
    for path in pairs.glob("[0235].txt"):
        path.write_text("a red circle " * 800_000)
    run = box.folder / "new"
    return Injection(box.train("--steps", 2, out=run), "finished")


def pack(box: Box) -> Path:
    """The pairs as one shard."""
    pairs = box.copy("pairs")
    for i in (0, 2, 3, 5):
        (pairs / f"{i}.json").write_text('{"original_height": 200, "original_width": 300}')
    write_tar(pairs)
    return pairs / "0.tar"


def cut_shard(box: Box) -> Injection:
    """a shard cut before its end"""
    shard = pack(box)
    with tarfile.open(shard) as tar:
        last = tar.getmembers()[-1]
    os.truncate(shard, box.rng.randrange(last.offset_data + 512))
    return Injection(box.read(shard.parent), "warning: ")


def craft_shard(box: Box) -> Injection:
    """headers of a shard changed, with right checksums"""
    shard = pack(box)
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        header = box.rng.choice(tar.getmembers()).offset
    start, length = box.rng.choice([  # name, mode, size, size, time, kind, name of a link, prefix
        (0, 100), (100, 8), (124, 12), (124, 12), (136, 12), (156, 1), (157, 100), (345, 155)])
    content[header + start:header + start + length] = box.rng.choice([
        box.rng.randbytes(length), b"\x80" + b"\xff" * (length - 1), b"7" * length,
        b"-" + b"1" * (length - 1), bytes(length), box.rng.choice([b"L", b"K", b"x", b"g", b"S"]) * length,
        (b"../" * length)[:length]])
    content[header + 148:header + 156] = b" " * 8
    content[header + 148:header + 156] = b"%06o\0 " % sum(content[header:header + 512])
    shard.write_bytes(content)
    return Injection(box.read(shard.parent))


def escape_shard(box: Box) -> Injection:
    """members of a shard named outside of it, links and devices"""
    shard, victim = pack(box), box.folder / "x.png"
    victim.write_bytes(b"kept")
    with tarfile.open(shard, "a") as tar:
        for name, kind in (("../x.png", tarfile.REGTYPE), (str(victim), tarfile.REGTYPE),
                           ("l.png", tarfile.SYMTYPE), ("d.png", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(victim)
            tar.addfile(member)
    return Injection(box.read(shard.parent), "pairs used", kept=(victim,))


def stray_file(box: Box) -> Injection:
    """one .tar, or a metadata.jsonl of one line, beside loose pairs"""
    pairs = box.copy("pairs")
    if box.rng.random() < 0.5:
        shutil.copytree(pairs, box.folder / "more")
        write_tar(box.folder / "more")
        shutil.copy(box.folder / "more" / "0.tar", pairs)
    else:
        (pairs / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a red circle"}\n')
    return Injection(box.read(pairs), "not used")


def damage_metadata(box: Box) -> Injection:
    """metadata.jsonl with bad lines and with names outside of the folder"""
    pairs, victim = box.copy("pairs"), box.folder / "x.png"
    shutil.copy(pairs / "0.png", victim)
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a red circle"}) for i in range(6)]
    lines.insert(box.rng.randrange(7), box.rng.choice([
        '{"file_name": "../x.png", "text": "a"}', f'{{"file_name": "{victim}", "text": "a"}}', DEEP, "[]",
        "{",
        '{"file_name": 7, "text": "a"}', '{"file_name": "a\\u0000.png", "text": "a"}',
        '{"file_name": "' + "x" * 5000 + '.png", "text": "a"}', "9" * 5000, '{"text": "a"}']))
    (pairs / "metadata.jsonl").write_text("\n".join(lines))
    return Injection(box.read(pairs), "5 pairs used; skipped: bad_image 1, ")


def mutate_metadata(box: Box) -> Injection:
    """bytes of metadata.jsonl changed"""
    pairs = box.copy("pairs")
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a red circle"}) for i in range(6)]
    (pairs / "metadata.jsonl").write_text("\n".join(lines))
    box.mutate(pairs / "metadata.jsonl")
    return Injection(box.read(pairs))


def change_sidecar(box: Box) -> Injection:
    """sizes in a sidecar JSON that cannot be"""
    pairs = box.copy("pairs")
    for i in (0, 2, 3, 5):
        size = json.dumps(box.rng.choice([*NUMBERS, 1e400, -7, 2**40]))
        (pairs / f"{i}.json").write_text(box.rng.choice([
            f'{{"original_height": {size}, "original_width": 64}}', DEEP, "", "[]",
            f'{{"original_height": 64, "original_width": {"9" * 5000}}}']))
    return Injection(box.read(pairs), "4 pairs used")


def delete_data(box: Box) -> Injection:
    """pictures and captions deleted during a run"""
    pairs, losses, run = box.copy("pairs"), distill.losses, box.folder / "new"
    names = box.rng.sample(["0", "2", "3", "5"], 2)

    def losses_and_deletion(*inputs):
        for name in names:
            for path in pairs.glob(f"{name}.*"):
                path.unlink()
        return losses(*inputs)
    distill.losses = losses_and_deletion
    return Injection(box.train(out=run), "unreadable 2")


def preview_own_words(box: Box) -> Injection:
    """a teacher with few words, and previews of a run on pictures of one's own"""
    run = box.folder / "new"
    return Injection(box.train("--preview-every", 3, out=run), "finished", run)


# ------------------------------------------------------------------------------------------------------------
# The cache


def flip_cache(box: Box) -> Injection:
    """a bit of the cache flipped, or the file cut"""
    path = box.copy("cache") / "records.bin"
    box.rng.choice([box.flip, box.cut])(path)
    return Injection(box.train(run="cached"), run=box.copy("cached"))


def swap_cache(box: Box) -> Injection:
    """two records of the cache swapped, or one copied over another"""
    path = box.copy("cache") / "records.bin"
    content = path.read_bytes()
    size = len(content) // 6
    records = [content[i:i + size] for i in range(0, len(content), size)]
    a, b = box.rng.sample(range(len(records)), 2)
    records[a], records[b] = records[b], records[a] if box.rng.random() < 0.5 else records[b]
    path.write_bytes(b"".join(records))
    return Injection(box.train(run="cached"), run=box.copy("cached"))


def damage_cache_settings(box: Box) -> Injection:
    """cache.json damaged"""
    path = box.copy("cache") / "cache.json"
    box.copy("cached")
    path.write_text(box.rng.choice(["{", "[]", DEEP, '{"data": 1}', ""]))
    return Injection(box.train(run="cached"), "error: ")


# ------------------------------------------------------------------------------------------------------------
# Words, files to write, and Python itself


def not_utf8(box: Box) -> Injection:
    """a prompt, caption, file of prompts or --out that is not UTF-8"""
    box.copy("teacher")
    (box.folder / "prompts").write_bytes(b"a red \xff circle")
    return Injection(box.rng.choice([
        box.draw("--prompt", "a red \udcff"), box.draw("--negative", "\udcff"),
        box.draw("--out", str(box.folder / "\udcff.png")),
        box.train("--caption", "a \udcff", out=box.folder / "new"),
        box.train("--out", str(box.folder / "\udcff")),
        partial(analysis.main, [
            "similarity", "--steps", "1", "--model", str(box.folder / "teacher"),
            "--prompts", str(box.folder / "prompts"), "--out", str(box.folder / "a.png")])]), "error: ")


def bad_flag(box: Box) -> Injection:
    """a flag with a value that cannot be"""
    box.copy("teacher")
    new = box.folder / "new"
    values = ("-1", "nan", "inf", "1e999", "x", "", "9" * 5000, "0x10", "\u0663x", "--")
    flags = ("--steps", "--batch", "--lr", "--seed", "--size", "--workers", "--clip", "--dropout", "--task",
             "--features", "--device", "--precision")
    draws = ("--steps", "--guidance", "--seed", "--count", "--height", "--width", "--device", "--precision")
    value = box.rng.choice(values)
    program = box.rng.choice([
        box.train(box.rng.choice(flags), value, out=new), box.draw(box.rng.choice(draws), value)])
    return Injection(program, "error: ")


def full_disk(box: Box) -> Injection:
    """no space while a run saves"""
    run, limit = box.copy("begun"), box.rng.randrange(5000, 500_000)  # its output fits
    program = box.train()

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return program()
    return Injection(limited, f"error: {box.folder}", kept=tuple(run.glob("step-00000003/*")))


def full_disk_for_pictures(box: Box) -> Injection:
    """no space for a picture or a table"""
    box.copy("teacher")
    program = box.rng.choice([box.draw(), partial(analysis.main, [
        "budget", "--model", "sdxl", "--out", str(box.folder / "budget.png")])])

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        return program()
    return Injection(limited, f"error: {box.folder}")


def unwritable_output(box: Box) -> Injection:
    """an output below a file, a device or with a name too long"""
    box.copy("teacher")
    (box.folder / "file").touch()
    out = box.rng.choice([box.folder / "file" / "x.png", Path("/dev/null/x.png"), Path("/proc/x.png"),
                          box.folder / ("x" * 300 + ".png"), box.folder / "file"])
    program = box.rng.choice([box.draw("--out", out), box.train(out=out), box.make("--out", out)])
    return Injection(program, "error: ")


def optimised_python(box: Box) -> Injection:
    """python -OO"""
    program = box.rng.choice([
        ["sample.py", "--steps", "1", "--prompt", "a red circle", "--out", box.folder / "a.png"],
        ["distill.py", "--dry-run"], ["-m", "toy.make", "--help"], ["analysis.py", "--help"]])
    return Injection(lambda: subprocess.run([sys.executable, "-OO", *program], cwd=ROOT).returncode)


# ------------------------------------------------------------------------------------------------------------
# The toy's making, and scores


def publish_damaged(box: Box) -> Injection:
    """toy.make publish of a damaged bundle"""
    made, target = box.copy("made"), box.copy("teacher")
    box.cut(box.pick(made / "bundle", "*.safetensors"))
    return Injection(partial(make.publish, made / "bundle", target), "error: ",
                     kept=tuple(path for path in target.rglob("*.*")))


def change_make(box: Box) -> Injection:
    """toy.make resumed with other settings"""
    box.copy("made")
    flag, value = box.rng.choice([("--lr", "0.5"), ("--batch", "4"), ("--cycle", "7"), ("--decay", "0.25")])
    return Injection(box.make(flag, value), "error: ")


def damage_scores(box: Box) -> Injection:
    """a file of scores damaged"""
    run = box.copy("begun")
    text = box.rng.choice(["colour,shape,spatial,distance\nx,1,1,1\n", "a,b\n1,2\n", "\xff\n", "colour\n1\n",
                           "\0\n1\n", ",colour\nteacher,1\n"])
    (run / "score-4-1.csv").write_text(text, encoding="latin-1")
    (run / "scores.csv").write_text(text, encoding="latin-1")
    if box.rng.random() < 0.5:
        score = partial(table3.score, run, 4, str(box.world / "teacher"), ("a red circle",))
        return Injection(score, "error: ")
    return Injection(partial(distill.judging.judge_run, run, 4, 1, None, {}), "error: ")


# ------------------------------------------------------------------------------------------------------------
# One place that runs and judges


KINDS = {  # and how often each is injected
    cut_checkpoint: 40, flip_checkpoint: 60, lose_checkpoint_file: 20, damage_all_checkpoints: 20,
    damage_log: 20, draw_damaged_log: 40, odd_lock: 4, leave_leftovers: 4, change_teacher: 8,
    change_pictures: 20, mix_programs: 6, damage_index: 20, diverge: 2, signal_group: 16, signal_main: 10,
    kill_main: 16, kill_reader: 8, signal_ranks: 4, kill_make: 4, cut_weights: 20, mutate_header: 60,
    other_weights: 20, change_config: 150, deep_config: 20, mutate_config: 80, damage_preset: 20,
    cut_merges: 20, change_vocabulary: 20, unequal_tokenizers: 6, mutate_tokenizer: 30, mutate_picture: 100,
    odd_picture: 24, odd_caption: 20, long_captions: 2, cut_shard: 60, craft_shard: 150,
    escape_shard: 2, stray_file: 4, damage_metadata: 30, mutate_metadata: 60, change_sidecar: 40,
    delete_data: 6, preview_own_words: 2, flip_cache: 30, swap_cache: 10, damage_cache_settings: 6,
    not_utf8: 16, bad_flag: 60, full_disk: 16, full_disk_for_pictures: 6, unwritable_output: 20,
    optimised_python: 4, publish_damaged: 6, change_make: 6, damage_scores: 16}


def execute(program: Callable[[], int | None], signals: tuple[int, ...] = (), to: str = "group",
            delay: float = 0) -> Outcome:
    """Runs a program in a process group of its own, with signals after `delay` seconds."""
    with tempfile.TemporaryFile("w+b") as output:
        if (child := os.fork()) == 0:
            os.setpgrp()
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            code = 70
            try:
                cli.run(program, "advice")
            except SystemExit as error:
                code = error.code or 0
                if isinstance(code, str):                        # as Python itself does
                    print(code, file=sys.stderr)
                    code = 1
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                multiprocessing.util._exit_function()            # ends the readers of data, as Python does
                os._exit(code)
        start, code = time.monotonic(), None
        while code is None and time.monotonic() < start + LIMIT:
            if signals and time.monotonic() > start + delay:
                send(child, signals[0], to)
                signals, delay = signals[1:], delay + 0.3
            done, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(0.01)
        if code is None:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        output.seek(0)
        return Outcome(code, output.read().decode(errors="replace"))


def send(child: int, number: int, to: str):
    try:
        if to == "group":
            os.killpg(child, number)
        else:
            readers = Path(f"/proc/{child}/task/{child}/children").read_text().split()
            os.kill(child if to == "main" else int(readers[0]), number)
    except (OSError, IndexError):                                # it has ended, or has not started
        pass


def untidy(outcome: Outcome) -> bool:
    """Whether a program ended with anything but success, a signal, or one clear line."""
    output = outcome.output.replace("\0", "")                    # PyTorch's word of a crashed reader ends with one
    lines = re.split(r"[\r\n]+", output.strip())
    errors = [line for line in lines if "error: " in line]
    clear = len(errors) == 1 and lines[-1].startswith("error: ") and "\x1b" not in lines[-1]
    if outcome.code == -signal.SIGKILL:                          # readers of data may report that it is gone
        return False
    ended = outcome.code in (0, 130, 143) or outcome.code < 0
    return "Traceback" in outcome.output or not (ended or clear)


def same_result(run: Path, reference: Path) -> bool:
    """Whether two runs ended with the same weights and moments."""
    try:
        return equal(checkpoint(run)[1], checkpoint(reference)[1])
    except (TypeError, ValueError):                              # there is no good checkpoint
        return False


def judge(box: Box, injection: Injection) -> tuple[str, str]:
    """Runs a program; returns what is wrong, a column of the table or "", and its output."""
    kept = {path: path.read_bytes() for path in injection.kept if path.is_file()}
    delay = box.rng.uniform(0, 3)
    outcomes = [execute(injection.program, injection.signals, injection.to, delay)]
    saved = [int(step) for step in re.findall(r"saved .* at step (\d+)", outcomes[0].output)]
    if injection.signals and saved:
        found = load_checkpoint(injection.run)
        if found is None or found[1]["state"]["step"] < saved[-1]:
            return "losses", outcomes[0].output
    if injection.signals and injection.to != "reader" and outcomes[0].code == 1:
        return "losses", outcomes[0].output                      # it did not save what it had done
    if injection.signals:
        outcomes.append(execute(injection.program))
    output = "\n--- again ---\n".join(f"{outcome.output}\nexit {outcome.code}" for outcome in outcomes)
    if any(outcome.code is None for outcome in outcomes):
        return "hangs", output
    if any(map(untidy, outcomes)):
        return "tracebacks", output
    refused = outcomes[-1].code != 0
    if injection.says not in outcomes[-1].output or injection.says.startswith("error: ") and not refused:
        return "accepted", output
    if injection.run and not same_result(injection.run, box.world / "results" / injection.run.name):
        return "losses", output
    if any(not path.is_file() or path.read_bytes() != content for path, content in kept.items()):
        return "losses", output
    return "", output


def inject(kind: Callable[[Box], Injection], number: int, seed: int, world: Path) -> tuple[str, str]:
    """Injects a fault in a folder of its own, and judges it."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix=f"{kind.__name__}-", dir=world / "boxes"))
    environ = dict(os.environ)
    box = Box(world, folder, random.Random(f"{seed} {kind.__name__} {number}"))
    losses = distill.losses
    try:
        return judge(box, kind(box))
    except Exception:
        return "tracebacks", "the injection itself failed\n" + traceback.format_exc()
    finally:
        distill.losses = losses
        for name in set(os.environ) - set(environ):
            del os.environ[name]
        shutil.rmtree(folder, ignore_errors=True)


def make_world(world: Path):
    """What is damaged later: a model, pictures, runs after three of six steps, and how they end."""
    (world / "boxes").mkdir()
    (world / "results").mkdir()
    write_teacher(world / "teacher")
    write_pairs(world / "pairs")
    box = Box(world, world, random.Random(0))
    for program in (box.train("--steps", 3), box.train("--steps", 3, run="cached")):
        outcome = execute(program)
        assert outcome.code == 0, outcome.output
    for name in ("begun", "cached"):
        shutil.copytree(world / name, world / "results" / name)
        outcome = execute(box.train(run=name, out=world / "results" / name))
        assert outcome.code == 0, outcome.output
    outcome = execute(box.train(out=world / "results" / "new"))
    assert outcome.code == 0, outcome.output
    outcome = execute(box.make())
    assert outcome.code == 0, outcome.output
    shutil.copytree(world / "made", world / "results" / "made")


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument("--seconds", type=number(int, 1), default=600, metavar="N", help="when it ends")
    parser.add_argument("--kind", nargs="+", metavar="KIND", choices=[kind.__name__ for kind in KINDS],
                        help="these alone, by the names of their functions [all]")
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N", help="of what is injected")
    parser.add_argument("--jobs", type=number(int, 1), default=2, metavar="N", help="faults at the same time")
    parser.add_argument("--verbose", action="store_true", help="show the output of what went wrong")
    args = parser.parse_args()
    start, kinds = time.monotonic(), [kind for kind in KINDS if not args.kind or kind.__name__ in args.kind]
    # In rounds, so that a run that is short of time has some of each kind.
    rounds = []
    for i, kind in enumerate(kinds):
        rounds += [(index / KINDS[kind], i, index) for index in range(KINDS[kind])]
    rounds.sort()
    table = {kind: Counter() for kind in kinds}
    context = multiprocessing.get_context("fork")
    files.sync = lambda path: None                               # a kill loses nothing that was written
    world = Path(tempfile.mkdtemp(prefix="faults-"))
    make_world(world)
    with ProcessPoolExecutor(args.jobs, context) as pool:
        running = {}
        while rounds or running:
            while rounds and len(running) < args.jobs and time.monotonic() < start + args.seconds:
                _, i, index = rounds.pop(0)
                running[pool.submit(inject, kinds[i], index, args.seed, world)] = kinds[i], index
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                kind, index = running.pop(future)
                wrong, output = future.result()
                table[kind].update(["injections", wrong])
                if wrong:
                    shown = output if args.verbose else ""
                    print(f"{kind.__name__} {index}: {wrong}", shown, file=sys.stderr)
    shutil.rmtree(world)
    columns = ("injections", "tracebacks", "hangs", "accepted", "losses")
    print(f"| fault | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for kind, counts in table.items():
        print(f"| {kind.__doc__} | {' | '.join(str(counts[column]) for column in columns)} |")
    total = sum(table.values(), Counter())
    print(f"| **{len(kinds)} kinds** | {' | '.join(f'**{total[column]}**' for column in columns)} |")
    seconds = time.monotonic() - start
    print(f"\n{seconds:.0f} s, seed {args.seed}, {args.jobs} at a time, torch {torch.__version__}")
    sys.exit(int(any(total[column] for column in columns[1:])))


if __name__ == "__main__":
    main()
