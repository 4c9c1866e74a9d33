from __future__ import annotations

import gc
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

NO_SKIPS = "LSAST_TESTS_NEED"
"""Environment variable: set, a test that is marked ``needs`` fails where its modules are missing; see .ci/run."""


def pytest_configure() -> None:
    """What tiny networks on a busy machine need in order to be quick."""
    # torch's tracer makes objects by the million: a fifth of its time went into collecting garbage.
    gc.set_threshold(100_000, 50, 50)
    # Threads that wait for one another cost a hundred times what they save.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``needs`` where its modules are missing."""
    if os.environ.get(NO_SKIPS):
        return
    for item in items:
        for marker in item.iter_markers("needs"):
            if missing := [name for name in marker.args if importlib.util.find_spec(name) is None]:
                item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)} (.ci/run has them)"))


@pytest.fixture(scope="session", autouse=True)
def _home_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the runtime keeps between runs is not kept in the home of the person who runs the tests.

    Nor do defaults depend on the processor: `auto` takes ONNX Runtime in fp32.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LSAST_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("LSAST_PROCESSOR", "")
        yield


TINY_UNET = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
}
"""Half of Stable Diffusion 1.5's levels, a tenth of its width; its text encoder has one head of 64 channels."""


@dataclass(frozen=True)
class CompvisBase:
    """A random base in CompVis naming, and the networks that its files were written from."""

    file: Path
    """U-Net, its EMA, autoencoder, text encoder."""
    controlnet_file: Path
    networks: dict[str, Any]
    """``unet``, ``ema``, ``controlnet``, ``autoencoder`` and ``text_encoder``: diffusers' and transformers' own."""
    tensors: dict[str, torch.Tensor]
    """What is in `file`."""


def random_networks(unet: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(
        vocab_size=400,
        hidden_size=unet["cross_attention_dim"],
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=max(1, unet["cross_attention_dim"] // 64),
        bos_token_id=398,
        eos_token_id=399,
    )
    control = {key: value for key, value in unet.items() if key != "up_block_types"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = {
            "unet": UNet2DConditionModel(**unet),
            "ema": UNet2DConditionModel(**unet),
            "controlnet": ControlNetModel(**control, conditioning_embedding_out_channels=(4, 8, 8, 16)),
            "autoencoder": AutoencoderKL(
                block_out_channels=(32, 32, 32, 64),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=1,
                latent_channels=4,
            ),
            "text_encoder": CLIPTextModel(text),
        }
        for network in networks.values():
            network.eval().requires_grad_(False)
            for parameter in network.parameters():
                # Zero convolutions and all other constants would hide what is mixed up.
                if parameter.std() == 0 or parameter.numel() == 1:
                    parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape))
    return networks


def _renamed(key: str, rules: list[tuple[str, Any]]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


_RESNET = [
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.conv_shortcut\.", ".skip_connection."),
]


def compvis_unet_key(key: str, layers: int, attending: tuple[bool, ...]) -> str:
    """CompVis' name (ldm/modules/diffusionmodules/openaimodel.py, cldm/cldm.py) of a tensor of U-Net or ControlNet."""
    parts = key.split(".")
    in_resnet = "resnets" in parts
    if parts[0] == "down_blocks":
        block, kind, place = int(parts[1]), parts[2], int(parts[3])
        number = 1 + block * (layers + 1) + place
        head = {
            "resnets": f"input_blocks.{number}.0",
            "attentions": f"input_blocks.{number}.1",
            "downsamplers": f"input_blocks.{(block + 1) * (layers + 1)}.0.op",
        }[kind]
        key = ".".join([head, *parts[5 if kind == "downsamplers" else 4 :]])
    elif parts[0] == "up_blocks":
        block, kind, place = int(parts[1]), parts[2], int(parts[3])
        number = block * (layers + 1) + place
        upsampler = 2 if attending[::-1][block] else 1
        head = {
            "resnets": f"output_blocks.{number}.0",
            "attentions": f"output_blocks.{number}.1",
            "upsamplers": f"output_blocks.{block * (layers + 1) + layers}.{upsampler}.conv",
        }[kind]
        key = ".".join([head, *parts[5 if kind == "upsamplers" else 4 :]])
    elif parts[0] == "mid_block":
        place = 1 if parts[1] == "attentions" else 2 * int(parts[2])
        key = ".".join([f"middle_block.{place}", *parts[3:]])
    elif key.startswith("controlnet_cond_embedding.blocks."):
        key = ".".join([f"input_hint_block.{2 * int(parts[2]) + 2}", parts[3]])
    if in_resnet:
        return _renamed(key, _RESNET)
    return _renamed(
        key,
        [
            (r"^time_embedding\.linear_([12])\.", lambda found: f"time_embed.{2 * int(found[1]) - 2}."),
            (r"^conv_in\.", "input_blocks.0.0."),
            (r"^conv_norm_out\.", "out.0."),
            (r"^conv_out\.", "out.2."),
            (r"^controlnet_cond_embedding\.conv_in\.", "input_hint_block.0."),
            (r"^controlnet_cond_embedding\.conv_out\.", "input_hint_block.14."),
            (r"^controlnet_down_blocks\.(\d+)\.", r"zero_convs.\1.0."),
            (r"^controlnet_mid_block\.", "middle_block_out.0."),
        ],
    )


def compvis_network(network: Any) -> dict[str, torch.Tensor]:
    """The tensors of a U-Net or ControlNet under CompVis' names, without prefix."""
    attending = tuple("CrossAttn" in kind for kind in network.config.down_block_types)
    layers = network.config.layers_per_block
    return {compvis_unet_key(key, layers, attending): value for key, value in network.state_dict().items()}


def compvis_vae(vae: Any) -> dict[str, torch.Tensor]:
    """The tensors of an autoencoder under CompVis' names (ldm/modules/diffusionmodules/model.py), without prefix."""
    levels = len(vae.config.block_out_channels)
    rules = [
        (r"\.down_blocks\.(\d)\.resnets\.", r".down.\1.block."),
        (r"\.down_blocks\.(\d)\.downsamplers\.0\.", r".down.\1.downsample."),
        (r"\.up_blocks\.(\d)\.resnets\.", lambda found: f".up.{levels - 1 - int(found[1])}.block."),
        (r"\.up_blocks\.(\d)\.upsamplers\.0\.", lambda found: f".up.{levels - 1 - int(found[1])}.upsample."),
        (r"\.mid_block\.resnets\.(\d)\.", lambda found: f".mid.block_{int(found[1]) + 1}."),
        (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
        (r"\.group_norm\.", ".norm."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.to_out\.0\.", ".proj_out."),
        (r"\.conv_norm_out\.", ".norm_out."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
    ]
    named = {_renamed(key, rules): value for key, value in vae.state_dict().items()}
    return {
        key: value[:, :, None, None] if ".attn_1." in key and value.ndim == 2 else value for key, value in named.items()
    }


def compvis_tensors(networks: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A base as Stable Diffusion 1.x was published: every tensor with its prefix, the averaged U-Net without dots."""
    unet, ema = compvis_network(networks["unet"]), compvis_network(networks["ema"])
    text = {key.removeprefix("text_model."): value for key, value in networks["text_encoder"].state_dict().items()}
    tensors = {
        **{f"model.diffusion_model.{key}": value for key, value in unet.items()},
        **{f"model_ema.diffusion_model{key.replace('.', '')}": value for key, value in ema.items()},
        **{f"first_stage_model.{key}": value for key, value in compvis_vae(networks["autoencoder"]).items()},
        **{f"cond_stage_model.transformer.text_model.{key}": value for key, value in text.items()},
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7),
    }
    return {key: value.contiguous() for key, value in tensors.items()}


@pytest.fixture(scope="session")
def compvis() -> SimpleNamespace:
    """What turns networks of diffusers into CompVis' naming; no test can import it from here."""
    return SimpleNamespace(
        random_networks=random_networks,
        compvis_network=compvis_network,
        compvis_vae=compvis_vae,
        compvis_tensors=compvis_tensors,
    )


@pytest.fixture(scope="session")
def compvis_base(tmp_path_factory: pytest.TempPathFactory) -> CompvisBase:
    """A tiny base in CompVis naming with its ControlNet; tests must not change the files."""
    folder = tmp_path_factory.mktemp("compvis")
    networks = random_networks(TINY_UNET)
    tensors = compvis_tensors(networks)
    control = {f"control_model.{key}": value for key, value in compvis_network(networks["controlnet"]).items()}
    file, controlnet_file = folder / "tiny-v1-5.safetensors", folder / "tiny-canny.safetensors"
    save_file(tensors, file)
    save_file(control, controlnet_file)
    return CompvisBase(file, controlnet_file, networks, tensors)
