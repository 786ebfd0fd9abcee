"""What goes along with a conversion besides numbers: the tokenizer, the processor, the task."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from .loading import TASK_FILE

_TOKENIZER = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "sentencepiece.bpe.model",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template.*",
)
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


class NoTokenizerWarning(UserWarning):
    """A merged model whose base's tokenizer and processor could not be had."""


def copy_companions(source: Path, out: Path) -> None:
    """Copy what belongs to an adapter besides its tensors and its config.

    `msplora eval` and its kin must know of the task.
    """
    _copy(source, out, (TASK_FILE, *_TOKENIZER, *_PROCESSOR))


def complete_from_base(base: str, revision: str | None, out: Path) -> None:
    """Give a merged model the base's tokenizer and processor where the adapter had none.

    Files of one tokenizer are never put beside those of another.

    Args:
        base: its folder or hub id.
        revision: of it on the hub.
        out: the folder of the merged model.
    """
    lacking = [its for its in (_TOKENIZER, _PROCESSOR) if not _found(out, its)]
    if not lacking:
        return
    wanted = [pattern for its in lacking for pattern in its]
    folder = Path(base).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(base, revision=revision, allow_patterns=wanted))
        except (OSError, ValueError, HfHubHTTPError) as error:
            warnings.warn(
                f"the merged model has no tokenizer or processor of its base: {base!r} could not "
                f"be asked for them ({type(error).__name__}). Save them into its folder.",
                NoTokenizerWarning,
                stacklevel=3,
            )
            return
    _copy(folder, out, wanted)


def _copy(source: Path, out: Path, patterns: tuple[str, ...] | list[str]) -> None:
    for file in _found(source, patterns):
        if not (out / file.name).exists():
            shutil.copy2(file, out / file.name)


def _found(folder: Path, patterns: tuple[str, ...] | list[str]) -> list[Path]:
    return [file for pattern in patterns for file in sorted(folder.glob(pattern))]
