"""The loop on the device, on a fake GPU: against the loop on the host, and by what it asks of the device, in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fake_denoiser import RANGES, inputs, step, style
from fake_gpu import FakeCuda, FakeTrt, write_engine
from lsast_engines.errors import BackendError, UsageError
from lsast_engines.loop import ADVANCE_GRAPH, DeviceLoop, Run
from lsast_engines.moves import moves
from lsast_engines.noise import NoiseSpec
from lsast_engines.profile import Ranges, Span
from lsast_engines.schedule import Schedule
from lsast_engines.solvers import make_solver
from lsast_engines.spec import advance_spec
from lsast_engines.tensorrt import TensorRtEngine

NULL = style("null", 1, 1)
STYLES = {"one": style("one", 10, 2), "two": style("two", 10, 3)}
Loops = Callable[..., DeviceLoop]


@pytest.fixture
def open_loop(
    compiled: Callable[..., Path], open_it: Callable[..., TensorRtEngine], engine_home: Path
) -> Callable[..., DeviceLoop]:
    def open_one(library: Any = "tensorrt", ranges: Ranges = RANGES) -> DeviceLoop:
        compiled(library)
        folder = engine_home.parents[1] / library / "fp16"
        write_engine(ADVANCE_GRAPH, advance_spec(), folder, library, ranges, "fp32")
        loop = DeviceLoop(open_it(library), NULL)
        for name, each in STYLES.items():
            loop.styles.add(name, each)
        return loop

    return open_one


def laid(
    solvers: Sequence[str] = ("unipc", "ddim"),
    guidance: Sequence[float] = (3.0, 2.0),
    styles: Sequence[str] = ("one", "two"),
    steps: int = 6,
    height: int = 8,
    seed: int = 0,
) -> tuple[Run, list[Schedule]]:
    """A run of a picture a solver; strengths differ, so that rows are at other stages."""
    schedules = [
        Schedule.build(NoiseSpec(), steps + 2 * place, steps / (steps + 2 * place), 10, name)
        for place, name in enumerate(solvers)
    ]
    feeds = inputs(len(solvers), height=height, seed=seed)
    tables = [moves(make_solver(s.solver, s.noise, s), s.abars()) for s in schedules]
    run = Run(
        latents=feeds["latent"],
        hint=feeds["hint"],
        control=0.7,
        timesteps=np.array([[s.steps[i].t for s in schedules] for i in range(steps)], np.int64),
        moves=np.stack(tables, axis=-1),
        guidance=guidance,
        styles=styles,
        stages=[[s.steps[i].stage for s in schedules] for i in range(steps)],
    )
    return run, schedules


def on_host(run: Run, schedules: list[Schedule]) -> list[np.ndarray]:
    """The latents after every step, by the solvers themselves, [steps + 1] of [B, 4, h, w]."""
    solvers = [make_solver(s.solver, s.noise, s) for s in schedules]
    latents = [run.latents.astype(np.float64)]
    for index, stages in enumerate(run.stages):
        hands = [STYLES[name].row(stage) for name, stage in zip(run.styles, stages, strict=True)]
        halves = [[hand.kv_unet for hand in hands]]
        if any(g != 1 for g in run.guidance):
            halves.insert(0, [NULL.row(0).kv_unet] * len(hands))
        eps = step(
            {
                "latent": latents[-1].astype(np.float32),
                "hint": run.hint,
                "timestep": run.timesteps[index],
                "kv_unet": np.array(halves),
                "kv_control": np.array([hand.kv_control for hand in hands]),
                "control_scale": np.array(run.control, np.float32),
            }
        ).astype(np.float64)
        after = []
        for place, solver in enumerate(solvers):
            noise = eps[0, place]
            if len(eps) == 2:
                noise = noise + run.guidance[place] * (eps[1, place] - noise)
            after.append(solver.step(noise, index, latents[-1][place]))
        latents.append(np.array(after))
    return latents


def close_to(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("guidance", [(3.0, 2.0), (1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("solvers", [("unipc", "ddim"), ("dpmpp2m", "unipc"), ("ddim", "dpmpp2m")])
def test_the_loop_is_the_hosts(
    open_loop: Loops, library: str, guidance: tuple[float, ...], solvers: tuple[str, ...]
) -> None:
    loop = open_loop(library)
    run, schedules = laid(solvers, guidance)
    close_to(loop.run(run), on_host(run, schedules)[-1])


def test_one_step_is_a_loop(open_loop: Loops) -> None:
    run, schedules = laid(("unipc",), (2.0,), ("one",), steps=1)
    close_to(open_loop().run(run), on_host(run, schedules)[-1])


def test_nothing_meets_the_host_between_the_first_step_and_the_last(open_loop: Loops, cuda: FakeCuda) -> None:
    loop = open_loop()
    run, _ = laid()
    loop.run(run)
    cuda.calls.clear()
    loop.run(run)
    assert not {"malloc", "free", "address"} & set(cuda.calls)
    first = cuda.calls.index("launch")
    assert set(cuda.calls[first:-2]) == {"copy", "launch"}
    assert cuda.calls[-2:] == ["download", "wait"]
    assert cuda.calls.count("download") == 1
    assert cuda.calls.count("launch") == len(run.timesteps)


def test_the_step_is_captured_once_for_all_runs_of_a_shape(open_loop: Loops, cuda: FakeCuda) -> None:
    loop = open_loop()
    plain_and_graph = laid()[0]
    first = loop.run(plain_and_graph)
    assert cuda.calls.count("execute") == 2 * 2  # each engine once plainly, once into the graph
    np.testing.assert_array_equal(loop.run(plain_and_graph), first)  # now all steps are the graph's
    other, schedules = laid(styles=("two", "one"), seed=5, solvers=("dpmpp2m", "ddim"))
    close_to(loop.run(other), on_host(other, schedules)[-1])
    assert cuda.calls.count("instantiate") == 1


def test_rtx_which_captures_by_itself_gives_the_same_bytes(open_loop: Loops, cuda: FakeCuda) -> None:
    run, _ = laid()
    loop = open_loop()
    captured = loop.run(run)
    loop._denoiser.close()
    plain = open_loop("tensorrt-rtx").run(run)
    assert cuda.calls.count("begin capture") == 1
    np.testing.assert_array_equal(captured, plain)


def test_other_shapes_drop_the_graph(open_loop: Loops, cuda: FakeCuda) -> None:
    loop = open_loop()
    for height in (8, 16, 8):
        run, schedules = laid(height=height)
        close_to(loop.run(run), on_host(run, schedules)[-1])
    assert cuda.calls.count("instantiate") == 3
    assert cuda.calls.count("free graph") == 2


def test_a_run_of_the_denoiser_alone_comes_between(
    open_loop: Loops, cuda: FakeCuda, open_it: Callable[..., TensorRtEngine]
) -> None:
    loop = open_loop()
    run, schedules = laid()
    loop.run(run)
    alone = inputs(1, height=16, seed=9)
    engine = loop._denoiser
    engine.bind({name: alone.pop(name) for name in ("hint", "control_scale", "kv_unet", "kv_control")})
    bound = inputs(1, height=16, seed=9)
    np.testing.assert_array_equal(engine(alone)["eps"], step(bound))
    close_to(loop.run(run), on_host(run, schedules)[-1])


def test_watching_waits_for_each_step_and_fetches_what_is_looked_at(open_loop: Loops, cuda: FakeCuda) -> None:
    loop = open_loop()
    run, schedules = laid()
    told: list[tuple[int, int]] = []
    loop.run(run, lambda done, total, guesses: told.append((done, total)))
    assert told == [(index, 6) for index in range(7)]
    assert cuda.calls.count("download") == 1
    kept: list[Any] = []
    loop.run(run, lambda done, total, guesses: kept.append(guesses))
    assert cuda.calls.count("download") == 1 + 6 + 1  # those that were kept, and the end
    latents = on_host(run, schedules)
    for index, schedule in enumerate(schedules):
        for place, guesses in enumerate(kept[1:]):
            abar = schedule.abars()[place]
            table = moves(make_solver(schedule.solver, schedule.noise, schedule), schedule.abars())
            assert table[place, -1, 0] == pytest.approx(abar**-0.5)
            assert guesses[index].shape == latents[0].shape[1:]
        # DDIM's next latent is made of the guess and of the noise, which the last step shows.
        if schedule.solver == "unipc":
            close_to(kept[-1][index], latents[-1][index])


def test_an_exception_of_the_watcher_ends_the_run_and_no_more(open_loop: Loops) -> None:
    loop = open_loop()
    run, schedules = laid()

    def stop(done: int, total: int, guesses: Sequence[np.ndarray]) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.run(run, stop)
    close_to(loop.run(run), on_host(run, schedules)[-1])


def test_longer_runs_make_room_and_shorter_ones_use_it(open_loop: Loops, cuda: FakeCuda) -> None:
    loop = open_loop()
    for steps, mallocs in ((4, 2), (8, 2), (3, 0), (8, 0)):
        before = cuda.calls.count("malloc")
        run, schedules = laid(steps=steps)
        close_to(loop.run(run), on_host(run, schedules)[-1])
        assert cuda.calls.count("malloc") - before == mallocs


def test_what_cannot_be_run_is_refused_before_anything_is_copied(open_loop: Loops, cuda: FakeCuda) -> None:
    loop = open_loop()
    run, schedules = laid()
    cuda.calls.clear()
    with pytest.raises(UsageError, match="found styles three"):
        loop.run(dataclasses.replace(run, styles=("one", "three")))
    with pytest.raises(BackendError, match="was not compiled for this"):
        loop.run(laid(height=24)[0])
    assert "execute" not in cuda.calls
    close_to(loop.run(run), on_host(run, schedules)[-1])


@pytest.mark.parametrize("captured", [False, True])
def test_a_step_that_fails_says_why(open_loop: Loops, trt: FakeTrt, captured: bool) -> None:
    loop = open_loop()
    run, schedules = laid()
    if captured:
        loop.run(laid(steps=1)[0])  # the next step is the one to be captured
    trt.failing = True
    with pytest.raises(BackendError, match="an illegal memory access"):
        loop.run(run)
    trt.failing = False
    close_to(loop.run(run), on_host(run, schedules)[-1])


def test_without_the_engine_it_is_one_line_and_the_denoiser_serves_on(
    compiled: Callable[..., Path], open_it: Callable[..., TensorRtEngine]
) -> None:
    compiled()
    engine = open_it()
    with pytest.raises(BackendError, match=r"found no engine .*advance\.engine"):
        DeviceLoop(engine, NULL)
    np.testing.assert_array_equal(engine(inputs())["eps"], step(inputs()))


def test_an_engine_for_larger_sizes_than_the_denoisers_is_refused(open_loop: Loops) -> None:
    with pytest.raises(BackendError, match="compile both with the same --sides and --batch"):
        open_loop(ranges=Ranges(Span(64, 64, 256), Span(1, 1, 3)))


def test_closing_either_leaves_nothing(open_loop: Loops, cuda: FakeCuda) -> None:
    loop = open_loop()
    loop.run(laid()[0])
    denoiser = loop._denoiser
    before = len(cuda.memory)
    loop.close()
    loop.close()
    assert len(cuda.memory) == before - 4 - 2  # halves, state, moves, advanced; two tables
    again = DeviceLoop(denoiser, NULL)
    again.styles.add("one", STYLES["one"])
    run, schedules = laid(("ddim",), (2.0,), ("one",))
    close_to(again.run(run), on_host(run, schedules)[-1])
    denoiser.close()
    assert cuda.calls[-1] == "destroy"
    with pytest.raises(BackendError, match="is closed"):
        again.run(run)
