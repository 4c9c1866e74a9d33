import dataclasses
import json
from typing import Any

import pytest

from lsast_engines.bundle.manifest import Manifest
from lsast_engines.errors import BundleError


def faults_of(data: Any) -> list[str]:
    with pytest.raises(BundleError) as error:
        Manifest.from_json(json.dumps(data), "toy/manifest.json")
    heading, *faults = str(error.value).split("\n  - ")
    assert "toy/manifest.json" in heading
    return faults


def test_manifest_from_json_lists_all_faults(manifest):
    data = json.loads(manifest.to_json())
    del data["name"]
    data["fingerprint"] = "abc"
    data["height"] = "256"
    data["width"] = True
    data["latent_scale"] = 0
    data["storage_dtype"] = "int4"
    data["stray"] = 1
    data["noise"]["beta_schedule"] = "cosine"
    data["geometry"] = [1]
    data["attention_layers"][0]["network"] = "text"
    data["graphs"]["controlnet_cond"]["inputs"][0]["shape"] = ["B", 0]
    data["defaults"]["steps"] = None
    data["files"] = {"vae_encoder.onnx": {"sha256": "ab" * 32, "bytes": -1}}
    data["parity"] = {"denoiser": float("nan")}
    data["source"] = {"torch": 2}
    assert sorted(faults_of(data)) == sorted(
        [
            "name: found nothing; expected text",
            "fingerprint: found 'abc'; expected text like [0-9a-f]{64}",
            "height: found '256'; expected a whole number from 1 to 16384",
            "width: found True; expected a whole number from 1 to 16384",
            "latent_scale: found 0; expected a number above 0",
            "storage_dtype: found 'int4'; expected one of fp32, fp16, bf16, int8",
            f"stray: found an unknown field; expected only {', '.join(f.name for f in dataclasses.fields(Manifest))}",
            "noise.beta_schedule: found 'cosine'; expected one of scaled_linear, linear",
            "geometry: found [1]; expected an object with hint_channels, tokens, unet_width, control_width, "
            "latent_channels, factor",
            "attention_layers[0].network: found 'text'; expected one of unet, control",
            "graphs.controlnet_cond.inputs[0].shape[1]: found 0; expected the length or the name of an axis",
            "defaults.steps: found None; expected a whole number from 1 to 100000",
            "files.vae_encoder.onnx.bytes: found -1; expected a whole number from 0 to 1125899906842624",
            "parity.denoiser: found nan; expected a number",
            "source.torch: found 2; expected text",
        ]
    )


def test_manifest_of_lacking_or_contradicting_fields_is_refused(manifest):
    data = json.loads(manifest.to_json())
    objects = ("noise", "attention_layers", "graphs", "defaults")
    lacking = {name: value for name, value in data.items() if name not in objects}
    assert [fault.split(":")[0] for fault in faults_of(lacking)] == list(objects)
    data["tokens"] = 4
    data["height"] = 200
    data["noise"]["beta_end"] = 0.0001
    assert faults_of(data)[0].startswith("noise: invalid noise schedule")
    data["noise"]["beta_end"] = 0.012
    data["multiple"] = 100
    data["attention_layers"][1]["offset"] = 9
    assert faults_of(data) == [
        "tokens: found 4; expected 3, as in geometry",
        "multiple: found 100; expected a multiple of geometry.factor 8",
        "width: found 512; expected a multiple of 100",
        "attention_layers: found offset 9 of unet up_blocks.0.attn2; expected 8",
        "attention_layers: found 21 columns of unet; expected 20, as in geometry",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"is not JSON .*export the bundle again"),
        ("[]", "has no format number"),
        ("{}", "has no format number"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": ' + "9" * 5000 + "}", "is not JSON"),
        ('{"format": 1}', r"has format 1; this version reads format 2: .*export the bundle again"),
    ],
)
def test_manifest_of_another_format_is_refused(text, message):
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(text)


def test_manifest_from_json_bounds_all_numbers_and_texts(manifest):
    data = json.loads(manifest.to_json())
    data["name"] = "\ud800"
    data["latent_scale"] = 10**400
    data["parity"]["x"] = 10**400
    data["stages"] = 2 * 10**9
    data["height"] = data["multiple"] = 2**20
    data["geometry"]["unet_width"] = 10**12
    data["graphs"]["controlnet_cond"]["inputs"][0]["shape"] = ["B", 10**30]
    data["graphs"]["vae_encoder"]["inputs"][0]["shape"] = ["B", "h" + "9" * 5000]
    data["graphs"]["vae_decoder"]["inputs"][0]["shape"] = ["B", "\ud800"]
    shapes = {f"graphs.{name}.inputs[0].shape[1]" for name in ("controlnet_cond", "vae_encoder", "vae_decoder")}
    numbers = {"latent_scale", "parity.x", "stages", "height", "multiple", "geometry.unet_width"}
    assert {fault.partition(":")[0] for fault in faults_of(data)} == {"name", *numbers, *shapes}
    data = json.loads(manifest.to_json())
    data["noise"] |= {"beta_start": 0.999, "beta_end": 0.999999999}
    assert "of the picture after 1000 timesteps; expected more than 1e-12" in faults_of(data)[-1]
