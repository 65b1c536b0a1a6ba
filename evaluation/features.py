"""Features of videos by a pretrained encoder: an image or video model of transformers, from a local folder.

B batch  F frames  C channels  h w pixels  D features
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.reading import read_json, reading

_CHUNK = 32  # frames a forward
_INPUT = "pixel_values"


class FeatureEncoder:
    """Pooled features of frames, or of clips where the model sees several frames at once.

    model: of transformers.
    size: (h, w) of the pixels that it sees.
    mean: of its normalisation, for each channel.
    std: of its normalisation, for each channel.
    clip: frames that it sees at once; None for an image model.
    pooled: whether its pooling layer was trained; else tokens are averaged.
    """

    def __init__(
        self, model: Any, size: tuple[int, int], mean: Tensor, std: Tensor, clip: int | None = None, pooled: bool = True
    ) -> None:
        self.model, self.size, self.mean, self.std = model, size, mean, std
        self.clip, self.pooled = clip, pooled

    @torch.no_grad()
    def __call__(self, pixels_BFChw: Tensor) -> Tensor:
        """Features [B, F, D] of each frame, or [B, 1, D] of clips, fp32 in CPU memory; pixels in [0, 1], grey or RGB.

        Frames are resized to the encoder's size without regard to their shape, antialiased; of a clip the encoder sees
        its number of frames at even distances. Raises ValueError for another shape.
        """
        if pixels_BFChw.ndim != 5 or pixels_BFChw.shape[2] not in (1, 3):
            raise ValueError(f"features: pixels must be [B, F, 1 or 3, h, w], got {list(pixels_BFChw.shape)}")
        if self.clip is not None:
            chosen = torch.linspace(0, pixels_BFChw.shape[1] - 1, self.clip).round().long()
            pixels_BFChw = pixels_BFChw[:, chosen.to(pixels_BFChw.device)]
            return torch.cat([self._features(self._seen(video)[None]) for video in pixels_BFChw])[:, None]
        frames = pixels_BFChw.flatten(0, 1)
        features = torch.cat([self._features(self._seen(part)) for part in frames.split(_CHUNK)])
        return features.unflatten(0, pixels_BFChw.shape[:2])

    def _seen(self, frames_NChw: Tensor) -> Tensor:
        frames = frames_NChw.to(self.mean.device).float().expand(-1, 3, -1, -1)
        if tuple(frames.shape[2:]) != self.size:
            frames = torch.nn.functional.interpolate(frames, self.size, mode="bilinear", antialias=True)
        return (frames - self.mean[:, None, None]) / self.std[:, None, None]

    def _features(self, values: Tensor) -> Tensor:
        out = self.model(**{_INPUT: values})
        pooled = getattr(out, "pooler_output", None) if self.pooled else None
        if pooled is None:
            hidden = out.last_hidden_state
            pooled = hidden.mean(dim=1) if hidden.ndim == 3 else hidden.mean(dim=(2, 3))  # tokens, or a feature map
        return pooled.flatten(1).float().cpu()


def load_features(folder: str | Path, device: torch.device | str = "cpu") -> FeatureEncoder:
    """The encoder in a folder: config.json, safetensors and preprocessor_config.json. Nothing is fetched, no pickle
    is read and no code of the folder is run.

    Raises ValueError, one line, for a folder that holds no complete image or video encoder.
    """
    from transformers import AutoModel

    folder = Path(folder)
    settings = _read(folder, "preprocessor_config.json")
    _read(folder, "config.json")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"features: {folder} holds no .safetensors file: convert its weights")
    with reading("features", folder, says="does not load"):
        loaded: Any = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        model, report = loaded
    missing = sorted(map(str, report.get("missing_keys") or ()))
    pooled = not any("pooler" in key.split(".") for key in missing)  # a classifier's weights have no pooling layer
    if lost := [key for key in missing if "pooler" not in key.split(".")]:
        raise ValueError(f"features: {folder} lacks {len(lost)} weights ({lost[0]}): fetch it again")
    model = getattr(model, "vision_model", model)  # of CLIP and its kind, the image half
    if model.main_input_name != _INPUT:
        raise ValueError(f"features: {folder} holds a {type(model).__name__}, which takes no pixels: give an encoder")
    mean, std = (torch.tensor(settings.get(f"image_{name}") or default, device=device)
                 for name, default in (("mean", [0.0] * 3), ("std", [1.0] * 3)))  # fmt: skip
    clip = getattr(model.config, "num_frames", None)
    model = model.eval().requires_grad_(False).to(device)
    return FeatureEncoder(model, _size(folder, model.config, settings), mean, std, clip, pooled)


def _read(folder: Path, name: str) -> dict[str, Any]:
    return read_json("features", folder / name, "give a folder of transformers' save_pretrained, with its preprocessor")


def _size(folder: Path, config: Any, settings: dict[str, Any]) -> tuple[int, int]:
    """Height and width that the model was made for."""
    for found in (getattr(config, "image_size", None), settings.get("crop_size"), settings.get("size")):
        if isinstance(found, int):
            return found, found
        if isinstance(found, (list, tuple)) and len(found) == 2:
            return int(found[0]), int(found[1])
        if isinstance(found, dict):
            side = found.get("shortest_edge")
            if (height := found.get("height", side)) and (width := found.get("width", side)):
                return int(height), int(width)
    raise ValueError(f"features: {folder} does not say its image size: write image_size into its config.json")
