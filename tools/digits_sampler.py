"""The sampler of the built-in digit denoisers: deterministic DDIM, with any callable as the denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# ``denoise(sample [n, 1, 8, 8], timestep [n] int64) -> noise [n, 1, 8, 8]`` (a tensor or a NumPy array).
Denoise = Callable[[Tensor, Tensor], Any]

# Noise schedule of ``digits-ddpm`` (as in its ``scheduler_config.json``), for diffusers' schedulers.
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "clip_sample": True,
    "clip_sample_range": 1.0,
}

MAX_BATCH = 128


def denoiser(program: Callable[..., Any]) -> Denoise:
    """Return a `Denoise` of a program called as ``program(sample, timestep, return_dict=False)[0]``."""

    def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
        return program(sample, timestep, return_dict=False)[0]

    return denoise


@torch.no_grad()
def sample_digits(
    denoise: Denoise,
    count: int,
    steps: int = 50,
    seed: int = 0,
    batch: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw digits by deterministic DDIM sampling (eta 0).

    All starting noise is drawn first, on the CPU: a seed gives the same pictures for every batch size and
    device, up to rounding.

    Args:
        denoise: Predicts the noise, see `Denoise`; for a module, ``denoiser(module)``.
        count: Number of pictures.
        steps: DDIM steps, 1 to 1000; each calls ``denoise`` once per batch.
        seed: Of the starting noise.
        batch: Rows of every call, by default ``min(count, 128)``. The last batch is padded to it, so that
            programs compiled for one shape need no other.
        device: Where ``denoise`` gets its inputs.

    Returns:
        ``[count, 1, 8, 8]``, float32, on the CPU, in [-1, 1].

    Raises:
        ValueError: Count, steps or batch is out of range, or ``denoise`` returns another shape.
        ImportError: diffusers is not installed.
    """
    return sample_each(lambda pictures: denoise, count, steps, seed, batch, device)


def sample_each(
    denoise_of: Callable[[Tensor], Denoise],
    count: int,
    steps: int,
    seed: int,
    batch: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw digits as `sample_digits` does, with what each batch needs; gradients go through where they are wanted.

    Args:
        denoise_of: Makes what predicts the noise of a batch from the indices ``[rows]`` of its pictures among
            ``count``, int64; in a padded batch the first index comes again.
    """
    rows = min(count, MAX_BATCH) if batch is None else batch
    if count < 1 or rows < 1 or not 1 <= steps <= 1000:
        raise ValueError(f"need count {count} >= 1, batch {rows} >= 1 and steps {steps} within 1 to 1000")
    noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    done = []
    for start in range(0, count, rows):
        kept = min(rows, count - start)
        pictures = torch.cat([torch.arange(start, start + kept), torch.full((rows - kept,), start)])
        sample = _denoised(denoise_of(pictures), noise[pictures].to(device), steps)
        done.append(sample[:kept].cpu())
    return torch.cat(done).clamp(-1.0, 1.0)


def _denoised(denoise: Denoise, sample: Tensor, steps: int) -> Tensor:
    """Take the noise out of ``sample`` in ``steps`` calls."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps.tolist():
        timestep = torch.full((len(sample),), t, dtype=torch.int64, device=sample.device)
        noise_now = torch.as_tensor(denoise(sample, timestep), dtype=torch.float32, device=sample.device)
        if noise_now.shape != sample.shape:
            raise ValueError(f"denoise returned shape {list(noise_now.shape)} for {list(sample.shape)}")
        # The noise is derived again from the clipped picture, else an early step's overshoot stays in it.
        step = scheduler.step(noise_now, t, sample, use_clipped_model_output=True, return_dict=False)
        sample = step[0]
    return sample
