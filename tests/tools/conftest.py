"""The scripts of tools/, imported as they see their neighbours."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
Import = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def import_tool() -> Iterator[Import]:
    """Imports a module of tools/ by name; the folder is on the path as long as the tests of one file run."""
    sys.path.insert(0, str(TOOLS))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(TOOLS))
