"""PyTorch's pickled files, parsed and never run.

A pickle is a program: unpickling calls whatever the file names. `parse_pickle` reads the same instructions, but what
the file names or calls only becomes a record of the name and the arguments (`Global`, `Call`). Nothing is imported, and
time and memory are bounded by the size of the file.

`load_module_tensors` reads files that hold whole modules, such as the released ``embeddings_gs-99999.pt``, which
``torch.load(weights_only=True)`` refuses. State dicts are read by torch (`lsast_train.checkpoints.weights`), after
`check_pickle`: torch runs nothing of a file either, but a few bytes can keep it busy for hours.
"""

from __future__ import annotations

import io
import logging
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO

import torch

from lsast_engines.errors import TrainingError

MAX_PICKLE = 64 << 20
"""Largest ``data.pkl`` that is read, in bytes; the tensors lie beside it."""

MAX_ITEMS = 10_000
"""Most items of a tuple, those of the tuples in it counted each time: a shared tuple can stand for 2**60 items."""

_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
}
_OLD_PICKLES = 5
"""Pickles at the head of a file from before PyTorch 1.6: magic number, version, system, content, names of storages."""

_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING")
_NEW: dict[str, Callable[[], Any]] = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
                                      "EMPTY_DICT": dict, "EMPTY_LIST": list}  # fmt: skip
_TAKEN = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None,
          "APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None}  # fmt: skip
"""Items that an instruction takes from the stack; None for all above the mark."""

_log = logging.getLogger("lsast.train")


class UnsafePickleError(Exception):
    """A pickle with instructions that torch.save does not write."""


@dataclass(frozen=True, eq=False)
class Global:
    """A name in a pickle, such as ``collections.OrderedDict``."""

    name: str


@dataclass(eq=False)
class Call:
    """A call in a pickle, never made."""

    name: str
    """What is called; ``storage`` for a reference to the values of a tensor."""
    arguments: tuple[Any, ...]
    state: Any = None
    """What the file would set on the result."""
    items: dict[Any, Any] = field(default_factory=dict)
    """What the file would put into the result, a mapping."""


class _Tuple(tuple[Any, ...]):
    """A tuple that knows how many items it stands for."""

    weight: int


def parse_pickle(stream: BinaryIO, names: set[str] | None = None) -> Any:
    """The content of a pickle as plain values, `Global` and `Call`; `stream` is left behind its end.

    Args:
        stream: the pickle.
        names: gets what it names, such as ``collections.OrderedDict``.

    Raises:
        UnsafePickleError: an instruction that torch.save does not write, or values that it does not write there.
        ValueError, IndexError, KeyError: the pickle is damaged.
    """
    stack: list[Any] = []
    outer: list[list[Any]] = []
    memo: dict[Any, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in _LITERALS:
            stack.append(argument)
        elif name in _NEW:
            stack.append(_NEW[name]())
        elif name == "MARK":
            outer.append(stack)
            stack = []
        elif name in _TAKEN:
            if (count := _TAKEN[name]) is None:
                items, stack = stack, outer.pop()
            else:
                items = [stack.pop() for _ in range(count)][::-1]
            if "TUPLE" in name:
                stack.append(_tuple(items))
            else:
                (_extend if "APPEND" in name else _set_items)(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(Global(argument.replace(" ", ".")))
            if names is not None:
                names.add(stack[-1].name)
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            _require(isinstance(function, Global) and isinstance(arguments, tuple), "a call of", function)
            stack.append(Call(function.name, arguments))
        elif name == "BUILD":
            state = stack.pop()
            _require(isinstance(stack[-1], Call), "a state for", stack[-1])
            stack[-1].state = state
        elif name == "BINPERSID":
            reference = stack.pop()
            plain = isinstance(reference, tuple) and all(isinstance(i, (str, int, Global, NoneType)) for i in reference)
            _require(plain, "a reference to", reference)
            stack.append(Call("storage", reference))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            raise UnsafePickleError(f"the instruction {name}")


def check_pickle(path: Path) -> set[str]:
    """Refuse a pickled file whose unpickling would take time or memory out of proportion to its size.

    Returns:
        What the file names, such as ``collections.OrderedDict``.

    Raises:
        UnsafePickleError: such a file, or one that torch.save did not write.
        OSError, ValueError, IndexError, KeyError, zipfile.BadZipFile: the file is damaged.
    """
    names: set[str] = set()
    with path.open("rb") as stream:
        archived = stream.read(2) == b"PK"
        stream.seek(0)
        if archived:
            with zipfile.ZipFile(stream) as archive:
                parse_pickle(io.BytesIO(archive.read(_pickle_entry(archive))), names)
        else:
            for _ in range(_OLD_PICKLES):
                parse_pickle(stream, names)
    return names


def load_module_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that holds whole modules, such as the released ``embeddings_gs-99999.pt``.

    Parameters and buffers are named as in a state dict, e.g. ``attention.attn1.to_q.weight`` for the module under
    ``attention``.

    Raises:
        TrainingError: no such file, no archive of torch.save, damaged, or content other than modules and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive, torch.device("cpu"):
            entry = _pickle_entry(archive)
            root = entry.filename.removesuffix("data.pkl")
            if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
                raise UnsafePickleError("tensors in big-endian order")
            storages: dict[str, bytearray] = {}

            def read(key: str) -> bytearray:
                if key not in storages:
                    storages[key] = bytearray(archive.read(_stored(archive.getinfo(f"{root}data/{key}"))))
                return storages[key]

            content = parse_pickle(io.BytesIO(archive.read(entry)))
            tensors = dict(_flatten(content, "", read, set()))
    except FileNotFoundError:
        raise TrainingError(f"found no file {path}") from None
    except UnsafePickleError as error:
        raise TrainingError(
            f"{path} is refused, nothing of it was run: found {error}; expected modules and tensors from torch.save"
        ) from None
    # What a damaged file can raise in the parser, in the archive and in torch.
    except (OSError, EOFError, ValueError, TypeError, LookupError, RuntimeError, zipfile.BadZipFile) as error:
        raise TrainingError(f"{path} cannot be read ({type(error).__name__}: {error}); get the file again") from error
    if not tensors:
        raise TrainingError(f"{path} holds no tensors; expected a module's parameters")
    return tensors


def _require(condition: bool, what: str, found: Any) -> None:
    if not condition:
        raise UnsafePickleError(f"{what} a {type(found).__name__}")


def _tuple(items: list[Any]) -> _Tuple:
    made = _Tuple(items)
    made.weight = 1 + sum(item.weight if isinstance(item, _Tuple) else 1 for item in items)
    if made.weight > MAX_ITEMS:
        raise UnsafePickleError(f"a tuple of more than {MAX_ITEMS} items")
    return made


def _extend(target: Any, items: list[Any]) -> None:
    _require(isinstance(target, list), "items for", target)
    target.extend(items)


def _set_items(target: Any, items: list[Any]) -> None:
    target = target.items if isinstance(target, Call) else target
    _require(isinstance(target, dict), "items for", target)
    for key, value in zip(items[::2], items[1::2], strict=True):
        _require(isinstance(key, (str, int, float, Global, NoneType)), "a key that is", key)
        target[key] = value


def _stored(entry: zipfile.ZipInfo) -> zipfile.ZipInfo:
    if entry.compress_type != zipfile.ZIP_STORED:
        raise UnsafePickleError(f"the entry {entry.filename!r} compressed")
    return entry


def _pickle_entry(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    entries = [entry for entry in archive.infolist() if entry.filename.rpartition("/")[2] == "data.pkl"]
    if len(entries) != 1 or entries[0].file_size > MAX_PICKLE:
        raise UnsafePickleError(f"{len(entries)} entries data.pkl, or one of more than {MAX_PICKLE} bytes")
    return _stored(entries[0])


def _flatten(
    value: Any, name: str, read: Callable[[str], bytearray], seen: set[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under `value`, named as in a state dict; every container is visited once."""
    children: dict[Any, Any] = {}
    if isinstance(value, dict):
        children = value
    elif not isinstance(value, Call):
        return
    elif value.name == "collections.OrderedDict":
        children = value.items
    elif value.name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
        yield name, _tensor(read, *value.arguments[:4])
    elif value.name == "torch._utils._rebuild_parameter":
        yield from _flatten(value.arguments[0], name, read, seen)
    elif isinstance(value.state, dict) and "_parameters" in value.state:
        if value.state.get("training") is True and "." not in name:
            _log.info("%r was stored in training mode; it is used without dropout", name)
        for kind in ("_parameters", "_buffers", "_modules"):
            part = value.state.get(kind, {})
            children |= part.items if isinstance(part, Call) else part
    else:
        raise UnsafePickleError(f"a call of {value.name!r}")
    if children and id(value) in seen:
        raise UnsafePickleError(f"the same container twice, at {name!r}")
    seen.add(id(value))
    for key, child in children.items():
        yield from _flatten(child, f"{name}.{key}" if name else str(key), read, seen)


def _tensor(read: Callable[[str], bytearray], storage: Call, offset: int, size: Any, stride: Any) -> torch.Tensor:
    """The tensor that ``torch._utils._rebuild_tensor_v2`` would give; torch checks that it lies in its storage."""
    _, kind, key, *_ = storage.arguments
    if kind.name not in _DTYPES or not all(type(number) is int for number in (offset, *size, *stride)):
        raise UnsafePickleError(f"a tensor of {kind.name}, or of sizes that are no numbers")
    data, dtype = read(key), _DTYPES[kind.name]
    values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    if math.prod(size) > len(values):
        raise UnsafePickleError("a tensor larger than its storage")
    return values.as_strided(size, stride, offset)
