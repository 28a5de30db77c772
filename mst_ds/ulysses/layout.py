"""Which attention heads each rank of a sequence group works on. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadLayout:
    """Contiguous, balanced ranges of heads for `sp_size` ranks; neither head count has to be divisible.

    A rank gets the key/value heads that its query heads read. With fewer key/value heads than ranks, or a range that
    begins inside a group of query heads, the same key/value head goes to several ranks.

    A rank may work through its heads in `head_groups` balanced ranges, one after another; where it has fewer heads,
    there are fewer groups. What is said of a rank is then said of one group of a rank, if one is named.

    Raises:
        ValueError: more ranks than query heads, or query heads that are no multiple of the key/value heads.
    """

    num_heads: int
    num_key_value_heads: int
    sp_size: int
    head_groups: int = 1

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

    @property
    def groups(self) -> range:
        """The groups of heads; on every rank as many, and none of them is empty."""
        return range(min(self.head_groups, self.num_heads // self.sp_size))

    def query_heads(self, sp_rank: int, group: int | None = None) -> range:
        heads = _part(range(self.num_heads), sp_rank, self.sp_size)
        return heads if group is None else _part(heads, group, len(self.groups))

    def key_value_heads(self, sp_rank: int, group: int | None = None) -> range:
        heads = self.query_heads(sp_rank, group)
        return range(heads.start // self.group_size, (heads.stop - 1) // self.group_size + 1)

    def key_value_index(self, sp_rank: int, group: int | None = None) -> list[int] | None:
        """For each local query head its local key/value head; None where a plain grouping (h // n) says the same."""
        heads, key_values = self.query_heads(sp_rank, group), self.key_value_heads(sp_rank, group)
        index = [head // self.group_size - key_values.start for head in heads]
        if len(heads) % len(key_values) == 0:
            local_group = len(heads) // len(key_values)
            if index == [position // local_group for position in range(len(heads))]:
                return None
        return index

    @property
    def shares_key_values(self) -> bool:
        """Whether a key/value head is worked on more than once, on several ranks or in several groups."""
        uses = [len(self.key_value_heads(rank, group)) for rank in range(self.sp_size) for group in self.groups]
        return sum(uses) > self.num_key_value_heads


def _part(heads: range, index: int, count: int) -> range:
    base, extra = divmod(len(heads), count)
    start = heads.start + index * base + min(index, extra)
    return range(start, start + base + (index < extra))
