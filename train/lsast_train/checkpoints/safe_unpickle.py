"""Tensors out of PyTorch's pickled files (``.ckpt``, ``.pth``, ``.pt``, ``.bin``) without running what is in them.

A pickle is a program: unpickling the usual way calls whatever the file names. Here it may name only what rebuilds
tensors and plain containers, each replaced by a function of ours; nothing that a file names is ever imported. A file
that names anything else is refused before its first instruction runs, or, where the name is only put together while
it runs, at that point, when nothing but containers and tensors has been made.
"""

from __future__ import annotations

import io
import logging
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from lsast_engines.errors import TrainingError, fault_list

from .torch_archive import Archive, Refused

_STORAGES: dict[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""Typed storages that torch.save names, all in the module ``torch``."""

_INERT = frozenset(
    {
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("_codecs", "encode"),
    }
)
"""Names in the training state that PyTorch Lightning stores beside the weights. They become `_Nothing`."""

_REFUSED_OPCODES = frozenset({"EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEXT_BUFFER", "READONLY_BUFFER"})
"""Instructions that torch.save never writes. Extension codes are looked up in a cache past any check of names."""

_log = logging.getLogger("lsast.restricted")


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name; those under a key ``state_dict`` if it has one.

    Tensors are views of the file, read when they are used. What is no tensor is passed over.

    Raises:
        TrainingError: no such file, no PyTorch archive, one that names anything but tensors and containers, or
            damaged; nothing of it has run.
    """
    content = _unpickle(path, modules=False)
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise TrainingError(f"{path} holds {type(content).__name__}; expected tensors by name (a state_dict)")
    tensors = {
        key: value.tensor for key, value in content.items() if isinstance(key, str) and isinstance(value, _Value)
    }
    if not tensors:
        raise TrainingError(f"{path} holds no tensors; expected a checkpoint with a state_dict")
    if left := sorted(str(key) for key in content.keys() - tensors.keys()):
        _log.debug("%s: passed over what is no tensor: %s", path, ", ".join(left))
    return tensors


def load_module_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that holds whole modules, such as the released ``embeddings_gs-99999.pt``.

    Modules of ``torch.nn`` and ``ldm`` are replaced by inert objects that keep their state; their parameters and
    buffers are named as in a state_dict, e.g. ``attention.attn1.to_q.weight`` for the module under ``attention``.

    Raises:
        TrainingError: as `load_tensors`.
    """
    content = _unpickle(path, modules=True)
    if isinstance(content, _Module):
        content = {"": content}
    if not isinstance(content, dict):
        raise TrainingError(f"{path} holds {type(content).__name__}; expected modules or tensors by name")
    for name, value in content.items():
        if isinstance(value, _Module) and value.state.get("training") is True:
            _log.info(
                "%s: %r was stored in training mode, in which the released code runs it with dropout; "
                "here it is used without",
                path,
                name,
            )
    tensors = dict(_flatten(content, "", path))
    if not tensors:
        raise TrainingError(f"{path} holds no tensors; expected a module's parameters")
    return tensors


class _Sealed:
    """An object of ours that a pickle may hold but not change."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> NoReturn:
        raise Refused("a state set on what has none")


class _Allowed(_Sealed):
    """A function of ours in the place of one that the file names."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class _Nothing:
    """What is of no interest: takes any arguments and any state, keeps none."""

    __slots__ = ()

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _NoCalls(type):
    """Instances of such a class come from NEWOBJ alone, as modules are pickled; calling the class is refused."""

    def __call__(cls, *_: Any, **__: Any) -> NoReturn:
        raise Refused(f"a call of {cls.__doc__}")


class _Module(metaclass=_NoCalls):
    """A module: its state and nothing else."""

    __slots__ = ("state",)

    def __new__(cls, *arguments: Any) -> _Module:
        if arguments:
            raise Refused(f"arguments for {cls.__doc__}")
        module = object.__new__(cls)
        module.state = {}
        return module

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise Refused(f"a state of {type(self).__doc__} that is no dictionary")
        self.state = state

    state: dict[Any, Any]


class _StorageType(_Sealed):
    """A typed storage as the file names it."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Storage(_Sealed):
    """The bytes of a storage, and what they are."""

    __slots__ = ("data", "dtype")

    def __init__(self, data: torch.UntypedStorage, dtype: torch.dtype) -> None:
        self.data = data
        self.dtype = dtype


class _Value(_Sealed):
    """A tensor, out of reach: a tensor itself has a __setstate__, and can be written to."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class _Unpickler(pickle.Unpickler):
    """An unpickler that knows nothing but what is named here."""

    def __init__(self, archive: Archive, modules: bool) -> None:
        super().__init__(io.BytesIO(archive.pickle), encoding="utf-8")
        self._archive = archive
        self._modules = modules

    def find_class(self, module: str, name: str) -> Any:
        return _resolve(module, name, self._modules)

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[2], str):
            raise Refused(f"a reference {str(pid)[:60]!r} that is no storage")
        if not isinstance(pid[1], _StorageType):
            raise Refused(f"a storage {pid[2]!r} of no known type")
        return _Storage(self._archive.storage(pid[2]), pid[1].dtype)


def _resolve(module: str, name: str, modules: bool) -> Any:
    """What stands in for the global `name` of `module`."""
    if module == "torch" and name in _STORAGES:
        return _StorageType(_STORAGES[name])
    if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
        return dtype
    if (module, name) in _INERT:
        return _Allowed(_Nothing)
    if function := _FUNCTIONS.get((module, name)):
        return _Allowed(function)
    if modules and module.split(".")[0] in ("torch", "ldm") and (module + ".").startswith(("torch.nn.", "ldm.")):
        # A class of its own for each, so that the error can name it and nothing outlives this file.
        return _NoCalls("_Module", (_Module,), {"__slots__": (), "__doc__": f"{module}.{name}"})
    raise Refused(f"{module}.{name}")


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Value:
    """The tensor that torch._utils._rebuild_tensor_v2 would give, with its bounds checked."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or len(size) != len(stride):
        raise Refused("a tensor without a storage, or of unlike size and stride")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise Refused(f"a tensor of size {size}, stride {stride} and offset {offset}")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    count = storage.data.nbytes() // storage.dtype.itemsize
    if 0 not in size and last >= count:
        raise Refused(f"a tensor that reads value {last} of a storage of {count}")
    flat = torch.empty(0, dtype=storage.dtype)
    return _Value(flat.reshape(size) if 0 in size else flat.set_(storage.data, offset, tuple(size), tuple(stride)))


def _rebuild_parameter(data: Any, *_: Any) -> _Value:
    if not isinstance(data, _Value):
        raise Refused(f"a parameter of {type(data).__name__}")
    return data


def _ordered(items: Any = ()) -> dict[Any, Any]:
    return _State(items)


class _State(OrderedDict[Any, Any]):
    """An ordered dictionary; of the attributes that state_dict gives it (``_metadata``) none is kept."""

    def __setstate__(self, state: Any) -> None: ...


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
}
"""What a file may call, and what is called in its place."""


def _unpickle(path: Path, modules: bool) -> Any:
    try:
        if not path.is_file():
            raise TrainingError(f"found no file {path}")
        if not zipfile.is_zipfile(path):
            raise TrainingError(
                f"{path} is no archive of torch.save in the format that PyTorch writes since 1.6; if you trust it, "
                "load and save it again with a newer PyTorch, or get it as .safetensors"
            )
        archive = Archive(path)
        _check_instructions(archive.pickle, modules)
        return _Unpickler(archive, modules).load()
    except Refused as error:
        raise TrainingError(
            fault_list(f"{path} is refused, nothing of it was run; found:", str(error).split("\n"))
            + "\nexpected tensors, numbers, texts and plain containers; get the weights as .safetensors"
        ) from None
    # A malformed pickle can fail in the unpickler in any of these ways.
    except (
        *(pickle.UnpicklingError, zipfile.BadZipFile, OSError, EOFError, ValueError, TypeError, AttributeError),
        *(KeyError, IndexError, OverflowError, MemoryError, RecursionError, RuntimeError, NotImplementedError),
    ) as error:
        raise TrainingError(f"{path} cannot be read ({type(error).__name__}: {error}); get the file again") from error


def _check_instructions(data: bytes, modules: bool) -> None:
    """Refuse the file for instructions and names that are not allowed, all at once, before any of it runs."""
    faults = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _REFUSED_OPCODES:
            faults.append(f"the instruction {opcode.name}" + ("" if argument is None else f" {argument}"))
        elif opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            try:
                _resolve(module, name, modules)
            except Refused as refusal:
                faults.append(str(refusal))
    if faults:
        raise Refused("\n".join(dict.fromkeys(faults)))


def _flatten(value: Any, name: str, path: Path, depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under `value`, named as in a state_dict."""
    if depth > 50:
        raise TrainingError(f"{path} nests modules more than 50 deep at {name!r}; expected a tree")
    if isinstance(value, _Value):
        yield name, value.tensor
        return
    children: dict[Any, Any] = {}
    if isinstance(value, _Module):
        for kind in ("_parameters", "_buffers", "_modules"):
            children |= _mapping(value.state.get(kind, {}), name, path)
    elif isinstance(value, Mapping):
        children = dict(value)
    for key, child in children.items():
        yield from _flatten(child, f"{name}.{key}" if name else str(key), path, depth + 1)


def _mapping(value: Any, name: str, path: Path) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise TrainingError(f"{path}: the module {name!r} has a {type(value).__name__}; expected its parts by name")
    return value
