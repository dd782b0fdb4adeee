"""Integrations with other trainers, which put the tracker, the sampler and the balancer on them.

Nothing here imports a trainer's library before it is needed.
"""
