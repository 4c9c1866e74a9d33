"""A base in one file of CompVis naming, and its ControlNet: the networks come out that were written."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from lsast_engines.errors import TrainingError
from lsast_train.base.lazy_base import load_base, open_base
from lsast_train.checkpoints.single_file import describe_unsupported, unet_weights

NETWORKS = ("unet", "controlnet", "autoencoder", "text_encoder")


def test_single_file_gives_the_networks_it_was_written_from(published):
    base = load_base(published.source())
    loaded = {**base.networks(), "text_encoder": base.text_encoder}
    assert loaded.keys() == set(NETWORKS)
    for name in NETWORKS:
        assert published.same(loaded[name], published.networks["ema" if name == "unet" else name]), name
    facts = base.config
    assert (facts.name, facts.family, facts.prediction, facts.tokens) == ("tiny-v1-5", "sd15", "epsilon", 77)
    assert (facts.latent_scale, facts.size, facts.multiple) == (0.18215, 512, 16)  # 8 x one halving of the U-Net
    assert facts.training == {
        "source": "tiny-v1-5.safetensors",
        "controlnet": "tiny-canny.safetensors",
        "unet_weights": "ema",
    }
    assert "text_encoder" not in base.networks()
    ids = torch.tensor([[398, *[399] * 76]])
    expected = published.networks["text_encoder"](input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(base.null_context, expected)
    assert not any(p.requires_grad for network in loaded.values() for p in network.parameters())


@pytest.mark.parametrize(
    ("wanted", "stored", "taken", "fact"),
    [
        ("ema", "both", "ema", "ema"),
        ("non-ema", "both", "unet", "non-ema"),
        ("auto", "one", "unet", "the only ones there"),
    ],
)
def test_unet_weights_choose_between_two_sets(published, tmp_path, caplog, wanted, stored, taken, fact):
    file = published.file
    if stored == "one":
        file = tmp_path / "one.safetensors"
        save_file(published.one_set, file)
    with caplog.at_level(logging.INFO, "lsast"):
        parts = open_base(published.source(base=file, unet_weights=wanted))
    assert published.same(parts.load("unet"), published.networks[taken])
    assert parts.config.training["unet_weights"] == fact
    assert f"unet weights: {fact}" in caplog.text


def test_unet_weights_of_one_set_are_refused(published, tmp_path):
    save_file(published.one_set, tmp_path / "one.safetensors")
    for wanted in ("ema", "non-ema"):
        with pytest.raises(TrainingError, match=f"found one set of weights .* two sets for --unet-weights {wanted}"):
            open_base(published.source(base=tmp_path / "one.safetensors", unet_weights=wanted))


def test_single_file_with_its_own_controlnet_needs_no_other(published, tmp_path):
    file = tmp_path / "whole.safetensors"
    save_file({**published.all_tensors, **load_file(published.controlnet_file)}, file)
    assert published.same(open_base(file).load("controlnet"), published.networks["controlnet"])


@pytest.mark.parametrize("told", ["key", "metadata", "yaml", "nowhere"])
def test_v_prediction_of_a_single_file_is_read_where_it_is_told(published, tmp_path, told):
    file = tmp_path / "v.safetensors"
    key = {"v_pred": torch.zeros(0)} if told == "key" else {}
    metadata = {"modelspec.prediction_type": "v"} if told == "metadata" else {"modelspec.prediction_type": "epsilon"}
    save_file({**published.one_set, **key}, file, metadata)
    parameterization = "v" if told == "yaml" else "eps"
    file.with_suffix(".yaml").write_text(f'model:\n  params:\n    parameterization: "{parameterization}"\n')
    expected = "epsilon" if told == "nowhere" else "v_prediction"
    assert open_base(published.source(base=file)).config.prediction == expected


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("model.diffusion_model.label_emb.0.0.weight", "Stable Diffusion XL"),
        ("conditioner.embedders.1.x", "Stable Diffusion XL"),
        ("conditioner.embedders.0.model.x", "Stable Diffusion 2 or SD-Turbo"),
        ("model.diffusion_model.time_embed.cond_proj.weight", "a latent consistency model"),
        ("lora_unet_down.lora_up.weight", "a LoRA"),
        ("lora_unet_down.hada_w1_a", "a LoRA"),
        ("emb_params", "a textual inversion"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "a diffusion transformer"),
        ("double_blocks.0.img_attn.qkv.weight", "a diffusion transformer"),
        ("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight", "an AnimateDiff motion module"),
        ("image_proj.proj.weight", "an IP-Adapter"),
        ("body.0.block1.weight", "a T2I-Adapter"),
        ("adapter.body.0.resnets.0.block1.weight", "a T2I-Adapter"),
        ("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight", "a ControlNet-LLLite"),
        ("clip_l", "a textual inversion"),
        ("<cat-toy>", "a textual inversion"),
        ("model.diffusion_model.input_blocks.0.0.weight", None),
    ],
)
def test_describe_unsupported_names_what_a_key_belongs_to(key, kind):
    found = describe_unsupported([key])
    assert found is None if kind is None else str(found).startswith(kind)


def test_built_network_shares_weights_of_the_same_dtype(compvis_base):
    unet = unet_weights(compvis_base.tensors).build()
    stored = compvis_base.tensors["model.diffusion_model.out.2.weight"]
    assert unet.conv_out.weight.data_ptr() == stored.data_ptr()
    assert not unet.conv_out.weight.requires_grad
    half = unet_weights(compvis_base.tensors).build(torch.float16)
    assert torch.equal(half.conv_out.weight, stored.half())


def test_compvis_weights_that_do_not_fit_are_named(compvis_base):
    tensors = {key: value for key, value in compvis_base.tensors.items() if key.startswith("model.diffusion_model.")}
    prefix = "model.diffusion_model."
    missing = dict(tensors)
    del missing[f"{prefix}output_blocks.1.0.in_layers.2.bias"]
    missing[f"{prefix}input_blocks.1.0.in_layers.2.bias"] = torch.zeros(5)
    with pytest.raises(TrainingError) as caught:
        unet_weights(missing).build()
    assert "up_blocks.0.resnets.1.conv1.bias: missing" in str(caught.value)
    assert "down_blocks.0.resnets.0.conv1.bias: found shape [5]; expected [32]" in str(caught.value)
    broken = {**tensors, f"{prefix}out.2.bias": torch.full((4,), float("nan"))}
    with pytest.raises(TrainingError, match=r"weights of the U-Net that are no numbers:\n  - conv_out\.bias: NaN"):
        unet_weights(broken).build()
    with pytest.raises(TrainingError, match=r"label_emb\.0\.0\.weight: not expected"):
        unet_weights({**tensors, f"{prefix}label_emb.0.0.weight": torch.zeros(3)})
    with pytest.raises(TrainingError, match=r"32.*multiples of 5"):
        unet_weights(tensors, heads=5)
    with pytest.raises(TrainingError, match=r"missing:\n  - input_blocks\.0\.0\.weight"):
        unet_weights({"something": torch.zeros(1)})
