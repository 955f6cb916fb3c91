"""A node's GPUs as nvidia-smi sees them: how many, their memory, who uses them, and whether their memory is sound."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moe_lvlm.preflight.finding import Finding, one_line
from moe_lvlm.preflight.programs import Answer, run_program

_LIMIT = 60.0  # seconds; a node of 8 GPUs without persistence mode takes about ten
_FIELDS = "index,uuid,name,pstate,memory.total,memory.used,memory.free"
# An idle GPU holds some hundred MiB at most (a display, a monitor's context); a training process holds more.
_IDLE_MIB = 1024
_NEEDS_RESET = "requires reset"
_MIB = 1024.0  # MiB in a GiB
# The multi-process service stands between a GPU and its users on some clusters; it is there before any user.
_NOBODY = ("nvidia-cuda-mps-server",)


class _GPUError(Exception):
    """nvidia-smi could not be asked; the message says why."""


@dataclass(frozen=True, slots=True)
class _GPU:
    """A line of nvidia-smi; memory in MiB, None where it does not say."""

    index: str
    uuid: str
    name: str
    state: str
    total: float | None
    used: float | None
    free: float | None


def check_gpus(*, count: int | None, min_gpu_memory: float | None) -> list[Finding]:
    """Look at the GPUs that CUDA_VISIBLE_DEVICES names, or all where it is not set.

    count: how many are asked for, None if it does not matter. min_gpu_memory: GiB that must be free on each.
    """
    if count == 0:
        return []
    asked = "" if count is None else f"at least {count}"
    try:
        gpus = _visible(_ask_gpus())
    except _GPUError as error:
        problem = None if count is None else str(error)
        return [Finding(name="GPUs", value=f"none ({error})", asked=asked, problem=problem, facts={"gpus": "0"})]
    problem = None
    if count is not None and len(gpus) < count:
        problem = f"{len(gpus)} GPU(s), asked for {count}"
    facts = {"gpus": str(len(gpus))}
    if gpus:
        facts["gpu"] = gpus[0].name
    names = ", ".join(sorted({gpu.name for gpu in gpus}))
    value = f"{len(gpus)} ({names})" if gpus else "0"
    findings = [Finding(name="GPUs", value=value, asked=asked, problem=problem, facts=facts)]
    if gpus:
        findings += _check_memory(gpus, min_gpu_memory)
        findings += _check_health(gpus)
    return findings


def _ask(*arguments: str) -> Answer:
    try:
        answer = run_program(["nvidia-smi", *arguments], limit=_LIMIT)
    except FileNotFoundError as error:
        raise _GPUError("nvidia-smi is not on PATH") from error
    if answer.status is None:
        raise _GPUError(f"nvidia-smi did not answer within {_LIMIT:.0f} s")
    return answer


def _rows(text: str, width: int) -> list[list[str]]:
    """Lines of so many fields. What nvidia-smi says besides, warnings that it prints to stdout, is left out."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [row for row in rows if len(row) == width]


def _ask_gpus() -> list[_GPU]:
    answer = _ask(f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits")
    if answer.status != 0:
        # "No devices were found", "couldn't communicate with the NVIDIA driver", "Unable to determine the device
        # handle for GPU 0000:CB:00.0: Unknown Error": all on one line.
        first = answer.text.strip().partition("\n")[0]
        raise _GPUError(f"nvidia-smi ended with status {answer.status}: {one_line(first)}")
    rows = _rows(answer.text, 7)
    return [_GPU(row[0], row[1], row[2], row[3], _number(row[4]), _number(row[5]), _number(row[6])) for row in rows]


def _number(text: str) -> float | None:
    """None for [N/A], [Not Supported], [Unknown Error]."""
    return float(text) if text.isdecimal() else None


def _visible(gpus: Sequence[_GPU]) -> list[_GPU]:
    """Those of CUDA_VISIBLE_DEVICES, where others may belong to other jobs. Parts of GPUs (MIG) are not told apart."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or "MIG-" in chosen:
        return list(gpus)
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    found = [[gpu for gpu in gpus if _is_named(gpu, name)] for name in names]
    return [gpu for matches in found for gpu in matches[:1]]


def _is_named(gpu: _GPU, name: str) -> bool:
    """By index, or by the beginning of its UUID, as CUDA reads it."""
    return gpu.index == name if name.isdecimal() else gpu.uuid.startswith(name)


def _check_memory(gpus: Sequence[_GPU], min_gpu_memory: float | None) -> list[Finding]:
    users = _users()
    asked = "unused" if min_gpu_memory is None else f"unused, {min_gpu_memory:g} GiB free"
    findings = []
    for gpu in gpus:
        problems = []
        if _NEEDS_RESET in gpu.state:
            problems.append("needs a reset")
        if users.get(gpu.uuid):
            problems.append(f"is in use by process {', '.join(users[gpu.uuid])}")
        elif gpu.used is not None and gpu.used > _IDLE_MIB:
            problems.append(f"is in use: {gpu.used / _MIB:.1f} GiB are taken")
        if min_gpu_memory is not None and gpu.free is not None and gpu.free / _MIB < min_gpu_memory:
            problems.append(f"has {gpu.free / _MIB:.1f} GiB free, asked for {min_gpu_memory:g} GiB")
        problem = f"GPU {gpu.index} {' and '.join(problems)}" if problems else None
        findings.append(Finding(name=f"GPU {gpu.index}", value=_memory_text(gpu), asked=asked, problem=problem))
    least = min((gpu.free for gpu in gpus if gpu.free is not None), default=None)
    if least is not None:
        findings[0] = replace(findings[0], facts={"gpu_free_gib": f"{least / _MIB:.1f}"})
    return findings


def _memory_text(gpu: _GPU) -> str:
    if gpu.total is None or gpu.free is None:
        return "nvidia-smi does not tell its memory"
    return f"{gpu.free / _MIB:.1f} of {gpu.total / _MIB:.1f} GiB free"


def _users() -> Mapping[str, list[str]]:
    """By UUID: processes that compute on the GPU, "id (name)". At this time none of them is ours."""
    answer = _ask("--query-compute-apps=gpu_uuid,pid,process_name", "--format=csv,noheader")
    users: dict[str, list[str]] = {}
    for uuid, pid, name in _rows(answer.text, 3):
        if not name.endswith(_NOBODY):
            users.setdefault(uuid, []).append(f"{pid} ({name})")
    return users


def _check_health(gpus: Sequence[_GPU]) -> list[Finding]:
    """Errors that ECC could not correct since the driver was loaded, and memory rows that wait to be replaced."""
    errors = _column("--query-gpu=uuid,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits")
    remaps = _column("--query-remapped-rows=gpu_uuid,remapped_rows.pending", "--format=csv,noheader")
    failures = _column("--query-remapped-rows=gpu_uuid,remapped_rows.failure", "--format=csv,noheader")
    problems = []
    for gpu in gpus:
        if _number(errors.get(gpu.uuid, "")):
            problems.append(f"GPU {gpu.index} had {errors[gpu.uuid]} uncorrected ECC error(s)")
        if _is_yes(remaps.get(gpu.uuid)):
            problems.append(f"GPU {gpu.index} waits for a reset to replace bad memory rows")
        if _is_yes(failures.get(gpu.uuid)):
            problems.append(f"GPU {gpu.index} could not replace bad memory rows")
    told = [name for name, column in (("ECC", errors), ("row remaps", remaps)) if column]
    value = "; ".join(problems) or (f"{' and '.join(told)}: no errors" if told else "nvidia-smi does not tell")
    return [Finding(name="GPU errors", value=value, asked="none", problem="; ".join(problems) or None)]


def _column(query: str, form: str) -> Mapping[str, str]:
    """The second field by UUID; empty where this driver does not know it."""
    answer = _ask(query, form)
    return dict(_rows(answer.text, 2)) if answer.status == 0 else {}


def _is_yes(text: str | None) -> bool:
    """Drivers say "Yes" and "No", or 1 and 0, or [N/A]."""
    return text is not None and text.lower() in ("yes", "1")
