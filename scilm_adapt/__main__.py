"""`python -m scilm_adapt` is the `scilm` command: what `accelerate launch` and torchrun can start."""
import sys

from .cli import main

if __name__ == '__main__': sys.exit(main())
