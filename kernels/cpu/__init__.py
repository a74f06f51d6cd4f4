"""Compiled CPU kernels: C sources, built at first use (`loader`), called by plain functions (`bindings`)."""
