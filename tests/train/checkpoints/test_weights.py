"""Files of weights: what is in them comes out as views, wherever the caller builds networks."""

import hashlib
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from lsast_engines.errors import TrainingError
from lsast_train.checkpoints.weights import read_tensors, write_tensors


def _tensors() -> dict[str, torch.Tensor]:
    shared = torch.arange(12.0)
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)
    return {
        "transposed": shared.view(3, 4).T,
        "part": shared[3:7],
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
        **{str(dtype): torch.ones(3, dtype=dtype) for dtype in dtypes},
    }


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a"])
@pytest.mark.parametrize("form", ["safetensors", "archive", "before PyTorch 1.6"])
def test_read_tensors_gives_what_was_saved_whatever_the_ending(tmp_path, form, name):
    tensors, path = _tensors(), tmp_path / name
    if form == "safetensors":
        save_file({key: value.detach().clone().contiguous() for key, value in tensors.items()}, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "archive")
    with torch.device("meta"):
        found = read_tensors(path)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].device.type, found[name].requires_grad) == (value.dtype, "cpu", False)
        assert torch.equal(found[name], value)


def test_read_tensors_takes_the_state_dict_out_of_a_training_checkpoint(tmp_path):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    inner = {"epoch": 7, "state_dict": module.state_dict(), "hyper": {"betas": (0.9, 0.999), "x": None}}
    extras = {"score": np.float64(1.5), "values": np.ones(2), "hparams": Namespace(lr=1.0), "path": Path("x")}
    torch.save({**inner, "sizes": torch.Size([1, 2]), **extras}, tmp_path / "a.ckpt")
    found = read_tensors(tmp_path / "a.ckpt")
    assert found.keys() == module.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in module.state_dict().items())


def test_read_tensors_ignores_the_callbacks_of_lightning(tmp_path):
    """As in the published v1-5-pruned.ckpt, whose callbacks are keyed by a class of PyTorch Lightning."""
    path, changed = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    # A name of the same length as the class's, replaced in the file.
    torch.save({"callbacks": {OrderedDict: {"best": 1}}, "state_dict": {"w": torch.ones(2)}}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(changed, "w") as target:
        for name in source.namelist():
            data = source.read(name).replace(
                b"ccollections\nOrderedDict\n", b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
            )
            target.writestr(name, data)
    assert torch.equal(read_tensors(changed)["w"], torch.ones(2))


def test_read_tensors_of_a_lazy_name_imports_nothing(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name, data in (("data.pkl", b"\x80\x02ctorch\n_inductor\n."), ("version", b"3\n"), ("data/0", bytes(8))):
            archive.writestr(f"archive/{name}", data)
    before = "torch._inductor" in sys.modules
    with pytest.raises(TrainingError, match=r"found torch\._inductor"):
        read_tensors(tmp_path / "a.pt")
    assert ("torch._inductor" in sys.modules) == before


OTHERS: dict[str, Any] = {
    "holds a list; expected tensors by name": [torch.ones(2)],
    "holds no tensors": {"a": 1},
    "holds a textual inversion": {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(1, 768)}},
    "holds an IP-Adapter": {"image_proj": {"a": torch.ones(2)}, "ip_adapter": {"b": torch.ones(2)}},
    r"found torch\.nn\.modules\.linear\.Linear; .* convert it to safetensors, or take the": {"a": nn.Linear(2, 2)},
    "pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1",
    r"neither safetensors nor a file of torch\.save": b"<!DOCTYPE html>",
}
"""What other files hold, by the messages."""


def test_read_tensors_of_other_files_says_what_was_found(tmp_path):
    for message, content in OTHERS.items():
        if isinstance(content, bytes):
            (tmp_path / "other").write_bytes(content)
        else:
            torch.save(content, tmp_path / "other")
        with pytest.raises(TrainingError, match=message):
            read_tensors(tmp_path / "other")
    torch.save({"a": torch.ones(2000)}, tmp_path / "whole.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:4000])
    with pytest.raises(TrainingError, match=r"cut\.ckpt cannot be read .*; get the file again"):
        read_tensors(tmp_path / "cut.ckpt")


def test_write_tensors_gives_the_bytes_of_the_safetensors_library(tmp_path):
    a = {"x": torch.randn(3, 5), "n": torch.arange(4), "e": torch.zeros(0, 2)}
    b = {"s": torch.tensor(2.5), "w": torch.randn(4, 6).T}
    digest = write_tensors(tmp_path / "f", {"b": lambda: b, "a": lambda: a, "": lambda: {"top": a["x"]}}, torch.float16)
    named = {**{f"a.{k}": v for k, v in a.items()}, **{f"b.{k}": v for k, v in b.items()}, "top": a["x"]}
    data = save({k: v.half().contiguous() if v.is_floating_point() else v for k, v in named.items()})
    assert (tmp_path / "f").read_bytes() == data
    assert digest == hashlib.sha256(data).hexdigest()
