"""What exported graphs compute: against torch, against unmodified diffusers networks, on two backends."""

import dataclasses
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import is_fake

from benchmarks.mini.training.mini_base import MiniConfig, build_mini
from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import GraphSpec, TensorSpec
from lsast_engines.errors import ExportError
from lsast_export.graphs import modules as graphs
from lsast_export.graphs.modules import SplitProcessor, geometry, graph_module, head_groups, split_attention
from lsast_export.graphs.trace import trace
from lsast_train.base.attention import project_contexts
from lsast_train.base.base import Base
from lsast_train.base.lazy_base import load_base

# None of these was traced or compared at export: batch 3, and shapes of other proportions.
SHAPES = [(3, 2, 8, 8), (1, 1, 24, 8), (2, 2, 8, 32)]


def stock_networks(bundle: Bundle) -> list[Any]:
    """The bundle's U-Net and ControlNet, built by diffusers from configuration and weights, untouched by us."""
    source, tensors = load_base(bundle.path), load_file(bundle.path / "base.safetensors")
    networks = []
    for name, kind in (("unet", UNet2DConditionModel), ("controlnet", ControlNetModel)):
        network = kind.from_config(getattr(source, name).config).eval()
        own = {k.removeprefix(f"{name}."): v.float() for k, v in tensors.items() if k.startswith(f"{name}.")}
        network.load_state_dict(own)
        networks.append(network)
    return networks


@pytest.mark.parametrize("storage_dtype", ["fp32", "fp16", "bf16"])
def test_denoiser_graph_matches_stock_diffusers_networks(bundles, run, storage_dtype):
    bundle = bundles[storage_dtype]
    unet, controlnet = stock_networks(bundle)
    generator = torch.Generator().manual_seed(5)
    context = torch.randn(2, 2, bundle.manifest.tokens, unet.config.cross_attention_dim, generator=generator)
    latent, timestep = torch.randn(2, 4, 8, 16, generator=generator), torch.tensor([41, 822])
    edges = (torch.rand(2, 3, 64, 128, generator=generator) < 0.1).float()
    alphas = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    abar = alphas[timestep].view(-1, 1, 1, 1)
    with torch.no_grad():
        down, mid = controlnet(latent, timestep, context[1], edges, conditioning_scale=0.7, return_dict=False)
        halves = [
            unet(
                latent,
                timestep,
                rows,
                down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
                return_dict=False,
            )[0]
            for rows in context
        ]
        # v = sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans & Ho 2022)
        expected = torch.stack([abar.sqrt() * v + (1 - abar).sqrt() * latent for v in halves]).numpy()
        base = load_base(bundle.path)
        grouped = context[:, :, None].expand(-1, -1, 3, -1, -1)  # the same context for all layer groups
        kv_unet = torch.stack([project_contexts(base.unet, rows) for rows in grouped]).numpy()
        kv_control = project_contexts(base.controlnet, grouped[1]).numpy()
    hint = run(bundle, "controlnet_cond", edges=edges.numpy())["hint"]
    found = run(
        bundle,
        "denoiser",
        latent=latent.numpy(),
        hint=hint,
        timestep=timestep.numpy(),
        kv_unet=kv_unet,
        kv_control=kv_control,
        control_scale=np.asarray(0.7, np.float32),
    )["eps"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_denoiser_graph_agrees_on_both_backends(bundles, feeds):
    path, spec = bundles["fp16"].graph_path("denoiser"), bundles["fp16"].manifest.graphs["denoiser"]
    with (
        closing(open_engine(path, spec, "onnxruntime", threads=1)) as one,
        closing(open_engine(path, spec, "openvino", threads=1)) as other,
    ):
        for shape in SHAPES:
            inputs = feeds(bundles["fp16"], *shape)
            first, second = (engine(inputs)["eps"] for engine in (one, other))
            assert first.shape == (shape[1], shape[0], 4, *shape[2:])
            np.testing.assert_allclose(first, second, rtol=0, atol=1e-4 * np.abs(first).max())


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn1", 8),  # 2 x 8 heads x 4096² x 4 bytes: 1 GB
        ("up_blocks.3.attentions.0.transformer_blocks.0.attn1", 8),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1", 1),  # 2 x 8 x 1024² x 4: 64 MB
        ("up_blocks.2.attentions.2.transformer_blocks.0.attn1", 1),
        ("mid_block.attentions.0.transformer_blocks.0.attn1", 1),
    ],
)
def test_head_groups_of_stable_diffusion_limit_the_scores(name, groups):
    assert head_groups(name, heads=8, levels=4, side=64) == groups
    assert head_groups(name, heads=8, levels=4, side=16) == 1


def test_split_attention_computes_the_same(monkeypatch):
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=8,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 4, 8, 8, generator=generator), 500, torch.randn(2, 3, 8, generator=generator)
    with torch.no_grad():
        expected = unet(*inputs).sample  # untouched by us
        # The scores of the upper level, 64 tokens, are 2 x 4 x 64² x 4 bytes; those of the middle 1/16 of that.
        monkeypatch.setattr(graphs, "SCORES_LIMIT", 2 * 64**2 * 4)
        split_attention(unet, 8)
        found = unet(*inputs).sample
    split = {name for name, kind in unet.attn_processors.items() if isinstance(kind, SplitProcessor)}
    assert {name.split(".")[0] for name in split} == {"down_blocks", "up_blocks"}
    assert all("attn1" in name for name in split)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_graph_module_shares_weights_and_changes_no_network(monkeypatch):
    monkeypatch.setattr(graphs, "SCORES_LIMIT", 0)
    base = build_mini(dataclasses.replace(MiniConfig.tiny(), heads=2))
    embedding, processors = base.controlnet.controlnet_cond_embedding, base.unet.attn_processors
    module = graph_module(base, "denoiser")
    assert any(isinstance(kind, SplitProcessor) for kind in module.unet.attn_processors.values())
    assert (base.controlnet.controlnet_cond_embedding, base.unet.attn_processors) == (embedding, processors)
    assert {*map(id, module.unet.parameters())} == {*map(id, base.unet.parameters())}


class _Three(torch.nn.Module):
    def __init__(self, picked: str) -> None:
        super().__init__()
        self._picked = picked

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = {"x": x, "y": x + 1, "z": x.double()}
        return tuple(values[name] for name in self._picked)


@pytest.mark.parametrize(
    ("picked", "fault"),
    [
        ("yy", "a: is b, too"),
        ("yx", "x: is b, too"),
        ("yz", r"output b: found float64 \[.*\]; expected b float32"),
        ("y", "output b: missing"),
        ("yxy", "output .*: not expected"),
    ],
)
def test_trace_of_another_interface_is_refused(picked, fault):
    (x, *outputs) = (TensorSpec(name, "float32", ("B", 4, "h", "w")) for name in "xab")
    with pytest.raises(ExportError, match=f"'toy' has another interface:(?s:.*){fault}"):
        trace(_Three(picked), GraphSpec("toy", (x,), tuple(outputs)), 64, 8)


def test_trace_reads_and_changes_no_weight(base, traced):
    assert all(weight.device.type == "cpu" and not is_fake(weight) for weight in base.controlnet.parameters())
    with torch.device("meta"):
        networks = {name: type(net).from_config(net.config) for name, net in base.networks().items()}
    skeleton = Base(base.config, base.fingerprint, null_context=base.null_context, **networks)
    module = graph_module(skeleton, "controlnet_cond")
    empty = trace(module, traced["controlnet_cond"].spec, base.config.multiple, geometry(base).factor)
    assert all(weight.device.type == "meta" and not is_fake(weight) for weight in module.parameters())
    models = (empty.model, traced["controlnet_cond"].model)
    nodes = [
        [(node.op_type, [value.name for value in node.inputs if value]) for node in model.graph] for model in models
    ]
    assert nodes[0] == nodes[1]
    assert empty.weights == traced["controlnet_cond"].weights
