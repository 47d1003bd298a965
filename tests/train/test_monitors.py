"""Monitors against what they claim to measure, computed plainly."""

from __future__ import annotations

import math

import pytest
import torch
from train.toy_training import toy_model

from pocketphi.train.loss import TokenLoss
from pocketphi.train.monitors import UpdateRatio, attention_logit_max
from pocketphi.train.parallel import World

ALONE = World(0, 1, torch.device("cpu"))


def test_update_ratio_by_group() -> None:
    model = toy_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    watch = UpdateRatio(model)
    watch.before()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=draw)
    found = watch.after(ALONE)
    for group, part in (("attention", "self_attn"), ("mlp", "mlp."), ("table", "embed"), ("norms", "norm")):
        names = [n for n in before if part in n]
        change = sum(float((model.get_parameter(n) - before[n]).square().sum()) for n in names)
        size = sum(float(before[n].square().sum()) for n in names)
        assert found[group] == pytest.approx(math.sqrt(change / size), rel=1e-4), group
    assert 0 < min(found["attention"], found["mlp"]) <= found["all"] * 1.5


def test_attention_logit_max_is_the_largest_visible_product() -> None:
    """Judge: transformers' Phi-3 in eager attention, its weights turned back into logits is not possible;
    so the model's own query and key rows, with the rotation written out anew in float64."""
    model = toy_model(num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.qkv_proj.weight.mul_(20)
    ids = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    found = attention_logit_max(TokenLoss(model), ids, ALONE)
    config, layer = model.config, model.model.layers[0]
    x = layer.input_layernorm(model.model.embed_tokens(ids))[0].double().detach()
    qkv = x @ layer.self_attn.qkv_proj.weight.double().detach().T
    size, heads, kv = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    rows = qkv.view(12, heads + 2 * kv, size)
    half = size // 2
    largest = -math.inf
    for h in range(heads):
        k_head = heads + h // (heads // kv)
        for t in range(12):
            for s in range(t + 1):
                logit = 0.0
                for i in range(half):
                    # Turning q by t and k by s is turning one of them by the difference.
                    angle = (t - s) * config.rope_theta ** (-2 * i / size)
                    q = complex(rows[t, h, i], rows[t, h, i + half])
                    k = complex(rows[s, k_head, i], rows[s, k_head, i + half])
                    turned = q * complex(math.cos(angle), math.sin(angle))
                    logit += (turned * k.conjugate()).real
                largest = max(largest, logit / math.sqrt(size))
    assert found == pytest.approx(largest, rel=1e-4)
    assert not layer.self_attn._forward_pre_hooks
