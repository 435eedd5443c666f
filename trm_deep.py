"""Tiny Recursive Model over embeddings, supervised inside its recursion.

One small network is applied again and again: a latent z_L is refined L_cycles times, then the answer z_H once; H_cycles
of that make one supervision step, and a row of the batch takes up to halt_max_steps of them before it gets new data.
The model reads embeddings (a puzzle's cells, a text's sentences) and predicts others (the digits, the next sentence).
Normally only the last H cycle is trained ("Less is More: Recursive Reasoning with Tiny Networks", arXiv 2510.04871);
deep supervision puts the loss on every one, a curriculum over depth begins with one cycle and adds the others later.

  python trm_deep.py --enable_deep_supervision --deep_supervision_schedule linear_decay      # laptop, 2 minutes
  python trm_deep.py --data_folder DIR --enable_deep_supervision                             # your embeddings, any GPU
  torchrun --nproc_per_node 8 trm_deep.py --data_folder DIR --enable_deep_supervision        # many GPUs

Without --data_folder it learns 6 x 6 Sudokus. The first command's last lines, seed 0, two threads:

  Step 1000/1000, Val Loss: 0.0173 | Steps: ['0.1239', '0.0388', '0.0173'] | Exact: 0.9892 | Solved: 0.8857
  validation                                    loss   exact  solved
  this model                                  0.0173  0.9892  0.8857
  before training                             2.1406  0.1004  0.0000
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import json
import math
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

try:
    from data import Concat, DataError, expecting, fingerprint, fixed_batches, pick, size_of, subset, training_batches
except ImportError as error:
    sys.exit(f"error: {error}; expected data.py beside this script and no other `data` before it on the path")

# ---- model ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    """What defines the model, in the names of the published configurations."""

    input_size: int = 1024  # D of the embeddings read
    output_size: int = 1024  # D of the embeddings predicted
    hidden_size: int = 1024
    num_heads: int = 16
    L_layers: int = 4  # blocks of the one network; it plays both roles
    expansion: float = 4.0
    H_cycles: int = 3
    L_cycles: int = 3
    halt_max_steps: int = 10  # N_sup in the paper
    halt_exploration_prob: float = 0.1
    pos_encodings: str = "rope"  # or none: no rotation
    causal: bool = True
    learn_init: bool = True  # H_init and L_init; only deep supervision brings a gradient to them
    separate_labels: bool = False  # labels are a separate tensor; False: the inputs, one position later
    # Mean (a float or D of them) and scale of the inputs and of the labels: the model sees (x - mean) / scale.
    normalization: tuple = ((0.0, 1.0), (0.0, 1.0))

    def __post_init__(self):
        unit = 2 * self.num_heads
        if self.hidden_size % unit:
            raise DataError(f"hidden_size {self.hidden_size}, expected a multiple of 2 * num_heads = {unit}")

    @classmethod
    def from_dict(cls, names):
        """Config from a published configuration, a dict; names that are not model parameters are ignored.

        vocab_size is the embeddings' size there. Raises DataError for sizes that do not fit each other.
        """
        size = names.get("vocab_size", cls.input_size)
        names = {"input_size": size, "output_size": size} | names
        return cls(**{name: names[name] for name in cls.__dataclass_fields__ if name in names})


def rms_norm(x):
    """n(x) = x / rms(x), computed in float32, without a gain. x: [..., D] of any float dtype."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-5).to(x.dtype)


def rotary(positions, d):
    """RoPE angles (theta 10000) of positions [T] as cos, signed sin [T, 1, 1, d], float32."""
    frequencies = 10000 ** (-torch.arange(0, d, 2, device=positions.device) / d)
    angles = positions[:, None, None, None] * frequencies
    return torch.cat([angles, angles], -1).cos(), torch.cat([-angles, angles], -1).sin()


def rotate(x, cos, sin):
    """Half-split rotation of x [B, T, 2, heads, d], in float32: [x1 cos - x2 sin, x2 cos + x1 sin], signs in sin."""
    x32 = x.float()
    return torch.addcmul(x32 * cos, x32.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Block(nn.Module):
    """Post-norm transformer block without biases: h = n(h + Attention(h)); h = n(h + SwiGLU(h))."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        # SwiGLU has three matrices; 2/3 keeps the parameter count.
        inner = math.ceil(round(config.expansion * D * 2 / 3) / 256) * 256
        self.config = config
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.o = nn.Linear(D, D, bias=False)
        self.gate_up = nn.Linear(D, 2 * inner, bias=False)
        self.down = nn.Linear(inner, D, bias=False)

    def forward(self, h, rotation):
        B, T, D = h.shape
        qk, v = self.qkv(h).split([2 * D, D], dim=-1)
        qk = rotate(qk.view(B, T, 2, self.config.num_heads, -1), *rotation)
        q, k = qk.transpose(1, 3).unbind(2)  # each [B, heads, T, d]
        v = v.view(B, T, self.config.num_heads, -1).transpose(1, 2)  # [B, heads, T, d]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.config.causal)  # [B, heads, T, d]
        h = rms_norm(h + self.o(attended.transpose(1, 2).reshape(B, T, D)))
        gate, up = self.gate_up(h).chunk(2, dim=-1)  # each [B, T, inner]
        return rms_norm(h + self.down(F.silu(gate) * up))


CARRIED = ("input_embeddings", "labels", "min_steps")  # a row's data, carried from step to step beside its state


class Model(nn.Module):
    """The recursive model. config: a Config, or a published configuration as a dict."""

    def __init__(self, config):
        super().__init__()
        self.config = c = Config.from_dict(config) if isinstance(config, dict) else config
        self.grad_checkpoint = False
        # Embeddings of another size than the network's are projected; the published model has no such layer.
        same = c.input_size == c.hidden_size
        self.embed = nn.Identity() if same else nn.Linear(c.input_size, c.hidden_size, bias=False)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.L_layers))
        self.lm_head = nn.Linear(c.hidden_size, c.output_size, bias=False)
        self.q_head = nn.Linear(c.hidden_size, 1)
        self.H_init, self.L_init = (nn.Parameter(torch.empty(c.hidden_size), c.learn_init) for _ in range(2))
        for p in self.parameters():
            std = p.shape[-1] ** -0.5 if p.ndim == 2 else 1.0
            std /= 0.87962566  # std of a unit normal truncated at +-2
            nn.init.trunc_normal_(p, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.q_head.weight)
        nn.init.constant_(self.q_head.bias, -5.0)  # almost never halt before the head has learned when to

    def initial_carry(self, batch):
        """The carry before the first step: every row halted, so that forward gives each its data and a fresh state.

        batch: input_embeddings [B, T, D_in]; in training also labels [B, T, D_out] and perhaps min_steps int32 [B].
        """
        inputs = batch["input_embeddings"]
        zeros = inputs.new_zeros(*inputs.shape[:2], self.config.hidden_size, dtype=torch.float32)
        steps = inputs.new_zeros(len(inputs), dtype=torch.int32)
        data = {name: torch.zeros_like(batch[name]) for name in CARRIED if name in batch}
        # z_L is not an alias of z_H: torch.compile would recompile once they differ.
        return {"z_H": zeros, "z_L": zeros.clone(), "steps": steps, "halted": steps == 0, **data}

    def net(self, a, b, rotation):
        """The one network of both roles. a, b: [B, T, D]."""
        h = a + b
        for block in self.layers:
            h = block(h, rotation)
        return h

    def cycle(self, z_H, z_L, inputs, rotation):
        """L_cycles refinements of the latent, then one of the answer. Returns both, and all the latents as a list."""
        x = self.embed(inputs)
        latents = []
        for _ in range(self.config.L_cycles):
            z_L = self.net(z_L, z_H + x, rotation)
            latents.append(z_L)
        return self.net(z_H, z_L, rotation), z_L, latents

    def forward(self, carry, batch, enable_deep_supervision=False, t=None, latent_logits=False, cycles=0, detach=False):
        """One supervision step: halted rows start on their row of batch, the others continue with the data they carry.

        carry: from initial_carry or the step before. batch: see initial_carry; a new row may not halt before min_steps
        (default 1). enable_deep_supervision: gradient through every cycle, not only the last. t: logits of one position
        only (one causal pass computes all). latent_logits: apply the head to z_L after every L cycle too. cycles: run
        so many H cycles (0: H_cycles). detach: no gradient from one cycle to the one before.

        Returns the new carry (detached) and a dict of float32 tensors: logits [B, T, D_out], q_halt_logits [B],
        intermediate_logits, a list over the cycles with a gradient, and latent_logits, a list of lists over L cycles.
        """
        c = self.config
        cycles = cycles or c.H_cycles

        def renew(fresh, old):  # where a row has halted; fresh: a number, or broadcast to old [B, ...]
            return torch.where(carry["halted"].view(-1, *[1] * (old.ndim - 1)), fresh, old)

        def read_out(z):  # what a state [B, T, D] predicts, at every position or at t alone
            return self.lm_head(z if t is None else z[:, [t]]).float()

        data = {name: renew(batch[name], carry[name]) for name in CARRIED if name in batch}
        steps = renew(0, carry["steps"]) + 1
        inputs = data["input_embeddings"]
        # States in the dtype of the matrix products: bfloat16 halves the bytes kept for backward.
        kind = inputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
        inputs = inputs.to(dtype)
        z_H = renew(self.H_init, carry["z_H"]).to(dtype)  # y in the paper: the answer
        z_L = renew(self.L_init, carry["z_L"]).to(dtype)  # z in the paper: the latent
        # Without RoPE every position is at 0: no rotation.
        positions = torch.arange(inputs.shape[1], device=inputs.device) * {"rope": 1, "none": 0}[c.pos_encodings]
        rotation = rotary(positions, c.hidden_size // c.num_heads)

        if not enable_deep_supervision:  # as in the paper: all cycles but the last have no gradient
            with torch.no_grad():
                for _ in range(cycles - 1):
                    z_H, z_L, _ = self.cycle(z_H, z_L, inputs, rotation)
            # Before torch 2.11 a weight cast under no_grad stayed in autocast's cache and lost its gradient below.
            torch.clear_autocast_cache()
            cycles = 1
        # Keeps only the states between cycles, and recomputes the rest in backward; but for the last, needed first.
        recomputed = functools.partial(checkpoint, self.cycle, use_reentrant=False, preserve_rng_state=False)
        intermediate = []  # logits after each H cycle
        latent = []  # logits after its L cycles
        for h in range(cycles):
            if detach and h > 0:
                z_H, z_L = z_H.detach(), z_L.detach()
            cycle = recomputed if self.grad_checkpoint and h < cycles - 1 else self.cycle
            z_H, z_L, latents = cycle(z_H, z_L, inputs, rotation)
            intermediate.append(read_out(z_H))
            latent.append([read_out(z) for z in latents if latent_logits])

        # The halting head reads the first position, as in the paper, or the last one, which alone has seen all.
        # In float32 always. The state is detached: a cross-entropy of .3 beside an MSE of .03 would dominate z_H's
        # gradient (synthetic dataset, 2,500 updates at lr 2e-3, seeds 0 and 1: .998 exact detached, .934 not).
        q = (z_H[:, -1 if c.causal else 0].detach().float() * self.q_head.weight[0]).sum(-1) + self.q_head.bias
        halted = (q > 0) & (steps >= data.get("min_steps", 1)) & self.training | (steps >= c.halt_max_steps)
        state = {"z_H": z_H.detach().float(), "z_L": z_L.detach().float(), "steps": steps, "halted": halted}
        return data | state, {
            "logits": intermediate[-1],
            "intermediate_logits": intermediate,
            "latent_logits": latent,
            "q_halt_logits": q,
        }


RecursiveLLM = Model  # the name in the published training scripts


def to_our_names(weights, model=None):
    """Weights (dict of arrays) renamed from the published names (see from_official) to this file's.

    The published token embedding is left out, and the second of its two halting logits.
    """
    ours = {}
    for name, value in weights.items():
        if "embed_tokens" not in name:
            name = re.sub(r"^inner\.|L_level\.|self_attn\.|mlp\.|_proj", "", name)
            ours[name] = torch.as_tensor(value)[: 1 if "q_head" in name else None]
    return ours


def read_folder(folder):
    raise DataError(f"{folder}: a folder, expected a file of weights")


def from_official(config, weights):
    """A Model with the weights of the published TRM code.

    config: dict in its names (hidden_size, num_heads, L_layers, ...; vocab_size is the embedding's size), plus causal
    (default False there: its attention is bidirectional). weights: dict of arrays named inner.H_init,
    inner.L_level.layers.0.self_attn.qkv_proj.weight and so on. Raises RuntimeError if one is missing or does not fit.
    """
    model = Model({"causal": False, **config})
    model.load_state_dict(to_our_names(weights))
    return model


# ---- the loss: the part people copy ---------------------------------------------------------------------------------


def supervision_weights(num_steps, schedule, base_weight):
    """Weights of the losses after steps 0 .. num_steps - 1, as a list of floats; the last one is 1.0 unless given.

    schedule: "constant": base; "linear_decay": base * (i + 1) / num_steps; "exponential_decay": base * 2^i /
    2^(num_steps - 1); "u_shaped": 1.0 for the first, base / 2 between; or the weights themselves, a list of numbers or
    text such as "0.3,0.4,0.7,1.0". Raises ValueError for other text or another number of weights.
    """
    last = num_steps - 1
    formulas = {
        "constant": [base_weight] * last,
        "linear_decay": [base_weight * (i + 1) / num_steps for i in range(last)],
        "exponential_decay": [base_weight * 2**i / 2**last for i in range(last)],
        "u_shaped": [1.0, *[base_weight / 2] * last][:last],
    }
    if str(schedule) in formulas:
        return [*formulas[schedule], 1.0]
    weights = [*map(float, schedule.split(",") if isinstance(schedule, str) else schedule)]
    if len(weights) != num_steps:
        raise ValueError(f"{len(weights)} weights for {num_steps} steps")
    return weights


def compute_deep_supervision_loss(intermediate_logits, labels, weight_schedule, base_weight):
    """Weighted mean of the MSE after every step: sum_i w_i * MSE(step_i, labels) / sum_i w_i.

    intermediate_logits: list of predictions [B, T, D], first step first; labels: [B, T, D]. weight_schedule: one of
    supervision_weights', or "dynamic": w_i = base * MSE_i / max_j MSE_j before the last step, without gradient through
    the weights: hard steps weigh up to base, solved ones nothing.
    Returns the loss and the list of the steps' losses (detached): float32 scalars.
    """
    losses = [F.mse_loss(logits.float(), labels.float()) for logits in intermediate_logits]
    values = [loss.detach() for loss in losses]
    if weight_schedule == "dynamic":
        hardest = torch.stack(values).max().clamp(min=1e-12)
        weights = [base_weight * value / hardest for value in values[:-1]] + [1.0]
    else:
        weights = supervision_weights(len(losses), weight_schedule, base_weight)
    return sum(weight * loss for weight, loss in zip(weights, losses)) / sum(weights), values


# ---- data: Sudoku, and folders of embeddings ------------------------------------------------------------------------

# A candidate digit of a cell excludes the others of its cell, and itself from its row, its column and its box of 2 x 3:
AXES = (4,), (2, 3), (0, 1), (1, 3)  # of bool [band 3, row in it 2, stack 2, column in it 3, digit 6, puzzle N]


def deduce(free):
    """The candidates, bool [cell 36, digit 6, N], that are left once the two simplest rules exclude no more."""
    free = free.reshape(3, 2, 2, 3, 6, -1)  # see AXES
    before = None
    while not np.array_equal(free, before):
        before = free
        sure = False
        for axes in AXES:  # the only candidate of a cell, or for a digit in a row, column or box, is right ...
            sure |= free & (free.sum(axes, np.uint8, keepdims=True) == 1)
        for axes in AXES:  # ... and excludes the others there
            free = free & (sure | ~sure.any(axes, keepdims=True))
    return free.reshape(36, 6, -1)


@functools.lru_cache
def codebook(seed, device="cpu"):
    """float32 [43, 64]: orthogonal codes of length 8 for the digits 1 to 6, a blank and the 36 cells."""
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((64, 43)))[0].T
    return torch.tensor(8 * Q, dtype=torch.float32, device=device)


def decode(x, seed):
    """The symbols whose codes are the nearest to x [..., 64]: int64 [...], digits 0 to 5 and 6, the blank."""
    return (x[..., None, :] * codebook(seed, x.device)[:7]).sum(-1).argmax(-1)  # autocast would round a matmul


@functools.lru_cache
def synthetic_dataset(seed, N=13_024):
    """Datasets of 6 x 6 Sudokus, boxes of 2 x 3, with 14 clues: 1,024 of N to validate. float32 [N, 36, 64] each.

    input_embeddings: the code of the clue, or the blank, plus that of the cell; labels: the code of the digit. The
    rules of deduce solve each puzzle, so each has one solution.
    """
    rng = np.random.default_rng(seed)
    solution = np.ones((36, 6, N), bool)
    for cell in range(36):  # a random candidate, then what follows from it
        solution[cell] = (solution[cell] * rng.random((6, N))).argmax(0) == np.arange(6)[:, None]
        solution = deduce(solution)
    clues = solution
    for cell in rng.permuted(np.tile(np.arange(36)[:, None], N), axis=0):  # of each puzzle another one: int64 [N]
        fewer = clues.copy()
        fewer[cell, :, np.arange(N)] = True
        solved = (deduce(fewer) == solution).all((0, 1))
        clues = np.where(solved & (fewer.all(1).sum(0) <= 22), fewer, clues)
    codes = codebook(seed)
    digits = solution.argmax(1).T  # int64 [N, 36]
    labels = codes[digits]
    inputs = codes[np.where(clues.all(1).T, 6, digits)] + codes[7:]
    return [{"input_embeddings": inputs[part], "labels": labels[part]} for part in (slice(1024, None), slice(1024))]


def open_chunk(path):
    """One chunk's tensors, memory-mapped: sequence [N, T + 1, D], or input_embeddings and labels [N, T, D]."""
    with expecting("floats [N, T + 1, D], or input_embeddings and labels [N, T, D], of torch.save or np.save", path):
        if path.suffix == ".npy":
            chunk = torch.from_numpy(np.load(path, mmap_mode="c"))  # copy on write: torch warns of read-only memory
        else:
            chunk = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        chunk = dict(sorted(chunk.items())) if isinstance(chunk, dict) else {"sequence": chunk}  # inputs first
        good = list(chunk) in (["sequence"], ["input_embeddings", "labels"])
        for x in chunk.values():
            good = good and x.is_floating_point() and x.ndim == 3 and x.numel()
            x.requires_grad_(False)
        if not good or len({x.shape[:2] for x in chunk.values()}) > 1:
            raise ValueError(f"holds {[f'{name}: {x.dtype} {list(x.shape)}' for name, x in chunk.items()]}")
    return chunk


def open_folder(folder):
    """Datasets train and val of folder/{train,val}_embeddings_chunk_*.{pt,npy}, chunks in numeric order.

    Without validation files the last tenth of the training sequences is held out (not a random tenth: neighbours in a
    text stay on one side). A dataset without any file is {}. Raises DataError for a file that is unreadable or of
    another shape than the first.
    """
    datasets = []
    first = {}  # the shapes in the first file
    unread = {*Path(folder).iterdir()}
    for split in ("train", "val"):
        name = rf"{split}_embeddings_chunk_(\d+)\.(?:pt|npy)"
        numbered = {int(match[1]): path for path in sorted(unread) if (match := re.fullmatch(name, path.name))}
        chunks = {path: open_chunk(path) for _, path in sorted(numbered.items())}
        unread -= {*chunks}
        for path, chunk in chunks.items():
            shapes = {name: list(x.shape[1:]) for name, x in chunk.items()}
            if shapes != (first := first or shapes):
                raise DataError(f"{path}: samples of shape {shapes}, expected {first} as in the first file")
        # Zeros at either end would count as sentences; only a puzzle's inputs may have them.
        datasets.append(
            {
                name: Concat([chunk[name] for chunk in chunks.values()], [*chunks], name == "input_embeddings")
                for name in first
                if chunks
            }
        )
    if others := sorted(path.name for path in unread if "embeddings" in path.name):
        say(f"{folder}: not read: {', '.join(others)}")
    train, val = datasets
    if train and not val:
        size = size_of(train)
        train, val = (subset(train, part) for part in np.split(np.arange(size), [-(size // 10 or 1)]))
    return train, val


CYCLES = ("H_cycles", "L_cycles", "halt_max_steps")


def make_data(args, given):
    """Datasets train and val, collate and config, as the shared part wants them. Raises DataError.

    given: what a checkpoint says of Config, a dict. The weights fit any number of cycles: the flags say it.
    """
    flags = {name: getattr(args, name) for name in CYCLES} | {"learn_init": args.enable_deep_supervision}
    EXAMPLE.clear()  # of an earlier run in this process
    if args.predict:
        return {"config": Config(**given | flags), "predict": functools.partial(predict, args=args)}
    train, val = open_folder(args.data_folder) if args.data_folder else synthetic_dataset(args.seed)
    if not size_of(val if args.eval_only else train):
        raise DataError(f"{args.data_folder}: too few training sequences, expected 2 in train_embeddings_chunk_0.pt")
    example = pick(val, np.arange(1)).values()  # a sequence, or its inputs and labels
    widths = [x.shape[2] for x in example]
    separate = "labels" in val
    sample = {}  # to measure by: samples spread over all the training data, about 2^24 numbers at most, read once
    if args.data_folder and train:
        size = size_of(train)
        sample = pick(train, np.arange(0, size, 1 + size * sum(x.numel() for x in example) // 2**24))
    sizes = {"input_size": widths[0], "output_size": widths[-1], "separate_labels": separate}
    if not given:
        if separate and not args.bidirectional:
            say("attention is causal; --bidirectional for labels that are not later inputs")
        given = {"causal": not args.bidirectional, "hidden_size": args.hidden_size or widths[0]}
        if sample and args.normalize:
            moments = []  # of the sequences, or of inputs and labels
            for x in sample.values():
                variance, mean = torch.var_mean(x.double(), (0, 1), correction=0)
                if not variance.any():
                    raise DataError(f"{args.data_folder}: constant embeddings, expected ones that differ")
                moments.append((mean.tolist(), variance.mean().sqrt().item()))
            given["normalization"] = moments[0], moments[-1]
    config = Config.from_dict(vars(args) | sizes | given | flags)
    if args.bidirectional and config.causal:
        raise DataError(f"{args.init_from}: attention is causal, expected no --bidirectional")
    if not config.causal and not separate:
        raise DataError(f"{args.data_folder}: labels are the later inputs, expected no --bidirectional")
    trained = {name: getattr(config, name) for name in sizes}
    if sizes != trained:
        raise DataError(f"{args.data_folder}: {sizes}, expected {trained} as in the run")

    def collate(picked, rng=None, rows=None):
        batch = {
            name: (x - torch.tensor(mean)).div_(scale)
            for (name, x), (mean, scale) in zip(picked.items(), config.normalization)
        }
        if "sequence" in batch:  # T + 1 sentences: all but the last are read, all but the first predicted
            batch = {"input_embeddings": batch["sequence"][:, :-1], "labels": batch["sequence"][:, 1:]}
        if rng:  # a longer draw begins with the shorter one: rows have theirs, however the update is split
            explore, uniform = rng.random((rows[-1] + 1, 2))[rows].T
            longer = 2 + uniform * (args.halt_max_steps - 1)
            batch["min_steps"] = np.int32(np.where(explore < args.halt_exploration_prob, longer, 1))
        return batch

    return {
        "train": train,
        "val": val,
        "collate": collate,
        "config": config,
        "ridge": fit_ridge(**collate(sample)) if sample else None,
    }


def linear_features(x):
    """What the linear baseline reads at each position of x [B, T, D]: the embedding and the mean of all up to it."""
    return torch.cat([x, x.cumsum(1) / torch.ones_like(x).cumsum(1)], -1)


def fit_ridge(input_embeddings, labels):
    """Ridge regression of labels [N, T, D_out] on linear_features; penalty by the last tenth. float32 [2 D, D_out]"""
    x = linear_features(input_embeddings).flatten(0, 1)
    y = labels.flatten(0, 1)
    cut = len(x) * 9 // 10
    gram = x[:cut].T @ x[:cut]
    moment = x[:cut].T @ y[:cut]
    penalties = gram.diagonal().mean() * 10.0 ** torch.arange(-3, 3.5, 0.5)
    fits = [torch.linalg.solve(gram + penalty * torch.eye(len(gram)), moment) for penalty in penalties]
    return min(fits, key=lambda weights: F.mse_loss(x[cut:] @ weights, y[cut:]))


EXAMPLE = []  # of the latest evaluation: a Sudoku and the answers after the first and the last cycle, int64 [36]


def describe(metrics):
    """The text of a log line, in the form of the published script: Steps are the losses after each H cycle."""
    steps = [f"{value:.4f}" for name, value in metrics.items() if re.fullmatch(r"step_\d+_loss", name)]
    text = f"Loss: {metrics['loss']:.4f} | Steps: {steps}"
    if "exact_acc" in metrics:
        text += f" | Exact: {metrics['exact_acc']:.4f} | Solved: {metrics['solved_acc']:.4f}"
    return text


def report(metrics):
    """The closing table: the model beside predictions that need no training."""
    rows = {
        "this model": "",
        f"halting, after {metrics.get('halt_mean_steps', 0):.2f} steps": "halt_",
        "before training": "first_",
        "always zero, the mean of normalized data": "zero_",
        "copying the input": "copy_",
        "ridge regression": "ridge_",
    }
    lines = [f"{'validation':42}{'loss':>8}{'exact':>8}{'solved':>8}"]
    for title, prefix in rows.items():
        if prefix + "exact_acc" in metrics:
            numbers = (f"{metrics[prefix + name]:8.4f}" for name in ("loss", "exact_acc", "solved_acc"))
            lines.append(f"{title:42}{''.join(numbers)}")
    for row in zip(*(grid.view(6, 6).tolist() for grid in EXAMPLE)):
        lines.append("     ".join(" ".join("123456."[digit] for digit in part) for part in row))
    return "\n".join(lines)


# ---- one supervision step, evaluation, prediction -------------------------------------------------------------------


def is_right(prediction, labels, args):
    """What counts as a right answer; both [B, T, D] float32. Returns positions bool [B, T] and rows bool [B].

    Sudoku: the code of the right digit is the nearest; a row is a puzzle. Real embeddings: a sentence is right if its
    cosine reaches --halt_cosine, a row if the mean of its cosines does. Cosines are of normalized data: a direction
    that all sentences share counts for nothing.
    """
    if args.data_folder:
        cosine = F.cosine_similarity(prediction, labels, dim=-1)
        return cosine >= args.halt_cosine, cosine.mean(1) >= args.halt_cosine
    right = decode(prediction, args.seed) == decode(labels, args.seed)
    return right, right.all(1)


def compute_loss(model, batch, carry, args):
    """One supervision step of every row, followed by one update: the outer loop of TRM (N_sup in the paper).

    batch: a fresh sample for every row, used by those that halted, and the shared part's `step` and `share`. carry: {}
    at first. Returns this micro-batch's share of the update's loss, metrics as (sum, count) pairs, and the next carry.
    """
    carry = carry or unwrap(model).initial_carry(batch)
    # Curriculum over depth: one cycle at first, one more at even intervals, all from --curriculum_end_step on.
    cycles = args.H_cycles
    end = args.curriculum_end_step
    if batch["step"] < end:
        cycles = 1 + batch["step"] * (cycles - 1) // end
    latent = args.L_cycle_supervision / args.L_cycles
    carry, outputs = model(
        carry, batch, args.enable_deep_supervision, latent_logits=latent > 0, cycles=cycles, detach=args.detach_cycles
    )
    labels = carry["labels"]
    supervision = labels, args.deep_supervision_schedule, args.deep_supervision_weight
    loss, losses = compute_deep_supervision_loss(outputs["intermediate_logits"], *supervision)
    for logits in zip(*outputs["latent_logits"]):  # the l-th L cycle of every H cycle
        loss = loss + latent * compute_deep_supervision_loss(logits, *supervision)[0]
    right = is_right(outputs["logits"], labels, args)[1]  # bool [B]
    halt_loss = F.binary_cross_entropy_with_logits(outputs["q_halt_logits"], right.float())

    steps = {f"step_{h}_loss": value for h, value in enumerate(losses, cycles - len(losses))}
    steps |= {"loss": loss.detach(), "q_halt_loss": halt_loss.detach(), "cycles": cycles}
    metrics = to_sums(steps, len(labels))
    metrics["mean_steps"] = (carry["steps"] * carry["halted"]).sum(), carry["halted"].sum()
    return batch["share"] * (loss + 0.5 * halt_loss), metrics, carry


def answer(model, batch, every_cycle=False):
    """Outputs after all halt_max_steps supervision steps; every_cycle: with the answers of all cycles of the last one.

    Also halted_logits [B, T, D_out] and halted_steps int [B]: those of each row's first step with q > 0.
    """
    carry = model.initial_carry(batch)
    running = torch.ones_like(carry["halted"])
    halted_logits = halted_steps = 0
    for _ in range(model.config.halt_max_steps):
        carry, outputs = model(carry, batch, every_cycle)
        # A row that has halted keeps its answer; the batch continues as a whole.
        halted_logits = torch.where(running[:, None, None], outputs["logits"], halted_logits)
        halted_steps += running
        running &= outputs["q_halt_logits"] <= 0
    return outputs | {"halted_logits": halted_logits, "halted_steps": halted_steps}


@torch.no_grad()
def evaluate(model, data, args):
    """Validation means. loss is the MSE of the final output alone: runs with and without deep supervision compare."""
    sums = {}
    for batch in eval_batches(data["val"], args, data["collate"], args.eval_samples):
        with autocast(args):
            outputs = answer(model, batch, every_cycle=True)
        inputs = batch["input_embeddings"]
        labels = batch["labels"]
        answers = outputs["intermediate_logits"]
        if not sums and not args.data_folder:  # the first puzzle
            EXAMPLE[:] = [decode(x[0], args.seed) for x in (inputs, answers[0], answers[-1])]
        metrics = {f"step_{h}_loss": F.mse_loss(x, labels) for h, x in enumerate(answers)}
        guesses = {"": outputs["logits"], "zero_": 0 * labels}
        if labels.shape == inputs.shape:
            guesses["copy_"] = inputs
        if data["ridge"] is not None:
            guesses["ridge_"] = linear_features(inputs) @ data["ridge"].to(inputs.device)
        if args.eval_halt:
            guesses["halt_"] = outputs["halted_logits"]
            metrics["halt_mean_steps"] = outputs["halted_steps"].float().mean()
        for prefix, guess in guesses.items():
            exact, solved = (right.float().mean() for right in is_right(guess, labels, args))
            metrics[prefix + "loss"] = F.mse_loss(guess, labels)
            metrics |= {prefix + "exact_acc": exact, prefix + "solved_acc": solved}
        add_sums(sums, to_sums(metrics, len(labels)))
    return means(sums)


@torch.no_grad()
def predict(model, args):
    """--predict IN OUT: continue sequences [B, T, D] by --rollout N embeddings: float32 [B, N, D].

    Each new embedding is appended to the model's input. A model of separate labels gives its labels [B, T, D_out].
    Returns what was done in words. Raises DataError for a file that does not fit.
    """
    source, target = map(Path, args.predict)
    c = model.config
    x = next(iter(open_chunk(source).values()))  # sequences or inputs
    if x.shape[2] != c.input_size:
        raise DataError(f"{source}: embeddings of size {x.shape[2]}, expected {c.input_size}")
    x = Concat([x], [source], c.separate_labels)[np.arange(len(x))]
    (mean, scale), (label_mean, label_scale) = c.normalization
    if c.separate_labels and args.rollout > 1:
        raise DataError("--rollout: the run's labels are no next inputs, expected a run on sequences")
    found = []
    with open(target, "xb") as file:  # first: what is no new file in a folder that exists is said before computing
        for part in ((x - torch.tensor(mean)) / scale).split(args.batch_size):
            sequence = part.to(args.device)
            for _ in range(args.rollout):
                with autocast(args):
                    outputs = answer(model, {"input_embeddings": sequence})
                new = outputs["halted_logits" if args.eval_halt else "logits"]
                if not c.separate_labels:
                    sequence = torch.cat([sequence, new[:, -1:]], 1)
                    new = sequence[:, x.shape[1] :]
            found.append(new.cpu())
        predicted = torch.cat(found) * label_scale + torch.tensor(label_mean)  # in the data's units again
        np.save(file, predicted.numpy())
    return f"wrote {predicted.shape[1]} embeddings for each sequence to {target}"


# ---- flags ----------------------------------------------------------------------------------------------------------


DATA_FLAGS = ("data_folder",)
EVAL_FLAGS = ("predict", "rollout", "halt_cosine", "eval_halt", *CYCLES)
FINE_TUNING = {}
DEMO = {
    "hidden_size": 128,
    "num_heads": 4,
    "L_layers": 1,
    "L_cycles": 2,
    "halt_max_steps": 1,
    "bidirectional": True,
    "batch_size": 32,
    "lr": 2e-3,
    "warmup_steps": 50,
    "weight_decay": 0.5,
    "ema_decay": 0.98,
    "max_train_steps": 1000,
    "curriculum_end_step": 600,
    "eval_interval": 200,
}


def add_method_args(parser):
    """Add this script's flags."""
    flag = flag_group(parser, "data")
    flag("--data_folder", None, "folder of {train,val}_embeddings_chunk_*.pt or .npy; default: synthetic")
    flag("--normalize", True, "centre and scale the folder's embeddings, by its training data")
    flag = flag_group(parser, "model")
    flag("--H_cycles", 3, "cycles of a supervision step; each ends in an answer", 1)
    flag("--L_cycles", 3, "refinements of the latent in a cycle", 1)
    flag("--L_layers", 4, "blocks of the network", 1)
    flag("--hidden_size", 0, "width of the network; 0: the size of the embeddings")
    flag("--num_heads", 16, "attention heads; twice their number divides hidden_size", 1)
    flag("--expansion", 4.0, "expansion of the SwiGLU", 0.01)
    flag("--bidirectional", False, "every position sees all others; only for labels that are not later inputs")
    flag = flag_group(parser, "halting")
    flag("--halt_max_steps", 10, "most supervision steps on one sample (N_sup)", 1)
    flag("--halt_exploration_prob", 0.1, "fraction of the rows that may not halt at once", 0, 1)
    flag("--halt_cosine", 0.9, "real data: an answer is right from this cosine on", -1, 1)
    flag("--eval_halt", False, "evaluate, or predict with, each row's answer at its first step with q > 0")
    flag = flag_group(parser, "deep supervision")
    flag("--enable_deep_supervision", False, "loss and gradient at every H cycle, not only at the last")
    flag("--deep_supervision_weight", 0.5, "base weight of the losses before the last")
    flag(
        "--deep_supervision_schedule",
        "constant",
        "constant, linear_decay, exponential_decay, u_shaped, dynamic (by each cycle's loss), or as 0.3,0.4,1.0",
    )
    flag("--detach_cycles", False, "the loss of every cycle, but no gradient from one cycle to the one before")
    flag("--curriculum_end_step", 0, "train one H cycle at first, one more at even intervals, all from this update on")
    flag("--L_cycle_supervision", 0.0, "weight of a loss after every L cycle as well")
    flag = flag_group(parser, "prediction, with --eval_only --out_dir RUN")
    flag("--predict", None, "continue, or label, the sequences [B, T, D] of IN", nargs=2, metavar=("IN.npy", "OUT.npy"))
    flag("--rollout", 1, "how many embeddings to predict; positions beyond those of training were never learned", 1)
    parser.set_defaults(batch_size=8, lr=1e-4, ema_decay=0.999)


def check(args, given, error):
    """Refuse flags that make no sense together."""
    deep = args.deep_supervision_weight, args.deep_supervision_schedule, args.L_cycle_supervision, args.detach_cycles
    if not args.enable_deep_supervision and deep != (0.5, "constant", 0.0, False):
        error(
            "--deep_supervision_weight, --deep_supervision_schedule, --L_cycle_supervision and --detach_cycles need "
            "--enable_deep_supervision"
        )
    if args.deep_supervision_schedule != "dynamic" and not args.eval_only:  # which may have other cycles
        cycles = 1 if args.curriculum_end_step else args.H_cycles
        try:
            supervision_weights(cycles, args.deep_supervision_schedule, args.deep_supervision_weight)
        except ValueError as wrong:
            error(f"--deep_supervision_schedule: {wrong}, expected a name, or --curriculum_end_step 0 and all weights")
    if not args.data_folder and (args.halt_cosine, args.normalize) != (0.9, True):
        error("--halt_cosine and --normalize need --data_folder")
    if args.predict and not args.eval_only:
        error("--predict needs --eval_only and the --out_dir of a run")


# ==== shared: identical in nepa_deep.py, trm_deep.py, jepa_lm.py =====================================================
# Trains whatever stands above. All it uses of it:
#   Config; Model(config); to_our_names(weights, model), which renames published weights; read_folder(folder), what the
#     folder of a published model says of Config, a dict; FINE_TUNING: defaults of flags with its "files"
#   DATA_FLAGS: the flags that name data; without the first of them the demonstration runs, with the defaults in DEMO
#   EVAL_FLAGS: what --eval_only may change; add_method_args(parser); check(args, given, error), see there
#   make_data(args, config) -> dict of train and val (datasets as in data.py), collate and config; or of config and
#     predict(model) -> text, which replaces the evaluation. The argument config: a dict, what a
#     checkpoint or --init_from says of Config; empty in a new run
#   compute_loss(model, batch, carry, args) -> loss, sums (see add_sums), carry. The batch holds step and share (see
#     train). carry: {} at first, then what each row takes along to the next update, tensors [B, ...]
#   evaluate(model, data, args) -> means, with a "loss"; describe(metrics) -> text of a log line
#   report(metrics) -> closing text on the last validation; best_... and first_... (untrained) metrics stand beside it

SCRIPT = Path(__file__).stem
# Both set by torchrun; RANK is ignored without WORLD_SIZE. Tasks of srun without torchrun are refused in launch.
WORLD = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", 1)))
RANK = int(os.environ.get("RANK", 0)) % WORLD


# ---- processes, precision, metrics ----


def all_reduce(tensor):
    """The tensor, summed over the processes in place: CPU tensors by gloo, CUDA tensors by nccl."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(value):
    """value of every process (anything that pickles), as a list in order of rank."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def unwrap(model):
    """The Model inside torch.compile and DistributedDataParallel."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)


def autocast(args):
    """Mixed precision as --dtype says; none for float32."""
    return torch.autocast(args.device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32")


def to_sums(values, count):
    """Means over count samples (dict of floats or scalar tensors) as (sum, count) pairs; never syncs."""
    return {name: (value * count, count) for name, value in values.items()}


def add_sums(sums, more):
    """Add (sum, count) pairs to the running ones, by name."""
    for name, (value, count) in more.items():
        total, n = sums.get(name, (0.0, 0.0))
        sums[name] = (total + value, n + count)


def over_processes(sums):
    """The sums of all processes together, as floats. A CPU-GPU sync point."""
    totals = {}
    for part in gather({name: (float(total), float(count)) for name, (total, count) in sums.items()}):
        add_sums(totals, part)
    return totals


def means(sums):
    """Means over everything added, on all processes; a metric without samples is left out. A CPU-GPU sync point."""
    return {name: total / count for name, (total, count) in over_processes(sums).items() if count}


def say(text):
    """Print on the first process, above the progress bar."""
    if RANK == 0:
        try:
            tqdm.write(text)
        except Exception:  # no stdout, or none any more (| head): the run goes on without
            sys.stdout = None


# ---- signals: the first ends the run cleanly, a Ctrl-C after it at once ----

RECEIVED = []


def receive(number, _):
    RECEIVED.append(number)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def catch_signals():
    """While the body runs; the handlers before are restored at its end."""
    RECEIVED.clear()  # of an earlier run in this process
    with contextlib.ExitStack() as restore:
        with contextlib.suppress(ValueError, AttributeError):  # only the main thread may; Windows lacks the last two
            for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
                number = getattr(signal, name)
                restore.callback(signal.signal, number, signal.signal(number, receive))
        yield


def received_signals():
    """How many signals the processes have received; the same on all of them."""
    return all_reduce(torch.tensor(len(RECEIVED)))


def eval_batches(dataset, args, collate, limit=0):
    """This process's share of one pass over a dataset (see data.fixed_batches), with progress on a terminal.

    A signal cuts the pass short; validate discards the result.
    """
    batches = fixed_batches(dataset, collate, args.device, args.batch_size, RANK, WORLD, limit)
    for batch in tqdm(batches, "evaluating", leave=False, disable=RANK > 0 or None):  # None: off without a terminal
        yield batch
        if RECEIVED:
            return


# ---- flags ----


def boolean(text):
    return ("false", "true").index(text.lower()) == 1


def flag_group(parser, title):
    """A function flag(names, default, help) that adds flags under this title; a flag has the type of its default.

    A default of None: text. Numbers must lie in low .. high.
    """
    group = parser.add_argument_group(title)

    def flag(names, default, help, low=0, high=1e38, **more):
        kind = type(default)

        def number(text):
            value = kind(text)
            if not low <= value <= high:
                raise argparse.ArgumentTypeError(f"{text!r}, expected at least {low} and at most {high}")
            return value

        if kind is bool:
            more = {"type": boolean, "nargs": "?", "const": True, "metavar": "True|False"}
        elif kind in (int, float):
            more = {"type": number, "metavar": "X"}
        if default is not None and default is not False:
            help += " (default: %(default)s)"
        group.add_argument(*names.split(), default=default, help=help, **more)

    return flag


# What --resume may change; of batch_size and grad_accum only the product with the number of processes must stay.
MAY_CHANGE = (
    "batch_size grad_accum max_train_steps eval_interval log_interval device compile "
    "wandb_mode wandb_project run_name out_dir resume eval_only"
)


def parse_args(argv):
    """The flags in force, and what the run starts from. Refuses flags that make no sense (exit 2)."""
    parser = argparse.ArgumentParser(
        usage="python %(prog)s [flags]      (--help lists them)",
        description=__doc__,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=120),
        allow_abbrev=False,
    )
    flag = flag_group(parser, "training")
    flag("--batch_size", 32, "samples per micro-batch and process", 1)
    flag("--grad_accum", 1, "micro-batches per update", 1)
    flag("--max_train_steps", 1000, "updates in all", 1)
    flag("--lr --learning_rate", 1e-3, "peak learning rate")
    flag("--min_lr_ratio", 0.1, "final learning rate as a fraction of --lr; 1: constant", 0, 1)
    flag("--warmup_steps", 100, "updates of linear warm-up")
    flag("--weight_decay", 0.1, "AdamW's, on matrices only")
    flag("--beta1", 0.9, "AdamW's", 0, 0.999999)
    flag("--beta2", 0.95, "AdamW's", 0, 0.999999)
    flag("--grad_clip", 1.0, "largest gradient norm; 0: no limit")
    flag("--ema_decay", 0.0, "of the averaged weights, which are then the ones evaluated; 0: none", 0, 0.999999)
    flag("--seed", 0, "of the weights, the order and the synthetic dataset", 0, 2**32 - 1)
    flag("--init_from", None, "start from the weights of a run's best.pt or ckpt.pt, or a published file or folder")
    flag = flag_group(parser, "machine")
    flag("--device", "auto", "auto (CUDA if there), cpu, cuda, mps, ...")
    flag("--dtype", "auto", "auto: bfloat16 on CUDA", choices=["auto", "float32", "bfloat16", "float16"])
    flag("--compile", "auto", "torch.compile; auto: on CUDA", choices=["auto", "on", "off"])
    flag("--grad_checkpoint", False, "recompute activations in the backward pass: same gradient, less memory")
    flag = flag_group(parser, "evaluation, output")
    flag("--eval_interval", 500, "updates between evaluations, each of which saves a checkpoint", 1)
    flag("--eval_samples", 0, "validation samples to use; 0: all")
    flag("--log_interval", 100, "updates between lines of metrics.jsonl", 1)
    flag("--out_dir", None, f"folder of the run (default: a new out/{SCRIPT}-DATE-TIME)")
    flag("--resume", False, "continue the run in --out_dir, with its flags; start it if there is none")
    flag("--eval_only", False, "evaluate the best checkpoint of the run in --out_dir")
    flag("--wandb_mode", "disabled", "Weights & Biases", choices=["disabled", "offline", "online"])
    flag("--wandb_project", "deep-supervision", "Weights & Biases")
    flag("--run_name", None, "Weights & Biases (default: the folder's name)")
    add_method_args(parser)
    parser.epilog = f"Without --{DATA_FLAGS[0]} the demonstration has defaults of its own:\n{DEMO}"

    args, start = parser.parse_args(argv), {"config": {}}
    origin = args.init_from
    if not args.out_dir and (args.resume or args.eval_only):
        parser.error("--resume and --eval_only need the --out_dir of a run")
    # expanduser: a shell leaves the ~ of --out_dir=~/x
    folder = Path(args.out_dir or f"out/{SCRIPT}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}").expanduser()
    path = folder / ("best.pt" if args.eval_only else "ckpt.pt")
    if args.eval_only or args.resume and path.exists():
        with expecting(f"a checkpoint of this version of {SCRIPT}.py", path):
            start = torch.load(path, map_location="cpu", weights_only=True)
            Config(**start["config"])
        origin = folder
    else:
        if not args.resume and (folder / "metrics.jsonl").exists():
            parser.error(f"--out_dir {folder} holds a run: --resume continues it, --eval_only uses it")
        if not getattr(args, DATA_FLAGS[0]):
            parser.set_defaults(**DEMO)
        if origin:
            start = load_weights(origin)
            if start["config"].get("files"):
                parser.set_defaults(**FINE_TUNING)
    stored = {name: value for name, value in start.get("args", start["config"]).items() if name in vars(args)}
    parser.set_defaults(**stored)
    given, args = args, parser.parse_args(argv)  # now the command line overrides the defaults set above
    free = {*MAY_CHANGE.split(), *DATA_FLAGS}
    if args.eval_only or not args.resume:
        free |= {"eval_samples", "dtype", *EVAL_FLAGS}
    for name, value in vars(args).items():
        if value == "":
            parser.error(f"--{name} is empty, expected a value")  # an unset shell variable
        if name not in free and value != stored.get(name, value):
            parser.error(f"--{name} {value} conflicts with {origin}, which has {stored[name]}")
    check(args, given, parser.error)
    args.out_dir = str(folder)
    args.flags = dict(vars(args))  # with auto unresolved: for the checkpoint and wandb
    device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with expecting("a device of this machine", f"--device {device}"):
        args.device = torch.zeros(1, device=device).device
    if args.dtype == "auto":
        bfloat16 = args.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if bfloat16 else "float32"
    return args, start


# ---- files ----


def load_weights(path):
    """For --init_from: {"weights": ..., "config": what comes with them, a dict}. Raises DataError.

    path: a run's checkpoint, whose averaged weights count if there are any, a published model's folder, or a file of
    published weights, with which no config comes.
    """
    path, found = Path(path), {}
    with expecting("a checkpoint or published weights (.safetensors: pip install safetensors)", path):
        for file in sorted(path.glob("model*.safetensors")) or [path]:
            if file.suffix == ".safetensors":
                from safetensors.torch import load_file

                found |= load_file(file)
            else:
                found = torch.load(file, map_location="cpu", weights_only=True)
        config = read_folder(path) if path.is_dir() else found.get("config", {})
        Config(**config)  # of this script, or an error
        for wrapper in ("ema", "model", "state_dict"):
            found = found.get(wrapper) or found
        return {
            "config": config,
            "weights": {re.sub(r"^((module|_orig_mod|model)\.)+", "", name): x for name, x in found.items()},
        }


# ---- optimizer ----


def learning_rate(step, args):
    """Linear warm-up, then a cosine from lr to lr * min_lr_ratio at the last update."""
    warmup = args.warmup_steps
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / (args.max_train_steps - warmup)
    return args.lr * (args.min_lr_ratio + (1 - args.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2)


def make_optimizer(model, args):
    """AdamW, weight decay on matrices only; fused: one kernel for all parameters."""
    groups = [
        {
            "params": [p for p in model.parameters() if (p.ndim >= 2) == matrices],
            "weight_decay": args.weight_decay * matrices,
        }
        for matrices in (True, False)
    ]
    return torch.optim.AdamW(groups, betas=(args.beta1, args.beta2), fused=True)


# ---- the run ----


class Run:
    """All that changes during a run, how it is logged and how it is saved."""

    def __init__(self, args, data, start):
        self.args, self.data, self.out_dir = args, data, Path(args.out_dir)
        self.num_rows = args.batch_size * args.grad_accum * WORLD  # samples of an update
        # The rows of an update that each micro-batch of this process takes: int64 [grad_accum, batch_size].
        self.parts = np.arange(self.num_rows).reshape(WORLD, args.grad_accum, -1)[RANK]
        self.must_match = {"--batch_size * --grad_accum * processes": self.num_rows} | fingerprint(data)

        torch.manual_seed(args.seed)
        self.model = self.net = Model(data["config"]).to(args.device)
        self.model.grad_checkpoint = args.grad_checkpoint
        if "weights" in start:
            with expecting("weights of this model", args.init_from):
                self.model.load_state_dict(to_our_names(start["weights"], self.model))
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if args.ema_decay else None
        self.optimizer = make_optimizer(self.model, args)
        self.scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == "float16")
        self.saved = {"model": self.model, "ema": self.ema, "optimizer": self.optimizer, "scaler": self.scaler}
        if args.compile == "on" or args.compile == "auto" and args.device.type == "cuda":
            torch._dynamo.config.recompile_limit = 64  # a curriculum over depth has a graph for each
            try:  # a tiny function first: not every machine has a compiler
                with expecting("a working compiler or --compile off", "torch.compile"):
                    torch.compile(torch.ones)(1, device=args.device)
                self.net = torch.compile(self.model)
            except DataError as error:
                if args.compile == "on":
                    raise
                say(f"not compiled: {error}")
        if WORLD > 1:  # waits for all: nobody writes before everybody has looked whether --out_dir is free
            self.net = nn.parallel.DistributedDataParallel(self.net, gradient_as_bucket_view=True)

        self.step, self.sums, self.carries = 0, {}, [{}] * args.grad_accum  # a carry for each micro-batch
        # first, last, best: the metrics of validations
        self.state = {
            "first": {},
            "last": {},
            "best": {"loss": math.inf},
            "seconds": 0.0,
            "log_size": 0,
            "wandb_id": None,
        }
        if "step" in start:
            self.restore(start)
        self.batches = training_batches(
            data["train"], data["collate"], args.device, args.seed, self.num_rows, self.parts, self.step
        )

    def restore(self, checkpoint):
        """Continue from the checkpoint, on any number of processes: bit for bit the uninterrupted run."""
        for name, then in checkpoint["must_match"].items():
            if self.must_match[name] != then:
                raise DataError(
                    f"{self.out_dir}: {name}: {self.must_match[name]}, expected {then}, as in the checkpoint"
                )
        for name, part in self.saved.items():
            if part:
                part.load_state_dict(checkpoint[name])
        self.step, self.state = checkpoint["step"], checkpoint["state"]
        if RANK == 0:
            self.sums = checkpoint["sums"]
        carry = checkpoint["carry"].items()
        self.carries = [{name: x[rows].to(self.args.device) for name, x in carry} for rows in self.parts]
        torch.set_rng_state(checkpoint["rng"])

    def require_finite(self, name, value):
        if not math.isfinite(value):
            raise DataError(f"step {self.step}: {name} is {value}, expected a finite number; the checkpoint stays")

    def save(self, name, **contents):
        """Write contents, and what both checkpoints hold, to out_dir/name on the first process.

        Raises DataError, and keeps the old file, if a weight is not finite.
        """
        self.require_finite("norm of the weights", nn.utils.get_total_norm(self.model.parameters()))
        if RANK > 0:
            return
        contents |= {
            "script": SCRIPT,
            "step": self.step,
            "args": self.args.flags,
            "config": dataclasses.asdict(self.model.config),
        }
        # Written beside it, then renamed: the file holds the old content or the new, never half.
        path, temporary = self.out_dir / name, self.out_dir / f"{name}.tmp"
        with expecting("a folder with room", path):
            try:
                with open(temporary, "wb") as file:
                    torch.save(contents, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def save_latest(self):
        """ckpt.pt: everything that --resume needs."""
        carries = sum(gather([{name: x.cpu() for name, x in carry.items()} for carry in self.carries]), [])
        self.save(
            "ckpt.pt",
            **{name: part and part.state_dict() for name, part in self.saved.items()},
            must_match=self.must_match,
            state=self.state,
            sums=over_processes(self.sums),
            # All rows in order, so that another number of processes can take them over.
            carry={name: torch.cat([carry[name] for carry in carries]) for name in carries[0]},
            rng=torch.get_rng_state(),  # nothing here draws on the GPU
        )

    @torch.no_grad()
    def average(self):
        """Move the averaged weights towards the weights; faster at first, to forget the initial ones."""
        if self.ema:
            decay = min(self.args.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    @contextlib.contextmanager
    def open_log(self):
        """For the body: metrics.jsonl, of which log_size bytes belong to the run so far, wandb, the progress bar.

        Until it ends, or the process, however that ends, another process that opens the log is refused.
        """
        args, self.log_path, self.wandb = self.args, self.out_dir / "metrics.jsonl", None
        # disable=None: off if stderr is no terminal
        self.bar = tqdm(total=args.max_train_steps, initial=self.step, disable=RANK > 0 or None)
        if RANK > 0:
            return (yield)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        owner = self.out_dir / ".owner"
        with open(self.log_path, "ab") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                owner.write_text(f"{os.uname().nodename}, {os.getpid()}")
            except BlockingIOError:
                raise DataError(f"another process ({owner.read_text()}) is training in {self.out_dir}") from None
            except (ImportError, OSError):  # Windows; a file system without locks
                pass
            file.truncate(min(self.state["log_size"], file.tell()))  # later lines will be logged again
            if args.wandb_mode != "disabled":
                os.environ["WANDB_MODE"] = args.wandb_mode  # an empty one would be an error
                import wandb

                self.wandb = wandb.init(
                    project=args.wandb_project,
                    name=args.run_name or self.out_dir.name,
                    dir=self.out_dir,
                    id=self.state["wandb_id"],
                    resume="allow",
                    config=args.flags,
                )
                # Its own counter would drop what a resumed run repeats.
                self.wandb.define_metric("*", step_metric="step")
                self.state["wandb_id"] = self.wandb.id
            yield

    def log(self, split, metrics):
        """One line: to the file, to wandb under the same names (val/ and final/ before theirs), and for people."""
        for name, value in metrics.items():
            self.require_finite(f"{split} {name}", value)
        if RANK > 0:
            return
        with expecting("room", self.log_path), open(self.log_path, "a") as file:
            file.write(json.dumps({"step": self.step, "split": split, **metrics}) + "\n")
            self.state["log_size"] = file.tell()
        if self.wandb:
            prefix = "" if split == "train" else f"{split}/"
            self.wandb.log({f"{prefix}{name}": value for name, value in metrics.items()} | {"step": self.step})
        if split != "final":
            say(f"Step {self.step}/{self.args.max_train_steps}, {split.capitalize()} {describe(metrics)}")

    def validate(self):
        """Evaluate, log and save, unless a signal cut the evaluation short."""
        model = self.ema or self.model
        metrics = evaluate(model.eval(), self.data, self.args) | {"step": self.step}
        self.model.train()
        if received_signals():
            return
        self.log("val", metrics)
        self.state |= {"last": metrics, "first": self.state["first"] or metrics}
        if metrics["loss"] < self.state["best"]["loss"]:
            self.state["best"] = metrics
            self.save("best.pt", model=model.state_dict(), metrics=metrics)
        self.save_latest()

    def finish(self):
        """The closing line and table."""
        self.bar.close()
        final = dict(self.state["last"])
        for which in ("first", "best"):
            final |= {f"{which}_{name}": value for name, value in self.state[which].items()}
        self.log("final", final)
        say(f"{report(final)}\nbest checkpoint: {self.out_dir}/best.pt, of step {final['best_step']}")


def train(run):
    """The loop. Returns the exit code: 0, or 128 + the number of the signal that ended the run."""
    args, optimizer, scaler = run.args, run.optimizer, run.scaler
    while True:
        # Evaluate, save, leave. A signal ends the run here, after a whole update.
        done = run.step >= args.max_train_steps
        if run.state["last"].get("step") != run.step and (done or run.step % args.eval_interval == 0):
            run.validate()
        if received_signals():
            run.save_latest()
            say(f"stopped after step {run.step}; to continue: --resume --out_dir {args.out_dir!r}")
            return 128 + max(RECEIVED, default=15)  # 15: only others received one
        if done:
            run.finish()
            return 0

        # Fetch and accumulate.
        start = time.perf_counter()
        batches = [next(run.batches) for _ in range(args.grad_accum)]
        lr = learning_rate(run.step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # The loss is one mean over the micro-batches of all processes. counts (float [k], a number for each part of the
        # loss): how many tokens, say, a batch holds, and so how much it weighs; without them, all weigh the same.
        counts = [batch.pop("counts", torch.ones(())) for batch in batches]
        total = all_reduce(sum(counts)).clamp(min=1)
        for micro, (batch, count) in enumerate(zip(batches, counts)):
            run.net.require_backward_grad_sync = micro == args.grad_accum - 1  # before the forward pass: DDP looks then
            batch |= {"step": run.step, "share": count / total}
            with autocast(args):
                loss, sums, run.carries[micro] = compute_loss(run.net, batch, run.carries[micro], args)
            scaler.scale(loss * WORLD).backward()  # DDP divides the gradient by it
            add_sums(run.sums, sums)

        # Step.
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), args.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.average()
        run.step += 1
        run.bar.update()

        # Log. A number that is not finite ends the run at the next line, evaluation or save.
        finite = norm.isfinite()  # not always in float16; the scaler skips that update
        add_sums(run.sums, {"grad_norm": (norm.masked_fill(~finite, 0) / WORLD, finite / WORLD)})  # equal on all ranks
        if due := run.step % args.log_interval == 0 or run.step in (1, args.max_train_steps):
            metrics = means(run.sums)  # waits for the GPU
        run.state["seconds"] += time.perf_counter() - start  # without evaluating and saving
        if due:
            run.log("train", metrics | {"lr": lr, "samples": run.step * run.num_rows, "seconds": run.state["seconds"]})
            run.sums = {}


def launch(argv):
    """Evaluate or train, as the flags say. Returns the exit code."""
    args, start = parse_args(argv)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
        torch.set_float32_matmul_precision("high")  # TF32
    if WORLD > 1:
        with expecting("processes started by torchrun", f"{WORLD} processes"):
            dist.init_process_group(f"cpu:gloo{',cuda:nccl' * (args.device.type == 'cuda')}")
    data = make_data(args, start["config"])
    if not args.eval_only:
        run = Run(args, data, start)
        with run.open_log(), catch_signals():
            say(
                f"{sum(p.numel() for p in run.model.parameters()):,} parameters, {size_of(data['train']):,} samples, "
                f"{WORLD} x {args.device} {args.dtype}, from step {run.step} -> {run.out_dir}"
            )
            return train(run)
    model = Model(data["config"]).to(args.device).eval()
    model.load_state_dict(start["model"])
    if RANK == 0:  # not on stdout, where an answer may stand
        step = start["step"] or "0, before training (warning: no later evaluation was better)"
        print(f"{args.out_dir}/best.pt of step {step}", file=sys.stderr)
    if "predict" not in data:
        metrics = evaluate(model, data, args)
        say(f"{describe(metrics)}\n{report(metrics)}")
    elif RANK == 0:
        say(data["predict"](model))
    return 0


def main(argv=None):
    """Run with these flags (a list of words; None: the command line's). Raises SystemExit where it does not succeed.

    Bad flags, data and files are one line, anything else is a traceback.
    """
    with contextlib.suppress(AttributeError):  # a notebook has another stdout, or there is none
        sys.stdout.reconfigure(errors="replace", line_buffering=True)  # what a terminal cannot show becomes a ?
    code, message = 1, None
    try:
        code = launch(argv)
    except (DataError, OSError) as error:
        message = f"error: {error}"
    except Exception:
        if WORLD == 1:
            raise
        message = traceback.format_exc()
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish(exit_code=1 if message else 0)
    if WORLD > 1:
        if message:
            time.sleep(min(RANK, 1))  # torchrun ends the others when one has ended: mostly the first alone says it
            print(f"[rank {RANK}] {message}", file=sys.stderr)
        os._exit(code)  # no cleaning up: freed in the wrong order, gloo and torch wait for each other's threads
    if code:
        sys.exit(message or code)


if __name__ == "__main__":
    main()
