"""The order in which a run reads a data set: a pure function of the global sample position, so it has no state.

The cursor of a checkpoint is the position alone. Ranks slice one global batch, so a run at another world size, or a
resumed one, reads what the unbroken run would have read: nothing twice, nothing never.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from utils.random import generator, keyed_seed


class Order(Protocol):
    """Positions 0, 1, 2, ... without end, and the item that each reads."""

    size: int

    def index(self, position: int) -> int: ...

    def candidates(self, position: int) -> Iterator[int]: ...


class ShardedOrder:
    """Every item once an epoch, reshuffled every epoch; `pool` shards are open at a time.

    shard_sizes: items of each shard (a file, or what one read brings); items are numbered through all shards. An epoch
    permutes the shards, takes them `pool` by `pool`, and permutes the items of each such pool. So what is read in a row
    lies in few files, and the order is still a function of (seed, position). pool None: all shards are one pool, a
    full shuffle. Memory: one number a shard and one an item of the pools in use.

    Raises ValueError without an item, or where pool < 1.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, pool: int | None = None) -> None:
        self.shard_sizes = list(shard_sizes)
        self.size = sum(self.shard_sizes)
        self.seed = seed
        self.pool = len(self.shard_sizes) if pool is None else pool
        if self.size < 1 or min(self.shard_sizes) < 0:
            raise ValueError(f"data order: needs at least one item, got shards of {self.shard_sizes[:8]}")
        if self.pool < 1:
            raise ValueError(f"data order: the pool must hold at least 1 shard, got {pool}")
        self._first = [0, *itertools.accumulate(self.shard_sizes)]
        # not methods with a cache: that would keep every order alive
        self._plan = functools.lru_cache(maxsize=2)(self._plan_of)
        self._pool_items = functools.lru_cache(maxsize=4)(self._pool_items_of)

    def index(self, position: int) -> int:
        """The item at this position. Raises ValueError for a negative one."""
        if position < 0:
            raise ValueError(f"data order: positions must be >= 0, got {position}")
        epoch, place = divmod(position, self.size)
        return self._at(epoch, place)

    def candidates(self, position: int) -> Iterator[int]:
        """The item at this position, then what takes its place if it cannot be read: the next ones of its epoch."""
        if position < 0:
            raise ValueError(f"data order: positions must be >= 0, got {position}")
        epoch, place = divmod(position, self.size)
        return (self._at(epoch, (place + step) % self.size) for step in range(self.size))

    def _at(self, epoch: int, place: int) -> int:
        _, starts = self._plan(epoch)
        pool = bisect_right(starts, place) - 1
        return self._pool_items(epoch, pool)[place - starts[pool]]

    def _plan_of(self, epoch: int) -> tuple[list[int], list[int]]:
        """The shards in this epoch's order, and the place at which each pool begins."""
        key = generator(self.seed, "shard order", epoch)
        shards = torch.randperm(len(self.shard_sizes), generator=key).tolist()
        pools = [shards[i : i + self.pool] for i in range(0, len(shards), self.pool)]
        sizes = [sum(self.shard_sizes[shard] for shard in pool) for pool in pools]
        return shards, [0, *itertools.accumulate(sizes)][:-1]

    def _pool_items_of(self, epoch: int, pool: int) -> list[int]:
        shards, _ = self._plan(epoch)
        part = shards[pool * self.pool : (pool + 1) * self.pool]
        items = [item for shard in part for item in range(self._first[shard], self._first[shard + 1])]
        key = generator(self.seed, "item order", epoch, pool)
        return [items[i] for i in torch.randperm(len(items), generator=key).tolist()]


class BucketOrder:
    """Batches of one bucket each (same frames, height, width), each item as often as any other.

    buckets: the items of each bucket by shard, `buckets[bucket][shard] = items`. batch: how many positions in a row
    share a bucket; the global batch, so that all ranks have tensors of one size. A bucket's items are a `ShardedOrder`
    of its own, which nothing is left over from. `batch` epochs are one round: bucket b has exactly size_b batches in
    it, in a keyed order; so a round reads every item `batch` times, and its share of the batches is its share of
    the data.

    Another `batch` is another order: a run whose global batch is changed reads on in it from its cursor.
    Raises ValueError without an item, or where batch < 1.
    """

    def __init__(self, buckets: Sequence[Sequence[Sequence[int]]], batch: int, seed: int, pool: int | None = None):
        if batch < 1:
            raise ValueError(f"data order: batches must hold at least 1 item, got {batch}")
        self.items = [[item for shard in shards for item in shard] for shards in buckets if any(map(len, shards))]
        used = [shards for shards in buckets if any(map(len, shards))]
        self.orders = [
            ShardedOrder([len(shard) for shard in shards if shard], keyed_seed(seed, "bucket", number), pool)
            for number, shards in enumerate(used)
        ]
        self.batch, self.seed = batch, seed
        self.size = sum(map(len, self.items))
        if self.size < 1:
            raise ValueError("data order: needs at least one item, and no bucket has any")
        self._round = functools.lru_cache(maxsize=2)(self._round_of)

    def index(self, position: int) -> int:
        """The item at this position. Raises ValueError for a negative one."""
        return next(self.candidates(position))

    def bucket(self, position: int) -> int:
        """Which bucket, of those that are not empty, this position reads from."""
        return self._placed(position)[0]

    def candidates(self, position: int) -> Iterator[int]:
        """The item at this position, then what takes its place if it cannot be read: others of its bucket."""
        bucket, place = self._placed(position)
        return (self.items[bucket][i] for i in self.orders[bucket].candidates(place))

    def _placed(self, position: int) -> tuple[int, int]:
        """(bucket, position in the order of that bucket)."""
        if position < 0:
            raise ValueError(f"data order: positions must be >= 0, got {position}")
        batch, within = divmod(position, self.batch)
        turn, number = divmod(batch, self.size)
        buckets, before = self._round(turn)
        bucket = buckets[number]
        earlier = turn * len(self.items[bucket]) + before[number]
        return bucket, earlier * self.batch + within

    def _round_of(self, turn: int) -> tuple[list[int], list[int]]:
        """The bucket of each batch of a round, and how many batches of that bucket came before it in the round."""
        every = [bucket for bucket, items in enumerate(self.items) for _ in items]
        order = torch.randperm(len(every), generator=generator(self.seed, "bucket order", turn)).tolist()
        counts, before = [0] * len(self.items), []
        for bucket in (buckets := [every[i] for i in order]):
            before.append(counts[bucket])
            counts[bucket] += 1
        return buckets, before
