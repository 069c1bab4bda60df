"""What tests run in pytest's own processes is compiled quickly, as it runs once. Commands in processes of their own are
compiled as a user's are. `JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest` compiles everything as for users. Compiled programs
are kept for the session alone."""

import atexit
import os
import shutil
import tempfile
from unittest import mock

import jax

if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
    if "PYTEST_XDIST_WORKER" in os.environ and jax.__version_info__ < (0, 11):
        # what is not optimised compiles quicker so; later versions have no such flag
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
        with mock.patch.dict(os.environ, XLA_FLAGS=flags):  # commands that tests start shall not have it
            jax.devices()  # XLA reads its flags once

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have it from the process that starts them
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="transformer_jax-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
