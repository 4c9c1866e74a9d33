"""PyTorch's pickled files, read by torch's restricted unpickler, which runs and imports nothing that a file names.

What torch does not know by itself, such as a module, becomes a `Stub` that keeps its state. Before, `_check_pickle`
bounds time and memory by the size of the file: a few bytes can keep any unpickler busy for hours.
"""

from __future__ import annotations

import contextlib
import io
import logging
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch

from lsast_engines.errors import TrainingError

MAX_PICKLE = 64 << 20
"""Largest ``data.pkl`` that is read, in bytes; the tensors lie beside it."""

MAX_ITEMS = 10_000
"""Most items of a tuple, those of the tuples in it counted each time: a shared tuple can stand for 2**60 items. The
result of a call counts `_CALL` times what it is given: calls in calls, such as ``_codecs.encode``, can double a text
each time."""

_CALL = 10

_OLD_PICKLES = 5
"""Pickles at the head of a file from before PyTorch 1.6: magic number, version, system, content, names of storages."""

_ALLOCATES = ("__builtin__.bytearray", "builtins.bytearray")
"""What torch allows to be called, though it takes as much memory as a file asks for."""

_log = logging.getLogger("lsast.train")


class Stub:
    """Stands for an object in a file, and keeps its state. There is a class for each name."""

    state: Any = None

    def __new__(cls, *_: Any) -> Stub:
        """Take any arguments."""
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


def load_pickle(path: Path, stubbed: Callable[[str], bool]) -> Any:
    """The content of a file of ``torch.save``; tensors are on the CPU and views of the file. `refusals` translates its
    errors.

    `stubbed` says whether a name that torch does not know, such as ``argparse.Namespace``, may become a `Stub`.
    """
    stubs: list[Any] = [(type(name, (Stub,), {}), name) for name in _check_pickle(path) if stubbed(name)]
    with path.open("rb") as stream, torch.device("cpu"), torch.serialization.safe_globals(stubs):
        # Files from before PyTorch 1.6 cannot be mapped into memory, and torch goes by the ending of a path.
        mapped = _is_archive(stream) and path.suffix != ".safetensors"
        return torch.load(path if mapped else stream, map_location="cpu", weights_only=True, mmap=mapped)


@contextlib.contextmanager
def refusals(path: Path, expected: str) -> Iterator[None]:
    """Raise `TrainingError` for what `load_pickle` raises; `expected` is what the file should hold."""
    try:
        yield
    except UnpicklingError as error:
        told = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"Unpickler error:\s*(.+)", str(error))
        found = told[1] if told else str(error).split("\n")[0]
        message = f"{path} is refused, nothing of it was run: found {found}; expected {expected}"
        raise TrainingError(message) from None
    except FileNotFoundError:
        raise TrainingError(f"found no file {path}") from None
    # What a damaged file can raise in the parser, in the archive and in torch.
    except (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, RuntimeError,
            zipfile.BadZipFile) as error:  # fmt: skip
        first = str(error).split("\n")[0]
        raise TrainingError(f"{path} cannot be read ({type(error).__name__}: {first}); get the file again") from error


def load_module_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that holds whole modules, such as the released ``embeddings_gs-99999.pt``, named as in a
    state dict, e.g. ``attention.attn1.to_q.weight`` for the module under ``attention``.

    Raises:
        TrainingError: no such file, no file of torch.save, damaged, or content other than modules and tensors.
    """
    with refusals(path, "modules and tensors from torch.save"):
        tensors = dict(_flatten(load_pickle(path, lambda name: True), "", set()))
        # A file can also have tensors made that are not in it, of any size and any content.
        storages = {value.data_ptr(): value.untyped_storage().nbytes() for value in tensors.values()}
        if sum(storages.values()) > path.stat().st_size:
            raise UnpicklingError("tensors of more bytes than the file has")
    if not tensors:
        raise TrainingError(f"{path} holds no tensors; expected a module's parameters")
    return tensors


def _check_pickle(path: Path) -> set[str]:
    """Refuse a file whose unpickling would take time or memory out of proportion to its size; returns what it names,
    such as ``collections.OrderedDict``."""
    names: set[str] = set()
    with path.open("rb") as stream:
        if not _is_archive(stream):
            for _ in range(_OLD_PICKLES):
                _check_tuples(stream, names)
            return names
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
            if packed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
                raise UnpicklingError(f"the entry {packed[0]!r} compressed")
            pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
                raise UnpicklingError(f"{len(pickles)} entries data.pkl, or one of more than {MAX_PICKLE} bytes")
            _check_tuples(io.BytesIO(archive.read(pickles[0])), names)
    return names


def _is_archive(stream: BinaryIO) -> bool:
    """Whether torch reads a file as an archive. It asks the first bytes; `zipfile.is_zipfile` asks the last ones."""
    head = stream.read(2)
    stream.seek(0)
    return head == b"PK"


def _check_tuples(stream: BinaryIO, names: set[str]) -> None:
    """Refuse a pickle with a tuple of more than `MAX_ITEMS`; `stream` is left behind its end."""
    stack: list[int | None] = []  # how many items each value stands for; None is a mark
    memo: dict[Any, int | None] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        before = opcode.stack_before
        marked = pickletools.markobject in before
        items = []
        if marked:
            while (weight := stack.pop()) is not None:
                items.append(weight)
        items += [stack.pop() or 1 for _ in before[: before.index(pickletools.markobject) if marked else None]]
        if opcode.name == "GLOBAL":
            name = str(argument).replace(" ", ".")
            if name in _ALLOCATES:
                raise UnpicklingError(name)
            names.add(name)
        if "GET" in opcode.name:
            stack.append(memo[argument])
        elif "PUT" in opcode.name:
            memo[argument] = stack[-1]
        elif opcode.name == "MARK":
            stack.append(None)
        else:
            weight = 1 + sum(items) if "TUPLE" in opcode.name else 1
            if opcode.name in ("REDUCE", "NEWOBJ"):
                weight = _CALL * sum(items)
            if weight > MAX_ITEMS:
                raise UnpicklingError(f"a tuple of more than {MAX_ITEMS} items, or calls in calls")
            stack += [weight] * len(opcode.stack_after)


def _flatten(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under `value`, named as in a state dict; every container is visited once."""
    children: dict[Any, Any] = {}
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu" or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UnpicklingError("a tensor larger than its storage")
        yield name, value.detach()
    elif isinstance(value, dict):
        children = value
    elif isinstance(value, Stub):
        if not isinstance(value.state, dict) or "_parameters" not in value.state:
            raise UnpicklingError(f"a call of {type(value).__name__!r}")
        if value.state.get("training") is True and "." not in name:
            _log.info("%r was stored in training mode; it is used without dropout", name)
        for kind in ("_parameters", "_buffers", "_modules"):
            children |= value.state.get(kind, {})
    if children and id(value) in seen:
        raise UnpicklingError(f"the same container twice, at {name!r}")
    seen.add(id(value))
    for key, child in children.items():
        yield from _flatten(child, f"{name}.{key}" if name else str(key), seen)
