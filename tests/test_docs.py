"""Documentation that cannot rot: examples run, verbs and names are in the README."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import wsi
from tests.conftest import REPOSITORY
from wsi.cli import app

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(wsi.__path__, "wsi.")
    if not module.name.endswith(("._cpu", "._cuda")) and ".models" not in module.name
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_every_verb_and_public_name_is_in_the_readme() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    for command in app.registered_commands:
        assert f"wsi {command.name or command.callback.__name__}" in readme  # type: ignore[union-attr]
    for group in app.registered_groups:
        for command in group.typer_instance.registered_commands:  # type: ignore[union-attr]
            verb = command.name or command.callback.__name__  # type: ignore[union-attr]
            assert f"wsi {group.typer_instance.info.name} {verb}" in readme  # type: ignore[union-attr]
    for name in wsi.__all__:
        assert name in readme, name


def test_every_public_name_is_there_and_documented() -> None:
    for name in wsi.__all__:
        assert getattr(wsi, name).__doc__
    with pytest.raises(AttributeError, match="no attribute"):
        _ = wsi.nothing
    assert set(wsi.__all__) <= set(dir(wsi))


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, wsi; assert not {'torch', 'zarr', 'numpy', 'openslide'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_error_is_on_the_tree() -> None:
    from wsi import errors

    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.WsiError):
            assert name in (errors.__doc__ or "")


def test_every_model_has_its_papers() -> None:
    folders = sorted(config.parent for config in (REPOSITORY / "models").glob("*/config.json"))
    assert len(folders) >= 2
    for folder in folders:
        for name in ("CARD.md", "train.py", "figures.json", "weights.safetensors", "mil/config.json"):
            assert (folder / name).is_file(), folder / name
        config = json.loads((folder / "config.json").read_text())
        head = json.loads((folder / "mil/config.json").read_text())
        assert head["encoder_sha256"] == config["weights_sha256"]
        card = (folder / "CARD.md").read_text()
        assert config["weights_sha256"] in card and "esearch" in card
