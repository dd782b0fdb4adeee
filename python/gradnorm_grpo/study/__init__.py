"""The study: many runs of one mixture under several arms and seeds, and what they say of the paper's questions."""
