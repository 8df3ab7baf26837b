"""`python -m gdfq`, which torchrun starts as `torchrun --nproc-per-node N -m gdfq ...`."""

from gdfq.cli import main

if __name__ == "__main__":
    main()
