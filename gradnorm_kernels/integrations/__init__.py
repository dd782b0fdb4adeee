"""Other people's trainers: what attaches the tracker, the sampler and the balancer to them.

Nothing here imports a trainer's library before it is asked for.
"""
