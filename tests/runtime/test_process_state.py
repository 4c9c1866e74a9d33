"""Painting leaves what the whole process shares as it is; with engines open, not even for a moment, for spied calls."""

import sys

import pytest

from lsast_engines.backends.registry import available_backends

SCRIPT = """
import asyncio, decimal, faulthandler, gc, io, locale, logging, multiprocessing, os, random, resource, signal, socket
import sys, threading, warnings
import numpy as np, PIL.Image, PIL.ImageFile

def state():
    status = open("/proc/self/status").read().splitlines() if os.path.exists("/proc/self/status") else []
    found = {
        "warnings": (list(warnings.filters), warnings.showwarning),
        "folder": os.getcwd(),
        "umask": [line for line in status if line.startswith("Umask")],
        "environment": {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"},
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "locale": locale.setlocale(locale.LC_ALL, None),
        "logging": (list(logging.root.handlers), logging.root.level, logging.root.manager.disable),
        "hooks": (sys.excepthook, threading.excepthook, sys.displayhook, sys.gettrace(), sys.getprofile()),
        "garbage": (gc.isenabled(), gc.get_threshold(), gc.get_debug()),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval(), sys.getdlopenflags()),
        "resources": [resource.getrlimit(number) for number in range(resource.RLIMIT_NOFILE + 1)],
        "random": (random.getstate(), str(np.random.get_state())),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "path": (list(sys.path), list(sys.meta_path), list(sys.path_hooks)),
        "others": (faulthandler.is_enabled(), str(decimal.getcontext()), socket.getdefaulttimeout()),
        "start": multiprocessing.get_start_method(allow_none=True),
        "numpy": (np.geterr(), np.geterrcall(), np.get_printoptions(), float(np.float32(1e-40) * np.float32(0.5)) > 0),
        "pillow": (PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES, PIL.ImageFile.MAXBLOCK),
    }
    if "cv2" in sys.modules and hasattr(sys.modules["cv2"], "getNumThreads"):
        cv2 = sys.modules["cv2"]
        found["cv2"] = (cv2.getNumThreads(), cv2.useOptimized(), cv2.ocl.useOpenCL())
    return found

def compare(when):
    now = state()
    for name, value in before.items():
        assert now[name] == value, (when, name, value, now[name])

events = []
def audit(event, arguments):  # what is set back at once is seen here
    if event in ("os.chdir", "os.putenv", "os.unsetenv", "signal.pthread_kill") and watching:
        events.append((event, arguments))
watching = False
sys.addaudithook(audit)
for owner, name in ((os, "umask"), (signal, "signal"), (locale, "setlocale"), (np, "seterr"), (logging, "basicConfig"),
                    (warnings, "simplefilter"), (warnings, "filterwarnings"), (warnings, "resetwarnings")):
    def spied(*arguments, inner=getattr(owner, name), name=name, **options):
        if watching and (name != "setlocale" or arguments[1:] not in ((), (None,))):
            events.append((name, arguments))
        return inner(*arguments, **options)
    setattr(owner, name, spied)
class Spy(warnings.catch_warnings):
    def __enter__(self):
        if watching:
            events.append(("catch_warnings", ()))
        return super().__enter__()
warnings.catch_warnings = Spy

before = state()
import lsast
bundle, backend = sys.argv[1:]
stylizer = lsast.load(bundle, backend=backend)
compare("load")
photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
mask = np.zeros((64, 64), bool)
mask[:30] = True
jpeg = io.BytesIO()
PIL.Image.fromarray(photo).save(jpeg, "JPEG")
stylizer.stylize(photo, mask=mask, feather=3, fit="stretch", size=64, on_step=lambda step, steps, look: look())
before = before | {"cv2": state()["cv2"]}
compare("first painting")
watching = True

def paint():
    for _ in range(3):
        stylizer.stylize(jpeg.getvalue(), mask=mask, feather=3, on_step=lambda *_: compare("on_step"))

threads = [threading.Thread(target=paint) for _ in range(4)]
[thread.start() for thread in threads]
list(stylizer.stylize_many([photo, photo], batch=2))
list(stylizer.stylize_frames([photo, photo]))
loop = asyncio.new_event_loop()  # asyncio.run sets a signal handler
loop.run_until_complete(stylizer.stylize_async(photo))
loop.close()
[thread.join() for thread in threads]
held = io.BytesIO()
stylizer.stylize(photo).write(held)
lsast.read_record(held.getvalue())
stylizer.close()
watching = False
compare("close")
assert not events, events
"""


@pytest.mark.skipif(sys.platform == "win32", reason="of POSIX")
@pytest.mark.parametrize("backend", sorted(available_backends()))
def test_painting_changes_nothing_of_the_process(python, bundle_path, backend):
    done = python(SCRIPT, bundle_path, backend)
    assert done.returncode == 0, done.stderr
