# SPDX-License-Identifier: MIT
"""Soak harness of tempo: puts the dispatcher under sustained load and judges what came out.

Run it from the repository's root with ``python3 -m soak COMMAND``. The core needs nothing but the standard library, so
that it runs on a Raspberry Pi as it comes. One file a subject:

================  ==============================================================================
``__main__``      the table of commands
``cli``           one-line errors, argparse types for sizes and times, the same as text
``config``        the settings that all passes of one run share, and the file that tune leaves
``payloads``      what producers send: the telemetry mix, payloads of one size, timed probes
``drive``         the life of one pass: start, load, drain, shutdown; whatever hangs, it ends
``load``          the hot loops of producers and consumers, and what the probes tell
``census``        the pass in which every event is checked
``heap``          the pass under tracemalloc, and the bound for its peak
``calibration``   the same producers without a dispatcher: the yardstick
``interrupts``    Ctrl-C: the first ends a load and keeps the result, the second ends all
``display``       lines or a live display while it runs, and the stream of samples
``environment``   machine, interpreter, commit
``verdict``       pass, warn or fail, from plain figures
``results``       files that are never lost
``sinks``         the command of that name: places, servers, faults, read-back
``recipes``       what users copy
``interleave``    the command of that name
================  ==============================================================================

And a file a command: ``run``, ``stress``, ``tune``, ``baseline``, ``report`` (with ``charts``), ``pi`` (with
``debian``), ``bench`` (with ``benchmarks``), ``instructions``.
"""
