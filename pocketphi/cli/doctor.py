"""`phi doctor`: what this machine has, and what it can therefore run."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import typer

from pocketphi import __version__
from pocketphi.cli.common import JsonOption, print_json
from pocketphi.core import machine

app = typer.Typer(add_completion=False, help="Show what this machine has and what it can run.")

# What each optional package is for; the name is the distribution's.
_OPTIONAL = {
    "torch": "training",
    "pyarrow": "documents",
    "resiliparse": "HTML pages",
    "fastwarc": "crawl archives",
    "matplotlib": "reports",
    "huggingface_hub": "downloads",
}

# Bytes a chat needs: weights at 4.5 bits, a 16-bit cache at the given context, and the program itself.
_PROGRAM_BYTES = 150_000_000
_MODELS = (
    # name, parameters, key-value bytes per token (16 bit), context; shapes of the Phi-3 report
    ("phi-3-mini, 4k context", 3_821_079_552, 393_216, 4096),
    ("phi-3-mini, 128k context", 3_821_079_552, 393_216, 131_072),
    ("phi-3-medium, 4k context", 13_960_238_080, 204_800, 4096),
)


@app.command()
def doctor(json: JsonOption = False) -> None:
    """Show processor, memory, disk, GPU, optional parts, and what fits."""
    figures = examine()
    if json:
        print_json(figures)
        return
    print(f"pocketphi {figures['version']}, Python {figures['python']}, {figures['platform']}")
    print(f"processor   {figures['cpu']}, {figures['num_cores']} cores")
    print(f"features    {', '.join(figures['cpu_features']) or 'none that our kernels use'}")
    print(f"engine      {figures['engine']}")
    print(
        f"memory      {figures['memory_bytes'] / 1e9:.1f} GB, {figures['memory_available_bytes'] / 1e9:.1f} GB free"
    )
    print(f"disk here   {figures['disk_free_bytes'] / 1e9:.1f} GB free")
    gpus = figures["gpus"]
    print(
        "gpu         "
        + (", ".join(f"{g['name']} ({g['memory_bytes'] / 1e9:.0f} GB)" for g in gpus) or "none")
    )
    print("parts")
    for name, version in figures["packages"].items():
        missing = f"not installed: no {_OPTIONAL[name]} (pip install 'pocketphi[make]')"
        print(f"  {name:<16} {version or missing}")
    print("what fits")
    for line in figures["fits"]:
        state = "yes" if line["fits"] else f"no, {line['missing_bytes'] / 1e9:.1f} GB of memory missing"
        print(f"  chat with {line['model']:<26} {line['needed_bytes'] / 1e9:>6.1f} GB   {state}")
    print(
        f"  make the nano recipe                {'yes' if figures['can_make'] else 'no: ' + figures['cannot_make_why']}"
    )


def examine() -> dict[str, Any]:
    """Return every figure that `phi doctor` shows; flat values where that makes sense."""
    packages = {name: _version(name) for name in _OPTIONAL}
    available = machine.memory_available_bytes()
    fits = []
    for name, parameters, cache_bytes_per_token, context in _MODELS:
        needed = int(parameters * 4.5 / 8) + cache_bytes_per_token * context + _PROGRAM_BYTES
        fits.append(
            {
                "model": name,
                "needed_bytes": needed,
                "fits": needed <= available,
                "missing_bytes": max(0, needed - available),
            }
        )
    absent = [n for n in ("torch", "pyarrow", "resiliparse", "matplotlib") if not packages[n]]
    why = f"{', '.join(absent)} not installed" if absent else ""
    if not why and available < 2_000_000_000:
        why = f"2 GB of memory needed, {available / 1e9:.1f} GB free"
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": machine.cpu_name(),
        "cpu_features": machine.cpu_features(),
        "num_cores": machine.num_cores(),
        "engine": _engine(),
        "memory_bytes": machine.memory_bytes(),
        "memory_available_bytes": available,
        "disk_free_bytes": machine.disk_free_bytes(),
        "gpus": machine.gpus(),
        "packages": packages,
        "fits": fits,
        "can_make": not why,
        "cannot_make_why": why,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _engine() -> str:
    """Name the kernels that a chat on this machine would use."""
    from pocketphi.engine import describe_backend

    return describe_backend()
