"""Checkpoints of the released code: ``embeddings_gs-99999.pt``, a pickled generator and its constant input.

The pickle is not executed: its tensors are read by name (`lsast_train.checkpoints.safe_unpickle`). Only the generator's
output is kept, without dropout: the released script leaves it on by mistake (docs/method.md §8.5).
"""

import logging
from pathlib import Path

import torch

from lsast_engines.errors import StyleError, fault_list, shape_faults
from lsast_engines.files import file_sha256
from lsast_train.base.lazy_base import LazyBase
from lsast_train.base.projection import GROUPS
from lsast_train.checkpoints.safe_unpickle import load_module_tensors
from lsast_train.prompts.matrix_index import matrix_index
from lsast_train.prompts.prompt_file import Prompts
from lsast_train.prompts.released_generator import HEADS, GegluGenerator
from lsast_train.prompts.text_encoder import PlaceholderEncoder

_CONSTANT = "initial_embeddings"
_MODULE = "attention."
_log = logging.getLogger("lsast.export")


def read_released(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a checkpoint of the released code; nothing in it is run.

    Returns:
        The generator's output without dropout, [3 · stages, 1, dim] float32, of which a base reads stages + 2 rows; and
        what the generator starts from, [dim]: a row of the token embedding of the text encoder it was trained with.

    Raises:
        TrainingError: no such file, no PyTorch archive, or one that holds more than tensors and modules.
        StyleError: tensors that are not those of the released generator; all faults at once.
    """
    tensors = load_module_tensors(path)
    generator = _generator(tensors, path)
    with torch.no_grad():
        embeddings = generator()
    if not torch.isfinite(embeddings).all():
        raise StyleError(f"{path} gives prompts that are NaN or infinite; expected a checkpoint of a sound training")
    return embeddings, generator.constant


def import_prompts(path: Path, base: LazyBase, name: str | None = None) -> Prompts:
    """The prompts in a released checkpoint, as the text encoder of `base` resolves them.

    Args:
        name: of the style; the file's name without its ending, if None.

    Raises:
        TrainingError, StyleError: as `read_released`; a base without a text encoder.
        UsageError: a text encoder of another size.
    """
    if "text_encoder" not in base.networks:
        raise StyleError(
            f"the embeddings in {path} need a text encoder; found base {base.config.name!r} without one (no bundle has "
            "one): name the --base that the bundle was exported from"
        )
    embeddings, constant = read_released(path)
    text = PlaceholderEncoder(base.load("text_encoder"))
    used, where = matrix_index("step+layer", "overlap", len(embeddings) // len(GROUPS)).unique(return_inverse=True)
    with torch.no_grad():
        prompts = text.contexts(embeddings[used])[where]
    if not torch.allclose(text.token_embedding(), constant, rtol=1e-2, atol=1e-4):
        _log.warning(
            "%s started from another word embedding than that of base %r: it was trained with another text encoder",
            path,
            base.config.name,
        )
    meta = {"imported_from": path.name, "imported_sha256": file_sha256(path)}
    name = name or path.stem
    return Prompts(name, base.fingerprint, "step+layer", "geglu", "overlap", "decoder", prompts, meta, embeddings)


def _generator(tensors: dict[str, torch.Tensor], path: Path) -> GegluGenerator:
    """The generator with the weights `tensors`; sizes are read from them."""
    state = {key.removeprefix(_MODULE): value for key, value in tensors.items() if key.startswith(_MODULE)}
    faults = [f"{key}: not expected" for key in tensors if not key.startswith(_MODULE) and key != _CONSTANT]
    for key in ("attn1.to_q.weight", "ff.net.2.weight"):
        if key not in state or state[key].ndim != 2:
            faults.append(f"{_MODULE}{key}: found {_shape(state.get(key))}; expected a matrix")
    constant = tensors.get(_CONSTANT)
    if constant is None or constant.ndim != 2 or len(constant) != 1:
        faults.append(f"{_CONSTANT}: found {_shape(constant)}; expected [1, dim]")
    if faults or constant is None:
        raise StyleError(_not_released(path, faults))
    dim, inner, (out, hidden) = constant.shape[1], len(state["attn1.to_q.weight"]), state["ff.net.2.weight"].shape
    count, rest = divmod(out, dim)
    if rest or not count or count % len(GROUPS):
        faults.append(f"{_MODULE}ff.net.2.weight: found {out} rows; expected {len(GROUPS)} · stages · {dim}")
    if not inner or inner % HEADS:
        faults.append(f"{_MODULE}attn1.to_q.weight: found {inner} rows; expected a multiple of {HEADS}")
    if faults:
        raise StyleError(_not_released(path, faults))
    generator = GegluGenerator(constant[0], count, inner=inner, hidden=hidden)
    state["constant"] = constant[0]
    shapes = ({key: value.shape for key, value in tensors.items()} for tensors in (state, generator.state_dict()))
    faults += [f"{_MODULE}{fault}" for fault in shape_faults(*shapes)]
    if faults:
        raise StyleError(_not_released(path, sorted(faults)))
    generator.load_state_dict({key: value.float() for key, value in state.items()})
    return generator


def _shape(tensor: torch.Tensor | None) -> str:
    return "nothing" if tensor is None else str(list(tensor.shape))


def _not_released(path: Path, faults: list[str]) -> str:
    return fault_list(f"{path} is not a checkpoint of the released LSAST:", faults)
