"""Documented commands are real: every `phi` line parses, and those that end quickly are run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from pocketphi.cli import phi

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs/guides").glob("*.md"))]
# A command whose line ends with this mark takes minutes, needs a GPU or a download: it must parse,
# and other tests run what it does on a small input.
LONG = re.compile(r"#.*(minutes|hours|GPU|download|interactive)")


def command_lines() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            joined = block.replace("\\\n", " ")
            found += [(page.name, line.strip()) for line in joined.splitlines() if line.strip()]
    return found


PHI = [(page, line) for page, line in command_lines() if line.startswith("phi ")]


def test_the_pages_hold_commands() -> None:
    assert len(PHI) >= 5
    assert any(line.startswith("make chat") for _, line in command_lines())


@pytest.mark.parametrize(("page", "line"), PHI)
def test_every_command_parses(page: str, line: str) -> None:
    arguments = shlex.split(line, comments=True)[1:]
    arguments = arguments[: arguments.index("|")] if "|" in arguments else arguments
    arguments = [a for a in arguments if a != "--help"]
    command: click.Command = phi
    context = click.Context(phi, info_name="phi")
    while isinstance(command, click.Group) and arguments:
        name, found, arguments = command.resolve_command(context, arguments)
        assert found is not None, f"{page}: {line}"
        command, context = found, click.Context(found, parent=context, info_name=name)
    command.make_parser(context).parse_args(list(arguments))


@pytest.mark.parametrize("page", sorted({page for page, line in PHI if not LONG.search(line)}))
def test_quick_commands_run(page: str, tmp_path: Path) -> None:
    """The quick commands of a page, in their order: later ones may use what earlier ones made."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Written files go to a scratch folder; recipes and docs are read from the project.
    for name in ("recipes", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for line in [line for of, line in PHI if of == page and not LONG.search(line)]:
        program = f'phi() {{ "{sys.executable}" -m pocketphi "$@"; }}; {line}'
        done = subprocess.run(
            ["bash", "-c", program],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=240,
        )
        assert done.returncode == 0, f"{page}: {line}\n{done.stderr[-2000:]}"


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in [*PAGES, *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)} -> {target}")
    assert not broken
