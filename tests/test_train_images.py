"""Runs on images: every layout is read, what is no image is named, and all verbs work."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from PIL import Image

from msplora.train.data_files import DataError
from msplora.train.data_images import open_image, read_images
from msplora.train.settings_data import DataSettings
from runs import Result, answered_rows, save_decoder, tensors, tree, write_config, write_jsonl
from runs import msplora as command
from tiny_images import COLOURS, SIDE, paint, paint_folder, processor, save_vision_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and images of three colours."""
    folder = tmp_path_factory.mktemp("images")
    save_vision_model(folder / "base")
    paint_folder(folder / "pets", 12)
    return folder


def config(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "model": str(folder / "base"),
        "task": "image-classification",
        "output": str(folder / name),
        "data": {"train": str(folder / "pets"), "validation_fraction": 0.25},
        "adapter": {"target_modules": "all-linear"},
        "training": {"epochs": 3, "batch_size": 8, "learning_rate": 0.01},
    }
    return content | changes


def train(folder: Path, name: str, *flags: object, **changes: Any) -> Result:
    file = write_config(folder / f"{name}.yaml", config(folder, name, **changes))
    result = command("train", file, *flags)
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """What the run of a pyramid printed."""
    return train(folder, "run").out


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def test_it_learns_the_colours_and_says_what_it_does(folder: Path, printed: str) -> None:
    metrics = read_json(folder / "run/metrics.json")
    assert metrics["metric_for_best"] == "accuracy"
    assert metrics["best"]["accuracy"] == metrics["best"]["macro_f1"] == 1.0
    assert "3 classes: blue, green, red" in printed
    assert "training: 27 images" in printed
    assert "held out: 9 images" in printed
    assert "0.png: 20 × 30, given to the model as 16 × 16 × 3" in printed
    assert "→ label = blue" in printed


def test_the_head_trains_beside_the_adapter_and_is_not_adapted(folder: Path, printed: str) -> None:
    plan = read_json(folder / "run/plan.json")
    assert plan["trainable_head"] == 16 * 3 + 3
    kinds = {kind["kind"] for kind in plan["plan"]["kinds"]}
    assert len(kinds) == 6  # query, key, value, output, and two of the perceptron
    assert not any("classifier" in kind for kind in kinds)
    saved = tensors(folder / "run/adapter")
    heads = [key for key in saved if "classifier" in key]
    assert sorted(heads) == [f"base_model.model.classifier.{its}" for its in ("bias", "weight")]
    assert (folder / "run/adapter/preprocessor_config.json").is_file()
    config = read_json(folder / "run/adapter/adapter_config.json")
    assert config["auto_mapping"]["base_model_class"] == "ViTForImageClassification"


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(its, marks=pytest.mark.slow) for its in ("full", "frozen"))]
)
def test_every_method_trains_the_same_head(folder: Path, method: str) -> None:
    train(folder, method, method=method, training={"max_steps": 2, "batch_size": 8})
    plan = read_json(folder / method / "plan.json")
    if method != "full":
        assert plan["trainable_head"] == 16 * 3 + 3
    if method == "lora":
        saved = tensors(folder / method / "adapter")
        assert not any("classifier" in key and "lora" in key for key in saved)
    result = command("eval", folder / method, "--json")
    assert result.code == 0, result.err
    best = read_json(folder / method / "metrics.json")["best"]
    assert result.json()["loss"] == pytest.approx(best["loss"], rel=1e-5)
    assert result.json()["data"] == "held out by the run"


def logits_by_hand(folder: Path, file: Path) -> torch.Tensor:
    base = hf.AutoModelForImageClassification.from_pretrained(
        folder / "base", num_labels=3, ignore_mismatched_sizes=True
    )
    model = peft.PeftModel.from_pretrained(base, str(folder / "run/adapter")).eval()
    image = Image.open(file).convert("RGB")
    pixels = hf.AutoImageProcessor.from_pretrained(folder / "base")(image, return_tensors="pt")
    with torch.no_grad():
        return model(**pixels).logits[0]


def test_predict_and_eval_see_what_the_model_sees(folder: Path, printed: str) -> None:
    given = paint_folder(folder / "given", 1)
    flat = folder / "flat"
    for colour in COLOURS:
        paint(flat / f"{colour}.png", colour, 3)
    write_jsonl(folder / "given.jsonl", [{"image": f"flat/{colour}.png"} for colour in COLOURS])
    for source in (flat, folder / "given.jsonl"):
        result = command("predict", folder / "run", source, "--json", "--batch-size", 2)
        assert result.code == 0, result.err
        rows = [json.loads(line) for line in result.out.splitlines()]
        assert [row["prediction"] for row in rows] == sorted(COLOURS)
        for row in rows:
            expected = logits_by_hand(folder, Path(row["image"])).softmax(-1).tolist()
            assert list(row["probabilities"].values()) == pytest.approx(expected, abs=1e-5)
    result = command("eval", folder / "run", "--json")
    best = read_json(folder / "run/metrics.json")["best"]
    assert result.json()["loss"] == pytest.approx(best["loss"], rel=1e-5)
    result = command("eval", folder / "run", "--data", given, "--json")
    assert result.json()["rows"] == 3
    assert result.json()["accuracy"] == 1.0


def test_it_is_converted_with_its_processor(folder: Path, printed: str) -> None:
    for to in ("lora", "merged"):
        out = folder / f"converted-{to}"
        result = command("convert", folder / "run", out, "--to", to)
        assert result.code == 0, result.err
        assert (out / "preprocessor_config.json").is_file()
    file = paint(folder / "one.png", "red", 5)
    merged = hf.AutoModelForImageClassification.from_pretrained(folder / "converted-merged").eval()
    assert merged.config.id2label == dict(enumerate(sorted(COLOURS)))
    pixels = hf.AutoImageProcessor.from_pretrained(folder / "converted-merged")(
        Image.open(file), return_tensors="pt"
    )
    with torch.no_grad():
        found = merged(**pixels).logits[0]
    assert torch.allclose(found, logits_by_hand(folder, file), atol=1e-4)


def test_the_card_says_how_to_load_it(folder: Path, printed: str) -> None:
    card = (folder / "run/README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    found: dict[str, Any] = {}
    exec(code.replace('"adapter"', repr(str(folder / "run/adapter"))), found)
    file = paint(folder / "two.png", "green", 5)
    pixels = processor()(Image.open(file), return_tensors="pt")
    with torch.no_grad():
        logits = found["model"].eval()(**pixels).logits[0]
    assert torch.allclose(logits, logits_by_hand(folder, file), atol=1e-5)


def names(images: list[Any]) -> list[str]:
    return [Path(image.source).parent.name for image in images]


def test_a_divided_folder_a_table_and_a_folder_agree(tmp_path: Path) -> None:
    paint_folder(tmp_path / "divided/train", 2)
    paint_folder(tmp_path / "divided/val", 1)
    train, held_out, classes = read_images(DataSettings(train=str(tmp_path / "divided")), 0)
    assert classes.labels == ("blue", "green", "red")
    assert len(train), len(held_out) == (6, 3)
    # By turns, so that a few rows are of all classes.
    assert names(train)[:3] == ["blue", "green", "red"]
    some = DataSettings(train=str(tmp_path / "divided"), max_rows=3)
    assert names(read_images(some, 0)[0]) == ["blue", "green", "red"]

    rows = ["picture,kind", *(f"{c}/{n}.png,{c}" for n in range(2) for c in sorted(COLOURS))]
    (tmp_path / "divided/train/table.csv").write_text("\n".join(rows))
    table = DataSettings(
        train=str(tmp_path / "divided/train/table.csv"),
        validation=str(tmp_path / "divided/val"),
        image_column="picture",
        label_column="kind",
    )
    again, held_again, _ = read_images(table, 0)
    assert [its.source for its in again] == [its.source for its in train]
    assert [its.label for its in again] == [its.label for its in train]
    assert held_again == held_out
    both = DataSettings(
        train=str(tmp_path / "divided/train"), validation=str(tmp_path / "divided/val")
    )
    assert read_images(both, 0)[:2] == (train, held_out)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train", "car"):
        for place in range(3):
            paint(tmp_path / name / f"{place}.png", "red", place)
    (tmp_path / "car/.DS_Store").write_text("no image")
    _, _, classes = read_images(DataSettings(train=str(tmp_path)), 0)
    assert classes.labels == ("car", "train")


def test_images_of_the_hub_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    files = [str(paint(tmp_path / f"{c}.png", c, 0)) for c in COLOURS for _ in range(2)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS))}
    )
    data = datasets.Dataset.from_dict(
        {"image": files, "label": [0, 0, 1, 1, 2, 2]}, features=features
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    train, held_out, classes = read_images(DataSettings(hub="some/colours"), 0)
    assert len(train) + len(held_out) == 6
    assert set(classes.labels) == set(COLOURS)
    for image in train:
        assert image.label is not None
        assert open_image(image).getpixel((0, 0)) == COLOURS[classes.labels[image.label]]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_kind_of_image_becomes_rgb(mode: str, tmp_path: Path) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    for colour in ("red", "blue"):
        for place in range(2):
            file = tmp_path / f"all/{colour}/{place}.{suffix}"
            if mode == "I;16":
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("I;16", (8, 8), 40_000).save(file)
            else:
                paint(file, colour, place, mode)
    train, _, _ = read_images(DataSettings(train=str(tmp_path / "all")), 0)
    assert open_image(train[0]).mode == "RGB"


def test_an_image_is_turned_upright(tmp_path: Path) -> None:
    for colour in ("red", "blue"):
        file = tmp_path / colour / "1.jpg"
        file.parent.mkdir()
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was held upright
        Image.new("RGB", (30, 20), COLOURS[colour]).save(file, exif=exif)
        paint(tmp_path / colour / "2.png", colour, 0)
    train, held_out, _ = read_images(DataSettings(train=str(tmp_path)), 0)
    turned = next(its for its in train + held_out if its.source.endswith(".jpg"))
    assert open_image(turned).size == (20, 30)


def broken(folder: Path) -> Path:
    file = folder / "red/1.png"
    file.write_bytes(file.read_bytes()[:60])
    return file


def no_image(folder: Path) -> Path:
    (folder / "red/1.png").write_text("no image at all")
    return folder / "red/1.png"


def empty_class(folder: Path) -> Path:
    (folder / "black").mkdir()
    return folder / "black"


def one_class(folder: Path) -> Path:
    for file in (*(folder / "red").iterdir(), *(folder / "green").iterdir()):
        file.unlink()
    for name in ("red", "green"):
        (folder / name).rmdir()
    return folder


SPOILT = {
    "cut short": (broken, "cannot be read"),
    "no image": (no_image, "is in no format that is known"),
    "empty class": (empty_class, "holds no image"),
    "one class": (one_class, "needs two or more"),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=SPOILT)
def test_a_spoilt_folder_is_refused_and_the_file_named(
    folder: Path, tmp_path: Path, spoil: Any, said: str
) -> None:
    named = spoil(paint_folder(tmp_path / "pets", 3))
    data = {"train": str(tmp_path / "pets")}
    file = write_config(tmp_path / "c.yaml", config(folder, "never", data=data))
    before = tree(folder)
    result = command("train", file)
    assert result.code == 1
    assert said in result.error
    assert str(named) in result.error
    assert tree(folder) == before


def test_a_path_to_nothing_is_refused_with_its_line(tmp_path: Path) -> None:
    paint(tmp_path / "1.png", "red", 0)
    (tmp_path / "t.csv").write_text("image,label\n1.png,red\n2.png,blue\n1.png,red\n1.png,blue\n")
    with pytest.raises(DataError, match=r"t\.csv, line 3: the image .*2\.png does not exist"):
        read_images(DataSettings(train=str(tmp_path / "t.csv")), 0)
    (tmp_path / "t.csv").write_text("image,label\n1.png,red\n,blue\n1.png,red\n1.png,blue\n")
    with pytest.raises(DataError, match=r"line 3: the column 'image' holds nothing"):
        read_images(DataSettings(train=str(tmp_path / "t.csv")), 0)


def test_a_flat_folder_is_refused_with_the_layout(tmp_path: Path) -> None:
    paint(tmp_path / "1.png", "red", 0)
    with pytest.raises(DataError, match="one for each class"):
        read_images(DataSettings(train=str(tmp_path)), 0)


WRONG = {
    "length": ({"data": {"train": "pets", "max_length": 32}}, "data.max_length = 32 is for task"),
    "columns": ({"data": {"train": "pets", "text_columns": ["a"]}}, "is for task 'classification'"),
    "nothing held out": (
        {"data": {"train": "pets", "validation_fraction": 0}},
        "it needs held-out rows",
    ),
    "metric": ({"training": {"metric_for_best": "f1"}}, "macro_f1"),
}


@pytest.mark.parametrize(("changes", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    file = write_config(folder / "wrong.yaml", config(folder, "wrong", **changes))
    result = command("train", file)
    assert result.code == 1
    assert said in result.error


def test_a_folder_is_refused_by_a_run_on_texts(folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", answered_rows(4))
    content = {
        "model": str(save_decoder(tmp_path / "base")),
        "task": "sft",
        "output": str(tmp_path / "run"),
        "data": {"train": str(tmp_path / "rows.jsonl"), "validation_fraction": 0},
        "training": {"max_steps": 1},
    }
    assert command("train", write_config(tmp_path / "c.yaml", content)).code == 0
    result = command("predict", tmp_path / "run", folder / "pets")
    assert result.code == 1
    assert "was not trained on images" in result.error


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dinov2", "swin"])
def test_other_families_train_and_come_back(folder: Path, tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    if family == "dinov2":
        model: Any = hf.Dinov2ForImageClassification(
            hf.Dinov2Config(
                hidden_size=16,
                num_hidden_layers=4,
                num_attention_heads=2,
                image_size=SIDE,
                patch_size=8,
            )
        )
    else:
        model = hf.SwinForImageClassification(
            hf.SwinConfig(
                image_size=SIDE,
                patch_size=2,
                embed_dim=8,
                depths=[2, 2],
                num_heads=[2, 2],
                window_size=4,
            )
        )
    model.save_pretrained(tmp_path / "base")
    processor().save_pretrained(tmp_path / "base")
    train(folder, family, model=str(tmp_path / "base"))
    found = command("eval", folder / family, "--json").json()
    best = read_json(folder / family / "metrics.json")["best"]
    assert found["loss"] == pytest.approx(best["loss"], rel=1e-5)
    result = command("convert", folder / family, tmp_path / "merged", "--to", "merged")
    assert result.code == 0, result.err


@pytest.mark.slow
def test_a_dry_run_foresees_what_is_measured(folder: Path) -> None:
    file = write_config(folder / "dry.yaml", config(folder, "dry"))
    result = command("train", file, "--dry-run", "--measure", "--json")
    assert result.code == 0, result.err
    found = result.json()
    assert abs(found["measured"]["error"]) < 0.01
    assert found["schedule"]["rows"] == 27
    shown = command("train", file, "--dry-run").out
    assert "it is of 8 images" in shown
    assert "tokens" not in shown


def test_predict_sees_images_wherever_they_stand(
    folder: Path, printed: str, tmp_path: Path
) -> None:
    for place in ("a.png", "more/b.png", "_old/c.png"):
        paint(tmp_path / "photos" / place, "red", 3)
    (tmp_path / "photos/notes").mkdir()
    result = command("predict", folder / "run", tmp_path / "photos", "--json")
    assert result.code == 0, result.err
    assert [Path(json.loads(line)["image"]).name for line in result.out.splitlines()] == [
        "c.png",
        "a.png",
        "b.png",
    ]
    (tmp_path / "photos/z.png").write_text("no image")
    assert "z.png" in command("predict", folder / "run", tmp_path / "photos", "--json").error


def test_a_name_that_is_not_utf_8_is_written(folder: Path, printed: str, tmp_path: Path) -> None:
    for suffix in ("jsonl", "tsv"):
        paint(tmp_path / "photos/a.png", "red", 3).rename(tmp_path / "photos/\udce9.png")
        out = tmp_path / f"out.{suffix}"
        result = command("predict", folder / "run", tmp_path / "photos", "--output", out)
        assert result.code == 0, result.err
        assert "udce9.png" in out.read_text(encoding="utf-8")


def test_the_only_image_of_a_class_may_be_held_out(tmp_path: Path) -> None:
    for colour in COLOURS:
        paint(tmp_path / f"all/{colour}/1.png", colour, 0)
    for seed in range(6):
        train, held_out, classes = read_images(DataSettings(train=str(tmp_path / "all")), seed)
        assert classes.labels == tuple(sorted(COLOURS))
        assert (len(train), len(held_out)) == (2, 1)
