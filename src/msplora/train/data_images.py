"""Images and their classes: a folder with one folder per class, a table of paths, or the hub."""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .data_classification import Classes, label_of, with_classes
from .data_files import DataError, Row, read_rows, require_columns
from .data_split import all_rows, hold_out, read_parts
from .settings_data import DataSettings

# The folders of a data set that comes divided, in lower case, by what they are for.
_TRAINING = ("train", "training", "train_set", "training_set")
_HELD_OUT = ("validation", "valid", "val", "dev", "eval", "test", "validation_set", "test_set")


@dataclass(frozen=True)
class LabelledImage:
    """Where an image is, and its class's index."""

    place: str
    source: Any
    """A path, the bytes of a file, or an image in memory."""
    label: int | None


def read_images(
    data: DataSettings, seed: int
) -> tuple[list[LabelledImage], list[LabelledImage], Classes]:
    """Return (training images, held-out images, classes). Every image has been looked at.

    Raises:
        DataError: an image or a label is missing, or a file is no image.
    """
    train, held_out, drawn = _splits(data, seed)
    require_columns(train, [data.image_column, data.label_column], "data.image_column")
    # The only image of a class may have been drawn to be held out.
    classes = with_classes(data, [*train, *held_out] if drawn else train, (data.image_column,))
    return labelled_images(train, classes), labelled_images(held_out, classes), classes


def labelled_images(
    rows: list[Row], classes: Classes, labelled: bool = True
) -> list[LabelledImage]:
    """Return the images of rows; without `labelled`, a label that stands there is not read.

    Raises:
        DataError: an image or a label is missing, or a file is no image: all are looked at.
    """
    (column,) = classes.text_columns
    wanted = [column, classes.label_column] if labelled else [column]
    require_columns(rows, wanted, "data.image_column and data.label_column")
    images = [
        LabelledImage(
            row.place, _source(row, column), int(label_of(row, classes)) if labelled else None
        )
        for row in rows
    ]
    for image in images:
        _look_at(image)
    return images


def read_more_images(path: Path | str, classes: Classes, labelled: bool = True) -> list[Row]:
    """Return the rows of another folder or table.

    Where no label is asked for, a folder's images may stand anywhere in it.
    """
    (column,) = classes.text_columns
    path = Path(path)
    if not path.is_dir():
        return _beside(read_rows(path), path, column)
    if labelled and any(_class_folders(path)):
        return _folder_rows(path, column, classes.label_column)
    files = _images_in(path)
    if not files:
        raise DataError(f"the folder {path} holds no image.")
    return [Row(str(file), {column: str(file)}) for file in files]


def image_files(data: DataSettings) -> list[Path]:
    """Every file with an image that is there, in the folders and tables that the data names."""
    found: list[Path] = []
    for path in (Path(its) for its in (data.train, data.validation) if isinstance(its, str)):
        if path.is_dir():
            found += _images_in(path)
            continue
        try:
            rows = read_rows(path)
        except DataError:  # a table that cannot be read names no image
            continue
        named = [row.values.get(data.image_column) for row in rows]
        files = [path.parent / its for its in named if isinstance(its, str)]
        found += [file for file in files if file.is_file()]
    return found


def open_image(image: LabelledImage) -> Image.Image:
    """Return the image in RGB of 8 bits, upright.

    Raises:
        DataError: it cannot be read to its end.
    """
    try:
        opened = _open(image.source)
        _refuse_unscaled(opened)
        upright = ImageOps.exif_transpose(opened)
        if _is_16_bits(opened):  # Pillow would clip it to white
            upright = Image.fromarray(np.rint(np.asarray(upright) / 257).astype(np.uint8))
        return upright.convert("RGB")
    except _UNREADABLE as error:
        raise _no_image(image, error) from error


_UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError)


def comes_divided(data: DataSettings) -> bool:
    """Whether the folder to train on holds a part to be held out."""
    root = Path(data.train) if isinstance(data.train, str) else None
    return bool(root and _part(root, _TRAINING) and _part(root, _HELD_OUT))


def _splits(data: DataSettings, seed: int) -> tuple[list[Row], list[Row], bool]:
    """The rows to train on and to hold out, and whether these were drawn from the same."""
    columns = data.image_column, data.label_column
    for key, value in (("data.train", data.train), ("data.validation", data.validation)):
        if isinstance(value, list):
            raise DataError(
                f"{key} names {len(value)} sources; images come from one folder or one table. Put "
                f"the images into one folder, or their paths into one table."
            )
    assert not isinstance(data.train, list)
    assert not isinstance(data.validation, list)
    if data.hub or not data.train or not Path(data.train).is_dir():
        tables = data
        if data.validation and Path(data.validation).is_dir():
            tables = data.model_copy(update={"validation": None, "validation_fraction": 0})
        splits = read_parts(tables, seed)
        train, held_out = all_rows(splits.train), all_rows(splits.held_out)
        if data.train:
            train = _beside(train, Path(data.train), data.image_column)
            held_out = _beside(held_out, Path(data.validation or data.train), data.image_column)
        if tables is not data:
            held_out = _folder_rows(Path(data.validation or ""), *columns)
        return train, held_out[: data.max_rows], splits.drawn
    root, drawn = Path(data.train), False
    training, apart = _part(root, _TRAINING), _part(root, _HELD_OUT)
    train = _folder_rows(training or root, *columns)
    if data.validation:
        beside = Path(data.validation)
        held_out = (
            _folder_rows(beside, *columns)
            if beside.is_dir()
            else _beside(read_rows(beside), beside, data.image_column)
        )
    elif training and apart:
        held_out = _folder_rows(apart, *columns)
    else:
        train, held_out = hold_out(train, data.validation_fraction, seed)
        drawn = True
    return train[: data.max_rows], held_out[: data.max_rows], drawn


def _part(root: Path, names: tuple[str, ...]) -> Path | None:
    """The part of a divided data set: a folder of such a name that holds folders, not images."""
    folders = {its.name.lower(): its for its in reversed(_class_folders(root))}
    return next((its for its in map(folders.get, names) if its and _class_folders(its)), None)


def _class_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(its for its in folder.iterdir() if its.is_dir() and its.name[0] not in "._")


def _folder_rows(folder: Path, image_column: str, label_column: str) -> list[Row]:
    """One row per image, the classes by turns: so that the first rows are of all classes."""
    classes = _class_folders(folder)
    if not classes:
        raise DataError(
            f"the folder {folder} holds no folders, one for each class, with its images in it "
            f"(as in cats/1.png and dogs/1.png). For a table, name its file."
        )
    by_class = []
    for its in classes:
        files = _images_in(its)
        if not files:
            raise DataError(f"the folder {its} of the class {its.name!r} holds no image.")
        if not any(file.parent == its for file in files):
            inside = ", ".join(part.name for part in _class_folders(its)[:3])
            raise DataError(
                f"the folder {its} holds images in folders of its own alone ({inside}), so it is "
                f"hardly one class. Name the folder whose folders are the classes in data.train, "
                f"and one with the same for held-out images in data.validation."
            )
        by_class.append(
            [Row(str(file), {image_column: str(file), label_column: its.name}) for file in files]
        )
    return [row for turn in zip_longest(*by_class) for row in turn if row is not None]


def _images_in(folder: Path) -> list[Path]:
    known = Image.registered_extensions()
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in known and file.is_file() and not file.name.startswith(".")
    )


def _beside(rows: list[Row], table: Path, column: str) -> list[Row]:
    """The rows of a table, whose paths are relative to its folder."""

    def moved(value: Any) -> Any:
        return str(table.parent / value) if isinstance(value, str) else value

    return [
        Row(row.place, {**row.values, column: moved(row[column])})
        if row.values.get(column)
        else row
        for row in rows
    ]


def _source(row: Row, column: str) -> Any:
    """Where the image is; data sets of the hub, and their parquet files, hold its bytes."""
    value = row[column]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not value or not isinstance(value, (str, bytes, Image.Image)):
        found = type(value).__name__ if value else "nothing"
        raise DataError(
            f"{row.place}: the column {column!r} holds {found}, not the path of an image."
        )
    return value


def _open(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _look_at(image: LabelledImage) -> None:
    """Refuse what is no whole image before anything is spent.

    Pixels are read when they are needed, or here where nothing else tells whether all are there.
    """
    try:
        opened = _open(image.source)
        _refuse_unscaled(opened)
        if isinstance(image.source, Image.Image):
            return
        with opened:
            if opened.format == "PNG":
                opened.verify()  # it has checksums
            elif opened.format != "JPEG" or not _has_jpeg_end(image.source):
                opened.load()
    except _UNREADABLE as error:
        raise _no_image(image, error) from error


def _has_jpeg_end(source: Any) -> bool:
    """Whether the last bytes are the mark that ends a JPEG; more may follow it in a whole one."""
    if isinstance(source, bytes):
        return source.endswith(_JPEG_END)
    with open(source, "rb") as file:
        file.seek(-len(_JPEG_END), io.SEEK_END)
        return file.read() == _JPEG_END


_JPEG_END = b"\xff\xd9"


def _is_16_bits(image: Image.Image) -> bool:
    # Older Pillows open a grey PNG of 16 bits in the mode of 32.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def _refuse_unscaled(image: Image.Image) -> None:
    if image.mode in ("I", "F") and not _is_16_bits(image):
        raise ValueError(f"mode {image.mode}: 32 bits a pixel, and no range that they fill")


def _no_image(image: LabelledImage, error: Exception) -> DataError:
    named = isinstance(image.source, str) and image.source not in image.place
    what = f"the image {image.source}" if named else "the image"
    if isinstance(error, FileNotFoundError):
        why = "does not exist"
    elif isinstance(error, UnidentifiedImageError):
        why = "is in no format that is known"
    else:
        why = f"cannot be read ({error})"
    return DataError(f"{image.place}: {what} {why}. Replace it, or leave it out.")
