"""The plan as text and as JSON: what `print(plan)` and `msplora plan` show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .pyramid import PER_LAYER, Kind, Level, Plan


def plan_text(plan: Plan) -> str:
    """Lay the plan out as two tables, a total and notes."""
    lines = [
        *_table(
            ("level", "groups", "rank", "alpha", "scale", "pairs", "parameters"),
            (_level_row(plan, level) for level in plan.levels),
            right=(2, 3, 4, 5, 6),
        ),
        "",
        *_table(
            ("kind", "shape", "layers", "blocks", "group sizes", "rank", "parameters"),
            (_kind_row(kind) for kind in plan.kinds),
            right=(2, 5, 6),
        ),
        "",
        total_line(plan),
        *(f"Note: {note}" for note in plan.notes),
    ]
    return "\n".join(lines)


def plan_dict(plan: Plan) -> dict[str, Any]:
    """Everything the plan holds, as JSON can write it."""
    return {
        "levels": [
            {
                "name": level.name,
                "groups": level.groups,
                "rank": level.rank,
                "alpha": level.alpha,
                "scale": level.scale,
                "parameters": plan.parameters_per_level[level.name],
            }
            for level in plan.levels
        ],
        "kinds": [
            {
                "kind": kind.name,
                "stack": kind.stack,
                "shape": str(kind.shape),
                "layout": kind.shape.layout,
                "rank": kind.rank,
                "ranks": [level.rank for level in kind.levels],
                "scales": [level.scale for level in kind.levels],
                "layers": kind.layers,
                "blocks": [site.block for site in kind.sites],
                "sites": [site.key for site in kind.sites],
                "parameters": kind.parameters,
            }
            for kind in plan.kinds
        ],
        "pairs": [
            {
                "address": pair.address,
                "rank": pair.rank,
                "scale": pair.scale,
                "parameters": pair.parameters,
                "blocks": list(pair.blocks),
                "sites": list(pair.sites),
            }
            for pair in plan.pairs
        ],
        "parameters": plan.parameters,
        "magnitude_parameters": plan.magnitude_parameters,
        "lora_parameters": plan.lora_parameters,
        "fingerprint": plan.fingerprint,
        "notes": list(plan.notes),
    }


def total_line(plan: Plan) -> str:
    """One sentence: what the pyramid trains, and what LoRA would."""
    share = plan.parameters / plan.lora_parameters
    magnitudes = (
        f" (of which {plan.magnitude_parameters:,} DoRA magnitudes)"
        if plan.magnitude_parameters
        else ""
    )
    return (
        f"{len(plan.sites)} sites, {len(plan.pairs)} pairs, {plan.parameters:,} parameters"
        f"{magnitudes}: {share:.1%} of the {plan.lora_parameters:,} of LoRA r = "
        f"{plan.levels[0].rank}."
    )


def _level_row(plan: Plan, level: Level) -> tuple[str, ...]:
    return (
        level.name,
        "per layer" if level.groups == PER_LAYER else str(level.groups),
        str(level.rank),
        f"{level.alpha:g}",
        f"{level.scale:g}",
        str(sum(pair.level == level.name for pair in plan.pairs)),
        f"{plan.parameters_per_level[level.name]:,}",
    )


def _kind_row(kind: Kind) -> tuple[str, ...]:
    sizes = []
    for level in kind.levels:
        groups = [level.group_of(depth, kind.layers) for depth in range(kind.layers)]
        counts = [groups.count(group) for group in sorted(set(groups))]
        sizes.append(repeated(counts))
    # A name of two stacks carries its stack; the others get it here.
    name = kind.name if ":" in kind.name else f"{kind.stack} … {kind.name}"
    return (
        name if kind.stack != kind.path else kind.path,
        str(kind.shape),
        str(kind.layers),
        _ranges([site.block for site in kind.sites]),
        " | ".join(sizes),
        "+".join(str(level.rank) for level in kind.levels),
        f"{kind.parameters:,}",
    )


def repeated(counts: Sequence[int]) -> str:
    """Sizes of groups, as ``4×1`` where they are alike, else ``3+2+2``."""
    if len(counts) > 1 and len(set(counts)) == 1:
        return f"{len(counts)}×{counts[0]}"
    return "+".join(map(str, counts))


def _ranges(blocks: Sequence[int | None]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``; `-` where the site lies in no list of blocks."""
    numbers = sorted({block for block in blocks if block is not None})
    if not numbers:
        return "-"
    runs = [[numbers[0], numbers[0]]]
    for number in numbers[1:]:
        if number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int]) -> list[str]:
    cells = [header, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()

    return [line(header), "  ".join("-" * width for width in widths), *map(line, cells[1:])]
