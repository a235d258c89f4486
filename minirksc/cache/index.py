"""The prefix index: which full block of the KV cache holds a given history of tokens.

A full block is found by a chained SHA-256 over its tokens, all tokens before it, and a salt: equal digests mean an
equal history, so nothing is ever shared across salts. Indexed blocks form a tree: a block's parent is the indexed
block right before it.
"""

import hashlib
import struct
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Block:
    """What is known of one block.

    Attributes:
        block_id: its number.
        num_references: tables that hold it.
        digest: key in the prefix index; None when it is not indexed.
        parent: indexed block before it; None for the first of a sequence.
        children: indexed blocks right after it, by digest.
        token_ids, salt: what an indexed block was made of.
        num_tokens_before: tokens of an indexed block's history, its own excluded.
        depth: place in the reasoning tree of the shallowest table that took it.
        importance: attention mass that it receives, as a multiple of what the average block of its sequence does.
        last_use, num_uses: clock and count of the times that a table took it.
        num_awaited: live sequences without a table that will need it again.
        num_pins: pinned sequences that held it when their table was last closed.
        cached_at: age of the pool when the last table was freed that held it.
    """

    block_id: int
    num_references: int = 0
    digest: bytes | None = None
    parent: "Block | None" = None
    children: dict[bytes, "Block"] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()
    salt: bytes = b""
    num_tokens_before: int = 0
    depth: int = 0
    importance: float = 1.0
    last_use: int = 0
    num_uses: int = 0
    num_awaited: int = 0
    num_pins: int = 0
    cached_at: float = 0.0


class PrefixIndex:
    """Full blocks by their history.

    Args:
        block_size: tokens a block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._blocks: dict[bytes, Block] = {}
        self._first: defaultdict[bytes, dict[bytes, Block]] = defaultdict(dict)  # salt: indexed first blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, digest: bytes) -> Block | None:
        """The block of that digest, if one is indexed."""
        return self._blocks.get(digest)

    def chain(self, token_ids: Sequence[int], salt: bytes) -> list[Block]:
        """The longest run of indexed blocks that token_ids begin with."""
        size = self._block_size
        chain: list[Block] = []
        digest = b""
        for begin in range(0, len(token_ids) - size + 1, size):
            digest = block_digest(digest, salt, token_ids[begin : begin + size])
            if (block := self._blocks.get(digest)) is None:
                break
            chain.append(block)
        return chain

    def following(self, chain: Sequence[Block], salt: bytes) -> Collection[Block]:
        """Indexed blocks right after a chain."""
        return (chain[-1].children if chain else self._first.get(salt, {})).values()

    def insert(
        self, block: Block, parent: Block | None, digest: bytes, token_ids: tuple[int, ...], salt: bytes
    ) -> None:
        """Indexes a full block after its parent, which is indexed."""
        assert digest not in self._blocks
        block.digest, block.parent = digest, parent
        block.token_ids, block.salt = token_ids, salt
        block.num_tokens_before = 0 if parent is None else parent.num_tokens_before + self._block_size
        self._blocks[digest] = block
        self._siblings(block)[digest] = block

    def remove(self, block: Block) -> None:
        """Forgets a block that nothing builds on."""
        assert block.digest is not None and not block.children
        siblings = self._siblings(block)
        del siblings[block.digest], self._blocks[block.digest]
        if block.parent is None and not siblings:
            del self._first[block.salt]
        block.digest, block.parent, block.token_ids, block.salt = None, None, (), b""

    def _siblings(self, block: Block) -> dict[bytes, Block]:
        """Indexed blocks at the same place of the same history, this one included."""
        return self._first[block.salt] if block.parent is None else block.parent.children


def closest(blocks: Iterable[Block], token_ids: Sequence[int]) -> tuple[Block | None, int]:
    """The block that begins with most of these tokens, and with how many; (None, 0) where none begins with the first.

    Args:
        blocks: candidates; of equally good ones the first is taken.
        token_ids: what the block after a chain should hold, at most block_size of them.
    """
    best, num_best = None, 0
    for block in blocks:
        num_equal = 0
        while num_equal < len(token_ids) and block.token_ids[num_equal] == token_ids[num_equal]:
            num_equal += 1
        if num_equal > num_best:
            best, num_best = block, num_equal
    return best, num_best


def block_digest(previous: bytes, salt: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of a full block: its tokens and, through the digest of the block before, all tokens before it."""
    # The tags keep salts and blocks apart: else a salt spelt like a block's input would continue its history.
    start = previous or hashlib.sha256(b"salt:" + salt).digest()
    return hashlib.sha256(b"block:" + start + struct.pack(f"<{len(token_ids)}q", *token_ids)).digest()
