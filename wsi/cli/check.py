"""``wsi check``: identify a file or folder and list its problems."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from wsi.cli.display import say


def check(
    path: Annotated[Path, typer.Argument(help="A slide, results, a store, annotations, bags of features, a project.")],
    phi: Annotated[bool, typer.Option("--phi", help="List what could identify a patient, operator or place.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Identify a file or folder and list its problems; exit 2 if there are any.

    With --phi: list associated images, identifying properties and dates of slides, and paths and names of slides in
    results. Only the names of fields are shown, never their values. Text in the scanned image itself is not detected.

    Examples:
      wsi check results

      wsi check annotations.geojson

      wsi check slide.svs --phi
    """
    from wsi import check as checking

    if not path.exists():
        say(f"wsi: {path}: there is no such file or folder")
        raise typer.Exit(2)
    if phi:
        rows = sorted(set(checking.phi(path)))
        if as_json:
            print(json.dumps([dict(zip(("file", "where", "what"), row, strict=True)) for row in rows], indent=2))
        else:
            for file, where, what in rows:
                print(f"{file}: {where}: {what}")
            say(f"{len(rows)} places" if rows else "nothing was found; look at the pictures yourself")
        return
    found = checking.check(path)
    if as_json:
        print(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    else:
        print(f"{found.path}: {found.kind}")
        for name, value in found.facts.items():
            print(f"  {name:<12} {value}")
        for problem in found.problems:
            print(f"  problem: {problem}")
    if found.problems:
        raise typer.Exit(2)
