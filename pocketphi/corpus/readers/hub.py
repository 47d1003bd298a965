"""Reader of Hugging Face datasets by name (`hf:owner/name`), streamed, never downloaded whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pocketphi.core.errors import DataError, UserError
from pocketphi.corpus.config import InputConfig
from pocketphi.corpus.document import Raw


def hub_records(source: InputConfig, max_document_bytes: int) -> Iterator[Raw]:
    """Yield the rows of `hf:PATH[#CONFIG][@SPLIT]`; PATH may be a local copy of a dataset.

    Raises UserError when the `datasets` package is missing, DataError when the dataset cannot be
    opened or has no text column.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source.path} needs the package 'datasets'", hint="pip install datasets") from None
    name, _, split = source.path.removeprefix("hf:").partition("@")
    name, _, subset = name.partition("#")
    base = name.rstrip("/").rsplit("/", 1)[-1] if Path(name).is_dir() else name  # no folder of this machine
    try:
        rows = datasets.load_dataset(name, subset or None, split=split or "train", streaming=True)
    except Exception as error:  # the library raises whatever its transports raise
        raise DataError(f"{source.path}: the dataset cannot be opened: {error}") from None
    for index, row in enumerate(rows):
        where = f"{base}:{index}"
        value = row.get(source.text_field)
        if not isinstance(value, str):
            page = row.get(source.html_field)
            if not isinstance(page, str):
                yield Raw(where=where, error=f"no field '{source.text_field}' or '{source.html_field}'")
                continue
            raw = Raw(where=where, key=where, html=page)
        else:
            raw = Raw(where=where, key=where, text=value)
        size = len(value if isinstance(value, str) else page)
        if size > max_document_bytes:
            yield Raw(
                where=where, error=f"{size} characters, more than max_document_bytes ({max_document_bytes})"
            )
            continue
        raw.url, raw.license = str(row.get("url") or ""), str(row.get("license") or "")
        raw.source = str(row.get("source") or f"hf:{base}")
        if row.get("id") is not None:
            raw.key = raw.meta["original_id"] = str(row["id"])
        yield raw
