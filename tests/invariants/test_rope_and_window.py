"""Rotary angles, the LongRoPE switch at 4095/4096/4097, the window at 2047/2048, packed documents."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pocketphi.core.errors import UserError  # noqa: E402
from pocketphi.model import KVCache, ModelConfig, PhiForCausalLM  # noqa: E402
from pocketphi.model.attention import make_mask  # noqa: E402
from pocketphi.model.rope import RotaryEmbedding, inverse_frequencies, rotate  # noqa: E402


def tiny(**changes) -> ModelConfig:
    values = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 131072,
        "eos_token_id": 2,
        "pad_token_id": None,
        "torch_dtype": "float32",
    }
    return ModelConfig(**{**values, **changes})


def phi_like(**changes) -> ModelConfig:
    scaling = {"type": "longrope", "short_factor": [1, 1.1, 1.3, 2], "long_factor": [1.1, 4, 16, 60]}
    return tiny(original_max_position_embeddings=4096, rope_scaling=scaling, **changes)


def make(config: ModelConfig) -> PhiForCausalLM:
    model = PhiForCausalLM(config)
    model.reset_parameters(seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.mul_(10)
    return model.eval()


def tokens(num_tokens: int, seed: int = 0):
    return torch.randint(3, 50, (1, num_tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("long", [False, True])
def test_tables_and_rotation_against_float64(long):
    config = ModelConfig.named("phi-3.5-mini")
    positions = np.array([0, 1, 7, 4095, 4096, 131071])
    factors = config.rope_scaling["long_factor" if long else "short_factor"]
    exponent = np.arange(0, 96, 2) / 96
    angles = positions[:, None] / (np.array(factors) * 10000.0**exponent)
    magnitude = math.sqrt(1 + math.log(32) / math.log(4096))
    cos, sin = RotaryEmbedding(config).tables(torch.tensor(positions)[None], long)
    assert cos.dtype == torch.float32
    # At 131071 radians one float32 step of the angle is 0.008.
    bound = np.maximum(positions[:, None] * 2.0**-22, 1e-6)
    assert (np.abs(cos[0, :, 0].numpy() - np.cos(angles) * magnitude) < bound).all()
    assert (np.abs(sin[0, :, 0].numpy() - np.sin(angles) * magnitude) < bound).all()

    x = torch.randn(1, len(positions), 2, 96)
    pair = x.numpy().astype(np.float64)
    turned = (pair[..., :48] + 1j * pair[..., 48:]) * np.exp(1j * angles)[None, :, None] * magnitude
    actual = rotate(x, cos, sin).numpy()
    expected = np.concatenate((turned.real, turned.imag), axis=-1)
    assert np.abs(actual - expected)[:, :4].max() < 0.005


def test_rotation_preserves_relative_products():
    config = tiny()
    rope = RotaryEmbedding(config)
    q, k = torch.randn(2, 1, 1, 1, 8).double()
    products = []
    for offset in (0, 5, 900):
        cos, sin = rope.tables(torch.tensor([[3 + offset, 1 + offset]]))
        turned_q, turned_k = rotate(q, cos[:, :1], sin[:, :1]), rotate(k, cos[:, 1:], sin[:, 1:])
        products.append(float((turned_q * turned_k).sum()))
    assert max(products) - min(products) < 1e-3


def test_tables_survive_a_cast_of_the_model():
    model = PhiForCausalLM(tiny()).to(torch.bfloat16)
    plan = model.plan(5, torch.device("cpu"))
    assert plan.cos_BT1P.dtype == torch.float32


@pytest.mark.parametrize("num_tokens", [4095, 4096, 4097])
def test_switch_uses_long_factors_past_the_original_context(num_tokens):
    config = phi_like()
    model = PhiForCausalLM(config)
    plan = model.plan(num_tokens, torch.device("cpu"))
    frequencies = inverse_frequencies(config, long=num_tokens > 4096)
    expected = (torch.arange(num_tokens).float()[:, None] * frequencies).cos() * config.attention_factor
    assert torch.equal(plan.cos_BT1P[0, :, 0], expected)


def test_cache_crossing_equals_a_fresh_pass():
    """Prompt of 4094 tokens, then one token at a time to 4099."""
    model = make(phi_like())
    ids = tokens(4099)
    cache = KVCache(model.config)
    with torch.no_grad():
        model.hidden(ids[:, :4094], cache=cache)
        for end in range(4095, 4100):
            cached = model.hidden(ids[:, end - 1 : end], cache=cache)
            fresh = model.hidden(ids[:, :end])[:, -1:]
            assert (cached - fresh).abs().max() < 1e-4, end
    assert cache.num_recomputed == 4096 and cache.length == 4099


def test_without_recomputation_the_crossing_would_be_wrong():
    """The guard above can fail: keys left at the short angles change the result visibly."""
    model = make(phi_like())
    ids = tokens(4097)
    with torch.no_grad():
        cache = KVCache(model.config)
        model.hidden(ids[:, :4096], cache=cache)
        cache.long = True  # pretend that the keys are already at the long angles
        stale = model.hidden(ids[:, 4096:], cache=cache)
        fresh = model.hidden(ids)[:, -1:]
    assert (stale - fresh).abs().max() > 0.01


@pytest.mark.parametrize(
    ("configured", "seen"), [(2047, 2048), (2048, 2048), (16, 16), (None, None), (0, None)]
)
def test_visible_window(configured, seen):
    assert tiny(sliding_window=configured).visible_window == seen


@pytest.mark.parametrize("cached", [False, True])
def test_window_boundary_is_2048_visible_tokens(cached):
    """Changing the token 2047 back moves the newest output, changing the one 2048 back does not."""
    model = make(tiny(sliding_window=2047, num_hidden_layers=1))
    ids = tokens(2100)

    def newest(sequence):
        with torch.no_grad():
            if not cached:
                return model.hidden(sequence)[:, -1]
            cache = KVCache(model.config)
            model.hidden(sequence[:, :2000], cache=cache)
            model.hidden(sequence[:, 2000:2099], cache=cache)
            return model.hidden(sequence[:, 2099:], cache=cache)[:, -1]

    base = newest(ids)
    for back, matters in [(2046, True), (2047, True), (2048, False), (2049, False)]:
        changed = ids.clone()
        changed[0, 2099 - back] = 3 if ids[0, 2099 - back] != 3 else 4
        assert bool((newest(changed) != base).any()) == matters, back


def test_short_sequences_need_no_dense_mask():
    config = tiny(sliding_window=2047)
    assert make_mask(config, 2048, 2048, torch.device("cpu")).causal
    assert make_mask(config, 2049, 2049, torch.device("cpu")).dense is not None


@pytest.mark.parametrize(
    "config", [tiny(), tiny(sliding_window=6), phi_like()], ids=["plain", "window", "longrope"]
)
def test_packed_documents_equal_separate_ones(config):
    if config.rope_scaling is not None:
        config.original_max_position_embeddings = 10
    model = make(config)
    lengths = [5, 17, 1, 10, 11]
    ids = tokens(sum(lengths))
    document_ids = torch.cat([torch.full((1, n), i + 4) for i, n in enumerate(lengths)], dim=1)
    with torch.no_grad():
        packed = model(ids, document_ids_BT=document_ids)
        start = 0
        for length in lengths:
            alone = model(ids[:, start : start + length])
            assert (packed[:, start : start + length] - alone).abs().max() < 1e-5
            start += length
        crossed = model(ids)
    assert (packed[:, 5:] - crossed[:, 5:]).abs().max() > 1e-3  # without the mask it would differ


def test_batch_rows_do_not_meet():
    model = make(tiny(sliding_window=6))
    ids = torch.cat([tokens(20, seed=s) for s in range(3)])
    with torch.no_grad():
        together = model(ids)
        for row in range(3):
            assert (model(ids[row : row + 1]) - together[row : row + 1]).abs().max() < 1e-5


def test_explicit_mscale_is_honoured():
    config = phi_like()
    assert config.attention_factor == pytest.approx(1.190238, abs=1e-6)
    config.rope_scaling |= {"short_mscale": 1.2, "long_mscale": 1.243163121016122}
    rope = RotaryEmbedding(config)
    for long, value in ((False, 1.2), (True, 1.243163121016122)):
        assert float(rope.tables(torch.zeros(1, 1), long)[0].max()) == pytest.approx(value)


def test_cache_refuses_what_it_cannot_do():
    model = make(tiny())
    cache = KVCache(model.config)
    model(tokens(3), cache=cache)
    with pytest.raises(UserError, match="sequences"):
        model(tokens(3).expand(2, 3), cache=cache)
    with pytest.raises(UserError, match="documents"):
        model(tokens(3), cache=cache, document_ids_BT=torch.zeros(1, 3))
