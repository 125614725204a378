# SPDX-License-Identifier: MIT
"""Walks the interleavings of tempo's calls, one bytecode at a time, and checks what came out.

`schedule` runs real threads one at a time and stops them, `scenes` sets up the states and says what must hold, `walk`
goes through all of it, and `twins` are broken copies of tempo that the walk must find.
"""
