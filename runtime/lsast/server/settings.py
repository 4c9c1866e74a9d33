"""The settings of a server, declared once: for `lsast-serve`, for the environment and for Ray Serve."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from lsast_engines.declared_options import Range, option_faults, rules_of
from lsast_engines.errors import UsageError, did_you_mean, fault_list, shown

from ..options.options import Options

PREFIX = "LSAST_SERVE_"
"""What the names of the environment variables begin with: LSAST_SERVE_PORT and so on."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Addresses that only this machine reaches."""

WORKER_LIMITS = ("batch", "max_megapixels", "max_size", "max_tile", "max_tiles")
"""The settings that hold where pictures are painted."""

_log = logging.getLogger("lsast.server")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a server.

    Raises:
        UsageError: one or more values are out of range; all of them are named at once.
    """

    host: Annotated[str, "Address to listen on; 0.0.0.0 is every address of this machine."] = "127.0.0.1"
    port: Annotated[int, "Port to listen on; 0 takes a free one.", Range(0, 65535)] = 8000
    token: Annotated[
        str,
        "Token that requests to /v1 and /metrics must send (Authorization: Bearer TOKEN); empty: none is asked for.",
    ] = ""
    allowed_hosts: Annotated[
        str,
        "Names, with commas, by which browsers may call this server, beside this machine's own; * is any. Left out: "
        "none on a loopback address, else any.",
    ] = ""
    bundle: Annotated[str, "Folder or name of the bundle. Left out: $LSAST_BUNDLE, else mini."] = ""
    backend: Annotated[str, "Library that runs the networks, as in lsast-run."] = "auto"
    device: Annotated[str, "Device of the backend, such as cpu or cuda."] = "auto"
    threads: Annotated[int, "Processor threads to use; 0 leaves it to the backend.", Range(0, 1024)] = 0
    compute_dtype: Annotated[str, "Data type (dtype) of the computation, as in lsast-run."] = "auto"
    preset: Annotated[str, "Preset of the paintings that name none."] = ""
    batch: Annotated[int, "Most pictures that are painted together.", Range(1, 64)] = 4
    queue: Annotated[int, "Most paintings that wait; more are refused with status 429.", Range(1, 100_000)] = 64
    max_bytes: Annotated[int, "Most bytes of a request.", Range(1)] = 32 * 2**20
    max_megapixels: Annotated[
        float, "Most megapixels of a picture or a mask, looked at before it is decoded.", Range(0, 121, above=True)
    ] = 40.0
    max_size: Annotated[int, "Largest painted size: at most MAX_SIZE x MAX_SIZE pixels.", Range(64, 8192)] = 2048
    max_tile: Annotated[int, "Largest tile, and so a bound of the memory.", Range(64, 8192)] = 1024
    max_tiles: Annotated[int, "Most tiles of a painting.", Range(1, 100_000)] = 64
    seconds: Annotated[
        float, "Most seconds to read a picture, and to paint it; waiting is not counted.", Range(0, above=True)
    ] = 300.0
    upload_seconds: Annotated[float, "Most seconds that a request may take to arrive.", Range(0, above=True)] = 60.0
    keep_seconds: Annotated[float, "Seconds that a finished job is kept for its client.", Range(0, above=True)] = 600.0
    keep_bytes: Annotated[int, "Most bytes of finished jobs; the oldest are dropped.", Range(0)] = 256 * 2**20
    drain_seconds: Annotated[
        float, "Most seconds that the server goes on after SIGTERM to finish what it has accepted.", Range(0)
    ] = 30.0

    def __post_init__(self) -> None:
        faults = [
            f"{name}: found {getattr(self, name)!r}; expected {range_}"
            for name, rule in rules_of(Settings).items()
            if (range_ := rule.range) and getattr(self, name) not in range_
        ]
        faults += option_faults(Options, {"preset": self.preset or None})
        if faults:
            raise UsageError(fault_list("invalid settings:", faults))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """The settings that variables such as LSAST_SERVE_PORT give.

        Raises:
            UsageError: a value that is no number where one is expected, or out of range.
        """
        for fault in unknown_variables(environment):
            _log.warning(fault)
        given: dict[str, Any] = {}
        for name, rule in rules_of(Settings).items():
            if text := environment.get(PREFIX + name.upper()):
                try:
                    given[name] = rule.type(text)
                except ValueError:
                    raise UsageError(f"found {PREFIX + name.upper()}={text}; expected a number") from None
        return cls(**given)

    @property
    def hosts(self) -> list[str]:
        """The values of the Host header that are answered; ``*`` is any. Probes on this machine are always answered."""
        own = [*LOOPBACK, f"[{LOOPBACK[-1]}]"]
        if self.allowed_hosts:
            return [*own, *filter(None, (host.strip() for host in self.allowed_hosts.split(",")))]
        return own if self.host in LOOPBACK else ["*"]

    @property
    def worker_limits(self) -> dict[str, float]:
        """The `WORKER_LIMITS`, by name."""
        return {name: getattr(self, name) for name in WORKER_LIMITS}

    @property
    def load(self) -> dict[str, Any]:
        """The arguments of `lsast.load`."""
        names = ("bundle", "backend", "device", "threads", "compute_dtype", "preset")
        return {name: getattr(self, name) or None for name in names}


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """A line for each variable that looks like a setting and is none: a wrong name, or one that Kubernetes gives to
    every container beside a service of this name."""
    known = [PREFIX + name.upper() for name in rules_of(Settings)]
    names = sorted(name for name in environment if name.upper().startswith(PREFIX) and name not in known)
    return [f"found {shown(name)} in the environment, which is no setting{did_you_mean(name, known)}" for name in names]
