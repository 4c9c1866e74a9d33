"""ONNX Runtime's providers for NVIDIA GPUs: what each is called, told, and where it may keep what it compiles.

================= ================================ ==============================================================
device            provider                         comes with
================= ================================ ==============================================================
``cuda``          CUDAExecutionProvider            onnxruntime-gpu; needs CUDA and cuDNN
``tensorrt``      TensorrtExecutionProvider        onnxruntime-gpu; needs TensorRT besides; compiles on first use
``tensorrt-rtx``  NvTensorRTRTXExecutionProvider   onnxruntime-ep-nv-tensorrt-rtx, a plugin of any onnxruntime
================= ================================ ==============================================================

Written after the documentation and the options that the libraries declare; for want of a GPU none has run here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

from .engine_key import graph_digest
from .errors import BackendError
from .files import cache_home
from .profile import Profile, Ranges
from .spec import GraphSpec

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
"""ONNX Runtime's name of the provider, by device."""

PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
"""Python module that carries the provider of ``tensorrt-rtx``."""

_log = logging.getLogger("lsast.onnxruntime")


def gpu_devices(library: Any) -> list[str]:
    """The GPU devices that the ONNX Runtime `library` was built or has a plugin for; whether they start is open."""
    there = library.get_available_providers()
    found = [device for device in ("cuda", "tensorrt") if PROVIDERS[device] in there]
    plugin = importlib.util.find_spec(PLUGIN) is not None
    return [*found, "tensorrt-rtx"] if plugin or PROVIDERS["tensorrt-rtx"] in there else found


def session(library: Any, path: Path, spec: GraphSpec, device: str, options: Any, left_out: list[str]) -> Any:
    """An inference session of the graph file `path` on `device`; the caller checks where it really runs.

    Args:
        library: the module `onnxruntime`.
        path: the ONNX file.
        spec: its inputs and outputs.
        device: a key of `PROVIDERS`.
        options: ONNX Runtime's session options.
        left_out: optimisers to leave out.
    """
    name, told = PROVIDERS[device], provider_options(library, path, spec, device)
    if device == "tensorrt-rtx" and name not in library.get_available_providers():
        options.add_provider_for_devices(_plugin_devices(library, name), told)
        return library.InferenceSession(path, options, disabled_optimizers=left_out)
    return library.InferenceSession(path, options, providers=[(name, told)], disabled_optimizers=left_out)


def provider_options(library: Any, path: Path, spec: GraphSpec, device: str) -> dict[str, str]:
    """What the provider of `device` is told, ONNX Runtime's way: text by name."""
    if device not in ("tensorrt", "tensorrt-rtx"):
        # TF32 has the 10 bits of fp16: not what arithmetic fp32 promises.
        return {"use_tf32": "0"} if device == "cuda" else {}
    profile = Ranges().profile(spec)
    folder = str(cache_folder(str(library.__version__), path, profile, device))
    prefix = "trt" if device == "tensorrt" else "nv"
    told = {
        f"{prefix}_profile_{end}_shapes": _shapes(profile, index) for index, end in enumerate(("min", "opt", "max"))
    }
    if device == "tensorrt-rtx":
        return {**told, "nv_runtime_cache_path": folder}
    if not any(Path(folder).glob("*.engine")):
        _log.warning("TensorRT compiles graph %s when it first runs, for minutes; it is kept in %s", spec.name, folder)
    cache = {f"trt_{kind}_cache_{what}": value for kind in ("engine", "timing") for what, value in
             (("enable", "1"), ("path", folder))}  # fmt: skip
    return {**told, **cache}


def cache_folder(version: str, path: Path, profile: Profile, device: str) -> Path:
    """A folder for what a provider compiles of the graph file `path`; it is made, and shared with no other graph.

    ONNX Runtime looks into its cache by names of nodes and shapes, not of weights: the key is in the folder's name.
    """
    text = f"{version} {device} {graph_digest(path)} {sorted(profile.items())}"
    folder = cache_home() / "compiled" / f"onnxruntime-{device}" / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _shapes(profile: Profile, end: int) -> str:
    """One end of a profile as the providers read it: ``latent:1x4x64x64,…``; scalars have no shape to tell."""
    return ",".join(f"{name}:{'x'.join(map(str, span[end]))}" for name, span in profile.items() if span[end])


def _plugin_devices(library: Any, name: str) -> list[Any]:
    """The GPUs of the plugin, which is registered with ONNX Runtime first."""
    plugin = importlib.import_module(PLUGIN)
    if not any(device.ep_name == name for device in library.get_ep_devices()):
        library.register_execution_provider_library(name, plugin.get_library_path())
    found = [device for device in library.get_ep_devices() if device.ep_name == name]
    if not found:
        raise BackendError(f"found no GPU for {name}; expected an RTX GPU with its driver, see lsast-run --doctor")
    return found
