"""What tests run in pytest's own processes is compiled quickly, as it runs once. Commands in processes of their own are
compiled as a user's are. `JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest` compiles everything as for users."""

import os

import jax

if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
