"""The figures of `msplora analyse`: those of the dense updates, by numpy's decompositions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import msplora
from adapted_llama import adapted
from largest_tensor import NothingAsLargeAs
from msplora.analysis.chance import explained_of_turned, random_principal_cosines
from msplora.analysis.results import AdapterResult, KindResult, LevelOverlap
from oracle import plan_of, weight_delta
from tiny import MODELS

Array = Any


def dense_levels(model: Any) -> dict[str, dict[str, Array]]:
    """Site → level → the dense update s B A, (O, I), by the oracle of the tests."""
    plan, factors = plan_of(model), msplora.factors(model)
    root = model.get_base_model()
    found: dict[str, dict[str, Array]] = {site.key: {} for site in plan.sites}
    for pair in plan.pairs:
        a, b, scale = factors[pair.address]
        for key in pair.sites:
            base = root.get_submodule(key).get_base_layer()
            delta = weight_delta(plan.site_of[key], base, a.detach(), b.detach(), scale)
            found[key][pair.level] = delta.double().numpy()
    return found


def column_space(update: Array) -> Array:
    """An orthonormal basis, (O, rank)."""
    left, values, _ = np.linalg.svd(update)
    return left[:, : int((values > 1e-5 * values[0]).sum())]


def overlap(one: Array, other: Array) -> float:
    cosines = np.linalg.svd(column_space(one).T @ column_space(other), compute_uv=False)
    return float((cosines**2).mean())


def share_inside(update: Array, span: Array) -> float:
    return float(np.linalg.norm(span.T @ update) ** 2 / np.linalg.norm(update) ** 2)


def cosine(one: Array, other: Array) -> float:
    return float((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))


def close(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(
        np.array(found, dtype=float), np.array(expected), rtol=tolerance, atol=1e-9
    )


@pytest.fixture(scope="module")
def model() -> Any:
    return adapted(r=4)


@pytest.fixture(scope="module")
def deltas(model: Any) -> dict[str, dict[str, Array]]:
    return dense_levels(model)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    MODELS["llama"].model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def result(model: Any, base: Path, tmp_path_factory: pytest.TempPathFactory) -> AdapterResult:
    folder = tmp_path_factory.mktemp("pyramid")
    model.save_pretrained(folder)
    (found,) = msplora.analyse(folder, base=str(base), intruder_vectors=6).adapters
    return found


def test_norms_shares_spectra_and_ranks(result: AdapterResult, deltas: Any) -> None:
    sites = [site for kind in result.kinds for site in kind.sites]
    assert {site.key for site in sites} == set(deltas)
    for site in sites:
        of_levels = deltas[site.key]
        assert list(site.levels) == list(of_levels) == ["global", "mid", "local"]
        squares = sum(np.linalg.norm(its) ** 2 for its in of_levels.values())
        measured = [(site.update, sum(of_levels.values()), 1.0)]
        for level, its in of_levels.items():
            measured.append((site.levels[level], its, np.linalg.norm(its) ** 2 / squares))
        for found, dense, share in measured:
            values = np.linalg.svd(dense, compute_uv=False)
            close(found.norm, np.linalg.norm(dense))
            close(found.share, share)
            close(found.singular_values, values[: len(found.singular_values)])
            assert found.numerical_rank == np.linalg.matrix_rank(dense.astype(np.float32))
            assert len(found.singular_values) == found.numerical_rank
            kept = values[: found.numerical_rank]
            shares = kept / kept.sum()
            close(found.effective_rank, np.exp(-(shares * np.log(shares)).sum()))
            close(found.stable_rank, (kept**2).sum() / kept[0] ** 2)


def kind_and_deltas(result: AdapterResult, deltas: Any, name: str) -> tuple[KindResult, Any]:
    (kind,) = [kind for kind in result.kinds if kind.name == name]
    return kind, [sum(deltas[site.key].values()) for site in kind.sites]


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.v_proj"])
def test_similarity_of_layers(name: str, result: AdapterResult, deltas: Any) -> None:
    kind, dense = kind_and_deltas(result, deltas, name)
    similarity = kind.similarity
    assert similarity is not None
    close(similarity.cosine, [[cosine(one, other) for other in dense] for one in dense])
    close(similarity.columns, [[overlap(one, other) for other in dense] for one in dense])
    close(similarity.rows, [[overlap(one.T, other.T) for other in dense] for one in dense])
    pairs = [(i, j) for i in range(len(dense)) for j in range(i + 1, len(dense))]
    for found, transpose in ((similarity.principal_columns, False), (similarity.principal_rows, 1)):
        sides = [its.T if transpose else its for its in dense]
        cosines = [
            np.linalg.svd(column_space(sides[i]).T @ column_space(sides[j]), compute_uv=False)
            for i, j in pairs
        ]
        close(found, np.mean(cosines, axis=0))
    close(similarity.random_columns, 7 / kind.out_features)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.v_proj"])
def test_what_one_shared_space_or_pair_explains(
    name: str, result: AdapterResult, deltas: Any
) -> None:
    kind, dense = kind_and_deltas(result, deltas, name)
    assert kind.shared is not None
    total = sum(np.linalg.norm(its) ** 2 for its in dense)
    for found, joined in (
        (kind.shared.columns, np.concatenate(dense, axis=1)),
        (kind.shared.rows, np.concatenate(dense, axis=0)),
    ):
        values = np.linalg.svd(joined, compute_uv=False)
        close(found, (np.cumsum(values**2) / total)[: len(found)])
    left, values, right = np.linalg.svd(sum(dense) / len(dense))
    for rank, found in enumerate(kind.shared.pair, start=1):
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        rest = sum(np.linalg.norm(its - best) ** 2 for its in dense)
        close(found, 1 - rest / total)
    assert len(kind.shared.pair) == 7  # what each layer has


def test_overlap_of_levels(result: AdapterResult, deltas: Any) -> None:
    for kind in result.kinds:
        assert [(its.level, its.of) for its in kind.decoupling] == [
            ("global", ("mid",)),
            ("global", ("local",)),
            ("mid", ("global",)),
            ("mid", ("local",)),
            ("local", ("global",)),
            ("local", ("mid",)),
            ("local", ("global", "mid")),
        ]
        for found in kind.decoupling:
            for place, site in enumerate(kind.sites):
                check_overlap(found, place, deltas[site.key])
    last = result.kinds[0].decoupling[-1]
    close(last.random_columns, 6 / 32)


def check_overlap(found: LevelOverlap, place: int, of_levels: dict[str, Array]) -> None:
    update = of_levels[found.level]
    others = [of_levels[other] for other in found.of]
    close(found.columns[place], share_inside(update, column_space(np.hstack(others))))
    rows = column_space(np.hstack([other.T for other in others]))
    close(found.rows[place], share_inside(update.T, rows))
    if len(others) == 1:
        close(found.cosine[place], cosine(update, others[0]))
    else:
        assert found.cosine == ()


def test_against_the_base(result: AdapterResult, deltas: Any) -> None:
    root = MODELS["llama"].model()
    for kind in result.kinds:
        for site in kind.sites:
            weight = root.get_submodule(site.key).weight.detach().double().numpy()
            update = sum(deltas[site.key].values())
            close(site.base_norm, np.linalg.norm(weight))
            close(site.relative_norm, np.linalg.norm(update) / np.linalg.norm(weight))
            for level, its in deltas[site.key].items():
                relative = np.linalg.norm(its) / np.linalg.norm(weight)
                close(site.levels[level].relative_norm, relative)
            before = np.linalg.svd(weight)[0][:, : min(weight.shape)]
            after = np.linalg.svd(weight + update)[0][:, :6]
            cosines = np.abs(before.T @ after).max(axis=0)
            assert site.intruders is not None
            np.testing.assert_allclose(site.intruders.cosines, cosines, atol=1e-4)
            assert site.intruders.count == (cosines < 0.5).sum()
    assert any(site.intruders.count for kind in result.kinds for site in kind.sites)  # pyright: ignore


def lora_of_ranks(folder: Path, ranks: list[int]) -> Path:
    """A LoRA on every q_proj, of a rank for each layer; 0 is an update of zero."""
    config = LoraConfig(
        r=1,
        target_modules=["q_proj"],
        init_lora_weights=False,
        rank_pattern={rf".*\.{place}\..*": rank for place, rank in enumerate(ranks) if rank},
    )
    model: Any = get_peft_model(MODELS["llama"].model(), config)
    with torch.no_grad():
        for place, rank in enumerate(ranks):
            if not rank:
                layer = model.get_base_model().model.layers[place].self_attn.q_proj
                layer.lora_B["default"].weight.zero_()
    model.save_pretrained(folder)
    return folder


def lora_of_orthogonal_layers(folder: Path) -> Path:
    """A LoRA of rank 2 on four layers that write to and read from directions of their own."""
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"])
    model: Any = get_peft_model(MODELS["llama"].model(), config)
    with torch.no_grad():
        for place in range(4):
            layer = model.get_base_model().model.layers[place].self_attn.q_proj
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            own = slice(2 * place, 2 * place + 2)
            a.zero_()[:, own] = torch.eye(2)
            b.zero_()[own] = torch.diag(torch.tensor([4.0 - place, 1.0]))
    model.save_pretrained(folder)
    return folder


def test_what_is_explained_of_layers_with_nothing_in_common(tmp_path: Path) -> None:
    found = msplora.analyse(lora_of_orthogonal_layers(tmp_path)).adapters[0].kinds[0].shared
    assert found is not None
    squares = [16, 9, 4, 1, 1, 1, 1, 1]
    expected = [16 / sum(squares), 25 / sum(squares)]
    for of in (found.columns, found.rows):
        close(of, expected)
    close(found.pair, [its / 4 for its in expected])
    # Random layers always have more in common than those.
    for of, chance in ((found.columns, found.random_columns), (found.pair, found.random_pair)):
        assert all(one < other < 1 for one, other in zip(of, chance, strict=True))  # pyright: ignore


def dense_turned(values: Array, shape: tuple[int, int], generator: Any) -> list[Array]:
    """Updates with these singular values, (layers, K), and random singular vectors."""
    count, found = values.shape[1], []
    for of_layer in values:
        left, right = (np.linalg.qr(generator.standard_normal((its, count)))[0] for its in shape)
        signs = generator.choice([-1, 1], count)
        found.append((left * signs * of_layer) @ right.T)
    return found


# All singular vectors have room to be orthogonal, those of one side have, and none have.
@pytest.mark.parametrize("shape", [(40, 60), (9, 40), (6, 5)])
def test_what_is_explained_by_chance_is_what_is_of_dense_random_turns(
    shape: tuple[int, int],
) -> None:
    values = np.array([[3.0, 1, 0.5], [2, 2, 0], [0, 0, 0], [1, 1, 1]])
    total, generator = (values**2).sum(), np.random.default_rng(1)
    draws = []
    for _ in range(400):
        dense = dense_turned(values, shape, generator)
        columns, rows, pair = (
            np.cumsum(np.linalg.svd(its, compute_uv=False)[:3] ** 2)
            for its in (np.concatenate(dense, axis=1), np.concatenate(dense), sum(dense))
        )
        draws.append(np.array([columns, rows, pair / len(dense)]) / total)
    found = torch.stack(explained_of_turned(torch.from_numpy(values), *shape))
    np.testing.assert_allclose(found, np.mean(draws, axis=0), atol=0.012)


def test_chance_is_drawn_without_a_matrix_of_all_layers() -> None:
    layers, rank = 80, 28
    with NothingAsLargeAs((layers * rank) ** 2 // 4):
        columns, rows, pair = explained_of_turned(torch.ones(layers, rank), 8192, 8192)
    # The k largest are a little more than their part of all, and of a sum a part of that.
    for curve, least in ((columns, 1), (rows, 1), (pair, 1 / layers)):
        part = curve * layers * rank / least / torch.arange(1, rank + 1)
        assert bool(((part > 1.2) & (part < 4.5)).all()), part


def test_layers_of_random_numbers_explain_what_chance_does(tmp_path: Path) -> None:
    """Though that is far more than of layers that are orthogonal."""
    torch.manual_seed(0)
    kind = msplora.analyse(lora_of_ranks(tmp_path, [8] * 4)).adapters[0].kinds[0]
    assert kind.shared is not None
    of = kind.shared
    for found, chance in (
        (of.columns, of.random_columns),
        (of.rows, of.random_rows),
        (of.pair, of.random_pair),
    ):
        np.testing.assert_allclose(np.array(found), np.array(chance), rtol=0.25)


@pytest.mark.parametrize("features", [5, 9, 60])
def test_the_principal_angles_of_random_spaces(features: int) -> None:
    generator = np.random.default_rng(1)
    ranks, draws = [4, 2, 0, 4], []
    for _ in range(400):
        spaces = [np.linalg.qr(generator.standard_normal((features, rank)))[0] for rank in ranks]
        of = [
            np.linalg.svd(spaces[one].T @ spaces[other], compute_uv=False)
            for one, other in ((0, 1), (0, 3), (1, 3))
        ]
        draws.append([np.mean([its[k] for its in of if len(its) > k]) for k in range(4)])
    found = random_principal_cosines(torch.tensor(ranks), features)
    np.testing.assert_allclose(found, np.mean(draws, axis=0), atol=0.06)
    assert len(random_principal_cosines(torch.tensor([3, 0]), features)) == 0


def test_chance_is_that_of_the_pairs_that_are_compared(tmp_path: Path) -> None:
    """Zero updates have no overlap, and a space of rank r in one of rank r' has max(r, r') / n."""
    one = lora_of_ranks(tmp_path / "one", [3, 5, 0, 3])
    other = lora_of_ranks(tmp_path / "other", [4, 2, 4, 0])
    found = msplora.analyse(one, other)
    ((kind,), _) = (its.kinds for its in found.adapters)
    assert kind.similarity is not None
    # Layers 0 and 1, 0 and 3, 1 and 3.
    close(kind.similarity.random_columns, (5 + 3 + 5) / 3 / 32)
    (beside,) = found.comparisons[0].kinds
    assert [its is None for its in beside.columns] == [False, False, True, True]
    close([beside.random_columns, beside.random_rows], [(4 + 5) / 2 / 32] * 2)
    alone = msplora.analyse(lora_of_ranks(tmp_path / "alone", [0, 5, 0, 0]))
    assert alone.adapters[0].kinds[0].similarity is not None
    assert alone.adapters[0].kinds[0].similarity.random_rows is None
    alone.to_html()


def test_chance_between_levels_is_that_of_the_layers_that_have_an_update(tmp_path: Path) -> None:
    model = adapted(r=4)
    with torch.no_grad():
        for address, (_, b, _) in msplora.factors(model).items():
            # One global pair, and a local one in the first layer only.
            b.mul_(not address.startswith("mid") and not address.startswith(("local/1", "local/2")))
            b.mul_(not address.startswith("local/3"))
    model.save_pretrained(tmp_path)
    (found,) = msplora.analyse(tmp_path).adapters
    for kind in found.kinds:
        within = {(its.level, its.of): its for its in kind.decoupling}
        assert within["local", ("mid",)].random_columns == 0
        close(within["local", ("global", "mid")].random_columns, 4 / kind.out_features)
        assert within["mid", ("global",)].columns == (None,) * 4
        assert within["mid", ("global",)].random_columns is None
        # Of four layers one has a local update that is no zero.
        close(within["global", ("local",)].random_columns, 1 / 4 / kind.out_features)


def test_chance_over_all_kinds_weighs_them_as_the_figure_beside_it(tmp_path: Path) -> None:
    """A head is one weight, and the queries are four."""
    adapted(r=4, target_modules=["q_proj", "lm_head"]).save_pretrained(tmp_path)
    (found,) = msplora.analyse(tmp_path).adapters
    of_query, of_head = 6 / 32, 6 / 64
    close(found.random_inside_coarser("local"), [(4 * of_query + of_head) / 5, 6 / 32])
