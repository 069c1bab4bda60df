"""`python train.py [RECIPE] [flags]` is `transformer-jax train`."""

import sys

from transformer_jax.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
