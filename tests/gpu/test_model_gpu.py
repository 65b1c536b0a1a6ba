"""Model, rollout and losses on CUDA: fp32 against the CPU, bf16 against fp32, every backend that is there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from model.attention.backends import Backend, attend, available
from model.attention.checkpointing import Checkpointing
from model.attention.masks import block_causal_mask, teacher_forcing_mask
from model.dmd import critic_loss, dmd_loss
from model.query import Guidance, ScoreQuery
from model.score import ScoreNet
from model.sid import sid_loss
from model.types import Conditioning, LossOutput
from model.wan.config import WanConfig
from model.wan.transformer import WanTransformer
from pipeline.causal import CausalConfig, VideoShape
from pipeline.causal_inference import generate
from pipeline.self_forcing_training import RolloutPlan, self_forcing_rollout
from tests.nets import KeyedNoise, gradients, latents, random_net, relative, texts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CUDA = torch.device("cuda")
# heads of 64: what fused kernels take
CONFIG = WanConfig(
    dim=128, ffn_dim=256, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=16, text_len=8, freq_dim=32
)
SIGMAS = (1.0, 0.8, 0.5)
BF16 = 2.0**-9  # largest relative error of one rounding
BACKENDS = [b for b in Backend if available(b) is None]
FP32_BACKENDS = [b for b in BACKENDS if b is not Backend.FLASH]
CAUSAL = {"full": CausalConfig(2), "window_sinks": CausalConfig(2, window_frames=4, sink_frames=1, context_noise=50)}


class DeviceNoise(KeyedNoise):
    """The CPU's draws, moved, so that both devices see the same."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(5, 2)
        self.device = device

    def normal(self, role: str, shape: tuple[int, ...]) -> Tensor:
        return super().normal(role, shape).to(self.device)


def net(
    seed: int, device: torch.device, backend: Backend = Backend.SDPA, checkpointing: Checkpointing = Checkpointing.none
) -> WanTransformer:
    return random_net(seed, CONFIG, backend=backend, checkpointing=checkpointing).to(device)


def conditioning(device: torch.device) -> Conditioning:
    return Conditioning(texts(3, 2, CONFIG).to(device))


def cosine(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    a, e = (torch.cat([g[name].float().cpu().flatten() for name in expected]) for g in (actual, expected))
    return float(functional.cosine_similarity(a, e, dim=0))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.value)
@pytest.mark.parametrize("name", ["dense", "causal", "teacher_forcing", "whole_128"])
def test_attention_backends_forward_and_backward(backend: Backend, name: str) -> None:
    mask = {
        "dense": None, "causal": block_causal_mask((1, 2, 2), 3, 1), "teacher_forcing": teacher_forcing_mask((2, 2)),
        "whole_128": block_causal_mask((2, 2)),
    }[name]  # fmt: skip
    tokens = 64 if name == "whole_128" else 37
    frames = 4 if mask is None else mask.query_frames
    dtype = torch.bfloat16 if backend is Backend.FLASH else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, frames * tokens, 2, 64, generator=generator).to(CUDA, dtype).requires_grad_() for _ in range(3)
    )
    weight = torch.randn(q.shape, generator=generator).to(CUDA)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, mask=mask, backend=backend)

    def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("blnd,bmnd->bnlm", q.double(), k.double()) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask.tokens(tokens, CUDA), float("-inf"))
        return torch.einsum("bnlm,bmnd->blnd", scores.softmax(-1), v.double())

    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-4
    out, expected = run(q, k, v), written_out(q, k, v)
    assert relative(out, expected) < tolerance
    actual = torch.autograd.grad((out.float() * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for a, e in zip(actual, wanted, strict=True):
        assert relative(a, e) < tolerance


@pytest.mark.parametrize("backend", FP32_BACKENDS, ids=lambda b: b.value)
def test_forward_fp32_is_the_cpus(backend: Backend) -> None:
    x, text, sigma = latents(2, 2, 6, CONFIG), texts(3, 2, CONFIG), torch.tensor([0.3, 0.9])
    mask = CAUSAL["full"].mask(6)
    with torch.no_grad():
        for m in (None, mask):
            expected = net(1, torch.device("cpu"), Backend.PLAIN)(x, sigma, text, mask=m)
            out = net(1, CUDA, backend)(x.to(CUDA), sigma.to(CUDA), text.to(CUDA), mask=m)
            assert relative(out.cpu(), expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.value)
def test_forward_bf16_is_close_to_fp32(backend: Backend) -> None:
    x, text, sigma = (t.to(CUDA) for t in (latents(2, 2, 6, CONFIG), texts(3, 2, CONFIG), torch.tensor([0.3, 0.9])))
    with torch.no_grad():
        exact = ScoreNet(net(1, CUDA), "n").velocity(x, sigma, text)
        rough = ScoreNet(net(1, CUDA, backend), "n", compute_dtype=torch.bfloat16).velocity(x, sigma, text)
        frozen = ScoreNet(net(1, CUDA, backend).bfloat16(), "n", compute_dtype=torch.bfloat16).velocity(x, sigma, text)
    assert rough.dtype is frozen.dtype is torch.float32
    assert 0 < relative(rough, exact) < 3e-2
    assert relative(frozen, exact) < 4e-2


def rollout(
    device: torch.device,
    causal: CausalConfig,
    dtype: torch.dtype | None,
    checkpointing: Checkpointing = Checkpointing.none,
    exits: tuple[int, ...] = (0, 2, 1, 2),
) -> tuple[Tensor, dict[str, Tensor]]:
    student = net(1, device, checkpointing=checkpointing)
    noise = latents(2, 2, 8, CONFIG).to(device)
    cache = causal.new_cache(student, VideoShape(2, 8, 4, 6), dtype or torch.float32, device)
    made = self_forcing_rollout(
        ScoreNet(student, "s", compute_dtype=dtype), noise, conditioning(device), RolloutPlan(causal, SIGMAS, exits, 8),
        DeviceNoise(device), cache, with_gradient=True,
    )  # fmt: skip
    (made.x0 * latents(6, 2, 8, CONFIG).to(device)).sum().backward()
    return made.x0.detach(), gradients(student)


@pytest.mark.parametrize("name", CAUSAL)
def test_rollout_fp32_is_the_cpus_and_bf16_is_close(name: str) -> None:
    expected_x0, expected = rollout(torch.device("cpu"), CAUSAL[name], None)
    x0, found = rollout(CUDA, CAUSAL[name], None)
    assert relative(x0.cpu(), expected_x0) < 1e-4
    for key, want in expected.items():
        assert relative(found[key].cpu(), want) < 1e-3 or float(want.norm()) < 1e-4, key
    rough_x0, rough = rollout(CUDA, CAUSAL[name], torch.bfloat16)
    assert relative(rough_x0.cpu(), expected_x0) < 5e-2
    assert rough.keys() == expected.keys()
    assert cosine(rough, expected) > 0.99


@pytest.mark.parametrize("name", CAUSAL)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    """With checkpointing the exit passes run without gradient and are replayed all at once. SDPA may take another
    kernel, and the sums over blocks run in another order. In fp32 that costs 2e-6 (on a CPU, where x0 is bit for bit
    the same)."""
    plain_x0, plain = rollout(CUDA, CAUSAL[name], None)
    again_x0, again = rollout(CUDA, CAUSAL[name], None, checkpointing=Checkpointing.full)
    assert relative(again_x0, plain_x0) < 1e-5
    assert again.keys() == plain.keys()
    for key, want in plain.items():
        assert relative(again[key], want) < 1e-5 or float(want.norm()) < 1e-4, key


@pytest.mark.parametrize("name", CAUSAL)
def test_checkpointing_rounds_no_more_in_bf16(name: str) -> None:
    """Without checkpointing the gradient of each block is rounded to bf16 before the sum; with it, only the sum is.
    The two differ by bf16's rounding (up to 1.6e-2 on a CPU), so both are compared with fp32, and must be as near."""
    exact_x0, exact = rollout(CUDA, CAUSAL[name], None)
    plain_x0, plain = rollout(CUDA, CAUSAL[name], torch.bfloat16)
    again_x0, again = rollout(CUDA, CAUSAL[name], torch.bfloat16, checkpointing=Checkpointing.full)
    assert relative(again_x0, exact_x0) < 2 * relative(plain_x0, exact_x0)
    assert again.keys() == plain.keys() == exact.keys()
    for key, want in exact.items():
        rounding = max(relative(plain[key], want), BF16)  # half a unit at least: some are exact by chance
        assert relative(again[key], want) < 2 * rounding or float(want.norm()) < 1e-4, key


def test_bf16_rollout_to_the_last_step_is_inference() -> None:
    """With checkpointing the exit passes run without gradient: they are the passes of inference. Passes with gradient
    may take other kernels, which round as often: they differ from inference by at most twice bf16's distance to fp32."""
    causal, exits = CAUSAL["window_sinks"], (2, 2, 2, 2)
    exact, _ = rollout(CUDA, causal, None, exits=exits)
    kept, _ = rollout(CUDA, causal, torch.bfloat16, exits=exits)
    replayed, _ = rollout(CUDA, causal, torch.bfloat16, checkpointing=Checkpointing.full, exits=exits)
    student = net(1, CUDA)
    cache = causal.new_cache(student, VideoShape(2, 8, 4, 6), torch.bfloat16, CUDA)
    score = ScoreNet(student, "s", compute_dtype=torch.bfloat16)
    noise = latents(2, 2, 8, CONFIG).to(CUDA)
    sampled = generate(score, noise, conditioning(CUDA), SIGMAS, causal, DeviceNoise(CUDA), cache)
    assert relative(sampled, replayed) < 1e-3
    assert relative(sampled, kept) < 2 * relative(kept, exact)


@pytest.mark.parametrize("kind", ["dmd", "sid", "critic"])
def test_losses_in_bf16_are_close_to_fp32(kind: str) -> None:
    def run(device: torch.device, dtype: torch.dtype | None) -> tuple[float, dict[str, Tensor]]:
        nets = {name: net(seed, device) for seed, name in enumerate(("student", "teacher", "critic"), 1)}
        trained = "critic" if kind == "critic" else "student"
        for name, module in nets.items():
            module.requires_grad_(name == trained)
        nets["teacher"].to(dtype or torch.float32)
        scores = {name: ScoreNet(module, name, compute_dtype=dtype) for name, module in nets.items()}
        causal, noise = CAUSAL["full"], latents(2, 2, 6, CONFIG).to(device)
        cache = causal.new_cache(nets["student"], VideoShape(2, 6, 4, 6), dtype or torch.float32, device)
        made = self_forcing_rollout(
            scores["student"], noise, conditioning(device), RolloutPlan(causal, SIGMAS, (1, 0, 2), 6), DeviceNoise(device), cache,
            with_gradient=trained == "student",
        )  # fmt: skip
        draw = torch.tensor([0.4, 0.7], device=device), latents(7, 2, 6, CONFIG).to(device)
        guidance = Guidance(texts(8, 2, CONFIG).to(device), 4.0)
        out: LossOutput
        if kind == "critic":
            out = critic_loss(made, scores["critic"], conditioning(device), *draw)
        else:
            loss = dmd_loss if kind == "dmd" else sid_loss
            out = loss(ScoreQuery(made, scores["teacher"], scores["critic"], conditioning(device), guidance, *draw))
        out.loss.backward()
        assert out.loss.dtype is torch.float32
        return float(out.loss.detach()), gradients(nets[trained])

    expected_loss, expected = run(torch.device("cpu"), None)
    loss, found = run(CUDA, None)
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    assert cosine(found, expected) > 0.9999
    rough_loss, rough = run(CUDA, torch.bfloat16)
    assert rough_loss == pytest.approx(expected_loss, rel=0.1)
    assert rough.keys() == expected.keys()
    assert cosine(rough, expected) > 0.95
