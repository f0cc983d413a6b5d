"""The live machine as a fingerprint: what was observed, not what was asked for.

torch is imported inside functions only. Environment variables come from an allow-list; host names and device serial
numbers are hashed; nothing here holds a path of the user's.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .fingerprint import Fingerprint, Value

if TYPE_CHECKING:
    import torch

ENVIRONMENT = (
    "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUDA_LAUNCH_BLOCKING", "NCCL_ALGO", "NCCL_PROTO",
    "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS", "NCCL_NVLS_ENABLE", "NCCL_COLLNET_ENABLE", "NCCL_P2P_NET_DISABLE",
    "NCCL_LAUNCH_MODE", "VLLM_BATCH_INVARIANT", "VLLM_ATTENTION_BACKEND", "TORCHINDUCTOR_FREEZING", "PYTHONHASHSEED",
)  # fmt: skip
"""Variables that change numerics. Only these are read, so that no secret can slip into a golden."""


def torch_facts(device: torch.device) -> Fingerprint:
    """torch, its backends and switches as they stand now, and the device."""
    import torch

    backends: Any = torch.backends
    facts: dict[str, Value] = {
        "torch": torch.__version__,
        "device": device.type,
        "device_class": device_class(device),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "blas": "mkl" if torch.backends.mkl.is_available() else "other",
        "mkldnn": bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled),
        "autocast": torch.is_autocast_enabled(device.type),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "fp32_precision.mkldnn": _read(lambda: backends.mkldnn.matmul.fp32_precision),
        "sdp.flash": torch.backends.cuda.flash_sdp_enabled(),
        "sdp.mem_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "sdp.math": torch.backends.cuda.math_sdp_enabled(),
        "sdp.cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
    }
    return {**facts, **_cuda_facts(device)} if device.type == "cuda" else facts


def device_class(device: torch.device) -> str:
    """`cpu`, or `cuda-sm90` by compute capability."""
    import torch

    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda-sm{major}{minor}"


def _cuda_facts(device: torch.device) -> dict[str, Value]:
    import torch

    backends: Any = torch.backends
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "gpu.sm_count": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version(),
        "cublas": _version_of("nvidia-cublas", "nvidia-cublas-cu13", "nvidia-cublas-cu12"),
        "nccl": _read(lambda: ".".join(map(str, torch.cuda.nccl.version()))),
        "triton": _version_of("triton"),
        "fp32_precision.cuda": _read(lambda: matmul.fp32_precision),
        "fp32_precision.cudnn": _read(lambda: cudnn.conv.fp32_precision),
        "reduced_precision.bf16": _read(lambda: str(matmul.allow_bf16_reduced_precision_reduction)),
        "reduced_precision.fp16": _read(lambda: str(matmul.allow_fp16_reduced_precision_reduction)),
        "preferred_blas": _read(lambda: str(torch.backends.cuda.preferred_blas_library())),
        "cudnn.deterministic": cudnn.deterministic,
        "cudnn.benchmark": cudnn.benchmark,
    }


def machine() -> Fingerprint:
    """Host, tools, allow-listed environment and NVIDIA driver: what is known without torch."""
    facts: dict[str, Value] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": _hashed(platform.node()),
        "os": f"{platform.system()} {platform.release()}",
        "arch": platform.machine(),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "python": platform.python_version(),
        "pytest_repro": __version__,
        "cpu_model": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "numpy": _version_of("numpy"),
        "tokenizers": _version_of("tokenizers"),
    }
    facts |= {f"env.{name}": os.environ[name] for name in ENVIRONMENT if name in os.environ}
    return {**facts, **nvidia()}


def peak_memory() -> dict[str, int]:
    """Most memory that this process has held since it began, bytes, by kind; a kind that cannot be told is left out.

    `resident`: Linux's VmHWM (its `ru_maxrss` would count the parent's memory in). `cuda`: what torch allocated on GPUs.
    """
    found: dict[str, int] = {}
    with suppress(OSError):
        status = Path("/proc/self/status").read_text("ascii", "replace")
        if peak := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE):
            found["resident"] = int(peak[1]) * 1024
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found["cuda"] = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return found


def nvidia() -> dict[str, Value]:
    """Driver and board of the first visible NVIDIA GPU, through NVML; empty without one.

    A getter that a board lacks is left out.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    try:
        handle = _first_visible()
        readings: Mapping[str, Callable[[], Any]] = {
            "driver": pynvml.nvmlSystemGetDriverVersion,
            "gpu.name": lambda: pynvml.nvmlDeviceGetName(handle),
            "gpu.count": pynvml.nvmlDeviceGetCount,
            "gpu.uuid": lambda: _hashed(_text(pynvml.nvmlDeviceGetUUID(handle))),
            "gpu.vbios": lambda: pynvml.nvmlDeviceGetVbiosVersion(handle),
            "gpu.ecc": lambda: bool(pynvml.nvmlDeviceGetEccMode(handle)[0]),
            "gpu.ecc_uncorrected": lambda: pynvml.nvmlDeviceGetTotalEccErrors(
                handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
            ),
            "gpu.mig": lambda: bool(pynvml.nvmlDeviceGetMigMode(handle)[0]),
            "gpu.power_limit_watts": lambda: pynvml.nvmlDeviceGetPowerManagementLimit(handle) // 1000,
            "gpu.max_sm_clock_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "gpu.throttle_reasons": lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
            "gpu.other_processes": lambda: sum(
                p.pid != os.getpid() for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            ),
            "gpu.cuda_driver_api": pynvml.nvmlSystemGetCudaDriverVersion,
        }
        return {name: value for name, get in readings.items() if (value := _reading(get)) is not None}
    except pynvml.NVMLError:
        return {}
    finally:
        pynvml.nvmlShutdown()


def visible_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the GPUs that CUDA would show to this process, as CUDA_VISIBLE_DEVICES spells them, without CUDA."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        count = int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return tuple(map(str, range(count)))
    names = [name.strip() for name in named.split(",")]
    known = list(
        takewhile(lambda n: n.startswith(("GPU-", "MIG-")) or (n.isascii() and n.isdecimal() and int(n) < count), names)
    )
    return tuple(known) if len(set(known)) == len(known) else ()  # CUDA shows none of a list that names one twice


def _first_visible() -> Any:
    """NVML's handle of CUDA's device 0: NVML itself does not look at CUDA_VISIBLE_DEVICES."""
    import pynvml

    name = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if name.startswith(("GPU-", "MIG-")):
        return pynvml.nvmlDeviceGetHandleByUUID(name)
    return pynvml.nvmlDeviceGetHandleByIndex(int(name) if name.isdigit() else 0)


def _reading(get: Callable[[], Any]) -> Value:
    import pynvml

    try:
        value = get()
    except (pynvml.NVMLError, AttributeError):
        return None
    return _text(value) if isinstance(value, bytes | str) else value


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def commit(folder: Path) -> dict[str, Value]:
    """Commit of the repository around a folder, and whether the work tree is dirty; empty outside of one."""
    try:
        import git
    except ImportError:  # GitPython refuses to load without a git program
        return {}
    try:
        repository = git.Repo(folder, search_parent_directories=True)
        return {"commit": repository.head.commit.hexsha, "dirty": repository.is_dirty(untracked_files=False)}
    except (git.InvalidGitRepositoryError, git.NoSuchPathError, git.GitCommandError, OSError, ValueError):
        return {}


def author(folder: Path) -> str:
    """Name and address from the git configuration, for a review; the login name outside of git."""
    import getpass

    try:
        import git
    except ImportError:
        return getpass.getuser()

    def setting(name: str) -> str:
        try:
            return str(git.Git(folder).config("--get", name)).strip()
        except (git.GitCommandError, git.GitCommandNotFound):
            return ""

    name, mail = setting("user.name"), setting("user.email")
    return f"{name} <{mail}>" if name and mail else name or mail or getpass.getuser()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version_of(*packages: str) -> str | None:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def _read(get: Callable[[], Any]) -> Value:
    """A torch switch; None where its getter refuses because legacy and new settings were mixed."""
    try:
        value: Value = get()
    except RuntimeError:
        return None
    return value


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
