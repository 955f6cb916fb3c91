"""The check of what lies between the nodes: all ranks meet, agree on versions, and all-reduce."""

from __future__ import annotations

import os
from collections.abc import Callable

from moe_lvlm.preflight.ending import FAILED, complain
from moe_lvlm.preflight.judge import Judge
from moe_lvlm.preflight.meeting import LATER, Meeting, NoMeetingError
from moe_lvlm.preflight.place import Place
from moe_lvlm.preflight.verdict import Verdict
from moe_lvlm.preflight.work import FabricDemands, Work, name_of


def check_fabric(place: Place, demands: FabricDemands, say: Callable[[Verdict], None]) -> int:
    """Take part in the check as one of its ranks; rank 0 says the verdict. Returns the exit status, 0 or 3. The caller
    ends the process with os._exit, as a thread may hang in a collective.
    """
    # An NCCL that notices an error would end the process, rank 0's too, before anything is said.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    try:
        meeting = Meeting(place, limit=demands.limit)
    except NoMeetingError as error:
        if place.rank > 0:
            complain(f"cannot reach rank 0 at {error}")
        else:
            say(Verdict(failure=f"no store at {error}", bad={name_of(place): f"cannot open the store at {error}"}))
        return FAILED
    work = Work(place, demands, meeting.connect())
    work.start()
    if place.rank > 0:
        return meeting.attend(lambda: work.at, limit=2 * (demands.limit + LATER))
    verdict = Judge(place, demands, meeting, lambda: work.at).judge()
    say(verdict)
    status = 0 if verdict.failure is None else FAILED
    meeting.dismiss(status)
    return status
