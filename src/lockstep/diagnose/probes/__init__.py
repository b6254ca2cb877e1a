"""What preflight looks at, a subject per module: `probe_x` finds the facts on a rank, `judge_x` says what they mean.

A probe returns a dict of plain values. A judge reads the facts of all ranks, and nothing else.
"""
