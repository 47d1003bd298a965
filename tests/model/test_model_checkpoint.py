"""Model folders: what is saved is loaded, and what is broken is named."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from pocketphi import model as phi_model  # noqa: E402
from pocketphi.core.errors import CheckpointError, ConfigError, UserError  # noqa: E402
from pocketphi.model import ModelConfig, PhiForCausalLM  # noqa: E402
from pocketphi.model.generation import generate, sample  # noqa: E402
from pocketphi.model.transformer import default_stop_ids  # noqa: E402


def tiny(**changes) -> ModelConfig:
    values = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": 5,
        "pad_token_id": 5,
        "torch_dtype": "float32",
    }
    return ModelConfig(**{**values, **changes})


@pytest.fixture
def folder(tmp_path):
    return phi_model.save(PhiForCausalLM(tiny()), tmp_path / "model")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [10_000, 5_000_000_000])
def test_round_trip(tied, shard_bytes, tmp_path):
    model = PhiForCausalLM(tiny(tie_word_embeddings=tied))
    model.stop_ids = (5, 6, 9)
    phi_model.save(model, tmp_path, max_shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes == 10_000)
    loaded = phi_model.load(tmp_path)
    assert loaded.config == model.config and loaded.stop_ids == (5, 6, 9)
    for (name, a), (other, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert not list(tmp_path.glob(".*"))


def test_saving_again_leaves_no_stale_shard(tmp_path):
    model = PhiForCausalLM(tiny())
    phi_model.save(model, tmp_path, max_shard_bytes=10_000)
    phi_model.save(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_same_weights_same_bytes(tmp_path):
    for name in ("a", "b"):
        model = PhiForCausalLM(tiny())
        model.reset_parameters(seed=4)
        phi_model.save(model, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_whoever_may_read_the_folder_may_read_the_weights(folder):
    modes = {p.name: p.stat().st_mode & 0o777 for p in folder.iterdir()}
    assert set(modes.values()) == {modes["config.json"]}, modes


def test_types(folder, tmp_path):
    assert phi_model.load(folder).lm_head.weight.dtype == torch.float32
    half = phi_model.load(folder, dtype="bfloat16")
    assert half.lm_head.weight.dtype == torch.bfloat16
    phi_model.save(half, tmp_path / "half")
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert phi_model.load(tmp_path / "half").lm_head.weight.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="int3"):
        phi_model.load(folder, dtype="int3")


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def test_missing_tensor(folder):
    edit_weights(folder, lambda w: w.pop("model.layers.1.mlp.down_proj.weight"))
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight.*missing.*\[32, 48\]"
    ):
        phi_model.load(folder)


def test_missing_part_of_a_fused_tensor(folder):
    def split(weights):
        q, k, _ = weights.pop("model.layers.0.self_attn.qkv_proj.weight").split([32, 16, 16])
        weights["model.layers.0.self_attn.q_proj.weight"] = q.clone()
        weights["model.layers.0.self_attn.k_proj.weight"] = k.clone()

    edit_weights(folder, split)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.v_proj\.weight.*missing.*\[16, 32\]"):
        phi_model.load(folder)


def test_wrong_shape_names_both(folder):
    edit_weights(folder, lambda w: w.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*model\.norm\.weight.*\[31\].*\[32\]"):
        phi_model.load(folder)


def test_unexpected_tensor_and_too_few_layers(folder):
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"does not account for.*model\.layers\.1"):
        phi_model.load(folder)


def test_integer_weights_are_refused(folder):
    edit_weights(folder, lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match="I8"):
        phi_model.load(folder)


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*not a whole"):
        phi_model.load(folder)


def test_truncated_and_missing_shards(tmp_path):
    phi_model.save(PhiForCausalLM(tiny()), tmp_path, max_shard_bytes=10_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match=shard.name):
        phi_model.load(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: the shard is missing"):
        phi_model.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"model_type": "bert"}'])
def test_broken_config(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises((CheckpointError, ConfigError), match=r"config\.json"):
        phi_model.load(folder)


def test_missing_files(folder, tmp_path):
    with pytest.raises(CheckpointError, match="no such model folder"):
        phi_model.load(tmp_path / "nowhere")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors") as caught:
        phi_model.load(folder)
    assert "pickle" in caught.value.hint
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        phi_model.load(folder)


def test_index_cannot_point_outside(tmp_path):
    phi_model.save(PhiForCausalLM(tiny()), tmp_path, max_shard_bytes=10_000)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"lm_head.weight": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside"):
        phi_model.load(tmp_path)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        phi_model.save(PhiForCausalLM(tiny()), tmp_path / "file" / "model")


def test_tied_config_with_another_head(folder):
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        phi_model.load(folder)


def test_phi3_stops_on_all_three_ids(tmp_path):
    config = tiny(vocab_size=32064, eos_token_id=32000)
    assert default_stop_ids(config) == (32000, 32001, 32007)
    model = PhiForCausalLM(config)
    phi_model.save(model, tmp_path)
    path = tmp_path / "generation_config.json"
    assert json.loads(path.read_text())["eos_token_id"] == [32000, 32001, 32007]
    for written in (32000, [32000, 32007], None):  # what other exporters leave of the list
        path.write_text(json.dumps({"eos_token_id": written}))
        assert set(phi_model.load(tmp_path).stop_ids) == {32000, 32001, 32007}
    path.write_text(json.dumps({"eos_token_id": 99999}))
    with pytest.raises(CheckpointError, match="99999"):
        phi_model.load(tmp_path)


def test_tokenizer_gives_the_stop_ids(tmp_path):
    class Words:
        stop_ids = frozenset({7, 3})

        def save(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    phi_model.save(PhiForCausalLM(tiny()), tmp_path, Words())
    assert phi_model.load(tmp_path).stop_ids == (3, 7)
    assert (tmp_path / "tokenizer.json").exists()


def test_initialisation():
    model = PhiForCausalLM(tiny(hidden_size=256, intermediate_size=512, num_hidden_layers=8))
    model.reset_parameters(seed=1)
    block = model.model.layers[0]
    assert float(block.mlp.down_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    model.reset_parameters(seed=1, scale_residual=True)
    assert float(block.mlp.down_proj.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.02)
    assert float(block.mlp.gate_up_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert bool((block.input_layernorm.weight == 1).all())


def test_checkpointed_layers_give_the_same_gradients():
    model = PhiForCausalLM(tiny())
    ids = torch.arange(20)[None]
    gradients = []
    for layers in (0, 2):
        model.checkpoint_layers = layers
        model.zero_grad()
        model(ids).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_generation_stops_and_repeats():
    model = PhiForCausalLM(tiny())
    text = generate(model, [1, 2, 3], max_new_tokens=12, temperature=1.0, seed=5, stop_ids=())
    assert len(text) == 12
    assert text == generate(model, [1, 2, 3], max_new_tokens=12, temperature=1.0, seed=5, stop_ids=())
    assert text != generate(model, [1, 2, 3], max_new_tokens=12, temperature=1.0, seed=6, stop_ids=())
    stopped = generate(model, [1, 2, 3], max_new_tokens=12, temperature=1.0, seed=5, stop_ids=[text[4]])
    assert stopped == text[: text.index(text[4])]
    assert len(generate(model, [1] * 60, max_new_tokens=12, stop_ids=())) == 4  # the context ends
    for bad, message in (([], "no tokens"), ([60], "vocabulary"), ([1] * 64, "context")):
        with pytest.raises(UserError, match=message):
            generate(model, bad)


def test_sampling_filters():
    logits = torch.log(torch.tensor([0.05, 0.5, 0.3, 0.15]))
    draw = torch.Generator().manual_seed(0)
    assert {sample(logits, draw, top_k=2) for _ in range(200)} == {1, 2}
    assert {sample(logits, draw, top_p=0.6) for _ in range(200)} == {1, 2}
    assert {sample(logits, draw, min_p=0.29) for _ in range(200)} == {1, 2, 3}
    assert {sample(logits, draw, top_p=0.01) for _ in range(50)} == {1}
    counts = torch.bincount(torch.tensor([sample(logits, draw) for _ in range(4000)])) / 4000
    assert (counts - logits.exp()).abs().max() < 0.03
