"""One resumable training loop for every stage: Muon and AdamW, a schedule tied to the clock, EMA, logs."""

import copy
import csv
import math
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary name beside `path`, then rename it, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    write(temporary)
    os.replace(temporary, path)


HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()  # without it, bfloat16 products are twelve times slower than fp32


def mixed_precision() -> torch.autocast:
    """Matrix products in bfloat16 if the processor has them."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=HAS_BFLOAT16)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized by five Newton-Schulz steps; matrices of one shape form one batch.

    Weights of more than two dimensions count as matrices (out, rest). The update has AdamW's usual root mean square
    (0.2, after Liu et al., arXiv 2502.16982), so that both optimizers share one learning rate.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    shapes.setdefault((param.shape[0], param[0].numel()), []).append(param)
            for (rows, columns), params in shapes.items():
                updates = []
                for param in params:
                    state = self.state[param]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(param)
                    state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                    updates.append(param.grad.lerp(state["momentum"], group["momentum"]).view(rows, columns))
                scale = 0.2 * math.sqrt(max(rows, columns))
                for param, update in zip(params, orthogonalise(torch.stack(updates))):
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.add_(update.view_as(param), alpha=-group["lr"] * scale)


def orthogonalise(matrices: Tensor, num_steps: int = 5) -> Tensor:
    """Move the singular values of a batch of matrices, (N, rows, columns), towards 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(torch.bfloat16 if HAS_BFLOAT16 else torch.float32)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).type_as(matrices)


def make_optimizers(model: nn.Module, is_matrix: Callable[[str, Tensor], bool], lr: float) -> list:
    """Muon for the parameters that `is_matrix(name, parameter)` picks, AdamW for the rest."""
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    matrices = [param for name, param in named if is_matrix(name, param)]
    others = [param for name, param in named if not is_matrix(name, param)]
    return [Muon(matrices, lr), torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]


DAMAGES = (RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError, pickle.UnpicklingError)


def resume(path: Path, model: nn.Module, ema: nn.Module, generator: torch.Generator, optimizers: list) -> tuple:
    """Restores a saved state; returns its step and its seconds of training.

    Raises `ValueError` naming the file if it is damaged or belongs to another model.
    """
    try:
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        generator.set_state(state["generator"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return state["step"], state["seconds"]
    except DAMAGES as error:
        raise ValueError(
            f"the training state {path} cannot be resumed; move it away to start over: {error}"
        ) from error


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, torch.Generator], Tensor],
    optimizers: list,
    folder: Path,
    minutes: float,
    seed: int,
    on_save: Callable[[nn.Module, int, float], None],
    ema_decay: float = 0.999,
    warmup_steps: int = 100,
    save_minutes: float = 3.0,
) -> nn.Module:
    """Train `model` for `minutes` in total, earlier runs included; returns its moving average.

    Time is processor time of this thread, so a busy machine does not shorten the training.
    `loss(model, generator)` draws a batch and returns a scalar. `on_save(ema, step, minutes)` is called every
    `save_minutes`, when the state is saved. The learning rate warms up, stays constant, and falls to 0 over the
    last 60% of the time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    ema = copy.deepcopy(model).requires_grad_(False)
    step, seconds, state_path, log_path = 0, 0.0, folder / "state.pt", folder / "loss.csv"
    base = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    if state_path.exists():
        step, seconds = resume(state_path, model, ema, generator, optimizers)
        if log_path.exists():
            rows = [row for row in csv.reader(log_path.open()) if int(row[0]) <= step]
            with log_path.open("w", newline="") as file:
                csv.writer(file).writerows(rows)
        print(f"{folder.name}: resumed at step {step}, {seconds / 60:.1f} of {minutes:g} minutes", flush=True)
    elif log_path.exists():
        log_path.unlink()

    def save() -> None:
        state = {"step": step, "seconds": seconds, "model": model.state_dict(), "ema": ema.state_dict()}
        state |= {"generator": generator.get_state(), "optimizers": [each.state_dict() for each in optimizers]}
        write_atomically(state_path, lambda path: torch.save(state, path))
        plot_loss(log_path)
        on_save(ema, step, seconds / 60)

    losses, saved_at, logged_at = [], seconds, seconds
    while seconds < 60 * minutes:
        start = time.thread_time()
        left = 1 - seconds / (60 * minutes)
        factor = min((step + 1) / warmup_steps, left / 0.6, 1)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, lr in zip(groups, base):
            group["lr"] = lr * factor
        value = loss(model, generator)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        losses.append(value.item())
        seconds += time.thread_time() - start
        if step % 20 == 0:
            mean = sum(losses) / len(losses)
            if not math.isfinite(mean):
                raise RuntimeError(f"{folder.name}: the loss is {mean} at step {step}")
            with log_path.open("a", newline="") as file:
                csv.writer(file).writerow([step, f"{seconds:.1f}", f"{mean:.5f}", f"{base[0] * factor:.6f}"])
            if step % 100 == 0:
                pace, logged_at = (seconds - logged_at) / 100, seconds
                print(
                    f"{folder.name}: step {step}, {seconds / 60:.1f} of {minutes:g} minutes, loss {mean:.5f}, "
                    f"{pace:.3f} s per step",
                    flush=True,
                )
            losses = []
        if seconds - saved_at > 60 * save_minutes:
            saved_at = seconds
            save()
    save()
    return ema


def plot_loss(log_path: Path) -> None:
    """Draw `loss.png` beside `loss.csv` (columns: step, seconds, loss, learning rate)."""
    if not log_path.exists():
        return
    rows = [[float(cell) for cell in row] for row in csv.reader(log_path.open())]
    figure, axes = plt.subplots(figsize=(6, 3.5))
    axes.loglog([row[0] for row in rows], [row[2] for row in rows])
    axes.set(xlabel="step", ylabel="loss", title=log_path.parent.name)
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    write_atomically(log_path.with_suffix(".png"), figure.savefig)
    plt.close(figure)
