"""The page's sections: which points belong to each, its tables, its sentences and its plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import claims, plots
from .measured import (
    AGAIN,
    OURS,
    Measured,
    constant,
    depth_series,
    gather,
    labels,
    main_point,
    method_name,
    method_order,
    others,
)
from .reading import MODEL, STEP, Results, Row, is_on_gpu
from .section import Plot, Section
from .tables import (
    Column,
    by_method,
    comparison,
    escape,
    measure,
    overhead_share,
    percent,
    quartiles,
    ratio_to_lora,
    rounded,
    spread,
    to_lora,
    verdict,
)

MIB = 2**20


def main(files: Sequence[Results]) -> Section:
    """Show all methods where most were measured, and then wherever others than ours were."""
    steps = _steps(files, plain=True)
    point = main_point(steps)
    if point is None:
        return Section()
    rest = [p for p in (*steps, *_steps(files, plain=False)) if p is not point and others([p])]
    columns = [_TRAINABLE, measure("step, ms", "seconds", 1, 1e-3), *_RATIOS]
    marks = [
        plots.MethodMark(method, method_name(method), value)
        for method in method_order([point])
        if (value := quartiles(point.rows[method]["to_floor"])) is not None
    ]
    return Section(
        by_method([point], columns),
        escape(constant([point])),
        [claims.main_claim(point), claims.what_they_are(method_order([point]))],
        [_methods_plot("main", "Step time of every method", "step time ÷ floor", marks, 3)],
        by_method(rest, columns, list(point.keys)) if rest else None,
        f"All methods at {len(rest)} more point{'s' * (len(rest) != 1)}",
    )


def sites(files: Sequence[Results]) -> Section:
    """Compare one adapted weight at a time."""
    points = gather(files, "sites", ("in", "out", "tokens", "dtype"))
    return _compared("sites", "Single sites: MSPLoRA against LoRA", points, extra=others(points))


def sweep(files: Sequence[Results]) -> Section:
    """Compare over batch, length, depth and whatever else was varied."""
    points = _steps(files, plain=True)
    found = _compared("sweep", "Sweep: MSPLoRA against LoRA", points)
    depths = depth_series(points)
    if depths:
        title = "Depth: MSPLoRA against LoRA"
        layers = [point.keys["layers"] for point in depths]
        held = ", ".join(
            depths[0].label([name]) for name in depths[0].keys if name not in ("layers", *_MODES)
        )
        alt = f"{title}, {layers[0]} to {layers[-1]} layers; {held}"
        svg = plots.draw_depth(title, layers, _point_marks(depths, list(map(str, layers))))
        found.plots.append(Plot("depth", escape(alt), svg))
    return found


def modes(files: Sequence[Results]) -> Section:
    """Compare under torch.compile and gradient checkpointing, beside the same points without."""
    special = _steps(files, plain=False)
    places = {_without_modes(point) for point in special}
    plain = [p for p in _steps(files, plain=True) if _without_modes(p) in places]
    points = _in_order([*special, *plain])
    return _compared("", "", points, judge=special)


def memory(files: Sequence[Results]) -> Section:
    """Show what a step holds at its peak."""
    points = gather(files, "memory", (*STEP, "compiled"))
    columns = [_TRAINABLE, *_LIVE, measure("resident set, MiB", "resident_bytes", 1, MIB)]
    whole, own = (
        claims.less_claim(points, field, f"{what} with MSPLoRA is", "higher")
        for field, what in (
            ("peak_live_bytes", "the peak of live tensors"),
            ("step_live_bytes", "what a step adds to those that live from step to step"),
        )
    )
    found = _listed(points, columns, whole, own)
    if points:
        # Of many points one can be drawn: where ours does worst.
        point = max(points, key=lambda its: ratio_to_lora(its, OURS, "step_live_bytes") or 0)
        marks = [
            plots.MethodMark(
                method, method_name(method), [point.rows[method]["step_live_bytes"] / MIB] * 3
            )
            for method in method_order([point])
        ]
        title = "What a step adds to live tensors, at its peak"
        if len(points) > 1:
            title += f", where MSPLoRA's share is largest: {labels(points)[points.index(point)]}"
        found.plots.append(_methods_plot("memory", title, "MiB", marks, 1))
    return found


def inject(files: Sequence[Results]) -> Section:
    """Show how long it takes to put an adapter into a model."""
    points = gather(files, "size", MODEL, lambda row: row["what"] == "inject")

    def per_layer(point: Measured, method: str) -> str:
        seconds = point.rows[method]["seconds"]
        return spread(seconds, 2, method, 1e-3 * point.keys["layers"])

    columns = [
        measure("ms", "seconds", 1, 1e-3),
        ("ms per layer", per_layer),
        measure("÷ LoRA", "to_lora", 3),
        _ROUNDS,
    ]
    what = "Planning and injecting a pyramid"
    return _listed(points, columns, claims.time_claim(points, "to_lora", what))


def adapter_files(files: Sequence[Results]) -> Section:
    """Show what a saved adapter weighs, and how long it takes to save and to load."""
    points = gather(files, "size", ("shape", "targets"), lambda row: row["what"] == "file")
    columns = [
        _TRAINABLE,
        measure("file, bytes", "bytes", 0),
        to_lora("÷ LoRA's", "bytes"),
        measure("of it header", "header_bytes", 0),
        measure("save, ms", "save_seconds", 1, 1e-3),
        measure("÷ LoRA", "save_to_lora", 3),
        measure("load, ms", "load_seconds", 1, 1e-3),
        measure("÷ LoRA", "load_to_lora", 3),
        _ROUNDS,
    ]
    words = (
        claims.less_claim(points, "bytes", "the file of MSPLoRA is", "larger"),
        claims.time_claim(points, "save_to_lora", "Saving it"),
        claims.time_claim(points, "load_to_lora", "Loading it"),
    )
    return _listed(points, columns, *words)


def singular_values(files: Sequence[Results]) -> Section:
    """Show what an analysis gains from never making the dense product."""
    points = gather(files, "size", ("shape", "rank"), lambda row: row["what"] == "singular values")
    columns: list[Column] = [
        measure("ms", "seconds", 2, 1e-3),
        measure("times as fast", "times_faster", 1, large_is_good=True),
        (
            "largest relative difference",
            lambda point, method: claims.difference(point.rows[method]["max_relative_difference"]),
        ),
        _ROUNDS,
    ]
    return _listed(points, columns, claims.singular_value_claim(points))


def gpu(files: Sequence[Results]) -> Section:
    """Show all methods at each point that was measured on a GPU."""
    points = gather(files, "speed", (*STEP, "compiled"), is_on_gpu)
    columns = [
        _TRAINABLE,
        measure("step, ms", "seconds", 2, 1e-3),
        *_RATIOS,
        measure("tokens per second", "tokens_per_second", 0, large_is_good=True),
        *_LIVE,
        measure("kernel launches", "kernel_launches", 0),
    ]
    if not points:
        return Section()
    words = (
        claims.speed_claim(claims.judged(points)),
        claims.inside_claim(points),
        claims.control_range(points),
    )
    return _listed(points, columns, *words)


_MODES = ("compiled", "checkpointing")
_TRAINABLE: Column = (
    "trainable",
    lambda point, method: f"{point.rows[method]['trainable']:,}",
)
_LIVE: list[Column] = [
    measure("peak of live tensors, MiB", "peak_live_bytes", 1, MIB),
    to_lora("÷ LoRA's", "peak_live_bytes"),
    measure("of it the step's, MiB", "step_live_bytes", 1, MIB),
    to_lora("÷ LoRA's", "step_live_bytes"),
]
_ROUNDS = measure("rounds", "rounds", 0)
_RATIOS: list[Column] = [
    measure("÷ floor", "to_floor", 3),
    measure("÷ LoRA", "to_lora", 3),
    (
        "share of LoRA's overhead",
        lambda point, method: percent(overhead_share(point, method), method),
    ),
]


def _steps(files: Iterable[Results], *, plain: bool) -> list[Measured]:
    def wanted(row: Row) -> bool:
        return not is_on_gpu(row) and plain != _in_a_mode(row)

    return gather(files, "speed", (*STEP, "compiled"), wanted)


def _in_a_mode(keys: Mapping[str, Any]) -> bool:
    """Tell a compiled or a checkpointed step; files may name the kind of checkpointing."""
    return keys["compiled"] or keys["checkpointing"] not in (False, "none")


def _without_modes(point: Measured) -> tuple[Any, ...]:
    return tuple(value for name, value in point.keys.items() if name not in _MODES)


def _in_order(points: Iterable[Measured]) -> list[Measured]:
    """Put each place's modes below one another, the plain one first."""
    found = list(points)
    places = list(dict.fromkeys(map(_without_modes, found)))
    return sorted(
        found,
        key=lambda p: (places.index(_without_modes(p)), _in_a_mode(p.keys), p.keys["compiled"]),
    )


def _compared(
    name: str,
    title: str,
    points: Sequence[Measured],
    judge: Sequence[Measured] | None = None,
    extra: Sequence[str] = (),
) -> Section:
    """Compare ours with LoRA at these points: a table, what it comes to, and a plot if named."""
    judge = points if judge is None else judge
    if not judge:
        return Section()
    words = [
        claims.speed_claim(claims.judged(judge, points)),
        claims.inside_claim(judge),
        claims.control_range(judge),
        claims.share_claim(judge),
    ]
    found = Section(comparison(points, extra), escape(constant(points)), list(filter(None, words)))
    marks = _point_marks(points, labels(points))
    if name and len(marks) > 1:  # of one point the table says it all
        alt = f"{title}: step time of each point of the table, with the A/A band"
        found.plots.append(Plot(name, escape(alt), plots.draw_points(title, marks)))
    return found


def _point_marks(points: Sequence[Measured], names: Sequence[str]) -> list[plots.PointMark]:
    """Mark the points where ours was measured against LoRA."""
    return [
        plots.PointMark(
            name,
            ours,
            quartiles(point.rows[AGAIN]["to_lora"]) if AGAIN in point.rows else None,
            verdict(point),
        )
        for point, name in zip(points, names, strict=True)
        if OURS in point.rows and (ours := quartiles(point.rows[OURS]["to_lora"])) is not None
    ]


def _methods_plot(
    name: str, title: str, unit: str, marks: Sequence[plots.MethodMark], digits: int
) -> Plot:
    medians = (f"{mark.label} {rounded(mark.value[1], digits, mark.method)}" for mark in marks)
    alt = escape(f"{title}, {unit}: {'; '.join(medians)}")
    return Plot(name, alt, plots.draw_methods(title, unit, marks, digits))


def _listed(
    points: Sequence[Measured],
    columns: Sequence[Column],
    *words: str,
) -> Section:
    """List every method at these points."""
    if not points:
        return Section()
    return Section(by_method(points, columns), escape(constant(points)), list(filter(None, words)))
