"""`gdfq reproduce`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from gdfq import ranks
from gdfq.cli.app import app, leave
from gdfq.cli.options import JsonOption
from gdfq.config import parse_override
from gdfq.errors import GdfqError


@app.command()
@ranks.started()
def reproduce(
    name: Annotated[str, typer.Argument(help="table1 to table9, or figure1")],
    out: Annotated[Path, typer.Option(help="folder for the results; tables may share one")] = Path("reproduce-output"),
    offline: Annotated[
        bool, typer.Option("--offline", help="on the network and images that the package ships, with no download")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER, NAME being cifar10, cifar100 or imagenet (val/ and train/); may be repeated"),
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="NETWORK=FILE instead of pytorchcv's weights; may be repeated")
    ] = None,
    models: Annotated[list[str] | None, typer.Option(help="only this NETWORK; may be repeated")] = None,
    cell: Annotated[int | None, typer.Option(help="only the cell of this number, for a scheduler; see --list")] = None,
    shard: Annotated[
        str | None, typer.Option(help="I/N, the I-th of N tasks that share --out: every N-th cell alone")
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="default 0; may be repeated")] = None,
    scale: Annotated[float, typer.Option(help="factor on the length of training, below 1 for a trial")] = 1.0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, for all cells; may be repeated")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="keep what --out holds, and do the rest")] = False,
    list_cells: Annotated[
        bool, typer.Option("--list", help="the table's cells by number, and what they lack; runs nothing")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a table or the figure of the paper again, beside the published figures.

    Example: gdfq reproduce table5 --offline

    On several GPUs, each cell on one of them: torchrun --nproc-per-node 8 -m gdfq reproduce ...
    """
    from gdfq.reproduce import render
    from gdfq.reproduce.figure1 import figure1
    from gdfq.reproduce.grid import Grid

    progress = not as_json and sys.stderr.isatty() and ranks.is_first()
    if name == "figure1":
        if ranks.count() > 1:
            raise GdfqError("figure1 has no cells that could be spread over ranks: start it without torchrun")
        if data or weights or models or cell is not None or shard or settings or list_cells or len(seeds or []) > 1:
            raise GdfqError("figure1 has no cells and takes no data: give --out, --scale, --json and one --seeds alone")
        result = figure1(out, *(seeds or []), scale=scale, progress=progress)
        typer.echo(json.dumps(result) if as_json else f"written to {out}: figure1.png, figure1.json")
        return
    grid = Grid(
        name,
        out,
        is_offline=offline,
        data=data or (),
        weights=weights or (),
        models=models or (),
        number=cell,
        shard=shard,
        seeds=seeds or (0,),
        scale=scale,
        settings=dict(parse_override(text) for text in settings or []),
    )
    if list_cells:
        if ranks.is_first():
            listed = grid.listing()
            typer.echo(json.dumps(listed) if as_json else render.listing(listed))
        return
    result = grid.run(resume or ranks.is_restarted(), progress, say=lambda text: typer.echo(text, err=True))
    if ranks.is_first():
        typer.echo(json.dumps(result) if as_json else render.markdown(result))
    if grid.failed:
        reason = next(iter(grid.failed.values()))
        leave(f"gdfq: {len(grid.failed)} cells failed, the first: {reason}", 1, is_said=not ranks.is_first())
