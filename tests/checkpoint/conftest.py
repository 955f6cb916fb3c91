"""Writes that fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moe_lvlm.checkpoint import files

FailWrite = Callable[[int, int], None]


@pytest.fixture
def fail_write(monkeypatch: pytest.MonkeyPatch) -> FailWrite:
    """`fail_write(k, code)`: the k-th write to a file from now on raises OSError with that number, the others work."""
    write = files.HashedFile.write

    def fail(failing: int, code: int) -> None:
        count = 0

        def counted(self: Any, data: Any) -> None:
            nonlocal count
            count += 1
            if count == failing:
                raise OSError(code, "injected")
            write(self, data)

        monkeypatch.setattr(files.HashedFile, "write", counted)

    return fail
