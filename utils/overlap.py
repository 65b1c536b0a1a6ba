"""Decoding beside the work that makes the next block: on CUDA on a stream of its own, so that neither waits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream for all videos of a device: freed memory serves only the stream that it was taken on."""
    return torch.cuda.Stream(device)


class SideDecoder:
    """decode: latents [B, f, C, H, W] to pixels, block by block in order; device: where both are."""

    def __init__(self, decode: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self.decode, self.device = decode, device
        self.stream = side_stream(device) if device.type == "cuda" else None

    @property
    def overlaps(self) -> bool:
        """Whether `start` returns before the pixels are there."""
        return self.stream is not None

    @torch.no_grad()
    def start(self, latents: Tensor) -> Callable[[], Tensor]:
        """Begins to decode what the current stream makes. What comes back waits for the pixels, fp32 on the CPU."""
        if self.stream is None:
            pixels = self.decode(latents).float().cpu()
            return lambda: pixels
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            made = self.decode(latents).float()
            latents.record_stream(self.stream)  # or its memory could be another block's before it is read
            host = torch.empty(made.shape, dtype=made.dtype, pin_memory=made.is_cuda)
            host.copy_(made, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self.stream)

        def wait() -> Tensor:
            done.synchronize()
            return host

        return wait
