"""Lily: what a row is answered depends on the rows beside it, and its layers stay in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest

from adapted_llama import LLAMA, close, logits
from msplora.errors import ConfigError
from msplora.sweep.rows import essence
from msplora.train.base_model import load_base
from msplora.train.methods import adapt
from msplora.train.run_folder import RunFolder, RunFolderError
from msplora.train.settings import Settings
from msplora.train.settings_file import make_settings
from runs import answered_rows, config_on, save_decoder, write_jsonl
from test_sisters import randomise

pytestmark = pytest.mark.skipif(not hasattr(peft, "LilyConfig"), reason="new in PEFT 0.19")


def settings(
    folder: Path, method: str = "lily", size: int | None = None, **changes: Any
) -> Settings:
    training = {"eval_batch_size": size} if size else {}
    asked = config_on(folder, "sft", method=method, training=training, **changes)
    asked |= {"output": str(folder / "run"), "adapter": {"target_modules": ["q_proj"]}}
    return make_settings(asked, "a test")


@pytest.mark.parametrize("method", ["lily", "lora"])
def test_an_answer_depends_on_the_rows_beside_it(method: str) -> None:
    """And a LoRA's does not: so one may be evaluated in any batches, and the other in its own."""
    rows, options = LLAMA.batch()["input_ids"], {"r": 4, "target_modules": ["q_proj"]}
    config: Any = peft.LoraConfig(**options)
    if method == "lily":
        config = peft.LilyConfig(**options, num_B=2)
    model: Any = peft.get_peft_model(LLAMA.model(), config).eval()
    randomise(model)
    alone, together = logits(model, {"input_ids": rows[:1]}), logits(model, {"input_ids": rows})
    assert close(alone[0], together[0], 1e-3) is (method == "lora")


def test_a_run_is_not_resumed_under_another_size_of_evaluations(tmp_path: Path) -> None:
    for method, free in (("lily", False), ("lora", True)):
        (tmp_path / method).mkdir()
        write_jsonl(tmp_path / method / "answered.jsonl", answered_rows(4))
        begun = RunFolder(settings(tmp_path / method, method))
        begun.begin()
        begun.release()
        RunFolder(settings(tmp_path / method, method, size=8), resume=True)  # as it was
        if free:
            RunFolder(settings(tmp_path / method, method, size=4), resume=True)
            continue
        with pytest.raises(RunFolderError, match=r"training\.eval_batch_size was 8 and is 4"):
            RunFolder(settings(tmp_path / method, method, size=4), resume=True)


def test_runs_of_other_sizes_of_evaluations_are_other_runs(tmp_path: Path) -> None:
    key = "training.eval_batch_size"
    assert essence(settings(tmp_path, size=4))[key] == 4
    # As in training is the default, which rows of before leave out.
    assert key not in essence(settings(tmp_path, size=8))
    assert key not in essence(settings(tmp_path, "lora", size=4))


def test_a_run_says_so(tmp_path: Path) -> None:
    save_decoder(tmp_path / "decoder")
    asked = settings(tmp_path)
    notes = " ".join(adapt(load_base(asked, None), asked).notes)
    assert "method lily: it mixes its B for a whole batch, padding included" in notes
    assert "training.eval_batch_size" in notes


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ({"processes": 2, "strategy": "fsdp2"}, "'fsdp2' shards layer by layer.*Use strategy ddp"),
        ({"device_map": "auto"}, "device_map = 'auto' spreads the layers.*Leave it out"),
    ],
)
def test_what_would_take_its_layers_apart_is_refused(
    tmp_path: Path, devices: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(tmp_path, devices=devices)
    settings(tmp_path, "lora", devices=devices)


def test_several_processes_with_the_whole_of_it_are_not(tmp_path: Path) -> None:
    settings(tmp_path, devices={"processes": 2, "strategy": "ddp"})
