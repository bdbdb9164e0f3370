"""Lays out the records of a check as tables: for the page of a report, and for the documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import results, targets
from benchmarks.predictions import predictions
from tools.gpu_check import counters, full_size, smoke
from tools.gpu_check.records import FACTS, FAILED, LEFT_OUT, SUMMARY, Record, load, worst
from tools.gpu_check.settings import RECORDS, REPORT, RESULTS, Settings

LONGEST_TEXT = 2000


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def facts_of(records: Sequence[Record]) -> Mapping[str, str]:
    """Return what is known of the machine; empty if nothing was written down."""
    return next((record.values for record in records if record.phase == FACTS), {})


def smoke_rows(records: Sequence[Record]) -> list[list[str]]:
    """Return a row for each op and engine: how its checks ended and the largest error."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.phase == smoke.PHASE and "op" in record.values:
            groups.setdefault((record.values["op"], record.values["engine"]), []).append(record)
    rows = []
    for (op, engine), found in groups.items():
        statuses = [record.status for record in found]
        failed = dict.fromkeys(record.values["check"] for record in found if record.status == FAILED)
        errors = [record.values["of_allowed"] for record in found if "of_allowed" in record.values]
        ran = sum(status != LEFT_OUT for status in statuses)
        largest = f"{max(errors):.2g}" if errors else ""
        rows.append([f"`{op}`", engine, worst(statuses), str(ran), largest, ", ".join(failed)])
    return rows


def smoke_table(records: Sequence[Record]) -> list[str]:
    """Return the table of ops and engines; empty where none was checked."""
    rows = smoke_rows(records)
    head = ["op", "engine", "outcome", "checks that ran", "largest error / allowed", "failed"]
    return table(head, rows) if rows else []


def counters_table(records: Sequence[Record]) -> list[str]:
    """Return the table of hardware counters, one row a kernel; empty where none were read."""
    found = [record for record in records if record.phase == counters.PHASE and record.values]
    if not found:
        return []
    names = [name for name in counters.METRICS if any(name in record.values for record in found)]
    rows = [[record.name, *(_figure(record.values.get(name)) for name in names)] for record in found]
    return table(["launch", *names], rows)


def _figure(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def full_size_table(records: Sequence[Record]) -> list[str]:
    """Return the table of the model of full size; empty where it was not timed."""
    found = [r.values for r in records if r.phase == full_size.PHASE and "cached_step_s" in r.values]
    if not found:
        return []
    values = found[-1]
    rows = [
        ["parameters", f"{values['parameters'] / 1e9:.2f} B"],
        ["a step without lesa", f"{values['plain_step_s']:.4f} s"],
        ["a full step", f"{values['full_step_s']:.4f} s"],
        ["a cached step", f"{values['cached_step_s']:.4f} s"],
        [f"{values['calls']} steps, {values['full_calls']} of them full", f"{values['run_s']:.3f} s"],
        ["as many steps without lesa", f"{values['run_of_plain_steps_s']:.3f} s"],
        ["history", f"{values['history_mib']:.0f} MiB"],
    ]
    return table(["", ""], rows)


def verdicts_of(rows: Sequence[results.Measurement], device: str) -> list[targets.Verdict]:
    """Return the verdicts on the targets, which are a GPU's; none where nothing was measured on one."""
    return targets.judge(rows) if device == "cuda" and rows else []


def verdict_table(verdicts: Sequence[targets.Verdict]) -> list[str]:
    """Return the table of the targets; empty where nothing was measured."""
    if not verdicts:
        return []
    rows = [
        [
            f"{verdict.target.op}, {verdict.target.size}",
            f"{verdict.target.against} / {verdict.target.ours}",
            verdict.target.wanted,
            "" if verdict.measured is None else f"{verdict.measured:.3f}",
            verdict.word,
        ]
        for verdict in verdicts
    ]
    return table(["case", "time of one / time of the other", "target", "measured", ""], rows)


def prediction_table(rows: Sequence[results.Measurement]) -> list[str]:
    """Return what was predicted beside what was measured; empty where nothing was predicted for the device."""
    measured = {(row.device, row.op, row.size, row.variant): row for row in rows}
    lines = []
    for predicted in predictions():
        row = measured.get((predicted.device, predicted.op, predicted.size, predicted.variant))
        if row is None:
            continue
        fast, slow = predicted.microseconds
        share = "" if row.share_of_copy is None else f"{row.share_of_copy:.2f}"
        peak = "" if row.share_of_peak is None else f"{100 * row.share_of_peak:.0f} %"
        lines.append(
            [
                f"`{predicted.op}`, {predicted.size}",
                f"{predicted.low:.2f} to {predicted.high:.2f}",
                share,
                f"{fast:.0f} to {slow:.0f}",
                f"{1e6 * row.median_s:.1f}",
                peak,
            ]
        )
    head = ["captured", "share of a copy, predicted", "measured", "us, predicted", "measured", "of data-sheet peak"]
    return table(head, lines) if lines else []


def phase_table(records: Sequence[Record]) -> list[str]:
    """Return the table of the phases and how each ended."""
    ends = [record for record in records if record.name == SUMMARY]
    return table(["phase", "outcome", "seconds", ""], [[r.phase, r.status, f"{r.seconds:.0f}", r.text] for r in ends])


def failures(records: Sequence[Record]) -> list[str]:
    """Return what failed, each with its reason."""
    lines = []
    for record in records:
        if record.status == FAILED and record.name != SUMMARY:
            lines += [f"### {record.phase}: {record.name}", "", "```", record.text[-LONGEST_TEXT:], "```", ""]
    return lines


def measured(folder: Path) -> list[results.Measurement]:
    """Return what a report measured; empty where it measured nothing."""
    path = folder / RESULTS
    return results.load(path) if path.exists() else []


def write(settings: Settings) -> None:
    """Write the page of the report from what there is so far."""
    records = load(settings.out / RECORDS)
    facts = facts_of(records)
    sections = {
        "Phases": phase_table(records),
        "Ops": smoke_table(records),
        "Targets": verdict_table(verdicts_of(measured(settings.out), settings.device)),
        "Hardware counters": counters_table(records),
        "FLUX of full size": full_size_table(records),
        "Failures": failures(records),
    }
    lines = ["# GPU check", "", *table(["", ""], [[name, value] for name, value in facts.items()]), ""]
    for title, section in sections.items():
        if section:
            lines += [f"## {title}", "", *section, ""]
    (settings.out / REPORT).write_text("\n".join(lines))
