# SPDX-License-Identifier: MIT
"""Soak harness of tempo: ``python3 -m soak COMMAND`` from the repository's root. One file a subject:

commands   ``run``, ``stress``, ``tune``, ``baseline``, ``report`` (with ``charts``), ``pi``, ``bench`` (with
           ``benchmarks``), ``instructions``, ``sinks`` and ``interleave`` (folders); the table is in ``__main__``
a load     ``config`` (its settings), ``payloads`` (what producers send), ``load`` (producers and consumers), ``drive``
           (start, load, drain, shutdown), ``census`` (every event checked), ``heap`` (under tracemalloc),
           ``calibration`` (without a dispatcher), ``interrupts`` (Ctrl-C)
its result ``verdict``, ``results`` (files), ``display`` (while it runs), ``environment`` (machine, interpreter, commit)
for both   ``cli`` (options and their errors), ``debian`` (packages fetched into a cache)
for users  ``recipes``

All but ``report``, ``bench`` and ``sinks`` need nothing but the standard library.
"""
