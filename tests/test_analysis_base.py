"""The base of `msplora analyse`: which weights it reads, of which model, and what it refuses."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import msplora
from adapted_llama import adapted
from analysed import WEIGHTS, edit, refused, save
from msplora.analysis import against_base
from msplora.analysis import base as base_module
from msplora.analysis.reading import read_adapter
from msplora.analysis.weight_files import weight_files
from msplora.loading import BaseOptions
from msplora.random_weights import RandomWeightsWarning
from tiny import MODELS, llama


def test_a_head_that_is_tied_has_the_weight_of_the_embedding(tmp_path: Path) -> None:
    base: Any = llama(2, tie_word_embeddings=True)
    config = LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    base.save_pretrained(tmp_path / "base")
    folder = save(get_peft_model(base, config), tmp_path)
    stored = load_file(tmp_path / "base/model.safetensors")
    assert not any("lm_head" in name for name in stored)
    (found,) = msplora.analyse(folder, base=str(tmp_path / "base"), intruder_vectors=1).adapters
    (head,) = [kind for kind in found.kinds if kind.name == "lm_head"]
    norm = float(stored["model.embed_tokens.weight"].norm())
    assert head.sites[0].base_norm == pytest.approx(norm, rel=1e-5)
    assert not any("in another form" in note for note in found.notes)


def test_of_a_hub_s_files_only_the_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts, hub = tmp_path / "whole", tmp_path / "parts", tmp_path / "hub"
    MODELS["llama"].model().save_pretrained(whole)
    MODELS["llama"].model().save_pretrained(parts, max_shard_size="50KB")
    shards = {file.name for file in parts.glob("*.safetensors")}
    assert len(shards) > 1
    for repository in (whole, parts):
        (repository / "original").mkdir()
        for copy in ("consolidated.safetensors", "original/model.safetensors"):
            (repository / copy).write_bytes(b"a second copy")
    read_config = transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(
        transformers.AutoConfig,
        "from_pretrained",
        lambda source, **_: read_config(str(tmp_path / source.partition("/")[2])),
    )

    def download(source: str, *, allow_patterns: list[str], **_: Any) -> str:
        to = hub / source
        repository = tmp_path / source.partition("/")[2]
        paths = [str(its.relative_to(repository)) for its in repository.rglob("*") if its.is_file()]
        for path in huggingface_hub.utils.filter_repo_objects(paths, allow_patterns=allow_patterns):
            (to / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / path, to / path)
        to.mkdir(parents=True, exist_ok=True)
        return str(to)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = save(adapted(), tmp_path / "pyramid")
    norms = []
    for name in ("whole", "parts"):
        (found,) = msplora.analyse(folder, base=f"org/{name}", intruder_vectors=0).adapters
        norms.append([site.base_norm for kind in found.kinds for site in kind.sites])
        fetched = {its.name for its in (hub / "org" / name).rglob("*") if its.is_file()}
        assert {its for its in fetched if its.endswith(".safetensors")} == (
            {"model.safetensors"} if name == "whole" else shards
        )
    assert norms[0] == norms[1]
    assert None not in norms[0]


def test_the_index_says_which_files_there_are(tmp_path: Path) -> None:
    base = tmp_path / "base"
    MODELS["llama"].model().save_pretrained(base, max_shard_size="50KB")
    shards = sorted(base.glob("model-*.safetensors"))
    (base / "model.fp16.safetensors").write_bytes(b"of another dtype")
    assert weight_files(base) == shards
    folder = save(adapted(), tmp_path / "pyramid")
    (base / "model.safetensors.index.json").write_text("[]")
    refused(folder, base=str(base), match="has no weight_map")


@pytest.mark.parametrize("method", [LoraConfig, msplora.MSPLoraConfig])
def test_a_base_that_is_not_the_named_one_is_said(method: Any, tmp_path: Path) -> None:
    base = MODELS["llama"].model()
    base.save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    config = method(target_modules=["q_proj"])
    folder = save(get_peft_model(base, config), tmp_path)
    edit(folder, base_model_name_or_path=str(tmp_path / "base"))
    for name, said in (("base", False), ("other", True)):
        (found,) = msplora.analyse(folder, base=tmp_path / name, intruder_vectors=0).adapters
        notes = [note for note in found.notes if "measured against" in note]
        assert bool(notes) == said
        assert all("other. Unless" in note and str(tmp_path.parent) not in note for note in notes)


def test_less_than_no_vectors_are_refused(tmp_path: Path) -> None:
    folder = save(adapted(), tmp_path, MODELS["llama"].model())
    refused(folder, base=tmp_path / "base", intruder_vectors=-1, match="has to be 0 or more")


def test_layers_that_peft_repeats_are_not_laid_beside_the_base(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 4)])
    MODELS["llama"].model().save_pretrained(tmp_path / "base")
    folder = save(get_peft_model(MODELS["llama"].model(), config), tmp_path)
    refused(folder, base=str(tmp_path / "base"), match="layer_replication.* without --base")
    assert len(msplora.analyse(folder).adapters[0].kinds[0].sites) == 5


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_a_quantised_base_and_one_without_safetensors(name: str, tmp_path: Path) -> None:
    """Llava's files call the weights by other names than the model does."""
    tiny = MODELS[name]
    model = adapted(tiny.model(), target_modules=tiny.targets)
    folder = save(model, tmp_path, tiny.model())
    base, file = str(tmp_path / "base"), tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    packed = {key.replace("proj.weight", "proj.qweight"): its for key, its in tensors.items()}
    for stored in (tensors, packed):
        save_file({key: its.to(torch.int8) for key, its in stored.items()}, file)
        # Before anything is spent: the data, which is measured first, is not looked for.
        refused(folder, base=base, data="nowhere.jsonl", match="I8: it is quantised")
    file.unlink()
    refused(folder, base=base, match="no weights in safetensors")


def test_only_what_the_base_s_files_hold_as_such_is_read_and_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's experts are one tensor there, which none of their updates is for."""
    tiny = MODELS["gpt-oss"]
    asked = {"target_modules": tiny.targets, "target_parameters": list(tiny.parameters)}
    folder = save(adapted(tiny.model(), **asked), tmp_path, tiny.model())
    read, said = list[str](), list[str]()

    class Watched:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.opened = safe_open(*arguments, **options)

        def __enter__(self) -> Any:
            self.opened.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.opened.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.opened, name)

        def get_tensor(self, name: str) -> Any:
            read.append(name)
            return self.opened.get_tensor(name)

    monkeypatch.setattr(base_module, "safe_open", Watched)
    (found,) = msplora.analyse(
        folder, base=str(tmp_path / "base"), intruder_vectors=1, notify=said.append
    ).adapters
    assert read == [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(4)]
    assert said[0].startswith("Intruder dimensions take 8 dense singular value decompositions")
    assert "of up to 32 × 32" in said[0]
    assert any(f"hold {4 * 2 * 4} of the {4 * 9} weights in another" in its for its in found.notes)


@pytest.mark.parametrize(
    ("method", "tokens"), [(LoraConfig, 70), (LoraConfig, 60), (msplora.MSPLoraConfig, 70)]
)
def test_the_adapter_brings_more_or_fewer_tokens(method: Any, tokens: int, tmp_path: Path) -> None:
    """As many as the training gave the base, whose files have 64."""
    base: Any = llama(2)
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(tokens)
    config = method(target_modules=["embed_tokens", "lm_head", "q_proj"], r=4)
    folder = save(get_peft_model(base, config), tmp_path)
    tensors = load_file(folder / WEIGHTS)
    del tensors["base_model.model.lm_head.base_layer.weight"]
    save_file(tensors, folder / WEIGHTS)
    with warnings.catch_warnings():  # nothing is made up where nothing is loaded
        warnings.simplefilter("error", RandomWeightsWarning)
        (found,) = msplora.analyse(folder, base=tmp_path / "base", intruder_vectors=0).adapters
    norms = {kind.name: kind.sites[0].base_norm for kind in found.kinds}
    assert norms.pop("self_attn.q_proj") is not None
    assert norms == {"model.embed_tokens": None, "lm_head": None}
    assert any("hold 2 of the 4 weights in another form or size" in note for note in found.notes)


def test_adapters_side_by_side_share_the_decompositions_of_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MODELS["llama"].model().save_pretrained(tmp_path / "base")
    lora = LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    folders = [
        save(get_peft_model(MODELS["llama"].model(), lora), tmp_path / "lora"),
        save(adapted(target_modules=["q_proj"]), tmp_path / "pyramid"),
    ]
    options: dict[str, Any] = {"base": tmp_path / "base", "intruder_vectors": 2}
    alone = [msplora.analyse(folder, **options).adapters[0].kinds for folder in folders]
    decompose, decomposed, said = against_base.left_vectors, list[int](), list[str]()
    monkeypatch.setattr(
        against_base, "left_vectors", lambda its: [decomposed.append(1), decompose(its)][1]
    )
    found = msplora.analyse(*folders, **options, notify=said.append)
    assert [adapter.kinds for adapter in found.adapters] == alone
    assert all(kind.intruders is not None for kinds in alone for kind in kinds)
    assert len(decomposed) == 8
    assert "take 20 dense" in said[0]
    assert "of 8 weights of the base and of 12 adapted ones" in said[0]


def test_another_revision_of_the_base_is_another_base(tmp_path: Path) -> None:
    """An adapter may name the one that it was made for."""
    MODELS["llama"].model().save_pretrained(tmp_path / "base")
    folder = save(adapted(target_modules=["q_proj"]), tmp_path / "pyramid")
    read = [read_adapter(folder, BaseOptions(str(tmp_path / "base"))) for _ in range(2)]
    assert [len(places) for places in against_base.weights_of(read).values()] == [2] * 4
    (_, first), (_, second) = read
    assert first is not None
    assert second is not None
    source, revision = second.weights
    assert first.weights == (source, revision)
    second.weights = source, "of another time"
    found = against_base.weights_of(read)
    assert len(found) == 8
    assert all(len(places) == 1 for places in found.values())
