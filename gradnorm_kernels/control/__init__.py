"""What acts on the estimates: task sampler, loss balancer, order of draws. No trainer is imported here."""
