"""Images as they are read: every depth, whole or not, and whether they are those of before."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from msplora.train.data_files import DataError
from msplora.train.data_images import open_image, read_images
from msplora.train.inputs import changed, checksums
from msplora.train.settings_data import DataSettings
from msplora.train.settings_file import make_settings
from runs import write_jsonl
from tiny_images import paint, paint_folder


@pytest.mark.parametrize("named_by", ["a folder", "a table"])
def test_a_run_that_goes_on_knows_its_images(named_by: str, tmp_path: Path) -> None:
    pets = paint_folder(tmp_path / "pets", 2)
    table = [{"image": str(file.relative_to(tmp_path))} for file in sorted(pets.rglob("*.png"))]
    write_jsonl(tmp_path / "table.jsonl", table)
    train = str(pets if named_by == "a folder" else tmp_path / "table.jsonl")
    content = {
        "model": "a",
        "task": "image-classification",
        "output": "b",
        "data": {"train": train},
    }
    settings = make_settings(content, "x.yaml")
    before = checksums(settings)
    assert changed(before, settings) == []
    paint(pets / "red/0.png", "blue", 0)
    (pets / "blue/1.png").unlink()
    (pets / "blue/notes.txt").write_text("nothing that the run reads")
    expected = [str(pets / "blue/1.png"), str(pets / "red/0.png")]
    assert changed(before, settings) == expected
    if named_by == "a table":
        (tmp_path / "table.jsonl").write_text("{")
        assert str(tmp_path / "table.jsonl") in changed(before, settings)


@pytest.mark.parametrize(
    "names", [("train", "eval"), ("Train", "Test"), ("training_set", "test_set")]
)
def test_a_data_set_that_comes_divided_is_known_by_the_usual_names(
    names: tuple[str, str], tmp_path: Path
) -> None:
    for name in names:
        paint_folder(tmp_path / name, 2)
    train, held_out, classes = read_images(DataSettings(train=str(tmp_path)), 0)
    assert classes.labels == ("blue", "green", "red")
    for images, name in ((train, names[0]), (held_out, names[1])):
        assert {Path(its.source).parts[-3] for its in images} == {name}


def test_a_folder_of_folders_is_no_class(tmp_path: Path) -> None:
    for name in ("first_half", "second_half"):
        paint_folder(tmp_path / name, 2)
    with pytest.raises(
        DataError, match=r"first_half .*\(blue, green, red\), so it is hardly one class"
    ):
        read_images(DataSettings(train=str(tmp_path)), 0)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_16_bits_is_scaled_and_of_32_refused(suffix: str, tmp_path: Path) -> None:
    levels = {"dark": 0, "grey": 40_000, "light": 65_535}
    for name, level in levels.items():
        (tmp_path / "all" / name).mkdir(parents=True)
        for place in range(2):
            Image.new("I;16", (8, 8), level).save(tmp_path / f"all/{name}/{place}.{suffix}")
    train, held_out, classes = read_images(DataSettings(train=str(tmp_path / "all")), 0)
    for image in (*train, *held_out):
        assert image.label is not None
        shade = round(levels[classes.labels[image.label]] / 257)
        assert open_image(image).getpixel((3, 3)) == (shade, shade, shade)
    for mode in ("I", "F"):
        odd = tmp_path / "all/dark/odd.tif"
        Image.new(mode, (8, 8), 1).save(odd)
        with pytest.raises(DataError, match=rf"odd\.tif: .* cannot be read \(mode {mode}: 32 bits"):
            read_images(DataSettings(train=str(tmp_path / "all")), 0)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "bmp", "tif", "gif", "png"])
def test_an_image_that_is_cut_short_is_named_before_the_first_step(
    suffix: str, tmp_path: Path
) -> None:
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for place in range(2):
            noise.save(tmp_path / f"{name}/{place}.{suffix}")
    whole = (tmp_path / f"b/1.{suffix}").read_bytes()
    (tmp_path / f"b/1.{suffix}").write_bytes(whole + b"appended" * (suffix == "jpg"))
    read_images(DataSettings(train=str(tmp_path)), 0)
    (tmp_path / f"b/1.{suffix}").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match=rf"b/1\.{suffix}"):
        read_images(DataSettings(train=str(tmp_path)), 0)
