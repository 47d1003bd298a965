"""A recipe file: every mistake is named before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocketphi import recipe
from pocketphi.core.errors import ConfigError, UserError
from pocketphi.recipe.plan import Forecast


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("corpse: {}", "did you mean 'corpus'"),
        ("name: x", "names no stage"),
        ("corpus: [1]", "must be a mapping"),
        ("corpus: {}\nseed: often", "seed must be an integer"),
    ],
)
def test_mistakes_in_the_frame(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe.read(write(tmp_path, text))


def test_a_misspelt_key_names_file_section_and_nearest(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    found = recipe.read(write(tmp_path, "quantize: {tipe: q4_0}"))
    with pytest.raises(ConfigError, match=r"r\.yaml: quantize: unknown key 'tipe'.*'type'"):
        recipe.plan(found)


def test_stages_come_in_the_order_of_a_models_life(tmp_path: Path) -> None:
    found = recipe.read(write(tmp_path, "quantize: {}\ntrain: {}\ncorpus: {}"))
    assert [s.name for s in found.stages()] == ["corpus", "train", "quantize"]
    providers = {s.name: found.providers(s) for s in found.stages()}
    assert providers["quantize"] == {"checkpoint": "train"}


def test_a_run_that_cannot_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"'train' needs about 80\.0 GB of memory, this machine has 24\.0 GB"):
        Forecast({"train": {"peak_memory_bytes": 80e9}}, 24_000_000_000, 10**12).check()
    with pytest.raises(UserError, match=r"writes about 5\.00 GB, 1\.00 GB are free"):
        Forecast({"train": {"disk_bytes": 5e9}}, 24_000_000_000, 10**9).check()
    Forecast({"train": {"disk_bytes": 5e8, "peak_memory_bytes": 1e9}}, 24_000_000_000, 10**9).check()


DATA = """
corpus: {inputs: [python-docs, "${data}/a.jsonl", {path: "${data}/b", quality: web}], benchmarks: ["${data}/c"]}
eval: {data_dir: "${data}/benchmarks", suite: quick}
"""


def test_the_data_folder_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETPHI_DATA", str(tmp_path))
    found = recipe.read(write(tmp_path, DATA))
    assert found.sections["corpus"]["inputs"][1:] == [
        f"{tmp_path}/a.jsonl",
        {"path": f"{tmp_path}/b", "quality": "web"},
    ]
    assert found.sections["eval"]["data_dir"] == f"{tmp_path}/benchmarks" and not found.left_out


def test_without_a_data_folder_its_entries_are_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POCKETPHI_DATA", raising=False)
    (tmp_path / "x" / "y").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "x" / "y")
    found = recipe.read(write(tmp_path, DATA))
    assert found.sections["corpus"] == {"inputs": ["python-docs"], "benchmarks": []}
    assert found.sections["eval"] == {"suite": "quick"}
    assert len(found.left_out) == 4


def test_a_data_folder_that_is_named_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETPHI_DATA", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="POCKETPHI_DATA"):
        recipe.read(write(tmp_path, DATA))
