"""What can be wrong with data, each as a ValueError of its own."""

from __future__ import annotations


class DataFileError(ValueError):
    """A data file as a whole cannot be used: it is missing, not JSON, not a list, empty. Raised at once."""


class TemplateError(ValueError):
    """A chat template, or the tokenizer under it, cannot serve for training. Raised when the template is built."""


class ImageSizeError(ValueError):
    """Images of different processed sizes came into one sample or one batch."""


class RecordFault(ValueError):
    """One record cannot be used. Raised where the reason is found; the dataset, which knows the file and the record,
    makes it a `BadRecordError`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class BadRecordError(ValueError):
    """One record of one file cannot be used.

    file: the data file. index: position in it, from 0. id: the record's own id, if it has one.
    key: `<dataset>/<index>`, the name of the sample. reason: what is wrong and what is allowed.
    """

    def __init__(self, file: str, index: int, id: str | None, key: str, reason: str) -> None:
        super().__init__(file, index, id, key, reason)
        self.file = file
        self.index = index
        self.id = id
        self.key = key
        self.reason = reason

    @property
    def record(self) -> str:
        """The record, in words."""
        return f"record {self.index}" if self.id is None else f"record {self.index} (id {self.id!r})"

    def __str__(self) -> str:
        return f"{self.file}: {self.record}: {self.reason}"


class TooManyBadSamplesError(ValueError):
    """More records are bad than the recipe's `data.bad_sample_limit` allows."""
