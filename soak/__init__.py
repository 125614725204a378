# SPDX-License-Identifier: MIT
"""Soak harness of tempo: puts the dispatcher under sustained load and judges what came out.

Run it from the repository's root with ``python3 -m soak COMMAND``. It needs nothing but the standard library, so that
it runs on a Raspberry Pi as it comes. One file a subject:

=================  =====================================================================================
``options``        what all commands do alike: a bad option is one line, with exit code 2
``run``            the command: its options, its passes in order, the result put together
``config``         the settings that all passes of one run share
``units``          sizes and times as text, both ways
``payloads``       what producers send: the telemetry mix, payloads of one size, the timed probes in both
``crew``           threads whose errors are kept, and waits that end
``drive``          the life of one pass: start, load, drain, shutdown, always ended by a deadline
``load``           the hot loops of producers and consumers, and what the probes tell
``census``         the pass in which every single event is checked
``heap``           the pass under tracemalloc, and the bound that it is held against
``calibration``    the same producers with no dispatcher: what this machine can do at all
``interrupts``     Ctrl-C: the first ends a load and keeps the result, the second ends all
``spool``          a durable fallback in SQLite, for users to copy: no command, needs tempo alone
``sinks``          where consumers put batches
``progress``       samples while it runs: lines on stderr, a synced JSONL stream
``environment``    machine, interpreter, commit
``baseline``       recorded figures, and which of them a run may be compared with
``verdict``        pass, warn or fail, from plain figures
``results``        the result's files and the summary for people
``report``         the command: one HTML page and one picture of a run, from its result and its samples
``charts``         the pictures of a report, drawn by matplotlib
``bench``          the command: rounds of workers, the table, pyperf's JSON, the comparison with a baseline
``rows``           what the benchmark compares with what, and what is aimed at
``worker``         one round of one group of the benchmark, in a process of its own
``micro``          what a call costs on one thread, beside queues and the least that is possible
``handover``       from a producer's thread to a consumer's, beside other batchers
``overhead``       the command: what the harness's own looking takes of the rate
``instructions``   the command: machine instructions a payload, counted by valgrind, against the recorded ones
=================  =====================================================================================
"""
