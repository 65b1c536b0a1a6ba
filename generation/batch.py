"""How many videos are made at once: by the network's size and the free memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from generation.generator import Generator
from generation.sampling import Sampling
from utils import distributed

MOST = 8  # more make no network faster
SHARE = 0.5  # of the free memory: the rest is for kernels, the decoder and what allocators lose
WIDTHS = 16  # features of a token that a block holds at once, in widths of a token: residuals, norms, q, k, v, the MLP


def bytes_per_video(generator: Generator, sampling: Sampling) -> float:
    """About what a video more costs while it is made: features of the frames that a pass makes, and the keys and values
    of those that a causal student looks back at."""
    geometry, shape, causal = generator.config.student.geometry(), generator.task.latent_shape, generator.config.causal
    frames = sampling.frames or shape[0]
    held = min(frames, sampling.window or causal.window_frames or frames) if generator.causal else 0
    made = min(frames, causal.num_frame_per_block) if generator.causal else frames
    widths = WIDTHS * made + 2 * geometry.num_layers * held
    size = 4 if generator.score.compute_dtype is None else 2
    return float(widths * geometry.tokens_per_frame(*shape[2:]) * geometry.dim * size)


def free_memory(device: torch.device) -> int:
    """Bytes that are free for this process: on its GPU, what torch keeps included, or its part of the machine's."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    file = Path("/proc/meminfo")
    if not file.is_file():
        return 4 << 30  # no Linux: what any machine has
    line = next(line for line in file.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def fitting(need: float, room: float, wanted: int) -> int:
    """Videos at once, of `wanted` that need so many bytes each, in so many that are free: from 1 to MOST."""
    return max(1, min(MOST, wanted, int(SHARE * room / max(need, 1.0))))


def chosen_batch(generator: Generator, sampling: Sampling, wanted: int, room: float, processes: int = 1) -> int:
    """How many videos are made at once where the command does not say, said on the console.

    wanted: videos in all.
    room: free bytes.
    processes: that share a video.
    """
    need = bytes_per_video(generator, sampling) / processes
    batch = fitting(need, room, wanted)
    if distributed.is_main() and wanted > 1:
        print(f"{batch} videos at once: about {need / 2**30:.2g} GiB each, {room / 2**30:.3g} GiB free (see --batch)")
    return batch
