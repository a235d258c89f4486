"""One sequence's block table, and the invariants that hold for it."""

from dataclasses import dataclass, field

from minirksc.cache.index import Block, block_digest
from minirksc.cache.windows import NO_WINDOW

NO_LIMIT = 1 << 62


@dataclass(slots=True)
class Table:
    """One sequence.

    Attributes:
        block_ids: in order of position; may reach beyond the tokens.
        token_ids: whose KV has been written.
        salt: root of its digests.
        depth: of its node in the reasoning tree.
        digests: of its full blocks, indexed or not.
        window_begin: place of the first block that it keeps in view of the layers with a window.
        exact_len: tokens whose KV is the model's own; blocks beyond are approximate and never indexed.
        awaited: digests of the full blocks that it had before they were taken back, if they were.
    """

    block_ids: list[int]
    token_ids: list[int]
    salt: bytes
    depth: int
    digests: list[bytes]
    window_begin: int = NO_WINDOW
    exact_len: int = NO_LIMIT
    awaited: list[bytes] = field(default_factory=list)

    def check(self, name: str, block_size: int, blocks: list[Block], first_in_view: int) -> None:
        """Verifies that its blocks are as many as its tokens need, and hold no other's.

        Args:
            name: for messages.
            block_size: tokens a block.
            blocks: those of block_ids.
            first_in_view: place of the first block that its next query sees.

        Raises:
            AssertionError: names the table or the block.
        """
        num_tokens = len(self.token_ids)
        assert len(self.block_ids) * block_size >= num_tokens, f"{name} is too short"
        assert len(self.digests) == num_tokens // block_size, f"digests of {name}"
        assert len(set(self.block_ids)) == len(self.block_ids), f"{name} repeats a block"
        assert min(self.window_begin, len(self.block_ids)) <= first_in_view, f"{name} lost what is in its window"
        digest = b""
        for place, expected in enumerate(self.digests):
            block = blocks[place]
            digest = block_digest(digest, self.salt, self.token_ids[place * block_size : (place + 1) * block_size])
            assert digest == expected, f"digest {place} of {name}"
            assert block.digest in (None, digest), f"block {block.block_id} of {name} is indexed as another's"
            assert block.digest is None or block.salt == self.salt, f"block {block.block_id}: another salt's"
