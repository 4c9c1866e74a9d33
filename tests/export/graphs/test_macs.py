"""`count_macs` on exported graphs, against torch's own count of the modules they were traced from."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench.macs import count_macs
from lsast_engines.bundle.graph_spec import REQUIRED_GRAPHS
from lsast_export.graphs.modules import graph_module

LENGTHS = [
    {"B": 1, "G": 1, "h": 8, "w": 8, "H": 64, "W": 64},
    {"B": 1, "G": 2, "h": 16, "w": 8, "H": 128, "W": 64},
    {"B": 3, "G": 2, "h": 8, "w": 24, "H": 64, "W": 192},
]


@pytest.mark.parametrize("storage_dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("graph", REQUIRED_GRAPHS)
def test_count_macs_matches_torchs_flop_counter(base, bundles, graph, storage_dtype):
    bundle = bundles[storage_dtype]
    inputs = bundle.manifest.graphs[graph].inputs
    shapes: list[dict[str, Any]] = [
        {tensor.name: [lengths.get(axis, axis) for axis in tensor.shape] for tensor in inputs}  # type: ignore[call-overload]
        for lengths in LENGTHS
    ]
    expected = []
    # torch does not count its fused attention on the CPU.
    module = graph_module(base, graph)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for shape in shapes:
            feeds = [
                torch.randn(shape[t.name]) if t.dtype == "float32" else torch.arange(shape[t.name][0]) for t in inputs
            ]
            with FlopCounterMode(display=False) as counter:
                module(*feeds)
            expected.append(counter.get_total_flops() // 2)
    assert expected[0] > 0
    assert count_macs(bundle.graph_path(graph), shapes) == expected
