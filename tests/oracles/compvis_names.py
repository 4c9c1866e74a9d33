"""Networks of diffusers in CompVis naming, as Stable Diffusion 1.x and ControlNet were published; tensors by name."""

import re
from typing import Any

import torch


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
            "controlnet": ControlNetModel(**control, conditioning_embedding_out_channels=(4, 8, 12, 16)),
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
    if parts[0] in ("down_blocks", "up_blocks"):
        block, kind, place = int(parts[1]), parts[2], int(parts[3])
        first = block * (layers + 1)
        upsampler = 2 if attending[::-1][block] else 1
        down, up = f"input_blocks.{1 + first + place}", f"output_blocks.{first + place}"
        head = {
            "resnets": f"{down if parts[0] == 'down_blocks' else up}.0",
            "attentions": f"{down if parts[0] == 'down_blocks' else up}.1",
            "downsamplers": f"input_blocks.{first + layers + 1}.0.op",
            "upsamplers": f"output_blocks.{first + layers}.{upsampler}.conv",
        }[kind]
        key = ".".join([head, *parts[5 if kind.endswith("samplers") else 4 :]])
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
