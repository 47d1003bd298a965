"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from pocketphi.cli import VERBS, reference

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pocketphi"

# Imports run one way: a package may import those of its own row and of the rows above it.
LAYERS = [
    {"core"},
    {"tokenizer"},
    {"model"},
    {"engine"},
    {"corpus"},
    {"synth", "train", "quant", "longctx", "evals", "safety", "search"},
    {"serve", "report"},
    {"recipe"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# What `pip install pocketphi` brings; everything else belongs to an extra.
HEAVY = [
    "torch",
    "pyarrow",
    "lxml",
    "resiliparse",
    "fastwarc",
    "matplotlib",
    "transformers",
    "zstandard",
    "scipy",
]
BASE = [
    "pocketphi.cli.chat", "pocketphi.cli.bench", "pocketphi.cli.models", "pocketphi.cli.doctor", "pocketphi.cli.pull",
    "pocketphi.engine", "pocketphi.tokenizer", "pocketphi.model", "pocketphi.model.config", "pocketphi.recipe",
]  # fmt: skip


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Packages of ours that a file imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [node.module or ""]
            if node.module == "pocketphi":
                names = [f"pocketphi.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("pocketphi.")}
    return found


def test_every_package_has_its_layer() -> None:
    packages = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert packages - set(LEVEL) == set()


@pytest.mark.parametrize("package", sorted(LEVEL))
def test_imports_run_one_way(package: str) -> None:
    back = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules()
        if path.relative_to(PACKAGE).parts[0] == package
        for name in imported(path)
        if LEVEL.get(name, 0) > LEVEL[package]
    ]
    assert not back, back


def test_the_check_of_the_imports_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from pocketphi import train\n    import pocketphi.cli.chat\n")
    assert imported(bad) == {"train", "cli"}


def test_no_module_passes_800_lines() -> None:
    sources = [*modules(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "native").rglob("*.[ch]pp")]
    long = {str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) > 800}
    assert not long


def test_safe_formats_only() -> None:
    """No pickle and no `torch.load`, anywhere in the package."""
    bad = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import) and any(
                a.name in ("pickle", "dill", "joblib") for a in node.names
            ):
                bad.append(f"{path}:{node.lineno}")
            if (
                isinstance(node, ast.Attribute)
                and node.attr == "load"
                and getattr(node.value, "id", "") == "torch"
            ):
                bad.append(f"{path}:{node.lineno}")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, (
                    f"{path}:{node.lineno}"
                )
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("yaml.load", "yaml.unsafe_load"):
                bad.append(f"{path}:{node.lineno}")
    assert not bad


def test_no_vague_module_names() -> None:
    vague = {"utils", "util", "helper", "helpers", "manager", "misc", "v2"}
    assert not [p for p in modules() if vague & set(p.stem.split("_"))]


def test_the_base_install_needs_nothing_heavy() -> None:
    """Chat, its engine and `phi --help` work with every heavy package forbidden."""
    program = f"""
import importlib, sys

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ImportError(f"{{name}} is not part of the base install")

sys.meta_path.insert(0, Forbid())
for name in {BASE!r}:
    importlib.import_module(name)
from pocketphi.cli import main
main(["--help"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_help_starts_without_the_engine() -> None:
    program = "import sys; from pocketphi.cli import phi; print([m for m in sys.modules if 'numpy' in m or 'torch' in m])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_every_verb_exists_and_explains_itself() -> None:
    names = {name for name, _ in reference.commands()}
    assert {f"phi {verb}" for verb in VERBS} <= names
    silent = [name for name, command in reference.commands() if not command.help]
    assert not silent


def test_verbs_and_flags_are_pinned() -> None:
    """Scripts of users rely on these; a change is made on purpose, with `make docs`."""
    assert (ROOT / "tests/goldens/cli.txt").read_text() == reference.pinned()


def test_the_reference_is_current() -> None:
    assert (ROOT / "docs/reference/cli.md").read_text() == reference.reference(), "run `make docs`"
