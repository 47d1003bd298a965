"""Each fast part of training against its slow twin: loss, optimizer, 8-bit products, masks, compiling."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pocketphi.core.errors import ConfigError  # noqa: E402
from pocketphi.model import ModelConfig, PhiForCausalLM  # noqa: E402
from pocketphi.model.layers import gated_silu  # noqa: E402
from pocketphi.train import acceleration  # noqa: E402
from pocketphi.train.acceleration import AccelerationConfig, accelerate, fastest_attention  # noqa: E402
from pocketphi.train.cross_entropy import IGNORE, chunked_cross_entropy, plain_cross_entropy  # noqa: E402
from pocketphi.train.float8 import Float8Config, Float8Linear, use_float8  # noqa: E402
from pocketphi.train.low_precision import (  # noqa: E402
    LowPrecisionAdamW,
    clip_scale,
    join_float32,
    round_stochastically,
    split_float32,
    total_norm,
)


def tiny(**changes) -> ModelConfig:
    values = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    return ModelConfig(**{**values, **changes})


def make(config: ModelConfig) -> PhiForCausalLM:
    model = PhiForCausalLM(config)
    model.reset_parameters(seed=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.mul_(4)
    return model


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("z_weight", [0.0, 1e-2])
def test_chunked_loss_equals_plain(chunk, z_weight):
    generator = torch.Generator().manual_seed(chunk)
    targets = torch.randint(0, 50, (64,), generator=generator)
    targets[::5] = IGNORE
    results = []
    for function, extra in ((plain_cross_entropy, {}), (chunked_cross_entropy, {"chunk": chunk})):
        x = torch.randn(64, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
        x.requires_grad_()
        weight = torch.randn(50, 24, generator=torch.Generator().manual_seed(2)).requires_grad_()
        loss, z_loss = function(x, weight, targets, z_weight=z_weight, **extra)
        (loss * 0.37).backward()
        results.append((loss.detach(), z_loss, x.grad, weight.grad))
    for plain, chunked in zip(*results):
        torch.testing.assert_close(chunked, plain, rtol=2e-6, atol=2e-5)


def test_chunked_loss_in_bfloat16_and_without_gradients():
    x, weight = torch.randn(40, 32).bfloat16(), torch.randn(70, 32).bfloat16()
    targets = torch.randint(0, 70, (40,))
    expected, _ = plain_cross_entropy(x.float(), weight.float(), targets)
    with torch.no_grad():
        loss, _ = chunked_cross_entropy(x, weight, targets, chunk=16)
    assert float(loss) == pytest.approx(float(expected), rel=5e-3)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    chunked_cross_entropy(a, weight, targets, chunk=16)[0].backward()
    plain_cross_entropy(b.float(), weight.float(), targets)[0].backward()
    assert (a.grad.float() - b.grad.float()).norm() / b.grad.float().norm() < 1e-2


@pytest.mark.parametrize("float8", ["off", "tensorwise", "rowwise"])
def test_float32_weights_under_autocast(float8):
    """The trainer's other mode: products in bfloat16 (or 8 bits), weights and gradients float32."""
    ids = torch.randint(0, 96, (2, 33), generator=torch.Generator().manual_seed(0))
    gradients = []
    for low in (False, True):
        model = make(tiny())
        if low:
            accelerate(model, AccelerationConfig(compile=False, float8=float8))
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            x = model.hidden(ids[:, :-1]).flatten(0, 1)
            loss, _ = chunked_cross_entropy(x, model.lm_head.weight, ids[:, 1:].flatten(), chunk=24)
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert 1e-4 < error < (0.05 if float8 == "off" else 0.25)


def test_all_targets_ignored_gives_zero():
    x = torch.randn(8, 4, requires_grad=True)
    loss, _ = chunked_cross_entropy(x, torch.randn(9, 4), torch.full((8,), IGNORE), chunk=3)
    loss.backward()
    assert float(loss.detach()) == 0 and not x.grad.any()


def test_split_weights_are_exactly_float32():
    x = torch.cat(
        [torch.randn(5000) * 10.0**p for p in (-30, -3, 0, 30)] + [torch.tensor([0.0, -0.0, 1e-45])]
    )
    # Exact ties between two bfloat16 numbers, where round-to-nearest-even would need a 17th bit.
    ties = (torch.randn(500).view(torch.int32) & -0x10000) | 0x8000
    x = torch.cat((x, ties.view(torch.float32)))
    high, rest = split_float32(x)
    assert torch.equal(join_float32(high, rest).view(torch.int32), x.view(torch.int32))
    assert ((high.float() - x).abs() <= x.abs() * 2**-8 + 1e-40).all()


def run_adamw(optimizer_of, weight, gradients, dtype):
    parameter = torch.nn.Parameter(weight.to(dtype, copy=True))
    optimizer = optimizer_of([parameter])
    for gradient in gradients:
        parameter.grad = gradient.to(dtype)
        optimizer.step()
    return parameter, optimizer


OPTIONS = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def test_split_master_equals_float32_adamw():
    weight = split_float32(torch.randn(40, 30))[0].float()  # representable start for both
    gradients = [torch.randn(40, 30).bfloat16().float() for _ in range(50)]
    expected, _ = run_adamw(lambda p: torch.optim.AdamW(p, **OPTIONS), weight, gradients, torch.float32)
    actual, optimizer = run_adamw(
        lambda p: LowPrecisionAdamW(p, **OPTIONS), weight, gradients, torch.bfloat16
    )
    master = join_float32(actual.detach(), optimizer.state[actual]["rest"])
    torch.testing.assert_close(master, expected.detach(), rtol=1e-6, atol=1e-7)
    lost, _ = run_adamw(lambda p: torch.optim.AdamW(p, **OPTIONS), weight, gradients, torch.bfloat16)
    error = (lost.float() - expected).abs().mean()
    assert error > 100 * (master - expected).abs().mean()  # what the rest is for


def test_stochastic_rounding_keeps_small_updates_on_average():
    weight, gradients = torch.ones(200, 100), [torch.ones(200, 100)] * 20
    expected, _ = run_adamw(lambda p: torch.optim.AdamW(p, **OPTIONS), weight, gradients, torch.float32)
    make_optimizer = lambda p: LowPrecisionAdamW(p, **OPTIONS, rounding="stochastic", seed=3)  # noqa: E731
    actual, _ = run_adamw(make_optimizer, weight, gradients, torch.bfloat16)
    moved, wanted = 1 - actual.float().mean(), 1 - expected.mean()
    assert float(moved) == pytest.approx(float(wanted), rel=0.03)
    again, _ = run_adamw(make_optimizer, weight, gradients, torch.bfloat16)
    assert torch.equal(actual, again)


def test_stochastic_rounding_is_unbiased_and_keeps_exact_values():
    x = torch.full((100_000,), 1.0 + 2**-7 * 0.3)
    rounded = round_stochastically(x, torch.tensor(77)).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert float((rounded - 1).mean() / 2**-7) == pytest.approx(0.3, abs=0.01)
    exact = torch.randn(1000).bfloat16().float()
    assert torch.equal(round_stochastically(exact, torch.tensor(5)).float(), exact)


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_resumed_optimizer_equals_undisturbed(rounding):
    def build():
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(33, 7).bfloat16())
        return parameter, LowPrecisionAdamW([parameter], lr=1e-2, rounding=rounding)

    gradients = [torch.randn(33, 7).bfloat16() for _ in range(6)]
    whole, optimizer = build()
    for g in gradients:
        whole.grad = g
        optimizer.step()
    first, optimizer = build()
    for g in gradients[:3]:
        first.grad = g
        optimizer.step()
    second, resumed = build()
    with torch.no_grad():
        second.copy_(first)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state[second]["exp_avg"].dtype == torch.float32
    for g in gradients[3:]:
        second.grad = g
        resumed.step()
    assert torch.equal(whole, second)


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_clipping_and_the_guard_are_part_of_the_update(rounding):
    parameter = torch.nn.Parameter(torch.randn(10, 10).bfloat16())
    plain = torch.nn.Parameter(parameter.detach().float())
    optimizer = LowPrecisionAdamW([parameter], lr=1e-2, eps=1.0, rounding=rounding)
    judge = torch.optim.AdamW([plain], lr=1e-2, eps=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    gradient = torch.randn(10, 10).bfloat16() * 30
    parameter.grad, plain.grad = gradient.clone(), gradient.float()
    norm = total_norm([parameter])
    assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_([plain], 1.0)), rel=1e-3)
    optimizer.grad_scale = clip_scale(norm, 1.0)
    optimizer.step()
    judge.step()
    torch.testing.assert_close(parameter.float(), plain.detach(), rtol=2**-7, atol=1e-3)

    before = parameter.detach().clone(), optimizer.state[parameter]["exp_avg"].clone()
    parameter.grad[3, 3] = torch.inf
    optimizer.grad_scale = clip_scale(total_norm([parameter]), 1.0)
    optimizer.step()
    assert torch.equal(parameter, before[0])
    assert torch.equal(optimizer.state[parameter]["exp_avg"], before[1])


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_float8_linear_is_near_the_exact_one(scaling):
    torch.manual_seed(0)
    exact = torch.nn.Linear(64, 96, bias=False)
    small = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False))
    with torch.no_grad():
        small[0].weight.copy_(exact.weight)
    assert use_float8(small, Float8Config(scaling=scaling)) == 1
    assert isinstance(small[0], Float8Linear)
    x = torch.randn(2, 24, 64)
    upstream = torch.randn(2, 24, 96)
    results = []
    for layer in (exact, small):
        a = x.clone().requires_grad_()
        y = layer(a)
        y.backward(upstream)
        results.append((y, a.grad, layer.weight.grad if layer is exact else layer[0].weight.grad))
    for name, wide, narrow in zip(("y", "dx", "dw"), *results):
        error = (wide - narrow).norm() / wide.norm()
        # e4m3 keeps 3 bits of mantissa: about 2.6% per operand; e5m2 keeps 2.
        assert 1e-3 < error < (0.08 if scaling == "tensorwise" else 0.05), (name, float(error))


def test_rowwise_float8_survives_an_outlier():
    torch.manual_seed(0)
    errors = {}
    for scaling in ("tensorwise", "rowwise"):
        layer = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
        x = torch.randn(32, 64)
        x[0, 0] = 2e6
        expected = layer(x)
        use_float8(layer, Float8Config(scaling=scaling))
        errors[scaling] = float(((layer(x) - expected)[1:].norm() / expected[1:].norm()).detach())
    assert errors["rowwise"] < 0.05 < errors["tensorwise"]


def test_float8_refuses_odd_widths():
    with pytest.raises(ConfigError, match="multiples of 16"):
        use_float8(torch.nn.Sequential(torch.nn.Linear(64, 100, bias=False)), Float8Config())


def test_float8_training_follows_plain_training():
    losses = {}
    for kind in ("off", "tensorwise", "rowwise"):
        model = accelerate(make(tiny()), AccelerationConfig(compile=False, float8=kind))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids = torch.randint(0, 20, (4, 65), generator=torch.Generator().manual_seed(0))
        total = 0.0
        for _ in range(15):
            x = model.hidden(ids[:, :-1]).flatten(0, 1)
            loss = chunked_cross_entropy(x, model.lm_head.weight, ids[:, 1:].flatten())[0] / 256
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) / 15
        losses[kind] = total
    assert float(loss.detach()) < 0.7 * losses["off"]  # it learns
    for kind in ("tensorwise", "rowwise"):
        assert losses[kind] == pytest.approx(losses["off"], rel=0.02)


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 96, (2, 384), generator=generator)
    lengths = [[5, 200, 1, 178], [384]]
    documents = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths])
    return ids, documents


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("with_documents", [True, False])
def test_flex_attention_equals_dense_masks(window, with_documents):
    ids, documents = batch()
    document_ids = documents if with_documents else None
    model = make(tiny(sliding_window=window))
    with torch.no_grad():
        expected = model(ids, document_ids_BT=document_ids)
        accelerate(model, AccelerationConfig(compile=False, attention="flex"))
        actual = model(ids, document_ids_BT=document_ids)
    assert (actual - expected).abs().max() < 2e-5


@pytest.mark.slow
def test_compiled_blocks_equal_plain_ones():
    ids, documents = batch()
    model = make(tiny())
    runs = []
    for config in (None, AccelerationConfig(compile=True, attention="sdpa", checkpoint_layers=1)):
        if config is not None:
            accelerate(model, config)
        model.zero_grad()
        with fastest_attention():
            x = model.hidden(ids, document_ids_BT=documents).flatten(0, 1)
            loss, _ = chunked_cross_entropy(x, model.lm_head.weight, ids.flatten(), chunk=100)
            loss.backward()
        runs.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    assert float(runs[0][0]) == pytest.approx(float(runs[1][0]), rel=1e-5)
    for plain, compiled in zip(runs[0][1], runs[1][1]):
        assert (plain - compiled).norm() <= 1e-4 * plain.norm()


@pytest.mark.slow
def test_compiled_flex_attention_equals_dense_masks():
    """Compiled, with documents that change from step to step."""
    model, plain = make(tiny(num_hidden_layers=1)), make(tiny(num_hidden_layers=1))
    accelerate(model, AccelerationConfig(compile=True, attention="flex"))
    ids, documents = batch()
    for document_ids in (documents, documents.flip(0)):
        with torch.no_grad():
            expected = plain.hidden(ids, document_ids_BT=document_ids)
            actual = model.hidden(ids, document_ids_BT=document_ids)
        assert (actual - expected).abs().max() < 2e-5


def test_gated_activation_has_the_gradient_of_autograd():
    x = torch.randn(7, 48, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(7, 24, dtype=torch.float64)
    (expected,) = torch.autograd.grad(gated_silu(x), x, dy)
    y = acceleration.fused_gated_silu(x.view(1, 7, 48))
    torch.testing.assert_close(y.view(7, 24), gated_silu(x))
    (found,) = torch.autograd.grad(y.view(7, 24), x, dy)
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel runs on GPUs only")
@pytest.mark.parametrize(("rows", "width"), [(3, 40), (1000, 8192)])
def test_gated_activation_kernel_equals_plain_gradient(rows, width):
    from pocketphi.train.activation_kernels import gated_silu_backward

    x = torch.randn(rows, 2 * width, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    exact = acceleration.gated_silu_gradient(x.double(), dy.double())
    found = gated_silu_backward(x, dy).double()
    assert float((found - exact).norm() / exact.norm()) < 3e-3


def test_quantize_kernel_equals_plain_quantisation():
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU (benchmarks/train_gpu.py checks the same there)")
    from pocketphi.train.float8 import scale_of, to_float8
    from pocketphi.train.float8_kernels import quantize_both

    x = torch.randn(300, 208, device="cuda", dtype=torch.bfloat16)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        scale = scale_of(x, dtype, None)
        straight, turned = quantize_both(x, scale, dtype)
        expected = to_float8(x, scale, dtype)
        np.testing.assert_array_equal(straight.float().cpu(), expected.float().cpu())
        np.testing.assert_array_equal(turned.float().cpu(), expected.float().t().cpu())
