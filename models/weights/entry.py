"""Where the numbers of one tensor lie in a checkpoint, and what they are multiplied with."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        file: file that holds it.
        name: name that it has there.
        dtype: code of its dtype in the header.
        shape: its dimensions.
        begin, end: range of its bytes in the file.
        interleaved_heads: number of heads that the rows belong to, where the rows of each have rotary pairs side by
            side and are put halves apart by `read_into`; None for all other tensors.
        scale: scales by which `read_into` multiplies an FP8 weight; None for all other tensors.
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
        entry: place of the scales; in order they are `[rows / extent[0], columns / extent[1]]`, rounded up.
        extent: rows and columns of the weight that share one.
        first_row: index of the first row that is read, where only some rows of the weight are.
    """

    entry: TensorEntry
    extent: tuple[int, int]
    first_row: int = 0
