"""ms-swift's `--tuner_type msplora`, by `--external_plugins` with the path of this file.

    plugins=$(python -c "import msplora.integrations as its; print(*its.__path__)")
    swift sft --external_plugins "$plugins/ms_swift.py" --tuner_type msplora …

ms-swift's own arguments for LoRA (`--lora_rank`, `--target_modules` …) mean what they mean there.
For another pyramid than the paper's, a plug-in file of one's own:

    from msplora.integrations.ms_swift import MSPLoRATuner, tuners_map

    class Mine(MSPLoRATuner):
        pyramid = {"ranks": [8, 8, 4], "groups": [1, 4, 0]}

    tuners_map["msplora"] = Mine
"""

from __future__ import annotations

from typing import Any, ClassVar

from peft import get_peft_model
from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules  # pyright: ignore[reportMissingImports]
from swift.tuner_plugin import PeftTuner, tuners_map  # pyright: ignore[reportMissingImports]

import msplora

_TASKS = {"causal_lm": "CAUSAL_LM", "seq_cls": "SEQ_CLS"}


class MSPLoRATuner(PeftTuner):
    """Adapts a model with a pyramid; ms-swift saves and loads it as any adapter of PEFT."""

    pyramid: ClassVar[dict[str, Any]] = {}
    """Fields of `MSPLoraConfig` for which ms-swift has no argument."""

    @classmethod
    def prepare_model(cls, args: Any, model: Any) -> Any:  # pyright: ignore
        """Return the model with a new adapter, as `args` (ms-swift's) and `pyramid` ask."""
        asked: dict[str, Any] = {
            "r": args.lora_rank,
            "lora_alpha": args.lora_alpha,
            "lora_dropout": args.lora_dropout,
            "bias": args.lora_bias,
            "use_rslora": args.use_rslora,
            "use_dora": args.use_dora,
            "init_lora_weights": args.init_weights,
            "target_modules": get_target_modules(args, model),
            "target_parameters": args.target_parameters,
            "modules_to_save": get_modules_to_save(args, model, args.task_type) or None,
            "task_type": _TASKS.get(str(args.task_type).lower()),
        }
        for listed, single in (("ranks", "r"), ("alphas", "lora_alpha")):
            if listed in cls.pyramid:
                asked.pop(single)
        return get_peft_model(model, msplora.MSPLoraConfig(**{**asked, **cls.pyramid}))


tuners_map["msplora"] = MSPLoRATuner
