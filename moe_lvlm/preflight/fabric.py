"""The check of what lies between the nodes: all ranks meet, agree on versions, and all-reduce."""

from __future__ import annotations

import os
from collections.abc import Callable

from moe_lvlm.preflight.ending import FAILED
from moe_lvlm.preflight.judge import Judge
from moe_lvlm.preflight.meeting import LATER
from moe_lvlm.preflight.place import Place
from moe_lvlm.preflight.session import conclude, open_meeting
from moe_lvlm.preflight.verdict import Verdict
from moe_lvlm.preflight.work import FabricDemands, Work


def check_fabric(place: Place, demands: FabricDemands, say: Callable[[Verdict], None]) -> int:
    """Take part in the check as one of its ranks; rank 0 says the verdict. Returns the exit status, 0 or 3. The caller
    ends the process with os._exit, as a thread may hang in a collective.
    """
    # An NCCL that notices an error would end the process, rank 0's too, before anything is said.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    meeting = open_meeting(place, demands.limit, say)
    if meeting is None:
        return FAILED
    work = Work(place, demands, meeting.connect())
    work.start()
    if place.rank > 0:
        return meeting.attend(lambda: work.at, limit=2 * (demands.limit + LATER))
    verdict = Judge(place, demands, meeting, lambda: work.at).judge()
    return conclude(meeting, verdict, say)
