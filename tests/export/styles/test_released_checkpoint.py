"""Checkpoints of the released code, against the module that a checkpoint was pickled from."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from golden_sets import TransformerBlock, both_sets, save_checkpoint
from lsast_engines.bundle.bundle import EMBEDDED
from lsast_engines.errors import StyleError, TrainingError
from lsast_export.cli.main import import_command
from lsast_export.graphs.modules import base_on_meta
from lsast_export.styles.bake import KVProjector, bake_prompts
from lsast_export.styles.released_checkpoint import import_prompts, read_released
from lsast_train.base.attention import cross_attention_layers
from lsast_train.base.lazy_base import LazyBase, open_base
from lsast_train.checkpoints.source import BaseSource
from lsast_train.prompts.prompt_file import load_prompts

DIM = 64


Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Pickles a checkpoint as the released code does."""

    def write(content: dict[str, Any], name: str = "embeddings_gs-99999.pt") -> Path:
        return save_checkpoint(content, tmp_path / name)

    return write


@pytest.fixture
def block() -> TransformerBlock:
    torch.manual_seed(0)
    made = TransformerBlock(DIM)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made


@pytest.fixture
def content(block: TransformerBlock, compvis_base: Any) -> dict[str, Any]:
    """A checkpoint trained on the tiny base: it starts from the base's word 320."""
    word = compvis_base.networks["text_encoder"].get_input_embeddings().weight[320]
    return {"attention": block, "initial_embeddings": nn.Parameter(word[None].clone(), requires_grad=False)}


@pytest.fixture(scope="session")
def published(compvis_base: Any) -> LazyBase:
    """The tiny base."""
    return open_base(BaseSource(compvis_base.file, compvis_base.controlnet_file))


def _by_transformers(compvis_base: Any, embeddings: torch.Tensor) -> torch.Tensor:
    """Contexts [K, 77, dim] of the caption ``*`` with its row of the token embedding replaced by each embedding."""
    encoder = compvis_base.networks["text_encoder"]
    table = encoder.get_input_embeddings().weight
    before = table[265].clone()
    contexts = []
    with torch.no_grad():
        for embedding in embeddings:
            table[265] = embedding[0]
            contexts.append(encoder(torch.tensor([[398, 265] + [399] * 75])).last_hidden_state[0])
        table[265] = before
    return torch.stack(contexts)


@both_sets
def test_read_released_gives_the_recorded_embeddings(golden):
    embeddings, constant = read_released(golden.checkpoint)
    expected = golden.generator()
    assert torch.equal(constant[None], expected["initial"])
    error = (embeddings[:, 0] - expected["prompts"]).abs().max() / expected["prompts"].abs().max()
    assert error < 1e-5


def test_imported_prompts_are_resolved_in_the_released_layout_and_baked_without_text_encoder(
    save, content, compvis_base, published, caplog
):
    path = save(content)
    with caplog.at_level(logging.WARNING, "lsast"):
        prompts = import_prompts(path, published, "hand")
        assert "another word embedding" not in caplog.text
        content["initial_embeddings"] = nn.Parameter(content["initial_embeddings"] + 0.1)
        import_prompts(save(content, "other.pt"), published, "hand")
    assert "trained with another text encoder" in caplog.text
    assert (prompts.name, prompts.base, prompts.prompt) == ("hand", published.fingerprint, "text")
    contexts = _by_transformers(compvis_base, read_released(path)[0])
    for stage in range(10):
        torch.testing.assert_close(prompts.prompts[stage], contexts[stage : stage + 3], rtol=1e-4, atol=1e-4)
    networks = base_on_meta(published)
    style = bake_prompts(KVProjector.of_base(networks, published), prompts)
    assert (style.stages, style.tokens, style.meta["prompt"]) == (10, 77, "text")
    entry = cross_attention_layers(networks.unet)[-1]
    assert entry.group == "up"
    keys = published.load("unet").get_submodule(entry.name).to_k.weight
    expected = (prompts.prompts[6, 2] @ keys.T).numpy()
    found = style.kv_unet[6, :, entry.offset : entry.offset + entry.width]
    assert abs(found - expected).max() < 1e-4


def test_read_released_lists_every_fault(save, content, tmp_path):
    block = content["attention"]
    nn.init.constant_(block.ff.net[2].bias, float("nan"))
    with pytest.raises(StyleError, match="NaN or infinite"):
        read_released(save(content))
    del block.norm2
    block.norm1 = nn.LayerNorm(DIM + 1)
    block.more = nn.Linear(1, 1, bias=False)
    with pytest.raises(StyleError) as caught:
        read_released(save(content))
    lines = [line.strip(" -") for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "attention.more.weight: not expected",
        "attention.norm1.bias: found shape [65]; expected [64]",
        "attention.norm1.weight: found shape [65]; expected [64]",
        "attention.norm2.bias: missing; expected shape [64]",
        "attention.norm2.weight: missing; expected shape [64]",
    ]
    with pytest.raises(StyleError, match=r"initial_embeddings: found nothing; expected \[1, dim\]"):
        read_released(save({"attention": block}))
    with pytest.raises(StyleError, match=r"found 1280 rows; expected 3 · stages · 64"):
        read_released(save({**content, "attention": TransformerBlock(DIM, 20)}))
    with pytest.raises(TrainingError):
        read_released(tmp_path / "nowhere.pt")


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(import_command, [str(argument) for argument in arguments])


def test_import_command_writes_prompts_of_the_base_or_refuses(save, content, compvis_base, published):
    base = ["--base", compvis_base.file, "--controlnet", compvis_base.controlnet_file]
    ran = _run(save(content), "--name", "hand", *base, "--json")
    assert ran.exit_code == 0, ran.output
    assert "training mode" in ran.stderr
    facts = json.loads(ran.stdout)
    assert facts["prompts"] == str(Path("runs", "hand", "hand.prompts.safetensors"))
    assert (facts["name"], facts["base"], facts["embeddings"]) == ("hand", published.fingerprint, [30, 1, DIM])
    written = load_prompts(Path(facts["prompts"]))
    assert (written.variant, written.generator, written.layout, written.gradient) == (
        *("step+layer", "geglu", "overlap", "decoder"),
    )
    assert written.meta["imported_from"] == "embeddings_gs-99999.pt"
    for arguments, status, expected in (
        (["--name", "../up", *base], 2, "letters, digits"),
        ([], 2, "Missing option '--base'"),
        (["--base", EMBEDDED], 1, "found base 'mini' without one"),
    ):
        refused = _run(save(content), *arguments)
        assert (refused.exit_code, expected in refused.stderr) == (status, True), refused.output
