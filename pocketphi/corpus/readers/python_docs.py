"""The default corpus: the text that every Python installation carries.

Pydoc's topics (the language reference), the docstrings of the standard library, and the long
descriptions of installed packages. Nothing is imported or run: sources are parsed.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from pocketphi.corpus.document import Raw

_SKIP = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3", "turtledemo"}
_MIN_DOCSTRING_CHARS = 40
_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def python_docs() -> Iterator[Raw]:
    """Yield one record per topic, per standard module and per installed package, in a fixed order."""
    yield from _topics()
    yield from _docstrings(Path(sysconfig.get_paths()["stdlib"]))
    yield from _package_descriptions()


def _topics() -> Iterator[Raw]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    for name in sorted(topics):
        yield _raw(f"pydoc:{name}", topics[name], "Python-2.0", f"python {_VERSION} pydoc topics")


def _docstrings(stdlib: Path) -> Iterator[Raw]:
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if _SKIP.intersection(relative.parts):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        raw = _raw(f"stdlib:{module}", None, "Python-2.0", f"python {_VERSION} standard library")
        raw.path, raw.kind = str(path), "docstrings"
        yield raw


def docstrings_of(source: bytes, module: str) -> str:
    """Return the docstrings of a Python source file as one page; raises SyntaxError or ValueError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return module_text(module, ast.parse(source))


def module_text(module: str, tree: ast.Module) -> str:
    """Return a module's docstrings as one page: its own, then each class and function with a heading."""
    parts: list[str] = []
    own = ast.get_docstring(tree)
    if own:
        parts.append(f"# {module}\n\n{own}")

    def visit(node: ast.AST, prefix: str) -> None:
        for child in getattr(node, "body", []):
            if not isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            name = f"{prefix}{child.name}"
            docstring = ast.get_docstring(child)
            if docstring and len(docstring) >= _MIN_DOCSTRING_CHARS:
                if isinstance(child, ast.ClassDef):
                    title = f"class {name}"
                else:
                    title = f"{name}({ast.unparse(child.args)})"
                parts.append(f"## {title}\n\n{docstring}")
            if isinstance(child, ast.ClassDef):
                visit(child, f"{name}.")

    visit(tree, "")
    return "\n\n".join(parts)


def _package_descriptions() -> Iterator[Raw]:
    found: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if name:
            found.setdefault(name, distribution)
    for name in sorted(found):
        headers: Any = found[name].metadata
        description = headers.get("Description") or headers.get_payload()
        if isinstance(description, str) and description.strip():
            licence = headers.get("License-Expression") or headers.get("License") or ""
            licence = licence.strip().splitlines()[0][:80] if licence.strip() else ""
            version = headers["Version"]
            yield _raw(f"package:{name}", description, licence, f"python package {name} {version}")


def _raw(where: str, text: str | None, licence: str, source: str) -> Raw:
    return Raw(where=where, key=where, text=text, source=source, license=licence)
