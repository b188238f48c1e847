"""A language model as judge: Likert scores and pairwise comparisons of predictions."""
