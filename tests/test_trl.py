"""TRL's trainers train, sync, save and resume an adapter: SFT, DPO, reward, GRPO."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel

import msplora
from adapted_llama import TARGETS, close, config, logits
from oracle import assert_shared, plan_of, randomise, same_tensors, tensors_of, trainable
from runs import WORDS, word_tokenizer
from tiny import VOCABULARY, llama

pytest.importorskip("trl", reason="trl (the train extra) is not installed")
datasets = pytest.importorskip("datasets", reason="datasets (the train extra) is not installed")
pytestmark = pytest.mark.slow

STEPS, HALFWAY = 4, 2
# With what marks the assistant's turns to TRL.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }} </s>{% endgeneration %}"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}"
)


def tokenizer() -> Any:
    found = hf.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer("<unk>", "<s>", "</s>", "<pad>"),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
    )
    found.chat_template = TEMPLATE
    return found


def base() -> Any:
    torch.manual_seed(0)
    return llama(bos_token_id=1, eos_token_id=2, pad_token_id=3).eval()


def judge() -> Any:
    """A Llama with a head of one score."""
    torch.manual_seed(0)
    return hf.LlamaForSequenceClassification(
        hf.LlamaConfig(
            num_hidden_layers=4,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            num_labels=1,
            pad_token_id=3,
        )
    ).eval()


def started() -> Any:
    """A base with an adapter that has learnt something, which the reference has to be."""
    from peft import get_peft_model

    model = get_peft_model(base(), config(task_type="CAUSAL_LM"))
    randomise(model)
    return model


def words(start: int, count: int) -> str:
    return " ".join(WORDS[(start * 3 + place) % 50] for place in range(count))


def data(row: Callable[[int], dict[str, Any]]) -> Any:
    return datasets.Dataset.from_list([row(place) for place in range(16)])


def arguments(kind: type, folder: Path, **changes: Any) -> Any:
    options = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_steps": HALFWAY,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return kind(**(options | changes))


def assert_trains_and_resumes(make: Callable[[], Any], folder: Path) -> Any:
    """Run it through, and again from its checkpoint: the same bits. Return the first trainer."""
    straight = make()
    model = straight.model
    plan = plan_of(model)
    before = tensors_of(model)
    straight.train()
    assert_shared(model, plan)
    after = tensors_of(model)
    assert not any(torch.equal(before[its][1], after[its][1]) for its in before)  # every B moved
    resumed = make()
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALFWAY}"))
    assert same_tensors(tensors_of(resumed.model), after)
    return straight


def assert_comes_back(folder: Path, model: Any, fresh: Any) -> None:
    loaded = PeftModel.from_pretrained(fresh, folder / f"checkpoint-{STEPS}").eval()
    assert torch.equal(logits(loaded), logits(model.eval()))


PROMPTED: Any = lambda place: {"prompt": words(place, 3), "completion": f" {words(place, 2)}"}  # noqa: E731
TURNS: Any = lambda place: {  # noqa: E731
    "messages": [
        {"role": "user", "content": words(place, 3)},
        {"role": "assistant", "content": words(place + 1, 2)},
    ]
}


@pytest.mark.parametrize(
    ("row", "options", "learnt"),
    [
        (PROMPTED, {"completion_only_loss": True}, 3),  # two words and the end
        (TURNS, {"assistant_only_loss": True}, 3),
        (PROMPTED, {"packing": True, "max_length": 16}, None),
    ],
    ids=["completion-only", "assistant-only", "packing"],
)
def test_sft(row: Any, options: dict[str, Any], learnt: int | None, tmp_path: Path) -> None:
    import trl

    def make() -> Any:
        return trl.SFTTrainer(
            model=base(),
            args=arguments(trl.SFTConfig, tmp_path, **options),
            train_dataset=data(row),
            processing_class=tokenizer(),
            peft_config=config(task_type="CAUSAL_LM"),
        )

    trainer = assert_trains_and_resumes(make, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    if learnt is None:
        assert len(trainer.train_dataset) < 16
        assert batch["input_ids"].shape[1] > 6  # more than a row
    else:
        assert int((batch["labels"] != -100).sum()) == learnt
    assert_comes_back(tmp_path, trainer.model, base())


def test_dpo_copies_the_adapter_as_its_reference(tmp_path: Path) -> None:
    import trl

    def make() -> Any:
        return trl.DPOTrainer(
            model=started(),
            args=arguments(trl.DPOConfig, tmp_path, disable_dropout=True),
            train_dataset=data(
                lambda place: {
                    "prompt": words(place, 3),
                    "chosen": f" {words(place, 2)}",
                    "rejected": f" {words(place + 5, 2)}",
                }
            ),
            processing_class=tokenizer(),
        )

    trainer = assert_trains_and_resumes(make, tmp_path)
    start = started()
    # It is a copy, with pairs of its own, and stays what the adapter was; the base is not it.
    assert same_tensors(tensors_of(trainer.model, "ref"), tensors_of(start))
    assert_shared(trainer.model, plan_of(trainer.model), "ref")
    first = trainer.state.log_history[0]["loss"]
    assert first == pytest.approx(math.log(2), abs=1e-5)
    assert not close(logits(start.eval()), logits(base()), 1e-2)
    assert_comes_back(tmp_path, trainer.model, base())


def test_reward(tmp_path: Path) -> None:
    import trl

    def make() -> Any:
        return trl.RewardTrainer(
            model=judge(),
            args=arguments(trl.RewardConfig, tmp_path),
            train_dataset=data(
                lambda place: {"chosen": words(place, 4), "rejected": words(place + 7, 4)}
            ),
            processing_class=tokenizer(),
            peft_config=config(task_type="SEQ_CLS"),
        )

    trainer = assert_trains_and_resumes(make, tmp_path)
    head = trainer.model.base_model.model.score
    assert trainable(trainer.model) == plan_of(trainer.model).parameters + 32
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    assert_comes_back(tmp_path, trainer.model, judge())


def test_grpo_against_a_copy_of_the_adapter(tmp_path: Path) -> None:
    import trl

    def even(completions: list[str], **_: Any) -> list[float]:
        """Rewards the words with an even number."""
        return [
            sum(word in WORDS[::2] for word in text.split()) / (1 + len(text.split()))
            for text in completions
        ]

    def make() -> Any:
        return trl.GRPOTrainer(
            model=started(),
            reward_funcs=even,
            args=arguments(
                trl.GRPOConfig, tmp_path, num_generations=4, max_completion_length=6, beta=0.1
            ),
            train_dataset=data(lambda place: {"prompt": words(place, 3)}),
            processing_class=tokenizer(),
        )

    trainer = assert_trains_and_resumes(make, tmp_path)
    assert same_tensors(tensors_of(trainer.model, "ref"), tensors_of(started()))
    assert_comes_back(tmp_path, trainer.model, base())


def test_the_weights_that_grpo_sends_to_vllm_are_the_merged_ones() -> None:
    """TRL's own walk over the parameters, read into a model as vLLM does: by name."""
    from accelerate import Accelerator
    from trl.distributed import DistributedBackend
    from trl.generation.vllm_generation import VLLMGeneration

    model = started().eval()
    model.add_adapter("ref", config())
    expected = logits(model)
    sender = VLLMGeneration.__new__(VLLMGeneration)  # its __init__ starts an engine
    sender.model, sender.accelerator = model, Accelerator(cpu=True)
    sender._dist = DistributedBackend(sender.accelerator)
    engine = base()
    for parameter in engine.parameters():
        torch.nn.init.zeros_(parameter)
    for _ in range(3):  # each step sends them again
        sent = {name: value.clone() for name, value in sender._iter_named_params()}
        assert sorted(sent) == sorted(name for name, _ in engine.named_parameters())
        engine.load_state_dict(sent)
        assert close(logits(engine), expected)
        assert not model.base_model.model.model.layers[0].self_attn.q_proj.merged
        assert close(logits(model), expected, 1e-6)
    before = dict(base().named_parameters())
    for name, value in sent.items():
        assert torch.equal(value, before[name]) != any(target in name for target in TARGETS)
    with torch.no_grad():
        for parameter in msplora.factors(model).values():
            parameter[0].mul_(2)
    changed = {name: value.clone() for name, value in sender._iter_named_params()}
    engine.load_state_dict(changed)
    assert close(logits(engine), logits(model))
    assert not close(logits(model), expected, 1e-2)
