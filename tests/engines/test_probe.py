"""The live machine as a fingerprint: no secrets, no host names, and a board whatever it cannot tell."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_repro import probe
from pytest_repro.session import take_gpu


def test_the_fingerprint_holds_no_secret_and_no_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import platform

    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    facts = probe.machine()
    assert facts["env.NVIDIA_TF32_OVERRIDE"] == "0"
    assert "hf_secret_value" not in map(str, facts.values())
    assert platform.node() not in map(str, facts.values())


def test_an_nvidia_board_is_read_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """A board of the data centre kind, one of whose getters is not supported: what it has is recorded."""
    import pynvml

    def missing(*_: Any) -> None:
        raise pynvml.NVMLError_NotSupported

    asked = []
    board: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda i: asked.append(i) or f"board {i}",
        "nvmlSystemGetDriverVersion": lambda: "580.65.06",
        "nvmlDeviceGetName": lambda _: b"NVIDIA H100",
        "nvmlDeviceGetCount": lambda: 8,
        "nvmlDeviceGetUUID": lambda _: "GPU-secret-serial",
        "nvmlDeviceGetVbiosVersion": lambda _: "96.00",
        "nvmlDeviceGetEccMode": lambda _: [1, 1],
        "nvmlDeviceGetTotalEccErrors": lambda *_: 0,
        "nvmlDeviceGetMigMode": missing,
        "nvmlDeviceGetPowerManagementLimit": lambda _: 700_000,
        "nvmlDeviceGetMaxClockInfo": lambda *_: 1980,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda _: 0,
        "nvmlDeviceGetComputeRunningProcesses": lambda _: [],
        "nvmlSystemGetCudaDriverVersion": lambda: 13000,
    }
    for name, get in board.items():
        monkeypatch.setattr(pynvml, name, get)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    facts = probe.nvidia()
    assert asked == [3]
    assert facts["driver"] == "580.65.06"
    assert facts["gpu.name"] == "NVIDIA H100"
    assert facts["gpu.power_limit_watts"] == 700
    assert facts["gpu.ecc"] is True
    assert "gpu.mig" not in facts
    assert "secret" not in str(facts)


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, "0 1 2 3"), ("", ""), ("2", "2"), ("3,1", "3 1"), (" 3 , 1 ", "3 1"), ("-1", ""), ("0,-1,1", "0"),
        ("0,9,1", "0"), ("NoDevFiles", ""), ("1,1", ""), ("GPU-a,GPU-b", "GPU-a GPU-b"), ("MIG-x,2", "MIG-x 2"), ("٣", ""),
    ],
)  # fmt: skip
def test_gpus_are_counted_as_cuda_would_show_them(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, found: str
) -> None:
    import pynvml

    boards: dict[str, Any] = {"nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlDeviceGetCount": lambda: 4}
    for name, get in boards.items():
        monkeypatch.setattr(pynvml, name, get)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert " ".join(probe.visible_gpus(environment)) == found


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetCount"])
def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    import pynvml

    def fails() -> None:
        raise pynvml.NVMLError_LibraryNotFound

    for name in ("nvmlInit", "nvmlShutdown", "nvmlDeviceGetCount"):
        monkeypatch.setattr(pynvml, name, fails if name == broken else lambda: None)
    assert probe.visible_gpus({}) == ()


@pytest.mark.parametrize(
    ("worker", "count", "visible", "shown"),
    [
        ("gw0", "2", "3,1", "3"), ("gw1", "2", "3,1", "1"), ("gw1", "2", None, "1"),
        ("gw5", "4", None, "1"),  # it replaces a worker that crashed
        ("gw1", "2", "3", "3"),  # fewer than workers: as it was
        ("gw1", "2", "", ""),
    ],
)  # fmt: skip
def test_a_worker_is_shown_one_gpu(
    monkeypatch: pytest.MonkeyPatch, worker: str, count: str, visible: str | None, shown: str
) -> None:
    import pynvml

    boards: dict[str, Any] = {"nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlDeviceGetCount": lambda: 4}
    for name, get in boards.items():
        monkeypatch.setattr(pynvml, name, get)
    environment = {"PYTEST_XDIST_WORKER": worker, "PYTEST_XDIST_WORKER_COUNT": count}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    take_gpu(environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == shown
