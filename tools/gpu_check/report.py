"""The report: one page to read, the same facts as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import results, targets
from tools.gpu_check.stages import FAILED, Outcome


@dataclass(frozen=True)
class StageReport:
    """A stage, how it ended and how long it took."""

    stage: str
    outcome: Outcome
    seconds: float


def verdicts_of(out: Path, device: str) -> list[targets.Verdict]:
    """Return the verdicts on the targets, which are a GPU's; none where nothing was measured on one."""
    path = out / "results.csv"
    return targets.judge(results.load(path)) if device == "cuda" and path.exists() else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def _target_rows(verdicts: Sequence[targets.Verdict]) -> list[list[str]]:
    return [
        [
            f"{verdict.target.op}, {verdict.target.size}",
            f"{verdict.target.against} / {verdict.target.ours}",
            verdict.target.wanted,
            "" if verdict.measured is None else f"{verdict.measured:.3f}",
            verdict.word,
        ]
        for verdict in verdicts
    ]


def write(
    out: Path, facts: Mapping[str, str], stages: Sequence[StageReport], not_run: Sequence[str],
    verdicts: Sequence[targets.Verdict], command: str,
) -> None:  # fmt: skip
    """Write report.md and report.json.

    Args:
        out: folder of the report, which also holds the logs and the results.
        facts: of the machine.
        stages: what ran.
        not_run: what did not, after a failure.
        verdicts: on the targets; empty where nothing was measured on a GPU.
        command: how this was started.
    """
    rows = [[s.stage, s.outcome.status, f"{s.seconds:.0f}", s.outcome.summary] for s in stages]
    rows += [[stage, "not run", "", "the check ended before"] for stage in not_run]
    lines = ["# GPU check", "", f"`{command}`", "", *_table(["", ""], [[name, value] for name, value in facts.items()])]
    lines += ["", "## Stages", "", *_table(["stage", "outcome", "seconds", ""], rows), ""]
    if verdicts:
        head = ["case", "time of one / time of the other", "target", "measured", ""]
        lines += ["## Targets", "", *_table(head, _target_rows(verdicts)), ""]
    for stage in stages:
        if stage.outcome.lines:
            lines += [f"## {stage.stage}: {stage.outcome.status}", "", "```", *stage.outcome.lines, "```", ""]
    (out / "report.md").write_text("\n".join(lines))
    content = {
        "command": command,
        "facts": dict(facts),
        "passed": not not_run and all(stage.outcome.status != FAILED for stage in stages),
        "stages": [asdict(stage) for stage in stages],
        "not_run": list(not_run),
        "targets": [{**asdict(verdict), "word": verdict.word} for verdict in verdicts],
    }
    (out / "report.json").write_text(json.dumps(content, indent=2) + "\n")
