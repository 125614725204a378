# SPDX-License-Identifier: MIT
"""Walks the interleavings of tempo's calls, one bytecode at a time, and checks what came out.

`schedule` stops real threads where it is told to, `scenes` sets up the states and the calls, and says what must hold,
`walk` goes through all of it, `twins` are broken copies of tempo that must be found.
"""
