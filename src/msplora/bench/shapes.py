"""The shapes that are measured: real configurations, written out, with random weights.

Every model is transformers' `…ForSequenceClassification`, so that all methods train the same small
head, whatever the model was made for. Nothing here loads torch until a model's numbers are asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from msplora.errors import MSPLoraError, nearest

# Where a family's blocks are, and what in a block is adapted: a regex on module paths, since
# RoBERTa's "dense" names three layers of a block and one of the head.
_BLOCKS = {"roberta": r".*\.encoder\.layer\.\d+\.", "llama": r".*\.layers\.\d+\."}
_TARGETS = {
    ("roberta", "qv"): r"attention\.self\.(query|value)",
    ("roberta", "all-linear"): (
        r"(attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense"
        r"|output\.dense)"
    ),
    ("llama", "qv"): r"self_attn\.(q|v)_proj",
    ("llama", "all-linear"): r"(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)",
}
TARGETS = ("qv", "all-linear")


@dataclass(frozen=True)
class Shape:
    """The numbers of a configuration that decide what a step costs."""

    name: str
    family: str
    """roberta or llama."""
    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int
    """The longest input: RoBERTa's table has two rows more, for its padding."""
    key_value_heads: int = 0
    """Fewer than `heads` where groups of queries share them; 0: as many."""
    head_size: int = 0
    """0: hidden / heads."""

    @property
    def queries(self) -> int:
        """How wide the queries of all heads are together."""
        return self.heads * (self.head_size or self.hidden // self.heads)

    @property
    def keys(self) -> int:
        """How wide the keys, or the values, of all heads are together."""
        return self.queries // self.heads * (self.key_value_heads or self.heads)

    def sites(self, targets: str) -> tuple[tuple[int, int], ...]:
        """(in, out) of every adapted layer of one block."""
        hidden, queries, keys = self.hidden, self.queries, self.keys
        if targets == "qv":
            return ((hidden, queries), (hidden, keys))
        feed = ((hidden, self.intermediate), (self.intermediate, hidden))
        gate = ((hidden, self.intermediate),) if self.family == "llama" else ()
        attention = ((hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden))
        return (*attention, *gate, *feed)

    def pattern(self, targets: str) -> str:
        """The regex that a module's whole path matches if it is adapted."""
        return _BLOCKS[self.family] + _TARGETS[self.family, targets]

    def config(self, layers: int | None = None) -> Any:
        """The transformers configuration, with so many layers instead of its own."""
        import transformers

        common = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": layers or self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate,
            "num_labels": 2,
            "use_cache": False,  # a cache of keys and values is of no use to a training step
        }
        if self.family == "roberta":
            return transformers.RobertaConfig(
                **common,
                max_position_embeddings=self.positions + 2,
                type_vocab_size=1,
                layer_norm_eps=1e-5,
                pad_token_id=1,
                # The model's own dropout takes the same time in every method; on a CPU it takes a
                # good part of a step, and would make every method look near to the floor.
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        return transformers.LlamaConfig(
            **common,
            max_position_embeddings=self.positions,
            num_key_value_heads=self.key_value_heads or self.heads,
            head_dim=self.head_size or self.hidden // self.heads,
            rms_norm_eps=1e-5,
            pad_token_id=0,
        )

    def parameters(self, layers: int | None = None) -> int:
        """How many numbers the model has, head included."""
        # Blocks are alike, and a model of a hundred thousand is not built to be counted.
        one, two = _count(self, 1), _count(self, 2)
        return one + ((layers or self.layers) - 1) * (two - one)


@cache
def _count(shape: Shape, layers: int) -> int:
    # On the meta device: real classes, no storage.
    import torch

    from .models import classifier_class

    with torch.device("meta"):
        model = classifier_class(shape)(shape.config(layers))
    return sum(parameter.numel() for parameter in model.parameters())


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("roberta-base", "roberta", 768, 12, 12, 3072, 50_265, 512),
        Shape("llama-3.2-1b", "llama", 2048, 16, 32, 8192, 128_256, 131_072, 8, 64),
        Shape("llama-3.2-3b", "llama", 3072, 28, 24, 8192, 128_256, 131_072, 8, 128),
        Shape("llama-2-7b", "llama", 4096, 32, 32, 11_008, 32_000, 4096),
        # For tests.
        Shape("tiny-roberta", "roberta", 32, 4, 4, 48, 64, 64),
        Shape("tiny-llama", "llama", 32, 4, 4, 48, 64, 64, 2),
    )
}


def shape_named(name: str) -> Shape:
    """Return a shape.

    Raises:
        MSPLoraError: there is none of that name.
    """
    if name not in SHAPES:
        raise MSPLoraError(
            f"there is no shape {name!r}.{nearest(name, SHAPES)} There are: {', '.join(SHAPES)}."
        )
    return SHAPES[name]
