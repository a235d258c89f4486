"""What vLLM's options are called here, or what takes their place, for those who come from there.

Names in vllm_names.json are those of its `SamplingParams` and `EngineArgs`, versions 0.4 to 0.11: what to do instead ->
name there -> values that change nothing. Options that both have under one name are not listed.
"""

import json
from pathlib import Path

from minirksc.option_fields import Theirs

_NAMES = json.loads(Path(__file__).with_name("vllm_names.json").read_text(encoding="utf-8"))


def _options(group: str) -> dict[str, Theirs]:
    """The options of a class of vLLM's, by their names there."""
    rows = _NAMES[group].items()
    return {name: Theirs(instead, tuple(values)) for instead, names in rows for name, values in names.items()}


SAMPLING_NAMES = _options("SamplingParams")
ENGINE_NAMES = _options("EngineArgs")
