"""LLM-JEPA over bytes: predict the next token, and the embedding of the answer's next step.

A small decoder learns chats. Besides the usual loss on the assistant's tokens, a few predictor tokens after a step of
the answer learn to predict the embedding of the next step, encoded alone (LLM-JEPA, arXiv 2509.14252). One packed row
holds the chat, the predictor tokens and the steps to encode alone, so a single forward pass computes both losses at 1.2
to 1.3 times the plain cost. Without pairs (--regular or --lbd 0: the same run, bit for bit) it is the plain pass.

  python jepa_lm.py                                                            # laptop, 1 to 2 minutes
  python jepa_lm.py --train_file train.jsonl --eval_file test.jsonl            # your chats, any GPU
  torchrun --nproc_per_node 8 jepa_lm.py --train_file train.jsonl --eval_file test.jsonl     # many GPUs

Without --train_file it learns a synthetic dataset of word problems. The first command's last lines, seed 0:

  Step 700/700, Train Loss: 0.0528 | LM: 0.0028 | JEPA: 0.0080 | Cos: 0.992 paired, -0.004 unpaired
  Step 700/700, Val Loss: 0.0026 | LM: 0.0026 | Exact: 0.9941
  validation                loss   exact  prefix
  this model              0.0026  0.9941  0.9941
  before training         5.7805  0.0000  0.0000
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

try:
    from data import DataError, expecting, fingerprint, fixed_batches, size_of, training_batches
except ImportError as error:
    sys.exit(f"error: {error}; expected data.py beside this script and no other `data` before it on the path")

# ---- model ----------------------------------------------------------------------------------------------------------

PAD, END, SYSTEM, USER, ASSISTANT, VOCABULARY = range(256, 262)  # after the 256 bytes; END closes a turn
ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
IGNORE = -100  # label of a position without a loss


@dataclasses.dataclass
class Config:
    """What defines the model. Raises DataError for sizes that do not fit each other."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 8
    predictors: int = 2  # predictor tokens; their ids follow the vocabulary

    def __post_init__(self):
        if self.hidden_size % (2 * self.num_heads):
            multiple = f"a multiple of 2 * num_heads = {2 * self.num_heads}"
            raise DataError(f"hidden_size is {self.hidden_size}, expected {multiple}")


def rms_norm(x):
    """x / rms(x), computed in float32, without a gain. x: [..., D] of any float dtype."""
    x32 = x.float()
    mean_square = x32.norm(dim=-1, keepdim=True).square() / x.shape[-1]  # a third faster than x32.square().mean(-1)
    return (x32 * torch.rsqrt(mean_square + 1e-5)).to(x.dtype)


def rotary(positions, d):
    """RoPE angles of positions [B, T] as cos, signed sin [B, T, 1, 1, d], float32."""
    frequencies = 10000.0 ** (-torch.arange(0, d, 2, device=positions.device) / d)
    angles = positions[:, :, None, None, None] * frequencies
    return torch.cat([angles, angles], dim=-1).cos(), torch.cat([-angles, angles], dim=-1).sin()


def rotate(x, cos, sin):
    """Half-split rotation of x [B, T, 2, heads, d], in float32: [x1 cos - x2 sin, x2 cos + x1 sin], signs in sin."""
    x32 = x.float()
    return torch.addcmul(x32 * cos, x32.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def attend(q, k, v, mask=None):
    """Attention of q to k and v, each [B, heads, T, d]; mask: bool [B, 1, E, T] for the last E queries.

    All other queries are causal: a kernel that knows this does half the work of a masked one.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    n = q.shape[2] - mask.shape[2]
    causal = attend(q[:, :, :n], k[:, :, :n], v[:, :, :n])
    return torch.cat([causal, F.scaled_dot_product_attention(q[:, :, n:], k, v, mask)], dim=2)


class Block(nn.Module):
    """Pre-norm transformer block without biases: h = h + Attention(n(h)); h = h + SwiGLU(n(h)); q and k normed too."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        inner = math.ceil(8 / 3 * D / 64) * 64  # SwiGLU has three matrices; 8/3 D keeps the parameter count of 4 D
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.o = nn.Linear(D, D, bias=False)
        self.gate_up = nn.Linear(D, 2 * inner, bias=False)
        self.down = nn.Linear(inner, D, bias=False)

    def forward(self, h, cos, sin, mask=None):
        B, T, D = h.shape
        qk, v = self.qkv(rms_norm(h)).split([2 * D, D], dim=-1)
        qk = rotate(rms_norm(qk.view(B, T, 2, self.num_heads, -1)), cos, sin)  # [B, T, 2, heads, d]
        q, k = qk.transpose(1, 3).unbind(2)  # each [B, heads, T, d]
        v = v.view(B, T, self.num_heads, -1).transpose(1, 2)  # [B, heads, T, d]
        h = h + self.o(attend(q, k, v, mask).transpose(1, 2).reshape(B, T, D))  # [B, heads, T, d] -> [B, T, D]
        gate, up = self.gate_up(rms_norm(h)).chunk(2, dim=-1)
        return h + self.down(F.silu(gate) * up)


class Model(nn.Module):
    """A decoder over bytes and special tokens; input and output embeddings are tied."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False
        self.embed = nn.Embedding(VOCABULARY, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.predictors = nn.Parameter(torch.empty(config.predictors, config.hidden_size))
        # In reverse order: the predictors come last, so the language model is the same for any number of them.
        for name, p in reversed(list(self.named_parameters())):
            std = 0.05 if name in ("embed.weight", "predictors") else p.shape[1] ** -0.5
            if name.endswith(("o.weight", "down.weight")):
                std /= (2 * config.num_layers) ** 0.5  # residual stream of equal variance at any depth, as in GPT-2
            nn.init.normal_(p, std=std)

    def forward(self, tokens, positions=None, mask=None):
        """Final states, after the last norm: [B, T, D].

        tokens: [B, T] of any integer dtype; predictor k has id VOCABULARY + k. positions: int64 [B, T]; None: 0, 1, ...
        mask: bool [B, 1, E, T], True where one of the last E tokens may attend to a token; all others are causal.
        """
        config = self.config
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        cos, sin = rotary(positions, config.hidden_size // config.num_heads)
        # One table in every pass: DistributedDataParallel needs a gradient, even if zero, for every parameter.
        h = F.embedding(tokens.long(), torch.cat([self.embed.weight, self.predictors]))
        for block in self.layers:
            # Backward starts with the last block: recomputing it would save no memory.
            if self.grad_checkpoint and torch.is_grad_enabled() and block is not self.layers[-1]:
                h = checkpoint(block, h, cos, sin, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, cos, sin, mask)
        return rms_norm(h)

    def head(self, h):
        """Logits [..., VOCABULARY] of final states [..., D], in float32: bfloat16 has ties for the best."""
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(h.float(), self.embed.weight.float())


def to_our_names(weights):
    """For --init_from: nobody has published weights for this model, and its own keep their names."""
    return weights


# ---- the losses: the part people copy -------------------------------------------------------------------------------


def jepa_loss(predicted, target, kind="cosine", text=None):
    """Mean distance of each prediction from its target, both [P, D] of any float dtype; a float32 scalar, 0 if P = 0.

    kind: "cosine": 1 - cos(p, t), as in the paper; "mse": mean square over P and D; "l2": length of p - t; "infonce":
    cross-entropy of picking one's own target among all P by cosine / 0.07. text: int [P], equal for targets with the
    same text, which are not negatives of each other. Gradients flow through both sides and stay bounded at zero
    vectors. Raises ValueError for an unknown kind.
    """
    p, t = predicted.float(), target.float()
    p_unit, t_unit = F.normalize(p, dim=-1, eps=1e-3), F.normalize(t, dim=-1, eps=1e-3)  # [P, D]; gradient <= 1 / eps
    if kind == "cosine":
        distance = 1 - (p_unit * t_unit).sum(-1)
    elif kind == "mse":
        distance = (p - t).square().mean(-1)
    elif kind == "l2":
        distance = (p - t).norm(dim=-1)
    elif kind == "infonce":
        logits = p_unit @ t_unit.T / 0.07  # [P, P]
        own = torch.arange(len(p), device=p.device)
        if text is not None:
            twin = (text[:, None] == text) & (own[:, None] != own)
            logits = logits.masked_fill(twin, float("-inf"))
        distance = F.cross_entropy(logits, own, reduction="none")
    else:
        raise ValueError(f"unknown loss {kind!r}, expected cosine, mse, l2 or infonce")
    return distance.sum() / max(len(p), 1)


def sigreg(views, directions):
    """How far views [N, D], of any float dtype, are from an isotropic Gaussian: a float32 scalar.

    directions: float32 [D, M] of unit length, drawn anew for each update. The mean over them of the Epps-Pulley
    statistic: N times the integral of |phi_N - phi|^2 phi over 17 points, phi_N being the characteristic function of
    the projected views and phi that of a standard Gaussian. About 1 for Gaussian views, about N if all views are equal.
    SIGReg of LeJEPA, arXiv 2511.08544.
    """
    t = torch.linspace(0, 3, 17, device=views.device)  # the integrand is even: the half from 0 on counts twice
    phi = torch.exp(-t.square() / 2)
    angles = (views.float() @ directions)[..., None] * t  # [N, M, 17]
    distance = (angles.cos().mean(0) - phi).square() + angles.sin().mean(0).square()
    return 2 * len(views) * torch.trapezoid(distance * phi, t).mean()


@torch.no_grad()
def cosines(predicted, target, text):
    """Similarity of the views, as name -> (cosines [P, P], bool [P, P]: the pairs that count).

    Of each prediction with its own target, with targets of other texts, and between targets of different texts. text:
    int [P], equal for equal targets. Collapse: unpaired cosines are as high as paired ones.
    """
    p, t = F.normalize(predicted.float(), dim=-1), F.normalize(target.float(), dim=-1)
    own, other = torch.eye(len(p), dtype=torch.bool, device=p.device), text[:, None] != text
    return {"cos_paired": (p @ t.T, own), "cos_unpaired": (p @ t.T, other), "cos_targets": (t @ t.T, other)}


# ---- data: chats, the synthetic dataset -----------------------------------------------------------------------------


class Sample(NamedTuple):
    """One chat. labels[i] is the token to predict at position i, or IGNORE: count (labels != IGNORE)."""

    tokens: np.ndarray  # int16 [T]
    labels: np.ndarray  # int16 [T]
    steps: list  # [start, end) of each step of the last answer in tokens, without the blank lines between them

    @property
    def answer(self):
        """Where the last answer begins in tokens; everything before, its role token included, is the prompt."""
        return int(np.flatnonzero(self.tokens == ASSISTANT)[-1]) + 1

    @property
    def length(self):
        """Approximate tokens in a packed row: batches are sorted by it, and are the same for all flags."""
        copies = self.steps[1:3] or [(self.answer, len(self.tokens))]
        return len(self.tokens) + sum(end - start for start, end in copies)


def encode(messages, unmask_user=False):
    """A chat as a Sample: [system,] then user and assistant in turn, each a role token, its bytes and END.

    messages: list of {"role": ..., "content": ...}. The bytes and END of every assistant turn are supervised; with
    unmask_user, every token but the first. Raises ValueError, TypeError or LookupError for anything else.
    """
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"roles {', '.join(map(repr, roles)) or 'none'}")
    tokens, targets = [], []
    for role, message in zip(roles, messages):
        start, text = len(tokens) + 1, bytes(message["content"], "utf-8")
        tokens += [ROLES[role], *text, END]
        targets += [IGNORE, *text, END] if role == "assistant" else [IGNORE] * (len(text) + 2)
    steps = find_steps(message["content"], start)
    if not steps:
        raise ValueError("the last answer is empty")
    labels = [*(tokens if unmask_user else targets)[1:], IGNORE]
    return Sample(np.array(tokens, np.int16), np.array(labels, np.int16), steps)


def find_steps(text, at):
    """[start, end) in bytes of each step of an answer that begins at `at`: runs of lines that are not blank."""
    steps = []
    for found in re.finditer(r"(?m)^(.*\S.*\n?)+", text):
        start = at + len(text[: found.start()].encode())
        steps.append((start, start + len(found[0].rstrip("\r\n").encode())))
    return steps


def decode(tokens):
    """The text of tokens, without special ones; invalid UTF-8 becomes U+FFFD."""
    return bytes(int(token) for token in tokens if token < 256).decode(errors="replace")


def read_chats(path, args, training=True):
    """Samples of a file with {"messages": [...]} on every line. Raises DataError that names the line."""
    chats, bad = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                with expecting(CHAT, f"{path}:{number}: no chat"):
                    if line.strip():
                        chats.append(encode(json.loads(line)["messages"], args.unmask_user))
            except DataError:
                bad += 1
                if not args.skip_bad_chats:
                    raise
    if bad:
        say(f"{path}: left out {bad} lines that are no chats")
    short = [sample for sample in chats if len(sample.tokens) <= args.max_length]
    if len(short) < len(chats):
        longest = max(len(sample.tokens) for sample in chats)
        what = f"{path}: {len(chats) - len(short)} of {len(chats)} chats are longer than --max_length {args.max_length}"
        if not training:  # leaving them out would raise the scores
            raise DataError(f"{what}, expected --max_length {longest}, the longest, or a file without them")
        say(f"{what} and left out; the longest has {longest} tokens")
    if not short:
        raise DataError(f"{path}: no chats, expected one on each line")
    return short


CHAT = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, these two in turn, '
    "with or without a system message before them; --skip_bad_chats leaves other lines out"
)
PEOPLE = ("Ann", "Bob", "Cid", "Dot", "Eva", "Fay", "Gus", "Hal")
THINGS = ("figs", "nuts", "pens", "eggs", "caps", "keys")


@functools.cache
def synthetic_dataset(seed, unmask_user):
    """Word problems: every start in 2 .. 9 with any three events, at most one a doubling, that stay within 1 .. 20.

    "Ann has 2 figs, doubles, gets 6, loses 3." -> "2*2=4", "4+6=10", "10-3=7", with a blank line between the steps. The
    seed shuffles the problems and assigns people and things. Returns lists of samples: training, validation (a tenth).
    """
    events = {f"gets {n}": n for n in range(1, 10)} | {f"loses {n}": -n for n in range(1, 10)} | {"doubles": 0}
    problems = []
    for start, *story in itertools.product(range(2, 10), events, events, events):
        values, steps = [start], []
        for event in story:
            value, change = values[-1], events[event]
            values.append(value + (change or value))  # doubling adds the value itself
            steps.append(f"{value}{f'{change:+}' if change else '*2'}={values[-1]}")
        if min(values) >= 1 and max(values) <= 20 and story.count("doubles") <= 1:
            problems.append((start, ", ".join(story), "\n\n".join(steps)))
    rng, n, samples = np.random.default_rng(seed), len(problems), []
    for i, person, thing in zip(rng.permutation(n), rng.choice(PEOPLE, n), rng.choice(THINGS, n)):
        start, story, answer = problems[i]
        question = {"role": "user", "content": f"{person} has {start} {thing}, {story}."}
        samples.append(encode([question, {"role": "assistant", "content": answer}], unmask_user))
    return samples[n // 10 :], samples[: n // 10]


# ---- data: packed rows ----------------------------------------------------------------------------------------------


def find_pairs(sample, args):
    """The pairs of a chat as (context, start, end): tokens[:context] predict the last state of tokens[start:end].

    --view_based_jepa: the chat up to the last question predicts the answer. Otherwise each of the first
    --num_prediction_steps steps, with all before it, predicts the next one; an answer of one step has no pair.
    """
    if args.view_based_jepa:
        return [(sample.answer - 1, sample.answer - 1, len(sample.tokens))]
    steps = sample.steps[: args.num_prediction_steps + 1]
    return [(end, *following) for (_, end), following in zip(steps, steps[1:])]


def pack(chats, pairs, predictors):
    """One row per chat: the chat, then for each pair the predictor tokens and a copy of the target to encode alone.

                 chat, causal                  pair 1                    pair 2
        tokens   question, a, blank, b, ...    P0 P1      | b            P0 P1      | c           PAD
        position 0 1 2 ...                     on from a  | 0 1 2 ...    on from b  | 0 1 2 ...   0
        segment  0                             1          | 2            3          | 4           -1
        sees     chat                          chat to a  | itself       chat to b  | itself      itself

    chats: int arrays; pairs: for each chat a list from find_pairs; predictors: K. Returns int64 arrays: tokens [B, T],
    ends [P, 2], the places of predictions and targets in the flattened rows, and text [P], equal for equal targets; if
    there is any pair, also positions and segment [B, T] and limit [B, E] (see packed_mask; before the last E tokens all
    rows hold their chats). Both states equal those of a pass over that text alone; with K = 0 the chat's own state
    predicts.
    """
    K, ends, texts = predictors, [], {}
    T = max(len(chat) + sum(K + end - start for _, start, end in mine) for chat, mine in zip(chats, pairs))
    tokens, positions, segments, limits = packed = np.zeros((4, len(chats), T), np.int64)
    tokens[:], segments[:] = PAD, -1
    for row, (chat, mine) in enumerate(zip(chats, pairs)):
        at, pieces = len(chat), [(chat, 0, 0)]  # tokens, position of the first, limit
        for context, start, end in mine:
            target = chat[start:end]
            pieces += [(VOCABULARY + np.arange(K), context, context), (target, 0, 0)]
            prediction, at = at + K if K else context, at + K + len(target)
            text = texts.setdefault(target.tobytes(), len(texts))  # a number for each text
            ends.append((row * T + prediction - 1, row * T + at - 1, text))
        fields = []
        for segment, (piece, first, limit) in enumerate(pieces):
            fields.append(np.broadcast_arrays(piece, first + np.arange(len(piece)), segment, limit))
        packed[:, row, :at] = np.concatenate(fields, axis=1)
    found = np.array(ends, np.int64).reshape(-1, 3)
    batch = {"tokens": tokens, "ends": found[:, :2], "text": found[:, 2]}
    if ends:
        batch |= {"positions": positions, "segment": segments, "limit": limits[:, min(map(len, chats)) :]}
    return batch


def packed_mask(segment, limit):
    """What the last E tokens of packed rows may attend to: bool [B, 1, E, T]. Built on the device of its inputs.

    segment: int [B, T]; limit: int [B, E]. A token sees its own segment up to itself, and the first `limit` tokens of
    the row, which belong to the chat. Padding is its own segment: a mask row without any True would give NaN.
    """
    at, E = torch.arange(segment.shape[1], device=segment.device), limit.shape[1]
    own = (segment[:, -E:, None] == segment[:, None, :]) & (at[-E:, None] >= at)  # [B, E, T]
    return (own | (at < limit[:, :, None]))[:, None]


def load_chats(args):
    """Samples to train on and to validate with. Raises DataError."""
    if not (args.train_file or args.eval_file):
        return synthetic_dataset(args.seed, args.unmask_user)
    training, train = not (args.eval_only and args.eval_file), []
    if args.train_file and (training or Path(args.train_file).exists()):  # it may be gone by the time of an evaluation
        train = read_chats(args.train_file, args)
    if args.eval_file:
        val = read_chats(args.eval_file, args, training=False)
    else:
        cut = len(train) // 10 or 1
        train, val = train[:-cut], train[-cut:]
    known = {sample.tokens.tobytes() for sample in train}
    fresh = [sample for sample in val if sample.tokens.tobytes() not in known]
    if len(fresh) < len(val):
        say(f"left out {len(val) - len(fresh)} of {len(val)} validation chats that are in the training data too")
    if not fresh or training and not train:
        raise DataError(f"{args.eval_file or args.train_file}: no chat is left to train or evaluate on, expected more")
    return train, fresh


def make_data(args, config=None):
    """The run's datasets and what the shared part needs to know about them (listed there). Raises DataError."""
    config = config or Config(args.hidden_size, args.num_layers, args.num_heads, args.predictors)
    if args.prompt:  # needs no chats
        return {"config": config, "predict": lambda model: respond(model, args)}
    train, val = load_chats(args)
    jepa = not args.regular and (args.lbd > 0 or args.force_pairs)
    if jepa and not args.eval_only:
        paired = sum(bool(find_pairs(sample, args)) for sample in train)
        hint = "; warning: the others train the next-token loss alone; --view_based_jepa has a pair in each"
        say(f"pairs in {paired:,} of {len(train):,} chats{hint if 2 * paired < len(train) else ''}")

    def collate(picked, rng=None, rows=None):
        pairs = [find_pairs(sample, args) if rng and jepa else [] for sample in picked]
        skipped = jepa * sum(not mine for mine in pairs)
        # Every process and micro-batch of an update draws the same. Without pairs it costs no more than a plain pass.
        if rng and rng.random() >= args.jepa_ratio:
            pairs = [[] for _ in picked]
        batch = pack([sample.tokens for sample in picked], pairs, config.predictors)
        if args.sigreg and len(batch["ends"]):
            directions = rng.standard_normal((config.hidden_size, 256), np.float32)
            batch["directions"] = directions / np.linalg.norm(directions, axis=0)
        labels = np.full(batch["tokens"].shape, IGNORE)  # [B, T]
        for row, sample in zip(labels, picked):
            first = 0 if rng else sample.answer - 1  # validation is always on the last answers
            row[first : len(sample.labels)] = sample.labels[first:]
        at = np.flatnonzero(labels != IGNORE)  # places in the flattened rows
        counts = np.array([len(at), len(batch["ends"])], np.float32)
        return batch | {"at": at, "next": labels.flat[at], "counts": counts, "skipped": skipped}

    return {"train": train, "val": val, "collate": collate, "config": config}


# ---- one micro-batch, evaluation, generation ------------------------------------------------------------------------


def compute_loss(model, batch, carry, args):
    """The losses of one micro-batch: gamma * next token + lbd * JEPA.

    batch: from collate, with `step` and `share` (float [2]: this micro-batch's part of the update's supervised tokens
    and of its pairs) from the shared part. Returns its part of the update's loss, metrics as (sum, count) pairs, {}.
    """
    tokens, at, ends = batch["tokens"], batch["at"], batch["ends"]
    B, similar = len(tokens), {}
    token_share, pair_share = batch["share"]
    mask = packed_mask(batch["segment"], batch["limit"]) if len(ends) else None
    h = model(tokens, batch.get("positions"), mask).flatten(0, 1)  # [B * T, D]
    llm_loss = F.cross_entropy(unwrap(model).head(h[at]), batch["next"])
    loss = args.gamma * token_share * llm_loss
    sums = to_sums({"llm_loss": llm_loss.detach()}, len(at))  # per token; the JEPA ones per pair
    if len(ends):
        views = h[ends].float()  # [P, 2, D]
        predicted, target = views.unbind(1)
        target = target.detach() if args.stop_grad_target else target
        with torch.autocast(h.device.type, enabled=False):  # bfloat16 could not tell cosines of .99 and .98 apart
            jepa = jepa_loss(predicted, target, args.jepa_loss, batch["text"])
            parts = {"jepa_loss": jepa.detach()}
            # rms_norm has scaled the views to the length of unit-variance Gaussian vectors. All views of the micro-
            # batch are tested together, so the value depends on how an update is split, as with infonce's negatives.
            if args.sigreg:
                spread = sigreg(views.flatten(0, 1), batch["directions"])
                parts["sigreg_loss"] = spread.detach()
                jepa = jepa + args.sigreg * spread
            similar = cosines(predicted, target, batch["text"])
        loss = loss + args.lbd * pair_share * jepa
        sums |= to_sums(parts, len(ends))
        sums |= {name: ((cosine * meant).sum(), meant.sum()) for name, (cosine, meant) in similar.items()}
    sums["loss"] = loss.detach(), token_share  # the mean of the updates' own losses
    sums |= {"valid_tokens": (len(at), B), "pairs": (len(ends), B), "skipped": (batch["skipped"], B)}
    if args.debug:
        print_debug(batch, llm_loss, similar, args)
    return loss, sums, {}


def print_debug(batch, llm_loss, similar, args):
    """--debug: what this micro-batch holds; from 5 on also the spread of its cosines. A CPU-GPU sync point."""
    tokens, num_pairs, skipped = batch["tokens"], len(batch["ends"]), int(batch["skipped"])
    B, used = len(tokens), int((tokens != PAD).sum())
    plain = int((batch["segment"] == 0).sum()) if num_pairs else used
    say(
        f"[DEBUG Loss] step={batch['step'] + 1}, input_batch={B}, forward_batch={B}, tokens forward={used} "
        f"plain={plain} ({used / plain:.2f}x), padding={1 - used / tokens.numel():.1%}\n"
        f"  valid_tokens={len(batch['at'])}, loss_per_token={llm_loss:.4f}, pairs={num_pairs}, skipped={skipped}"
    )
    for name, (cosine, meant) in similar.items() if args.debug >= 5 else ():
        if len(c := cosine[meant]):
            spread = c.std(correction=0)
            say(f"  {name:12} mean={c.mean():.4f} std={spread:.4f} min={c.min():.4f} max={c.max():.4f}")


@torch.no_grad()
def evaluate(model, data, args):
    """Validation means. loss and llm_loss: over the tokens of the last answers, also with --unmask_user.

    exact_match: the greedy answer is the chat's; prefix_match: it begins with it. Neither needs generation: if every
    token is the most likely one given the right ones before it, greedy decoding gives exactly these.
    """
    sums = {}
    for batch in eval_batches(data["val"], args, data["collate"], args.eval_samples):
        tokens, at, right = batch["tokens"], batch["at"], batch["next"]
        with autocast(args):
            logits = model.head(model(tokens).flatten(0, 1)[at])  # [tokens of the answers, VOCABULARY]
        loss = F.cross_entropy(logits, right)
        add_sums(sums, to_sums({"loss": loss, "llm_loss": loss}, len(at)))
        wrong, row = logits.argmax(-1) != right, at // tokens.shape[1]
        # The end of a prefix does not count: a longer answer begins with the right one.
        for name, missed in {"exact_match": wrong, "prefix_match": wrong & (right != END)}.items():
            add_sums(sums, {name: (len(tokens) - len(row[missed].unique()), len(tokens))})
    return means(sums)


@torch.no_grad()
def generate(model, tokens, max_length):
    """A Model's greedy continuation of tokens (ints [T]) up to END or max_length tokens, as a list of all of them."""
    tokens = torch.as_tensor(tokens, device=model.embed.weight.device)[None]
    while tokens.shape[1] < max_length and tokens[0, -1] != END:  # without a cache: answers are short
        following = model.head(model(tokens)[:, -1]).argmax(-1, keepdim=True)  # [1, 1]
        tokens = torch.cat([tokens, following], dim=1)
    return tokens[0].tolist()


def respond(model, args):
    """The answer to --prompt, as text."""
    turns = {"system": args.system, "user": args.prompt, "assistant": "?"}
    with expecting("text in UTF-8", "--prompt or --system"):
        sample = encode([{"role": role, "content": text} for role, text in turns.items() if text])
    if sample.answer >= args.max_length:
        raise DataError(f"--prompt: {sample.answer} tokens, expected fewer than --max_length {args.max_length}")
    with autocast(args):
        return decode(generate(model, sample.tokens[: sample.answer], args.max_length)[sample.answer :])


def describe(metrics):
    """Text of a log line."""
    names = {"loss": "Loss", "llm_loss": "LM", "jepa_loss": "JEPA", "exact_match": "Exact"}
    parts = [f"{title}: {metrics[name]:.4f}" for name, title in names.items() if name in metrics]
    if "cos_unpaired" in metrics:
        paired, unpaired = metrics["cos_paired"], metrics["cos_unpaired"]
        collapsed = unpaired > 0.95 and paired - unpaired < 0.02
        remedy = ": collapsed, try --sigreg 0.02" if collapsed else ""
        parts.append(f"Cos: {paired:.3f} paired, {unpaired:.3f} unpaired{remedy}")
    return " | ".join(parts)


def report(metrics):
    """The closing table."""
    lines = [f"{'validation':22}{'loss':>8}{'exact':>8}{'prefix':>8}"]
    for title, prefix in {"this model": "", "before training": "first_"}.items():
        if prefix + "loss" in metrics:
            numbers = [metrics[prefix + name] for name in ("loss", "exact_match", "prefix_match")]
            lines.append(f"{title:22}" + "".join(f"{number:8.4f}" for number in numbers))
    return "\n".join(lines)


# ---- flags ----------------------------------------------------------------------------------------------------------

DATA_FLAGS = ("train_file", "eval_file")
EVAL_FLAGS = ("prompt", "system", "max_length", "skip_bad_chats")
DEMO = {"num_layers": 2, "sigreg": 0.02, "batch_size": 16, "lr": 3e-3, "max_train_steps": 700}
DEMO |= {"eval_interval": 100, "eval_samples": 512, "log_interval": 50}


def add_method_args(parser):
    flag = flag_group(parser, "data")
    flag("--train_file", None, '{"messages": [...]} on every line; without it, a synthetic dataset of word problems')
    flag("--eval_file", None, "the same, to evaluate on (default: the last tenth of --train_file)")
    flag("--max_length", 1024, "longer chats are left out of training, refused in --eval_file", 8)
    flag("--skip_bad_chats", False, "leave out lines that are no chats, and count them (default: refuse)")
    flag("--unmask_user", False, "supervise every token of a training chat, not only the answers")
    flag = flag_group(parser, "model")
    flag("--hidden_size", 128, "width of the network", 2)
    flag("--num_layers", 4, "blocks of the network", 1)
    flag("--num_heads", 8, "attention heads; twice their number divides hidden_size", 1)
    flag = flag_group(parser, "objective: gamma * next token + lbd * JEPA")
    flag("--regular", False, "the next-token loss alone, ignoring the flags below: the same run as --lbd 0")
    flag("--lbd", 0.5, "weight of the JEPA loss; 0: none, and no pairs in the rows")
    flag("--gamma", 1.0, "weight of the next-token loss")
    flag("--num_prediction_steps", 2, "pairs per chat: how many steps predict the next one", 1)
    flag("--predictors", 2, "predictor tokens (K); 0: the step's last token predicts")
    flag("--view_based_jepa", False, "one pair per chat: the question predicts the answer")
    flag("--jepa_loss", "cosine", "distance of the views", choices=["cosine", "mse", "l2", "infonce"])
    flag("--sigreg", 0.0, "weight of SIGReg, added to the distance: prevents collapse; try 0.02; 0: none")
    flag("--jepa_ratio", 1.0, "fraction of the updates that have the JEPA loss", 0, 1)
    flag("--stop_grad_target", False, "no gradient through the targets: slows the collapse")
    flag("--force_pairs", False, "with --lbd 0: build the pairs nevertheless, for comparison")
    flag("--debug", 0, "1: print what every micro-batch holds; 5: its cosines as well")
    flag = flag_group(parser, "prediction, with --eval_only --out_dir RUN")
    flag("--prompt", None, "answer one question")
    flag("--system", None, "the system prompt before it")
    parser.set_defaults(lr=2e-3, min_lr_ratio=0.0, warmup_steps=50)


def check(args, error):
    """Refuse flags that make no sense together."""
    if args.jepa_loss == "infonce" and args.batch_size == 1:
        error("--jepa_loss infonce needs --batch_size 2 or more: other pairs of a micro-batch are negatives")
    if args.gamma == 0 and (args.regular or args.lbd == 0):
        error("--gamma 0 without a JEPA loss leaves nothing to learn")
    if args.eval_file and not (args.train_file or args.eval_only):
        error("--eval_file needs --train_file")
    if (args.prompt or args.system) and not (args.prompt and args.eval_only):
        error("--prompt, and --system before it, need --eval_only and the --out_dir of a run")


# ==== shared: identical in nepa_deep.py, trm_deep.py, jepa_lm.py =====================================================
# Trains whatever stands above. All it uses of it:
#   Config; Model(config); to_our_names(weights), which renames published weights
#   DATA_FLAGS: the flags that name data; without the first of them the demonstration runs, with the defaults in DEMO
#   EVAL_FLAGS: what --eval_only may change; add_method_args(parser); check(args, error): error(text) refuses the flags
#   make_data(args, config) -> dict of train and val (datasets as in data.py), collate and config; or of config and
#     predict(model) -> text, which replaces the evaluation. The argument config: the checkpoint's, None in a new run
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
    return int(all_reduce(torch.tensor(len(RECEIVED))))


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
    """The flags in force and, with --resume or --eval_only, the checkpoint. Refuses what makes no sense (exit 2)."""
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
    flag("--init_from", None, "start from the weights in this file: a run's best.pt or ckpt.pt, or published ones")
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

    args, checkpoint, stored = parser.parse_args(argv), None, {}
    if not args.out_dir and (args.resume or args.eval_only):
        parser.error("--resume and --eval_only need the --out_dir of a run")
    # expanduser: a shell leaves the ~ of --out_dir=~/x
    folder = Path(args.out_dir or f"out/{SCRIPT}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}").expanduser()
    path = folder / ("best.pt" if args.eval_only else "ckpt.pt")
    if args.eval_only or args.resume and path.exists():
        checkpoint = load_checkpoint(path)
        stored = checkpoint["args"]
        parser.set_defaults(**stored)
    elif not args.resume and (folder / "metrics.jsonl").exists():
        parser.error(f"--out_dir {folder} holds a run; --resume continues it, or delete it first")
    elif not getattr(args, DATA_FLAGS[0]):
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)  # now the command line overrides the defaults set above
    free = {*MAY_CHANGE.split(), *DATA_FLAGS, *(("eval_samples", "dtype", *EVAL_FLAGS) if args.eval_only else ())}
    for name, value in vars(args).items():
        if value == "":
            parser.error(f"--{name} is empty, expected a value")  # an unset shell variable
        if name not in free and value != stored.get(name, value):
            parser.error(f"--{name} {value} conflicts with the run in {folder}, which has {stored[name]}")
    check(args, parser.error)
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
    return args, checkpoint


# ---- files ----


def load_checkpoint(path):
    """The checkpoint at path (see Run.save), its config as a Config. Raises DataError if it is not this script's."""
    with expecting(f"a checkpoint of this version of {SCRIPT}.py", path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint | {"config": Config(**checkpoint["config"])}


def load_weights(model, path):
    """--init_from: the weights of a checkpoint (averaged if there are any), or published ones. Raises DataError."""
    with expecting("weights of this model (for .safetensors, pip install safetensors)", path):
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file  # the only use of this package

            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        for wrapper in ("ema", "model", "state_dict"):
            weights = weights.get(wrapper) or weights
        bare = {re.sub(r"^((module|_orig_mod|model)\.)+", "", name): value for name, value in weights.items()}
        model.load_state_dict(to_our_names(bare))


# ---- optimizer ----


def learning_rate(step, args):
    """Linear warm-up, then a cosine from lr to lr * min_lr_ratio at the last update."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / (args.max_train_steps - args.warmup_steps)
    return args.lr * (args.min_lr_ratio + (1 - args.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2)


def make_optimizer(model, args):
    """AdamW, weight decay on matrices only; fused: one kernel for all parameters."""
    matrices = {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": args.weight_decay}
    vectors = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], betas=(args.beta1, args.beta2), fused=True)


# ---- the run ----


class Run:
    """All that changes during a run, how it is logged and how it is saved."""

    def __init__(self, args, data, checkpoint):
        self.args, self.data, self.out_dir = args, data, Path(args.out_dir)
        self.num_rows = args.batch_size * args.grad_accum * WORLD  # samples of an update
        # The rows of an update that each micro-batch of this process takes: int64 [grad_accum, batch_size].
        self.parts = np.arange(self.num_rows).reshape(WORLD, args.grad_accum, args.batch_size)[RANK]
        self.must_match = {"--batch_size * --grad_accum * processes": self.num_rows} | fingerprint(data)

        torch.manual_seed(args.seed)
        self.model = self.net = Model(data["config"]).to(args.device)
        self.model.grad_checkpoint = args.grad_checkpoint
        if args.init_from and not checkpoint:
            load_weights(self.model, args.init_from)
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
        if WORLD > 1:
            self.net = nn.parallel.DistributedDataParallel(self.net, gradient_as_bucket_view=True)

        self.step, self.sums, self.carries = 0, {}, [{}] * args.grad_accum  # a carry for each micro-batch
        # first, last, best: the metrics of validations
        self.state = {
            "first": {},
            "last": {"step": -1},
            "best": {"loss": math.inf},
            "seconds": 0.0,
            "log_size": 0,
            "wandb_id": None,
        }
        if checkpoint:
            self.restore(checkpoint)
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
        self.sums = checkpoint["sums"] if RANK == 0 else {}
        carry = checkpoint["carry"].items()
        self.carries = [{name: x[rows].to(self.args.device) for name, x in carry} for rows in self.parts]
        torch.set_rng_state(checkpoint["rng"])

    def require_finite(self, metrics):
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise DataError(f"step {self.step}: {name} is {value}, expected a finite number; the checkpoint stays")

    def save(self, name, contents):
        """Write contents, and what both checkpoints hold, to out_dir/name on the first process.

        Raises DataError, and keeps the old file, if a weight is not finite.
        """
        self.require_finite({"norm of the weights": nn.utils.get_total_norm(self.model.parameters()).item()})
        if RANK > 0:
            return
        contents |= {"script": SCRIPT, "step": self.step, "args": self.args.flags}
        contents["config"] = dataclasses.asdict(self.model.config)
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
        contents = {name: part and part.state_dict() for name, part in self.saved.items()} | {
            "must_match": self.must_match,
            "state": self.state,
            "sums": over_processes(self.sums),
            # All rows in order, so that another number of processes can take them over.
            "carry": {name: torch.cat([carry[name] for carry in carries]) for name in carries[0]},
            "rng": torch.get_rng_state(),  # nothing here draws on the GPU
        }
        self.save("ckpt.pt", contents)

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
        self.require_finite({f"{split} {name}": value for name, value in metrics.items()})
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
        """Evaluate, log and save. Returns whether a signal came meanwhile: then half an evaluation is discarded."""
        model = self.ema or self.model
        metrics = evaluate(model.eval(), self.data, self.args) | {"step": self.step}
        self.model.train()
        if received_signals():
            return True
        self.log("val", metrics)
        self.state |= {"last": metrics, "first": self.state["first"] or metrics}
        if metrics["loss"] < self.state["best"]["loss"]:
            self.state["best"] = metrics
            self.save("best.pt", {"model": model.state_dict(), "metrics": metrics})
        self.save_latest()
        return False

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
        done, stop = run.step >= args.max_train_steps, received_signals()
        if not stop and run.state["last"]["step"] < run.step and (done or run.step % args.eval_interval == 0):
            stop = run.validate()
        if stop:
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
    args, checkpoint = parse_args(argv)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
        torch.set_float32_matmul_precision("high")  # TF32
    if WORLD > 1:
        with expecting("processes started by torchrun", f"{WORLD} processes"):
            dist.init_process_group(f"cpu:gloo{',cuda:nccl' * (args.device.type == 'cuda')}")
        dist.barrier()  # nobody writes before everybody has looked whether --out_dir is free
    data = make_data(args, checkpoint and checkpoint["config"])
    if not args.eval_only:
        run = Run(args, data, checkpoint)
        with run.open_log(), catch_signals():
            say(
                f"{sum(p.numel() for p in run.model.parameters()):,} parameters, {size_of(data['train']):,} samples, "
                f"{WORLD} x {args.device} {args.dtype}, from step {run.step} -> {run.out_dir}"
            )
            return train(run)
    model = Model(data["config"]).to(args.device).eval()
    model.load_state_dict(checkpoint["model"])
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
        sys.modules["wandb"].finish(exit_code=int(bool(message)))
    if message and WORLD > 1:
        time.sleep(min(RANK, 1))  # torchrun ends the others when one has ended: mostly the first alone says it
        message = print(f"[rank {RANK}] {message}", file=sys.stderr)
    if dist.is_initialized():  # no cleaning up: freed in the wrong order, gloo and torch wait for each other's threads
        os._exit(code)
    if code:
        sys.exit(message or code)


if __name__ == "__main__":
    main()
