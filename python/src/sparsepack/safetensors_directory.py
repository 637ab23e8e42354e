"""Safetensors directories: plain, with packed tensors, or of compressed-tensors' formats."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from . import encodings
from .checkpoint import Checkpoint
from .dtypes import NAMES, dtype_of
from .encodings import Component, Dense, Encoding, Quantized, compressed_tensors, quantized
from .encodings.base import shape_of
from .errors import FormatError, MalformedError, check_name
from .quantization import Schemes, schemes
from .strict_json import parse_object

DECLARATIONS = "sparsepack.encodings"
HEADER_LIMIT = 100_000_000
# Components that only quantized modules of compressed-tensors have, and others that they may not have here.
QUANTIZED = (".weight_scale", ".weight_packed", ".weight_zero_point", ".weight_shape")
FOREIGN = (
    ".weight_g_idx",
    ".weight_global_scale",
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".output_scale",
)


@dataclass(frozen=True)
class Stored:
    """A stored tensor: its file, type and shape."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class SafetensorsCheckpoint(Checkpoint):
    """``model.safetensors``, or shards and their index."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._opened: dict[Path, Any] = {}
        self._stored: dict[str, Stored] = {}
        self._parts: dict[str, dict[str, str]] = {}
        declarations: dict[str, tuple[Path, Any]] = {}
        for file in shards(path):
            for name, declaration in self._open(file).items():
                if name in declarations:
                    raise FormatError(file, "declared in two files", name)
                declarations[name] = (file, declaration)
        check_weight_map(path, self._stored)
        self._place(declarations, storage(path))

    def _open(self, file: Path) -> dict[str, Any]:
        """Takes in the header of one file, and returns its declarations."""
        header, metadata = read_header(file)
        for name, stored in header.items():
            check_name(file, name)
            if name in self._stored:
                raise FormatError(file, f"stored in {self._stored[name].file.name} too", name)
            self._stored[name] = stored
        if DECLARATIONS not in metadata:
            return {}
        return parse_object(file, metadata[DECLARATIONS], DECLARATIONS)

    def _place(self, declarations: dict[str, tuple[Path, Any]], stored_as: str | Schemes | None) -> None:
        """Finds the components of every packed tensor; what is left is dense. Keeps the stored order."""
        owners: dict[str, str] = {}
        packed: dict[str, Encoding] = {}
        for name, (file, declaration) in declarations.items():
            try:
                packed[name] = encodings.declared(declaration)
            except MalformedError as wrong:
                raise FormatError(file, str(wrong), name) from None
            self._claim(name, packed[name], name, owners)
            for component in packed[name].components():
                if self._stored[name + component.suffix].file != file:
                    raise FormatError(file, f"{component.suffix} lies in another file than its declaration", name)
        self._check_neighbours(packed)
        if isinstance(stored_as, Schemes):
            self._place_quantized(stored_as, packed, owners)
        elif stored_as is not None:
            self._place_legacy(stored_as, packed, owners)
        for stored_name, stored in self._stored.items():
            owner = owners.get(stored_name, stored_name)
            if owner not in self.encodings:
                self.encodings[owner] = packed.get(owner) or Dense(stored.dtype, stored.shape)
                self._parts.setdefault(owner, {"": stored_name})

    def _place_legacy(self, legacy: str, packed: dict[str, Encoding], owners: dict[str, str]) -> None:
        suffixes = compressed_tensors.SUFFIXES[legacy]
        for stored_name in list(self._stored):
            module = stored_name.removesuffix(compressed_tensors.COMPRESSED)
            if module == stored_name:
                continue
            name = module + ".weight"
            if module.endswith(".weight"):
                raise FormatError(self.path, "names of compressed-tensors 0.8 or older", module)
            for other in (name, *(module + suffix for suffix in suffixes)):
                if (other in self._stored) == (other == name):
                    state = "stored beside its components" if other == name else "not stored"
                    raise FormatError(self.path, f"{other} is {state}", name)
            compressed = self._stored[stored_name]
            try:
                packed[name] = compressed_tensors.inferred(
                    legacy,
                    Component(compressed_tensors.COMPRESSED, compressed.dtype, compressed.shape),
                    self._tensor(module + compressed_tensors.SHAPE),
                )
            except MalformedError as wrong:
                raise FormatError(self.path, str(wrong), name) from None
            self._claim(name, packed[name], module, owners)
        for stored_name, stored in self._stored.items():
            if stored_name not in owners and stored_name.endswith(
                (compressed_tensors.BITMASK, compressed_tensors.ROW_OFFSETS)
            ):
                raise FormatError(stored.file, "stored without the other components", stored_name)

    def _place_quantized(self, found: Schemes, packed: dict[str, Encoding], owners: dict[str, str]) -> None:
        modules = {name.removesuffix(suffix) for name in self._stored for suffix in QUANTIZED if name.endswith(suffix)}
        for module in sorted(modules):
            name = module + ".weight"
            try:
                packed[name] = self._quantized(module, found)
            except MalformedError as wrong:
                raise FormatError(self.path, str(wrong), name) from None
            self._claim(name, packed[name], module, owners)
            known = {component.suffix for component in packed[name].components()}
            for suffix in (*QUANTIZED, *FOREIGN, ".weight"):
                if suffix not in known and module + suffix in self._stored:
                    raise FormatError(self.path, f"{suffix} is not a component of {packed[name].name}", name)
        for module in found.names:
            if module not in modules and module + ".weight" in self._stored:
                raise FormatError(self.path, "a target of config_groups, but not quantized", module + ".weight")

    def _quantized(self, module: str, found: Schemes) -> Quantized:
        """The encoding of a module's weight; its shape is that of the codes, or said beside them."""
        scheme = found.of(module)
        scale = self._component(module, ".weight_scale")
        quantized.check_scales(scale.dtype)
        if scheme.format != quantized.PACK:
            shape = self._component(module, ".weight").shape
        else:
            said = self._component(module, ".weight_shape")
            if (said.dtype, said.shape) != (torch.int64, (2,)):
                raise MalformedError(f".weight_shape is {said.dtype} {list(said.shape)} (expected two I64)")
            shape = tuple(self._tensor(module + ".weight_shape").tolist())
        if len(shape) != 2 or min(shape) < 0:
            raise MalformedError(f"shape {list(shape)} is not a matrix")
        return Quantized.of(scale.dtype, (shape[0], shape[1]), scheme.grid, scheme.format)

    def _component(self, module: str, suffix: str) -> Stored:
        if module + suffix not in self._stored:
            raise MalformedError(f"component {suffix} is not stored")
        return self._stored[module + suffix]

    def _check_neighbours(self, packed: dict[str, Encoding]) -> None:
        """Beside its components, neither a tensor's own name nor the name with another suffix may be stored."""
        for stored_name, stored in self._stored.items():
            stem, dot, suffix = stored_name.rpartition(".")
            other = stem in packed and all(dot + suffix != c.suffix for c in packed[stem].components())
            if other or stored_name in packed:
                name = stem if other else stored_name
                raise FormatError(stored.file, f"{stored_name} is stored beside its components", name)

    def _claim(self, name: str, encoding: Encoding, stem: str, owners: dict[str, str]) -> None:
        """Checks types and shapes of a packed tensor's components, and notes whose they are."""
        for component in encoding.components():
            stored_name = stem + component.suffix
            stored = self._stored.get(stored_name)
            if stored is None:
                raise FormatError(self.path, f"component {component.suffix} is not stored", name)
            if (stored.dtype, stored.shape) != (component.dtype, component.shape):
                raise FormatError(
                    stored.file,
                    f"{component.suffix} is {NAMES[stored.dtype]} {list(stored.shape)} "
                    f"(expected {NAMES[component.dtype]} {list(component.shape)})",
                    name,
                )
            if owners.setdefault(stored_name, name) != name:
                raise FormatError(stored.file, f"{stored_name} is a component of two tensors", name)
        self._parts[name] = {component.suffix: stem + component.suffix for component in encoding.components()}

    def components(self, name: str) -> dict[str, torch.Tensor]:
        return {suffix: self._tensor(stored_name) for suffix, stored_name in self._parts[name].items()}

    def _tensor(self, stored_name: str) -> torch.Tensor:
        file = self._stored[stored_name].file
        try:
            if file not in self._opened:
                self._opened[file] = safe_open(file, framework="pt", device="cpu")
            tensor: torch.Tensor = self._opened[file].get_tensor(stored_name)
            return tensor
        except SafetensorError as wrong:
            raise FormatError(file, str(wrong), stored_name) from None


def shards(path: Path) -> list[Path]:
    """The files of a directory, in the order of their names."""
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    files = sorted(set(weight_map(path).values()))
    for file in files:
        if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise FormatError(path, f"shard {file!r} in the index is not a plain file name")
        if not (path / file).is_file():
            raise FormatError(path, f"shard {file} of the index is not there")
    return [path / file for file in files]


def weight_map(path: Path) -> dict[str, str]:
    """Stored names and their files, from the index."""
    file = path / "model.safetensors.index.json"
    found = parse_object(file, file.read_bytes(), "index").get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
        raise FormatError(file, "weight_map is not an object of file names")
    return found


def check_weight_map(path: Path, stored: dict[str, Stored]) -> None:
    """Index and shards must name the same tensors."""
    if (path / "model.safetensors").is_file():
        return
    mapped = weight_map(path)
    for name in mapped.keys() | stored.keys():
        there = stored[name].file.name if name in stored else "no shard"
        if mapped.get(name) != there:
            raise FormatError(path, f"the index says {mapped.get(name, 'nothing')}, but it is in {there}", name)


def read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors in the order of their data, and ``__metadata__``.

    The ``safetensors`` package checks offsets against shapes and file, but takes one of two equal names
    without a word, so names and order are read here.
    """
    try:
        with safe_open(file, framework="pt", device="cpu"):
            pass
    except SafetensorError as wrong:
        raise FormatError(file, str(wrong)) from None
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > HEADER_LIMIT:
            raise FormatError(file, f"header has {length} bytes (expected at most {HEADER_LIMIT})")
        header = parse_object(file, opened.read(length), "header")
    metadata = header.pop("__metadata__", {})
    order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    try:
        tensors = {name: Stored(file, dtype_of(entry["dtype"]), shape_of(entry["shape"])) for name, entry in order}
    except MalformedError as wrong:
        raise FormatError(file, str(wrong)) from None
    return tensors, metadata


def storage(path: Path) -> str | Schemes | None:
    """What ``config.json`` says of compressed-tensors: a sparse format, quantized modules, or nothing."""
    file = path / "config.json"
    if not file.is_file():
        return None
    config = parse_object(file, file.read_bytes(), "config")
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "compressed-tensors":
        raise FormatError(file, "quantization_config is not one that sparsepack reads")
    if quantization.get("config_groups"):
        try:
            return schemes(quantization)
        except MalformedError as wrong:
            raise FormatError(file, str(wrong)) from None
    sparsity = quantization.get("sparsity_config")
    named = sparsity.get("format") if isinstance(sparsity, dict) else None
    if named in compressed_tensors.SUFFIXES:
        return str(named)
    if named == "dense" or not sparsity:
        return None
    raise FormatError(file, f"sparsity_config.format is {json.dumps(named)}")
