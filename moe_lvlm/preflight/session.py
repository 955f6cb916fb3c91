"""The first and the last step of each check that ranks make together."""

from __future__ import annotations

from collections.abc import Callable

from moe_lvlm.preflight.ending import FAILED, complain
from moe_lvlm.preflight.meeting import Meeting, NoMeetingError
from moe_lvlm.preflight.place import Place
from moe_lvlm.preflight.verdict import Verdict
from moe_lvlm.preflight.work import name_of


def open_meeting(place: Place, limit: float, say: Callable[[Verdict], None]) -> Meeting | None:
    """Meet the others; None where that fails, and it was said why."""
    try:
        return Meeting(place, limit=limit)
    except NoMeetingError as error:
        if place.rank > 0:
            complain(f"cannot reach rank 0 at {error}")
        else:
            say(Verdict(failure=f"no store at {error}", bad={name_of(place): f"cannot open the store at {error}"}))
    return None


def conclude(meeting: Meeting, verdict: Verdict, say: Callable[[Verdict], None]) -> int:
    """Rank 0's last words: say the verdict and let the others go. Returns the exit status, 0 or 3."""
    say(verdict)
    status = 0 if verdict.failure is None else FAILED
    meeting.dismiss(status)
    return status
