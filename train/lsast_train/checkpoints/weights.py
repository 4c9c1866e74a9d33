"""Weights on disk: read as views of their files, turned into networks, hashed and written, one network at a time."""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lsast_engines.bundle.safetensors_header import encode_header
from lsast_engines.errors import TrainingError, fault_list, shape_faults
from lsast_engines.files import replace_file

from .safe_unpickle import load_pickle, refusals

_CODES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of element types in the header of a safetensors file."""

OpenTensors = Callable[[], Mapping[str, torch.Tensor]]
"""Opens the tensors of a network by name."""


@dataclass(frozen=True, eq=False)
class Weights:
    """A network that is not built yet; its tensors are still in their file."""

    what: str
    """Its name in messages."""
    config: Mapping[str, Any]
    """As diffusers or transformers know it."""
    make: Callable[[], nn.Module]
    """Builds it; see `on_meta`."""
    tensors: Mapping[str, torch.Tensor]
    """By their names in the network."""

    def named(self) -> dict[str, torch.Tensor]:
        """Its tensors by names that do not depend on the version of a library."""
        return {key.removeprefix("text_model."): value for key, value in self.tensors.items()}

    def on_meta(self) -> Any:
        """The network on torch's meta device: shapes without memory, weights not loaded."""
        with torch.device("meta"):
            return self.make()

    def faults(self, network: nn.Module | None = None) -> list[str]:
        """Tensors that are missing, of another shape, or not expected in `network`, or in that of `on_meta`."""
        expected = (network or self.on_meta()).state_dict()
        found, wanted = ({key: x.shape for key, x in tensors.items()} for tensors in (self.tensors, expected))
        return shape_faults(found, wanted)

    def build(self, dtype: torch.dtype = torch.float32) -> Any:
        """The network in `dtype`, frozen, in evaluation mode; tensors that are of it already stay views of their file.

        `TrainingError` for weights that do not fit, or that are not finite.
        """
        network = self.on_meta()
        if faults := self.faults(network):
            heading = f"the weights of {self.what} do not fit its architecture:"
            raise TrainingError(fault_list(heading, truncate(faults)))
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.tensors.items()}
        if infinite := [f"{key}: NaN or infinite" for key, value in state.items() if not torch.isfinite(value).all()]:
            raise TrainingError(fault_list(f"found weights of {self.what} that are no numbers:", truncate(infinite)))
        network.load_state_dict(state, assign=True)
        return network.eval().requires_grad_(False)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or of a pickled state dict, as views of the file.

    The content says which of the two a file is, not its ending. The tensors are on the CPU, whatever ``torch.device``
    context the caller is in.

    Raises:
        TrainingError: no such file, neither of the two, damaged, or a pickle that holds more than a state dict.
    """
    if not path.exists():
        raise TrainingError(f"found no file {path}")
    if not path.is_file():  # a pipe would be waited for
        raise TrainingError(f"{path} cannot be read (it is no file); expected a file of weights")
    if path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise TrainingError(f"{path} is a pointer of Git LFS; expected the file itself: run git lfs pull there")
    kind = weights_format(path)
    if kind is None:
        raise TrainingError(
            f"{path} cannot be read (it is neither safetensors nor a file of torch.save, or is damaged); expected "
            "weights: get the file again"
        )
    return _read_pickled(path) if kind == "pickle" else _read_safetensors(path)[0]


def weights_format(path: Path) -> Literal["safetensors", "pickle"] | None:
    """The format of a file of weights, by its first bytes; None for another file, or one that cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError:
        return None
    # Eight bytes of a safetensors file are the length of its header, a JSON object.
    if head[8:] == b"{":
        return "safetensors"
    # A ZIP archive; before PyTorch 1.6 a pickle of protocol 2.
    return "pickle" if head.startswith((b"PK", b"\x80")) else None


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file, none of another file; `TrainingError` for a damaged one."""
    return _read_safetensors(path)[1] if weights_format(path) == "safetensors" else {}


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with path.open("rb"), safe_open(str(path), "pt", device="cpu") as file:  # it calls an unreadable one missing
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            return tensors, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} cannot be read ({error}); get the file again") from error


_TRAINING_STATE = ("argparse", "lightning", "lightning_fabric", "numpy", "omegaconf", "pathlib", "pytorch_lightning")
"""Packages whose objects PyTorch Lightning stores beside the weights, as in ``v1-5-pruned.ckpt``."""

_NESTED = {"string_to_param": "a textual inversion", "ip_adapter": "an IP-Adapter"}
"""What keeps its tensors in dictionaries under such a key."""


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a state dict that ``torch.save`` wrote; those under ``state_dict`` if the file has such a key."""
    wanted = "tensors, numbers and texts only: convert it to safetensors, or take the .safetensors"
    with refusals(path, wanted):
        content = load_pickle(path, lambda name: name.partition(".")[0] in _TRAINING_STATE)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise TrainingError(f"{path} holds a {type(content).__name__}; expected tensors by name (a state dict)")
    tensors = {
        key: value.data
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor)
        if value.layout is torch.strided and value.device.type == "cpu"
    }
    if not tensors:
        kind = next((kind for key, kind in _NESTED.items() if key in content), "no tensors")
        raise TrainingError(f"{path} holds {kind}; expected a state dict")
    return tensors


def tensors_sha256(networks: Mapping[str, OpenTensors]) -> str:
    """SHA-256 over the floating tensors of several networks, in the order of their names.

    Each counts with the name ``NETWORK.KEY``, its shape and its values as float32, so that format and precision of
    equal values do not matter. One network is open at a time.
    """
    digest = hashlib.sha256()
    for network, tensors in sorted(networks.items()):
        for key, value in sorted(tensors().items()):
            if value.is_floating_point():
                digest.update(f"{network}.{key} {list(value.shape)}\n".encode())
                digest.update(value.detach().float().contiguous().reshape(-1).numpy().data)
    return digest.hexdigest()


def write_tensors(path: Path, networks: Mapping[str, OpenTensors], dtype: torch.dtype) -> str:
    """Write the tensors of several networks into one safetensors file, whole; returns the file's SHA-256.

    Args:
        networks: opens the tensors of each network; called again for every pass, and held only while they are written.
            A tensor is named ``NETWORK.KEY``, under the empty name just ``KEY``.
        dtype: floating tensors are stored in it; one at a time is converted.
    """
    plan = [
        (network, key, dtype if value.is_floating_point() else value.dtype, tuple(value.shape))
        for network, opened in networks.items()
        for key, value in opened().items()
    ]
    names = {entry: f"{entry[0]}.{entry[1]}".removeprefix(".") for entry in plan}
    # As safetensors itself sorts them: wide elements first, so that every tensor is aligned.
    plan.sort(key=lambda entry: (-entry[2].itemsize, names[entry]))
    header = encode_header(
        (names[entry], _CODES[entry[2]], entry[3], math.prod(entry[3]) * entry[2].itemsize) for entry in plan
    )
    digest = hashlib.sha256(header)
    with replace_file(path) as handle:
        handle.write(header)
        for network, entries in itertools.groupby(plan, key=lambda entry: entry[0]):
            tensors = networks[network]()
            for _, key, stored, _ in entries:
                value = tensors[key].detach().to("cpu", stored).contiguous()
                data = value.reshape(-1).view(torch.uint8).numpy().data
                digest.update(data)
                handle.write(data)
            del tensors
    return digest.hexdigest()


def truncate(faults: Iterable[str], limit: int = 20) -> list[str]:
    """The first `limit` faults, and the number of the others: a wrong file has hundreds."""
    faults = list(faults)
    return faults if len(faults) <= limit else [*faults[:limit], f"… and {len(faults) - limit} more"]
