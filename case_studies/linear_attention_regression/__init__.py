"""Linear self-attention learns linear regression (Zhang, Frei and Bartlett 2023)."""
