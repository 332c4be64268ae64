"""``wsi doctor``: report what is installed, what the hardware offers, and what is missing."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check the installation: versions, readers, native kernels, GPU, models.

    Exits with 2 if something required is broken.

    Example:
      wsi doctor
    """
    import importlib.metadata
    import os
    import platform

    from wsi import native
    from wsi.nn.checkpoint import known_models
    from wsi.nn.patch import cpu_has_bfloat16, gpu_name

    facts: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count()}
    problems = []
    needed = "wsi numpy openslide-python openslide-bin tiffslide simplejpeg zarr dask shapely torch timm"
    for name in needed.split():
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = None
            if name != "openslide-bin":  # the system may provide the library
                problems.append(f"{name} is not installed: pip install {name}")
    try:
        from wsi.slide.openslide import library_version

        facts["openslide library"] = library_version()
        if tuple(int(part) for part in library_version().split(".")[:3]) < (4, 0, 1):
            problems.append("OpenSlide is older than 4.0.1, which closed security holes: pip install openslide-bin")
    except (ImportError, OSError) as error:
        problems.append(f"OpenSlide does not load ({error}): pip install openslide-bin")
    try:
        from wsi.nn.backbone import TORCHVISION_REPAIRED

        facts["torchvision fits torch"] = (
            "no: wsi mends it for itself, but a plain `import timm` fails; install builds that match"
            if TORCHVISION_REPAIRED
            else "yes"
        )
    except Exception as error:  # noqa: BLE001  any failure of the import is reported
        problems.append(f"timm does not load ({error}): install torch and torchvision of matching versions")
    twins = "NumPy twins (no C++ compiler at install): same bytes, slower"
    facts["native kernels"] = "compiled" if native.HAVE_CPU else twins
    instructions = native.winograd_instructions()
    of_torch = "torch's (no AVX2, or no compiler at install)"
    facts["3 x 3 convolutions"] = f"ours, with {instructions[0]}" if instructions else of_torch
    facts["bfloat16 on this CPU"] = cpu_has_bfloat16()
    facts["GPU"] = gpu_name() or "none that torch sees"
    facts["models"] = known_models()
    if as_json:
        print(json.dumps({**facts, "problems": problems}, indent=2))
    else:
        for key, value in facts.items():
            print(f"{key:22} {', '.join(value) if isinstance(value, list) else value}")
        for problem in problems:
            print(f"PROBLEM: {problem}")
        if not problems:
            print("all well")
    if problems:
        raise typer.Exit(2)
