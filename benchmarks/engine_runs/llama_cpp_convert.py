"""llama.cpp's own conversions: bases to GGUF, without their vocabulary, and plain LoRAs.

Tiny random models have no tokenizer, and none is needed where token ids go in and logits come out:
of a base's conversion only `set_vocab` is another. Everything about weights and parameters is
llama.cpp's code, and `convert_lora_to_gguf.py` is run as it is.

    python llama_cpp_convert.py SOURCE CASES.json

SOURCE is a checkout of llama.cpp; the package llama-cpp-python brings one as vendor/llama.cpp.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

SOURCE, CASES = sys.argv[1:]
sys.path[:0] = [SOURCE, str(Path(SOURCE) / "gguf-py")]

import gguf  # noqa: E402
import torch  # noqa: E402
from conversion import (  # noqa: E402
    ModelBase,
    ModelType,
    get_model_architecture,
    get_model_class,
)


def convert_base(base: Path, out: Path) -> None:
    """Write the base's weights and parameters in float32."""
    hparams = ModelBase.load_hparams(base, False)
    known = get_model_class(get_model_architecture(hparams, ModelType.TEXT))

    class WithoutVocabulary(known):
        model_arch = known.model_arch

        def set_vocab(self) -> None:
            self.gguf_writer.add_tokenizer_model("none")
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    with torch.inference_mode():
        WithoutVocabulary(base, gguf.LlamaFileType.ALL_F32, out).write()


def convert_lora(lora: Path, base: Path, out: Path) -> None:
    """Let llama.cpp's script convert PEFT's folder."""
    script = str(Path(SOURCE) / "convert_lora_to_gguf.py")
    sys.argv = [script, "--base", str(base), "--outfile", str(out), str(lora)]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    for case in json.loads(Path(CASES).read_text()):
        base = Path(case["base"])
        convert_base(base, Path(case["base_out"]))
        convert_lora(Path(case["lora"]), base, Path(case["lora_out"]))
