"""What to do, or to look at, next: commands and files, by how a run stands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_lvlm.monitoring.attempts import CRASH, USER_ERROR, Attempt
from moe_lvlm.monitoring.folder import EXCLUDED, HANGS, RANK_LOGS
from moe_lvlm.monitoring.records import text
from moe_lvlm.monitoring.state import CANCELLED, DONE, FAILED, GAVE_UP, REQUEUED, RUNNING, SILENT, STOPPED
from moe_lvlm.monitoring.training_log import HANG


def hints(
    run: Path, state: str, attempts: Sequence[Attempt], events: Sequence[dict[str, Any]], *, checkpoint: str | None
) -> tuple[str, ...]:
    """Sentences for a run in this state. checkpoint: the newest one's name, None if there is none."""
    if state == DONE:
        return ()
    found = _about_failure(run, attempts)
    script = next((text(event.get("script")) for event in reversed(events) if event["event"] == "submit"), "")
    place = "from the beginning" if checkpoint is None else f"from {checkpoint}"
    if state == SILENT:
        job = attempts[-1].job if attempts else ""
        found.append(
            f"is it alive? {f'`squeue -j {job}`, ' if job else ''}and what the ranks said last: {_logs(run, '--all')}"
        )
    elif state in (FAILED, GAVE_UP, CANCELLED, STOPPED) and script:
        cause = "mend the cause, then " if state in (FAILED, GAVE_UP) else ""
        found.append(f"{cause}`moe-lvlm submit {shlex.quote(script)}` goes on {place}")
    elif state in (FAILED, STOPPED):
        found.append(f"the command that it was started with goes on {place}")
    if state in (REQUEUED, RUNNING, FAILED, GAVE_UP) and (run / EXCLUDED).is_file():
        found.append(f"jobs keep away from the nodes in {run / EXCLUDED}; take a line out to let a node in again")
    return tuple(found)


def _about_failure(run: Path, attempts: Sequence[Attempt]) -> list[str]:
    """About the newest attempt that failed, if it is the newest at all or the one before."""
    failed = [attempt for attempt in attempts[-2:] if attempt.outcome in (CRASH, HANG, USER_ERROR)]
    if not failed:
        return []
    attempt = failed[-1]
    found = []
    if attempt.outcome == HANG and (newest := _newest_hang(run)) is not None:
        found.append(f"stacks of all ranks at the hang: {newest}")
    if not (run / RANK_LOGS).is_dir() or attempt.number is None:
        return found
    if attempt.outcome in (CRASH, USER_ERROR):
        named = "" if attempt.rank is None else f"; all that rank {attempt.rank} said: "
        told = _logs(run, f"--rank {attempt.rank} --attempt {attempt.number}") if named else ""
        found.append(
            f"why attempt {attempt.number} failed: {_logs(run, f'--errors --attempt {attempt.number}')}{named}{told}"
        )
    return found


def _newest_hang(run: Path) -> str | None:
    """The files of the newest hang, as a pattern: their names begin with the time of the run's start."""
    starts = sorted(path.name.partition("-rank-")[0] for path in (run / HANGS).glob("*-rank-*.txt"))
    return f"{run / HANGS / starts[-1]}-*" if starts else None


def _logs(run: Path, options: str) -> str:
    return f"`moe-lvlm logs {shlex.quote(str(run))} {options}`"
