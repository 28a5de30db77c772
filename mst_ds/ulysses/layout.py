"""Which attention heads each rank of a sequence group works on. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadLayout:
    """Contiguous, balanced ranges of heads for `sp_size` ranks; neither head count has to be divisible.

    A rank gets the key/value heads that its query heads read. With fewer key/value heads than ranks, or a range that
    begins inside a group of query heads, the same key/value head goes to several ranks.

    Raises:
        ValueError: more ranks than query heads, or query heads that are no multiple of the key/value heads.
    """

    num_heads: int
    num_key_value_heads: int
    sp_size: int

    def __post_init__(self) -> None:
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_heads} query heads are no multiple of {self.num_key_value_heads} key/value heads"
            )
        if self.sp_size > self.num_heads:
            raise ValueError(
                f"sp_size {self.sp_size} is above the number of query heads {self.num_heads}: "
                f"a rank would have no head; use sp_size <= {self.num_heads}"
            )

    @property
    def group_size(self) -> int:
        """Query heads that read one key/value head."""
        return self.num_heads // self.num_key_value_heads

    def query_heads(self, sp_rank: int) -> range:
        base, extra = divmod(self.num_heads, self.sp_size)
        start = sp_rank * base + min(sp_rank, extra)
        return range(start, start + base + (sp_rank < extra))

    def key_value_heads(self, sp_rank: int) -> range:
        heads = self.query_heads(sp_rank)
        return range(heads.start // self.group_size, (heads.stop - 1) // self.group_size + 1)

    def key_value_index(self, sp_rank: int) -> list[int] | None:
        """For each local query head its local key/value head; None where a plain grouping (h // n) says the same."""
        heads, key_values = self.query_heads(sp_rank), self.key_value_heads(sp_rank)
        index = [head // self.group_size - key_values.start for head in heads]
        if len(heads) % len(key_values) == 0:
            local_group = len(heads) // len(key_values)
            if index == [position // local_group for position in range(len(heads))]:
                return None
        return index
