"""`pytest test_all.py`: the proofs, on the CPU, in a few minutes.  `python test_all.py`: the benchmark table.

Every clever path (one causal pass, checkpointing, packed halting rows, accumulation, several processes, resuming) is
checked against a slow and obvious reference written here, independently of the scripts. Times and memory are never
asserted; the benchmark prints them.
"""

import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import trm_deep
from data import Concat, DataError, Loader, fixed_batches, mix, permuted, sample_index

HERE = Path(__file__).parent
SCRIPTS = {"trm_deep": trm_deep}
# The smallest run of each script that still goes through everything.
TINY = {"trm_deep": "--hidden_size 32 --num_heads 2 --H_cycles 2 --halt_max_steps 3 --enable_deep_supervision"}
COMMON = "--device cpu --batch_size 8 --max_train_steps 6 --warmup_steps 2 --eval_interval 3 --eval_samples 20"
COMMON += " --log_interval 1 --save_interval 3"
each_script = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(autouse=True)
def few_threads():
    """Tiny tensors are fastest on one thread, and the signal handlers of a run must not outlive it."""
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(script, out_dir, flags="", tiny=True):
    """The script's own main() in this process; returns the lines of metrics.jsonl."""
    words = f"{TINY[script]} {COMMON} {flags}" if tiny else flags
    argv, sys.argv = sys.argv, [f"{script}.py", "--out_dir", str(out_dir), *words.split()]
    try:
        SCRIPTS[script].main()
    finally:
        sys.argv = argv
    return lines_of(out_dir)


def lines_of(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


def without_time(lines):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def shell(command, **kwargs):
    """A command line in a process of its own, as a user types it; python is this one."""
    words = [sys.executable if word == "python" else word for word in command.split()]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=HERE, env=env, capture_output=True, text=True, timeout=300, **kwargs)


def torchrun(processes, command):
    done = shell(f"python -m torch.distributed.run --standalone --nproc_per_node {processes} {command}")
    assert done.returncode == 0, done.stderr[-3000:]
    return done


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
    assert len(lines_a) == len(lines_b)
    for a, b in zip(lines_a, lines_b, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name != "seconds":
                assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (a["step"], a["split"], name)


# ==== data.py ========================================================================================================


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000])
def test_permutation_is_one_and_changes_with_the_epoch(size):
    def order(epoch, seed):
        return permuted(np.arange(size), size, mix(np.full(size, epoch), seed))

    assert sorted(order(0, 0)) == list(range(size))
    if size >= 16:
        assert any(order(0, 0) != order(1, 0)) and any(order(0, 0) != order(0, 1))
        assert abs(np.corrcoef(np.arange(size), order(0, 0))[0, 1]) < 0.6


def test_permutation_is_uniform():
    where = np.stack([permuted(np.arange(20), 20, mix(np.full(20, epoch), 3)) for epoch in range(2000)])
    counts = np.stack([np.bincount(where[:, i], minlength=20) for i in range(20)])
    assert ((counts - 100) ** 2 / 100).sum() < 361 + 5 * math.sqrt(2 * 361)  # chi-squared, 19 x 19 degrees of freedom


def test_every_epoch_visits_every_sample_once():
    taken = [sample_index(np.full(8, turn), np.arange(8), 8, 10, seed=0) for turn in range(10)]
    taken = np.concatenate(taken).reshape(8, 10)  # 80 draws are 8 epochs of 10 samples, epochs straddling the batches
    assert all(sorted(epoch) == list(range(10)) for epoch in taken)


def test_processes_and_micro_batches_see_what_one_process_sees():
    dataset = {"x": np.arange(50) * 10}

    def draw(first, size, turn):
        loader = Loader(dataset, 12, 0, "cpu")
        loader.request(first, torch.full((size,), turn))
        return loader.next()["x"]

    for turn in (0, 7):
        parts = [draw(first, 3, turn) for first in (0, 3, 6, 9)]
        assert torch.equal(torch.cat(parts), draw(0, 12, turn))


def test_loader_draws_only_the_wanted_rows_in_request_order():
    loader = Loader({"x": np.arange(50)}, 4, 0, "cpu")
    loader.request(0, torch.tensor([0, 0, 0, 0]))
    loader.request(0, torch.tensor([1, 5, 1, 2]), torch.tensor([False, True, False, True]))
    loader.request(0, torch.tensor([1, 1, 1, 1]), torch.zeros(4, dtype=torch.bool))
    first, second, third = loader.next(), loader.next(), loader.next()
    assert first["rows"].tolist() == [0, 1, 2, 3] and third["x"].shape == (0,)
    assert second["rows"].tolist() == [1, 3] and second["position"].tolist() == [5 * 4 + 1, 2 * 4 + 3]
    assert second["x"].tolist() == sample_index(np.array([5, 2]), np.array([1, 3]), 4, 50, 0).tolist()


def test_validation_visits_every_sample_once_in_order():
    dataset = {"x": np.arange(23)}
    assert torch.cat([b["x"] for b in fixed_batches(dataset, 5, "cpu")]).tolist() == list(range(23))
    parts = [[b["x"] for b in fixed_batches(dataset, 5, "cpu", rank, 2)] for rank in (0, 1)]
    assert [len(x) for x in parts[0]] == [5, 5, 3] and [len(x) for x in parts[1]] == [5, 5]
    assert sorted(torch.cat(parts[0] + parts[1]).tolist()) == list(range(23))
    assert torch.cat([b["x"] for b in fixed_batches(dataset, 5, "cpu", limit=7)]).tolist() == list(range(7))


def test_lists_need_a_collate_function_and_errors_leave_the_thread():
    words = ["a", "bb", "ccc"]
    batches = fixed_batches(words, 2, "cpu", collate=lambda picked, extra: {"n": [len(word) for word in picked]})
    assert [batch["n"].tolist() for batch in batches] == [[1, 2], [3]]
    loader = Loader({"x": Concat([torch.tensor([[1.0], [math.nan]])], ["a.pt"])}, 2, 0, "cpu")
    loader.request(0, torch.tensor([0, 0]))
    with pytest.raises(DataError, match=r"a\.pt: sample 1 is not finite"):
        loader.next()


def test_concat_is_the_concatenation():
    chunks = [torch.randn(n, 2).half() for n in (3, 1, 4)]
    whole, index = torch.cat(chunks).float(), np.array([7, 0, 3, 3, 2])
    assert torch.equal(Concat(chunks, "abc")[index], whole[index])
    part = Concat(chunks, "abc", start=2, stop=6)
    assert len(part) == 4 and torch.equal(part[np.arange(4)], whole[2:6])


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


@pytest.mark.skipif("PARITY" not in os.environ, reason="set PARITY=FILE.npz to a dump of the published model")
@pytest.mark.parametrize("causal", [False, True])
def test_parity_with_the_published_model(causal):
    """FILE.npz: weights (`w:` + name), config as JSON, inputs, and outputs (under `causal:` the causal ones)."""
    dump = np.load(os.environ["PARITY"])
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
    model, batch = trm(), trm_batch()
    saved = set()

    def pack(tensor):
        if tensor.dtype == torch.bfloat16 and tensor.shape in ((48, 16), (16, 48)):  # the qkv matrix, or its transpose
            saved.add(tensor.data_ptr())
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = step(model, batch, enable_deep_supervision=True)[1]
    assert len(saved) == 2 and outputs["logits"].dtype == torch.float32  # one copy for each of the two layers


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


def test_memory_of_the_variants_in_bytes_kept_for_backward():
    """Counted, not timed: detaching keeps one cycle at a time, checkpointing the states between cycles."""

    def peak(**flags):
        model = trm(L_layers=2, hidden_size=32, vocab_size=32, H_cycles=4)
        model.grad_checkpoint = flags.pop("grad_checkpoint", False)
        batch = trm_batch(8, 16, 32)
        return peak_saved_bytes(lambda: loss_of(model, batch, H_cycles=4, **flags)[0].backward())

    none, deep = peak(enable_deep_supervision=False), peak()
    assert 3.5 < deep / none < 4.5
    assert peak(detach_cycles=True) / none < 1.2 and peak(grad_checkpoint=True) / none < 1.4


def peak_saved_bytes(run_step):
    """Most bytes that autograd kept alive at any moment, each storage counted once."""
    alive, total, most = {}, 0, 0

    class Kept:
        def __init__(self, tensor):
            nonlocal total, most
            self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
            alive[self.key] = alive.get(self.key, 0) + 1
            if alive[self.key] == 1:
                total += tensor.untyped_storage().nbytes()
                most = max(most, total)

        def __del__(self):
            nonlocal total
            alive[self.key] -= 1
            if alive[self.key] == 0:
                total -= self.tensor.untyped_storage().nbytes()

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        run_step()
    return most
