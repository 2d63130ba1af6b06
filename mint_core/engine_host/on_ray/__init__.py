"""Engines as actors of Ray, on any machine of its cluster.

    front --local sockets--> driver (this machine) --TLS--> agent (an actor) --pipe--> engine

The front knows nothing of Ray. Its driver is a process of its own: Ray ends a process that has lost
the cluster, and a front must live. What dies of the four ends that engine's life and no more; the
front's end is the end of all.
"""
