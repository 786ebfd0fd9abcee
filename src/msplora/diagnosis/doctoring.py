"""`msplora.doctor`: load a base with an adapter on it, and check one thing after the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel
from torch import Tensor

from msplora import __version__
from msplora.config import MSPLoraConfig
from msplora.config_file import lora_or_pyramid
from msplora.errors import BaseModelError, UnsupportedError
from msplora.extras import train_extra
from msplora.loading import (
    BaseOptions,
    adapter_folder,
    class_names,
    load_base_of,
    loading_errors_explained,
    read_tensors,
    resolve_source,
)
from msplora.probing import probe_inputs
from msplora.random_weights import RandomPoolerWarning, RandomWeightsWarning
from msplora.rewritten_base import CONVERT, not_repeated

from .belonging import (
    BASE,
    base_fits,
    everything_is_loaded,
    file_is_whole,
)
from .outputs import conversion_is_equal, is_applied, merging_keeps_the_output
from .patient import Patient
from .precision import activations_stay_in_range, factors_survive
from .putting_on import Misfit, put_on
from .results import Check, Diagnosis, name_of
from .weights import rounding_keeps_the_update, unmerging_restores_the_base

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many of its steps are done, and of how many."""

_ROUNDS = 9
_NO_INPUTS = (
    "Models that take tokens or images are examined; msplora inspect looks at the files of any."
)


def doctor(
    model: str | BaseOptions,
    adapter: str | Path,
    *,
    data: str | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Check an adapter on its base: applied, merged, unmerged, rounded, converted.

    Args:
        model: the base: a folder, an id on the hub, or how to load it.
        adapter: the folder of an MSPLoRA adapter or of PEFT's plain LoRA, or of a run.
        data: a file of rows, as `msplora eval` takes them, to run on in place of random inputs.
        progress: called as the work goes on.

    Returns:
        Frozen values; `ok` says whether no check failed.

    Raises:
        MSPLoraError: the base, the adapter or the data cannot be read at all. That the two do not
            fit each other is a failed check.
    """
    options = BaseOptions.of(model)
    if not options.source:
        raise BaseModelError("no base is given. Give its folder, or its id on the hub.")
    source = resolve_source(options.source)
    asked = options = replace(options, source=source)
    folder = adapter_folder(Path(adapter).expanduser())
    config = lora_or_pyramid(folder, "examined")
    options = replace(options, revision=options.revision_for(config))
    method = "MSPLoRA" if isinstance(config, MSPLoraConfig) else "LoRA"
    tensors = read_tensors(folder)
    with loading_errors_explained(source):
        of_base = transformers.AutoConfig.from_pretrained(
            source, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    report = progress or (lambda what, done, total: None)
    inputs = "random inputs from a fixed seed" if data is None else f"the first rows of {data}"
    whole = file_is_whole(folder, config)
    found = [whole]
    dtype = options.dtype

    def done() -> Diagnosis:
        names = source, str(adapter), method
        return Diagnosis(*names, dtype, inputs, tuple(found), __version__)

    with warnings.catch_warnings(record=True) as warned:  # what they warn of is what is checked
        warnings.simplefilter("always")
        try:
            adapted, batch = _load(
                folder, config, tensors, options if data is None else asked, data
            )
        except Misfit as error:
            found = _misfit(error, whole, config)
            return done()
        patient = Patient(
            folder,
            source,
            adapted,
            batch,
            tensors,
            whole.status == "passed",
            getattr(of_base.get_text_config(), "vocab_size", None),
            options.revision,
            options.trust_remote_code,
            _said(warned, RandomWeightsWarning),
            _said(warned, RandomPoolerWarning),
        )
        dtype = name_of(patient.dtype)
        for step, checks in enumerate(_examine(patient), start=1):
            found += checks
            report("examining", step, _ROUNDS)
    return done()


def _examine(patient: Patient) -> Iterator[list[Check]]:
    yield [base_fits(patient)]
    yield [everything_is_loaded(patient)]
    yield [is_applied(patient)]
    yield [conversion_is_equal(patient)]
    yield factors_survive(patient)
    yield [activations_stay_in_range(patient)]
    yield rounding_keeps_the_update(patient)
    yield [unmerging_restores_the_base(patient)]
    yield [merging_keeps_the_output(patient)]


def _said(warned: Sequence[warnings.WarningMessage], category: type[Warning]) -> str | None:
    """The first warning of a category."""
    found = (str(its.message) for its in warned if issubclass(its.category, category))
    return next(found, None)


def _misfit(error: Misfit, whole: Check, config: Any) -> list[Check]:
    """The first two checks, by whose fault it is that the adapter cannot be put on the base."""
    if whole.status != "passed":
        said = f"The file is not whole, and cannot be put on a base: {error}"
        return [whole, Check(BASE, "skipped", said)]
    if error.of_tensors and getattr(config, "fingerprint", None):
        # What inspect cannot know without the base: a kind's last layer, or all of its pairs.
        said = f"The base has the sites that the adapter was made for, and {error}"
        advice = "Save or copy it again: the base is the right one."
        return [
            replace(whole, status="failed", said=said, advice=advice),
            Check(BASE, "skipped", "The names and shapes of its sites are the adapter's."),
        ]
    why = not_repeated(config)
    said = str(error) if why is None else f"{why} {error}"
    advice = "Pass the base that it was made for." if why is None else CONVERT
    return [whole, Check(BASE, "failed", said, advice)]


def _load(
    folder: Path, config: Any, tensors: Any, options: BaseOptions, data: str | None
) -> tuple[PeftModel, dict[str, Tensor]]:
    if data is None:
        base = load_base_of(config, tensors, options, class_names(folder))
        model = put_on(base, folder)
        return model, probe_inputs(model, _NO_INPUTS)
    asked = {
        "--dtype": options.dtype != "auto",
        "--revision": options.revision is not None,
        "--trust-remote-code": options.trust_remote_code,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise UnsupportedError(
                f"{name} does not go with --data: rows are read by the base as the run had it. "
                f"Give one of them."
            )
    with train_extra():
        from .rows import model_and_rows

        return model_and_rows(folder, str(options.source), data)
