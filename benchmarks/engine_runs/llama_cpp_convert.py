"""llama.cpp's own conversion of a base to GGUF, without its vocabulary.

Tiny random models have no tokenizer, and none is needed where token ids go in and logits come out:
only `set_vocab` is another. Everything about weights and parameters is llama.cpp's code.

    python llama_cpp_convert.py SOURCE BASE OUT.gguf

SOURCE is a checkout of llama.cpp; the package llama-cpp-python brings one as vendor/llama.cpp.
"""

from __future__ import annotations

import sys
from pathlib import Path

SOURCE, BASE, OUT = sys.argv[1:]
sys.path[:0] = [SOURCE, str(Path(SOURCE) / "gguf-py")]

import gguf  # noqa: E402
import torch  # noqa: E402
from conversion import (  # noqa: E402
    ModelBase,
    ModelType,
    get_model_architecture,
    get_model_class,
)


def main() -> None:
    hparams = ModelBase.load_hparams(Path(BASE), False)
    known = get_model_class(get_model_architecture(hparams, ModelType.TEXT))

    class WithoutVocabulary(known):
        model_arch = known.model_arch

        def set_vocab(self) -> None:
            self.gguf_writer.add_tokenizer_model("none")
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    with torch.inference_mode():
        WithoutVocabulary(Path(BASE), gguf.LlamaFileType.ALL_F32, Path(OUT)).write()


if __name__ == "__main__":
    main()
