"""The cache gives back what was written, or nothing: what is damaged, misplaced or half-written is absent."""

import numpy as np
import pytest
import torch
from common import refusal
from runs import equal, in_processes

from support.cache import Cache

LAYOUT = {"mean": ((4, 2, 3), torch.float32), "text": ((5, 2), torch.bfloat16), "pooled": ((3,), torch.float16),
          "time_ids": ((6,), torch.float32)}
IDENTITY = {"data": "12ab", "size": 64, "caption": None}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, dtype) in LAYOUT.items()}


@pytest.fixture
def cache(tmp_path):
    """A cache of records 0, 1 and 3."""
    cache = Cache(tmp_path / "cache", IDENTITY, LAYOUT)
    for index in (3, 0, 1):
        cache.write(index, tensors(index) | {"caption": "a box", "noise": torch.ones(9)})
    return cache


def present(cache: Cache) -> set[int]:
    """The records that are there, all of which have to be right."""
    found = {index: cache.read(index) for index in range(6)}
    for index, record in found.items():
        assert record is None or equal(record, tensors(index))
    return {index for index, record in found.items() if record}


def test_what_was_written_is_read(cache):
    assert present(cache) == {0, 1, 3}
    for name, tensor in cache.read(3).items():
        assert (tensor.shape, tensor.dtype) == LAYOUT[name]
    other = Cache(cache.path.parent, IDENTITY, LAYOUT)           # another run
    other.write(1, tensors(1))
    other.write(2**31, tensors(5))                               # far behind the others
    assert present(cache) == {0, 1, 3} and equal(cache.read(2**31), tensors(5))
    assert cache.path.stat().st_blocks * 512 < 2**20             # what is between takes no space
    cache.path.unlink()
    assert present(Cache(cache.path.parent, IDENTITY, LAYOUT)) == set()


def test_tensors_of_other_dtypes_and_places_in_memory_are_written_as_the_layout_says(cache):
    wide = torch.randn(3, 2, 4)
    cache.write(4, tensors(4) | {"mean": wide.permute(2, 1, 0).double(), "time_ids": torch.arange(6)})
    record = cache.read(4)
    assert torch.equal(record["mean"], wide.permute(2, 1, 0)) and record["time_ids"].tolist() == [0, 1, 2, 3, 4, 5]


def test_no_changed_bit_is_used(cache):
    content, rng = cache.path.read_bytes(), np.random.default_rng(0)
    for i in range(2 * cache.size):
        damaged = bytearray(content)
        damaged[i] ^= 1 << int(rng.integers(8))
        cache.path.write_bytes(damaged)
        assert present(cache) == {0, 1, 3} - {i // cache.size}, i
    cache.write(1, tensors(1))
    assert present(cache) == {0, 1, 3}                           # made again


def test_records_in_the_wrong_place_are_not_used(cache):
    content, size = cache.path.read_bytes(), cache.size
    first, second = content[:size], content[size:2 * size]
    cache.path.write_bytes(second + first + content[2 * size:])
    assert present(cache) == {3}
    cache.path.write_bytes(content[1:])
    assert present(cache) == set()


def test_a_record_of_which_only_a_part_is_on_the_disk_is_absent(cache):
    content, size = cache.path.read_bytes(), cache.size
    for cut in range(3 * size, 4 * size):
        cache.path.write_bytes(content[:cut])
        assert present(cache) == {0, 1}
        zeros = content[:cut] + bytes(4 * size - cut)
        cache.path.write_bytes(zeros)
        assert present(cache) == ({0, 1, 3} if zeros == content else {0, 1})
    cache.write(3, tensors(3))
    assert present(cache) == {0, 1, 3}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", LAYOUT)
def test_numbers_that_are_not_finite_are_not_written(cache, name, number):
    bad = tensors(4)
    bad[name].view(-1)[-1] = number
    cache.write(4, bad)
    cache.write(5, tensors(5) | {"pooled": torch.full((3,), 1e6)})  # infinite in float16
    assert present(cache) == {0, 1, 3}


def test_other_settings_are_refused_and_change_nothing(cache):
    folder = cache.path.parent
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for identity, layout in ((IDENTITY | {"data": "other"}, LAYOUT), (IDENTITY | {"more": 1}, LAYOUT), ({}, LAYOUT),
                             (IDENTITY, LAYOUT | {"pooled": ((4,), torch.float16)}),
                             (IDENTITY, LAYOUT | {"pooled": ((3,), torch.bfloat16)})):
        assert f"--cache {folder}" in refusal(Cache, folder, identity, layout)
    assert "data was 12ab and is other" in refusal(Cache, folder, IDENTITY | {"data": "other"}, LAYOUT)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "cache.json").write_text("{")
    assert "cache.json" in refusal(Cache, folder, IDENTITY, LAYOUT)


def test_processes_share_a_cache(tmp_path):
    """Several create it at once, write the same records at the same time, and read them."""
    def job():
        cache = Cache(tmp_path / "cache", IDENTITY, LAYOUT)
        for _ in range(40):
            for index in (0, 3, 5):
                cache.write(index, tensors(index))
            present(cache)

    assert in_processes(job, job, job) == [0, 0, 0]
    assert present(Cache(tmp_path / "cache", IDENTITY, LAYOUT)) == {0, 3, 5}
