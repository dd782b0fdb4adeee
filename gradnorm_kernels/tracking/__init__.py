"""Behind the tracker: which layers, which rows belong to whom, how gradients are captured and turned into Grams."""
