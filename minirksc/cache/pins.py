"""Sequences whose blocks stay in the cache although no table holds them.

A pin is of a sequence. When its table is closed, its indexed blocks, the window before their end included, are held
from here. If it has a table again, the blocks stay pinned, and what it computes in addition is pinned with the rest
when that table is closed. A last block that is not full is not kept. With layers that have a window, the window before
the last full block is held too, where it has not been given up already; without it the prefix serves nobody.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from minirksc.cache.index import Block
from minirksc.cache.pool import BlockPool
from minirksc.cache.table import Table
from minirksc.cache.windows import WindowPool


@dataclass(slots=True)
class Pin:
    """What a closed table left.

    Attributes:
        blocks: its indexed blocks, in order.
        window_begin: index of the first one that has room in the window pool.
        in_view: that room is held; not while the sequence has a table.
    """

    blocks: list[Block] = field(default_factory=list)
    window_begin: int = 0
    in_view: bool = False


class Pins:
    """Pinned sequences.

    Args:
        pool: of the blocks.
        windows: where blocks may have room for layers with a window.
        block_size: tokens a block.
    """

    def __init__(self, pool: BlockPool, windows: WindowPool, block_size: int) -> None:
        self._pool = pool
        self._windows = windows
        self._block_size = block_size
        self._pins: dict[int, Pin] = {}

    @property
    def advice(self) -> str:
        """How many cached blocks are pinned and how to unpin them; "" if none is."""
        if not self._pool.num_pinned:
            return ""
        return f"; {self._pool.num_pinned} blocks of {len(self._pins)} pinned sequences stay in it: unpin() some"

    @property
    def seq_ids(self) -> list[int]:
        """Sequences that are pinned."""
        return list(self._pins)

    def add(self, seq_id: int) -> None:
        """Pins a sequence that has a table, or will have one."""
        self._pins.setdefault(seq_id, Pin())

    def discard(self, seq_id: int) -> None:
        """Unpins a sequence, if it is pinned."""
        self.resume(seq_id)
        pin = self._pins.pop(seq_id, Pin())
        for block in reversed(pin.blocks):
            self._pool.unpin(block)

    def clear(self) -> None:
        """Unpins all."""
        for seq_id in list(self._pins):
            self.discard(seq_id)

    def capture(self, seq_id: int, table: Table) -> None:
        """The table of a sequence is about to be closed: if it is pinned, its indexed blocks stay."""
        pin = self._pins.get(seq_id)
        if pin is None:
            return
        blocks = [self._pool[block_id] for block_id in table.block_ids]
        blocks = blocks[: next((place for place, block in enumerate(blocks) if block.digest is None), None)]
        # A block more than the table has in view, if the last full one ends before the tokens do.
        begin = min(table.window_begin, self._windows.first_needed(len(blocks) * self._block_size))
        if blocks == pin.blocks[: len(blocks)]:
            blocks, begin = pin.blocks, pin.window_begin  # closed before it had all again
        for block in blocks:
            self._pool.pin(block)
        for block in reversed(pin.blocks):
            self._pool.unpin(block)
        lost = [place for place, block in enumerate(blocks) if place >= begin and block.window_id is None]
        begin = min(max([begin, *(place + 1 for place in lost)]), len(blocks))
        for block in blocks[begin:]:
            self._windows.view(block)
        self._pins[seq_id] = Pin(blocks, begin, in_view=True)

    def resume(self, seq_id: int) -> None:
        """The sequence has a table again, whose window takes the place of the pin's; blocks stay pinned."""
        pin = self._pins.get(seq_id)
        if pin is not None and pin.in_view:
            pin.in_view = False
            for block in pin.blocks[pin.window_begin :]:
                self._windows.release(block)

    def check(self, tables: Collection[int], views: list[int]) -> Sequence[int]:
        """Verifies that a pin holds room for windows only while its sequence has no table.

        Args:
            tables: sequences that have one.
            views: tables whose window reaches each block; the pins' are added.

        Returns:
            How many pins hold each block.

        Raises:
            AssertionError: names the sequence.
        """
        pins = [0] * len(self._pool)
        for seq_id, pin in self._pins.items():
            assert not pin.in_view or seq_id not in tables, f"sequence {seq_id} has a table and its pin a window"
            for place, block in enumerate(pin.blocks):
                pins[block.block_id] += 1
                views[block.block_id] += pin.in_view and place >= pin.window_begin
        return pins
