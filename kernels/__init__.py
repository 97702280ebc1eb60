"""Triton kernels, one file per op. Importing this package imports no triton; importing one of its modules does."""

from __future__ import annotations
