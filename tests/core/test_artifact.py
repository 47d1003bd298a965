"""Artifacts: whole or absent, verified, reused, continued after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pocketphi.core import artifact
from pocketphi.core.errors import DataError, UserError


def make(out: Path, text: str = "hello", config: dict | None = None, **more) -> artifact.Artifact:
    with artifact.create(out, kind="demo", config=config or {"a": 1}, **more) as draft:
        (draft.path / "sub").mkdir(exist_ok=True)
        (draft.path / "sub" / "text.txt").write_text(text)
        draft.counts["documents_in"] = 1
    return draft.artifact


def test_published_and_loaded(tmp_path: Path) -> None:
    made = make(tmp_path / "x")
    found = artifact.load(tmp_path / "x", kind="demo")
    assert found.checksum == made.checksum
    assert found.counts == {"documents_in": 1}
    assert found.file("sub/text.txt").read_text() == "hello"
    assert not (tmp_path / "x.partial").exists()


def test_what_is_read_back_is_what_was_made(tmp_path: Path) -> None:
    """To the order of the counts: what is shown first must not depend on whether a stage ran or was reused."""
    with artifact.create(tmp_path / "a", kind="demo", config={}) as draft:
        (draft.path / "text.txt").write_text("hello")
        draft.counts.update(zebras=3, apes=1, method="by hand", lions=2.5)
    assert json.dumps(draft.artifact.manifest) == json.dumps(artifact.load(tmp_path / "a").manifest)


def test_checksum_says_what_came_out(tmp_path: Path) -> None:
    assert make(tmp_path / "a").checksum == make(tmp_path / "b").checksum
    assert make(tmp_path / "c", text="other").checksum != make(tmp_path / "a").checksum


def test_volatile_files_do_not_count_for_the_checksum(tmp_path: Path) -> None:
    checksums = set()
    for name in ("a", "b"):
        with artifact.create(tmp_path / name, kind="demo", config={}) as draft:
            (draft.path / "figures.json").write_text("{}")
            (draft.path / "speed.json").write_text(name)
            draft.volatile.add("speed.json")
        checksums.add(draft.artifact.checksum)
    assert len(checksums) == 1
    (tmp_path / "a" / "speed.json").write_text("z")
    with pytest.raises(DataError, match=r"speed\.json"):
        artifact.load(tmp_path / "a")


def test_reused_only_for_the_same_question(tmp_path: Path) -> None:
    parent = make(tmp_path / "p")
    made = make(tmp_path / "x", parents=[parent])
    ask = {"kind": "demo", "config": {"a": 1}}
    found = artifact.reuse(tmp_path / "x", **ask, parents=[parent])
    assert found is not None and found.checksum == made.checksum
    assert artifact.reuse(tmp_path / "x", **ask) is None
    assert artifact.reuse(tmp_path / "x", kind="demo", config={"a": 2}, parents=[parent]) is None
    assert artifact.reuse(tmp_path / "none", **ask) is None


def test_sources_count(tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("1")
    found = make(tmp_path / "x", sources=[source])
    assert artifact.sources_unchanged(found)
    source.write_text("22")
    assert not artifact.sources_unchanged(found)
    assert artifact.reuse(tmp_path / "x", kind="demo", config={"a": 1}, sources=[source]) is None


@pytest.mark.parametrize("damage", ["change", "truncate", "delete", "manifest", "empty manifest"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    make(tmp_path / "x")
    file, manifest = tmp_path / "x/sub/text.txt", tmp_path / "x/manifest.json"
    if damage == "change":
        file.write_text("hellO")
    elif damage == "truncate":
        file.write_text("hel")
    elif damage == "delete":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    else:
        manifest.write_text("[]")
    with pytest.raises(DataError) as caught:
        artifact.load(tmp_path / "x")
    assert ("manifest" if "manifest" in damage else "text.txt") in str(caught.value)
    assert artifact.reuse(tmp_path / "x", kind="demo", config={"a": 1}) is None


def test_wrong_kind_and_newer_schema(tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(DataError, match="expected a corpus"):
        artifact.load(tmp_path / "x", kind="corpus")
    manifest = json.loads((tmp_path / "x/manifest.json").read_text())
    (tmp_path / "x/manifest.json").write_text(json.dumps({**manifest, "schema": 99}))
    with pytest.raises(DataError, match="newer"):
        artifact.load(tmp_path / "x")


def test_an_error_publishes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError), artifact.create(tmp_path / "x", kind="demo", config={}) as draft:
        (draft.path / "a").write_text("a")
        raise ValueError
    assert not (tmp_path / "x").exists()
    with pytest.raises(DataError, match="no artifact here"):
        artifact.load(tmp_path / "x")


def test_an_empty_result_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match="wrote no file"),
        artifact.create(tmp_path / "x", kind="d", config={}),
    ):
        pass


def test_a_stranger_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="not an artifact"):
        make(tmp_path / "home")
    assert (tmp_path / "home/thesis.txt").read_text() == "years"


def test_remade_with_another_question_replaces(tmp_path: Path) -> None:
    make(tmp_path / "x")
    made = make(tmp_path / "x", text="new", config={"a": 2})
    assert artifact.load(tmp_path / "x").checksum == made.checksum
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["x"]


def test_lineage_walks_to_the_first_ancestor(tmp_path: Path) -> None:
    grandparent = make(tmp_path / "g", text="g")
    parent = make(tmp_path / "p", text="p", parents=[grandparent])
    child = make(tmp_path / "c", text="c", parents=[parent, grandparent])
    assert [a.path.name for a in artifact.lineage(child)] == ["c", "p", "g"]


_CHILD = """
    import sys, time
    from pathlib import Path
    from pocketphi.core import artifact
    with artifact.create(Path(sys.argv[1]), kind="demo", config={"a": 1}, resumable=True) as draft:
        for i in range(40):
            part = draft.path / f"part-{i:02d}"
            if part.exists():
                continue
            artifact.write_atomic(part, str(i))
            print(i, flush=True)
            time.sleep(0.01)
    print(draft.artifact.checksum)
"""


def _child(out: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_CHILD), str(out)],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip


def test_killed_at_any_point_it_continues_to_the_same_checksum(tmp_path: Path) -> None:
    undisturbed = _child(tmp_path / "whole").communicate()[0].split()[-1]
    out = tmp_path / "killed"
    for delay in (0.0, 0.15, 0.25, 0.3):
        child = _child(out)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not (out / "manifest.json").exists() or artifact.load(out)
    assert _child(out).communicate()[0].split()[-1] == undisturbed
    assert artifact.load(out).checksum == undisturbed


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    child = _child(tmp_path / "x")
    assert child.stdout is not None
    child.stdout.readline()
    with pytest.raises(UserError, match="another process"):
        make(tmp_path / "x")
    child.kill()
    child.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_said_and_nothing_is_published(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(UserError, match="disk is full"):
            make(small / "x", text="x" * 1_000_000)
        assert not (small / "x").exists()
        made = make(small / "x", text="fits")
        assert artifact.load(small / "x").checksum == made.checksum
    finally:
        subprocess.run(["umount", str(small)], check=True)
