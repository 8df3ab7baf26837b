"""How long every operation of gdfq_ext takes, against other ways of computing it.

    __main__.py     the command
    operations.py   the operations and their providers: one definition, which benchmarks/test_ops.py uses too
    peers.py        the quantizers of other libraries
    shapes.py       the layers that are measured
    timing.py       clocks: cold and warm cache, CPU and GPU
    measure.py      which cases a run has, and measuring them
    output.py       table, JSON, CSV, pictures

`benchmarks/README.md` has the method.
"""
