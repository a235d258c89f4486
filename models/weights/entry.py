"""Where the numbers of one tensor lie in a checkpoint, and what they are multiplied with."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        file: that holds it.
        name: that it has there.
        dtype: its code in the header.
        shape: its dimensions.
        begin, end: absolute byte range.
        interleaved_heads: how many heads the rows belong to, where the rows of each have rotary pairs side by side
            and are put halves apart by `read_into`; None for all other tensors.
        scale: what an FP8 weight is multiplied with by `read_into`; None for all other tensors.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    interleaved_heads: int | None = None
    scale: "Scale | None" = None


@dataclass(frozen=True)
class Scale:
    """The scales of one weight.

    Attributes:
        entry: the tensor; all its numbers in order are `[rows / extent[0], columns / extent[1]]`, rounded up.
        extent: rows and columns of the weight that share one.
        first_row: of the weight, where only a part of its rows is read.
    """

    entry: TensorEntry
    extent: tuple[int, int]
    first_row: int = 0
