"""Write the command-line reference and the pinned list of verbs and flags from the code itself.

`make docs` runs it; a test fails when either file is stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from pocketphi.cli import phi


def commands(command: click.Command = phi, name: str = "phi") -> Iterator[tuple[str, click.Command]]:
    """Yield every command with its full name, groups before their members."""
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=name)
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found is not None:
                yield from commands(found, f"{name} {child}")


def reference() -> str:
    """Return docs/reference/cli.md."""
    parts = [
        "# Command-line reference",
        "",
        "Generated from the code by `make docs`. Exit codes: 0 done, 1 failed, 2 wrong usage.",
        "Messages go to stderr, data to stdout.",
    ]
    for name, command in commands():
        parts += ["", f"## {name}", "", (command.help or "").strip()]
        rows = [_row(parameter) for parameter in command.params]
        if rows:
            parts += ["", "| option | default | what |", "|---|---|---|", *rows]
    return "\n".join(parts).rstrip() + "\n"


def pinned() -> str:
    """Return one line per verb with its flags: what a user's scripts rely on."""
    lines = []
    for name, command in commands():
        flags = []
        for parameter in command.params:
            if isinstance(parameter, click.Argument):
                flags.append((parameter.human_readable_name or "").upper())
            else:
                flags += sorted([*parameter.opts, *parameter.secondary_opts])
        lines.append(" ".join([name, *flags]))
    return "\n".join(lines) + "\n"


def _row(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Argument):
        name, text = (parameter.human_readable_name or "").upper(), getattr(parameter, "help", "") or ""
        default = "required" if parameter.required else ""
    else:
        assert isinstance(parameter, click.Option)
        name, text = ", ".join([*parameter.opts, *parameter.secondary_opts]), parameter.help or ""
        shown = parameter.default
        # 0 is a default worth showing, and equal to False.
        nothing = shown is None or shown is False or shown == () or shown == []
        default = "" if nothing or callable(shown) or "UNSET" in str(shown) else str(shown)
    return f"| `{name}` | {default} | {' '.join(text.split())} |".replace("|  |", "| |")


def main() -> None:
    """`python -m pocketphi.cli.reference REFERENCE.md PINNED.txt`"""
    for path, text in zip(map(Path, sys.argv[1:3]), (reference(), pinned())):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
