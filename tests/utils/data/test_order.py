"""Reading order: every sample exactly once an epoch, whatever the number of ranks and wherever a run is resumed."""

from __future__ import annotations

import logging
from collections import Counter

import pytest

from utils.data.order import BucketOrder, Order, ShardedOrder
from utils.data.stream import CorruptSample, Faults, Sample, Stream, TooManyCorrupt

SIZES = [5, 0, 1, 7, 4, 3]
TOTAL = sum(SIZES)
# two buckets over two shards, one over one, and an empty one
BUCKETS = [[[0, 1, 2], [7]], [[3, 4], [8, 9, 10]], [[], []], [[5, 6], []]]


class Numbers:
    """A source whose sample i is called "i"; the items in `bad` are corrupt, and reads are noted."""

    def __init__(self, shard_sizes: list[int], bad: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        self.shard_sizes, self.bad, self.reads = shard_sizes, bad, list[int]()

    def read(self, item: int, position: int) -> Sample:
        self.reads.append(item)
        if item in self.bad:
            raise CorruptSample(f"item {item} of numbers.tar\nis broken")
        return Sample(str(item), f"caption {item}")


def make(kind: str, seed: int = 0, pool: int | None = 2) -> Order:
    if kind == "sharded":
        return ShardedOrder(SIZES, seed, pool)
    return BucketOrder(BUCKETS, 4, seed, pool)


def read(order: Order, start: int, count: int) -> list[int]:
    return [order.index(position) for position in range(start, start + count)]


@pytest.mark.parametrize("pool", [None, 1, 2, 4, 100])
def test_an_epoch_has_every_item_once_in_an_order_of_its_own(pool: int | None) -> None:
    order = ShardedOrder(SIZES, 3, pool)
    epochs = [read(order, epoch * TOTAL, TOTAL) for epoch in range(20)]
    assert all(sorted(epoch) == list(range(TOTAL)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert read(ShardedOrder(SIZES, 4, pool), 0, TOTAL) != epochs[0]


def test_a_full_shuffle_puts_every_item_everywhere() -> None:
    order = ShardedOrder([2, 2], 0)
    first = Counter(order.index(4 * epoch) for epoch in range(400))
    assert set(first) == {0, 1, 2, 3}
    assert min(first.values()) > 70


def test_a_pool_keeps_neighbouring_reads_in_few_shards() -> None:
    sizes = [10] * 30
    for pool in (1, 3):
        epoch = read(ShardedOrder(sizes, 0, pool), 0, 300)
        runs = [epoch[i : i + 10 * pool] for i in range(0, 300, 10 * pool)]
        assert all(len({item // 10 for item in run}) == pool for run in runs)
        assert [item // 10 for item in epoch] != sorted(item // 10 for item in epoch)
    assert len({item // 10 for item in read(ShardedOrder(sizes, 0), 0, 30)}) > 10


def test_a_bucketed_batch_has_one_bucket_and_a_round_has_every_item_batch_times() -> None:
    order, size = BucketOrder(BUCKETS, 4, 0), 11
    buckets = {item: number for number, shards in enumerate(BUCKETS) for shard in shards for item in shard}
    for turn in range(3):
        whole = read(order, turn * 4 * size, 4 * size)
        assert Counter(whole) == dict.fromkeys(range(size), 4)
        assert all(len({buckets[item] for item in whole[i : i + 4]}) == 1 for i in range(0, len(whole), 4))
    assert read(order, 0, 44) != read(order, 44, 44)
    # within a bucket nothing comes again before all of it came
    first = [item for item in read(order, 0, 132) if buckets[item] == 1]
    assert all(len(set(first[i : i + 5])) == 5 for i in range(0, len(first) - 4, 5))


def test_equal_buckets_are_not_shuffled_alike() -> None:
    order = BucketOrder([[[0, 1, 2, 3, 4, 5]], [[6, 7, 8, 9, 10, 11]]], 6, 0)
    halves: list[list[int]] = [[], []]
    for item in read(order, 0, 6 * 12):
        halves[item // 6].append(item % 6)
    assert halves[0] != halves[1]
    assert Counter(halves[0]) == Counter(halves[1])


@pytest.mark.parametrize("kind", ["sharded", "bucketed"])
def test_ranks_and_resumes_lose_and_repeat_nothing(kind: str) -> None:
    """8 samples a step; 1 rank, then resumed on 4, then on 2, in new processes: what one unbroken rank reads."""
    whole = read(make(kind), 0, 8 * 30)
    cursor, seen = 0, []
    for ranks, steps in [(1, 3), (4, 11), (2, 9), (8, 7)]:
        orders = [make(kind) for _ in range(ranks)]  # fresh: nothing but the cursor is carried over
        for _ in range(steps):
            each = 8 // ranks
            for rank, order in enumerate(orders):
                seen += read(order, cursor + rank * each, each)
            cursor += 8
    assert seen == whole


@pytest.mark.parametrize("kind", ["sharded", "bucketed"])
def test_corrupt_samples_are_replaced_alike_on_any_rank_and_resume(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    bad = {1, 4}

    def stream() -> Stream:
        return Stream(Numbers(SIZES, bad), make(kind), 0, max_corrupt=0.5)

    unbroken = stream()
    with caplog.at_level(logging.WARNING):
        whole = [sample.name for sample in unbroken.samples(range(80))]
    assert not bad & set(map(int, whole))
    assert set(unbroken.faults.reasons) == bad
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert all("\n" not in line for line in warnings)
    assert any("item 4 of numbers.tar is broken" in line for line in warnings)
    for position in range(79, -1, -7):  # each position alone, in a process that met nothing before
        assert stream().sample(position).name == whole[position]
    order = make(kind)
    for position, name in enumerate(whole):  # what could be read stays where it was
        assert order.index(position) in {*bad, int(name)}


def test_a_replacement_is_of_the_same_bucket() -> None:
    order = BucketOrder(BUCKETS, 4, 0)
    stream = Stream(Numbers([11], {0, 3, 8}), order, 0, max_corrupt=1)
    buckets = {item: number for number, shards in enumerate(BUCKETS) for shard in shards for item in shard}
    for position in range(88):
        assert buckets[int(stream.sample(position).name)] == buckets[order.index(position)]


def test_more_than_one_percent_corrupt_is_the_end() -> None:
    order = ShardedOrder([200], 0)
    good = Stream(Numbers([200], {5, 60}), order, 0)
    assert len(good.samples(range(200))) == 200
    assert len(good.faults.reasons) == 2
    with pytest.raises(
        TooManyCorrupt,
        match=r"3 of 200 samples are corrupt, more than a share of 0\.01",
    ) as error:
        Stream(Numbers([200], {5, 60, 7}), order, 0).samples(range(200))
    assert "numbers.tar is broken; the log names them all: make their files anew" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(TooManyCorrupt, match="none of 3 samples"):
        Stream(Numbers([3], {0, 1, 2}), ShardedOrder([3], 0), 0, max_corrupt=1).sample(0)


def test_a_corrupt_sample_is_read_once_and_no_rank_reads_anothers() -> None:
    source = Numbers([8], {3})
    stream = Stream(source, ShardedOrder([8], 0), 0, max_corrupt=1)
    stream.samples(range(80))
    assert source.reads.count(3) == 1
    rank_source = Numbers([8])
    Stream(rank_source, ShardedOrder([8], 0), 0).samples(range(2, 4))
    assert len(rank_source.reads) == 2


def test_caption_dropout_goes_by_position() -> None:
    def dropped(share: float, seed: int = 0) -> list[bool]:
        stream = Stream(Numbers([7]), ShardedOrder([7], 0), seed, caption_dropout=share, dropped_caption="bad")
        return [sample.caption == "bad" for sample in stream.samples(range(2000))]

    tenth = dropped(0.1)
    assert 0.07 < sum(tenth) / 2000 < 0.13
    assert not any(dropped(0.0))
    assert all(dropped(1.0))
    assert dropped(0.1, seed=1) != tenth
    half = dropped(0.5)
    assert all(more for less, more in zip(tenth, half, strict=True) if less)
    alone = Stream(Numbers([7]), ShardedOrder([7], 0), 0, caption_dropout=0.5, dropped_caption="bad")
    assert [alone.sample(p).caption == "bad" for p in range(1999, 1990, -1)] == half[1999:1990:-1]


def test_bad_orders_are_refused() -> None:
    for action, message in [
        (lambda: ShardedOrder([], 0), "at least one item"),
        (lambda: ShardedOrder([0, 0], 0), "at least one item"),
        (lambda: ShardedOrder([3], 0, pool=0), "at least 1 shard, got 0"),
        (lambda: ShardedOrder([3], 0).index(-1), "must be >= 0, got -1"),
        (lambda: BucketOrder([[[], []]], 2, 0), "no bucket has any"),
        (lambda: BucketOrder([[[1]]], 0, 0), "at least 1 item, got 0"),
        (lambda: Faults(3, 1.5), r"max_corrupt must be in \[0, 1\]"),
        (lambda: Stream(Numbers([1]), ShardedOrder([1], 0), 0, caption_dropout=2), "caption_dropout must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            action()
