"""`lsast-bench`: what painting costs on this machine; `cli` is the way in, `child` what each of its processes does."""
