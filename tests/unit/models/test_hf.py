"""Encoders of transformers: embeddings, special tokens, blocks, weights, export, and folders that are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file

import advtrain
from advtrain.errors import UserError
from advtrain.hub import download, pretrained_folder
from advtrain.models import build_model
from advtrain.models.blocks import block_names, freeze_blocks, head_tensors
from advtrain.models.network import attack_view
from advtrain.models.pretrained import pretrained_weights
from advtrain.models.serialized import Architecture, ModelSource
from advtrain.models.start import fit_weights
from advtrain.recipe.data import TextShape
from advtrain.recipe.model import ModelConfig, runs_code
from advtrain.registry.export import check_export
from advtrain.threat import ThreatModel
from advtrain.training.sharded import shard
from tests.hf_kit import SIZES, SPECIAL, WORDS, bert_folder

VOCABULARY = len(SPECIAL) + len(WORDS)
SHAPE = TextShape(12, VOCABULARY, (2, 3))
L2 = ThreatModel("l2", 0.5)


@pytest.fixture(scope="module")
def name(tmp_path_factory) -> str:
    return bert_folder(tmp_path_factory.mktemp("hf") / "bert")


def folder_of(name: str) -> Path:
    return Path(name.removeprefix("hf:"))


def built(name: str, **args: object) -> torch.nn.Module:
    return build_model(ModelConfig(name=name, args=args), SHAPE, 3)


def ids() -> torch.Tensor:
    x = torch.randint(5, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(1))
    x[:, 0] = 2
    x[0, 7] = x[1, 4] = x[2, 2] = x[3, 7] = 3
    x[1, 5:] = x[2, 3:] = 0
    return x


def test_logits_are_those_of_transformers_for_the_ids(name):
    model, x = built(name).eval(), ids()
    network = model.network.transformer
    wanted = network(input_ids=x, attention_mask=(x != 0).long()).logits
    assert torch.allclose(model(x), wanted, atol=1e-6)
    assert network.config._attn_implementation == "eager"


def test_padding_changes_neither_logits_nor_perturbation(name):
    model, x, y = built(name).eval(), ids(), torch.tensor([0, 1, 2, 0])
    longer = F.pad(x, (0, 4))
    assert torch.allclose(model(longer), model(x), atol=1e-6)
    short, long = (advtrain.attack(model, each, y, L2, num_steps=3, start="none") for each in (x, longer))
    assert torch.allclose(long[:, :8], short, atol=1e-5)
    assert (long[:, 8:] == 0).all()


@pytest.mark.parametrize("per", ["sample", "token"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_padding_and_special_tokens_do_not_move(name, norm, per):
    model, x, y = built(name).eval(), ids(), torch.tensor([0, 1, 2, 0])
    threat = ThreatModel(norm, 0.1, group=per)
    z = model.embed(x)
    moved = (advtrain.attack(model, x, y, threat, num_steps=3) != z).any(-1)
    assert (moved == (x > 3)).all()


@pytest.mark.parametrize(("tokens", "positions"), [(8000, 24), (6000, 400), (100, 24)])
def test_sharded_tables_have_the_same_perturbation(tmp_path, tokens, positions):
    """The table is a block, or in a block of embeddings, or in no block."""
    name = bert_folder(tmp_path, vocab_size=tokens, max_position_embeddings=positions)
    model = build_model(ModelConfig(name=name), TextShape(12, tokens, (2, 3)), 3).eval()
    x, y = ids(), torch.tensor([0, 1, 2, 0])
    wanted = advtrain.attack(model, x, y, L2, num_steps=2, start="none")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        shard(model, torch.device("cpu"), 1)
        threat = model.threat_at(torch.ones(4, 8, 16), L2)
        assert threat.free.all()
        found = advtrain.attack(model, x, y, L2, num_steps=2, start="none")
    finally:
        dist.destroy_process_group()
    assert torch.allclose(found, wanted, atol=1e-5)


def test_word_embeddings_before_positions_are_perturbed(name):
    model, x = built(name), ids()
    view, z, threat = attack_view(model, x, L2)
    assert torch.equal(z, model.network.table(x) * (x != 0).unsqueeze(-1))
    assert torch.equal(threat.free.squeeze(-1), x > 3)
    assert view(z).shape == (4, 3)


def test_second_derivatives_of_the_logits_exist(name):
    model = built(name).eval()
    z = model.embed(ids()).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(z, embedded=True).pow(2).sum(), z, create_graph=True)
    gradient.pow(2).sum().backward()
    assert z.grad.abs().sum() > 0


def test_blocks_are_embeddings_layers_and_head(name):
    model = built(name)
    names = block_names(model.network)
    layers = [f"transformer.bert.encoder.layer.{n}" for n in range(2)]
    assert names == [
        "transformer.bert.embeddings",
        *layers,
        "transformer.bert.pooler",
        "transformer.classifier",
    ]
    assert head_tensors(model) == [f"network.transformer.classifier.{part}" for part in ("weight", "bias")]
    freeze_blocks(model, ["transformer.bert.embeddings", layers[0]])
    assert not model.network.table.weight.requires_grad
    assert model.network.transformer.bert.encoder.layer[1].output.dense.weight.requires_grad


def test_all_modules_after_the_encoder_are_one_head(tmp_path):
    from transformers import DistilBertConfig, DistilBertModel

    small = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 24}
    DistilBertModel(DistilBertConfig(vocab_size=VOCABULARY, **small)).save_pretrained(tmp_path)
    model = build_model(ModelConfig(name=f"hf:{tmp_path}"), SHAPE, 3)
    parts = {tensor.split(".")[2] for tensor in head_tensors(model)}
    assert parts == {"pre_classifier", "classifier"}
    freeze_blocks(model, "backbone")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(head_tensors(model))


def test_settings_of_the_folder_can_be_changed(name):
    model = built(name, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    assert torch.equal(model(ids()), model(ids()))
    assert not torch.equal(built(name).train()(ids()), built(name).train()(ids()))
    with pytest.raises(
        UserError, match="model.args.hidden_dropout: 'hf:.*' has no such setting; did you mean 'hidden_"
    ):
        built(name, hidden_dropout=0.0)
    with pytest.raises(UserError, match="model.args of 'hf:.*"):
        built(name, hidden_size="wide")


def test_complete_settings_need_no_folder(name):
    complete = pretrained_weights("hf", name.removeprefix("hf:"), allow_download=False).args
    model = build_model(ModelConfig(name="hf:gone", args=dict(complete)), SHAPE, 3)
    assert [*model.state_dict()] == [*built(name).state_dict()]
    assert json.loads(json.dumps(complete)) == complete


def test_weights_of_the_folder_are_loaded_without_a_head(name, tmp_path):
    found = pretrained_weights("hf", name.removeprefix("hf:"), allow_download=False)
    weights = {f"network.{key}": value for key, value in found.weights.items()}
    fitted = fit_weights(weights, built(name), "backbone")
    assert sorted(fitted.new) == [f"network.transformer.classifier.{part}" for part in ("bias", "weight")]
    assert not fitted.ignored
    with pytest.raises(UserError, match="has another head than this model .*: set model.load: backbone"):
        fit_weights(weights, built(name), "all")
    full = pretrained_weights("hf", bert_folder(tmp_path, head=True, num_labels=3)[3:], allow_download=False)
    assert full.num_classes == 3
    assert not fit_weights({f"network.{k}": v for k, v in full.weights.items()}, built(name)).new


def test_loading_uses_no_random_numbers(name):
    state = torch.random.get_rng_state()
    pretrained_weights("hf", name.removeprefix("hf:"), allow_download=False)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("layers", [1, 2])
def test_export_takes_any_batch_and_length(tmp_path, layers):
    name = bert_folder(tmp_path, num_hidden_layers=layers)
    check_export(built(name), SHAPE)


def test_another_process_builds_the_model_from_its_settings(name):
    complete = dict(pretrained_weights("hf", name.removeprefix("hf:"), allow_download=False).args)
    made = Architecture(ModelConfig(name="hf:gone", args=complete), SHAPE, 3)
    model = made.build().eval()
    source = ModelSource.of(model.state_dict(), made)
    assert torch.equal(source.load()(ids()), model(ids()))
    assert (source.embeds, source.libraries) == (True, ["transformers"])
    assert not runs_code(name)


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def split_weights(folder: Path, file: object) -> None:
    """Rename the weights, and write an index that names them."""
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / str(file))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_weights_in_several_files_are_loaded(tmp_path):
    name = bert_folder(tmp_path)
    whole = pretrained_weights("hf", name[3:], allow_download=False).weights
    split_weights(tmp_path, "model-00001-of-00001.safetensors")
    found = pretrained_weights("hf", name[3:], allow_download=False).weights
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)


REFUSED = {
    "remote code": (
        lambda f: change_config(f, auto_map={"AutoModel": "modeling.Net"}),
        "needs Python code from outside transformers .*; build the network in your own .*, and pass --allow-code",
    ),
    "unknown type": (lambda f: change_config(f, model_type="wordnet"), "model_type 'wordnet' is no encoder"),
    "decoder": (lambda f: change_config(f, model_type="gpt2"), "model_type 'gpt2' is no encoder"),
    "decoder of an encoder": (lambda f: change_config(f, is_decoder=True), "has a decoder; only encoders"),
    "no type": (lambda f: change_config(f, model_type=None), "has no model_type"),
    "other padding": (
        lambda f: change_config(f, pad_token_id=1),
        "its padding is token 1, but token 0 is padding here",
    ),
    "damaged": (lambda f: (f / "config.json").write_text("{"), "config.json' is damaged"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "it holds no JSON object"),
    "nested": (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json' is damaged"),
    "large": (lambda f: (f / "config.json").write_text(" " * 2**21), "has more than 1,048,576 bytes"),
    "missing": (
        lambda f: (f / "config.json").unlink(),
        "is no folder of transformers: config.json: No such file",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_unusable_folder_is_refused(tmp_path, fault):
    name = bert_folder(tmp_path)
    change, message = REFUSED[fault]
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        built(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            r"has pickled weights \(pytorch_model.bin\), .*; save them as model.safetensors, with model.save_",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors with weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"broken"), "the weights in '.*' cannot be loaded"),
        (
            lambda f: split_weights(f, "shard-00001.bin"),
            "names 'shard-00001.bin', which is not loaded because it",
        ),
        (lambda f: split_weights(f, 5), "model.safetensors.index.json' is damaged"),
        (
            lambda f: change_config(f, transformers_weights="adapter_model.bin"),
            "config.json names other weights .transformers_weights: 'adapter_model.bin'. than model.safetensors",
        ),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter; merge it"),
        (lambda f: change_config(f, hidden_size=32), "cannot be loaded"),
    ],
)
def test_unusable_weights_are_refused(tmp_path, change, message):
    name = bert_folder(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        pretrained_weights("hf", name.removeprefix("hf:"), allow_download=False)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            TextShape(12, VOCABULARY + 1),
            f"embeds {VOCABULARY} tokens, but the tokenizer has {VOCABULARY + 1}, so it does",
        ),
        (
            TextShape(25, VOCABULARY),
            "has 24 positions, but the texts have up to 25 tokens; set data.max_length: 24",
        ),
        ((3, 8, 8), "takes texts, but the samples are not"),
    ],
)
def test_data_that_does_not_suit_the_network_is_refused(name, shape, message):
    with pytest.raises(UserError, match=message):
        build_model(ModelConfig(name=name), shape, 2)


def test_tokenizer_may_lack_a_few_rows_that_round_the_table_up(tmp_path):
    name = bert_folder(tmp_path, vocab_size=VOCABULARY + 100)
    assert built(name)(ids()).shape == (4, 3)
    name = bert_folder(tmp_path, vocab_size=VOCABULARY + 200)
    with pytest.raises(UserError, match="does not belong to the network"):
        built(name)


def test_missing_package_is_named_with_its_command(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs the package transformers: pip install 'advtrain\[text\]'"):
        built(name)


def test_download_fills_the_cache_and_leaves_folders_alone(tmp_path, monkeypatch):
    name = bert_folder(tmp_path / "bert")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    asked = []

    def fetch(repository, allow_patterns):
        asked.append(repository)
        if repository == "org/none":
            raise OSError("404 no such repository")
        snapshot = tmp_path / "hub" / "models--org--bert" / "snapshots" / "abc"
        snapshot.parent.mkdir(parents=True)
        (tmp_path / "bert").rename(snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("abc")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    download(name.removeprefix("hf:"))
    with pytest.raises(UserError, match="lacks it; name a folder with .*, or download it from the hub"):
        pretrained_folder("org/bert")
    download("org/bert")
    download("org/bert")  # from the cache
    assert asked == ["org/bert"]
    assert built("hf:org/bert")(ids()).shape == (4, 3)
    with pytest.raises(UserError, match="'hf:org/none' cannot be downloaded from the Hugging Face hub: 404"):
        download("org/none")


def test_sizes_of_the_test_network_are_those_of_its_folder(name):
    assert built(name).network.transformer.config.hidden_size == SIZES["hidden_size"]
