"""Algorithm 1, and how its iterations are carried out."""
