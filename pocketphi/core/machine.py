"""What this machine has: processor features, memory, disk, accelerators. Only `give_back_memory` changes anything."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import shutil
import subprocess
from pathlib import Path

# The instruction sets our kernels ask for, by the name the kernel reports them under.
_X86 = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
_ARM = ("asimd", "asimddp", "i8mm", "bf16", "sve")


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    for line in _cpuinfo():
        if line.lower().startswith(("model name", "hardware")):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The vector instruction sets of this processor that kernels may use."""
    for line in _cpuinfo():
        if line.lower().startswith(("flags", "features")):
            have = set(line.split(":", 1)[1].split())
            return [f for f in (*_X86, *_ARM) if f in have]
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return ["asimd", "asimddp"]
    return []


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def memory_bytes() -> int:
    """Physical memory, or the container's limit when that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            total = min(total, int(limit.read_text()))
        except (OSError, ValueError):
            continue
    return total


def memory_available_bytes() -> int:
    """Memory that can be taken without swapping; all of it where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, memory_bytes())
    except (OSError, ValueError):
        pass
    return memory_bytes()


def disk_free_bytes(folder: Path | str = ".") -> int:
    """Free space where `folder` is, or will be."""
    path = Path(folder).resolve()
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def gpus() -> list[dict[str, object]]:
    """NVIDIA GPUs as `[{"name", "memory_bytes"}]`, asked of nvidia-smi; empty when there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        listing = subprocess.run(
            [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    found: list[dict[str, object]] = []
    for line in listing.splitlines():
        name, _, mebibytes = line.rpartition(",")
        if name and mebibytes.strip().isdigit():
            found.append({"name": name.strip(), "memory_bytes": int(mebibytes) * 2**20})
    return found


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library keeps it (glibc): a process that made a
    corpus would hold some 150 MB of nothing while it trains."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
