"""Ranks as processes: one model cut among several, on one machine or more.

Rank 0 is the process that the user talks to: it tokenises, schedules and samples, and for every step sends the others one
message. All ranks then run the same graph and meet in its collectives. Between steps the others wait, for as long as it takes.

    world      who takes part          frames     what goes over the wire   compute_thread  runs this rank
    control    how ranks connect       group      collectives (gloo)          launch     ranks of this machine as processes
    start      coming together         monitor       rank 0 watches the others
    leader     rank 0's backend        rank_worker   every other rank         failures      which rank failed
"""

from __future__ import annotations
