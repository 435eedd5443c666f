"""The tiny data loader shared by the three scripts: which sample comes next, and how it reaches the device.

A dataset is a dict of equally long arrays (numpy arrays, torch tensors, or memory maps larger than RAM), or a list of
anything that a collate function turns into a batch. Three rules make every run repeatable:

- The order is a pure function. A training batch has B rows (over all processes and micro-steps); row b takes as its
  k-th sample entry k * B + b of an endless sequence of permutations, one per (seed, epoch). Nothing is stored: resuming
  at update k, or splitting the B rows over more processes, gives the very same samples. Samples of uneven length are
  put into batches of about equal length, 32 batches at a time (see Bucketed), by a pure function too.
- Validation visits every sample once in file order, batches dealt out to the processes in turn.
- One batch is always being made ahead in a background thread, in pinned memory when the device is CUDA.
"""

import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch


class DataError(ValueError):
    """Bad input from outside. The message reads `<file>[:<line>]: <what is wrong>, expected <what>`."""


# ---- order: pure functions of (seed, epoch) -------------------------------------------------------------------------


def mix(values, salt):
    """Hash integers to uint64 (the splitmix64 finaliser, Steele et al. 2014): the scripts' stateless randomness.

    values: integer array [n]; salt: an int, 0 or more. mix(values, salt) / 2**64 is uniform on [0, 1).
    """
    x = values.astype(np.uint64) + np.uint64((salt + 1) * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted(index, size, key):
    """Entries `index` of the pseudorandom permutation of range(size) named by `key`, in O(len(index)) time and memory.

    index: int64 [n], each in [0, size); key: uint64 [n]. Returns int64 [n]. A Feistel network is a bijection on
    2^(2h) >= size values; applying it again to whatever falls outside [0, size) makes it one on range(size). A table
    (np.random.permutation) would cost 8 bytes per sample in every process and be shuffled again each epoch.
    """
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    x = index.astype(np.uint64)
    todo = np.ones(x.shape, bool)
    while todo.any():
        left, right = x >> half, x & mask
        for turn in range(6):
            left, right = right, left ^ (mix(right + (key << np.uint64(3)), turn) & mask)
        x = np.where(todo, left << half | right, x)
        todo = x >= np.uint64(size)
    return x.astype(np.int64)


def sample_index(turns, rows, num_rows, size, seed):
    """Which samples (int64 [n]) rows[i] of num_rows take as their turns[i]-th; both int64 [n], counted from 0."""
    epoch, entry = np.divmod(turns * num_rows + rows, size)
    return permuted(entry, size, mix(epoch, seed))


def window_size(num_rows, size):
    """How many batches trade samples: 32, but no more than an epoch has."""
    return min(32, max(1, size // num_rows))


def bucketed_window(window, num_rows, lengths, seed):
    """Which samples (int64 [n, num_rows]) the n batches of a window hold: in each, samples of about equal length.

    The window's entries of the endless sequence are sorted by length and cut into batches, which then come in random
    order (short ones first in every window would be a curriculum). lengths: int [size]. A window that goes from one
    epoch into the next may hold a sample twice, and then often in one batch.
    """
    n = window_size(num_rows, len(lengths))
    batches = np.arange(n) + window * n
    index = sample_index(np.repeat(batches, num_rows), np.tile(np.arange(num_rows), n), num_rows, len(lengths), seed)
    in_order = index[np.argsort(lengths[index], kind="stable")].reshape(n, num_rows)
    return in_order[np.argsort(mix(batches, seed), kind="stable")]


# ---- arrays ---------------------------------------------------------------------------------------------------------


class Concat:
    """The tensors of several files seen as one, from start to stop: supports len() and indexing with int64 arrays.

    Indexing gives float32, or integers as they are, and raises DataError for a number that is not finite.
    """

    def __init__(self, tensors, files, start=0, stop=None):
        self.tensors, self.files, self.start = tensors, files, start
        self.ends = np.cumsum([len(tensor) for tensor in tensors])
        self.stop = int(self.ends[-1]) if stop is None else stop

    def __len__(self):
        return self.stop - self.start

    def __getitem__(self, index):
        index = index + self.start
        which = np.searchsorted(self.ends, index, side="right")
        row = index - np.concatenate([[0], self.ends])[which]
        dtype = torch.float32 if self.tensors[0].is_floating_point() else self.tensors[0].dtype
        picked = torch.empty(len(index), *self.tensors[0].shape[1:], dtype=dtype)
        for i in np.unique(which):
            here = np.flatnonzero(which == i)
            picked[here] = self.tensors[i][row[here]].to(dtype)
        finite = torch.isfinite(picked).flatten(1).all(1)
        if not finite.all():
            bad = int(finite.int().argmin())
            raise DataError(f"{self.files[which[bad]]}: sample {row[bad]} is not finite, expected numbers")
        return picked


class Bucketed(list):
    """A list of samples with their lengths, int [n]: a training batch then holds samples of about equal length."""

    def __init__(self, samples, lengths):
        super().__init__(samples)
        self.lengths = np.asarray(lengths)


def size_of(dataset):
    """Number of samples."""
    return len(dataset) if isinstance(dataset, list) else len(next(iter(dataset.values())))


def make_batch(dataset, index, extra, collate, pin):
    """Gather samples index (int64 [n]) and the arrays in extra into one dict of CPU tensors."""
    picked = [dataset[i] for i in index] if isinstance(dataset, list) else {k: v[index] for k, v in dataset.items()}
    batch = {**picked, **extra} if collate is None else collate(picked, extra)
    batch = {name: torch.as_tensor(value) for name, value in batch.items()}
    return {name: value.pin_memory() for name, value in batch.items()} if pin else batch


# ---- batches --------------------------------------------------------------------------------------------------------


def background(device):
    """One thread; on CUDA it pins memory for this process's device and not for the first one."""
    cuda = torch.device(device).type == "cuda"
    return ThreadPoolExecutor(
        1, initializer=torch.cuda.set_device if cuda else None, initargs=(device,) if cuda else ()
    )


class Loader:
    """Training batches without end, made in request order in a background thread.

    collate(picked, extra) -> dict of arrays; extra holds `rows` (their places in this process's micro-batch) and
    `position` (k * B + b, unique for each sample ever taken: whatever is random about one is hashed from it).
    """

    def __init__(self, dataset, num_rows, seed, device, collate=None):
        self.dataset, self.size, self.num_rows, self.seed = dataset, size_of(dataset), num_rows, seed
        self.device, self.collate = torch.device(device), collate
        self.thread, self.queue = background(device), deque()
        self.window = -1, None  # of a Bucketed dataset: which one, its batches

    def request(self, first_row, turns, wanted=None):
        """Start making a batch: rows first_row, first_row + 1, ... take their turns[i]-th sample.

        turns: int64 tensor [n] on any device; wanted: bool tensor [n], which rows take one at all (None: every row).
        A CUDA tensor is copied without waiting: the thread waits for the copy, the caller goes on to the backward pass.
        """
        cuda = self.device.type == "cuda"
        copies = [None if t is None else t.to("cpu", non_blocking=cuda) for t in (turns, wanted)]
        copied = torch.cuda.Event() if cuda else None
        if copied:
            copied.record()
        self.queue.append(self.thread.submit(self._make, first_row, *copies, copied))

    def _make(self, first_row, turns, wanted, copied):
        if copied:
            copied.synchronize()
        rows = np.arange(len(turns)) if wanted is None else np.flatnonzero(wanted.numpy())
        turns = turns.numpy()[rows]
        index = self._index(turns, first_row + rows)
        extra = {"rows": rows, "position": turns * self.num_rows + first_row + rows}
        return make_batch(self.dataset, index, extra, self.collate, copied is not None)

    def _index(self, turns, rows):
        if not isinstance(self.dataset, Bucketed):
            return sample_index(turns, rows, self.num_rows, self.size, self.seed)
        index, n = np.empty(len(turns), np.int64), window_size(self.num_rows, self.size)
        for i, (turn, row) in enumerate(zip(turns, rows)):
            if self.window[0] != turn // n:  # kept: one sort for every n updates
                batches = bucketed_window(turn // n, self.num_rows, self.dataset.lengths, self.seed)
                self.window = turn // n, batches
            index[i] = self.window[1][turn % n, row]
        return index

    def next(self):
        """The oldest requested batch, as a dict of tensors on the device. Raises what the thread raised."""
        batch = self.queue.popleft().result()
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}


def fixed_batches(dataset, batch_size, device, rank=0, world=1, limit=0, collate=None):
    """Yield every sample once (the first `limit` of them if limit > 0), in order; the last batch may be smaller.

    This process gets batches rank, rank + world, ... of the whole pass.
    """
    size = min(size_of(dataset), limit or size_of(dataset))
    pin = torch.device(device).type == "cuda"
    with background(device) as thread:
        ahead = None
        for start in itertools.chain(range(rank * batch_size, size, world * batch_size), [None]):
            now, ahead = ahead, None
            if start is not None:
                index = np.arange(start, min(start + batch_size, size))
                ahead = thread.submit(make_batch, dataset, index, {}, collate, pin)
            if now is not None:
                yield {name: value.to(device, non_blocking=True) for name, value in now.result().items()}
