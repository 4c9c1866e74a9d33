"""What an inspection of a published base finds: its parts, its configuration, and every fault."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lsast_engines.diffusion import NoiseSchedule
from lsast_engines.errors import TrainingError, UsageError

from .networks import HEADS
from .weights import Weights, truncate

Part = Literal["unet", "controlnet", "autoencoder", "text_encoder"]
"""The networks of a published base."""

UnetWeights = Literal["auto", "ema", "non-ema"]
"""Which weights of the U-Net to take; ``auto``: the averaged ones (EMA) if both are there. The release was trained on
those that are not averaged (docs/method.md §3)."""

OpenWeights = Callable[[], Weights]
"""Opens a network that is not built yet; its tensors stay in their file as long as nobody uses them."""


@dataclass(eq=False)
class BaseInspection:
    """Parts and faults of a published base; filled in as its files are read."""

    name: str = ""
    """Of the base: its file or folder."""
    multiple: int = 1
    """Legal heights and widths are multiples of this many pixels: all halvings of autoencoder and U-Net."""
    heads: int = HEADS
    """Attention heads of U-Net and ControlNet where no configuration names them."""
    networks: dict[Part, OpenWeights] = field(default_factory=dict)
    """The parts that could be opened."""
    configs: dict[Part, Mapping[str, Any]] = field(default_factory=dict)
    """Their configurations."""
    origin: dict[str, str] = field(default_factory=dict)
    """Names of the files or repositories, and which weights of the U-Net were taken."""
    faults: list[str] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    """Parts with a fault, or ``base``: they are not reported as missing as well."""
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    noise: NoiseSchedule = field(default_factory=NoiseSchedule)

    def fail(self, part: str, fault: str) -> None:
        """Add a fault of `part`, or of the whole ``base``."""
        self.failed.add(part)
        self.faults.append(f"{part}: {fault}")

    def add(self, part: Part, opened: OpenWeights) -> None:
        """Add a part if it can be opened, and the faults of its weights."""
        try:
            weights = opened()
        except (TrainingError, UsageError) as error:
            self.fail(part, f"{error}")
            return
        self.networks[part], self.configs[part] = opened, weights.config
        if faults := weights.faults():
            self.fail(part, "; ".join(truncate(faults, 5)))
