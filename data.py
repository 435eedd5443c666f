"""The tiny data loader shared by the three scripts: which sample comes next, and how it reaches the device.

A dataset is a dict of equally long arrays (numpy arrays, torch tensors, or memory maps larger than RAM), or a list of
samples of uneven length, each with an attribute `length`. A function collate(picked, rng, rows) turns some of them into
a batch, a dict of arrays. Three rules make every run repeatable:

- Which samples an update takes is a pure function of (seed, update). Nothing is stored: resuming at update k, or
  splitting an update over more processes, gives the very same samples.
- What is random about a batch is drawn from rng, a generator of its own for each (seed, update), the same in every
  process; rows are the places of the picked samples in the update. In validation both are None.
- Validation visits every sample once, in file order, batches dealt out to the processes in turn.

The next batches are made in a background thread, in pinned memory when the device is CUDA.
"""

import contextlib
import functools
import hashlib
import itertools
import textwrap
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch


class DataError(ValueError):
    """Bad input from outside. The message reads `<file>[:<line>]: <what is wrong>, expected <what>`."""


@contextlib.contextmanager
def expecting(expected, source):
    """Turn any error inside into a DataError about source: reading a file can fail with many types of exceptions."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        what = textwrap.shorten(str(error) or type(error).__name__, 300)  # in one line
        raise DataError(f"{source}: {what}, expected {expected}") from None


# ---- arrays ---------------------------------------------------------------------------------------------------------


class Subset:
    """Rows index (int64 [n]) of an array: len() and indexing with int64 arrays, nothing copied."""

    def __init__(self, array, index):
        self.array, self.index = array, index

    def __len__(self):
        return len(self.index)

    def __getitem__(self, index):
        return self.array[self.index[index]]


def subset(dataset, index):
    """These rows of a dict of arrays, nothing copied."""
    return {name: Subset(array, index) for name, array in dataset.items()}


class Concat:
    """The tensors of several files as one: len() and indexing with int64 arrays, which gives float32.

    Indexing raises DataError for a number that is not finite and, unless padded, for a sample [T, D] that begins or
    ends in zeros.
    """

    def __init__(self, tensors, files, padded=True):
        self.tensors, self.files, self.padded = tensors, files, padded
        self.starts = np.cumsum([0, *map(len, tensors)])

    def __len__(self):
        return self.starts[-1]

    def __getitem__(self, index):
        which = np.searchsorted(self.starts, index, side="right") - 1
        rows = index - self.starts[which]
        picked = torch.stack([self.tensors[i][row].float() for i, row in zip(which, rows)])
        bad = ~picked.flatten(1).sum(1).isfinite()  # ten times as fast as looking at each
        if not self.padded:
            bad |= (picked[:, [0, -1]] == 0).all(-1).any(1)
        if bad.any():
            at = int(bad.int().argmax())
            what = "is not finite or begins or ends in zeros, expected numbers, cut to windows of equal length"
            raise DataError(f"{self.files[which[at]]}: sample {rows[at]} {what}")
        return picked


def size_of(dataset):
    """Number of samples; {} has none."""
    return len(dataset if isinstance(dataset, list) else next(iter(dataset.values()), ()))


def pick(dataset, index):
    """The samples index (int64 [n]): a list, or a dict of arrays."""
    return [dataset[i] for i in index] if isinstance(dataset, list) else {k: v[index] for k, v in dataset.items()}


def fingerprint(data):
    """Sizes of data["train"] and data["val"], and a hash of three samples of each: enough to notice other data."""
    sizes, content = {}, hashlib.sha256()
    for split in ("train", "val"):
        size = sizes[f"number of {split} samples"] = size_of(data[split])
        picked = pick(data[split], np.array([0, size // 2, size - 1]))
        arrays = data["collate"](picked) if isinstance(picked, list) else picked
        for array in arrays.values():
            content.update(np.ascontiguousarray(array).tobytes())
    return sizes | {"content of the data, hashed": content.hexdigest()[:16]}


# ---- batches --------------------------------------------------------------------------------------------------------


def prefetch(make, keys, device, depth=1):
    """Yield make(key), a dict of arrays, for every key, as tensors on the device; `depth` of them are made ahead."""
    cuda = torch.device(device).type == "cuda"

    def prepare(key):
        # contiguous: a strided view would leave the fast path to the GPU, and wait for it.
        batch = {name: torch.as_tensor(value).contiguous() for name, value in make(key).items()}
        return {name: value.pin_memory() for name, value in batch.items()} if cuda else batch

    # Without set_device the thread would pin memory for the first GPU.
    with ThreadPoolExecutor(1, initializer=functools.partial(torch.cuda.set_device, device) if cuda else None) as pool:
        keys = iter(keys)
        ahead = deque(pool.submit(prepare, key) for key in itertools.islice(keys, depth))
        while ahead:
            ahead.extend(pool.submit(prepare, key) for key in itertools.islice(keys, 1))
            batch = ahead.popleft().result()
            # non_blocking from pinned memory only: other memory might be freed before it is copied.
            yield {name: value.to(device, non_blocking=cuda) for name, value in batch.items()}


def training_batches(dataset, collate, device, seed, num_rows, parts, update=0):
    """Yield training batches without end, from an update on: for each update one batch for each of parts.

    num_rows: samples of an update, over all processes; parts: int64 [k, n], which of them this process takes. An epoch
    is one permutation cut into updates; what does not fill an update is left out. Samples of uneven length are sorted
    by length, 32 updates at a time, to keep padding small.
    """
    size = size_of(dataset)
    per_epoch = max(1, size // num_rows)
    lengths = np.array([sample.length for sample in dataset]) if isinstance(dataset, list) else None

    @functools.lru_cache(1)
    def order(epoch):
        """int64 [per_epoch, num_rows]"""
        rng = np.random.default_rng((seed, 1, epoch))
        index = np.resize(rng.permutation(size), per_epoch * num_rows)  # repeats the samples where they are too few
        if lengths is None:
            return index.reshape(per_epoch, num_rows)
        index = index[np.lexsort((lengths[index], np.arange(len(index)) // (32 * num_rows)))]
        return rng.permutation(index.reshape(per_epoch, num_rows))  # short ones first would be a curriculum

    def make(key):
        update, rows = key
        picked = pick(dataset, order(update // per_epoch)[update % per_epoch, rows])
        return collate(picked, np.random.default_rng((seed, 2, update)), rows)

    return prefetch(make, ((k, rows) for k in itertools.count(update) for rows in parts), device, len(parts))


def fixed_batches(dataset, collate, device, batch_size, rank=0, world=1, limit=0):
    """Yield every sample once, in order; the last batch may be smaller.

    This process gets batches rank, rank + world, ... limit: if not 0, only so many samples; a random choice,
    since files are often sorted, but always the same one.
    """
    index = np.sort(np.random.default_rng(0).permutation(size_of(dataset))[: limit or None])

    def make(first):
        return collate(pick(dataset, index[first : first + batch_size]))

    return prefetch(make, range(rank * batch_size, len(index), world * batch_size), device)
