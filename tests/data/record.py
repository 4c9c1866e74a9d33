"""Writes the recordings beside this file: ``python tests/data/record.py``, from the repository's root.

A three-level U-Net and ControlNet of random fp16 weights go once through the run of the released code as it is called
by default (50 steps, strength 0.7, guidance 10) and through four of its training steps; a generator of random weights
is pickled as its training does. Everything is computed by tests/oracles/released_lsast.py. A second run writes the same
tensors.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "oracles"))

from golden_sets import OWN, TransformerBlock, record, save_checkpoint  # noqa: E402
from released_lsast import generator, training_step  # noqa: E402

RECIPE = {"channel_mult": (1, 1, 1), "attending": (0, 1), "size": (8, 8)}
TIMESTEPS = (0, 99, 340, 999)
DIM = 24


def record_training() -> None:
    random = torch.Generator().manual_seed(200)
    unet, tensors = OWN.tensors("unet"), {}
    for number, t in enumerate(TIMESTEPS):
        z, noise = torch.randn(2, 1, 4, 8, 8, generator=random)
        contexts = torch.randn(12, 5, DIM, generator=random)
        loss, index, gradient = training_step(unet, z, noise, t, contexts, OWN.heads)
        case = {
            "z": z,
            "noise": noise,
            "t": torch.tensor([t]),
            "contexts": contexts,
            "loss": torch.tensor([loss]),
            "grad_index": torch.tensor([index]),
            "grad": gradient,
        }
        tensors |= {f"{number}_{name}": value.contiguous() for name, value in case.items()}
    save_file(tensors, f"{OWN.prefix}_train.safetensors")


def record_generator() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(300)
        block = TransformerBlock(DIM, inner=64)
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        e = torch.randn(1, DIM).half()
    block = block.half().train().requires_grad_(False)
    save_checkpoint({"attention": block, "initial_embeddings": torch.nn.Parameter(e)}, OWN.checkpoint)
    prompts = generator(block.state_dict(), e[0].float())
    save_file({"initial": e.float(), "prompts": prompts.contiguous()}, HERE / "generator_io.safetensors")


if __name__ == "__main__":
    run = record(num_heads=OWN.heads, steps=OWN.steps, strength=OWN.strength, guidance=OWN.guidance, **RECIPE)
    for part, tensors in (("unet", run.unet), ("control", run.control), ("io", run.io)):
        save_file({name: value.contiguous() for name, value in tensors.items()}, f"{OWN.prefix}_{part}.safetensors")
    record_training()
    record_generator()
