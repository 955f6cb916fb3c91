"""What a run says while it trains: log.jsonl, TensorBoard, and a progress bar or plain lines. Rank 0 only."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from moe_lvlm.analysis.measures import site_of
from moe_lvlm.routing.types import CONNECTOR, LANGUAGE_MODEL

_SCALARS = ("loss", "language_loss", "balance_loss", "learning_rate", "grad_norm", "tokens_per_second")


class RunLog:
    """Writes events to the run's files, and shows them. On other ranks than the first it does nothing."""

    def __init__(self, folder: Path, *, is_enabled: bool) -> None:
        self.is_enabled = is_enabled
        self._file: TextIO | None = None
        self._board: Any = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._console = Console(stderr=True)
        self._lock = threading.Lock()
        if is_enabled:
            from torch.utils.tensorboard import SummaryWriter

            self._file = _open_lines(folder / "log.jsonl")
            self._board = SummaryWriter(str(folder / "tensorboard"))

    def say(self, message: str) -> None:
        """A line for the person who watches."""
        if self.is_enabled:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def event(self, name: str, **values: Any) -> None:
        """One line of log.jsonl, and curves of a step's numbers."""
        if self._file is None:
            return
        line = {"event": name, **{key: _number(value) for key, value in values.items()}, "time": round(time.time(), 3)}
        with self._lock:  # a save beside training logs its end
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        if name == "step":
            self._write_curves(values)

    def _write_curves(self, values: dict[str, Any]) -> None:
        step = values["global_step"]
        for key in _SCALARS:
            if values.get(key) is not None:
                self._board.add_scalar(key, values[key], step)
        for layer, loads in (values.get("expert_load") or {}).items():
            for modality, counts in loads.items():
                total = max(sum(counts), 1)
                for expert, count in enumerate(counts):
                    self._board.add_scalar(f"expert_load/{layer}/{modality}/{expert}", count / total, step)
        for layer, conflicts in (values.get("conflicts") or {}).items():
            for modality, counts in conflicts.items():
                share = sum(counts) / max(sum(values["expert_load"][layer][modality]), 1)
                self._board.add_scalar(f"conflict_share/{layer}/{modality}", share, step)
        for modality, share in _dropped_shares(values).items():
            self._board.add_scalar(f"dropped_share/{modality}", share, step)
        for layer, share in (values.get("tail_share") or {}).items():
            self._board.add_scalar(f"tail_share/{layer}", share, step)

    def open_stage(self, name: str, *, done: int, total: int) -> None:
        """Begin a stage's progress: a bar on a terminal."""
        if self.is_enabled and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(name, completed=done, total=total, numbers="")

    def advance(self) -> None:
        """One step more on the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)

    def show(self, stage: str, step: int, total: int, values: dict[str, Any]) -> None:
        """A logged step's numbers: on the bar, or as a line where there is no terminal."""
        numbers = (
            f"loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tokens/s{_load(values)}{_dropped(values)}"
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, numbers=numbers)
        else:
            self.say(f"{stage} {step}/{total}  {numbers}  lr {values['learning_rate']:.2e}")

    def close_stage(self) -> None:
        """End the stage's progress."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def close(self) -> None:
        """Flush and close the files."""
        self.close_stage()
        if self._file is not None:
            self._file.close()
            self._board.close()


def _open_lines(path: Path) -> TextIO:
    """A file of lines, to be gone on with; half a line at its end, left by a crash or a full disk, is dropped."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
    return path.open("a", encoding="utf-8")


def _number(value: Any) -> Any:
    """JSON has no word for numbers that are none: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _load(values: dict[str, Any]) -> str:
    """Share of the assignments that each expert took, over all layers and modalities, in per cent: of the language
    model's experts, where there are none of the connector's, else of the adapters', whose numbers may all differ."""
    loads = values.get("expert_load")
    if not loads:
        return ""
    parts = (LANGUAGE_MODEL, CONNECTOR)
    places = {name: parts.index(part) if (part := site_of(name).part) in parts else len(parts) for name in loads}
    loads = {name: load for name, load in loads.items() if places[name] == min(places.values())}
    totals = [sum(column) for column in zip(*(c for layer in loads.values() for c in layer.values()), strict=True)]
    whole = max(sum(totals), 1)
    return "  experts " + "/".join(f"{100 * total / whole:.0f}" for total in totals) + " %"


def _dropped_shares(values: dict[str, Any]) -> dict[str, float]:
    """Share of each modality's assignments, over all layers, that found no room; empty where nothing is ever dropped."""
    dropped, kept = values.get("dropped") or {}, values.get("expert_load") or {}
    lost: dict[str, int] = {}
    chosen: dict[str, int] = {}
    for layer, by_modality in dropped.items():
        for modality, counts in by_modality.items():
            lost[modality] = lost.get(modality, 0) + sum(counts)
            chosen[modality] = chosen.get(modality, 0) + sum(counts) + sum(kept[layer][modality])
    return {modality: lost[modality] / total for modality, total in chosen.items() if total}


def _dropped(values: dict[str, Any]) -> str:
    shares = _dropped_shares(values)
    return "".join(f"  {modality} dropped {100 * share:.1f}%" for modality, share in shares.items())
