"""How much of a prompt is cached: whole blocks, and the beginning of the block after them."""

from collections.abc import Sequence

from minirksc.cache.index import Block, PrefixIndex
from minirksc.cache.windows import WindowPool


class PrefixSearch:
    """Finds what a new table may adopt.

    Args:
        index: of full blocks.
        windows: a cached prefix serves only as far as the window before its end has room there.
        block_size: tokens a block.
    """

    def __init__(self, index: PrefixIndex, windows: WindowPool, block_size: int) -> None:
        self._index = index
        self._windows = windows
        self._block_size = block_size

    def __call__(self, token_ids: Sequence[int], salt: bytes) -> tuple[list[Block], Block | None, int]:
        """(full blocks, the block to copy from, how many of its tokens agree); one token at least is left over."""
        usable = token_ids[:-1]
        chain = self._in_window(self._index.chain(usable, salt))
        begin = len(chain) * self._block_size
        rest = tuple(usable[begin : begin + self._block_size])
        best, num_best = None, 0
        for block in self._index.following(chain, salt):
            if self._windows.num_blocks and block.window_id is None:
                continue
            num_equal = 0
            while num_equal < len(rest) and block.token_ids[num_equal] == rest[num_equal]:
                num_equal += 1
            if num_equal > num_best:
                best, num_best = block, num_equal
        return chain, best, num_best

    def _in_window(self, chain: list[Block]) -> list[Block]:
        """As much of a cached chain as has the window before its end."""
        missing = -1  # last place without room in the window pool
        num_usable = 0
        for place, block in enumerate(chain):
            if block.window_id is None:
                missing = place
            if missing < self._windows.first_needed((place + 1) * self._block_size):
                num_usable = place + 1
        return chain[:num_usable]
