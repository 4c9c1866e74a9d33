"""What `test_two_processes` launches: the command itself, and the prompts as each process sees them at the end."""

import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lsast_train import inversion
from lsast_train.__main__ import main

folder = Path(sys.argv[1])
finish = inversion.Inversion._finish


def finish_and_tell(run: inversion.Inversion) -> Any:
    tensors = {
        "matrices": run.space.matrices.detach(),
        **{k: v.detach() for k, v in run.space.attention_weights().items()},
    }
    save_file(tensors, folder / f"process{run.accelerator.process_index}.safetensors")
    return finish(run)


inversion.Inversion._finish = finish_and_tell
main(sys.argv[2:])
