"""`msplora convert`: to a plain LoRA or into the base, and back to a pyramid."""

from __future__ import annotations

import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msplora.serving import SERVERS

from .convert_back import BaseArguments, Shape, refuse_for, to_pyramid

if TYPE_CHECKING:
    from msplora.plain_lora import Padding


class Target(str, Enum):
    """What to convert to."""

    lora = "lora"
    gguf = "gguf"
    mlx = "mlx"
    merged = "merged"
    msplora = "msplora"


class ServerName(str, Enum):
    """Of `serving.SERVERS`."""

    vllm = "vllm"
    sglang = "sglang"
    llama_cpp = "llama.cpp"
    mlx = "mlx"


class DType(str, Enum):
    """Of the tensors written."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def padding(text: str) -> Padding:
    """What `--pad-to` says."""
    if text == "none" or text == "pow2":
        return text
    if text.isdecimal() and int(text):
        return int(text)
    raise typer.BadParameter(f"--pad-to takes none, pow2 or a rank, not {text!r}.")


def convert(
    source: Annotated[Path, typer.Argument(help="The adapter's folder, or a run's.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[
        Target,
        typer.Option(
            help="`lora`: a plain LoRA as PEFT saves it; `gguf`: for llama.cpp; `mlx`: for mlx-lm; "
            "`merged`: a model without adapter; `msplora`: the nearest pyramid, of a LoRA or a "
            "checkpoint of the released code."
        ),
    ],
    server: Annotated[
        ServerName | None,
        typer.Option("--for", help="Refuse what this server cannot serve, before it is written."),
    ] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option(min=1, help="The largest rank that the server is started with.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model, if not the one the adapter names.")
    ] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(
            help="Of the tensors written: float32 by default, as the base is stored for `merged`."
        ),
    ] = None,
    pad_to: Annotated[
        str, typer.Option(help="Pad the LoRA's rank with zeros: to a power of two, or a number.")
    ] = "none",
    verify: Annotated[
        bool, typer.Option(help="Compare the result's logits with the adapter's before it is kept.")
    ] = True,
    allow_quantized: Annotated[
        bool, typer.Option(help="Merge into a quantised base, which rounds it again.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Of the base model on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run Python code that the base model brings along.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(help="Replace an earlier conversion that is as it was written; nothing else."),
    ] = False,
    r: Annotated[
        int | None, typer.Option("--r", help="Of a pyramid: rank of the first level.")
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(help="Of a pyramid: rank of each level: 8,4,2")
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="Of a pyramid: groups of each level, 0 = per layer: 1,3,0")
    ] = None,
    levels: Annotated[
        str | None, typer.Option(help="Of a pyramid: the levels' names: global,mid,local")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Of a pyramid: a file to measure its loss and the source's on."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Of a pyramid: print JSON instead of a table.")
    ] = False,
) -> None:
    """Convert an adapter, prove it on the real model, then put it in place."""
    if to in (Target.merged, Target.msplora) and (server or max_lora_rank or pad_to != "none"):
        raise typer.BadParameter(
            f"--for, --max-lora-rank, --pad-to: for LoRAs only, not --to {to.value}."
        )
    if to is not Target.merged and allow_quantized:
        raise typer.BadParameter(f"--allow-quantized: for --to merged only, not --to {to.value}.")
    if to is Target.msplora:
        to_pyramid(
            source,
            out,
            Shape(r, ranks, groups, levels),
            base=BaseArguments(base, revision, trust_remote_code),
            dtype=(dtype or DType.float32).value,
            data=data,
            verify=verify,
            force=force,
            as_json=as_json,
        )
        return
    refuse_for(to.value, Shape(r, ranks, groups, levels), data, as_json)
    from rich.console import Console

    from msplora.convert import RoundedAwayWarning, to_lora, to_merged
    from msplora.loading import BaseOptions
    from msplora.serving import serve_command

    with warnings.catch_warnings():
        # Deprecations within the libraries are not for users to read.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", RoundedAwayWarning)  # said below
        if to is not Target.merged:
            result = to_lora(
                source,
                out,
                base=BaseOptions(base, "auto", revision, trust_remote_code),
                dtype=(dtype or DType.float32).value,
                pad_to=padding(pad_to),
                form=to.value,
                server=server.value if server else None,
                max_lora_rank=max_lora_rank,
                verify=verify,
                force=force,
            )
        else:
            stored = "auto" if dtype is None else dtype.value
            result = to_merged(
                source,
                out,
                base=BaseOptions(base, stored, revision, trust_remote_code),
                verify=verify,
                allow_quantized=allow_quantized,
                force=force,
            )
    console = Console(soft_wrap=True, highlight=False)
    if result.comparison is None:
        console.print("[yellow]Not checked[/] (--no-verify).")
    else:
        console.print(f"[green]Checked[/]: {result.comparison}.")
        if result.comparison.rounded_away:
            console.print(f"[bold yellow]Warning[/]: {result.comparison.rounded_away}")
    console.print(
        f"Wrote {result.out} ({result.out_bytes:,} bytes; the adapter has {result.source_bytes:,})."
    )
    if result.generates:
        reading = [name for name, its in SERVERS.items() if its.form == to.value]
        reader = (
            server.value
            if server
            else next((name for name in reading if name not in result.not_served), None)
        )
        if reader is None:
            for why in result.not_served.values():
                console.print(f"{why}.", markup=False)
            console.print("PEFT loads it; for a server convert with --to merged.")
            return
        command = serve_command(
            base or result.base or "BASE",
            str(out),
            result.rank,
            out.resolve().name,  # of "." too
            reader,
            max_lora_rank,
        )
        console.print(f"Serve it, for instance: {command}", markup=False)
