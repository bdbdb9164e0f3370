"""Writes what a check found into the results, docs/gpu.md and the README.

`python -m tools.gpu_check.publish REPORT ...`; what is published twice stands there once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import report as benchmark_report
from benchmarks import results
from benchmarks.pages import renewed
from tools.gpu_check import full_size, gpu_report
from tools.gpu_check.records import FAILED, PASSED, SUMMARY, Record, load
from tools.gpu_check.settings import RECORDS, ROOT

COMMAND = "python -m tools.gpu_check.publish"


def status_line(records: Sequence[Record]) -> str:
    """Return what the README says of the GPU: how many ops are right on which engine, and the speed of a model."""
    facts = gpu_report.facts_of(records)
    counts = []
    for engine, name in (("lesa", "CUDA"), ("triton", "Triton")):
        rows = [row for row in gpu_report.smoke_rows(records) if row[1] == engine]
        right = sum(row[2] == PASSED for row in rows)
        counts += [f"{right} of {len(rows)} ops right on {name}"] if rows else []
    ran = f"Ran on {facts.get('device', 'an unknown device')}, torch {facts.get('torch', '?')}"
    parts = [": ".join([ran, *([", ".join(counts)] if counts else [])])]
    for values in (r.values for r in records if r.phase == full_size.PHASE and "cached_step_s" in r.values):
        parts.append(
            f"FLUX of {values['parameters'] / 1e9:.0f} B parameters: {values['full_step_s']:.3f} s a full step, "
            f"{1e3 * values['cached_step_s']:.1f} ms a cached one"
        )
    failed = dict.fromkeys(r.phase for r in records if r.name == SUMMARY and r.status == FAILED)
    parts += [f"with failures in {', '.join(failed)}"] if failed else []
    return "; ".join(parts) + ". [docs/gpu.md](docs/gpu.md) has the report."


def page(records: Sequence[Record], rows: Sequence[results.Measurement]) -> str:
    """Return what docs/gpu.md shows of a check."""
    facts = gpu_report.facts_of(records)
    shown = ("device", "torch", "triton", "nvcc", "driver, greatest clocks, power limit", "commit", "command")
    sections = {
        "": gpu_report.table(["", ""], [[name, str(facts[name])] for name in shown if name in facts]),
        "Every op": gpu_report.smoke_table(records),
        "Targets": gpu_report.verdict_table(gpu_report.verdicts_of(rows, "cuda" if _on_gpu(records) else "cpu")),
        "Predicted and measured": gpu_report.prediction_table(rows),
        "Hardware counters": gpu_report.counters_table(records),
        "FLUX of full size, random weights, bfloat16": gpu_report.full_size_table(records),
        "What failed": [f"- {r.phase}: {r.name}" for r in records if r.status == FAILED and r.name != SUMMARY],
    }
    lines: list[str] = []
    for title, section in sections.items():
        if section:
            lines += [*([f"### {title}", ""] if title else []), *section, ""]
    return "\n".join(lines).strip()


def _on_gpu(records: Sequence[Record]) -> bool:
    return "capability" in gpu_report.facts_of(records)


def new_rows(folders: Sequence[Path], known: Sequence[results.Measurement]) -> list[results.Measurement]:
    """Return the rows of reports that are not known yet; a copy without git takes its commit from the report."""
    found = []
    for folder in folders:
        facts = gpu_report.facts_of(load(folder / RECORDS))
        for row in gpu_report.measured(folder):
            found.append(replace(row, commit=facts["commit"]) if row.commit == "unknown" and "commit" in facts else row)
    return [row for row in found if row not in known]


def main(
    reports: Annotated[list[Path], typer.Argument(help="Folders of reports of one machine, in the order they ran.")],
    root: Annotated[Path, typer.Option(help="The checkout whose documents are renewed.")] = ROOT,
) -> None:
    """Append the results and renew the documents."""
    if missing := [str(folder) for folder in reports if not (folder / RECORDS).exists()]:
        raise typer.BadParameter(f"a report must hold {RECORDS}, {', '.join(missing)} does not")
    records = [record for folder in reports for record in load(folder / RECORDS)]
    rows = [row for folder in reports for row in gpu_report.measured(folder)]
    table, readme, gpu = root / "benchmarks/results.csv", root / "README.md", root / "docs/gpu.md"
    fresh = new_rows(reports, results.load(table))
    texts = {path: path.read_text(encoding="utf-8") for path in (readme, gpu)}
    texts = {
        readme: renewed(texts[readme], COMMAND, status_line(records)),
        gpu: renewed(texts[gpu], COMMAND, page(records, rows)),
    }
    results.save(fresh, table)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    benchmark_report.main(table, readme, root / "docs/performance.md", root / "docs/performance")
    typer.echo(f"{len(fresh)} rows appended to {table.name}; renewed: {readme.name}, docs/{gpu.name}; next: git diff")


if __name__ == "__main__":
    typer.run(main)
