"""What the cache gives is what the encoders made, bit for bit; what is damaged or misplaced is made again."""

import resource

import pytest
import torch

from common import draw, equal, refusal
from support.cache import Cache
from support.data import collate

IDENTITY = {"data": "12ab", "size": 64, "caption": None}
HALF, FULL = torch.bfloat16, torch.float32
LATENT, CONTEXT = (4, 2, 3), (5, 2)
LAYOUT = {"mean": (LATENT, FULL), "std": (LATENT, FULL), "context": (CONTEXT, HALF), "pooled": ((3,), HALF),
          "time_ids": ((6,), FULL)}


def encode_new(captions: list[str]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([draw(f"{name} {text}", *shape).to(dtype) for text in captions])
            for name, (shape, dtype) in LAYOUT.items()}


@pytest.fixture
def make(tmp_path):
    def make(identity=IDENTITY, dtype=HALF) -> Cache:
        folder = tmp_path / "cache"
        return Cache(folder, identity, lambda batch: encode_new(batch["caption"]), LATENT, CONTEXT, 3, dtype)
    return make


def encode(cache: Cache, *indices: int) -> tuple[dict, list[int]]:
    """A batch as training reads it, and which samples were not cached."""
    samples = [{"index": index, "noise": torch.zeros(1)} | (cache.reader()(index) or {
        "pixels": torch.zeros(1), "caption": str(index)}) for index in indices]
    return cache.encode(collate(samples)), [sample["index"] for sample in samples if "pixels" in sample]


def test_what_is_cached_is_what_was_encoded_bit_for_bit(make):
    make()
    for indices, new in (((7, 2, 5), [7, 2, 5]), ((2, 9, 5), [9]), ((9, 7), []), ((10**6, 3), [10**6, 3])):
        encoded, made = encode(make(), *indices)                 # by another run each time
        assert made == new and equal(encoded, encode_new([*map(str, indices)]))
    assert make().path.stat().st_blocks * 512 < 2**20            # what is between takes no space


def test_damaged_half_written_and_misplaced_records_are_made_again(make):
    cache = make()
    whole, _ = encode(cache, 0, 1, 2)
    content = cache.path.read_bytes()
    size, middle = len(content) // 3, len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]
    swapped = content[size:2 * size] + content[:size] + content[2 * size:]
    for damaged, lost in ((flipped, [1]), (content[:-1], [2]), (content[:size] + bytes(2 * size), [1, 2]),
                          (content[1:], [0, 1, 2]), (swapped, [0, 1])):
        cache.path.write_bytes(damaged)
        again, made = encode(cache, 0, 1, 2)
        assert made == lost and equal(again, whole) and cache.path.read_bytes() == content


def test_another_identity_is_refused(make):
    folder = make().path.parent
    assert f"--cache {folder}" in refusal(make, IDENTITY | {"data": "other"})
    assert "context was (5, 2) torch.bfloat16" in refusal(make, dtype=torch.float16)


def test_a_full_disk_only_warns(make, capsys):
    cache = make()
    whole, _ = encode(cache, 0, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (cache.path.stat().st_size, hard))
    try:
        encoded = [encode(cache, 3, 0, 4) for _ in range(2)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert all(made == [3, 4] and equal(tensors, encode_new(["3", "0", "4"])) for tensors, made in encoded)
    assert capsys.readouterr().err.count("warning: ") == 1 and equal(encode(cache, 0, 1)[0], whole)
