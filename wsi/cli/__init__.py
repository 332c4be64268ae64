"""The command line: one file per command. Data goes to stdout, messages to stderr."""

from __future__ import annotations

import io
import logging
import os
import sys

import typer

from wsi.cli.check import check
from wsi.cli.convert import convert
from wsi.cli.demo import demo
from wsi.cli.doctor import doctor
from wsi.cli.embed import embed
from wsi.cli.evaluate import evaluate
from wsi.cli.export import export
from wsi.cli.imports import import_annotations
from wsi.cli.info import info
from wsi.cli.score import score
from wsi.cli.tile import tile
from wsi.cli.train import train
from wsi.errors import WsiError

app = typer.Typer(
    name="wsi",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Whole-slide pathology analysis: slides in; grades, QuPath GeoJSON and heatmaps out. Research use only.",
    epilog="Start with [bold]wsi demo[/bold]; `wsi VERB --help` has examples.",
)
for verb in (score, tile, embed, info, check, convert, demo, doctor):
    app.command()(verb)
app.command("import")(import_annotations)
for group in (export, evaluate, train):
    app.add_typer(group)


def main() -> None:
    """Run the command line; exit 0 done, 2 wrong usage or bad input, 3 some slides failed, 130 interrupted, 1 bug."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:  # the caller may have closed stdin, stdout or stderr
        os.set_inheritable(opened, True)
    os.close(opened)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: PTH123, SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as on stderr: the terminal may lack characters
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs each odd tag; we raise errors
    try:
        app()
    except KeyboardInterrupt:  # raised before typer handles it
        raise SystemExit(130) from None
    except WsiError as error:
        print(f"wsi: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.filename is None:
            raise
        print(f"wsi: {error.filename}: {error.strerror}. Check the path, its permissions and the disk", file=sys.stderr)
        raise SystemExit(2) from None
