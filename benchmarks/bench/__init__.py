"""What painting costs on this machine: ``python -m benchmarks.bench`` from the root of the clone.

`__main__` is the command line, `worker` what each measured process does.
"""
