"""The class of transformers that an adapter's base is loaded with."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import transformers
from peft import PeftConfig

from .errors import BaseModelError

if TYPE_CHECKING:
    from .loading import BaseOptions

# PEFT's task type -> the transformers class that loads its base.
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def base_class(config: PeftConfig, source: str, base: BaseOptions) -> Any:
    """The class that an adapter's base is loaded with: transformers', or the user's own.

    Raises:
        BaseModelError: transformers has no such class, and no module that is imported has it.
    """
    task = str(getattr(config.task_type, "value", config.task_type))
    automatic = getattr(transformers, _AUTO_CLASSES[task]) if task in _AUTO_CLASSES else None
    if automatic is not None and task != "CAUSAL_LM":
        return automatic
    adapted = {} if automatic else config.auto_mapping or {}
    name = adapted.get("base_model_class")
    if name is None:
        of_base = transformers.AutoConfig.from_pretrained(
            source,
            revision=base.revision_for(config),
            trust_remote_code=base.trust_remote_code,
        )
        name = (of_base.architectures or ["AutoModel"])[0]
        if automatic is not None and not _reads_more_than_text(of_base, name):
            return automatic
    # A module is not imported because an adapter's file says so: that would run its code.
    home = str(adapted.get("parent_library") or "transformers")
    for module in (sys.modules.get(home), transformers):
        found = getattr(module, name, None)
        if hasattr(found, "from_pretrained"):
            return found
    raise BaseModelError(
        f"the adapter's base is a {name} of {home}. transformers {transformers.__version__} has "
        f"no such class, and {home} is not imported or has none with from_pretrained. Convert in "
        f"Python, in a program that has imported {name}; or set task_type in the adapter's "
        f"adapter_config.json, if one of transformers' automatic classes loads the base."
    )


def _reads_more_than_text(of_base: Any, name: str) -> bool:
    """Whether a base is a model that AutoModelForCausalLM does not know.

    Most recipes for models of images and text write CAUSAL_LM into the adapter nevertheless.
    """
    automatic = type(of_base) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    own = "AutoModelForCausalLM" in (getattr(of_base, "auto_map", None) or {})
    return not automatic and not own and name.endswith("ForConditionalGeneration")
