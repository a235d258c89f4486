"""A GGUF file for llama.cpp with the very weights of the packaged model: dequantised as minirksc does, kept for later.

minirksc computes with the packaged file's weights rounded to bfloat16, and so does the file that is made here, norms
included (which llama.cpp wants as float32). "q8_0" rounds the matrices further, as llama.cpp's own tool would.
"""

import importlib.util
from pathlib import Path
from typing import Any

from bench.peer_process import PeerError
from minirksc.checkpoints.sources import ALIASES, cache_folder

KINDS = ("bf16", "q8_0")
VERSION = 1
"""Part of the file's name: changed code makes it anew."""


def packaged_gguf(model: str) -> Path:
    """The GGUF file that an alias comes as.

    Raises:
        PeerError: there is none, or it is in several parts.
    """
    known = ALIASES.get(model)
    if known is None or len(known.parts) != 1:
        raise PeerError(f"{model} comes with no GGUF file to convert; name one: --gguf FILE")
    package, name = known.parts[0]
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (file := Path(folder, name)).is_file():
            return file
    raise PeerError(f"the package {package.replace('_', '-')} is not installed: {known.install}")


def converted_gguf(model: str, kind: str) -> Path:
    """The file of an alias in one of `KINDS`, made on first use.

    Raises:
        PeerError: there is nothing to convert, or nothing to do it with.
    """
    source = packaged_gguf(model)
    file = cache_folder() / "peers" / f"{model}-v{VERSION}-{source.stat().st_size}-{kind}.gguf"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        try:
            convert(source, unfinished, kind)
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
    return file


def convert(source: Path, destination: Path, kind: str) -> None:
    """Writes the GGUF file with all matrices in one type and everything else as it was.

    Args:
        source: GGUF file that the gguf package can dequantise.
        destination: file that is overwritten.
        kind: name out of `KINDS`.

    Raises:
        PeerError: the gguf package is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise PeerError("making a GGUF file needs the gguf package: pip install 'minirksc[demo]'") from error
    bf16, f32 = gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.F32
    wanted = {"bf16": bf16, "q8_0": gguf.GGMLQuantizationType.Q8_0}[kind]
    file_type = {"bf16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[kind]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(destination, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue  # the writer's own
        element = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], element)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        values = _rounded(gguf, gguf.dequantize(tensor.data, tensor.tensor_type))
        if len(tensor.shape) < 2:
            writer.add_tensor(tensor.name, values, raw_dtype=f32)
        else:
            writer.add_tensor(tensor.name, gguf.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rounded(gguf: Any, values: Any) -> Any:
    """To bfloat16, as float32."""
    bf16 = gguf.GGMLQuantizationType.BF16
    return gguf.dequantize(gguf.quantize(values, bf16), bf16)
