"""Logits against transformers' Phi3ForCausalLM (and Llama), in full, cached, and through folders."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from pocketphi import model as phi_model  # noqa: E402
from pocketphi.model import KVCache, ModelConfig, PhiForCausalLM  # noqa: E402
from pocketphi.model.layers import RMSNorm  # noqa: E402

TOLERANCE = 1e-5
SHORT = [1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.8, 2.0]
LONG = [1.1, 1.3, 2.0, 4.0, 8.0, 16.0, 30.0, 60.0]


def tiny(**changes) -> ModelConfig:
    values = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    return ModelConfig(**{**values, **changes})


def longrope(**extra) -> dict:
    return {
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 12,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG, **extra},
    }


CASES = {
    "mha": tiny(),
    "gqa": tiny(num_key_value_heads=2),
    "mqa-tied": tiny(num_key_value_heads=1, tie_word_embeddings=True),
    "window": tiny(sliding_window=5),
    "longrope": tiny(**longrope()),
    "longrope-gqa-window": tiny(num_key_value_heads=2, sliding_window=7, **longrope()),
    "su": tiny(**{**longrope(), "rope_scaling": {**longrope()["rope_scaling"], "type": "su"}}),
    "attention-factor": tiny(**longrope(attention_factor=1.37)),
}


def make(config: ModelConfig, seed: int = 0) -> PhiForCausalLM:
    model = PhiForCausalLM(config)
    model.reset_parameters(seed=seed)
    with torch.no_grad():  # larger weights: tiny logits would hide errors behind the tolerance
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(5)
    return model.eval()


def peer(model: PhiForCausalLM, folder: Path):
    phi_model.save(model, folder)
    other = transformers.Phi3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return other.eval()


def tokens(num_tokens: int, rows: int = 2, seed: int = 1):
    return torch.randint(3, 97, (rows, num_tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_tokens", [1, 11, 12, 13, 40])
def test_full_logits(name, num_tokens, tmp_path):
    model = make(CASES[name])
    ids = tokens(num_tokens)
    with torch.no_grad():
        expected = peer(model, tmp_path)(ids).logits
        actual = model(ids)
    assert expected.std() > 0.3
    assert (actual - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_cached_logits(name, tmp_path):
    """Fed in pieces (several tokens, then one by one) past the window and the LongRoPE switch."""
    model = make(CASES[name])
    other = peer(model, tmp_path)
    ids = tokens(30)
    cache = KVCache(model.config)
    pieces = [0, 4, 9, *range(10, 31)]
    with torch.no_grad():
        for start, end in itertools.pairwise(pieces):
            actual = model(ids[:, start:end], cache=cache)
            # transformers recomputes its cache at the switch inside generate(); without a cache it
            # has nothing to recompute, so the uncached pass is the judge.
            expected = other(ids[:, :end], use_cache=False).logits[:, start:end]
            assert actual.shape == expected.shape
            assert (actual - expected).abs().max() < TOLERANCE
    assert cache.length == 30
    assert bool(cache.num_recomputed) == (model.config.rope_scaling is not None)


@pytest.mark.parametrize("name", ["gqa", "window", "longrope"])
def test_cache_against_the_cache_of_transformers(name, tmp_path):
    model = make(CASES[name])
    other = peer(model, tmp_path)
    ids = tokens(12)
    ours, theirs = KVCache(model.config), transformers.DynamicCache(config=other.config)
    with torch.no_grad():
        for start, end in [(0, 6), *((i, i + 1) for i in range(6, 12))]:
            expected = other(ids[:, start:end], past_key_values=theirs, use_cache=True).logits
            actual = model(ids[:, start:end], cache=ours)
            assert (actual - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["gqa", "longrope", "longrope-gqa-window", "mqa-tied"])
def test_greedy_text_equals_generate_of_transformers(name, tmp_path):
    """Crosses the switch at 12/13 tokens; transformers' generate() recomputes its cache there."""
    model = make(CASES[name])
    other = peer(model, tmp_path)
    ids = tokens(8, rows=1)
    expected = other.generate(
        ids, max_new_tokens=20, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(ids)
    )[0, 8:].tolist()
    actual = phi_model.generate(model, ids[0].tolist(), max_new_tokens=20, stop_ids=())
    assert actual == expected


@pytest.mark.parametrize("name", ["mha", "mqa-tied", "longrope"])
def test_folder_of_transformers_loads(name, tmp_path):
    other = transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**{**CASES[name].to_hf(), "initializer_range": 0.1})
    ).eval()
    other.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = phi_model.load(tmp_path)
    ids = tokens(20)
    with torch.no_grad():
        assert (model(ids) - other(ids).logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("tied", [True, False])
def test_llama_folder_loads(tied, tmp_path):
    """Separate q/k/v and gate/up weights go into the same fused blocks."""
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_theta=5000.0,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        dtype="float32",
    )
    other = transformers.LlamaForCausalLM(config).eval()
    other.save_pretrained(tmp_path)
    model = phi_model.load(tmp_path)
    ids = tokens(20)
    with torch.no_grad():
        assert (model(ids) - other(ids).logits).abs().max() < TOLERANCE


def test_bfloat16_stays_near_float32(tmp_path):
    """The rotary tables must not be cast with the weights: at position 4000 that would be noise."""
    config = tiny(max_position_embeddings=8192)
    model = make(config)
    ids = tokens(12, rows=1)
    positions = torch.arange(4000, 4012)[None]
    with torch.no_grad():
        expected = model(ids, positions_BT=positions)
        actual = model.to(torch.bfloat16)(ids, positions_BT=positions).float()
    assert (actual - expected).std() / expected.std() < 0.03


def test_rmsnorm_against_float64():
    norm = RMSNorm(48, 1e-5)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    x = torch.randn(3, 7, 48) * 3
    wide = x.numpy().astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * norm.weight.detach().numpy()
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=2e-6, atol=1e-6)


def test_saved_config_is_what_transformers_reads(tmp_path):
    model = make(CASES["longrope-gqa-window"])
    other = peer(model, tmp_path)
    assert other.config.sliding_window == 7
    assert other.config.num_key_value_heads == 2
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2]
