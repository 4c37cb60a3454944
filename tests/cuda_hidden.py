"""Imported before JAX: tests start as runs do without a GPU, with none of the plugin's errors."""

from stem_jax.cuda_plugin import hide_cuda_plugin

hide_cuda_plugin()
