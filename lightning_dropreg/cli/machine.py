"""The machine and the versions that a measurement was made with."""

import os
import platform
from pathlib import Path

import lightning
import torch
from torch import nn

__all__ = ["describe_machine"]


def describe_machine(model: nn.Module) -> dict[str, str | int]:
    """Describe what a timing depends on besides the code: processor, threads, load, versions and parameters."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
