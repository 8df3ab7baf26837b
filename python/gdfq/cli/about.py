"""`gdfq targets` and `gdfq doctor`: what there is."""

import json

import typer

from gdfq.cli.app import app
from gdfq.cli.options import JsonOption
from gdfq.registry import TARGETS


@app.command()
def targets(as_json: JsonOption = False) -> None:
    """List what the quantized network can be made to run on, and what each means for the quantizer.

    A target of your own is a TOML table of what differs from one of these, in a file for --target or as the setting
    quantizer.target:

        extends = "onnx"
        name = "my accelerator"
        weight_scheme = "symmetric"
    """
    known = {name: target.model_dump(mode="json") for name, target in TARGETS.items()}
    if as_json:
        typer.echo(json.dumps(known, indent=2))
        return
    from gdfq.target import Target

    for name, values in known.items():
        typer.echo(f"{name}: {values['help']}")
        for key, value in values.items():
            if key not in ("name", "help"):
                shown = ", ".join(value) if isinstance(value, list) else "-" if value in (None, {}) else value
                typer.echo(f"  {key:18} {shown}")
    typer.echo("\nwhat each key says:")
    for key, field in Target.model_fields.items():
        if field.description:
            typer.echo(f"  {key:18} {field.description}")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this installation can do: versions, devices, and which kernels every op uses and why."""
    import gdfq_ext
    from gdfq.provenance import versions

    build = gdfq_ext.build_info()
    backends = gdfq_ext.backend_report()
    if as_json:
        typer.echo(json.dumps({"versions": versions(), "build": build, "backends": backends.as_dict()}, indent=2))
        return
    for title, entries in (("versions", versions()), ("build", build or {"extension": "not built"})):
        typer.echo(title)
        for name, value in entries.items():
            typer.echo(f"  {name:18} {value}")
    typer.echo(str(backends))
