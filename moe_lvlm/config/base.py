"""The ground of all settings: frozen, typed, and strict about unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen group of settings. An unknown key is an error, a wrong type too."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
