"""Files of GLUE's tasks as GLUE has them, with a few rows."""

from __future__ import annotations

from pathlib import Path

TASKS: dict[str, tuple[str, str, str]] = {
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t1\t2\t{}\tA.", "0\t3\t4\t{}\tB."),
    "cola": ("", "x\t1\t\t{}", "x\t0\t*\t{} be."),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        "0\tA.\t{}\tentailment",
        "0\tB.\t{}\tnot_entailment",
    ),
    "sst2": ("sentence\tlabel", "{}\t1", "No. {}\t0"),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        "0\tA?\t{}\tentailment",
        "0\tB?\t{}\tnot_entailment",
    ),
    "stsb": ("index\tsentence1\tsentence2\tscore", "0\tA.\t{}\t5.0", "0\tB.\t{}\t0.5"),
}  # fmt: skip
"""The header, and a row of each class, with room for a sentence; CoLA's files have no header."""


def write_glue(folder: Path, task: str, pairs: int = 6, sentence: str = "A.") -> None:
    """Write train.tsv and dev.tsv, each with so many pairs of rows."""
    header, *rows = TASKS[task]
    lines = [header] * bool(header) + [row.format(sentence) for row in rows] * pairs
    folder.mkdir(parents=True)
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
