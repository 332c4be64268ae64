"""Reports of evaluations: report.json, CSVs, plots, and one HTML page."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import importlib.metadata
import importlib.resources
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsi import __version__
from wsi.errors import EvaluationError, OutputError
from wsi.files import replacing, write_csv, write_json
from wsi.metrics.estimate import Estimate

Row = Mapping[str, Any]

#: Items that TRIPOD+AI (BMJ 2024;385:e078378) and CLAIM (Radiology: AI, 2024) require in a report. The evaluation fills
#: in those it knows; the others stay empty unless the user gives them (``--about``).
REPORTING_ITEMS = (
    "intended_use", "population_and_setting", "data_sources", "data_dates", "eligibility", "partition_unit",
    "reference_standard", "annotators", "demographics", "sample_size_rationale", "missing_data", "preprocessing",
    "model", "hyperparameters", "training_data", "threshold_selection", "metrics", "calibration", "subgroups",
    "failure_analysis", "limitations", "deidentification", "ethics", "registration", "code_availability",
    "data_availability", "funding", "patient_involvement",
)  # fmt: skip
#: Longer tables are not shown on the HTML page.
_LONG_TABLE = 40


@dataclass(frozen=True)
class Plot:
    """A plot of a report: the stem of its file, a caption, and a function that draws it on matplotlib axes."""

    name: str
    caption: str
    draw: Callable[[Any], None]


@dataclass(frozen=True)
class Report:
    """The outcome of an evaluation.

    Attributes
    ----------
    task, title : str
    protocol : mapping
        How it was measured: every choice that affects a number.
    data : mapping
        What it was measured on: counts and a hash.
    results : mapping of str to Estimate
    tables : mapping of str to rows
        Each becomes a CSV; short ones are also on the HTML page.
    plots : sequence of Plot
    exclusions : rows
    leaderboard : rows
    warnings : sequence of str
    reporting : mapping
        The ``REPORTING_ITEMS`` that the evaluation fills in.
    """

    task: str
    title: str
    protocol: Mapping[str, Any]
    data: Mapping[str, Any]
    results: Mapping[str, Estimate]
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    plots: Sequence[Plot] = ()
    exclusions: Sequence[Row] = ()
    leaderboard: Sequence[Row] = ()
    warnings: Sequence[str] = ()
    reporting: Mapping[str, str] = field(default_factory=dict)

    def json(self, about: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return the content of report.json.

        Examples
        --------
        >>> Report("slides", "t", {}, {}, {"auroc": Estimate(0.9)}).json()["results"]["auroc"]["value"]
        0.9
        """
        given = {**self.reporting, **(about or {})}
        return {
            "task": self.task,
            "title": self.title,
            "use": "research only",
            "protocol": dict(self.protocol),
            "data": dict(self.data),
            "exclusions": [dict(row) for row in self.exclusions],
            "results": {name: estimate.json() for name, estimate in self.results.items()},
            "tables": {name: f"{name}.csv" for name in self.tables},
            "leaderboard": [dict(row) for row in self.leaderboard],
            "warnings": list(self.warnings),
            "reporting": {
                item: given.get(item) for item in (*REPORTING_ITEMS, *sorted(set(given) - {*REPORTING_ITEMS}))
            },
            "versions": _versions(),
        }


def write_report(folder: str | os.PathLike[str], report: Report, about: Mapping[str, str] | None = None) -> None:
    """Write report.json, results.csv, a CSV per table, a PNG per plot, and index.html, which shows all of them.

    Parameters
    ----------
    folder : path
        Created if missing.
    report : Report
    about : mapping, optional
        The user's answers to ``REPORTING_ITEMS``.

    Raises
    ------
    OutputError
        The folder cannot be written to, or holds files of these names that are not of a report (the labels, say).

    Examples
    --------
    >>> write_report("out", Report("slides", "A test", {}, {}, {"auroc": Estimate(0.9)}))         # doctest: +SKIP
    """
    folder = Path(folder)
    names = [*(f"{name}.csv" for name in ("results", *report.tables)), *(f"{p.name}.png" for p in report.plots)]
    refuse_foreign(folder, *names, "index.html")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # First: its presence allows a later report to replace the other files.
        write_json(folder / "report.json", content := report.json(about))
        rows = [{"metric": name, **estimate.json()} for name, estimate in report.results.items()]
        write_csv(folder / "results.csv", ("metric", "value", "low", "high", "n", "method", "reason"), rows)
        for name, table in report.tables.items():
            write_csv(folder / f"{name}.csv", list(dict.fromkeys(key for row in table for key in row)), table)
        pictures = {}
        for plot in report.plots:
            _draw(folder / f"{plot.name}.png", plot)
            pictures[plot.name] = (folder / f"{plot.name}.png").read_bytes()
        with replacing(folder / "index.html") as file:
            file.write(_page(report, content, pictures).encode())
    except OSError as error:
        raise OutputError.of(error, folder) from error


def refuse_foreign(folder: Path, *names: str) -> None:
    """Refuse to replace files that no evaluation wrote: those have a report.json beside them.

    Raises
    ------
    OutputError

    Examples
    --------
    >>> refuse_foreign(Path("nowhere"), "slides.csv")
    """
    there = [name for name in names if (folder / name).exists()]
    if there and not (folder / "report.json").exists():
        raise OutputError(folder / there[0], "is there already, and not from a report", "Choose another folder with -o")


def data_hash(rows: Iterable[Iterable[Any]]) -> str:
    """Return the sha256 of rows in sorted order: the same cases, labels and scores give the same hash.

    Examples
    --------
    >>> data_hash([("b", 1), ("a", 0)]) == data_hash([("a", 0), ("b", 1)])
    True
    """
    lines = sorted(json.dumps([str(cell) for cell in row]) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def packaged_rows(name: str) -> list[dict[str, str]]:
    """Return the rows of a CSV in the package: ``camelyon16_exclusions`` or ``leaderboard``.

    Examples
    --------
    >>> packaged_rows("camelyon16_exclusions")[0]["slide"]
    'test_049'
    """
    text = (importlib.resources.files("wsi.evaluate") / "data" / f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def leaderboard(task: str, order: str, own: Mapping[str, Estimate], protocol: str) -> list[dict[str, Any]]:
    """Return published results and this run's, by decreasing `order`.

    Examples
    --------
    >>> [row["name"] for row in leaderboard("camelyon17", "kappa", {"kappa": Estimate(0.9)}, "here")][:3]
    ['ensemble of the best submissions', 'PFA-ScanNet', 'this run']
    """
    rows: list[dict[str, Any]] = []
    for published in packaged_rows("leaderboard"):
        if published["task"] == task:
            metrics = {k: v for k, v in published.items() if k.startswith(("froc", "auroc", "kappa"))}
            numbers = {k: float(v) if v else None for k, v in metrics.items()}
            rows.append({"name": published["name"], **numbers, **{k: published[k] for k in ("protocol", "source")}})
    run: dict[str, Any] = {"name": "this run", "protocol": protocol, "source": "report.json"}
    for name, estimate in own.items():
        run |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    rows.append(run)
    keys = dict.fromkeys(key for row in rows for key in row)
    used = [key for key in keys if any(row.get(key) is not None for row in rows)]
    rows.sort(key=lambda row: -1e9 if row.get(order) is None else row[order], reverse=True)
    return [{key: row.get(key) for key in used} for row in rows]


def read_about(path: Path | None) -> dict[str, str]:
    """Read answers to ``REPORTING_ITEMS`` from a JSON object of strings.

    Raises
    ------
    EvaluationError
        The file is missing, or is not a JSON object of strings.
    """
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvaluationError(path, "there is no such file", "Check the path") from None
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(path, f"is no JSON ({error})", "Give an object of strings") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise EvaluationError(path, "is no JSON object of strings", f"Keys: {', '.join(REPORTING_ITEMS)}")
    return found


def _versions() -> dict[str, str]:
    names = ("numpy", "scipy", "shapely", "scikit-image", "scikit-learn")
    return {
        "wsi": __version__,
        "python": platform.python_version(),
        **{n: importlib.metadata.version(n) for n in names},
    }


def _draw(path: Path, plot: Plot) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.2), dpi=100, layout="constrained", facecolor="white")
    plot.draw(figure.add_subplot())
    with replacing(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


_STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.15rem .7rem .15rem 0;text-align:left;
border-bottom:1px solid #ddd;vertical-align:top}img{max-width:30rem;width:100%}
figure{display:inline-block;margin:0 1rem 1rem 0}
figcaption{color:#555}.own{font-weight:bold}.none{color:#888}"""


def _page(report: Report, content: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """A self-contained page without scripts; every text is escaped."""
    parts = [f"<h1>{_text(report.title)}</h1><p>Research use only: nothing here may guide the care of a patient.</p>"]
    rows = [
        {"metric": name, "estimate": str(e), "n": e.n, "interval": e.method, "note": e.reason}
        for name, e in report.results.items()
    ]
    parts += ["<h2>Results</h2>", _table(rows)]
    if report.warnings:
        parts.append("<h2>Warnings</h2><ul>" + "".join(f"<li>{_text(w)}</li>" for w in report.warnings) + "</ul>")
    for plot in report.plots:
        data = base64.b64encode(pictures[plot.name]).decode()
        parts.append(
            f'<figure><img alt="{_text(plot.caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{_text(plot.caption)}</figcaption></figure>"
        )
    for title, key in (("Protocol", "protocol"), ("Data", "data")):
        parts += [f"<h2>{title}</h2>", _table([{"item": k, "value": v} for k, v in content[key].items()])]
    if report.exclusions:
        parts += ["<h2>Exclusions</h2>", _table(report.exclusions)]
    for name, table in report.tables.items():
        parts.append(f"<h2>{_text(name.replace('_', ' '))}</h2>")
        parts.append(_table(table) if len(table) <= _LONG_TABLE else f"<p>{len(table)} rows in {_text(name)}.csv</p>")
    if report.leaderboard:
        parts += ["<h2>Beside published results</h2><p>Of other protocols, other slides or other dates: compare with "
                  "care.</p>", _table(report.leaderboard)]  # fmt: skip
    items = [{"item": key.replace("_", " "), "answer": value} for key, value in content["reporting"].items()]
    parts += ["<h2>What TRIPOD+AI and CLAIM ask for</h2>", _table(items)]
    parts += ["<h2>Versions</h2>", _table([content["versions"]])]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(report.title)}</title>'
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _table(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join(
        f"<tr{' class=own' if row.get('name') == 'this run' else ''}>"
        + "".join(f"<td>{_text(row.get(column))}</td>" for column in columns)
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _text(value: Any) -> str:
    if value is None or value == "":
        return '<span class="none">-</span>'
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        value = [f"{key} {each}" for key, each in value.items()]
    if isinstance(value, list | tuple):
        return html.escape(", ".join(map(str, value)))
    return html.escape(str(value))
