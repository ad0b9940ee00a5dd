"""Eight virtual CPU devices, and shapes and dtypes of public functions checked at run time. Both before JAX starts."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook(["quant", "dsjax.layers", "dsjax.cache", "dsjax.sampling"], "beartype.beartype")
