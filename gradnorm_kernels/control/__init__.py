"""What acts on the estimates: the task sampler, the row draws and the loss balancer. Nothing here imports a trainer."""
