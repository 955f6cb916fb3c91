"""The size of a micro-batch, as far as costs depend on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """A micro-batch of one process.

    sample_lengths: tokens of each sample, those of its images included.
    num_images: images of all samples. supervised: positions that have a loss.
    padded_to: the length that every sample is padded to; None: packed, all samples one after the other in one row.
    tail_share: share of all tokens that take `tail_k` experts (LTDR's vision tail tokens); 0 where the router has none.

    Raises:
        ValueError: numbers that no batch has.
    """

    sample_lengths: tuple[int, ...]
    num_images: int
    supervised: int
    padded_to: int | None = None
    tail_share: float = 0.0

    def __post_init__(self) -> None:
        if not self.sample_lengths or min(self.sample_lengths) < 1:
            raise ValueError(f"sample_lengths: {self.sample_lengths}; allowed: one number of 1 or above a sample")
        if self.padded_to is not None and self.padded_to < max(self.sample_lengths):
            raise ValueError(f"padded_to: {self.padded_to}; allowed: {max(self.sample_lengths)}, the longest, or more")
        if self.num_images < 0:
            raise ValueError(f"num_images: {self.num_images}; allowed: 0 and above")
        if not 0 <= self.supervised <= self.tokens:
            raise ValueError(f"supervised: {self.supervised}; allowed: 0 to {self.tokens}, the number of tokens")
        if not 0 <= self.tail_share <= 1:
            raise ValueError(f"tail_share: {self.tail_share}; allowed: 0 to 1")

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(self.sample_lengths)

    @property
    def rows(self) -> int:
        """Rows of the batch's tensors."""
        return 1 if self.padded_to is None else len(self.sample_lengths)

    @property
    def width(self) -> int:
        """Positions of a row."""
        return self.tokens if self.padded_to is None else self.padded_to

    @property
    def positions(self) -> int:
        """Tokens and padding."""
        return self.rows * self.width

    @property
    def squares(self) -> int:
        """Pairs of positions within samples: what attention is about."""
        return sum(length * length for length in self.sample_lengths)
