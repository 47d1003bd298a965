"""From a checkpoint to a file that runs: every scheme and method, repeatable, faithful as claimed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pocketphi import engine, quant
from pocketphi.core.errors import ConfigError, DataError, UserError
from pocketphi.core.gguf import GgufFile
from pocketphi.quant.config import QuantConfig, tensor_types

SMALL = {"calibration_tokens": 1024, "sequence_length": 64, "fidelity_tokens": 256}


def made(folder: Path, text: Path | None, out: Path, type_: str, method: str, **more):  # type: ignore[no-untyped-def]
    settings = {**SMALL, **more}
    config = QuantConfig(type=type_, method=method, calibration=text, fidelity_text=text, **settings)  # type: ignore[arg-type]
    return quant.run(config, {"checkpoint": folder}, out=out)


@pytest.fixture(scope="module")
def files(folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One file per (type, method)."""
    base = tmp_path_factory.mktemp("files")
    runs = [("f32", "rtn"), ("q8_0", "rtn"), ("q4_0", "rtn"), ("q4_0", "importance"), ("q4_0", "gptq")]
    runs += [("q4_k_m", "rtn"), ("q4_k_m", "gptq")]
    return {run: made(folder, text_file, base / "-".join(run), *run) for run in runs}


def test_float_file_is_the_model(files: dict) -> None:
    counts = files["f32", "rtn"].counts
    # Measured in the runtime as people have it: its cache holds 16 bits.
    assert counts["kl_divergence"] < 1e-4 and counts["top1_agreement"] > 0.99
    assert abs(counts["nll_gap"]) < 1e-3


def test_order_of_fidelity(files: dict) -> None:
    """More bits and more care give less divergence; by margins that chance does not give."""
    kl = {run: a.counts["kl_divergence"] for run, a in files.items()}
    assert kl["q8_0", "rtn"] < 0.2 * kl["q4_0", "rtn"]
    assert kl["q4_0", "importance"] < kl["q4_0", "rtn"]
    assert kl["q4_0", "gptq"] < 0.8 * kl["q4_0", "rtn"]
    assert kl["q4_k_m", "gptq"] < 0.9 * kl["q4_k_m", "rtn"]


def test_errors_by_tensor(files: dict) -> None:
    notes = json.loads(files["q4_0", "gptq"].file("quantization.json").read_text())
    matrices = {k: v for k, v in notes.items() if k.startswith("blk.") and "norm" not in k}
    assert len(matrices) == 8
    assert all(v["type"] == "Q4_0" and v["error"] < v["error_rtn"] for v in matrices.values())
    assert notes["token_embd.weight"]["type"] == "Q6_K" and notes["output_norm.weight"]["type"] == "F32"


def test_file_as_the_gguf_package_sees_it(files: dict, folder: Path) -> None:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(str(files["q4_k_m", "gptq"].file("model.gguf")))
    names = [t.name for t in reader.tensors]
    # The tensors of a phi3 file as llama.cpp wants them; the head is the embedding.
    layer = ["attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"]
    blocks = [f"blk.{n}.{part}.weight" for n in range(2) for part in layer]
    assert names == ["token_embd.weight", *blocks, "output_norm.weight"]
    arch = gguf.MODEL_ARCH.PHI3
    tensor_map = gguf.get_tensor_name_map(arch, 2)
    known = {tensor_map.get_name(f"model.layers.{n}.self_attn.qkv_proj") for n in range(2)}
    assert {"blk.0.attn_qkv", "blk.1.attn_qkv"} == known
    fields = {k: f.contents() for k, f in reader.fields.items()}
    assert fields["general.architecture"] == "phi3" and "phi3" in fields["general.name"]
    assert fields["phi3.attention.sliding_window"] == 64 and fields["phi3.rope.dimension_count"] == 32
    assert fields["tokenizer.ggml.model"] == "llama" and len(fields["tokenizer.ggml.tokens"]) == 640
    assert fields["tokenizer.ggml.eos_token_id"] == 576
    values = gguf.dequantize(reader.tensors[1 + 1].data, reader.tensors[1 + 1].tensor_type)
    assert values.shape == (512, 256) and np.isfinite(values).all()


def test_chats_in_the_engine(files: dict) -> None:
    with engine.load(files["q4_0", "gptq"].path) as loaded:
        answer = loaded.chat([{"role": "user", "content": "Hi"}], max_new_tokens=4)
        assert len(answer.tokens) <= 4
        assert loaded.tokenizer.template is not None and loaded.tokenizer.template.name == "phi-3"
        assert loaded.config.visible_window == 64 and loaded.config.tie_word_embeddings


def test_repeatable(folder: Path, text_file: Path, files: dict, tmp_path: Path) -> None:
    again = made(folder, text_file, tmp_path / "again", "q4_0", "gptq")
    assert again.checksum == files["q4_0", "gptq"].checksum
    manifest = (again.path / "manifest.json").stat().st_mtime_ns
    assert made(folder, text_file, tmp_path / "again", "q4_0", "gptq").checksum == again.checksum
    assert (again.path / "manifest.json").stat().st_mtime_ns == manifest, "it was made twice"


def test_a_gguf_file_can_be_the_source(files: dict, tmp_path: Path) -> None:
    source = files["f32", "rtn"].file("model.gguf")
    direct = files["q8_0", "rtn"]
    through = made(source, None, tmp_path / "q8", "q8_0", "rtn", fidelity_tokens=0)
    ours, theirs = GgufFile(through.file("model.gguf")), GgufFile(direct.file("model.gguf"))
    assert {n: bytes(ours.raw(n)) for n in ours.tensors} == {n: bytes(theirs.raw(n)) for n in theirs.tensors}


def test_longrope_and_untied_head(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from pocketphi import model as models

    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
    config = models.ModelConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, original_max_position_embeddings=16,
        rope_scaling=scaling, torch_dtype="float32",
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = models.PhiForCausalLM(config)
    model.reset_parameters(seed=0)
    models.save(model, tmp_path / "m")
    out = quant.run(QuantConfig(type="f32", method="rtn"), {"checkpoint": tmp_path / "m"}, out=tmp_path / "g")
    file = GgufFile(out.file("model.gguf"))
    assert file.metadata["phi3.rope.scaling.attn_factor"] == pytest.approx(config.attention_factor)
    assert "output.weight" in file.tensors and file.tensors["rope_factors_long.weight"].shape == (8,)
    with engine.load(out.file("model.gguf")) as loaded:
        for length in (12, 24):  # short and long factors
            ids = list(range(3, 3 + length))
            with torch.no_grad():
                expected = model(torch.tensor([ids]))[0].numpy()
            assert np.abs(loaded.logits(ids) - expected).max() < 1e-4


def test_choices(folder: Path) -> None:
    from pocketphi.model.config import ModelConfig

    model = ModelConfig.named("phi-3-mini-4k")
    types, replaced = tensor_types(QuantConfig(type="q4_k_m"), model)
    assert not replaced and types["output.weight"] == "Q6_K" and types["token_embd.weight"] == "Q4_K"
    assert [types[f"blk.{n}.ffn_down.weight"] for n in (0, 3, 4, 5, 6, 31)] == [
        "Q6_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K",
    ]  # fmt: skip
    types, _ = tensor_types(QuantConfig(type="q4_0", layers={"blk.0.*": "q8_0", "*embd*": "f16"}), model)
    assert types["blk.0.ffn_up.weight"] == "Q8_0" and types["token_embd.weight"] == "F16"
    nano = ModelConfig.named("nano")
    types, replaced = tensor_types(QuantConfig(type="q4_k"), nano)
    assert replaced and types[replaced[-1]] in ("Q4_1", "Q8_0")
    with pytest.raises(ConfigError, match="fits no tensor"):
        tensor_types(QuantConfig(layers={"blk.99.*": "q8_0"}), model)
    with pytest.raises(ConfigError, match="did you mean 'q4_0'"):
        QuantConfig(type="q40")
    with pytest.raises(ConfigError, match="unknown type"):
        QuantConfig(layers={"*": "q3"})


def test_errors(folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs calibration text"):
        made(folder, None, tmp_path / "x", "q4_0", "gptq")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(DataError, match="too few to measure on"):
        made(folder, tmp_path / "short.txt", tmp_path / "x", "q4_0", "gptq")
    assert not (tmp_path / "x").exists(), "nothing half-written is left as an artifact"
    with pytest.raises(DataError, match="no such file"):
        made(tmp_path / "none", None, tmp_path / "x", "q4_0", "rtn")


def test_auto_says_what_it_does(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = quant.run(QuantConfig(), {"checkpoint": folder}, out=tmp_path / "a")
    said = capsys.readouterr().err
    assert out.counts["method"] == "rtn"
    assert "rounding to nearest, there is no calibration text" in said and "no fidelity report" in said


def test_plan() -> None:
    small = quant.plan(QuantConfig(), {"train": {"parameters": 4_000_000}})
    large = quant.plan(QuantConfig(), {"train": {"parameters": 4_000_000}, "sft": {"parameters": 40_000_000}})
    assert 0 < small["wall_s"] < large["wall_s"] and 4e6 * 4.5 / 8 < small["disk_bytes"] < 5e6


def test_verbs(folder: Path, text_file: Path, tmp_path: Path) -> None:
    def phi(*arguments: str) -> subprocess.CompletedProcess:
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
        command = [sys.executable, "-c", "from pocketphi.cli import main; main()", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    out = tmp_path / "g"
    done = phi("quantize", str(folder), "-t", "q8_0", "-m", "rtn", "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["bytes_Q8_0"] > 0 and Path(figures["path"]).is_file()
    measured = phi(
        "perplexity", str(out), str(text_file), "--reference", str(folder), "--max-tokens", "256",
        "--window", "64", "--json",
    )  # fmt: skip
    assert measured.returncode == 0, measured.stderr
    figures = json.loads(measured.stdout)
    assert figures["num_tokens"] == 252 and figures["nll_per_token"] > 0 and figures["bits_per_byte"] > 0
    assert figures["nll_gap"] == pytest.approx(
        figures["nll_per_token"] - figures["reference_nll_per_token"], abs=1e-5
    )
    wrong = phi("quantize", str(folder), "-t", "q5", "--out", str(out))
    assert wrong.returncode == 2 and "unknown quantisation type 'q5'" in wrong.stderr
