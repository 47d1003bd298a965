"""The chunked loss against torch's own; Muon and the parameter groups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from train.toy_training import toy_model

from pocketphi.train import optimizer
from pocketphi.train.config import OptimizerConfig
from pocketphi.train.cross_entropy import chunked_cross_entropy
from pocketphi.train.data import IGNORE
from pocketphi.train.optimizer import Optimizers, orthogonalized, parameter_groups


@pytest.mark.parametrize("chunk", [7, 64, 1000])
@pytest.mark.parametrize("z_weight", [0.0, 1e-2])
def test_chunked_loss_and_gradients_equal_the_plain_ones(chunk: int, z_weight: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(100, 24, requires_grad=True)
    weight = torch.randn(50, 24, requires_grad=True)
    targets = torch.randint(0, 50, (100,))
    targets[::9] = IGNORE
    loss, z = chunked_cross_entropy(x, weight, targets, z_weight=z_weight, chunk=chunk)
    (loss * 0.25).backward()
    x64 = x.detach().double().requires_grad_()
    weight64 = weight.detach().double().requires_grad_()
    logits = x64 @ weight64.T
    plain = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    plain_z = (torch.logsumexp(logits, -1).square() * (targets != IGNORE)).sum()
    ((plain + z_weight * plain_z) * 0.25).backward()
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-6)
    assert float(z.detach()) == pytest.approx(float(plain_z.detach()), rel=1e-6)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), weight64.grad, rtol=1e-4, atol=1e-5)


def test_orthogonalized_update_has_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((32, 96), (96, 32), (64, 64)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape), 5))
        assert values.max() < 1.3
        assert values.median() > 0.6
    u, _, v = torch.linalg.svd(torch.randn(48, 48))
    noisy = u @ torch.diag(torch.linspace(0.2, 3.0, 48)) @ v
    torch.testing.assert_close(orthogonalized(noisy, 12), u @ v, atol=0.35, rtol=0)


def test_groups_hold_every_parameter_once_and_norms_do_not_decay() -> None:
    for tied in (True, False):
        model = toy_model(tie_word_embeddings=tied)
        groups = parameter_groups(model)
        assert sum(len(g) for g in groups.values()) == len(list(model.parameters()))
        assert len(groups["head"]) == (not tied)
        optimizers = Optimizers(model, OptimizerConfig(kind="adamw", weight_decay=0.1))
        decays = {
            id(p): group["weight_decay"]
            for o in optimizers.optimizers
            for group in o.param_groups
            for p in group["params"]
        }
        for name, parameter in model.named_parameters():
            plain = name.endswith(("norm.weight", "embed_tokens.weight"))
            assert decays[id(parameter)] == (0.0 if plain else 0.1), name


def test_muon_treats_fused_matrices_as_the_matrices_they_hold() -> None:
    model = toy_model()
    optimizers = Optimizers(model, OptimizerConfig(kind="muon", weight_decay=0.0, muon_momentum=0.0))
    weight = model.model.layers[0].self_attn.qkv_proj.weight
    before = weight.detach().clone()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    grad = weight.grad.clone()
    optimizers.step(1e-2)
    moved = (before - weight.detach()) / 1e-2
    for piece, g in zip(moved.split([32, 16, 16]), grad.split([32, 16, 16])):
        torch.testing.assert_close(piece, orthogonalized(g, 5) * 0.2 * 32**0.5, rtol=1e-4, atol=1e-4)


def test_matrices_of_one_shape_are_updated_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal matrices are iterated together; how many, and beside what, does not change the update."""

    def updated(together: int) -> list[torch.Tensor]:
        monkeypatch.setattr(optimizer, "_TOGETHER", together)
        generator = torch.Generator().manual_seed(3)
        # Two shapes, and two splits of one shape.
        shapes = [(24, 16)] * 5 + [(16, 16)] * 2
        parameters = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
        parts = {parameters[0]: [8, 16], parameters[2]: [8, 16], parameters[4]: [12, 12]}
        muon = optimizer.Muon(
            parameters,
            lr=0.1,
            momentum=0.9,
            weight_decay=0.1,
            iterations=5,
            parts=parts,  # type: ignore[arg-type]
        )
        for _ in range(2):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator)
            muon.step()
        return [p.detach() for p in parameters]

    for together, alone in zip(updated(1 << 20), updated(1)):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
