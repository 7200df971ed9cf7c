"""Ranks as processes: one model sharded over several, on one machine or more.

Rank 0, the leader, is the process that the user talks to: it tokenises, schedules and samples, and sends the other ranks, its
workers, one message for each run of a graph. All ranks then run that graph and take part in its collectives. Between runs the
workers wait, for as long as it takes.

    world      ranks and their places     protocol   messages on the wire       compute_thread  runs this rank's graphs
    control    how workers connect        group      collectives (gloo)         launch          ranks of this machine
    start      the start of all ranks     monitor    the leader's view of all   store           how ranks find each other
    leader     the leader's backend       rank_worker   every other rank        failures        failure reports
"""

from __future__ import annotations
