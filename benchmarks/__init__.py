"""Benchmarks of quantplane: `python -m benchmarks [NAME ...]`.

Each figure stands beside a baseline that is measured in the same run, in turns with
it, because no machine is quiet: trust the ratios more than the rates. Everything is
on loopback, in processes of its own, and ends with the run.
"""
