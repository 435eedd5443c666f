"""`pytest test_all.py`: the proofs, on the CPU, in a few minutes.  `python test_all.py`: the benchmark table.

Every clever path (one causal pass, checkpointing, packed halting rows, accumulation, several processes, resuming) is
checked against a slow and obvious reference written here, independently of the scripts. Times and memory are never
asserted; the benchmark prints them.
"""

import argparse
import cmath
import copy
import datetime
import functools
import hashlib
import http.server
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
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, read when it loads: no chatter
os.environ["no_proxy"] = "127.0.0.1"  # the downloads tested here come from this machine

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import jepa_lm
import nepa_deep
import trm_deep
from data import (
    Concat,
    DataError,
    Loader,
    Subset,
    bucketed_window,
    fixed_batches,
    make_batch,
    permutation,
    sample_index,
    to_device,
    window_size,
)

HERE = Path(__file__).parent
SCRIPTS = {"nepa_deep": nepa_deep, "trm_deep": trm_deep, "jepa_lm": jepa_lm}
# The smallest run of each script that still goes through everything.
TINY = {
    "nepa_deep": "--hidden_size 16 --num_layers 3 --num_heads 2 --patch_size 8 --use_intermediate_loss"
    " --probe_samples 60",
    "trm_deep": "--hidden_size 32 --num_heads 2 --H_cycles 2 --halt_max_steps 3 --enable_deep_supervision",
    "jepa_lm": "--hidden_size 32 --num_heads 2 --num_layers 1 --sigreg 0",
}
COMMON = "--device cpu --batch_size 8 --max_train_steps 6 --warmup_steps 2 --eval_interval 3 --eval_samples 20"
COMMON += " --log_interval 1 --save_interval 3"
each_script = pytest.mark.parametrize("script", SCRIPTS)
# Runs in processes of their own are forked from a server that has imported torch and the scripts, and computed nothing.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_all"])
if __name__ != "__main__":
    torch.set_num_threads(1)  # the fastest for tiny tensors
if os.environ.get("FORK_SERVER"):  # this is that server: its children find the worlds ready
    nepa_deep.make_world(0)
    jepa_lm.make_world(0, False)
os.environ["FORK_SERVER"] = "yes"


def typed(script, words):
    """As if the script had been called with these words."""
    return mock.patch.object(sys, "argv", [f"{script}.py", *words.split()])


def words_of(script, out_dir, flags="", tiny=True):
    return f"--out_dir {out_dir} " + (f"{TINY[script]} {COMMON} {flags}" if tiny else flags)


def run(script, out_dir, flags="", tiny=True):
    """The script's own main() in this process; returns the lines of metrics.jsonl."""
    with typed(script, words_of(script, out_dir, flags, tiny)):
        SCRIPTS[script].main()
    return lines_of(out_dir)


def parsed(script, flags):
    """The flags in force when the script is called with these."""
    with typed(script, flags):
        return SCRIPTS[script].parse_args()[0]


def dumps(name):
    """Of the files in PARITY, dumps of published models (.npz, separated by colons), those that hold this weight."""
    files = os.environ.get("PARITY", "").split(":")
    return [file for file in files if file and "w:" + name in np.load(file).files]


def lines_of(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


def without_time(lines):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def shell(command, **env):
    """A command line in a process of its own, as a user types it; python is this one."""
    words = [sys.executable if word == "python" else word for word in command.split()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(words, cwd=HERE, env=env, capture_output=True, text=True, timeout=300)


class Processes:
    """The script's own main() in processes of its own, connected as torchrun does it."""

    def __init__(self, script, out_dir, flags="", count=1, tiny=True, prepare=None):
        """prepare(rank), called in each process before main: a function of this module that breaks something."""
        words = words_of(script, out_dir, flags, tiny)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
        self.logs, self.all = [], []
        for rank in range(count):
            self.logs.append(tempfile.NamedTemporaryFile())  # noqa: SIM115 (as long as they are looked at)
            inputs = script, words, self.logs[-1].name, {**where, "RANK": str(rank), "LOCAL_RANK": str(rank)}, prepare
            self.all.append(FORKS.Process(target=self.child, args=inputs, daemon=True))
            self.all[-1].start()

    @staticmethod
    def child(script, words, log, environment, prepare):
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
        os.environ.update(environment)
        if prepare:
            prepare(int(environment["RANK"]))
        with typed(script, words):
            SCRIPTS[script].main()

    def wait(self, seconds=120):
        """The exit codes: a signal's number below zero, -9 too for who still ran after so many seconds."""
        deadline = time.monotonic() + seconds
        for process in self.all:
            process.join(max(0.0, deadline - time.monotonic()))
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


def same(a, b):
    """Whether two nested structures are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def close(lines_a, lines_b, tolerance):
    """Whether metrics agree; not the cosines of what shares a micro-batch."""
    assert len(lines_a) == len(lines_b)
    for pair in zip(lines_a, lines_b, strict=True):
        a, b = ({k: v for k, v in line.items() if k not in ("seconds", "cos_unpaired", "cos_targets")} for line in pair)
        assert a.pop("split") == b.pop("split")
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


def saved_bytes(run_once, model, of=lambda tensor: True):
    """Bytes that run_once keeps for backward in tensors that `of` accepts, the model's parameters left out.

    Several views of one storage count once.
    """
    storages = {}

    def pack(tensor):
        if of(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = run_once()  # noqa: F841 (held until all is counted)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(storage.nbytes() for at, storage in storages.items() if at not in parameters)


# ==== data.py ========================================================================================================


@pytest.mark.parametrize("size", [1, 2, 17, 1000])
def test_every_epoch_visits_every_sample_once_in_an_order_of_its_own(size):
    order = permutation(size, 0, 0)
    taken = np.concatenate([sample_index(np.full(8, drawn), np.arange(8), 8, size, 0) for drawn in range(size)])
    assert all(sorted(epoch) == list(range(size)) for epoch in [order, *taken.reshape(8, size)])
    if size >= 17:
        assert any(order != permutation(size, 0, 1)) and any(order != permutation(size, 1, 0))
        assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.6


class Word(str):
    length = property(len)


def numbers(picked, extra):
    return {"x": [len(word) for word in picked], **extra}


LENGTHS = np.arange(1, 290)
NUMBERS = {"x": LENGTHS}, None  # a dataset of arrays, and one of samples of uneven length, with their collate functions
WORDS = [Word("x" * n) for n in LENGTHS], numbers


@pytest.mark.parametrize("dataset,collate", [NUMBERS, WORDS])
def test_processes_micro_batches_and_resumed_runs_get_the_samples_of_one_run(dataset, collate):
    """Whatever was drawn before, however far ahead batches are made."""

    def draw(first, size, *updates):
        loader = Loader(dataset, 8, 3, "cpu", collate)
        for update in updates:
            loader.request(first, torch.full((size,), update))
        return [loader.next() for _ in updates][-1]

    for update in (0, 7, 40):
        whole = draw(0, 8, update)
        index = sample_index(np.full(8, update), np.arange(8), 8, 289, 3)
        if collate:
            index = bucketed_window(update // 32, 8, LENGTHS, 3)[update % 32]
        assert whole["x"].tolist() == LENGTHS[index].tolist()
        assert torch.equal(torch.cat([draw(first, 2, update)["x"] for first in (0, 2, 4, 6)]), whole["x"])
        assert whole["position"].tolist() == list(range(update * 8, update * 8 + 8))
        assert torch.equal(draw(0, 8, 0, 70, update)["x"], whole["x"])


def test_loader_draws_only_the_wanted_rows_in_request_order():
    loader = Loader({"x": np.arange(50)}, 4, 0, "cpu")
    loader.request(0, torch.tensor([1, 5, 1, 2]), torch.tensor([False, True, False, True]))
    loader.request(0, torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.bool))
    batch = loader.next()
    assert batch["rows"].tolist() == [1, 3] and batch["position"].tolist() == [5 * 4 + 1, 2 * 4 + 3]
    assert batch["x"].tolist() == sample_index(np.array([5, 2]), np.array([1, 3]), 4, 50, 0).tolist()
    assert loader.next()["x"].shape == (0,)


@pytest.mark.parametrize("dataset,collate", [NUMBERS, WORDS])
def test_validation_visits_every_sample_once_in_order(dataset, collate):
    def batches(*world, limit=23):
        passed = fixed_batches(dataset, 5, "cpu", *world, limit=limit, collate=collate)
        return [batch and (batch["x"] - 1).tolist() for batch in passed]

    whole = [list(range(first, min(first + 5, 23))) for first in range(0, 23, 5)]
    assert batches() == whole and sum(batches(limit=0), []) == list(range(289))
    assert batches(0, 2) == whole[::2] and batches(1, 2) == [*whole[1::2], None]  # as many rounds for every process


def test_concat_is_the_concatenation_and_subset_its_rows():
    chunks = [torch.randn(n, 2).half() for n in (3, 1, 4)]
    whole, index = torch.cat(chunks).float(), np.array([7, 0, 3, 3, 2])
    joined = Concat(chunks, "abc")
    assert torch.equal(joined[index], whole[index])
    assert torch.equal(Subset(joined, index)[np.array([1, 0])], whole[[0, 7]])


def test_a_window_of_batches_is_the_unsorted_one_cut_by_length():
    lengths = np.random.default_rng(0).integers(1, 50, 700)
    batches = bucketed_window(3, 6, lengths, 5)
    plain = np.concatenate([sample_index(np.full(6, 3 * 32 + k), np.arange(6), 6, 700, 5) for k in range(32)])
    by_length = sorted(plain.tolist(), key=lambda i: lengths[i])
    right = [by_length[k : k + 6] for k in range(0, 32 * 6, 6)]
    assert sorted(batches.tolist()) == sorted(right)
    assert abs(np.corrcoef(lengths[batches].mean(1), np.arange(32))[0, 1]) < 0.6  # in random order
    assert [window_size(8, size) for size in (1, 8, 20, 4000)] == [1, 1, 2, 32]
    assert sorted(bucketed_window(5, 4, np.array([3, 1, 2, 5]), 0)[0]) == [0, 1, 2, 3]  # a tiny set: no sample twice


def test_batches_are_contiguous_and_only_pinned_memory_is_copied_without_waiting():
    batch = make_batch({"x": torch.arange(12).view(4, 3)}, np.array([2, 1]), {}, lambda picked, _: {"x": picked["x"].T})
    assert batch["x"].is_contiguous() and batch["x"].tolist() == [[6, 3], [7, 4], [8, 5]]
    for device, waits in {"cpu": True, "mps": True, "cuda:0": False}.items():
        tensor = mock.Mock()
        to_device({"x": tensor}, device)
        tensor.to.assert_called_once_with(device, non_blocking=not waits)


# ==== trm_deep.py: the model =========================================================================================

SMALL = {"vocab_size": 16, "hidden_size": 16, "num_heads": 2, "L_layers": 2, "H_cycles": 3, "L_cycles": 2}


def trm(seed=0, **changes):
    torch.manual_seed(seed)
    return trm_deep.Model({**SMALL, **changes})


def trm_batch(B=3, T=5, D=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(B, T, D, generator=generator) for name in ("input_embeddings", "labels")}


def step(model, batch, carry=None, **kwargs):
    return model(carry or model.initial_carry(batch), batch, **kwargs)


def reference_trm(model, x, z_H, z_L):
    """spec in words, one sample, one position and one head at a time, float64: z_H, z_L and the answers per cycle."""
    c = model.config
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    d, x, z_H, z_L = c.hidden_size // c.num_heads, x.double(), z_H.double(), z_L.double()

    def norm(v):
        return v / (v.pow(2).mean() + 1e-5).sqrt()

    def turn(v, position):
        v, out = v.tolist(), [0.0] * d
        for j in range(d // 2):
            angle = position * 10000 ** (-2 * j / d)
            out[j] = v[j] * math.cos(angle) - v[j + d // 2] * math.sin(angle)
            out[j + d // 2] = v[j + d // 2] * math.cos(angle) + v[j] * math.sin(angle)
        return torch.tensor(out, dtype=torch.float64)

    def block(h, i):
        T, D = h.shape
        w = {name: weights[f"layers.{i}.{name}.weight"] for name in ("qkv", "o", "gate_up", "down")}
        qkv, mixed = h @ w["qkv"].T, torch.zeros(T, D, dtype=torch.float64)
        for head in range(c.num_heads):
            q, k, v = (qkv[:, part * D + head * d : part * D + (head + 1) * d] for part in range(3))
            q, k = (torch.stack([turn(row, t) for t, row in enumerate(rows)]) for rows in (q, k))
            for t in range(T):
                seen = t + 1 if c.causal else T
                mixed[t, head * d : (head + 1) * d] = torch.softmax(k[:seen] @ q[t] / d**0.5, 0) @ v[:seen]
        h = torch.stack([norm(row) for row in h + mixed @ w["o"].T])
        inner = w["down"].shape[1]
        gate, up = (h @ w["gate_up"].T)[:, :inner], (h @ w["gate_up"].T)[:, inner:]
        return torch.stack([norm(row) for row in h + (gate * torch.sigmoid(gate) * up) @ w["down"].T])

    def net(a, b):
        h = a + b
        for i in range(c.L_layers):
            h = block(h, i)
        return h

    answers = []
    for _ in range(c.H_cycles):
        for _ in range(c.L_cycles):
            z_L = net(z_L, z_H + x)
        z_H = net(z_H, z_L)
        answers.append(z_H @ weights["lm_head.weight"].T)
    return z_H, z_L, answers


@pytest.mark.parametrize("causal", [True, False])
def test_model_equals_the_slow_reference_over_two_supervision_steps(causal):
    model, batch, carry = trm(causal=causal), trm_batch(), None
    start = [v.detach().expand(5, 16) for v in (model.H_init, model.L_init)]
    states = [start] * 3
    for _ in range(2):
        carry, outputs = step(model, batch, carry, enable_deep_supervision=True)
        for b in range(3):
            z_H, z_L, answers = reference_trm(model, batch["input_embeddings"][b], *states[b])
            states[b] = [z_H, z_L]
            torch.testing.assert_close(carry["z_H"][b].double(), z_H, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(carry["z_L"][b].double(), z_L, atol=1e-5, rtol=1e-5)
            for mine, right in zip(outputs["intermediate_logits"], answers, strict=True):
                torch.testing.assert_close(mine[b].detach().double(), right, atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs["logits"], outputs["intermediate_logits"][-1])


def test_inference_computes_the_final_head_only():
    model, calls = trm().eval(), []

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            calls.append(function is F.linear and args[1] is model.lm_head.weight)
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Count():
        trm_deep.answer(model, trm_batch())  # ten supervision steps of three cycles
    assert sum(calls) == 10


def test_swiglu_size_and_initialisation():
    model = trm(hidden_size=64, num_heads=4, vocab_size=64)
    assert model.layers[0].down.weight.shape == (64, 256)  # round(4 * 64 * 2 / 3) = 171, up to a multiple of 256
    assert trm(hidden_size=512, num_heads=8, vocab_size=512).layers[0].down.weight.shape == (512, 1536)
    for p in (model.layers[0].qkv.weight, model.layers[1].down.weight, model.lm_head.weight):
        assert p.std().item() == pytest.approx(p.shape[1] ** -0.5, rel=0.05)
        assert p.abs().max() <= 2.3 * p.shape[1] ** -0.5
    assert not model.q_head.weight.any() and model.q_head.bias.item() == -5


def test_another_hidden_size_is_projected_and_the_dimensions_are_checked():
    model = trm_deep.Model(trm_deep.Config(input_size=6, output_size=4, hidden_size=16, num_heads=2, L_layers=1))
    batch = {"input_embeddings": torch.randn(2, 3, 6), "labels": torch.randn(2, 3, 4)}
    assert step(model, batch)[1]["logits"].shape == (2, 3, 4)
    with pytest.raises(ValueError, match="hidden_size 18, expected a multiple of 2 \\* num_heads = 8"):
        trm(hidden_size=18, num_heads=4)


@pytest.mark.parametrize("path", dumps("inner.H_init"))
@pytest.mark.parametrize("causal", [False, True])
def test_parity_with_the_published_model(causal, path):
    """The dump: weights (`w:` + name), config as JSON, inputs, and outputs (under `causal:` the causal ones)."""
    dump = np.load(path)
    prefix = "causal:" if causal else ""
    weights = {name[2:]: dump[name] for name in dump.files if name.startswith("w:")}
    model = trm_deep.from_official({**json.loads(str(dump["config"])), "causal": causal}, weights)
    batch = {name: torch.tensor(dump[name]) for name in ("input_embeddings", "labels")}

    def check(mine, name):
        torch.testing.assert_close(
            mine.detach(), torch.tensor(dump[prefix + name]).to(mine.dtype), atol=1e-4, rtol=1e-4
        )

    first, outputs = step(model, batch, enable_deep_supervision=True)
    second, later = step(model, batch, first)
    check(outputs["logits"], "logits")
    check(torch.stack(outputs["intermediate_logits"]), "intermediate_logits")
    check(outputs["q_halt_logits"], "q_halt_logits")
    check(first["z_H"], "z_H")
    check(later["logits"], "act2:logits")
    check(second["z_H"], "act2:z_H")
    check(second["z_L"], "act2:z_L")
    flipped = {"input_embeddings": batch["input_embeddings"].flip(1), "labels": batch["labels"]}
    mixed, outputs = step(model, flipped, {**first, "halted": torch.tensor([True, False])})
    check(outputs["logits"], "reset:logits")
    assert mixed["steps"].tolist() == dump["reset:steps"].tolist()
    for schedule in ("baseline", "constant", "linear_decay", "exponential_decay"):
        model.zero_grad()
        outputs = step(model, batch, enable_deep_supervision=schedule != "baseline")[1]
        loss = F.mse_loss(outputs["logits"], batch["labels"])
        if schedule != "baseline":
            loss, _ = trm_deep.compute_deep_supervision_loss(
                outputs["intermediate_logits"], batch["labels"], schedule, 0.5
            )
        loss.backward()
        squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
        check(loss, f"loss:{schedule}")
        check(torch.stack(squares).sum().sqrt(), f"gradnorm:{schedule}")


def test_from_official_renames_and_refuses_what_does_not_fit():
    model = trm(causal=False)
    official = {"inner.embed_tokens.embedding_weight": np.zeros((16, 16))}
    for name, value in model.state_dict().items():
        name = re.sub(r"\.(qkv|o)\.", r".self_attn.\1_proj.", re.sub(r"\.(gate_up|down)\.", r".mlp.\1_proj.", name))
        name = f"inner.L_level.{name}" if name.startswith("layers") else f"inner.{name}"
        official[name] = (torch.cat([value, value + 1]) if "q_head" in name else value).numpy()  # halt, continue
    assert "inner.L_level.layers.1.self_attn.o_proj.weight" in official
    loaded = trm_deep.from_official(SMALL, official)
    assert same(loaded.state_dict(), model.state_dict()) and not loaded.config.causal
    del official["inner.H_init"]
    with pytest.raises(ValueError, match="H_init"):
        trm_deep.from_official(SMALL, official)


# ==== trm_deep.py: no leak ===========================================================================================


def test_an_input_changes_no_output_before_it():
    model, batch, carry, other_carry = trm(), trm_batch(T=6), None, None
    for t in range(6):
        changed = {**batch, "input_embeddings": batch["input_embeddings"].clone()}
        changed["input_embeddings"][:, t] += 1.0
        for _ in range(3):  # several supervision steps: the carry must not leak either
            carry, outputs = step(model, batch, carry)
            other_carry, others = step(model, changed, other_carry)
            assert torch.equal(outputs["logits"][:, :t], others["logits"][:, :t])
            assert not torch.equal(outputs["logits"][:, t], others["logits"][:, t])
        carry = other_carry = None


def noise_folder(folder, shifted_dict=False):
    generator = torch.Generator().manual_seed(5)
    for split, size in (("train", 512), ("val", 256)):
        x = torch.randn(size, 9, 8, generator=generator)
        x = {"input_embeddings": x[:, :-1].clone(), "labels": x[:, 1:].double()} if shifted_dict else x
        torch.save(x, folder / f"{split}_embeddings_chunk_0.pt")
    size = "--num_heads 2 --hidden_size 32 --L_layers 1 --L_cycles 1 --halt_max_steps 2 --batch_size 32 --ema_decay 0"
    return f"--data_folder {folder} {size} --lr 3e-3 --max_train_steps 250 --warmup_steps 10 --eval_interval 50"


@pytest.mark.parametrize(
    "flags", ["", "--enable_deep_supervision", "--enable_deep_supervision --detach_cycles", "dict"]
)
def test_noise_cannot_be_predicted(tmp_path, flags):
    words = noise_folder(tmp_path, shifted_dict=flags == "dict")
    lines = run("trm_deep", tmp_path / "run", f"{words} {flags.replace('dict', '')}", tiny=False)
    assert min(line["loss"] for line in lines if line["split"] == "val") >= 0.97


def test_the_noise_test_would_see_a_leak(tmp_path, monkeypatch):
    monkeypatch.setattr(trm_deep, "predicts_next", lambda dataset: False)  # the source's bidirectional attention
    lines = run("trm_deep", tmp_path / "run", noise_folder(tmp_path), tiny=False)
    assert lines[-1]["loss"] < 0.9


# ==== trm_deep.py: the loss ==========================================================================================

WORKED = [  # the document's numbers, and the same formulas at H = 4
    ("constant", 3, 0.5, [0.5, 0.5, 1.0], 2.0),
    ("linear_decay", 3, 0.5, [0.167, 0.333, 1.0], 1.5),
    ("exponential_decay", 3, 0.5, [0.125, 0.25, 1.0], 1.375),
    ("constant", 4, 0.3, [0.3, 0.3, 0.3, 1.0], 1.9),
    ("linear_decay", 4, 0.5, [0.125, 0.25, 0.375, 1.0], 1.75),
    ("exponential_decay", 4, 0.5, [0.0625, 0.125, 0.25, 1.0], 1.4375),
    ("u_shaped", 4, 0.5, [1.0, 0.25, 0.25, 1.0], 2.5),
    ("0.3,0.4,0.7,1.0", 4, 0.5, [0.3, 0.4, 0.7, 1.0], 2.4),
    ("constant", 1, 0.5, [1.0], 1.0),
]


@pytest.mark.parametrize("schedule,steps,base,weights,total", WORKED)
def test_weights_and_totals_are_the_documents(schedule, steps, base, weights, total):
    mine = trm_deep.supervision_weights(steps, schedule, base)
    assert [round(w, 3 if "linear" in schedule else 6) for w in mine] == weights and sum(mine) == pytest.approx(total)
    logits, labels = [torch.randn(2, 3, 4) for _ in range(steps)], torch.randn(2, 3, 4)
    loss, losses = trm_deep.compute_deep_supervision_loss(logits, labels, schedule, base)
    each = [((x - labels) ** 2).mean() for x in logits]
    assert loss.item() == pytest.approx(sum(w * x for w, x in zip(mine, each, strict=True)).item() / total)
    assert [x.item() for x in losses] == pytest.approx([x.item() for x in each])


@pytest.mark.parametrize("schedule", ["quadratic", "0.1,1.0", "1,1,0", "-1,1,1", "nan,1,1", "inf,1,1", ""])
def test_a_schedule_that_is_none_is_refused(schedule):
    with pytest.raises(ValueError, match="schedule"):
        trm_deep.supervision_weights(3, schedule, 0.5)


def test_dynamic_weights_follow_the_difficulty_without_gradient():
    labels = torch.zeros(1, 1, 4)
    logits = [torch.full((1, 1, 4), value, requires_grad=True) for value in (2.0, 1.0, 1.0)]
    loss, _ = trm_deep.compute_deep_supervision_loss(logits, labels, "dynamic", 0.5)
    weights = [0.5, 0.5 / 4, 1.0]  # losses 4, 1, 1; the hardest gets the base weight
    assert loss.item() == pytest.approx((0.5 * 4 + 0.125 * 1 + 1.0) / sum(weights))
    loss.backward()
    assert logits[0].grad[0, 0, 0].item() == pytest.approx(weights[0] / sum(weights) * 2 * 2.0 / 4)


def test_the_curriculum_moves_the_intermediate_weights_only():
    logits, labels = [torch.randn(2, 3, 4) for _ in range(3)], torch.randn(2, 3, 4)
    none, losses = trm_deep.compute_deep_supervision_loss(logits, labels, "u_shaped", 0.5, curriculum=0.0)
    half, _ = trm_deep.compute_deep_supervision_loss(logits, labels, "constant", 0.5, curriculum=0.5)
    assert none.item() == pytest.approx(losses[2].item())
    assert half.item() == pytest.approx((0.25 * losses[0] + 0.25 * losses[1] + losses[2]).item() / 1.5)


@pytest.mark.parametrize(
    "start,end,values", [(0, 0, [1, 1, 1]), (2, 6, [0, 0, 0.5]), (3, 3, [0, 0, 1]), (0, 8, [0, 0.25, 0.5])]
)
def test_curriculum_is_zero_then_linear_then_one(start, end, values):
    class Args:
        curriculum_start_step, curriculum_end_step = start, end

    assert [trm_deep.curriculum(at, Args) for at in (0, 2, 4)] == values and trm_deep.curriculum(9, Args) == 1


def test_the_loss_functions_run_when_pasted_elsewhere():
    scope = {"torch": torch, "F": F}
    for function in (trm_deep.supervision_weights, trm_deep.compute_deep_supervision_loss):
        exec(inspect.getsource(function), scope)
    logits, labels = [torch.randn(2, 3, 4) for _ in range(3)], torch.randn(2, 3, 4)
    for schedule in ("constant", "linear_decay", "exponential_decay", "u_shaped", "dynamic", "1,2,3"):
        pasted = scope["compute_deep_supervision_loss"](logits, labels, schedule, 0.5)
        assert same(pasted, trm_deep.compute_deep_supervision_loss(logits, labels, schedule, 0.5))


def test_the_documents_training_loop_runs_as_written():
    """The section "Custom Training Loop with Deep Supervision" at smaller sizes, with only its import changed."""
    from trm_deep import RecursiveLLM

    config = {
        "batch_size": 8,
        "seq_len": 6,
        "vocab_size": 32,
        "H_cycles": 4,
        "L_cycles": 3,
        "L_layers": 2,
        "hidden_size": 32,
        "expansion": 4.0,
        "num_heads": 4,
        "pos_encodings": "rope",
        "halt_max_steps": 10,
        "halt_exploration_prob": 0.1,
        "enable_deep_supervision": True,
        "deep_supervision_weight": 0.3,
    }
    torch.manual_seed(0)
    model = RecursiveLLM(config)
    batch = {"input_embeddings": torch.randn(8, 6, 32), "labels": torch.randn(8, 6, 32)}
    carry = model.initial_carry(batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    carry, outputs = model(carry, batch, t=0, enable_deep_supervision=True)
    total_loss = 0
    weights = [0.3, 0.4, 0.7, 1.0]
    for i, step_logits in enumerate(outputs["intermediate_logits"]):
        loss_i = F.mse_loss(step_logits, batch["labels"][:, 0:1, :])
        total_loss += weights[i] * loss_i
    total_loss = total_loss / sum(weights)
    before = [p.clone() for p in model.parameters()]
    total_loss.backward()
    optimizer.step()
    assert i == 3 and step_logits.shape == (8, 1, 32)
    assert (
        sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) == len(before) - 2
    )  # q_head

    model.eval()
    with torch.no_grad():
        carry = model.initial_carry(batch)
        carry, outputs = model(carry, batch)
        assert outputs["logits"].shape == (8, 6, 32) and "intermediate_logits" not in outputs
        for t in (0, 3, -1):
            one = model(model.initial_carry(batch), batch, t=t)[1]["logits"]
            torch.testing.assert_close(one[:, 0], outputs["logits"][:, t])


# ==== trm_deep.py: gradients =========================================================================================


def gradients(model, batch, deep=True, schedule="constant", **kwargs):
    model.zero_grad(set_to_none=True)
    outputs = step(model, batch, enable_deep_supervision=deep, **kwargs)[1]
    loss = F.mse_loss(outputs["logits"], batch["labels"])
    if deep:
        loss, _ = trm_deep.compute_deep_supervision_loss(outputs["intermediate_logits"], batch["labels"], schedule, 0.5)
    (loss + outputs["q_halt_logits"].mean()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_gradient_runs_through_every_cycle_with_deep_supervision_and_the_last_without():
    """Against finite differences of a weight that is used in one chosen cycle only is too slow; H_init tells it all."""
    model, batch = trm(), trm_batch()
    assert gradients(model, batch)["H_init"].abs().sum() > 0
    ablation = gradients(model, batch, schedule="0,0,1")  # --deep_supervision_weight 0: full gradient, last loss only
    assert ablation["H_init"].abs().sum() > 0
    assert gradients(model, batch, deep=False)["H_init"] is None
    frozen = trm_deep.Model(trm_deep.Config(16, 16, 16, 2, 1, learn_init=False))
    assert all(g is not None for g in gradients(frozen, batch, deep=False).values())


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("projected", [True, False])
def test_gradients_under_amp_equal_float32_ones_for_every_parameter(deep, projected):
    """The autocast cache trap: weights cast under no_grad in the early cycles must not lose their later gradient."""
    torch.manual_seed(0)
    sizes = (24 if projected else 64, 64, 64, 4, 2)
    model = trm_deep.Model(trm_deep.Config(*sizes, L_cycles=2, learn_init=deep))
    batch = {"input_embeddings": torch.randn(8, 6, sizes[0]), "labels": torch.randn(8, 6, 64)}
    right = gradients(model, batch, deep)
    with torch.autocast("cpu", torch.bfloat16):
        mine = gradients(model, batch, deep)
    for name, gradient in right.items():
        assert mine[name] is not None, name
        assert F.cosine_similarity(mine[name].flatten(), gradient.flatten(), dim=0) > 0.97, name
        assert mine[name].norm().item() == pytest.approx(gradient.norm().item(), rel=0.1), name


def test_under_amp_every_weight_is_cast_once_per_step():
    model = trm_deep.Model(trm_deep.Config(24, 16, 16, 2, 2, L_cycles=2))
    batch, casts = {"input_embeddings": torch.randn(2, 3, 24), "labels": torch.randn(2, 3, 16)}, []

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if (
                isinstance(args[0] if args else None, torch.nn.Parameter)
                and getattr(out, "dtype", None) == torch.bfloat16
            ):
                casts.append(id(args[0]))
            return out

    saved = set()

    def pack(tensor):
        if tensor.dtype == torch.bfloat16 and tensor.shape in ((48, 16), (16, 48)):  # the qkv matrix, or its transpose
            saved.add(tensor.data_ptr())
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        Count(),
    ):
        outputs = step(model, batch, enable_deep_supervision=True)[1]
    assert len(saved) == 2 and outputs["logits"].dtype == torch.float32  # one copy for each of the two layers
    matrices = {id(p) for p in model.parameters() if p.ndim == 2 and p is not model.q_head.weight}
    assert sorted(casts) == sorted(matrices)


@pytest.mark.parametrize("amp", [True, False])
def test_checkpointing_gives_the_gradient_of_the_full_graph(amp):
    model, batch = trm(), trm_batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        right = gradients(model, batch)
        model.grad_checkpoint = True
        mine = gradients(model, batch)
    assert same(mine, right)


class TrmArgs:
    """compute_loss's flags, without a parser."""

    enable_deep_supervision, deep_supervision_weight, deep_supervision_schedule = True, 0.5, "linear_decay"
    curriculum_start_step = curriculum_end_step = 0
    L_cycle_supervision, detach_cycles, H_cycles, L_cycles = 0.0, False, 3, 2
    data_folder, halt_cosine, seed = "folder", 0.9, 0

    def __init__(self, **changes):
        vars(self).update(changes)


def loss_of(model, batch, state=None, at=0, **flags):
    B = len(batch["labels"])
    full = {**batch, "rows": torch.arange(B), "min_steps": torch.ones(B, dtype=torch.int32), "step": at, "share": 1.0}
    return trm_deep.compute_loss(model, full, state, TrmArgs(**flags))


@pytest.mark.parametrize("latent", [0.0, 0.4])
def test_detached_cycles_equal_a_graph_cut_between_cycles(latent):
    """The reference cuts each cycle's states by hand, keeps every graph and runs one backward pass over the sum."""
    model, batch = trm(), trm_batch()
    loss, metrics, _ = loss_of(model, batch, detach_cycles=True, L_cycle_supervision=latent)
    loss.backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters()}

    cycles = []
    model.zero_grad()
    outputs = step(
        model,
        batch,
        enable_deep_supervision=True,
        latent_logits=True,
        after_cycle=lambda h, logits, latents: (cycles.append((logits, latents)), (logits, latents))[1],
    )[1]
    cycles.append((outputs["logits"], outputs["latent_logits"][-1]))
    total = 0
    for weight, (logits, latents) in zip([1 / 6, 2 / 6, 1.0], cycles, strict=True):
        own = F.mse_loss(logits, batch["labels"]) + latent * sum(F.mse_loss(x, batch["labels"]) for x in latents) / 2
        total = total + weight / 1.5 * own
    halting = F.softplus(outputs["q_halt_logits"]).mean()  # cross-entropy where no row is right
    (total + 0.5 * halting).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(mine[name], p.grad, atol=1e-6, rtol=1e-5)
    assert loss.item() == pytest.approx((total + 0.5 * halting).item(), rel=1e-5)
    assert metrics["loss"][0].item() / 3 == pytest.approx(total.item(), rel=1e-5)
    assert metrics["q_halt_loss"][0].item() / 3 == pytest.approx(halting.item(), rel=1e-5)


def test_detaching_is_another_gradient_and_the_l_cycles_add_their_losses():
    model, batch = trm(), trm_batch()

    def gradient(**flags):
        model.zero_grad()
        loss, _, _ = loss_of(model, batch, **flags)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    full, detached = gradient(), gradient(detach_cycles=True)
    assert full[0] == pytest.approx(detached[0], rel=1e-6)
    assert F.cosine_similarity(full[1], detached[1], dim=0) < 0.95
    with torch.no_grad():
        outputs = step(model, batch, enable_deep_supervision=True, latent_logits=True)[1]
    more = 0
    for weight, latents in zip([1 / 6, 2 / 6, 1.0], outputs["latent_logits"], strict=True):
        more += weight / 1.5 * sum(F.mse_loss(x, batch["labels"]).item() for x in latents) / 2
    assert gradient(L_cycle_supervision=0.4)[0] - full[0] == pytest.approx(0.4 * more, rel=1e-4)


def test_memory_of_the_variants_in_bytes():
    """Counted, not timed: detached or checkpointed cycles hold about one graph at a time, the full graph all four."""

    def peak(**flags):
        model, batch = trm(hidden_size=32, vocab_size=32, H_cycles=4), trm_batch(16, 32, 32)
        model.grad_checkpoint = flags.pop("grad_checkpoint", False)
        return peak_bytes(lambda: loss_of(model, batch, H_cycles=4, **flags)[0].backward())

    none, deep = peak(enable_deep_supervision=False), peak()
    assert 3.3 < deep / none < 4.2
    assert peak(detach_cycles=True) / none < 1.35 and peak(grad_checkpoint=True) / none < 1.35


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
    assert carry["steps"].tolist() == [1, 1, 1] and not carry["z_H"].requires_grad
    carry["halted"] = torch.tensor([False, True, False])
    mixed, outputs = step(model, later, carry)
    assert mixed["steps"].tolist() == [2, 1, 2]
    for b, source in enumerate((batch, later, batch)):
        assert torch.equal(mixed["labels"][b], source["labels"][b])
    fresh = step(model, later)[1]["logits"][1]
    goes_on = step(model, batch, {**carry, "halted": torch.zeros(3, dtype=torch.bool)})[1]["logits"]
    torch.testing.assert_close(outputs["logits"][1], fresh)
    torch.testing.assert_close(outputs["logits"][[0, 2]], goes_on[[0, 2]])


def test_rows_halt_when_sure_or_at_the_last_step_but_not_before_their_minimum():
    model, batch = trm(halt_max_steps=3), trm_batch(B=2)
    min_steps = torch.tensor([1, 3], dtype=torch.int32)

    def halts(bias):
        model.q_head.bias.data.fill_(bias)
        carry, seen = None, []
        for _ in range(3):
            carry, _ = step(model, {**batch, "min_steps": min_steps}, carry)
            seen.append(carry["halted"].tolist())
        return seen

    assert halts(-5.0) == [[False, False], [False, False], [True, True]]
    assert halts(+5.0)[0] == [True, False] and halts(+5.0)[2] == [True, True]
    model.eval()
    assert halts(+5.0) == [[False, False], [False, False], [True, True]]  # evaluation always runs all steps


def test_exploration_is_drawn_per_sample_with_the_asked_probability():
    model = trm(halt_max_steps=4, halt_exploration_prob=0.25)
    drawn = model.draw_min_steps(trm_batch(B=4000, T=1))
    assert (drawn > 1).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert set(drawn.tolist()) == {1, 2, 3, 4}


def test_training_takes_a_fresh_sample_only_for_halted_rows(tmp_path, monkeypatch):
    taken, real = [], trm_deep.compute_loss

    def spy(model, batch, state, args):
        loss, metrics, new = real(model, batch, state, args)
        asked = 8 if state is None else int(state["halted"].sum())
        taken.append((len(batch["rows"]), asked, new["steps"].tolist()))
        return loss, metrics, new

    monkeypatch.setattr(trm_deep, "compute_loss", spy)
    run("trm_deep", tmp_path)
    assert [drawn for drawn, _, _ in taken] == [asked for _, asked, _ in taken] == [8, 0, 0, 8, 0, 0]
    assert [steps[0] for _, _, steps in taken] == [1, 2, 3, 1, 2, 3]


def test_the_halting_head_learns_who_is_right():
    torch.manual_seed(0)
    model, batch = trm(causal=False), trm_batch(B=8)
    optimizer = torch.optim.Adam(model.q_head.parameters(), lr=0.1)
    model.requires_grad_(False)
    model.q_head.requires_grad_(True)
    with torch.no_grad():  # the first half of the rows is right from the start
        batch["labels"][:4] = step(model, batch)[1]["logits"][:4]
    for _ in range(300):
        optimizer.zero_grad()
        loss, metrics, state = loss_of(model, batch)
        loss.backward()
        optimizer.step()
    assert state["halted"].tolist() == [True] * 4 + [False] * 4 and metrics["q_halt_loss"][0] / 8 < 0.2


def test_a_causal_run_halts_by_the_position_that_has_seen_the_whole_row(tmp_path):
    run("trm_deep", tmp_path, "--max_train_steps 1")
    config = load(tmp_path)["config"]
    assert config["causal"] and config["halt_position"] == -1
    for position, sees in ((-1, True), (0, False)):
        model = trm_deep.Model(trm_deep.Config(16, 16, 16, 2, 1, halt_position=position))
        torch.nn.init.normal_(model.q_head.weight)
        batch, other = trm_batch(), trm_batch()
        other["input_embeddings"][:, -1] += 1.0
        one, two = (step(model, each)[1]["q_halt_logits"] for each in (batch, other))
        assert torch.equal(one, two) is not sees


def test_the_halting_head_reads_the_answer_without_shaping_it():
    model, batch = trm(), trm_batch()
    torch.nn.init.normal_(model.q_head.weight)
    step(model, batch, enable_deep_supervision=True)[1]["q_halt_logits"].sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"q_head.weight", "q_head.bias"}


# ==== trm_deep.py: data ==============================================================================================


def test_the_built_in_world_follows_its_rule():
    """One story at a time, bit by bit, from the words of the docstring."""

    def tell(opening):
        story = [opening]
        for t in range(12):
            first = max(0, t - (1 + 2 * story[t][0] + story[t][1]))
            second = max(0, first - (1 + 2 * story[first][0] + story[first][1]))
            u = [story[t][i] if i % 2 == 0 else story[second][i] for i in range(16)]
            story.append([u[i - 1] ^ (u[i] | u[(i + 1) % 16]) for i in range(16)])
        return story

    train, val = trm_deep.make_world()
    for bits in (train["bits"][::5000], val["bits"][::500]):
        for story in bits:
            assert story.tolist() == tell(story[0].tolist())
    number = {split: stories["bits"][:, 0] @ (1 << np.arange(16)) for split, stories in (("t", train), ("v", val))}
    assert sorted(np.concatenate([number["t"], number["v"]])) == list(range(2**16))
    assert all(int(n) * 2654435761 // 128 % 16 == 0 for n in number["v"]) and len(number["v"]) > 4000


def test_a_sentence_is_right_when_its_signs_decode():
    Q = trm_deep.codebook(0).numpy()
    assert np.allclose(Q @ Q.T, np.eye(16), atol=1e-6)
    bits = np.random.default_rng(0).integers(0, 2, (2, 3, 16))
    labels = torch.from_numpy(((2 * bits - 1) @ Q * (96 / 16) ** 0.5).astype(np.float32))
    assert labels.square().mean().item() == pytest.approx(1.0, rel=1e-5)  # predicting zero scores 1
    wrong = labels.clone()
    wrong[1, 2] -= torch.from_numpy((2 * bits[1, 2, 5] - 1) * Q[5]).float() * 3  # one sign of one sentence turned over
    positions, rows = trm_deep.is_right(0.1 * wrong, labels, TrmArgs(data_folder=None))
    assert positions.tolist() == [[True] * 3, [True, True, False]] and rows.tolist() == [True, False]
    args = TrmArgs(halt_cosine=0.9)
    assert (
        trm_deep.is_right(0.1 * labels, labels, args)[1].all() and not trm_deep.is_right(-labels, labels, args)[1].any()
    )


def folder_with(folder, chunks):
    folder.mkdir(exist_ok=True)
    for name, value in chunks.items():
        if name.endswith(".npy"):
            np.save(folder / name, value)
        else:
            torch.save(value, folder / name)
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_chunks_are_read_in_numeric_order_memory_mapped(tmp_path, dtype):
    parts = {i: torch.randn(3, 5, 4).to(dtype) for i in (0, 2, 10)}
    chunks = {f"train_embeddings_chunk_{i}.pt": part for i, part in parts.items()}
    folder = folder_with(
        tmp_path, {**chunks, "val_embeddings_chunk_0.pt": torch.randn(2, 5, 4).to(dtype), "other.pt": 1}
    )
    train, val = trm_deep.open_folder(folder)
    assert torch.equal(train["sequence"][np.arange(9)], torch.cat([parts[0], parts[2], parts[10]]).float())
    assert len(val["sequence"]) == 2
    if Path("/proc/self/maps").exists():
        assert str(folder / "train_embeddings_chunk_10.pt") in Path("/proc/self/maps").read_text()


def test_npy_chunks_and_a_held_out_tenth(tmp_path):
    whole = np.random.default_rng(0).standard_normal((30, 4, 6)).astype(np.float16)
    chunks = {"train_embeddings_chunk_0.npy": whole[:21], "train_embeddings_chunk_1.npy": whole[21:]}
    train, val = trm_deep.open_folder(folder_with(tmp_path, chunks))
    assert np.array_equal(train["sequence"][np.arange(27)], whole[:27].astype(np.float32))
    assert np.array_equal(val["sequence"][np.arange(3)], whole[27:].astype(np.float32))


def test_attention_is_causal_whenever_labels_are_the_next_inputs(tmp_path):
    x = torch.randn(20, 7, 8)
    symbols = torch.randn(4, 8)[torch.randint(4, (20, 7))]
    symbols[0] = 0.0  # an empty puzzle agrees with itself at every shift
    cases = {
        "one": (x, True),
        "two_shifted": ({"input_embeddings": x[:, :-1].clone(), "labels": x[:, 1:].half().float()}, True),
        "two_types": ({"input_embeddings": x[:, :-1].bfloat16(), "labels": x[:, 1:].clone()}, True),
        "two_ahead": ({"input_embeddings": x[:, :-2].clone(), "labels": x[:, 2:].half()}, True),
        "separate": ({"input_embeddings": x, "labels": torch.randn(20, 7, 4)}, False),
        "puzzles": ({"input_embeddings": symbols, "labels": symbols.flip(0)}, False),
    }
    for name, (value, causal) in cases.items():
        if name == "two_shifted":
            value["input_embeddings"] = value["input_embeddings"].half().float()
        folder = folder_with(tmp_path / name, {"train_embeddings_chunk_0.pt": value})
        lines = run("trm_deep", tmp_path / f"run_{name}", f"--data_folder {folder}")
        assert load(tmp_path / f"run_{name}")["config"]["causal"] is causal
        assert lines[-1]["split"] == "final" and ("copy_loss" in lines[-1]) is (name != "separate")


x3 = torch.zeros(3, 5, 4)
BAD_FOLDERS = {
    "no such folder": None,
    "no training files": {"val_embeddings_chunk_0.pt": x3},
    "train_embeddings_chunk_1.pt: samples of shape": {
        "train_embeddings_chunk_0.pt": x3,
        "train_embeddings_chunk_1.pt": x3[:, :4],
    },
    "val_embeddings_chunk_0.pt: samples of shape": {
        "train_embeddings_chunk_0.pt": x3,
        "val_embeddings_chunk_0.pt": x3[..., :2],
    },
    "is torch.int64 [3, 5, 4], expected a float": {"train_embeddings_chunk_0.pt": x3.long()},
    "is torch.float32 [3, 5], expected": {"train_embeddings_chunk_0.pt": x3[..., 0]},
    "is torch.float32 [0, 5, 4], expected": {"train_embeddings_chunk_0.pt": x3[:0]},
    "holds keys ['labels'], expected": {"train_embeddings_chunk_0.pt": {"labels": x3}},
    "holds list, expected": {"train_embeddings_chunk_0.pt": [x3]},
    "is no plain tensor (Tensor), expected a float": {"train_embeddings_chunk_0.pt": x3.to_sparse()},
    "expected the same N and T": {"train_embeddings_chunk_0.pt": {"input_embeddings": x3, "labels": x3[:, 1:]}},
    "sequences of one embedding": {"train_embeddings_chunk_0.pt": x3[:, :1]},
    "one training sequence in all": {"train_embeddings_chunk_0.pt": x3[:1]},
    "sample 2 is not finite": {"train_embeddings_chunk_0.pt": torch.cat([x3[:1], x3[:2] / 0])},
    "cannot be read": {"train_embeddings_chunk_0.pt": Path},  # pickled code: refused by weights_only
}


@pytest.mark.parametrize("message", BAD_FOLDERS)
def test_bad_data_is_one_line_that_names_the_file(tmp_path, message):
    folder = tmp_path / "data"
    if BAD_FOLDERS[message]:
        folder_with(folder, BAD_FOLDERS[message])
    with pytest.raises(SystemExit) as stop:
        run("trm_deep", tmp_path / "run", f"--data_folder {folder}")
    text = stop.value.code
    assert text.startswith(f"error: {folder}") and message in text and "expected" in text and "\n" not in text
    assert not (tmp_path / "run").exists() or "finite" in message


def test_a_file_that_is_no_tensor_and_one_that_was_cut_short(tmp_path):
    torch.save(torch.randn(50, 5, 4), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for content in (b"", b"not a tensor", whole[: len(whole) // 2]):
        (tmp_path / "train_embeddings_chunk_0.pt").write_bytes(content)
        with pytest.raises(DataError, match="train_embeddings_chunk_0.pt: cannot be read .*, expected"):
            trm_deep.open_folder(tmp_path)


def test_a_trained_model_can_be_given_more_or_fewer_cycles(tmp_path, capsys):
    lines = run("trm_deep", tmp_path, "--eval_interval 6 --deep_supervision_schedule 0.5,1")
    capsys.readouterr()
    printed = []
    for flags in ("", "--H_cycles 1", "--H_cycles 4", "--halt_max_steps 1", "--L_cycles 2"):
        run("trm_deep", tmp_path, f"--eval_only {flags}", tiny=False)
        printed.append(re.search(r"after each H cycle: Steps: \[(.*)\]", capsys.readouterr().out)[1].split(", "))
    assert [len(losses) for losses in printed] == [2, 1, 4, 2, 2]
    # With one supervision step from the start, the first cycles are the same, however many come after.
    whole, one, four, single, _ = printed
    assert whole[-1] == f"'{lines[-1]['best_loss']:.4f}'" and len({tuple(each) for each in printed}) == 5
    run("trm_deep", tmp_path, "--eval_only --H_cycles 1 --halt_max_steps 1", tiny=False)
    assert f"Steps: [{single[0]}]" in capsys.readouterr().out


# ==== trm_deep.py: prediction ========================================================================================


def test_predict_rolls_out_the_final_head_on_its_own_predictions(tmp_path):
    run("trm_deep", tmp_path / "run", "--hidden_size 96")
    prefix = np.random.default_rng(0).standard_normal((2, 4, 96)).astype(np.float32)
    np.save(tmp_path / "in.npy", prefix)
    words = f"--eval_only --predict {tmp_path / 'in.npy'} {tmp_path / 'out.npy'} --rollout 3"
    run("trm_deep", tmp_path / "run", words, tiny=False)

    checkpoint = load(tmp_path / "run", "best.pt")
    model = trm_deep.Model(trm_deep.Config(**checkpoint["config"])).eval()
    model.load_state_dict(checkpoint["model"])
    sequence = torch.from_numpy(prefix)
    with torch.no_grad():
        for _ in range(3):
            carry, batch = None, {"input_embeddings": sequence}
            for _ in range(3):  # --halt_max_steps 3
                carry, outputs = step(model, batch, carry)
            sequence = torch.cat([sequence, outputs["logits"][:, -1:]], 1)
    rolled = np.load(tmp_path / "out.npy")
    assert rolled.shape == (2, 3, 96) and np.allclose(rolled, sequence[:, 4:].numpy(), atol=1e-5)

    with pytest.raises(SystemExit, match="out.npy: exists already"):
        run("trm_deep", tmp_path / "run", words, tiny=False)
    np.save(tmp_path / "one.npy", prefix[0])
    run("trm_deep", tmp_path / "run", f"--eval_only --predict {tmp_path / 'one.npy'} {tmp_path / 'o.npy'}", tiny=False)
    assert np.allclose(np.load(tmp_path / "o.npy"), rolled[0, :1], atol=1e-5)
    for name, content in {"zip": b"PK and no zip", "text": b"1 2 3"}.items():
        (tmp_path / f"{name}.npy").write_bytes(content)
        with pytest.raises(SystemExit, match=f"{name}.npy: cannot be read"):
            run(
                "trm_deep",
                tmp_path / "run",
                f"--eval_only --predict {tmp_path / name}.npy {tmp_path / 'b.npy'}",
                tiny=False,
            )
    np.save(tmp_path / "complex.npy", prefix * 1j)
    with pytest.raises(SystemExit, match="complex.npy: holds torch.complex64, expected floats"):
        run("trm_deep", tmp_path / "run", f"--eval_only --predict {tmp_path}/complex.npy {tmp_path}/b.npy", tiny=False)
    np.save(tmp_path / "bad.npy", prefix[..., :5])
    with pytest.raises(SystemExit, match="bad.npy: shape .2, 4, 5., expected"):
        run(
            "trm_deep",
            tmp_path / "run",
            f"--eval_only --predict {tmp_path / 'bad.npy'} {tmp_path / 'b.npy'}",
            tiny=False,
        )


# ==== nepa_deep.py: the model ========================================================================================

VIT = {"image_size": 12, "patch_size": 4, "hidden_size": 16, "num_layers": 3, "num_heads": 2, "layerscale_value": 0.5}


def vit(seed=0, **changes):
    """A small model away from its initialisation: biases, norms and scales differ from entry to entry."""
    torch.manual_seed(seed)
    model = nepa_deep.Model(nepa_deep.Config(**{**VIT, **changes}))
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.2 * torch.randn_like(p)
    return model


def pictures(B=2, height=12, width=12, seed=1):
    return torch.randn(B, 3, height, width, generator=torch.Generator().manual_seed(seed))


def reference_vit(model, image, scale=1.0):
    """The specification, one image, one position and one head at a time, float64: embedding, states, prediction."""
    c = model.config
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    P, D, d = c.patch_size, c.hidden_size, c.hidden_size // c.num_heads
    rows, columns = image.shape[1] // P, image.shape[2] // P

    def norm(v, gain=1.0, shift=0.0):
        return (v - v.mean()) / ((v - v.mean()).pow(2).mean() + c.norm_eps).sqrt() * gain + shift

    def linear(v, name):
        return w[f"{name}.weight"] @ v + w[f"{name}.bias"]

    def turn(v, position):
        if position == 0:  # CLS
            return v
        row, column = divmod(position - 1, columns)
        y, x = scale * (2 * (row + 0.5) / rows - 1), scale * (2 * (column + 0.5) / columns - 1)
        f = [c.rope_theta ** (-4 * j / d) for j in range(d // 4)]
        angles = [2 * math.pi * y * value for value in f] + [2 * math.pi * x * value for value in f]
        out = v.clone()
        for j, a in enumerate(angles):
            out[j] = v[j] * math.cos(a) - v[j + d // 2] * math.sin(a)
            out[j + d // 2] = v[j + d // 2] * math.cos(a) + v[j] * math.sin(a)
        return out

    def block(h, name):
        q, k, v = [], [], []
        for t, state in enumerate(h):
            qkv = linear(norm(state, w[f"{name}.norm1.weight"], w[f"{name}.norm1.bias"]), f"{name}.qkv")
            for part, out in enumerate((q, k, v)):
                heads = list(qkv[part * D : (part + 1) * D].split(d))
                if part < 2:
                    if c.qk_norm_affine:
                        affine = [w[f"{name}.{'qk'[part]}_norm.{kind}"] for kind in ("weight", "bias")]
                        heads = [norm(head, *affine) for head in heads]
                    elif c.qk_norm:
                        heads = [norm(head) for head in heads]
                    heads = [turn(head, t) for head in heads]
                out.append(heads)
        out = []
        for t, state in enumerate(h):
            mixed = []
            for head in range(c.num_heads):
                scores = torch.stack([q[t][head] @ k[s][head] for s in range(t + 1)]) / d**0.5
                mixed.append(sum(p * v[s][head] for s, p in enumerate(torch.softmax(scores, 0))))
            state = state + w[f"{name}.scale1"] * linear(torch.cat(mixed), f"{name}.o")
            up = linear(norm(state, w[f"{name}.norm2.weight"], w[f"{name}.norm2.bias"]), f"{name}.up")
            if c.gated_mlp:
                gate, up = up[: c.mlp_hidden], up[c.mlp_hidden :]
                inner = gate / (1 + torch.exp(-gate)) * up
            else:
                inner = up * 0.5 * (1 + torch.erf(up / 2**0.5))
            out.append(state + w[f"{name}.scale2"] * linear(inner, f"{name}.down"))
        return out

    h = [w["cls_token"][0, 0]]
    for row in range(rows):
        for column in range(columns):
            patch = image[:, row * P : (row + 1) * P, column * P : (column + 1) * P].double()
            h.append((w["patch.weight"] * patch).sum((1, 2, 3)) + w["patch.bias"])
    embedding, states = torch.stack(h), []
    for i in range(c.num_layers):
        h = block(h, f"layers.{i}")
        states.append(torch.stack(h))
    return embedding, states, torch.stack([norm(state, w["norm.weight"], w["norm.bias"]) for state in h])


KINDS = [{}, {"gated_mlp": True, "mlp_hidden": 10}, {"qk_norm": False}, {"qk_norm_affine": True}]


@pytest.mark.parametrize("changes", KINDS)
def test_vit_equals_the_slow_reference(changes):
    model, images = vit(**changes).eval(), pictures(width=20)
    for scale in (1.0, 1.7):
        output = model(images, scale)
        for b in range(len(images)):
            embedding, states, prediction = reference_vit(model, images[b], scale)
            torch.testing.assert_close(output.embedding[b].detach().double(), embedding, atol=1e-6, rtol=1e-5)
            for mine, right in zip(output.hidden_states, states, strict=True):
                torch.testing.assert_close(mine[b].detach().double(), right, atol=5e-6, rtol=1e-5)
            torch.testing.assert_close(output.prediction[b].detach().double(), prediction, atol=5e-6, rtol=1e-5)


def test_positions_are_stretched_in_training_only_and_within_the_range(monkeypatch):
    model, scales = vit(), []
    real = nepa_deep.rotary
    monkeypatch.setattr(nepa_deep, "rotary", lambda *inputs: (scales.append(float(inputs[4])), real(*inputs))[1])
    for _ in range(200):
        model(pictures(1))
    assert 0.5 <= min(scales) < 0.6 and 1.7 < max(scales) <= 2.0
    assert np.mean(np.log(scales)) == pytest.approx(0, abs=0.1)  # uniform in the logarithm
    model.eval()(pictures(1))
    assert scales[-1] == 1.0


def test_vit_initialisation():
    torch.manual_seed(0)
    model = nepa_deep.Model(nepa_deep.Config(image_size=8, patch_size=4, hidden_size=192, num_layers=2, num_heads=3))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif "norm" in name:
            assert (p == 1).all()
        elif "scale" in name:
            assert (p == 1e-5).all()
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.15), name
    assert model.config.mlp_hidden == 768


@pytest.mark.parametrize(
    "changes,message",
    [({"num_heads": 3}, "multiple of 4 \\* num_heads = 12"), ({"image_size": 13}, "multiple of patch")],
)
def test_a_config_that_does_not_divide_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        vit(**changes)


def test_changing_a_patch_changes_no_prediction_before_it():
    model, images = vit().eval(), pictures(1)
    before = model(images)
    for k in range(9):  # patch k is position k + 1
        changed = images.clone()
        changed[:, :, 4 * (k // 3) : 4 * (k // 3) + 4, 4 * (k % 3) : 4 * (k % 3) + 4] += 1
        after = model(changed)
        for a, b in zip([before.prediction, *before.hidden_states], [after.prediction, *after.hidden_states]):
            assert torch.equal(a[:, : k + 1], b[:, : k + 1])
            assert (a[:, k + 1 :] != b[:, k + 1 :]).any(-1).all()


def test_checkpointing_blocks_gives_the_same_gradient():
    gradients = []
    for grad_checkpoint in (False, True):
        model = vit()
        model.grad_checkpoint = grad_checkpoint
        nepa_deep.intermediate_loss(*model(pictures(), 1.3))[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(g is not None and g.abs().sum() > 0 for g in gradients[0])
    torch.testing.assert_close(*gradients)


def loss_at(model, images, every_layer):
    """The loss with or without the layers before the last."""
    output = model(images, 1.0)
    states = output.hidden_states if every_layer else []
    return nepa_deep.intermediate_loss(output.embedding, states, output.prediction)[0]


def gradient_norm(model, images, every_layer):
    model.zero_grad()
    loss_at(model, images, every_layer).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()


@pytest.mark.parametrize("every_layer", [False, True])
@pytest.mark.parametrize("layerscale", [1e-5, 1.0])
def test_blank_patches_keep_the_gradient_sane_at_init(layerscale, every_layer):
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 4, "hidden_size": 64, "num_layers": 4, "num_heads": 2}
    model = nepa_deep.Model(nepa_deep.Config(**sizes, layerscale_value=layerscale))
    ordinary = gradient_norm(model, pictures(2, 32, 32), every_layer)
    half = pictures(2, 32, 32)
    half[:, :, 16:] = 0
    for images in (torch.zeros(2, 3, 32, 32), torch.full((2, 3, 32, 32), 128 / 127.5 - 1), half):
        assert gradient_norm(model, images, every_layer) < 100 * ordinary  # without the guard: 1e6 and more


def test_the_guard_against_blank_patches_leaves_ordinary_ones_alone():
    torch.manual_seed(0)
    model = nepa_deep.Model(nepa_deep.Config(image_size=32, patch_size=4, hidden_size=64, num_layers=1, num_heads=2))
    images = nepa_deep.prepare({"images": torch.tensor(nepa_deep.make_world(0)[1]["images"])}, 32)
    patches = F.conv2d(images, model.patch.weight, model.patch.bias, stride=4).flatten(2).transpose(1, 2)
    assert torch.equal(model.embed(images)[:, 1:], patches)


# ==== nepa_deep.py: published weights ================================================================================


def official_weights(model):
    """The model's weights under the published names, written down here a second time."""
    weights, D, c = {}, model.config.hidden_size, model.config
    for name, p in model.state_dict().items():
        kind = name.rsplit(".", 1)[-1]
        if not name.startswith("layers."):
            module = {"cls_token": "embeddings.cls_token", "norm": f"layernorm.{kind}"}
            module["patch"] = f"embeddings.patch_embeddings.projection.{kind}"
            weights["vit_nepa." + module[name.split(".")[0]]] = p
            continue
        _, i, part, *_ = name.split(".")
        at = f"vit_nepa.encoder.layer.{i}"
        if part == "qkv":
            for j, theirs in enumerate(("query", "key", "value")):
                weights[f"{at}.attention.attention.{theirs}.{kind}"] = p[j * D : (j + 1) * D]
        elif part == "up" and c.gated_mlp:
            weights[f"{at}.intermediate.gate_proj.{kind}"] = p[: c.mlp_hidden]
            weights[f"{at}.intermediate.up_proj.{kind}"] = p[c.mlp_hidden :]
        else:
            theirs = {
                "up": f"intermediate.up_proj.{kind}",
                "o": f"attention.output.dense.{kind}",
                "down": f"output.dense.{kind}",
                "norm1": f"layernorm_before.{kind}",
                "norm2": f"layernorm_after.{kind}",
                "scale1": "layer_scale.lambda1",
                "scale2": "output.layer_scale.lambda1",
                "q_norm": f"attention.attention.q_norm.{kind}",
                "k_norm": f"attention.attention.k_norm.{kind}",
            }
            weights[f"{at}.{theirs[part]}"] = p
    return weights


def official_config(**changes):
    names = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "mlp_hidden": "intermediate_size"}
    names["gated_mlp"] = "use_gated_mlp"
    config = {names.get(name, name): value for name, value in {**VIT, "mlp_hidden": 64, **changes}.items()}
    return {**config, "hidden_act": "silu" if changes.get("gated_mlp") else "gelu", "is_causal": True, "qkv_bias": True}


@pytest.mark.parametrize("changes", KINDS)
def test_published_weights_load_by_their_names(changes):
    model = vit(**changes)
    loaded = nepa_deep.from_official(official_config(**changes), official_weights(model))
    assert same(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded.eval()(pictures()).prediction, model.eval()(pictures()).prediction)


def test_published_weights_that_do_not_fit_are_named():
    weights, config = official_weights(vit()), official_config()
    norm = "vit_nepa.layernorm.weight"
    with pytest.raises(ValueError, match="no weight layernorm.weight"):
        nepa_deep.from_official(config, {name: value for name, value in weights.items() if name != norm})
    with pytest.raises(ValueError, match=r"layernorm.weight is \[3\], expected \[16\]"):
        nepa_deep.from_official(config, {**weights, norm: np.ones(3, np.float32)})
    at = "vit_nepa.encoder.layer.0.attention.attention."
    shifted = {f"{at}query.bias": np.ones(20), f"{at}key.bias": np.ones(12)}  # together of the right size
    with pytest.raises(ValueError, match=r"query.bias is \[20\], expected \[16\]"):
        nepa_deep.from_official(config, {**weights, **shifted})
    with pytest.raises(ValueError, match="unknown weight decoder.bias"):
        nepa_deep.from_official(config, {**weights, "vit_nepa.decoder.bias": np.ones(3)})
    nepa_deep.from_official(config, {**weights, "vit_nepa.pooler.dense.bias": np.ones(16)})
    for name, value in {"is_causal": False, "qkv_bias": False, "hidden_act": "relu"}.items():
        with pytest.raises(ValueError, match=f"{name} .*expected"):
            nepa_deep.from_official({**config, name: value}, weights)


def test_a_run_starts_from_given_weights(tmp_path, capsys):
    sizes = "--hidden_size 16 --num_layers 3 --num_heads 2 --patch_size 4 --lr 0 --weight_decay 0 --ema_decay 0"
    weights = official_weights(vit())
    torch.save(weights, tmp_path / "weights.pt")
    np.savez(tmp_path / "weights.npz", **{"w:" + name: value.numpy() for name, value in weights.items()}, loss=1.0)
    for file in ("weights.pt", "weights.npz"):
        run("nepa_deep", tmp_path / file[-2:], f"{sizes} --init_from {tmp_path / file} --max_train_steps 3")
        assert same(load(tmp_path / file[-2:])["model"], vit().state_dict())
        (tmp_path / file).unlink()  # resuming needs the checkpoint alone
        run("nepa_deep", tmp_path / file[-2:], "--resume --max_train_steps 4", tiny=False)
    torch.save([1], tmp_path / "list.pt")
    torch.save({0: torch.ones(16)}, tmp_path / "number.pt")
    torch.save({**weights, "x": weights["vit_nepa.layernorm.weight"]}, tmp_path / "more.pt")
    (tmp_path / "cut.npz").write_bytes(b"PK")
    messages = {
        "list.pt": "holds list, expected a state dict",
        "number.pt": "0 is Tensor, expected tensors by name",
        "more.pt": "unknown weight x",
        "cut.npz": "cannot be read",
    }
    for file, message in messages.items():
        with pytest.raises(SystemExit) as exit_:
            run("nepa_deep", tmp_path / "bad", f"{sizes} --init_from {tmp_path / file}")
        assert str(exit_.value).startswith(f"error: {tmp_path / file}: ") and message in str(exit_.value)
        assert "\n" not in str(exit_.value)


@pytest.mark.parametrize("path", dumps("vit_nepa.layernorm.weight"))
def test_parity_with_the_published_vit(path):
    """States within 5e-6, losses within 1e-6, gradient norms within 1e-5 of their size."""
    dump = np.load(path)
    weights = {name[2:]: dump[name] for name in dump.files if name.startswith("w:")}
    model = nepa_deep.from_official(json.loads(str(dump["config"])), weights).eval()
    output = model(torch.tensor(dump["pixel_values"]))
    states = {"input_embedding": output.embedding, "last_hidden_state": output.prediction}
    states |= {f"h{i}": state for i, state in enumerate(output.hidden_states, start=1)}
    for name, state in states.items():
        torch.testing.assert_close(state.detach(), torch.tensor(dump[name]), atol=5e-6, rtol=0)
    total, final, layers = nepa_deep.intermediate_loss(*output)
    assert final.item() == pytest.approx(float(dump["loss"]), abs=1e-6)
    assert sum(layers).item() / len(layers) == pytest.approx(float(dump["loss_intermediate"]), abs=1e-6)
    for loss, name in ((total, "total"), (final, "loss")):
        model.zero_grad()
        loss.backward(retain_graph=True)
        norm = torch.stack([p.grad.double().norm() for p in model.parameters()]).norm().item()
        assert norm == pytest.approx(float(dump[f"grad_norm_{name}"]), rel=1e-5)


# ==== nepa_deep.py: the loss =========================================================================================


def reference_loss(target, prediction):
    """Position by position, float64."""
    B, T, _ = target.shape
    cosines = []
    for b in range(B):
        for t in range(T - 1):
            a, p = target[b, t + 1].detach().double(), prediction[b, t].double()
            cosines.append((a @ p) / (a @ a).sqrt() / (p @ p).sqrt())
    return -sum(cosines) / len(cosines)


def test_every_layer_but_the_last_counts_in_the_intermediate_loss():
    model = vit()
    output = model(pictures(), 1.0)
    layers = [reference_loss(output.embedding, h) for h in output.hidden_states[:-1]]
    final = reference_loss(output.embedding, output.prediction)
    expected = final + 0.7 * (layers[0] + layers[1]) / 2
    loss, loss_final, values = nepa_deep.intermediate_loss(*output, weight=0.7)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert loss_final.item() == pytest.approx(final.item(), abs=1e-6)
    assert [v.item() for v in values] == pytest.approx([v.item() for v in layers], abs=1e-6)
    assert nepa_deep.prediction_loss(output.embedding, output.prediction).item() == pytest.approx(
        final.item(), abs=1e-6
    )
    # The same gradient too: it sees whether the target is detached and whether a layer counts that should not.
    alone = nepa_deep.prediction_loss(output.embedding, output.prediction)
    for mine, right in ((loss, expected), (loss_final, final), (alone, final)):
        mine, right = (
            torch.autograd.grad(each, list(model.parameters()), retain_graph=True, allow_unused=True)
            for each in (mine, right)
        )
        for a, b in zip(mine, right):
            torch.testing.assert_close(a, b.float(), atol=1e-6, rtol=1e-4)


def test_one_layer_or_no_states_leave_the_final_loss_alone():
    output = vit(num_layers=1)(pictures(), 1.0)
    assert nepa_deep.intermediate_loss(*output)[0] == nepa_deep.intermediate_loss(*output)[1]
    output = vit()(pictures(), 1.0)
    loss, loss_final, layers = nepa_deep.intermediate_loss(output.embedding, [], output.prediction)
    assert loss is loss_final and layers == []


def test_the_losses_stay_finite_at_zero_and_know_their_range():
    zero, x = torch.zeros(1, 4, 8, requires_grad=True), torch.randn(1, 4, 8)
    for loss in (nepa_deep.prediction_loss, lambda a, b: nepa_deep.intermediate_loss(a, [], b)[0]):
        assert loss(x, zero).item() == 0 and loss(zero, x).item() == 0
        (gradient,) = torch.autograd.grad(loss(x, zero), zero)
        assert gradient.isfinite().all()
        shifted = torch.cat([x[:, 1:], x[:, :1]], 1)  # predicts at t what stands at t + 1
        assert loss(x, 3 * shifted).item() == pytest.approx(-1) and loss(x, -shifted).item() == pytest.approx(1)


def test_the_nepa_losses_run_when_pasted_elsewhere():
    output = vit()(pictures(), 1.0)
    for function, inputs in ((nepa_deep.prediction_loss, output[::2]), (nepa_deep.intermediate_loss, output)):
        scope = {"torch": torch, "F": F}
        exec(inspect.getsource(function), scope)
        pasted, here = scope[function.__name__](*inputs), function(*inputs)
        assert same(pasted, here)


@pytest.mark.parametrize("amp", [False, True])
def test_the_intermediate_loss_keeps_almost_nothing_more_for_backward(amp):
    model = vit(image_size=32, hidden_size=96, num_heads=3, num_layers=12)

    def saved(every_layer):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return saved_bytes(lambda: loss_at(model, pictures(4, 32, 32), every_layer), model)

    growth = saved(True) / saved(False) - 1
    assert 0 < growth <= 0.005


def test_the_intermediate_loss_weight_and_its_metrics(tmp_path):
    on = run("nepa_deep", tmp_path / "on", "--intermediate_loss_weight 0.5 --grad_accum 2")
    for line in on:
        layers = [line["loss_layer_1"], line["loss_layer_2"]]
        assert line["loss_intermediate"] == pytest.approx(sum(layers) / 2, abs=1e-6) and "loss_layer_3" not in line
        assert line["loss"] == pytest.approx(line["loss_final"] + 0.5 * line["loss_intermediate"], abs=1e-6)
    off = run("nepa_deep", tmp_path / "off", "--use_intermediate_loss False")
    train, val = ([line for line in off if line["split"] == split] for split in ("train", "val"))
    assert all(line["loss"] == line["loss_final"] and "loss_intermediate" not in line for line in train)
    assert all(line["loss"] == line["loss_final"] and "loss_intermediate" in line for line in val)  # as a diagnosis
    names = {"loss_layer_1", "loss_layer_2", "copy_loss", "constant_loss", "knn_acc", "probe_acc"}
    assert names | {"embed_cos", "effective_rank"} <= val[0].keys()
    assert {prefix + name for prefix in ("raw_", "untrained_") for name in ("knn_acc", "probe_acc")} <= off[-1].keys()


def test_every_micro_batch_of_an_update_sees_one_rope_scale(tmp_path, monkeypatch):
    scales, real = [], nepa_deep.rotary

    def spy(rows, columns, d, theta, scale, device):
        scales.append(float(scale))
        return real(rows, columns, d, theta, scale, device)

    monkeypatch.setattr(nepa_deep, "rotary", spy)
    run("nepa_deep", tmp_path, "--grad_accum 2 --eval_interval 100 --probe_samples 10 --eval_samples 8")
    train = [scale for scale in scales if scale != 1.0]
    assert len(train) == 12 and train[::2] == train[1::2] and len(set(train)) == 6


# ==== nepa_deep.py: data =============================================================================================


def test_the_built_in_textures():
    train, val = nepa_deep.make_world(0)
    images, labels = train["images"], train["labels"]
    assert images.shape == (8000, 32, 32, 3) and len(val["images"]) == 2000 and images.dtype == np.uint8
    assert (np.abs(np.bincount(np.concatenate([labels, val["labels"]])) - 1000) == 0).all()
    patches = images.reshape(-1, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 48)
    assert (patches.min(1) < patches.max(1)).all()  # none is constant
    assert ((images == 0) | (images == 255)).mean() < 0.05
    assert not np.array_equal(nepa_deep.make_world(1)[0]["images"], images)
    # A label means an orientation and a period: of the spectrum's mass more than half lies near that wave.
    rng = np.random.default_rng(0)
    fy, fx = np.meshgrid(np.fft.fftfreq(32), np.fft.fftfreq(32), indexing="ij")
    angle = np.rad2deg(np.arctan2(fy, fx)) % 180
    for label in range(10):
        power = np.abs(np.fft.fft2(nepa_deep.textures(rng, np.full(100, label)))).mean(0) ** 2
        period = 1 / (np.hypot(fy, fx) * power).sum() * power.sum()
        assert (3.5 < period < 7) if label < 5 else (6 < period < 12)
        if label % 5 < 4:
            off = np.abs((angle - 45 * (label % 5) + 90) % 180 - 90)
            assert power[off < 30].sum() > 0.6 * power.sum()


def cifar_folder(folder, sizes=(12, 8), test=6, inside=""):
    """Random CIFAR-10 binary batches; returns images [N, 32, 32, 3] and labels of the training part."""
    rng, home = np.random.default_rng(0), Path(folder) / inside
    home.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, size in [(f"data_batch_{i}", size) for i, size in enumerate(sizes, 1)] + [("test_batch", test)]:
        records = rng.integers(256, size=(size, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(size) % 10
        if size:
            records.tofile(home / f"{name}.bin")
        parts.append(records)
    records = np.concatenate(parts[:-1])
    images = np.zeros((len(records), 32, 32, 3), np.uint8)
    for n, record in enumerate(records):
        for channel in range(3):
            images[n, :, :, channel] = record[1 + 1024 * channel : 1 + 1024 * (channel + 1)].reshape(32, 32)
    return images, records[:, 0]


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"])
def test_cifar_binary_batches_are_read_as_images(tmp_path, inside):
    images, labels = cifar_folder(tmp_path, inside=inside)
    train, val = nepa_deep.open_images(tmp_path)
    index = np.array([19, 0, 12, 11])
    assert np.array_equal(train["images"][index].numpy(), images[index]) and train["images"][index].dtype == torch.uint8
    assert np.array_equal(train["labels"], labels) and len(val["images"]) == 6
    lines = run("nepa_deep", tmp_path / "run", f"--data_dir {tmp_path} --batch_size 4")
    assert lines[-1]["split"] == "final"


def test_arrays_are_memory_maps_and_one_image_of_ten_is_held_out(tmp_path):
    images, labels = cifar_folder(tmp_path / "elsewhere", sizes=(25,))
    np.save(tmp_path / "images.npy", images[:, :24])  # not square: the middle is used
    np.save(tmp_path / "labels.npy", labels.astype(np.int16))
    train, val = nepa_deep.open_images(tmp_path)
    kept = nepa_deep.HeldOut(np.arange(25), False)[np.arange(23)]
    out = nepa_deep.HeldOut(np.arange(25), True)[np.arange(2)]
    assert sorted([*kept, *out]) == list(range(25)) and out[0] < 10 <= out[1] < 20
    assert len(train["images"]) == 23 and len(val["images"]) == 2
    assert np.array_equal(train["images"][np.arange(23)], images[kept, :24])
    assert val["labels"][np.arange(2)].tolist() == labels[out].tolist()
    assert isinstance(train["images"].array, np.memmap)
    lines = run("nepa_deep", tmp_path / "run", f"--data_dir {tmp_path} --batch_size 4")
    assert lines[-1]["split"] == "final" and load(tmp_path / "run")["config"]["image_size"] == 24
    np.save(tmp_path / "val_images.npy", images[:5, :24])
    np.save(tmp_path / "val_labels.npy", labels[:5])
    assert [len(part["images"]) for part in nepa_deep.open_images(tmp_path)] == [25, 5]


def test_labels_that_come_in_turn_are_all_held_out_and_all_probed():
    labels = np.arange(10_000) % 10
    for held_out, size in ((False, 9000), (True, 1000)):
        part = nepa_deep.HeldOut(labels, held_out)
        assert len(part) == size and np.bincount(part[np.arange(size)]).min() > 0.07 * size
    data = {"train": {"images": np.zeros((10_000, 1)), "labels": labels}, "collate": None}
    args = parsed("nepa_deep", "--device cpu --probe_samples 1000")
    seen = torch.cat([batch["labels"] for batch in nepa_deep.probe_batches(data, args)])
    assert len(seen) == 1000 and seen.bincount().min() > 70


def arrays(images=None, labels=None):
    def make(folder):
        np.save(folder / "images.npy", np.zeros((20, 8, 8, 3), np.uint8) if images is None else images)
        np.save(folder / "labels.npy", np.zeros(20, np.int64) if labels is None else labels)

    return make


def binary(contents, name="data_batch_1.bin"):
    def make(folder):
        (folder / name).write_bytes(contents)

    return make


BAD_IMAGES = {
    "no images, expected images.npy or data_batch_": lambda folder: None,
    "data_batch_1.bin: 3072 bytes, expected records of 3073": binary(b"\0" * 3072),
    "data_batch_1.bin: 0 bytes": binary(b""),
    "data_batch_1.bin: record 1 has label 10, expected 0 to 9": binary(b"\0" * 3073 + b"\x0a" + b"\0" * 3072),
    "9 images, expected 10 or more": arrays(np.zeros((9, 8, 8, 3), np.uint8), np.zeros(9, np.int64)),
    "images.npy: float64 [20, 8, 8, 3], expected uint8": arrays(images=np.zeros((20, 8, 8, 3))),
    "images.npy: uint8 [20, 8, 8], expected uint8 [N, H, W, C]": arrays(images=np.zeros((20, 8, 8), np.uint8)),
    "images.npy: uint8 [0, 8, 8, 3], expected": arrays(images=np.zeros((0, 8, 8, 3), np.uint8)),
    "images.npy: cannot be read": arrays(images=np.array([None, {}], dtype=object)),
    "labels.npy: float64 [20], expected integers [N]": arrays(labels=np.zeros(20)),
    "labels.npy: 19 labels, expected 20": arrays(labels=np.zeros(19, np.int64)),
    "labels.npy: entry 3 is -1, expected classes": arrays(labels=np.array([0, 1, 2, -1] * 5)),
    "labels.npy: entry 1 is 10000, expected classes": arrays(labels=np.array([0, 10_000] * 10)),
    "images are 9 x 9 x 3, expected --patch_size 8 to divide a side": arrays(images=np.zeros((20, 9, 9, 3), np.uint8)),
}


@pytest.mark.parametrize("message", BAD_IMAGES)
def test_bad_images_are_one_line_that_names_the_file(tmp_path, message):
    BAD_IMAGES[message](tmp_path)
    with pytest.raises(SystemExit) as exit_:
        run("nepa_deep", tmp_path / "run", f"--data_dir {tmp_path}")
    assert str(exit_.value).startswith(f"error: {tmp_path}") and message in str(exit_.value)
    assert "\n" not in str(exit_.value) and not (tmp_path / "run").exists()


def test_labels_without_a_file_and_validation_images_of_another_shape(tmp_path):
    arrays()(tmp_path)
    np.save(tmp_path / "val_images.npy", np.zeros((5, 16, 8, 3), np.uint8))
    for message in ("val_labels.npy: cannot be read", "validation images [16, 8, 3], expected [8, 8, 3]"):
        with pytest.raises(DataError) as error:
            nepa_deep.open_images(tmp_path)
        assert message in str(error.value)
        np.save(tmp_path / "val_labels.npy", np.zeros(5, np.int64))


# ==== nepa_deep.py: crops ============================================================================================


def test_resizing_is_torchs_antialiased_one_and_cuts_the_middle():
    images = torch.randint(256, (2, 20, 20, 3), dtype=torch.uint8)
    for size in (32, 20, 9):
        wanted = F.interpolate(images.permute(0, 3, 1, 2).float(), size, mode="bilinear", antialias=True) / 127.5 - 1
        torch.testing.assert_close(nepa_deep.prepare({"images": images}, size), wanted, atol=1e-4, rtol=1e-4)
    wide = torch.cat([torch.zeros(2, 20, 7, 3), images, torch.zeros(2, 20, 7, 3)], 2).to(torch.uint8)
    assert torch.equal(nepa_deep.prepare({"images": wide}, 20), nepa_deep.prepare({"images": images}, 20))


def test_a_crop_is_the_slow_average_of_its_pixels():
    image = torch.randint(256, (1, 10, 14, 3), dtype=torch.uint8)
    top, left, height, width = 1.3, 2.6, 6.5, 9.1
    for flipped in (0.0, 1.0):
        box = torch.tensor([[top, left, height, width, flipped]])
        mine = nepa_deep.prepare({"images": image, "boxes": box}, 4)[0]
        for i in range(4):
            for j in range(4):
                total = weight = 0.0
                for y in range(10):
                    for x in range(14):
                        dy = abs(y + 0.5 - (top + (i + 0.5) * height / 4)) / (height / 4)
                        dx = abs(x + 0.5 - (left + (j + 0.5) * width / 4)) / (width / 4)
                        share = max(0.0, 1 - dy) * max(0.0, 1 - dx)
                        total, weight = total + share * image[0, y, x].double(), weight + share
                at = 3 - j if flipped else j
                torch.testing.assert_close(mine[:, i, at].double(), total / weight / 127.5 - 1, atol=1e-5, rtol=1e-5)


def test_crop_boxes_follow_the_position_and_the_flags():
    args = parsed("nepa_deep", "--crop_scale 0.5 --flip_prob 0.3")
    boxes = nepa_deep.crop_boxes(np.arange(20_000), 40, 60, args)
    top, left, height, width, flip = boxes.T
    assert boxes.dtype == np.float32 and (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 40 + 1e-4).all() and (left + width <= 60 + 1e-4).all()
    uncut = (height < 40) & (width < 60)
    area, ratio = height * width / 2400, (width / height)[uncut]
    assert 0.5 <= area.min() + 1e-6 < 0.51 and area.max() > 0.99 and area.mean() == pytest.approx(0.75, abs=0.01)
    assert 0.74 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.34
    assert flip.mean() == pytest.approx(0.3, abs=0.02)
    assert np.corrcoef(np.stack([top / (40.01 - height), left / (60.01 - width), flip]))[0, 1:] == pytest.approx(
        0, abs=0.03
    )
    assert np.array_equal(nepa_deep.crop_boxes(np.array([7, 3]), 40, 60, args), boxes[[7, 3]])
    args.seed = 1
    assert not np.array_equal(nepa_deep.crop_boxes(np.array([7, 3]), 40, 60, args), boxes[[7, 3]])
    args.crop_scale = 1.0  # no crop at all
    assert nepa_deep.crop_boxes(np.arange(9), 40, 60, args)[:, :4] == pytest.approx(np.array([[0, 0, 40, 60]] * 9))


# ==== nepa_deep.py: the download =====================================================================================


class Served:
    """A server on the loopback that serves one file, honours Range, and may hang up early."""

    def __init__(self, contents, hang_up_after=None, ranges=True):
        served = self
        self.contents, self.hang_up_after, self.ranges, self.asked = contents, hang_up_after, ranges, []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                wanted = self.headers.get("Range") if served.ranges else None
                served.asked.append(wanted)
                start = int(wanted[len("bytes=") : -1]) if wanted else 0
                if start >= len(served.contents):
                    return self.send_error(416)
                self.send_response(206 if wanted else 200)
                self.send_header("Content-Length", str(len(served.contents) - start))
                self.end_headers()
                self.wfile.write(served.contents[start : served.hang_up_after])

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/cifar.tar.gz"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def archive(tmp_path, names=None):
    """A gzipped tar: of CIFAR-10-like files, or with one small file of each of these names."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        if names is None:
            cifar_folder(tmp_path / "made")
            tar.add(tmp_path / "made", "cifar-10-batches-bin")
        for name in names or ():
            entry = tarfile.TarInfo(name)
            entry.size = 3
            tar.addfile(entry, io.BytesIO(b"abc"))
    return packed.getvalue()


def md5(contents):
    return hashlib.md5(contents).hexdigest()


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on_where_it_stopped(tmp_path, ranges):
    contents, folder = archive(tmp_path), tmp_path / "data"
    half = len(contents) // 2
    with Served(contents, hang_up_after=half, ranges=ranges) as server:
        with pytest.raises(DataError, match=rf"ended after {half} of {len(contents)} bytes"):
            nepa_deep.download(server.url, md5(contents), folder)
        assert (folder / "cifar.tar.gz.part").stat().st_size == half and not (folder / "cifar.tar.gz").exists()
        server.hang_up_after = half + 9
        with pytest.raises(DataError, match=rf"ended after {half + 9} of {len(contents)} bytes"):
            nepa_deep.download(server.url, md5(contents), folder)
        server.hang_up_after = None
        nepa_deep.download(server.url, md5(contents), folder)
        assert server.asked == [None, *(f"bytes={have}-" if ranges else None for have in (half, half + 9))]
        assert [len(part["images"]) for part in nepa_deep.open_images(folder)] == [20, 6]
        nepa_deep.download(server.url, md5(contents), folder)  # all there: nothing is fetched again
        assert len(server.asked) == 3
    assert sorted(path.name for path in folder.iterdir()) == ["cifar-10-batches-bin", "cifar.tar.gz"]


def test_a_complete_part_is_not_fetched_again(tmp_path):
    contents = archive(tmp_path)
    (tmp_path / "cifar.tar.gz.part").write_bytes(contents)
    with Served(contents) as server:
        nepa_deep.download(server.url, md5(contents), tmp_path)
    assert server.asked == [f"bytes={len(contents)}-"]
    assert (tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin").exists()


def test_a_wrong_checksum_is_an_error_that_removes_nothing_good(tmp_path):
    cifar_folder(tmp_path)
    with (
        Served(b"something else") as server,
        pytest.raises(DataError, match="md5 .*, expected 123; the download was removed"),
    ):
        nepa_deep.download(server.url, "123", tmp_path)
    assert not list(tmp_path.glob("cifar*")) and [len(p["labels"]) for p in nepa_deep.open_images(tmp_path)] == [20, 6]
    for name in ("cifar.tar.gz", "cifar.tar.gz.part"):
        (tmp_path / name).write_bytes(b"put here by hand")
    with pytest.raises(DataError, match="cifar.tar.gz: md5 .*, expected 123"):
        nepa_deep.download(server.url, "123", tmp_path)
    for name in ("cifar.tar.gz", "cifar.tar.gz.part"):
        assert (tmp_path / name).read_bytes() == b"put here by hand"


def test_unpacking_completes_what_is_there_and_replaces_nothing(tmp_path):
    contents, home = archive(tmp_path), tmp_path / "data" / "cifar-10-batches-bin"
    home.mkdir(parents=True)
    (home / "data_batch_1.bin").write_bytes(b"mine")
    with Served(contents) as server:
        nepa_deep.download(server.url, md5(contents), tmp_path / "data")
    assert (home / "data_batch_1.bin").read_bytes() == b"mine" and (home / "test_batch.bin").exists()
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["cifar-10-batches-bin", "cifar.tar.gz"]


@pytest.mark.parametrize("name", ["../outside.bin", "inside/../../outside.bin"])
def test_an_archive_that_would_write_outside_its_folder_is_refused(tmp_path, name):
    contents = archive(tmp_path, ["good.bin", name])
    with Served(contents) as server, pytest.raises(DataError, match="cifar.tar.gz: .*outside"):
        nepa_deep.download(server.url, md5(contents), tmp_path / "data")
    assert not list(tmp_path.rglob("outside.bin")) and len(list((tmp_path / "data").iterdir())) == 1


def test_download_is_a_flag_and_a_dead_server_one_line(tmp_path, monkeypatch):
    contents = archive(tmp_path)
    monkeypatch.setattr(nepa_deep, "CIFAR_MD5", md5(contents))
    with Served(contents) as server:
        monkeypatch.setattr(nepa_deep, "CIFAR_URL", server.url)
        lines = run("nepa_deep", tmp_path / "run", f"--data_dir {tmp_path / 'data'} --download --batch_size 4")
    assert lines[-1]["split"] == "final"
    (tmp_path / "data" / "cifar.tar.gz").unlink()
    run("nepa_deep", tmp_path / "run", "--resume --max_train_steps 7", tiny=False)  # fetches nothing
    with pytest.raises(SystemExit) as exit_:
        run("nepa_deep", tmp_path / "run2", f"--data_dir {tmp_path / 'other'} --download")
    assert str(exit_.value).startswith(f"error: {server.url}: ") and "\n" not in str(exit_.value)


# ==== nepa_deep.py: evaluation =======================================================================================


def clusters(n, D=6, classes=4, seed=0):
    """Features whose label shows in a few directions of very different size."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = torch.randn(classes, D, generator=torch.Generator().manual_seed(9))
    x = centres[y] + 0.8 * torch.randn(n, D, generator=generator)
    return x * torch.tensor([100.0, 10.0, 1.0, 1.0, 0.1, 0.01])[:D], y


@pytest.mark.parametrize("wide", [False, True])
def test_the_ridge_probe_is_least_squares_with_a_penalty_chosen_on_known_labels(wide):
    (x, y), (test_x, test_y) = clusters(100), clusters(80, seed=1)
    if wide:  # more numbers than samples: the other of the two equivalent systems
        generator = torch.Generator().manual_seed(3)
        x, test_x = (torch.cat([v, torch.randn(len(v), 150, generator=generator)], 1) for v in (x, test_x))
    found = nepa_deep.probe([(x[:60], y[:60]), (x[60:], y[60:])], [(test_x, test_y)])
    std, D = x.double().std(0).numpy(), x.shape[1]
    a, b = ((v.double() - x.double().mean(0)).numpy() / std for v in (x, test_x))

    def accuracy(a, y, b, test_y, penalty):
        one_hot = np.eye(4)[y]
        rows = np.concatenate([a, np.sqrt(penalty * len(a)) * np.eye(D)])  # ridge as least squares with more rows
        weights = np.linalg.lstsq(rows, np.concatenate([one_hot - one_hot.mean(0), np.zeros((D, 4))]), rcond=None)[0]
        return np.mean((b @ weights + one_hot.mean(0)).argmax(1) == test_y.numpy())

    held = mix(np.arange(100), 0) % np.uint64(5) == 0
    assert 10 < held.sum() < 30
    choices = {p: accuracy(a[~held], y[~held], a[held], y[held], p) for p in 10.0 ** np.arange(1, -7, -1)}
    best = max(choices, key=lambda p: (choices[p], p))
    assert found["probe_acc"] == pytest.approx(accuracy(a, y, b, test_y, best)) and found["probe_acc"] > 0.4
    assert len(set(choices.values())) > 1


def test_knn_votes_by_the_cosine_of_whitened_features():
    (x, y), (test_x, test_y) = clusters(300), clusters(80, seed=1)
    found = nepa_deep.probe([(x, y)], [(test_x, test_y)])["knn_acc"]
    centred = (x - x.mean(0)).double().numpy()
    values, axes = np.linalg.eigh(centred.T @ centred)
    near, far = (((v - x.mean(0)).double().numpy() @ axes) / np.sqrt(values) for v in (x, test_x))
    right = 0
    for v, label in zip(far, test_y):
        cosine = near @ v / np.linalg.norm(near, axis=1) / np.linalg.norm(v)
        right += np.bincount(y[np.argsort(-cosine)[:20]]).argmax() == label.item()
    assert found == pytest.approx(right / 80) and found > 0.7


def test_a_direction_without_variance_adds_no_noise_to_knn():
    (x, y), (test_x, test_y) = clusters(300), clusters(80, seed=1)
    noise = [
        torch.cat([v, 1e-9 * torch.randn(len(v), 40, generator=torch.Generator().manual_seed(2))], 1)
        for v in (x, test_x)
    ]
    plain, more = nepa_deep.probe([(x, y)], [(test_x, test_y)]), nepa_deep.probe([(noise[0], y)], [(noise[1], test_y)])
    assert plain["knn_acc"] == more["knn_acc"]


def test_collapse_metrics_are_their_definitions():
    vectors = F.normalize(torch.randn(50, 6, dtype=torch.float64) * torch.tensor([3, 2, 1, 1, 0.1, 0.1]) + 0.5, dim=1)
    found = nepa_deep.collapse(vectors.sum(0), vectors.T @ vectors, len(vectors))
    cosines = [(vectors[i] @ vectors[j]).item() for i in range(50) for j in range(50) if i != j]
    assert found["embed_cos"] == pytest.approx(np.mean(cosines), abs=1e-9)
    p = np.linalg.svd(vectors.numpy(), compute_uv=False)
    p = p / p.sum()
    assert found["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    best = -F.normalize(vectors.mean(0), dim=0) @ vectors.mean(0)
    assert found["constant_loss"] == pytest.approx(best.item(), abs=1e-9)
    others = F.normalize(torch.randn(1000, 6, dtype=torch.float64), dim=1)
    assert (-(others @ vectors.mean(0)) >= found["constant_loss"]).all()
    one = torch.ones(50, 6) / 6**0.5
    collapsed = nepa_deep.collapse(one.sum(0), one.T @ one, 50)
    assert collapsed["embed_cos"] == pytest.approx(1, abs=1e-4) and collapsed["effective_rank"] == pytest.approx(
        1, abs=1e-2
    )


def test_the_effective_rank_of_one_direction_is_one_in_many_dimensions_too(tmp_path):
    args = parsed("nepa_deep", f"{COMMON} --hidden_size 512 --num_layers 1 --num_heads 1 --out_dir {tmp_path}")
    data = nepa_deep.make_data(args)
    model = nepa_deep.Model(nepa_deep.Config(**data["config"])).eval()
    model.patch.bias.data[:] = 1e6 * torch.randn(512, generator=torch.Generator().manual_seed(0))
    found = nepa_deep.evaluate(model, data, args)
    assert found["effective_rank"] == pytest.approx(1, abs=0.01) and found["embed_cos"] == pytest.approx(1, abs=1e-5)


def test_features_that_say_nothing_do_not_stop_the_probes():
    y, same_for_all = torch.arange(40) % 4, torch.ones(40, 3)
    assert nepa_deep.probe([(same_for_all, y)], [(same_for_all, y)]) == {"knn_acc": 0.25, "probe_acc": 0.25}
    one = nepa_deep.probe([(same_for_all[:1], y[:1])], [(same_for_all, y)])
    assert one == {"knn_acc": 0.25, "probe_acc": 0.25}


def test_weights_ruined_by_the_last_update_stop_the_run_in_one_line(tmp_path):
    with pytest.raises(SystemExit) as exit_:
        run("nepa_deep", tmp_path, "--lr 1e30 --grad_clip 0 --ema_decay 0 --eval_interval 1 --warmup_steps 0")
    assert str(exit_.value).startswith("error: step ") and "\n" not in str(exit_.value)


def test_evaluation_draws_nothing_and_reads_the_asked_layer(tmp_path, monkeypatch):
    def never(seed):
        raise AssertionError("the generators of the training are seeded anew")

    args = parsed("nepa_deep", f"{TINY['nepa_deep']} {COMMON} --out_dir {tmp_path}")
    data = nepa_deep.make_data(args)
    torch.manual_seed(0)
    model = nepa_deep.Model(nepa_deep.Config(**data["config"])).eval()
    before = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", never)
    first = nepa_deep.evaluate(model, data, args)
    data["baselines"]()
    assert torch.equal(before, torch.get_rng_state())
    assert first == nepa_deep.evaluate(model, data, args)
    output = model(nepa_deep.prepare({"images": torch.as_tensor(data["val"]["images"][:8])}, 32))
    states = [output.embedding, *output.hidden_states]
    for layer in (None, 0, 2, 3):
        args.probe_layer = layer
        state = output.prediction if layer is None else states[layer]
        torch.testing.assert_close(nepa_deep.features(output, args), torch.stack(list(state[:, 1:].unbind(1))).mean(0))


def test_the_probes_see_file_order_whatever_the_number_of_processes(monkeypatch, tmp_path):
    args = parsed("nepa_deep", f"{TINY['nepa_deep']} {COMMON} --out_dir {tmp_path}")
    data = nepa_deep.make_data(args)
    torch.manual_seed(0)
    model = nepa_deep.Model(nepa_deep.Config(**data["config"])).eval()
    probed, parts, gather = [], [], nepa_deep.gather

    def gather_two(value):
        if isinstance(value, tuple):
            parts.append(value)
            return parts[-2:]
        return gather(value)

    def probe(*pairs):
        probed.append([torch.cat([each[i] for each in batches]) for batches in pairs for i in (0, 1)])
        return {}

    monkeypatch.setattr(nepa_deep, "probe", probe)
    one = nepa_deep.evaluate(model, data, args)
    monkeypatch.setattr(nepa_deep, "gather", gather_two)
    monkeypatch.setattr(nepa_deep, "world_size", lambda: 2)
    for process in (0, 1):
        monkeypatch.setattr(nepa_deep, "rank", lambda process=process: process)
        two = nepa_deep.evaluate(model, data, args)
    for a, b in zip(probed[0], probed[-1]):
        torch.testing.assert_close(a, b)
    for name in ("embed_cos", "effective_rank", "constant_loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-5)


def test_the_probes_see_uncut_training_images_with_their_labels(tmp_path):
    args = parsed("nepa_deep", f"{TINY['nepa_deep']} {COMMON} --out_dir {tmp_path}")
    data = nepa_deep.make_data(args)
    batches = list(nepa_deep.probe_batches(data, args))
    images, labels = (torch.cat([batch[name] for batch in batches]) for name in ("images", "labels"))
    numbers = {image.tobytes(): i for i, image in enumerate(data["train"]["images"])}
    index = [numbers[image.numpy().tobytes()] for image in images]
    assert len(set(index)) == 60 and index == sorted(index) and "boxes" not in batches[0]
    assert labels.tolist() == data["train"]["labels"][index].tolist()
    args.seed = 1
    assert torch.equal(next(nepa_deep.probe_batches(data, args))["labels"], batches[0]["labels"])
    dealt = [list(nepa_deep.probe_batches(data, args, first, 2)) for first in (0, 1)]
    assert sum(len(batch["labels"]) for part in dealt for batch in part) == 60
    assert torch.equal(dealt[1][0]["labels"], batches[1]["labels"])


def test_a_short_run_already_learns_textures(tmp_path):
    flags = "--device cpu --hidden_size 32 --num_layers 2 --num_heads 2 --batch_size 32 --max_train_steps 60"
    flags += " --eval_interval 60 --probe_samples 1000 --eval_samples 500 --warmup_steps 5 --lr 3e-3 --patch_size 8"
    lines = run("nepa_deep", tmp_path, flags, tiny=False)
    last = lines[-1]
    assert last["loss_final"] < lines[0]["loss_final"] - 0.2
    assert last["loss_final"] < min(last["copy_loss"], last["constant_loss"])


# ==== jepa_lm.py: the model ==========================================================================================


def jepa_model(seed=0, **changes):
    torch.manual_seed(seed)
    return jepa_lm.Model(jepa_lm.Config(**{"hidden_size": 32, "num_layers": 2, "num_heads": 2, **changes}))


class JepaArgs:
    """The flags of make_data and compute_loss, without a parser."""

    regular = view_based_jepa = tube = stop_grad_target = force_pairs = unmask_user = False
    lbd, gamma, num_prediction_steps, predictors, jepa_ratio, debug, sigreg = 0.5, 1.0, 2, 2, 1.0, 0, 0.0
    jepa_loss = "cosine"
    train_file = eval_file = prompt = None
    batch_size, grad_accum, seed, max_length, eval_samples = 4, 1, 0, 1024, 0
    hidden_size, num_layers, num_heads = 32, 2, 2

    def __init__(self, **changes):
        vars(self).update(changes)


def chat(answer, user="q", system=None):
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


RAGGED = [
    chat("one\n\ntwo is longer\n\n3", user="what?"),
    chat("a single step", system="be brief"),
    chat("1\n\n2\n\n3\n\n4\n\n5\n\nsix", user="count é"),
    chat("ab\n\ncd", system="s", user="a much longer question than all the others"),
]


def write_chats(path, chats):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    return path


def batch_of(chats, args, tmp_path, at=0, share=(1.0, 1.0)):
    """The training batch that make_data's collate makes of these chats at update `at`."""
    args.train_file = args.eval_file = write_chats(tmp_path / "chats.jsonl", chats)
    data = jepa_lm.make_data(args)
    position = np.arange(len(chats)) + at * args.batch_size * args.grad_accum
    batch = data["collate"](list(data["train"]), {"rows": np.arange(len(chats)), "position": position})
    batch = {name: torch.as_tensor(value) for name, value in batch.items()}
    return batch | {"step": at, "share": torch.tensor(share)}


def tokens_of(messages):
    """Role, bytes, end of turn: as the text above encode says."""
    role = {"system": 258, "user": 259, "assistant": 260}
    return [t for m in messages for t in [role[m["role"]], *m["content"].encode(), 257]]


def naive_pairs(messages, args):
    """(tokens the prediction sees, tokens of the target), by cutting the text and not by spans."""
    text, head = messages[-1]["content"], [*tokens_of(messages[:-1]), 260]
    if args.view_based_jepa:
        return [(head[:-1], tokens_of(messages[-1:]))]
    steps = text.split("\n\n")
    found = []
    for i in range(min(args.num_prediction_steps, len(steps) - 1)):
        found.append((head + list("\n\n".join(steps[: i + 1]).encode()), list(steps[i + 1].encode())))
    return found


def naive_losses(model, chats, args):
    """Every chat, prediction and target in a pass of its own, one row, no padding, no mask: the two losses."""

    def states(tokens):
        return model(torch.tensor([tokens]))[0]

    nll, predicted, target = [], [], []
    for messages in chats:
        tokens, answer = tokens_of(messages), tokens_of(messages[-1:])
        logits = states(tokens) @ model.embed.weight.T
        for i in range(len(tokens) - len(answer), len(tokens) - 1):
            nll.append(torch.logsumexp(logits[i], 0) - logits[i, tokens[i + 1]])
        for seen, step in naive_pairs(messages, args):
            predicted.append(states(seen + [261 + k for k in range(args.predictors)])[-1])
            with torch.set_grad_enabled(not args.stop_grad_target):
                target.append(states(step)[-1])
    llm = torch.stack(nll).mean()
    if not predicted:
        return llm, llm * 0, 0
    p, t = torch.stack(predicted), torch.stack(target)
    return llm, (1 - (p * t).sum(1) / (p.norm(dim=1) * t.norm(dim=1))).mean(), len(p)


CASES = [{"num_prediction_steps": n, "predictors": k} for n, k in [(1, 0), (1, 2), (2, 1), (2, 2), (3, 3), (4, 0)]]
CASES += [{"view_based_jepa": True, "predictors": k} for k in range(4)]
CASES += [{"num_prediction_steps": 4, "predictors": 1, "stop_grad_target": True}]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_losses_and_gradients_equal_separate_passes(case, tmp_path):
    args = JepaArgs(**case)
    model = jepa_model(predictors=args.predictors)
    llm, jepa, pairs = naive_losses(model, RAGGED, args)
    (args.gamma * llm + args.lbd * jepa).backward()
    right = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss, metrics, _ = jepa_lm.compute_loss(model, batch_of(RAGGED, args, tmp_path), None, args)
    loss.backward()
    assert pairs == {1: 3, 2: 5, 3: 6, 4: 7}[args.num_prediction_steps] if not args.view_based_jepa else pairs == 4
    assert metrics["pairs"][0] == pairs and metrics["skipped"][0] == (0 if args.view_based_jepa else 1)
    for name, value in {"llm_loss": llm, "jepa_loss": jepa, "loss": llm + 0.5 * jepa}.items():
        total, count = metrics[name]
        assert total.item() / count == pytest.approx(value.item(), rel=1e-5), name
    for name, p in model.named_parameters():
        if name in right and p.numel():
            assert (p.grad - right[name]).norm() <= 1e-5 * right[name].norm(), name
        else:
            assert not p.numel() or not p.grad.any()  # predictors that do not stand in any row


def packed_states(model, batch):
    mask = jepa_lm.packed_mask(batch["block"], batch["limit"])
    return model(batch["tokens"], batch["positions"], mask)


@pytest.mark.parametrize("case", [{}, {"view_based_jepa": True}, {"num_prediction_steps": 4, "predictors": 3}], ids=str)
def test_packed_states_equal_separate_passes(case, tmp_path):
    args = JepaArgs(**case)
    model, batch = jepa_model(predictors=args.predictors), batch_of(RAGGED, args, tmp_path)
    h = packed_states(model, batch)
    views = h.flatten(0, 1)[batch["ends"]]
    seen = 0
    for row, messages in zip(h, RAGGED, strict=True):
        tokens = tokens_of(messages)
        torch.testing.assert_close(row[: len(tokens)], model(torch.tensor([tokens]))[0], atol=1e-5, rtol=0)
        for context, step in naive_pairs(messages, args):
            context = context + [261 + k for k in range(args.predictors)]
            for mine, alone in zip(views[seen], (context, step), strict=True):
                torch.testing.assert_close(mine, model(torch.tensor([alone]))[0, -1], atol=1e-5, rtol=0)
            seen += 1
    assert seen == len(views) and h.isfinite().all()  # padding too: a row of the mask without any True gives NaN


def test_what_may_not_be_seen_changes_nothing(tmp_path):
    """To the last bit: predictors no chat state, the chat no step read alone, padding nothing at all."""
    args = JepaArgs(num_prediction_steps=4)
    model, batch = jepa_model(), batch_of(RAGGED, args, tmp_path)
    h, block = packed_states(model, batch), batch["block"]
    with torch.no_grad():
        model.predictors += 1.0
    other = packed_states(model, batch)
    assert torch.equal(h[block == 0], other[block == 0])
    alone, ahead = (block > 0) & (block % 2 == 0), (block > 0) & (block % 2 == 1)
    assert torch.equal(h[alone], other[alone]) and (h[ahead] != other[ahead]).any(1).all()

    h = packed_states(model, batch)
    changed = {**batch, "tokens": torch.where(block == 0, (batch["tokens"] + 1) % 256, batch["tokens"])}
    other = packed_states(model, changed)
    assert torch.equal(h[alone], other[alone]) and (h[ahead] != other[ahead]).any(1).all()
    for each in block[2].unique():  # chat, predictors and steps of the third row, one changed at a time
        mine = block[2] == each
        changed = {**batch, "tokens": batch["tokens"].clone()}
        changed["tokens"][2, mine] = 7
        other = packed_states(model, changed)
        assert torch.equal(other[[0, 1, 3]], h[[0, 1, 3]])
        sees = mine | (ahead[2] if each == 0 else torch.zeros_like(mine))
        assert torch.equal(other[2, ~sees], h[2, ~sees]) and (other[2, sees] != h[2, sees]).any()

    wide = {
        name: F.pad(batch[name], (0, 5), value=batch[name][1, -1]) for name in ("tokens", "positions", "block", "limit")
    }
    assert block[1, -1] == -1
    T = block.shape[1]
    torch.testing.assert_close(packed_states(model, wide)[:, :T], h, atol=2e-6, rtol=0)
    wide["tokens"][wide["block"] == -1] = 65
    real = block != -1
    torch.testing.assert_close(packed_states(model, wide)[:, :T][real], h[real], atol=2e-6, rtol=0)
    plain = model(torch.tensor([tokens_of(RAGGED[0]) + [256] * 9]))[0, :-9]
    torch.testing.assert_close(plain, h[0, : len(plain)], atol=2e-6, rtol=0)


def test_a_prediction_sees_its_prefix_up_to_the_steps_end_and_no_further(tmp_path):
    """By gradient: the first pair's prediction depends on exactly the tokens before the end of the first step."""
    args = JepaArgs(num_prediction_steps=1)
    model, batch = jepa_model(), batch_of(RAGGED[:1], args, tmp_path)
    table = model.embed.weight.detach()
    inputs = F.embedding(batch["tokens"].clamp(max=260), table).requires_grad_()
    real, F_embedding = jepa_lm.F.embedding, lambda *_: inputs
    try:
        jepa_lm.F.embedding = F_embedding
        h = packed_states(model, batch).flatten(0, 1)[batch["ends"][0]]
        for state, low, high in ((h[0], 0, 8 + 3), (h[1], len(tokens_of(RAGGED[0])) + 2, batch["tokens"].shape[1])):
            seen = torch.autograd.grad(state.square().sum() + state.sum(), inputs, retain_graph=True)[0][0].any(1)
            expected = torch.zeros_like(seen)
            expected[low:high] = True
            if low == 0:  # user turn 7 tokens, role 1, "one" 3; then the two predictors behind the chat
                expected[len(tokens_of(RAGGED[0])) : len(tokens_of(RAGGED[0])) + 2] = True
            assert torch.equal(seen, expected)
    finally:
        jepa_lm.F.embedding = real


def test_the_language_model_does_not_depend_on_the_number_of_predictors():
    weights = [jepa_model(predictors=k).state_dict() for k in (0, 3)]
    for state in weights:
        state.pop("predictors")
    assert same(*weights)


def test_model_equals_a_slow_reference():
    """The text of Block and Model, one position and one head at a time, in float64."""
    model, tokens = jepa_model(), [258, 65, 66, 10, 261]
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    D, heads = 32, 2
    d = D // heads

    def norm(v):
        return v / (v.pow(2).mean() + 1e-5).sqrt()

    def turn(v, at):
        out = v.clone()
        for j in range(d // 2):
            a = at * 10000 ** (-2 * j / d)
            out[j], out[j + d // 2] = (
                v[j] * math.cos(a) - v[j + d // 2] * math.sin(a),
                v[j + d // 2] * math.cos(a) + v[j] * math.sin(a),
            )
        return out

    h = [torch.cat([w["embed.weight"], w["predictors"]])[token] for token in tokens]
    for layer in range(2):
        qkv = [w[f"layers.{layer}.qkv.weight"] @ norm(v) for v in h]
        for t in reversed(range(len(h))):
            mixed = []
            for head in range(heads):
                q, *k = (
                    turn(norm(qkv[i][j * D :][head * d : (head + 1) * d]), i)
                    for i, j in [(t, 0)] + [(s, 1) for s in range(t + 1)]
                )
                a = torch.softmax(torch.stack([q @ each for each in k]) / d**0.5, 0)
                mixed.append(sum(a[s] * qkv[s][2 * D :][head * d : (head + 1) * d] for s in range(t + 1)))
            h[t] = h[t] + w[f"layers.{layer}.o.weight"] @ torch.cat(mixed)
            gate, up = (w[f"layers.{layer}.gate_up.weight"] @ norm(h[t])).chunk(2)
            h[t] = h[t] + w[f"layers.{layer}.down.weight"] @ (gate * torch.sigmoid(gate) * up)
    right = torch.stack([norm(v) for v in h])
    torch.testing.assert_close(model(torch.tensor([tokens]))[0].double(), right, atol=1e-5, rtol=1e-5)


# ==== jepa_lm.py: chats ==============================================================================================


def test_encode_supervises_the_answer_and_its_end():
    sample = jepa_lm.encode(RAGGED[0])
    assert sample.tokens.tolist() == tokens_of(RAGGED[0])
    supervised = np.flatnonzero(sample.labels != -100)
    text = b"one\n\ntwo is longer\n\n3"
    assert sample.labels[supervised].tolist() == [*text, 257] and supervised[0] == 7  # where the role token stands
    assert [bytes(sample.tokens[a:b].tolist()) for a, b in sample.steps] == [b"one", b"two is longer", b"3"]
    whole = jepa_lm.encode(RAGGED[3], unmask_user=True)
    assert whole.labels.tolist() == [*tokens_of(RAGGED[3])[1:], -100]


@pytest.mark.parametrize(
    "text,steps",
    [
        ("one", ["one"]),
        ("a\nb", ["a\nb"]),
        ("\n\na\n\nb\n\n", ["a", "b"]),
        ("a\n\n\n\nb\n\n\nc", ["a", "b", "c"]),
        ("a\n\n \n\nb", ["a", "b"]),
        ("a\n\n\u00a0\n\nb", ["a", "b"]),
        ("a\\n\\nb. Step 2: c", ["a\\n\\nb. Step 2: c"]),
        ("é\n\nü\nö", ["é", "ü\nö"]),
    ],
)
def test_steps_are_what_blank_lines_separate_and_no_boundary_is_invented(text, steps):
    sample = jepa_lm.encode(chat(text))
    assert [jepa_lm.decode(sample.tokens[a:b].tolist()) for a, b in sample.steps] == steps


BAD_CHATS = {
    "{": "Expecting property name enclosed in double quotes",
    "[1, 2]": 'no messages, expected {"messages": [...]}',
    '{"text": "x"}': "no messages, expected",
    '{"messages": "x"}': "messages is no list of objects",
    '{"messages": []}': "roles none, expected user, assistant",
    '{"messages": [{"role": "assistant", "content": "x"}]}': "roles 'assistant', expected user",
    '{"messages": [{"role": "user", "content": "x"}]}': "roles 'user', expected",
    '{"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "x"}]}': "roles 'tool', 'assist",
    '{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}]}': "content of user is int",
    '{"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}': "content of user is NoneType",
    json.dumps({"messages": chat(" \n\n")}): "content of assistant is empty",
    json.dumps({"messages": chat("a\ud800")}): "surrogates not allowed",
    json.dumps({"messages": [{"role": "user\nx", "content": "x"}]}): "roles 'user\\nx', expected",
    "[" * 100000: "recursion",
    "\xff": "expected JSON",
}


@pytest.mark.parametrize("line", BAD_CHATS, ids=lambda line: line[:40])
def test_a_bad_chat_is_one_line_that_names_file_and_line(tmp_path, line):
    path = write_chats(tmp_path / "chats.jsonl", RAGGED)
    path.write_bytes(path.read_bytes() + b"\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(SystemExit) as stop:
        run("jepa_lm", tmp_path / "run", f"--train_file {path}")
    assert stop.value.code.startswith(f"error: {path}:6: ") and BAD_CHATS[line] in stop.value.code
    assert "expected" in stop.value.code and "\n" not in stop.value.code and not (tmp_path / "run").exists()


def test_files_that_are_missing_or_empty_and_chats_that_are_too_long(tmp_path, capsys):
    def refused(flags, message):
        with pytest.raises(SystemExit) as stop:
            run("jepa_lm", tmp_path / "run", flags)
        assert message in stop.value.code and stop.value.code.startswith("error: "), stop.value.code

    refused(
        f"--train_file {tmp_path}/none", "none: cannot be read (No such file or directory), expected a file of chats"
    )
    (tmp_path / "empty").write_text("\n\n")
    refused(f"--train_file {tmp_path}/empty", "empty: no chats, expected one on each line")
    refused(f"--train_file {write_chats(tmp_path / 'one', RAGGED[:1])}", "one: one chat in all, expected at least two")
    four = write_chats(tmp_path / "four", RAGGED)
    refused(f"--train_file {four} --max_length 8", "four: no chat is within --max_length 8, expected some")
    capsys.readouterr()
    longest = len(tokens_of(RAGGED[3]))
    refused(
        f"--train_file {four} --eval_file {four} --max_length {longest - 1}",
        f"four:4: {longest} tokens, expected at most --max_length {longest - 1}",
    )
    three = write_chats(tmp_path / "three", RAGGED[:3])
    run(
        "jepa_lm",
        tmp_path / "run",
        f"--train_file {four} --eval_file {three} --max_length {longest - 1} --max_train_steps 1 --batch_size 2",
    )
    out = capsys.readouterr().out
    assert (
        f"left out 1 of 4 training chats: longer than --max_length {longest - 1}" in out and "3 training samples" in out
    )


def test_the_world_is_what_it_says():
    train, val = jepa_lm.make_world(0, False)
    assert (len(train), len(val)) == (22553, 2505)
    problems = set()
    for sample in train[:3000] + val:
        text = jepa_lm.decode(sample.tokens.tolist())
        found = re.fullmatch(r"(\w+) has (\d) (\w+), (.*), (.*), (.*)\.(.*)\n\n(.*)\n\n(.*)", text, re.S)
        value, steps = int(found[2]), []
        for told in found.group(4, 5, 6):
            word, _, n = told.partition(" ")
            new = {"gets": lambda v, n=n: v + int(n), "loses": lambda v, n=n: v - int(n), "doubles": lambda v: 2 * v}[
                word
            ](value)
            sign = {"gets": f"+{n}", "loses": f"-{n}", "doubles": "*2"}[word]
            steps.append(f"{value}{sign}={new}")
            value = new
            assert 1 <= value <= 20
        assert steps == list(found.group(7, 8, 9)) and 60 <= len(sample.tokens) + 5 <= 80
        problems.add(found.group(2, 4, 5, 6))
    assert len(problems) == 3000 + 2505
    other, _ = jepa_lm.make_world(1, False)
    assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(train[:9], other[:9], strict=True))


# ==== jepa_lm.py: the losses =========================================================================================


def test_jepa_losses_are_the_formulas():
    p, t = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    cos = [[float(a @ b / (a.norm() * b.norm())) for b in t] for a in p]
    right = {
        "cosine": sum(1 - cos[i][i] for i in range(5)) / 5,
        "mse": float(((p - t) ** 2).sum()) / 40,
        "l2": sum(math.dist(a, b) for a, b in zip(p.tolist(), t.tolist(), strict=True)) / 5,
        "infonce": sum(math.log(sum(math.exp((c - row[i]) / 0.07) for c in row)) for i, row in enumerate(cos)) / 5,
    }
    for kind, value in right.items():
        assert jepa_lm.jepa_loss(p, t, kind).item() == pytest.approx(value, rel=1e-5), kind
        assert jepa_lm.jepa_loss(p[:0], t[:0], kind).item() == 0
    twins = torch.tensor([0, 1, 0, 2, 3])  # the first and third target are the same text: no negatives of each other
    value = 0
    for i, row in enumerate(cos):
        others = [c for j, c in enumerate(row) if j == i or twins[j] != twins[i]]
        value += math.log(sum(math.exp((c - row[i]) / 0.07) for c in others)) / 5
    assert jepa_lm.jepa_loss(p, t, "infonce", twins).item() == pytest.approx(value, rel=1e-5)
    with pytest.raises(ValueError, match="unknown loss 'cos', expected cosine, mse, l2 or infonce"):
        jepa_lm.jepa_loss(p, t, "cos")
    scope = {"torch": torch, "F": F}
    exec(inspect.getsource(jepa_lm.jepa_loss), scope)
    assert scope["jepa_loss"](p, t, "infonce", twins) == jepa_lm.jepa_loss(p, t, "infonce", twins)
    across, among, apart = jepa_lm.cosines(p, t, twins)
    torch.testing.assert_close(across, torch.tensor(cos), atol=1e-6, rtol=0)
    torch.testing.assert_close(among, F.cosine_similarity(t[:, None], t, dim=-1).float(), atol=1e-6, rtol=0)
    assert apart.tolist() == [[int(twins[i]) != int(twins[j]) for j in range(5)] for i in range(5)]


def test_sigreg_is_the_epps_pulley_test_along_each_direction():
    views = torch.randn(6, 8, dtype=torch.float64)
    directions = F.normalize(torch.randn(8, 5), dim=0)
    points, right = np.linspace(-3, 3, 33), []
    for direction in directions.T.tolist():
        along = [sum(a * b for a, b in zip(view, direction, strict=True)) for view in views.tolist()]
        gauss = np.exp(-(points**2) / 2)
        off = [abs(sum(cmath.exp(1j * t * x) for x in along) / 6 - g) ** 2 * g for t, g in zip(points, gauss)]
        right.append(6 * sum((a + b) / 2 * (6 / 32) for a, b in zip(off, off[1:])))
    assert jepa_lm.sigreg(views, directions).item() == pytest.approx(sum(right) / 5, rel=1e-5)
    assert jepa_lm.sigreg(views[:0], directions).item() == 0
    assert jepa_lm.sigreg(torch.randn(4000, 8), directions) < 2 < 1000 < jepa_lm.sigreg(torch.ones(4000, 8), directions)
    scope = {"torch": torch, "F": F}
    exec(inspect.getsource(jepa_lm.sigreg), scope)
    assert scope["sigreg"](views, directions) == jepa_lm.sigreg(views, directions)


def test_sigreg_drives_collapsed_views_apart():
    generator = torch.Generator().manual_seed(0)
    views = (1 + 0.1 * torch.randn(32, 16, generator=generator)).requires_grad_()
    optimizer, unlike = torch.optim.Adam([views], lr=0.05), ~torch.eye(32, dtype=torch.bool)

    def cosine():
        normed = F.normalize(views.detach(), dim=-1)
        return (normed @ normed.T)[unlike].mean().item()

    assert cosine() > 0.95
    for _ in range(100):
        optimizer.zero_grad()
        directions = F.normalize(torch.randn(16, 64, generator=generator), dim=0)
        jepa_lm.sigreg(jepa_lm.rms_norm(views), directions).backward()
        optimizer.step()
    assert abs(cosine()) < 0.05


def test_sigreg_weighs_predictions_and_targets_beside_the_distance(tmp_path, monkeypatch):
    args, model, drawn = JepaArgs(sigreg=0.3, lbd=0.7, stop_grad_target=True), jepa_model(), []
    batch, real = batch_of(RAGGED, args, tmp_path), jepa_lm.sigreg
    mask = jepa_lm.packed_mask(batch["block"], batch["limit"])
    views = model(batch["tokens"], batch["positions"], mask).flatten(0, 1)[batch["ends"].flatten()]

    def spy(seen, directions):
        torch.testing.assert_close(seen, views, rtol=1e-4, atol=1e-5)
        assert seen.requires_grad  # also the targets', under --stop_grad_target
        drawn.append(directions)
        return real(seen, directions)

    monkeypatch.setattr(jepa_lm, "sigreg", spy)
    for step in (0, 0, 1):
        loss, metrics, _ = jepa_lm.compute_loss(model, batch | {"step": step}, None, args)
        part = {name: (value / count).item() for name, (value, count) in metrics.items() if "loss" in name}
        total = part["llm_loss"] + 0.7 * (part["jepa_loss"] + 0.3 * part["sigreg_loss"])
        assert loss.item() == pytest.approx(total, rel=1e-5)
        assert part["sigreg_loss"] == pytest.approx(real(views, drawn[-1]).item(), rel=1e-3)
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])  # anew for each update, one for all its parts
    torch.testing.assert_close(drawn[2].norm(dim=0), torch.ones(256))


def test_identical_steps_are_no_negatives_and_not_unpaired(tmp_path):
    chats = [np.array([1, 2, 3, 4, 3, 4, 5])]
    batch = jepa_lm.pack(chats, [[(2, 2, 4), (4, 4, 6), (6, 6, 7)]], 1)
    assert batch["text"].tolist() == [0, 0, 1]
    same_step = [chat("a\n\nb"), chat("c\n\nb"), chat("d\n\ne")]
    args, model = JepaArgs(jepa_loss="infonce"), jepa_model()
    batch = batch_of(same_step, args, tmp_path)
    _, metrics, _ = jepa_lm.compute_loss(model, batch, None, args)
    p, t = (
        model(batch["tokens"], batch["positions"], jepa_lm.packed_mask(batch["block"], batch["limit"]))
        .flatten(0, 1)[batch["ends"]]
        .unbind(1)
    )
    cos, loss, apart = F.cosine_similarity(p[:, None], t, dim=-1), 0, [(0, 2), (1, 2), (2, 0), (2, 1)]
    for i in range(3):
        others = [cos[i, j] / 0.07 for j in range(3) if j == i or (i, j) in apart]
        loss = loss + (torch.logsumexp(torch.stack(others), 0) - cos[i, i] / 0.07) / 3
    assert metrics["jepa_loss"][0].item() / 3 == pytest.approx(loss.item(), rel=1e-4)
    total, count = metrics["cos_unpaired"]
    assert count == 4 and total.item() == pytest.approx(sum(cos[i, j] for i, j in apart).item(), rel=1e-4)


def test_batches_of_a_shuffled_file_are_little_padded(tmp_path):
    """Answers in steps of very different lengths, packed and plain."""
    generator = np.random.default_rng(0)
    chats = [
        chat("\n\n".join("x" * n for n in generator.integers(5, 60, generator.integers(1, 6)))) for _ in range(2000)
    ]
    path = write_chats(tmp_path / "chats", chats)
    for lbd in (0.0, 0.5):
        args = JepaArgs(lbd=lbd, train_file=path, eval_file=path, batch_size=8)
        data = jepa_lm.make_data(args)
        loader, used, held = Loader(data["train"], 8, 0, "cpu", data["collate"]), 0, 0
        for turn in range(64):
            loader.request(0, torch.full((8,), turn))
            tokens = loader.next()["tokens"]
            used, held = used + int((tokens != 256).sum()), held + tokens.numel()
        assert used > (0.9 if lbd else 0.85) * held  # unsorted: about .65


def test_skipped_counts_chats_without_pairs_whatever_is_drawn(tmp_path):
    path = write_chats(tmp_path / "chats", RAGGED * 4)
    flags = f"--train_file {path} --eval_file {path} --batch_size 16 --max_train_steps 3"
    for name, ratio in (("all", 1.0), ("none", 0.0), ("some", 0.4)):
        lines = run("jepa_lm", tmp_path / name, f"{flags} --jepa_ratio {ratio}")
        assert all(line["skipped"] == 0.25 for line in lines if line["split"] == "train")


def test_the_tube_is_a_span_of_the_chat_and_its_loss_the_formula(tmp_path):
    args = JepaArgs(tube=True)
    model, spans = jepa_model(), set()
    n = [len(tokens_of(messages)) for messages in RAGGED]
    first = [len(tokens_of(messages[:-2])) for messages in RAGGED]
    for at in range(300):
        batch = batch_of(RAGGED, args, tmp_path, at) if at < 3 else None
        T = max(n)
        position = np.arange(4) + at * 4
        ends = jepa_lm.draw_tubes([np.array(tokens_of(messages)) for messages in RAGGED], position, T, args.seed)
        for row, (low, s, e, high) in enumerate(ends - np.arange(4)[:, None] * T):
            assert (low, high) == (first[row], n[row] - 1) and low <= s < e <= high and (s, e) != (low, high)
            spans.add((row, s - low, e - low))
        if batch:
            assert batch["ends"].tolist() == ends.tolist() and "block" not in batch
            loss, metrics, _ = jepa_lm.compute_loss(model, batch, None, args)
            right = []
            for messages, span in zip(RAGGED, ends, strict=True):
                h = model(torch.tensor([tokens_of(messages)]))[0]
                h_0, h_s, h_e, h_n = h[span % T]
                right.append(1 - F.cosine_similarity((h_n - h_0) - (h_e - h_s), h_e - h_s, dim=0))
            assert metrics["jepa_loss"][0].item() / 4 == pytest.approx(sum(right).item() / 4, rel=1e-4)
            assert metrics["pairs"] == (4, 4) and metrics["skipped"] == (0, 4)
    short = {span[1:] for span in spans if span[0] == 0}
    assert len(short) > 150  # the first chat has 30 tokens, so 434 spans; 300 draws


def test_the_jepa_ratio_is_one_draw_per_update(tmp_path):
    args, has = JepaArgs(jepa_ratio=0.3, grad_accum=2), []
    args.train_file = args.eval_file = write_chats(tmp_path / "chats.jsonl", RAGGED)
    data = jepa_lm.make_data(args)
    for at in range(200):
        position = np.arange(4) + at * 8
        parts = [data["collate"](data["train"][:4], {"position": position + first}) for first in (0, 4)]
        assert len({"block" in part for part in parts}) == 1
        has.append("block" in parts[0])
        assert has[-1] == (parts[0]["counts"][1] > 0)
    assert 40 <= sum(has) <= 80


# ==== jepa_lm.py: regular and lbd 0 are the same run =================================================================


def spied(monkeypatch):
    """Every call of Model.forward in training: its tokens and whether there was a mask."""
    calls, real = [], jepa_lm.Model.forward

    def forward(self, tokens, positions=None, mask=None, cache=None):
        if torch.is_grad_enabled():
            calls.append((tokens, mask is None, positions is None))
        return real(self, tokens, positions, mask, cache)

    monkeypatch.setattr(jepa_lm.Model, "forward", forward)
    return calls


@pytest.mark.parametrize("accum", [1, 4])
def test_regular_and_lbd_0_are_the_same_run_to_the_last_bit(accum, tmp_path, monkeypatch):
    calls = spied(monkeypatch)
    flags = f"--grad_accum {accum} --batch_size 4"
    regular = run("jepa_lm", tmp_path / "regular", f"{flags} --regular")
    seen = [list(calls)]
    for name, others in {
        "0": "--num_prediction_steps 2",
        "k": "--num_prediction_steps 4 --predictors 5",
        "v": "--view_based_jepa",
    }.items():
        calls.clear()
        lines = run("jepa_lm", tmp_path / name, f"{flags} --lbd 0 {others}")
        assert without_time(lines) == without_time(regular)
        seen.append(list(calls))
        assert len(calls) == 6 * accum and all(no_mask and no_positions for _, no_mask, no_positions in calls)
    for other in seen[1:]:
        assert all(torch.equal(a[0], b[0]) for a, b in zip(seen[0], other, strict=True))
    assert same(load(tmp_path / "regular")["model"], load(tmp_path / "0")["model"])
    assert {"loss", "llm_loss", "valid_tokens", "grad_norm"} <= regular[1].keys() and "jepa_loss" not in regular[1]


def test_regular_and_lbd_0_are_the_same_run_in_two_processes(tmp_path):
    runs = {}
    for name, flags in {"regular": "--regular", "zero": "--lbd 0 --num_prediction_steps 2"}.items():
        runs[name] = two_processes("jepa_lm", tmp_path / name, f"--batch_size 2 --grad_accum 2 {flags}")
    assert without_time(runs["regular"]) == without_time(runs["zero"])
    close(run("jepa_lm", tmp_path / "one", "--regular"), runs["zero"], 2e-5)


def test_forced_pairs_change_neither_the_loss_nor_its_gradient(tmp_path, monkeypatch):
    calls = spied(monkeypatch)
    plain = run("jepa_lm", tmp_path / "plain", "--lbd 0")
    calls.clear()
    forced = run("jepa_lm", tmp_path / "forced", "--lbd 0 --force_pairs")
    assert not any(no_mask for _, no_mask, _ in calls) and forced[1]["pairs"] == 2 and plain[1]["pairs"] == 0
    assert forced[1]["jepa_loss"] > 0
    for a, b in zip(plain, forced, strict=True):
        for name in {"loss", "llm_loss", "grad_norm", "valid_tokens"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-5), name


@pytest.mark.parametrize("lbd", [0.0, 0.5])
def test_the_losses_are_means_over_the_tokens_and_pairs_of_the_whole_update(lbd, tmp_path):
    """Two micro-batches with unequal numbers of tokens and of pairs."""
    chats = [RAGGED[0], RAGGED[1], chat("x" * 60, user="y"), RAGGED[3]]
    path = write_chats(tmp_path / "chats", chats)
    flags = f"--train_file {path} --eval_file {path} --lbd {lbd} --max_train_steps 1 --batch_size 2 --grad_accum 2"
    lines = run("jepa_lm", tmp_path / "run", flags)
    torch.manual_seed(0)
    model = jepa_lm.Model(jepa_lm.Config(**load(tmp_path / "run")["config"]))
    llm, jepa, pairs = naive_losses(model, chats, JepaArgs())
    (llm + lbd * jepa).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    answers = sum(len(tokens_of(messages[-1:])) - 1 for messages in chats)
    assert lines[1]["llm_loss"] == pytest.approx(llm.item(), rel=1e-5)
    assert lines[1]["loss"] == pytest.approx((llm + lbd * jepa).item(), rel=1e-5)
    assert lines[1]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert lines[0]["llm_loss"] == pytest.approx(llm.item(), rel=1e-5)  # validation, before the update
    assert lines[1]["valid_tokens"] == answers / 4 and lines[1]["pairs"] == (pairs / 4 if lbd else 0)


def test_unmask_user_supervises_everything_in_training_and_nothing_more_in_validation(tmp_path):
    """The document's puzzle on purpose: training losses over other tokens do not compare, validation losses do."""
    path = write_chats(tmp_path / "chats", RAGGED * 2)
    for source in ("", f"--train_file {path}"):
        lines = [
            run("jepa_lm", tmp_path / f"{len(source)}{flags}", f"{source} --max_train_steps 1 --batch_size 4 {flags}")
            for flags in ("--regular", "--regular --unmask_user")
        ]
        assert lines[0][0] == lines[1][0] and lines[0][1]["valid_tokens"] < lines[1][1]["valid_tokens"]
        if source:
            tokens = [len(tokens_of(messages)) - 1 for messages in (RAGGED * 2)[:7]]
            assert min(tokens) <= lines[1][1]["valid_tokens"] <= max(tokens)


def test_jepa_metrics_are_the_ones_of_the_design(tmp_path):
    lines = run("jepa_lm", tmp_path, "--eval_samples 300")
    train, val, final = lines[2], lines[0], lines[-1]
    names = {
        "loss",
        "llm_loss",
        "jepa_loss",
        "cos_paired",
        "cos_unpaired",
        "cos_targets",
        "valid_tokens",
        "pairs",
        "skipped",
    }
    assert names <= train.keys() and {"loss", "llm_loss", "exact_match", "prefix_match", "result_match"} <= val.keys()
    assert train["loss"] == pytest.approx(train["llm_loss"] + 0.5 * train["jepa_loss"])
    assert train["jepa_loss"] == pytest.approx(1 - train["cos_paired"], abs=1e-5) and train["pairs"] == 2
    assert final["common_exact_match"] < 0.02 and 0.02 < final["common_result_match"] < 0.12
    assert 0.02 < final["copy_result_match"] < 0.12 and val["loss"] == val["llm_loss"]


def test_debug_counts_right(tmp_path, capsys):
    path = write_chats(tmp_path / "chats", RAGGED)
    flags = f"--train_file {path} --eval_file {path} --batch_size 4 --max_train_steps 1"
    lines = run("jepa_lm", tmp_path / "run", f"{flags} --debug 5")
    out = capsys.readouterr().out
    plain = sum(len(tokens_of(messages)) for messages in RAGGED)
    answers = sum(len(tokens_of(messages[-1:])) - 1 for messages in RAGGED)
    extra = sum(2 + len(step) for messages in RAGGED for _, step in naive_pairs(messages, JepaArgs()))
    assert f"step=1, input_batch=4, forward_batch=4, tokens forward={plain + extra} plain={plain} (" in out
    assert f"valid_tokens={answers}, loss_per_token={lines[1]['llm_loss']:.4f}, pairs=5, skipped=1" in out
    for name in ("cos_paired", "cos_unpaired", "cos_targets"):
        assert re.search(
            rf"{name} +mean={lines[1][name]:.4f} std=\d\.\d{{4}} min=-?\d\.\d{{4}} max=-?\d\.\d{{4}}$", out, re.M
        )
    run("jepa_lm", tmp_path / "zero", f"{flags} --debug 5 --lbd 0")
    out = capsys.readouterr().out
    assert f"tokens forward={plain} plain={plain} (1.00x)" in out and "cos_" not in out
    run("jepa_lm", tmp_path / "one", f"{flags} --debug 1")
    assert "cos_" not in capsys.readouterr().out


def test_collapse_is_said_once(capsys):
    describe = jepa_lm.describer()
    metrics = {"loss": 1.0, "llm_loss": 1.0, "jepa_loss": 0.1, "cos_paired": 0.97, "cos_unpaired": 0.94}
    assert "0.970 paired, 0.940 unpaired" in describe(metrics) and not capsys.readouterr().out
    describe(metrics | {"cos_unpaired": 0.951, "cos_paired": 0.972})
    assert not capsys.readouterr().out
    for _ in range(2):
        describe(metrics | {"cos_unpaired": 0.96})
    assert capsys.readouterr().out.count("warning: the embeddings have collapsed") == 1


def test_chats_without_pairs_are_said_to_be(tmp_path, capsys):
    path = write_chats(tmp_path / "chats", [chat(f"answer {i}", user="x" * i) for i in range(9)])
    lines = run("jepa_lm", tmp_path / "run", f"--train_file {path}")
    assert "warning: no answer has two steps" in capsys.readouterr().out
    assert lines[1]["skipped"] == 1 and lines[1]["pairs"] == 0 and "jepa_loss" not in lines[1]
    lines = run("jepa_lm", tmp_path / "views", f"--train_file {path} --view_based_jepa")
    assert "warning: no answer" not in capsys.readouterr().out
    assert lines[1]["skipped"] == 0 and lines[1]["pairs"] == 1


@pytest.mark.parametrize("flags", ["--tube --jepa_loss mse", "--view_based_jepa --stop_grad_target --gamma 0.5"])
def test_accumulating_the_other_modes_equals_one_batch(flags, tmp_path):
    path = write_chats(tmp_path / "chats", RAGGED * 5)
    one = run("jepa_lm", tmp_path / "one", f"{flags} --train_file {path} --batch_size 8")
    four = run("jepa_lm", tmp_path / "four", f"{flags} --train_file {path} --batch_size 2 --grad_accum 4")
    close(one, four, 2e-5)


def test_two_processes_when_one_of_them_has_no_pair(tmp_path):
    """Sorted by length, the chats of one step come first: the first process has no pair, the second has five or ten."""
    path = write_chats(tmp_path / "chats", [chat("one")] * 8 + [RAGGED[2]] * 8)
    flags = f"--train_file {path} --eval_file {path} --jepa_loss l2 --predictors 0"
    one = run("jepa_lm", tmp_path / "one", f"{flags} --batch_size 16")
    assert all(line["skipped"] == 0.5 and line["pairs"] == 1 for line in one if line["split"] == "train")
    close(one, two_processes("jepa_lm", tmp_path / "two", f"--batch_size 8 {flags}"), 2e-5)


# ==== jepa_lm.py: generation =========================================================================================


def greedy(model, prompt, limit):
    """No cache, no batch: a whole pass for every token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + limit and (tokens[-1] != 257 or len(tokens) == len(prompt)):
        tokens.append(int((model(torch.tensor([tokens]))[0, -1] @ model.embed.weight.T).argmax()))
    return tokens[len(prompt) :]


def test_generation_equals_greedy_decoding_one_by_one():
    """Ragged prompts and answers: a missing padding mask or a wrong position shows only then."""
    model = jepa_model(hidden_size=64, num_layers=3)
    with torch.no_grad():
        model.embed.weight[257] *= 2.0  # ends come early for some
    generator = np.random.default_rng(0)
    prompts = [[259, *generator.integers(97, 123, n).tolist(), 257, 260] for n in (1, 30, 7, 2, 19, 11, 3, 45)]
    limits = [12, 12, 5, 12, 1, 12, 12, 9]
    mine = jepa_lm.generate(model.eval(), prompts, limits)
    with torch.no_grad():
        right = [greedy(model, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    assert mine == right and len({len(answer) for answer in mine}) > 2


def test_a_learned_answer_is_found_by_evaluation_and_by_prompt(tmp_path, capsys):
    """Four chats by heart. The greedy answer is right if and only if every token is, the right ones before it given."""
    known = RAGGED[:3]
    train = write_chats(tmp_path / "train", known)
    test = write_chats(tmp_path / "test", [*known, chat("never seen", user="zzz")])
    flags = (
        f"--train_file {train} --eval_file {test} --hidden_size 64 --num_layers 1 --batch_size 3 --lr 1e-2 --lbd 0.1"
    )
    out = tmp_path / "run"
    lines = run(
        "jepa_lm",
        out,
        f"{flags} --max_train_steps 80 --warmup_steps 5 --eval_interval 80 --log_interval 80 --device cpu",
        tiny=False,
    )
    final = lines[-1]
    assert final["exact_match"] == final["prefix_match"] == 0.75 and final["new_exact_match"] == 0.0
    checkpoint = load(out, "best.pt")
    model = jepa_lm.Model(jepa_lm.Config(**checkpoint["config"])).eval()
    model.load_state_dict(checkpoint["model"])
    for messages in known:
        tokens, start = tokens_of(messages), len(tokens_of(messages[:-1])) + 1
        guess = (model(torch.tensor([tokens]))[0] @ model.embed.weight.T).argmax(-1).tolist()
        assert guess[start - 1 : -1] == tokens[start:]

    def answer(*words):
        argv, sys.argv = sys.argv, ["jepa_lm.py", "--eval_only", "--out_dir", str(out), *words]
        try:
            jepa_lm.main()
        finally:
            sys.argv = argv
        return capsys.readouterr().out

    capsys.readouterr()
    assert answer("--prompt", "what?") == "one\n\ntwo is longer\n\n3\n"
    assert answer("--prompt", "q", "--system", "be brief") == "a single step\n"
    assert "0.7500" in answer()
    assert "1.0000" in answer("--eval_file", str(train))
    with pytest.raises(SystemExit, match="--prompt: 11 tokens, expected fewer than --max_length 9"):
        answer("--prompt", "12345678", "--max_length", "9")


@pytest.mark.parametrize(
    "answer,scores",
    [
        ("2+1=3\n\n3+1=4", (1, 1, 1)),
        ("2+1=3\n\n3+1=4 and so on", (0, 1, 0)),
        ("2+2=4\n\n3+1=4", (0, 0, 1)),
        ("2+1=3\n\n0+3+1=4", (0, 0, 1)),
        ("2+1=3\n\n3+1=5", (0, 0, 0)),
        (24 * "1" + "=42", (0, 0, 0)),  # cut after the 4, twice as long as the right one
    ],
)
def test_what_counts_as_a_match(answer, scores, monkeypatch, tmp_path):
    right = chat("2+1=3\n\n3+1=4")
    monkeypatch.setattr(jepa_lm, "make_world", lambda seed, unmask: ([jepa_lm.encode(right)], [jepa_lm.encode(right)]))
    monkeypatch.setattr(
        jepa_lm, "generate", lambda model, prompts, limits: [[*answer.encode(), 257][:n] for n in limits]
    )
    args = JepaArgs(device="cpu", dtype="float32")
    metrics = jepa_lm.evaluate(jepa_model(), jepa_lm.make_data(args), args)
    assert tuple(metrics[name] for name in ("exact_match", "prefix_match", "result_match")) == scores


BAD_JEPA_FLAGS = {
    "--regular --lbd 0.5": "--lbd means nothing with --regular",
    "--regular --tube": "--tube means nothing with --regular",
    "--regular --predictors 3": "--predictors means nothing with --regular",
    "--tube --predictors 3": "--predictors means nothing with --tube",
    "--tube --sigreg 0.1": "--sigreg means nothing with --tube",
    "--regular --sigreg 0.1": "--sigreg means nothing with --regular",
    "--view_based_jepa --num_prediction_steps 2": "--view_based_jepa has one pair per chat",
    "--view_based_jepa --tube": "--view_based_jepa has one pair per chat",
    "--force_pairs": "--force_pairs is for --lbd 0",
    "--gamma 0 --lbd 0": "leaves nothing to learn",
    "--gamma 0 --regular": "leaves nothing to learn",
    "--gamma 0 --jepa_ratio 0": "leaves nothing to learn",
    "--jepa_loss infonce --batch_size 1": "--jepa_loss infonce needs --batch_size 2 or more",
    "--eval_file x": "--eval_file needs --train_file",
    "--prompt hi": "--prompt needs a question, --eval_only",
    "--system hi": "--system needs --prompt",
    "--hidden_size 30": "--hidden_size 30 must be a multiple of 2 * --num_heads = 4",
    "--jepa_loss cubic": "invalid choice: 'cubic'",
    "--jepa_ratio 1.5": "at most 1.0",
}


@pytest.mark.parametrize("flags", BAD_JEPA_FLAGS)
def test_bad_jepa_flags_are_refused_with_the_reason(flags, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["jepa_lm.py", *(TINY["jepa_lm"] if "30" in flags else "").split(), *flags.split()]
    )
    with pytest.raises(SystemExit) as stop:
        jepa_lm.main()
    assert stop.value.code == 2 and BAD_JEPA_FLAGS[flags] in capsys.readouterr().err.splitlines()[-1]


# ==== the shared part: proven through each script ====================================================================


def test_the_shared_part_is_identical_in_all_scripts():
    assert len({(HERE / f"{name}.py").read_text().split("\n# ==== shared")[1] for name in SCRIPTS}) == 1


PRINTED = {"nepa_deep": "best_copy_loss"}  # what shows in the closing table which weights were evaluated


def own_data(script, folder, seed=0):
    """Real data in a folder: 60 random samples, others for each seed. Returns the flag that names them."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    if script == "nepa_deep":
        np.save(folder / "images.npy", rng.integers(0, 256, (60, 16, 16, 3), np.uint8))
        np.save(folder / "labels.npy", np.arange(60) % 3)
        return f"--data_dir {folder}"
    if script == "trm_deep":
        np.save(folder / "train_embeddings_chunk_0.npy", rng.standard_normal((60, 6, 32), np.float32))
        return f"--data_folder {folder}"
    texts = [bytes(text).decode() for text in rng.integers(97, 123, (60, 9), np.uint8)]
    write_chats(folder / "chats", [chat(f"{text[:3]}\n\n{text[3:6]}", text[6:]) for text in texts])
    return f"--train_file {folder}/chats"


@each_script
def test_a_run_writes_its_lines_and_a_checkpoint_that_eval_only_repeats(script, tmp_path, capsys):
    lines = run(script, tmp_path, "--ema_decay 0.9 --grad_clip 0.01 --weight_decay 0.3 --grad_checkpoint False")
    assert [(line["split"], line["step"]) for line in lines] == [
        *[("val", 0), ("train", 1), ("train", 2), ("train", 3), ("val", 3), ("train", 4), ("train", 5), ("train", 6)],
        *[("val", 6), ("final", 6)],
    ]
    train = [line for line in lines if line["split"] == "train"]
    assert [line["samples"] for line in train] == [8, 16, 24, 32, 40, 48]
    assert {"loss", "lr", "grad_norm", "seconds"} <= train[0].keys()
    checkpoint, best = load(tmp_path), min((line["loss"], line["step"]) for line in lines if line["split"] == "val")
    assert checkpoint["script"] == script and checkpoint["step"] == 6 and not checkpoint["args"]["grad_checkpoint"]
    assert (checkpoint["best"]["loss"], checkpoint["best"]["step"]) == best
    assert (lines[-1]["best_loss"], lines[-1]["best_step"]) == best and load(tmp_path, "best.pt")["step"] == best[1]
    # Weight decay is for matrices; the gradient is clipped, the logged norm is the one before.
    groups = [(group["weight_decay"], len(group["params"])) for group in checkpoint["optimizer"]["param_groups"]]
    vectors = sum(x.ndim < 2 for x in checkpoint["model"].values())
    assert groups == [(0.3, len(checkpoint["model"]) - vectors), (0.0, vectors)]
    moments = math.sqrt(sum(float(state["exp_avg_sq"].sum()) for state in checkpoint["optimizer"]["state"].values()))
    assert moments <= 0.01 < train[0]["grad_norm"]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    run(script, tmp_path, "--eval_only", tiny=False)
    assert f"{lines[-1][PRINTED.get(script, 'best_loss')]:.4f}" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_trm_metrics_are_the_ones_of_the_design(tmp_path):
    lines = run("trm_deep", tmp_path, "--curriculum_end_step 4 --eval_samples 400")
    final, train = lines[-1], [line for line in lines if line["split"] == "train"]
    assert final["loss"] == final["step_1_loss"] and final["zero_loss"] == pytest.approx(1.0, rel=1e-4)
    assert 0.05 < final["no_memory_exact_acc"] < 0.15 and 0.4 < final["opening_exact_acc"] < 0.65
    assert [line["supervision_weight"] for line in train] == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]
    assert [line.get("mean_steps") for line in train] == [None, None, 3.0] * 2  # where rows halted


@each_script
def test_a_seed_decides_everything_and_evaluating_changes_nothing(script, tmp_path):
    once = run(script, tmp_path / "a", "--ema_decay 0.9")
    again = run(script, tmp_path / "b", "--ema_decay 0.9 --eval_interval 1 --eval_samples 1")
    train = [[line for line in without_time(lines) if line["split"] == "train"] for lines in (once, again)]
    assert train[0] == train[1] and same(load(tmp_path / "a")["model"], load(tmp_path / "b")["model"])
    assert all(math.isfinite(value) for line in again for value in line.values() if not isinstance(value, str))
    assert run(script, tmp_path / "c", "--seed 1 --max_train_steps 1")[1]["loss"] != once[1]["loss"]


def do_at(monkeypatch, script, at, action):
    """Call action() at the beginning of the micro-batch number `at`, counted from 1."""
    real, count = SCRIPTS[script].compute_loss, itertools.count(1)

    def spy(*inputs):
        if next(count) == at:
            action()
        return real(*inputs)

    monkeypatch.setattr(SCRIPTS[script], "compute_loss", spy)


def interrupt(monkeypatch, script, at, number=signal.SIGTERM):
    do_at(monkeypatch, script, at, lambda: os.kill(os.getpid(), number))


STATE = "model", "ema", "optimizer", "rng", "carry", "best", "step", "sums"


@pytest.mark.parametrize(
    "script,name,interval",
    [("nepa_deep", "SIGTERM", 3), ("trm_deep", "SIGINT", 5), ("jepa_lm", "SIGHUP", 5), ("trm_deep", "SIGUSR1", 3)],
)
def test_resumed_equals_uninterrupted_to_the_last_bit(script, name, interval, tmp_path, monkeypatch, capsys):
    """Stopped inside a log interval and the life of the carried rows, perhaps where an evaluation is due."""
    flags = "--max_train_steps 10 --log_interval 4 --save_interval 0 --ema_decay 0.9 --grad_accum 2"
    flags, number = f"{flags} --eval_interval {interval}", signal.Signals[name]
    whole, handler = run(script, tmp_path / "whole", flags), signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        interrupt(patch, script, 2 * 5 - 1, number)
        run(script, tmp_path / "parts", flags)
    assert stop.value.code == 128 + number and signal.getsignal(number) == handler
    assert f"--resume --out_dir {tmp_path / 'parts'}" in capsys.readouterr().out
    assert load(tmp_path / "parts")["step"] == 5 and lines_of(tmp_path / "parts")[-1]["step"] == max(4, interval)
    assert without_time(run(script, tmp_path / "parts", "--resume", tiny=False)) == without_time(whole)
    one, two = load(tmp_path / "whole"), load(tmp_path / "parts")
    assert all(same(one[part], two[part]) for part in STATE)
    assert same(load(tmp_path / "whole", "best.pt")["model"], load(tmp_path / "parts", "best.pt")["model"])


def test_a_run_in_a_thread_needs_no_handlers(tmp_path):
    thread = threading.Thread(target=run, args=("jepa_lm", tmp_path))
    thread.start()
    thread.join()
    assert lines_of(tmp_path)[-1]["split"] == "final"


def signal_to(script, who, name, rank):
    """Process `who` receives SIGTERM during its fourth update, or its second pass over validation data."""
    real, count = SCRIPTS[script].eval_batches, itertools.count(1)

    def kill():
        if rank == who:
            os.kill(os.getpid(), signal.SIGTERM)

    def batches(*inputs):
        this = next(count)
        for batch in real(*inputs):
            yield batch
            if this == 2:
                kill()

    if name == "compute_loss":
        do_at(pytest.MonkeyPatch(), script, 4, kill)
    else:
        SCRIPTS[script].eval_batches = batches


@each_script
@pytest.mark.parametrize("name,count", [("eval_batches", 1), ("eval_batches", 2), ("compute_loss", 2)])
def test_a_signal_to_one_process_ends_all_in_good_order_also_within_an_evaluation(script, name, count, tmp_path):
    """NEPA's first evaluation has two passes over data, for the others the second pass is the second evaluation."""
    flags = "--eval_samples 19 --batch_size"
    stop = functools.partial(signal_to, script, count - 1, name)
    processes = Processes(script, tmp_path / "parts", f"{flags} {8 // count}", count, prepare=stop)
    assert processes.wait() == [143] * count, processes.text()
    step, lines = load(tmp_path / "parts")["step"], lines_of(tmp_path / "parts")
    launcher = f"torchrun --nproc_per_node {count}" if count == 2 else "python"
    assert f"stopped after step {step}; go on with: {launcher} {script}.py --resume" in processes.text()
    assert count == 1 or not processes.text(1)
    assert step == (4 if name == "compute_loss" else 0 if script == "nepa_deep" else 3)
    assert [line["split"] for line in lines].count("val") == (step + 2) // 3  # half an evaluation is none
    lines = run(script, tmp_path / "parts", "--resume --batch_size 8", tiny=False)
    close(run(script, tmp_path / "whole", f"{flags} 8"), lines, (count - 1) * 2e-5)


@each_script
@pytest.mark.parametrize("at", [1, 5])
def test_one_command_starts_a_run_and_resumes_it_after_a_crash_without_repeating_a_line(
    script, at, tmp_path, monkeypatch
):
    """The last checkpoint is of the first validation, or of step 3 while the log goes on to step 4."""
    whole = run(script, tmp_path / "whole", "--save_interval 0")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        do_at(patch, script, at, lambda: 1 / 0)
        run(script, tmp_path / "parts", "--save_interval 0 --resume")
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "spl')  # half a line
    assert load(tmp_path / "parts")["step"] == (0 if at == 1 else 3)
    for _ in range(2):  # a finished run resumed is only summed up again
        assert without_time(run(script, tmp_path / "parts", "--save_interval 0 --resume")) == without_time(whole)
    longer = run(script, tmp_path / "parts", "--resume --max_train_steps 8", tiny=False)
    assert [line["step"] for line in longer if line["split"] == "final"] == [8]


def stopped(capsys, script, out_dir, flags, tiny=True):
    """The last line of what a run that fails says, and its exit code."""
    with pytest.raises(SystemExit) as stop:
        run(script, out_dir, flags, tiny)
    text = capsys.readouterr().err
    return (stop.value.code, 1)[isinstance(stop.value.code, str)], (text.splitlines() or [stop.value.code])[-1]


@each_script
def test_a_run_is_resumed_with_its_flags_but_for_the_few_that_may_change(script, tmp_path, capsys):
    run(script, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for flags, code, message in (
        ("--resume --lr 0.5", 2, "--lr 0.5 conflicts with the run in"),
        ("--resume --hidden_size 64", 2, "--hidden_size 64 conflicts with the run in"),
        ("--eval_only --seed 4", 2, "--seed 4 conflicts"),
        ("--resume --batch_size 4", 1, "--batch_size * --grad_accum * processes is 4, expected 8"),
        ("", 2, "holds a run; --resume continues it, or delete it first"),
    ):
        found = stopped(capsys, script, tmp_path, flags, tiny=False)
        assert found[0] == code and message in found[1]
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    flags = "--resume --batch_size 4 --grad_accum 2 --max_train_steps 8 --log_interval 2"
    lines = run(script, tmp_path, flags, tiny=False)
    assert lines[-1]["step"] == 8 and lines[-3]["samples"] == 64
    run(script, tmp_path, "--resume --max_train_steps 5", tiny=False)  # done already


@each_script
def test_data_may_move_but_not_change(script, tmp_path, monkeypatch, capsys):
    """The same samples under another path from another folder go on; others, as many, do not."""
    more, out = "--min_lr_ratio 1 --max_train_steps", tmp_path / "run"
    whole = run(script, tmp_path / "whole", f"{own_data(script, tmp_path / 'whole_data')} {more} 6")
    monkeypatch.chdir(tmp_path)
    run(script, out, f"{own_data(script, Path('data'))} {more} 3")
    Path("data").rename("gone")
    monkeypatch.chdir("/")
    assert "data" in stopped(capsys, script, out, "--resume", tiny=False)[1]
    code, text = stopped(capsys, script, out, f"--resume {own_data(script, tmp_path / 'other', 1)}", tiny=False)
    assert re.search(r"train data is 54 samples, \w+, expected 54 samples, \w+ as in the checkpoint", text)
    moved = own_data(script, tmp_path / "moved")
    assert without_time(run(script, out, f"--resume {moved} --max_train_steps 6", tiny=False)) == without_time(whole)
    capsys.readouterr()
    run(script, out, f"--eval_only {moved}", tiny=False)
    assert f"{whole[-1][PRINTED.get(script, 'best_loss')]:.4f}" in capsys.readouterr().out
    # A batch larger than the data runs into the next epoch.
    lines = run(script, tmp_path / "large", f"{moved} --batch_size 80 --max_train_steps 2")
    assert lines[-1]["step"] == 2 and lines[-3]["samples"] == 160


@each_script
def test_init_from_takes_the_averaged_weights_of_a_run_however_they_are_wrapped(script, tmp_path, capsys, monkeypatch):
    old, path = run(script, tmp_path / "old", "--ema_decay 0.5 --max_train_steps 3"), tmp_path / "weights.pt"
    weights = load(tmp_path / "old")["ema"]
    torch.save({"state_dict": {f"module._orig_mod.model.{name}": x for name, x in weights.items()}}, path)
    for i, file in enumerate((tmp_path / "old" / "ckpt.pt", path)):
        new = run(script, tmp_path / str(i), f"--init_from {file} --max_train_steps 1")
        assert {**new[0], "step": 3} == old[-2]
    name = next(iter(weights))
    torch.save(weights | {name: weights[name] * math.nan}, path)
    found = stopped(capsys, script, tmp_path / "a", f"--init_from {path}")
    assert found == (1, f"error: {path}: weight {name} is not finite, expected numbers")
    torch.save({other: x for other, x in weights.items() if other != name}, path)
    found = stopped(capsys, script, tmp_path / "b", f"--init_from {path}")[1]
    assert found.startswith(f"error: {path}: ") and name in found
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors" in stopped(capsys, script, tmp_path / "c", f"--init_from {path}.safetensors")[1]


@each_script
def test_accumulating_4_x_8_equals_1_x_32(script, tmp_path):
    one = run(script, tmp_path / "one", "--batch_size 32")
    close(one, run(script, tmp_path / "four", "--batch_size 8 --grad_accum 4"), 2e-5)
    one, four = load(tmp_path / "one"), load(tmp_path / "four")
    for part, atol in (("model", 1e-5), ("carry", 1e-2)):
        for name, value in one[part].items():
            torch.testing.assert_close(four[part][name], value, atol=atol, rtol=1e-2)


@pytest.mark.parametrize(
    "script,accum,flags",
    [
        (script, accum, flags)
        for script in SCRIPTS
        for accum, flags in ((1, ""), (3, "--grad_checkpoint --eval_samples 3"))
    ]
    + [("trm_deep", 3, "--enable_deep_supervision False")],
)
def test_two_processes_equal_one(script, accum, flags, tmp_path):
    """19 validation samples are batches of 4, 4, 4, 4 and 3 for two; of 3 the second process has none at all."""
    flags = f"--eval_samples 19 {flags}"
    one = run(script, tmp_path / "one", f"{flags} --batch_size {8 * accum}")
    close(one, two_processes(script, tmp_path / "two", f"{flags} --batch_size 4 --grad_accum {accum}"), 2e-5)
    carry = load(tmp_path / "two")["carry"]
    for name, value in load(tmp_path / "one")["carry"].items():
        torch.testing.assert_close(carry[name], value, atol=1e-2, rtol=1e-2)
    # The rows lie in the checkpoint in one order however they were split: one process takes the run over from two.
    grown = "--resume --max_train_steps 8"
    lines = run(script, tmp_path / "two", f"{grown} --batch_size {8 * accum} --grad_accum 1", tiny=False)
    close(run(script, tmp_path / "one", grown, tiny=False), lines, 1e-4)


def always_sure(rank=0):
    """Every row halts as soon as it may."""
    real = trm_deep.Model.__init__

    def init(self, config):
        real(self, config)
        torch.nn.init.constant_(self.q_head.bias, 5.0)

    trm_deep.Model.__init__ = init


def test_two_processes_equal_one_when_rows_halt_at_different_steps(tmp_path, monkeypatch):
    flags = "--halt_exploration_prob 0.6 --halt_max_steps 4 --max_train_steps 8 --batch_size"
    monkeypatch.setattr(trm_deep.Model, "__init__", trm_deep.Model.__init__)  # undone at the end
    always_sure()
    one, halted = run("trm_deep", tmp_path / "one", f"{flags} 24"), load(tmp_path / "one")["carry"]
    assert len(set(halted["drawn"].tolist())) > 2 and 0 < halted["halted"].sum() < len(halted["halted"])
    close(one, two_processes("trm_deep", tmp_path / "two", f"{flags} 4 --grad_accum 3", prepare=always_sure), 2e-5)
    carry = load(tmp_path / "two")["carry"]
    assert all(torch.equal(halted[name], carry[name]) for name in ("drawn", "halted", "steps", "min_steps"))


@each_script
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_trains_close_to_float32_and_resumes(script, dtype, tmp_path, monkeypatch):
    flags = "--warmup_steps 1 --max_train_steps 8 --log_interval 8"
    mixed = run(script, tmp_path / "mixed", f"{flags} --dtype {dtype}")
    assert run(script, tmp_path / "plain", flags)[-1]["loss"] == pytest.approx(mixed[-1]["loss"], rel=0.03)
    assert all(value.dtype == torch.float32 for value in load(tmp_path / "mixed")["model"].values())
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt(patch, script, at=4)
        run(script, tmp_path / "parts", f"{flags} --dtype {dtype}")
    assert without_time(run(script, tmp_path / "parts", "--resume", tiny=False)) == without_time(mixed)


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
    eager = run(script, tmp_path / "eager", flags)
    close(eager, run(script, tmp_path / "one", f"{flags} --compile on"), 1e-4)
    assert not counters["graph_break"] and 0 < counters["stats"]["unique_graphs"] <= 1 + (script == "jepa_lm")
    flags += " --compile on --batch_size 4 --grad_checkpoint"
    close(eager, two_processes(script, tmp_path / "two", flags, prepare=compile_quickly), 1e-4)


BAD_FLAGS = {
    "--lr fast": "invalid float value: 'fast'",
    "--lr inf": "'inf', expected 0 to 1e+38",
    "--batch_size 0": "'0', expected 1 to 1e+38",
    "--beta1 1.5": "'1.5', expected 0 to 0.999999",
    "--grad_checkpoint maybe": "invalid boolean value: 'maybe'",
    "--device quantum": "--device quantum",
    "--device meta": "--device meta",
    "--wandb_mode maybe": "invalid choice: 'maybe'",
    f"--warmup_steps {10**400}": "expected 0 to 1e+38",
    "--run_name=": "--run_name is empty, expected a value",
    "--seed 4294967296": "'4294967296', expected 0 to 4294967295",
    "--resume": "need the --out_dir",
    "--unknown 1": "unrecognized arguments: --unknown 1",
}
BAD_METHOD_FLAGS = {
    "trm_deep": {
        "--deep_supervision_weight 0.3": "--deep_supervision_weight needs --enable_deep_supervision",
        "--enable_deep_supervision --deep_supervision_schedule cubic": "unknown schedule 'cubic'",
        "--enable_deep_supervision --deep_supervision_schedule 0.5,1": "expected 3 weights",
        "--enable_deep_supervision --curriculum_start_step 9 --curriculum_end_step 3": "must not come before",
        "--data_folder=": "--data_folder is empty",
        "--predict a.npy b.npy": "--predict needs --eval_only",
    },
    "nepa_deep": {
        "--download": "--download needs the --data_dir to download to",
        "--intermediate_loss_weight 2": "--intermediate_loss_weight needs --use_intermediate_loss",
        "--probe_layer 5": "--probe_layer 5 must be at most --num_layers 4",
        "--crop_scale 0": "'0', expected 0.01 to 1",
        "--rope_rescale 0.5": "'0.5', expected 1 to 1e+38",
        "--probe_samples 5": "'5', expected 10 to 1e+38",
    },
    "jepa_lm": {
        "--jepa_loss infonce --batch_size 1": "--jepa_loss infonce needs --batch_size 2 or more",
        "--gamma 0 --regular": "leaves nothing to learn",
        "--eval_file x": "--eval_file needs --train_file",
        "--prompt x": "need --eval_only",
    },
}
BAD_SIZES = {  # said by Config
    ("trm_deep", "--hidden_size 30"): "hidden_size 30, expected a multiple of 2 * num_heads = 8",
    ("nepa_deep", "--num_heads 3"): "hidden_size 64, expected a multiple of 4 * num_heads = 12",
    ("nepa_deep", "--patch_size 5"): "image_size 32, expected a multiple of patch_size 5",
    ("jepa_lm", "--hidden_size 30"): "hidden_size is 30, expected a multiple of 2 * num_heads = 16",
}


@each_script
def test_bad_flags_are_one_line_with_the_reason(script, tmp_path, capsys):
    for flags, message in {**BAD_FLAGS, **BAD_METHOD_FLAGS[script]}.items():
        with pytest.raises(SystemExit) as stop, typed(script, flags):
            SCRIPTS[script].main()
        assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    for (of, flags), message in BAD_SIZES.items():
        if of == script:
            code, text = stopped(capsys, script, tmp_path, f"--out_dir {tmp_path} {flags}", tiny=False)
            assert code == 1 and text.startswith("error: ") and message in text


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
    code = f"import sys, {script}; {script}.main(); assert 'wandb' not in sys.modules"
    words = words_of(script, tmp_path / "off").split()
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=HERE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("WANDB_MODE", {"trm_deep": "wrong"}.get(script, ""))
    lines = run(script, tmp_path, "--wandb_mode offline --run_name proof")
    prefix = {"train": "", "val": "val/", "final": "final/"}
    names = {prefix[line["split"]] + name for line in lines for name in line if name not in ("step", "split")}
    assert not in_wandb(tmp_path, names | {"proof"})
    run(script, tmp_path, "--resume --max_train_steps 7", tiny=False)  # the same run goes on
    assert {path.name for path in tmp_path.glob("wandb/*/*.wandb")} == {f"run-{load(tmp_path)['wandb_id']}.wandb"}


def test_the_schedule_is_linear_warm_up_then_cosine():
    args = argparse.Namespace(lr=2.0, warmup_steps=4, max_train_steps=14, min_lr_ratio=0.1)
    rates = [trm_deep.learning_rate(at, args) for at in (0, 1, 2, 3, 9, 14)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 1.1, 0.2])


def test_the_moving_average_is_the_formula(tmp_path):
    """Steps 1, 2, 3 saved one by one; the average recomputed from the saved weights."""
    flags, average = "--ema_decay 0.9 --save_interval 1 --warmup_steps 0 --min_lr_ratio 1 --resume", {}
    for update in range(3):
        run("jepa_lm", tmp_path, f"{flags} --max_train_steps {update + 1}")
        now, decay = load(tmp_path), min(0.9, (1 + update) / (10 + update))
        for name, value in average.items():
            torch.testing.assert_close(now["ema"][name], decay * value + (1 - decay) * now["model"][name])
        average = now["ema"]


# ==== reliability ====================================================================================================


def die_in_a_write(at, moment, rank):
    """SIGKILL in the at-th atomic write: with half of the bytes written, before the file takes its place, or after."""
    real_sync, real_replace, count = os.fsync, os.replace, [0]

    def die(now):
        if count[0] == at and moment == now:
            os.kill(os.getpid(), signal.SIGKILL)

    def sync(file):
        count[0] += 1
        if moment == "half" and count[0] == at:
            os.truncate(file, os.fstat(file).st_size // 2)
        die("half")
        real_sync(file)

    def replace(*paths):
        die("before")
        real_replace(*paths)
        die("after")

    os.fsync, os.replace = sync, replace


def test_killed_at_20_moments_and_resumed_it_is_the_run_that_never_was(tmp_path):
    """Half of the kills come at a random time, half inside a random write of best.pt or ckpt.pt."""
    flags = "--max_train_steps 12 --eval_interval 4 --save_interval 2 --ema_decay 0.9 --resume"
    start = time.monotonic()
    assert Processes("trm_deep", tmp_path / "whole", flags).wait() == [0]
    seconds, whole = time.monotonic() - start, without_time(lines_of(tmp_path / "whole"))
    rng, kills, out = random.Random(0), 0, tmp_path
    while kills < 20:
        out, code = out / "next", None
        while code != 0:  # one life after another, until the run is complete
            in_a_write = functools.partial(die_in_a_write, rng.randint(1, 9), rng.choice(["half", "before", "after"]))
            process = Processes("trm_deep", out, flags, prepare=in_a_write if kills % 2 else None)
            (code,) = process.wait(120 if kills % 2 else rng.uniform(0, seconds))
            assert code in (0, -9), process.text()
            kills += code == -9
        assert without_time(lines_of(out)) == whole
        for name in ("ckpt.pt", "best.pt"):
            one, other = load(tmp_path / "whole", name), load(out, name)
            assert all(same(one[part], other[part]) for part in STATE)
        assert {path.name for path in out.iterdir()} == {"metrics.jsonl", "ckpt.pt", "best.pt"}


def test_torchrun_passes_a_signal_on_and_one_process_takes_over(tmp_path):
    """SIGTERM to torchrun, as a cluster sends it: both save after the same update."""
    words = f"-m torch.distributed.run --standalone --nproc_per_node 2 trm_deep.py {TINY['trm_deep']} {COMMON}"
    words += f" --batch_size 4 --max_train_steps 100000 --eval_interval 100000 --save_interval 0 --out_dir {tmp_path}"
    process = subprocess.Popen([sys.executable, *words.split()], cwd=HERE, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "metrics.jsonl").exists() or len(lines_of(tmp_path)) < 6:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    finally:
        process.kill()
    step = load(tmp_path)["step"]
    assert step >= 5 and lines_of(tmp_path)[-1]["step"] == step
    lines = run("trm_deep", tmp_path, f"--resume --batch_size 8 --max_train_steps {step + 2}", tiny=False)
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, step + 3))


def no_room(size, rank):
    """A file may grow to so many bytes; what is beyond fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("count", [1, 2])
def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(count, tmp_path):
    script = "trm_deep"
    whole, out = run(script, tmp_path / "whole", "--batch_size 16"), tmp_path / "run"
    run(script, out, "--batch_size 16 --max_train_steps 3")
    before = (out / "ckpt.pt").read_bytes()
    for file, size in (("metrics.jsonl", load(out)["log_size"] + 20), ("(ckpt|best).pt", 20_000)):
        again = f"--resume --max_train_steps 6 --save_interval 0 --batch_size {16 // count}"
        full = Processes(script, out, again, count=count, tiny=False, prepare=functools.partial(no_room, size))
        assert full.wait()[0] == 1
        error = re.findall("^error.*", full.text(), re.M)
        assert len(error) == 1 and re.match(rf"error: \S*/{file}: cannot be written \(.*\), expected ", error[0])
        assert "Traceback" not in full.text(count - 1)
        assert before == (out / "ckpt.pt").read_bytes() and not list(out.glob("*.tmp"))
    lines = run(script, out, "--resume --max_train_steps 6", tiny=False)
    assert [(line["split"], line["step"]) for line in lines] == [(line["split"], line["step"]) for line in whole]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert re.match(r"error: \[Errno \d+\] .*file", stopped(capsys, "trm_deep", tmp_path / "file" / "run", "")[1])


class Exploit:
    """Unpickled carelessly, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@each_script
def test_a_file_that_cannot_be_read_is_one_line_stays_and_runs_no_code(script, tmp_path, capsys):
    """Half a checkpoint, another script's, nonsense and code, in the place of each file that a script reads."""
    run(script, tmp_path / "run")
    good, mark = (tmp_path / "run" / "ckpt.pt").read_bytes(), tmp_path / "it_ran"
    foreign, pickled, objects = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"script": "other"}, foreign)
    torch.save({"script": script, "x": Exploit(mark)}, pickled)
    np.save(objects, np.array([Exploit(mark)], dtype=object), allow_pickle=True)
    data = own_data(script, tmp_path / "data")
    places = {"run/ckpt.pt": "--resume", "weights.pt": f"--init_from {tmp_path}/weights.pt"}
    places |= {f"data/{name}": data for name in os.listdir(tmp_path / "data")}
    if script == "trm_deep":
        places["in.npy"] = f"--eval_only --predict {tmp_path}/in.npy {tmp_path}/out.npy"
    contents = b"nonsense", good[: len(good) // 2], foreign.getvalue(), pickled.getvalue(), objects.getvalue()
    for (place, flags), content in itertools.product(places.items(), (*contents, pickle.dumps(Exploit(mark), 2))):
        (tmp_path / place).write_bytes(content)
        out = tmp_path / ("run" if flags.startswith(("--resume", "--eval_only")) else "new")
        code, text = stopped(capsys, script, out, flags, tiny=False)
        assert code == 1 and text.startswith(f"error: {tmp_path / place}:") and "\n" not in text
        assert not mark.exists() and (tmp_path / place).read_bytes() == content
        if place.endswith("ckpt.pt") and content == foreign.getvalue():
            assert "written by other.py" in text
    pickle.loads(pickle.dumps(Exploit(mark)))
    assert mark.exists()  # it would have
    run(script, tmp_path / "run", "--eval_only", tiny=False)  # best.pt
    (tmp_path / "run" / "ckpt.pt").write_bytes(good)
    assert run(script, tmp_path / "run", "--resume --max_train_steps 8", tiny=False)[-1]["step"] == 8


def fail_at(step, rank):
    """The second process fails in an update, as code with a bug would."""
    if rank == 1:
        for script in SCRIPTS:
            do_at(pytest.MonkeyPatch(), script, step, lambda: [].pop())


@each_script
def test_a_process_that_fails_takes_the_run_down_with_its_own_error_and_wandb_has_its_records(script, tmp_path):
    flags = "--batch_size 4 --max_train_steps 100000 --eval_interval 100000 --wandb_mode offline"
    processes = Processes(script, tmp_path, flags, count=2, prepare=functools.partial(fail_at, 5))
    assert processes.wait() == [1, 1]
    assert "IndexError: pop from empty list" in processes.text(1) and "rror" not in processes.text()
    assert not in_wandb(tmp_path, {"loss", "grad_norm", "val/loss"})


def test_one_bad_sample_is_named_where_it_stands_and_one_process_alone_says_so(tmp_path):
    x = np.random.default_rng(0).standard_normal((3, 30, 6, 8)).astype(np.float16)
    x[2, 7, 0, 0] = np.inf
    for count, names in enumerate((["train", "train", "val"], ["val", "train", "train"]), start=1):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i, name in enumerate(names):
            np.save(folder / f"{name}_embeddings_chunk_{i}.npy", x[i])
        flags = f"--data_folder {folder} --max_train_steps 40 --eval_samples 0 --batch_size {4 // count}"
        processes = Processes("trm_deep", folder / "run", flags, count)
        assert processes.wait() == [1] * count
        errors = re.findall("^error.*", processes.text(0) + processes.text(count - 1) * (count - 1), re.M)
        where = f"{folder}/{names[2]}_embeddings_chunk_2.npy: sample 7"
        assert errors == [f"error: {where} is not finite, expected numbers"]


@pytest.mark.parametrize("flags,code", [("--lr x", 2), ("--data_folder /nowhere", 1)])
def test_a_mistake_is_said_once_however_many_processes_there_are(flags, code, tmp_path):
    processes = Processes("trm_deep", tmp_path / "run", flags, count=2)
    assert processes.wait() == [code, code]
    assert len(re.findall("error: ", processes.text(0) + processes.text(1))) == 1


@each_script
@pytest.mark.parametrize("save,name", [(0, r"(\w*loss|grad_norm)"), (1, "norm of the weights")])
def test_an_absurd_learning_rate_stops_the_run_and_saves_nothing_broken(script, save, name, tmp_path, capsys):
    flags = f"--max_train_steps 50 --log_interval 10 --eval_interval 50 --warmup_steps 0 --save_interval {save}"
    _, text = stopped(capsys, script, tmp_path, f"{flags} --lr 1e30")
    assert re.match(rf"error: step \d+: train {name} is (nan|inf), expected a finite .*; the checkpoint stays", text)
    for file in ("ckpt.pt", "best.pt"):
        assert all(value.isfinite().all() for value in load(tmp_path, file)["model"].values())


def test_too_little_memory_is_one_line(tmp_path, monkeypatch, capsys):
    do_at(monkeypatch, "jepa_lm", 1, lambda: torch.empty(2**60))
    assert re.match("error: .*allocate.*; a smaller --batch_size or", stopped(capsys, "jepa_lm", tmp_path, "")[1])


def report_memory(rank):
    """Prints the most memory the process has ever had resident at its end."""
    real = nepa_deep.main
    nepa_deep.main = lambda: (real(), print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


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
    """Replaces the run by evaluations; prints the growth of memory, files and threads over the last 150."""

    def main():
        args = trm_deep.parse_args()[0]
        data = trm_deep.make_data(args)
        model = trm_deep.Model(data["config"]).eval()
        used = []
        for _ in range(200):
            trm_deep.evaluate(model, data, args)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            used.append([pages * resource.getpagesize(), len(os.listdir("/proc/self/fd")), threading.active_count()])
        print(json.dumps(np.subtract(used[199], used[49]).tolist()))

    trm_deep.main = main


def test_200_evaluations_leak_nothing(tmp_path):
    process = Processes("trm_deep", tmp_path, "--eval_samples 8", prepare=evaluate_200_times)
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
    assert without_time(run("trm_deep", tmp_path / "here", flags, tiny=False)) == without_time(lines_of(out))
    done = shell(f"python trm_deep.py --data_folder {tmp_path / 'none'}")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@each_script
@pytest.mark.parametrize("found", [None, argparse])
def test_without_its_data_py_a_script_says_so(script, found, monkeypatch):
    monkeypatch.setitem(sys.modules, "data", found)  # None: not there; otherwise another module of that name
    with pytest.raises(SystemExit, match="^error: .*; expected data.py beside this script"):
        exec((HERE / f"{script}.py").read_text(), {"__name__": script})


def readme_tables(script, heading):
    """The README's tables that begin so: of all scripts, and of this one."""
    sections = re.findall(rf"^## (?:Scaling|{script}).*?(?=^## )", (HERE / "README.md").read_text(), re.M | re.S)
    return "".join(re.findall(rf"^\| {heading} .*?\n\n", "".join(sections), re.M | re.S))


@each_script
def test_help_fits_two_screens_and_lists_the_flags_of_the_readme(script):
    text = shell(f"python {script}.py --help").stdout
    flags = text.partition("\ntraining:")[2].rpartition("\nWithout --")[0]
    assert text.count("\n") <= 100 and max(map(len, flags.splitlines())) <= 120
    listed = re.findall(r"--\w+", readme_tables(script, "group"))
    assert sorted(listed) == sorted(re.findall(r"^  (--\w+)", flags, re.M))  # none twice
    assert set(listed) == set(re.findall(r'flag\(\s*"(--\w+)', (HERE / f"{script}.py").read_text()))
    assert "--learning_rate" in flags and "(default: 0.0)" in flags and "demonstration" in text


@each_script
def test_every_metric_is_explained_in_the_readme(script, tmp_path):
    more = {"nepa_deep": "", "trm_deep": "--L_cycle_supervision 0.5 --eval_halt", "jepa_lm": "--sigreg 0.02"}[script]
    explained = set(re.findall(r"`(\w+)`", readme_tables(script, "name")))
    for name in set().union(*run(script, tmp_path, f"{more} --max_train_steps 3")):
        bare = re.sub(r"_\d+", "_0" if script == "trm_deep" else "_1", re.sub(r"^best_", "", name))
        baseline = re.sub(r"^(untrained|raw|zero|copy|common|no_memory|opening)_", "", bare)
        assert explained & {bare, baseline}, name


def test_links_of_the_readme_lead_somewhere():
    text = (HERE / "README.md").read_text()
    titles = re.findall(r"^#+ (.*)", text, re.M)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for title, target in re.findall(r"\[([^]]*)\]\(([^)]*)\)", text):
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
        data = self.script.make_data(self.args)
        self.model = self.script.Model(data["config"]).to(self.args.device)
        self.model.grad_checkpoint = self.args.grad_checkpoint
        self.net = torch.compile(self.model) if self.args.compile == "on" else self.model
        self.loader = Loader(data["train"], self.args.batch_size, 0, self.args.device, data["collate"])
        self.request()
        self.batch = self.loader.next()
        self.request()

    def request(self):
        self.loader.request(0, torch.zeros(self.args.batch_size, dtype=torch.int64))

    def __call__(self):
        batch = {**(self.loader.next() if self.load else self.batch), "step": 0}
        batch["share"] = torch.ones_like(batch.pop("counts")) if "counts" in batch else 1.0
        with self.script.autocast(self.args):
            loss = self.script.compute_loss(self.net, batch, None, self.args)[0]
        if self.load:
            self.request()
        loss.backward()
        self.model.zero_grad(set_to_none=False)

    def flops(self):
        """Floating point operations of matrix products and attention, without any recomputation."""
        self.net, self.model.grad_checkpoint = self.model, False
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops()


def seconds(run_once, cuda):
    """What one call takes, by the device's own clock."""
    if not cuda:
        start = time.perf_counter()
        run_once()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run_once()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


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
    cuda = args.device.startswith("cuda")
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if cuda else machine
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
        took = {variant: [], base: []}
        for i in range(rounds):
            for run_once in (variant, base) if i % 2 else (base, variant):
                took[run_once].append(seconds(run_once, cuda))
        ratios = np.divide(took[variant], took[base])
        line = f"{title:56}{predicted:9.2f}{np.median(ratios):7.3f} ({min(ratios):.2f}-{max(ratios):.2f})"
        if memory:
            line = f"{line:84}{memory:9.2f}{peak_bytes(variant, cuda) / peak_bytes(base, cuda):7.3f}"
        if cuda and isinstance(variant, Update):
            each = np.median(took[variant])
            line = f"{line:100}{variant.args.batch_size / each:11.0f}{variant.flops() / each / rate:6.0%}"
        print(line, flush=True)

    # The published sizes where there is room for them.
    sizes = f"{flags} --hidden_size 192 --num_layers 12 --num_heads 3 --batch_size 16"
    if cuda:
        sizes = f"{flags} --hidden_size 768 --num_layers 12 --num_heads 12 --image_size 224 --patch_size 14"
    every = Update("nepa_deep", f"{sizes} --use_intermediate_loss")
    row("NEPA, a loss at every layer / at the last", every, Update("nepa_deep", sizes), 1, 1, 15)

    sizes = f"{flags} --batch_size 16 --L_cycles 3 --hidden_size " + (
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
        files = f"{flags} --train_file {folder}/chats"
        regular, lbd_0, pairs = (Update("jepa_lm", f"{files} {more}") for more in variants)
    copies = copy.copy(regular)
    copies.batch = {**regular.batch, "tokens": regular.batch["tokens"].repeat(3, 1)}
    size = {update: update.batch["tokens"].numel() for update in (regular, pairs, copies)}
    row("JEPA, --lbd 0 / --regular", lbd_0, regular, 1, rounds=41)
    row("JEPA, pairs in the row, K 2 / --regular", pairs, regular, size[pairs] / size[regular])
    row("JEPA, three copies of every row / pairs in the row", copies, pairs, size[copies] / size[pairs])

    for script in SCRIPTS:  # the demonstrations
        demo = flags + " --enable_deep_supervision" * (script == "trm_deep")
        made, fixed = (Update(script, demo, load) for load in (True, False))
        row(f"{script}.py with its data loader / the same batch again", made, fixed, 1, rounds=41)


if __name__ == "__main__":
    if sys.argv[1:]:
        benchmark(" ".join(sys.argv[1:]))
    else:
        benchmark("--dtype float32 --compile off")
        if torch.cuda.is_available():
            benchmark("--dtype bfloat16")  # compiled
