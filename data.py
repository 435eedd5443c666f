"""The tiny data loader shared by the three scripts: which sample comes next, and how it reaches the device.

A dataset is a dict of equally long arrays (numpy arrays, torch tensors, or memory maps larger than RAM), or a list of
samples of uneven length that a collate function turns into a batch. Three rules make every run repeatable:

- The order is a pure function. A training batch has B rows (over all processes and micro-batches); row b takes as its
  k-th sample entry k * B + b of an endless sequence of permutations, one per (seed, epoch). Nothing is stored: resuming
  at update k, or splitting the B rows over more processes, gives the very same samples. Samples of uneven length are
  put into batches of about equal length, 32 batches at a time (see bucketed_window), by a pure function too.
- Validation visits every sample once in file order, batches dealt out to the processes in turn.
- One batch is always being made ahead in a background thread, in pinned memory when the device is CUDA.
"""

import functools
import hashlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch


class DataError(ValueError):
    """Bad input from outside. The message reads `<file>[:<line>]: <what is wrong>, expected <what>`."""


# ---- order: pure functions of (seed, epoch) -------------------------------------------------------------------------


def hash64(values, salt):
    """Hash integers to uint64 (the splitmix64 finaliser, Steele et al. 2014): the scripts' stateless randomness.

    values: integer array [n]; salt: an int, 0 or more. hash64(values, salt) / 2**64 is uniform on [0, 1).
    """
    x = values.astype(np.uint64) + np.uint64((salt + 1) * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache(maxsize=4)  # 8 bytes a sample each; rows rarely lie further apart than two epochs
def permutation(size, seed, epoch):
    """The order of an epoch: int64 [size]."""
    return np.random.default_rng((seed, epoch)).permutation(size)


def sample_index(drawn, rows, num_rows, size, seed):
    """Which samples (int64 [n]) rows[i] of num_rows take after drawn[i] others; both int64 [n], counted from 0."""
    epochs, entry = np.divmod(drawn * num_rows + rows, size)
    index = np.empty_like(entry)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        index[here] = permutation(size, seed, int(epoch))[entry[here]]
    return index


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
    updates = np.arange(n) + window * n
    index = sample_index(np.repeat(updates, num_rows), np.tile(np.arange(num_rows), n), num_rows, len(lengths), seed)
    by_length = index[np.argsort(lengths[index], kind="stable")].reshape(n, num_rows)
    return by_length[np.argsort(hash64(updates, seed), kind="stable")]


# ---- arrays ---------------------------------------------------------------------------------------------------------


class Subset:
    """Rows index (int64 [n]) of an array: len() and indexing with int64 arrays, nothing copied."""

    def __init__(self, array, index):
        self.array, self.index = array, index

    def __len__(self):
        return len(self.index)

    def __getitem__(self, index):
        return self.array[self.index[index]]


class Concat:
    """The tensors of several files seen as one: len() and indexing with int64 arrays.

    Indexing gives float32. Raises DataError for a number that is not finite and, where padded is False, for a sample
    [T, ...] that ends in zeros.
    """

    def __init__(self, tensors, files, padded=True):
        self.tensors, self.files, self.padded = tensors, files, padded
        self.ends = np.cumsum([len(tensor) for tensor in tensors])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, index):
        which = np.searchsorted(self.ends, index, side="right")
        row = index - np.concatenate([[0], self.ends])[which]
        picked = torch.empty(len(index), *self.tensors[0].shape[1:])
        for i in np.unique(which):
            here = np.flatnonzero(which == i)
            picked[here] = self.tensors[i][row[here]].float()
        bad = ~torch.isfinite(picked).flatten(1).all(1)
        if not self.padded:
            bad |= (picked[:, -1] == 0).all(-1)
        if bad.any():
            at = int(bad.int().argmax())
            what = "is not finite or ends in zeros, expected numbers, cut to windows of equal length"
            raise DataError(f"{self.files[which[at]]}: sample {row[at]} {what}")
        return picked


def size_of(dataset):
    """Number of samples."""
    return len(dataset) if isinstance(dataset, list) else len(next(iter(dataset.values())))


def make_batch(dataset, index, extra, collate, pin=False):
    """Gather samples index (int64 [n]) and the arrays in extra into one dict of contiguous CPU tensors."""
    picked = [dataset[i] for i in index] if isinstance(dataset, list) else {k: v[index] for k, v in dataset.items()}
    batch = {**picked, **extra} if collate is None else collate(picked, extra)
    # A strided view would leave the fast path to the GPU, and wait for it.
    batch = {name: torch.as_tensor(value).contiguous() for name, value in batch.items()}
    return {name: value.pin_memory() for name, value in batch.items()} if pin else batch


def fingerprint(dataset, collate):
    """Number of samples and a hash of the first, the middle and the last: enough to notice that they are others."""
    size = size_of(dataset)
    batch = make_batch(dataset, np.array([0, size // 2, size - 1]), {}, collate if isinstance(dataset, list) else None)
    content = b"".join(value.numpy().tobytes() for value in batch.values())
    return f"{size} samples, {hashlib.sha256(content).hexdigest()[:16]}"


# ---- batches --------------------------------------------------------------------------------------------------------


def background(device):
    """One thread; on CUDA it pins memory for this process's device and not for the first one."""
    pinning = torch.device(device).type == "cuda"
    return ThreadPoolExecutor(1, initializer=functools.partial(torch.cuda.set_device, device) if pinning else None)


def to_device(batch, device):
    """The batch on the device, copied without waiting from pinned memory alone: other memory may be freed too early."""
    pinned = torch.device(device).type == "cuda"
    return batch and {name: value.to(device, non_blocking=pinned) for name, value in batch.items()}


class Loader:
    """Training batches without end, made in request order in a background thread.

    collate(picked, extra) -> dict of arrays; extra holds `rows` (their places in this process's micro-batch) and
    `position` (k * B + b, unique for each sample ever taken: whatever is random about one is hashed from it).
    The samples of a list have an attribute `length`.
    """

    def __init__(self, dataset, num_rows, seed, device, collate=None):
        self.dataset, self.num_rows, self.seed = dataset, num_rows, seed
        self.device, self.collate = torch.device(device), collate
        self.thread, self.queue = background(device), deque()
        if isinstance(dataset, list):
            lengths = np.array([sample.length for sample in dataset])
            self.window = functools.lru_cache(1)(lambda window: bucketed_window(window, num_rows, lengths, seed))

    def request(self, first_row, drawn, wanted=None):
        """Start making a batch: rows first_row, first_row + 1, ... take a sample each, after drawn[i] others.

        drawn: int64 tensor [n] on any device, all equal where the dataset is a list; wanted: bool tensor [n], which
        rows take one at all (None: every row). A CUDA tensor is copied without waiting: the thread waits for the copy,
        the caller goes on to the backward pass.
        """
        cuda = self.device.type == "cuda"
        copies = [None if t is None else t.to("cpu", non_blocking=cuda) for t in (drawn, wanted)]
        copied = torch.cuda.Event() if cuda else None
        if copied:
            copied.record()
        self.queue.append(self.thread.submit(self._make, first_row, *copies, copied))

    def _make(self, first_row, drawn, wanted, copied):
        if copied:
            copied.synchronize()
        rows = np.arange(len(drawn)) if wanted is None else np.flatnonzero(wanted.numpy())
        drawn = drawn.numpy()[rows]
        size = size_of(self.dataset)
        if isinstance(self.dataset, list):
            window, update = divmod(int(drawn[0]), window_size(self.num_rows, size))
            index = self.window(window)[update, first_row + rows]
        else:
            index = sample_index(drawn, first_row + rows, self.num_rows, size, self.seed)
        extra = {"rows": rows, "position": drawn * self.num_rows + first_row + rows}
        return make_batch(self.dataset, index, extra, self.collate, pin=copied is not None)

    def next(self):
        """The oldest requested batch, as a dict of tensors on the device. Raises what the thread raised."""
        return to_device(self.queue.popleft().result(), self.device)


def fixed_batches(dataset, batch_size, device, rank=0, world=1, limit=0, collate=None):
    """Yield every sample once (the first `limit` of them if limit > 0), in order; the last batch may be smaller.

    This process gets batches rank, rank + world, ... of the whole pass, and None in the last round if there it has
    none: every process goes through the same number of rounds.
    """
    size = min(size_of(dataset), limit or size_of(dataset))
    pin = torch.device(device).type == "cuda"

    def make(first):
        index = np.arange(first, min(first + batch_size, size))
        return make_batch(dataset, index, {}, collate, pin) if len(index) else None

    with background(device) as thread:
        ahead = None
        for first in [*range(rank * batch_size, size + rank * batch_size, world * batch_size), None]:
            now, ahead = ahead, None if first is None else thread.submit(make, first)
            if now:
                yield to_device(now.result(), device)
