"""Fixtures of the training tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from train.toy_training import toy_documents, write_shards


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, toy_documents())
    return folder
