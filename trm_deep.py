"""Tiny Recursive Model over sentence embeddings, supervised inside its recursion.

One small network is applied again and again: a latent z_L is refined L_cycles times, then the answer z_H once; H_cycles
of that make one supervision step, and a row of the batch takes up to halt_max_steps of them before it gets new data.
The model reads a sequence of sentence embeddings and predicts each next one. Normally only the last H cycle is trained
("Less is More: Recursive Reasoning with Tiny Networks", arXiv 2510.04871); deep supervision puts the loss on every one.

  python trm_deep.py --enable_deep_supervision --deep_supervision_schedule linear_decay      # laptop, 1 to 2 minutes
  python trm_deep.py --data_folder DIR --enable_deep_supervision                             # your embeddings, any GPU
  torchrun --nproc_per_node 8 trm_deep.py --data_folder DIR --enable_deep_supervision        # many GPUs

Without --data_folder it learns a built-in world of "flashback stories". The first command's last lines, seed 0:

  Step 1500/1500, Val Loss: 0.0096 | Steps: ['0.0525', '0.0157', '0.0096'] | Exact: 0.9888
  validation                                    loss   exact
  this model                                  0.0096  0.9888
"""

import argparse
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

from data import Concat, DataError, Loader, fixed_batches, make_batch, mix, size_of

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
    causal: bool = True
    halt_position: int = 0  # which position the halting head reads; the paper's is the first
    learn_init: bool = True  # H_init and L_init; only deep supervision brings a gradient to them

    def __post_init__(self):
        heads = 2 * self.num_heads
        if self.hidden_size % heads:
            raise ValueError(f"hidden_size {self.hidden_size}, expected a multiple of 2 * num_heads = {heads}")

    @classmethod
    def from_dict(cls, names):
        """Config from a dict in the published configurations' names; what says nothing about the shape is left out.

        vocab_size is an embedding's size there. Raises ValueError for position encodings other than rope.
        """
        if names.get("pos_encodings", "rope") != "rope":
            raise ValueError(f"pos_encodings {names['pos_encodings']!r}, expected 'rope'")
        known = {field.name for field in dataclasses.fields(cls)}
        sizes = dict.fromkeys(("input_size", "output_size"), names.get("vocab_size", cls.input_size))
        return cls(**sizes | {name: value for name, value in names.items() if name in known})


def rms_norm(x):
    """n(x) = x / rms(x), computed in float32, without a gain. x: [..., D] of any float dtype."""
    x32 = x.float()
    mean_square = x32.norm(dim=-1, keepdim=True).square() / x.shape[-1]  # a third faster than x32.square().mean(-1)
    return (x32 * torch.rsqrt(mean_square + 1e-5)).to(x.dtype)


def rotary(T, d, device):
    """RoPE angles (theta 10000) of T positions as cos, signed sin [T, 1, 1, d], float32."""
    frequencies = 10000 ** (-torch.arange(0, d, 2, device=device) / d)
    angles = torch.arange(T, device=device)[:, None, None, None] * frequencies
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
        inner = math.ceil(round(config.expansion * D * 2 / 3) / 256) * 256
        self.num_heads, self.causal = config.num_heads, config.causal
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.o = nn.Linear(D, D, bias=False)
        self.gate_up = nn.Linear(D, 2 * inner, bias=False)
        self.down = nn.Linear(inner, D, bias=False)

    def cast(self, dtype):
        """The four matrices in the compute dtype."""
        return [layer.weight.to(dtype) for layer in (self.qkv, self.o, self.gate_up, self.down)]

    def forward(self, h, weights, cos, sin):
        w_qkv, w_o, w_gate_up, w_down = weights
        B, T, D = h.shape
        qk, v = F.linear(h, w_qkv).split([2 * D, D], dim=-1)
        q, k = rotate(qk.view(B, T, 2, self.num_heads, -1), cos, sin).transpose(1, 3).unbind(2)  # each [B, heads, T, d]
        v = v.view(B, T, self.num_heads, -1).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        h = rms_norm(h + F.linear(attended.transpose(1, 2).reshape(B, T, D), w_o))
        gate, up = F.linear(h, w_gate_up).chunk(2, dim=-1)
        return rms_norm(h + F.linear(F.silu(gate) * up, w_down))


class Model(nn.Module):
    """The recursive model. config: a Config, or a dict with the names of the published configurations."""

    def __init__(self, config):
        super().__init__()
        self.config = c = Config.from_dict(config) if isinstance(config, dict) else config
        self.grad_checkpoint = False
        # Sentences of another size than the network's are projected; the published model has no such layer.
        project = c.input_size != c.hidden_size
        self.embed = nn.Linear(c.input_size, c.hidden_size, bias=False) if project else None
        self.layers = nn.ModuleList(Block(c) for _ in range(c.L_layers))
        self.lm_head = nn.Linear(c.hidden_size, c.output_size, bias=False)
        self.q_head = nn.Linear(c.hidden_size, 1)
        self.H_init = nn.Parameter(torch.empty(c.hidden_size), requires_grad=c.learn_init)
        self.L_init = nn.Parameter(torch.empty(c.hidden_size), requires_grad=c.learn_init)
        for p in self.parameters():
            std = p.shape[-1] ** -0.5 if p.ndim == 2 else 1.0
            # A normal cut at two standard deviations has .8796 of its std left: correct for it.
            nn.init.trunc_normal_(p, std=std / 0.87962566, a=-2 * std / 0.87962566, b=2 * std / 0.87962566)
        nn.init.zeros_(self.q_head.weight)
        nn.init.constant_(self.q_head.bias, -5.0)  # almost never halt before it has been learned when to

    def initial_carry(self, batch):
        """The carry before the first step: every row halted, so that forward gives each its data and a fresh state.

        batch: input_embeddings [B, T, D_in], labels [B, T, D_out] (labels may be missing at inference).
        """
        B, T, _ = batch["input_embeddings"].shape
        device = batch["input_embeddings"].device
        zeros = torch.zeros(B, T, self.config.hidden_size, device=device)
        count = torch.zeros(B, dtype=torch.int32, device=device)
        data = {name: torch.zeros_like(batch[name]) for name in ("input_embeddings", "labels") if name in batch}
        return {"z_H": zeros, "z_L": zeros, "steps": count, "min_steps": count, "halted": count == 0, **data}

    def forward(self, carry, batch, enable_deep_supervision=False, t=None, latent_logits=False, after_cycle=None):
        """One supervision step: halted rows start on their row of batch, the others go on with the data they carry.

        carry: from initial_carry or the step before. batch: see initial_carry; in training also `min_steps` int32 [B],
        before which a new row may not halt (drawn here when absent). enable_deep_supervision: a gradient through every
        cycle, not the last alone. t: give the logits of one position only (one pass computes all; causal attention
        keeps them apart). latent_logits: read the head off z_L after every L cycle too. after_cycle(h, logits,
        latent_logits) -> the same two: called after each cycle but the last, whose states are then cut off the graph.

        Returns the new carry (detached) and a dict of float32 tensors: logits [B, T, D_out], q_halt_logits [B], and on
        demand intermediate_logits, a list over cycles, and latent_logits, a list over cycles of lists over L cycles.
        """
        c, halted = self.config, carry["halted"]
        names = [name for name in ("input_embeddings", "labels") if name in batch]
        carry = {**carry, **{k: torch.where(halted[:, None, None], batch[k], carry[k]) for k in names}}
        steps = torch.where(halted, 0, carry["steps"]) + 1

        inputs = carry["input_embeddings"]
        T, device = inputs.shape[1], inputs.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.q_head.weight.dtype
        # Cast every matrix once per step: cast where it is used, each recursion would make a copy and keep it for
        # backward (half of all bytes saved). Not left to autocast: before torch 2.11 its cache could hand on a copy
        # made in a cycle under no_grad, and the weight silently lost its gradient.
        weights = [block.cast(dtype) for block in self.layers]
        w_head, w_embed = self.lm_head.weight.to(dtype), None if self.embed is None else self.embed.weight.to(dtype)
        cos, sin = rotary(T, c.hidden_size // c.num_heads, device)

        def net(a, b):
            h = a + b
            for block, w in zip(self.layers, weights):
                h = block(h, w, cos, sin)
            return h

        def cycle(z_H, z_L, x):
            latents = []
            for _ in range(c.L_cycles):
                z_L = net(z_L, z_H + x)
                latents.append(z_L)
            return net(z_H, z_L), latents

        # Keep only the states between cycles; backward runs each a second time. Not the last, which it needs first.
        recomputed = functools.partial(checkpoint, cycle, use_reentrant=False, preserve_rng_state=False)

        def head(z):
            z = z if t is None else z[:, [t]]
            return F.linear(z, w_head).float()

        z_H = torch.where(halted[:, None, None], self.H_init, carry["z_H"]).to(dtype)  # y in the paper: the answer
        z_L = torch.where(halted[:, None, None], self.L_init, carry["z_L"]).to(dtype)  # z in the paper: the latent
        intermediate, latent = [], []
        for h in range(c.H_cycles):
            last = h == c.H_cycles - 1
            with torch.set_grad_enabled(torch.is_grad_enabled() and (last or enable_deep_supervision)):
                x = inputs.to(dtype) if w_embed is None else F.linear(inputs.to(dtype), w_embed)
                z_H, latents = (recomputed if self.grad_checkpoint and not last else cycle)(z_H, z_L, x)
                z_L = latents[-1]
                if last or enable_deep_supervision:
                    logits = head(z_H)
                    latent.append([head(z) for z in latents] if latent_logits else [])
                    if after_cycle and not last:
                        logits, latent[-1] = after_cycle(h, logits, latent[-1])
                        z_H, z_L = z_H.detach(), z_L.detach()
                    intermediate.append(logits)

        # In float32 always. The head reads a detached state: a cross-entropy of .3 beside an MSE of .03 would own z_H
        # (built-in world, 2,500 updates at lr 2e-3, seeds 0 and 1: .998 exact detached, .934 not).
        q = (z_H[:, c.halt_position].detach().float() * self.q_head.weight[0]).sum(-1) + self.q_head.bias
        outputs = {"logits": logits, "q_halt_logits": q}
        if enable_deep_supervision:
            outputs["intermediate_logits"] = intermediate
        if latent_logits:
            outputs["latent_logits"] = latent
        with torch.no_grad():
            stop = steps >= c.halt_max_steps
            min_steps = carry["min_steps"]
            if self.training:
                min_steps = torch.where(halted, self.draw_min_steps(batch), min_steps)
                stop = stop | ((q > 0) & (steps >= min_steps))
        state = {"z_H": z_H.detach().float(), "z_L": z_L.detach().float()}
        return {**carry, **state, "steps": steps, "min_steps": min_steps, "halted": stop}, outputs

    def draw_min_steps(self, batch):
        """int32 [B]: 1, or with probability halt_exploration_prob a number from 2 to halt_max_steps."""
        if "min_steps" in batch:
            return batch["min_steps"]
        c, (B, *_), device = self.config, batch["input_embeddings"].shape, batch["input_embeddings"].device
        more = torch.randint(2, max(c.halt_max_steps, 2) + 1, (B,), dtype=torch.int32, device=device)
        return torch.where(torch.rand(B, device=device) < c.halt_exploration_prob, more, 1)


RecursiveLLM = Model  # the name in the published training scripts


def from_official(config, weights):
    """A Model with the weights of the published TRM code.

    config: dict in its names (hidden_size, num_heads, L_layers, ...; vocab_size is the embedding's size), plus causal
    (default False there: its attention is bidirectional). weights: dict of arrays named inner.H_init,
    inner.L_level.layers.0.self_attn.qkv_proj.weight and so on; of the two halting logits the first is kept, and the
    token table is left out. Raises ValueError for a missing, unknown or misshapen name.
    """
    model = Model({"causal": False, **config})
    state = {}
    for name, value in weights.items():
        if "embed_tokens" not in name:
            name = re.sub(r"^inner\.|L_level\.|self_attn\.|mlp\.|_proj", "", name)
            state[name] = torch.as_tensor(value)[: 1 if "q_head" in name else None]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"weights do not fit the config: {error}") from None
    return model


# ---- the loss: the part people copy ---------------------------------------------------------------------------------


def supervision_weights(num_steps, schedule, base_weight):
    """Weights of the losses after steps 0 .. num_steps - 1, as a list of floats; the last one is 1.0.

    schedule: "constant": base; "linear_decay": base * (i + 1) / num_steps; "exponential_decay": base * 2^i /
    2^(num_steps - 1), so that earlier answers weigh less; "u_shaped": 1.0 for the first, base / 2 between; or a list
    such as "0.3,0.4,0.7,1.0" that is used as it stands. Raises ValueError for anything else.
    """
    last = num_steps - 1
    if schedule == "constant":
        weights = [base_weight] * last
    elif schedule == "linear_decay":
        weights = [base_weight * (i + 1) / num_steps for i in range(last)]
    elif schedule == "exponential_decay":
        weights = [base_weight * 2**i / 2**last for i in range(last)]
    elif schedule == "u_shaped":
        weights = [1.0 if i == 0 else base_weight * 0.5 for i in range(last)]
    else:
        try:
            weights = [float(weight) for weight in schedule.split(",")]
        except ValueError:
            raise ValueError(f"unknown schedule {schedule!r}") from None
        if len(weights) != num_steps or not all(0 <= w < float("inf") for w in weights) or weights[-1] == 0:
            raise ValueError(f"schedule {schedule!r}: expected {num_steps} weights of 0 or more, the last above 0")
        return weights
    return weights + [1.0]


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
    """The rule: sentence t + 1 (uint8 [N, 16]) of stories [N, > t, 16] whose flashbacks lead to sentences j2 [N]."""
    u = np.where(np.arange(BITS) % 2 == 0, story[:, t], story[np.arange(len(story)), j2])
    return np.roll(u, 1, 1) ^ (u | np.roll(u, -1, 1))


def make_stories(openings):
    """Flashback stories: opening states uint8 [N, 16] -> uint8 [N, 13, 16], the opening first.

    The state s lies on a ring. The pointer d(s) = 1 + 2 s[0] + s[1] says how far back to look: j1 = max(0, t - d(s_t)),
    then j2 = max(0, j1 - d(s_j1)). Even bits of u come from s_t, odd ones from s_j2, and the next state is
    s_{t+1}[i] = u[i-1] XOR (u[i] OR u[i+1]). So the past determines everything, and the irreducible loss is zero.
    """
    n, story = np.arange(len(openings)), np.zeros((len(openings), STORY_SENTENCES, BITS), np.uint8)
    story[:, 0] = openings
    for t in range(STORY_SENTENCES - 1):
        j = np.full(len(n), t)
        for _ in range(2):
            j = np.maximum(0, j - 1 - 2 * story[n, j, 0].astype(int) - story[n, j, 1])
        story[:, t + 1] = next_sentence(story, t, j)
    return story


@functools.lru_cache
def codebook(seed, device="cpu"):
    """Q float32 [16, 96], orthonormal rows drawn from the seed: a sentence reads (2s - 1) @ Q * sqrt(96 / 16)."""
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((STORY_SIZE, BITS)))[0].T
    return torch.tensor(Q, dtype=torch.float32, device=device)


@functools.lru_cache
def make_world():
    """Datasets of the built-in world as bits, uint8 [N, 13, 16]: all 65,536 openings, about one in 16 held out."""
    number = np.arange(2**BITS, dtype=np.int64)
    held_out = ((number * 2654435761) >> 7) % 16 == 0
    stories = make_stories((number[:, None] >> np.arange(BITS)).astype(np.uint8) & 1)
    return {"bits": stories[~held_out]}, {"bits": stories[held_out]}


def open_chunk(path):
    """One chunk's tensors, memory-mapped: sequence [N, T + 1, D], or input_embeddings and labels [N, T, D]."""
    try:
        if path.suffix == ".npy":
            loaded = torch.from_numpy(np.load(path, mmap_mode="c"))
        else:
            try:
                loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError:  # a file in torch's format of before 1.6 cannot be mapped
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling and zip errors come in many types
        expected = "a tensor saved by torch.save or np.save"
        raise DataError(f"{path}: cannot be read ({first_line(error)}), expected {expected}") from None
    if torch.is_tensor(loaded):
        loaded = {"sequence": loaded}
    if not isinstance(loaded, dict) or set(loaded) not in ({"sequence"}, {"input_embeddings", "labels"}):
        what = f"keys {sorted(map(str, loaded))}" if isinstance(loaded, dict) else type(loaded).__name__
        raise DataError(f"{path}: holds {what}, expected a tensor or a dict of input_embeddings and labels")
    for name, tensor in loaded.items():
        plain = torch.is_tensor(tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        plain = plain and not tensor.is_nested
        if not (plain and tensor.is_floating_point() and tensor.ndim == 3 and 0 not in tensor.shape):
            what = f"{tensor.dtype} {list(tensor.shape)}" if plain else f"no plain tensor ({type(tensor).__name__})"
            raise DataError(f"{path}: {name} is {what}, expected a float tensor [N, T, D] with no empty dimension")
    if "sequence" in loaded and loaded["sequence"].shape[1] < 2:
        raise DataError(f"{path}: sequences of one embedding, expected at least two (one to read, one to predict)")
    if "labels" in loaded and loaded["labels"].shape[:2] != loaded["input_embeddings"].shape[:2]:
        shapes = {name: list(tensor.shape) for name, tensor in loaded.items()}
        raise DataError(f"{path}: shapes {shapes}, expected the same N and T in both")
    return {name: tensor.detach() for name, tensor in loaded.items()}


def open_folder(folder):
    """Datasets train and val of folder/{train,val}_embeddings_chunk_*.{pt,npy}, chunks in numeric order.

    Without validation files the last tenth of the training sequences is held out (the last, not a random tenth:
    neighbours in a text stay on one side). Raises DataError for a file that is missing, unreadable or of another shape.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected one with train_embeddings_chunk_*.pt files")
    splits, first = {}, None
    for split in ("train", "val"):
        matches = [
            (re.fullmatch(rf"{split}_embeddings_chunk_(\d+)\.(pt|npy)", path.name), path) for path in folder.iterdir()
        ]
        files = [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]
        chunks = [open_chunk(path) for path in files]
        for path, chunk in zip(files, chunks):
            shapes = {name: list(tensor.shape[1:]) for name, tensor in chunk.items()}
            first = first or (path.name, shapes)
            if shapes != first[1]:
                raise DataError(f"{path}: samples of shape {shapes}, expected {first[1]} as in {first[0]}")
        if files:
            splits[split] = {name: Concat([chunk[name] for chunk in chunks], files) for name in first[1]}
    if "train" not in splits:
        raise DataError(f"{folder}: no training files, expected train_embeddings_chunk_0.pt (or .npy) and so on")
    if "val" not in splits:
        size = size_of(splits["train"])
        if size < 2:
            raise DataError(f"{folder}: one training sequence in all, expected at least two, one to hold out")
        kept, whole = size - max(1, size // 10), splits["train"].items()
        splits["val"] = {name: Concat(array.tensors, array.files, start=kept) for name, array in whole}
        splits["train"] = {name: Concat(array.tensors, array.files, stop=kept) for name, array in whole}
    return splits["train"], splits["val"]


def predicts_next(dataset):
    """Whether labels are later inputs, by the numbers and not by the keys: then attention must be causal.

    One tensor is cut into inputs and labels that overlap, and two tensors may be such a cut as well. Of 16 samples half
    must agree at one shift, up to rounding in any float type (2^-8) and in half of the positions at least: symbols
    of a puzzle repeat by chance.
    """
    if "input_embeddings" not in dataset:
        return True
    index = np.unique(np.linspace(0, size_of(dataset) - 1, 16).astype(np.int64))
    inputs, labels = dataset["input_embeddings"][index], dataset["labels"][index]
    T = inputs.shape[1]
    if inputs.shape != labels.shape:
        return False
    for shift in range(1, T // 2 + 1):
        later, now = inputs[:, shift:].flatten(1), labels[:, : T - shift].flatten(1)
        if ((later - now).norm(dim=1) < 0.05 * now.norm(dim=1)).float().mean() >= 0.5:
            return True
    return False


def make_data(args):
    """The run's datasets and what the shared part needs to know about them (listed there). Raises DataError."""
    if args.predict:  # reads its own file and takes the model's shape from the checkpoint
        return {
            "config": None,
            "baselines": dict,
            "report": "wrote {predicted} embeddings for each sequence".format_map,
        }
    train, val = open_folder(args.data_folder) if args.data_folder else make_world()

    def collate(picked, extra):
        if "bits" in picked:
            signs = 2 * torch.from_numpy(picked["bits"]).float() - 1
            picked = {"sequence": signs @ codebook(args.seed) * (STORY_SIZE / BITS) ** 0.5}
        if "sequence" in picked:  # T + 1 sentences: all but the last are read, all but the first predicted
            picked = {"input_embeddings": picked["sequence"][:, :-1], "labels": picked["sequence"][:, 1:]}
        if "rows" not in extra:
            return picked
        explore = mix(extra["position"], args.seed + 1) / 2**64 < args.halt_exploration_prob
        more = 2 + mix(extra["position"], args.seed + 2) % np.uint64(max(args.halt_max_steps - 1, 1))
        return {**picked, "rows": extra["rows"], "min_steps": np.where(explore, more, 1).astype(np.int32)}

    sample = make_batch(val, np.array([0]), {}, collate, pin=False)
    sizes = {"input_size": sample["input_embeddings"].shape[2], "output_size": sample["labels"].shape[2]}
    names = ("num_heads", "L_layers", "expansion", "H_cycles", "L_cycles", "halt_max_steps", "halt_exploration_prob")
    causal, hidden = predicts_next(train), args.hidden_size or sizes["input_size"]
    if hidden % (2 * args.num_heads):
        fitting = f"--hidden_size or --num_heads such that 2 * {args.num_heads} divides it"
        raise DataError(f"{args.data_folder}: embeddings of size {hidden}, expected {fitting}")
    config = {
        **sizes,
        "hidden_size": hidden,
        **{name: getattr(args, name) for name in names},
        "causal": causal,
        "halt_position": -1 if causal else 0,  # the first position of a causal model has seen one sentence only
        "learn_init": args.enable_deep_supervision,
    }
    return {
        "train": train,
        "val": val,
        "collate": collate,
        "config": config,
        "split": {"sentences per sample": sample["input_embeddings"].shape[1]},  # the carry has as many
        "baselines": lambda: baselines(train, val, collate, args),
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
        "always zero": "zero_",
        "the mean of the training sentences": "mean_",
        "the sentence before": "copy_",
        "the rule without flashbacks": "no_memory_",
        "the rule with flashbacks to the opening": "opening_",
    }
    lines = [f"{'validation':42}{'loss':>8}{'exact':>8}"]
    for title, prefix in rows.items():
        cells = [metrics.get(prefix + name) for name in ("loss", "exact_acc")]
        if any(cell is not None for cell in cells):
            lines.append(f"{title:42}" + "".join("       -" if cell is None else f"{cell:8.4f}" for cell in cells))
    return "\n".join([*lines, f"after each H cycle: {describe(metrics).split('| ')[1]}"])


def baselines(train, val, collate, args):
    """Loss and exact accuracy on the validation samples of predictions that need no training, as final metrics."""
    index = np.unique(np.linspace(0, size_of(train) - 1, 4096).astype(np.int64))
    mean = 0.0
    for part in np.array_split(index, 64):  # not all at once: sequences may be long
        mean = mean + make_batch(train, part, {}, collate, pin=False)["labels"].mean(1).sum(0) / len(index)
    sums = {}
    for batch in fixed_batches(val, args.batch_size, "cpu", limit=args.eval_samples, collate=collate):
        labels = batch["labels"]
        guesses = {
            "zero_": torch.zeros_like(labels),
            "mean_": mean.expand_as(labels),
            "copy_": batch["input_embeddings"],
        }
        for prefix, guess in guesses.items():
            if guess.shape == labels.shape:
                right = is_right(guess, labels, args)[0].float().mean()
                add(sums, weigh({prefix + "loss": F.mse_loss(guess, labels), prefix + "exact_acc": right}, len(labels)))
    found = {name: float(total / count) for name, (total, count) in sums.items()}
    if "bits" in val:
        bits = val["bits"][: args.eval_samples or None]
        for prefix, memory in {"no_memory_": lambda t: t, "opening_": lambda t: 0}.items():
            guesses = [next_sentence(bits, t, np.full(len(bits), memory(t))) for t in range(STORY_SENTENCES - 1)]
            found[prefix + "exact_acc"] = float((np.stack(guesses, 1) == bits[:, 1:]).all(2).mean())
    return found


# ---- one supervision step, evaluation, prediction -------------------------------------------------------------------


def is_right(prediction, labels, args):
    """What counts as a right answer; both [B, T, D] float32. Returns positions bool [B, T] and rows bool [B].

    Built-in world: a sentence is right when all 16 signs decode, a row when all its sentences are. Real embeddings: a
    sentence is right when its cosine reaches --halt_cosine, a row when the mean of its cosines does.
    """
    if args.data_folder:
        cosine = F.cosine_similarity(prediction, labels, dim=-1)
        return cosine >= args.halt_cosine, cosine.mean(1) >= args.halt_cosine
    Q = codebook(args.seed, labels.device)
    with torch.autocast(labels.device.type, enabled=False):
        right = ((prediction @ Q.T > 0) == (labels @ Q.T > 0)).all(-1)
    return right, right.all(1)


def curriculum(step, args):
    """How much the losses before the last count at an update: 0 until the start step, linear to 1 at the end step."""
    start, end = args.curriculum_start_step, args.curriculum_end_step
    return float(step >= end) if end <= start else min(max((step - start) / (end - start), 0.0), 1.0)


def compute_loss(model, batch, state, args):
    """One supervision step of every row, followed by one update: the outer loop of TRM (N_sup in the paper).

    batch: fresh samples for the rows that halted, `rows` their places, and the shared part's `step` and `share`.
    state: None at first, then the carry. Returns this micro-batch's share of the update's loss, metrics as (sum, count)
    pairs, and the next state, whose `halted` rows ask for a new sample each.
    """
    names = ("input_embeddings", "labels", "min_steps")
    if state is None:
        data = {name: batch[name] for name in names}
        state = unwrap(model).initial_carry(data) | {"turn": torch.zeros_like(batch["rows"])}
    else:
        data = {name: state[name].index_copy(0, batch["rows"], batch[name]) for name in names}
    turn = state["turn"] + state["halted"]  # how many samples each row has begun
    labels, B, deep = data["labels"], len(data["labels"]), args.enable_deep_supervision
    ramp, latent = curriculum(batch["step"], args), args.L_cycle_supervision / args.L_cycles
    supervision = (args.deep_supervision_schedule, args.deep_supervision_weight, ramp)

    # --detach_cycles: the graph of a cycle is used up and freed before the next is built. Its gradients are added to
    # p.grad at once, as another micro-batch's would be: DistributedDataParallel looks at p.grad after the last one.
    def backward_cycle(h, logits, latent_logits):
        alone = [labels] * args.H_cycles  # every other cycle right: the loss that is left is this cycle's
        losses = [
            compute_deep_supervision_loss([*alone[:h], x, *alone[h + 1 :]], labels, *supervision)[0]
            for x in (logits, *latent_logits)
        ]
        (batch["share"] * (losses[0] + latent * sum(losses[1:]))).backward()
        return logits.detach(), [x.detach() for x in latent_logits]

    carry, outputs = model(
        state,
        data,
        enable_deep_supervision=deep,
        latent_logits=latent > 0,
        after_cycle=backward_cycle if args.detach_cycles else None,
    )

    if deep:
        loss, losses = compute_deep_supervision_loss(outputs["intermediate_logits"], labels, *supervision)
        for logits in zip(*outputs.get("latent_logits", [])):  # the l-th L cycle of every H cycle
            loss = loss + latent * compute_deep_supervision_loss(logits, labels, *supervision)[0]
    else:
        loss = F.mse_loss(outputs["logits"], labels)
        losses = [loss.detach()]
    right = is_right(outputs["logits"].detach(), labels, args)[1]
    halt_loss = F.binary_cross_entropy_with_logits(outputs["q_halt_logits"], right.float())

    values = {f"step_{i}_loss": value for i, value in enumerate(losses, start=args.H_cycles - len(losses))}
    values |= {"loss": loss.detach(), "q_halt_loss": halt_loss.detach()}
    base = 1.0 if "," in args.deep_supervision_schedule else args.deep_supervision_weight  # a list has its own weights
    metrics = weigh(values | {"supervision_weight": base * ramp * deep}, B)
    metrics["mean_steps"] = ((carry["steps"] * carry["halted"]).sum(), carry["halted"].sum())
    if args.detach_cycles:  # DistributedDataParallel waits for every parameter, these are the first cycle's alone
        loss = loss + 0.0 * sum(p.sum() for name, p in model.named_parameters() if name.endswith("_init"))
    return batch["share"] * (loss + 0.5 * halt_loss), metrics, {**carry, "turn": turn}


def answer(model, batch, diagnose=False):
    """Outputs after all halt_max_steps supervision steps; diagnose adds what each cycle of the last one answers."""
    carry, steps = model.initial_carry(batch), model.config.halt_max_steps
    for step in range(steps):
        carry, outputs = model(carry, batch, enable_deep_supervision=diagnose and step == steps - 1)
    return outputs


@torch.no_grad()
def evaluate(model, data, args):
    """Validation means. loss is the MSE of the final output alone: runs with and without deep supervision compare."""
    if args.predict:
        return predict(model, args)
    sums, collate = {}, data["collate"]
    split = (rank(), world_size(), args.eval_samples)
    for batch in fixed_batches(data["val"], args.batch_size, args.device, *split, collate):
        with autocast(args):
            outputs = answer(model, batch, diagnose=True)
        labels = batch["labels"]
        metrics = {f"step_{i}_loss": F.mse_loss(x, labels) for i, x in enumerate(outputs["intermediate_logits"])}
        right = is_right(outputs["logits"], labels, args)[0]
        metrics |= {"loss": F.mse_loss(outputs["logits"], labels), "exact_acc": right.float().mean()}
        add(sums, weigh(metrics, len(labels)))
    return means(sums)


def predict(model, args):
    """Continue sequences: --predict IN.npy OUT.npy --rollout N, float [T, D] or [B, T, D] -> float32 [.., N, D].

    Every new embedding is appended to what the model reads next. Raises DataError for a file that does not fit.
    """
    source, target = map(Path, args.predict)
    c = model.config
    if target.exists() and not args.overwrite:
        raise DataError(f"{target}: exists already, expected a new file or --overwrite")
    try:
        prefix = torch.from_numpy(np.load(source))
    except Exception as error:  # as in open_chunk
        raise DataError(f"{source}: cannot be read ({first_line(error)}), expected an array saved by np.save") from None
    if not prefix.is_floating_point():
        raise DataError(f"{source}: holds {prefix.dtype}, expected floats")
    if prefix.ndim not in (2, 3) or 0 in prefix.shape or prefix.shape[-1] != c.input_size:
        raise DataError(f"{source}: shape {list(prefix.shape)}, expected [T, {c.input_size}] or [B, T, {c.input_size}]")
    if not prefix.float().isfinite().all():
        raise DataError(f"{source}: holds NaN or infinity (in float32), expected finite numbers")
    if not c.causal:
        raise DataError(
            f"{source}: the model was trained on separate labels, expected one that predicts the next input"
        )
    sequence = prefix.float().to(args.device).reshape(-1, *prefix.shape[-2:])
    for _ in range(args.rollout):
        with autocast(args):
            new = answer(model, {"input_embeddings": sequence})["logits"][:, -1:]
        sequence = torch.cat([sequence, new], dim=1)
    rolled = sequence[:, prefix.shape[-2] :].reshape(*prefix.shape[:-2], args.rollout, c.output_size)
    if not rolled.isfinite().all():
        raise DataError(f"{source}: its continuation is not finite, expected embeddings like those of the training")
    write_atomically(target, lambda file: np.save(file, rolled.cpu().numpy()))
    return {"predicted": args.rollout}


# ---- flags ----------------------------------------------------------------------------------------------------------


def add_method_args(parser):
    """Add this script's flags. Returns the flag that brings real data, the demonstration's defaults, the flags that
    --eval_only may be given anew, and check(args, given), which calls parser.error for what makes no sense together
    (given: the names on the command line).
    """
    flag = parser.add_argument_group("data").add_argument
    flag("--data_folder", help="folder of {train,val}_embeddings_chunk_*.pt or .npy; without it, the built-in world")
    flag = parser.add_argument_group("model").add_argument
    flag("--H_cycles", type=number(1), default=3, help="cycles of a supervision step; each ends in an answer")
    flag("--L_cycles", type=number(1), default=3, help="refinements of the latent in a cycle")
    flag("--L_layers", type=number(1), default=4, help="blocks of the network")
    flag("--hidden_size", type=number(2), help="width of the network (default: the size of the embeddings)")
    flag("--num_heads", type=number(1), default=16, help="attention heads; twice their number divides hidden_size")
    flag("--expansion", type=number(0.01), default=4.0, help="expansion of the SwiGLU")
    flag = parser.add_argument_group("halting").add_argument
    flag("--halt_max_steps", type=number(1), default=10, help="most supervision steps on one sample (N_sup)")
    flag(
        "--halt_exploration_prob", type=number(0.0, 1.0), default=0.1, help="part of the rows that may not halt at once"
    )
    flag("--halt_cosine", type=number(-1.0, 1.0), default=0.9, help="real data: an answer is right from this cosine on")
    flag = parser.add_argument_group("deep supervision").add_argument
    flag("--enable_deep_supervision", **BOOLEAN, help="loss and gradient at every H cycle, not only at the last")
    schedules = (
        "constant, linear_decay, exponential_decay, u_shaped, dynamic (by each cycle's own loss), or 0.3,0.4,1.0"
    )
    flag("--deep_supervision_weight", type=number(0.0), default=0.5, help="base weight of the losses before the last")
    flag("--deep_supervision_schedule", default="constant", help=schedules)
    flag("--curriculum_start_step", type=number(0), default=0, help="until here only the last cycle's loss counts")
    flag("--curriculum_end_step", type=number(0), default=0, help="from here all count in full; linear between")
    flag("--L_cycle_supervision", type=number(0.0), default=0.0, help="weight of a loss after every L cycle as well")
    flag("--detach_cycles", **BOOLEAN, help="a backward pass per cycle: less memory, another gradient (none crosses)")
    flag = parser.add_argument_group("prediction, with --eval_only --out_dir RUN").add_argument
    flag("--predict", nargs=2, metavar=("IN.npy", "OUT.npy"), help="continue the sequences [T, D] or [B, T, D] of IN")
    flag("--rollout", type=number(1), default=1, help="how many embeddings to predict")
    parser.set_defaults(batch_size=8, max_train_steps=1000, lr=1e-4, weight_decay=0.1, ema_decay=0.999)
    demo = {"L_cycles": 1, "L_layers": 1, "num_heads": 4, "halt_max_steps": 1, "batch_size": 32, "lr": 3e-3}
    demo |= {"weight_decay": 0.5, "beta2": 0.98, "warmup_steps": 50, "min_lr_ratio": 0.05, "ema_decay": 0.0}
    demo |= {"max_train_steps": 1500, "eval_interval": 300, "eval_samples": 1024}

    def check(args, given):
        deep_only = ("deep_supervision_", "curriculum_", "L_cycle_supervision", "detach_cycles")
        for name in sorted(given):
            if name.startswith(deep_only) and not args.enable_deep_supervision:
                parser.error(f"--{name} needs --enable_deep_supervision")
        schedule = args.deep_supervision_schedule
        if schedule != "dynamic" and not args.eval_only:  # which may have another number of cycles
            try:
                supervision_weights(args.H_cycles, schedule, args.deep_supervision_weight)
            except ValueError as error:
                parser.error(f"--deep_supervision_schedule: {error}")
        if "," in schedule and "deep_supervision_weight" in given:
            parser.error("--deep_supervision_weight means nothing beside a list of weights")
        if args.curriculum_end_step < args.curriculum_start_step:
            parser.error("--curriculum_end_step must not come before --curriculum_start_step")
        if args.detach_cycles:
            if schedule == "dynamic":
                parser.error("--detach_cycles uses each loss before the later ones are known; dynamic needs them all")
            if args.grad_checkpoint:
                parser.error("--detach_cycles holds one cycle's graph at most; --grad_checkpoint would only cost time")
            if args.dtype == "float16" or args.compile == "on":
                parser.error("--detach_cycles works with neither --dtype float16 nor --compile on")
            args.compile = "off"  # also where auto would compile: the compiled graph has one backward pass only
        if "halt_cosine" in given and not args.data_folder:
            parser.error("--halt_cosine needs --data_folder; in the built-in world a right answer decodes exactly")
        if args.predict and not args.eval_only:
            parser.error("--predict needs --eval_only and the --out_dir of a run")
        if "rollout" in given and not args.predict:
            parser.error("--rollout needs --predict")
        if args.predict and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            parser.error("--predict runs in one process, without torchrun")
        hidden = args.hidden_size or (0 if args.data_folder else STORY_SIZE)  # 0: known when the data are
        if hidden % (2 * args.num_heads):
            parser.error(f"--hidden_size {hidden} must be a multiple of 2 * --num_heads = {2 * args.num_heads}")

    cycles = {"H_cycles", "L_cycles", "halt_max_steps"}  # the weights are the same in every cycle
    return "data_folder", demo, {"predict", "rollout", "halt_cosine", *cycles}, check


# ==== shared: identical in nepa_deep.py, trm_deep.py, jepa_lm.py =====================================================
# Trains whatever stands above. All it uses of it: Config, Model(config), add_method_args(parser),
# compute_loss(model, batch, state, args) -> loss, metrics, state    evaluate(model, data, args) -> means with a "loss"
# make_data(args) -> dict: train, val (datasets as data.py wants them), collate, config (Config's fields), baselines()
# -> metrics of the final line, describe(metrics) -> text for the progress bar, report(metrics) -> text at the end; and,
# where a run may start from other weights than random ones, init(model); where the data of a resumed run must have the
# old one's sizes, split (a dict).


# ---- processes, precision, metrics ----


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """The tensor, summed over the processes in place: CPU tensors travel by gloo, CUDA tensors by nccl."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def unwrap(model):
    """The Model inside torch.compile and DistributedDataParallel."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)


def autocast(args):
    """Mixed precision as --dtype says; float32 is none at all."""
    device_type = torch.device(args.device).type
    return torch.autocast(device_type, getattr(torch, args.dtype), enabled=args.dtype != "float32")


def weigh(values, count):
    """Means over count samples (dict of floats or scalar tensors) as (sum, count) pairs; never syncs."""
    return {name: (value * count, count) for name, value in values.items()}


def add(sums, pairs):
    """Add (sum, count) pairs to the running ones, by name."""
    for name, (value, count) in pairs.items():
        total, n = sums.get(name, (0.0, 0.0))
        sums[name] = (total + value, n + count)


def first_line(error):
    """What an exception says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def gather(value):
    """value of every process (anything that pickles), as a list in order of rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def means(sums):
    """Means over everything added, on all processes; a metric without samples is left out. A CPU-GPU sync point."""
    totals = {}
    for pairs in gather({name: (float(total), float(count)) for name, (total, count) in sums.items()}):
        add(totals, pairs)
    return {name: total / count for name, (total, count) in totals.items() if count}


# ---- flags ----


def number(low, high=None):
    """An argparse type: a number of low's own type (int or float), from low to high (None: what float32 can count)."""
    limit = high if high is not None else 2**53 if isinstance(low, int) else 1e38

    def parse(text):
        try:
            value = type(low)(text)
        except ValueError:
            value = math.nan
        if not low <= value <= limit:
            kind = "an integer" if isinstance(low, int) else "a number"
            most = "" if high is None else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text!r}, expected {kind} of at least {low}{most}")
        return value

    return parse


def true_or_false(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}, expected True or False")
    return text.lower() == "true"


BOOLEAN = {"type": true_or_false, "nargs": "?", "const": True, "default": False, "metavar": "True|False"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog, **_):
        super().__init__(prog, max_help_position=36, width=120)  # a line for each flag, as wide as the text above

    def _get_default_metavar_for_optional(self, action):
        return "X"

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


# What --resume may be given anew; of batch_size and grad_accum only the product with the processes has to stay.
MAY_CHANGE = {"batch_size", "grad_accum", "max_train_steps", "eval_interval", "log_interval", "save_interval"}
MAY_CHANGE |= {"device", "compile", "wandb_mode", "wandb_project", "run_name", "out_dir", "resume", "overwrite"}
EVALUATION = {"eval_only", "eval_samples", "dtype"}  # and what --eval_only may be given beside those


def parse_args():
    """The flags in force and, with --resume or --eval_only, the checkpoint. Refuses what makes no sense (exit 2)."""
    script = Path(__file__).stem
    usage = "python %(prog)s [flags]      (--help lists them)"
    parser = argparse.ArgumentParser(None, usage, __doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    flag = parser.add_argument_group("training").add_argument
    flag("--batch_size", type=number(1), default=32, help="samples per micro-batch and process")
    flag("--grad_accum", type=number(1), default=1, help="micro-batches per update")
    flag("--max_train_steps", type=number(1), default=1000, help="updates in all")
    flag("--lr", "--learning_rate", type=number(0.0), default=1e-3, help="peak learning rate")
    flag("--min_lr_ratio", type=number(0.0, 1.0), default=0.1, help="end of the cosine, in parts of --lr; 1: constant")
    flag("--warmup_steps", type=number(0), default=100, help="updates of linear warm-up")
    flag("--weight_decay", type=number(0.0), default=0.1, help="AdamW's, on matrices only")
    flag("--beta1", type=number(0.0, 0.999999), default=0.9, help="AdamW's")
    flag("--beta2", type=number(0.0, 0.999999), default=0.95, help="AdamW's")
    flag("--grad_clip", type=number(0.0), default=1.0, help="largest norm of the gradient; 0: no limit")
    flag("--ema_decay", type=number(0.0, 0.999999), default=0.0, help="of the averaged weights to evaluate; 0: none")
    flag("--seed", type=number(0, 2**32 - 1), default=0, help="of the weights, the order and the built-in world")
    flag = parser.add_argument_group("machine").add_argument
    flag("--device", default="auto", help="auto (CUDA if there), cpu, cuda, mps, ...")
    flag("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="auto: bfloat16 on CUDA")
    flag("--compile", choices=["auto", "on", "off"], default="auto", help="torch.compile; auto: on CUDA")
    flag("--grad_checkpoint", **BOOLEAN, help="recompute in the backward pass: the same gradient, less memory")
    flag = parser.add_argument_group("evaluation, output").add_argument
    flag("--eval_interval", type=number(1), default=500, help="updates between evaluations")
    flag("--eval_samples", type=number(0), default=0, help="validation samples to use; 0: all")
    flag("--log_interval", type=number(1), default=100, help="updates between lines of metrics.jsonl")
    flag("--save_interval", type=number(0), default=500, help="updates between checkpoints; 0: with best.pt only")
    flag("--out_dir", help=f"folder of the run (default: a new out/{script}-DATE-TIME)")
    flag("--overwrite", **BOOLEAN, help="replace what is already there")
    flag("--resume", **BOOLEAN, help="go on with the run in --out_dir, with its flags")
    flag("--eval_only", **BOOLEAN, help="evaluate the best checkpoint of the run in --out_dir")
    flag("--wandb_mode", choices=["disabled", "offline", "online"], default="disabled", help="Weights & Biases")
    flag("--wandb_project", default="deep-supervision", help="Weights & Biases")
    flag("--run_name", help="Weights & Biases (default: the folder's name)")
    data_flag, demo, evaluation, check = add_method_args(parser)
    sizes = " ".join(f"--{name} {value}" for name, value in demo.items())
    parser.epilog = f"Without --{data_flag} the demonstration has defaults of its own:\n{sizes}"

    defaults = vars(parser.parse_args([]))
    unset = object()
    parsed = vars(parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {name: value for name, value in parsed.items() if value is not unset}
    for name in (name for name, value in given.items() if value == ""):
        parser.error(f"--{name} is empty, expected a value")  # a shell variable that is not set
    base, checkpoint = {} if given.get(data_flag) else demo, None
    if given.get("resume") or given.get("eval_only"):
        if "out_dir" not in given or given.get("resume") and (given.get("eval_only") or given.get("overwrite")):
            parser.error(
                "--resume or --eval_only needs the --out_dir of a run; --resume excludes --eval_only, --overwrite"
            )
        folder = Path(given["out_dir"])
        names = ["best.pt", "ckpt.pt"] if given.get("eval_only") else ["ckpt.pt"]
        path = next((folder / name for name in names if (folder / name).exists()), folder / "ckpt.pt")
        checkpoint = load_checkpoint(path, script)
        base = {name: value for name, value in checkpoint["args"].items() if name not in ("resume", "overwrite")}
        free = MAY_CHANGE if given.get("resume") else MAY_CHANGE | evaluation | {data_flag, *EVALUATION}
        for name, value in given.items():
            if given.get("eval_only") and name in evaluation & checkpoint["config"].keys():
                checkpoint["config"][name] = value  # a shape that any weights fit
            if name not in free and value != base.get(name):
                parser.error(f"--{name} {value} conflicts with the run in {folder}, which has {base.get(name)}")
    args = argparse.Namespace(**{**defaults, **base, **given})
    if given.get("resume") and args.max_train_steps < checkpoint["step"]:
        parser.error(f"--max_train_steps {args.max_train_steps} lies before the checkpoint's step {checkpoint['step']}")
    check(args, given)
    if args.out_dir is None:
        args.out_dir = f"out/{script}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    if checkpoint is None and not args.overwrite and any((Path(args.out_dir) / name).exists() for name in RUN_FILES):
        parser.error(f"--out_dir {args.out_dir} holds a run; --resume continues it, --overwrite replaces it")
    args.flags = vars(args).copy()  # as asked for, before auto is resolved: what the checkpoint and wandb keep
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
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


# ---- checkpoints ----

RUN_FILES = ("ckpt.pt", "best.pt", "metrics.jsonl")  # in the order in which --overwrite removes them
CHECKPOINT_KEYS = {"script", "step", "config", "args", "model", "ema", "optimizer", "scaler", "rng", "state", "sums"}
CHECKPOINT_KEYS |= {"split", "evaluated", "best", "seconds", "wandb_id"}


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
        raise DataError(f"{path}: cannot be written ({first_line(error)}), expected a folder with room") from None
    finally:
        temporary.unlink(missing_ok=True)  # a full disk keeps no half file


def load_checkpoint(path, script):
    """The checkpoint at path as a dict on the CPU. Raises DataError if it is none, or another script's."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        written_by = checkpoint["script"]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, expected the checkpoint of a run") from None
    except Exception as error:  # unpickling and zip errors come in many types
        raise DataError(f"{path}: cannot be read ({first_line(error)}), expected the checkpoint of a run") from None
    if written_by != script:
        raise DataError(f"{path}: written by {written_by}.py, expected a checkpoint of {script}.py")
    if missing := CHECKPOINT_KEYS - checkpoint.keys():
        raise DataError(f"{path}: holds no {', '.join(sorted(missing))}, expected the checkpoint of a run")
    return checkpoint


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
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = True if args.device.startswith(("cpu", "cuda")) else None
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=fused)


# ---- log ----


class Log:
    """metrics.jsonl, Weights & Biases and the terminal. Only the first process writes."""

    def __init__(self, args, describe, checkpoint):
        self.args, self.describe, self.wandb = args, describe, None
        self.wandb_id = checkpoint["wandb_id"] if checkpoint else None
        if rank() > 0:
            return
        self.path = Path(args.out_dir) / "metrics.jsonl"
        if checkpoint and self.path.exists():
            lines = self.older_lines(checkpoint)
            write_atomically(self.path, lambda file: file.write("".join(line + "\n" for line in lines).encode()))
        if args.wandb_mode != "disabled":
            try:
                import wandb

                self.wandb = wandb.init(
                    project=args.wandb_project,
                    name=args.run_name or Path(args.out_dir).name,
                    dir=args.out_dir,
                    id=self.wandb_id,
                    resume="allow",
                    mode=args.wandb_mode,
                    config=args.flags,
                )
            except Exception as error:
                raise DataError(f"--wandb_mode {args.wandb_mode}: {first_line(error)}") from None
            self.wandb_id = self.wandb.id
        terminal = sys.stdout.isatty() and sys.stderr.isatty()
        start = checkpoint["step"] if checkpoint else 0
        self.bar = tqdm(total=args.max_train_steps, initial=start, disable=not terminal, dynamic_ncols=True)

    def older_lines(self, checkpoint):
        """The lines up to the checkpoint: what was logged after it will be logged again."""
        newest, lines = {"train": checkpoint["step"], "val": checkpoint["evaluated"]}, []
        for n, line in enumerate(whole := self.path.read_text(errors="replace").splitlines(), 1):
            try:
                record = json.loads(line)
                if record["step"] <= newest.get(record["split"], -1):
                    lines.append(line)
            except (ValueError, TypeError, KeyError, RecursionError):
                if n < len(whole):  # the last one may be half: the process died while it wrote it
                    raise DataError(f"{self.path}:{n}: cannot be read, expected JSON with step and split") from None
        return lines

    def write(self, step, split, metrics):
        """One line: to the file, to wandb under the same names (val/ and final/ before theirs), and for people."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise DataError(f"step {step}: {split} {name} is {value}, expected a finite number")
        if rank() > 0:
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, "split": split, **metrics}) + "\n")
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror}), expected room for a line") from None
        if self.wandb:
            prefix = "" if split == "train" else split + "/"
            self.wandb.log({prefix + name: value for name, value in metrics.items()}, step=step)
        if split != "final":
            text = f"Step {step}/{self.args.max_train_steps}, {split.capitalize()} {self.describe(metrics)}"
            if self.bar.disable or split == "val":
                self.say(text)
            else:
                self.bar.set_description_str(text)

    def say(self, text):
        if rank() == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def advance(self):
        if rank() == 0:
            self.bar.update()

    def close(self):
        if rank() == 0:
            self.bar.close()
        if self.wandb:
            self.wandb.finish()


# ---- the run ----


def fit(now, then, source):
    """Raise DataError unless what the data and flags say (now, a dict) is what the checkpoint says (then)."""
    for name, value in now.items():
        if value != then.get(name):
            raise DataError(f"{source}: {name} is {value!r}, expected {then.get(name)!r} as in the checkpoint")


def train(args, checkpoint):
    """Train, evaluate, save: the whole loop in sight. Returns the exit code, 128 + the number of a signal after one."""
    data, out_dir, accum = make_data(args), Path(args.out_dir), args.grad_accum
    num_rows, size = args.batch_size * accum * world_size(), size_of(data["train"])
    split = {"--batch_size * --grad_accum * processes": num_rows, "number of training samples": size}
    split |= data.get("split", {})
    if num_rows > size:
        raise DataError(f"--batch_size * --grad_accum * processes is {num_rows}, expected at most {size}, all samples")
    torch.manual_seed(args.seed)
    model = Model(Config(**data["config"])).to(args.device)
    if "init" in data and not checkpoint:
        data["init"](model)
    model.grad_checkpoint = args.grad_checkpoint
    ema = copy.deepcopy(model).requires_grad_(False) if args.ema_decay else None
    optimizer = make_optimizer(model, args)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.dtype == "float16")
    net = torch.compile(model) if args.compile == "on" else model
    if dist.is_initialized():
        net = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)

    # All that changes during a run: the checkpoint holds it, so the resumed run is the one that was never interrupted.
    step, evaluated, best, sums, states, seconds = 0, -1, {"loss": math.inf}, {}, [None] * accum, 0.0
    if checkpoint:
        fit(data["config"], checkpoint["config"], out_dir)
        fit(split, checkpoint["split"], out_dir)
        try:
            model.load_state_dict(checkpoint["model"])
            if ema:
                ema.load_state_dict(checkpoint["ema"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            scaler.load_state_dict(checkpoint["scaler"])
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{out_dir}: the checkpoint has other contents ({first_line(error)})") from None
        step, evaluated, best, seconds = (checkpoint[name] for name in ("step", "evaluated", "best", "seconds"))
        if len(checkpoint["sums"]) == world_size():  # with another number of processes the next line's means start anew
            sums = checkpoint["sums"][rank()]
        if checkpoint["state"]:
            mine = {name: value.split(args.batch_size) for name, value in checkpoint["state"].items()}
            for micro in range(accum):
                states[micro] = {name: rows[rank() * accum + micro].to(args.device) for name, rows in mine.items()}
        on_cpu, on_cuda = checkpoint["rng"][rank() % len(checkpoint["rng"])]
        torch.set_rng_state(on_cpu)
        if on_cuda is not None and args.device.startswith("cuda"):
            torch.cuda.set_rng_state(on_cuda)
    if rank() == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:
            (out_dir / (name + ".tmp")).unlink(missing_ok=True)  # of a process killed while it wrote
            if args.overwrite and not checkpoint:
                (out_dir / name).unlink(missing_ok=True)
    log = Log(args, data["describe"], checkpoint)
    count = f"{sum(p.numel() for p in model.parameters()):,} parameters, {size:,} training samples"
    log.say(f"{Path(__file__).stem}: {count}, {world_size()} x {args.device} {args.dtype} -> {out_dir}")

    first_bad = torch.full((2,), -1, device=args.device)  # first update whose loss, gradient norm was not finite

    def stop_if_broken():
        for name, bad in zip(("loss", "grad_norm"), first_bad.tolist()):
            if bad >= 0:
                raise DataError(f"step {bad + 1}: train {name} is not finite, expected a number; the checkpoint stays")
        if scaler.is_enabled() and scaler.get_scale() < 1:  # it has been halved at every update for a long time
            raise DataError(f"step {step}: train grad_norm overflows float16, expected finite; try --dtype bfloat16")

    def save(name):
        stop_if_broken()
        if not all(p.isfinite().all() for p in params):  # the last update's doing: its own loss was still a number
            raise DataError(f"step {step}: train weights are not finite, expected numbers; the checkpoint stays")
        on_cpu = [state and {key: value.cpu() for key, value in state.items()} for state in states]
        rng = [torch.get_rng_state(), torch.cuda.get_rng_state() if args.device.startswith("cuda") else None]
        mine = ({key: (float(total), float(n)) for key, (total, n) in sums.items()}, on_cpu, rng)
        kept = [mine] * world_size()
        if dist.is_initialized():
            dist.gather_object(mine, kept if rank() == 0 else None)
        if rank() > 0:
            return
        in_order = [state for _, states, _ in kept for state in states]  # by rows, however they are split
        contents = {
            "script": Path(__file__).stem,
            "step": step,
            "config": dataclasses.asdict(model.config),
            "args": args.flags,
            "model": model.state_dict(),
            "ema": ema.state_dict() if ema else None,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "rng": [rng for _, _, rng in kept],
            "state": in_order[0] and {key: torch.cat([state[key] for state in in_order]) for key in in_order[0]},
            "sums": [sums for sums, _, _ in kept],
            "split": split,
            "evaluated": evaluated,
            "best": best,
            "seconds": seconds,
            "wandb_id": log.wandb_id,
        }
        write_atomically(out_dir / name, lambda file: torch.save(contents, file))

    loader = Loader(data["train"], num_rows, args.seed, args.device, data["collate"])

    def request(micro, step):
        """Order what a micro-batch of update `step` needs: a sample for every row, or for the rows that halted."""
        first, state = (rank() * accum + micro) * args.batch_size, states[micro]
        turns = torch.full((args.batch_size,), step) if state is None else state["turn"]
        loader.request(first, turns, None if state is None else state["halted"])

    for micro in range(accum):
        request(micro, step)
    received = []
    for number in (signal.SIGINT, signal.SIGTERM):  # the first one ends the run in good order, a second one at once
        signal.signal(number, lambda number, _: (received.append(number), signal.signal(number, signal.SIG_DFL)))
    start, metrics, clock = step, None, time.perf_counter() - seconds
    while True:
        seconds = time.perf_counter() - clock  # of training, without evaluating and saving
        done = step == args.max_train_steps
        stop = int(all_reduce(torch.tensor(received[-1] if received else 0), dist.ReduceOp.MAX))
        better = False
        if evaluated < step and (done or step % args.eval_interval == 0 and not stop):
            stop_if_broken()
            metrics = evaluate((ema or model).eval(), data, args)
            model.train()
            log.write(step, "val", metrics)
            evaluated = step
            better = metrics["loss"] < best["loss"]
            if better:
                best = {**metrics, "step": step}
                save("best.pt")
        if better or done or stop or (args.save_interval and step % args.save_interval == 0 and step > start):
            save("ckpt.pt")  # with a new best.pt too: the two belong together
        if done or stop:
            break
        clock = time.perf_counter() - seconds

        batches = [loader.next() for _ in range(accum)]
        # An update is a mean over all it holds, so a micro-batch with more tokens weighs more. Data that do not say how
        # much they hold (counts: float [k], a number for each part of the loss) hold the same in every micro-batch.
        counts = [batch.pop("counts") for batch in batches if "counts" in batch]
        total = all_reduce(sum(counts)).clamp(min=1) / world_size() if counts else accum  # DDP divides by the processes
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        update_loss = 0.0
        for micro, batch in enumerate(batches):
            net.require_backward_grad_sync = micro == accum - 1  # before the forward pass: that is when DDP looks
            batch |= {"step": step, "share": counts[micro] / total if counts else 1 / total}
            with autocast(args):
                loss, pairs, states[micro] = compute_loss(net, batch, states[micro], args)
            request(micro, step + 1)  # made in the background during the backward pass
            scaler.scale(loss).backward()
            update_loss = update_loss + loss.detach()
            add(sums, pairs)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(params, args.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if ema:  # younger averages forget faster, or the first weights would stay in them
            decay = min(args.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - decay)
        finite = torch.stack([update_loss, norm]).isfinite()
        finite[1] |= scaler.is_enabled()  # float16 gradients overflow now and then: the scaler skips that update
        first_bad = torch.where(finite | (first_bad >= 0), first_bad, step)
        add(sums, {"grad_norm": (norm.nan_to_num(0.0, 0.0, 0.0), norm.isfinite().float())})
        step += 1
        log.advance()
        if step == 1 or step % args.log_interval == 0 or step == args.max_train_steps:
            stop_if_broken()
            line = {"lr": learning_rate(step - 1, args), "samples": step * num_rows}
            log.write(step, "train", means(sums) | line | {"seconds": time.perf_counter() - clock})
            sums = {}

    if stop and not done:
        launcher = "python" if world_size() == 1 else f"torchrun --nproc_per_node {world_size()}"
        command = f"{launcher} {Path(__file__).name} --resume --out_dir {shlex.quote(str(out_dir))}"
        log.say(f"stopped after step {step}; go on with: {command}")
        log.close()
        return 128 + stop
    final = metrics or evaluate((ema or model).eval(), data, args)
    if rank() == 0:
        final |= {f"best_{name}": value for name, value in best.items()} | data["baselines"]()
        log.write(step, "final", final)
        log.say(data["report"](final))
        log.say(f"best checkpoint: {out_dir}/best.pt, of step {best['step']}")
    log.close()
    return 0


def main():
    message, code = None, 0
    try:
        args, checkpoint = parse_args()
        if args.device.startswith("cuda"):
            torch.cuda.set_device(args.device)
            torch.set_float32_matmul_precision("high")  # TF32
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.startswith("cuda") else "gloo")
            except ValueError as error:
                raise DataError(f"WORLD_SIZE is set: {first_line(error)}; expected torchrun to set them all") from None
            dist.barrier()  # nobody writes before everybody has looked whether --out_dir is free
        if args.eval_only:
            data = make_data(args)
            model = Model(Config(**checkpoint["config"])).to(args.device).eval()
            if data["config"]:
                fit(data["config"], checkpoint["config"], args.out_dir)
            model.load_state_dict(checkpoint["ema"] or checkpoint["model"])
            metrics = evaluate(model, data, args)
            if rank() == 0:
                print(data["report"](metrics | data["baselines"]()))
        else:
            code = train(args, checkpoint)
    except KeyboardInterrupt:  # before training has begun; from then on the run ends in good order
        code = 130
    except Exception as error:
        code = 1
        if isinstance(error, (DataError, OSError)):
            message = f"error: {error}"
        elif "gloo" in str(error) or "NCCL" in str(error):
            message = f"error: process {rank()} lost another one, which says why: {first_line(error)}"
        elif isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            message = f"error: {first_line(error)}; a smaller --batch_size or --grad_checkpoint needs less memory"
        elif dist.is_initialized():
            message = traceback.format_exc()
        else:
            raise
    if dist.is_initialized():  # no tidying up: freed in the wrong order, gloo and torch wait for each other's threads
        if message:
            print(message, file=sys.stderr)
        sys.stdout.flush()
        os._exit(code)
    if code:
        sys.exit(message or code)


if __name__ == "__main__":
    main()
