"""Downloads: from the Hub or any address, resumable, checked, never half a file under a whole one's name.

A file is written to `<name>.part` and renamed when its size and (where known) its sha256 agree. A run that
was cut continues where it stopped, provided the server still has the same file (its ETag is kept beside the
part). The Hub tells the sha256 of large files; a plain address can be given one.

An access token (HF_TOKEN) goes to the Hub's own host only, never to where that redirects.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pocketphi.core import machine, progress
from pocketphi.core.errors import DataError, UserError, did_you_mean
from pocketphi.engine.catalog import models_folder

HUB = "https://huggingface.co"
_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30.0
_RETRIES = 4
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_MAX_LISTING_BYTES = 32 << 20


@dataclass(frozen=True)
class Remote:
    """A file to fetch. `sha256`, `num_bytes` and `commit` are None where the server does not tell."""

    url: str
    name: str
    sha256: str | None = None
    num_bytes: int | None = None
    commit: str | None = None


def endpoint() -> str:
    """The Hub's address; HF_ENDPOINT names another (a mirror)."""
    return os.environ.get("HF_ENDPOINT", HUB).rstrip("/")


def pull(
    source: str,
    *,
    file: str | None = None,
    revision: str = "main",
    sha256: str | None = None,
    folder: Path | None = None,
) -> list[Path]:
    """Fetch a model; returns the paths of its files, also when they were there already.

    `source` is an address (http or https) or a Hub repository `owner/name`. Of a repository with GGUF files
    one is taken, named by `file` (a name or a part of one); otherwise the safetensors, configuration and
    tokenizer files are. Raises UserError for a source or file that is not there or ambiguous (naming what
    is), DataError when a checksum or size differs or the connection fails for good.
    """
    folder = folder or models_folder()
    if source.startswith(("http://", "https://")):
        name = Path(urllib.parse.unquote(urllib.parse.urlparse(source).path)).name
        if not name:
            raise UserError(f"{source}: the address names no file")
        return [fetch(Remote(source, name, sha256), folder / name)]
    if not _REPOSITORY.fullmatch(source):
        raise UserError(
            f"'{source}' is neither an address nor a repository OWNER/NAME",
            hint="for example: phi pull microsoft/Phi-3-mini-4k-instruct-gguf --file q4",
        )
    chosen = _choose(source, list_repository(source, revision), file)
    if sha256 is not None and len(chosen) > 1:
        raise UserError(f"--sha256 is for one file, {source} has {len(chosen)}")
    place = folder / source.replace("/", "--")
    fetched = []
    for remote in chosen:
        if sha256 is not None:
            remote = Remote(remote.url, remote.name, sha256, remote.num_bytes)
        fetched.append(fetch(remote, place / Path(remote.name).name))
    return fetched


def fetch(remote: Remote, path: Path) -> Path:
    """Download one file to `path`, continuing a part that is there; see the module's text."""
    if path.is_file():
        if _whole(path, remote):
            progress.say(f"{path} is here already")
            return path
        progress.say(f"{path} differs from what the server has: fetching it again")
    path.parent.mkdir(parents=True, exist_ok=True)
    part, note = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.json")
    for attempt in range(_RETRIES):
        try:
            _transfer(remote, part, note)
            break
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            code = getattr(error, "code", None)
            if code is not None and code < 500 and code != 429:
                raise _refused(remote.url, error) from None
            if attempt == _RETRIES - 1:
                raise DataError(
                    f"{remote.url}: {getattr(error, 'reason', None) or error}",
                    hint="what arrived is kept: run the same command again to continue",
                ) from None
            progress.say(f"the connection failed ({getattr(error, 'reason', None) or error}); trying again")
            time.sleep(min(2.0**attempt, 10) * _BACKOFF_S)
    if not _whole(part, remote):
        with contextlib.suppress(OSError):
            part.unlink()
            note.unlink()
        raise DataError(
            f"{remote.url}: the checksum or size differs from what was announced; nothing was kept",
            hint="try again; if it happens twice, the file on the server is not the one expected",
        )
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    note.unlink(missing_ok=True)
    return path


_BACKOFF_S = 1.0


def _transfer(remote: Remote, part: Path, note: Path) -> None:
    """Append to `part` until the server has no more; starts anew when the file there is another."""
    have = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": "pocketphi", "Accept-Encoding": "identity"}
    known = _read_note(note) if have else {}
    if have and remote.num_bytes is not None and have == remote.num_bytes:
        return
    if have and known.get("etag"):
        headers["Range"] = f"bytes={have}-"
        headers["If-Range"] = known["etag"]
    try:
        response = _open(urllib.request.Request(remote.url, headers=headers))
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.unlink(missing_ok=True)
        response = _open(urllib.request.Request(remote.url, headers={"User-Agent": "pocketphi"}))
    with response:
        continues = response.status == 206 and _range_start(response) == have
        if not continues:
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdigit() else remote.num_bytes
        if total is not None and total - have > machine.disk_free_bytes(part.parent):
            raise UserError(
                f"{remote.name} needs {total - have} bytes more, {machine.disk_free_bytes(part.parent)} "
                f"are free at {part.parent}"
            )
        # If-Range needs a strong validator; without one a later run starts from the beginning.
        etag = response.headers.get("ETag") or ""
        note.write_text(json.dumps({"etag": "" if etag.startswith("W/") else etag, "url": remote.url}))
        with (
            open(part, "ab" if continues else "wb") as file,
            progress.bar(remote.name, total, unit="bytes", done=have) as bar,
        ):
            while data := response.read(_CHUNK_BYTES):
                file.write(data)
                bar.advance(len(data))
                have += len(data)
        if total is not None and have < total:
            raise ConnectionError(f"the connection ended after {have} of {total} bytes")


class _SameHostToken(urllib.request.HTTPRedirectHandler):
    """Follows redirects without the access token when the host changes; never from https to http."""

    def redirect_request(self, request, file, code, message, headers, address):  # type: ignore[no-untyped-def]
        old, new = urllib.parse.urlparse(request.full_url), urllib.parse.urlparse(address)
        if old.scheme == "https" and new.scheme != "https":
            raise urllib.error.URLError(f"redirect from https to {new.scheme} refused")
        made = super().redirect_request(request, file, code, message, headers, address)
        if made is not None and old.netloc != new.netloc:
            made.remove_header("Authorization")
        return made


def _open(request: urllib.request.Request) -> Any:
    token = os.environ.get("HF_TOKEN")
    if token and urllib.parse.urlparse(request.full_url).netloc == urllib.parse.urlparse(endpoint()).netloc:
        request.add_header("Authorization", f"Bearer {token}")
    return urllib.request.build_opener(_SameHostToken()).open(request, timeout=_TIMEOUT_S)


def list_repository(
    repository: str, revision: str = "main", *, kind: Literal["models", "datasets"] = "models"
) -> list[Remote]:
    """Return the files of a Hub repository at a revision, at the commit it stands for now.

    Raises UserError when the Hub refuses (unknown name, gated), DataError when it cannot be reached or
    answers something else than a listing.
    """
    quoted = urllib.parse.quote(revision, safe="")
    url = f"{endpoint()}/api/{kind}/{repository}/revision/{quoted}?blobs=true"
    prefix = "" if kind == "models" else f"{kind}/"
    try:
        with _open(urllib.request.Request(url, headers={"User-Agent": "pocketphi"})) as response:
            tree = json.loads(response.read(_MAX_LISTING_BYTES))
        commit = str(tree.get("sha") or revision)
        siblings = [(str(s["rfilename"]), s) for s in tree["siblings"]]
    except urllib.error.HTTPError as error:
        raise _refused(url, error) from None
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise DataError(
            f"{url}: {getattr(error, 'reason', None) or error}", hint="is there a network connection?"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{url}: not the listing of a repository: {error}") from None
    remotes = []
    for name, entry in siblings:
        large = entry.get("lfs") or {}
        size = large.get("size", entry.get("size"))
        # The commit, not the branch: all files of one pull belong together.
        place = f"{endpoint()}/{prefix}{repository}/resolve/{commit}/{urllib.parse.quote(name)}"
        size = size if isinstance(size, int) else None
        remotes.append(Remote(place, name, large.get("sha256"), size, commit))
    return remotes


def _choose(repository: str, remotes: list[Remote], file: str | None) -> list[Remote]:
    ggufs = [r for r in remotes if r.name.endswith(".gguf")]
    if file is not None:
        exact = [r for r in remotes if r.name == file]
        found = exact or [r for r in ggufs if file.lower() in r.name.lower()]
        if len(found) == 1:
            return found
        names = [r.name for r in ggufs or remotes]
        what = "no file" if not found else f"{len(found)} files"
        raise UserError(f"{repository} has {what} matching '{file}'{did_you_mean(file, names)}")
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        listing = ", ".join(
            f"{r.name} ({r.num_bytes / 1e9:.2f} GB)" if r.num_bytes else r.name for r in ggufs
        )
        raise UserError(f"{repository} has {len(ggufs)} GGUF files: {listing}", hint="choose one with --file")
    whole = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model")
    wanted = [
        r
        for r in remotes
        if "/" not in r.name
        and (
            r.name in (*whole, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
            or r.name.endswith((".safetensors", ".safetensors.index.json"))
        )
    ]
    if not any(r.name.endswith(".safetensors") for r in wanted):
        raise UserError(f"{repository} has neither GGUF nor safetensors files")
    return wanted


def _whole(path: Path, remote: Remote) -> bool:
    if remote.num_bytes is not None and path.stat().st_size != remote.num_bytes:
        return False
    if remote.sha256 is None:
        return True
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(_CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest() == remote.sha256.lower()


def _range_start(response: Any) -> int:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match.group(1)) if match else -1


def _read_note(note: Path) -> dict[str, str]:
    try:
        tree = json.loads(note.read_text())
        return tree if isinstance(tree, dict) else {}
    except (OSError, ValueError):
        return {}


def _refused(url: str, error: Any) -> UserError:
    hints = {
        401: "the repository may be gated: accept its terms and set HF_TOKEN",
        403: "the repository may be gated: accept its terms and set HF_TOKEN",
        404: "is the name right?",
    }
    code = getattr(error, "code", None)
    return UserError(f"{url}: the server answers {code} {error.reason}", hint=hints.get(code or 0))
