"""Why models differ: reads reasons.toml, which lies beside it, when it is imported, and that is for a page."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

_TABLES = tomllib.loads(Path(__file__).with_name("reasons.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Reason:
    """About one field.

    Attributes:
        title: name of the field in a few words.
        text: formula and purpose, in a sentence or two.
        source: paper or file that describes it; "" for none.
    """

    title: str
    text: str
    source: str = ""


WHY = {name: Reason(**entry) for name, entry in _TABLES["fields"].items()}
"""Every field of `ArchSpec`, and of the specs in it, in the order in which a page shows them."""

ROPE_KINDS = {name: Reason(**entry) for name, entry in _TABLES["rope_kinds"].items()}
"""Every kind of `RopeSpec`."""
