"""Packed directories as transformers models."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from . import semi_structured
from .checkpoint import Checkpoint, open_checkpoint
from .encodings.sparse24 import Sparse24
from .encodings.torch_cutlass import TorchCutlass
from .errors import FormatError, MalformedError, SparseUnavailableError
from .semi_structured import Hardware

logger = logging.getLogger("sparsepack")

# Old checkpoints store the rotary frequencies, which models compute.
COMPUTED = re.compile(r"rotary_emb\.inv_freq$")


@dataclass
class LoadReport:
    """What became of each stored tensor, by parameter name."""

    sparse: dict[str, str] = field(default_factory=dict)
    """Semi-structured weights and their backend, ``cutlass`` or ``cusparselt``."""
    dense: dict[str, str] = field(default_factory=dict)
    """2:4 weights that were decoded, and why."""
    encodings: dict[str, str] = field(default_factory=dict)
    """How each parameter was stored."""
    ignored: list[str] = field(default_factory=list)
    """Stored tensors that the model says it does not need."""

    def __str__(self) -> str:
        lines = [f"{len(self.sparse)} semi-structured weights, {len(self.dense)} 2:4 weights decoded"]
        lines += [f"  {name}: {backend}" for name, backend in self.sparse.items()]
        lines += [f"  {name}: dense: {why}" for name, why in self.dense.items()]
        lines += [f"  {name}: ignored" for name in self.ignored]
        return "\n".join(lines)


def load(
    directory: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    sparse: Literal["auto"] | bool = "auto",
    backend: Literal["cutlass", "cusparselt"] | None = None,
) -> Any:
    """Loads a packed directory as the transformers model that its ``config.json`` names.

    Weights go to the device one at a time, decoded; there is never a second copy of the model.

    Args:
        directory: what ``sparsepack convert`` wrote: safetensors, plain or packed, or ``model.spz``.
        device: where the model goes; the CPU if not given.
        dtype: type of the weights; that of ``config.json`` if not given.
        sparse: ``"auto"``: 2:4 weights of linears (``sparse24``, ``torch-cutlass``) are semi-structured on
            a GPU that can use them, and decoded elsewhere. ``True``: all of them are, or it is an error.
            ``False``: all are decoded.
        backend: the library of semi-structured products; chosen for each weight if not given.

    Returns:
        The model, in ``eval`` mode. Its ``sparsepack_report`` (:class:`LoadReport`) says which weights
        are semi-structured, and why others are not; the logger ``sparsepack`` says so too.

    Raises:
        FormatError: the directory is malformed, or its tensors are not those of the model.
        SparseUnavailableError: ``sparse=True`` and a 2:4 weight cannot be semi-structured, or there is none.
    """
    if sparse not in ("auto", True, False):
        raise ValueError(f"sparse is {sparse!r} (expected 'auto', True or False)")
    if backend not in (None, semi_structured.CUTLASS, semi_structured.CUSPARSELT):
        raise ValueError(f"backend is {backend!r} (expected 'cutlass' or 'cusparselt')")
    path = Path(directory)
    checkpoint = open_checkpoint(path)
    model = empty_model(path, dtype)
    filler = Filler(checkpoint, model, Hardware.of(torch.device(device or "cpu")), sparse, backend)
    filler.fill()
    model.sparsepack_report = filler.report
    if filler.report.dense and sparse == "auto":
        reasons = sorted(set(filler.report.dense.values()))
        logger.info("%d 2:4 weights are dense: %s", len(filler.report.dense), "; ".join(reasons))
    logger.debug("%s: %s", path, filler.report)
    return model.eval()


def empty_model(path: Path, dtype: torch.dtype | None) -> Any:
    """The model of ``config.json`` with parameters on the meta device, and buffers computed."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    if not (path / "config.json").is_file():
        raise FormatError(path, "no config.json")
    config = read_config(path)
    if hasattr(config, "quantization_config"):
        # The reader has looked at it: weights are decoded, and transformers must not try to.
        del config.quantization_config
    dtype = dtype or config.dtype
    if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
        raise FormatError(path / "config.json", f"dtype is {dtype}; give load the dtype to compute in")
    with meta_parameters():
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, trust_remote_code=False
        )
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    model.name_or_path = str(path)
    return model


def read_config(path: Path) -> Any:
    """The configuration in ``config.json``. Code that stands beside it is not run: of sliced models we have our own."""
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

    model_type = PreTrainedConfig.get_config_dict(path)[0].get("model_type")
    if not str(model_type).startswith("sliced_"):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    from .modeling_sliced import SlicedConfig, SlicedForCausalLM

    AutoModelForCausalLM.register(SlicedConfig, SlicedForCausalLM, exist_ok=True)
    try:
        return SlicedConfig.from_pretrained(path)
    except ValueError as wrong:
        raise FormatError(path / "config.json", str(wrong)) from None


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Parameters that are registered inside take no memory. Buffers, which are not stored, stay real."""
    register = nn.Module.register_parameter

    def register_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@dataclass
class Filler:
    """Fills a model's parameters from a checkpoint, one by one."""

    checkpoint: Checkpoint
    model: Any
    hardware: Hardware
    sparse: Literal["auto"] | bool
    backend: str | None
    report: LoadReport = field(default_factory=LoadReport)

    def fill(self) -> None:
        """Every tensor to its parameter; buffers to the device; tied parameters tied."""
        names = self.parameter_names()
        if self.sparse is True:
            self.demand_sparse(names)
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.to(self.hardware.device)
        filled = {name for stored in self.checkpoint.encodings for name in self.assign(stored, names)}
        missing = {name for name, _ in self.model.named_parameters(remove_duplicate=False)} - filled
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter.is_meta:
                raise FormatError(self.checkpoint.path, "the model has this parameter, the directory does not", name)

    def parameter_names(self) -> dict[str, str]:
        """Stored names and the parameters they fill; base models' names come with or without their prefix."""
        owned = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        owned |= set(self.model.state_dict())
        prefix = self.model.base_model_prefix + "."
        patterns = [re.compile(p) for p in self.model._keys_to_ignore_on_load_unexpected or ()]
        names: dict[str, str] = {}
        for stored in self.checkpoint.encodings:
            found = [n for n in (stored, prefix + stored, stored.removeprefix(prefix)) if n in owned]
            if found:
                if found[0] in names.values():
                    raise FormatError(self.checkpoint.path, f"fills {found[0]}, as another tensor does", stored)
                names[stored] = found[0]
            elif COMPUTED.search(stored) or any(p.search(stored) for p in patterns):
                self.report.ignored.append(stored)
            else:
                raise FormatError(self.checkpoint.path, "the model has no such parameter", stored)
        return names

    def demand_sparse(self, names: dict[str, str]) -> None:
        """``sparse=True``: says before anything is read that a weight cannot be semi-structured."""
        decided = {name: self.decide(stored, name) for stored, name in names.items()}
        refused = [f"{name}: {why}" for name, (backend, why) in decided.items() if why]
        if refused:
            more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
            raise SparseUnavailableError(f"{self.checkpoint.path}: {refused[0]}{more}")
        if not any(backend for backend, _ in decided.values()):
            raise SparseUnavailableError(f"{self.checkpoint.path}: no linear is stored as sparse24 or torch-cutlass")

    def decide(self, stored: str, name: str) -> tuple[str, str]:
        """The backend of a weight, or why a 2:4 weight has none; both empty for others."""
        encoding = self.checkpoint.encodings[stored]
        if not isinstance(encoding, (Sparse24, TorchCutlass)):
            return "", ""
        if self.sparse is False:
            return "", "sparse=False"
        module_name, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(module_name)
        if not isinstance(module, nn.Linear) or attribute != "weight":
            return "", f"{type(module).__name__}.{attribute} is not a linear's weight"
        return semi_structured.choose(self.hardware, encoding, module.weight.dtype, self.backend)

    def assign(self, stored: str, names: dict[str, str]) -> list[str]:
        """Fills the parameter or buffer of a stored tensor. Returns its name."""
        if stored not in names:
            return []
        name = names[stored]
        module_name, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(module_name)
        target = getattr(module, attribute)
        encoding = self.checkpoint.encodings[stored]
        if tuple(target.shape) != encoding.shape:
            raise FormatError(
                self.checkpoint.path, f"shape is {list(encoding.shape)} (expected {list(target.shape)})", stored
            )
        backend, why = self.decide(stored, name)
        self.report.encodings[name] = encoding.name
        if why:
            self.report.dense[name] = why
        if backend:
            self.report.sparse[name] = backend
            value = self.semi_structured(stored, backend, target.dtype)
        else:
            value = self.checkpoint.dense(stored).to(self.hardware.device, target.dtype)
        if attribute in module._buffers:
            module._buffers[attribute] = value
        else:
            module._parameters[attribute] = nn.Parameter(value, requires_grad=not backend and value.is_floating_point())
        return [name]

    def semi_structured(self, stored: str, backend: str, dtype: torch.dtype) -> torch.Tensor:
        parts = self.checkpoint.components(stored)
        encoding = self.checkpoint.encodings[stored]
        try:
            return semi_structured.build(backend, encoding, parts, self.hardware.device, dtype)
        except MalformedError as wrong:
            raise FormatError(self.checkpoint.path, str(wrong), stored) from None
