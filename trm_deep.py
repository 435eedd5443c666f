"""Tiny Recursive Model over sentence embeddings, supervised inside its recursion.

One small network is applied again and again: a latent z_L is refined L_cycles times, then the answer z_H once; H_cycles
of that make one supervision step, and a row of the batch takes up to halt_max_steps of them before it gets new data.
The model reads a sequence of sentence embeddings and predicts each next one. Normally only the last H cycle is trained
("Less is More: Recursive Reasoning with Tiny Networks", arXiv 2510.04871); deep supervision puts the loss on every one.

  python trm_deep.py --enable_deep_supervision --deep_supervision_schedule linear_decay      # laptop, 1 to 2 minutes
  python trm_deep.py --data_folder DIR --enable_deep_supervision                             # your embeddings, any GPU
  torchrun --nproc_per_node 8 trm_deep.py --data_folder DIR --enable_deep_supervision        # many GPUs

Without --data_folder it learns a built-in world of "flashback stories". The first command's last lines, seed 0:

  Step 1500/1500, Val Loss: 0.0266 | Steps: ['0.0773', '0.0364', '0.0266'] | Exact: 0.9609
  validation                                    loss   exact
  this model                                  0.0266  0.9609
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
import shlex
import signal
import sys
import textwrap
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
    from data import Concat, DataError, Loader, Subset, fingerprint, fixed_batches, hash64, size_of
except ImportError as error:
    sys.exit(f"error: {error}; expected data.py beside this script and no other `data` before it on the path")

# ---- model ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    """What defines the model; the names are the published configurations'."""

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
    pos_encodings: str = "rope"  # or none
    causal: bool = True
    halt_position: int = 0  # which position the halting head reads; the paper's is the first
    learn_init: bool = True  # H_init and L_init; only deep supervision brings a gradient to them
    seq_len: int = 0  # embeddings read at once in training; says nothing about the shape
    # Mean (a float or D of them) and scale of both tensors, as the data have them: the model sees (x - mean) / scale.
    normalization: dict = dataclasses.field(
        default_factory=lambda: {"input_embeddings": (0.0, 1.0), "labels": (0.0, 1.0)}
    )

    def __post_init__(self):
        if self.hidden_size % (2 * self.num_heads):
            expected = f"a multiple of 2 * num_heads = {2 * self.num_heads}"
            raise DataError(f"hidden_size {self.hidden_size}, expected {expected}")
        if self.pos_encodings not in ("rope", "none"):
            raise DataError(f"pos_encodings {self.pos_encodings!r}, expected 'rope' or 'none'")

    @classmethod
    def from_dict(cls, names):
        """Config from a dict in the published configurations' names; what says nothing about the model is left out.

        vocab_size is an embedding's size there. Raises DataError for what cannot be built.
        """
        size = names.get("vocab_size", cls.input_size)
        known = {name: value for name, value in names.items() if name in cls.__dataclass_fields__}
        return cls(**{"input_size": size, "output_size": size} | known)


def rms_norm(x):
    """n(x) = x / rms(x), computed in float32, without a gain. x: [..., D] of any float dtype."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-5).to(x.dtype)


def rotary(positions, d):
    """RoPE angles (theta 10000) of positions [T] as cos, signed sin [T, 1, 1, d], float32."""
    frequencies = 10000 ** (-torch.arange(0, d, 2, device=positions.device) / d)
    angles = positions[:, None, None, None] * frequencies
    return torch.cat([angles, angles], dim=-1).cos(), torch.cat([-angles, angles], dim=-1).sin()


def rotate(x, cos, sin):
    """Half-split rotation of x [B, T, 2, heads, d], in float32: [x1 cos - x2 sin, x2 cos + x1 sin], signs in sin."""
    x32 = x.float()
    return torch.addcmul(x32 * cos, x32.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Block(nn.Module):
    """Post-norm transformer block without biases: h = n(h + Attention(h)); h = n(h + SwiGLU(h))."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        inner = math.ceil(round(config.expansion * D * 2 / 3) / 256) * 256  # 2/3: the gate has weights of its own
        self.num_heads, self.causal = config.num_heads, config.causal
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.o = nn.Linear(D, D, bias=False)
        self.gate_up = nn.Linear(D, 2 * inner, bias=False)
        self.down = nn.Linear(inner, D, bias=False)

    def forward(self, h, rotation):
        B, T, D = h.shape
        qk, v = self.qkv(h).split([2 * D, D], dim=-1)
        qk = rotate(qk.view(B, T, 2, self.num_heads, -1), *rotation)
        q, k = qk.transpose(1, 3).unbind(2)  # each [B, heads, T, d]
        v = v.view(B, T, self.num_heads, -1).transpose(1, 2)  # [B, heads, T, d]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # [B, heads, T, d]
        h = rms_norm(h + self.o(attended.transpose(1, 2).reshape(B, T, D)))
        gate, up = self.gate_up(h).chunk(2, dim=-1)  # each [B, T, inner]
        return rms_norm(h + self.down(F.silu(gate) * up))


DATA = ("input_embeddings", "labels", "min_steps")  # what a row takes along from step to step beside its state


class Model(nn.Module):
    """The recursive model. config: a Config, or a dict with the names of the published configurations."""

    def __init__(self, config):
        super().__init__()
        self.config = c = Config.from_dict(config) if isinstance(config, dict) else config
        self.grad_checkpoint = False
        # Sentences of another size than the network's are projected; the published model has no such layer.
        same = c.input_size == c.hidden_size
        self.embed = nn.Identity() if same else nn.Linear(c.input_size, c.hidden_size, bias=False)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.L_layers))
        self.lm_head = nn.Linear(c.hidden_size, c.output_size, bias=False)
        self.q_head = nn.Linear(c.hidden_size, 1)
        self.H_init, self.L_init = (nn.Parameter(torch.empty(c.hidden_size), c.learn_init) for _ in range(2))
        for p in self.parameters():
            std = p.shape[-1] ** -0.5 if p.ndim == 2 else 1.0
            std /= 0.87962566  # what a normal cut at two standard deviations has left of its own
            nn.init.trunc_normal_(p, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.q_head.weight)
        nn.init.constant_(self.q_head.bias, -5.0)  # almost never halt before it has been learned when to

    def initial_carry(self, batch):
        """The carry before the first step: every row halted, so that forward gives each its data and a fresh state.

        batch: input_embeddings [B, T, D_in]; in training also labels [B, T, D_out] and perhaps min_steps int32 [B].
        """
        inputs = batch["input_embeddings"]
        zeros = inputs.new_zeros(*inputs.shape[:2], self.config.hidden_size, dtype=torch.float32)
        steps = inputs.new_zeros(len(inputs), dtype=torch.int32)
        data = {name: torch.zeros_like(batch[name]) for name in DATA if name in batch}
        # Two tensors, not one twice: the compiled model would be compiled again when they part.
        return {"z_H": zeros, "z_L": zeros.clone(), "steps": steps, "halted": steps == 0, **data}

    def net(self, a, b, rotation):
        """The one network of both roles. a, b: [B, T, D]."""
        h = a + b
        for block in self.layers:
            h = block(h, rotation)
        return h

    def cycle(self, z_H, z_L, inputs, rotation):
        """L_cycles refinements of the latent, then one of the answer. Returns z_H and the list of latents."""
        x, latents = self.embed(inputs), []
        for _ in range(self.config.L_cycles):
            z_L = self.net(z_L, z_H + x, rotation)
            latents.append(z_L)
        return self.net(z_H, z_L, rotation), latents

    def read_out(self, z, t):
        """What a state [B, T, D] predicts, at every position or at t alone: float32 [B, T or 1, D_out]."""
        return self.lm_head(z if t is None else z[:, [t]]).float()

    def forward(self, carry, batch, enable_deep_supervision=False, t=None, latent_logits=False):
        """One supervision step: halted rows start on their row of batch, the others go on with the data they carry.

        carry: from initial_carry or the step before. batch: see initial_carry; before min_steps (1 where missing) a new
        row may not halt. enable_deep_supervision: a gradient through every cycle, not the last alone. t: the logits of
        one position only (one pass computes all; causal attention keeps them apart). latent_logits: read the head off
        z_L after every L cycle too.

        Returns the new carry (detached) and a dict of float32 tensors: logits [B, T, D_out], q_halt_logits [B],
        intermediate_logits, a list over the cycles with a gradient, and latent_logits, a list of lists over L cycles.
        """
        c, halted = self.config, carry["halted"]

        def renew(fresh, old):  # fresh: a number or what broadcasts to old [B, ...]
            return torch.where(halted.view(-1, *[1] * (old.ndim - 1)), fresh, old)

        data = {name: renew(batch[name], carry[name]) for name in DATA if name in batch}
        steps = renew(0, carry["steps"]) + 1
        inputs = data["input_embeddings"]
        # States in the dtype of the matrix products: in bfloat16 half as many bytes are kept for backward.
        kind = inputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
        inputs = inputs.to(dtype)
        z_H = renew(self.H_init, carry["z_H"]).to(dtype)  # y in the paper: the answer
        z_L = renew(self.L_init, carry["z_L"]).to(dtype)  # z in the paper: the latent
        positions = torch.arange(inputs.shape[1], device=inputs.device) * (c.pos_encodings == "rope")  # none: all at 0
        rotation = rotary(positions, c.hidden_size // c.num_heads)

        if not enable_deep_supervision:  # the paper's way: all cycles but the last prepare its start
            with torch.no_grad():
                for _ in range(c.H_cycles - 1):
                    z_H, (*_, z_L) = self.cycle(z_H, z_L, inputs, rotation)
            # Before torch 2.11 a weight cast under no_grad stayed in autocast's cache and lost its gradient below.
            torch.clear_autocast_cache()
        # Keep only the states between cycles; backward runs each a second time. Not the last, which it needs first.
        recomputed = functools.partial(checkpoint, self.cycle, use_reentrant=False, preserve_rng_state=False)
        intermediate, latent = [], []  # logits
        for later in reversed(range(c.H_cycles if enable_deep_supervision else 1)):
            run = recomputed if self.grad_checkpoint and later else self.cycle
            z_H, latents = run(z_H, z_L, inputs, rotation)
            z_L = latents[-1]
            intermediate.append(self.read_out(z_H, t))
            latent.append([self.read_out(z, t) for z in latents if latent_logits])

        # In float32 always. The head reads a detached state: a cross-entropy of .3 beside an MSE of .03 would own z_H
        # (built-in world, 2,500 updates at lr 2e-3, seeds 0 and 1: .998 exact detached, .934 not).
        q = (z_H[:, c.halt_position].detach().float() * self.q_head.weight[0]).sum(-1) + self.q_head.bias
        sure = (q.detach() > 0) & (steps >= data.get("min_steps", 1)) & self.training
        stop = sure | (steps >= c.halt_max_steps)
        state = {"z_H": z_H.detach().float(), "z_L": z_L.detach().float(), "steps": steps, "halted": stop}
        outputs = {"logits": intermediate[-1], "intermediate_logits": intermediate, "latent_logits": latent}
        return {**carry, **data, **state}, {**outputs, "q_halt_logits": q}


RecursiveLLM = Model  # the name in the published training scripts


def to_our_names(weights):
    """Weights, a dict of arrays, under this file's names instead of the published ones (see from_official).

    The published token table is left out, and of two halting logits the second.
    """
    ours = {}
    for name, value in weights.items():
        if "embed_tokens" not in name:
            name = re.sub(r"^inner\.|L_level\.|self_attn\.|mlp\.|_proj", "", name)
            ours[name] = torch.as_tensor(value)[: 1 if "q_head" in name else None]
    return ours


def from_official(config, weights):
    """A Model with the weights of the published TRM code.

    config: dict in its names (hidden_size, num_heads, L_layers, ...; vocab_size is the embedding's size), plus causal
    (default False there: its attention is bidirectional). weights: dict of arrays named inner.H_init,
    inner.L_level.layers.0.self_attn.qkv_proj.weight and so on. Raises ValueError where one is missing or does not fit.
    """
    model = Model({"causal": False, **config})
    load_state(model, to_our_names(weights))
    return model


# ---- the loss: the part people copy ---------------------------------------------------------------------------------


def supervision_weights(num_steps, schedule, base_weight):
    """Weights of the losses after steps 0 .. num_steps - 1, as a list of floats; the last one is 1.0.

    schedule: "constant": base; "linear_decay": base * (i + 1) / num_steps; "exponential_decay": base * 2^i /
    2^(num_steps - 1), so that earlier answers weigh less; "u_shaped": 1.0 for the first, base / 2 between; or a list
    such as "0.3,0.4,0.7,1.0" that is used as it stands. Raises ValueError for anything else.
    """
    last = num_steps - 1
    formulas = {
        "constant": lambda i: base_weight,
        "linear_decay": lambda i: base_weight * (i + 1) / num_steps,
        "exponential_decay": lambda i: base_weight * 2**i / 2**last,
        "u_shaped": lambda i: base_weight * 0.5 if i else 1.0,
    }
    if schedule in formulas:
        return [formulas[schedule](i) for i in range(last)] + [1.0]
    try:
        weights = [float(weight) for weight in schedule.split(",")]
    except ValueError:
        raise ValueError(f"unknown schedule {schedule!r}") from None
    if len(weights) != num_steps or not all(0 <= w < float("inf") for w in weights) or weights[-1] == 0:
        raise ValueError(f"schedule {schedule!r}: expected {num_steps} weights of 0 or more, the last above 0")
    return weights


def compute_deep_supervision_loss(intermediate_logits, labels, weight_schedule, base_weight, curriculum=1.0):
    """Weighted mean of the MSE after every step: sum_i w_i * MSE(step_i, labels) / sum_i w_i.

    intermediate_logits: list of predictions [B, T, D], first step first; labels: [B, T, D]. weight_schedule: one of
    supervision_weights', or "dynamic": w_i = base * MSE_i / max_j MSE_j before the last step, with no gradient through
    the weights, so that a hard step counts up to base and a solved one not at all. curriculum scales every weight but
    the last, from 0.0 (the loss is the last step's; the gradient still runs through all) to 1.0.
    Returns the loss and the list of the steps' own losses (detached): float32 scalars.
    """
    losses = [F.mse_loss(logits.float(), labels.float()) for logits in intermediate_logits]
    values = [loss.detach() for loss in losses]
    if weight_schedule == "dynamic":
        hardest = torch.stack(values).max().clamp(min=1e-12)
        weights = [base_weight * value / hardest for value in values[:-1]] + [1.0]
    else:
        weights = supervision_weights(len(losses), weight_schedule, base_weight)
    weights = [curriculum * weight for weight in weights[:-1]] + weights[-1:]
    return sum(weight * loss for weight, loss in zip(weights, losses)) / sum(weights), values


# ---- data: the built-in world, and folders of embeddings ------------------------------------------------------------

BITS, STORY_SENTENCES, STORY_SIZE = 16, 13, 96  # state bits, sentences per story, size of a sentence embedding


def next_sentence(story, t, j2):
    """The rule: sentence t + 1 (uint8 [N, 16]) of stories [N, > t, 16] whose flashbacks lead to j2 [N] or int."""
    u = np.where(np.arange(BITS) % 2 == 0, story[:, t], story[np.arange(len(story)), j2])
    return np.roll(u, 1, 1) ^ (u | np.roll(u, -1, 1))


@functools.lru_cache
def codebook(seed, device="cpu"):
    """Q float32 [16, 96], orthonormal rows drawn from the seed: a sentence reads (2s - 1) @ Q * sqrt(96 / 16)."""
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((STORY_SIZE, BITS)))[0].T
    return torch.tensor(Q, dtype=torch.float32, device=device)


@functools.lru_cache
def make_world():
    """Datasets of flashback stories as bits, uint8 [N, 13, 16]: all 65,536 openings, about one in 16 held out.

    The state s lies on a ring. The pointer d(s) = 1 + 2 s[0] + s[1] says how far back to look: j1 = max(0, t - d(s_t)),
    then j2 = max(0, j1 - d(s_j1)). Even bits of u come from s_t, odd ones from s_j2, and the next state is
    s_{t+1}[i] = u[i-1] XOR (u[i] OR u[i+1]). So the past determines everything, and the irreducible loss is zero.
    """
    n = np.arange(2**BITS)
    story = np.zeros((len(n), STORY_SENTENCES, BITS), np.uint8)
    story[:, 0] = n[:, None] >> np.arange(BITS) & 1  # opening number n, the lowest bit first
    for t in range(STORY_SENTENCES - 1):
        j = t
        for _ in range(2):
            j = np.maximum(0, j - 1 - 2 * story[n, j, 0].astype(int) - story[n, j, 1])
        story[:, t + 1] = next_sentence(story, t, j)
    held_out = ((n * 2654435761) >> 7) % 16 == 0
    return {"bits": story[~held_out]}, {"bits": story[held_out]}


def read_tensors(path):
    """What torch.save or np.save wrote, as tensors, memory-mapped. Raises DataError for anything else."""
    try:
        if path.suffix != ".npy":
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        # Numpy keeps a file open for every memory map (1,024 are a common limit), torch does not.
        head = np.load(path, mmap_mode="r")
        content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8).numpy()
        array = np.ndarray(head.shape, head.dtype, content, head.offset, head.strides)
        return torch.from_numpy(array.astype(head.dtype.newbyteorder("="), copy=False))  # a copy of other byte orders
    except Exception as error:  # unpickling and zip errors come in many types
        expected = "a tensor saved by torch.save or np.save"
        raise DataError(f"{path}: cannot be read ({first_line(error)}), expected {expected}") from None


def open_chunk(path):
    """One chunk's tensors, memory-mapped: sequence [N, T + 1, D], or input_embeddings and labels [N, T, D]."""
    chunk = read_tensors(path)
    chunk = chunk if isinstance(chunk, dict) else {"sequence": chunk}
    good = set(chunk) in ({"sequence"}, {"input_embeddings", "labels"})
    for x in chunk.values():
        good = good and torch.is_tensor(x) and x.is_floating_point() and x.ndim == 3 and x.numel()
    if not good or len({x.shape[:2] for x in chunk.values()}) > 1 or "sequence" in chunk and x.shape[1] < 2:
        found = {name: [getattr(x, "dtype", type(x)), *getattr(x, "shape", ())] for name, x in chunk.items()}
        expected = "floats [N, T + 1, D], or a dict of input_embeddings and labels with the same N and T"
        raise DataError(f"{path}: holds {found}, expected {expected}")
    return dict(sorted(chunk.items()))  # inputs first


def open_folder(folder):
    """Datasets train and val of folder/{train,val}_embeddings_chunk_*.{pt,npy}, chunks in numeric order.

    Without validation files the last tenth of the training sequences is held out (the last, not a random tenth:
    neighbours in a text stay on one side). Raises DataError for a file that is missing, unreadable or of another shape.
    """
    folder, datasets, first = Path(folder), [], {}
    for split in ("train", "val"):
        paths = {}
        for path in sorted(folder.glob(f"{split}_embeddings_chunk_*")):
            if match := re.fullmatch(r".*_(\d+)\.(pt|npy)", path.name):
                twin = paths.setdefault(int(match[1]), path)
                if twin != path:
                    raise DataError(f"{path}: the same chunk as {twin.name}, expected one of the two")
        if paths and len(paths) <= max(paths) - min(paths):
            say(f"{folder}: some {split} chunks are missing, {len(paths)} are numbered {min(paths)} to {max(paths)}")
        files = [paths[n] for n in sorted(paths)]
        chunks = [open_chunk(path) for path in files]
        for path, chunk in zip(files, chunks):
            shapes = {name: list(x.shape[1:]) for name, x in chunk.items()}
            first = first or shapes
            if shapes != first:
                raise DataError(f"{path}: samples of shape {shapes}, expected {first} as in the first file")
        arrays = {name: [chunk[name] for chunk in chunks] for name in first if files}
        # Zeros at the end would count as sentences; only what a puzzle reads may have them.
        datasets.append({name: Concat(array, files, name == "input_embeddings") for name, array in arrays.items()})
    train, val = datasets
    if not train or size_of(train) < 2:
        raise DataError(f"{folder}: no training sequences, expected two or more in train_embeddings_chunk_0.pt or .npy")
    if not val:
        size = size_of(train)
        parts = np.split(np.arange(size), [size - max(1, size // 10)])
        train, val = ({name: Subset(array, part) for name, array in train.items()} for part in parts)
    return train, val


def predicts_next(dataset):
    """Whether labels are later inputs, by the numbers and not by the keys: then attention must be causal.

    One tensor is cut into inputs and labels that overlap, and two tensors may be such a cut as well. Of 16 samples half
    must agree at one shift, up to rounding in any float type (2^-8) and in half of the positions at least: symbols
    of a puzzle repeat by chance.
    """
    if "input_embeddings" not in dataset:
        return True
    index = np.arange(0, size_of(dataset), 1 + size_of(dataset) // 16)  # spread over all of them
    inputs, labels = (dataset[name][index] for name in ("input_embeddings", "labels"))
    if inputs.shape != labels.shape:
        return False
    for shift in range(1, inputs.shape[1] // 2 + 1):
        now = labels[:, :-shift]
        # Where both are zero the quotient is NaN and says nothing.
        if ((inputs[:, shift:] - now).norm(dim=(1, 2)) / now.norm(dim=(1, 2))).nanmedian() < 0.05:
            return True
    return False


def measure(array):
    """[mean, scale] of embeddings [N, T, D], as D floats and a float: (x - mean) / scale has mean square 1.

    From a sample of at most 2^24 numbers, spread over all of them.
    """
    step = 1 + len(array) * array[np.arange(1)].numel() // 2**24
    sample = array[np.arange(0, len(array), step)].double().flatten(0, 1)
    mean = sample.mean(0)
    return [mean.tolist(), (sample - mean).square().mean().sqrt().item()]


def pairs(picked, seed):
    """What is read and what is predicted, as the data have it: input_embeddings [B, T, D_in], labels [B, T, D_out]."""
    if "bits" in picked:
        signs = 2 * torch.from_numpy(picked["bits"]).float() - 1
        picked = {"sequence": signs @ codebook(seed) * (STORY_SIZE / BITS) ** 0.5}
    if "sequence" in picked:  # T + 1 sentences: all but the last are read, all but the first predicted
        picked = {"input_embeddings": picked["sequence"][:, :-1], "labels": picked["sequence"][:, 1:]}
    return picked


CYCLES = ("H_cycles", "L_cycles", "halt_max_steps")


def make_data(args, config=None):
    """The run's datasets and what the shared part needs to know about them (listed there). Raises DataError."""
    if config:  # --eval_only may change the cycles: any weights fit
        config = dataclasses.replace(config, **{name: getattr(args, name) for name in CYCLES})
    if args.predict:  # reads its own file
        return {"config": config, "predict": lambda model: predict(model, args)}
    train, val = open_folder(args.data_folder) if args.data_folder else make_world()
    inputs, labels = pairs({name: array[np.arange(1)] for name, array in train.items()}, args.seed).values()
    (_, T, D), causal = inputs.shape, predicts_next(train)
    facts = {"input_size": D, "output_size": labels.shape[2], "causal": causal}
    if config is None:
        # The first position of a causal model has seen one sentence only: its halting head reads the last.
        more = {"hidden_size": args.hidden_size or D, "halt_position": -1 if causal else 0}
        more |= {"seq_len": T, "learn_init": args.enable_deep_supervision}
        if args.data_folder and args.normalize:
            moments = [measure(array) for array in train.values()]
            more["normalization"] = {"input_embeddings": moments[0], "labels": moments[0 if causal else -1]}
        config = Config.from_dict(vars(args) | facts | more)
    for name, value in facts.items():
        if value != getattr(config, name):
            raise DataError(f"{args.data_folder}: {name} is {value}, expected {getattr(config, name)} as in the run")

    def collate(picked, extra):
        batch = pairs(picked, args.seed)
        for name in batch:
            mean, scale = config.normalization[name]
            batch[name] = (batch[name] - torch.tensor(mean)) / scale
        if "rows" in extra:
            explore = hash64(extra["position"], args.seed + 1) / 2**64 < args.halt_exploration_prob
            steps = 2 + hash64(extra["position"], args.seed + 2) % np.uint64(max(args.halt_max_steps - 1, 1))
            batch |= {"rows": extra["rows"], "min_steps": np.where(explore, steps, 1).astype(np.int32)}
        return batch

    return {
        "train": train,
        "val": val,
        "collate": collate,
        "config": config,
        "baselines": lambda: baselines(val, collate, args),
        "describe": describe,
        "report": report,
    }


def describe(metrics):
    """One line for the progress bar, in the form of the published script."""
    steps = [f"{value:.4f}" for name, value in metrics.items() if re.fullmatch(r"step_\d+_loss", name)]
    exact = f" | Exact: {metrics['exact_acc']:.4f}" if "exact_acc" in metrics else ""
    return f"Loss: {metrics['loss']:.4f} | Steps: {steps}{exact}"


def report(metrics):
    """The closing table: the model beside predictions that need no training."""
    rows = {
        "this model": "",
        f"halting, after {metrics.get('halt_mean_steps', 0):.2f} steps": "halt_",
        "always zero, the mean of normalised data": "zero_",
        "the sentence before": "copy_",
        "the rule without flashbacks": "no_memory_",
        "the rule with flashbacks to the opening": "opening_",
    }
    lines = [f"{'validation':42}{'loss':>8}{'exact':>8}"]
    for title, prefix in rows.items():
        if prefix + "exact_acc" in metrics:
            lines.append(f"{title:42}{metrics[prefix + 'loss']:8.4f}{metrics[prefix + 'exact_acc']:8.4f}")
    return "\n".join([*lines, f"after each H cycle: {describe(metrics).split(' | ')[1]}"])


def scores(prediction, labels, args, prefix=""):
    """Loss and exact accuracy of a prediction [B, T, D] as metrics."""
    exact = is_right(prediction, labels, args)[0].float().mean()
    return {prefix + "loss": F.mse_loss(prediction, labels), prefix + "exact_acc": exact}


def baselines(val, collate, args):
    """Loss and exact accuracy on the validation samples of predictions that need no training, as final metrics."""
    sums = {}
    for batch in fixed_batches(val, args.batch_size, "cpu", limit=args.eval_samples, collate=collate):
        labels = batch["labels"]
        guesses = {"zero_": torch.zeros_like(labels), "copy_": batch["input_embeddings"]}
        for prefix, guess in guesses.items():
            if guess.shape == labels.shape:
                add_sums(sums, to_sums(scores(guess, labels, args, prefix), len(labels)))
    found = {name: float(total / count) for name, (total, count) in sums.items()}
    if "bits" in val:
        bits = val["bits"][: args.eval_samples or None]
        for prefix, look in {"no_memory_": 1, "opening_": 0}.items():  # both flashbacks lead to where one is, or to 0
            wrong = np.stack([next_sentence(bits, t, look * t) != bits[:, t + 1] for t in range(STORY_SENTENCES - 1)])
            found |= {
                prefix + "loss": 4 * wrong.mean(),
                prefix + "exact_acc": 1 - wrong.any(2).mean(),
            }  # signs: 2 apart
    return found


# ---- one supervision step, evaluation, prediction -------------------------------------------------------------------


def is_right(prediction, labels, args):
    """What counts as a right answer; both [B, T, D] float32. Returns positions bool [B, T] and rows bool [B].

    Built-in world: a sentence is right when all 16 signs decode, a row when all its sentences are. Real embeddings: a
    sentence is right when its cosine reaches --halt_cosine, a row when the mean of its cosines does. The cosine is the
    normalised data's: around their mean, so that the direction all sentences share counts for nothing.
    """
    if args.data_folder:
        cosine = F.cosine_similarity(prediction, labels, dim=-1)
        return cosine >= args.halt_cosine, cosine.mean(1) >= args.halt_cosine
    Q = codebook(args.seed, labels.device)
    guess, truth = ((x[..., None, :] * Q).sum(-1) > 0 for x in (prediction, labels))  # autocast rounds a matmul
    right = (guess == truth).all(-1)
    return right, right.all(1)


def compute_loss(model, batch, carry, args):
    """One supervision step of every row, followed by one update: the outer loop of TRM (N_sup in the paper).

    batch: fresh samples for the rows that halted, `rows` their places, and the shared part's `step` and `share`.
    carry: None at first. Returns this micro-batch's share of the update's loss, metrics as (sum, count) pairs, and the
    next carry, whose `halted` rows ask for a new sample each.
    """
    if carry is None:
        carry = unwrap(model).initial_carry(batch) | {"drawn": torch.zeros_like(batch["rows"])}
    data = {name: carry[name].index_copy(0, batch["rows"], batch[name]) for name in DATA}
    drawn = carry["drawn"] + carry["halted"]  # the rows that halted take one more sample
    labels, deep, latent = data["labels"], args.enable_deep_supervision, args.L_cycle_supervision / args.L_cycles
    carry, outputs = model(carry, data, enable_deep_supervision=deep, latent_logits=latent > 0)

    # The curriculum: losses before the last count nothing until the start step, then linearly more until the end step.
    ramp = float(np.interp(batch["step"], (args.curriculum_start_step, args.curriculum_end_step), (0.0, 1.0)))
    supervision = labels, args.deep_supervision_schedule, args.deep_supervision_weight, ramp
    loss, losses = compute_deep_supervision_loss(outputs["intermediate_logits"], *supervision)
    for logits in zip(*outputs["latent_logits"]):  # the l-th L cycle of every H cycle
        loss = loss + latent * compute_deep_supervision_loss(logits, *supervision)[0]
    right = is_right(outputs["logits"].detach(), labels, args)[1]  # bool [B]
    halt_loss = F.binary_cross_entropy_with_logits(outputs["q_halt_logits"], right.float())

    base = 1.0 if "," in args.deep_supervision_schedule else args.deep_supervision_weight  # a list has its own weights
    values = {f"step_{i}_loss": value for i, value in enumerate(losses, start=args.H_cycles - len(losses))}
    values |= {"loss": loss.detach(), "q_halt_loss": halt_loss.detach(), "supervision_weight": base * ramp * deep}
    metrics = to_sums(values, len(labels))
    metrics["mean_steps"] = ((carry["steps"] * carry["halted"]).sum(), carry["halted"].sum())
    return batch["share"] * (loss + 0.5 * halt_loss), metrics, carry | {"drawn": drawn}


def answer(model, batch, diagnose=False, halt=False):
    """Outputs after all halt_max_steps supervision steps; diagnose adds what each cycle of the last one answers.

    And halted_logits [B, T, D_out], halted_steps int [B]: with halt, of each row's first step where q > 0.
    """
    carry, steps = model.initial_carry(batch), model.config.halt_max_steps
    running, halted_steps, halted_logits = carry["halted"], carry["steps"], 0.0
    for step in range(steps):
        carry, outputs = model(carry, batch, enable_deep_supervision=diagnose and step == steps - 1)
        # A row that was sure keeps its answer; the batch goes on as a whole.
        halted_logits = torch.where(running[:, None, None], outputs["logits"], halted_logits)
        halted_steps = halted_steps + running
        if halt:
            running = running & (outputs["q_halt_logits"] <= 0)
            if not diagnose and not running.any():  # a CPU-GPU sync point
                break
    return outputs | {"halted_logits": halted_logits, "halted_steps": halted_steps}


@torch.no_grad()
def evaluate(model, data, args):
    """Validation means. loss is the MSE of the final output alone: runs with and without deep supervision compare."""
    sums = {}
    for batch in eval_batches(data["val"], args, data["collate"], args.eval_samples):
        with autocast(args):
            outputs = answer(model, batch, diagnose=True, halt=args.eval_halt)
        labels = batch["labels"]
        metrics = {f"step_{i}_loss": F.mse_loss(x, labels) for i, x in enumerate(outputs["intermediate_logits"])}
        metrics |= scores(outputs["logits"], labels, args)
        if args.eval_halt:
            metrics |= scores(outputs["halted_logits"], labels, args, "halt_")
            metrics["halt_mean_steps"] = outputs["halted_steps"].float().mean()
        add_sums(sums, to_sums(metrics, len(labels)))
    return means(sums)


@torch.no_grad()
def predict(model, args):
    """Continue sequences: --predict IN.npy OUT.npy --rollout N, float [T, D] or [B, T, D] -> float32 [.., N, D].

    Every new embedding is appended to what the model reads next. A model of separate labels gives [.., T, D_out].
    Returns what was done in words. Raises DataError for a file that does not fit.
    """
    source, target = map(Path, args.predict)
    c, prefix = model.config, read_tensors(source)
    if target.exists():
        raise DataError(f"{target}: exists already, expected a new file")
    *rows, T, size = prefix.shape
    if not prefix.is_floating_point() or len(rows) > 1 or size != c.input_size or not prefix.float().isfinite().all():
        expected = f"finite floats [T, {c.input_size}] or [B, T, {c.input_size}]"
        raise DataError(f"{source}: holds {prefix.dtype} {list(prefix.shape)}, expected {expected}")
    (mean, scale), (label_mean, label_scale) = c.normalization["input_embeddings"], c.normalization["labels"]

    def read(sequence):
        with autocast(args):
            return answer(model, {"input_embeddings": sequence}, halt=args.eval_halt)["halted_logits"]

    found, rollout = [], args.rollout if c.causal else 0  # separate labels come all at once
    for part in ((prefix.float() - torch.tensor(mean)) / scale).reshape(-1, T, size).split(args.batch_size):
        sequence = part.to(args.device)
        for _ in range(rollout):
            sequence = torch.cat([sequence, read(sequence)[:, -1:]], dim=1)
        found.append(sequence[:, T:] if c.causal else read(sequence))
    found = torch.cat(found).cpu() * label_scale + torch.tensor(label_mean)  # in the data's units again
    found = found.reshape(*rows, *found.shape[1:])
    write_atomically(target, lambda file: np.save(file, found.numpy()))
    longest = T + max(rollout, 1) - 1
    more = f"; read up to {longest} at once, trained on {c.seq_len}" if longest > c.seq_len else ""
    return f"wrote {found.shape[-2]} embeddings for each sequence to {target}{more}"


# ---- flags ----------------------------------------------------------------------------------------------------------


def add_method_args(parser):
    """Add this script's flags. Returns the flags that name data, the demonstration's defaults, the flags that
    --eval_only may be given anew, and check(args), which calls parser.error for what would be wrong or mislead.
    """
    flag = flag_group(parser, "data")
    flag("--data_folder", None, "folder of {train,val}_embeddings_chunk_*.pt or .npy; without it, the built-in world")
    flag("--normalize", True, "centre and scale the folder's embeddings, as measured on its training data")
    flag = flag_group(parser, "model")
    flag("--H_cycles", 3, "cycles of a supervision step; each ends in an answer", 1)
    flag("--L_cycles", 3, "refinements of the latent in a cycle", 1)
    flag("--L_layers", 4, "blocks of the network", 1)
    flag("--hidden_size", 0, "width of the network; 0: the size of the embeddings")
    flag("--num_heads", 16, "attention heads; twice their number divides hidden_size", 1)
    flag("--expansion", 4.0, "expansion of the SwiGLU", 0.01)
    flag = flag_group(parser, "halting")
    flag("--halt_max_steps", 10, "most supervision steps on one sample (N_sup)", 1)
    flag("--halt_exploration_prob", 0.1, "part of the rows that may not halt at once", 0, 1)
    flag("--halt_cosine", 0.9, "real data: an answer is right from this cosine on, normalised as for training", -1, 1)
    flag("--eval_halt", False, "evaluate, or predict with, the answers at the first step where q > 0")
    flag = flag_group(parser, "deep supervision")
    flag("--enable_deep_supervision", False, "loss and gradient at every H cycle, not only at the last")
    flag("--deep_supervision_weight", 0.5, "base weight of the losses before the last")
    schedules = "constant, linear_decay, exponential_decay, u_shaped, dynamic (by each cycle's loss), or as 0.3,0.4,1.0"
    flag("--deep_supervision_schedule", "constant", schedules)
    flag("--curriculum_start_step", 0, "until here only the last cycle's loss counts")
    flag("--curriculum_end_step", 0, "from here all count in full; linear between")
    flag("--L_cycle_supervision", 0.0, "weight of a loss after every L cycle as well")
    flag = flag_group(parser, "prediction, with --eval_only --out_dir RUN")
    flag("--predict", None, "continue, or label, the sequences [B, T, D] of IN", nargs=2, metavar=("IN.npy", "OUT.npy"))
    flag("--rollout", 1, "how many embeddings to predict", 1)
    parser.set_defaults(batch_size=8, lr=1e-4, ema_decay=0.999)
    demo = {"L_cycles": 1, "L_layers": 1, "num_heads": 4, "halt_max_steps": 1, "batch_size": 32, "lr": 3e-3}
    demo |= {"weight_decay": 0.5, "beta2": 0.98, "warmup_steps": 50, "min_lr_ratio": 0.05, "ema_decay": 0.0}
    demo |= {"max_train_steps": 1500, "eval_interval": 300, "eval_samples": 1024}

    def check(args):
        for name in (
            "deep_supervision_weight",
            "deep_supervision_schedule",
            "curriculum_end_step",
            "L_cycle_supervision",
        ):
            if not args.enable_deep_supervision and getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name} needs --enable_deep_supervision")
        if args.deep_supervision_schedule != "dynamic" and not args.eval_only:  # which may have other cycles
            try:
                supervision_weights(args.H_cycles, args.deep_supervision_schedule, args.deep_supervision_weight)
            except ValueError as error:
                parser.error(f"--deep_supervision_schedule: {error}")
        if args.curriculum_end_step < args.curriculum_start_step:
            parser.error("--curriculum_end_step must not come before --curriculum_start_step")
        if args.predict and not args.eval_only:
            parser.error("--predict needs --eval_only and the --out_dir of a run")

    return ("data_folder",), demo, ("predict", "rollout", "halt_cosine", "eval_halt", *CYCLES), check


# ==== shared: identical in nepa_deep.py, trm_deep.py, jepa_lm.py =====================================================
# Trains whatever stands above. All it uses of it:
#   Config, Model(config), to_our_names(weights), which renames published weights
#   add_method_args(parser) -> see there
#   make_data(args, config) -> dict. config: the checkpoint's Config, None in a new run. Keys: train, val (datasets as
#     data.py wants them), collate, config, describe(metrics) -> text of a log line, report(metrics) -> text at the end,
#     baselines() -> metrics of the final line; where it applies, predict(model) -> text (instead of an evaluation)
#   compute_loss(model, batch, carry, args) -> loss, sums, carry. The batch holds step and share (see train); it may
#     hold counts. carry: None, or what each row takes along: tensors [B, ...], among them `drawn` (how many samples the
#     row has taken before) and `halted` (whether it needs another one)
#   evaluate(model, data, args) -> means, with a "loss"


SCRIPT = Path(__file__).stem


# ---- processes, precision, metrics ----


def rank():
    return int(os.environ.get("RANK", 0)) % world_size()  # torchrun sets both; a lone RANK of a cluster says nothing


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """The tensor, summed over the processes in place: CPU tensors travel by gloo, CUDA tensors by nccl."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def gather(value):
    """value of every process (anything that pickles), as a list in order of rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def unwrap(model):
    """The Model inside torch.compile and DistributedDataParallel."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)


def autocast(args):
    """Mixed precision as --dtype says; float32 is none at all."""
    device_type = torch.device(args.device).type
    return torch.autocast(device_type, getattr(torch, args.dtype), enabled=args.dtype != "float32")


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
    for mine in gather({name: (float(total), float(count)) for name, (total, count) in sums.items()}):
        add_sums(totals, mine)
    return totals


def means(sums):
    """Means over everything added, on all processes; a metric without samples is left out. A CPU-GPU sync point."""
    return {name: total / count for name, (total, count) in over_processes(sums).items() if count}


def require_finite(step, split, metrics):
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise DataError(f"step {step}: {split} {name} is {value}, expected a finite number; the checkpoint stays")


def first_line(error):
    """What an exception says, in one line."""
    return textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")


def say(text):
    """Print on the first process, above the progress bar."""
    if rank() == 0:
        tqdm.write(text)


# ---- signals: the first one ends the run in good order, a second one at once ----

RECEIVED = []


class Stopped(Exception):
    """A signal came while the model was evaluated; its number is the argument."""


def receive(number, _):
    RECEIVED.append(number)
    signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def catch_signals():
    before = {}
    RECEIVED.clear()  # of an earlier run in this process
    with contextlib.suppress(ValueError, AttributeError):  # a thread may set no handlers, Windows has but two of these
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name)
            before[number] = signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def received_signal():
    """The number of a signal that any process has received since the last call, or 0, the same on all of them."""
    number = RECEIVED.pop() if RECEIVED else 0
    return int(all_reduce(torch.tensor(number), dist.ReduceOp.MAX))


def eval_batches(dataset, args, collate, limit=0):
    """This process's share of one pass over a dataset in order (data.fixed_batches), with progress on a terminal.

    limit: only the first so many samples; 0: all. Raises Stopped on every process when one has received a signal.
    """
    batches = fixed_batches(dataset, args.batch_size, args.device, rank(), world_size(), limit, collate)
    for batch in tqdm(batches, "evaluating", leave=False, disable=rank() > 0 or None):  # None: where is no terminal
        if number := received_signal():
            raise Stopped(number)
        if batch:  # in the last round some processes may have none
            yield batch


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
                raise argparse.ArgumentTypeError(f"{text!r}, expected {low} to {high}")
            return value

        if kind is bool:
            more = {"type": boolean, "nargs": "?", "const": True, "metavar": "True|False"}
        elif kind in (int, float):
            more = {"type": number, "metavar": "X"}
        if default is not None and default is not False:
            help += " (default: %(default)s)"
        group.add_argument(*names.split(), default=default, help=help, **more)

    return flag


# What --resume may be given anew; of batch_size and grad_accum only the product with the processes has to stay.
MAY_CHANGE = (
    "batch_size grad_accum max_train_steps eval_interval log_interval save_interval device compile "
    "wandb_mode wandb_project run_name out_dir resume eval_only"
)


def parse_args():
    """The flags in force and, with --resume or --eval_only, the checkpoint. Refuses what makes no sense (exit 2)."""
    parser = argparse.ArgumentParser(
        usage="python %(prog)s [flags]      (--help lists them)",
        description=__doc__,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=120),
        allow_abbrev=False,
    )
    if rank() > 0:
        parser.error = lambda message: sys.exit(time.sleep(1) or 2)  # the first process says it
    flag = flag_group(parser, "training")
    flag("--batch_size", 32, "samples per micro-batch and process", 1)
    flag("--grad_accum", 1, "micro-batches per update", 1)
    flag("--max_train_steps", 1000, "updates in all", 1)
    flag("--lr --learning_rate", 1e-3, "peak learning rate")
    flag("--min_lr_ratio", 0.1, "end of the cosine, in parts of --lr; 1: constant", 0, 1)
    flag("--warmup_steps", 100, "updates of linear warm-up")
    flag("--weight_decay", 0.1, "AdamW's, on matrices only")
    flag("--beta1", 0.9, "AdamW's", 0, 0.999999)
    flag("--beta2", 0.95, "AdamW's", 0, 0.999999)
    flag("--grad_clip", 1.0, "largest norm of the gradient; 0: no limit")
    flag("--ema_decay", 0.0, "of the averaged weights that are evaluated; 0: none", 0, 0.999999)
    flag("--seed", 0, "of the weights, the order and the built-in world", 0, 2**32 - 1)
    flag("--init_from", None, "start from the weights in this file: a run's best.pt or ckpt.pt, or published ones")
    flag = flag_group(parser, "machine")
    flag("--device", "auto", "auto (CUDA if there), cpu, cuda, mps, ...")
    flag("--dtype", "auto", "auto: bfloat16 on CUDA", choices=["auto", "float32", "bfloat16", "float16"])
    flag("--compile", "auto", "torch.compile; auto: on CUDA", choices=["auto", "on", "off"])
    flag("--grad_checkpoint", False, "recompute in the backward pass: the same gradient, less memory")
    flag = flag_group(parser, "evaluation, output")
    flag("--eval_interval", 500, "updates between evaluations", 1)
    flag("--eval_samples", 0, "validation samples to use; 0: all")
    flag("--log_interval", 100, "updates between lines of metrics.jsonl", 1)
    flag("--save_interval", 500, "updates between checkpoints; 0: with best.pt only")
    flag("--out_dir", None, f"folder of the run (default: a new out/{SCRIPT}-DATE-TIME)")
    flag("--resume", False, "go on with the run in --out_dir, with its flags; start it where there is none")
    flag("--eval_only", False, "evaluate the best checkpoint of the run in --out_dir")
    flag("--wandb_mode", "disabled", "Weights & Biases", choices=["disabled", "offline", "online"])
    flag("--wandb_project", "deep-supervision", "Weights & Biases")
    flag("--run_name", None, "Weights & Biases (default: the folder's name)")
    data_flags, demo, evaluation, check = add_method_args(parser)
    sizes = " ".join(f"--{name} {value}" for name, value in demo.items())
    parser.epilog = f"Without --{data_flags[0]} the demonstration has defaults of its own:\n{sizes}"

    args = parser.parse_args()
    if args.out_dir is None and (args.resume or args.eval_only):
        parser.error("--resume and --eval_only need the --out_dir of a run")
    folder = Path(args.out_dir or f"out/{SCRIPT}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}")
    latest, best, checkpoint = folder / "ckpt.pt", folder / "best.pt", None
    if args.eval_only or args.resume and latest.exists():
        checkpoint = load_checkpoint(best if args.eval_only and best.exists() else latest)
        parser.set_defaults(**checkpoint["args"])
    elif not args.resume and (folder / "metrics.jsonl").exists():
        parser.error(f"--out_dir {folder} holds a run; --resume continues it, or delete it first")
    elif not getattr(args, data_flags[0]):
        parser.set_defaults(**demo)
    args = parser.parse_args()  # what is on the command line, over what was set above
    if checkpoint:
        free = {*MAY_CHANGE.split(), *data_flags}
        if args.eval_only:
            free |= {*evaluation, "eval_samples", "dtype"}
        for name, value in checkpoint["args"].items():
            if name not in free and value != (now := getattr(args, name)):
                parser.error(f"--{name} {now} conflicts with the run in {folder}, which has {value}")
    for name, value in vars(args).items():
        if value == "":
            parser.error(f"--{name} is empty, expected a value")  # a shell variable that is not set
    check(args)
    args.out_dir = str(folder)
    args.flags = vars(args) | {"resume": False}  # as asked for, before auto is resolved: for the checkpoint and wandb
    cuda = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    args.device = {"auto": cuda if torch.cuda.is_available() else "cpu", "cuda": cuda}.get(args.device, args.device)
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # every backend has its own way to say that it is not there
        parser.error(f"--device {args.device}: {first_line(error)}")
    on_cuda = args.device.startswith("cuda")
    if args.dtype == "auto":
        args.dtype = "bfloat16" if on_cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if args.compile == "auto":
        args.compile = "on" if on_cuda else "off"
    return args, checkpoint


# ---- files ----


def write_atomically(path, write):
    """write(file) into a temporary file beside path, then rename: path holds the old content or the new, never half.

    Raises DataError when that fails, on a full disk for one.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:  # torch.save has its own types
        temporary.unlink(missing_ok=True)  # a full disk keeps no half file
        raise DataError(f"{path}: cannot be written ({first_line(error)}), expected a folder with room") from None


def read_file(path, expected):
    """What torch.save wrote to path, on the CPU. Raises DataError that says what was expected."""
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file  # nothing else needs this package

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling and zip errors come in many types
        expected = "pip install safetensors" if isinstance(error, ImportError) else expected
        raise DataError(f"{path}: cannot be read ({first_line(error)}), expected {expected}") from None


def load_checkpoint(path):
    """The checkpoint at path: see Run.save; its config is a Config. Raises DataError if it is none of this script's."""
    checkpoint = read_file(path, "the checkpoint of a run")
    try:
        return checkpoint | {"config": Config(**checkpoint["config"])}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: {first_line(error)}, expected a checkpoint of this version of {SCRIPT}.py") from None


def load_state(model, weights):
    """Load weights, a dict of tensors by name. Raises ValueError that names what does not fit or is not finite."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"weight {name} is not finite, expected numbers")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(first_line(error)) from None


def load_weights(model, path):
    """--init_from: the weights of a checkpoint (the averaged ones where there are any), or published ones."""
    weights = read_file(path, "weights saved by torch.save")
    try:
        for wrapper in ("ema", "model", "state_dict"):
            weights = weights.get(wrapper) or weights
        bare = {re.sub(r"^((module|_orig_mod|model)\.)+", "", name): value for name, value in weights.items()}
        load_state(model, to_our_names(bare))
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: {first_line(error)}") from None


# ---- optimizer ----


def learning_rate(step, args):
    """Linear warm-up, then a cosine from lr to lr * min_lr_ratio at the last update."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.max_train_steps - args.warmup_steps)
    return args.lr * (args.min_lr_ratio + (1 - args.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1))))


def make_optimizer(model, args):
    """AdamW, weight decay on matrices only; fused (one kernel for all parameters) where torch has it."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if (p.ndim >= 2) == matrices], "weight_decay": args.weight_decay * matrices}
        for matrices in (True, False)
    ]
    fused = args.device.startswith(("cpu", "cuda")) or None
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=fused)


# ---- the run ----


class Run:
    """All that changes during a run, how it is logged and how it is saved."""

    parts = ("model", "ema", "optimizer", "scaler")  # saved as state dicts
    values = ("step", "sizes", "last", "best", "seconds", "sums", "wandb_id")  # saved as they are
    step, seconds, wandb_id = 0, 0.0, None
    last, best = {"step": -1}, {"loss": math.inf}  # metrics of the last and of the best validation

    def __init__(self, args, data, checkpoint):
        self.args, self.data, self.out_dir = args, data, Path(args.out_dir)
        self.num_rows = args.batch_size * args.grad_accum * world_size()  # samples of an update
        self.sizes = {"--batch_size * --grad_accum * processes": self.num_rows}
        self.sizes |= {f"{split} data": fingerprint(data[split], data["collate"]) for split in ("train", "val")}

        torch.manual_seed(args.seed)
        self.model = Model(data["config"]).to(args.device)
        self.model.grad_checkpoint = args.grad_checkpoint
        if args.init_from and not checkpoint:
            load_weights(self.model, args.init_from)
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if args.ema_decay else None
        self.optimizer = make_optimizer(self.model, args)
        self.scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.dtype == "float16")
        self.net = self.model
        if args.compile == "on":
            torch._dynamo.config.optimize_ddp = not args.grad_checkpoint  # torch 2.6 fails where it cuts checkpoints
            self.net = torch.compile(self.model)
        if dist.is_initialized():
            self.net = nn.parallel.DistributedDataParallel(self.net, gradient_as_bucket_view=True)

        self.sums, self.carries = {}, [None] * args.grad_accum  # a carry for each micro-batch
        if checkpoint:
            self.restore(checkpoint)
        self.open_log(checkpoint["log_size"] if checkpoint else 0)
        self.loader = Loader(data["train"], self.num_rows, args.seed, args.device, data["collate"])
        for micro in range(args.grad_accum):
            self.request(micro, self.step)

    def restore(self, checkpoint):
        """Go on where the checkpoint was saved, on any number of processes: bit for bit the run that never stopped."""
        for name, then in checkpoint["sizes"].items():
            if then != (now := self.sizes[name]):
                raise DataError(f"{self.out_dir}: {name} is {now}, expected {then} as in the checkpoint")
        for name in self.parts:
            if part := getattr(self, name):
                part.load_state_dict(checkpoint[name])
        for name in self.values:
            setattr(self, name, checkpoint[name])
        self.sums = self.sums if rank() == 0 else {}
        for micro in range(self.args.grad_accum if checkpoint["carry"] else 0):
            rows = (rank() * self.args.grad_accum + micro) * self.args.batch_size + torch.arange(self.args.batch_size)
            self.carries[micro] = {name: x[rows].to(self.args.device) for name, x in checkpoint["carry"].items()}
        torch.set_rng_state(checkpoint["rng"])

    @torch.no_grad()
    def save(self, name):
        """Write everything to out_dir/name. Raises DataError, and keeps the file, where a number is not finite."""
        sums = over_processes(self.sums)
        lengths = torch._foreach_norm(list(self.model.parameters()))  # one wait for the GPU, not one for each
        totals = {key: total for key, (total, _) in sums.items()}
        require_finite(self.step, "train", totals | {"norm of the weights": float(torch.stack(lengths).sum())})
        mine = {key: torch.cat([carry[key] for carry in self.carries]).cpu() for key in self.carries[0] or ()}
        shards = gather(mine)
        if rank() > 0:
            return
        contents = {
            "script": SCRIPT,
            "config": dataclasses.asdict(self.model.config),
            "args": self.args.flags,
            **{key: part and part.state_dict() for key in self.parts for part in [getattr(self, key)]},
            **{key: getattr(self, key) for key in self.values},
            "sums": sums,
            "carry": {key: torch.cat([shard[key] for shard in shards]) for key in mine},  # all rows in order
            "rng": torch.get_rng_state(),  # nothing here draws on the GPU
            "log_size": self.log_path.stat().st_size,
        }
        write_atomically(self.out_dir / name, lambda file: torch.save(contents, file))

    def request(self, micro, step):
        """Order what a micro-batch of update `step` needs: a sample for every row, or for the rows that halted."""
        args, carry = self.args, self.carries[micro]
        first_row = (rank() * args.grad_accum + micro) * args.batch_size
        drawn = carry["drawn"] if carry else torch.full((args.batch_size,), step)
        self.loader.request(first_row, drawn, carry and carry["halted"])

    @torch.no_grad()
    def average(self):
        """Move the averaged weights towards the weights; at first faster, or the first ones would stay in them."""
        if self.ema:
            decay = min(self.args.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    def open_log(self, size):
        """metrics.jsonl, of which size bytes belong to the run so far, Weights & Biases, the progress bar."""
        args, self.log_path, self.wandb = self.args, self.out_dir / "metrics.jsonl", None
        disable = None if rank() == 0 and sys.stdout.isatty() else True  # None: where stderr is no terminal
        self.bar = tqdm(total=args.max_train_steps, initial=self.step, disable=disable, dynamic_ncols=True)
        if rank() > 0:
            return
        self.out_dir.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "ab") as file:
            file.truncate(min(size, file.tell()))  # what was logged after the checkpoint will be logged again
        if args.wandb_mode != "disabled":
            os.environ["WANDB_MODE"] = args.wandb_mode  # an empty one would be an error
            import wandb

            self.wandb = wandb.init(
                project=args.wandb_project,
                name=args.run_name or self.out_dir.name,
                dir=args.out_dir,
                id=self.wandb_id,
                resume="allow",
                config=args.flags,
            )
            self.wandb.define_metric("*", step_metric="step")  # its own counter would drop what a resumed run logs anew
            self.wandb_id = self.wandb.id

    def log(self, split, metrics):
        """One line: to the file, to wandb under the same names (val/ and final/ before theirs), and for people."""
        require_finite(self.step, split, metrics)
        if rank() > 0:
            return
        try:
            with open(self.log_path, "a") as file:
                file.write(json.dumps({"step": self.step, "split": split, **metrics}) + "\n")
        except OSError as error:
            raise DataError(f"{self.log_path}: cannot be written ({error.strerror}), expected room") from None
        if self.wandb:
            prefix = "" if split == "train" else split + "/"
            self.wandb.log({prefix + name: value for name, value in metrics.items()} | {"step": self.step})
        text = f"Step {self.step}/{self.args.max_train_steps}, {split.capitalize()} {self.data['describe'](metrics)}"
        if split == "train" and not self.bar.disable:
            self.bar.set_description_str(text)
        elif split != "final":
            say(text)

    def validate(self):
        """Evaluate and log. Returns whether the loss is the lowest so far; then best.pt is saved."""
        metrics = evaluate((self.ema or self.model).eval(), self.data, self.args)
        self.model.train()
        self.log("val", metrics)
        self.last = {**metrics, "step": self.step}
        if better := metrics["loss"] < self.best["loss"]:
            self.best = self.last
            self.save("best.pt")
        return better

    def finish(self):
        """The closing line and table."""
        self.bar.close()
        if rank() == 0:
            final = self.last | {f"best_{name}": value for name, value in self.best.items()} | self.data["baselines"]()
            self.log("final", final)
            say(self.data["report"](final))
            say(f"best checkpoint: {self.out_dir}/best.pt, of step {self.best['step']}")


def shares(batches):
    """What part of the update each micro-batch is: an update is one mean over all it holds, in all processes.

    A batch with more tokens weighs more: it says how much it holds (counts: float [k], a number for each part of the
    loss). Batches that say nothing hold the same. DistributedDataParallel divides by the number of processes.
    """
    if "counts" not in batches[0]:
        return [1 / len(batches)] * len(batches)
    counts = [batch.pop("counts") for batch in batches]
    total = all_reduce(sum(counts)).clamp(min=1) / world_size()
    return [count / total for count in counts]


def train(run):
    """The loop. Returns the exit code: 0, or 128 + the number of the signal that ended the run."""
    args, net, optimizer, scaler = run.args, run.net, run.optimizer, run.scaler
    while True:
        # Evaluate, save, leave. A signal ends the run here, after a whole update.
        done, stop, better = run.step >= args.max_train_steps, received_signal(), False
        if run.last["step"] < run.step and (done or run.step % args.eval_interval == 0):
            try:
                better = run.validate()
            except Stopped as stopped:  # half an evaluation is none: the resumed run begins with it
                (stop,) = stopped.args
        if better or done or stop or args.save_interval and run.step % args.save_interval == 0:
            run.save("ckpt.pt")  # with a new best.pt too: the two belong together
        if done and run.last["step"] == run.step:
            run.finish()
            return 0
        if stop:
            run.bar.close()
            launcher = "python" if world_size() == 1 else f"torchrun --nproc_per_node {world_size()}"
            where = shlex.quote(args.out_dir)
            say(f"stopped after step {run.step}; go on with: {launcher} {SCRIPT}.py --resume --out_dir {where}")
            return 128 + stop

        # Fetch and accumulate.
        start = time.perf_counter()
        batches = [run.loader.next() for _ in range(args.grad_accum)]
        lr = learning_rate(run.step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for micro, (batch, share) in enumerate(zip(batches, shares(batches))):
            net.require_backward_grad_sync = micro == args.grad_accum - 1  # before the forward pass: DDP looks then
            batch |= {"step": run.step, "share": share}
            with autocast(args):
                loss, sums, run.carries[micro] = compute_loss(net, batch, run.carries[micro], args)
            run.request(micro, run.step + 1)  # made in the background during the backward pass
            scaler.scale(loss).backward()
            add_sums(run.sums, sums)

        # Step.
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), args.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        run.average()
        run.step += 1
        run.bar.update()

        # Log. A number that is not finite ends the run at the next line, evaluation or save.
        overflow = ~norm.isfinite() & scaler.is_enabled()  # of float16, now and then: the scaler skips that update
        add_sums(run.sums, {"grad_norm": (norm.masked_fill(overflow, 0.0), (~overflow).float())})
        due = run.step == 1 or run.step % args.log_interval == 0 or run.step == args.max_train_steps
        metrics = means(run.sums) if due else {}  # waits for the GPU
        run.seconds += time.perf_counter() - start  # without evaluating and saving
        if due:
            run.log("train", metrics | {"lr": lr, "samples": run.step * run.num_rows, "seconds": run.seconds})
            run.sums = {}


def first_to_fail():
    """Whether no other process has failed before this one: it alone says why."""
    if not dist.is_initialized():
        time.sleep(min(rank(), 1))  # torchrun ends the others when one has ended
        return rank() == 0
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the process that counted is gone
        return False


def launch():
    """Evaluate or train, as the flags say. Returns the exit code."""
    args, checkpoint = parse_args()
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
        torch.set_float32_matmul_precision("high")  # TF32
    if world_size() > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.startswith("cuda") else "gloo")
        dist.barrier()  # nobody writes before everybody has looked whether --out_dir is free
    data = make_data(args, checkpoint and checkpoint["config"])
    if not args.eval_only:
        run = Run(args, data, checkpoint)
        sizes = f"{sum(p.numel() for p in run.model.parameters()):,} parameters, {size_of(data['train']):,} samples"
        say(f"{sizes}, {world_size()} x {args.device} {args.dtype}, from step {run.step} -> {run.out_dir}")
        with catch_signals():
            return train(run)
    model = Model(data["config"]).to(args.device).eval()
    load_state(model, checkpoint["ema"] or checkpoint["model"])
    if "predict" in data:
        say(rank() == 0 and data["predict"](model))
    else:
        metrics = evaluate(model, data, args)
        say(data["describe"](metrics))
        say(rank() == 0 and data["report"](metrics | data["baselines"]()))
    return 0


def main():
    message = None
    try:
        code = launch()
    except KeyboardInterrupt:  # before training has begun; from then on the run ends in good order
        code = 130
    except Exception as error:
        code = 1
        if isinstance(error, (DataError, OSError)):
            message = f"error: {error}"
        elif isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            message = f"error: {first_line(error)}; a smaller --batch_size or --grad_checkpoint needs less memory"
        elif dist.is_initialized():
            message = traceback.format_exc()
        else:
            raise
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish(exit_code=int(message is not None))
    message = message if message and first_to_fail() else None
    if dist.is_initialized():  # no tidying up: freed in the wrong order, gloo and torch wait for each other's threads
        if message:
            print(message, file=sys.stderr)
        sys.stdout.flush()
        os._exit(code)
    if code:
        sys.exit(message or code)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # what a terminal cannot show becomes a ?
    main()
