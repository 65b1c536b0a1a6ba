"""What this machine can do: each check looks at one thing, and really tries it where that costs little."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from model.attention.backends import Backend, attend
from planning.finding import Finding, Lack, first_line, tried
from planning.hardware import GB
from planning.packages import install, installed
from utils.space import free_space
from utils.video import write_video

FLASH = {"flash 3": "flash_attn_interface", "flash 2": "flash_attn"}  # the first that is there is used
SLURM_SECONDS = 10.0  # in which a controller answers


# ----------------------------------------------------------------------------------------------------- ways of looking


def gpus() -> list[tuple[str, int]]:
    """Name and bytes of each GPU that torch can compute on. Raises RuntimeError for one that it cannot."""
    found = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(number)
        torch.ones(8, 8, device=f"cuda:{number}").sum().item()
        found.append((properties.name, properties.total_memory))
    return found


def memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's where that is less."""
    least = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if file.is_file() and (text := file.read_text().strip()).isdecimal():
            least = min(least, int(text))
    return least


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_bf16() -> bool:
    """Whether the cores have instructions for products in bf16."""
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.is_file() else ""
    return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", text) is not None


def try_attention(backend: Backend, device: torch.device) -> None:
    """Raises where the backend does not run forward and backward on a device."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(1, 32, 2, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    attend(q, k, v, backend=backend).sum().backward()


def try_triton(device: torch.device) -> None:
    """Raises where our kernels do not run."""
    from model.attention.vsa.attention import SparseBackend, video_sparse_attention
    from model.attention.vsa.tiles import Grids

    q, k, v, gate = (
        torch.randn(1, 128, 2, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(4)
    )
    grids = Grids((2, 8, 8), cube=(1, 4, 8))
    video_sparse_attention(q, k, v, gate, grids, 0.5, backend=SparseBackend.TRITON).sum().item()


def try_codec() -> None:
    """Raises where the class of Wan's VAE does not import."""
    from diffusers import AutoencoderKLWan  # noqa: F401


def try_text_encoder() -> None:
    """Raises where the class of the text encoder does not import."""
    from transformers import UMT5EncoderModel  # noqa: F401


def try_video() -> None:
    """Raises where an MP4 cannot be written."""
    with tempfile.TemporaryDirectory() as folder:
        write_video(Path(folder, "probe.mp4"), torch.rand(2, 3, 16, 16), 8)


def partitions() -> list[str] | None:
    """Slurm's partitions, None where there is no Slurm. Raises OSError where it does not answer."""
    if shutil.which("sinfo") is None or shutil.which("srun") is None:
        return None
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%R (%D nodes, %G)"], capture_output=True, text=True, timeout=SLURM_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"sinfo gives no answer within {SLURM_SECONDS:.0f} s") from None
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or [f"sinfo exits with {done.returncode}"])[0])
    return done.stdout.split("\n")[:-1]


def driver_sees() -> list[str]:
    """GPUs by NVIDIA's driver, whether torch can use them or not."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=SLURM_SECONDS)
    return [line for line in done.stdout.splitlines() if line.startswith("GPU")]


@dataclass(frozen=True)
class Probes:
    """The ways of looking. Tests put others in their place."""

    version: Callable[[str], str | None] = installed
    gpus: Callable[[], list[tuple[str, int]]] = gpus
    driver_sees: Callable[[], list[str]] = driver_sees
    memory: Callable[[], int] = memory
    cores: Callable[[], int] = cores
    has_bf16: Callable[[], bool] = has_bf16
    free_disk: Callable[[Path], int] = free_space
    has_module: Callable[[str], bool] = lambda name: find_spec(name) is not None
    attention: Callable[[Backend, torch.device], None] = try_attention
    triton: Callable[[torch.device], None] = try_triton
    codec: Callable[[], None] = try_codec
    text_encoder: Callable[[], None] = try_text_encoder
    video: Callable[[], None] = try_video
    partitions: Callable[[], list[str] | None] = partitions


@dataclass
class Machine:
    """What the checks of a recipe ask of a machine, filled in by `check_machine`.

    gpus: name and bytes of each.
    memory: bytes.
    """

    probes: Probes = field(default_factory=Probes)
    gpus: list[tuple[str, int]] = field(default_factory=list)
    memory: int = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.gpus else "cpu")


# ----------------------------------------------------------------------------------------------------------- the checks


def check_machine(machine: Machine) -> Iterator[Finding]:
    """Everything but Python and its packages, which planning/packages.py looks at."""
    yield check_gpu(machine)
    yield check_processor(machine)
    yield from check_attention(machine)
    yield check_triton(machine)
    yield check_codec(machine.probes)
    yield check_text_encoder(machine.probes)
    yield check_video(machine.probes)
    yield check_slurm(machine.probes)
    yield check_disk(machine.probes)


def check_gpu(machine: Machine) -> Finding:
    """Fills in the machine's GPUs."""
    try:
        machine.gpus = machine.probes.gpus()
        unused = [] if machine.gpus else machine.probes.driver_sees()
    except Exception as problem:  # of a driver that does not go with torch
        remedy = "update the driver, or install the build of torch that goes with it"
        return Finding("GPU", False, f"{first_line(problem)}: no run can use the GPUs", remedy)
    if machine.gpus:
        names = dict.fromkeys(machine.gpus)
        counted = [f"{machine.gpus.count(gpu)} x {gpu[0]}, {gpu[1] / GB:.0f} GB" for gpu in names]
        return Finding("GPU", True, "; ".join(counted))
    if unused:
        what = f"the driver sees {len(unused)}, and torch {torch.__version__} cannot use them: runs would be on the CPU"
        return Finding("GPU", False, what, "install a build of torch for CUDA: pip install torch", needed=False)
    what = "none: real models train and stream on one; the toy worlds need none"
    return Finding(
        "GPU", False, what, "take a machine with NVIDIA GPUs, or ask about one: --gpus N --gpu NAME", needed=False
    )


def check_processor(machine: Machine) -> Finding:
    """Fills in the machine's memory."""
    machine.memory = machine.probes.memory()
    sizes = f"{machine.probes.cores()} cores, {machine.memory / GB:.1f} GB of memory"
    if machine.probes.has_bf16() or machine.gpus:
        return Finding("processor", True, f"{sizes}{', bf16 instructions' if machine.probes.has_bf16() else ''}")
    what = f"{sizes}, no bf16 instructions: a run in bf16 is several times slower here"
    return Finding("processor", False, what, "add training.precision=fp32 to what trains on these cores", needed=False)


def check_attention(machine: Machine) -> Iterator[Finding]:
    """Each backend on a small tensor, forward and backward. One that a run can do with is enough."""
    device, probes = machine.device, machine.probes

    def trial(backend: Backend) -> str:
        probes.attention(backend, device)
        return f"runs on {device.type}, forward and backward"

    lack = Lack("no run can use it", "reinstall torch: " + install("torch"), needed=True)
    yield tried("attention sdpa", lambda: trial(Backend.SDPA), lack)
    yield tried("attention plain", lambda: trial(Backend.PLAIN), lack)
    others = Lack("networks take attention sdpa instead", install("flash-attn") + " --no-build-isolation")
    if device.type == "cpu":  # compiling it takes a minute here, for no run that trains
        what = "no backward on a CPU: networks take attention sdpa or plain instead"
        yield Finding("attention flex", False, what, "take a machine with a GPU", needed=False)
    else:
        yield tried("attention flex", lambda: trial(Backend.FLEX), Lack(others.without, "install a C compiler"))
    found = [version for version, module in FLASH.items() if probes.has_module(module)]
    if not found:
        what = f"no {' nor '.join(FLASH.values())}: {others.without}"
        yield Finding("attention flash", False, what, others.remedy, needed=False)
    elif device.type == "cpu":
        what = f"{found[0]} is installed, and runs on GPUs alone: {others.without}"
        yield Finding("attention flash", False, what, "take a machine with a GPU", needed=False)
    else:
        yield tried("attention flash", lambda: f"{found[0]}: {trial(Backend.FLASH)}", others)


def check_triton(machine: Machine) -> Finding:
    without = "sparse attention takes its slower reference instead"
    if not machine.probes.has_module("triton"):
        return Finding("Triton", False, f"not installed: {without}", "pip install triton", needed=False)
    if not machine.gpus:
        return Finding(
            "Triton",
            False,
            f"installed, and its kernels run on GPUs alone: {without}",
            "take a machine with a GPU",
            needed=False,
        )

    def trial() -> str:
        machine.probes.triton(machine.device)
        return f"{machine.probes.version('triton')}, and our kernels run"

    return tried("Triton", trial, Lack(without, "install the Triton that came with this torch, and a C compiler"))


def check_codec(probes: Probes) -> Finding:
    def trial() -> str:
        probes.codec()
        return f"diffusers {probes.version('diffusers')}"

    return tried("VAE", trial, Lack("no Wan video is encoded or decoded", install("diffusers", "accelerate")))


def check_text_encoder(probes: Probes) -> Finding:
    def trial() -> str:
        probes.text_encoder()
        return f"transformers {probes.version('transformers')}"

    return tried("text encoder", trial, Lack("no prompt is encoded", install("transformers", "tokenizers", "ftfy")))


def check_video(probes: Probes) -> Finding:
    def trial() -> str:
        probes.video()
        return f"an MP4 was written by PyAV {probes.version('av')}"

    return tried("video", trial, Lack("no video is written or read", install("av")))


def check_slurm(probes: Probes) -> Finding:
    without = "runs of several nodes need another launcher"
    remedy = "use torchrun on one node, or a login node of a cluster for sbatch"

    def trial() -> str:
        if (found := probes.partitions()) is None:
            raise OSError("no sinfo and srun")
        return f"partitions {', '.join(found)}" if found else "it answers, and has no partition"

    return tried("Slurm", trial, Lack(without, remedy))


def check_disk(probes: Probes) -> Finding:
    """Whether there is room at all. How much a recipe needs is for planning/recipe_checks.py to say."""
    free = probes.free_disk(Path.cwd())
    if not os.access(Path.cwd(), os.W_OK):
        return Finding(
            "disk", False, "this folder cannot be written to: no run can be saved", "change to another folder"
        )
    return Finding("disk", free > 0, f"{free / GB:.1f} GB free here", "" if free else "free some space here")
