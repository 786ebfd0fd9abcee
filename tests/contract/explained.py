"""Why tests of PEFT's LoRA that do not pass with a pyramid mean nothing for one."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Explanation:
    """One reason, and the tests that it is the reason for."""

    why: str
    test: str = ""
    """A regular expression that is looked for in the test's name."""
    error: str = ""
    """And one that is looked for in what it failed with."""

    def fits(self, test: str, error: str) -> bool:
        return bool(re.search(self.test, test) and re.search(self.error, error))


_REWRITES = "starts from each layer's own base weight, which shared pairs cannot all do"
EXPLAINED = [
    Explanation(f"{name} {_REWRITES}", error=f"UnsupportedError: .* {pattern}")
    for name, pattern in (
        ("KaSA", "kasa_config"),
        ("EVA", "eva_config|init_lora_weights='eva'"),
        ("CorDA", "corda_config|init_lora_weights='corda'"),
        ("LoRA-GA", "lora_ga_config|init_lora_weights='lora_ga'"),
        ("LoftQ", "loftq_config|init_lora_weights='loftq'"),
        ("MiCA", "init_lora_weights='mica'"),
        ("PiSSA", "init_lora_weights='pissa"),
        ("OLoRA", "init_lora_weights='(?i:olora)'"),
    )
]
EXPLAINED += [
    Explanation("a pair has no bias of its own (`lora_bias`)", error="support lora_bias=True"),
    Explanation("BD-LoRA's block-diagonal factors cannot be stacked", error="support use_bdlora"),
    Explanation("VeLoRA compresses the activations of one pair", error="support velora_config"),
    Explanation("MonteCLoRA samples around one pair", error="support monteclora_config"),
    Explanation("Arrow routes between plain LoRAs", error="support arrow_config"),
    Explanation("activated LoRA has a forward pass of its own", error="support alora_invocation"),
    Explanation("QALoRA pools each layer's input", error="support use_qalora"),
    Explanation(
        "replicated layers change the depth that groups are cut by", error="support layer_replic"
    ),
]
_OWN = "a layer that borrows its factors owns none"
EXPLAINED += [
    Explanation(
        "looks tensors up by the names that a LoRA layer gives its own; a shared one is named "
        "after its pair",
        "test_requires_grad_|test_training_works|test_dora_save_and_load_remapping"
        "|test_target_multiple_parameters_on_same_module|TestTunerStateDictKeyPrefixes"
        "|test_from_pretrained_missing_keys_warning",
        r"lora_[AB]|assert False \+ where False = any|len\(\{'base_model",
    ),
    Explanation(
        f"prints, or sets in place, a layer's own factors; {_OWN} (`msplora.factors` gives them)",
        "test_repr_lora|test_loading_adapter_preserves_custom_requires_grad|works_with_existing_par"
        "|targeting_param_equivalent|warns_for_unsharded_state_dict",
    ),
    Explanation(
        f"sets a layer's own factors; {_OWN} (`msplora.factors` gives them)",
        error="'View' object does not support item assignment",
    ),
    Explanation(f"asks whether a factor is an `nn.Linear`; {_OWN}", error="isinstance\\(Assembled"),
    Explanation(
        "expects the name or the number of parameters of LoRA itself",
        "TestModelAndLayerStatus",
        "MSPLoraModel|MSPLORA|assert 1078 == 616",
    ),
    Explanation(
        "asks a layer for the rank or scaling of one pair; it has those of all levels together",
        "TestRankAndAlphaPattern|TestScaling|test_lora_(rslora|default)_scaling"
        "|test_lora_scaling_default",
        "AssertionError",
    ),
    Explanation(
        "a name or pattern that matches nothing is an error of ours, no warning and not let pass",
        "test_rank_and_alpha_pattern_no_matching_keys|test_exclude_modules_not_used"
        "|test_second_adapter_only_modules_to_save_raises|test_some_modules_excluded_some_unmatched"
        "|test_valid_no_target_module_nor_target_parameter|test_valid_target_.*_invalid_target_.*"
        "|test_unmatched_.*_pattern_key|test_partially_matched_pattern"
        "|test_modules_to_save_targets_lora|test_trainable_token_indices_targets_lora",
    ),
    Explanation(
        "the same refusal in other words",
        error="Actual message: .(All modules were excluded|init_lora_weights='orthogonal' needs|"
        "Incompatible PEFT types found: MSPLORA and IA3)",
    ),
    Explanation(
        "refused, in other words, for what it asks of LoRA at all",
        error="Actual message: .MSPLoRA does not support",
    ),
    Explanation(
        "EVA is refused when the config is made", "test_lora_config_raises_warning_with_eva_"
    ),
    Explanation(
        "a wrong `bias` is refused when the config is made", "test_lora_with_bias_argument"
    ),
    Explanation(
        "an adapter's name by which PEFT would lose its tensors is an error of ours, no warning",
        "TestNamingConflictWarning",
    ),
    Explanation(
        "the groups of a convolution must divide the rank of every level, not of the first alone",
        error="must divide every rank",
    ),
    Explanation(
        "PEFT's own hotswap takes LoRA only; `msplora.hotswap` is there",
        "TestHotSwapping::test_hotswap_",
        "Hotswapping only supports LORA|lora_A",
    ),
    Explanation(
        f"pads the factors of each layer for PEFT's hotswap; {_OWN}",
        "test_prepare_model_for_compiled_hotswap",
    ),
    Explanation(
        "tests a layer's factor for one distribution; each level has that of its own rank",
        "init_gaussian|test_lora_embedding_(default|gaussian)",
        "assert np.float64",
    ),
    Explanation(
        f"asks whether the factors of two tied layers are one tensor; {_OWN}, and the pair is one",
        "TestWeightTying",
        "data_ptr",
    ),
    Explanation(
        "adapting one of two tied layers is an error of ours, no warning",
        "test_alt_weight_tying_tied_model_target_modules_lora",
    ),
    Explanation(
        "`all-linear` has a tied head in it, and with it goes the embedding, which LoRA leaves out",
        "test_weight_tying_tied_model_target_modules_all_linear_lora",
    ),
    Explanation(
        "head and embedding are one weight, which the base's config denies; merging changes both",
        "test_ensure_weight_tying_not_tying_when_model_config_tie_false_target_modules",
    ),
    Explanation(
        "a base whose modules have other names is another base, by the adapter's fingerprint",
        "test_key_mapping_save_old_load_new_lora",
    ),
    Explanation(
        "gets a real `LoraConfig`, as it should, where it now asks for the pyramid's",
        "test_fixed_rank_lora_config",
    ),
    Explanation(
        "is about a LoRA that is converted into a LoRA",
        "test_converted_lora_to_lora_works_and_warns",
    ),
    Explanation(
        "its hooks change the dtype of every module's parameters while that module runs; the "
        "modules of a pair run before the layer",
        "TestDisableInputDtypeCasting",
    ),
    Explanation(
        "compares a layer's B with a saved one; a stacked B has the scales of its levels in it",
        "test_inject_from_state_dict_model_with_weight_conversion|test_prefix_removal_is_undone",
        "assert",
    ),
    Explanation(
        "an adapter's tensors name pairs, not the layers that borrow them; its config does",
        "test_inject_from_state_dict_",
    ),
    Explanation(
        "PEFT's mixed models take a closed list of methods",
        error="not compatible with the `PeftMixedModel`|not supported for mixed models",
    ),
    Explanation(
        "PEFT's LoRA-FA optimiser looks in each LoRA layer for an A, a B and a scale of its own",
        "test_lorafa.py::",
    ),
    Explanation(
        "PEFT's Riemannian optimiser finds pairs by the names that LoRA gives them",
        "test_riemannian_lora.py::",
    ),
    Explanation(
        "PEFT's function for intruder dimensions takes LoRA only (`msplora analyse` counts them)",
        "test_lora_intruders.py::",
    ),
    Explanation("expects the tag `lora` on the card", "TestModelCard::"),
    Explanation(
        "PEFT rewrites transformers 4's names of experts for LoRA only; ours says to name them "
        "in `target_parameters`",
        "TestTransformersV5::test_qwen3_moe_",
    ),
    Explanation(
        "PEFT's LoRA+ optimiser tells an embedding's factors by the layer that holds them",
        "test_lora_plus_embedding_lr",
    ),
    Explanation(
        "hangs on the random numbers: of 200 seeds LoRA passes with 29, a pyramid with 25",
        r"test_only_params_are_updated\[Embedding \+ transformers Conv1D 2 LoRA",
        "assert not True",
    ),
    Explanation(
        "combines by `svd`, PEFT's default, adapters of different ranks; ours is `linear`",
        "test_weighted_combination_of_adapters",
        "which 'linear' cannot add",
    ),
    Explanation(
        "asks a layer for the rank in `rank_pattern`; it has that of all levels together",
        "test_multirank$",
    ),
    Explanation(
        "gives layers that share a pair different ranks", error="rank_pattern/alpha_pattern give"
    ),
    Explanation(
        "a rank of 1 to 3 in `rank_pattern` cannot be halved twice", error="rank_pattern asks for"
    ),
    Explanation(
        "what it prunes or decomposes belongs to one layer; `linear` and `cat` are there",
        error="combination_type='.*' is not supported",
    ),
    Explanation(
        "`density` is for pruning; `linear` and `cat` prune nothing", error="does not use .'density"
    ),
    Explanation(
        "adapters on different sites cannot be combined pair by pair", error="do not share alike"
    ),
    Explanation(
        "an adapter on a site of another shape does not fit, and is not loaded in part",
        "ignore_mismatched_sizes",
        "made for another base",
    ),
    Explanation(
        "a layer of the user's own for what LoRA does not know has no factors that could be shared",
        "test_target_layer_without_in_features",
    ),
]

NOT_RUN = [
    "`test_gpu_examples`, `test_common_gpu`, `test_quantization`, `test_gptqmodel`: need a GPU.",
    "`test_arrow`, `test_bdlora`, `test_velora`, `test_lora_ga`, `test_xlora`: forms of LoRA that "
    "a pyramid refuses, each with its reason.",
    "`test_torch_compile`: PEFT leaves it out by default; it needs a data set of the hub.",
    "`test_mixed`: PEFT's mixed models take a closed list of methods.",
    "`test_stablediffusion`, `test_lora_megatron`: need diffusers' weights, and Megatron.",
    "The files of other methods.",
]


def explain(test: str, error: str) -> str | None:
    """The reason for a test that did not pass, `None` if there is none."""
    return next((its.why for its in EXPLAINED if its.fits(test, error)), None)
