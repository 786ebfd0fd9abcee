"""`msplora plan`: what would be adapted and shared, without loading a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def names(text: str) -> list[str]:
    """The names of a list separated by commas, with blanks or without."""
    return [its.strip() for its in text.split(",")]


def numbers(text: str | None) -> list[int] | None:
    """The whole numbers of a list separated by commas."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 8,4,2") from None


def plan(
    model: Annotated[str, typer.Argument(help="A model's folder, or its id on the hub.")],
    target_modules: Annotated[
        str | None,
        typer.Option("--target-modules", "-t", help="Names, separated by commas; or all-linear."),
    ] = None,
    r: Annotated[int | None, typer.Option("--r", "-r", help="Rank of the first level.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Alpha of every level.")] = None,
    split_alpha: Annotated[bool, typer.Option(help="Share alpha out over the levels.")] = False,
    ranks: Annotated[str | None, typer.Option(help="Rank of each level: 8,4,2")] = None,
    groups: Annotated[
        str | None, typer.Option(help="Groups of each level, 0 = per layer: 1,3,0")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Adapt only the blocks of these numbers: 0,1,2")
    ] = None,
    dora: Annotated[bool, typer.Option(help="With DoRA's magnitudes.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the whole plan as JSON.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Draw the pyramid, with sliders, as a page: a file to write."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an earlier page.")] = False,
    revision: Annotated[str | None, typer.Option(help="Of the model on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run Python code that the model brings along.")
    ] = False,
) -> None:
    """Print the sites, kinds, groups and parameter counts of a pyramid on a model."""
    import transformers

    from msplora import MSPLoraConfig
    from msplora import plan as make_plan
    from msplora.errors import ConfigError, MSPLoraError
    from msplora.loading import loading_errors_explained, resolve_source

    if html is not None:
        from msplora.extras import report_extra
        from msplora.page.writing import check_page_free

        with report_extra():
            import jinja2  # noqa: F401  (missed now, not after the work)
        check_page_free(html, force)
    source = resolve_source(model)
    with loading_errors_explained(source):
        model_config = transformers.AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
    targets = None if target_modules is None else names(target_modules)
    try:
        config = MSPLoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            split_alpha=split_alpha,
            ranks=numbers(ranks),
            groups=numbers(groups),
            layers_to_transform=numbers(layers),
            use_dora=dora,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
        )
        found = make_plan(model_config, config, trust_remote_code=trust_remote_code)
    except MSPLoraError:
        raise
    except ValueError as error:  # PEFT's own checks of a config
        raise ConfigError(str(error)) from None
    if html is not None:
        from msplora.page.writing import write_files

        write_files({html: found.to_html(source)}, html)
    if json:
        import json as json_format

        typer.echo(json_format.dumps(found.to_dict(), indent=2))
    else:
        typer.echo(f"{source} ({(model_config.architectures or ['?'])[0]})\n")
        typer.echo(str(found))
        if html is not None:
            typer.echo(f"\nWrote {html}")
