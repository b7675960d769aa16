"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from l2l.report.rundir import environment


def cpu_name() -> str:
    """The processor as it calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def load_average() -> float | None:
    """Processes that wanted to run during the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def hardware() -> dict[str, Any]:
    """Date, versions, processor, graphics card, cores, and how busy the machine is."""
    cores, load = os.cpu_count() or 1, load_average()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": environment()["versions"],
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": cores,
        "load_average": load,
        "noisy": load is not None and load > cores,
    }
