"""`python -m spikeformers` is the command line; `accelerate launch -m spikeformers ...` needs this form."""

import sys

from spikeformers.cli import main

if __name__ == "__main__":
    sys.exit(main())
