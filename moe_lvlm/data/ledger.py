"""Bad records of a run: a list on disk, and the share at which the run must stop."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from moe_lvlm.data.errors import BadRecordError, TooManyBadSamplesError

NUM_REASONS_SHOWN = 3


class BadSampleLedger:
    """Appends bad records to `bad_samples.jsonl`, each once: {"file", "record", "id", "key", "reason"} a line.

    One process of a run writes it: gather the others' bad records first. A ledger opened on a file that is there goes
    on with it (a resumed run); a last line that was cut off by a crash is dropped.

    limit: the recipe's `data.bad_sample_limit`. epoch_size: draws of an epoch. The limit is a share of the draws seen,
    or of a whole epoch until that many are seen: one bad record among the first hundred is not yet one per cent.
    """

    def __init__(self, path: Path, *, limit: float, epoch_size: int) -> None:
        self.path = path
        self.limit = limit
        self.epoch_size = epoch_size
        self._listed: dict[tuple[str, int], str] = {}  # (file, record) -> reason
        self._num_bad = 0
        self._num_seen = 0
        if path.exists():
            self._read()

    @property
    def num_listed(self) -> int:
        """Different records in the list."""
        return len(self._listed)

    @property
    def share(self) -> float:
        """Bad draws over draws seen, by the counts last given to `check`; 0 before."""
        return self._num_bad / self._num_seen if self._num_seen else 0.0

    def add(self, bad: Iterable[BadRecordError]) -> None:
        """Writes down records not listed yet."""
        new = {(error.file, error.index): error for error in bad if (error.file, error.index) not in self._listed}
        if not new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as lines:
            for place, error in new.items():
                lines.write(json.dumps(_line(error)) + "\n")
                self._listed[place] = error.reason

    def check(self, bad: int, seen: int) -> None:
        """Raises TooManyBadSamplesError if more than the limit are bad.

        bad, seen: draws of the stage so far, over all ranks.
        """
        self._num_bad, self._num_seen = bad, seen
        allowed = self.limit * max(seen, self.epoch_size)
        if bad <= allowed:
            return
        shown = list(self._listed.items())[:NUM_REASONS_SHOWN]
        reasons = "".join(f"\n  {file}: record {index}: {reason}" for (file, index), reason in shown)
        raise TooManyBadSamplesError(
            f"{bad} of {seen} samples are bad ({self.share:.2%}); data.bad_sample_limit {self.limit} allows"
            f" {int(allowed)} so far. All are listed in {self.path}; the first:{reasons}"
        )

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as lines:
                lines.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._listed[(entry["file"], entry["record"])] = entry["reason"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}: line {number} is not a line of this list ({error!r})") from error


def _line(error: BadRecordError) -> dict[str, str | int | None]:
    return {"file": error.file, "record": error.index, "id": error.id, "key": error.key, "reason": error.reason}
