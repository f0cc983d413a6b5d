"""The live machine as a fingerprint: no secrets, no host names, and a board whatever it cannot tell."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_repro import probe


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
