"""The live page: what the browser asks for, over real HTTP, while a log grows and is cut."""

from __future__ import annotations

import json
import re
from http.client import HTTPConnection
from pathlib import Path

import pytest
from train.toy_training import toy_phases, toy_trainer

from pocketphi.core.errors import UserError
from pocketphi.train import journal, live


def ask(address: str, path: str) -> tuple[int, bytes]:
    host, port = re.fullmatch(r"http://([\d.]+):(\d+)/", address).groups()  # type: ignore[union-attr]
    connection = HTTPConnection(host, int(port), timeout=10)
    connection.request("GET", path)
    reply = connection.getresponse()
    body = reply.read()
    connection.close()
    return reply.status, body


def test_the_page_gets_what_is_new(tmp_path: Path) -> None:
    run = tmp_path / "nano"
    stage = run / "train.partial"
    stage.mkdir(parents=True)
    log = stage / "metrics.jsonl"
    with live.page(run, 0) as address:
        assert address.startswith("http://127.0.0.1:")
        status, body = ask(address, "/")
        assert status == 200 and b"<canvas" not in body and b"poll()" in body
        # Nothing comes from elsewhere.
        assert not re.search(rb"""(?:src|href)\s*=|https?://|@import""", body)
        assert ask(address, "/../../etc/passwd")[0] == 404
        assert ask(address, "/data?offset=x")[0] == 400
        assert json.loads(ask(address, "/data")[1])["rows"] == []
        log.write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "lo')
        found = json.loads(ask(address, "/data")[1])
        assert found["stage"] == "train" and found["rows"] == [{"step": 1, "loss": 9.0}]
        with log.open("a") as file:
            file.write('ss": 8.0}\n')
        more = json.loads(ask(address, f"/data?stage=train&offset={found['offset']}")[1])
        assert more["rows"] == [{"step": 2, "loss": 8.0}] and not more["reset"]
        log.write_text('{"step": 1, "loss": 9.0}\n')  # the run went back to a checkpoint
        again = json.loads(ask(address, f"/data?stage=train&offset={more['offset']}")[1])
        assert again["reset"] and again["rows"] == [{"step": 1, "loss": 9.0}]
        with pytest.raises(UserError, match="cannot be opened"):
            live.server(run, int(address.rsplit(":", 1)[1].strip("/")))


def test_figures_of_a_real_run_reach_the_page_and_a_tracker(toy_shards: Path, tmp_path: Path) -> None:
    class Kept:
        lines: dict[int, dict[str, float]] = {}  # noqa: RUF012

        def log(self, step: int, figures: dict[str, float]) -> None:
            self.lines.setdefault(step, {}).update(figures)

        def close(self) -> None:
            self.lines[-1] = {}

    trainer = toy_trainer(toy_shards, tmp_path / "run", toy_phases())
    trainer.journal.trackers = [Kept()]
    trainer.run()
    assert -1 in Kept.lines
    found = live.answer(tmp_path / "run", "", 0)
    steps = {row["step"]: row for row in found["rows"] if "loss" in row}
    assert len(steps) == 18
    for step, row in steps.items():
        assert Kept.lines[step]["loss"] == row["loss"]
    monitored = steps[10]
    assert {"attention", "mlp", "table", "norms"} <= set(monitored["update_ratios"])
    assert Kept.lines[10]["update_ratios/mlp"] == monitored["update_ratios"]["mlp"] > 0
    assert monitored["attention_logit_max"] > 0 and monitored["z_loss"] > 0


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for module in ("tensorboard", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"'{name}', which is not installed") as error:
        journal.trackers([name], tmp_path, {})
    assert f"pip install {name}" in str(error.value.hint)
