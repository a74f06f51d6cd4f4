"""Sequence ops: references, chunked torch forms, Triton and compiled CPU kernels, and the dispatcher."""
