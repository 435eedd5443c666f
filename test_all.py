"""`pytest test_all.py`: the proofs, on the CPU, in a few minutes.  `python test_all.py`: the benchmark table.

Every clever path (one causal pass, checkpointing, packed rows, accumulation, several processes, resuming) is checked
against a slow and obvious reference written here, independently of the scripts. Times and memory are never
asserted; the benchmark prints them.
"""

import argparse
import cmath
import contextlib
import copy
import dataclasses
import datetime
import functools
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, read when it loads: no chatter

import jinja2
import numpy as np
import pytest
import tokenizers
import torch
import torch._dynamo
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import jepa_lm
import nepa_deep
import trm_deep
from data import Concat, DataError, Subset, expecting, fixed_batches, pick, prefetch, training_batches

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
SCRIPTS = {"nepa_deep": nepa_deep, "trm_deep": trm_deep, "jepa_lm": jepa_lm}
# The smallest run of each script that still goes through everything.
TINY = {
    "nepa_deep": "--hidden_size 16 --num_layers 3 --num_heads 2 --patch_size 8 --use_intermediate_loss"
    " --probe_samples 60",
    "trm_deep": "--hidden_size 32 --num_heads 2 --H_cycles 2 --halt_max_steps 3 --enable_deep_supervision"
    " --curriculum_end_step 0",
    "jepa_lm": "--hidden_size 32 --num_heads 2 --num_layers 1 --sigreg 0",
}
COMMON = "--device cpu --batch_size 8 --max_train_steps 6 --warmup_steps 2 --eval_interval 3 --eval_samples 20"
COMMON += " --log_interval 1"
each_script = pytest.mark.parametrize("script", SCRIPTS)
# Runs in processes of their own are forked from a server that has imported torch and the scripts, and computed nothing.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_all"])
if __name__ != "__main__":
    torch.set_num_threads(1)  # the fastest for tiny tensors
if os.environ.get("FORK_SERVER"):  # this is that server: its children find the synthetic data ready
    nepa_deep.synthetic_dataset(0)
    trm_deep.synthetic_dataset(0)
    jepa_lm.synthetic_dataset(0, False, jepa_lm.BYTES)
os.environ["FORK_SERVER"] = "yes"


def words_of(script, out_dir, flags="", tiny=None):
    """tiny: with TINY and COMMON; None: unless a run in out_dir has flags already."""
    if tiny is None:
        tiny = not (Path(out_dir) / "ckpt.pt").exists()
    return f"--out_dir {out_dir} " + (f"{TINY[script]} {COMMON} {flags}" if tiny else flags)


def run(script, out_dir, flags="", tiny=None):
    """The script's own main() in this process; returns the lines of metrics.jsonl."""
    assert SCRIPTS[script].main(shlex.split(words_of(script, out_dir, flags, tiny))) is None
    return lines_of(out_dir)


def printed(*inputs):
    """What such a run prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run(*inputs)
    return out.getvalue()


def parsed(script, flags):
    """The flags in force when the script is called with these."""
    return SCRIPTS[script].parse_args(shlex.split(flags))[0]


def batch_of(data, index, update=None, rows=None, split="train"):
    """These samples of a split, collated: with an update's number as in training, without as in validation."""
    index = np.asarray(index)
    rng = None if update is None else np.random.default_rng((0, 2, update))
    batch = data["collate"](pick(data[split], index), rng, np.arange(len(index)) if rows is None else rows)
    return {name: torch.as_tensor(value) for name, value in batch.items()}


def dumps(name):
    """Of the files in PARITY, dumps of published models (.npz, separated by colons), those that hold this weight."""
    files = os.environ.get("PARITY", "").split(":")
    return [file for file in files if file and "w:" + name in np.load(file).files]


def lines_of(out_dir):
    """The lines of metrics.jsonl, without the seconds, which alone differ from run to run."""
    lines = [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]
    for line in of_split(lines, "train"):
        del line["seconds"]
    return lines


def of_split(lines, split):
    return [line for line in lines if line["split"] == split]


def shell(command, **env):
    """A command line in a process of its own, as a user without a GPU types it; python is this one."""
    words = [sys.executable if word == "python" else word for word in command.split()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.run(words, cwd=HERE, env=env, capture_output=True, text=True, timeout=300)


class Processes:
    """The script's own main() in processes of its own, connected as torchrun does it."""

    def __init__(self, script, out_dir, flags="", count=1, tiny=None, prepare=None):
        """prepare(rank), called in each process before main: a function of this module that breaks something."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.logs = [tempfile.NamedTemporaryFile() for _ in range(count)]  # noqa: SIM115 (as long as they are looked at)
        self.all = []
        for rank, log in enumerate(self.logs):
            inputs = log.name, rank, count, port, prepare, (script, out_dir, flags, tiny)
            self.all.append(FORKS.Process(target=self.child, args=inputs, daemon=True))
            self.all[-1].start()

    @staticmethod
    def child(log, rank, count, port, prepare, inputs):
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": count}
        os.environ.update({name: str(value) for name, value in where.items()})
        for module in SCRIPTS.values():  # which read it when they were imported
            module.RANK, module.WORLD = rank, count
        if prepare:
            prepare(rank)
        run(*inputs)

    def wait(self, seconds=120):
        """The exit codes: a signal's number below zero, -9 too for who still ran after so many seconds."""
        for process in self.all:
            process.join(seconds)
            process.kill()
            process.join()
        return [process.exitcode for process in self.all]

    def text(self, rank=0):
        return Path(self.logs[rank].name).read_text()


def two_processes(script, out_dir, flags="", **kwargs):
    """Like run, in two processes."""
    processes = Processes(script, out_dir, flags, count=2, **kwargs)
    assert processes.wait() == [0, 0], processes.text(0) + processes.text(1)
    return lines_of(out_dir)


def load(out_dir, name="ckpt.pt"):
    return torch.load(Path(out_dir) / name, weights_only=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(a, b):
    """Whether two nested structures are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def best_of(script, out_dir, **changes):
    """The Model in best.pt, with other settings perhaps."""
    saved = load(out_dir, "best.pt")
    model = SCRIPTS[script].Model(SCRIPTS[script].Config(**saved["config"] | changes)).eval()
    model.load_state_dict(saved["model"])
    return model


STATE = "model", "ema", "optimizer", "rng", "carry", "step", "sums"


def same_run(folder_a, folder_b):
    """Whether two folders hold the same lines and checkpoints, to the last bit."""
    for name, parts in {"ckpt.pt": STATE, "best.pt": ("model", "metrics", "step")}.items():
        a, b = load(folder_a, name), load(folder_b, name)
        assert all(same(a[part], b[part]) for part in parts)
    return lines_of(folder_a) == lines_of(folder_b)


PER_BATCH = "cos_unpaired|embed_cos|effective_rank|constant_loss"


def close(lines_a, lines_b, tolerance):
    """Whether metrics agree, but for those that compare the samples of one batch."""
    for pair in zip(lines_a, lines_b, strict=True):
        a, b = ({name: value for name, value in line.items() if not re.search(PER_BATCH, name)} for line in pair)
        assert a.pop("split") == b.pop("split")
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


def saved_bytes(run_once, model, of=lambda tensor: True):
    """Bytes that run_once keeps for backward in tensors that `of` accepts, the model's parameters left out.

    Several views of one storage count once.
    """
    storages = {}

    def pack(tensor):
        if of(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage  # so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = run_once()  # noqa: F841 (held until all is counted)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(storage.nbytes() for at, storage in storages.items() if at not in parameters)


# ==== data.py ========================================================================================================


class Word(str):
    length = property(len)


def numbers(picked, rng=None, rows=None):
    """The samples' numbers, 1 to 289, and what is random about them."""
    x = np.array([len(word) for word in picked] if isinstance(picked, list) else picked["x"])
    return {"x": x} if rng is None else {"x": x, "drawn": rng.random(rows[-1] + 1)[rows]}


LENGTHS = np.arange(1, 290)
DATASETS = [{"x": LENGTHS}, [Word("x" * n) for n in LENGTHS]]  # arrays, and samples of uneven length
each_dataset = pytest.mark.parametrize("dataset", DATASETS)


def drawn(dataset, num_rows, rows, updates, first=0, seed=3):
    """The batches of these rows of so many updates."""
    batches = training_batches(dataset, numbers, "cpu", seed, num_rows, [np.array(rows)], first)
    return list(itertools.islice(batches, updates))


@each_dataset
def test_an_epoch_visits_every_sample_once_in_an_order_of_its_own(dataset):
    epochs = [drawn(dataset, 17, range(17), 17, 17 * k, seed) for k, seed in ((0, 3), (1, 3), (0, 4))]
    orders = [np.stack([batch["x"] for batch in epoch]) for epoch in epochs]
    assert all((np.sort(order, None) == LENGTHS).all() for order in orders) and len(np.unique(orders, axis=0)) == 3
    assert abs(np.corrcoef(np.arange(17), orders[0].mean(1))[0, 1]) < 0.6  # short ones do not come first
    assert all((np.ptp(orders[0], 1) == 16) == isinstance(dataset, list))  # uneven samples are sorted, then cut


@each_dataset
def test_processes_micro_batches_and_resumed_runs_get_the_samples_of_one_run(dataset):
    whole = drawn(dataset, 8, range(8), 45)
    assert same(drawn(dataset, 8, range(8), 1, first=44), whole[44:])  # of the second epoch
    for rows in ([0, 1], [5, 6, 7]):
        assert same(drawn(dataset, 8, rows, 45), [{name: x[rows] for name, x in batch.items()} for batch in whole])
    pieces = training_batches(dataset, numbers, "cpu", 3, 8, np.arange(8).reshape(4, 2))
    assert all(torch.equal(torch.cat([next(pieces)["x"] for _ in range(4)]), batch["x"]) for batch in whole)


def test_uneven_samples_are_sorted_32_updates_at_a_time_and_few_samples_repeat():
    words = [Word("x" * n) for n in np.random.default_rng(0).integers(1, 50, 700)]
    spans = [np.ptp(batch["x"].numpy()) for batch in drawn(words, 6, range(6), 116)]
    assert 1 < np.mean(spans) < 2.5  # 50 lengths in 32 batches
    few = drawn(words[:4], 9, range(9), 1)[0]["x"].tolist()
    assert {*few} == {*map(len, words[:4])} and len(few) == 9


@each_dataset
def test_validation_visits_every_sample_once_in_order_or_always_the_same_few(dataset):
    def batches(rank=0, world=1, limit=0):
        return [batch["x"].tolist() for batch in fixed_batches(dataset, numbers, "cpu", 50, rank, world, limit)]

    whole = [LENGTHS[first : first + 50].tolist() for first in range(0, 289, 50)]
    assert batches() == whole and batches(3, 4) == whole[3::4] and batches(7, 8) == []
    some = sum(batches(limit=70), [])
    assert some == sorted(set(some)) and len(some) == 70 and max(some) > 250  # not the first ones of a sorted file
    assert batches(1, 2, limit=70) == [some[50:]]


def test_concat_is_the_concatenation_and_subset_its_rows():
    chunks = [torch.randn(n, 2).half() for n in (3, 1, 4)]
    joined = Concat(chunks, "abc")
    rows = Subset(joined, np.array([7, 0, 3, 3, 2]))
    assert torch.equal(rows[np.array([1, 0, 2, 3, 4])], torch.cat(chunks).float()[[0, 7, 3, 3, 2]])
    assert (len(joined), len(rows)) == (8, 5)


def test_batches_are_made_ahead_contiguous_and_only_pinned_memory_is_copied_without_waiting():
    made = []
    batches = prefetch(lambda key: {"x": torch.full((2, 3), key).T, "n": made.append(key) or key}, [7, 8, 9], "cpu", 2)
    x = next(batches)["x"]
    assert x.is_contiguous() and x.shape == (3, 2) and len(list(batches)) == 2 and made == [7, 8, 9]
    for device in ("cpu", "mps", "cuda:0"):
        with mock.patch("torch.cuda.set_device"), mock.patch("torch.as_tensor") as as_tensor:
            next(prefetch(lambda key: {"x": key}, [0], device))
        contiguous = as_tensor().contiguous()
        copied = contiguous.pin_memory() if device == "cuda:0" else contiguous
        copied.to.assert_called_once_with(device, non_blocking=device == "cuda:0")


def test_an_error_is_one_line_and_leaves_the_background():
    def make(error):
        with expecting("good data", "file"):
            raise error

    for error, message in {TypeError(): "TypeError", OSError("bad\n  data"): "bad data"}.items():
        with pytest.raises(DataError, match=f"^file: {message}, expected good data$"):
            next(prefetch(make, [error], "cpu"))


# ==== what holds for every script ====================================================================================


def small(script):
    """A model, inputs [2, 9, ...], and what makes tensors [2, 9 or with CLS 10, D] of both."""
    make, x, outputs = {
        "nepa_deep": (
            vit,
            torch.randn(2, 9, 48),
            lambda model, x: [*(y := model(F.fold(x.mT, 12, 4, stride=4))).hidden_states, y.prediction],
        ),
        "trm_deep": (  # several supervision steps: the carry must not leak either
            trm,
            torch.randn(2, 9, 16),
            lambda model, x: trm_deep.answer(model, {"input_embeddings": x}, True)["intermediate_logits"],
        ),
        "jepa_lm": (jepa_model, torch.randint(2, 250, (2, 9)), lambda model, x: [model(x)]),
    }[script]
    return make(), x, outputs


@each_script
def test_an_input_changes_no_output_before_it_and_all_from_it_on(script):
    model, x, outputs = small(script)
    for t in range(-9, 0):
        changed = x.index_fill(1, torch.tensor(9 + t), 1)
        for a, b in zip(outputs(model, x), outputs(model, changed), strict=True):
            assert torch.equal(a[:, :t], b[:, :t]) and (a[:, t:] != b[:, t:]).any(-1).all()


@each_script
@pytest.mark.parametrize("amp", [True, False])
def test_checkpointing_gives_the_same_gradient_and_keeps_less(script, amp):
    model, x, outputs = small(script)
    gradients, kept = [], []

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return sum(y.float().sin().sum() for y in outputs(model, x))

    for model.grad_checkpoint in (False, True):
        gradients.append(torch.autograd.grad(loss(), list(model.parameters()), allow_unused=True))
        kept.append(saved_bytes(loss, model))
    assert same(*gradients) and kept[1] < kept[0]


# Columns of the last matrix of a layer, the divisor of hidden_size / num_heads, and by the first name that fits: mean,
# s and e of the standard deviation s * fan-in ** e.
INITIAL = [
    ("nepa_deep", 640, 4, {"bias": (0, 0, 0), "scale": (1e-5, 0, 0), "norm": (1, 0, 0), "": (0, 0.02, 0)}),
    ("trm_deep", 512, 2, {"q_head.weight": (0, 0, 0), "bias": (-5, 0, 0), "init": (0, 1, 0), "": (0, 1, -0.5)}),
    ("jepa_lm", 448, 2, {"embed": (0, 0.05, 0), "norm": (1, 0, 0), "": (0, 3**-0.5, -0.5)}),
]


@pytest.mark.parametrize("script,inner,heads,rules", INITIAL)
def test_sizes_and_initialisation(script, inner, heads, rules):
    config = SCRIPTS[script].Config
    torch.manual_seed(0)
    model = SCRIPTS[script].Model(config(hidden_size=160, num_heads=4))
    assert next(p for name, p in model.named_parameters() if "down" in name).shape == (160, inner)
    for name, p in model.named_parameters():
        mean, factor, exponent = next(rules[part] for part in rules if re.search(part, name))
        std = factor * p.shape[-1] ** exponent
        mine, chance = [p.mean().item(), p.std(correction=0).item()], std * p.numel() ** -0.5
        assert mine == pytest.approx([mean, std], rel=1e-6, abs=4 * chance), name
        assert script != "trm_deep" or (p - mean).abs().max() <= 2.3 * std  # cut
    with pytest.raises(DataError, match=f"18, expected a multiple of {heads} .* = {4 * heads}"):
        config(hidden_size=18, num_heads=4)


def test_the_losses_run_when_pasted_elsewhere():
    x, y, z = torch.randn(3, 2, 4, 8)
    calls = [
        (nepa_deep.prediction_loss, x, y),
        (nepa_deep.intermediate_loss, x, [y, z], z),
        (trm_deep.supervision_weights, 3, "constant", 0.5),
        (jepa_lm.sigreg, x[0], y[0].T),
        (jepa_lm.cosines, x[0], y[0], torch.arange(4)),
    ]
    for schedule in ("constant", "linear_decay", "exponential_decay", "u_shaped", "dynamic", "1,2,3"):
        calls.append((trm_deep.compute_deep_supervision_loss, [x, y, z], x, schedule, 0.5))
    calls += [(jepa_lm.jepa_loss, x[0], y[0], kind) for kind in ("cosine", "mse", "l2", "infonce")]
    scope = {"torch": torch, "F": F}
    for function, *inputs in calls:
        exec(inspect.getsource(function), scope)
        assert same(scope[function.__name__](*inputs), function(*inputs))


def folder_with(folder, files):
    """The folder, with these files: bytes, an array, a shape of zeros or anything.

    0.pt stands for train_embeddings_chunk_0.pt.
    """
    folder.mkdir(exist_ok=True)
    for name, value in files.items():
        path = folder / (name if name[0].isalpha() else f"train_embeddings_chunk_{name}")
        if isinstance(value, bytes):
            path.write_bytes(value)
        elif path.suffix == ".npy":
            np.save(path, np.zeros(value, np.uint8) if isinstance(value, tuple) else value)
        else:
            torch.save(value, path)
    return folder


x3 = torch.randn(3, 5, 4)
BAD = {  # flag -> message -> the files
    "--data_folder": {
        "too few training sequences": {},
        "too few training sequences, expected": {"0.pt": x3[:1]},
        "constant embeddings, expected ones that differ": {"0.pt": torch.ones(9, 5, 4)},
        "chunk_1.pt: samples of shape": {"0.pt": x3, "1.pt": x3[:, :4]},
        "val_embeddings_chunk_0.pt: samples of shape": {"0.pt": x3, "val_embeddings_chunk_0.pt": x3[..., :2]},
        "torch.int64 [3, 5, 4]'], expected": {"0.pt": x3.long()},
        "torch.float32 [3, 5]'], expected": {"0.pt": x3[..., 0]},
        "torch.float32 [0, 5, 4]'], expected": {"0.pt": x3[:0]},
        "holds ['labels: torch.float32 [3, 5, 4]'], expected": {"0.pt": {"labels": x3}},
        "'list' object has no attribute 'is_floating_point', expected": {"0.pt": [x3]},
        "labels: torch.float32 [3, 4, 4]'], expected": {"0.pt": {"input_embeddings": x3, "labels": x3[:, 1:]}},
        "chunk_0.pt: sample 2 is not finite": {"0.pt": x3 / 0},
        "chunk_0.pt: sample 2 is not finite or begins": {"0.pt": F.pad(x3, (0, 0, 1, 0))},
        "chunk_0.pt: sample 2 is not finite or begins or ends": {"0.pt": F.pad(x3, (0, 0, 0, 1))},
        "Weights only load failed": {"0.pt": Path},  # pickled code
        "chunk_1.pt: mmap can only be used": {"1.pt": b""},
        "chunk_4.npy: ": {"4.npy": b"PK and no zip"},
        "byte order": {"5.npy": x3.numpy().astype(">f4")},
    },
    "--data_dir": {
        "images.npy: [Errno 2] No such file": {},
        "one image, expected two": {"images.npy": (1, 8, 8, 3)},
        "images.npy: float64 [20, 8, 8, 3], expected uint8": {"images.npy": np.zeros((20, 8, 8, 3))},
        "images.npy: uint8 [20, 8], expected uint8 [N, H, W, C]": {"images.npy": (20, 8)},
        "images.npy: uint8 [0, 8, 8, 3], expected": {"images.npy": (0, 8, 8, 3)},
        "uint8 [20, 3, 8, 8], expected uint8 [N, H, W, C], the channels last": {"images.npy": (20, 3, 8, 8)},
        "images of 1 channels, expected 3": {"images.npy": (20, 8, 8, 3), "val_images.npy": (20, 8, 8)},
        "labels.npy: float64 [20], expected integers [20]": {"labels.npy": np.zeros(20)},
        "labels.npy: int64 [19], expected integers [20]": {"labels.npy": np.zeros(19, np.int64)},
        "image_size (0, 8), expected multiples of patch_size 8": {"images.npy": (20, 7, 9, 3)},
    },
}


@pytest.mark.parametrize("flag,message,files", [(flag, *case) for flag, cases in BAD.items() for case in cases.items()])
def test_bad_data_is_one_line_that_names_the_file(tmp_path, flag, message, files):
    folder = folder_with(tmp_path / "data", files)
    if "labels.npy" in files:
        arrays(folder)
    script = "nepa_deep" if "dir" in flag else "trm_deep"
    _, text = stopped(script, tmp_path / "run", f"{flag} {folder} --batch_size 2")
    assert text.startswith((f"error: {folder}", "error: image_size")) and message in text and "\n" not in text
    assert "expected" in text and ("folder" in flag or not (tmp_path / "run").exists())


# ==== trm_deep.py: the model =========================================================================================

SMALL = {"vocab_size": 16, "hidden_size": 16, "num_heads": 2, "L_layers": 2, "H_cycles": 3, "L_cycles": 2}


def trm(**changes):
    torch.manual_seed(0)
    return trm_deep.Model({**SMALL, **changes})


def trm_batch(B=3, T=5, D=16, seed=1):
    x = torch.randn(2, B, T, D, generator=torch.Generator().manual_seed(seed))
    return dict(zip(("input_embeddings", "labels"), x, strict=True))


def step(model, batch, carry=None, **kwargs):
    return model(carry or model.initial_carry(batch), batch, **kwargs)


def near(mine, right, tolerance=1e-4):
    torch.testing.assert_close(mine.detach().double(), right.detach().double(), atol=tolerance, rtol=tolerance)


def ref_norm(rows, eps=1e-5):
    """Each row [D] over its root mean square."""
    return rows / (rows.pow(2).mean(1, keepdim=True) + eps).sqrt()


def ref_angle(t, j, d):
    return t * 10000 ** (-2 * j / d)


def ref_rotate(rows, angle):
    """Half-split rotation of rows [T, d], one pair of numbers at a time: pair j of row t by angle(t, j, d)."""
    out, half = rows.clone(), rows.shape[1] // 2
    for t, j in itertools.product(range(len(rows)), range(half)):
        turned = complex(rows[t, j], rows[t, j + half]) * cmath.exp(1j * angle(t, j, 2 * half))
        out[t, j], out[t, j + half] = turned.real, turned.imag
    return out


def reference(model, angle=ref_angle, causal=True, head_norm=lambda rows, name: rows, rename=str):
    """What all models are made of, in words, for one sample in float64: weights by name, functions of rows [T, D]."""
    c, weights = model.config, {}
    for name, p in model.named_parameters():  # those that get one name are one matrix
        before = [weights[rename(name)]] if rename(name) in weights else []
        weights[rename(name)] = torch.cat([*before, p.detach().double()])
    d, n = getattr(c, "head_dim", c.hidden_size // c.num_heads), c.num_heads

    def linear(rows, name):
        return rows @ weights[f"{name}.weight"].flatten(1).T + weights.get(f"{name}.bias", 0)

    def attention(rows, at):
        """Head by head and query by query."""
        parts, heads = linear(rows, at + "qkv").split(d, 1), []
        keys = (len(parts) - n) // 2
        for i, q in enumerate(parts[:n]):
            k, v = parts[n + i * keys // n :: keys]
            q, k = ref_rotate(head_norm(q, at + "q_norm"), angle), ref_rotate(head_norm(k, at + "k_norm"), angle)
            sees = [slice(t + 1 if causal else None) for t in range(len(rows))]
            heads.append(torch.stack([torch.softmax(k[s] @ q[t] / d**0.5, 0) @ v[s] for t, s in enumerate(sees)]))
        return linear(torch.cat(heads, 1), at + "o")

    def swiglu(rows, at, up="gate_up"):
        gate, up = linear(rows, at + up).chunk(2, 1)
        return linear(gate * torch.sigmoid(gate) * up, at + "down")

    return weights, linear, attention, swiglu


def reference_trm(model, x, z_H, z_L):
    """The published model in words: z_H, z_L and the answers after each cycle."""
    c = model.config
    angle = ref_angle if c.pos_encodings == "rope" else lambda *place: 0
    _, linear, attention, swiglu = reference(model, angle, c.causal)

    def net(h):
        for at in (f"layers.{i}." for i in range(c.L_layers)):
            h = ref_norm(h + attention(h, at))
            h = ref_norm(h + swiglu(h, at))
        return h

    answers = []
    for _ in range(c.H_cycles):
        for _ in range(c.L_cycles):
            z_L = net(z_L + z_H + x)
        z_H = net(z_H + z_L)
        answers.append(linear(z_H, "lm_head"))
    return z_H, z_L, answers


@pytest.mark.parametrize("causal,positions", [(True, "rope"), (False, "rope"), (True, "none"), (False, "none")])
def test_model_equals_the_slow_reference_over_two_supervision_steps(causal, positions):
    model, batch, carry = trm(causal=causal, pos_encodings=positions), trm_batch(), None
    states = [[v.detach().double().expand(5, 16) for v in (model.H_init, model.L_init)]] * 3
    for _ in range(2):
        carry, outputs = step(model, batch, carry, enable_deep_supervision=True)
        mine = [carry["z_H"], carry["z_L"], *outputs["intermediate_logits"]]
        for b in range(3):
            *states[b], answers = reference_trm(model, batch["input_embeddings"][b].double(), *states[b])
            near(torch.stack([value[b] for value in mine]), torch.stack([*states[b], *answers]))
    assert outputs["logits"] is mine[-1]


def test_inference_computes_the_final_head_only():
    model, calls = trm().eval(), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    trm_deep.answer(model, trm_batch())  # ten supervision steps of three cycles
    assert len(calls) == 10


def test_another_hidden_size_than_the_embeddings_is_projected():
    model, inputs = trm(input_size=6, output_size=4), torch.randn(2, 3, 6)
    assert step(model, {"input_embeddings": inputs})[1]["logits"].shape == (2, 3, 4)
    with pytest.raises(KeyError, match="learned"):
        step(trm(pos_encodings="learned"), trm_batch())


def published(module, path, **changes):
    """The tensors of a dump by name; the model of its configuration (JSON) and of its weights (`w:` + name)."""
    raw = np.load(path)
    dump = {name: torch.tensor(value) for name, value in raw.items() if value.dtype.kind != "U"}
    weights = {name[2:]: value for name, value in dump.items() if name.startswith("w:")}
    return dump, module.from_official(json.loads(str(raw["config"])) | changes, weights)


@pytest.mark.parametrize("path", dumps("inner.H_init"))
@pytest.mark.parametrize("causal", [False, True])
def test_parity_with_the_published_model(causal, path):
    """Under `causal:` the dump holds what causal attention makes of the same weights."""
    dump, model = published(trm_deep, path, causal=causal)
    batch = {name: dump[name] for name in ("input_embeddings", "labels")}
    first, one = step(model, batch, enable_deep_supervision=True)
    second, two = step(model, batch, first)
    flipped = batch | {"input_embeddings": batch["input_embeddings"].flip(1)}
    mixed, reset = step(model, flipped, first | {"halted": torch.tensor([True, False])})
    mine = {"logits": one["logits"], "intermediate_logits": torch.stack(one["intermediate_logits"])}
    mine |= {"q_halt_logits": one["q_halt_logits"], "z_H": first["z_H"], "act2:logits": two["logits"]}
    mine |= {"act2:z_H": second["z_H"], "act2:z_L": second["z_L"], "reset:logits": reset["logits"]}
    for schedule in (None, "constant", "linear_decay", "exponential_decay"):
        loss, grads = gradients(model, batch, schedule)
        norm = torch.nn.utils.get_total_norm(g for name, g in grads.items() if g is not None and "q_head" not in name)
        mine |= {f"loss:{schedule or 'baseline'}": loss, f"gradnorm:{schedule or 'baseline'}": norm}
    for name, value in mine.items():
        near(value, dump["causal:" * causal + name])
    assert mixed["steps"].tolist() == dump["reset:steps"].tolist()


def test_published_names_are_renamed_own_ones_stay_and_misfits_are_refused():
    model, official = trm(causal=False), {"inner.embed_tokens.embedding_weight": np.zeros((16, 16))}
    for name, value in model.state_dict().items():
        name = re.sub(r"\.(qkv|o)\.", r".self_attn.\1_proj.", re.sub(r"\.(gate_up|down)\.", r".mlp.\1_proj.", name))
        name = f"inner.L_level.{name}" if name.startswith("layers") else f"inner.{name}"
        official[name] = (torch.cat([value, value + 1]) if "q_head" in name else value).numpy()  # halt, continue
    assert "inner.L_level.layers.1.self_attn.o_proj.weight" in official
    loaded = trm_deep.from_official(SMALL, official)
    assert same(loaded.state_dict(), model.state_dict()) and not loaded.config.causal
    assert same(trm_deep.to_our_names(model.state_dict()), dict(model.state_dict()))
    del official["inner.H_init"]
    with pytest.raises(RuntimeError, match="H_init"):
        trm_deep.from_official(SMALL, official)


# ==== trm_deep.py: no leak ===========================================================================================


FORMS = {  # of labels that are the next inputs, or nearly
    "sequence": None,
    "next": lambda y: y.double(),
    "times two": lambda y: 2 * y,
    "unit length": lambda y: F.normalize(y, dim=-1),
    "noisy": lambda y: y + 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(6)),
    "another encoder": lambda y: torch.cat([y.sin(), y], -1),
}


def train_on_noise(folder, form, flags=""):
    x = torch.randn(768, 9, 8, generator=torch.Generator().manual_seed(5))
    for split, part in {"train": x[:512], "val": x[512:]}.items():
        if FORMS[form]:
            part = {"input_embeddings": part[:, :-1].clone(), "labels": FORMS[form](part[:, 1:])}
        torch.save(part, folder / f"{split}_embeddings_chunk_0.pt")
    flags += " --num_heads 2 --hidden_size 32 --L_layers 1 --L_cycles 1 --halt_max_steps 2 --batch_size 32"
    flags += (
        f" --ema_decay 0 --data_folder {folder} --lr 3e-3 --max_train_steps 250 --warmup_steps 10 --eval_interval 50"
    )
    lines = run("trm_deep", folder / "run", flags, tiny=False)
    return min(line["loss"] for line in lines if line["split"] == "val")


@pytest.mark.parametrize("form", FORMS)
def test_noise_cannot_be_predicted(tmp_path, form):
    assert train_on_noise(tmp_path, form, "--enable_deep_supervision" if form == "sequence" else "") >= 0.97


@pytest.mark.parametrize("form", ["next", "noisy"])
def test_the_noise_test_would_see_a_leak(tmp_path, form):
    """The source's bidirectional attention; where labels are known to be the next inputs it is refused."""
    assert train_on_noise(tmp_path, form, "--bidirectional") < 0.9
    with pytest.raises(SystemExit, match="labels are the later inputs, expected no --bidirectional"):
        (tmp_path / "other").mkdir()
        train_on_noise(tmp_path / "other", "sequence", "--bidirectional")


# ==== trm_deep.py: the loss ==========================================================================================

WORKED = [  # the document's numbers, and others
    ("constant", 0.5, [0.5, 0.5, 1.0], 2.0),
    ("linear_decay", 0.5, [0.167, 0.333, 1.0], 1.5),
    ("exponential_decay", 0.5, [0.125, 0.25, 1.0], 1.375),
    ("linear_decay", 0.4, [0.1, 0.2, 0.3, 1.0], 1.6),
    ("u_shaped", 0.5, [1.0, 0.25, 0.25, 1.0], 2.5),
    ("0.3,0.4,0.7,1.0", 0.5, [0.3, 0.4, 0.7, 1.0], 2.4),
    ("constant", 0.5, [1.0], 1.0),
]


def deep_loss(schedule, num_steps=3):
    """The loss, the steps' losses, and those by hand, of random predictions."""
    logits, labels = torch.randn(num_steps, 2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3, 4)
    loss, losses = trm_deep.compute_deep_supervision_loss(list(logits), labels, schedule, 0.5)
    return loss, losses, (logits - labels).square().mean((1, 2, 3))


@pytest.mark.parametrize("schedule,base,weights,total", WORKED)
def test_weights_and_totals_are_the_documents(schedule, base, weights, total):
    assert trm_deep.supervision_weights(len(weights), weights, base) == weights  # a list as well as text
    mine = trm_deep.supervision_weights(len(weights), schedule, base)
    assert mine == pytest.approx(weights, abs=5e-4) and sum(mine) == pytest.approx(total)
    loss, losses, each = deep_loss(schedule, len(weights))
    mine = torch.tensor(trm_deep.supervision_weights(len(weights), schedule, 0.5))
    near(loss, (mine * each).sum() / mine.sum())
    near(torch.stack(losses), each)


def test_a_schedule_that_is_none_is_refused():
    for schedule in ("quadratic", "", "0.1,1.0", [1, 1]):
        with pytest.raises(ValueError):
            trm_deep.supervision_weights(3, schedule, 0.5)


def test_dynamic_weights_follow_the_difficulty_without_gradient():
    logits = [torch.full((1, 1, 4), value, requires_grad=True) for value in (2.0, 1.0, 1.0)]
    loss, _ = trm_deep.compute_deep_supervision_loss(logits, torch.zeros(1, 1, 4), "dynamic", 0.5)
    total = 0.5 + 0.5 / 4 + 1.0  # losses 4, 1, 1; the hardest gets the base weight
    assert loss.item() == pytest.approx((0.5 * 4 + 0.125 * 1 + 1.0) / total)
    loss.backward()
    assert logits[0].grad[0, 0, 0].item() == pytest.approx(0.5 / total * 2 * 2.0 / 4)


def test_the_curriculum_adds_one_cycle_at_even_intervals(tmp_path):
    """And the losses are those of a model with so many cycles, with and without deep supervision."""
    for deep, count in (("", 0), ("--enable_deep_supervision False", 1)):
        for at, cycles in {0: 1, 3: 1, 4: 2, 7: 2, 8: 3, 99: 3}.items():
            loss, sums, _ = loss_of(trm(), trm_batch(), f"--curriculum_end_step 8 {deep}", at)
            right, plain, _ = loss_of(trm(H_cycles=cycles), trm_batch(), f"--H_cycles {cycles} {deep}")
            assert torch.equal(loss, right) and sums.keys() == plain.keys() and sums["cycles"] == (cycles * 3, 3)
            assert sum(name.startswith("step_") for name in sums) == (count or cycles)
    train = [line for line in run("trm_deep", tmp_path, "--curriculum_end_step 4") if line["split"] == "train"]
    assert [line["cycles"] for line in train] == [1, 1, 1, 1, 2, 2] and "step_1_loss" not in train[0]


def test_the_documents_training_loop_runs_as_written():
    """The section "Custom Training Loop with Deep Supervision" at smaller sizes, with only its import changed."""
    from trm_deep import RecursiveLLM

    config = SMALL | {
        "batch_size": 8,
        "seq_len": 6,
        "H_cycles": 4,
        "expansion": 4.0,
        "pos_encodings": "rope",
        "halt_max_steps": 10,
        "halt_exploration_prob": 0.1,
        "enable_deep_supervision": True,
        "deep_supervision_weight": 0.3,
    }
    model = RecursiveLLM(config)
    batch = {"input_embeddings": torch.randn(8, 6, 16), "labels": torch.randn(8, 6, 16)}
    carry = model.initial_carry(batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    carry, outputs = model(carry, batch, t=0, enable_deep_supervision=True)
    total_loss = 0
    weights = [0.3, 0.4, 0.7, 1.0]
    for i, step_logits in enumerate(outputs["intermediate_logits"]):
        loss_i = F.mse_loss(step_logits, batch["labels"][:, 0:1, :])
        total_loss += weights[i] * loss_i
    total_loss = total_loss / sum(weights)
    total_loss.backward()
    optimizer.step()
    assert i == 3 and step_logits.shape == (8, 1, 16)
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"q_head.weight", "q_head.bias"}

    model.eval()
    with torch.no_grad():
        carry = model.initial_carry(batch)
        carry, outputs = model(carry, batch)
        assert outputs["logits"].shape == (8, 6, 16) and len(outputs["intermediate_logits"]) == 1
        for t in (0, 3, -1):
            near(model(model.initial_carry(batch), batch, t=t)[1]["logits"][:, 0], outputs["logits"][:, t])


# ==== trm_deep.py: gradients =========================================================================================


def gradients(model, batch, schedule="constant", amp=False):
    """The loss, and every trained parameter's gradient of it and of the halting head; schedule None: the plain loss."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        outputs = step(model, batch, enable_deep_supervision=schedule is not None)[1]
    logits, labels = outputs["intermediate_logits"], batch["labels"]
    loss, _ = trm_deep.compute_deep_supervision_loss(logits, labels, schedule or "constant", 0.5)
    (loss + outputs["q_halt_logits"].mean()).backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("schedule", ["constant", None])
@pytest.mark.parametrize("size", [24, 64])
def test_amp_gives_float32_gradients_to_every_parameter_and_keeps_one_copy_of_each_weight(schedule, size):
    """The autocast cache trap: weights cast under no_grad in the early cycles must not lose their later gradient."""
    model = trm(input_size=size, output_size=64, hidden_size=64, num_heads=4, learn_init=schedule is not None)
    batch = {"input_embeddings": torch.randn(8, 6, size), "labels": torch.randn(8, 6, 64)}
    right, mine = gradients(model, batch, schedule)[1], gradients(model, batch, schedule, amp=True)[1]
    for name, gradient in right.items():
        assert (mine[name] - gradient).norm() < 0.1 * gradient.norm(), name

    def run_once():
        with torch.autocast("cpu", torch.bfloat16):
            return step(model, batch, enable_deep_supervision=schedule is not None)[1]

    kept = saved_bytes(run_once, model, lambda x: x.dtype == torch.bfloat16 and set(x.shape) == {64, 3 * 64})
    assert kept == 2 * (2 * 64 * 3 * 64) and run_once()["logits"].dtype == torch.float32  # qkv of the two layers


@functools.lru_cache
def trm_args(flags=""):
    return parsed("trm_deep", f"--data_folder unread --L_cycles 2 --enable_deep_supervision {flags}")


def loss_of(model, batch, flags="", at=0):
    minimum = torch.ones(len(batch["labels"]), dtype=torch.int32)
    full = {**batch, "min_steps": minimum, "step": at, "share": 1.0}
    return trm_deep.compute_loss(model, full, {}, trm_args(flags))


def test_gradient_runs_through_all_cycles_with_deep_supervision_else_the_last_and_detached_through_their_own():
    model, batch = trm(), trm_batch()
    both = [step(model, batch, enable_deep_supervision=True, detach=detach)[1] for detach in (False, True)]
    near(*(torch.stack(outputs["intermediate_logits"]) for outputs in both), 0)
    reaching = [True, True, True], [True, False, False], [False]
    for outputs, right in zip([*both, step(model, batch)[1]], reaching, strict=True):
        how = {"retain_graph": True, "allow_unused": True}
        sums = [logits.sum() for logits in outputs["intermediate_logits"]]
        assert [torch.autograd.grad(x, model.H_init, **how)[0] is not None for x in sums] == right
    assert loss_of(model, batch, "--detach_cycles")[0] == loss_of(model, batch)[0]


def test_the_l_cycles_add_their_losses():
    model, batch = trm(), trm_batch()
    latents = step(model, batch, enable_deep_supervision=True, latent_logits=True)[1]["latent_logits"]
    means = torch.stack([sum(F.mse_loss(x, batch["labels"]) for x in each) / 2 for each in latents])
    plain, both = (loss_of(model, batch, flags)[0] for flags in ("", "--L_cycle_supervision 0.4"))
    near(both - plain, 0.4 * (means * torch.tensor([0.5, 0.5, 1.0])).sum() / 2)


def test_memory_of_the_variants_in_bytes():
    """Counted, not timed: checkpointed cycles hold about one graph at a time, the full graph all four."""

    def peak(flags="", grad_checkpoint=False):
        model, batch = trm(hidden_size=32, vocab_size=32, H_cycles=4), trm_batch(16, 32, 32)
        model.grad_checkpoint = grad_checkpoint
        return peak_bytes(lambda: loss_of(model, batch, f"--H_cycles 4 {flags}")[0].backward())

    none = peak("--enable_deep_supervision False")
    assert 3.3 < peak() / none < 4.2 and peak(grad_checkpoint=True) / none < 1.35


def peak_bytes(run_once, cuda=False):
    """Most bytes that tensors held at any moment beyond those held at the start, from the allocator or the profiler."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run_once()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(np.cumsum([change for _, change in changes]))


# ==== trm_deep.py: halting and the carry =============================================================================


def test_a_halted_row_starts_anew_and_the_others_go_on_with_their_own_data():
    model, batch, later = trm(), trm_batch(), trm_batch(seed=2)
    carry, _ = step(model, batch)
    mixed, outputs = step(model, later, carry | {"halted": torch.tensor([False, True, False])})
    assert mixed["steps"].tolist() == [2, 1, 2] and not mixed["z_H"].requires_grad
    for b, (source, old) in enumerate([(batch, carry), (later, None), (batch, carry)]):
        near(mixed["labels"][b], source["labels"][b], 0)
        near(outputs["logits"][b], step(model, source, old)[1]["logits"][b])


def test_rows_halt_when_sure_or_at_the_last_step_but_not_before_their_minimum():
    model, batch = trm(halt_max_steps=3), trm_batch(B=2)
    no, minimum = [False, False], {"min_steps": torch.tensor([1, 3], dtype=torch.int32)}

    def halts(bias, **more):
        model.q_head.bias.data.fill_(bias)
        carry, seen = None, []
        for _ in range(3):
            carry, _ = step(model, {**batch, **more}, carry)
            seen.append(carry["halted"].tolist())
        return seen

    assert halts(-5.0, **minimum) == [no, no, [True, True]]
    assert halts(+5.0, **minimum)[::2] == [[True, False], [True, True]]
    assert halts(+5.0)[0] == [True, True]  # a missing minimum is 1
    model.eval()
    assert halts(+5.0, **minimum) == [no, no, [True, True]]  # evaluation always runs all steps


def test_exploration_is_drawn_per_row_with_the_asked_probability_however_the_update_is_split():
    data = trm_deep.make_data(parsed("trm_deep", "--halt_max_steps 4 --halt_exploration_prob 0.25"), {})
    drawn = batch_of(data, range(4000), 7)["min_steps"]
    assert (drawn > 1).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.bincount(drawn)[2:].min() > 280 and len(torch.bincount(drawn)) == 5  # 2, 3 and 4 equally often
    part = np.array([5, 17, 90])
    assert torch.equal(batch_of(data, part, 7, rows=part)["min_steps"], drawn[part])
    assert not torch.equal(batch_of(data, range(4000), 8)["min_steps"], drawn)


def test_the_halting_head_learns_who_is_right():
    model, batch = trm(causal=False).requires_grad_(False), trm_batch(B=8)
    optimizer = torch.optim.Adam(model.q_head.requires_grad_(True).parameters(), lr=0.1)
    batch["labels"][:4] = step(model, batch)[1]["logits"][:4]  # the first half of the rows is right from the start
    for _ in range(300):
        optimizer.zero_grad()
        loss, sums, carry = loss_of(model, batch)
        loss.backward()
        optimizer.step()
    assert carry["halted"].tolist() == [True] * 4 + [False] * 4 and sums["q_halt_loss"][0] / 8 < 0.2


def test_the_halting_head_reads_the_first_position_of_a_bidirectional_run_else_the_last_and_shapes_nothing():
    for causal, position in ((True, -1), (False, 0)):
        model = trm(causal=causal)
        torch.nn.init.normal_(model.q_head.weight)
        carry, outputs = step(model, trm_batch(), enable_deep_supervision=True)
        q = outputs["q_halt_logits"]
        near(q, model.q_head(carry["z_H"][:, position])[:, 0])
        q.sum().backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == {"q_head.weight", "q_head.bias"}


def test_evaluation_may_take_each_rows_answer_at_the_first_step_where_q_is_positive(tmp_path):
    model, batch = trm(halt_max_steps=4).eval(), trm_batch(B=99)
    torch.nn.init.normal_(model.q_head.weight)
    torch.nn.init.zeros_(model.q_head.bias)
    outputs = trm_deep.answer(model, batch)
    carry, answers = None, []
    for _ in range(4):
        carry, each = step(model, batch, carry)
        answers.append(each)
    q, logits = (torch.stack([each[name] for each in answers]) for name in ("q_halt_logits", "logits"))
    q[-1] = 1.0  # at the latest
    first = (q > 0).int().argmax(0)
    assert outputs["halted_steps"].tolist() == (first + 1).tolist() and len(first.unique()) > 2
    near(outputs["halted_logits"], logits[first, range(99)])
    near(outputs["logits"], logits[-1])
    last = run("trm_deep", tmp_path, "--eval_halt")[-1]
    assert last["halt_mean_steps"] == 3 and last["halt_exact_acc"] == last["exact_acc"]  # q is about -5 still
    assert "halting, after 3.00 steps" in printed("trm_deep", tmp_path, "--eval_only --eval_halt")


# ==== trm_deep.py: data ==============================================================================================


def solutions(grid):
    """The solutions of a Sudoku, one after the other: lists of 36, 0 to 5, from one with 6 where blank."""

    def free(cell):
        row, column, box = cell // 6, cell % 6, (cell // 12, cell % 6 // 3)
        near = (d for d in range(36) if row == d // 6 or column == d % 6 or box == (d // 12, d % 6 // 3))
        return {*range(6)} - {grid[d] for d in near}

    blanks = [cell for cell in range(36) if grid[cell] == 6]
    if not blanks:
        yield grid
    else:
        cell = min(blanks, key=lambda cell: len(free(cell)))
        for digit in free(cell):
            yield from solutions([*grid[:cell], digit, *grid[cell + 1 :]])


def test_the_synthetic_dataset_is_sudokus_of_14_clues_and_one_solution():
    codes, parts = trm_deep.codebook(0), trm_deep.synthetic_dataset(0)
    near(codes @ codes.T, 64 * torch.eye(43))
    assert [len(part["labels"]) for part in parts] == [12_000, 1024]
    place, grids = codes[7:], []
    for part in parts:
        clues, digits = (trm_deep.decode(part[name], 0) for name in ("input_embeddings", "labels"))
        near(part["input_embeddings"], codes[clues] + place, 1e-5)
        assert torch.equal(part["labels"], codes[digits]) and ((clues != 6).sum(1) == 14).all()
        assert ((clues == digits) | (clues == 6)).all()
        boxes = digits.view(-1, 3, 2, 2, 3).transpose(2, 3).reshape(-1, 6, 6)
        for units in (digits.view(-1, 6, 6), digits.view(-1, 6, 6).mT, boxes):
            assert (units.sort().values == torch.arange(6)).all()
        grids += clues.tolist()
    assert all(len([*itertools.islice(solutions(grid), 2)]) == 1 for grid in grids[::500])
    assert len(set(map(tuple, grids))) == 13_024  # no held-out puzzle is a training one
    assert not torch.equal(trm_deep.synthetic_dataset(1, 50)[1]["labels"][:50], parts[1]["labels"][:50])


def test_a_cell_is_right_when_its_code_decodes_and_a_sentence_when_its_cosine_is_high():
    args, (_, val) = parsed("trm_deep", ""), trm_deep.synthetic_dataset(0)
    labels = val["labels"][:2]
    wrong = 0.1 * labels
    wrong[1, 2] = -wrong[1, 2]
    with torch.autocast("cpu", torch.bfloat16):
        cells, puzzles = trm_deep.is_right(wrong, labels, args)
    assert (~cells).nonzero().tolist() == [[1, 2]] and puzzles.tolist() == [True, False]
    assert trm_deep.is_right(0.1 * labels, labels, trm_args())[1].all()
    assert not trm_deep.is_right(-labels, labels, trm_args())[1].any()


def test_the_report_shows_a_puzzle_and_two_answers(tmp_path):
    said = printed("trm_deep", tmp_path, "--eval_samples 1")
    rows = re.findall(r"^((?:[1-6.] ){5}[1-6.])     ((?:[1-6.] ){5}[1-6.])     (.*)$", said, re.M)
    puzzles = trm_deep.decode(trm_deep.synthetic_dataset(0)[1]["input_embeddings"], 0).tolist()
    assert ["123456.".index(symbol) for row in rows for symbol in row[0].split()] in puzzles
    shown = printed("trm_deep", tmp_path, "--eval_only").split("best")[0].split()
    assert " ".join(map("     ".join, rows)).split() == shown[-108:]


def test_ridge_regression_is_fitted_and_stands_in_the_report(tmp_path, capsys):
    A = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0)) / 4
    x = torch.randn(300, 8, 6)
    for t in range(1, 8):  # the next one is linear in the last and the mean of all
        x[:, t] = x[:, t - 1] @ A[0] + x[:, :t].mean(1) @ A[1] + 0.1 * torch.randn(300, 6)
    folder = folder_with(tmp_path / "data", {"0.pt": x})
    final = run("trm_deep", tmp_path / "run", f"--data_folder {folder}")[-1]
    assert final["ridge_loss"] < 0.5 * final["zero_loss"] and "ridge regression" in capsys.readouterr().out
    features = trm_deep.linear_features(x)
    near(features, torch.cat([x, torch.stack([x[:, : t + 1].mean(1) for t in range(8)], 1)], -1), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_chunks_are_read_in_numeric_order_memory_mapped(tmp_path, dtype, capsys):
    x = torch.randn(11, 5, 4).to(dtype)
    chunks = {
        "10.pt": x[6:9],
        "2.pt": x[3:6],
        "0.pt": x[:3],
        "0.npy": x[:1].float().numpy(),  # a second file of this number
        "val_embeddings_chunk_0.pt": x[9:],
        "train_embeddings_chunk_old.pt": 1,
        "valid_embeddings_chunk_0.pt": 1,
    }
    chunks["2.pt"].requires_grad_()
    train, val = trm_deep.open_folder(folder_with(tmp_path, chunks))
    assert torch.equal(train["sequence"][np.arange(9)], x[:9].float()) and len(val["sequence"]) == 2
    assert not train["sequence"][np.arange(9)].requires_grad
    unread = "not read: train_embeddings_chunk_0.npy, train_embeddings_chunk_old.pt, valid_embeddings_chunk_0.pt\n"
    assert capsys.readouterr().out == f"{tmp_path}: {unread}"
    assert str(tmp_path / "train_embeddings_chunk_10.pt") in Path("/proc/self/maps").read_text()


def test_the_last_tenth_is_held_out_and_npy_chunks_are_read_in_any_memory_order(tmp_path):
    x = np.random.default_rng(0).standard_normal((20, 4, 6)).astype(np.float16)
    chunks = {"0.npy": x[:15], "1.npy": np.asfortranarray(x[15:])}
    train, val = trm_deep.open_folder(folder_with(tmp_path, chunks))
    whole = torch.cat([train["sequence"][np.arange(18)], val["sequence"][np.arange(2)]])
    assert np.array_equal(whole, x.astype(np.float32))


def test_embeddings_of_any_scale_give_one_curve_and_predictions_in_their_own_units(tmp_path):
    A = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    x = torch.randn(200, 1, 8)
    x = 3 + torch.cat([x @ torch.linalg.matrix_power(A, t) for t in range(7)], 1)  # each is the last one turned
    mean = x.mean((0, 1))
    scale = (x - mean).square().mean().sqrt()
    flags = "--L_layers 1 --L_cycles 1 --lr 5e-3 --batch_size 32 --halt_max_steps 1 --ema_decay 0 --max_train_steps 60"

    def train(name, value, more=""):
        folder = folder_with(tmp_path / name, {"0.pt": value, "val_embeddings_chunk_0.pt": value})
        lines = run("trm_deep", folder / "run", f"{flags} --eval_samples 200 --data_folder {folder} {more}")
        np.save(tmp_path / "in.npy", value[:5, :4])
        run("trm_deep", folder / "run", f"--eval_only --predict {tmp_path}/in.npy {folder}/out.npy")
        curve = torch.tensor([line["loss"] for line in lines] + [lines[-1]["zero_loss"]])
        return curve, torch.tensor(np.load(folder / "out.npy")), best_of("trm_deep", folder / "run").config

    curve, rolled, _ = train("1", x)
    assert curve[-2] < 0.2 and abs(curve[-1] - 1) < 0.05
    assert F.mse_loss(rolled[:, 0], x[:5, 4]) < 0.2  # in their own units
    again, mine, config = train("0.006", 0.006 * x)
    near(again, curve, 1e-2)
    near(mine / 0.006, rolled, 2e-2)
    again, _, off = train("off", (x - mean) / scale, "--normalize False")  # what is normalised changes no more
    near(again, curve, 1e-2)
    assert off.normalization[1] == (0.0, 1.0)

    # Other data are read in the units of the run, and must fit it.
    args = parsed("trm_deep", f"--eval_only --out_dir {tmp_path}/0.006/run --data_folder {tmp_path}/1")
    given = dataclasses.asdict(config)
    data = trm_deep.make_data(args, given)
    assert data["config"] == config and data["collate"]({"sequence": x})["labels"].std() > 50
    args.data_folder = folder_with(tmp_path / "3", {"0.pt": {"input_embeddings": x, "labels": x[..., :3]}})
    with pytest.raises(DataError, match="3: .*'output_size': 3, 'separate_labels': True.*"):
        trm_deep.make_data(args, given)


def test_attention_is_causal_unless_asked_and_labels_have_a_scale_of_their_own(tmp_path, capsys):
    x = torch.randn(20, 7, 8)
    folder = folder_with(tmp_path / "data", {"0.pt": {"labels": x.flip(0)[..., :4], "input_embeddings": x}})
    for flags, causal in (("", True), ("--bidirectional", False)):
        final = run("trm_deep", tmp_path / f"run{causal}", f"--data_folder {folder} {flags}")[-1]
        config = load(tmp_path / f"run{causal}")["config"]
        assert config["causal"] is causal and [len(mean) for mean, _ in config["normalization"]] == [8, 4]
        said = "attention is causal; --bidirectional for labels that are not later inputs"
        assert capsys.readouterr().out.count(said) == causal and "zero_loss" in final and "copy_loss" not in final


def test_a_trained_model_can_be_given_more_or_fewer_cycles(tmp_path):
    best = run("trm_deep", tmp_path, "--eval_interval 6 --deep_supervision_schedule 0.5,1")[-1]["best_loss"]

    def steps(flags):
        return re.findall(r"Steps: \[(.*)\]", printed("trm_deep", tmp_path, f"--eval_only {flags}"))[-1].split(", ")

    each = [*map(steps, ("", "--H_cycles 1", "--H_cycles 4", "--halt_max_steps 1", "--L_cycles 3"))]
    assert [len(losses) for losses in each] == [2, 1, 4, 2, 2]
    assert each[0][-1] == f"'{best:.4f}'" and len({*map(tuple, each)}) == 5
    # With one supervision step from the start, the first cycles are the same, however many come after.
    assert steps("--H_cycles 1 --halt_max_steps 1") == each[3][:1]


# ==== trm_deep.py: prediction ========================================================================================


def test_predict_rolls_out_the_final_head_on_its_own_predictions(tmp_path, monkeypatch):
    run("trm_deep", tmp_path / "run", own_data("trm_deep", tmp_path / "data"))
    sizes, real = [], trm_deep.answer

    def answer(model, batch, **how):
        sizes.append(len(batch["input_embeddings"]))
        return real(model, batch, **how)

    def predict(name, content, flags=""):
        folder_with(tmp_path, {f"{name}_in.npy": content})
        files = f"{tmp_path}/{name}_in.npy {tmp_path}/{name}_out.npy"
        run("trm_deep", tmp_path / "run", f"--eval_only --batch_size 2 --predict {files} {flags}")
        return torch.tensor(np.load(tmp_path / f"{name}_out.npy"))

    monkeypatch.setattr(trm_deep, "answer", answer)
    prefix = np.random.default_rng(0).standard_normal((5, 4, 32)).astype(np.float32)
    rolled = predict("whole", prefix, "--rollout 2")
    assert sizes == [2] * 4 + [1] * 2  # pieces of --batch_size
    model = best_of("trm_deep", tmp_path / "run")
    mean, scale = model.config.normalization[1]
    sequence = (torch.from_numpy(prefix) - torch.tensor(mean)) / scale
    for _ in range(2):
        outputs = real(model, {"input_embeddings": sequence})
        sequence = torch.cat([sequence, outputs["logits"][:, -1:]], 1)
    near(rolled, sequence[:, 4:] * scale + torch.tensor(mean))
    near(predict("one", prefix[:1], "--eval_halt"), rolled[:1, :1])

    for name, content, message in (
        ("zip", b"PK and no zip", "expected floats \\[N, T"),
        ("flat", prefix[0, 0], "expected floats"),
        ("empty", prefix[:0], "expected floats"),
        ("integers", prefix.astype(int), "expected floats"),
        ("narrow", prefix[..., :5], "embeddings of size 5, expected 32"),
        ("nan", prefix * np.nan, "sample 0 is not finite"),
        ("padded", np.concatenate([prefix, 0 * prefix], 1), "sample 0 .* ends in zeros"),
    ):
        with pytest.raises(SystemExit, match=f"{name}_in.npy: .*{message}"):
            predict(name, content)
    with pytest.raises(SystemExit, match=f"File exists.*{tmp_path}/whole_out.npy"):
        predict("whole", prefix)


def test_predict_gives_separate_labels_at_every_position_in_their_own_units(tmp_path):
    x = torch.randn(40, 7, 6) + 2
    y = 50 * x.flip(1)[..., :3] - 9
    folder = folder_with(tmp_path, {"0.pt": {"input_embeddings": x, "labels": y}})
    run("trm_deep", folder / "run", f"--data_folder {folder} --bidirectional --halt_max_steps 1 --L_cycles 1")
    chunk = folder / "train_embeddings_chunk_0.pt"  # as it is
    run("trm_deep", folder / "run", f"--eval_only --H_cycles 5 --predict {chunk} {folder}/out.npy")
    mean, label_mean = x[:36].mean((0, 1)), y[:36].mean((0, 1))
    scale, label_scale = (v.square().mean().sqrt() for v in (x[:36] - mean, y[:36] - label_mean))
    model = best_of("trm_deep", folder / "run", H_cycles=5)
    logits = trm_deep.answer(model, {"input_embeddings": (x - mean) / scale})["logits"]
    near(torch.tensor(np.load(folder / "out.npy")), logits * label_scale + label_mean, 1e-3)
    flags = f"--eval_only --rollout 2 --predict {chunk} {folder}/more.npy"
    assert "labels are no next inputs, expected" in stopped("trm_deep", folder / "run", flags, tiny=False)[1]


# ==== nepa_deep.py: the model ========================================================================================

VIT = {"image_size": 12, "patch_size": 4, "hidden_size": 16, "num_layers": 3, "num_heads": 2, "layerscale_value": 0.5}
KINDS = [{}, {"gated_mlp": True, "mlp_hidden": 10}, {"qk_norm": False}, {"qk_norm_affine": True}]


def vit(**changes):
    """A small model away from its initialisation: biases, norms and scales differ from entry to entry."""
    torch.manual_seed(0)
    model = nepa_deep.Model(nepa_deep.Config(**{**VIT, **changes}))
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.2 * torch.randn_like(p)
    return model


def pictures(B=2, height=12, width=12):
    return torch.randn(B, 3, height, width, generator=torch.Generator().manual_seed(1))


def reference_vit(model, image, scale):
    """The specification, step by step, for one image: embedding, states, prediction."""
    c = model.config
    rows, columns = (side // c.patch_size for side in image.shape[1:])

    def angle(t, j, d):
        row, column = divmod(t - 1, columns)
        place = (2 * (row + 0.5) / rows - 1, 2 * (column + 0.5) / columns - 1)[j // (d // 4)]
        return (t > 0) * 2 * math.pi * scale * place * c.rope_theta ** (-4 * (j % (d // 4)) / d)  # 0: CLS

    def norm(v, name):
        unit = ref_norm(v - v.mean(1, keepdim=True), c.norm_eps)
        return unit * weights.get(f"{name}.weight", 1) + weights.get(f"{name}.bias", 0)

    head_norm = norm if c.qk_norm else lambda v, name: v
    weights, linear, attention, swiglu = reference(model, angle, head_norm=head_norm)
    patches = F.unfold(image[None].double(), c.patch_size, stride=c.patch_size)[0].T
    states = [torch.cat([weights["cls_token"][0], linear(patches, "patch")])]
    for at in (f"layers.{i}." for i in range(c.num_layers)):
        h = states[-1] + weights[at + "scale1"] * attention(norm(states[-1], at + "norm1"), at)
        inner = norm(h, at + "norm2")
        more = swiglu(inner, at, "up") if c.gated_mlp else linear(F.gelu(linear(inner, at + "up")), at + "down")
        states.append(h + weights[at + "scale2"] * more)
    return [*states, norm(states[-1], "norm")]


@pytest.mark.parametrize("changes", KINDS)
def test_vit_equals_the_slow_reference(changes):
    model, images = vit(**changes), pictures(width=20)
    for b, scale in enumerate((1.0, 1.7)):
        embedding, states, prediction = model(images, scale)
        mine = torch.stack([embedding, *states, prediction])
        near(mine[:, b], torch.stack(reference_vit(model, images[b], scale)), 1e-5)


def grad_norm(loss, model, **how):
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, **how)
    return torch.nn.utils.get_total_norm(g for g in gradients if g is not None).item()


def loss_at(model, images, every_layer):
    """The loss with or without the layers before the last."""
    output = model(images)
    states = output.hidden_states if every_layer else []
    return nepa_deep.intermediate_loss(output.embedding, states, output.prediction)[0]


@pytest.mark.parametrize("every_layer", [False, True])
@pytest.mark.parametrize("layerscale", [1e-5, 1.0])
def test_blank_patches_keep_the_gradient_sane_at_init(layerscale, every_layer):
    torch.manual_seed(0)
    model = nepa_deep.Model(nepa_deep.Config(**VIT | {"image_size": 32, "layerscale_value": layerscale}))
    ordinary, half = pictures(4, 32, 32).chunk(2)
    half[:, :, 16:] = 0
    inputs = ordinary, half, torch.zeros_like(half), torch.full_like(half, 128 / 127.5 - 1)
    norms = [grad_norm(loss_at(model, images, every_layer), model) for images in inputs]
    assert max(norms) < 100 * norms[0]  # without the guard: 1e6 times
    assert torch.equal(model.embed(ordinary)[:, 1:], model.patch(ordinary).flatten(2).transpose(1, 2))


# ==== nepa_deep.py: published weights ================================================================================

OFFICIAL = {
    "cls_token": "embeddings.cls_token",
    "patch": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "qkv": "attention.attention.query attention.attention.key attention.attention.value",
    "q_norm": "attention.attention.q_norm",
    "k_norm": "attention.attention.k_norm",
    "o": "attention.output.dense",
    "gated": "intermediate.gate_proj intermediate.up_proj",
    "up": "intermediate.up_proj",
    "down": "output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "scale1": "layer_scale.lambda1",
    "scale2": "output.layer_scale.lambda1",
}


def official_weights(model):
    """The model's weights by their published names, from a second copy of the table."""
    weights = {}
    for name, p in model.state_dict().items():
        layer, part, kind = re.fullmatch(r"(?:layers\.(\d+)\.)?(\w+)(\.\w+)?", name).groups()
        names = OFFICIAL["gated" if part == "up" and model.config.gated_mlp else part].split()
        at = "vit_nepa." + (f"encoder.layer.{layer}." if layer else "")
        weights |= {at + theirs + (kind or ""): piece for theirs, piece in zip(names, p.chunk(len(names)))}
    return weights


def official_config(**changes):
    gated, hidden = changes.get("gated_mlp", False), changes.get("mlp_hidden", 64)
    config = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": hidden, "use_gated_mlp": gated}
    return VIT | changes | config | {"hidden_act": "silu" if gated else "gelu", "is_causal": True, "qkv_bias": True}


@pytest.mark.parametrize("changes", KINDS)
def test_published_weights_load_by_their_names(changes, capsys):
    model = vit(**changes)
    weights = official_weights(model)
    in_order = {name: weights[name] for name in sorted(weights)}  # as .safetensors has them: key before query
    bare = {name.removeprefix("vit_nepa."): value.numpy() for name, value in weights.items()}
    head = {"classifier.weight": torch.ones(3, 16), "vit_nepa.pooler.dense.bias": torch.ones(16)}
    for given in (weights, in_order, bare, model.state_dict(), weights | head):
        loaded = nepa_deep.from_official(official_config(**changes), given)
        assert same(loaded.state_dict(), model.state_dict())
    assert capsys.readouterr().out == "left out: classifier.weight, vit_nepa.pooler.dense.bias\n"


def test_published_weights_that_do_not_fit_are_named():
    weights, config = official_weights(vit()), official_config()
    key = "vit_nepa.encoder.layer.0.attention.attention.key.bias"
    bad = {r"layers.0.qkv.bias.*\[32\]": {name: weights[name] for name in weights if name != key}}
    bad["decoder.bias"] = weights | {"vit_nepa.decoder.bias": torch.ones(3)}
    for message, given in bad.items():
        with pytest.raises(RuntimeError, match=message):
            nepa_deep.from_official(config, given)
    for name, value in {"is_causal": False, "qkv_bias": False, "hidden_act": "relu"}.items():
        with pytest.raises(ValueError, match=f"{name} .*expected"):
            nepa_deep.from_official({**config, name: value}, weights)


def test_a_run_starts_from_published_weights(tmp_path):
    """A folder brings the sizes, too."""
    weights, flags = official_weights(vit()), "--lr 0 --weight_decay 0 --init_from"
    torch.save({"state_dict": weights}, tmp_path / "weights.pt")
    sizes = "--hidden_size 16 --num_layers 3 --num_heads 2 --patch_size 4"
    folder = folder_with(tmp_path / "model", {"config.json": json.dumps(official_config()).encode()})
    save_file({name: piece.contiguous() for name, piece in weights.items()}, folder / "model.safetensors")
    for out, more in (("file", f"{tmp_path}/weights.pt {sizes}"), ("folder", f"{folder} {COMMON}")):
        run("nepa_deep", tmp_path / out, f"{flags} {more}", tiny=out == "file")
        assert same(load(tmp_path / out)["model"], vit().state_dict())


@pytest.mark.parametrize("path", dumps("vit_nepa.layernorm.weight"))
def test_parity_with_the_published_vit(path):
    """States within 5e-6, losses within 1e-6, gradient norms within 1e-5 of their size."""
    dump, model = published(nepa_deep, path)
    output = model(dump["pixel_values"])
    states = {"input_embedding": output.embedding, "last_hidden_state": output.prediction}
    for name, state in (states | {f"h{i}": h for i, h in enumerate(output.hidden_states, start=1)}).items():
        torch.testing.assert_close(state, dump[name], atol=5e-6, rtol=0)
    total, final, layers = nepa_deep.intermediate_loss(*output)
    losses = {"loss": final.item(), "loss_intermediate": sum(layers).item() / len(layers)}
    assert losses == pytest.approx({name: float(dump[name]) for name in losses}, abs=1e-6)
    for loss, name in ((total, "total"), (final, "loss")):
        assert grad_norm(loss, model, retain_graph=True) == pytest.approx(float(dump[f"grad_norm_{name}"]), rel=1e-5)


# ==== nepa_deep.py: the loss =========================================================================================


def reference_loss(target, prediction):
    """Position by position, float64."""
    cosines = []
    for b, t in itertools.product(range(len(target)), range(target.shape[1] - 1)):
        a, p = target[b, t + 1].detach().double(), prediction[b, t].double()
        cosines.append((a @ p) / (a @ a).sqrt() / (p @ p).sqrt())
    return -sum(cosines) / len(cosines)


def test_every_layer_but_the_last_counts_in_the_intermediate_loss():
    model = vit()
    output = model(pictures())
    layers = [reference_loss(output.embedding, h) for h in output.hidden_states[:-1]]
    final = reference_loss(output.embedding, output.prediction)
    expected = final + 0.7 * (layers[0] + layers[1]) / 2
    loss, loss_final, values = nepa_deep.intermediate_loss(*output, weight=0.7)
    near(torch.stack(values), torch.stack(layers), 1e-6)
    alone = nepa_deep.prediction_loss(output.embedding, output.prediction)
    for mine, right in ((loss, expected), (loss_final, final), (alone, final)):
        near(mine, right, 1e-6)
        # The gradient too: it shows whether the target is detached and which layers count.
        how = {"retain_graph": True, "allow_unused": True}
        for a, b in zip(*(torch.autograd.grad(x, list(model.parameters()), **how) for x in (mine, right))):
            near(a, b, 1e-5)
    for states in ([], output.hidden_states[:1]):  # none before the last
        loss, loss_final, values = nepa_deep.intermediate_loss(output.embedding, states, output.prediction)
        assert loss is loss_final and values == []


def test_the_losses_stay_finite_at_zero_and_know_their_range():
    zero, x = torch.zeros(1, 4, 8, requires_grad=True), torch.randn(1, 4, 8)
    following = x.roll(-1, 1)  # at t, the target at t + 1
    for loss in (nepa_deep.prediction_loss, lambda a, b: nepa_deep.intermediate_loss(a, [], b)[0]):
        assert loss(x, zero).item() == loss(zero, x).item() == 0
        assert torch.autograd.grad(loss(x, zero), zero)[0].isfinite().all()
        assert [loss(x, 3 * following).item(), loss(x, -following).item()] == pytest.approx([-1, 1])


@pytest.mark.parametrize("amp", [False, True])
def test_the_intermediate_loss_keeps_almost_nothing_more_for_backward(amp):
    model = vit(image_size=32, hidden_size=96, num_heads=3, num_layers=12)

    def saved(every_layer):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return saved_bytes(lambda: loss_at(model, pictures(4, 32, 32), every_layer), model)

    assert 0 < saved(True) / saved(False) - 1 <= 0.005


def test_the_intermediate_loss_weight_and_its_metrics(tmp_path):
    for line in run("nepa_deep", tmp_path / "on", "--intermediate_loss_weight 0.5 --grad_accum 2"):
        mean = (line["loss_layer_1"] + line["loss_layer_2"]) / 2
        assert line["loss_intermediate"] == pytest.approx(mean, abs=1e-6) and "loss_layer_3" not in line
        assert line["loss"] == pytest.approx(line["loss_final"] + 0.5 * mean, abs=1e-6)
    off = run("nepa_deep", tmp_path / "off", "--use_intermediate_loss False")
    for line in off:  # validation has them as a diagnosis
        assert line["loss"] == line["loss_final"] and ("loss_intermediate" in line) == (line["split"] != "train")
    names = "loss_layer_1 loss_layer_2 copy_loss constant_loss knn_acc raw_knn_acc first_knn_acc best_knn_acc"
    assert {*names.split(), "probe_acc", "raw_probe_acc", "embed_cos", "effective_rank"} <= off[-1].keys()


def test_crops_and_the_one_scale_of_positions_belong_to_an_update_however_it_is_split(monkeypatch):
    scales, real, args, model = [], nepa_deep.rotary, parsed("nepa_deep", "--device cpu"), vit(num_layers=1)
    monkeypatch.setattr(nepa_deep, "rotary", lambda *inputs: scales.append(float(inputs[4])) or real(*inputs))
    data = nepa_deep.make_data(args, {})
    for update in range(1000):
        whole, part = batch_of(data, range(4), update), batch_of(data, [5, 6], update, np.array([0, 2]))
        assert torch.equal(whole["boxes"][[0, 2]], part["boxes"])
        for batch in (whole, part):
            nepa_deep.compute_loss(model, batch | {"share": 1}, {}, args)
    assert scales[::2] == scales[1::2]
    quarters, _ = np.histogram(np.log2(scales), bins=4, range=(-1, 1))
    assert quarters.sum() == 2000 and quarters.min() > 360  # from 1/2 to 2, uniform in the logarithm


# ==== nepa_deep.py: data =============================================================================================


def test_the_synthetic_textures():
    train, val = nepa_deep.synthetic_dataset(0)
    images, labels = train["images"], train["labels"]
    assert images.shape == (8000, 32, 32, 3) and len(val["images"]) == 2000 and images.dtype == np.uint8
    assert (np.bincount([*labels, *val["labels"]]) == 1000).all()
    assert np.ptp(images.reshape(-1, 8, 4, 8, 4, 3), (2, 4, 5)).all()  # no patch is constant
    assert np.isin(images, (0, 255)).mean() < 0.05
    assert not np.array_equal(nepa_deep.synthetic_dataset(1)[0]["images"], images)
    # A label is an orientation and a period: most of the spectrum is near that wave.
    wave = np.fft.fftfreq(32)[:, None] * 1j + np.fft.fftfreq(32)
    for label in range(10):
        textures = nepa_deep.textures(np.random.default_rng(0), np.full(100, label))
        power = np.abs(np.fft.fft2(textures)).mean(0) ** 2
        power /= power.sum()
        assert (3.5, 6)[label // 5] < 1 / (abs(wave) * power).sum() < (7, 12)[label // 5]
        near = (np.angle(wave, deg=True) - 45 * (label % 5) + 30) % 180 < 60
        assert label % 5 == 4 or power[near].sum() > 0.6


def random_images(n, side=8):
    return np.random.default_rng(0).integers(256, size=(n, side, side, 3), dtype=np.uint8)


def arrays(folder, images=(20, 8, 8, 3), labels=None, prefix=""):
    files = {f"{prefix}images.npy": images, f"{prefix}labels.npy": labels}
    folder_with(folder, {name: value for name, value in files.items() if value is not None})


def opened(flags):
    """What make_data gives for these flags."""
    return nepa_deep.make_data(parsed("nepa_deep", f"--device cpu {flags}"), {})


def test_arrays_are_memory_maps_and_a_tenth_of_the_images_is_held_out(tmp_path):
    images, labels = random_images(1000)[:, :7], np.arange(1000, dtype=np.int16) % 10  # not square: the middle is used
    arrays(tmp_path, images, labels)
    data = opened(f"--data_dir {tmp_path}")
    parts = data["train"], data["val"]
    kept, out = (part["images"].index for part in parts)
    assert sorted([*kept, *out]) == list(range(1000)) and len(out) == 100
    for part, index in zip(parts, (kept, out)):
        assert isinstance(part["images"].array, np.memmap) and (np.diff(index) > 0).all()
        found = pick(part, np.arange(len(index)))
        assert np.array_equal(found["images"], images[index]) and np.array_equal(found["labels"], labels[index])
    assert len({*(out % 10)}) == len({*(out // 100)}) == 10  # neither the first images nor every tenth
    run("nepa_deep", tmp_path / "run", f"--data_dir {tmp_path} --patch_size 7")
    arrays(tmp_path, random_images(5, 18), labels[:5], "val_")  # of another size
    said = "images of [18, 18] pixels, 3 channels; evaluation sees the middle [18, 18]\n"
    assert said in printed("nepa_deep", tmp_path / "run", "--eval_only")


@pytest.mark.parametrize("labels,val_labels", [(None, None), (np.full(40, -1), None), (None, np.zeros(9, int))])
def test_images_without_labels_train_and_the_report_says_why_there_is_no_accuracy(tmp_path, capsys, labels, val_labels):
    grey = random_images(40)[..., 0]
    arrays(tmp_path, grey, labels)
    arrays(tmp_path, grey[:9], val_labels, "val_")
    lines = run("nepa_deep", tmp_path / "run", f"--data_dir {tmp_path}")
    assert lines[-1]["best_loss"] and not any("acc" in name for line in lines for name in line)
    assert load(tmp_path / "run", "best.pt")["config"]["num_channels"] == 1
    assert "which need labels" in capsys.readouterr().out


def test_only_labelled_images_are_probed(tmp_path):
    arrays(tmp_path, random_images(40), np.where(np.arange(40) % 3, np.arange(40) % 2, -1))
    data = opened(f"--data_dir {tmp_path}")
    known, labels = (data[name]["labels"][:] for name in ("known", "train"))
    assert known.tolist() == labels[labels >= 0].tolist() and -1 in labels
    x, y = clusters(30)
    dates = 20230000 + 17 * y
    found = nepa_deep.probe(x, dates, x, torch.where(y > 0, dates, -1))
    assert found == nepa_deep.probe(x, y, x[y > 0], y[y > 0])


# ==== nepa_deep.py: crops ============================================================================================


def prepared(images, size, box=None):
    """Images [B, H, W, C] at this size, cropped to this box, or as in validation."""
    batch = opened(f"--patch_size 1 --image_size {size[0]} {size[1]}")["collate"]({"images": images})
    batch["boxes"] = torch.as_tensor([box] * len(images) if box else batch["boxes"])
    return nepa_deep.prepare(batch, size)


def test_resizing_is_torchs_antialiased_one_and_validation_sees_the_middle(tmp_path, capsys):
    for shape, size in ((20, 20), (32, 32)), ((20, 20), (20, 20)), ((20, 20), (9, 9)), ((16, 64), (8, 32)):
        images = torch.randint(256, (2, *shape, 3), dtype=torch.uint8)
        wanted = F.interpolate(images.permute(0, 3, 1, 2).float(), size, mode="bilinear", antialias=True) / 127.5 - 1
        near(prepared(images, size), wanted)
    near(prepared(images, (16, 16)), images[:, :, 24:40].permute(0, 3, 1, 2) / 127.5 - 1)
    # By default the data's own shape, as far as patches divide it; a number is the side of a square.
    arrays(tmp_path, (20, 16, 67, 13))
    for flags, size, seen in ("", (16, 64), "[16, 64]"), ("--image_size 8", (8, 8), "[16, 16]"):
        data = opened(f"--data_dir {tmp_path} --patch_size 8 {flags}")
        assert data["config"].image_size == size
        height, width = batch_of(data, range(9), 0)["boxes"].T[2:4]
        assert (width > 2 * height).all() == (size == (16, 64))
        said = f"images of [16, 67] pixels, 13 channels; evaluation sees the middle {seen}"
        assert capsys.readouterr().out.splitlines()[-1] == said


def test_a_crop_is_the_slow_average_of_its_pixels():
    image = torch.randint(256, (1, 10, 14, 3), dtype=torch.uint8)
    mine, flipped = (prepared(image, (4, 4), [1.3, 2.6, 6.5, 9.1, flip])[0] for flip in (0, 1))
    assert torch.equal(flipped, mine.flip(2))

    def weight(n, start, length, i):
        return (1 - abs(np.arange(n) + 0.5 - start - (i + 0.5) * length / 4) / (length / 4)).clip(0)

    for i, j in itertools.product(range(4), range(4)):
        weights = np.outer(weight(10, 1.3, 6.5, i), weight(14, 2.6, 9.1, j))
        average = np.einsum("yx,yxc->c", weights / weights.sum(), image[0])
        assert mine[:, i, j].numpy() == pytest.approx(average / 127.5 - 1, abs=1e-5)


def test_crop_boxes_follow_the_flags():
    args = parsed("nepa_deep", "--crop_scale 0.5 --flip_prob 0.3")
    draw = functools.partial(nepa_deep.crop_boxes, np.random.default_rng(0), aspect=2)
    boxes = draw(np.arange(20_000), 40, 80, args)
    top, left, height, width, flip = boxes.T
    assert boxes.dtype == np.float32 and boxes.min() >= 0
    assert (boxes[:, :2] + boxes[:, 2:4] <= [40.0001, 80.0001]).all()
    area, ratio = height * width / 3200, (width / height)[(height < 40) & (width < 80)] / 2
    assert [area.min(), area.max(), area.mean()] == pytest.approx([0.5, 1, 0.75], abs=0.01)
    assert [ratio.min(), ratio.max(), flip.mean()] == pytest.approx([3 / 4, 4 / 3, 0.3], abs=0.02)
    args.crop_scale = 1.0  # no crop at all
    assert (draw(np.arange(9), 40, 80, args)[:, :4] == [0, 0, 40, 80]).all()


# ==== nepa_deep.py: evaluation =======================================================================================


def clusters(n, seed=0, noise=0):
    """Features with the label in six directions of very different scale, then directions of noise; labels."""
    generator, y = torch.Generator().manual_seed(seed), torch.arange(n) % 4
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    x = (centres[y] + 0.8 * torch.randn(n, 6, generator=generator)) * torch.tensor([100.0, 10, 1, 1, 0.1, 0.01])
    return torch.cat([x, torch.randn(n, noise, generator=generator)], 1), y


@pytest.mark.parametrize("noise", [0, 60])  # 60: more dimensions than samples
def test_the_ridge_probe_has_the_penalty_that_predicts_left_out_samples_best(noise):
    (x, y), (test_x, test_y) = clusters(50, noise=noise), clusters(80, seed=1, noise=noise)
    found = nepa_deep.probe(x, y, test_x, test_y)["probe_acc"]
    x, y, test_x = x.double().numpy(), y.numpy(), test_x.double().numpy()
    largest = np.linalg.norm(x - x.mean(0), 2) ** 2  # eigenvalue of the Gram matrix

    def predictions(rows, v, penalty):
        """The classes of v according to the fit to these rows of x."""
        a, targets = x[rows] - x[rows].mean(0), np.eye(4)[y[rows]]
        weights = np.linalg.solve(a.T @ a + penalty * largest * np.eye(x.shape[1]), a.T @ targets)
        return ((v - x[rows].mean(0)) @ weights + targets.mean(0)).argmax(1)

    each, penalties = range(50), 10.0 ** np.arange(1, -7, -1)
    right = [sum(predictions(np.delete(each, i), x[[i]], penalty)[0] == y[i] for i in each) for penalty in penalties]
    best = penalties[np.argmax(right)]
    assert found == pytest.approx(np.mean(predictions(each, test_x, best) == test_y.numpy())) and found > 0.4
    assert len(set(right)) > 1


def test_knn_votes_by_the_cosine_of_whitened_features():
    (x, y), (test_x, test_y) = clusters(300), clusters(80, seed=1)
    found = nepa_deep.probe(x, y, test_x, test_y)["knn_acc"]
    near, far = ((v - x.mean(0)).double().numpy() for v in (x, test_x))
    _, values, axes = np.linalg.svd(near, full_matrices=False)
    near, far = near @ axes.T / values, far @ axes.T / values
    nearest = np.argsort(-far @ near.T / np.linalg.norm(near, axis=1))[:, :20]
    votes = [np.bincount(y[row]).argmax() for row in nearest]
    assert found == pytest.approx(np.mean(votes == test_y.numpy())) and found > 0.7
    # Directions without variance add no noise.
    near, far = (torch.cat([v, 1e-9 * torch.randn(len(v), 40)], 1) for v in (x, test_x))
    assert nepa_deep.probe(near, y, far, test_y)["knn_acc"] == found


@pytest.mark.parametrize("n", [40, 1])
def test_constant_features_do_not_stop_the_probes(n):
    y, same_for_all = torch.arange(40) % 4, torch.ones(40, 3)
    found = nepa_deep.probe(same_for_all[:n], y[:n], same_for_all, y)
    assert found == {"knn_acc": 0.25, "probe_acc": 0.25}


def test_collapse_metrics_are_their_definitions():
    def found(embedding):
        return torch.stack([*nepa_deep.collapse(embedding).values()])

    vectors = torch.randn(5, 11, 6) * torch.tensor([3, 2, 1, 1, 0.1, 0.1]) + 0.5
    units = F.normalize(vectors[:, 1:].double().flatten(0, 1), dim=1)  # without CLS
    cosines = [a @ b for a, b in itertools.permutations(units, 2)]
    p = torch.linalg.svdvals(units)
    p /= p.sum()
    right = [sum(cosines) / len(cosines), (-(p * p.log()).sum()).exp(), -units.mean(0).norm()]
    near(found(vectors), torch.stack(right), 1e-6)
    one = torch.randn(512).expand(4, 65, 512) + 1e-6 * torch.randn(4, 65, 512)  # one direction, in many dimensions
    near(found(one), torch.tensor([1, 1, -1]), 0.01)
    near(found(one[:1, :2]), torch.tensor([0, 1, -1]))  # a single patch


def set_up():
    args = parsed("nepa_deep", f"{TINY['nepa_deep']} {COMMON}")
    data = nepa_deep.make_data(args, {})
    return nepa_deep.Model(data["config"]), data, args


def test_evaluation_draws_nothing_and_reads_the_asked_layer():
    (model, data, args), before = set_up(), torch.get_rng_state()
    first = nepa_deep.evaluate(model, data, args)
    assert torch.equal(before, torch.get_rng_state()) and first == nepa_deep.evaluate(model, data, args)
    output = model(pictures(8, 32, 32))
    for layer, state in {-1: output.prediction, 0: output.embedding, 2: output.hidden_states[1]}.items():
        args.probe_layer = layer
        near(nepa_deep.features(output, args), state[:, 1:].mean(1), 1e-6)


def test_the_probes_see_uncut_images_and_their_pixels_in_file_order(monkeypatch):
    (model, data, args), probed = set_up(), []
    monkeypatch.setattr(nepa_deep, "probe", lambda *inputs: probed.append(inputs) or {})
    for world in (1, 2, 3):  # processes, dealt batches in turn
        gather = lambda x, n=world: [x[rank::n] for rank in range(n)] if isinstance(x, list) else [x]  # noqa: E731
        monkeypatch.setattr(nepa_deep, "gather", gather)
        nepa_deep.evaluate(model, data, args)
        assert same(probed[-2:], probed[:2])
    index = data["known"]["images"].index
    assert len(index) == 60 and (np.diff(index) > 0).all()
    batch = batch_of(data, index)
    images = nepa_deep.prepare(batch, (32, 32))
    (x, y, _, test_y), (pixels, *_) = sorted(probed[:2], key=lambda inputs: inputs[0].shape[1])
    near(x, model(images).prediction[:, 1:].mean(1), 1e-5)
    near(pixels, F.interpolate(images, 16, mode="bilinear", antialias=True).flatten(1))
    assert torch.equal(y, batch["labels"]) and len(test_y) == 20
    args.seed = 1
    assert np.array_equal(nepa_deep.make_data(args, {})["known"]["images"].index, index)


def test_features_are_those_of_all_images_in_file_order_also_in_two_processes_and_overwrite_nothing(tmp_path):
    images, out = random_images(23, 16), tmp_path / "features"
    arrays(tmp_path / "data", images[:20])
    arrays(tmp_path / "data", images[20:], prefix="val_")
    run("nepa_deep", tmp_path, f"--data_dir {tmp_path}/data")
    flags = f"--eval_only --probe_layer 1 --batch_size 8 --features {out}"
    two_processes("nepa_deep", tmp_path, flags)
    model = best_of("nepa_deep", tmp_path)
    output = model(torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1)
    near(torch.tensor(np.load(out)), output.hidden_states[0][:, 1:].mean(1), 1e-5)
    assert "File exists" in stopped("nepa_deep", tmp_path, flags)[1]
    with pytest.raises(ValueError, match="expected H and W to be multiples of 8"):
        model(pictures(2, 16, 30))


# ==== jepa_lm.py: the model ==========================================================================================


def jepa_model(seed=0, **changes):
    torch.manual_seed(seed)
    return jepa_lm.Model(jepa_lm.Config(**{"hidden_size": 32, "num_layers": 2, "num_heads": 2, **changes})).eval()


def chat(answer, user="q", system=None):
    turns = {"system": system, "user": user, "assistant": answer}
    return [{"role": role, "content": text} for role, text in turns.items() if text is not None]


RAGGED = [
    chat("one\n\ntwo is longer\n\n3", user="what?"),
    chat("a single step", system="brief"),
    chat("not\n\nthis one", user="first") + chat("1\n\n2\n\n3\n\n4\n\n5\n\nsix", user="count é"),
    chat("ab\n\ncd", system="s", user="a much longer question than all the others"),
]
OTHERS = [chat("never\n\nseen", user="z")]


def write_chats(path, chats):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    return path


def files_of(folder, train, val=OTHERS):
    """The flags that train on these chats and evaluate on those."""
    return f"--train_file {write_chats(folder / 'train', train)} --eval_file {write_chats(folder / 'val', val)} "


def jepa_data(folder, chats, flags=""):
    """args, data of make_data, and collated(update): these chats as the only batch of an update."""
    args = parsed("jepa_lm", f"{TINY['jepa_lm']} --device cpu {files_of(folder, chats)} {flags}")
    data = jepa_lm.make_data(args, {})

    def collated(update=0):
        return batch_of(data, np.arange(len(chats)), update) | {"step": update, "share": torch.ones(2)}

    return args, data, collated


def tokens_of(messages):
    """Role, bytes, end of turn: as the docstring of encode says."""
    role = {"system": 254, "user": 253, "assistant": 252}
    return [t for m in messages for t in [role[m["role"]], *m["content"].encode(), 255]]


def naive_pairs(messages, args):
    """(tokens the prediction sees, tokens of the target), by splitting the text, without spans."""
    head = [*tokens_of(messages[:-1]), 252]
    if args.view_based_jepa:
        return [(head[:-1], tokens_of(messages[-1:]))]
    steps = messages[-1]["content"].split("\n\n")
    return [
        (head + list("\n\n".join(steps[: i + 1]).encode()), list(steps[i + 1].encode()))
        for i in range(min(args.num_prediction_steps, len(steps) - 1))
    ]


def naive_losses(model, chats, args):
    """Every chat, prediction and target in a separate pass, without padding or mask: losses, pairs, answer tokens."""
    parts = []
    for messages in chats:
        learned, at = [], 0
        for message in messages:
            begin, at = at, at + len(tokens_of([message]))
            learned += range(begin, at - 1) if message["role"] == "assistant" else []
        parts.append((tokens_of(messages), learned, naive_pairs(messages, args)))
    return separate_losses(model, parts, args)


def separate_losses(model, chats, args):
    """The same for (tokens, the places that learn their next token, pairs of tokens: of the prediction, the target)."""

    def states(tokens):
        return model(torch.tensor([tokens]))[0]

    nll, predicted, target = [], [], []
    for tokens, learned, pairs in chats:
        log_p = model.head(states(tokens)).log_softmax(-1)
        nll += [-log_p[i, tokens[i + 1]] for i in learned]
        for context, step in pairs:
            predicted.append(states(context + [model.config.vocab_size + k for k in range(args.predictors)])[-1])
            with torch.set_grad_enabled(not args.stop_grad_target):
                target.append(states(step)[-1])
    llm = torch.stack(nll).mean()
    p, t = torch.stack(predicted), torch.stack(target)
    return llm, 1 - F.cosine_similarity(p, t).mean(), len(p), len(nll)


CASES = [f"--num_prediction_steps {n} --predictors {k}" for n, k in itertools.product((1, 2, 4), (0, 1, 3))]
CASES += [f"--view_based_jepa --predictors {k}" for k in range(4)]
CASES += ["--num_prediction_steps 4 --predictors 1 --stop_grad_target"]


@pytest.mark.parametrize("flags", CASES)
def test_packed_losses_and_gradients_equal_separate_passes(flags, tmp_path):
    """A prediction sees its prefix up to the end of its step, a target only itself, a later turn all before it."""
    args, _, collated = jepa_data(tmp_path, RAGGED, flags)
    model = jepa_model(predictors=args.predictors)
    weights = [p for p in model.parameters() if p.numel()]
    llm, jepa, pairs, answers = naive_losses(model, RAGGED, args)
    total = llm + 0.5 * jepa
    loss, sums, _ = jepa_lm.compute_loss(model, collated(), {}, args)
    assert sums["skipped"] == (0 if args.view_based_jepa else 1, 4)
    assert sums["pairs"] == (pairs, 4) and sums["valid_tokens"] == (answers, 4)
    for name, value in {"llm_loss": llm, "jepa_loss": jepa, "loss": total}.items():
        near(sums[name][0] / sums[name][1], value, 1e-5)
    for mine, right in zip(*(torch.autograd.grad(each, weights) for each in (loss, total)), strict=True):
        assert (mine - right).norm() <= 1e-5 * right.norm()


def packed_states(model, batch):
    return model(batch["tokens"], batch["positions"], jepa_lm.packed_mask(batch["start"], batch["limit"]))


def test_what_may_not_be_seen_changes_nothing(tmp_path):
    """To the last bit: predictors change no state of the chat, the chat none of a step alone, padding none at all."""
    model, batch = jepa_model(), jepa_data(tmp_path, RAGGED, "--num_prediction_steps 4")[2]()
    # Each place belongs to 0, the chat, 1, predictors, 2, their step, 3 and 4, ..., or -1, nothing, at the row's end.
    real = batch["tokens"] >= 0
    pieces = real.int() - 1
    for row, starts in zip(pieces, batch["start"]):
        row[row == 0] = starts[row == 0].unique(return_inverse=True)[1].int()
    assert not real.all() and (real.int().diff() <= 0).all() and real.any(0).all()
    # A row of the mask without any True would give NaN in some kernels.
    assert jepa_lm.packed_mask(batch["start"], batch["limit"]).any(3).all()
    h, ahead = packed_states(model, batch)[real], (pieces > 0) & (pieces % 2 == 1)
    for row in range(4):
        here = torch.arange(4)[:, None] == row
        for each in pieces[row].unique():  # chat, predictors, steps, padding: one changed at a time
            mine = here & (pieces == each)
            other = packed_states(model, {**batch, "tokens": torch.where(mine, 7, batch["tokens"])})[real]
            sees = (mine | here & ahead & (each == 0))[real]
            assert torch.equal(other[~sees], h[~sees]) and (other[sees] != h[sees]).any(1).all()


def test_the_language_model_does_not_depend_on_the_number_of_predictors():
    none, three = (jepa_model(predictors=k).state_dict() for k in (0, 3))
    three["embed_tokens.weight"] = three["embed_tokens.weight"][:-3]
    assert same(none, three)


def reference_lm(model, tokens):
    """Llama and its kin in words: the logits [T, V]."""
    c = model.config

    def norm(rows, name):
        return ref_norm(rows, c.rms_norm_eps) * weights[f"{name}.weight"] if f"{name}.weight" in weights else rows

    def angle(t, j, d):
        turn = c.rope_theta ** (-2 * j / d)
        if c.rope_scaling:
            low, high, old = (c.rope_scaling[n + "factor"] for n in ("low_freq_", "high_freq_", ""))
            length, wave = c.rope_scaling["original_max_position_embeddings"], 2 * math.pi / turn
            m = (length / wave - low) / (high - low)
            slow = wave > length / low
            turn = turn / old if slow else turn if wave < length / high else (1 - m) * turn / old + m * turn
        return t * turn

    def rename(name):
        name = re.sub(r"self_attn\.|mlp\.|_proj", "", name)
        return re.sub(r"\b(gate|up)\b", "gate_up", re.sub(r"\b[qkv]\b", "qkv", name))

    weights, _, attention, swiglu = reference(model, angle, head_norm=norm, rename=rename)
    h = weights["embed_tokens.weight"][tokens]
    for at in (f"layers.{i}." for i in range(c.num_layers)):
        h = h + attention(norm(h, at + "input_layernorm"), at)
        h = h + swiglu(norm(h, at + "post_attention_layernorm"), at)
    table = weights["embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"]
    return norm(h, "norm") @ table[: c.vocab_size].T


def test_model_equals_a_slow_reference_and_predictors_are_never_the_next_token():
    model, tokens = jepa_model(predictors=3), [253, 65, 66, 10, 256, 258]
    near(model.head(model(torch.tensor([tokens])))[0], reference_lm(model, tokens), 1e-5)  # [6, 256]


# ==== jepa_lm.py: published models ===================================================================================

LLAMA = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "intermediate_size": 48, "hidden_act": "silu", "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
FAMILIES = {  # model_type -> the base of RoPE, what else stands in config.json, parameters of attention beside Llama's
    "llama": (
        5e5,
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "attention_bias": True},
        "q_proj.bias k_proj.bias v_proj.bias o_proj.bias",
    ),
    "mistral": (1e4, {"sliding_window": 4096, "head_dim": None}, ""),
    "qwen2": (
        1e6,
        {"rope_theta": 1e6, "tie_word_embeddings": True, "sliding_window": 8, "use_sliding_window": False},
        "q_proj.bias k_proj.bias v_proj.bias",
    ),
    "qwen3": (
        1e6,
        {"rope_parameters": {"rope_theta": 1e6}, "tie_word_embeddings": True, "head_dim": 12},
        "q_norm.weight k_norm.weight",
    ),
}
LAYER = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
LAYER += " input_layernorm post_attention_layernorm"
CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def hub_folder(folder, family="qwen3", template=CHATML, **changes):
    """A folder with a tiny random model in the published names, as transformers writes it."""
    _, more, extra = FAMILIES[family]
    config = LLAMA | {"model_type": family} | more | changes
    D, d = 32, config.get("head_dim") or 8
    parts = [f"{part}.weight" for part in LAYER.split()] + [f"self_attn.{part}" for part in extra.split()]
    names = [f"model.layers.{i}.{part}" for i in (0, 1) for part in parts]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    sizes = {"[qk]_norm": (d,), "norm": (D,), "embed|head": (300, D), "q_proj": (4 * d, D), "[kv]_proj": (2 * d, D)}
    sizes |= {"o_proj": (D, 4 * d), "gate|up": (48, D), "down": (D, 48)}
    folder.mkdir()
    for shard in (1, 2):
        weights = {}
        for name in names[shard - 1 : len(names) - config.get("tie_word_embeddings", False) : 2]:
            size = next(size for part, size in sizes.items() if re.search(part, name))
            weights[name] = 0.2 * torch.randn(size[:1] if "bias" in name else size)
        save_file(weights, folder / f"model-0000{shard}-of-00002.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer, special = tokenizers.ByteLevelBPETokenizer(), ["<|im_start|>", "<|im_end|>"]
    words = ["<think> user assistant system the step one two three"] * 9
    tokenizer.train_from_iterator(words, 300, show_progress=False, special_tokens=special)
    tokenizer.enable_truncation(5)  # some files do, and must not
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def weights_in(folder):
    return {name: w for file in folder.glob("*.safetensors") for name, w in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_model_equals_the_slow_reference(family, tmp_path):
    """Its table gets a row for each predictor."""
    folder = hub_folder(tmp_path / "model", family)
    tokens, model = [5, 299, 0, 17, *range(40, 60), 301], jepa_lm.from_pretrained(folder)
    table = model.embed_tokens.weight
    assert torch.equal(table[:300], weights_in(folder)["model.embed_tokens.weight"]) and len(table) == 302
    assert (model.config.rope_theta, model.config.rms_norm_eps) == (FAMILIES[family][0], 1e-5)
    near(model.head(model(torch.tensor([tokens])))[0], reference_lm(model, tokens), 2e-5)
    near(table[300:].std(), table[:300].std(), 0.3)


def test_what_a_folder_asks_for_and_we_do_not_have_is_named(tmp_path):
    for name, value in {
        "model_type": "gemma", "hidden_act": "gelu", "mlp_bias": True, "rope_scaling": {"type": "linear", "factor": 2},
        "rope_parameters": {"rope_type": "yarn"}, "sliding_window": 500, "chat_template": None,
    }.items():  # fmt: skip
        folder = hub_folder(tmp_path / name, "mistral", **{name: value})
        if name == "chat_template":  # of a base model
            (folder / "tokenizer_config.json").write_text("{}")
        _, said = stopped("jepa_lm", tmp_path / "run", f"--init_from {folder}", tiny=False)
        word = "rope_type" if "rope" in name else name
        assert word in said and ", expected" in said and "\n" not in said
    assert "Instruct" in said


TRIMS = CHATML.replace("m['content']", "m['content'] | trim")
SPACE = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
SPACE += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
THINKS = CHATML.replace(
    "}}\n{{ m", "}}\n{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m"
)
DATED = "{{ strftime_now('%Y') }}{% if messages[0]['role'] != 'system' %}be brief{% else %}"
DATED += "{{ raise_exception('no system') }}{% endif %}" + CHATML
TEMPLATES = {  # template -> what is learned of a chat; None: refused, as the answer or its end is hidden
    CHATML: " one <|im_end|>the step\n\ntwo\n \nthree\n<|im_end|>",
    TRIMS: "one<|im_end|>the step\n\ntwo\n \nthree<|im_end|>",
    SPACE: "  one <|im_end|> the step\n\ntwo\n \nthree\n<|im_end|>",
    THINKS: " one <|im_end|><think>\n\n</think>\n\nthe step\n\ntwo\n \nthree\n<|im_end|>",
    DATED: " one <|im_end|>the step\n\ntwo\n \nthree\n<|im_end|>",
    CHATML.replace("m['content']", "m['content'] | upper"): None,
    CHATML.replace("<|im_end|>", ""): None,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_is_what_its_template_renders_and_a_step_has_the_same_tokens_alone(template, tmp_path):
    tokenizer = jepa_lm.open_tokenizer(hub_folder(tmp_path / "model", template=template))
    chat_of_two = chat(" one ", user="first <think>") + chat("the step\n\ntwo\n \nthree\n", user="é?")
    if not TEMPLATES[template]:
        with pytest.raises(ValueError, match="hides its end"):
            jepa_lm.encode(chat_of_two, tokenizer=tokenizer)
        return
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    words = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "strftime_now": datetime.datetime.now().strftime}
    sample = jepa_lm.encode(chat_of_two, tokenizer=tokenizer)
    text = plain.render(messages=chat_of_two, **words)
    assert sample.tokens.tolist() == tokenizer.inner.encode(text, add_special_tokens=False).ids  # as everybody does
    assert tokenizer.decode(sample.tokens, True) == text
    prompt = plain.render(messages=chat_of_two[:3], add_generation_prompt=True, **words)
    assert tokenizer.decode(sample.tokens[: sample.answer], True) == prompt
    steps = [" the step" if template == SPACE else "the step", "two", "three"]
    assert [sample.tokens[a:b].tolist() for a, b in sample.steps] == [tokenizer.tokens(step)[0] for step in steps]
    assert tokenizer.decode(sample.labels[sample.labels != -100], True) == TEMPLATES[template]
    if template == DATED:
        with pytest.raises(ValueError, match="no system"):
            jepa_lm.encode(RAGGED[1], tokenizer=tokenizer)


def test_a_published_model_is_fine_tuned_asked_and_exported_without_its_folder(tmp_path, capsys):
    folder, out = hub_folder(tmp_path / "model"), tmp_path / "run"
    flags = f"--init_from {folder} {files_of(tmp_path, RAGGED)} --device cpu --batch_size 4 --max_train_steps 3"
    args, start = jepa_lm.parse_args(shlex.split(flags))
    assert args.lr == jepa_lm.FINE_TUNING["lr"]
    data, model = jepa_lm.make_data(args, start["config"]), jepa_lm.from_pretrained(folder)
    chats = []
    for tokens, labels, steps, _ in data["train"]:
        tokens = tokens.tolist()
        pairs = [(tokens[:end], tokens[slice(*target)]) for (_, end), target in itertools.pairwise(steps[:3])]
        chats.append((tokens, np.flatnonzero(labels != -100), pairs))
    batch = batch_of(data, range(4), 0) | {"step": 0, "share": torch.ones(2)}
    loss, sums, _ = jepa_lm.compute_loss(model, batch, {}, args)
    llm, jepa, *counts = separate_losses(model, chats, args)
    near(loss, llm + 0.5 * jepa)
    assert [sums["pairs"][0], sums["valid_tokens"][0]] == counts
    run("jepa_lm", out, f"{flags} --grad_checkpoint", tiny=False)
    published = weights_in(folder)
    shutil.rmtree(folder)
    run("jepa_lm", out, "--eval_only --prompt one --max_length 30")
    said = capsys.readouterr().err
    assert "best.pt of step" in said and "warning: cut at --max_length 30; the prompt has" in said
    run("jepa_lm", out, f"--eval_only --export {tmp_path}/out")
    written, best = weights_in(tmp_path / "out"), load(out, "best.pt")["model"]
    assert written.keys() == published.keys() and not same(written, published)
    best["embed_tokens.weight"] = best["embed_tokens.weight"][:300]
    assert same(jepa_lm.from_pretrained(tmp_path / "out", 0).state_dict(), best)  # as many rows as published
    assert jepa_lm.open_tokenizer(tmp_path / "out").tokens("one")[0]


def test_a_published_model_without_a_file_learns_word_problems_in_its_own_tokens(tmp_path, monkeypatch):
    folder, calls = hub_folder(tmp_path / "model"), spied(monkeypatch)
    run("jepa_lm", tmp_path / "run", f"--init_from {folder} --device cpu --max_train_steps 1 --eval_samples 4", False)
    row = calls[0][0][0]
    text = jepa_lm.open_tokenizer(folder).decode(row[(row >= 0) & (row < 300)].tolist(), True)
    form = r"<.im_start.>user\n\w+ has .*\.<.im_end.>\n<.im_start.>assistant\n(.+=\d+\n\n){2}.+=\d+<.im_end.>\n"
    assert re.match(form, text)  # what follows are the steps alone


# ==== jepa_lm.py: chats ==============================================================================================


def test_answers_and_their_ends_are_supervised_but_for_masked_ones_and_nothing_follows_the_last_to_learn():
    one, two = chat("one", user="1"), chat("2\n\nsix", user="count é")
    messages = [*one, one[0], one[1] | {"weight": 0}, *two]
    sample = jepa_lm.encode([{"role": "system", "content": ""}, *messages, two[0], one[1] | {"train": False}])
    tokens = tokens_of(messages)  # without an empty system turn
    assert sample.tokens.tolist() == tokens
    learned = np.flatnonzero(sample.labels != -100)
    assert sample.labels[learned].tolist() == [*b"one", 255, *b"2\n\nsix", 255]
    assert [jepa_lm.BYTES.decode(sample.tokens[a:b]) for a, b in sample.steps] == ["2", "six"]
    masked = len(tokens_of(messages[:3]))  # its role teaches its first byte
    tokens[masked + 1 : masked + 5] = [-100] * 4
    assert jepa_lm.encode(messages, unmask_user=True).labels.tolist() == [*tokens[1:], -100]


@pytest.mark.parametrize(
    "text,steps",
    [
        ("\n\na\n\nb\n\n", ["a", "b"]),
        ("a\n\n\n\nb\n\n\nc", ["a", "b", "c"]),
        ("a\n\u00a0\nb", ["a", "b"]),
        ("a\r\nb\r\n\r\nc\r\n", ["a\r\nb", "c"]),
        ("a\n \n  b\n\t\nc", ["a", "  b", "c"]),
        ("a\\n\\nb. Step 2: c", ["a\\n\\nb. Step 2: c"]),
        ("é\n\nü\nö", ["é", "ü\nö"]),
    ],
)
def test_steps_are_what_blank_lines_separate_and_no_boundary_is_invented(text, steps):
    sample = jepa_lm.encode(chat(text))
    assert [jepa_lm.BYTES.decode(sample.tokens[a:b]) for a, b in sample.steps] == steps


ONE = chat("a")  # a question and its answer


def row(*messages, **fields):
    return json.dumps({"messages": messages, **fields})


NO_CHATS = {  # a line -> a part of the error message
    "{": "Expecting property name enclosed in double quotes",
    row(*ONE, tools=[1]): "the row has tools, which would be dropped",
    row(ONE[0], ONE[1] | {"reasoning_content": "x"}): "message 2 has reasoning_content, which would be dropped",
    '{"messages": "x"}': "'str' object has no attribute 'items'",
    row(): "roles []",
    row(*RAGGED[2][:3]): "roles ['user', 'assistant', 'user']",
    row(*ONE, {"role": "tool\nx", "content": "x"}): "'assistant', 'tool\\nx'",
    row(ONE[0], {"role": "assistant", "content": [1]}): "message 2 has content of type list, expected text",
    row(*chat(" \n\n")): "the last one is empty",
    row(ONE[0], ONE[1] | {"weight": 0}): "no answer to learn",
    row(*ONE, ONE[0], ONE[1] | {"weight": 0.5}): "message 4 has a weight that is not 0 or 1",
    row(*chat("a\ud800")): "surrogates not allowed",
    "[" * 100000: "recursion",
    "\xff": "can't decode byte 0xff",
}


@pytest.mark.parametrize("bad", NO_CHATS, ids=lambda bad: bad[:40])
def test_a_line_that_is_no_chat_is_named_or_left_out(bad, tmp_path, capsys):
    path = write_chats(tmp_path / "chats.jsonl", RAGGED)
    path.write_bytes(path.read_bytes() + b"\n" + bad.encode("latin-1") + b"\n")
    _, said = stopped("jepa_lm", tmp_path / "run", f"--train_file {path}")
    assert said.startswith(f"error: {path}:6: no chat: ") and NO_CHATS[bad] in said and "\n" not in said
    assert ", expected " in said and "--skip_bad_chats" in said and not (tmp_path / "run").exists()
    run("jepa_lm", tmp_path / "run", f"--train_file {path} --batch_size 2 --skip_bad_chats")
    said = capsys.readouterr().out
    assert f"{path}: left out 1 lines that are no chats: " in said and NO_CHATS[bad] in said


LONGEST = len(tokens_of(RAGGED[3]))
FILES = [  # flags, chats to train on and to validate with, what is said of them
    ("", [], OTHERS, "error: --train_file .*/train, .*/val: 0 and 1 chats are left to train on and to eval"),
    ("--max_length 16", RAGGED, OTHERS, "error: .*/val: 0 and [1-9] chats are left to train on"),
    ("--max_length 40", RAGGED[:2], RAGGED, f"error: .*/val: 2 of 2 chats are longer .*40, expected .*{LONGEST}"),
    (
        f"--max_length {LONGEST - 1}",
        RAGGED,
        OTHERS,
        f"1 of 4 chats are longer than --max_length {LONGEST - 1} and left out; the longest has {LONGEST} tokens",
    ),
    ("", RAGGED, RAGGED[:3] + OTHERS, "^left out 3 of 4 validation chats that are in the training data too\n$"),
    ("", RAGGED, OTHERS, "^left out 0 of 1 validation chats .* too\n$"),
]


@pytest.mark.parametrize("flags,train,val,text", FILES)
def test_chats_too_long_too_few_or_in_both_files_are_said(flags, train, val, text, tmp_path, capsys):
    try:
        jepa_lm.make_data(parsed("jepa_lm", files_of(tmp_path, train, val) + flags), {})
    except DataError as error:
        print(f"error: {error}")
    assert re.search(text, capsys.readouterr().out)


def test_without_an_eval_file_a_random_tenth_validates_whatever_the_flags_of_an_evaluation(tmp_path):
    chats = [chat("x" * (1 + i % 50), user=f"{i}") for i in range(100)]
    flags = f"--train_file {write_chats(tmp_path / 'chats', chats)}"
    run("jepa_lm", tmp_path / "run", flags)
    args = parsed("jepa_lm", f"--eval_only --out_dir {tmp_path}/run")
    train, val = jepa_lm.load_chats(args, jepa_lm.BYTES)
    assert (len(train), len(val)) == (90, 10)
    places = sorted(int(jepa_lm.BYTES.decode(sample.tokens).rstrip("x")) for sample in val)
    assert places[0] < 50 < places[-1]
    args.max_length = 30
    shorter = {sample.tokens.tobytes() for sample in jepa_lm.load_chats(args, jepa_lm.BYTES)[1]}
    assert shorter == {sample.tokens.tobytes() for sample in val if len(sample.tokens) <= 30} and len(shorter) < 10
    (tmp_path / "chats").unlink()
    said = printed("jepa_lm", tmp_path / "run", f"--eval_only --eval_file {write_chats(tmp_path / 'val', OTHERS)}")
    assert f"warning: {tmp_path}/chats is gone" in said


def readme_prompt():
    """The question that the README asks a trained run, and the steps of the answer that it shows."""
    text = " ".join(README.split())
    return re.search(r'--prompt "(Ann.*?)"` with `(.*?)`, `(.*?)`, `(.*?)`', text).groups()


def test_the_synthetic_dataset_is_as_described_and_holds_the_prompt_of_the_readme():
    form, problems = r"(\w+) has (\d) (\w+), (.*), (.*), (.*)\.", {}
    train, val = jepa_lm.synthetic_dataset(0, False, jepa_lm.BYTES)
    assert (len(train), len(val)) == (22553, 2505)
    for sample in train + val:
        question, answer = (jepa_lm.BYTES.decode(part) for part in np.split(sample.tokens, [sample.answer]))
        person, start, thing, *story = re.fullmatch(form, question).groups()
        value, steps = int(start), []
        for told in story:
            word, _, n = told.partition(" ")
            sign, more = {"gets": ("+", n), "loses": ("-", f"-{n}"), "doubles": ("*2", value)}[word]
            steps.append(f"{value}{sign}{n}={value + int(more)}")
            value += int(more)
            assert 1 <= value <= 20
        assert answer == "\n\n".join(steps) and 60 <= len(sample.tokens) + 5 <= 80
        problems[start, *story] = steps
    assert len(problems) == 22553 + 2505
    assert jepa_lm.synthetic_dataset(1, False)[0][0].tokens.tolist() != train[0].tokens.tolist()
    question, *steps = readme_prompt()
    person, start, thing, *story = re.fullmatch(form, question).groups()
    assert person in jepa_lm.PEOPLE and thing in jepa_lm.THINGS and problems[start, *story] == steps


# ==== jepa_lm.py: the losses =========================================================================================


def test_jepa_losses_are_the_formulas():
    p, t = torch.randn(2, 5, 8, dtype=torch.float64)
    cos = F.cosine_similarity(p[:, None], t, dim=-1)
    twins = torch.tensor([0, 1, 0, 2, 3])  # the first and third target are the same text: no negatives of each other
    own, other = torch.eye(5) > 0, twins[:, None] != twins

    def infonce(meant):
        likely = (cos / 0.07).exp()
        return -(likely.diagonal() / (likely * meant).sum(1)).log()

    right = {"cosine": 1 - cos.diagonal(), "mse": (p - t) ** 2, "l2": (p - t).norm(dim=1), "infonce": infonce(1)}
    for kind, values in right.items():
        near(jepa_lm.jepa_loss(p, t, kind), values.mean(), 1e-5)
        assert jepa_lm.jepa_loss(p[:0], t[:0], kind).item() == 0
        for a, b in ((0, 1), (1, 0), (0, 0)):  # the gradient stays bounded
            views = torch.stack([a * p, b * t]).requires_grad_()
            jepa_lm.jepa_loss(*views, kind).backward()
            assert views.grad.norm() < 1e5, kind
    near(jepa_lm.jepa_loss(p, t, "infonce", twins), infonce(own | other).mean(), 1e-5)
    (paired, P), (unpaired, others) = (jepa_lm.cosines(p, t, twins)[f"cos_{name}"] for name in ("paired", "unpaired"))
    near(paired, cos[own].sum(), 1e-5)
    near(unpaired, cos[other].sum(), 1e-5)
    assert (P, others) == (5, 18)


def test_sigreg_is_the_epps_pulley_test_along_each_direction():
    views = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    given = 3 * torch.randn(8, 5)
    directions = given / given.norm(dim=0)
    points = torch.linspace(-3, 3, 33).double()
    gauss = (-(points**2) / 2).exp()
    phi = (1j * points * (views @ directions.double())[..., None]).exp().mean(0)  # [5, 33]
    losses = jepa_lm.sigreg(views, given), 6 * torch.trapezoid((phi - gauss).abs() ** 2 * gauss, points).mean()
    near(*losses, 1e-5)
    near(*(torch.autograd.grad(loss, views)[0] for loss in losses), 1e-5)
    assert jepa_lm.sigreg(torch.randn(4000, 8), given) < 2 < 1000 < jepa_lm.sigreg(torch.ones(4000, 8), given)


def test_the_losses_of_a_batch_are_the_functions_of_its_views(tmp_path):
    """SIGReg is added to the distance, and moves targets too; identical steps are no negatives and not unpaired."""
    flags = "--gamma 0 --sigreg 0.3 --lbd 0.7 --stop_grad_target --jepa_loss infonce"
    args, _, collated = jepa_data(tmp_path, [chat("a\n\nb"), chat("c\n\nb"), chat("d\n\ne")], flags)
    model, batch = jepa_model(), collated()
    assert batch["text"].tolist() == [0, 0, 1]
    views = packed_states(model, batch).flatten(0, 1)[batch["ends"]]
    distance = jepa_lm.jepa_loss(views[:, 0], views[:, 1].detach(), "infonce", batch["text"])
    spread = jepa_lm.sigreg(F.rms_norm(views.flatten(0, 1), (32,)), batch["directions"])
    right = 0.7 * (distance + 0.3 * spread)
    loss, sums, _ = jepa_lm.compute_loss(model, batch, {}, args)
    near(loss, right, 1e-5)
    near(sums["jepa_loss"][0] / 3, distance)
    near(sums["sigreg_loss"][0] / 3, spread)
    assert sums["cos_unpaired"][1] == 4
    assert grad_norm(loss, model) == pytest.approx(grad_norm(right, model), rel=1e-4)


def test_batches_of_a_shuffled_file_have_little_padding(tmp_path):
    """Answers in steps of very different lengths, and their pairs."""
    generator = np.random.default_rng(0)
    steps = [generator.integers(5, 60, generator.integers(1, 6)) for _ in range(2000)]
    flags = files_of(tmp_path, [chat("\n\n".join("x" * n for n in each)) for each in steps])
    data = jepa_lm.make_data(parsed("jepa_lm", flags), {})
    batches = training_batches(data["train"], data["collate"], "cpu", 0, 8, np.arange(8)[None])
    used = torch.cat([(batch["tokens"] >= 0).flatten() for batch in itertools.islice(batches, 64)])
    assert used.float().mean() > 0.8  # unsorted: about .65


def test_an_update_draws_the_jepa_ratio_and_directions_once(tmp_path):
    """The same for all its micro-batches, other ones for each update."""
    data, drawn = jepa_data(tmp_path, RAGGED, "--jepa_ratio 0.3 --sigreg 0.1")[1], []
    for update in range(200):
        parts = [batch_of(data, rows, update, rows) for rows in np.arange(4).reshape(2, 2)]
        one, two = (part.get("directions") for part in parts)  # None: without the JEPA loss
        assert same(one, two) and [part["skipped"] for part in parts] == ([2, 2] if one is None else [1, 0])
        drawn += [] if one is None else [one]
    assert 40 <= len(drawn) <= 80 and len(torch.stack(drawn).unique(dim=0)) == len(drawn)


# ==== jepa_lm.py: regular and lbd 0 are the same run =================================================================


def spied(monkeypatch):
    """Every call of Model.forward in training: its tokens and whether it was causal."""
    calls, real = [], jepa_lm.Model.forward

    def forward(self, tokens, positions=None, mask=None):
        if torch.is_grad_enabled():
            calls.append((tokens, mask is None))
        return real(self, tokens, positions, mask)

    monkeypatch.setattr(jepa_lm.Model, "forward", forward)
    return calls


@pytest.mark.parametrize("accum", [1, 4])
def test_regular_and_lbd_0_are_the_same_run_to_the_last_bit(accum, tmp_path, monkeypatch):
    calls = spied(monkeypatch)
    flags = f"--grad_accum {accum} --batch_size 4"
    regular = run("jepa_lm", tmp_path / "regular", f"{flags} --regular")
    first = list(calls)
    assert len(first) == 6 * accum and all(plain for _, plain in first)
    for i, more in enumerate(("", "--num_prediction_steps 4 --predictors 5", "--view_based_jepa --sigreg 0.1")):
        calls.clear()
        assert run("jepa_lm", tmp_path / str(i), f"{flags} --lbd 0 {more}") == regular
        assert same(first, calls)
    assert same_run(tmp_path / "regular", tmp_path / "0")
    assert "jepa_loss" not in regular[1]


def test_regular_and_lbd_0_are_the_same_run_in_two_processes(tmp_path):
    flags = "--batch_size 2 --grad_accum 2"
    regular = two_processes("jepa_lm", tmp_path / "regular", f"{flags} --regular")
    zero = two_processes("jepa_lm", tmp_path / "zero", f"{flags} --lbd 0 --num_prediction_steps 2")
    assert regular == zero
    close(run("jepa_lm", tmp_path / "one", "--regular"), zero, 2e-5)


@pytest.mark.parametrize("flags", ["--lbd 0", "", "--view_based_jepa --stop_grad_target --gamma 0.5"])
def test_the_losses_are_means_over_the_tokens_and_pairs_of_the_whole_update(flags, tmp_path):
    """Two micro-batches with unequal numbers of tokens and of pairs."""
    chats = [RAGGED[0], RAGGED[1], chat("x" * 60, user="y"), RAGGED[3]]
    flags = f"{files_of(tmp_path, chats)} {flags} --max_train_steps 1 --batch_size 2 --grad_accum 2"
    lines = run("jepa_lm", tmp_path / "run", flags)
    args, model = parsed("jepa_lm", flags), jepa_model(num_layers=1)
    llm, jepa, pairs, answers = naive_losses(model, chats, args)
    loss = args.gamma * llm + args.lbd * jepa
    right = {"llm_loss": llm.item(), "loss": loss.item(), "grad_norm": grad_norm(loss, model)}
    right |= {"valid_tokens": answers / 4, "pairs": pairs / 4 * (args.lbd > 0)}
    right |= {"jepa_loss": jepa.item(), "cos_paired": 1 - jepa.item()} if args.lbd else {}
    assert lines[0].keys() == {"step", "split", "loss", "llm_loss", "exact_match", "prefix_match"}
    assert {name: lines[1][name] for name in right} == pytest.approx(right, rel=1e-5)
    assert lines[0]["llm_loss"] == pytest.approx(naive_losses(model, OTHERS, args)[0].item(), rel=1e-5)  # validation


def test_unmask_user_supervises_everything_in_training_and_nothing_more_in_validation(tmp_path):
    """The source document's puzzle: training losses over different tokens do not compare, validation losses do."""
    for i, source in enumerate(("", files_of(tmp_path, RAGGED[:3] * 2))):
        flags = f"{source} --max_train_steps 1 --batch_size 6 --regular"
        masked, whole = (run("jepa_lm", tmp_path / f"{i}{len(more)}", flags + more) for more in ("", " --unmask_user"))
        assert masked[0] == whole[0] and masked[1]["valid_tokens"] < whole[1]["valid_tokens"]
    assert whole[1]["valid_tokens"] == sum(len(tokens_of(messages)) - 1 for messages in RAGGED[:3]) / 3


def test_debug_counts_right(tmp_path):
    flags = f"{files_of(tmp_path, RAGGED)} --batch_size 4 --max_train_steps 1 --debug"
    said, line = printed("jepa_lm", tmp_path / "run", f"{flags} 1"), lines_of(tmp_path / "run")[1]
    plain, answers = sum(len(tokens_of(messages)) for messages in RAGGED), int(4 * line["valid_tokens"])
    extra = sum(2 + len(step) for each in RAGGED for _, step in naive_pairs(each, parsed("jepa_lm", "")))
    assert f"step=1, input_batch=4, forward_batch=4, tokens forward={plain + extra} plain={plain}\n" in said
    assert f"valid_tokens={answers}, loss_per_token={line['llm_loss']:.4f}, pairs=5, skipped=1" in said
    said = printed("jepa_lm", tmp_path / "zero", f"{flags} 1 --lbd 0")
    assert f"tokens forward={plain} plain={plain}\n" in said and "pairs=0, skipped=4" in said


def test_a_log_line_says_that_the_views_have_collapsed():
    remedy = ": collapsed, try --sigreg 0.02"
    for paired, unpaired, end in ((0.97, 0.94, ""), (0.972, 0.951, ""), (0.97, 0.96, remedy)):
        text = jepa_lm.describe({"loss": 1.0, "pairs": 2.0, "cos_paired": paired, "cos_unpaired": unpaired})
        assert text == f"Loss: 1.0000 | Pairs: 2.0000 | Cos: {paired:.3f} paired, {unpaired:.3f} unpaired{end}"


def test_two_processes_when_one_of_them_has_no_pair(tmp_path):
    """Sorted by length, the chats of one step come first: no pair in the first process, all of them in the second."""
    flags = f"{files_of(tmp_path, [chat('one')] * 8 + [RAGGED[2]] * 8)} --jepa_loss l2 --predictors 0 --sigreg 0.1"
    one = run("jepa_lm", tmp_path / "one", f"{flags} --batch_size 16")
    assert all(line["skipped"] == 0.5 and line["pairs"] == 1 for line in of_split(one, "train"))
    two = two_processes("jepa_lm", tmp_path / "two", f"--batch_size 8 {flags}")
    close(one, two, 2e-5)


# ==== jepa_lm.py: generation =========================================================================================


def test_generation_is_greedy_matches_are_its_own_and_a_prompt_is_answered(tmp_path):
    """Chats learned by heart, the README's too, by an untrained, a half and a fully trained model."""
    question, *steps = readme_prompt()
    learned = [*RAGGED[:3], chat("\n\n".join(steps), user=question)]
    test = [*RAGGED[:3], chat("a", user="never"), chat("on", user="what?"), chat("a single", system="brief")]
    out, flags = tmp_path / "run", f"{files_of(tmp_path, learned)} --hidden_size 64 --num_layers 1 --batch_size 4"
    flags += " --lr 1e-2 --lbd 0.1 --warmup_steps 5 --max_train_steps 120 --eval_interval 120 --device cpu"
    run("jepa_lm", out, flags, tiny=False)
    (tmp_path / "train").unlink()  # an evaluation on another file does without the training file
    more = f"--eval_only --eval_file {write_chats(tmp_path / 'test', test)}"
    args = parsed("jepa_lm", f"{more} --out_dir {out}")
    data, model, last = jepa_lm.make_data(args, {}), best_of("jepa_lm", out), load(out)["model"]
    first = copy.deepcopy(model.state_dict())  # the best one is untrained: these chats do not help with others
    (out / "ckpt.pt").replace(out / "best.pt")
    for part in (0.0, 0.5, 1.0):
        model.load_state_dict({name: torch.lerp(w, last[name], part) for name, w in first.items()})
        hits = []
        for sample in data["val"]:
            right = sample.tokens.tolist()
            tokens = right[: sample.answer]
            while len(tokens) < len(right) and tokens[-1] != 255:
                state = model(torch.tensor([tokens]))[0, -1]
                tokens.append(int((state @ model.embed_tokens.weight[:256].T).argmax()))
            assert jepa_lm.generate(model, sample.tokens[: sample.answer], len(right), 255) == tokens
            hits.append((tokens == right, tokens[: len(right) - 1] == right[:-1]))
        metrics = jepa_lm.evaluate(model, data, args)
        exact, prefix = metrics["exact_match"], metrics["prefix_match"]
        assert [exact, prefix] == pytest.approx(np.mean(hits, 0))
    assert exact == 0.5 < prefix

    def answer(flags):
        return printed("jepa_lm", out, f"--eval_only {flags}", False)

    assert answer(f'--prompt "{question}"').split() == steps
    assert answer("--prompt q --system brief") == "a single step\n"
    shown = answer(more)
    assert re.search(rf"^this model .*{exact:8.4f}{prefix:8.4f}$", shown, re.M) and "before" not in shown
    with pytest.raises(SystemExit, match="--prompt or --system: .* surrogates not allowed, expected text in UTF-8"):
        answer("--prompt a\udcff")


# ==== the shared part: proven through each script ====================================================================


def test_the_shared_part_is_identical_in_all_scripts():
    assert len({(HERE / f"{name}.py").read_text().split("\n# ==== shared")[1] for name in SCRIPTS}) == 1


def own_data(script, folder, seed=0, size=60):
    """Real data in a folder: random samples, others for each seed. Returns the flag that names them."""
    rng = np.random.default_rng(seed)
    if script == "nepa_deep":
        arrays(folder, rng.integers(0, 256, (size, 16, 16, 3), np.uint8), np.arange(size) % 3)
        return f"--data_dir {folder}"
    if script == "trm_deep":
        folder_with(folder, {"0.npy": rng.standard_normal((size, 6, 32), np.float32)})
        return f"--data_folder {folder}"
    folder.mkdir()
    texts = [bytes(text).decode() for text in rng.integers(97, 123, (size, 9), np.uint8)]
    write_chats(folder / "chats", [chat(f"{text[:3]}\n\n{text[3:6]}", text[6:]) for text in texts])
    return f"--train_file {folder}/chats"


@each_script
def test_a_run_writes_its_lines_and_a_checkpoint_that_eval_only_repeats(script, tmp_path):
    lines = run(script, tmp_path, "--ema_decay 0.9 --grad_clip 0.01 --weight_decay 0.3 --grad_checkpoint False")
    order = " ".join(f"{line['split']} {line['step']}" for line in lines)
    assert order == "val 0 train 1 train 2 train 3 val 3 train 4 train 5 train 6 val 6 final 6"
    train, best = of_split(lines, "train"), min(of_split(lines, "val"), key=lambda line: line["loss"])
    assert [line["samples"] for line in train] == [8, 16, 24, 32, 40, 48] and {"loss", "lr"} <= train[0].keys()
    checkpoint, kept, final = load(tmp_path), load(tmp_path, "best.pt"), lines[-1]
    assert not checkpoint["args"]["grad_checkpoint"]
    assert checkpoint["state"]["best"] == kept["metrics"] and kept["metrics"] | {"split": "val"} == best
    assert {f"best_{name}": value for name, value in kept["metrics"].items()}.items() <= final.items()
    assert final["first_loss"] == lines[0]["loss"]
    # What an evaluation needs, and one set of weights.
    assert kept.keys() == {"script", "step", "config", "args", "metrics", "model"} and kept["step"] == best["step"]
    assert best["step"] < 6 or same(kept["model"], checkpoint["ema"])
    # Weight decay is for matrices; the gradient is clipped, the logged norm is the one before.
    optimizer, vectors = checkpoint["optimizer"], sum(x.ndim < 2 for x in checkpoint["model"].values())
    groups = [(group["weight_decay"], len(group["params"])) for group in optimizer["param_groups"]]
    assert groups == [(0.3, len(checkpoint["model"]) - vectors), (0.0, vectors)]
    moments = sum(state["exp_avg_sq"].sum() for state in optimizer["state"].values())
    assert moments <= 0.01**2 < train[0]["grad_norm"] ** 2
    before = contents(tmp_path)
    assert f"Loss: {final['best_loss']:.4f}" in printed(script, tmp_path, "--eval_only")
    assert before == contents(tmp_path)


def test_trm_metrics_are_the_ones_of_the_design(tmp_path):
    lines = run("trm_deep", tmp_path, "--eval_samples 400")
    final, train = lines[-1], of_split(lines, "train")
    assert final["loss"] == final["step_1_loss"] and final["zero_loss"] == pytest.approx(1.0, rel=1e-4)
    assert {"copy_loss", "first_exact_acc", "best_solved_acc"} <= final.keys() and "ridge_loss" not in final
    assert final["copy_exact_acc"] == pytest.approx(14 / 36)
    assert [line.get("mean_steps") for line in train] == [None, None, 3.0] * 2  # where rows halted


@each_script
def test_a_seed_decides_everything_and_evaluating_changes_nothing(script, tmp_path):
    once = run(script, tmp_path / "a", "--ema_decay 0.9")
    again = run(script, tmp_path / "b", "--ema_decay 0.9 --eval_interval 1 --eval_samples 1")
    assert of_split(once, "train") == of_split(again, "train")
    assert same(load(tmp_path / "a")["model"], load(tmp_path / "b")["model"])
    assert run(script, tmp_path / "c", "--seed 1 --max_train_steps 1")[1]["loss"] != once[1]["loss"]


def do_at(script, at, action, name="compute_loss"):
    """A patch: action() is called at the beginning of call number `at` of this function, counted from 1."""
    real, count = getattr(SCRIPTS[script], name), itertools.count(1)

    def spy(*inputs):
        if next(count) == at:
            action()
        return real(*inputs)

    return mock.patch.object(SCRIPTS[script], name, spy)


def interrupt(script, at, number=signal.SIGTERM, *name):
    return do_at(script, at, lambda: os.kill(os.getpid(), number), *name)


@pytest.mark.parametrize(
    "script,name,interval",
    [("nepa_deep", "SIGTERM", 3), ("trm_deep", "SIGINT", 5), ("jepa_lm", "SIGHUP", 5), ("trm_deep", "SIGUSR1", 3)],
)
def test_resumed_equals_uninterrupted_to_the_last_bit(script, name, interval, tmp_path, capsys):
    """Stopped inside a log interval and the life of the carried rows, perhaps where an evaluation is due."""
    flags = f"--max_train_steps 10 --log_interval 4 --ema_decay 0.9 --grad_accum 2 --eval_interval {interval}"
    number, parts = signal.Signals[name], tmp_path / "parts"
    handler = signal.getsignal(number)
    with interrupt(script, 2 * 5 - 1, number), pytest.raises(SystemExit) as stop:
        run(script, parts, flags)
    assert stop.value.code == 128 + number and signal.getsignal(number) == handler
    assert f"stopped after step 5; to continue: --resume --out_dir '{parts}'" in capsys.readouterr().out
    assert load(parts)["step"] == 5 and lines_of(parts)[-1]["step"] == 4
    run(script, parts, "--resume")
    run(script, tmp_path / "whole", flags)
    assert same_run(parts, tmp_path / "whole")


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    twice = do_at("jepa_lm", 2, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with twice, pytest.raises(KeyboardInterrupt):
        run("jepa_lm", tmp_path)


def test_a_run_in_a_thread_needs_no_handlers(tmp_path):
    thread = threading.Thread(target=run, args=("jepa_lm", tmp_path))
    thread.start()
    thread.join()
    assert lines_of(tmp_path)[-1]["split"] == "final"


def signal_to(script, who, name, rank):
    """Process `who` receives SIGTERM during its fourth update, or its second pass over validation data."""
    if rank == who:
        interrupt(script, 4 if name == "compute_loss" else 2, signal.SIGTERM, name).start()


@each_script
@pytest.mark.parametrize("name,count", [("eval_batches", 1), ("eval_batches", 2), ("compute_loss", 2)])
def test_a_signal_to_one_process_ends_all_in_good_order_also_within_an_evaluation(script, name, count, tmp_path):
    """NEPA's first evaluation has two passes over data, for the others the second pass is the second evaluation."""
    flags = "--eval_samples 19 --log_interval 3 --batch_size"  # stopped within an interval, perhaps
    stop, parts = functools.partial(signal_to, script, count - 1, name), tmp_path / "parts"
    processes = Processes(script, parts, f"{flags} {8 // count}", count, prepare=stop)
    assert processes.wait() == [143] * count, processes.text()
    step = load(parts)["step"]
    assert f"stopped after step {step}; to continue: --resume" in processes.text()
    assert count == 1 or not processes.text(1)
    assert step == (4 if name == "compute_loss" else 0 if script == "nepa_deep" else 3)
    assert len(of_split(lines_of(parts), "val")) == (step + 2) // 3  # half an evaluation is none
    lines = run(script, parts, "--resume --batch_size 8")
    close(run(script, tmp_path / "whole", f"{flags} 8"), lines, (count - 1) * 2e-5)


@each_script
@pytest.mark.parametrize("at", [1, 5])
def test_one_command_starts_a_run_and_resumes_it_after_a_crash_without_repeating_a_line(script, at, tmp_path):
    """The last checkpoint is of the first validation, or of step 3 while the log goes on to step 4."""
    whole, parts = run(script, tmp_path / "whole"), tmp_path / "parts"
    with do_at(script, at, lambda: 1 / 0), pytest.raises(ZeroDivisionError):
        run(script, parts, "--resume", tiny=True)
    with open(parts / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "spl')  # half a line
    assert load(parts)["step"] == (0 if at == 1 else 3)
    for _ in range(2):  # a finished run resumed is only summed up again
        assert run(script, parts, "--resume", tiny=True) == whole
    longer = run(script, parts, "--resume --max_train_steps 8")
    assert [line["step"] for line in of_split(longer, "final")] == [8]


def stopped(script, out_dir, flags="", tiny=None):
    """The exit code of a run that fails and the last line that it says."""
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(io.StringIO()) as said:
        run(script, out_dir, flags, tiny)
    code = stop.value.code
    return (1, code) if isinstance(code, str) else (code, said.getvalue().splitlines()[-1])


@each_script
def test_a_run_is_resumed_with_its_flags_but_for_the_few_that_may_change(script, tmp_path):
    run(script, tmp_path)
    before = contents(tmp_path)
    for flags, code, message in (
        ("--resume --lr 0.5", 2, "--lr 0.5 conflicts with"),
        ("--eval_only --seed 4", 2, "--seed 4 conflicts"),
        ("--resume --batch_size 4", 1, "--batch_size * --grad_accum * processes: 4, expected 8"),
        ("", 2, "holds a run: --resume continues it, --eval_only uses it"),
    ):
        found, text = stopped(script, tmp_path, flags)
        assert found == code and message in text
    assert before == contents(tmp_path)
    flags = "--resume --batch_size 4 --grad_accum 2 --max_train_steps 8 --log_interval 2"
    lines = run(script, tmp_path, flags)
    assert lines[-1]["step"] == 8 and lines[-3]["samples"] == 64
    run(script, tmp_path, "--resume --max_train_steps 5")  # done already


@each_script
def test_data_may_move_but_not_change(script, tmp_path, monkeypatch):
    """The same samples under another path from another folder go on; one less or others, as many, do not."""
    more, out = "--min_lr_ratio 1 --max_train_steps", tmp_path / "run"
    whole = run(script, tmp_path / "whole", f"{own_data(script, tmp_path / 'whole_data')} {more} 6")
    monkeypatch.chdir(tmp_path)
    run(script, out, f"{own_data(script, Path('data'))} {more} 3")
    Path("data").rename("gone")
    monkeypatch.chdir("/")
    assert "data" in stopped(script, out, "--resume")[1]
    for seed, size, said in (
        (0, 59, r"number of \w+ samples: 5\d?, expected (54|6),"),
        (1, 60, r"content .* expected \w{16},"),
    ):
        flags = own_data(script, tmp_path / str(size), seed, size)
        assert re.search(said, stopped(script, out, f"--resume {flags}")[1])
    moved = own_data(script, tmp_path / "moved")
    assert run(script, out, f"--resume {moved} --max_train_steps 6") == whole
    assert f"Loss: {whole[-1]['best_loss']:.4f}" in printed(script, out, f"--eval_only {moved}")
    # A batch larger than the data runs into the next epoch.
    lines = run(script, tmp_path / "large", f"{moved} --batch_size 80 --max_train_steps 2")
    assert lines[-1]["step"] == 2 and lines[-3]["samples"] == 160


@each_script
def test_init_from_takes_the_averaged_weights_of_a_run_however_they_are_wrapped(script, tmp_path, monkeypatch):
    old, path = run(script, tmp_path / "old", "--ema_decay 0.5 --max_train_steps 3"), tmp_path / "weights.pt"
    weights = load(tmp_path / "old")["ema"]
    torch.save({"state_dict": {f"module._orig_mod.model.{name}": x for name, x in weights.items()}}, path)
    for i, file in enumerate((tmp_path / "old" / "ckpt.pt", tmp_path / "old" / "best.pt", path)):
        new = run(script, tmp_path / str(i), f"--init_from {file} --max_train_steps 1")
        assert {**new[0], "step": 3} == old[-2]
    _, text = stopped(script, tmp_path / "new", f"--init_from {tmp_path}/old/best.pt --hidden_size 64")
    assert f"--hidden_size 64 conflicts with {tmp_path}/old/best.pt, which has" in text
    name = list(weights)[-1]
    torch.save(weights | {name: weights[name] * math.nan}, path)
    code, text = stopped(script, tmp_path / "a", f"--init_from {path}")
    assert code == 1 and re.match(r"error: step 0: (val \w+|norm of the weights) is nan", text)
    torch.save({other: x for other, x in weights.items() if other != name}, path)
    _, text = stopped(script, tmp_path / "b", f"--init_from {path}")
    assert text.startswith(f"error: {path}: ") and name in text
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors" in stopped(script, tmp_path / "c", f"--init_from {path}.safetensors")[1]


def always_sure(rank=0):
    """Every row halts as soon as it may."""
    real = trm_deep.Model.__init__

    def init(self, config):
        real(self, config)
        torch.nn.init.constant_(self.q_head.bias, 5.0)

    trm_deep.Model.__init__ = init


SPLITS = (1, 4, ""), (2, 1, ""), (2, 3, "--grad_checkpoint --eval_samples 3")  # processes, micro-batches, flags


@pytest.mark.parametrize(
    "script,count,accum,flags",
    [(script, *split) for script in SCRIPTS for split in SPLITS]
    + [("trm_deep", 2, 3, flags) for flags in ("--enable_deep_supervision False", "--halt_exploration_prob 0.6")],
)
def test_micro_batches_and_processes_equal_one_batch_in_one_process(script, count, accum, flags, tmp_path, monkeypatch):
    """19 validation samples are batches of 4, 4, 4, 4 and 3 for two; of 3 the second process has none at all."""
    flags, size, how = f"--eval_samples 19 {flags}", 4 * count * accum, {}
    if "exploration" in flags:  # rows halt at different steps
        monkeypatch.setattr(trm_deep.Model, "__init__", trm_deep.Model.__init__)  # undone at the end
        always_sure()
        how = {"prepare": always_sure}
    one, parts = run(script, tmp_path / "one", f"{flags} --batch_size {size}"), tmp_path / "parts"
    split = run if count == 1 else two_processes
    close(one, split(script, parts, f"{flags} --batch_size 4 --grad_accum {accum}", **how), 2e-5)
    a, b = load(tmp_path / "one"), load(parts)
    for part, atol in (("model", 1e-5), ("carry", 1e-2)):
        for name, value in a[part].items():
            torch.testing.assert_close(b[part][name], value, atol=atol, rtol=1e-2)
    assert not how or 0 < a["carry"]["halted"].sum() < size and len(a["carry"]["steps"].unique()) > 2
    # The rows lie in the checkpoint in one order however they were split: one batch takes the run over.
    grown = "--resume --max_train_steps 8"
    lines = run(script, parts, f"{grown} --batch_size {size} --grad_accum 1")
    close(run(script, tmp_path / "one", grown), lines, 1e-4)


@each_script
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_trains_close_to_float32_and_resumes(script, dtype, tmp_path):
    flags = "--warmup_steps 1 --max_train_steps 8 --log_interval 8"
    mixed = run(script, tmp_path / "mixed", f"{flags} --dtype {dtype}")
    assert run(script, tmp_path / "plain", flags)[-1]["loss"] == pytest.approx(mixed[-1]["loss"], rel=0.03)
    assert all(value.dtype == torch.float32 for value in load(tmp_path / "mixed")["model"].values())
    with interrupt(script, at=4), pytest.raises(SystemExit):
        run(script, tmp_path / "parts", f"{flags} --dtype {dtype}")
    assert run(script, tmp_path / "parts", "--resume") == mixed


@each_script
def test_float16_skips_an_update_that_overflows_and_goes_on(script, tmp_path, monkeypatch):
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: real(*args, init_scale=2.0**40, **kwargs))
    lines = run(script, tmp_path, "--dtype float16 --max_train_steps 60 --log_interval 30 --eval_interval 60")
    assert lines[1]["step"] == 1 and "grad_norm" not in lines[1] and lines[-1]["loss"] < lines[0]["loss"]
    assert load(tmp_path)["scaler"]["scale"] < 2.0**39


def compile_quickly(rank=0):
    """torch.compile without a compiler: graphs are traced and run as they are."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")


@each_script
def test_a_compiled_run_is_one_graph_and_equals_the_eager_one_also_in_two_processes(script, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", torch.compile)  # undone at the end
    compile_quickly()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    flags = "--max_train_steps 12 --hidden_size 192"  # above 1 MB, from where on DistributedDataParallel cuts graphs
    flags += " --curriculum_end_step 6" * (script == "trm_deep")  # one graph for each depth
    eager = run(script, tmp_path / "eager", flags)
    close(eager, run(script, tmp_path / "one", f"{flags} --compile on"), 1e-4)
    assert not counters["graph_break"] and 1 < counters["stats"]["unique_graphs"] <= 2 + (script != "nepa_deep")
    for more in ("", "--grad_checkpoint"):
        two = f"{flags} {more} --compile on --batch_size 4"
        close(eager, two_processes(script, tmp_path / f"two{more}", two, prepare=compile_quickly), 1e-4)


BAD_FLAGS = {
    "--lr fast": "invalid number value: 'fast'",
    "--lr nan": "'nan', expected at least 0 and at most 1e+38",
    "--batch_size 0": "'0', expected at least 1",
    "--beta1 1.5": "'1.5', expected at least 0 and at most 0.999999",
    "--grad_checkpoint maybe": "invalid boolean value: 'maybe'",
    "--wandb_mode maybe": "invalid choice: 'maybe'",
    f"--warmup_steps {10**400}": "expected at least 0 and at most 1e+38",
    "--run_name=": "--run_name is empty, expected a value",
    "--seed 4294967296": "'4294967296', expected at least 0 and at most 4294967295",
    "--unknown 1": "unrecognized arguments: --unknown 1",
    "--device quantum": "error: --device quantum: ",
}
BAD_METHOD_FLAGS = {
    "trm_deep": {
        "--deep_supervision_weight 0.3": "--detach_cycles need --enable_deep_supervision",
        "--enable_deep_supervision --deep_supervision_schedule cubic": "float: 'cubic', expected a name",
        "--enable_deep_supervision --deep_supervision_schedule 1,1 --curriculum_end_step 0": "2 weights for 3 steps",
        "--enable_deep_supervision --deep_supervision_schedule 0.5,1,1": "or --curriculum_end_step 0 and all weights",
        "--halt_cosine 0.5": "--halt_cosine and --normalize need --data_folder",
        "--predict a.npy b.npy": "--predict needs --eval_only",
    },
    "nepa_deep": {
        "--intermediate_loss_weight 2": "--intermediate_loss_weight needs --use_intermediate_loss",
        "--probe_layer 5": "--probe_layer 5 must be at most --num_layers 4",
        "--crop_scale 0": "'0', expected at least 0.01",
        "--rope_rescale 0.5": "'0.5', expected at least 1",
        "--probe_samples 5": "'5', expected at least 10",
        "--num_heads 3": "error: hidden_size 64, expected a multiple of 4 * num_heads = 12",
        "--image_size 8 8 8": "error: image_size [8, 8, 8]: ",
        "--features x.npy": "--features needs --eval_only",
    },
    "jepa_lm": {
        "--eval_file /dev/null": "error: --train_file None, --eval_file /dev/null: 0 and 0 chats are left to train",
        "--prompt x": "--prompt or --export, not both, needs --eval_only",
        "--system x": "--system needs --prompt",
        "--train_file /none": "error: [Errno 2] No such file or directory: '/none'",
    },
}


@each_script
def test_bad_flags_are_one_line_with_the_reason(script, tmp_path, capsys):
    """What the parser refuses exits with 2, what is found later with 1; neither leaves a folder."""
    for flags, message in {**BAD_FLAGS, **BAD_METHOD_FLAGS[script]}.items():
        code, text = stopped(script, tmp_path / "run", flags, tiny=False)
        assert message in text and "\n" not in text and code == (1 if message.startswith("error: ") else 2)
    with pytest.raises(SystemExit):
        parsed(script, "--resume")
    assert "need the --out_dir" in capsys.readouterr().err and not any(tmp_path.iterdir())


def in_wandb(folder, names):
    """Which of these strings the offline runs in a folder do not hold."""
    deadline = time.monotonic() + 30
    while names and time.monotonic() < deadline:  # wandb's own process may still be writing
        content = b"".join(path.read_bytes() for path in folder.glob("wandb/offline-run-*/*.wandb"))
        names = {name for name in names if bytes([len(name)]) + name.encode() not in content}  # as protobuf has them
        time.sleep(0.1)
    return names


@each_script
def test_wandb_offline_holds_the_metrics_and_disabled_never_imports_it(script, tmp_path, monkeypatch):
    done = shell(f"python -X importtime {script}.py {words_of(script, tmp_path / 'off')}")  # names what is imported
    assert done.returncode == 0 and "tqdm" in done.stderr and "wandb" not in done.stderr
    monkeypatch.setenv("WANDB_MODE", {"trm_deep": "wrong"}.get(script, ""))
    lines = run(script, tmp_path, "--wandb_mode offline --run_name proof")
    prefix = {"train": "", "val": "val/", "final": "final/"}
    names = {prefix[line["split"]] + name for line in lines for name in line if name not in ("step", "split")}
    assert not in_wandb(tmp_path, names | {"proof", "seconds"})
    run(script, tmp_path, "--resume --max_train_steps 7")  # the same run goes on
    assert {path.stem for path in tmp_path.glob("wandb/*/*.wandb")} == {f"run-{load(tmp_path)['state']['wandb_id']}"}


def test_the_schedule_is_linear_warm_up_then_cosine():
    args = argparse.Namespace(lr=2.0, warmup_steps=4, max_train_steps=14, min_lr_ratio=0.1)
    rates = [trm_deep.learning_rate(at, args) for at in (0, 1, 2, 3, 9, 14)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 1.1, 0.2])


def test_the_moving_average_is_the_formula(tmp_path):
    """Steps 1, 2, 3 saved one by one; the average recomputed from the saved weights."""
    flags, average = "--ema_decay 0.9 --warmup_steps 0 --min_lr_ratio 1 --resume", {}
    for update in range(3):
        run("jepa_lm", tmp_path, f"{flags} --max_train_steps {update + 1}")
        now, decay = load(tmp_path), min(0.9, (1 + update) / (10 + update))
        for name, value in average.items():
            torch.testing.assert_close(now["ema"][name], decay * value + (1 - decay) * now["model"][name])
        average = now["ema"]


# ==== reliability ====================================================================================================


def die_in_a_write(at, moment, rank):
    """SIGKILL in the at-th atomic write: with half of the bytes written, before the file takes its place, or after."""
    real, os.fsync = os.replace, mock.Mock()

    def replace(temporary, path):
        if os.fsync.call_count < at:
            return real(temporary, path)
        if moment == "half":
            os.truncate(temporary, os.path.getsize(temporary) // 2)
        if moment == "after":
            real(temporary, path)
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def test_killed_at_20_moments_and_resumed_it_is_the_run_that_never_was(tmp_path):
    """Half of the kills come at a random time, half inside a random write of best.pt or ckpt.pt."""
    flags = "--max_train_steps 12 --eval_interval 2 --ema_decay 0.9 --resume"
    start = time.monotonic()
    assert Processes("trm_deep", tmp_path / "whole", flags).wait() == [0]
    seconds, rng, kills, out, lives = time.monotonic() - start, random.Random(0), 0, tmp_path, itertools.count()
    while kills < 20:
        out, code = out / "next", None
        while code != 0:  # one life after another, until the run is complete
            assert next(lives) < 200  # else no kill hits a write
            in_a_write = functools.partial(die_in_a_write, rng.randint(1, 9), rng.choice(["half", "before", "after"]))
            process = Processes("trm_deep", out, flags, prepare=in_a_write if kills % 2 else None)
            (code,) = process.wait(120 if kills % 2 else rng.uniform(0, seconds))
            assert code in (0, -9), process.text()
            kills += code == -9
        assert same_run(tmp_path / "whole", out)
        assert contents(out).keys() == {"metrics.jsonl", "ckpt.pt", "best.pt", ".owner"}


def test_torchrun_passes_a_signal_on_and_one_process_takes_over(tmp_path):
    """SIGTERM to torchrun, as a cluster sends it: both save after the same update. Until then nobody else may write."""
    words = f"-m torch.distributed.run --standalone --nproc_per_node 2 trm_deep.py {TINY['trm_deep']} {COMMON}"
    words += f" --batch_size 4 --max_train_steps 100000 --eval_interval 100000 --out_dir {tmp_path}"
    process = subprocess.Popen([sys.executable, *words.split()], cwd=HERE, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "metrics.jsonl").exists() or len(lines_of(tmp_path)) < 6:
            assert process.poll() is None
            time.sleep(0.01)
        _, text = stopped("trm_deep", tmp_path, "--resume --batch_size 8")
        assert re.fullmatch(rf"error: another process \(\S+, \d+\) is training in {tmp_path}", text)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    finally:
        process.kill()
    step = load(tmp_path)["step"]
    assert step >= 5 and lines_of(tmp_path)[-1]["step"] == step
    lines = run("trm_deep", tmp_path, f"--resume --batch_size 8 --max_train_steps {step + 2}")
    assert [line["step"] for line in of_split(lines, "train")] == list(range(1, step + 3))


def no_room(size, rank):
    """A file may grow to so many bytes; what is beyond fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("count", [1, 2])
def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(count, tmp_path):
    script, flags, out = "trm_deep", "--batch_size 16 --min_lr_ratio 1", tmp_path / "run"
    run(script, out, f"{flags} --max_train_steps 3")
    before = (out / "ckpt.pt").read_bytes()
    for file, size in (("metrics.jsonl", load(out)["state"]["log_size"] + 20), ("(ckpt|best).pt", 20_000)):
        again = f"--resume --max_train_steps 6 --batch_size {16 // count}"
        full = Processes(script, out, again, count=count, prepare=functools.partial(no_room, size))
        assert full.wait() == [1] * count
        assert re.match(rf"(\[rank 0\] )?error: \S*/{file}: .+, expected .*room\n$", full.text().splitlines(True)[-1])
        assert before == (out / "ckpt.pt").read_bytes() and not list(out.glob("*.tmp"))
    whole = run(script, tmp_path / "whole", flags)
    assert run(script, out, "--resume --max_train_steps 6") == whole


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert re.match(r"error: \[Errno \d+\] .*file", stopped("trm_deep", tmp_path / "file" / "run", "")[1])


class Exploit:
    """Unpickled carelessly, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@each_script
def test_a_file_that_cannot_be_read_is_one_line_stays_and_runs_no_code(script, tmp_path):
    """Half a checkpoint, another script's, nonsense and code, in the place of each file that a script reads."""
    run(script, tmp_path / "run")
    good, mark = (tmp_path / "run" / "ckpt.pt").read_bytes(), tmp_path / "it_ran"
    files = {"nonsense": b"nonsense", "half": good[: len(good) // 2], "pickle": pickle.dumps(Exploit(mark), 2)}
    files |= {"other.pt": {"script": "other"}, "code.pt": {"script": script, "x": Exploit(mark)}}
    bad = contents(folder_with(tmp_path / "bad", files | {"code.npy": np.array([Exploit(mark)], dtype=object)}))
    data = own_data(script, tmp_path / "data")
    places = {"run/ckpt.pt": "--resume", "weights.pt": f"--init_from {tmp_path}/weights.pt"}
    places |= {f"data/{name}": data for name in os.listdir(tmp_path / "data")}
    if script == "trm_deep":
        places["in.npy"] = f"--eval_only --predict {tmp_path}/in.npy {tmp_path}/out.npy"
    for (place, flags), content in itertools.product(places.items(), bad.values()):
        (tmp_path / place).write_bytes(content)
        out = tmp_path / ("run" if flags.startswith(("--resume", "--eval_only")) else "new")
        code, text = stopped(script, out, flags, tiny=False)
        assert code == 1 and text.startswith(f"error: {tmp_path / place}:") and "\n" not in text
        assert not mark.exists() and (tmp_path / place).read_bytes() == content
    pickle.loads(bad["pickle"])
    assert mark.exists()  # it would have
    run(script, tmp_path / "run", "--eval_only")  # best.pt
    (tmp_path / "run" / "ckpt.pt").write_bytes(good)
    assert run(script, tmp_path / "run", "--resume --max_train_steps 8")[-1]["step"] == 8


def fail_at(step, rank):
    """The second process fails in an update, as code with a bug would."""
    if rank == 1:
        for script in SCRIPTS:
            do_at(script, step, lambda: [].pop()).start()


@each_script
def test_a_process_that_fails_takes_the_run_down_with_its_own_error_and_wandb_has_its_records(script, tmp_path):
    flags = "--batch_size 4 --max_train_steps 100000 --eval_interval 100000 --wandb_mode offline"
    processes = Processes(script, tmp_path, flags, count=2, prepare=functools.partial(fail_at, 5))
    assert processes.wait() == [1, 1]
    assert "[rank 1] Traceback" in processes.text(1) and "IndexError: pop from empty list" in processes.text(1)
    assert not in_wandb(tmp_path, {"loss", "grad_norm", "val/loss"})


def test_one_bad_sample_is_named_where_it_stands(tmp_path):
    x = np.random.default_rng(0).standard_normal((3, 30, 6, 8)).astype(np.float16)
    x[2, 7, 0, 0] = np.inf
    for count, names in enumerate((["train", "train", "val"], ["val", "train", "train"]), start=1):
        files = {f"{name}_embeddings_chunk_{i}.npy": x[i] for i, name in enumerate(names)}
        folder = folder_with(tmp_path / str(count), files)
        flags = f"--data_folder {folder} --max_train_steps 40 --eval_samples 0 --batch_size {4 // count}"
        processes = Processes("trm_deep", folder / "run", flags, count)
        assert processes.wait() == [1] * count
        where = f"{folder}/{names[2]}_embeddings_chunk_2.npy: sample 7"
        assert f"error: {where} is not finite" in processes.text(0) + processes.text(count - 1)


@pytest.mark.parametrize("flags,code", [("--lr x", 2), ("--data_folder /nowhere", 1)])
def test_a_mistake_is_one_line_in_each_process(flags, code, tmp_path):
    processes = Processes("trm_deep", tmp_path / "run", flags, count=2)
    assert processes.wait() == [code, code]
    for rank in (0, 1):
        text = processes.text(rank)
        assert "Traceback" not in text and text.count("error: ") == 1
        assert code == 2 or text.startswith(f"[rank {rank}] error: ")


@each_script
@pytest.mark.parametrize("interval,name", [(50, r"train (\w*loss|grad_norm)"), (1, r"(val \w+|norm of the weights)")])
def test_an_absurd_learning_rate_stops_the_run_and_saves_nothing_broken(script, interval, name, tmp_path):
    flags = f"--max_train_steps 50 --log_interval 10 --eval_interval {interval} --warmup_steps 0"
    _, text = stopped(script, tmp_path, f"{flags} --lr 1e30")
    assert re.match(rf"error: step \d+: {name} is (nan|inf), expected a finite .*; the checkpoint stays", text)
    for file in ("ckpt.pt", "best.pt"):
        assert all(value.isfinite().all() for value in load(tmp_path, file)["model"].values())


def report_memory(rank):
    """Prints the most memory the process has ever had resident at its end."""
    real = nepa_deep.main
    nepa_deep.main = lambda argv: real(argv) or print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def test_8_gib_of_data_train_in_the_memory_of_a_small_set(tmp_path):
    """A sparse file takes no room on the disk and reads as zeros."""
    peak = []
    for size in (2**24, 2**33):
        folder = tmp_path / str(size)
        folder.mkdir()
        np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (size // 3072, 32, 32, 3))
        flags = f"--data_dir {folder} --max_train_steps 50 --eval_interval 25"
        process = Processes("nepa_deep", folder / "run", flags, prepare=report_memory)
        assert process.wait() == [0], process.text()
        peak.append(int(process.text().splitlines()[-1]))
    assert peak[1] - peak[0] < 300 * 2**20, peak


def evaluate_200_times(rank):
    """Instead of a run; prints the growth of memory, files and threads over the last 150."""
    args = parsed("trm_deep", f"{TINY['trm_deep']} {COMMON} --eval_samples 8")
    data = trm_deep.make_data(args, {})
    model, used = trm_deep.Model(data["config"]).eval(), []
    for _ in range(200):
        trm_deep.evaluate(model, data, args)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        used.append([pages * resource.getpagesize(), len(os.listdir("/proc/self/fd")), threading.active_count()])
    print(json.dumps(np.subtract(used[199], used[49]).tolist()))
    sys.exit()


def test_200_evaluations_leak_nothing(tmp_path):
    process = Processes("trm_deep", tmp_path, prepare=evaluate_200_times)
    assert process.wait() == [0], process.text()
    memory, files, threads = json.loads(process.text().splitlines()[-1])
    assert memory < 4 * 2**20 and files <= 0 and threads <= 0


# ==== the commands as typed ==========================================================================================


def test_exit_codes_and_streams_of_the_real_command(tmp_path):
    """In terminals that know no é too; Python's hashes of strings, other in every process, decide nothing."""
    flags, out = f"{TINY['trm_deep']} {COMMON} --deep_supervision_schedule linear_decay", tmp_path / "é"
    done = shell(f"python trm_deep.py {flags} --out_dir {out}", PYTHONIOENCODING="ascii", PYTHONHASHSEED="1")
    assert done.returncode == 0 and not done.stderr and "/?/best.pt" in done.stdout
    assert re.search(r"^Step 6/6, Train Loss: \d\.\d{4} \| Steps: \['\d\.\d{4}', '\d\.\d{4}'\]$", done.stdout, re.M)
    assert run("trm_deep", tmp_path / "here", flags, tiny=False) == lines_of(out)
    for more, env in {
        f"--data_folder {tmp_path}/none": {},
        "--seed 1": {"WORLD_SIZE": "2"},
        "--seed 2": {"SLURM_STEP_NUM_TASKS": "2"},
        "--compile on": {"CXX": "none", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
    }.items():
        done = shell(f"python trm_deep.py {more} --out_dir {tmp_path}/new", **env)
        assert done.returncode == 1 and "error: " in done.stderr and done.stderr.count("\n") == 1


def test_a_run_needs_no_terminal_and_nobody_who_reads(tmp_path, monkeypatch):
    """A notebook's stdout, none, one that | head has closed; and a path as --out_dir=~/x leaves it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parsed("jepa_lm", "--out_dir=~/x").out_dir == str(tmp_path / "x")
    read, write = os.pipe()
    os.close(read)
    for name, stream in {"notebook": io.StringIO(), "none": None, "head": os.fdopen(write, "w")}.items():
        monkeypatch.setattr(sys, "stdout", stream)
        assert run("jepa_lm", tmp_path / name)[-1]["split"] == "final"


@each_script
@pytest.mark.parametrize("found", [None, argparse])
def test_without_its_data_py_a_script_says_so(script, found, monkeypatch):
    monkeypatch.setitem(sys.modules, "data", found)  # None: not there; otherwise another module of that name
    with pytest.raises(SystemExit, match="^error: .*; expected data.py beside this script"):
        exec((HERE / f"{script}.py").read_text(), {"__name__": script})


@each_script
def test_help_fits_two_screens_and_lists_the_flags_of_the_readme(script):
    text = shell(f"python {script}.py --help").stdout
    flags = text.partition("\ntraining:")[2].rpartition("\nWithout --")[0]
    assert text.count("\n") <= 100 and max(map(len, flags.splitlines())) <= 120
    listed = re.findall(r"--\w+", "".join(re.findall(rf"^(?:all scripts|{script}.py)\n((?:  .*\n)*)", README, re.M)))
    assert sorted(listed) == sorted(re.findall(r"^  (--\w+)", flags, re.M))  # none twice
    assert set(listed) == set(re.findall(r'flag\(\s*"(--\w+)', (HERE / f"{script}.py").read_text()))
    assert "--learning_rate" in flags and "(default: 0.0)" in flags and "demonstration" in text


@each_script
def test_every_metric_is_explained_in_the_readme(script, tmp_path):
    more = {"trm_deep": "--L_cycle_supervision 0.5 --eval_halt", "jepa_lm": "--sigreg 0.02"}.get(script, "")
    tables = re.findall(rf"^##+ (?:Flags|{script}).*?(?=^##)", README, re.M | re.S)  # of all scripts, of this one
    explained = set(re.findall(r"`(\w+)`", "".join(tables)))
    for name in set().union(*run(script, tmp_path, f"{more} --max_train_steps 3")):
        bare = re.sub(r"_\d+", "_0" if script == "trm_deep" else "_1", re.sub(r"^(best|first)_", "", name))
        baseline = re.sub(r"^(raw|zero|copy|ridge)_", "", bare)
        assert explained & {bare, baseline}, name


def test_the_loss_in_the_readme_is_that_of_the_script():
    shown = re.search(r"^def .*?\n(?=\n)", README, re.M | re.S)[0]
    assert re.sub('    """.*?"""\n', "", (HERE / "trm_deep.py").read_text(), flags=re.S).count(shown) == 1


def test_links_of_the_readme_lead_somewhere():
    titles = re.findall(r"^#+ (.*)", README, re.M)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for title, target in re.findall(r"\[([^]]*)\]\(([^)]*)\)", README):
        if target.startswith("https://arxiv.org/abs/"):
            assert title == f"arXiv {target[22:]}"
        else:
            assert target.removeprefix("#") in anchors or (HERE / target).exists(), target


def test_the_top_level_holds_what_the_readme_lists_and_no_more():
    names = {"nepa_deep.py", "trm_deep.py", "jepa_lm.py", "data.py", "test_all.py", "requirements.txt", "README.md"}
    assert {name for name in shell("git ls-files").stdout.split() if not name.startswith(".")} <= names
    wanted = ["torch", "numpy", "wandb", "tqdm"]
    assert [line.split("==")[0] for line in (HERE / "requirements.txt").read_text().split()] == wanted


# ==== the benchmark: python test_all.py ==============================================================================


class Update:
    """Forward and backward pass of a script's compute_loss under some flags, for calling again.

    Gradients stay allocated and are zeroed, so that peak memory is that of activations.
    """

    def __init__(self, script, flags, load=False):
        """load: make every batch anew in the background, as training does; otherwise use the first one again."""
        self.script, self.args, self.load = SCRIPTS[script], parsed(script, flags), load
        with contextlib.redirect_stdout(None):  # what it says of the chats belongs to no table
            data = self.script.make_data(self.args, {})
        self.model = self.script.Model(data["config"]).to(self.args.device)
        self.model.grad_checkpoint = self.args.grad_checkpoint
        self.net = torch.compile(self.model) if self.args.compile == "on" else self.model
        rows = np.arange(self.args.batch_size)
        self.batches = training_batches(data["train"], data["collate"], self.args.device, 0, len(rows), [rows])
        self.batch = next(self.batches)

    def __call__(self):
        batch = {**(next(self.batches) if self.load else self.batch), "step": 0}
        batch["share"] = torch.ones_like(batch.pop("counts")) if "counts" in batch else 1.0
        with self.script.autocast(self.args):
            loss = self.script.compute_loss(self.net, batch, {}, self.args)[0]
        loss.backward()
        self.model.zero_grad(set_to_none=False)

    def flops(self):
        """Floating point operations of matrix products and attention, without any recomputation."""
        self.net, self.model.grad_checkpoint = self.model, False
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops()


def seconds(run_once, cuda):
    """What one call takes."""
    wait = torch.cuda.synchronize if cuda else list
    wait()
    start = time.perf_counter()
    run_once(), wait()
    return time.perf_counter() - start


def write_random_chats(path):
    """1,024 chats of random letters, as long as NL-RX-SYNTH's without its system prompt."""
    rng = np.random.default_rng(0)
    chats = []
    for z in rng.normal(1, 0.21, 1024):  # a longer question has a longer answer
        lengths = 67 * z, 26 * (z / 2 + rng.normal(0.5, 0.25))
        question, answer = (bytes(rng.integers(97, 123, max(int(n), 3), np.uint8)).decode() for n in lengths)
        chats.append(chat(answer, question))
    write_chats(path, chats)


def benchmark(flags):
    """Ratios variant / base, measured in one process and printed as they come, predictions by counting beside them."""
    args = parsed("nepa_deep", flags)
    cuda = args.device.type == "cuda"
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if cuda:
        machine = torch.cuda.get_device_name()
    print(f"{machine}, torch {torch.__version__}, {args.dtype}, compile {args.compile}, {datetime.date.today()}")
    title = f"{'variant / base: predicted, measured':56}{'time (lowest-highest)':>28}{'peak memory':>16}"
    if cuda:
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        rate = 2 * 8192**3 / min(seconds(lambda: a @ b, True) for _ in range(10))
        title += f"{'samples/s':>11}{'MFU':>6}"
    print(title)

    def row(title, variant, base, predicted, memory=None, rounds=9):
        """variant, base: functions without arguments. predicted, memory: ratios; None: not measured.

        The time is the median of the ratios of neighbours, run in turn after both are warm; the memory is the most
        bytes at any moment beyond those at the start.
        """
        torch._dynamo.reset()
        variant(), base()
        took = np.array([[seconds(run_once, cuda) for run_once in (variant, base)] for _ in range(rounds)])
        ratios = took[:, 0] / took[:, 1]
        line = f"{title:56}{predicted:9.2f}{np.median(ratios):7.3f} ({min(ratios):.2f}-{max(ratios):.2f})"
        if memory:
            line = f"{line:84}{memory:9.2f}{peak_bytes(variant, cuda) / peak_bytes(base, cuda):7.3f}"
        if cuda and isinstance(variant, Update):
            each = np.median(took[:, 0])
            line = f"{line:100}{variant.args.batch_size / each:11.0f}{variant.flops() / each / rate:6.0%}"
        print(line, flush=True)

    # The published sizes where there is room for them.
    sizes = f"{flags} --hidden_size 192 --num_layers 12 --num_heads 3 --batch_size 16"
    if cuda:
        sizes = f"{flags} --hidden_size 768 --num_layers 12 --num_heads 12 --image_size 224 --patch_size 14"
        sizes += " --batch_size 128"
    every = Update("nepa_deep", f"{sizes} --use_intermediate_loss")
    row("NEPA, a loss at every layer / at the last", every, Update("nepa_deep", sizes), 1, 1, 15)

    sizes = f"{flags} --batch_size 16 --L_cycles 3 --curriculum_end_step 0 --bidirectional False --hidden_size " + (
        "512 --num_heads 8" if cuda else "256 --L_layers 4 --num_heads 8"
    )
    deep, recomputed = (
        Update("trm_deep", f"{sizes} --enable_deep_supervision {more}") for more in ("", "--grad_checkpoint")
    )
    none = Update("trm_deep", sizes)
    # A cycle costs 1 forward and 2 more with its backward, and 1 again where it is recomputed: all but the last.
    row("TRM, 3 cycles, deep supervision / none", deep, none, 9 / 5, 3)
    row("the same with --grad_checkpoint", recomputed, none, 11 / 5, 1)

    embeddings = torch.randn(2, 32, none.model.config.input_size, device=args.device)
    batch = {"input_embeddings": embeddings, "labels": embeddings}

    def passes(positions):  # None: all positions in one
        for t in positions:
            with trm_deep.autocast(args):
                logits = none.net(none.model.initial_carry(batch), batch, t=t)[1]["logits"]
            F.mse_loss(logits, embeddings if t is None else embeddings[:, [t]]).backward()

    each, one = functools.partial(passes, range(32)), functools.partial(passes, [None])
    row("TRM, a pass per position, as published / one causal pass", each, one, 32, rounds=5)

    with tempfile.TemporaryDirectory() as folder:
        write_random_chats(Path(folder) / "chats")
        variants = "--regular", "--lbd 0", "--view_based_jepa"
        files = f"{flags} --train_file {folder}/chats" + " --hidden_size 960 --num_layers 12" * cuda  # 133M weights
        regular, lbd_0, pairs = (Update("jepa_lm", f"{files} {more}") for more in variants)
    copies = copy.copy(regular)
    copies.batch = {**regular.batch, **{name: regular.batch[name].repeat(3, 1) for name in ("tokens", "positions")}}
    size = {update: update.batch["tokens"].numel() for update in (regular, pairs, copies)}
    row("JEPA, --lbd 0 / --regular", lbd_0, regular, 1, rounds=41)
    row("JEPA, pairs in the row, K 2 / --regular", pairs, regular, size[pairs] / size[regular])
    row("JEPA, three copies of every row / pairs in the row", copies, pairs, size[copies] / size[pairs])

    for script in SCRIPTS:  # the demonstrations
        demo = flags + " --enable_deep_supervision --curriculum_end_step 0" * (script == "trm_deep")
        made, fixed = (Update(script, demo, load) for load in (True, False))
        row(f"{script}.py with its data loader / the same batch again", made, fixed, 1, rounds=41)

    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/images.npy", random_images(1024, 256))
        batches = Update("nepa_deep", f"{flags} --data_dir {folder}").batches
        took = seconds(lambda: [next(batches) for _ in range(100)], False)
        print(f"nepa_deep.py loads {6400 / took:.0f} images of 256 x 256 a second")


if __name__ == "__main__":
    if sys.argv[1:]:
        benchmark(" ".join(sys.argv[1:]))
    else:
        benchmark("--dtype float32 --compile off")
        if torch.cuda.is_available():
            benchmark("--dtype bfloat16 --compile on")
