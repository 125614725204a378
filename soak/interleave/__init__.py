# SPDX-License-Identifier: MIT
"""Walks the interleavings of tempo's calls, one bytecode at a time, and checks what came out."""
