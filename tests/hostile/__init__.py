"""A tenant who sends the worst it can, and a neighbour who must not notice."""
