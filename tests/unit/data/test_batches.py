"""Batches: every sample exactly once, and the same for any number of workers."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advtrain.data import ArraySplit, AugmentConfig, BatchPlan, Place
from advtrain.data.augment import augment


def test_split_that_shares_memory_gives_the_same_batches_and_frees_its_own():
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 2, 2), dtype=np.uint8)
    split, stored = (ArraySplit(images.copy(), np.arange(20)) for _ in range(2))
    stored.images.flags.writeable = stored.labels.flags.writeable = False  # as in Ray's store
    before = list(split.train_batches(7, 0, 0, AugmentConfig(), Place()))
    held = weakref.ref(split.images)
    split.share_memory_of(stored)
    assert held() is None
    after = list(split.train_batches(7, 0, 0, AugmentConfig(), Place()))
    assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(before, after, strict=True))


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 300), batch_size=st.integers(1, 64), world=st.integers(1, 5))
def test_ranks_and_steps_partition_the_epoch(n, batch_size, world):
    plan = BatchPlan(np.random.default_rng(n).permutation(n), batch_size)
    seen = []
    for step in range(plan.num_steps):
        parts = [plan.part(step, rank, world) for rank in range(world)]
        whole = np.concatenate([rows for rows, _, _ in parts])
        assert len(whole) <= batch_size
        assert all(total == len(whole) for _, _, total in parts)
        assert [offset for _, offset, _ in parts] == list(
            np.cumsum([0] + [len(rows) for rows, _, _ in parts])[:-1]
        )
        assert np.array_equal(whole, plan.part(step, 0, 1)[0])
        seen.append(whole)
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(n))
    assert max(map(len, seen)) - min(map(len, seen)) <= 1


def split(n=23, shape=(2, 6, 5)):
    rng = np.random.default_rng(0)
    return ArraySplit(rng.integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(n))


def test_batches_are_exact_gray_levels_in_unit_interval():
    data = split()
    batch = next(data.batches(23, Place()))
    assert batch.x.dtype == torch.float32
    assert torch.equal(batch.x, torch.from_numpy(data.images).float() / 255)


def test_train_batches_differ_by_epoch_and_repeat_by_seed():
    data, config = split(), AugmentConfig()

    def order(seed, epoch):
        return torch.cat([b.y for b in data.train_batches(5, seed, epoch, config, Place())]).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert sorted(order(0, 3)) == list(range(23))


def test_train_batches_resume_in_mid_epoch():
    data, config = split(), AugmentConfig(crop=1, flip=True)
    whole = list(data.train_batches(5, 0, 2, config, Place()))
    rest = list(data.train_batches(5, 0, 2, config, Place(), start=3))
    assert len(rest) == len(whole) - 3
    assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(rest, whole[3:], strict=True))


def test_augmented_global_batches_do_not_depend_on_the_number_of_workers():
    data, config = split(), AugmentConfig(crop=2, flip=True)
    alone = list(data.train_batches(8, 0, 0, config, Place()))
    ranks = [list(data.train_batches(8, 0, 0, config, Place(rank, 3))) for rank in range(3)]
    for step, batch in enumerate(alone):
        assert torch.equal(batch.x, torch.cat([r[step].x for r in ranks]))


def test_augment_gives_shifted_window_optionally_mirrored():
    """Oracle: every output equals one of all (2 crop + 1)^2 windows, mirrored or not, cut by slicing."""
    x = torch.rand(12, 2, 6, 5)
    out = augment(x, AugmentConfig(crop=2, flip=True), [0], 0, 12)
    padded = torch.nn.functional.pad(x, [2] * 4)
    mirrored = 0
    for i in range(12):
        windows = [padded[i, :, a : a + 6, b : b + 5] for a in range(5) for b in range(5)]
        straight = any(torch.equal(out[i], w) for w in windows)
        flipped = any(torch.equal(out[i], w.flip(2)) for w in windows)
        assert straight or flipped
        mirrored += flipped
    assert 0 < mirrored < 12


def test_augment_returns_input_when_disabled():
    x = torch.rand(3, 1, 4, 4)
    assert augment(x, AugmentConfig(), [0], 0, 3) is x


def test_augment_mirrors_half_of_images():
    x = torch.arange(4.0).expand(4000, 1, 1, 4)
    out = augment(x, AugmentConfig(flip=True), [0], 0, 4000)
    assert abs((out[:, 0, 0, 0] == 3).float().mean() - 0.5) < 0.03
