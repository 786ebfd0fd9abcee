"""What a saved model must know of its task, kept beside its weights as task.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from msplora.errors import MSPLoraError
from msplora.loading import TASK_FILE

from .data_classification import Classes
from .data_forms import Form
from .held_out_rows import HeldOutRows
from .settings import Settings
from .settings_file import make_settings

_FORMAT_VERSION = 1


@dataclass(frozen=True)
class TaskRecord:
    """The run's settings, and what its data decided: the classes, or the form of the samples."""

    settings: Settings
    classes: Classes | None = None
    forms: tuple[Form, ...] = ()
    """Every form that the data had, the one to put prompts into first."""
    held_out: HeldOutRows | None = None
    """By what its held-out rows are known; None of a run before that was kept."""
    start: dict[str, int] | None = None
    """The checksums of the adapter that `init_from` names; None of a run before that was kept."""
    dtype: str | None = None
    """What it was computed in, where the settings say auto; None of a run before that was kept."""

    def save(self, folder: Path) -> None:
        """Write task.json into the folder of the weights."""
        content = {
            "format_version": _FORMAT_VERSION,
            "settings": self.settings.to_dict(),
            "classes": asdict(self.classes) if self.classes else None,
            "form": self.form,
            "more_forms": self.forms[1:],
            "held_out": asdict(self.held_out) if self.held_out else None,
            "start": self.start,
            "dtype": self.dtype,
        }
        (folder / TASK_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @property
    def form(self) -> Form | None:
        """The form to put prompts into."""
        return self.forms[0] if self.forms else None

    @classmethod
    def load(cls, folder: Path) -> TaskRecord | None:
        """Return the record in `folder`, or None where there is none."""
        file = folder / TASK_FILE
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            version = content["format_version"]
            classes = content["classes"]
            if classes:
                label_range = classes["label_range"]
                classes = Classes(
                    tuple(classes["text_columns"]),
                    classes["label_column"],
                    tuple(classes["labels"]),
                    tuple(label_range) if label_range else None,
                )
            form, settings = content["form"], content["settings"]
            forms = (form, *content.get("more_forms", ())) if form else ()
            held_out = content.get("held_out")
            held_out = HeldOutRows(held_out["rows"], held_out["checksum"]) if held_out else None
        except (ValueError, KeyError, TypeError) as error:
            raise MSPLoraError(
                f"{file} is not a record of a run ({type(error).__name__}: {error}). Restore it, "
                f"or remove it and give the base and the data yourself."
            ) from None
        if version != _FORMAT_VERSION:
            raise MSPLoraError(
                f"{file} has format_version {version}; this msplora reads {_FORMAT_VERSION}. "
                f"Install the msplora that wrote it, or a newer one."
            )
        return cls(
            make_settings(settings, str(file)),
            classes,
            forms,
            held_out,
            content.get("start"),
            content.get("dtype"),
        )
